"""The four expectations and five questions, answered from the tables. Pure functions, deterministic under a seed.

Every answer is one number per pair of iteration and unit (a mean, a slope or an interaction over levels), so that one
model, that of crossed random effects, stands behind all of them. docs/decisions/0016-statistics.md gives the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from pruning_comparison.crossed import (
    Array,
    Components,
    EffectSize,
    Fit,
    PValue,
    difference_test,
    fit_crossed,
    holm,
    needed,
    standardised,
)
from pruning_comparison.measure.metrics import METRICS
from pruning_comparison.statistics import Observations, observations

ANSWER_COLUMNS = (
    "model", "method", "temperature", "id", "kind", "family", "contrast", "metric", "estimand", "scale",
    "estimate", "ci_low", "ci_high", "unit", "n", "n_iterations", "n_units", "unit_name",
    "p", "p_holm", "smallest_p", "test", "p_claim_holm",
    "effect_size", "effect_size_low", "effect_size_high", "effect_size_name",
    "margin", "better", "verdict", "reason", "more_iterations", "more_units",
)  # fmt: skip

SIGNIFICANCE = 0.05
PRIMARY = ("agency", "baseline")
QUALITY_LEVEL = 40.0
"""Expectations about quality are about levels from here on (per cent of the heads)."""
_MOST_MISSING = 0.1
_EFFECT_SIZE = "standardised paired difference"
_GAIN_METRICS = (
    "perplexity", "tokens_per_second", "first_token_latency_s", "distinct_2_distance", "generation_perplexity_distance",
)  # fmt: skip
_SORTED_METRICS = (
    "perplexity", "distinct_2_distance", "seq_rep_4_distance", "generation_perplexity_distance", "tokens_per_second",
    "first_token_latency_s", "time_per_output_token_s", "peak_memory_bytes",
)  # fmt: skip

Key = tuple[float, float]
"""(temperature, level); temperature is NaN where it does not apply, written as -1 in keys."""
Claim = Literal["better", "no difference", "worse"]


@dataclass(frozen=True)
class Margins:
    """Margins of relevance and of equivalence. Relative ones are shares (0.02 is 2 %), read as ratios on the log scale."""

    speed: float = 0.02
    quality: float = 0.05
    diversity: float = 0.02
    latency: float = 0.02
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and 0 <= value < 1):
                raise ValueError(f"margin {name} is {value!r}: give a share of at least 0 and below 1, such as 0.05")


@dataclass(frozen=True)
class _Answer:
    """One answer before the correction for multiplicity. ``bounds`` are the two ends of the margin, on the fit's scale."""

    labels: Mapping[str, Any]
    fit: Fit | None
    test: PValue
    bounds: tuple[float, float]
    sign: int
    either: bool
    absent: str


def suggested_claim(
    estimate: float, interval: tuple[float, float], bounds: tuple[float, float], sign: int
) -> tuple[Claim, float]:
    """What the estimate suggests, and the boundary it has to be clear of: (claim, boundary on the estimate's scale).

    ``sign`` is +1 where more is better, else -1. "better" has to clear the margin, "worse" has to clear zero, and "no
    difference" has to clear the nearer end of the margin from within.
    """
    inner, outer = (bounds[1], bounds[0]) if sign > 0 else (bounds[0], bounds[1])
    if sign * (estimate - inner) > 0:
        return "better", inner
    inside = bounds[0] < interval[0] and interval[1] < bounds[1]
    within = bounds[0] < estimate < bounds[1]
    if inside or (within and sign * estimate >= 0):
        return "no difference", min(inner, outer, key=lambda bound: abs(bound - estimate))
    return "worse", 0.0


def verdict(
    claim: Claim, boundary: float, interval: tuple[float, float], bounds: tuple[float, float], sign: int,
    p_holm: float, p_claim_holm: float,
) -> tuple[str, str]:  # fmt: skip
    """(verdict, reason): the claim if both its interval and its corrected p allow it, else "inconclusive".

    Differences need the corrected p of "no difference" too.
    """
    low, high = interval
    if claim == "no difference":
        clear = bounds[0] < low and high < bounds[1]
    else:
        clear = low > boundary if (sign > 0) == (claim == "better") else high < boundary
        clear = clear and p_holm <= SIGNIFICANCE
    if not (clear and p_claim_holm <= SIGNIFICANCE):
        return "inconclusive", "wide interval"
    return ("supported" if claim == "better" else "refuted"), claim


def answers(
    model: str,
    cells: pd.DataFrame,
    measurements: pd.DataFrame,
    *,
    margins: Margins | None = None,
    variant: str = "agency",
    reference: str = "baseline",
    seed: int = 0,
) -> pd.DataFrame:
    """E1 to E4, Q1 and Q3 to Q5 for every method (and temperature), columns ``ANSWER_COLUMNS``, one row per answer.

    All expectations of the run are one Holm family, all questions another. Contrasts other than agency against baseline
    are exploratory. What cannot be answered is a row all the same: inconclusive, with its reason.
    """
    margins = margins or Margins()
    source = _Source(model, cells, dict(observations(cells, measurements)), variant, reference, seed)
    rows: list[_Answer] = []
    for method in source.methods():
        rows += _expectations(source, method, margins)
    for method in source.methods():
        rows += _questions(source, method)
    return _table(rows)


# From tables to one number per pair


def _mean(levels: Array) -> Array:
    return np.full(len(levels), 1 / len(levels))


def _slope(levels: Array) -> Array:
    """Weights of the least-squares slope per 10 % of the heads."""
    centred = levels - levels.mean()
    return np.asarray(10 * centred / float((centred**2).sum()))


def curve_area(levels: Array, values: Array) -> Array:
    """Area under curves ``values`` [..., L] over ``levels`` [L] by trapezoids, divided by the range of levels.

    That is the mean height of the curve, so that areas of runs with other levels compare.
    """
    return np.asarray(np.trapezoid(values, levels, axis=-1) / (levels[-1] - levels[0]))


def curve_slope(levels: Array, values: Array) -> Array:
    """Least-squares slope of curves ``values`` [..., L] on ``levels`` [L], per 10 % of the heads."""
    return np.asarray(values @ _slope(levels))


@dataclass(frozen=True)
class _Sample:
    """One number per iteration and unit [a, b], or None; ``absent`` says why there is none, or that too many are missing."""

    values: Array | None
    absent: str = ""


@dataclass(frozen=True)
class _Source:
    """The tables of one contrast."""

    model: str
    cells: pd.DataFrame
    data: Mapping[str, Observations]
    variant: str
    reference: str
    seed: int
    _pairs: dict[str, pd.DataFrame] = field(default_factory=dict)

    def methods(self) -> list[str]:
        """Methods of which both variants were asked for."""
        by_variant = [
            set(self.cells.loc[self.cells["variant"] == name, "method"]) for name in (self.variant, self.reference)
        ]
        return sorted(by_variant[0] & by_variant[1])

    def asked(self, method: str) -> pd.DataFrame:
        """The cells of both variants, failed ones too."""
        of_both = self.cells["variant"].isin((self.variant, self.reference))
        return self.cells[of_both & (self.cells["method"] == method)]

    def levels(self, method: str, least: float) -> list[float]:
        levels = sorted({float(level) for level in self.asked(method)["level"]})
        return [level for level in levels if level >= least]

    def temperatures(self, metric: str, method: str) -> list[float]:
        pairs = self.pairs(metric, method)
        return sorted({float(value) for value in pairs["temperature"].dropna()})

    def pairs(self, metric: str, method: str) -> pd.DataFrame:
        if metric not in self._pairs:
            if metric not in self.data:
                columns = ["method", "level", "temperature", "iteration", "unit", "difference", "pair"]
                self._pairs[metric] = pd.DataFrame(columns=columns)
            else:
                self._pairs[metric] = self.data[metric].pairs(self.variant, self.reference)
        pairs = self._pairs[metric]
        return pairs[pairs["method"] == method]

    def sample(
        self,
        metric: str,
        method: str,
        levels: Sequence[float],
        weigh: Callable[[Array], Array] = _mean,
        *,
        temperatures: Sequence[float] = (math.nan,),
        heat: Sequence[float] = (1.0,),
        fewest: int = 1,
    ) -> _Sample:
        """The pairs' differences weighed over levels, and over temperatures by ``heat``.

        Levels at which nothing was measured are left out of the weights. Iterations that are the same by construction
        count once; units that are not complete are left out. With more than a tenth of the pairs missing the sample is
        marked: what is missing is seldom missing by chance.
        """
        pairs = self.pairs(metric, method)
        pairs = pairs.assign(temperature=pairs["temperature"].fillna(-1.0))
        heats = [-1.0 if math.isnan(value) else value for value in temperatures]
        found = pairs[pairs["level"].isin(levels) & pairs["temperature"].isin(heats)]
        if len(levels) < fewest:
            return _Sample(None, "too little data")
        counts = found.groupby("level")["temperature"].nunique()
        known = [level for level in levels if counts.get(level, 0) == len(heats)]
        if len(known) < fewest:
            return _Sample(None, "missing")
        units = set(pairs["unit"]) if metric not in self.data else self._units(metric, method)
        expected = self.asked(method)["iteration"].nunique() * len(units) * len(levels) * len(heats)
        absent = "missing" if len(found) < (1 - _MOST_MISSING) * expected else ""
        keys = [(temperature, level) for temperature in heats for level in known]
        cube, identities = _cube(found, keys)
        weights = np.outer(np.array(heat), weigh(np.array(known))).ravel()
        values = _complete(np.tensordot(weights, cube, axes=1), identities)
        return _Sample(None, "missing") if values is None else _Sample(values, absent)

    def _units(self, metric: str, method: str) -> set[Any]:
        table = self.data[metric].table
        chosen = table["variant"].isin((self.variant, self.reference)) & (table["method"] == method)
        return set(table.loc[chosen, "unit"])


def _cube(pairs: pd.DataFrame, keys: Sequence[Key]) -> tuple[Array, list[str]]:
    """Differences [K, a, b], NaN where missing, and what identifies each iteration [a]."""
    iterations, units = sorted(set(pairs["iteration"])), sorted(set(pairs["unit"]))
    layers, names = [], []
    for temperature, level in keys:
        layer = pairs[(pairs["temperature"] == temperature) & (pairs["level"] == level)]
        layers.append(
            layer.pivot_table(index="iteration", columns="unit", values="difference", aggfunc="mean")
            .reindex(index=iterations, columns=units)
            .to_numpy(dtype=np.float64)
        )
        names.append(layer.groupby("iteration")["pair"].first().reindex(iterations).astype(str).tolist())
    return np.stack(layers), ["|".join(parts) for parts in zip(*names, strict=True)]


def _complete(values: Array, identities: Sequence[str]) -> Array | None:
    """The matrix without repeated iterations and without holes: incomplete units go, or incomplete iterations."""
    first = [identities.index(name) == row for row, name in enumerate(identities)]
    values = values[first]
    values = values[~np.isnan(values).all(1)]
    whole = values[:, ~np.isnan(values).any(0)]
    if not whole.size:
        whole = values[~np.isnan(values).any(1)]
    return whole if whole.size else None


# The answers, one by one


def _expectations(source: _Source, method: str, margins: Margins) -> list[_Answer]:
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


def _questions(source: _Source, method: str) -> list[_Answer]:
    every, pruned = source.levels(method, 0.0), source.levels(method, 1e-9)
    rows = [
        _answer(
            source, method, "Q1", "perplexity", source.sample("perplexity", method, every, _slope, fewest=2),
            "difference of slopes of log perplexity per 10 % of the heads", scale="slope",
        )
    ]  # fmt: skip
    metric = "generation_perplexity_distance"
    temperatures = source.temperatures(metric, method)
    if len(temperatures) > 1:
        heat = _slope(np.array(temperatures)) / 10 * (temperatures[-1] - temperatures[0])
        sample = source.sample(metric, method, every, _slope, temperatures=temperatures, heat=list(heat), fewest=2)
    else:
        sample = _Sample(None, "too little data" if temperatures else "missing")
    rows.append(
        _answer(
            source, method, "Q3", metric, sample,
            "change, from the lowest to the highest temperature, of the difference of slopes of the distance of log "
            "generation perplexity from the dense model, per 10 % of the heads",
            scale="slope", either=True,
        )
    )  # fmt: skip
    for name in _GAIN_METRICS:
        if name in source.data:
            sample = _over_temperatures(source, name, method, pruned, _slope, 2)
            rows.append(
                _answer(
                    source, method, "Q4", name, sample, "slope over levels > 0 of the gain, per 10 % of the heads",
                    scale="slope", gain=True,
                )
            )  # fmt: skip
    effects = [
        _answer(
            source, method, "Q5", name, _over_temperatures(source, name, method, pruned, _mean, 1),
            "standardised gain, mean over levels > 0", scale="standardised", gain=True,
        )
        for name in _SORTED_METRICS
        if name in source.data
    ]  # fmt: skip
    rows += sorted(effects, key=lambda row: -_sortable(standardised(row.fit).estimate if row.fit else math.nan))
    return rows


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _over_temperatures(
    source: _Source, metric: str, method: str, levels: Sequence[float], weigh: Callable[[Array], Array], fewest: int
) -> _Sample:
    """Averaged over temperatures, where the metric has any."""
    heats = source.temperatures(metric, method) or [math.nan]
    share = [1 / len(heats)] * len(heats)
    return source.sample(metric, method, levels, weigh, temperatures=heats, heat=share, fewest=fewest)


def _answer(
    source: _Source,
    method: str,
    name: str,
    metric: str,
    sample: _Sample,
    estimand: str,
    *,
    margin: float = math.nan,
    scale: str = "",
    temperature: float = math.nan,
    gain: bool = False,
    either: bool = False,
) -> _Answer:
    """Fits and tests one sample. ``gain`` turns the sign so that more is better."""
    better = METRICS[metric].better
    values = sample.values
    if gain:
        values = None if values is None else (values if better == "higher" else -values)
        better = "higher"
    unit_name = "document" if metric in ("perplexity", "bits_per_byte") else "prompt"
    fit = None if values is None else fit_crossed(values)
    nothing = PValue(math.nan, math.nan, "none")
    test = nothing if values is None else difference_test(values, unit_name, seed=source.seed)
    absent = sample.absent or ("too little data" if fit is None or fit.n < 2 else "")
    if not scale:
        scale = "log_ratio" if METRICS[metric].log_scale else "difference"
    return _labelled(
        source, method, name, metric, estimand, fit, test, absent,
        margin=margin, scale=scale, temperature=temperature, unit_name=unit_name, better=better, either=either,
    )  # fmt: skip


def _labelled(
    source: _Source,
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
    unit_name: str,
    better: str,
    either: bool,
) -> _Answer:
    contrast = f"{source.variant} vs {source.reference}"
    kind, family = ("expectation", "expectations") if name.startswith("E") else ("question", "questions")
    if (source.variant, source.reference) != PRIMARY:
        kind, family = "exploratory", f"exploratory {family} ({contrast})"
    log_scale = METRICS[metric].log_scale
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
        "unit_name": unit_name, "margin": margin, "better": better,
    }  # fmt: skip
    return _Answer(labels, fit, test, bounds, 1 if better == "higher" else -1, either, absent)


def _table(rows: Sequence[_Answer]) -> pd.DataFrame:
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
            decision, reason = verdict(
                part.claim, part.boundary, part.interval, row.bounds, part.sign, p_holm, p_claim_holm
            )
            if row.either and decision == "supported" and part.sign != row.sign:
                reason = "worse"
            if decision == "inconclusive" and row.fit is not None and row.fit.variance == 0:
                reason = "too little data"
            elif decision == "inconclusive" and row.fit is not None:
                alpha = SIGNIFICANCE / max(tests[str(row.labels["family"])], 1)
                distance = abs(row.fit.mean - part.boundary)
                more = needed(distance, row.fit.components, row.fit.iterations, row.fit.units, alpha=alpha)
        fit, size = row.fit, part.effect
        estimate = math.nan if fit is None else size.estimate if row.labels["scale"] == "standardised" else fit.mean
        table.append(
            {
                **row.labels,
                "estimate": estimate, "ci_low": part.interval[0], "ci_high": part.interval[1],
                "n": fit.n if fit else 0, "n_iterations": fit.iterations if fit else 0, "n_units": fit.units if fit else 0,
                "p": row.test.p, "p_holm": p_holm, "smallest_p": row.test.smallest, "test": row.test.name,
                "p_claim_holm": p_claim_holm,
                "effect_size": size.estimate, "effect_size_low": size.low, "effect_size_high": size.high,
                "effect_size_name": _EFFECT_SIZE, "verdict": decision, "reason": reason,
                "more_iterations": more[0], "more_units": more[1],
            }
        )  # fmt: skip
    return pd.DataFrame(table, columns=list(ANSWER_COLUMNS))


@dataclass(frozen=True)
class _Decidable:
    claim: Claim
    boundary: float
    sign: int
    interval: tuple[float, float]
    p_claim: float
    effect: EffectSize


def _decidable(row: _Answer) -> _Decidable:
    """The claim that an answer suggests, and its p before correction."""
    if row.fit is None:
        nan = math.nan
        return _Decidable("worse", nan, row.sign, (nan, nan), nan, EffectSize(nan, nan, nan))
    effect = standardised(row.fit)
    shown = row.fit.estimate()
    interval = (shown.ci_low, shown.ci_high)
    sign = (1 if row.fit.mean > 0 else -1) if row.either else row.sign
    claim, boundary = suggested_claim(row.fit.mean, interval, row.bounds, sign)
    if row.labels["scale"] == "standardised":
        interval = (effect.low, effect.high)
    return _Decidable(claim, boundary, sign, interval, row.fit.p_value(boundary), effect)


def _by_family(p_values: Sequence[float], families: Sequence[str]) -> list[float]:
    result = [math.nan] * len(p_values)
    for family in dict.fromkeys(families):
        places = [index for index, name in enumerate(families) if name == family]
        for index, p in zip(places, holm([p_values[index] for index in places]), strict=True):
            result[index] = p
    return result


# Speed at equal perplexity

EQUAL_COLUMNS = (
    "model", "method", "perplexity", "baseline_level", "agency_level", "speed_ratio", "ci_low", "ci_high", "n", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class _Equal:
    """Perplexities [T], the levels [2, T] where reference and variant have them, a fit for each, and one for the mean."""

    perplexities: Array
    levels: Array
    ratios: Sequence[Fit]
    mean: Fit


def speed_at_equal_perplexity(
    model: str,
    cells: pd.DataFrame,
    measurements: pd.DataFrame,
    *,
    variant: str = "agency",
    reference: str = "baseline",
) -> pd.DataFrame:
    """How much faster the variant is where both have the same perplexity, columns ``EQUAL_COLUMNS``.

    Both curves are interpolated, log perplexity and log speed linearly in the level, at as many perplexities as there are
    levels above 0, equally spaced on the log scale from the dense model's (left out) to the highest that both reach.
    Nothing is extrapolated. Intervals are jackknifed over iterations, documents and prompts. One row with a reason where
    there is nothing to interpolate. ``baseline_level`` and ``agency_level`` are those of ``reference`` and ``variant``.
    """
    source = _Source(model, cells, dict(observations(cells, measurements)), variant, reference, 0)
    rows: list[list[Any]] = []
    for method in source.methods():
        found = _equal_speed(source, method)
        if isinstance(found, str):
            rows.append([model, method, *[math.nan] * 6, 0, found])
            continue
        for index, fit in enumerate(found.ratios):
            ratio = fit.estimate().map(math.exp)
            place = [model, method, found.perplexities[index], *found.levels[:, index]]
            reason = "too little data" if math.isnan(ratio.ci_low) else ""
            rows.append([*place, ratio.estimate, ratio.ci_low, ratio.ci_high, fit.n, reason])
    return pd.DataFrame(rows, columns=list(EQUAL_COLUMNS))


def _equal_answer(source: _Source, method: str, margins: Margins) -> _Answer:
    found = _equal_speed(source, method)
    fit = None if isinstance(found, str) else found.mean
    absent = found if isinstance(found, str) else "too little data" if found.mean.n < 2 else ""
    if fit is None or fit.n < 2:
        test = PValue(math.nan, math.nan, "none")
    else:
        test = PValue(fit.p_value(), 0.0, "Student's t with the jackknife's error")
    return _labelled(
        source, method, "E1p", "tokens_per_second", "mean over equal perplexities of the log ratio of tokens per second",
        fit, test, absent, margin=margins.speed, scale="log_ratio", temperature=math.nan, unit_name="prompt",
        better="higher", either=False,
    )  # fmt: skip


def _equal_speed(source: _Source, method: str) -> _Equal | str:
    """The comparison at equal perplexity, or the reason why there is none."""
    levels = source.levels(method, 0.0)
    if len(levels) < 2 or levels[0] != 0:
        return "too little data"
    cubes = [_curves(source, metric, method, levels) for metric in ("perplexity", "tokens_per_second")]
    if cubes[0] is None or cubes[1] is None:
        return "missing"
    common = sorted(cubes[0].keys() & cubes[1].keys())
    if not common:
        return "missing"
    # [2, L, a, b]: reference and variant, levels, iterations, documents or prompts
    losses, speeds = (_whole(np.stack([cube[key] for key in common], 2)) for cube in cubes if cube is not None)
    if losses is None or speeds is None or losses.shape[2] != speeds.shape[2]:
        return "missing"
    at = np.array(levels)
    point = _at_equal(losses.mean((2, 3)), speeds.mean((2, 3)), at)
    if point is None:
        return "no perplexity that both reach"
    targets, where, ratios = point
    spreads: list[tuple[Array, int]] = []
    for count, leave_out in (
        (losses.shape[2], lambda i: (np.delete(losses, i, 2), np.delete(speeds, i, 2))),
        (losses.shape[3], lambda i: (np.delete(losses, i, 3), speeds)),
        (speeds.shape[3], lambda i: (losses, np.delete(speeds, i, 3))),
    ):
        spreads.append((_jackknife(count, leave_out, at, len(ratios)), count))
    shape = (losses.shape[2], speeds.shape[3])
    fits = [
        _jackknife_fit(value, [(float(spread[index]), count) for spread, count in spreads], shape)
        for index, value in enumerate([*ratios, ratios.mean()])
    ]
    return _Equal(np.exp(targets), where, fits[:-1], fits[-1])


def _jackknife(count: int, leave_out: Callable[[int], tuple[Array, Array]], levels: Array, targets: int) -> Array:
    """Delete-one variances [T + 1] of the log ratios at each target and of their mean (Efron and Stein 1981)."""
    if count == 1:
        return np.zeros(targets + 1)
    replicates = []
    for index in range(count):
        losses, speeds = leave_out(index)
        found = _at_equal(losses.mean((2, 3)), speeds.mean((2, 3)), levels)
        ratios = np.full(targets, math.nan) if found is None else found[2]
        replicates.append([*ratios, ratios.mean()])
    values = np.array(replicates)
    return np.asarray((count - 1) / count * ((values - values.mean(0)) ** 2).sum(0))


def _jackknife_fit(mean: float, spreads: Sequence[tuple[float, int]], shape: tuple[int, int]) -> Fit:
    """Adds the three variances; degrees of freedom after Satterthwaite. The residual counts in each: conservative."""
    variance = sum(spread for spread, _ in spreads)
    squares = sum(spread**2 / (count - 1) for spread, count in spreads if count > 1)
    freedom = variance**2 / squares if squares > 0 else 1.0
    a, b = shape
    parts = Components(spreads[0][0] * a, (spreads[1][0] + spreads[2][0]) * b, 0.0)
    return Fit(float(mean), variance, freedom, parts, a, b)


def _at_equal(losses: Array, speeds: Array, levels: Array) -> tuple[Array, Array, Array] | None:
    """From curves [2, L] of log perplexity and log speed: targets [T], levels [2, T], log ratios of speed [T]."""
    top = float(losses.max(1).min())
    start = float(losses[:, 0].max())
    if not top > start:
        return None
    targets = start + (top - start) * np.arange(1, len(levels)) / (len(levels) - 1)
    where = np.array([[_highest_level(target, levels, curve) for target in targets] for curve in losses])
    speed = [np.interp(where[side], levels, speeds[side]) for side in (0, 1)]
    return targets, where, speed[1] - speed[0]


def _highest_level(target: float, levels: Array, losses: Array) -> float:
    """The highest level, interpolated, at which the loss is still within the target."""
    for right in range(len(levels) - 1, 0, -1):
        if losses[right] <= target:
            return float(levels[right])
        if losses[right - 1] <= target:
            share = (target - losses[right - 1]) / (losses[right] - losses[right - 1])
            return float(levels[right - 1] + share * (levels[right] - levels[right - 1]))
    return float(levels[0])


def _curves(source: _Source, metric: str, method: str, levels: Sequence[float]) -> dict[Any, Array] | None:
    """Per iteration the values [2, L, b] of reference and variant, NaN where missing; None if there are none at all."""
    if metric not in source.data:
        return None
    table = source.data[metric].table
    table = table[(table["method"] == method) & table["variant"].isin((source.variant, source.reference))]
    units = sorted(set(table["unit"]))
    wide = table.pivot_table(index=["iteration", "variant", "level"], columns="unit", values="x", aggfunc="mean")
    result = {}
    for iteration in sorted(set(table["iteration"])):
        keys = [(iteration, name, level) for name in (source.reference, source.variant) for level in levels]
        rows = wide.reindex(index=pd.MultiIndex.from_tuples(keys), columns=units)
        result[iteration] = rows.to_numpy(dtype=np.float64).reshape(2, len(levels), len(units))
    return result


def _whole(values: Array) -> Array | None:
    """[2, L, a, b] without the units that have a hole; None if none is left."""
    whole = values[..., ~np.isnan(values).any((0, 1, 2))]
    return whole if whole.size else None
