"""Prices within a layer against least squares and direct inverses on small matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.pruning.rectangles import Rectangle, rectangles_by_score
from pruning_comparison.scoring.prices import (
    Curve,
    LayerPrices,
    Prices,
    elimination,
    ridged_inverse,
    withdrawal_costs,
)

HEADS, SIZE, WIDTH = 3, 4, 10
FEATURES = HEADS * SIZE


def samples(seed=0, tokens=54):
    """Correlated features far from zero, [S, F], and an output projection [F, E]."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES)) + 50
    return torch.tensor(mixed), torch.tensor(rng.normal(size=(FEATURES, WIDTH)))


def gram_of(x, centred=True):
    x = x - x.mean(0) if centred else x
    return x.T @ x / len(x)


def rows(x):
    return x.numpy()


def own(head):
    return slice(head * SIZE, (head + 1) * SIZE)


def least_squares_cost(x, weight, gone, ridge, centred):
    """Brute force: the least |X W - X V|^2 / S + lambda |W - V|^2 over all V whose rows ``gone`` are zero."""
    x, weight = x - x.mean(0) if centred else x, weight.double().numpy()
    strength = ridge * np.square(x).sum(0).mean() / len(x)
    stacked = np.vstack([x / np.sqrt(len(x)), np.sqrt(strength) * np.eye(FEATURES)])
    goal = stacked @ weight
    left = np.setdiff1d(np.arange(FEATURES), gone)
    solution = np.linalg.lstsq(stacked[:, left], goal, rcond=None)[0]
    return np.square(goal - stacked[:, left] @ solution).sum()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_withdrawal_cost_is_the_least_squared_error_without_the_head(ridge, centred):
    x, weight = samples(4)
    gram = gram_of(x, centred)
    costs = withdrawal_costs(gram, weight, heads=HEADS, ridge=ridge)
    every = np.arange(FEATURES)
    expected = [least_squares_cost(rows(x), weight, every[own(h)], ridge, centred) for h in range(HEADS)]
    np.testing.assert_allclose(costs, expected, rtol=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(HEADS)), st.integers(0, 10**6), st.sampled_from([1e-6, 0.01, 1.0]), st.booleans())
def test_costs_one_after_the_other_sum_to_the_joint_cost_in_any_order(order, seed, ridge, centred):
    x, weight = samples(seed)
    layer = LayerPrices.of(gram_of(x, centred), weight, range(HEADS), ridge=ridge)
    paid, gone = 0.0, []
    for head in order:
        assert float(layer.costs.min()) >= 0
        paid += float(layer.costs[layer.heads.index(head)])
        gone.extend(np.arange(FEATURES)[own(head)])
        assert paid == pytest.approx(least_squares_cost(rows(x), weight, gone, ridge, centred), rel=5e-3)
        if len(layer.heads) > 1:
            layer = layer.withdraw(head)


def test_survivors_weights_are_those_of_least_squares():
    x, weight = samples(5)
    layer = LayerPrices.of(gram_of(x), weight, range(HEADS), ridge=1e-9).withdraw(1)
    centred = rows(x) - rows(x).mean(0)
    left = np.r_[own(0), own(2)]
    solution = np.linalg.lstsq(centred[:, left], centred @ weight.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(layer.weight, solution, rtol=1e-2, atol=1e-3)
    assert layer.heads == (0, 2)


def test_of_two_duplicates_exactly_one_is_cheap():
    x, weight = samples(6)
    x[..., own(2)] = x[..., own(0)]
    layer = LayerPrices.of(gram_of(x), weight, range(HEADS), ridge=1e-7)
    alone = layer.costs
    assert float(alone[0]) < 1e-3 * float(alone[1])
    assert float(alone[2]) < 1e-3 * float(alone[1])
    assert float(layer.withdraw(0).costs[1]) > 1e3 * float(alone[2])
    assert float(layer.withdraw(2).costs[0]) > 1e3 * float(alone[0])


def test_costs_are_weighed_by_layer_and_granting_leaves_the_model_it_came_from():
    x, weight = samples(7)
    layer = LayerPrices.of(gram_of(x), weight, (0, 2, 3), ridge=0.01)
    costs = Prices((layer, None, layer), (1.0, 1.0, 3.0), 4)
    table = costs.table()
    torch.testing.assert_close(table[2], 3 * table[0], equal_nan=True)
    assert table.isnan().tolist() == [[False, True, False, False], [True] * 4, [False, True, False, False]]
    assert costs.price(2, [3]) == pytest.approx(3 * float(layer.costs[2]))
    after = costs.withdraw(2, 2).table()
    torch.testing.assert_close(costs.table(), table, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after[:2], table[:2], rtol=0, atol=0, equal_nan=True)
    assert after[2].isnan().tolist() == [False, True, True, False]
    assert after[2, 0] > table[2, 0]
    emptied = costs.withdraw(0, 0).withdraw(0, 2).withdraw(0, 3)
    assert emptied.layers[0] is None
    for layer_number, head in ((1, 0), (0, 1)):
        with pytest.raises(KeyError, match="has left"):
            costs.price(layer_number, [head])
        with pytest.raises(KeyError, match="has left"):
            costs.withdraw(layer_number, head)


def test_a_singular_matrix_gets_more_ridge_and_nothing_costs_nothing():
    x, weight = samples(8)
    x[..., 1:] = x[..., :1]
    gram = gram_of(x)
    assert torch.isfinite(ridged_inverse(gram, 1e-300)).all()
    assert torch.isfinite(withdrawal_costs(gram, weight, heads=HEADS, ridge=1e-300)).all()
    nothing = torch.zeros(FEATURES, FEATURES).double()
    assert float(withdrawal_costs(nothing, weight, heads=HEADS, ridge=0.01).max()) < 1e-50
    with pytest.raises(ValueError, match="ridge must be above 0"):
        ridged_inverse(gram, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        ridged_inverse(gram * torch.nan, 0.1)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(HEADS)), st.integers(0, 10**6), st.sampled_from([0.01, 1.0]))
def test_downdates_are_the_direct_inverse_and_refit_of_those_that_are_left(order, seed, ridge):
    """Every step against G with the heads that have left struck out: its inverse, and W_o + G_oo^-1 G_ox W_x."""
    x, weight = samples(seed)
    layer = LayerPrices.of(gram_of(x), weight, range(HEADS), ridge=ridge)
    gram = gram_of(x) + ridge * gram_of(x).diagonal().mean() * torch.eye(FEATURES).double()
    gone = []
    for head in order[:-1]:
        layer = layer.withdraw(head)
        gone.append(head)
        left = [head for head in range(HEADS) if head not in gone]
        assert layer.heads == tuple(left)
        kept = np.concatenate([np.arange(FEATURES)[own(head)] for head in left])
        lost = np.setdiff1d(np.arange(FEATURES), kept)
        direct = np.linalg.inv(gram.numpy()[np.ix_(kept, kept)])
        np.testing.assert_allclose(layer.inverse, direct, rtol=1e-5, atol=1e-9)
        refit = weight.numpy()[kept] + direct @ gram.numpy()[np.ix_(kept, lost)] @ weight.numpy()[lost]
        np.testing.assert_allclose(layer.weight, refit, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_first_is_the_plain_greedy_loop_over_least_squares(seed, group_size):
    heads, size = 4, 3
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=(60, heads * size)) @ rng.normal(size=(heads * size, heads * size)))
    weight = torch.tensor(rng.normal(size=(heads * size, 5)))
    features = np.arange(heads * size).reshape(-1, group_size * size)  # of each group

    def cost(groups):
        return least_squares(x.numpy(), weight.numpy(), features[groups].ravel(), 0.03)

    gone, sums = [], [0.0]
    while len(gone) < len(features):
        gone.append(min((g for g in range(len(features)) if g not in gone), key=lambda g: cost([*gone, g])))
        sums.append(cost(gone))
    curve = LayerPrices.of(gram_of(x, centred=False), weight, range(heads)).cheapest_first(group_size)
    assert curve.order == tuple(head for g in gone for head in range(g * group_size, (g + 1) * group_size))
    np.testing.assert_allclose(curve.sums, sums, rtol=1e-6)
    # Nested: the first k of a longer loss are those of a shorter one.
    assert all(curve.first(k) == curve.first(k + 1)[: k * group_size] for k in range(len(gone)))


def least_squares(x, weight, gone, ridge):
    """The least |X W - X V|^2 / S + lambda |W - V|^2 over all V whose rows ``gone`` are zero."""
    strength = ridge * np.square(x).sum(0).mean() / len(x)
    stacked = np.vstack([x / np.sqrt(len(x)), np.sqrt(strength) * np.eye(x.shape[1])])
    left = np.setdiff1d(np.arange(x.shape[1]), gone)
    solution = np.linalg.lstsq(stacked[:, left], stacked @ weight, rcond=None)[0]
    return np.square(stacked @ weight - stacked[:, left] @ solution).sum()


def apart(*costs):
    """A layer of heads of size 1 that have nothing to do with one another and cost what is given."""
    weight = torch.tensor(costs, dtype=torch.float64).sqrt().unsqueeze(1)
    return LayerPrices.of(torch.eye(len(costs)).double(), weight, range(len(costs)), ridge=1e-12)


def test_the_order_of_all_heads_merges_those_of_the_layers_at_their_weights():
    """Prices 1, 5, 2 and, at twice the weight, 3, 8 (of 1.5 and 4): sorted, 1 2 3 5 8."""
    prices = Prices.of([apart(1.0, 5.0, 2.0), None, apart(1.5, 4.0)], [1.0, 7.0, 2.0], 3)
    order, paid = elimination(prices)
    assert order.tolist() == [[0, 3, 1], [-1, -1, -1], [2, 4, -1]]
    np.testing.assert_allclose(paid, [[1, 5, 2], [0, 0, 0], [3, 8, 0]], rtol=1e-6)
    gone = order.ge(0) & order.lt(3)
    assert prices.total(gone) == pytest.approx(6.0)


def test_groups_share_a_position_and_its_price():
    """Joint prices 1 + 6 and 2 + 3: the second pair leaves first, though the cheapest head is in the other."""
    order, paid = elimination(Prices.of([apart(1.0, 6.0, 2.0, 3.0)], None, 4), group_size=2)
    assert order.tolist() == [[1, 1, 0, 0]]
    np.testing.assert_allclose(paid, [[3.5, 3.5, 2.5, 2.5]], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.1, 10), min_size=2, max_size=2))
def test_prices_paid_one_after_the_other_are_the_total_of_those_that_left(seed, weights):
    layers = [LayerPrices.of(gram_of(x), weight, range(HEADS)) for x, weight in (samples(seed), samples(seed + 1))]
    prices = Prices.of(layers, weights, HEADS)
    order, paid = elimination(prices)
    assert sorted(order.flatten().tolist()) == list(range(2 * HEADS))
    for count in range(2 * HEADS + 1):
        gone = order < count
        assert prices.total(gone) == pytest.approx(float(paid[gone].sum()), rel=1e-6, abs=1e-12)


def test_half_of_a_layer_is_rounded_down_and_never_nothing():
    for heads, half in ((1, 1), (2, 1), (3, 1), (8, 4), (9, 4)):
        assert Curve(tuple(range(heads)), tuple(map(float, range(heads + 1)))).half == half


def test_weights_that_weigh_nothing_are_refused():
    layer = apart(1.0, 2.0)
    for weights in ([1.0, -1.0], [1.0, float("nan")], [1.0]):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
            Prices.of([layer, layer], weights, 2)


@pytest.mark.parametrize("seed", range(4))
def test_rectangles_of_heads_apart_are_the_best_of_their_shape(seed):
    """Costs that add up: the least that stays out is the sum over the heads that are not among the best of the shape."""
    costs = torch.rand(9, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    found = apart(*costs.tolist()).rectangles(3)
    by_sum = rectangles_by_score(costs[None], 3)[0]
    assert {(one.groups, one.kept) for one in found} == {(one.groups, one.kept) for one in by_sum}
    for one in found:
        left = float(sum(costs[head] for head in range(9) if head not in one.kept))
        assert one.cost == pytest.approx(left, rel=1e-6)


def test_rectangles_by_backward_greedy_are_near_the_best_of_all_sets():
    """Of 3 groups of 3 heads that depend on one another, against all 134 sets of every layer."""
    heads, size, gaps = 9, 3, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = torch.tensor(rng.normal(size=(80, heads * 2)) @ rng.normal(size=(heads * 2, heads * 2)))
        layer = LayerPrices.of(gram_of(x, centred=False), torch.tensor(rng.normal(size=(heads * 2, 5))), range(heads))
        found = layer.rectangles(size)
        shapes = [(g, r) for g in range(1, 4) for r in range(1, 4)]
        assert sorted((one.groups, len(one.kept)) for one in found) == sorted(
            [(0, 0), *((g, g * r) for g, r in shapes)]
        )
        for g, r in shapes:
            (one,) = (one for one in found if (one.groups, len(one.kept)) == (g, g * r))
            gone = [head for head in range(heads) if head not in one.kept]
            assert one.cost == pytest.approx(layer.joint_cost(gone), rel=1e-6, abs=1e-12)
            best = min(
                layer.joint_cost([head for head in range(heads) if head not in kept])
                for groups in itertools.combinations(range(3), g)
                for kept in map(
                    set,
                    (
                        itertools.chain.from_iterable(rows)
                        for rows in itertools.product(
                            *(itertools.combinations(range(size * group, size * group + size), r) for group in groups)
                        )
                    ),
                )
            )
            if best:
                gaps.append(one.cost / best - 1)
    assert min(gaps) > -1e-6
    assert np.mean(gaps) < 0.02, np.mean(gaps)
    assert max(gaps) < 0.2, max(gaps)


def test_rectangles_of_a_layer_that_has_lost_some_are_within_what_is_left():
    layer = apart(*(float(cost) for cost in range(1, 10)))
    left = layer.withdraw(0).withdraw(3).withdraw(8).withdraw(6).withdraw(7)  # heads 1, 2, 4, 5: two groups of two
    found = {(one.groups, one.kept): one.cost for one in left.rectangles(3)}
    assert found == {
        (2, (1, 2, 4, 5)): 0.0,
        (2, (2, 5)): pytest.approx(2 + 5),
        (1, (4, 5)): pytest.approx(2 + 3),
        (1, (5,)): pytest.approx(2 + 3 + 5),
        (0, ()): pytest.approx(2 + 3 + 5 + 6),
    }
    with pytest.raises(ValueError, match="not as many of each key-value group of 3"):
        layer.withdraw(0).rectangles(3)
    assert Prices.of([None, left], [1.0, 2.0], 9).rectangles(3)[0] == [Rectangle((), 0, 0.0)]
    doubled = Prices.of([None, left], [1.0, 2.0], 9).rectangles(3)[1]
    assert [one.cost for one in doubled] == pytest.approx([2 * one.cost for one in left.rectangles(3)])
