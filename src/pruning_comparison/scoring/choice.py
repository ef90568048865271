"""From what a method has found to the heads that stay: by scores, or by prices of what layers can keep.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning_comparison.pruning.selection import select_heads, select_rectangles
from pruning_comparison.scoring.scores import HeadScores
from pruning_comparison.spec import Scope


def heads_to_keep(
    scored: HeadScores,
    level: float,
    scope: Scope = "model",
    *,
    gone: Tensor | None = None,
    group_size: int = 1,
    rectangle: int | None = None,
) -> Tensor:
    """Keep mask, bool [L, H], at a level: by the prices of rectangles where the scores have them, else by the scores.

    Arguments as in ``select_heads``.
    """
    if rectangle is None or scored.rectangles is None:
        return select_heads(scored.scores, level, scope, gone, group_size, rectangle)
    return select_rectangles(scored.rectangles, level, scope, rectangle, scored.scores.shape[1], gone)


def scored_again(dense: HeadScores, again: HeadScores, gone: Tensor) -> HeadScores:
    """Scores on a model that has lost the heads true in ``gone`` (bool [L, H]), with the dense model's for these heads.

    Rectangles are not nested, so that heads which have left may have to come back; a model without them has no score for
    them. Their layers may then keep what they could in the dense model, at its prices.
    """
    scores = torch.where(gone.cpu(), dense.scores.cpu().double(), again.scores.cpu().double())
    rectangles = None
    if again.rectangles is not None and dense.rectangles is not None:
        rectangles = []
        for left, at_first, lost in zip(again.rectangles, dense.rectangles, gone.cpu(), strict=True):
            absent = set(lost.nonzero().flatten().tolist())
            rectangles.append([*left, *(one for one in at_first if absent.intersection(one.kept))])
    return HeadScores(scores, again.details, rectangles)
