"""Which method is best, which variant is best, and is it better than chance: paired contrasts of all pairs, one family."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, fit_of
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.questions import QUALITY_LEVEL
from pruning_comparison.analysis.random_effects import CrossedFit, Estimate, ratio_of
from pruning_comparison.analysis.verdict_rules import (
    ERROR_RATE,
    NO_DIFFERENCE,
    NOT_ENOUGH,
    REFUTED,
    SUPPORTED,
    decide,
    in_chains,
    level_of,
)

__all__ = ["BETTER", "NO_CONTROL", "RANDOM", "RANKING_COLUMNS", "WORSE", "rank_methods", "rank_variants"]

RANKING_COLUMNS = (
    "model", "compared", "within", "rank", "name", "metric", "levels", "estimate", "ci_low", "ci_high", "n",
    "next_name", "next_estimate", "next_ci_low", "next_ci_high", "p", "p_holm", "decided",
    "versus_random_estimate", "versus_random_ci_low", "versus_random_ci_high", "versus_random_p_holm",
    "versus_random_verdict",
)  # fmt: skip

RANDOM = "random"
"""The control: a method that chance ranks."""
BETTER, WORSE, NO_CONTROL = "better", "worse", "no random control"
METRIC = "perplexity"
Compared = Literal["method", "variant"]


def rank_methods(
    model: str, tables: Mapping[str, MetricTable], *, margins: Margins | None = None, looks: int = 1
) -> pd.DataFrame:
    """Methods within each variant, best first, columns ``RANKING_COLUMNS``.

    ``estimate`` is perplexity over the dense model's, the mean over levels from 40 % on (all above 0 where there are none)
    on the log scale; ``next_*`` is that of the next in rank over this one's, by pairs of the same iteration and document.
    ``decided``: this one beats the next after correction, for which all pairs of methods within any variant, and of variants
    within any method, are one Holm family. ``versus_random_verdict`` is "better" or "worse" where the corrected interval
    leaves out 1, "no meaningful difference" where it lies within the margin of quality, else "not enough data"; it is empty
    for the control itself and for variants.
    """
    return _rank(model, tables, "method", margins or Margins(), looks)


def rank_variants(
    model: str, tables: Mapping[str, MetricTable], *, margins: Margins | None = None, looks: int = 1
) -> pd.DataFrame:
    """Variants within each method, as ``rank_methods`` does it."""
    return _rank(model, tables, "variant", margins or Margins(), looks)


@dataclass(frozen=True)
class _Pair:
    """Two names within one group, and the fit of the first one's mean log perplexity less the second's."""

    first: str
    second: str
    fit: CrossedFit


@dataclass(frozen=True)
class _Group:
    """All names that are ranked against each other: their means over levels, each with its rows, and all pairs."""

    compared: Compared
    within: str
    means: Mapping[str, CrossedFit]
    pairs: Sequence[_Pair]
    levels: tuple[float, ...]


def _rank(
    model: str, tables: Mapping[str, MetricTable], compared: Compared, margins: Margins, looks: int
) -> pd.DataFrame:
    groups = [*_groups(tables, "method"), *_groups(tables, "variant")]
    tested = [(group, pair) for group in groups for pair in group.pairs if pair.fit.n > 1]
    level = level_of("rankings", looks)
    adjusted: dict[tuple[str, str, str, str], tuple[float, float]] = {}
    if tested:
        p = np.array([[pair.fit.p_value() for _, pair in tested]])
        corrected, levels = in_chains(p, [[index] for index in range(len(tested))], [1.0] * len(tested), level)
        for (group, pair), one, own in zip(tested, corrected[0], levels[0], strict=True):
            scaled = min(1.0, float(one) * ERROR_RATE / level)
            adjusted[group.compared, group.within, pair.first, pair.second] = (scaled, float(own))
    rows = [row for group in groups if group.compared == compared for row in _rows(model, group, adjusted, margins)]
    return pd.DataFrame(rows, columns=list(RANKING_COLUMNS))


def _groups(tables: Mapping[str, MetricTable], compared: Compared) -> list[_Group]:
    if METRIC not in tables:
        return []
    data = tables[METRIC]
    arms: dict[str, dict[str, pd.DataFrame]] = {}
    for variant in sorted(data.table["variant"].unique()):
        for method, rows in data.pairs_with_dense(variant).groupby("method"):
            name, within = (str(method), variant) if compared == "method" else (variant, str(method))
            arms.setdefault(within, {})[name] = rows
    groups = [_group(compared, within, of_name) for within, of_name in sorted(arms.items())]
    return [group for group in groups if group is not None]


def _group(kind: Compared, within: str, arms: Mapping[str, pd.DataFrame]) -> _Group | None:
    """None where fewer than two have a level in common."""
    if len(arms) < 2:
        return None
    common = set.intersection(*({float(level) for level in rows["level"]} for rows in arms.values()))
    levels = tuple(sorted(level for level in common if level >= QUALITY_LEVEL) or sorted(common))
    if not levels:
        return None
    means = {name: _mean_over(rows, levels) for name, rows in arms.items()}
    fits = {name: fit for name, rows in means.items() if (fit := fit_of(rows, "difference", "pair")) is not None}
    pairs = []
    for first, second in itertools.combinations(sorted(fits), 2):
        both = means[first].merge(means[second], on=["iteration", "cluster"], suffixes=("", "_second"))
        both = both.assign(
            difference=both["difference"] - both["difference_second"], pair=both["pair"] + "|" + both["pair_second"]
        )
        fit = fit_of(both, "difference", "pair")
        if fit is not None:
            pairs.append(_Pair(first, second, fit))
    return _Group(kind, within, fits, pairs, levels) if len(fits) > 1 else None


def _mean_over(rows: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """Means over the levels of log perplexity over dense, by iteration and document; only where every level is there."""
    chosen = rows[rows["level"].isin(levels)].sort_values("level")
    by_place = chosen.groupby(["iteration", "cluster"], as_index=False)
    means = by_place.agg(difference=("difference", "mean"), pair=("pair", "|".join), count=("level", "size"))
    return means[means["count"] == len(levels)]


def _rows(
    model: str, group: _Group, adjusted: Mapping[tuple[str, str, str, str], tuple[float, float]], margins: Margins
) -> list[dict[str, Any]]:
    by_names: dict[tuple[str, str], tuple[CrossedFit, int, float, float]] = {}
    for pair in group.pairs:
        p_holm, own = adjusted.get((group.compared, group.within, pair.first, pair.second), (math.nan, math.nan))
        by_names[pair.first, pair.second] = (pair.fit, 1, p_holm, own)
        by_names[pair.second, pair.first] = (pair.fit, -1, p_holm, own)
    order = sorted(group.means, key=lambda name: (group.means[name].mean, name))
    rows = []
    for place, name in enumerate(order):
        shown = group.means[name].estimate().map(ratio_of)
        following = order[place + 1] if place + 1 < len(order) else None
        after = by_names.get((following, name)) if following is not None else None
        nothing = Estimate(math.nan, math.nan, math.nan, 0)
        beyond = nothing if after is None else _ratio(after[0], after[1])
        p, p_holm = (math.nan, math.nan) if after is None else (after[0].p_value(), after[2])
        rows.append(
            {
                "model": model, "compared": group.compared, "within": group.within, "rank": place + 1, "name": name,
                "metric": METRIC, "levels": ",".join(f"{level:g}" for level in group.levels),
                "estimate": shown.estimate, "ci_low": shown.ci_low, "ci_high": shown.ci_high, "n": shown.n,
                "next_name": following if after is not None else None, "next_estimate": beyond.estimate,
                "next_ci_low": beyond.ci_low, "next_ci_high": beyond.ci_high, "p": p, "p_holm": p_holm,
                "decided": bool(p_holm <= ERROR_RATE and beyond.estimate > 1),
                **_versus_random(group, name, by_names.get((name, RANDOM)), margins),
            }
        )  # fmt: skip
    return rows


def _ratio(fit: CrossedFit, sign: int) -> Estimate:
    """The ratio of a fit, or its inverse."""
    estimate = fit.estimate()
    if sign < 0:
        estimate = Estimate(-estimate.estimate, -estimate.ci_high, -estimate.ci_low, estimate.n)
    return estimate.map(ratio_of)


def _versus_random(
    group: _Group, name: str, against: tuple[CrossedFit, int, float, float] | None, margins: Margins
) -> dict[str, Any]:
    prefix = "versus_random_"
    verdict = ""
    if group.compared == "method" and name != RANDOM:
        verdict = NO_CONTROL if against is None else NOT_ENOUGH
    if group.compared != "method" or against is None:
        numbers = dict.fromkeys(("estimate", "ci_low", "ci_high", "p_holm"), math.nan)
        return {f"{prefix}{column}": value for column, value in numbers.items()} | {f"{prefix}verdict": verdict}
    fit, sign, p_holm, level = against
    ratio = _ratio(fit, sign)
    return {
        f"{prefix}estimate": ratio.estimate, f"{prefix}ci_low": ratio.ci_low, f"{prefix}ci_high": ratio.ci_high,
        f"{prefix}p_holm": p_holm, f"{prefix}verdict": control_verdict(fit, sign, level, margins.quality),
    }  # fmt: skip


def control_verdict(fit: CrossedFit, sign: int, level: float, margin: float) -> str:
    """Whether a method beats the control. ``fit``: mean log ratio to it, times ``sign``; less is better.

    Within the margin it is no difference that matters, even where it is clear which is lower.
    """
    within = decide(fit, (math.log1p(-margin), math.log1p(margin)), 1, level)
    if within.verdict == NO_DIFFERENCE:
        return NO_DIFFERENCE
    clear = decide(fit, (0.0, 0.0), -sign, level)
    return {SUPPORTED: BETTER, REFUTED: WORSE}.get(clear.verdict, NOT_ENOUGH)
