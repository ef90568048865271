"""Prices of heads: what a head's going costs once the survivors of its layer have adapted, in closed form.

Within a layer the price is an error, in squared units of what the layer writes; ``Prices`` weighs it across layers by what
an error in each costs the model, which ``agency.prices_across_layers`` measures. Nothing here runs a model.

Dimension letters: L layers, H heads, D head size, E embedding, F features (live heads of one layer x D).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruning_comparison.pruning.rectangles import Rectangle

RIDGE = 0.03
"""Of the Gram matrix that prices come from, in units of its mean diagonal."""


def withdrawal_costs(gram: Tensor, weight: Tensor, *, heads: int, ridge: float = RIDGE) -> Tensor:
    """What the withdrawal of each head alone costs its layer after the survivors have adapted, [H].

    With G [F, F] the Gram matrix per token plus lambda I, lambda = ``ridge`` * its mean diagonal, and W [F, E] the output
    projection: tr(W_h' [(G^-1)_hh]^-1 W_h), the optimal-brain-surgeon cost (Hassibi and Stork 1993) of a block. It is the
    least squared error per token in what the layer writes, plus lambda |change of W|^2, over all output projections whose
    rows of head h are zero.
    """
    return _block_costs(ridged_inverse(gram.double(), ridge), weight.double(), heads)


@dataclass(frozen=True)
class LayerPrices:
    """Withdrawal costs of one layer's live heads, with those that have left taken into account.

    ``inverse`` [F, F] is the inverse of the live features' ridged Gram matrix per token, ``weight`` [F, E] the output
    projection as the survivors would have adapted it, ``costs`` [H'] what each live head would cost next: squared error per
    token in what the layer writes.
    """

    heads: tuple[int, ...]
    inverse: Tensor
    weight: Tensor
    costs: Tensor
    _curves: dict[int, Curve] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rectangles: dict[int, tuple[Rectangle, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, heads: Sequence[int], *, ridge: float = RIDGE) -> LayerPrices:
        """From the Gram matrix per token [F, F] and the output projection [F, E] of the live ``heads``."""
        inverse, rows = ridged_inverse(gram.double(), ridge), weight.double()
        return cls(tuple(heads), inverse, rows, _block_costs(inverse, rows, len(heads)))

    def withdraw(self, head: int) -> LayerPrices:
        """The costs after ``head``, one of at least two, has left and the others have adapted. KeyError if it has left.

        Block elimination: with P = G^-1, the inverse of G without head h is P_oo - P_oh P_hh^-1 P_ho, and the best weights
        without it are W_o - P_oh P_hh^-1 W_h. Constraints add up on a quadratic, so costs paid one after the other sum to
        the joint cost of the set, in whatever order.
        """
        place = self._place(head)
        size = len(self.inverse) // len(self.heads)
        gone = slice(place * size, (place + 1) * size)
        left = self.heads[:place] + self.heads[place + 1 :]
        # By numbers and not by a mask: a device would have to be waited for to count what a mask holds.
        rest = torch.tensor([row for row in range(len(self.inverse)) if not gone.start <= row < gone.stop])
        rest = rest.to(self.inverse.device)
        rows = self.inverse[rest]
        cross = self.inverse[gone][:, rest]
        gain = torch.linalg.solve(self.inverse[gone, gone], cross)
        inverse = rows[:, rest] - cross.T @ gain
        inverse = (inverse + inverse.T) / 2
        weight = self.weight[rest] - gain.T @ self.weight[gone]
        return LayerPrices(left, inverse, weight, _block_costs(inverse, weight, len(left)))

    def joint_cost(self, heads: Sequence[int]) -> float:
        """What several live heads that leave together cost. KeyError if one has left."""
        total, layer = 0.0, self
        for number, head in enumerate(heads):
            total += float(layer.costs[layer._place(head)])
            if number + 1 < len(heads):
                layer = layer.withdraw(head)
        return total

    def group_costs(self, group_size: int) -> Tensor:
        """What each group of ``group_size`` live heads that follow one another costs as a whole, [H' / group_size]."""
        return _block_costs(self.inverse, self.weight, len(self.heads) // group_size)

    def cheapest_first(self, group_size: int = 1) -> Curve:
        """Backward greedy: all live heads in the order in which they leave when the next is always the one that costs least.

        Heads of a whole ``group_size`` leave together, at their joint cost. Of equals the first leaves.
        """
        if group_size in self._curves:
            return self._curves[group_size]
        order: list[int] = []
        sums = [0.0]
        layer: LayerPrices | None = self
        while layer is not None:
            groups = [layer.heads[first : first + group_size] for first in range(0, len(layer.heads), group_size)]
            costs = [layer.joint_cost(group) for group in groups]
            paid = min(costs)
            leaving = groups[costs.index(paid)]
            order.extend(leaving)
            sums.append(sums[-1] + paid)
            for head in leaving:
                layer = None if len(layer.heads) == 1 else layer.withdraw(head)
                if layer is None:
                    break
        self._curves[group_size] = Curve(tuple(order), tuple(sums), group_size)
        return self._curves[group_size]

    def rectangles(self, rectangle: int) -> tuple[Rectangle, ...]:
        """A set of each shape that the layer can keep, g groups of r live heads, by backward greedy, with its unweighed
        cost.

        ``rectangle`` is R, the query heads per key-value group. From a shape with one group, or one head of each group,
        more, there leaves the group with the least joint cost, or the cheapest head of every group, the cheapest of all
        first, costs brought up to date after each. Of both ways to a shape the one that has cost less in all counts. So
        G R sets are looked at where there are 2^H; a test holds them against the best of all. ValueError unless the
        live heads are a rectangle.
        """
        if rectangle not in self._rectangles:
            self._rectangles[rectangle] = tuple(_layer_rectangles(self, rectangle))
        return self._rectangles[rectangle]

    def _place(self, head: int) -> int:
        if head not in self.heads:
            raise KeyError(f"head {head} has left")
        return self.heads.index(head)


@dataclass(frozen=True)
class Curve:
    """How a layer loses its heads when the cheapest goes first: C_l(k).

    ``order`` has its live heads in the order in which they leave, ``group_size`` at a time; ``sums[k]`` is what the first k
    groups cost together, ``sums[0]`` 0.
    """

    order: tuple[int, ...]
    sums: tuple[float, ...]
    group_size: int = 1

    @property
    def half(self) -> int:
        """The groups that make up the cheaper half of the layer, rounded down; at least one."""
        return max(1, (len(self.sums) - 1) // 2)

    def first(self, groups: int) -> tuple[int, ...]:
        """The heads of that many cheapest groups."""
        return self.order[: groups * self.group_size]

    def weighed(self, weight: float) -> Curve:
        """The same with every sum times ``weight``."""
        return Curve(self.order, tuple(weight * total for total in self.sums), self.group_size)


@dataclass(frozen=True)
class Prices:
    """What the going of every live head would cost now, weighed across layers. Immutable: withdrawing gives a new one.

    ``weights`` [L] turn a layer's squared error per token into nats of Kullback-Leibler divergence per token, or, with
    ones, leave it as it is.
    """

    layers: tuple[LayerPrices | None, ...]
    weights: tuple[float, ...]
    n_heads: int

    @classmethod
    def of(cls, layers: Sequence[LayerPrices | None], weights: Sequence[float] | None, n_heads: int) -> Prices:
        """Of layers, None where all heads have left. ValueError for weights that are negative, not finite or too few."""
        factors = torch.ones(len(layers)) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
        if len(factors) != len(layers) or not bool((factors.isfinite() & (factors >= 0)).all()):
            raise ValueError(f"weights must be {len(layers)} finite numbers of at least 0, got {factors.tolist()}")
        return cls(tuple(layers), tuple(factors.tolist()), n_heads)

    def price(self, layer: int, heads: Iterable[int]) -> float:
        """Of live heads of a layer that leave together. KeyError if one has left."""
        of_layer, leaving = self.layers[layer], list(heads)
        if of_layer is None:
            raise KeyError(f"head {leaving[0]} of layer {layer} has left")
        return self.weights[layer] * of_layer.joint_cost(leaving)

    def rectangles(self, rectangle: int) -> list[list[Rectangle]]:
        """For every layer what it can keep, a set of each shape, with the price of the others: see
        ``LayerPrices.rectangles``.

        A layer that has no heads can keep none.
        """
        return [
            [Rectangle((), 0, 0.0)]
            if layer is None
            else [Rectangle(one.kept, one.groups, weight * one.cost) for one in layer.rectangles(rectangle)]
            for layer, weight in zip(self.layers, self.weights, strict=True)
        ]

    def table(self) -> Tensor:
        """Prices of single heads, float64 [L, H] on the CPU; NaN for heads that have left."""
        prices = torch.full((len(self.layers), self.n_heads), torch.nan, dtype=torch.float64)
        for layer, of_layer in enumerate(self.layers):
            if of_layer is not None:
                prices[layer, list(of_layer.heads)] = self.weights[layer] * of_layer.costs
        return prices

    def withdraw(self, layer: int, head: int) -> Prices:
        """The prices after this head has left. KeyError if it has left before."""
        of_layer = self.layers[layer]
        if of_layer is None or head not in of_layer.heads:
            raise KeyError(f"head {head} of layer {layer} has left")
        changed = None if len(of_layer.heads) == 1 else of_layer.withdraw(head)
        return Prices((*self.layers[:layer], changed, *self.layers[layer + 1 :]), self.weights, self.n_heads)

    def total(self, leaving: Tensor) -> float:
        """What live heads, true in bool [L, H], cost together: the predicted divergence from the dense model.

        Costs of layers are added up, which holds as long as errors of different layers neither cancel nor amplify.
        """
        return sum(
            self.price(layer, leaving[layer].nonzero().squeeze(1).tolist())
            for layer in range(len(self.layers))
            if bool(leaving[layer].any())
        )


def elimination(prices: Prices, group_size: int = 1) -> tuple[Tensor, Tensor]:
    """Position at which every head leaves when the cheapest always goes first, and what it is paid for: two float [L, H].

    A layer's own greedy order does not depend on the other layers, so the order of all heads merges those of the layers: the
    next to leave is the next of the layer where that has the least price, w_l (C_l(k + 1) - C_l(k)). Heads of a group share
    a position, and its price evenly. Heads that have left before have position -1 and price 0. Ties leave in the order of
    layers.
    """
    weighed: list[Curve | None] = []
    for layer, weight in zip(prices.layers, prices.weights, strict=True):
        curve = None if layer is None else layer.cheapest_first(group_size)
        weighed.append(None if curve is None else curve.weighed(weight))
    return merged(weighed, prices.n_heads)


def merged(curves: Sequence[Curve | None], n_heads: int) -> tuple[Tensor, Tensor]:
    """The order of all heads, and what each is paid for, of layers whose curves are in nats: see ``elimination``."""
    shape = len(curves), n_heads
    order, paid = torch.full(shape, -1.0, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    taken = [0] * len(curves)
    position = 0
    while True:
        offers = {
            layer: curve.sums[taken[layer] + 1] - curve.sums[taken[layer]]
            for layer, curve in enumerate(curves)
            if curve is not None and taken[layer] + 1 < len(curve.sums)
        }
        if not offers:
            return order, paid
        layer = min(offers, key=lambda one: offers[one])
        curve = curves[layer]
        assert curve is not None
        leaving = curve.order[taken[layer] * curve.group_size : (taken[layer] + 1) * curve.group_size]
        order[layer, list(leaving)] = float(position)
        paid[layer, list(leaving)] = offers[layer] / len(leaving)
        taken[layer] += 1
        position += 1


def _layer_rectangles(layer: LayerPrices, rectangle: int) -> Iterator[Rectangle]:
    groups = sorted({head // rectangle for head in layer.heads})
    per_group = len(layer.heads) // len(groups)
    if any(sum(head // rectangle == group for head in layer.heads) != per_group for group in groups):
        raise ValueError(f"heads {list(layer.heads)} are not as many of each key-value group of {rectangle}")
    above: list[tuple[float, LayerPrices]] = []
    for r in range(per_group, 0, -1):
        row: list[tuple[float, LayerPrices]] = []
        for g in range(len(groups), 0, -1):
            ways = []
            if above:
                ways.append(_without_a_head_of_each(*above[len(row)], rectangle))
            if row:
                ways.append(_without_a_group(*row[-1], r))
            row.append(min(ways, key=lambda way: way[0]) if ways else (0.0, layer))
            yield Rectangle(row[-1][1].heads, g, row[-1][0])
        above = row
    paid, last = above[-1]
    yield Rectangle((), 0, paid + float(last.costs[0]))


def _without_a_group(paid: float, layer: LayerPrices, r: int) -> tuple[float, LayerPrices]:
    """After the group with the least joint cost has left, one of at least two of ``r`` live heads each."""
    costs = layer.group_costs(r)
    first = r * int(costs.argmin())
    leaving = layer.heads[first : first + r]
    for head in leaving:
        layer = layer.withdraw(head)
    return paid + float(costs.min()), layer


def _without_a_head_of_each(paid: float, layer: LayerPrices, rectangle: int) -> tuple[float, LayerPrices]:
    """After one of at least two live heads has left every group, the cheapest of all first."""
    open_groups = {head // rectangle for head in layer.heads}
    while open_groups:
        offers = {
            head: float(cost)
            for head, cost in zip(layer.heads, layer.costs, strict=True)
            if head // rectangle in open_groups
        }
        head = min(offers, key=lambda one: offers[one])
        paid += offers[head]
        layer = layer.withdraw(head)
        open_groups.remove(head // rectangle)
    return paid, layer


def ridged_inverse(gram: Tensor, ridge: float) -> Tensor:
    """(G + lambda I)^-1 of a float64 Gram matrix [F, F], lambda = ``ridge`` * mean diagonal of G; always finite.

    Where the Cholesky factor does not exist or the inverse overflows, the ridge grows tenfold. ValueError unless ``ridge``
    is above 0.
    """
    if not ridge > 0:
        raise ValueError(f"the ridge must be above 0, got {ridge}")
    # A layer whose heads hand over nothing has no scale of its own; any small one makes its costs next to nothing.
    scale = max(float(gram.diagonal().mean()), _LEAST_SCALE)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    strength = ridge
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + strength * scale * identity)
        if not bool(failed):
            inverse = torch.cholesky_inverse(factor)
            if bool(inverse.isfinite().all()):
                return inverse
        if not strength < 1e12:
            raise ValueError("the Gram matrix of the head outputs is not finite")
        strength *= 10


_LEAST_SCALE = 1e-100


def _block_costs(inverse: Tensor, weight: Tensor, heads: int) -> Tensor:
    """tr(W_h' [P_hh]^-1 W_h) for every head, [H] on the CPU; squares of a Cholesky solve, so never negative."""
    size = len(inverse) // heads
    blocks = inverse.view(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors = torch.linalg.cholesky(blocks)
    solved = torch.linalg.solve_triangular(factors, weight.view(heads, size, -1), upper=False)
    costs: Tensor = solved.square().sum((1, 2)).cpu()
    return costs
