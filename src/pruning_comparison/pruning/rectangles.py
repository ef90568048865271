"""Rectangles: layers that keep as many query heads in each key-value group that they keep. Pure functions.

A layer that keeps g groups of r query heads each is an ordinary grouped-query layer with smaller numbers: its attention
takes the fast path, its cache shrinks with every group that goes, and other engines know it. How many heads can leave at
all, which sets are best for a score, and which set of every layer costs least together.

Dimension letters: L layers, H heads of a layer, G key-value groups of R query heads each, H = G R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXACT_BITS = 52
"""Whole numbers of so many bits add up exactly in float64."""


@dataclass(frozen=True)
class Rectangle:
    """A set of heads that a layer may keep: as many of each of ``groups`` key-value groups, or none.

    ``kept`` are its heads, rising; ``cost`` is what the going of the others costs, lower = better, in whatever unit.
    """

    kept: tuple[int, ...]
    groups: int
    cost: float


def heads_kept(n_heads: int, rectangle: int) -> tuple[int, ...]:
    """How many of a layer's heads rectangles keep, rising: 0 and every g r. ``rectangle`` is R, heads per group."""
    groups = n_heads // rectangle
    return tuple(sorted({0, *(g * r for g in range(1, groups + 1) for r in range(1, rectangle + 1))}))


@cache
def numbers_leaving(n_layers: int, n_heads: int, rectangle: int) -> tuple[int, ...]:
    """Every number of heads, rising, that can leave ``n_layers`` layers together when each keeps a rectangle."""
    reached = 1  # Bit n: n heads can leave the layers so far.
    for _ in range(n_layers):
        before, reached = reached, 0
        for kept in heads_kept(n_heads, rectangle):
            reached |= before << (n_heads - kept)
    return tuple(number for number in range(n_layers * n_heads + 1) if reached >> number & 1)


def nearest_number_leaving(wanted: int, n_layers: int, n_heads: int, rectangle: int) -> int:
    """The number of ``numbers_leaving`` next to ``wanted``; of two, the smaller."""
    return min(numbers_leaving(n_layers, n_heads, rectangle), key=lambda number: (abs(number - wanted), number))


def is_rectangle(keep: Tensor, rectangle: int) -> bool:
    """Whether every layer of a keep mask, bool [L, H], keeps as many heads in each group of ``rectangle`` that it keeps."""
    live = keep.unflatten(1, (-1, rectangle)).sum(2)
    return all(len(set(row) - {0}) <= 1 for row in live.tolist())


def rectangles_by_score(scores: Tensor, rectangle: int, gone: Tensor | None = None) -> list[list[Rectangle]]:
    """For every layer the best set of each shape, g groups of r heads, by ``scores`` [L, H], higher = keep.

    The scores of the heads of a set are added up, so the best set of a shape is the r best heads of each group, of the
    g groups in which these add up to most. ``cost`` is the sum over the others, in steps of which the range of all
    scores has 2^39 or more: every score is rounded to one, so that sums are exact and equal sets tie on every machine.
    A constant added to all scores changes nothing. Of equals the lower-numbered heads leave first, as in
    ``select_heads``. Heads that are true in ``gone`` (bool [L, H]) are kept only by shapes that cannot do without them.
    """
    whole = _whole_numbers(scores.double().cpu())
    lost = torch.zeros(scores.shape, dtype=torch.bool) if gone is None else gone.cpu()
    found = []
    for row, absent in zip(whole.tolist(), lost.tolist(), strict=True):

        def better(head: int, row: list[float] = row, absent: list[bool] = absent) -> tuple[bool, float, int]:
            return absent[head], -row[head], -head

        groups = [
            sorted(range(first, first + rectangle), key=better) for first in range(0, len(row), rectangle)
        ]  # fmt: skip
        options = []
        for r in range(1, rectangle + 1):
            tops = [group[:r] for group in groups]
            tops.sort(
                key=lambda top: (
                    sum(absent[head] for head in top),
                    -sum(row[head] for head in top),
                    -(top[0] // rectangle),
                )
            )
            for g in range(1, len(groups) + 1):
                kept = sorted(head for top in tops[:g] for head in top)
                options.append(Rectangle(tuple(kept), g, sum(row) - sum(row[head] for head in kept)))
        found.append([Rectangle((), 0, sum(row)), *options])
    return found


def cheapest_rectangles(
    options: Sequence[Sequence[Rectangle]], leaving: int | Sequence[int], n_heads: int, gone: Tensor | None = None
) -> list[Rectangle]:
    """One of the ``options`` of every layer, so that exactly ``leaving`` heads leave at the least cost in all.

    ``leaving`` is a number for the whole model, or one for each layer (``--scope=layer``). By dynamic programming over the
    layers, from the last to the first, so no other choice costs less. Ties: more heads leave the earlier layers, then fewer
    key-value groups stay. Heads that are true in ``gone`` (bool [L, H]) come back only where the number cannot be met
    without them, and as few of them as can be. ValueError where no choice has that number.
    """
    absent = [set[int]()] * len(options) if gone is None else [set(row.nonzero().flatten().tolist()) for row in gone]
    if not isinstance(leaving, int):
        return [
            choice
            for one, number, back in zip(options, leaving, absent, strict=True)
            for choice in _programme([one], number, n_heads, [back])
        ]
    return _programme(options, leaving, n_heads, absent)


def keep_mask(chosen: Sequence[Rectangle], n_heads: int) -> Tensor:
    """bool [L, H]: the heads of one rectangle for every layer."""
    keep = torch.zeros(len(chosen), n_heads, dtype=torch.bool)
    for layer, rectangle in enumerate(chosen):
        keep[layer, list(rectangle.kept)] = True
    return keep


def _programme(
    options: Sequence[Sequence[Rectangle]], leaving: int, n_heads: int, absent: Sequence[set[int]]
) -> list[Rectangle]:
    # At k: the fewest heads that come back, and the least cost for so few, at which these layers lose k heads together.
    returned, paid = (np.full(leaving + 1, math.inf) for _ in range(2))
    returned[0] = paid[0] = 0.0
    taken: list[tuple[list[Rectangle], np.ndarray[Any, np.dtype[np.int64]]]] = []
    for layer, back in zip(reversed(options), reversed(absent), strict=True):
        # The first of equals is taken.
        ordered = sorted(layer, key=lambda one: (len(one.kept), one.groups))
        best_returned, best_paid = (np.full(leaving + 1, math.inf) for _ in range(2))
        best = np.full(leaving + 1, -1)
        for number, option in enumerate(ordered):
            lost = n_heads - len(option.kept)
            if lost > leaving:
                continue
            now_returned = returned[: leaving + 1 - lost] + len(back.intersection(option.kept))
            now_paid = paid[: leaving + 1 - lost] + option.cost
            so_far = best_returned[lost:]
            better = (now_returned < so_far) | ((now_returned == so_far) & (now_paid < best_paid[lost:]))
            best_returned[lost:][better] = now_returned[better]
            best_paid[lost:][better] = now_paid[better]
            best[lost:][better] = number
        returned, paid = best_returned, best_paid
        taken.append((ordered, best))
    if not math.isfinite(returned[leaving]):
        raise ValueError(f"no rectangles of {len(options)} layers of {n_heads} heads lose {leaving} heads together")
    chosen, left = [], leaving
    for ordered, best in reversed(taken):
        option = ordered[int(best[left])]
        chosen.append(option)
        left -= n_heads - len(option.kept)
    return chosen


def _whole_numbers(scores: Tensor) -> Tensor:
    """The scores as whole numbers of one step from the lowest on, so few that all of them add up exactly in float64."""
    largest = float(scores.abs().max())
    scaled = scores / largest if largest > 0 else scores
    scaled = scaled - scaled.min()
    span = float(scaled.max())
    if not span > 0:
        return torch.zeros_like(scores)
    return (scaled / span * 2.0 ** (_EXACT_BITS - scores.numel().bit_length())).round()
