"""The four expectations and five questions, answered from the tables. Pure functions, deterministic.

Every answer is one number per pair of iteration and cluster (a mean, a slope or an interaction over levels), so that one
model, that of crossed random effects, stands behind all of them. docs/decisions/0016-statistics.md gives the estimands, and
0023-what-a-run-may-claim.md the rules by which they are decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.pairs import Sample, Source, area_weights, mean_weights, slope_weights
from pruning_comparison.analysis.questions import QUALITY_LEVEL, QUESTIONS
from pruning_comparison.analysis.random_effects import (
    Array,
    EffectSize,
    Fit,
    PValue,
    difference_test,
    fit_crossed,
    needed,
    standardised,
)
from pruning_comparison.analysis.tradeoffs import equal_speed
from pruning_comparison.analysis.verdict_rules import (
    ANSWERED,
    ERROR_RATE,
    NO_DIFFERENCE,
    NOT_ENOUGH,
    SUPPORTED,
    Decision,
    decide,
    in_chains,
    level_of,
    p_of_decision,
)
from pruning_comparison.metrics import METRICS, in_role
from pruning_comparison.variants import DENSE, PRIMARY

__all__ = [
    "CHAINS",
    "HYPOTHESIS_COLUMNS",
    "HypothesisResult",
    "answer_hypotheses",
    "answer_pruning",
    "asked_of_a_method",
    "chains_of",
    "first_levels",
    "hypothesis_table",
    "make_result",
]

HYPOTHESIS_COLUMNS = (
    "model", "method", "temperature", "id", "kind", "family", "contrast", "metric", "estimand", "scale",
    "estimate", "ci_low", "ci_high", "unit", "n", "n_iterations", "n_clusters", "cluster",
    "p", "p_holm", "test", "claim_low", "claim_high", "claim_level",
    "effect_size", "effect_size_low", "effect_size_high", "effect_size_name",
    "margin", "better", "verdict", "reason", "more_iterations", "more_clusters",
)  # fmt: skip
"""``ci_low`` and ``ci_high`` are the ends of the 95 % interval; the verdict comes from ``claim_low`` and ``claim_high``,
those of the interval at 1 - ``claim_level``. ``p`` is that of no difference; ``p_holm`` that of the margin's favourable end,
corrected for everything that the run claims: at most 0.05 decides.
"""

CHAINS: Sequence[tuple[float, Sequence[tuple[str, str]]]] = (
    (0.4, (("E2", "perplexity"), ("Q5", "perplexity"), ("Q1", "perplexity"), ("Q4", "perplexity"))),
    (0.175, (("E1", "tokens_per_second"), ("Q5", "tokens_per_second"), ("Q4", "tokens_per_second"))),
    (0.175, (("E4", "first_token_latency_s"), ("Q5", "first_token_latency_s"), ("Q4", "first_token_latency_s"))),
    (0.1, (("Q5", "generation_perplexity_distance"), ("Q4", "generation_perplexity_distance"))),
    (0.1, (("E1p", "tokens_per_second"),)),
)
"""A method's chains of answers, each with its share of the method's error rate. Quality is the primary answer: it has the
largest share, and what it hands on decides the others. What is in no chain shares the rest, each answer for itself."""

_EFFECT_SIZE = "standardised paired difference"


@dataclass(frozen=True)
class HypothesisResult:
    """One answer before the correction for multiplicity. ``bounds`` are the two ends of the margin, on the fit's scale."""

    labels: Mapping[str, Any]
    fit: Fit | None
    test: PValue
    bounds: tuple[float, float]
    sign: int
    either: bool
    absent: str


def answer_hypotheses(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    variant: str = "agency",
    reference: str = "baseline",
    looks: int = 1,
) -> pd.DataFrame:
    """E1 to E4, Q1 and Q3 to Q5 for every method (and temperature), columns ``HYPOTHESIS_COLUMNS``, one row per answer.

    Every method is a family of its own, with quality as its primary answer, and the methods share the error rate evenly.
    ``looks``: how many times such a run is looked at before it ends, each at that part of the error rate. Contrasts other
    than agency against baseline are exploratory. What cannot be answered is a row all the same, with its reason.
    """
    margins = margins or Margins()
    source = Source(model, cells, tables, variant, reference)
    methods = source.methods()
    rows: list[HypothesisResult] = []
    for method in methods:
        rows += _expectations(source, method, margins)
    for method in methods:
        rows += _questions(source, method)
    tasks = any(METRICS[name].kind == "task" for name in tables)
    return hypothesis_table(rows, level=level_of("answers", looks, tasks=tasks) / max(len(methods), 1))


def answer_pruning(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    looks: int = 1,
) -> pd.DataFrame:
    """P1, does pruning make the model faster: one row per variant and method, columns ``HYPOTHESIS_COLUMNS``, one family."""
    margins = margins or Margins()
    rows = []
    for method, source in beside_dense(model, cells, tables):
        sample = source.sample("tokens_per_second", method, source.levels(method, 1e-9))
        rows.append(
            answer_of(
                source, method, "P1", "tokens_per_second", sample,
                "mean over levels > 0 of the log ratio of tokens per second", margin=margins.speed,
            )
        )  # fmt: skip
    return hypothesis_table(rows, level=level_of("faster", looks))


def beside_dense(model: str, cells: pd.DataFrame, tables: Mapping[str, MetricTable]) -> Iterator[tuple[str, Source]]:
    """Every method, and what a variant pruned by it and the unpruned model are compared by."""
    for method, variant in sorted(set(zip(cells["method"], cells["variant"], strict=True))):
        yield str(method), Source(model, cells, tables, str(variant), DENSE)


# The answers, one by one


def _expectations(source: Source, method: str, margins: Margins) -> list[HypothesisResult]:
    pruned, high = source.levels(method, 1e-9), source.levels(method, QUALITY_LEVEL)
    mean = "mean over levels {} of the log ratio of {}"
    rows = [
        answer_of(
            source, method, "E1", "tokens_per_second", source.sample("tokens_per_second", method, pruned),
            mean.format("> 0", "tokens per second"), margin=margins.speed,
        ),
        _equal_answer(source, method, margins),
        answer_of(
            source, method, "E2", "perplexity", source.sample("perplexity", method, high),
            mean.format(f">= {QUALITY_LEVEL:g}", "perplexity"), margin=margins.quality,
        ),
    ]  # fmt: skip
    for temperature in source.temperatures("distinct_2_distance", method) or [math.nan]:
        sample = source.sample("distinct_2_distance", method, high, temperatures=(temperature,))
        rows.append(
            answer_of(
                source, method, "E3", "distinct_2_distance", sample,
                f"mean over levels >= {QUALITY_LEVEL:g} of the difference of distinct-2's distance from the dense model",
                margin=margins.diversity, temperature=temperature,
            )
        )  # fmt: skip
    rows.append(
        answer_of(
            source, method, "E4", "first_token_latency_s", source.sample("first_token_latency_s", method, pruned),
            mean.format("> 0", "first-token latency"), margin=margins.latency,
        )
    )  # fmt: skip
    return rows


def _questions(source: Source, method: str) -> list[HypothesisResult]:
    every, pruned = source.levels(method, 0.0), source.levels(method, 1e-9)
    rows = [
        answer_of(
            source, method, "Q1", "perplexity", source.sample("perplexity", method, every, slope_weights, fewest=2),
            "difference of slopes of log perplexity per 10 % of the heads", scale="slope",
        )
    ]  # fmt: skip
    metric = "generation_perplexity_distance"
    temperatures = source.temperatures(metric, method)
    if len(temperatures) > 1:
        weights = slope_weights(np.array(temperatures)) / 10 * (temperatures[-1] - temperatures[0])
        sample = source.sample(
            metric,
            method,
            every,
            slope_weights,
            temperatures=temperatures,
            temperature_weights=list(weights),
            fewest=2,
        )
    else:
        sample = Sample(None, "too little data" if temperatures else "missing")
    rows.append(
        answer_of(
            source, method, "Q3", metric, sample,
            "change, from the lowest to the highest temperature, of the difference of slopes of the distance of log "
            "generation perplexity from the dense model, per 10 % of the heads",
            scale="slope", either=True,
        )
    )  # fmt: skip
    for name in in_role("tight resources"):
        if name in source.data:
            sample = _over_temperatures(source, name, method, pruned, slope_weights, 2)
            rows.append(
                answer_of(
                    source, method, "Q4", name, sample, "slope over levels > 0 of the gain, per 10 % of the heads",
                    scale="slope", gain=True,
                )
            )  # fmt: skip
    rows.append(
        answer_of(
            source, method, "X:area", "perplexity", source.sample("perplexity", method, every, area_weights, fewest=2),
            "area between the curves of log perplexity over levels, divided by their range", scale="log_ratio",
        )
    )  # fmt: skip
    effects = [
        answer_of(
            source, method, "Q5", name, _over_temperatures(source, name, method, pruned, mean_weights, 1),
            "standardised gain, mean over levels > 0", scale="standardised", gain=True,
        )
        for name in in_role("which metrics")
        if name in source.data
    ]  # fmt: skip
    rows += sorted(effects, key=lambda row: -_sortable(standardised(row.fit).estimate if row.fit else math.nan))
    return rows


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _over_temperatures(
    source: Source, metric: str, method: str, levels: Sequence[float], weigh: Callable[[Array], Array], fewest: int
) -> Sample:
    """Averaged over temperatures, where the metric has any."""
    temperatures = source.temperatures(metric, method) or [math.nan]
    share = [1 / len(temperatures)] * len(temperatures)
    return source.sample(
        metric, method, levels, weigh, temperatures=temperatures, temperature_weights=share, fewest=fewest
    )


def _equal_answer(source: Source, method: str, margins: Margins) -> HypothesisResult:
    found = equal_speed(source, method)
    fit = None if isinstance(found, str) else found.mean
    absent = found if isinstance(found, str) else "too little data" if found.mean.n < 2 else ""
    if fit is None or fit.n < 2:
        test = PValue(math.nan, "none")
    else:
        test = PValue(fit.p_value(), "Student's t with the jackknife's error")
    return make_result(
        source, method, "E1p", "tokens_per_second", "mean over equal perplexities of the log ratio of tokens per second",
        fit, test, absent, margin=margins.speed, scale="log_ratio", temperature=math.nan, cluster="prompt",
        better="higher", either=False,
    )  # fmt: skip


def answer_of(
    source: Source,
    method: str,
    name: str,
    metric: str,
    sample: Sample,
    estimand: str,
    *,
    margin: float = math.nan,
    scale: str = "",
    temperature: float = math.nan,
    better: str = "",
    gain: bool = False,
    either: bool = False,
) -> HypothesisResult:
    """Fits and tests one sample. ``better`` is what is claimed, the metric's own direction if empty; ``gain`` turns the sign
    so that more is better."""
    better = better or METRICS[metric].direction
    values = sample.values
    if gain:
        values = None if values is None else (values if better == "higher" else -values)
        better = "higher"
    cluster = METRICS[metric].cluster
    fit = None if values is None else fit_crossed(values)
    test = PValue(math.nan, "none") if fit is None else difference_test(fit)
    absent = sample.absent or ("too little data" if fit is None or fit.n < 2 else "")
    if not scale:
        scale = "log_ratio" if METRICS[metric].scale == "log" else "difference"
    return make_result(
        source, method, name, metric, estimand, fit, test, absent,
        margin=margin, scale=scale, temperature=temperature, cluster=cluster, better=better, either=either,
    )  # fmt: skip


def make_result(
    source: Source,
    method: str,
    name: str,
    metric: str,
    estimand: str,
    fit: Fit | None,
    test: PValue,
    absent: str,
    *,
    margin: float,
    scale: str,
    temperature: float,
    cluster: str,
    better: str,
    either: bool,
) -> HypothesisResult:
    contrast = f"{source.variant} vs {source.reference}"
    kind, family = "exploratory", f"exploratory: {method}, {contrast}"
    if name in QUESTIONS and QUESTIONS[name].kind == "pruning":
        kind, family = "pruning", "pruning"
    elif name in QUESTIONS and (source.variant, source.reference) == PRIMARY:
        kind, family = QUESTIONS[name].kind, method
    log_scale = METRICS[metric].scale == "log"
    unit = {
        "log_ratio": "log ratio",
        "difference": METRICS[metric].unit,
        "slope": "log ratio per 10 % of heads" if log_scale else "per 10 % of heads",
        "standardised": "standard deviation",
    }[scale]
    if math.isnan(margin):
        bounds = (0.0, 0.0)
    else:
        bounds = (math.log1p(-margin), math.log1p(margin)) if scale == "log_ratio" else (-margin, margin)
    labels = {
        "model": source.model, "method": method, "temperature": temperature, "id": name, "kind": kind, "family": family,
        "contrast": contrast, "metric": metric, "estimand": estimand, "scale": scale, "unit": unit,
        "cluster": cluster, "margin": margin, "better": better,
    }  # fmt: skip
    return HypothesisResult(labels, fit, test, bounds, 1 if better == "higher" else -1, either, absent)


def hypothesis_table(
    rows: Sequence[HypothesisResult],
    columns: Sequence[str] = HYPOTHESIS_COLUMNS,
    *,
    level: float,
    chains: Sequence[Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Corrects within families, each at ``level``, decides, and says how much more data an open answer would take.

    ``chains`` are places of ``rows``, all of one family, that are tested one after the other; those of ``CHAINS`` without.
    """
    intervals = [_intervals(row) for row in rows]
    corrected = _by_family(rows, level, chains)
    table = []
    for row, (shown, effect), (p, own_level) in zip(rows, intervals, corrected, strict=True):
        fit = row.fit
        decision = Decision(NOT_ENOUGH, math.nan, math.nan, math.nan)
        reason = row.absent
        more: tuple[float, float] = (math.nan, math.nan)
        if not row.absent and fit is not None:
            decision = decide(fit, row.bounds, row.sign, own_level, either=row.either)
            reason = _reason(row, fit, decision)
            if decision.verdict == NOT_ENOUGH and fit.variance > 0:
                distance = abs(fit.mean - _favourable(row))
                hard = own_level if own_level > 0 else level / len(rows)
                more = needed(distance, fit.components, fit.iterations, fit.clusters, alpha=hard)
        estimate = math.nan if fit is None else effect.estimate if row.labels["scale"] == "standardised" else fit.mean
        table.append(
            {
                **row.labels,
                "estimate": estimate, "ci_low": shown[0], "ci_high": shown[1],
                "n": fit.n if fit else 0, "n_iterations": fit.iterations if fit else 0,
                "n_clusters": fit.clusters if fit else 0,
                "p": row.test.p, "p_holm": min(1.0, p * ERROR_RATE / level), "test": row.test.name,
                "claim_low": decision.low, "claim_high": decision.high, "claim_level": decision.level,
                "effect_size": effect.estimate, "effect_size_low": effect.low, "effect_size_high": effect.high,
                "effect_size_name": _EFFECT_SIZE, "verdict": _as_asked(row, decision.verdict), "reason": reason,
                "more_iterations": more[0], "more_clusters": more[1],
            }
        )  # fmt: skip
    return pd.DataFrame(table, columns=list(columns))


def _as_asked(row: HypothesisResult, verdict: str) -> str:
    """Q5 asks which metrics, not whether: what is decided about one is an answer, to which side is in its reason."""
    return ANSWERED if row.labels["id"] == "Q5" and verdict != NOT_ENOUGH else verdict


def _favourable(row: HypothesisResult) -> float:
    """The end of the margin that a gain has to be beyond."""
    return row.bounds[1] if row.sign > 0 else row.bounds[0]


def _reason(row: HypothesisResult, fit: Fit, decision: Decision) -> str:
    if decision.verdict == NOT_ENOUGH:
        return "too little data" if fit.variance == 0 else "wide interval"
    if decision.verdict == NO_DIFFERENCE:
        return "no difference"
    if decision.verdict == SUPPORTED:
        return "better" if row.sign * fit.mean > 0 else "worse"
    harm = decision.high < 0 if row.sign > 0 else decision.low > 0
    return "worse" if harm else "no gain beyond the margin"


def _intervals(row: HypothesisResult) -> tuple[tuple[float, float], EffectSize]:
    """The 95 % interval that is shown, and the effect size."""
    if row.fit is None:
        nan = math.nan
        return (nan, nan), EffectSize(nan, nan, nan)
    effect, estimate = standardised(row.fit), row.fit.estimate()
    if row.labels["scale"] == "standardised":
        return (effect.low, effect.high), effect
    within = METRICS[row.labels["metric"]].bounds if row.labels["scale"] == "difference" else None
    shown = estimate if within is None else estimate.within(within[0] - within[1], within[1] - within[0])
    return (shown.ci_low, shown.ci_high), effect


def _by_family(
    rows: Sequence[HypothesisResult], level: float, given: Sequence[Sequence[int]] | None = None
) -> list[tuple[float, float]]:
    """Per answer the corrected p at which it is decided, and the level at which it is tested; NaN where absent.

    What is absent is skipped in its chain, but a chain that is absent keeps its share: which answers there are must not
    decide how sure the others have to be.
    """
    result = [(math.nan, math.nan)] * len(rows)
    families = [str(row.labels["family"]) for row in rows]
    for family in dict.fromkeys(families):
        members = [index for index, name in enumerate(families) if name == family]
        here = [rows[index] for index in members]
        chains, weights = chains_of([(str(row.labels["id"]), str(row.labels["metric"])) for row in here])
        if given is not None:
            chains, weights = [list(chain) for chain in given], [1 / len(given)] * len(given)
        chains = [[place for place in chain if not here[place].absent] or chain[:1] for chain in chains]
        p = [1.0 if row.fit is None or row.absent else p_of_decision(row.fit, row.bounds, row.sign) for row in here]
        adjusted, levels = in_chains(np.array([p]), chains, weights, level)
        for index, row, corrected, own in zip(members, here, adjusted[0], levels[0], strict=True):
            if not row.absent:
                result[index] = (float(corrected), float(own))
    return result


def asked_of_a_method(temperatures: int, metrics: Collection[str]) -> list[tuple[str, str]]:
    """Every answer that a method's family holds, as (id, metric), with so many temperatures and these metrics measured."""
    names = [("E1", "tokens_per_second"), ("E1p", "tokens_per_second"), ("E2", "perplexity")]
    names += [("E3", "distinct_2_distance")] * temperatures
    names += [("E4", "first_token_latency_s"), ("Q1", "perplexity")]
    names += [("Q3", "generation_perplexity_distance")] if temperatures > 1 else []
    names += [("Q4", name) for name in in_role("tight resources") if name in metrics]
    return [*names, *(("Q5", name) for name in in_role("which metrics") if name in metrics)]


def first_levels(names: Sequence[tuple[str, str]], level: float) -> list[float]:
    """The level at which each answer of a family is tested before any other is decided; 0 behind another of its chain."""
    chains, weights = chains_of(names)
    found = [0.0] * len(names)
    for chain, weight in zip(chains, weights, strict=True):
        found[chain[0]] = level * weight / sum(weights)
    return found


def chains_of(names: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[float]]:
    """Chains of answers named by (id, metric), as indices, and their weights; answers that are absent are skipped."""
    chains, weights = [], []
    left = set(range(len(names)))
    for weight, chain in CHAINS:
        present = [names.index(name) for name in chain if name in names]
        if present:
            chains.append(present)
            weights.append(weight)
            left -= set(present)
    rest = 1 - sum(weight for weight, _ in CHAINS)
    return [*chains, *([index] for index in sorted(left))], [*weights, *[rest / len(left) for _ in left]]
