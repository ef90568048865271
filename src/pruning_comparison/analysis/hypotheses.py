"""The four expectations and five questions, answered from the tables. Pure functions, deterministic under a seed.

Every answer is one number per pair of iteration and cluster (a mean, a slope or an interaction over levels), so that one
model, that of crossed random effects, stands behind all of them. docs/decisions/0016-statistics.md gives the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    holm,
    needed,
    standardised,
)
from pruning_comparison.analysis.tradeoffs import SIGNIFICANCE, equal_speed
from pruning_comparison.metrics import METRICS, in_role
from pruning_comparison.variants import PRIMARY

__all__ = [
    "CLAIM_LEVEL",
    "HYPOTHESIS_COLUMNS",
    "Claim",
    "HypothesisResult",
    "answer_hypotheses",
    "hypothesis_table",
    "make_result",
    "suggested_claim",
    "verdict",
]

HYPOTHESIS_COLUMNS = (
    "model", "method", "temperature", "id", "kind", "family", "contrast", "metric", "estimand", "scale",
    "estimate", "ci_low", "ci_high", "unit", "n", "n_iterations", "n_clusters", "cluster",
    "p", "p_holm", "smallest_p", "test", "p_claim_holm",
    "effect_size", "effect_size_low", "effect_size_high", "effect_size_name",
    "margin", "better", "verdict", "reason", "more_iterations", "more_clusters",
)  # fmt: skip

CLAIM_LEVEL = 0.025
"""A claim's own corrected p may be at most this: half of what is promised, because skewed data make small p too small."""
_EFFECT_SIZE = "standardised paired difference"

Claim = Literal["better", "no difference", "worse"]


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


def suggested_claim(estimate: float, inside: bool, bounds: tuple[float, float], sign: int) -> tuple[Claim, float]:
    """What the data suggest, and the boundary it has to be clear of: (claim, boundary on the estimate's scale).

    ``inside``: the interval lies within the margin's ends ``bounds``. ``sign`` is +1 where more is better, else -1.
    "better" has to clear the margin, "worse" has to clear zero, "no difference" the nearer end of the margin from within.
    """
    inner, outer = (bounds[1], bounds[0]) if sign > 0 else (bounds[0], bounds[1])
    if sign * (estimate - inner) > 0:
        return "better", inner
    within = bounds[0] < estimate < bounds[1]
    if inside or (within and sign * estimate >= 0):
        return "no difference", min(inner, outer, key=lambda bound: abs(bound - estimate))
    return "worse", 0.0


def verdict(claim: Claim, clear: bool, p_holm: float, p_claim_holm: float) -> tuple[str, str]:
    """(verdict, reason): the claim if both interval and corrected p allow it, else "inconclusive".

    ``clear``: the interval leaves out the claim's boundary. A difference needs the corrected p of "no difference" too.
    """
    allowed = clear and p_claim_holm <= CLAIM_LEVEL and (claim == "no difference" or p_holm <= SIGNIFICANCE)
    if not allowed:
        return "inconclusive", "wide interval"
    return ("supported" if claim == "better" else "refuted"), claim


def answer_hypotheses(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    variant: str = "agency",
    reference: str = "baseline",
    seed: int = 0,
) -> pd.DataFrame:
    """E1 to E4, Q1 and Q3 to Q5 for every method (and temperature), columns ``HYPOTHESIS_COLUMNS``, one row per answer.

    All expectations of the run are one Holm family, all questions another. Contrasts other than agency against baseline
    are exploratory. What cannot be answered is a row all the same: inconclusive, with its reason.
    """
    margins = margins or Margins()
    source = Source(model, cells, tables, variant, reference, seed)
    rows: list[HypothesisResult] = []
    for method in source.methods():
        rows += _expectations(source, method, margins)
    for method in source.methods():
        rows += _questions(source, method)
    return hypothesis_table(rows)


# The answers, one by one


def _expectations(source: Source, method: str, margins: Margins) -> list[HypothesisResult]:
    pruned, high = source.levels(method, 1e-9), source.levels(method, QUALITY_LEVEL)
    mean = "mean over levels {} of the log ratio of {}"
    rows = [
        _answer(
            source, method, "E1", "tokens_per_second", source.sample("tokens_per_second", method, pruned),
            mean.format("> 0", "tokens per second"), margin=margins.speed,
        ),
        _equal_answer(source, method, margins),
        _answer(
            source, method, "E2", "perplexity", source.sample("perplexity", method, high),
            mean.format(f">= {QUALITY_LEVEL:g}", "perplexity"), margin=margins.quality,
        ),
    ]  # fmt: skip
    for temperature in source.temperatures("distinct_2_distance", method) or [math.nan]:
        sample = source.sample("distinct_2_distance", method, high, temperatures=(temperature,))
        rows.append(
            _answer(
                source, method, "E3", "distinct_2_distance", sample,
                f"mean over levels >= {QUALITY_LEVEL:g} of the difference of distinct-2's distance from the dense model",
                margin=margins.diversity, temperature=temperature,
            )
        )  # fmt: skip
    rows.append(
        _answer(
            source, method, "E4", "first_token_latency_s", source.sample("first_token_latency_s", method, pruned),
            mean.format("> 0", "first-token latency"), margin=margins.latency,
        )
    )  # fmt: skip
    return rows


def _questions(source: Source, method: str) -> list[HypothesisResult]:
    every, pruned = source.levels(method, 0.0), source.levels(method, 1e-9)
    rows = [
        _answer(
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
        _answer(
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
                _answer(
                    source, method, "Q4", name, sample, "slope over levels > 0 of the gain, per 10 % of the heads",
                    scale="slope", gain=True,
                )
            )  # fmt: skip
    rows.append(
        _answer(
            source, method, "X:area", "perplexity", source.sample("perplexity", method, every, area_weights, fewest=2),
            "area between the curves of log perplexity over levels, divided by their range", scale="log_ratio",
        )
    )  # fmt: skip
    effects = [
        _answer(
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
        test = PValue(math.nan, math.nan, "none")
    else:
        test = PValue(fit.p_value(), 0.0, "Student's t with the jackknife's error")
    return make_result(
        source, method, "E1p", "tokens_per_second", "mean over equal perplexities of the log ratio of tokens per second",
        fit, test, absent, margin=margins.speed, scale="log_ratio", temperature=math.nan, cluster="prompt",
        better="higher", either=False,
    )  # fmt: skip


def _answer(
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
    gain: bool = False,
    either: bool = False,
) -> HypothesisResult:
    """Fits and tests one sample. ``gain`` turns the sign so that more is better."""
    better: str = METRICS[metric].direction
    values = sample.values
    if gain:
        values = None if values is None else (values if better == "higher" else -values)
        better = "higher"
    cluster = METRICS[metric].cluster
    fit = None if values is None else fit_crossed(values)
    nothing = PValue(math.nan, math.nan, "none")
    test = nothing if values is None else difference_test(values, cluster, seed=source.seed)
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
    kind, family = "exploratory", "exploratory"
    if not name.startswith("X:"):
        kind, family = QUESTIONS[name].kind, QUESTIONS[name].family
        if (source.variant, source.reference) != PRIMARY:
            kind, family = "exploratory", f"exploratory {family} ({contrast})"
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


def hypothesis_table(rows: Sequence[HypothesisResult], columns: Sequence[str] = HYPOTHESIS_COLUMNS) -> pd.DataFrame:
    """Corrects within families, decides, and says how much more data an open answer would take."""
    parts = [_decidable(row) for row in rows]
    families = [str(row.labels["family"]) for row in rows]
    corrected = _by_family([row.test.p for row in rows], families)
    corrected_claims = _by_family([part.p_claim for part in parts], families)
    tests = {
        name: sum(f == name and not math.isnan(row.test.p) for f, row in zip(families, rows, strict=True))
        for name in families
    }
    table = []
    for row, part, p_holm, p_claim_holm in zip(rows, parts, corrected, corrected_claims, strict=True):
        decision, reason = "inconclusive", row.absent
        more: tuple[float, float] = (math.nan, math.nan)
        if not row.absent:
            decision, reason = verdict(part.claim, part.clear, p_holm, p_claim_holm)
            if row.either and decision == "supported" and part.sign != row.sign:
                reason = "worse"
            if decision == "inconclusive" and row.fit is not None and row.fit.variance == 0:
                reason = "too little data"
            elif decision == "inconclusive" and row.fit is not None:
                alpha = CLAIM_LEVEL / max(tests[str(row.labels["family"])], 1)
                distance = abs(row.fit.mean - part.boundary)
                more = needed(distance, row.fit.components, row.fit.iterations, row.fit.clusters, alpha=alpha)
        fit, size = row.fit, part.effect
        estimate = math.nan if fit is None else size.estimate if row.labels["scale"] == "standardised" else fit.mean
        table.append(
            {
                **row.labels,
                "estimate": estimate, "ci_low": part.interval[0], "ci_high": part.interval[1],
                "n": fit.n if fit else 0, "n_iterations": fit.iterations if fit else 0,
                "n_clusters": fit.clusters if fit else 0,
                "p": row.test.p, "p_holm": p_holm, "smallest_p": row.test.smallest, "test": row.test.name,
                "p_claim_holm": p_claim_holm,
                "effect_size": size.estimate, "effect_size_low": size.low, "effect_size_high": size.high,
                "effect_size_name": _EFFECT_SIZE, "verdict": decision, "reason": reason,
                "more_iterations": more[0], "more_clusters": more[1],
            }
        )  # fmt: skip
    return pd.DataFrame(table, columns=list(columns))


@dataclass(frozen=True)
class _Decidable:
    claim: Claim
    boundary: float
    clear: bool
    sign: int
    interval: tuple[float, float]
    p_claim: float
    effect: EffectSize


def _decidable(row: HypothesisResult) -> _Decidable:
    """The claim that an answer suggests, and its p before correction."""
    if row.fit is None:
        nan = math.nan
        return _Decidable("worse", nan, False, row.sign, (nan, nan), nan, EffectSize(nan, nan, nan))
    effect, shown = standardised(row.fit), row.fit.estimate()
    inside = row.bounds[0] < shown.ci_low and shown.ci_high < row.bounds[1]
    sign = (1 if row.fit.mean > 0 else -1) if row.either else row.sign
    claim, boundary = suggested_claim(row.fit.mean, inside, row.bounds, sign)
    interval = (effect.low, effect.high) if row.labels["scale"] == "standardised" else (shown.ci_low, shown.ci_high)
    clear = inside if claim == "no difference" else not interval[0] <= boundary <= interval[1]
    return _Decidable(claim, boundary, clear, sign, interval, row.fit.p_value(boundary), effect)


def _by_family(p_values: Sequence[float], families: Sequence[str]) -> list[float]:
    result = [math.nan] * len(p_values)
    for family in dict.fromkeys(families):
        places = [index for index, name in enumerate(families) if name == family]
        for index, p in zip(places, holm([p_values[index] for index in places]), strict=True):
            result[index] = p
    return result
