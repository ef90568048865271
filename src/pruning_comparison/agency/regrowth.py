"""Regrowth: heads that have left come back in exchange for others, where the model says that this is better.

Dimension letters: N windows, T time, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.cuts import Cut, cut_layer, divergences
from pruning_comparison.agency.moments import HeadMoments
from pruning_comparison.scoring.prices import LayerPrices

MOST_ROUNDS = 4
"""Of exchanges, each of which is judged as a whole."""


@dataclass(frozen=True)
class Exchange:
    """A head that came back, and the one that left in its place; ``returned`` and ``left`` are (layer, head)."""

    returned: tuple[int, int]
    left: tuple[int, int]


@dataclass(frozen=True)
class Regrowth:
    """What regrowth came to.

    ``keep`` bool [L, H] has as many heads as before. ``exchanges`` in the order in which they were made, ``nats_before`` and
    ``nats_after`` the divergence from the dense model on the windows that judged them, ``evaluations`` how often the model
    was run on these.
    """

    keep: Tensor
    exchanges: tuple[Exchange, ...]
    nats_before: float
    nats_after: float
    evaluations: int


@torch.no_grad()
def regrow(
    model: PreTrainedModel,
    moments: HeadMoments,
    layers: Sequence[LayerPrices | None],
    keep: Tensor,
    fresh: Tensor,
    *,
    most_rounds: int = MOST_ROUNDS,
    exclude_first: bool = False,
    new_bias: bool = True,
) -> Regrowth:
    """Exchanges withdrawn and surviving heads of a dense ``model``, starting from the heads of ``keep`` (bool [L, H]).

    In each of at most ``most_rounds`` the price within a layer proposes and the model decides. For every layer three things
    are proposed: the withdrawn head whose return saves most squared error comes back; the surviving head that costs least
    leaves; and, where squared error then falls, the best exchange of the two kinds within the layer. Each is tried on the
    ``fresh`` windows [N, T], which the moments have not read, with all layers cut and refitted from the moments alone
    (``cuts.cut_layer``). Returns that save most divergence are matched with withdrawals of other layers that cost least, as
    long as the one saves more than the other costs, and exchanges within layers join them. All are then made at once and
    tried together; where divergence does not fall, only the better half of them is, and so on. It ends with a round in which
    nothing helps.

    The number of heads never changes.
    """
    keep = keep.clone()
    state = _State(model, moments, layers, fresh, exclude_first, new_bias)
    nats = before = state.divergence(keep)
    made: list[Exchange] = []
    for _ in range(most_rounds):
        proposed = state.proposals(keep, nats)
        while proposed:
            changed = keep.clone()
            for exchange in proposed:
                changed[exchange.returned] = True
                changed[exchange.left] = False
            found = state.divergence(changed)
            if found < nats:
                keep, nats = changed, found
                made.extend(proposed)
                break
            proposed = proposed[: len(proposed) // 2]
        else:
            break
    return Regrowth(keep, tuple(made), before, nats, state.evaluations)


class _State:
    """The model with all layers cut, and what it costs to change one or two of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        moments: HeadMoments,
        layers: Sequence[LayerPrices | None],
        fresh: Tensor,
        exclude_first: bool,
        new_bias: bool,
    ) -> None:
        self._model = model
        self._moments = moments
        self._layers = layers
        self._fresh = fresh
        self._exclude_first = exclude_first
        self._new_bias = new_bias
        self._cuts: dict[tuple[int, tuple[int, ...]], Cut] = {}
        self._proposals: dict[tuple[int, tuple[int, ...]], list[tuple[str, tuple[int, ...]]]] = {}
        self.evaluations = 0

    def divergence(self, keep: Tensor) -> float:
        """KL(dense || all layers cut), nats per token."""
        self.evaluations += 1
        start, _ = divergences(self._model, [], self._fresh, base=self._base(keep), exclude_first=self._exclude_first)
        return float(start.mean())

    def proposals(self, keep: Tensor, nats: float) -> list[Exchange]:
        """Exchanges that the model finds better one by one, the best first; no head takes part in two of them."""
        kinds: list[tuple[str, int, tuple[int, ...]]] = []
        trials: list[dict[int, Cut]] = []
        for number, layer in enumerate(self._layers):
            if layer is None:
                continue
            gone = tuple(head for head in layer.heads if not keep[number, head])
            if (number, gone) not in self._proposals:
                self._proposals[number, gone] = _of_layer(layer, gone)
            for kind, heads in self._proposals[number, gone]:
                changed = tuple(sorted({*gone} ^ {*heads}))
                kinds.append((kind, number, heads))
                trials.append({number: self._cut(number, changed)})
        _, found = divergences(
            self._model, trials, self._fresh, base=self._base(keep), exclude_first=self._exclude_first
        )
        self.evaluations += len(trials)
        changes = (found.mean(1) - nats).tolist()
        offers = {
            kind: sorted(
                (change, number, heads)
                for change, (one, number, heads) in zip(changes, kinds, strict=True)
                if one == kind
            )
            for kind in ("return", "withdrawal", "within")
        }
        gains: list[tuple[float, Exchange]] = []
        taken: set[int] = set()
        for change, number, (back, out) in offers["within"]:
            if change < 0:
                gains.append((change, Exchange((number, back), (number, out))))
                taken.add(number)
        withdrawals = [offer for offer in offers["withdrawal"] if offer[1] not in taken]
        for change, number, (back,) in offers["return"]:
            match = next((offer for offer in withdrawals if offer[1] != number), None)
            if number in taken or match is None or change + match[0] >= 0:
                continue
            gains.append((change + match[0], Exchange((number, back), (match[1], match[2][0]))))
            taken |= {number, match[1]}
            withdrawals = [offer for offer in withdrawals if offer[1] not in taken]
        return [exchange for _, exchange in sorted(gains, key=lambda gain: gain[0])]

    def _base(self, keep: Tensor) -> dict[int, Cut]:
        base = {}
        for number, layer in enumerate(self._layers):
            gone = () if layer is None else tuple(head for head in layer.heads if not keep[number, head])
            if gone:
                base[number] = self._cut(number, gone)
        return base

    def _cut(self, number: int, gone: tuple[int, ...]) -> Cut:
        layer, seen = self._layers[number], self._moments.moments[number]
        assert layer is not None
        assert seen is not None
        if (number, gone) not in self._cuts:
            self._cuts[number, gone] = cut_layer(self._model, number, seen, layer, gone, new_bias=self._new_bias)
        return self._cuts[number, gone]


def _of_layer(layer: LayerPrices, gone: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """What squared error proposes for a layer: heads that change sides, named by kind of proposal."""
    found: list[tuple[str, tuple[int, ...]]] = []
    staying = [head for head in layer.heads if head not in gone]
    left = _without(layer, gone)
    if left is not None:
        found.append(("withdrawal", (left.heads[int(left.costs.argmin())],)))
    if not gone:
        return found
    now, pair = layer.joint_cost(gone), None
    best = now
    with_return = {back: _without(layer, [one for one in gone if one != back]) for back in gone}
    # What all cost together is what the others cost, and then the one that would come back.
    after_return = {
        back: now - float(others.costs[others.heads.index(back)])
        for back, others in with_return.items()
        if others is not None
    }
    found.append(("return", (min(gone, key=lambda head: after_return[head]),)))
    for back, others in with_return.items():
        assert others is not None
        for out in staying:
            cost = after_return[back] + float(others.costs[others.heads.index(out)])
            if cost < best:
                best, pair = cost, (back, out)
    if pair is not None and best < now * (1 - 1e-9):
        found.append(("within", pair))
    return found


def _without(layer: LayerPrices, gone: Sequence[int]) -> LayerPrices | None:
    """The layer's prices after these heads have left; None where none is left."""
    left: LayerPrices | None = layer
    for head in gone:
        assert left is not None
        left = None if len(left.heads) == 1 else left.withdraw(head)
    return left
