"""Cuts of several layers at once, what is measured with them, and exchanges of heads, against models changed by hand."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from builders import tiny_gpt2, tiny_model

from pruning_comparison.agency.cuts import cut_layer, divergences
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices, layer_weights
from pruning_comparison.agency.regrowth import regrow
from pruning_comparison.agency.weights_in_context import LEAST_SHARE, measured_curves, weights_in_context
from pruning_comparison.models.heads import head_grid, output_projections, set_projection

WINDOWS = torch.randint(1, 97, (8, 16), generator=torch.Generator().manual_seed(3))
FRESH = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(4))
LEAVING = {0: (1, 2), 2: (0,)}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def measured(request):
    model = tiny_model(request.param).double()
    moments = observe(model, WINDOWS, keep=head_grid(model.config).all_heads(), batch_size=3, utilisation=False)
    return model, moments, layer_prices(model, moments)


def changed(measured, leaving):
    """The model with those heads cut, layer by layer."""
    model, moments, layers = measured
    other = copy.deepcopy(model)
    for number, heads in leaving.items():
        cut = cut_layer(model, number, moments.moments[number], layers[number], heads)
        set_projection(output_projections(other)[number], cut.weight, cut.bias)
    return other


def divergence(model, other):
    """KL(model || other) of every fresh window, written out."""
    values = []
    for window in FRESH:
        one, two = (which(window[None]).logits[0].log_softmax(-1) for which in (model, other))
        values.append(float((one.exp() * (one - two)).sum(-1).mean()))
    return values


def cuts_of(measured, leaving):
    model, moments, layers = measured
    return {n: cut_layer(model, n, moments.moments[n], layers[n], heads) for n, heads in leaving.items()}


def test_a_cut_without_heads_to_lose_is_the_projection_itself(measured):
    assert divergence(measured[0], changed(measured, {0: (), 1: ()})) == pytest.approx([0] * 3, abs=1e-9)


def test_divergences_are_those_of_models_changed_by_hand(measured):
    trials = [{1: (0,)}, {0: (3,)}, {0: (), 2: (0, 1)}]
    base, found = divergences(
        measured[0], [cuts_of(measured, trial) for trial in trials], FRESH, base=cuts_of(measured, LEAVING)
    )
    assert base.tolist() == pytest.approx(divergence(measured[0], changed(measured, LEAVING)), rel=1e-6)
    for row, trial in zip(found, trials, strict=True):
        expected = divergence(measured[0], changed(measured, {**LEAVING, **trial}))
        assert row.tolist() == pytest.approx(expected, rel=1e-6)
    alone, _ = divergences(measured[0], [], FRESH)
    assert alone.tolist() == [0] * 3


def test_another_model_may_be_the_reference(measured):
    other = changed(measured, LEAVING)
    base, found = divergences(other, [cuts_of(measured, {1: (0,)})], FRESH, reference=measured[0])
    assert base.tolist() == pytest.approx(divergence(measured[0], other), rel=1e-6)
    expected = divergence(measured[0], changed(measured, {**LEAVING, 1: (0,)}))
    assert found[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_of_a_model_that_has_been_pruned_are_what_a_cut_adds(measured):
    model, moments, layers = measured
    other = changed(measured, {0: (1,)})
    found = layer_weights(other, moments, layers, FRESH, reference=model)
    expected = []
    # Of the layers that are still whole: the first one's moments are not the other model's.
    for number, layer in list(enumerate(layers))[1:]:
        curve = layer.cheapest_first()
        cuts = ({0: (1,)}, {0: (1,), number: curve.first(curve.half)})
        before, after = (torch.tensor(divergence(model, changed(measured, one))).mean() for one in cuts)
        expected.append(max(float(after - before) / curve.sums[curve.half], 0.0))
    assert found[1:].tolist() == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0


def test_weights_in_context_are_what_a_layers_return_saves(measured):
    model, moments, layers = measured
    leaving = head_grid(model.config).all_heads() & False
    for number, heads in LEAVING.items():
        leaving[number, list(heads)] = True
    found = weights_in_context(model, moments, layers, leaving, [1e-9] * 3, FRESH)

    def nats(**one):
        cut = {**LEAVING, **{int(key[1:]): heads for key, heads in one.items()}}
        return float(torch.tensor(divergence(model, changed(measured, cut))).mean())

    cheapest = layers[1].cheapest_first().first(1)
    expected = [
        (nats() - nats(_0=())) / layers[0].joint_cost(LEAVING[0]),
        (nats(_1=cheapest) - nats()) / layers[1].joint_cost(cheapest),
        (nats() - nats(_2=())) / layers[2].joint_cost(LEAVING[2]),
    ]
    assert found.tolist() == pytest.approx([max(one, LEAST_SHARE * 1e-9) for one in expected], rel=1e-4)
    assert weights_in_context(model, moments, layers, leaving, [1e9] * 3, FRESH).tolist() == [LEAST_SHARE * 1e9] * 3


def test_measured_curves_are_exact_where_they_are_measured_and_proportional_in_between(measured):
    model, moments, layers = measured
    heads = len(layers[0].heads)
    for curve, layer, number in zip(
        measured_curves(model, moments, layers, FRESH, points=2), layers, range(3), strict=True
    ):
        plain = layer.cheapest_first()
        assert curve.order == plain.order
        half, whole = (
            float(torch.tensor(divergence(model, changed(measured, {number: plain.first(size)}))).mean())
            for size in (heads // 2, heads)
        )
        assert curve.sums[heads // 2] == pytest.approx(half, rel=1e-4)
        assert curve.sums[-1] == pytest.approx(max(half, whole), rel=1e-4)
        assert curve.sums[1] == pytest.approx(half * plain.sums[1] / plain.sums[heads // 2], rel=1e-4)


def test_regrowth_keeps_the_number_of_heads_and_only_what_the_model_finds_better(measured):
    model, moments, layers = measured
    keep = head_grid(model.config).all_heads()
    keep[0] = False
    keep[1, :2] = False
    grown = regrow(model, moments, layers, keep, FRESH)

    def nats(mask):
        leaving = {n: tuple((~mask[n]).nonzero().squeeze(1).tolist()) for n in range(3)}
        return float(torch.tensor(divergence(model, changed(measured, leaving))).mean())

    assert int(grown.keep.sum()) == int(keep.sum())
    assert grown.nats_before == pytest.approx(nats(keep), rel=1e-6)
    assert grown.nats_after == pytest.approx(nats(grown.keep), rel=1e-6)
    assert grown.nats_after < grown.nats_before  # a layer without heads next to one that has all of them
    again = keep.clone()
    for exchange in grown.exchanges:
        assert not again[exchange.returned]
        assert again[exchange.left]
        again[exchange.returned], again[exchange.left] = True, False
    assert torch.equal(again, grown.keep)
    assert torch.equal(regrow(model, moments, layers, keep, FRESH, most_rounds=0).keep, keep)


def test_regrowth_leaves_the_best_set_alone():
    """Found by trying all sets of so many heads of two layers."""
    model = tiny_gpt2(layers=2).double()
    moments = observe(model, WINDOWS, keep=head_grid(model.config).all_heads(), batch_size=3, utilisation=False)
    layers = layer_prices(model, moments)
    nats = {}
    for gone in itertools.combinations(range(8), 2):
        leaving = {n: tuple(place % 4 for place in gone if place // 4 == n) for n in range(2)}
        cuts = {n: cut_layer(model, n, moments.moments[n], layers[n], heads) for n, heads in leaving.items()}
        nats[gone] = float(divergences(model, [], FRESH, base=cuts)[0].mean())
    best = min(nats, key=nats.get)
    keep = torch.ones(8, dtype=torch.bool)
    keep[list(best)] = False
    grown = regrow(model, moments, layers, keep.view(2, 4), FRESH)
    assert grown.exchanges == ()
    assert torch.equal(grown.keep, keep.view(2, 4))
