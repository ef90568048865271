"""Progressive pruning: in rounds on a fixed grid of levels, with heads scored anew on what the rounds before left.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.pruning import mask_heads, masked_copy, remove_heads
from pruning_comparison.scoring import HeadScores
from pruning_comparison.selection import Scope, select_heads

ROUND_LEVEL = 10.0
"""Per cent of the heads that a round takes out."""


@dataclass(frozen=True)
class Round:
    """What a round left: the level it reached, the heads that stay (bool [L, H]), and the scores that chose them.

    ``model`` is the physically pruned model.
    """

    level: float
    keep: Tensor
    scores: HeadScores
    model: PreTrainedModel


class ProgressiveTrajectory:
    """The path of a model from level 0 up, in rounds of ``ROUND_LEVEL`` that do not depend on the levels asked for.

    So a level means the same in every run. One that is off the grid branches off from the last round before it and leaves
    the path itself alone. After each round heads are scored anew on what is left.
    """

    def __init__(
        self, dense: PreTrainedModel, *, score: Callable[[PreTrainedModel], HeadScores], all_heads: Tensor, scope: Scope
    ) -> None:
        """``score`` ranks the heads of a full-size model, in which those that have left are masked; ``all_heads`` [L, H]."""
        self._dense = dense
        self._score = score
        self._scope: Scope = scope
        self._start = Round(0.0, all_heads, score(dense), dense)
        self._reached = self._start

    def at(self, level: float) -> Round:
        """The model at ``level`` per cent. Rising levels go on from the last round; a lower one begins anew."""
        if level < self._reached.level:
            self._reached = self._start
        for target in _grid_up_to(level):
            if target > self._reached.level:
                self._reached = self._next(self._reached, target)
        return self._reached if self._reached.level == level else self._next(self._reached, level)

    def _next(self, reached: Round, level: float) -> Round:
        scores = self._scores_of(reached)
        keep = select_heads(scores.scores, level, self._scope, gone=~reached.keep)
        return Round(level, keep, scores, remove_heads(self._dense, keep))

    def _scores_of(self, reached: Round) -> HeadScores:
        if bool(reached.keep.all()):
            return self._score(self._dense)
        full_size = masked_copy(self._dense, reached.model, reached.keep)
        with mask_heads(full_size, reached.keep):
            return self._score(full_size)


def _grid_up_to(level: float) -> list[float]:
    """The levels of the rounds up to and including ``level``."""
    return [number * ROUND_LEVEL for number in range(1, int(level / ROUND_LEVEL) + 1)]
