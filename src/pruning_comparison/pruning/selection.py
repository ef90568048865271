"""From scores and a level to the heads that stay. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pruning_comparison.pruning.rectangles import (
    Rectangle,
    cheapest_rectangles,
    keep_mask,
    nearest_number_leaving,
    rectangles_by_score,
)
from pruning_comparison.spec import SCOPES, Scope


def heads_to_prune(level: float, total: int) -> int:
    """Number of heads that a level (per cent, 0 to below 100) takes out of ``total``: round(level / 100 * total)."""
    if not 0 <= level < 100:
        raise ValueError(f"level must be at least 0 and below 100 per cent, got {level}")
    return round(level / 100 * total)


def select_heads(
    scores: Tensor,
    level: float,
    scope: Scope = "model",
    gone: Tensor | None = None,
    group_size: int = 1,
    rectangle: int | None = None,
) -> Tensor:
    """Keep mask, bool [L, H]: the lowest-scored heads leave.

    ``scores`` [L, H]: higher = keep. ``scope`` "model" ranks all heads together; "layer" takes the same share of every
    layer, rounded within it. Ties leave in order of layer, then head, so that equal scores give equal masks, and the masks
    of rising levels are nested. Heads that are true in ``gone`` (bool [L, H]) have left before and stay away, whatever their
    scores; they count towards the level. With a ``group_size``, that many heads which follow one another leave together:
    their scores are added up, and levels are rounded to whole groups.

    With a ``rectangle``, the query heads per key-value group, every layer keeps as many heads of each group that it keeps,
    those with the greatest sum of scores in all: see ``rectangles_by_score``. Such sets are not nested, and heads that are
    gone come back where the number cannot be met without them.

    ValueError if a score is not finite, if more heads are gone than may be, or if a part of a group is gone.
    """
    if not bool(torch.isfinite(scores).all()):
        bad = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"the score of head {tuple(bad)} is {scores[tuple(bad)].item()}; scores must be finite")
    if rectangle is not None:
        return select_rectangles(
            rectangles_by_score(scores, rectangle, gone), level, scope, rectangle, scores.shape[1], gone
        )
    ranked = scores.cpu().double().unflatten(1, (-1, group_size)).sum(2)
    if gone is not None:
        lost = gone.cpu().unflatten(1, (-1, group_size))
        if bool((lost.any(2) != lost.all(2)).any()):
            raise ValueError(f"a part of a group of {group_size} heads is gone; groups leave as a whole")
        ranked = ranked.masked_fill(lost.any(2), -math.inf)
    if scope == "model":
        keep = _drop_lowest(ranked.flatten(), level).view_as(ranked)
    elif scope == "layer":
        keep = torch.stack([_drop_lowest(layer, level) for layer in ranked])
    else:
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)}")
    keep = keep.repeat_interleave(group_size, 1)
    if gone is not None and bool((keep & gone.cpu()).any()):
        raise ValueError(f"{int(gone.sum())} heads are gone already, more than level {level} takes out")
    return keep


def select_rectangles(
    options: Sequence[Sequence[Rectangle]],
    level: float,
    scope: Scope,
    rectangle: int,
    n_heads: int,
    gone: Tensor | None = None,
) -> Tensor:
    """Keep mask, bool [L, H]: one of the ``options`` of every layer, the cheapest together at a level's number of heads.

    ``rectangle`` is the number of query heads per key-value group; see ``cheapest_rectangles``.
    """
    return keep_mask(
        cheapest_rectangles(
            options, leaving_of_level(level, len(options), n_heads, scope, rectangle=rectangle), n_heads, gone
        ),
        n_heads,
    )


def expected_heads_pruned(
    level: float, n_layers: int, n_heads: int, scope: Scope, group_size: int = 1, rectangle: int | None = None
) -> int:
    """What the rule of the scope asks for; a mask that differs is a bug and raises where it is used.

    In whole groups of ``group_size``, or the nearest number that rectangles allow: see ``leaving_of_level``.
    """
    leaving = leaving_of_level(level, n_layers, n_heads, scope, group_size, rectangle)
    return leaving if isinstance(leaving, int) else sum(leaving)


def leaving_of_level(
    level: float, n_layers: int, n_heads: int, scope: Scope, group_size: int = 1, rectangle: int | None = None
) -> int | list[int]:
    """How many heads a level takes out of the dense model, or of each layer where ``scope`` is "layer".

    A share of all heads, rounded: to whole groups of ``group_size``, or, with a ``rectangle``, to the nearest number that
    can leave when every layer keeps a rectangle, of two the smaller. It follows from the model's numbers alone, before any
    score is known.
    """
    layers = 1 if scope == "layer" else n_layers
    if rectangle is None:
        number = group_size * heads_to_prune(level, layers * (n_heads // group_size))
    else:
        number = nearest_number_leaving(heads_to_prune(level, layers * n_heads), layers, n_heads, rectangle)
    return [number] * n_layers if scope == "layer" else number


def _drop_lowest(scores: Tensor, level: float) -> Tensor:
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores.cpu(), stable=True)[: heads_to_prune(level, len(scores))]] = False
    return keep
