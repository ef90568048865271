"""Two runs side by side: another model, method or machine, with the statistics of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, observations
from pruning_comparison.analysis.hypotheses import HYPOTHESIS_COLUMNS, HypothesisResult, hypothesis_table, make_result
from pruning_comparison.analysis.pairs import Source, complete_matrix, difference_cube
from pruning_comparison.analysis.random_effects import Array, Components, Fit, PValue, difference_test, fit_crossed
from pruning_comparison.metrics import METRICS

RUN_COLUMNS = (*HYPOTHESIS_COLUMNS, "variant", "level")


@dataclass(frozen=True)
class RunTables:
    """The tables of one run, and what to call it."""

    label: str
    model: str
    cells: pd.DataFrame
    measurements: pd.DataFrame


def compare_runs(first: RunTables, second: RunTables, *, seed: int = 0) -> pd.DataFrame:
    """The second run against the first, columns ``RUN_COLUMNS``: one row per method, variant, level, temperature, metric.

    Runs are paired by iteration and by document or prompt where they have those in common; else their means are compared.
    Methods are paired by name, or all with all where they share none. Perplexity per token is left out where the two
    models cut the same documents into other numbers of tokens, and what is judged by the dense model where the models
    differ. All rows are exploratory; each metric is one Holm family.
    """
    tables = [dict(observations(run.cells, run.measurements)) for run in (first, second)]
    methods = [sorted(set(run.cells["method"])) for run in (first, second)]
    shared = [name for name in methods[0] if name in methods[1]]
    pairs = [(name, name) for name in shared] or [(one, other) for one in methods[0] for other in methods[1]]
    source = Source(f"{second.model} vs {first.model}", first.cells, {}, second.label, first.label, seed)
    rows: list[HypothesisResult] = []
    for metric, record in METRICS.items():
        if not record.compared or record.direction == "none" or any(metric not in t for t in tables):
            continue
        one, other = tables[0][metric].table, tables[1][metric].table
        if first.model != second.model and "dense model" in record.alike:
            continue
        if record.kind == "loss" and "tokenizer" in record.alike and not _same_tokens(one, other):
            continue
        for names in pairs:
            rows += _run_rows(source, metric, one, other, names)
    return hypothesis_table(rows, RUN_COLUMNS)


def _same_tokens(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether the documents that two runs have in common have equally many tokens in both."""
    counts = [table.groupby("unit")["window_tokens"].max() for table in (one, other)]
    both = pd.concat(counts, axis=1, join="inner", keys=("one", "other"))
    return len(both) > 0 and bool((both["one"] == both["other"]).all())


def _run_rows(
    source: Source, metric: str, one: pd.DataFrame, other: pd.DataFrame, methods: tuple[str, str]
) -> list[HypothesisResult]:
    """Every variant, level and temperature that both runs have."""
    name = methods[0] if methods[0] == methods[1] else f"{methods[1]} vs {methods[0]}"
    groups = [_by_place(table[table["method"] == method]) for table, method in zip((one, other), methods, strict=True)]
    unit_name = METRICS[metric].cluster
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
            fit, test = fit_crossed(values), difference_test(values, unit_name, seed=source.seed)
        else:
            fit, test = _unpaired([_own_matrix(arm) for arm in arms])
        absent = "missing" if fit is None else "too little data" if fit.n < 2 else ""
        row = make_result(
            source, name, f"X:{metric}", metric, "second run against the first at one level", fit, test, absent,
            margin=math.nan, scale="log_ratio" if METRICS[metric].scale == "log" else "difference",
            temperature=math.nan if temperature < 0 else temperature, unit_name=unit_name,
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
    wide = arm.pivot_table(index="iteration", columns="unit", values="x", aggfunc="mean")
    names = arm.groupby("iteration")["model_id"].first().reindex(wide.index).astype(str).tolist()
    return complete_matrix(wide.to_numpy(dtype=np.float64), names)


def _unpaired(arms: Sequence[Array | None]) -> tuple[Fit | None, PValue]:
    """Difference of two independent means; degrees of freedom after Welch (1947)."""
    one, other = arms
    if one is None or other is None:
        return None, PValue(math.nan, math.nan, "none")
    fits = [fit_crossed(values) for values in (one, other)]
    variance = fits[0].variance + fits[1].variance
    spread = sum(fit.variance**2 / fit.df for fit in fits)
    parts = [fit.components for fit in fits]
    total = Components(
        parts[0].iterations + parts[1].iterations,
        parts[0].units + parts[1].units,
        parts[0].residual + parts[1].residual,
    )
    a, b = min(fit.iterations for fit in fits), min(fit.units for fit in fits)
    df = variance**2 / spread if spread > 0 else 1.0
    fit = Fit(fits[1].mean - fits[0].mean, variance, df, total, a, b)
    if min(fits[0].n, fits[1].n) < 2:
        return replace(fit, iterations=1, units=1), PValue(math.nan, math.nan, "none")
    return fit, PValue(fit.p_value(), 0.0, "Welch's t: the runs have no documents or prompts in common")
