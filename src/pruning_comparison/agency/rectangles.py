"""Consent where layers keep rectangles: the heads that leave a layer answer together. Pure functions.

Dimension letters: L layers, H heads, G key-value groups of R query heads each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning_comparison.agency.consent import CONSENT_FACTOR, HeadAnswer, HeadState, Reply, States
from pruning_comparison.pruning.rectangles import Rectangle, cheapest_rectangles, keep_mask
from pruning_comparison.scoring.prices import Prices


def negotiate_rectangles(
    proposed: Tensor,
    prices: Prices,
    leaving: int | Sequence[int],
    rectangle: int,
    *,
    states: States | None = None,
    everyone_consents: bool = False,
) -> tuple[Tensor, tuple[Reply, ...]]:
    """Asks the heads of a dense model that a method proposes to cut, and takes from others what refusals leave open.

    ``proposed`` bool [L, H]: what the method would keep, a rectangle in every layer, with ``leaving`` heads gone, of
    the model or of each layer. ``rectangle`` is R. Whether a head can go depends on who else of its layer goes, so the
    heads of a layer that are to leave answer together: they consent when their price per head, that of all of them
    together over their number, is at most the limit. The limit is ``CONSENT_FACTOR`` times the price per head of the
    dearest layer in the cheapest choice of as many heads (``cheapest_rectangles`` of ``Prices.rectangles``): nobody has
    to pay more. With a number for each layer, it is that of the layer's own cheapest choice.

    Layers that consent keep what was proposed. From the others the same programme takes, at the least price, as many
    heads as are left open, which can always be met: the proposal does. Those heads are asked in turn: they consent at
    the limit, and are overridden above it. Heads of a refused proposal that stay have refused. ``everyone_consents``
    takes the proposal.

    Keep mask, bool [L, H], and the replies, layer by layer: of the first asking those who left by it or stay, then of the
    second those who left by that. Cost, limit and what a head left at are prices per head. ``states`` are recorded with the
    replies and change none.
    """
    n_layers, n_heads = proposed.shape
    options = prices.rectangles(rectangle)
    known = [{one.kept: one.cost for one in layer} for layer in options]

    def per_head(layer: int, keep: Tensor) -> float:
        """The price per head of those that a layer (keep mask [H]) loses; 0 where none leaves."""
        gone = (~keep).nonzero().flatten().tolist()
        if not gone:
            return 0.0
        kept = tuple(keep.nonzero().flatten().tolist())
        # What the programme has counted with is what it is held by: a sum in another order may differ in its last digit.
        return (known[layer][kept] if kept in known[layer] else prices.price(layer, gone)) / len(gone)

    cheapest = keep_mask(cheapest_rectangles(options, leaving, n_heads), n_heads)
    dearest = [per_head(layer, keep) for layer, keep in enumerate(cheapest)]
    if isinstance(leaving, int):
        dearest = [max(dearest)] * n_layers
    limits = [CONSENT_FACTOR * price for price in dearest]
    asked = [per_head(layer, keep) for layer, keep in enumerate(proposed)]
    consents = [
        bool(keep.all()) or everyone_consents or price <= limit
        for keep, price, limit in zip(proposed, asked, limits, strict=True)
    ]
    keep = proposed
    if not all(consents):
        # Only a layer that was asked is settled: one that was to lose nothing is as open as one that has refused.
        left = [
            [Rectangle(tuple(row.nonzero().flatten().tolist()), 0, 0.0)] if yes and not bool(row.all()) else layer
            for yes, row, layer in zip(consents, proposed, options, strict=True)
        ]
        keep = keep_mask(cheapest_rectangles(left, leaving, n_heads), n_heads)

    replies: list[Reply] = []
    departures = 0

    def reply(layer: int, head: int, answer: HeadAnswer, price: float) -> None:
        nonlocal departures
        state = HeadState.ACTIVE if states is None else states[layer][head]
        place, left_price = (None, None) if answer is HeadAnswer.REFUSED else (departures, price)
        replies.append(Reply(layer, head, answer, state, len(replies), price, limits[layer], place, left_price))
        departures += answer is not HeadAnswer.REFUSED

    as_proposed = [yes and torch.equal(*rows) for yes, *rows in zip(consents, proposed, keep, strict=True)]
    for layer in range(n_layers):
        for head in (~proposed[layer]).nonzero().flatten().tolist():
            if as_proposed[layer]:
                reply(layer, head, HeadAnswer.CONSENTED, asked[layer])
            elif keep[layer, head]:
                reply(layer, head, HeadAnswer.REFUSED, asked[layer])
    for layer in range(n_layers):
        price = per_head(layer, keep[layer])
        for head in [] if as_proposed[layer] else (~keep[layer]).nonzero().flatten().tolist():
            answer = HeadAnswer.CONSENTED if price <= limits[layer] else HeadAnswer.OVERRIDDEN
            reply(layer, head, answer, price)
    return keep, tuple(replies)
