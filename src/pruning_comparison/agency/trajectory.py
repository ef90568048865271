"""Progressive pruning: in rounds on a fixed grid of levels, with heads scored, and asked, anew on what earlier rounds left.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.consent import Reply, States, head_states, negotiate, quota_of_level
from pruning_comparison.agency.signals import HeadSignals, cost_model, measure_signals, nats_weights, observe
from pruning_comparison.models.devices import fast_products
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import mask_heads, masked_copy, remove_heads
from pruning_comparison.scoring.scores import HeadScores
from pruning_comparison.spec import Scope

_T = TypeVar("_T")

ROUND_LEVEL = 10.0
"""Per cent of the heads that a round takes out."""


@dataclass(frozen=True)
class RoundRecord:
    """What a negotiated round was decided on, and how: signals and states before it, the replies of its heads.

    All of them are kept for as long as the path goes on, so none holds a cost model, which is as large as all attention.
    """

    level: float
    signals: HeadSignals
    states: States
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Round:
    """What a round left: the level it reached, the heads that stay (bool [L, H]), and the scores that chose them.

    ``model`` is the physically pruned model. ``round_records`` are those of all rounds so far, where heads were asked at
    all, and ``seconds`` what the rounds have taken.
    """

    level: float
    keep: Tensor
    scores: HeadScores
    model: PreTrainedModel
    round_records: tuple[RoundRecord, ...] = ()
    seconds: float = 0.0


class ProgressiveTrajectory:
    """The path of a model from level 0 up, in rounds of ``ROUND_LEVEL`` that do not depend on the levels asked for.

    So a level means the same in every run. One that is off the grid branches off from the last round before it and leaves
    the path itself alone. After each round heads are scored anew on what is left.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        *,
        score: Callable[[PreTrainedModel], HeadScores],
        all_heads: Tensor,
        scope: Scope,
        group_size: int = 1,
        scores_pruned: bool = False,
    ) -> None:
        """``score`` ranks the heads of a full-size model, in which those that have left are masked; ``all_heads`` [L, H].

        With ``scores_pruned`` it is handed the physically pruned model instead, which is faster; its scores keep their
        shape, and those of heads that have left count for nothing. Heads leave in groups of ``group_size``.
        """
        self._dense = dense
        self._score = score
        self._scope: Scope = scope
        self._group_size = group_size
        self._scores_pruned = scores_pruned
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
        scores = self._scores_on(reached)
        keep = select_heads(scores.scores, level, self._scope, gone=~reached.keep, group_size=self._group_size)
        return Round(level, keep, scores, remove_heads(self._dense, keep))

    def _scores_on(self, reached: Round) -> HeadScores:
        """The scores of the heads that a round has left."""
        return self._score(reached.model) if self._scores_pruned else self._of_full_size(reached, self._score)

    def _of_full_size(self, reached: Round, measure: Callable[[PreTrainedModel], _T]) -> _T:
        """``measure`` of the full-size model in which the lost heads are masked: scores keep their shape."""
        if bool(reached.keep.all()):
            return measure(self._dense)
        full_size = masked_copy(self._dense, reached.model, reached.keep)
        with mask_heads(full_size, reached.keep):
            return measure(full_size)


class NegotiatedTrajectory(ProgressiveTrajectory):
    """The path on which heads are asked to leave, and survivors adapt after every round.

    In each round the heads' signals, states and withdrawal costs are measured on the adapted model, heads are asked in the
    order of the method's scores, and those that consent, or are overridden, leave; see ``consent.negotiate``. The number
    that leaves is that of every other variant.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        *,
        score: Callable[[PreTrainedModel], HeadScores],
        importance: Callable[[PreTrainedModel], Tensor] | None,
        adapt: Callable[[PreTrainedModel], object],
        windows: Tensor,
        batch_size: int,
        all_heads: Tensor,
        scope: Scope,
        ridge: float = 0.1,
        everyone_consents: bool = False,
        exclude_first: bool = False,
        group_size: int = 1,
        scores_pruned: bool = False,
    ) -> None:
        """``importance`` gives the Fisher scores [L, H], summed over ``windows`` [N, T], of a full-size model; None where
        they are the method's own scores.

        ``adapt`` adapts a physically pruned model in place, between rounds; ``ridge`` is that of the withdrawal costs.
        ``everyone_consents`` is that of ``consent.negotiate``, ``exclude_first`` that of ``signals.observe``.
        """
        super().__init__(
            dense, score=score, all_heads=all_heads, scope=scope, group_size=group_size, scores_pruned=scores_pruned
        )
        self._importance = importance
        self._adapt = adapt
        self._windows = windows
        self._batch_size = batch_size
        self._ridge = ridge
        self._everyone_consents = everyone_consents
        self._exclude_first = exclude_first
        self._first_contributions: Tensor | None = None

    def _next(self, reached: Round, level: float) -> Round:
        started = time.perf_counter()
        scores = self._scores_on(reached)
        keep, round_record = self._ask(reached, level, scores)
        model = remove_heads(self._dense, keep)
        self._adapt(model)
        seconds = reached.seconds + time.perf_counter() - started
        return Round(level, keep, scores, model, (*reached.round_records, round_record), seconds)

    def _ask(self, reached: Round, level: float, scores: HeadScores) -> tuple[Tensor, RoundRecord]:
        """The heads that stay, and how that came about. What was observed, as large as all attention, is gone by then."""
        importance = scores.scores if self._importance is None else self._of_full_size(reached, self._importance)
        with fast_products(reached.model):
            seen = observe(
                reached.model,
                self._windows,
                keep=reached.keep,
                batch_size=self._batch_size,
                exclude_first=self._exclude_first,
            )
        weights = nats_weights(importance.masked_fill(~reached.keep, 0.0), self._windows.numel(), seen)
        costs = cost_model(seen, ridge=self._ridge, weights=weights)
        signals = measure_signals(seen, costs, ridge=self._ridge, importance=importance)
        if self._first_contributions is None:
            self._first_contributions = signals.contribution
        before = reached.round_records[-1].states if reached.round_records else None
        now = head_states(signals, before, start=self._first_contributions)
        negotiation = negotiate(
            scores.scores,
            costs,
            reached.keep,
            quota_of_level(level, reached.keep, self._scope, self._group_size),
            states=now,
            everyone_consents=self._everyone_consents,
            group_size=self._group_size,
        )
        return negotiation.keep, RoundRecord(level, signals, now, negotiation.replies)


def _grid_up_to(level: float) -> list[float]:
    """The levels of the rounds up to and including ``level``."""
    return [number * ROUND_LEVEL for number in range(1, int(level / ROUND_LEVEL) + 1)]
