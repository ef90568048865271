"""What counts as a decision: four verdicts, and how a run spends what it may err.

Every claim of a run comes from one interval at its own corrected level. docs/decisions/0023-what-a-run-may-claim.md gives
the reasons and what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pruning_comparison.analysis.random_effects import Array, Fit

__all__ = [
    "ANSWERED",
    "ERROR_RATE",
    "NOT_ENOUGH",
    "NO_DIFFERENCE",
    "REFUTED",
    "SHARES",
    "SHARES_WITH_TASKS",
    "SPENT",
    "SUPPORTED",
    "VERDICTS",
    "Decision",
    "Part",
    "decide",
    "in_chains",
    "level_of",
    "p_of_decision",
    "verdict_of",
]

SUPPORTED = "supported"
NO_DIFFERENCE = "no meaningful difference"
REFUTED = "refuted"
NOT_ENOUGH = "not enough data"
ANSWERED = "answered"
"""Of a question that asks for a figure (Q2, Q5) and not whether something holds."""
VERDICTS = (SUPPORTED, NO_DIFFERENCE, REFUTED, NOT_ENOUGH)

ERROR_RATE = 0.05
"""At most this share of runs may claim anything false."""

Part = Literal["answers", "relative to dense", "faster", "rankings", "accuracy"]

SPENT = 0.0225
"""What claims are tested at, all together. Less than ``ERROR_RATE``, because skewed data make very small p-values too small
(``benchmarks/statistics_calibration.py --part=claims``)."""

SHARES: Mapping[Part, float] = {
    "answers": 0.85,
    "relative to dense": 0.04,
    "faster": 0.05,
    "rankings": 0.06,
}
"""How the parts of a report share ``SPENT``; all methods, variants and levels of a part share its part."""

SHARES_WITH_TASKS: Mapping[Part, float] = {**SHARES, "answers": 0.60, "accuracy": 0.25}
"""The same where tasks were asked."""


def level_of(part: Part, looks: int = 1, *, tasks: bool = False) -> float:
    """The error rate of one part of a report, of a run whose data are looked at so many times before it ends.

    ``tasks``: whether it also says how much accuracy on tasks is lost.
    """
    return SPENT * (SHARES_WITH_TASKS if tasks else SHARES)[part] / looks


def verdict_of(low: float, high: float, bounds: tuple[float, float], sign: int) -> str:
    """The verdict of an interval. ``bounds``: both ends of the margin; ``sign``: +1 where more is better, else -1.

    With m the end of the margin on the favourable side: *supported*, the whole interval is beyond m; *not enough data*, it
    contains m; *no meaningful difference*, all of it lies within the margin; *refuted*, all of it is short of m otherwise.
    Where there is no margin, m is 0, and the last two fall together.
    """
    if sign < 0:
        low, high, bounds = -high, -low, (-bounds[1], -bounds[0])
    if low > bounds[1]:
        return SUPPORTED
    if not high < bounds[1]:
        return NOT_ENOUGH
    return NO_DIFFERENCE if low > bounds[0] else REFUTED


def p_of_decision(fit: Fit, bounds: tuple[float, float], sign: int) -> float:
    """The level at which an answer is decided: its two-sided p against the margin's favourable end.

    Only one side can be false wherever the truth lies beside a margin, so that one tail would do if data were not skewed
    (Goeman, Solari and Stijnen 2010). Skewness makes one tail err up to three times as often, and the other less.
    """
    return fit.p_value(bounds[1] if sign > 0 else bounds[0])


@dataclass(frozen=True)
class Decision:
    """A verdict and the interval that it comes from, at the error rate ``level``; NaN where none was left for it."""

    verdict: str
    level: float
    low: float
    high: float


def decide(fit: Fit, bounds: tuple[float, float], sign: int, level: float, *, either: bool = False) -> Decision:
    """The verdict of a mean at a corrected level. ``either``: a difference to any side supports.

    Pairs that are all equal have no interval to speak of; they decide where signs alone could, at 2^(1 - n).
    """
    if not level > 0 or fit.n < 2:
        return Decision(NOT_ENOUGH, level, math.nan, math.nan)
    margin = fit.margin(max(1 - level, 0.0))
    low, high = fit.mean - margin, fit.mean + margin
    if p_of_decision(fit, bounds, sign) > level:
        return Decision(NOT_ENOUGH, level, low, high)
    verdict = verdict_of(low, high, bounds, sign)
    if either and verdict == REFUTED:
        verdict = SUPPORTED
    return Decision(verdict, level, low, high)


def in_chains(p: Array, chains: Sequence[Sequence[int]], weights: Sequence[float], level: float) -> tuple[Array, Array]:
    """Corrects claims that are tested in chains: (adjusted p, level at which each is tested), both [N, n].

    ``p`` [N, n]: N runs of n claims each, every claim in one of the ``chains``. A chain is a fixed sequence: a claim is
    tested once all before it are decided, at the chain's whole level. Chains share ``level`` by ``weights``, and one that
    is through hands its share to the others (Holm 1979, weighted). With chains of one claim each this is Holm's procedure.
    As a closed test, in which every set of claims is tested by the first of each chain, it bounds the probability of any
    false claim by ``level`` under any dependence (Bretz, Maurer, Brannath and Posch 2009). Decided is what has an adjusted
    p of at most ``level``; a claim that no level was left for is tested at 0.
    """
    runs, count = p.shape
    lengths = np.array([len(chain) for chain in chains], dtype=np.int64)
    places = np.zeros((len(chains), lengths.max(initial=1)), dtype=np.int64)
    for row, chain in enumerate(chains):
        places[row, : len(chain)] = chain
    share = np.array(weights, dtype=np.float64)
    head = np.zeros((runs, len(chains)), dtype=np.int64)
    adjusted, levels = np.ones((runs, count)), np.zeros((runs, count))
    highest = np.zeros(runs)
    every = np.arange(runs)
    for _ in range(int(lengths.sum())):
        remaining = head < lengths
        own = np.where(remaining, share, 0.0)
        own = own / np.maximum(own.sum(1, keepdims=True), np.finfo(float).tiny)
        claims = places[np.arange(len(chains)), np.minimum(head, lengths - 1)]
        with np.errstate(divide="ignore"):
            ratio = np.where(remaining, p[every[:, None], claims] / own, np.inf)
        chosen = ratio.argmin(1)
        claim = claims[every, chosen]
        smallest = ratio[every, chosen]
        # What is tested after the first claim that is not decided keeps the level that its chain had then.
        stopped = highest > level
        waiting = (smallest > level) & ~stopped
        for place in range(len(chains)):
            rows = np.flatnonzero(waiting & remaining[:, place])
            levels[rows, claims[rows, place]] = level * own[rows, place]
        decided = ~stopped & ~waiting
        levels[every[decided], claim[decided]] = level * own[decided, chosen[decided]]
        highest = np.maximum(highest, np.minimum(smallest, 1.0))
        adjusted[every, claim] = highest
        head[every, chosen] += 1
    return adjusted, levels
