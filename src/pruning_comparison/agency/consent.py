"""States and consent: which heads agree to leave, in what order they are asked, and who is overridden. Pure functions.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from pruning_comparison.agency.savings import Savings
from pruning_comparison.agency.signals import HeadSignals
from pruning_comparison.pruning.selection import leaving_of_level
from pruning_comparison.scoring.prices import Prices
from pruning_comparison.spec import Scope


class HeadState(StrEnum):
    """What a head is doing at the moment. See ``head_states``."""

    ACTIVE = "active"
    OVERLOADED = "overloaded"
    MISALIGNED = "misaligned"
    WITHDRAWN = "withdrawn"


class HeadAnswer(StrEnum):
    """How a head that was asked to leave has answered, or been answered."""

    CONSENTED = "consented"
    REFUSED = "refused"
    OVERRIDDEN = "overridden"


States = tuple[tuple[HeadState, ...], ...]
"""The state of every head, ``states[layer][head]``."""


CONSENT_FACTOR = 1.0
"""The limit up to which heads consent is this times the price of the quota-th cheapest live head."""

# States are entered at one value and left at another, so that a head near the edge does not change sides every round.

OVERLOADED_GROWTH, OVERLOADED_GROWTH_LEFT = 2.0, 1.5
"""Multiples of the head's own contribution at the start from which on it is overloaded, and below which no longer."""

OVERLOADED_SHARE, OVERLOADED_SHARE_LEFT = 2.0, 1.5
"""Multiples of the equal share, 1 / live heads of the layer, that must be reached as well, and below which no longer."""

MISALIGNED, MISALIGNED_LEFT = -0.2, -0.1
"""Correlations with the rest of the layer at or below which a head is misaligned, and above which no longer."""


def consent_limit(prices: Tensor, quota: int) -> float:
    """The price up to which heads consent when ``quota`` of those with ``prices``, NaN for withdrawn ones, have to leave.

    ``CONSENT_FACTOR`` times the price of the quota-th cheapest: if prices did not change as others leave, that many could be
    had for as much each. 0 where nobody has to leave. Infinite prices are no limit: the highest finite one is.
    """
    live = prices[prices.isfinite()].sort().values
    return CONSENT_FACTOR * float(live[min(quota, len(live)) - 1]) if quota > 0 and len(live) else 0.0


def head_states(signals: HeadSignals, previous: States | None, *, start: Tensor | None = None) -> States:
    """The state of every head.

    * ``withdrawn``: it has left; its signals are NaN.
    * ``misaligned``: it works against its layer, its alignment is at most ``MISALIGNED``.
    * ``overloaded``: it carries far more than its share since others withdrew. Its contribution has grown to at least
      ``OVERLOADED_GROWTH`` times its own at the ``start`` [L, H], and is at least ``OVERLOADED_SHARE`` times the equal
      share of its layer's live heads.
    * ``active`` otherwise. A head that is both misaligned and overloaded is misaligned.

    A head keeps a state that it was in, by ``previous``, until it crosses the ``.._LEFT`` threshold. Without a ``start``
    nobody is overloaded. ValueError where a withdrawn head is back.
    """
    contribution, alignment = signals.contribution, signals.alignment
    live = contribution.isfinite()
    equal_share = 1 / live.sum(1).clamp(min=1).double()
    table = []
    for layer in range(live.shape[0]):
        row = []
        for head in range(live.shape[1]):
            before = HeadState.ACTIVE if previous is None else previous[layer][head]
            if not live[layer, head]:
                row.append(HeadState.WITHDRAWN)
                continue
            if before is HeadState.WITHDRAWN:
                raise ValueError(f"head {(layer, head)} was withdrawn and has signals again")
            was_misaligned, was_overloaded = before is HeadState.MISALIGNED, before is HeadState.OVERLOADED
            growth = OVERLOADED_GROWTH_LEFT if was_overloaded else OVERLOADED_GROWTH
            share = OVERLOADED_SHARE_LEFT if was_overloaded else OVERLOADED_SHARE
            edge = MISALIGNED_LEFT if was_misaligned else MISALIGNED
            own, first = float(contribution[layer, head]), math.inf if start is None else float(start[layer, head])
            if float(alignment[layer, head]) <= edge:
                row.append(HeadState.MISALIGNED)
            elif own > 0 and own >= growth * first and own >= share * float(equal_share[layer]):
                row.append(HeadState.OVERLOADED)
            else:
                row.append(HeadState.ACTIVE)
        table.append(tuple(row))
    return tuple(table)


@dataclass(frozen=True)
class Reply:
    """One head that was asked to leave in a negotiation.

    ``rank`` counts the heads asked, from 0. ``cost`` is its price when it was asked, ``limit`` the price up to which it
    would have consented. ``left`` counts the heads that left, from 0, None for one that stayed; ``left_cost`` is its price
    then, which for an overridden head differs from ``cost`` where others of its layer left in between. Where heads were held
    against what they save, ``cost``, ``limit`` and ``left_cost`` are rates: nats per second, or per byte.
    """

    layer: int
    head: int
    answer: HeadAnswer
    state: HeadState
    rank: int
    cost: float
    limit: float
    left: int | None
    left_cost: float | None


@dataclass(frozen=True)
class Negotiation:
    """What a negotiation came to.

    ``replies`` in the order in which heads were asked; ``keep`` bool [L, H] without those that left; ``prices`` those of the
    heads that stay.
    """

    replies: tuple[Reply, ...]
    keep: Tensor
    prices: Prices

    @property
    def left(self) -> tuple[tuple[int, int], ...]:
        """The heads (layer, head) that left, in that order."""
        leaving = sorted((reply.left, reply.layer, reply.head) for reply in self.replies if reply.left is not None)
        return tuple((layer, head) for _, layer, head in leaving)

    @property
    def violations(self) -> tuple[Reply, ...]:
        """Heads that left although they had refused, in the order in which they were overridden."""
        overridden = [reply for reply in self.replies if reply.answer is HeadAnswer.OVERRIDDEN]
        return tuple(sorted(overridden, key=lambda reply: -1 if reply.left is None else reply.left))


def negotiate(
    scores: Tensor,
    prices: Prices,
    keep: Tensor,
    quota: int | Sequence[int],
    *,
    limit: float | None = None,
    states: States | None = None,
    everyone_consents: bool = False,
    group_size: int = 1,
    savings: Savings | None = None,
) -> Negotiation:
    """Asks live heads to leave, in the method's order, until ``quota`` of them have left.

    ``scores`` [L, H]: the method's, higher = keep; ties are asked in order of layer, then head. ``keep`` bool [L, H]: live
    heads. ``quota``: how many must leave, of the whole model, or of each layer (L numbers, ``--scope=layer``).

    A head consents when its present price is at most ``limit``, by default ``consent_limit`` of the live heads that the
    quota is for: the model's, or the layer's. One that consents leaves at once, which raises the prices of others in its
    layer: of two heads that duplicate each other exactly one is cheap. When everyone was asked and too few have consented,
    the refusals that are cheapest by then are overridden one at a time, with prices brought up to date in between; each is a
    consent violation. Nobody is asked once the quota is met.

    ``states`` are recorded with the replies and change none. ``everyone_consents`` takes the method's order as it is.

    With a ``group_size``, that many heads which follow one another are asked, and leave, as one: their scores are added up,
    and their price is that of all of them together, so that heads that make up for one another do not look cheap. The
    default limit is that of such groups. Each of its heads has a reply, with the price of the group.

    With ``savings`` a head is held by its rate, price over what is saved, in place of its price. Rates are those at the
    start: a move of several heads saves what it does only as a whole, and after its first head had left the rest would look
    cheap. Heads whose rate is below that of the quota-th cheapest all find a place; those at the limit consent for as long
    as there is one beside them. Refusals are overridden by rate, then by their price at that moment.

    ValueError if the quota is more than the live heads or no number of whole groups, if a part of a group is gone, if a live
    head's score is not finite, or if prices and mask disagree on who is live.
    """
    keep = keep.cpu().clone()
    scores = scores.cpu().double()
    open_quota = _Quota.of(quota, keep)
    _check_live(scores, prices.table(), keep)
    _check_groups(open_quota, keep, group_size)
    rates = None if savings is None else _rates(prices, keep, savings)
    table = _group_prices(prices, keep, group_size) if rates is None else rates[:, ::group_size]
    limits = _limits(table, quota, limit, group_size)
    places = None if rates is None else _ReservedPlaces(table, quota, group_size)

    def members(first: int) -> range:
        return range(first, first + group_size)

    def state_of(layer: int, head: int) -> HeadState:
        return HeadState.ACTIVE if states is None else states[layer][head]

    def order(place: list[int]) -> tuple[float, list[int]]:
        layer, first = place
        return float(scores[layer, first : first + group_size].sum()), place

    replies: list[Reply] = []
    gone = 0

    def leave(layer: int, first: int) -> None:
        nonlocal prices, gone
        for head in members(first):
            prices = prices.withdraw(layer, head)
            keep[layer, head] = False
            open_quota.take(layer)
            gone += 1

    for layer, first in sorted(keep[:, ::group_size].nonzero().mul(torch.tensor([1, group_size])).tolist(), key=order):
        if not open_quota.left(layer):
            continue
        price = prices.price(layer, members(first)) if rates is None else float(rates[layer, first])
        yes = everyone_consents or price <= limits[layer]
        if yes and places is not None and not everyone_consents:
            yes = places.take(layer, price, open_quota.left(layer) // group_size)
        answer = HeadAnswer.CONSENTED if yes else HeadAnswer.REFUSED
        for number, head in enumerate(members(first)):
            place, left_price = (gone + number, price) if yes else (None, None)
            state = state_of(layer, head)
            replies.append(Reply(layer, head, answer, state, len(replies), price, limits[layer], place, left_price))
        if yes:
            leave(layer, first)
    while refused := [r for r in replies[::group_size] if r.left is None and open_quota.left(r.layer)]:
        joint = {r.rank: prices.price(r.layer, members(r.head)) for r in refused}
        held = joint if rates is None else {r.rank: float(rates[r.layer, r.head]) for r in refused}
        cheapest = min(refused, key=lambda reply: (held[reply.rank], joint[reply.rank], reply.rank))
        for number, rank in enumerate(members(cheapest.rank)):
            replies[rank] = replace(
                replies[rank], answer=HeadAnswer.OVERRIDDEN, left=gone + number, left_cost=held[cheapest.rank]
            )
        leave(cheapest.layer, cheapest.head)
    return Negotiation(tuple(replies), keep, prices)


def quota_of_level(level: float, keep: Tensor, scope: Scope = "model", group_size: int = 1) -> int | list[int]:
    """How many more heads have to leave, besides those gone from ``keep`` bool [L, H], for the model to be at ``level``.

    For the whole model, or for each layer where ``scope`` is "layer"; rounded to whole groups of ``group_size``. ValueError
    where more are gone than the level says.
    """
    n_layers, n_heads = keep.shape
    leaving = leaving_of_level(level, n_layers, n_heads, scope, group_size)
    if isinstance(leaving, int):
        quota = [leaving - int((~keep).sum())]
    else:
        quota = [wanted - int(gone) for wanted, gone in zip(leaving, (~keep).sum(1), strict=True)]
    if min(quota) < 0:
        raise ValueError(f"{int((~keep).sum())} heads are gone already, more than level {level} takes out")
    return quota if scope == "layer" else quota[0]


class _Quota:
    """How many heads still have to leave: of the model as a whole, or of each layer."""

    def __init__(self, remaining: list[int], per_layer: bool) -> None:
        self._remaining = remaining
        self._per_layer = per_layer

    @classmethod
    def of(cls, quota: int | Sequence[int], keep: Tensor) -> _Quota:
        """ValueError where the quota does not fit the live heads."""
        per_layer = not isinstance(quota, int)
        remaining = [quota] if isinstance(quota, int) else list(quota)
        live = keep.sum(1).tolist() if per_layer else [int(keep.sum())]
        if len(remaining) != len(live):
            raise ValueError(f"the quota has {len(remaining)} numbers, the model {len(live)} layers")
        for wanted, available in zip(remaining, live, strict=True):
            if not 0 <= wanted <= available:
                raise ValueError(f"{wanted} heads must leave, but {available} are live; choose a lower level")
        return cls(remaining, per_layer)

    def left(self, layer: int) -> int:
        return self._remaining[layer if self._per_layer else 0]

    def whole_groups(self, group_size: int) -> bool:
        return all(remaining % group_size == 0 for remaining in self._remaining)

    def take(self, layer: int) -> None:
        self._remaining[layer if self._per_layer else 0] -= 1


def _limits(table: Tensor, quota: int | Sequence[int], limit: float | None, group_size: int) -> list[float]:
    """The price up to which the heads of each layer consent, [L], of the prices of groups, ``table`` [L, H / group_size]."""
    layers = len(table)
    if limit is not None:
        return [limit] * layers
    if isinstance(quota, int):
        return [consent_limit(table, quota // group_size)] * layers
    return [consent_limit(row, wanted // group_size) for row, wanted in zip(table, quota, strict=True)]


class _ReservedPlaces:
    """Places for the groups of heads whose rate is below that of the quota-th cheapest, of the model or of each layer."""

    def __init__(self, table: Tensor, quota: int | Sequence[int], group_size: int) -> None:
        rows = [table] * len(table) if isinstance(quota, int) else list(table)
        wanted = [quota] * len(table) if isinstance(quota, int) else list(quota)
        self._shared = isinstance(quota, int)
        self._edges = [_nth_cheapest(row, count // group_size) for row, count in zip(rows, wanted, strict=True)]
        self._below = [int((row < edge).sum()) for row, edge in zip(rows, self._edges, strict=True)]

    def take(self, layer: int, rate: float, left: int) -> bool:
        """Whether a group with this rate finds a place, where ``left`` groups have to leave still; takes one if reserved."""
        place = 0 if self._shared else layer
        if rate < self._edges[layer]:
            self._below[place] -= 1
            return True
        return left > self._below[place]


def _nth_cheapest(rates: Tensor, count: int) -> float:
    live = rates[rates.isfinite()].sort().values
    return float(live[min(count, len(live)) - 1]) if count > 0 and len(live) else 0.0


def _rates(prices: Prices, keep: Tensor, savings: Savings) -> Tensor:
    """The rate of every live head, float64 [L, H]; NaN for heads that have left."""
    table = torch.full(tuple(keep.shape), torch.nan, dtype=torch.float64)
    for layer in range(len(keep)):
        for head, rate in savings.rates(prices, layer).items():
            table[layer, head] = rate
    return table


def _group_prices(prices: Prices, keep: Tensor, group_size: int) -> Tensor:
    """The price of each group as a whole, [L, H / group_size]; NaN for groups that have left."""
    if group_size == 1:
        return prices.table()
    table = torch.full((keep.shape[0], keep.shape[1] // group_size), torch.nan, dtype=torch.float64)
    for layer, group in keep[:, ::group_size].nonzero().tolist():
        table[layer, group] = prices.price(layer, range(group * group_size, (group + 1) * group_size))
    return table


def _check_groups(quota: _Quota, keep: Tensor, group_size: int) -> None:
    by_group = keep.unflatten(1, (-1, group_size))
    if not torch.equal(by_group.any(2), by_group.all(2)):
        raise ValueError(f"a part of a group of {group_size} heads is gone; groups leave as a whole")
    if not quota.whole_groups(group_size):
        raise ValueError(f"the quota must be whole groups of {group_size} heads")


def _check_live(scores: Tensor, prices: Tensor, keep: Tensor) -> None:
    if scores.shape != keep.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, the keep mask {tuple(keep.shape)}")
    for layer, head in keep.nonzero().tolist():
        if not bool(scores[layer, head].isfinite()):
            raise ValueError(
                f"the score of head {(layer, head)} is {scores[layer, head].item()}; scores must be finite"
            )
    if not torch.equal(prices.isfinite(), keep):
        layer, head = (prices.isfinite() != keep).nonzero()[0].tolist()
        raise ValueError(f"prices and keep mask disagree on head {(layer, head)}: measure prices of the same heads")
