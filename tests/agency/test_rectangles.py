"""Consent of layers by hand, and what has to hold for any prices and scores; what rounds and levels do with rectangles."""

from __future__ import annotations

import itertools

import pytest
import torch
from builders import plain_costs, random_costs, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pruning_comparison.agency import NegotiatedTrajectory, ProgressiveTrajectory
from pruning_comparison.agency.consent import HeadAnswer
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices, measure_prices, score_obs
from pruning_comparison.agency.rectangles import negotiate_rectangles
from pruning_comparison.agency.savings import cache_savings
from pruning_comparison.pruning.rectangles import (
    Rectangle,
    cheapest_rectangles,
    is_rectangle,
    keep_mask,
    numbers_leaving,
)
from pruning_comparison.pruning.selection import expected_heads_pruned, select_heads
from pruning_comparison.scoring.choice import heads_to_keep
from pruning_comparison.scoring.gradients import score_fisher
from pruning_comparison.scoring.prices import Prices
from pruning_comparison.scoring.scores import HeadScores

CONSENTED, REFUSED, OVERRIDDEN = HeadAnswer
WINDOWS = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(5))
COSTS = [[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 5.0, 9.0]]
"""Two layers of 2 groups of 2, heads that have nothing to do with one another. To lose 2, 3 or 4 heads costs the first layer
3 (the first group), 6 (all but the last head) or 10, and the second 2, 7 or 16."""


def keeping(*rows):
    return torch.tensor([[head in row for head in range(4)] for row in rows])


def said(replies):
    return [((reply.layer, reply.head), reply.answer, reply.cost, reply.left) for reply in replies]


def test_the_heads_of_a_layer_answer_together_and_a_refusal_is_made_up_at_least_price():
    """5 heads: 3 of one layer and 2 of the other cost 6 + 2 or 3 + 7. There 6 for 3 heads is dearer: the limit is 2."""
    keep, replies = negotiate_rectangles(keeping([3], [2, 3]), plain_costs(COSTS), 5, 2)
    assert torch.equal(keep, keeping([3], [2, 3]))
    assert [reply.limit for reply in replies] == pytest.approx([2.0] * 5)
    assert [reply.answer for reply in replies] == [CONSENTED] * 5
    # The second layer's 3 heads cost 7 / 3 = 2.33 and refuse. The first has consented, so 3 have to leave the second.
    keep, replies = negotiate_rectangles(keeping([2, 3], [3]), plain_costs(COSTS), 5, 2)
    assert torch.equal(keep, keeping([2, 3], [3]))
    assert said(replies) == [
        ((0, 0), CONSENTED, pytest.approx(1.5), 0),
        ((0, 1), CONSENTED, pytest.approx(1.5), 1),
        *(((1, head), OVERRIDDEN, pytest.approx(7 / 3), 2 + head) for head in range(3)),
    ]


def test_layers_that_have_refused_or_not_been_asked_consent_to_what_is_cheap_enough():
    """4 heads: at the least 3 + 2, at most 1.5 a head. All of the first layer at 10 / 4 refuse; then both lose a group."""
    keep, replies = negotiate_rectangles(keeping([], [0, 1, 2, 3]), plain_costs(COSTS), 4, 2)
    assert torch.equal(keep, keeping([2, 3], [2, 3]))
    assert said(replies) == [
        ((0, 2), REFUSED, pytest.approx(2.5), None),
        ((0, 3), REFUSED, pytest.approx(2.5), None),
        ((0, 0), CONSENTED, pytest.approx(1.5), 0),
        ((0, 1), CONSENTED, pytest.approx(1.5), 1),
        ((1, 0), CONSENTED, pytest.approx(1.0), 2),
        ((1, 1), CONSENTED, pytest.approx(1.0), 3),
    ]
    keep, replies = negotiate_rectangles(keeping([], [0, 1, 2, 3]), plain_costs(COSTS), 4, 2, everyone_consents=True)
    assert torch.equal(keep, keeping([], [0, 1, 2, 3]))
    assert said(replies) == [((0, head), CONSENTED, pytest.approx(2.5), head) for head in range(4)]


def test_a_number_for_each_layer_gives_each_its_limit():
    """2 of each: the cheapest cost 1.5 and 1 a head. The second group of the first layer, at 3.5, refuses."""
    keep, replies = negotiate_rectangles(keeping([0, 1], [2, 3]), plain_costs(COSTS), [2, 2], 2)
    assert torch.equal(keep, keeping([2, 3], [2, 3]))
    assert [(reply.layer, reply.limit) for reply in replies] == [(0, pytest.approx(1.5))] * 2 + [
        (1, pytest.approx(1.0))
    ] * 2 + [(0, pytest.approx(1.5))] * 2
    assert [reply.answer for reply in replies] == [REFUSED] * 2 + [CONSENTED] * 4


def every_rectangle(prices, n_heads, size):
    """For every layer all sets that keep as many heads of each group that they keep, at their exact price."""
    found = []
    for layer in range(len(prices.layers)):
        options = []
        for number in range(n_heads + 1):
            for kept in itertools.combinations(range(n_heads), number):
                keep = torch.zeros(1, n_heads, dtype=torch.bool)
                keep[0, list(kept)] = True
                if is_rectangle(keep, size):
                    gone = [head for head in range(n_heads) if head not in kept]
                    options.append(Rectangle(kept, 0, prices.price(layer, gone) if gone else 0.0))
        found.append(options)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(numbers_leaving(3, 6, 2)))
@example(122, 3)  # the proposal costs less than what backward greedy finds
def test_what_holds_whatever_prices_and_scores_are(seed, leaving):
    layers, heads, size = 3, 6, 2
    prices = random_costs(layers, heads, seed)
    scores = torch.randn(layers, heads, generator=torch.Generator().manual_seed(seed + 1))
    options = prices.rectangles(size)
    proposed = select_heads(
        scores, 100 * leaving / (layers * heads) if leaving < layers * heads else 99.9, rectangle=size
    )
    assert int((~proposed).sum()) == leaving
    keep, replies = negotiate_rectangles(proposed, prices, leaving, size)
    assert is_rectangle(keep, size)
    assert int((~keep).sum()) == leaving
    left = [
        (reply.layer, reply.head)
        for reply in sorted(replies, key=lambda r: (r.left is None, r.left))
        if reply.left is not None
    ]
    assert sorted(left) == [tuple(place) for place in (~keep).nonzero().tolist()]
    assert [reply.left for reply in replies if reply.left is not None] == list(range(leaving))
    assert [reply.rank for reply in replies] == list(range(len(replies)))
    for reply in replies:
        assert (reply.cost <= reply.limit) == (reply.answer is CONSENTED)
        assert (reply.left is None) == (reply.answer is REFUSED)
    # What is paid, head by head, is what they cost together, and no less than the least of all sets. (Less than the least
    # of ``options`` it can be: the method may propose a set that backward greedy does not find.)
    paid = sum(reply.left_cost for reply in replies if reply.left is not None)
    assert paid == pytest.approx(prices.total(~keep), rel=1e-6)
    least = sum(one.cost for one in cheapest_rectangles(every_rectangle(prices, heads, size), leaving, heads))
    assert least <= paid * (1 + 1e-9)
    # Whoever proposes the cheapest choice hears no refusal.
    cheapest = keep_mask(cheapest_rectangles(options, leaving, heads), heads)
    keep, replies = negotiate_rectangles(cheapest, prices, leaving, size)
    assert torch.equal(keep, cheapest)
    assert {reply.answer for reply in replies} <= {CONSENTED}


LAYERS, HEADS, SIZE = 3, 8, 2


@pytest.fixture(scope="module")
def grouped():
    """A Llama of 4 key-value groups of 2 query heads."""
    return tiny_model("llama", layers=LAYERS, width=32, num_attention_heads=HEADS, num_key_value_heads=HEADS // SIZE)


def fisher(model):
    return score_fisher(model, WINDOWS, batch_size=3, gradient_precision="float32")


def every():
    return torch.ones(LAYERS, HEADS, dtype=torch.bool)


def negotiated(model, scores, prices=None, scope="model", **others):
    moments = observe(model, WINDOWS, keep=every(), batch_size=3)
    prices = prices or Prices.of(layer_prices(model, moments), [1.0, 0.5, 2.0], HEADS)
    return NegotiatedTrajectory(scores, prices, moments=moments, scope=scope, rectangle=SIZE, **others)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_progressive_rounds_meet_every_levels_number(grouped, scope):
    trajectory = ProgressiveTrajectory(grouped, score=fisher, all_heads=every(), scope=scope, rectangle=SIZE)
    returned = 0
    before = every()
    for level in (10, 30, 50, 55, 70, 90):
        keep = trajectory.at(level).keep
        assert is_rectangle(keep, SIZE)
        assert int((~keep).sum()) == expected_heads_pruned(level, LAYERS, HEADS, scope, rectangle=SIZE)
        returned += int((keep & ~before).sum())
        before = keep
        anew = ProgressiveTrajectory(grouped, score=fisher, all_heads=every(), scope=scope, rectangle=SIZE)
        assert torch.equal(anew.at(level).keep, keep)
    assert returned < LAYERS * HEADS / 4


def test_progressive_rounds_by_price_bring_heads_back_where_the_number_asks_for_it():
    """Layers of 3 groups of 3 that lose 5 at 60 % keep 2 groups of 2; at 70 % 3 must stay, which no part of these is."""
    model = tiny_model("llama", layers=2, width=36, num_attention_heads=9, num_key_value_heads=3)

    def score(scored):
        return score_obs(scored, WINDOWS, 3, rectangle=3)

    keep = torch.ones(2, 9, dtype=torch.bool)
    trajectory = ProgressiveTrajectory(
        model, score=score, all_heads=keep, scope="layer", rectangle=3, scores_pruned=True
    )
    at = {level: trajectory.at(level).keep for level in (60, 70, 80)}
    assert [at[level].sum(1).tolist() for level in at] == [[4, 4], [3, 3], [2, 2]]
    assert all(is_rectangle(mask, 3) for mask in at.values())
    # Three of one group, or one of each of three: two of the four have to go, and one comes back.
    assert (at[70] & ~at[60]).sum(1).tolist() == [1, 1]
    assert not bool((at[80] & ~at[70]).any())


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_negotiated_level_is_one_round_that_begins_with_the_dense_model(grouped, scope):
    scores = fisher(grouped)
    together = negotiated(grouped, scores, scope=scope)
    for level in (30, 55, 80, 50):
        reached = together.at(level)
        assert torch.equal(reached.keep, negotiated(grouped, scores, scope=scope).at(level).keep)
        assert is_rectangle(reached.keep, SIZE)
        assert int((~reached.keep).sum()) == expected_heads_pruned(level, LAYERS, HEADS, scope, rectangle=SIZE)
        assert [record.level for record in reached.round_records] == [level]
    assert bool(together.at(0).keep.all())
    always = negotiated(grouped, scores, scope=scope, everyone_consents=True)
    assert torch.equal(always.at(50).keep, select_heads(scores.scores, 50, scope, rectangle=SIZE))


def test_consent_changes_nothing_where_the_method_is_the_price(grouped):
    prices = measure_prices(grouped, WINDOWS, batch_size=3)
    scores = score_obs(grouped, WINDOWS, 3, prices=lambda: prices, rectangle=SIZE)
    for level in (10, 30, 50, 70, 90):
        reached = negotiated(grouped, scores, prices).at(level)
        assert torch.equal(reached.keep, heads_to_keep(scores, level, rectangle=SIZE))
        assert all(reply.answer == "consented" for reply in reached.round_records[0].replies)
        # Chosen by what sets cost together, and not by the sum of the positions at which heads leave.
        least = cheapest_rectangles(prices.rectangles(SIZE), int((~reached.keep).sum()), HEADS)
        assert prices.total(~reached.keep) == pytest.approx(sum(one.cost for one in least), rel=1e-6)
    by_position = HeadScores(scores.scores)
    assert any(
        not torch.equal(heads_to_keep(by_position, level, rectangle=SIZE), heads_to_keep(scores, level, rectangle=SIZE))
        for level in (10, 20, 30, 40, 50, 60, 70, 80, 90)
    )


def test_rectangles_are_held_by_price_alone(grouped):
    with pytest.raises(ValueError, match="by their prices alone"):
        negotiated(grouped, fisher(grouped), savings=cache_savings(2, 64))
