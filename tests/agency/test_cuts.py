"""Cuts of several layers at once, and what is measured with them, against models changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import tiny_model

from pruning_comparison.agency import cuts
from pruning_comparison.agency.cuts import cut_layer, divergence_of_differences, divergences
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices, layer_weights
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
    together = [LEAVING, *({**LEAVING, **trial} for trial in trials)]
    _, (base, *found) = divergences(measured[0], [cuts_of(measured, trial) for trial in together], FRESH)
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


@pytest.mark.parametrize("at_once", [1, 200, 10**6])
@pytest.mark.parametrize("size", [0.0, 0.01, 5.0, 15.0])
def test_a_divergence_from_differences_of_logits_is_that_of_the_softmaxes(monkeypatch, size, at_once):
    """In pieces of one row, of two, and of all of them."""
    monkeypatch.setattr(cuts, "_NUMBERS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(2, 5, 97, generator=generator)
    differences = (3 + size * torch.randn(2, 5, 97, generator=generator)).bfloat16()
    one, two = logits.double().log_softmax(-1), (logits.double() + differences.double()).log_softmax(-1)
    expected = (one.exp() * (one - two)).sum(-1)
    found = divergence_of_differences(logits.softmax(-1), differences)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_in_half_precision_differences_stand_for_logits_only_where_nothing_caps_them(monkeypatch, cap):
    """Where the model caps its logits, what it returns is no sum of a reference and a difference."""
    model = tiny_model("gemma2") if cap else tiny_model("llama")
    model.config.final_logit_softcapping = cap
    moments = observe(model, WINDOWS, keep=head_grid(model.config).all_heads(), batch_size=3, utilisation=False)
    layers = layer_prices(model, moments)
    trials = [cuts_of((model, moments, layers), leaving) for leaving in ({1: (0,)}, {0: (1, 2)})]
    exact = divergences(model, trials, FRESH)[1]
    monkeypatch.setattr(cuts, "fast_products", lambda m: torch.autocast("cpu", dtype=torch.bfloat16))
    used = []
    real = divergence_of_differences
    monkeypatch.setattr(cuts, "divergence_of_differences", lambda *args: used.append(1) or real(*args))
    found = divergences(model, trials, FRESH)[1]
    assert len(used) == (0 if cap else len(trials) * len(FRESH))
    torch.testing.assert_close(found, exact, rtol=0.3, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Differences that overflow are left to the softmax.
    monkeypatch.setattr(cuts, "divergence_of_differences", lambda p, d: d.new_full(d.shape[:-1], torch.inf))
    torch.testing.assert_close(divergences(model, trials, FRESH)[1], found, rtol=1e-3, atol=1e-5)
