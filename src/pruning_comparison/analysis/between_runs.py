"""Two runs side by side: what differs between them, what cannot be compared, and the rest with the statistics of one run.

Several runs are compared one by one with the first of them. A comparison of runs is made after the fact, so all of it is
exploratory; and two runs differ in whatever their manifests say they differ in, so no difference is put down to one cause.
Sentences are made in ``report.between_runs``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, observations
from pruning_comparison.analysis.hypotheses import HYPOTHESIS_COLUMNS, HypothesisResult, hypothesis_table, make_result
from pruning_comparison.analysis.pairs import Source, complete_matrix, difference_cube
from pruning_comparison.analysis.random_effects import Array, Components, Fit, PValue, difference_test, fit_crossed
from pruning_comparison.analysis.verdict_rules import level_of
from pruning_comparison.metrics import METRICS, Alike, Kind, of_kind
from pruning_comparison.spec import Revisions

RUN_COLUMNS = (*HYPOTHESIS_COLUMNS, "variant", "level")
Part = Literal["spec", "inputs", "model", "revisions", "versions", "hardware", "commit"]
"""Parts of a manifest in which two runs may differ."""
_PARTS: tuple[Part, ...] = ("spec", "inputs", "model", "revisions", "versions", "hardware")

LimitReason = Literal[
    "no method in common",
    "only in one run",
    "other evaluation text",
    "other tokens",
    "other prompts",
    "other text length",
    "other judge",
    "other tokenizer",
    "other batch size",
    "other formula",
    "other protocol",
    "another machine",
    "timed at another time",
]
Axis = Literal["method", "variant", "level", "temperature"]
_AXES: tuple[tuple[str, Axis], ...] = (
    ("pruning_methods", "method"),
    ("variants", "variant"),
    ("pruning_levels", "level"),
    ("temperatures", "temperature"),
)


@dataclass(frozen=True)
class RunTables:
    """The tables of one run and its manifest, and what to call it."""

    label: str
    model: str
    cells: pd.DataFrame
    measurements: pd.DataFrame
    manifest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One entry of the manifests that is not the same in both runs; None where a run does not have it."""

    part: Part
    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class OnlyIn:
    """A value of an axis that only one of two runs has."""

    axis: Axis
    value: Any
    run: Literal["first", "second"]


@dataclass(frozen=True)
class Limit:
    """Something that is not compared, or compared with a reservation.

    Metrics in ``left_out`` are left out altogether; those in ``reserved`` are compared with that reservation. ``only_in``
    belongs to the reason "only in one run".
    """

    reason: LimitReason
    left_out: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    only_in: OnlyIn | None = None


def manifest_part(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a manifest that is a mapping; empty where a run has recorded none."""
    part = manifest.get(name)
    return part if isinstance(part, Mapping) else {}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """What the manifests of two runs say differently: settings, contents, model, revisions, versions, machine, commit."""
    found: list[Difference] = []
    for part in _PARTS:
        one, other = manifest_part(first, part), manifest_part(second, part)
        if part == "revisions":
            found += _changed_revisions(revisions_in(first), revisions_in(second))
            continue
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                found.append(Difference(part, name, one.get(name), other.get(name)))
    if first.get("commit") != second.get("commit"):
        found.append(Difference("commit", "commit", first.get("commit"), second.get("commit")))
    return found


def _changed_revisions(one: Mapping[str, int], other: Mapping[str, int]) -> list[Difference]:
    """Revisions of what both runs have; a run that stored none differs from one that did in that alone."""
    if bool(one) != bool(other):
        return [Difference("revisions", "everything", *("recorded" if known else None for known in (one, other)))]
    both = [name for name in one if name in other]
    return [Difference("revisions", name, one[name], other[name]) for name in both if one[name] != other[name]]


def revisions_in(manifest: Mapping[str, Any]) -> dict[str, int]:
    """The revisions that a run's results rest on, by what each is of, such as "metric perplexity"; empty if not stored."""
    try:
        return Revisions.from_dict(manifest_part(manifest, "revisions")).named()
    except ValueError:
        return {}


def limits(first: RunTables, second: RunTables) -> list[Limit]:
    """What is not compared, or only with a reservation, and why."""
    return [
        *_only_in_one(first.manifest["spec"], second.manifest["spec"]),
        *_evaluation_limits(first, second),
        *_generation_limits(first.manifest, second.manifest),
        _speed_limit(first.manifest, second.manifest),
        *_revision_limits(first.manifest, second.manifest),
    ]


def same_tokens(first: RunTables, second: RunTables) -> bool:
    """Whether both runs scored the same windows with as many tokens and bytes in each, so that a token means the same."""
    return _window_sizes(first.measurements) == _window_sizes(second.measurements)


def other_machine(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the manifests name another machine, device, number of threads or version of torch."""
    one, other = manifest_part(first, "hardware"), manifest_part(second, "hardware")
    torch_versions = [manifest_part(manifest, "versions").get("torch") for manifest in (first, second)]
    return one != other or torch_versions[0] != torch_versions[1]


def _only_in_one(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Limit]:
    found = []
    sides: tuple[tuple[Mapping[str, Any], Mapping[str, Any], Literal["first", "second"]], ...] = (
        (one, other, "first"),
        (other, one, "second"),
    )
    for setting, axis in _AXES:
        if axis == "method" and not set(one[setting]) & set(other[setting]):
            found.append(Limit("no method in common"))
            continue
        for mine, theirs, run in sides:
            for value in mine[setting]:
                if value not in theirs[setting]:
                    found.append(Limit("only in one run", only_in=OnlyIn(axis, value, run)))
    return found


def _evaluation_limits(first: RunTables, second: RunTables) -> list[Limit]:
    contents = [manifest_part(run.manifest, "inputs").get("eval_text") for run in (first, second)]
    if contents[0] != contents[1]:
        return [Limit("other evaluation text", compared_metrics("loss", "divergence"))]
    if same_tokens(first, second):
        return []
    return [Limit("other tokens", _that_need("tokenizer", compared_metrics("loss", "divergence")))]


def compared_metrics(*kinds: Kind) -> tuple[str, ...]:
    """Metrics of these kinds by which two runs are compared."""
    return tuple(metric.name for metric in of_kind(*kinds) if metric.compared and metric.direction != "none")


def _that_need(what: Alike, metrics: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics that mean the same in two runs only where both have the same of it."""
    return tuple(metric for metric in metrics if what in METRICS[metric].alike)


def _generation_limits(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Limit]:
    of_generation = (*compared_metrics("text", "distance", "timing", "memory"), "prefill_flops")
    same_judge = manifest_part(one, "inputs").get("model") == manifest_part(other, "inputs").get("model")
    if manifest_part(one, "inputs").get("prompts") != manifest_part(other, "inputs").get("prompts"):
        judged = compared_metrics("divergence")
        return [Limit("other prompts", of_generation), *([] if same_judge else [Limit("other judge", judged)])]
    found = []
    if one["spec"]["num_tokens"] != other["spec"]["num_tokens"]:
        found.append(Limit("other text length", _that_need("length", of_generation)))
    if not same_judge:
        found.append(Limit("other judge", _that_need("dense model", (*of_generation, *compared_metrics("divergence")))))
        found.append(Limit("other tokenizer", reserved=_that_need("tokenizer", of_generation)))
    return found


def _speed_limit(one: Mapping[str, Any], other: Mapping[str, Any]) -> Limit:
    """Timings are what a clock measured, and so what another machine measures differently."""
    timings = compared_metrics("timing")
    if one["spec"]["batch_size"] != other["spec"]["batch_size"]:
        return Limit("other batch size", (*timings, *compared_metrics("memory")))
    return Limit("another machine" if other_machine(one, other) else "timed at another time", reserved=timings)


def _revision_limits(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Limit]:
    """Figures of two formulas are not compared; those measured in two ways are, with that reservation."""
    revisions = [revisions_in(manifest) for manifest in (one, other)]
    changed = {name for name in set(revisions[0]) & set(revisions[1]) if revisions[0][name] != revisions[1][name]}
    metrics = tuple(name for name in METRICS if f"metric {name}" in changed)
    found = [Limit("other formula", metrics)] if metrics else []
    if "the protocol" in changed or bool(revisions[0]) != bool(revisions[1]):
        measured = compared_metrics("loss", "divergence", "text", "distance", "timing", "memory")
        found.append(Limit("other protocol", reserved=tuple(name for name in measured if name not in metrics)))
    return found


def _window_sizes(measurements: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    rows = measurements[measurements["metric"].isin(["window_tokens", "window_bytes"])]
    rows = rows.drop_duplicates(["document", "window", "metric"])
    keys = zip(rows["document"], rows["window"], rows["metric"], strict=True)
    return dict(zip(keys, rows["value"], strict=True))


def compare_runs(first: RunTables, second: RunTables, *, left_out: Collection[str] = ()) -> pd.DataFrame:
    """The second run against the first, columns ``RUN_COLUMNS``: one row per method, variant, level, temperature, metric.

    Runs are paired by iteration and by document or prompt where they have those in common; else their means are compared.
    Methods are paired by name, or all with all where they share none. Perplexity per token is left out where the two
    models cut the same documents into other numbers of tokens, and what is judged by the dense model where the models
    differ; so are the metrics in ``left_out``. All rows are exploratory; each metric is one Holm family.
    """
    tables = [observations(run.cells, run.measurements) for run in (first, second)]
    methods = [sorted(set(run.cells["method"])) for run in (first, second)]
    shared = [name for name in methods[0] if name in methods[1]]
    pairs = [(name, name) for name in shared] or [(one, other) for one in methods[0] for other in methods[1]]
    source = Source(f"{second.model} vs {first.model}", first.cells, {}, second.label, first.label)
    rows: list[HypothesisResult] = []
    for metric, record in METRICS.items():
        if (
            not record.compared
            or record.direction == "none"
            or metric in left_out
            or any(metric not in t for t in tables)
        ):
            continue
        one, other = tables[0][metric].table, tables[1][metric].table
        if first.model != second.model and "dense model" in record.alike:
            continue
        if record.kind in ("loss", "divergence") and "tokenizer" in record.alike and not _same_tokens(one, other):
            continue
        for names in pairs:
            rows += _run_rows(source, metric, one, other, names)
    return hypothesis_table(rows, RUN_COLUMNS, level=level_of("answers"))


def _same_tokens(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether the documents that two runs have in common have equally many tokens in both."""
    counts = [table.groupby("cluster")["window_tokens"].max() for table in (one, other)]
    both = pd.concat(counts, axis=1, join="inner", keys=("one", "other"))
    return len(both) > 0 and bool((both["one"] == both["other"]).all())


def _run_rows(
    source: Source, metric: str, one: pd.DataFrame, other: pd.DataFrame, methods: tuple[str, str]
) -> list[HypothesisResult]:
    """Every variant, level and temperature that both runs have."""
    name = methods[0] if methods[0] == methods[1] else f"{methods[1]} vs {methods[0]}"
    groups = [_by_place(table[table["method"] == method]) for table, method in zip((one, other), methods, strict=True)]
    cluster = METRICS[metric].cluster
    rows = []
    for variant, level, temperature in sorted(groups[0].keys() & groups[1].keys()):
        arms = [found[variant, level, temperature] for found in groups]
        renamed = [arm.assign(variant=label, method=name) for arm, label in zip(arms, ("first", "second"), strict=True)]
        table = pd.concat(renamed, ignore_index=True)
        paired = MetricTable(metric, table, METRICS[metric].scale == "log").pairs("second", "first")
        fit: Fit | None
        if len(paired):
            cube, identities = difference_cube(paired, [(temperature, level)])
            values = complete_matrix(cube[0], identities)
        else:
            values = None
        if values is not None:
            fit = fit_crossed(values)
            test = difference_test(fit)
        else:
            fit, test = _unpaired([_own_matrix(arm) for arm in arms])
        absent = "missing" if fit is None else "too little data" if fit.n < 2 else ""
        row = make_result(
            source, name, f"X:{metric}", metric, "second run against the first at one level", fit, test, absent,
            margin=math.nan, scale="log_ratio" if METRICS[metric].scale == "log" else "difference",
            temperature=math.nan if temperature < 0 else temperature, cluster=cluster,
            better=METRICS[metric].direction, either=False,
        )  # fmt: skip
        place = {"family": f"exploratory {metric}", "variant": variant, "level": level}
        rows.append(replace(row, labels={**row.labels, **place}))
    return rows


def _by_place(table: pd.DataFrame) -> dict[tuple[str, float, float], pd.DataFrame]:
    """Groups by (variant, level, temperature); temperature is -1 where it does not apply, as NaN is not equal to itself."""
    places = table.assign(temperature=table["temperature"].fillna(-1.0)).groupby(["variant", "level", "temperature"])
    return {cast(tuple[str, float, float], key): group for key, group in places}


def _own_matrix(arm: pd.DataFrame) -> Array | None:
    wide = arm.pivot_table(index="iteration", columns="cluster", values="x", aggfunc="mean")
    names = arm.groupby("iteration")["model_id"].first().reindex(wide.index).astype(str).tolist()
    return complete_matrix(wide.to_numpy(dtype=np.float64), names)


def _unpaired(arms: Sequence[Array | None]) -> tuple[Fit | None, PValue]:
    """Difference of two independent means; degrees of freedom after Welch (1947)."""
    one, other = arms
    if one is None or other is None:
        return None, PValue(math.nan, "none")
    fits = [fit_crossed(values) for values in (one, other)]
    variance = fits[0].variance + fits[1].variance
    spread = sum(fit.variance**2 / fit.df for fit in fits)
    parts = [fit.components for fit in fits]
    total = Components(
        parts[0].iterations + parts[1].iterations,
        parts[0].clusters + parts[1].clusters,
        parts[0].residual + parts[1].residual,
    )
    a, b = min(fit.iterations for fit in fits), min(fit.clusters for fit in fits)
    df = variance**2 / spread if spread > 0 else 1.0
    fit = Fit(fits[1].mean - fits[0].mean, variance, df, total, a, b)
    if min(fits[0].n, fits[1].n) < 2:
        return replace(fit, iterations=1, clusters=1), PValue(math.nan, "none")
    return fit, PValue(fit.p_value(), "Welch's t: the runs have no documents or prompts in common")
