"""Which heads leave, when, and how far that agrees between iterations, methods and variants. Pure: tables to tables.

The ``heads``, ``signals`` and ``replies`` tables are those of the journal, one row per head and cell (and round).
Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from pruning_comparison.analysis.random_effects import Array
from pruning_comparison.variants import variant_order

__all__ = [
    "AGREEMENT_COLUMNS",
    "SIGNALS",
    "HeadMap",
    "RoundMap",
    "agreement",
    "map_heads",
    "map_rounds",
]

SIGNALS = ("utilisation", "contribution", "alignment", "redundancy", "importance", "withdrawal_cost")
AGREEMENT_COLUMNS = (
    "kind", "level", "variant", "method", "other_variant", "other_method", "common", "chance", "score_correlation", "n",
)  # fmt: skip
Mask = np.ndarray[Any, np.dtype[np.bool_]]
_TRAJECTORY = ["variant", "method", "iteration"]


@dataclass(frozen=True)
class HeadMap:
    """The heads of one variant and method, over all iterations; every array is [L, H].

    ``gone_at`` is the lowest measured level at which the head has gone, the median over iterations (of two middle ones the
    lower); infinite where it stays. ``by_iteration`` [I, L, H] has the same per iteration. ``values`` holds the dense
    model's score and, where heads are asked, its signals, means over iterations. ``refused`` and ``overridden`` count the
    iterations in which the head refused at least once, or was overridden.
    """

    variant: str
    method: str
    levels: tuple[float, ...]
    gone_at: Array
    by_iteration: Array
    values: Mapping[str, Array]
    refused: Array
    overridden: Array
    asked: bool


@dataclass(frozen=True)
class RoundMap:
    """One round of one trajectory: the state of every head before it, and what those that were asked answered.

    ``words`` [L][H] is "consented", "refused" or "overridden" for heads that were asked, else the state.
    ``states`` [L][H] is the state alone.
    """

    variant: str
    method: str
    iteration: int
    level: float
    words: tuple[tuple[str, ...], ...]
    states: tuple[tuple[str, ...], ...] = field(repr=False)


def map_heads(heads: pd.DataFrame, signals: pd.DataFrame, replies: pd.DataFrame) -> list[HeadMap]:
    """One map per method and variant, methods in the table's order, baseline and agency first."""
    if heads.empty:
        return []
    shape = _shape(heads)
    found = []
    for method in heads["method"].drop_duplicates():
        ours = heads[heads["method"] == method]
        for variant in _ordered(ours["variant"].unique()):
            rows = ours[ours["variant"] == variant]
            levels = sorted(float(level) for level in rows["level"].unique())
            iterations = [_gone_at(part, shape) for _, part in rows.groupby("iteration", sort=True)]
            stacked = np.sort(np.stack(iterations), axis=0)
            dense = rows[rows["level"] == levels[0]]
            values = {"score": _mean_grid(dense, "score", shape)}
            heard = signals[(signals["method"] == method) & (signals["variant"] == variant)]
            if len(heard):
                first = heard[heard["round_level"] == heard["round_level"].min()]
                first = first.drop_duplicates(["iteration", "layer", "head"])
                values |= {name: _mean_grid(first, name, shape) for name in SIGNALS}
            answers = replies[(replies["method"] == method) & (replies["variant"] == variant)]
            found.append(
                HeadMap(
                    str(variant), str(method), tuple(levels), stacked[(len(stacked) - 1) // 2], np.stack(iterations),
                    values, _counted(answers, "refused", shape), _counted(answers, "overridden", shape), len(heard) > 0,
                )
            )  # fmt: skip
    return found


def map_rounds(signals: pd.DataFrame, replies: pd.DataFrame, *, iteration: int | None = None) -> list[RoundMap]:
    """Every round of the first iteration (or of the one given), by method, variant and level.

    A round is told as the highest level that was measured saw it: levels share the rounds before them.
    """
    if signals.empty:
        return []
    shape = _shape(signals)
    chosen = int(signals["iteration"].min()) if iteration is None else iteration
    found = []
    ours = signals[signals["iteration"] == chosen]
    for method in ours["method"].drop_duplicates():
        for variant in _ordered(ours.loc[ours["method"] == method, "variant"].unique()):
            keep = (ours["method"] == method) & (ours["variant"] == variant)
            rows = ours[keep]
            rows = rows[rows["level"] == rows["level"].max()]
            asked = replies[
                (replies["method"] == method) & (replies["variant"] == variant) & (replies["iteration"] == chosen)
            ]
            asked = asked[asked["level"] == rows["level"].max()]
            for level, part in rows.groupby("round_level", sort=True):
                states = [["withdrawn"] * shape[1] for _ in range(shape[0])]
                for layer, head, state in part[["layer", "head", "state"]].itertuples(index=False):
                    states[layer][head] = str(state)
                words = [list(row) for row in states]
                answered = asked[asked["round_level"] == level]
                for layer, head, answer in answered[["layer", "head", "answer"]].itertuples(index=False):
                    words[layer][head] = str(answer)
                found.append(
                    RoundMap(
                        str(variant), str(method), chosen, float(cast(float, level)),
                        tuple(tuple(row) for row in words), tuple(tuple(row) for row in states),
                    )
                )  # fmt: skip
    return found


def agreement(heads: pd.DataFrame) -> pd.DataFrame:
    """How far two choices of heads agree, columns ``AGREEMENT_COLUMNS``, at every level above 0.

    ``common`` is the share of the heads gone in one that are gone in the other as well (both have lost equally many), and
    ``chance`` what two random choices of that many heads would have in common: the share of heads gone.
    ``score_correlation`` is Spearman's rank correlation of the two scores of the dense model. All are means over ``n``
    pairs. Kinds: "iterations" of one variant and method, every pair; "methods" of one variant and "variants" of one method,
    of the same iteration.
    """
    gone: dict[tuple[str, str, float], dict[int, Mask]] = {}
    scores: dict[tuple[str, str], dict[int, Array]] = {}
    shape = _shape(heads) if len(heads) else (0, 0)
    for key, rows in heads.groupby([*_TRAJECTORY, "level"], sort=True):
        variant, method, iteration, level = cast(tuple[str, str, int, float], key)
        if level > 0:
            gone.setdefault((variant, method, float(level)), {})[int(iteration)] = _grid(rows, "kept", shape) == 0
        else:
            scores.setdefault((variant, method), {})[int(iteration)] = _grid(rows, "score", shape)
    found = []
    for (variant, method, level), sets in gone.items():
        pairs = [(sets[one], sets[two]) for one, two in combinations(sorted(sets), 2)]
        ranks = scores.get((variant, method), {})
        correlated = [_correlation(ranks[one], ranks[two]) for one, two in combinations(sorted(ranks), 2)]
        found.append(("iterations", level, variant, method, variant, method, *_common(pairs, correlated)))
    for (first, one), (second, two) in combinations(gone.items(), 2):
        if first[2] != second[2] or (first[0] != second[0] and first[1] != second[1]):
            continue
        kind = "methods" if first[0] == second[0] else "variants"
        shared = sorted(set(one) & set(two))
        ranks_one, ranks_two = scores.get(first[:2], {}), scores.get(second[:2], {})
        correlated = [_correlation(ranks_one[i], ranks_two[i]) for i in shared if i in ranks_one and i in ranks_two]
        pairs = [(one[i], two[i]) for i in shared]
        found.append((kind, first[2], *first[:2], *second[:2], *_common(pairs, correlated)))
    return pd.DataFrame([row for row in found if row[-1]], columns=list(AGREEMENT_COLUMNS))


def _common(pairs: Sequence[tuple[Mask, Mask]], correlated: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean share in common, mean of what chance gives, mean correlation, and the number of pairs."""
    if not pairs:
        return math.nan, math.nan, math.nan, 0
    shares = [float((one & two).sum() / max(1, min(one.sum(), two.sum()))) for one, two in pairs]
    by_chance = [float(max(one.mean(), two.mean())) for one, two in pairs]
    known = [value for value in correlated if not math.isnan(value)]
    correlation = float(np.mean(known)) if known else math.nan
    return float(np.mean(shares)), float(np.mean(by_chance)), correlation, len(pairs)


def _correlation(one: Array, two: Array) -> float:
    a, b = one.ravel(), two.ravel()
    usable = np.isfinite(a) & np.isfinite(b)
    if usable.sum() < 3 or np.ptp(a[usable]) == 0 or np.ptp(b[usable]) == 0:
        return math.nan
    return float(spearmanr(a[usable], b[usable]).statistic)


def _shape(table: pd.DataFrame) -> tuple[int, int]:
    return int(table["layer"].max()) + 1, int(table["head"].max()) + 1


def _grid(rows: pd.DataFrame, column: str, shape: tuple[int, int]) -> Array:
    grid = np.full(shape, np.nan)
    grid[rows["layer"].to_numpy(dtype=int), rows["head"].to_numpy(dtype=int)] = rows[column].to_numpy(dtype=float)
    return grid


def _mean_grid(rows: pd.DataFrame, column: str, shape: tuple[int, int]) -> Array:
    means = rows.groupby(["layer", "head"])[column].mean().reset_index()
    return _grid(means, column, shape)


def _gone_at(rows: pd.DataFrame, shape: tuple[int, int]) -> Array:
    grid = np.full(shape, np.inf)
    lowest = rows[rows["kept"] == 0].groupby(["layer", "head"])["level"].min().reset_index()
    grid[lowest["layer"].to_numpy(dtype=int), lowest["head"].to_numpy(dtype=int)] = lowest["level"].to_numpy(
        dtype=float
    )
    return grid


def _counted(replies: pd.DataFrame, answer: str, shape: tuple[int, int]) -> Array:
    grid = np.zeros(shape)
    rows = replies[replies["answer"] == answer].drop_duplicates(["iteration", "layer", "head"])
    np.add.at(grid, (rows["layer"].to_numpy(dtype=int), rows["head"].to_numpy(dtype=int)), 1.0)
    return grid


def _ordered(variants: Iterable[str]) -> list[str]:
    return sorted({str(variant) for variant in variants}, key=variant_order)
