"""Weights of layers against the model changed by hand, for every family and with and without biases."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import ATTENTIONS, random_masks, tiny_gpt2, tiny_model

from pruning_comparison.agency import cuts
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import (
    layer_prices,
    layer_weights,
    measure_prices,
    score_obs,
    split_windows,
)
from pruning_comparison.models.heads import head_grid, input_major_weight, output_projections, set_projection
from pruning_comparison.pruning.surgery import mask_heads, remove_heads
from pruning_comparison.scoring.prices import RIDGE, elimination

WINDOWS = torch.randint(1, 97, (8, 16), generator=torch.Generator().manual_seed(3))
FRESH = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(4))


def log_probabilities(model, windows, first):
    return torch.cat([model(window[None]).logits[0, first:] for window in windows]).double().log_softmax(-1)


def inputs_of(model, layer, windows, first):
    """What the layer's output projection reads, [S, F]."""
    caught = []
    handle = output_projections(model)[layer].register_forward_pre_hook(lambda m, i: caught.append(i[0]))
    model(windows)
    handle.remove()
    return caught[0][:, first:].flatten(0, 1).double().numpy()


def brute_force(model, layer, *, first=0, with_bias=True, group_size=1):
    """Cuts the layer's cheapest half, found by trying, refits by least squares, and compares what the model then says."""
    grid = head_grid(model.config)
    x = inputs_of(model, layer, WINDOWS, first)
    weight = input_major_weight(output_projections(model)[layer]).double().numpy()
    centred = x - x.mean(0) if with_bias else x
    strength = RIDGE * np.square(centred).sum(0).mean() / len(x)
    stacked = np.vstack([centred / np.sqrt(len(x)), np.sqrt(strength) * np.eye(x.shape[1])])
    features = np.arange(x.shape[1]).reshape(-1, group_size * grid.head_size)

    def refit(gone):
        left = np.setdiff1d(np.arange(x.shape[1]), features[gone].ravel())
        full = np.zeros_like(weight)
        full[left] = np.linalg.lstsq(stacked[:, left], stacked @ weight, rcond=None)[0]
        return full, np.square(stacked @ (weight - full)).sum()

    gone = []
    while len(gone) < len(features) // 2:
        gone.append(min((g for g in range(len(features)) if g not in gone), key=lambda g: refit([*gone, g])[1]))
    full, cost = refit(gone)
    changed = copy.deepcopy(model)
    bias = None
    if with_bias:
        old = getattr(output_projections(model)[layer], "bias", None)
        bias = torch.tensor(x.mean(0) @ (weight - full)) + (0 if old is None else old.double())
    set_projection(
        output_projections(changed)[layer],
        torch.tensor(full),
        bias,
    )
    before, after = (log_probabilities(one, FRESH, first) for one in (model, changed))
    return float((before.exp() * (before - after)).sum(-1).mean()) / cost


def weights_of(model, **settings):
    first = settings.get("exclude_first", False)
    moments = observe(model, WINDOWS, keep=head_grid(model.config).all_heads(), batch_size=3, exclude_first=first)
    layers = layer_prices(model, moments, new_bias=settings.get("new_bias", True))
    return layer_weights(model, moments, layers, FRESH, **settings)


# Grouped products of experts know no float64.
@pytest.mark.parametrize("family", [family for family in ATTENTIONS if family != "gpt_oss"])
def test_a_weight_is_the_divergence_measured_over_the_error_made(family):
    model = tiny_model(family).double()
    found = weights_of(model)
    assert found.tolist() == pytest.approx([brute_force(model, layer) for layer in range(3)], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_new_bias_only_layers_that_have_one_are_centred(family):
    """GPT-2 has output biases, Llama none."""
    model = tiny_model(family).double()
    expected = [brute_force(model, layer, with_bias=family == "gpt2") for layer in range(3)]
    assert weights_of(model, new_bias=False).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_token_that_every_text_begins_with_counts_nowhere():
    model = tiny_model("llama").double()
    found = weights_of(model, exclude_first=True)
    assert found.tolist() == pytest.approx([brute_force(model, layer, first=1) for layer in range(3)], rel=1e-4)
    assert not torch.allclose(found, weights_of(model), rtol=0.02)


def test_groups_are_cut_as_groups():
    model = tiny_model("llama").double()  # 6 heads that read 3 key-value heads
    found = weights_of(model, group_size=2)
    assert found.tolist() == pytest.approx([brute_force(model, n, group_size=2) for n in range(3)], rel=1e-4)


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_gpt2()
    before = model(WINDOWS).logits
    measure_prices(model, WINDOWS, batch_size=3)
    assert torch.equal(model(WINDOWS).logits, before)
    assert not any(projection._forward_pre_hooks for projection in output_projections(model))


@pytest.mark.parametrize("name", random_masks(3, 6))
def test_masked_and_compact_models_have_the_same_prices(name):
    model, keep = tiny_model("llama"), random_masks(3, 6)[name]
    compact = measure_prices(remove_heads(model, keep), WINDOWS, batch_size=3)
    fitted, fresh = split_windows(WINDOWS)
    with mask_heads(model, keep):
        moments = observe(model, fitted, keep=keep, batch_size=3, utilisation=False)
        layers = layer_prices(model, moments)
        weights = layer_weights(model, moments, layers, fresh)
    assert torch.equal(compact.table().isfinite(), keep)
    assert compact.weights == pytest.approx(weights.tolist(), rel=1e-2)
    for one, other in zip(compact.layers, layers, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.costs, other.costs, rtol=1e-3, atol=1e-9)


def test_fresh_windows_are_the_last_few_and_no_regression_reads_them():
    for count, length, fresh in ((2, 8, 0), (3, 8, 1), (16, 8, 2), (64, 256, 8), (400, 512, 8)):
        windows = torch.arange(count)[:, None].expand(count, length)
        fitted, kept_out = split_windows(windows)
        if fresh == 0:
            assert torch.equal(fitted, windows)
            assert torch.equal(kept_out, windows)
        else:
            assert len(kept_out) == fresh
            assert torch.equal(torch.cat([fitted, kept_out]), windows)


def test_blocks_may_run_in_bfloat16_and_only_what_differs_from_the_logits_is_rounded(monkeypatch):
    """What large models do on processors with units for it. In bfloat16 logits near 8 are 1/32 apart."""
    model = tiny_gpt2()
    exact = weights_of(model)
    monkeypatch.setattr(cuts, "fast_products", lambda m: torch.autocast("cpu", dtype=torch.bfloat16))
    seen = {}
    for name in ("transformer.h.1.mlp.c_fc", "lm_head"):
        module, seen[name] = model.get_submodule(name), []
        module.register_forward_hook(lambda m, i, output, to=seen[name]: to.append(output.dtype))
    found = weights_of(model)
    assert seen["transformer.h.1.mlp.c_fc"][-1] == torch.bfloat16
    # One window at a time: its own logits, and what each layer's cut changes in them.
    expected = ([torch.float32] + [torch.bfloat16] * len(found)) * len(FRESH)
    assert seen["lm_head"][-len(expected) :] == expected
    assert "forward" not in vars(model.lm_head)
    # Random weights magnify what is rounded; on SmolLM2 the two are within 9 %.
    torch.testing.assert_close(found, exact, rtol=0.3, atol=0)
    assert not torch.equal(found, exact)


def test_prices_are_weights_times_costs_and_moments_save_the_pass():
    model = tiny_gpt2()
    prices = measure_prices(model, WINDOWS, batch_size=3)
    fitted, fresh = split_windows(WINDOWS)
    moments = observe(model, fitted, keep=torch.ones(3, 4, dtype=torch.bool), batch_size=3)
    layers = layer_prices(model, moments)
    expected = layer_weights(model, moments, layers, fresh)[:, None] * torch.stack([layer.costs for layer in layers])
    torch.testing.assert_close(prices.table(), expected)
    again = measure_prices(model, WINDOWS, batch_size=3, moments=moments)
    torch.testing.assert_close(again.table(), expected)


def test_the_method_ranks_by_the_prices_it_is_given_or_measures_them():
    model = tiny_gpt2()
    prices = measure_prices(model, WINDOWS, batch_size=3)
    order, paid = elimination(prices)
    for given in (None, lambda: prices):
        scored = score_obs(model, WINDOWS, batch_size=3, prices=given)
        assert torch.equal(scored.scores, order)
        assert scored.details["layer_weights"] == pytest.approx(prices.weights)
        np.testing.assert_allclose(scored.details["prices_nats"], paid, rtol=1e-5)
