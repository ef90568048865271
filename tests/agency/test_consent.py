"""States and negotiation by hand, on a planted model, and what has to hold whatever the heads, scores and costs are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builders import plain_costs, random_costs, tiny_gpt2, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.agency import consent
from pruning_comparison.agency.consent import (
    HeadAnswer,
    HeadState,
    consent_limit,
    head_states,
    negotiate,
    quota_of_level,
)
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices
from pruning_comparison.agency.signals import HeadSignals, measure_signals
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.scoring.gradients import score_fisher
from pruning_comparison.scoring.prices import LayerPrices, Prices

ACTIVE, OVERLOADED, MISALIGNED, WITHDRAWN = HeadState
CONSENTED, REFUSED, OVERRIDDEN = HeadAnswer
WINDOWS = torch.randint(1, 97, (8, 24), generator=torch.Generator().manual_seed(4))


def scores_in_order(*places, shape):
    """Scores that ask these places first, then the others in order of layer and head."""
    scores = torch.arange(math.prod(shape)).double().view(shape) + len(places)
    for number, place in enumerate(places):
        scores[place] = number
    return scores


def answers(negotiation):
    return [((reply.layer, reply.head), reply.answer) for reply in negotiation.replies]


def test_heads_are_asked_in_the_methods_order_until_enough_have_left():
    costs = plain_costs([[1.0, 5.0, 2.0], [9.0, 0.5, 3.0]])
    scores = torch.tensor([[3.0, 1.0, 2.0], [6.0, 5.0, 4.0]])
    keep = torch.ones(2, 3, dtype=torch.bool)
    result = negotiate(scores, costs, keep, 2, limit=2.5)
    assert answers(result) == [((0, 1), REFUSED), ((0, 2), CONSENTED), ((0, 0), CONSENTED)]
    assert result.left == ((0, 2), (0, 0))
    assert result.keep.tolist() == [[False, True, False], [True, True, True]]
    assert [reply.cost for reply in result.replies] == pytest.approx([5, 2, 1])
    assert [reply.rank for reply in result.replies] == [0, 1, 2]
    assert [reply.left for reply in result.replies] == [None, 0, 1]
    assert result.violations == ()
    assert [reply.limit for reply in result.replies] == [2.5] * 3
    assert result.prices.table().isfinite().tolist() == result.keep.tolist()
    assert keep.all()


def test_the_cheapest_refusals_are_overridden_when_too_few_consent():
    costs = plain_costs([[1.0, 5.0, 8.0], [9.0, 7.0, 6.0]])
    result = negotiate(scores_in_order((1, 0), (1, 1), shape=(2, 3)), costs, torch.ones(2, 3) > 0, 4, limit=1.5)
    assert [place for place, answer in answers(result) if answer is CONSENTED] == [(0, 0)]
    assert [(reply.layer, reply.head) for reply in result.violations] == [(0, 1), (1, 2), (1, 1)]
    assert [reply.left for reply in result.violations] == [1, 2, 3]
    assert [reply.left_cost for reply in result.violations] == pytest.approx([5, 6, 7])
    assert result.left == ((0, 0), (0, 1), (1, 2), (1, 1))
    assert [place for place, answer in answers(result) if answer is REFUSED] == [(1, 0), (0, 2)]


def test_costs_are_brought_up_to_date_between_overrides():
    """Heads 0 and 1 of layer 0 are duplicates: cheap while the other is there, the dearest of all when it is not."""
    base = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).double()
    other = torch.randn(40, 1, generator=torch.Generator().manual_seed(1)).double()
    x = torch.cat([base, base, other], 1)
    layer = LayerPrices.of(x.T @ x / 40, torch.tensor([[1.9], [2.0], [1.0]]), range(3), ridge=1e-9)
    costs = Prices((layer,), (1.0,), 3)
    result = negotiate(torch.zeros(1, 3), costs, torch.ones(1, 3) > 0, 2, limit=0.0)
    assert result.left == ((0, 0), (0, 2))
    assert [reply.answer for reply in result.replies] == [OVERRIDDEN, REFUSED, OVERRIDDEN]


def test_states_are_recorded_and_change_no_answer():
    costs = plain_costs([[2.0, 2.0, 0.9, 2.0]])
    told = ((OVERLOADED, ACTIVE, OVERLOADED, MISALIGNED),)
    scores, keep = torch.arange(4.0).view(1, 4), torch.ones(1, 4) > 0
    recorded = negotiate(scores, costs, keep, 3, limit=2.0 + 1e-9, states=told)
    plain = negotiate(scores, costs, keep, 3, limit=2.0 + 1e-9)
    assert recorded.left == plain.left == ((0, 0), (0, 1), (0, 2))
    assert recorded.violations == ()
    assert [reply.state for reply in recorded.replies] == [OVERLOADED, ACTIVE, OVERLOADED]
    assert plain.replies[0].state is ACTIVE


def test_a_quota_for_each_layer():
    costs = plain_costs([[1.0, 5.0, 2.0], [9.0, 7.0, 8.0]])
    result = negotiate(torch.arange(6.0).view(2, 3).flip(0), costs, torch.ones(2, 3) > 0, [1, 2], limit=3.0)
    assert result.left == ((0, 0), (1, 1), (1, 2))
    assert [reply.answer for reply in result.replies] == [REFUSED, OVERRIDDEN, OVERRIDDEN, CONSENTED]


def test_the_limit_is_absolute_if_given_and_else_the_price_of_the_quota_th_cheapest(monkeypatch):
    """Live prices 1, 2, 3, 4: the second cheapest is 2, and half as much again is 3."""
    table = torch.tensor([[4.0, torch.nan, 1.0], [2.0, 3.0, torch.nan]])
    monkeypatch.setattr(consent, "CONSENT_FACTOR", 1.5)
    assert [consent_limit(table, quota) for quota in range(5)] == [0, 1.5, 3.0, 4.5, 6.0]
    assert consent_limit(torch.full((1, 2), torch.nan), 0) == 0.0
    arguments = torch.zeros(2, 3), plain_costs(table.tolist()), table.isfinite(), 2
    assert {reply.limit for reply in negotiate(*arguments, limit=0.7).replies} == {0.7}
    # In order: 4 refuses, 1 and 2 consent.
    result = negotiate(*arguments)
    assert [reply.limit for reply in result.replies] == pytest.approx([3.0] * 3)
    assert result.left == ((0, 2), (1, 0))


def test_each_layer_has_a_limit_of_its_own_where_it_has_a_quota_of_its_own(monkeypatch):
    """Layer 0 loses one of 1, 5, 2, so nobody may cost more than 1; layer 1 two of 9, 7, 8, so nobody more than 8."""
    monkeypatch.setattr(consent, "CONSENT_FACTOR", 1.0)
    costs = plain_costs([[1.0, 5.0, 2.0], [9.0, 7.0, 8.0]])
    result = negotiate(torch.arange(6.0).view(2, 3).flip(1), costs, torch.ones(2, 3) > 0, [1, 2])
    assert {(reply.layer, round(reply.limit, 6)) for reply in result.replies} == {(0, 1.0), (1, 8.0)}
    assert result.left == ((0, 0), (1, 2), (1, 1))


def test_states_are_left_no_sooner_than_they_are_entered():
    assert consent.OVERLOADED_GROWTH_LEFT <= consent.OVERLOADED_GROWTH
    assert consent.OVERLOADED_SHARE_LEFT <= consent.OVERLOADED_SHARE
    assert consent.MISALIGNED <= consent.MISALIGNED_LEFT


def signals_with(contribution, alignment):
    """Signals [1, H] of which only these two are known."""
    unknown = torch.full((1, len(contribution)), torch.nan).double()
    known = [torch.tensor([values], dtype=torch.float64) for values in (contribution, alignment)]
    return HeadSignals(unknown, *known, unknown, unknown, unknown)


def test_overloaded_needs_growth_and_a_large_share():
    """Four live heads, equal share 0.25: from 0.5 on it is large, from twice the head's own start it has grown."""
    start = torch.tensor([[0.30, 0.25, 0.05, 0.30, 0.10]])
    found = head_states(signals_with([0.58, 0.52, 0.20, math.nan, 0.10], [0.0] * 5), None, start=start)
    assert found == ((ACTIVE, OVERLOADED, ACTIVE, WITHDRAWN, ACTIVE),)
    assert head_states(signals_with([0.58, 0.52, 0.20, math.nan, 0.10], [0.0] * 5), None) == (
        (ACTIVE, ACTIVE, ACTIVE, WITHDRAWN, ACTIVE),
    )


def test_states_are_entered_and_left_at_different_values():
    start = torch.tensor([[0.2, 0.5]])
    history = []
    before = None
    for share, alignment in [(0.70, -0.15), (1.0, -0.2), (0.8, -0.11), (0.76, -0.09), (0.74, -0.15), (0.76, -0.15)]:
        # Head 0 is the only one of two live ones to grow: equal share 0.5, entered at 1.0, left below 0.75.
        before = head_states(signals_with([share, 1 - share], [0.0, alignment]), before, start=start)
        history.append(before[0])
    assert [row[0] for row in history] == [ACTIVE, OVERLOADED, OVERLOADED, OVERLOADED, ACTIVE, ACTIVE]
    assert [row[1] for row in history] == [ACTIVE, MISALIGNED, MISALIGNED, ACTIVE, ACTIVE, ACTIVE]


def test_overloaded_is_left_when_the_growth_is_gone():
    start = torch.tensor([[0.5, 0.2, 0.15, 0.15]])
    grown = head_states(signals_with([0.0, 0.8, 0.1, 0.1], [0.0] * 4), None, start=start)
    assert grown[0][1] is OVERLOADED
    for first, expected in ((0.5, OVERLOADED), (0.54, ACTIVE)):
        start[0, 1] = first
        assert head_states(signals_with([0.0, 0.8, 0.1, 0.1], [0.0] * 4), grown, start=start)[0][1] is expected


def test_a_head_that_is_both_is_misaligned_and_a_withdrawn_one_does_not_come_back():
    both = signals_with([0.9, 0.1], [-0.5, 0.0])
    start = torch.tensor([[0.1, 0.9]])
    assert head_states(both, None, start=start) == ((MISALIGNED, ACTIVE),)
    with pytest.raises(ValueError, match=r"head \(0, 1\) was withdrawn"):
        head_states(both, ((ACTIVE, WITHDRAWN),), start=start)


def planted_model():
    """Two layers of four heads of size 8 with known roles.

    Layer 0: heads 0 and 1 are the same, head 2 writes nothing, head 3 is like no other. Layer 1: heads 0 and 1 are the same,
    head 3 writes minus half of what they write, head 2 is like no other.
    """
    model = tiny_gpt2(layers=2, heads=4, width=32)
    for layer, copies in ((0, [(1, 1.0)]), (1, [(1, 1.0), (3, -0.5)])):
        attention = model.transformer.h[layer].attn
        for head, factor in copies:
            for part in range(3):
                to, of = (slice(32 * part + 8 * h, 32 * part + 8 * h + 8) for h in (head, 0))
                attention.c_attn.weight.data[:, to] = attention.c_attn.weight.data[:, of]
                attention.c_attn.bias.data[to] = attention.c_attn.bias.data[of]
            rows = attention.c_proj.weight.data
            rows[8 * head : 8 * head + 8] = factor * rows[:8]
    model.transformer.h[0].attn.c_proj.weight.data[16:24] = 0
    return model


def planted_signals(ridge=1e-7):
    model, keep = planted_model(), torch.ones(2, 4, dtype=torch.bool)
    observations = observe(model, WINDOWS, keep=keep, batch_size=3)
    costs = Prices.of(layer_prices(model, observations, ridge=ridge), None, 4)
    fisher = score_fisher(model, WINDOWS, batch_size=4, gradient_precision="float32").scores
    return measure_signals(observations, costs, ridge=ridge, importance=fisher), costs


def test_the_planted_heads_have_the_signals_that_were_planted():
    signals, costs = planted_signals()
    share, redundancy, cost = signals.contribution, signals.redundancy, signals.withdrawal_cost
    torch.testing.assert_close(share[0, 0], share[0, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(share[1, 0], share[1, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(share[1, 3], share[1, 0] / 4, rtol=1e-4, atol=0)
    assert float(share[0, 2]) == 0
    assert float(signals.importance[0, 2]) == 0
    copies = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 3)]
    unlike = [(0, 3), (1, 2)]
    for place in copies:
        assert float(redundancy[place]) > 0.999
        assert float(cost[place]) < 1e-4 * min(float(cost[other]) for other in unlike)
    for place in unlike:
        assert float(redundancy[place]) < 0.95
    assert float(cost[0, 2]) == 0
    torch.testing.assert_close(cost, costs.table())
    # What head 3 of layer 1 writes is -y/2, the rest 2 y + z: their correlation from the energies of y, z and 2 y + z alone.
    y, z = float(share[1, 0]), float(share[1, 2])
    assert float(signals.alignment[1, 3]) < -0.7
    assert float(signals.alignment[1, :3].min()) > 0
    cross = -float(signals.alignment[1, 3])
    # <y, 2y + z> = 2 |y|^2 + <y, z>; the correlation of z with the other 1.5 y gives <y, z> once more.
    inner = float(signals.alignment[1, 2]) * math.sqrt(y * z)
    assert cross == pytest.approx((2 * y + inner) / math.sqrt(y * (4 * y + z + 4 * inner)), rel=1e-3)


def test_the_planted_heads_have_the_states_that_were_planted():
    signals, _ = planted_signals()
    assert head_states(signals, None, start=signals.contribution) == (
        (ACTIVE, ACTIVE, ACTIVE, ACTIVE),
        (ACTIVE, ACTIVE, ACTIVE, MISALIGNED),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_planted_heads_consent_as_planted_in_whatever_order_they_are_asked(seed):
    """One of the duplicates, the dead head and two of the three copies in layer 1 can go for nothing: four of eight."""
    signals, costs = planted_signals()
    scores = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(2, 4, dtype=torch.bool)
    told = head_states(signals, None, start=signals.contribution)
    limit = 1e-3 * float(signals.withdrawal_cost[0, 3])
    result = negotiate(scores, costs, keep, 4, limit=limit, states=told)
    assert result.violations == ()
    left = set(result.left)
    assert (0, 2) in left
    assert len(left & {(0, 0), (0, 1)}) == 1
    assert len(left & {(1, 0), (1, 1), (1, 3)}) == 2
    assert len(left) == 4
    stay = {(0, 3), (1, 2)}
    assert all(reply.answer is REFUSED for reply in result.replies if (reply.layer, reply.head) in stay)
    # One more has to be overridden, and is.
    more = negotiate(scores, costs, keep, 5, limit=limit, states=told)
    assert len(more.violations) == 1
    assert left < set(more.left)


def test_negotiation_on_a_model_with_shared_keys():
    model, keep = tiny_model("llama"), torch.ones(3, 6, dtype=torch.bool)
    observations = observe(model, WINDOWS, keep=keep, batch_size=4)
    costs = Prices.of(layer_prices(model, observations, ridge=0.01), None, 6)
    scores = score_fisher(model, WINDOWS, batch_size=4, gradient_precision="float32").scores
    result = negotiate(scores, costs, keep, 7)
    assert int((~result.keep).sum()) == 7
    assert min(reply.cost for reply in result.replies) > 0


@st.composite
def negotiations(draw):
    """Arguments for ``negotiate``, with some heads gone already."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 10**6))
    costs = random_costs(layers, heads, seed, duplicates=draw(st.booleans()))
    keep = torch.ones(layers, heads, dtype=torch.bool)
    for place in draw(st.sets(st.sampled_from([*itertools.product(range(layers), range(heads))]))):
        costs, keep[place] = costs.withdraw(*place), False
    values = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    scores = torch.tensor(draw(st.lists(values, min_size=layers * heads, max_size=layers * heads))).view(layers, heads)
    if draw(st.booleans()):
        quota = draw(st.integers(0, int(keep.sum())))
    else:
        quota = [draw(st.integers(0, int(live))) for live in keep.sum(1)]
    cost = draw(st.none() | st.sampled_from([0.0, 0.3, 1e9]))
    told = [[draw(st.sampled_from([ACTIVE, OVERLOADED, MISALIGNED])) for _ in range(heads)] for _ in range(layers)]
    given_states = draw(st.none() | st.just(tuple(map(tuple, told))))
    return scores, costs, keep, quota, cost, given_states


@settings(max_examples=150, deadline=None)
@given(negotiations())
def test_whatever_is_negotiated(arguments):
    scores, costs, keep, quota, limit, told = arguments
    result = negotiate(scores, costs, keep, quota, limit=limit, states=told)
    gone = keep & ~result.keep
    if isinstance(quota, int):
        assert int(gone.sum()) == quota
    else:
        assert gone.sum(1).tolist() == quota
    assert not bool((result.keep & ~keep).any())
    places = [(reply.layer, reply.head) for reply in result.replies]
    assert len(set(places)) == len(places)
    assert all(keep[place] for place in places)
    assert set(result.left) == set(map(tuple, gone.nonzero().tolist()))
    assert sorted(reply.left for reply in result.replies if reply.left is not None) == list(range(int(gone.sum())))
    replayed = costs
    by_place = dict(zip(places, result.replies, strict=True))
    for place in result.left:
        assert by_place[place].left_cost == pytest.approx(replayed.price(place[0], [place[1]]), rel=1e-6, abs=1e-12)
        replayed = replayed.withdraw(*place)
    for reply in result.replies:
        assert reply.cost >= 0
        assert (reply.answer is CONSENTED) == (reply.cost <= reply.limit)
        assert (reply.left is None) == (reply.answer is REFUSED)
    for violation in result.violations:
        layer = slice(None) if isinstance(quota, int) else violation.layer
        wanted = quota if isinstance(quota, int) else quota[violation.layer]
        mine = [r for r in result.replies if isinstance(quota, int) or r.layer == violation.layer]
        consented = [r for r in mine if r.answer is CONSENTED]
        assert len(consented) < wanted
        assert len(mine) == int(keep[layer].sum())
        assert violation.left >= len(consented) or not isinstance(quota, int)
    assert torch.equal(result.prices.table().isfinite(), result.keep)


@settings(max_examples=60, deadline=None)
@given(negotiations())
def test_if_everyone_consents_the_methods_order_decides(arguments):
    scores, costs, keep, quota, limit, told = arguments
    result = negotiate(scores, costs, keep, quota, limit=limit, states=told, everyone_consents=True)
    order = sorted(keep.nonzero().tolist(), key=lambda place: (float(scores[tuple(place)]), place))
    if isinstance(quota, int):
        assert result.left == tuple(map(tuple, order[:quota]))
    else:
        for layer, wanted in enumerate(quota):
            mine = [tuple(place) for place in order if place[0] == layer]
            assert [place for place in result.left if place[0] == layer] == mine[:wanted]
    assert result.violations == ()


def test_quota_of_a_level_counts_those_gone_already():
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, :4] = False
    assert quota_of_level(30, keep) == 2
    assert quota_of_level(50, keep, "layer") == [1, 5]
    with pytest.raises(ValueError, match="4 heads are gone already, more than level 10"):
        quota_of_level(10, keep)
    with pytest.raises(ValueError, match="more than level 30"):
        quota_of_level(30, keep, "layer")


def test_what_does_not_fit_together_is_refused():
    costs, keep = plain_costs([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2, dtype=torch.bool)
    scores = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="5 heads must leave, but 4 are live"):
        negotiate(scores, costs, keep, 5)
    with pytest.raises(ValueError, match="3 heads must leave, but 2 are live"):
        negotiate(scores, costs, keep, [0, 3])
    with pytest.raises(ValueError, match="quota has 1 numbers, the model 2 layers"):
        negotiate(scores, costs, keep, [2])
    with pytest.raises(ValueError, match=r"scores have shape \(1, 2\)"):
        negotiate(scores[:1], costs, keep, 1)
    fewer = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match=r"disagree on head \(1, 0\)"):
        negotiate(scores, costs, fewer, 1)
    scores[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"score of head \(1, 0\) is nan"):
        negotiate(scores, costs, keep, 1)
    left = costs.withdraw(1, 0)
    assert negotiate(scores, left, fewer, 1).left == ((0, 0),)


def test_a_group_is_asked_as_one_and_pays_the_joint_price(monkeypatch):
    """Heads 0 and 1 hand over the same, so each alone is free while the other stays, and both together cost what one did.

    The twins have 1 on and off the diagonal of the Gram matrix, so one twin alone costs next to nothing; heads
    2 and 3 are independent and cost half each.
    """
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1 - 1e-9
    weight = torch.tensor([[1.0], [1.0], [0.5**0.5], [0.5**0.5]], dtype=torch.float64)
    layer = LayerPrices.of(gram, weight, range(4), ridge=1e-9)
    costs = Prices((layer,), (1.0,), 4)
    assert costs.price(0, [0]) == pytest.approx(0.0, abs=1e-6)
    assert costs.price(0, (0, 1)) == pytest.approx(4.0, rel=1e-6)  # (1 + 1)^2 of the same input
    assert costs.price(0, (2, 3)) == pytest.approx(1.0, rel=1e-6)
    keep, scores = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    result = negotiate(scores, costs, keep, 2, limit=1.5, group_size=2)
    # The method asks the twins first, they refuse; the others consent.
    assert [(r.head, r.answer, r.left) for r in result.replies] == [
        (0, HeadAnswer.REFUSED, None),
        (1, HeadAnswer.REFUSED, None),
        (2, HeadAnswer.CONSENTED, 0),
        (3, HeadAnswer.CONSENTED, 1),
    ]
    assert [r.cost for r in result.replies] == pytest.approx([4.0, 4.0, 1.0, 1.0], rel=1e-6)
    assert result.keep.tolist() == [[True, True, False, False]]
    overridden = negotiate(scores, costs, keep, 2, limit=0.5, group_size=2)
    assert [(r.head, r.left) for r in overridden.violations] == [(2, 0), (3, 1)]
    # The cheaper of the two groups costs 1: the limit is of groups, not of heads.
    monkeypatch.setattr(consent, "CONSENT_FACTOR", 2.5)
    replies = negotiate(scores, costs, keep, 2, group_size=2).replies
    assert [r.limit for r in replies] == pytest.approx([2.5] * 4, rel=1e-6)
    with pytest.raises(ValueError, match="whole groups of 2 heads"):
        negotiate(scores, costs, keep, 1, group_size=2)
    assert quota_of_level(40, torch.ones(2, 6, dtype=torch.bool), group_size=2) == 4  # round(0.4 * 6 groups) = 2


@given(st.integers(0, 10**6), st.floats(0, 95), st.sampled_from(["model", "layer"]), st.booleans())
def test_groups_leave_as_a_whole_and_in_the_methods_order_where_everyone_consents(seed, level, scope, everyone):
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(3, 4, dtype=torch.bool)
    quota = quota_of_level(level, keep, scope, 2)
    result = negotiate(scores, random_costs(3, 4, seed), keep, quota, everyone_consents=everyone, group_size=2)
    assert bool((result.keep[:, ::2] == result.keep[:, 1::2]).all())
    assert len(result.left) == (sum(quota) if scope == "layer" else quota)
    if everyone:
        assert torch.equal(result.keep, select_heads(scores, level, scope, group_size=2))
