"""Signals against NumPy on small matrices, and the pass that gathers them against what goes through the model."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from builders import ATTENTIONS, random_masks, tiny_gpt2, tiny_model

from pruning_comparison.agency.moments import LayerMoments, observe
from pruning_comparison.agency.prices_across_layers import layer_prices
from pruning_comparison.agency.signals import (
    alignments,
    contributions,
    measure_signals,
    redundancies,
    written_products,
)
from pruning_comparison.models.heads import attentions, head_grid, input_major_weight, output_projections
from pruning_comparison.pruning.surgery import converted_copy, mask_heads, remove_heads
from pruning_comparison.scoring.prices import Prices, withdrawal_costs

HEADS, SIZE, WIDTH = 3, 4, 10
FEATURES = HEADS * SIZE
WINDOWS = torch.randint(1, 97, (7, 16), generator=torch.Generator().manual_seed(3))


def samples(seed=0, windows=6, time=9):
    """Correlated features far from zero, [N, T, F], and an output projection [F, E]."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(windows, time, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES)) + 50
    return torch.tensor(mixed, dtype=torch.float32), torch.tensor(
        rng.normal(size=(FEATURES, WIDTH)), dtype=torch.float32
    )


def moments_of(x, weight, batch=4):
    moments = LayerMoments(tuple(range(HEADS)), SIZE, weight)
    for start in range(0, len(x), batch):
        moments.add(x[start : start + batch], start)
    return moments


def rows(x, half=None):
    return (x if half is None else x[half::2]).flatten(0, 1).double().numpy()


def own(head):
    return slice(head * SIZE, (head + 1) * SIZE)


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_moments_are_those_of_the_stacked_rows(batch):
    x, weight = samples()
    moments = moments_of(x, weight, batch)
    for half in (None, 0, 1):
        stacked = rows(x, half)
        centre = np.arange(FEATURES) / 3
        assert moments.count(half) == len(stacked)
        np.testing.assert_allclose(moments.mean(half), stacked.mean(0), rtol=1e-6)
        expected = np.cov(stacked.T, bias=True) * len(stacked)
        np.testing.assert_allclose(moments.gram(half), expected, rtol=1e-4, atol=1e-2)
        about = (stacked - centre).T @ (stacked - centre)
        np.testing.assert_allclose(moments.gram(half, about=torch.tensor(centre)), about, rtol=1e-5)
    np.testing.assert_allclose(moments.covariance(centred=False), rows(x).T @ rows(x) / len(rows(x)), rtol=1e-5)


def test_a_mean_far_from_zero_costs_no_precision():
    """In float32, squares of 3,000 leave no digit for a spread of 0.01 if they are not centred before."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(6, 200, FEATURES, generator=generator) * 0.25
    moments = moments_of(spread + 3000, torch.zeros(FEATURES, 1))
    exact = rows((spread + 3000) - 3000.0)
    np.testing.assert_allclose(moments.covariance(), np.cov(exact.T, bias=True), rtol=1e-3, atol=1e-5)


def test_contribution_is_the_share_of_the_written_energy():
    x, weight = samples(1)
    centred = rows(x) - rows(x).mean(0)
    written = [centred[:, own(h)] @ weight[own(h)].double().numpy() for h in range(HEADS)]
    energy = np.array([np.square(y).sum() for y in written])
    np.testing.assert_allclose(contributions(moments_of(x, weight)), energy / energy.sum(), rtol=1e-4)
    products = [[(a * b).sum() / len(centred) for b in written] for a in written]
    np.testing.assert_allclose(written_products(moments_of(x, weight)), products, rtol=1e-3, atol=1e-2)


def test_alignment_is_the_correlation_with_the_rest_of_the_layer():
    x, weight = samples(2)
    written = [rows(x)[:, own(h)] @ weight[own(h)].double().numpy() for h in range(HEADS)]
    written = [y - y.mean(0) for y in written]
    expected = []
    for head in range(HEADS):
        rest = sum(y for number, y in enumerate(written) if number != head)
        expected.append((written[head] * rest).sum() / np.sqrt((written[head] ** 2).sum() * (rest**2).sum()))
    np.testing.assert_allclose(alignments(moments_of(x, weight)), expected, rtol=1e-3, atol=1e-4)


def test_redundancy_is_the_r2_of_ridge_regression_on_the_other_half():
    x, weight = samples(3, windows=10)
    ridge, expected = 0.05, []
    for head in range(HEADS):
        other = np.setdiff1d(np.arange(FEATURES), np.arange(FEATURES)[own(head)])
        missed = total = 0.0
        for fitted, judged in ((0, 1), (1, 0)):
            mean = rows(x, fitted).mean(0)
            fit, new = rows(x, fitted) - mean, rows(x, judged) - mean
            strength = ridge * np.square(fit).sum(0).mean()
            stacked = np.vstack([fit[:, other], np.sqrt(strength) * np.eye(len(other))])
            goal = np.vstack([fit[:, own(head)], np.zeros((len(other), SIZE))])
            solution = np.linalg.lstsq(stacked, goal, rcond=None)[0]
            written = weight[own(head)].double().numpy()
            missed += np.square((new[:, own(head)] - new[:, other] @ solution) @ written).sum()
            total += np.square(new[:, own(head)] @ written).sum()
        expected.append(1 - missed / total)
    np.testing.assert_allclose(redundancies(moments_of(x, weight), ridge=ridge), expected, rtol=1e-3, atol=1e-4)


def test_redundancy_of_noise_is_not_above_nothing():
    """Fitted and judged on the same tokens it would be: 8 features explain something of 4 by chance on 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 10, FEATURES, generator=generator)
    assert float(redundancies(moments_of(x, torch.randn(FEATURES, WIDTH, generator=generator)), ridge=1e-6).max()) < 0


def test_silent_heads_have_signals_without_a_division_by_nothing():
    x, weight = samples(9)
    silent = weight.clone()
    silent[own(1)] = 0
    moments = moments_of(x, silent)
    assert float(contributions(moments)[1]) == 0
    assert float(alignments(moments)[1]) == 0
    assert float(redundancies(moments, ridge=0.01)[1]) == 1
    assert float(withdrawal_costs(moments.covariance(), silent, heads=HEADS, ridge=0.01)[1]) == 0
    everything = moments_of(x, torch.zeros_like(weight))
    torch.testing.assert_close(contributions(everything), torch.full((HEADS,), 1 / HEADS).double())
    assert alignments(everything).tolist() == [0.0] * HEADS


def inputs_of_projections(model, windows):
    """What enters every output projection that is left, [S, F] per layer, None where a layer is empty."""
    caught = {}

    def catch(layer):
        def hook(module, inputs):
            caught[layer] = inputs[0].flatten(0, 1)

        return hook

    handles = [
        projection.register_forward_pre_hook(catch(layer))
        for layer, projection in enumerate(output_projections(model))
        if projection is not None
    ]
    model(windows)
    for handle in handles:
        handle.remove()
    return [caught.get(layer) for layer in range(len(attentions(model)))]


@pytest.mark.parametrize("exclude_first", [False, True])
@pytest.mark.parametrize("name", ["all kept", "uneven", "first layer emptied"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_pass_sees_what_enters_the_output_projections(family, name, exclude_first):
    model, keep = tiny_model(family), random_masks(3, 6)[name]
    compact = remove_heads(model, keep)
    observed = observe(compact, WINDOWS, keep=keep, batch_size=3, exclude_first=exclude_first).moments
    for layer, x in enumerate(inputs_of_projections(compact, WINDOWS)):
        if x is None:
            assert observed[layer] is None
            continue
        x = x.unflatten(0, WINDOWS.shape)[:, int(exclude_first) :]
        moments = observed[layer]
        assert moments.heads == tuple(keep[layer].nonzero().squeeze(1).tolist())
        assert torch.equal(moments.weight, input_major_weight(output_projections(compact)[layer]))
        for half in (0, 1):
            part = rows(x, half)
            assert moments.count(half) == len(part)
            np.testing.assert_allclose(moments.mean(half), part.mean(0), rtol=1e-4, atol=1e-5)
            expected = np.cov(part.T, bias=True) * len(part)
            np.testing.assert_allclose(moments.gram(half), expected, rtol=1e-3, atol=1e-3)


def maps_and_values(model, family):
    """Attention maps [N, H, T, T] of the dense model's layers and the values [N, H, T, D] that its heads read."""
    caught = []
    grid = head_grid(model.config)
    name = "c_attn" if family == "gpt2" else "v_proj"
    handles = [a.get_submodule(name).register_forward_hook(lambda m, i, o: caught.append(o)) for a in attentions(model)]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(WINDOWS, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    values = []
    for projected in caught:
        if family == "gpt2":
            projected = projected.chunk(3, -1)[2]
        by_group = projected.unflatten(-1, (grid.n_kv_heads, grid.head_size)).transpose(1, 2)
        values.append(torch.stack([by_group[:, h // grid.group_size] for h in range(grid.n_heads)], 1))
    return maps, values


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral with a window", "qwen2"])
def test_utilisation_is_attention_weighted_by_value_norms_without_the_first_token(family):
    model = tiny_model(family)
    grid = head_grid(model.config)
    observed = observe(model, WINDOWS, keep=grid.all_heads(), batch_size=3).utilisation
    maps, values = maps_and_values(model, family)
    for layer, head in itertools.product(range(grid.n_layers), range(grid.n_heads)):
        norms = values[layer][:, head].norm(dim=-1)
        used = sum(
            float(maps[layer][n, head, t, s] * norms[n, s])
            for n in range(len(WINDOWS))
            for t in range(1, 16)
            for s in range(1, t + 1)
        )
        assert float(observed[layer, head]) == pytest.approx(used / float(norms[:, 1:].sum()), rel=1e-3)


def test_a_head_that_parks_on_the_first_token_is_not_used(model):
    """Keys are all the same but for the first token's, which every query of head 2 points at."""
    attention = model.transformer.h[0].attn
    model.transformer.h[0].ln_1.weight.data[:] = 1
    model.transformer.h[0].ln_1.bias.data[:] = 0
    attention.c_attn.weight.data[:, 16:24] = 0
    attention.c_attn.bias.data[16:24] = 0
    attention.c_attn.bias.data[16] = 1e4
    model.transformer.wte.weight.data[5] = 0
    model.transformer.wpe.weight.data[0] = 10 * torch.sign(attention.c_attn.weight.data[:, 32 + 16])
    windows = WINDOWS.clone()
    windows[:, 0] = 5
    used = observe(model, windows, keep=torch.ones(3, 4, dtype=torch.bool), batch_size=7).utilisation
    maps, _ = maps_and_values(model, "gpt2")
    assert float(maps[0][:, 2, :, 0].mean()) > 0.9
    assert float(used[0, 2]) < 0.1
    assert float(used[0, [0, 1, 3]].min()) > 0.2


@pytest.mark.parametrize("name", random_masks(3, 6))
@pytest.mark.parametrize("family", ATTENTIONS)
def test_masked_and_compact_models_have_the_same_signals(family, name):
    model, keep = tiny_model(family), random_masks(3, 6)[name]
    compact = signals_of(remove_heads(model, keep), keep, batch_size=3)
    with mask_heads(model, keep):
        masked = signals_of(model, keep, batch_size=4)
    for field in vars(compact):
        assert torch.equal(getattr(compact, field).isnan(), ~keep), field
        torch.testing.assert_close(
            getattr(masked, field), getattr(compact, field), rtol=2e-3, atol=1e-4, equal_nan=True, msg=field
        )


def signals_of(model, keep, batch_size=4):
    observations = observe(model, WINDOWS, keep=keep, batch_size=batch_size)
    prices = Prices.of(layer_prices(model, observations, ridge=0.01), None, keep.shape[1])
    return measure_signals(observations, prices, ridge=0.01, importance=torch.ones(keep.shape))


def test_a_pass_without_utilisation_is_the_same_otherwise(model):
    keep = random_masks(3, 4)["uneven"]
    compact = remove_heads(model, keep)
    with_it = observe(compact, WINDOWS, keep=keep, batch_size=4)
    without = observe(compact, WINDOWS, keep=keep, batch_size=4, utilisation=False)
    assert without.utilisation.isnan().all()
    for one, other in zip(with_it.moments, without.moments, strict=True):
        torch.testing.assert_close(one.products, other.products)
        torch.testing.assert_close(one.sums, other.sums)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_pass_leaves_the_model_as_it_was(model, implementation):
    model.set_attn_implementation(implementation)
    before = model(WINDOWS).logits
    keep = torch.ones(3, 4, dtype=torch.bool)
    observe(model, WINDOWS, keep=keep, batch_size=4)
    with pytest.raises(IndexError):
        observe(model, WINDOWS + 97, keep=keep, batch_size=4)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(WINDOWS).logits, before)
    for projection in output_projections(model):
        assert not projection._forward_pre_hooks


def test_memory_does_not_grow_with_the_text(model):
    """Bytes of all tensors alive when a batch is done, at their peak; the text itself is counted out."""

    def peak(number):
        windows = torch.randint(1, 97, (number, 16))
        seen = []

        def count(module, inputs, outputs):
            gc.collect()
            tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            storages.pop(windows.untyped_storage().data_ptr(), None)
            seen.append(sum(storages.values()))

        handle = model.transformer.h[2].mlp.register_forward_hook(count)
        observe(model, windows, keep=torch.ones(3, 4, dtype=torch.bool), batch_size=2)
        handle.remove()
        return max(seen)

    assert peak(12) == peak(4)


def test_half_precision_is_accumulated_in_float32():
    model = tiny_gpt2()
    rounded = converted_copy(model, torch.bfloat16)
    keep = torch.ones(3, 4, dtype=torch.bool)
    fine, coarse = observe(model, WINDOWS, keep=keep, batch_size=4), observe(rounded, WINDOWS, keep=keep, batch_size=4)
    for one, other in zip(coarse.moments, fine.moments, strict=True):
        energies = (written_products(moments).diagonal() for moments in (one, other))
        torch.testing.assert_close(*energies, rtol=0.05, atol=0)
    torch.testing.assert_close(coarse.utilisation, fine.utilisation, rtol=0.05, atol=0)
    x = inputs_of_projections(rounded, WINDOWS)[0]
    np.testing.assert_allclose(coarse.moments[0].covariance(), np.cov(x.double().numpy().T, bias=True), atol=1e-5)


def test_what_cannot_be_measured_is_refused(model):
    keep = torch.ones(3, 4, dtype=torch.bool)
    fewer = keep.clone()
    fewer[1, 2] = False
    with pytest.raises(ValueError, match="at least 2 windows"):
        observe(model, WINDOWS[:1], keep=keep, batch_size=4)
    with pytest.raises(ValueError, match="keep mask must be bool"):
        observe(model, WINDOWS, keep=keep[:2], batch_size=4)
    with pytest.raises(ValueError, match=r"heads of layer 1 .* still write"):
        observe(model, WINDOWS, keep=fewer, batch_size=4)
    with pytest.raises(ValueError, match="layer 1 has 3 heads"):
        observe(remove_heads(model, fewer), WINDOWS, keep=keep, batch_size=4)
    model.transformer.h[2].attn.c_attn.bias.data[-1] = torch.inf
    with pytest.raises(ValueError, match="layer 2 are not finite"):
        observe(model, WINDOWS, keep=keep, batch_size=4)
