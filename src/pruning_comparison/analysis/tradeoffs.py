"""Curves over levels: speed at equal perplexity, and how far a variant can be pruned. Pure functions on tidy tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pruning_comparison.analysis.estimates import MetricTable
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.pairs import Source
from pruning_comparison.analysis.random_effects import Array, Components, Fit, crossed_p_values, ratio_of

SIGNIFICANCE = 0.05

EQUAL_COLUMNS = (
    "model", "method", "perplexity", "baseline_level", "agency_level", "speed_ratio", "ci_low", "ci_high", "n", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class EqualSpeed:
    """Perplexities [T], the levels [2, T] where reference and variant have them, a fit for each, and one for the mean."""

    perplexities: Array
    levels: Array
    ratios: Sequence[Fit]
    mean: Fit


def speed_at_equal_perplexity(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
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
    source = Source(model, cells, tables, variant, reference)
    rows: list[list[Any]] = []
    for method in source.methods():
        found = equal_speed(source, method)
        if isinstance(found, str):
            rows.append([model, method, *[math.nan] * 6, 0, found])
            continue
        for index, fit in enumerate(found.ratios):
            ratio = fit.estimate().map(ratio_of)
            place = [model, method, found.perplexities[index], *found.levels[:, index]]
            reason = "too little data" if math.isnan(ratio.ci_low) else ""
            rows.append([*place, ratio.estimate, ratio.ci_low, ratio.ci_high, fit.n, reason])
    return pd.DataFrame(rows, columns=list(EQUAL_COLUMNS))


def equal_speed(source: Source, method: str) -> EqualSpeed | str:
    """The comparison at equal perplexity, or the reason why there is none."""
    levels = source.levels(method, 0.0)
    if len(levels) < 2 or levels[0] != 0:
        return "too little data"
    arms = (source.reference, source.variant)
    cubes = [_curves(source.data, metric, method, arms, levels) for metric in ("perplexity", "tokens_per_second")]
    common = sorted(cubes[0].keys() & cubes[1].keys())
    if not common:
        return "missing"
    # [2, L, a, b]: reference and variant, levels, iterations, documents or prompts
    losses, speeds = (_whole(np.stack([cube[key] for key in common], 2)) for cube in cubes)
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
    return EqualSpeed(np.exp(targets), where, fits[:-1], fits[-1])


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
    df = variance**2 / squares if squares > 0 else 1.0
    a, b = shape
    parts = Components(spreads[0][0] * a, (spreads[1][0] + spreads[2][0]) * b, 0.0)
    return Fit(float(mean), variance, df, parts, a, b)


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


def _curves(
    data: Mapping[str, MetricTable], metric: str, method: str, variants: Sequence[str], levels: Sequence[float]
) -> dict[int, Array]:
    """Per iteration the values [V, L, b] of each variant, NaN where missing.

    Where the unpruned model took part in every level's turns, they are relative to it: levels are timed one after the other,
    and between them a machine changes by more than models do.
    """
    if metric not in data:
        return {}
    table, dense = data[metric].table, data[metric].dense
    table = table[(table["method"] == method) & table["variant"].isin(variants)]
    if dense is not None:
        place = ["method", "level", "iteration", "cluster"]
        beside = dense.groupby(place, as_index=False)["x"].mean()
        both = table.merge(beside, on=place, how="left", suffixes=("", "_dense"))
        # At level 0 a variant is the unpruned model, which nothing has to be timed beside.
        table = both.assign(x=(both["x"] - both["x_dense"]).where(both["level"] > 0, 0.0))
    clusters = sorted(set(table["cluster"]))
    wide = table.pivot_table(index=["iteration", "variant", "level"], columns="cluster", values="x", aggfunc="mean")
    result = {}
    for iteration in sorted(set(table["iteration"])):
        keys = [(iteration, name, level) for name in variants for level in levels]
        rows = wide.reindex(index=pd.MultiIndex.from_tuples(keys), columns=clusters)
        result[int(iteration)] = rows.to_numpy(dtype=np.float64).reshape(len(variants), len(levels), len(clusters))
    return result


def _whole(values: Array) -> Array | None:
    """[V, L, a, b] without the clusters that have a hole; None if none is left."""
    whole = values[..., ~np.isnan(values).any((0, 1, 2))]
    return whole if whole.size else None


# The optimal level

OPTIMUM_COLUMNS = (
    "model", "method", "variant", "highest_level", "tolerance", "share", "knee_level", "levels", "n", "n_iterations",
    "n_clusters", "reason",
)  # fmt: skip
_RESAMPLES = 500


def optimal_levels(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How far each variant can be pruned, columns ``OPTIMUM_COLUMNS``, one row per method and variant.

    ``highest_level`` is the safe level: the last up to which the upper end of the 95 % interval of perplexity over the
    dense model's is at most 1 + the tolerance. Levels are tried upwards until one fails, so that no correction is needed
    among them: too high a level is called safe in at most 2.5 % of runs. ``share`` is the share of
    resamples of iterations and documents, crossed, in which the same rule ends at the same level. ``knee_level`` is where
    the share of the speed gained is furthest ahead of the share of the quality lost (Satopaa et al. 2011); NaN where it
    never is. A level without data ends the search, with the reason.
    """
    margins = margins or Margins()
    rows = []
    groups = cells.groupby(["method", "variant"], sort=True)
    for (method, variant), group in groups:
        found = _optimum(tables, str(method), str(variant), sorted(set(group["level"])), margins.tolerance, seed)
        rows.append({"model": model, "method": method, "variant": variant, "tolerance": margins.tolerance, **found})
    return pd.DataFrame(rows, columns=list(OPTIMUM_COLUMNS))


def _optimum(
    data: Mapping[str, MetricTable],
    method: str,
    variant: str,
    levels: list[float],
    tolerance: float,
    seed: int,
) -> dict[str, Any]:
    nothing = {"highest_level": math.nan, "share": math.nan, "knee_level": math.nan, "levels": "", "n": 0,
               "n_iterations": 0, "n_clusters": 0}  # fmt: skip
    curves = _curves(data, "perplexity", method, (variant,), levels)
    if not curves:
        return nothing | {"reason": "missing"}
    losses = np.stack(list(curves.values()), 2)[0]
    known = ~np.isnan(losses).all((1, 2))
    reached = len(known) if known.all() else int(np.argmin(known))
    if reached == 0:
        return nothing | {"reason": "missing"}
    reason = "" if reached == len(levels) else f"missing from level {levels[reached]:g} on"
    names = _identities(data["perplexity"].table, method, variant, list(curves), levels[:reached])
    losses = losses[:reached, :1] if len(set(names)) == 1 else losses[:reached]
    losses = losses[:, :, ~np.isnan(losses).any((0, 1))]
    _, a, b = losses.shape
    shape = {
        "levels": ",".join(f"{level:g}" for level in levels[:reached]),
        "n": a * b,
        "n_iterations": a,
        "n_clusters": b,
    }
    if a * b < 2 or reached < 2:
        return nothing | shape | {"reason": reason or "too little data"}
    excess = losses - losses[0]
    limit = math.log1p(tolerance)
    chosen = int(_last_within(excess[None], limit)[0])
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(a, size=(_RESAMPLES, a)), generator.integers(b, size=(_RESAMPLES, b))
    resampled = excess[:, rows[:, :, None], columns[:, None, :]].swapaxes(0, 1)
    share = float((_last_within(resampled, limit) == chosen).mean())
    knee = _knee(data, method, variant, levels[:reached], excess.mean((1, 2)))
    return shape | {"highest_level": levels[chosen], "share": share, "knee_level": knee, "reason": reason}


def _last_within(excess: Array, limit: float) -> NDArray[np.int64]:
    """Index [N] of the last level up to which the 95 % interval of the mean of [N, L, a, b] stays below the limit."""
    n, count, a, b = excess.shape
    flat = excess.reshape(n * count, a, b)
    within = (flat.mean((1, 2)) < limit) & (crossed_p_values(flat, limit) <= SIGNIFICANCE)
    return np.asarray(np.cumprod(within.reshape(n, count)[:, 1:], axis=1).sum(1))


def _identities(
    table: pd.DataFrame, method: str, variant: str, iterations: Sequence[int], levels: Sequence[float]
) -> list[str]:
    """What identifies each iteration's models."""
    rows = table[(table["method"] == method) & (table["variant"] == variant) & table["level"].isin(levels)]
    names = rows.groupby(["iteration", "level"])["model_id"].first().unstack("level")
    return ["|".join(row) for row in names.reindex(list(iterations)).fillna("").to_numpy()]


def _knee(data: Mapping[str, MetricTable], method: str, variant: str, levels: Sequence[float], losses: Array) -> float:
    curves = _curves(data, "tokens_per_second", method, (variant,), levels)
    speeds = _whole(np.stack(list(curves.values()), 2)) if curves else None
    if speeds is None or len(levels) < 3:
        return math.nan
    gain = speeds[0].mean((1, 2))
    gain, loss = gain - gain[0], losses - losses[0]
    if gain.max() <= 0 or loss.max() <= 0:
        return math.nan
    ahead = gain / gain.max() - loss / loss.max()
    best = int(ahead[1:].argmax()) + 1
    return levels[best] if ahead[best] > 0 else math.nan
