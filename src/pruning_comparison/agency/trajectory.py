"""Pruning in rounds on a fixed grid of levels: heads scored anew on what earlier rounds left, or asked at today's prices.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.consent import Reply, States, head_states, negotiate, quota_of_level
from pruning_comparison.agency.moments import HeadMoments
from pruning_comparison.agency.rectangles import negotiate_rectangles
from pruning_comparison.agency.savings import Savings
from pruning_comparison.agency.signals import HeadSignals, measure_signals
from pruning_comparison.pruning.selection import leaving_of_level
from pruning_comparison.pruning.surgery import mask_heads, masked_copy, remove_heads
from pruning_comparison.scoring.choice import heads_to_keep, scored_again
from pruning_comparison.scoring.prices import RIDGE, Prices
from pruning_comparison.scoring.scores import HeadScores
from pruning_comparison.spec import Scope

ROUND_LEVEL = 10.0
"""Per cent of the heads that a round takes out."""


@dataclass(frozen=True)
class RoundRecord:
    """How a negotiated round came about: signals and states of its heads before it, and their replies.

    All of them are kept for as long as the path goes on, so none holds prices, which are as large as all attention.
    """

    level: float
    signals: HeadSignals
    states: States
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Round:
    """What a round left: the level it reached, the heads that stay (bool [L, H]), and the scores that chose them.

    ``model`` is the physically pruned model, None where heads are asked: nothing is run then. ``round_records`` are those
    of all rounds so far, where heads were asked at all, and ``seconds`` what the rounds have taken.
    """

    level: float
    keep: Tensor
    scores: HeadScores
    model: PreTrainedModel | None = None
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
        rectangle: int | None = None,
        scores_pruned: bool = False,
    ) -> None:
        """``score`` ranks the heads of a full-size model, in which those that have left are masked; ``all_heads`` [L, H].

        With ``scores_pruned`` it is handed the physically pruned model instead, which is faster; its scores keep their
        shape, and those of heads that have left count for nothing. Heads leave in groups of ``group_size``, or so that
        layers keep rectangles, ``rectangle`` query heads to a key-value group: heads then come back where a level's
        number cannot be met without them, as few as can be, by their scores in the dense model
        (``scoring.choice.scored_again``).
        """
        self._dense = dense
        self._score = score
        self._scope: Scope = scope
        self._group_size = group_size
        self._rectangle = rectangle
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
        if self._rectangle is not None:
            scores = scored_again(self._start.scores, scores, ~reached.keep)
        keep = heads_to_keep(
            scores,
            level,
            self._scope,
            gone=~reached.keep,
            group_size=self._group_size,
            rectangle=self._rectangle,
        )
        return Round(level, keep, scores, remove_heads(self._dense, keep))

    def _scores_on(self, reached: Round) -> HeadScores:
        """The scores of the heads that a round has left."""
        assert reached.model is not None
        if self._scores_pruned or bool(reached.keep.all()):
            return self._score(reached.model)
        # In the full-size model in which the lost heads are masked, scores keep their shape.
        full_size = masked_copy(self._dense, reached.model, reached.keep)
        with mask_heads(full_size, reached.keep):
            return self._score(full_size)


class NegotiatedTrajectory:
    """The path on which heads are asked to leave, from level 0 up on the same grid of rounds.

    Scores and prices are those of the dense model, measured once. In each round heads are asked in the order of the scores,
    and those that consent, or are overridden, leave; see ``consent.negotiate``. What has left changes the prices of the
    others in its layer, in closed form: no model is run. Heads that have left stay away, so the sets of rising levels are
    nested. The number that leaves is that of every other variant.

    Rectangles are not nested. Where layers keep them, every level is one round that begins with the dense model: see
    ``rectangles.negotiate_rectangles``.
    """

    def __init__(
        self,
        scores: HeadScores,
        prices: Prices,
        *,
        moments: HeadMoments,
        scope: Scope,
        importance: Tensor | None = None,
        everyone_consents: bool = False,
        group_size: int = 1,
        rectangle: int | None = None,
        savings: Savings | None = None,
        seconds: float = 0.0,
        describes: bool = True,
    ) -> None:
        """``scores`` rank the heads that ``prices`` and ``moments`` are of; ``seconds`` is what measuring prices took.

        Signals are made of ``moments`` and ``importance`` [L, H], Fisher scores; they are recorded and change no
        answer. Without ``describes`` there are none, and rounds leave no records. ``everyone_consents`` and ``savings``
        are those of ``consent.negotiate``. Heads leave in groups of ``group_size``, or so that layers keep rectangles,
        ``rectangle`` query heads to a key-value group. ValueError for rectangles with ``savings``.
        """
        if rectangle is not None and savings is not None:
            raise ValueError("where layers keep rectangles, heads are held by their prices alone")
        self._scores = scores
        self._describes = describes
        self._moments = moments
        self._importance = importance
        self._scope: Scope = scope
        self._everyone_consents = everyone_consents
        self._group_size = group_size
        self._rectangle = rectangle
        self._savings = savings
        self._start = Round(0.0, moments.keep.cpu(), scores, seconds=seconds), prices
        self._reached = self._start
        self._first_contributions: Tensor | None = None

    def at(self, level: float) -> Round:
        """The heads at ``level`` per cent. Rising levels go on from the last round; a lower one begins anew."""
        if self._rectangle is not None:
            return self._in_one_round(level, self._rectangle)
        if level < self._reached[0].level:
            self._reached = self._start
        for target in _grid_up_to(level):
            if target > self._reached[0].level:
                self._reached = self._next(*self._reached, target)
        return self._reached[0] if self._reached[0].level == level else self._next(*self._reached, level)[0]

    def _next(self, reached: Round, prices: Prices, level: float) -> tuple[Round, Prices]:
        described = self._described(reached, prices) if self._describes else None
        started = time.perf_counter()
        result = negotiate(
            self._scores.scores,
            prices,
            reached.keep,
            quota_of_level(level, reached.keep, self._scope, self._group_size),
            states=None if described is None else described[1],
            everyone_consents=self._everyone_consents,
            group_size=self._group_size,
            savings=self._savings,
        )
        seconds = reached.seconds + time.perf_counter() - started
        records = reached.round_records
        if described is not None:
            records = (*records, RoundRecord(level, *described, result.replies))
        return Round(level, result.keep, self._scores, None, records, seconds), result.prices

    def _in_one_round(self, level: float, rectangle: int) -> Round:
        reached, prices = self._start
        if level == 0:
            return reached
        described = self._described(reached, prices) if self._describes else None
        started = time.perf_counter()
        n_layers, n_heads = reached.keep.shape
        keep, replies = negotiate_rectangles(
            heads_to_keep(self._scores, level, self._scope, rectangle=rectangle),
            prices,
            leaving_of_level(level, n_layers, n_heads, self._scope, rectangle=rectangle),
            rectangle,
            states=None if described is None else described[1],
            everyone_consents=self._everyone_consents,
        )
        seconds = reached.seconds + time.perf_counter() - started
        records = () if described is None else (RoundRecord(level, *described, replies),)
        return Round(level, keep, self._scores, None, records, seconds)

    def _described(self, reached: Round, prices: Prices) -> tuple[HeadSignals, States]:
        """Signals and states of the heads that a round begins with."""
        signals = measure_signals(self._moments.after(prices), prices, ridge=RIDGE, importance=self._importance)
        if self._first_contributions is None:
            self._first_contributions = signals.contribution
        before = reached.round_records[-1].states if reached.round_records else None
        return signals, head_states(signals, before, start=self._first_contributions)


def _grid_up_to(level: float) -> list[float]:
    """The levels of the rounds up to and including ``level``."""
    return [number * ROUND_LEVEL for number in range(1, int(level / ROUND_LEVEL) + 1)]
