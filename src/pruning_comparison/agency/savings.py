"""What withdrawals save, in time or in cache bytes, and the rate at which a saving is paid for. Pure functions.

A price says what the going of heads costs; what it saves need not follow it. A layer without heads runs no attention at all,
which saves more time than as many heads spread over several layers, and a key-value head leaves the cache only with all the
query heads that read it. So savings are had by moves of several heads, and a rate is that of a move.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scipy.optimize import isotonic_regression

from pruning_comparison.scoring.prices import LayerPrices, Prices


class Savings:
    """Rates of heads: nats of price for each unit that a layer's next moves save.

    Within a layer heads leave in its cheapest-first order, ``together`` at a time: those that share ``head // together``.
    After j of these steps they have cost P_j and saved V_j, what the layer spends on the heads there are less what it spends
    on those left. The moves are the segments of the lower convex hull of the points (V_j, P_j): from the point i reached, to
    the j > i at which

        (P_j - P_i) / (V_j - V_i)

    is least, the nearest of equals. That quotient is the rate of every head that leaves in the move. A step that saves
    nothing by itself is so part of a move that does: the emptying of a layer, as one move, has the price of all its heads
    over all that it saves. Heads after the last saving have an infinite rate.

    Along the hull rates rise, so that taking the least rate of all layers first gives, at the end of every move, the least
    price for what has been saved in all by heads that leave their layers in this order.
    """

    def __init__(self, spent: Callable[[Sequence[int]], float], together: int = 1) -> None:
        """``spent`` says what a layer with these live heads spends, in whatever unit; more heads never spend less."""
        self._spent = spent
        self._together = together
        # A layer that nobody has left since keeps its rates; its prices are the very same object then.
        self._known: dict[int, tuple[LayerPrices, dict[int, float]]] = {}

    def rates(self, prices: Prices, layer: int) -> Mapping[int, float]:
        """The rate of every live head of a layer, by head."""
        of_layer = prices.layers[layer]
        if of_layer is None:
            return {}
        known = self._known.get(layer)
        if known is None or known[0] is not of_layer:
            known = of_layer, self._rates(of_layer, prices.weights[layer])
            self._known[layer] = known
        return known[1]

    def _rates(self, layer: LayerPrices, weight: float) -> dict[int, float]:
        steps, costs = cheapest_steps(layer, self._together)
        paid, saved, left = [0.0], [0.0], list(layer.heads)
        before = self._spent(left)
        for heads, cost in zip(steps, costs, strict=True):
            left = [head for head in left if head not in heads]
            paid.append(paid[-1] + weight * cost)
            saved.append(before - self._spent(left))
        rates = dict.fromkeys(layer.heads, float("inf"))
        for start, end, rate in hull_moves(saved, paid):
            for heads in steps[start:end]:
                rates |= dict.fromkeys(heads, rate)
        return rates


def hull_moves(saved: Sequence[float], paid: Sequence[float]) -> list[tuple[int, int, float]]:
    """The moves (i, j, rate) along the lower convex hull of the points (V_j, P_j), from the first to the last saving."""
    moves: list[tuple[int, int, float]] = []
    start = 0
    while True:
        ends = [end for end in range(start + 1, len(saved)) if saved[end] > saved[start]]
        if not ends:
            return moves
        slopes = [(paid[end] - paid[start]) / (saved[end] - saved[start]) for end in ends]
        rate = min(slopes)
        end = ends[slopes.index(rate)]
        moves.append((start, end, rate))
        start = end


def cheapest_steps(layer: LayerPrices, together: int = 1) -> tuple[list[tuple[int, ...]], list[float]]:
    """Backward greedy over a layer's live heads: which leave at every step, and what the step costs, unweighed.

    Heads that share ``head // together`` leave at once, as many of them as are live. Of equals the first leaves.
    """
    steps: list[tuple[int, ...]] = []
    costs: list[float] = []
    left: LayerPrices | None = layer
    while left is not None:
        groups: dict[int, list[int]] = {}
        for head in left.heads:
            groups.setdefault(head // together, []).append(head)
        offers = {group: left.joint_cost(heads) for group, heads in groups.items()}
        group = min(offers, key=lambda one: offers[one])
        steps.append(tuple(groups[group]))
        costs.append(offers[group])
        for head in steps[-1]:
            left = None if len(left.heads) == 1 else left.withdraw(head)
            if left is None:
                break
    return steps, costs


def time_savings(layer_times_s: Mapping[int, float], together: int = 1) -> Savings:
    """Savings of time, in seconds of a decoding step: ``layer_times_s`` has the seconds of one layer by its live heads.

    More heads cannot take less time, so times that fall are a clock's noise, or a slower kernel for some counts: they are
    replaced by the nearest that do not (isotonic regression), which makes the steps between them save nothing. Counts that
    are missing are not asked for.
    """
    counts = sorted(layer_times_s)
    smooth = isotonic_regression([layer_times_s[count] for count in counts]).x
    table = dict(zip(counts, map(float, smooth), strict=True))
    return Savings(lambda heads: table[len(heads)], together)


def cache_savings(group_size: int, kv_head_bytes: int) -> Savings:
    """Savings of key-value cache, in bytes per token of context.

    ``group_size`` query heads read each key-value head, which takes ``kv_head_bytes`` per token until all of them have left.
    """
    return Savings(lambda heads: kv_head_bytes * len({head // group_size for head in heads}), group_size)
