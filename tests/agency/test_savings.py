"""What withdrawals save: moves and rates by brute force on small tables, and what comes of them in a negotiation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builders import plain_costs, random_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.agency.consent import HeadAnswer, negotiate
from pruning_comparison.agency.savings import Savings, cache_savings, cheapest_steps, hull_moves, time_savings
from pruning_comparison.scoring.prices import LayerPrices, Prices

CONSENTED, REFUSED, OVERRIDDEN = HeadAnswer


def everyone(prices):
    return prices.table().isfinite()


def least_by_brute_force(points, saved):
    """The least price, mixing two points (V, P) if need be, that saves exactly so much: the lower convex hull there."""
    best = min((p for v, p in points if v == saved), default=math.inf)
    for (v, p), (w, q) in itertools.permutations(points, 2):
        if v < saved < w:
            best = min(best, p + (q - p) * (saved - v) / (w - v))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.floats(0.01, 10)),
        min_size=1,
        max_size=7,
    )
)
def test_moves_end_on_the_convex_hull_and_their_rates_rise(steps):
    saved = list(itertools.accumulate((float(step) for step, _ in steps), initial=0.0))
    paid = list(itertools.accumulate((price for _, price in steps), initial=0.0))
    moves = hull_moves(saved, paid)
    points = list(zip(saved, paid, strict=True))
    # The corners lie on the hull, and so does every point between them.
    for start, end, rate in moves:
        assert paid[end] == pytest.approx(least_by_brute_force(points, saved[end]))
        assert rate == pytest.approx((paid[end] - paid[start]) / (saved[end] - saved[start]))
        middle = (saved[start] + saved[end]) / 2
        assert least_by_brute_force(points, middle) == pytest.approx((paid[start] + paid[end]) / 2)
    assert [rate for *_, rate in moves] == pytest.approx(sorted(rate for *_, rate in moves))
    assert [start for start, *_ in moves] == [0, *(end for _, end, _ in moves)][: len(moves)]
    assert max((saved[end] for _, end, _ in moves), default=0.0) == saved[-1]


def test_a_layer_whose_emptying_alone_saves_time_is_one_move():
    """Heads at 1, 2 and 6; nothing is saved until the last has gone, then 3 s: 9 nats for 3 s, whoever is looked at."""
    prices = plain_costs([[1.0, 6.0, 2.0]])
    savings = time_savings({3: 5.0, 2: 5.0, 1: 5.0, 0: 2.0})
    assert savings.rates(prices, 0) == pytest.approx({0: 3.0, 1: 3.0, 2: 3.0})


def test_where_every_head_saves_as_much_rates_are_the_prices_over_it():
    prices = plain_costs([[1.0, 6.0, 2.0]])
    assert time_savings({3: 8.0, 2: 6.0, 1: 4.0, 0: 2.0}).rates(prices, 0) == pytest.approx({0: 0.5, 1: 3.0, 2: 1.0})


def test_a_head_that_saves_nothing_joins_the_cheapest_move_that_does():
    """Times 8, 8, 5, 4: the two cheapest heads, 1 + 2, save 3 s, a rate of 1; the last, 6, saves 1 s more."""
    prices = plain_costs([[1.0, 6.0, 2.0]])
    assert time_savings({3: 8.0, 2: 8.0, 1: 5.0, 0: 4.0}).rates(prices, 0) == pytest.approx({0: 1.0, 2: 1.0, 1: 6.0})


def test_times_that_fall_with_more_heads_are_levelled():
    """3 heads measured faster than 2: both count as 5.5, so the first head to go saves nothing, and goes with the second."""
    prices = plain_costs([[1.0, 6.0, 2.0]])
    rates = time_savings({3: 5.0, 2: 6.0, 1: 4.0, 0: 2.0}).rates(prices, 0)
    assert rates == pytest.approx({0: 3 / 1.5, 2: 3 / 1.5, 1: 6 / 2})


def test_what_saves_nothing_more_has_an_infinite_rate():
    prices = plain_costs([[1.0, 6.0]])
    assert time_savings({2: 3.0, 1: 2.0, 0: 2.0}).rates(prices, 0) == pytest.approx({0: 1.0, 1: math.inf})


def test_a_key_value_head_leaves_the_cache_with_the_last_head_that_reads_it():
    """Two groups of two, at 1 + 7 and 3 + 3; a group saves 10 bytes: the second is cheaper, though head 0 costs least."""
    prices = plain_costs([[1.0, 7.0, 3.0, 3.0]])
    savings = cache_savings(group_size=2, kv_head_bytes=10)
    assert savings.rates(prices, 0) == pytest.approx({2: 0.6, 3: 0.6, 0: 0.8, 1: 0.8})
    assert savings.rates(prices.withdraw(0, 1), 0) == pytest.approx({0: 0.1, 2: 0.6, 3: 0.6})


def test_where_every_head_has_its_own_keys_cache_rates_are_the_order_of_prices():
    prices = plain_costs([[1.0, 7.0, 3.0, 4.0]])
    assert cache_savings(1, 8).rates(prices, 0) == pytest.approx({0: 1 / 8, 2: 3 / 8, 3: 4 / 8, 1: 7 / 8})


def test_steps_are_the_backward_greedy_of_single_heads_and_of_what_is_left_of_groups():
    prices = random_costs(1, 6, 3)
    layer = prices.layers[0]
    steps, costs = cheapest_steps(layer)
    curve = layer.cheapest_first()
    assert [head for (head,) in steps] == list(curve.order)
    assert list(itertools.accumulate(costs, initial=0.0)) == pytest.approx(curve.sums)
    left = layer.withdraw(1)
    steps, costs = cheapest_steps(left, 3)
    assert sorted(steps) == [(0, 2), (3, 4, 5)]
    assert costs[0] == pytest.approx(min(left.joint_cost((0, 2)), left.joint_cost((3, 4, 5))))
    assert sum(costs) == pytest.approx(left.joint_cost(left.heads))


def test_of_duplicates_the_first_is_cheap_and_the_other_is_not():
    base = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).double()
    layer = LayerPrices.of(
        torch.cat([base, base], 1).T @ torch.cat([base, base], 1) / 40, torch.ones(2, 1), (0, 1), ridge=1e-9
    )
    rates = time_savings({2: 3.0, 1: 2.0, 0: 1.0}).rates(Prices((layer,), (1.0,), 2), 0)
    assert rates[0] < 1e-6 < 1.0 < rates[1]


EMPTYING = {0: 1.0, 1: 4.0, 2: 4.0, 3: 4.0}
"""Seconds of a layer by its heads: only an empty one is faster, by 3 s."""


def test_a_whole_layer_leaves_where_quality_would_spread_the_heads():
    """Layer 0 costs 2 + 2 + 2 = 6, layer 1 1 + 1 + 9 = 11. By price the two heads at 1 leave first; by time layer 0."""
    prices = plain_costs([[2.0, 2.0, 2.0], [1.0, 1.0, 9.0]])
    scores = torch.arange(6.0).view(2, 3).flip(0)  # layer 1 is asked first
    plain = negotiate(scores, prices, everyone(prices), 3)
    assert set(plain.left) == {(1, 0), (1, 1), (0, 0)}
    timed = negotiate(scores, prices, everyone(prices), 3, savings=time_savings(EMPTYING))
    assert set(timed.left) == {(0, 0), (0, 1), (0, 2)}
    assert timed.violations == ()
    assert [reply.answer for reply in timed.replies[:3]] == [REFUSED] * 3
    assert [reply.limit for reply in timed.replies] == pytest.approx([2.0] * 6)
    assert [reply.cost for reply in timed.replies] == pytest.approx([11 / 3] * 3 + [2.0] * 3)


def test_a_move_that_is_only_begun_takes_no_place_of_a_cheaper_one():
    """Four of six must go: layer 0 as a whole, at 2 nats per second, and one head of layer 1, though that is asked first."""
    prices = plain_costs([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    scores = torch.arange(6.0).view(2, 3).flip(0)
    result = negotiate(scores, prices, everyone(prices), 4, savings=time_savings(EMPTYING))
    assert set(result.left) == {(1, 0), (0, 0), (0, 1), (0, 2)}
    assert result.violations == ()


def test_a_layer_that_was_begun_is_finished_first():
    """What has been paid is past: of layer 1 one head is left, 3 nats for the same 3 s, cheaper than layer 0 at 4.5."""
    prices = plain_costs([[1.5, 1.5, 1.5], [3.0, 3.0, 3.0]]).withdraw(1, 0).withdraw(1, 2)
    result = negotiate(torch.arange(6.0).view(2, 3), prices, everyone(prices), 1, savings=time_savings(EMPTYING))
    assert result.left == ((1, 1),)


def test_what_saves_nothing_goes_by_price_when_all_else_has_gone():
    prices = plain_costs([[1.0, 8.0, 6.0]])
    savings = time_savings({3: 5.0, 2: 4.0, 1: 4.0, 0: 4.0})
    result = negotiate(torch.arange(3.0).view(1, 3), prices, everyone(prices), 2, savings=savings)
    assert result.left == ((0, 0), (0, 2))
    assert [(reply.head, reply.left_cost) for reply in result.violations] == [(2, math.inf)]


def test_each_layer_keeps_its_own_quota():
    prices = plain_costs([[2.0, 4.0, 3.0], [1.0, 5.0, 9.0]])
    savings = time_savings({3: 4.0, 2: 3.0, 1: 2.0, 0: 1.0})
    result = negotiate(torch.arange(6.0).view(2, 3).flip(1), prices, everyone(prices), [1, 2], savings=savings)
    assert set(result.left) == {(0, 0), (1, 0), (1, 1)}


def test_groups_leave_as_one_and_are_held_as_one():
    prices = plain_costs([[1.0, 7.0, 3.0, 3.0]])
    savings = time_savings({4: 8.0, 2: 6.0, 0: 4.0}, 2)
    result = negotiate(torch.arange(4.0).view(1, 4), prices, everyone(prices), 2, group_size=2, savings=savings)
    assert result.left == ((0, 2), (0, 3))
    assert [reply.cost for reply in result.replies] == pytest.approx([4, 4, 3, 3])


def test_heads_that_all_consent_go_in_the_order_of_the_method_whatever_they_save():
    prices = random_costs(2, 4, 1)
    scores = torch.randperm(8, generator=torch.Generator().manual_seed(2)).double().view(2, 4)
    first = scores.flatten().argsort()[:3].tolist()
    result = negotiate(
        scores,
        prices,
        everyone(prices),
        3,
        everyone_consents=True,
        savings=time_savings({n: 4.0 + n for n in range(5)}),
    )
    assert [4 * layer + head for layer, head in result.left] == first


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12), st.booleans())
def test_as_many_leave_as_must_and_no_cheaper_move_is_passed_over(seed, quota, cache):
    """Whoever stays has no lower rate than any that left: by rates at the start, whatever the order of the method."""
    prices = random_costs(3, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.rand(5, generator=generator).cumsum(0).tolist()
    savings = cache_savings(2, 8) if cache else time_savings(dict(enumerate(seconds)))
    rates = {(layer, head): rate for layer in range(3) for head, rate in savings.rates(prices, layer).items()}
    scores = torch.rand(3, 4, generator=generator)
    result = negotiate(scores, prices, everyone(prices), quota, savings=savings)
    assert len(result.left) == quota == int((~result.keep).sum())
    if 0 < quota < 12:
        assert max(rates[place] for place in result.left) <= min(
            rate for place, rate in rates.items() if place not in result.left
        )
    assert result.violations == ()


def test_rates_are_worked_out_again_only_where_a_layer_has_changed():
    asked = []

    def spent(heads):
        asked.append(tuple(heads))
        return float(len(heads))

    prices = plain_costs([[1.0, 2.0], [3.0, 4.0]])
    savings = Savings(spent)
    first = savings.rates(prices, 0), savings.rates(prices, 1)
    count = len(asked)
    later = prices.withdraw(0, 1)
    assert savings.rates(later, 1) is first[1]
    assert len(asked) == count
    assert savings.rates(later, 0) == pytest.approx({0: 1.0})
