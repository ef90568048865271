"""The refit against brute force, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import random_masks, tiny_gpt2, tiny_model, with_long_first_tokens
from scipy.optimize import minimize

from pruning_comparison.agency import adaptation, streams
from pruning_comparison.agency.adaptation import adapt, ridge_towards, ridge_towards_at_once
from pruning_comparison.agency.before_norms import before_norm, pass_through, refit_gains
from pruning_comparison.agency.streams import DenseStream
from pruning_comparison.models.heads import (
    attentions,
    blocks,
    gains_of,
    input_major_weight,
    output_projections,
    set_gains,
)
from pruning_comparison.pruning.surgery import mask_heads, masked_copy, remove_heads

LAYERS, HEADS, WIDTH, SIZE = 3, 4, 32, 8
MASKS = random_masks(LAYERS, HEADS)
WINDOWS = torch.randint(1, 97, (12, 20), generator=torch.Generator().manual_seed(7))


def caught(module, run, what="input"):
    """What enters (or leaves) a module while ``run`` runs, [samples, features]."""
    seen = []

    def hook(module, inputs, outputs):
        value = inputs[0] if what == "input" else outputs
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_hook(hook)
    run()
    handle.remove()
    return torch.cat(seen).flatten(0, -2)


def brute_force(x, targets, weight, ridge, centre=True):
    """Least squares on stacked rows: |T - X V - b|^2 + lambda |V - W|^2, b not penalised; b = 0 if not ``centre``."""
    x, targets, weight = (t.double().numpy() for t in (x, targets, weight))
    centred, goal = (x - x.mean(0), targets - targets.mean(0)) if centre else (x, targets)
    strength = ridge * np.mean(np.sum(centred**2, 0))
    rows = np.vstack([centred, np.sqrt(strength) * np.eye(x.shape[1])])
    goals = np.vstack([goal, np.sqrt(strength) * weight])
    solution = np.linalg.lstsq(rows, goals, rcond=None)[0]
    return solution, targets.mean(0) - x.mean(0) @ solution


@pytest.mark.parametrize("name", ["uneven", "middle layer emptied", "first layer emptied"])
def test_every_layer_is_the_brute_force_solution(model, name):
    """Layer by layer: X from the adapted pruned model, T = dense stream after attention less pruned stream before it."""
    compact = remove_heads(model, MASKS[name])
    original = remove_heads(model, MASKS[name])
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="refit", ridge=0.05)
    changed = False
    for layer in range(LAYERS):
        changed = changed or not MASKS[name][layer].all()
        block, dense_block = compact.transformer.h[layer], model.transformer.h[layer]
        if not changed:
            continue
        dense_after = caught(dense_block.ln_2, lambda: model(WINDOWS))
        pruned_before = caught(block.ln_1, lambda: compact(WINDOWS))
        targets = dense_after - pruned_before
        if not MASKS[name][layer].any():
            torch.testing.assert_close(block.attn.bias, targets.mean(0), rtol=1e-3, atol=1e-4)
            continue
        x = caught(block.attn.c_proj, lambda: compact(WINDOWS))
        weight, bias = brute_force(x, targets, original.transformer.h[layer].attn.c_proj.weight, 0.05)
        np.testing.assert_allclose(block.attn.c_proj.weight.numpy(), weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(block.attn.c_proj.bias.numpy(), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("allow_new_bias", [True, False])
@pytest.mark.parametrize("name", ["uneven", "middle layer emptied"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt_neox in sequence", "granite"])
def test_other_families_are_the_brute_force_solution(family, name, allow_new_bias):
    """T = dense stream after attention less pruned stream before it; in parallel blocks, the dense stream after the whole
    block less the pruned stream before it and what the pruned MLP adds. Without a bias nothing is centred. What Granite's
    projections write is multiplied by 0.4 before it is added."""
    model, mask = tiny_model(family), random_masks(3, 6)[name]
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="refit", ridge=0.05, allow_new_bias=allow_new_bias)
    with_bias = allow_new_bias or family == "gpt_neox"

    def run():
        compact(WINDOWS)

    for layer in range(3):
        block, dense_block = blocks(compact)[layer], blocks(model)[layer]
        attention, pruned_before = attentions(compact)[layer], caught(block.input_layernorm, run)
        if family == "gpt_neox":
            dense_after = caught(dense_block, lambda: model(WINDOWS), "output")
            targets = dense_after - pruned_before - caught(block.mlp, run, "output")
        else:
            targets = caught(dense_block.post_attention_layernorm, lambda: model(WINDOWS)) - pruned_before
        if family == "granite":
            targets = targets / 0.4
        if not mask[layer].any():
            if with_bias:
                torch.testing.assert_close(attention.bias, targets.mean(0), rtol=1e-3, atol=1e-4)
            else:
                assert attention.bias is None
            continue
        projection = output_projections(compact)[layer]
        before = input_major_weight(output_projections(original)[layer])
        weight, bias = brute_force(caught(projection, run), targets, before, 0.05, centre=with_bias)
        np.testing.assert_allclose(input_major_weight(projection).numpy(), weight, rtol=1e-3, atol=1e-4)
        if with_bias:
            np.testing.assert_allclose(projection.bias.numpy(), bias, rtol=1e-3, atol=1e-4)
        else:
            assert projection.bias is None


class Norm(torch.nn.Module):
    """x g / sqrt(mean x^2 + eps), as Gemma and OLMo 2 have it before what they add."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return x * self.gain / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def nearest_by_search(norm, wanted, length):
    """The vector of that length whose norm is nearest to what is wanted, from a minimiser that knows only the norm."""
    draw = np.random.default_rng(0)

    def distance(x):
        return float((norm(torch.tensor(x * length / np.linalg.norm(x)))[None] - wanted).square().sum())

    starts = [draw.standard_normal(len(wanted)) for _ in range(6)]
    found = min((minimize(distance, start, tol=1e-14) for start in starts), key=lambda one: one.fun)
    return found.x * length / np.linalg.norm(found.x), found.fun


def test_what_has_to_enter_a_norm_is_what_a_search_finds():
    """Gains of any sign and of nearly nothing; what is wanted can be reached, or is too long, or too short."""
    draw = torch.Generator().manual_seed(0)
    for scale in (0.2, 1.0, 5.0):
        gain = torch.randn(5, generator=draw, dtype=torch.float64)
        gain[0] = 1e-4
        norm, wanted = Norm(gain), scale * torch.randn(5, generator=draw, dtype=torch.float64)
        found = before_norm(norm, wanted[None], torch.tensor([[3.0]], dtype=torch.float64))[0]
        expected, distance = nearest_by_search(norm, wanted, 3.0)
        assert float(found.norm()) == pytest.approx(3.0)
        assert float((norm(found) - wanted).square().sum()) == pytest.approx(distance, rel=1e-6)
        np.testing.assert_allclose(gain * found, gain * torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_what_nothing_was_lost_of_comes_back_as_it_was():
    draw = torch.Generator().manual_seed(1)
    before = torch.randn(7, 9, 48, generator=draw)
    norm = Norm(torch.randn(48, generator=draw) * 0.5)
    found = before_norm(norm, norm(before), before.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-3)


def entering(norm, wanted, written):
    """What has to enter the norm, [S, E], by bisection for the multiplier; ``written`` is what the dense model has there."""
    length = written.double().norm(dim=-1, keepdim=True).numpy()
    flat = torch.tensor(length).expand_as(wanted) / wanted.shape[1] ** 0.5
    factors = norm(flat.float()).double().numpy() * wanted.shape[1] ** 0.5
    wanted = wanted.double().numpy()
    low = (np.abs(factors * wanted) - factors**2).max(1, keepdims=True)
    high = low + np.linalg.norm(factors * wanted, axis=1, keepdims=True) + (factors**2).max(1, keepdims=True)
    for _ in range(200):
        middle = (low + high) / 2
        too_long = np.linalg.norm(factors * wanted / (factors**2 + middle), axis=1, keepdims=True) > 1
        low, high = np.where(too_long, middle, low), np.where(too_long, high, middle)
    return torch.tensor(length * factors * wanted / (factors**2 + high))


@pytest.mark.parametrize("name", ["uneven", "middle layer emptied"])
@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_where_norms_follow_the_targets_are_what_has_to_enter_them(family, name):
    """T is what has to enter attention's norm for the streams to meet. The gains of both norms then are those of least
    squares, an emptied layer adds what is missing on average, and the MLP's projection stays."""
    model, mask = tiny_model(family), random_masks(3, 6)[name]
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="refit-mlp", ridge=0.05, mlp_ridge=0.2)

    def run():
        compact(WINDOWS)

    for layer in range(3):
        if not changed_by(mask, layer):
            continue
        block, dense_block = blocks(compact)[layer], blocks(model)[layer]
        first, second = dense_block.post_attention_layernorm, dense_block.post_feedforward_layernorm
        pruned_before, dense_before = caught_first(block, run), caught_first(dense_block, lambda m=model: m(WINDOWS))
        attended, fed = (caught(norm, lambda m=model: m(WINDOWS)) for norm in (first, second))
        middle = dense_before + first(attended)
        wanted = middle - pruned_before
        targets = entering(first, wanted, attended)
        if mask[layer].any():
            projection = output_projections(compact)[layer]
            old = input_major_weight(output_projections(original)[layer])
            weight, bias = brute_force(caught(projection, run), targets, old, 0.05)
            np.testing.assert_allclose(input_major_weight(projection).numpy(), weight, rtol=1e-3, atol=5e-4)
            np.testing.assert_allclose(projection.bias.numpy(), bias, rtol=1e-3, atol=5e-4)
            assert_gains_fit(block.post_attention_layernorm, caught(block.post_attention_layernorm, run), wanted)
        else:
            adds = caught(block.post_attention_layernorm, run, "output")
            torch.testing.assert_close(adds, wanted.mean(0).expand_as(adds), rtol=1e-3, atol=5e-4)
        pruned_middle = pruned_before + caught(block.post_attention_layernorm, run, "output")
        wanted = middle + second(fed) - pruned_middle
        assert_gains_fit(block.post_feedforward_layernorm, caught(block.post_feedforward_layernorm, run), wanted)
        assert block.mlp.down_proj.weight is dense_block.mlp.down_proj.weight
        assert block.mlp.down_proj.bias is None


def assert_gains_fit(norm, written, wanted):
    """Every feature's gain is the slope through the origin of what is wanted on what is written, both [S, E], over its
    root mean square."""
    written, wanted = written.double().numpy(), wanted.double().numpy()
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    unit = written / np.sqrt((written**2).mean(1, keepdims=True) + eps)
    slopes = [np.linalg.lstsq(unit[:, [e]], wanted[:, e], rcond=None)[0][0] for e in range(unit.shape[1])]
    stored = norm.weight.numpy() + (1 if "Gemma" in type(norm).__name__ else 0)
    np.testing.assert_allclose(stored, slopes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_gains_are_the_models_own_and_can_be_set(family):
    """Gemma stores them less 1. Checked by what the norm makes of a vector, worked out from its formula."""
    norm = blocks(tiny_model(family))[0].post_attention_layernorm
    x, old = torch.linspace(-2, 3, 48), norm.weight
    stored = old + 1 if family.startswith("gemma") else old
    torch.testing.assert_close(gains_of(norm), stored, rtol=1e-4, atol=1e-5)
    gains = torch.linspace(-1, 4, 48)
    set_gains(norm, gains)
    torch.testing.assert_close(norm(x), x / x.square().mean().sqrt() * gains, rtol=1e-4, atol=1e-5)
    assert norm.weight is not old


def test_gains_are_least_squares_and_of_silent_features_stay():
    """The first feature is wanted at half its size, the second with the other sign; nothing writes the third."""
    norm = torch.nn.RMSNorm(3, eps=0)
    norm.weight.data = torch.tensor([2.0, 3.0, 5.0])
    written = torch.tensor([[[3.0, 4.0, 0.0], [4.0, -3.0, 0.0]]])
    added = norm(written).detach()
    goals = [added[..., 0] / 2, -added[..., 1], torch.ones(1, 2)]
    refit_gains(norm, [written[:, :1], written[:, 1:]], torch.stack(goals, -1).split(1, 1))
    torch.testing.assert_close(norm.weight.data, torch.tensor([1.0, -3.0, 5.0]))


def test_a_constant_passes_through():
    norm = torch.nn.RMSNorm(4)
    constant = torch.tensor([0.01, -0.02, 0.0, 0.05])
    pass_through(norm, constant)
    torch.testing.assert_close(norm(constant).detach(), constant, rtol=1e-3, atol=0)


def caught_first(block, run):
    """The stream that enters a block, [S, E]."""
    seen = []
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    return torch.cat(seen).flatten(0, -2)


@pytest.mark.parametrize("allow_new_bias", [True, False])
@pytest.mark.parametrize("name", ["uneven", "first layer emptied"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "granite", "opt", "opt with norms after"])
def test_mlps_are_the_brute_force_solution(family, name, allow_new_bias):
    """T = the sum that the dense block ends with, less what the pruned block has before its MLP adds to it."""
    model, mask = tiny_model(family), random_masks(3, 6)[name]
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    adapt(
        DenseStream(model, WINDOWS, batch_size=5),
        compact,
        steps="refit-mlp",
        ridge=0.05,
        mlp_ridge=0.2,
        allow_new_bias=allow_new_bias,
    )
    outputs = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h"}
    outputs["granite"] = outputs["llama"]
    with_bias = allow_new_bias or family not in ("llama", "granite")
    factor = 0.4 if family == "granite" else 1.0

    def run():
        compact(WINDOWS)

    for layer in range(3):
        if not changed_by(mask, layer):
            continue
        block, dense_block = blocks(compact)[layer], blocks(model)[layer]
        projection = block.get_submodule(outputs.get(family, "fc2"))
        if family == "opt with norms after":
            dense_end = caught(dense_block.final_layer_norm, lambda m=model: m(WINDOWS))
            before = caught(block.fc1, run)
        else:
            dense_end = caught(dense_block, lambda m=model: m(WINDOWS), "output")
            before = caught(block, run) + factor * caught(attentions(compact)[layer], run, "output")
        z = caught(projection, run)
        old = input_major_weight(blocks(original)[layer].get_submodule(outputs.get(family, "fc2")))
        weight, bias = brute_force(z, (dense_end - before) / factor, old, 0.2, centre=with_bias)
        np.testing.assert_allclose(input_major_weight(projection).numpy(), weight, rtol=1e-3, atol=2e-4)
        if with_bias:
            np.testing.assert_allclose(projection.bias.numpy(), bias, rtol=1e-3, atol=2e-4)
        else:
            assert projection.bias is None


def changed_by(mask, layer):
    return not bool(mask[: layer + 1].all())


@pytest.mark.parametrize("allow_new_bias", [True, False])
@pytest.mark.parametrize("name", ["uneven", "middle layer emptied", "first layer emptied"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_a_bias_alone_is_what_the_lost_heads_add_on_average_in_the_dense_model(family, name, allow_new_bias):
    """An et al. (2024): old bias + mean over tokens of the dense model's features of lost heads, times their rows of W."""
    model, mask = tiny_model(family), random_masks(3, 6)[name]
    compact = remove_heads(model, mask)
    weights = [None if one is None else input_major_weight(one).clone() for one in output_projections(compact)]
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="bias", allow_new_bias=allow_new_bias)
    for layer in range(3):
        projection = output_projections(model)[layer]
        features = caught(projection, lambda: model(WINDOWS)).double()
        rows = torch.cat(
            [torch.arange(len(features[0])).view(6, -1)[head] for head in range(6) if not mask[layer, head]]
            or [torch.arange(0)]
        )
        added = features.mean(0)[rows] @ input_major_weight(projection).double()[rows]
        old = getattr(projection, "bias", None)
        after = output_projections(compact)[layer]
        bias = getattr(attentions(compact)[layer] if after is None else after, "bias", None)
        if old is None and (not allow_new_bias or not len(rows)):
            assert bias is None
        else:
            expected = added if old is None else old.double() + added
            torch.testing.assert_close(bias.double(), expected, rtol=1e-3, atol=1e-4)
        if after is not None:
            assert torch.equal(input_major_weight(after), weights[layer])


def test_gates_are_the_brute_force_solution(model):
    mask = MASKS["uneven"]
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="gate", ridge=0.05)
    changed = [layer for layer in range(LAYERS) if changed_by(mask, layer)]
    assert changed
    for layer in changed:
        block = compact.transformer.h[layer]
        targets = caught(model.transformer.h[layer].ln_2, lambda: model(WINDOWS)) - caught(
            block.ln_1, lambda: compact(WINDOWS)
        )
        x, old = caught(block.attn.c_proj, lambda: compact(WINDOWS)), original.transformer.h[layer].attn.c_proj.weight
        written = torch.stack(
            [x[:, h : h + SIZE] @ old[h : h + SIZE] for h in range(0, len(old), SIZE)], -1
        )  # [S, E, heads]
        centred = (written - written.mean(0)).flatten(0, 1)
        goal = (targets - targets.mean(0)).flatten()[:, None]
        gates = brute_force(centred, goal, torch.ones(centred.shape[1], 1), 0.05, centre=False)[0]
        assert gates.min() > 0
        expected = old.double() * torch.tensor(gates).repeat_interleave(SIZE, 0)
        bias = targets.double().mean(0) - x.double().mean(0) @ expected
        torch.testing.assert_close(block.attn.c_proj.weight.double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(block.attn.c_proj.bias.double(), bias, rtol=1e-3, atol=1e-4)
        assert block.mlp.c_proj.weight is model.transformer.h[layer].mlp.c_proj.weight


def test_each_step_brings_the_stream_closer(model):
    mask, dense = MASKS["uneven"], DenseStream(model, WINDOWS, batch_size=4)

    def error(steps):
        compact = remove_heads(model, mask)
        adapt(dense, compact, steps=steps, ridge=1e-4, mlp_ridge=1e-4)
        end = caught(compact.transformer.ln_f, lambda: compact(WINDOWS))
        return float((end - caught(model.transformer.ln_f, lambda: model(WINDOWS))).square().mean())

    errors = [error(steps) for steps in ("none", "bias", "refit", "refit-mlp")]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_mixtures_of_experts_are_not_refitted():
    model = tiny_model("qwen3_moe")
    compact = remove_heads(model, random_masks(3, 6)["uneven"])
    with pytest.raises(ValueError, match="mixtures of experts; choose refit"):
        adapt(DenseStream(model, WINDOWS, batch_size=4), compact, steps="refit-mlp")


def test_unknown_steps_are_refused(model):
    with pytest.raises(ValueError, match="choose one of none, bias, gate, refit, refit-mlp"):
        adapt(DenseStream(model, WINDOWS, batch_size=4), model, steps="magic")


def test_a_stream_in_a_scratch_file_adapts_as_one_in_memory(model, monkeypatch, tmp_path):
    in_memory = DenseStream(model, WINDOWS, batch_size=5)
    monkeypatch.setattr("pruning_comparison.models.devices.MOST_STREAM_BYTES", 0)
    on_disk = DenseStream(model, WINDOWS, batch_size=5, scratch_folder=tmp_path)
    # Two places for each layer, two bytes for each number.
    assert (in_memory.scratch_bytes, on_disk.scratch_bytes) == (0, 2 * LAYERS * WINDOWS.numel() * WIDTH * 2)
    for place in ("after attention", "after block"):
        torch.testing.assert_close(on_disk.at(2, 1, place), in_memory.at(2, 1, place), rtol=1e-3, atol=1e-3)
    models = [remove_heads(model, MASKS["uneven"]) for _ in range(2)]
    costs = [adapt(dense, compact) for dense, compact in zip((in_memory, on_disk), models, strict=True)]
    assert costs[1].scratch_bytes == on_disk.scratch_bytes
    torch.testing.assert_close(models[0](WINDOWS).logits, models[1](WINDOWS).logits, rtol=1e-2, atol=2e-2)
    on_disk.close()
    assert not any(tmp_path.iterdir())


def test_layers_with_other_masks_are_refitted_under_their_own():
    """Full attention in the first layer, a window of 5 in the others: each walks on with the mask the model gives it."""
    model = tiny_model("qwen3 with windows")
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 0] = False
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=5), compact, steps="refit", ridge=0.05)
    targets = caught(blocks(model)[2].self_attn, lambda: model(WINDOWS), "output")
    projection = output_projections(compact)[2]
    x = caught(projection, lambda: compact(WINDOWS))
    weight, _ = brute_force(x, targets, input_major_weight(output_projections(original)[2]), 0.05)
    np.testing.assert_allclose(input_major_weight(projection).numpy(), weight, rtol=1e-3, atol=1e-4)


def test_a_refitted_layer_that_lost_no_head_is_in_the_masked_copy(model):
    keep = MASKS["all kept"].clone()
    keep[0, 1:3] = False
    compact = remove_heads(model, keep)
    adapt(DenseStream(model, WINDOWS, batch_size=4), compact, steps="refit", ridge=0.05)
    assert not torch.equal(compact.transformer.h[2].attn.c_proj.weight, model.transformer.h[2].attn.c_proj.weight)
    full = masked_copy(model, compact, keep)
    mask_heads(full, keep)
    torch.testing.assert_close(full(WINDOWS).logits, compact(WINDOWS).logits, rtol=1e-4, atol=1e-4)


def test_adaptation_brings_the_logits_closer(model):
    mask = MASKS["uneven"]
    plain, adapted = remove_heads(model, mask), remove_heads(model, mask)
    cost = adapt(DenseStream(model, WINDOWS, batch_size=4), adapted, steps="refit", ridge=0.01)
    dense = model(WINDOWS).logits

    def error(other):
        return float((other(WINDOWS).logits - dense).square().mean())

    assert error(adapted) < 0.7 * error(plain)
    assert cost.tokens == WINDOWS.numel()
    assert cost.seconds > 0


def test_nothing_pruned_means_nothing_changed(model):
    copy = remove_heads(model, MASKS["all kept"])
    adapt(DenseStream(model, WINDOWS, batch_size=4), copy, steps="refit", ridge=0.05)
    assert torch.equal(copy(WINDOWS).logits, model(WINDOWS).logits)


def test_layers_before_the_first_pruned_one_and_the_dense_model_are_untouched(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    mask = MASKS["all kept"].clone()
    mask[2, 1] = False
    compact = remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=4), compact, steps="refit", ridge=0.05)
    assert compact.transformer.h[1].attn.c_proj.weight is model.transformer.h[1].attn.c_proj.weight
    assert not torch.equal(compact.transformer.h[2].attn.c_proj.bias, model.transformer.h[2].attn.c_proj.bias)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_batches_do_not_matter(model):
    models = [remove_heads(model, MASKS["uneven"]) for _ in range(2)]
    for compact, batch in zip(models, (1, 12), strict=True):
        adapt(DenseStream(model, WINDOWS, batch_size=batch), compact, steps="refit", ridge=0.05)
    torch.testing.assert_close(models[0](WINDOWS).logits, models[1](WINDOWS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MASKS)
def test_masked_execution_computes_what_the_adapted_compact_model_does(model, name):
    compact = remove_heads(model, MASKS[name])
    adapt(DenseStream(model, WINDOWS, batch_size=4), compact, steps="refit", ridge=0.05)
    full = masked_copy(model, compact, MASKS[name])
    mask_heads(full, MASKS[name])
    torch.testing.assert_close(full(WINDOWS).logits, compact(WINDOWS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_masked_execution_has_the_refitted_gains(family):
    model, mask = tiny_model(family), random_masks(3, 6)["middle layer emptied"]
    compact = remove_heads(model, mask)
    adapt(DenseStream(model, WINDOWS, batch_size=4), compact, steps="refit-mlp", ridge=0.05)
    full = masked_copy(model, compact, mask)
    mask_heads(full, mask)
    torch.testing.assert_close(full(WINDOWS).logits, compact(WINDOWS).logits, rtol=1e-4, atol=1e-4)


def test_a_singular_matrix_gets_more_ridge_never_a_nan():
    x = torch.zeros(10, 4, dtype=torch.float64)
    x[:, 0] = torch.arange(10)
    x[:, 1] = x[:, 0]
    weight = torch.ones(4, 3)
    solution = ridge_towards(x.T @ x, x.T @ torch.ones(10, 3, dtype=torch.float64), weight, 1e-300)
    assert torch.isfinite(solution).all()
    assert torch.equal(
        ridge_towards(torch.zeros(4, 4).double(), torch.zeros(4, 3).double(), weight, 0.1), weight.double()
    )


@pytest.mark.parametrize("solve", [ridge_towards, ridge_towards_at_once])
def test_a_ridge_too_small_for_a_matrix_grows_until_there_is_a_fit(solve):
    """Rounding has left an eigenvalue of -1e-9, so there is no factor before lambda is above it. X'T lies along the other
    eigenvector, (1, 1), of 2: weights of 0 become 1/2 each."""
    gram = torch.tensor([[1, 1 + 1e-9], [1 + 1e-9, 1]], dtype=torch.float64)
    found = solve(gram, torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3), 1e-12)
    torch.testing.assert_close(found, torch.full((2, 3), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_infinite_ridge_returns_the_original_weights():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=generator)
    solution = ridge_towards(x.T @ x, x.T @ torch.randn(50, 3, generator=generator, dtype=torch.float64), weight, 1e9)
    torch.testing.assert_close(solution, weight.double(), rtol=1e-5, atol=1e-5)


def test_coarse_precision_is_refused():
    model = tiny_gpt2().to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        adapt(DenseStream(model, WINDOWS, batch_size=4), model, steps="refit", ridge=0.1)


@pytest.mark.parametrize("features", [1, 192, 193, 500])
def test_products_in_blocks_are_the_whole_product(features):
    x = torch.randn(40, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(adaptation._gram(x), x.T @ x)


FIRST_TOKENS = torch.arange(1, 97)[torch.randperm(96, generator=torch.Generator().manual_seed(8))][:, None]
OF_UNREAD_IDS, FIRST_TOKENS = FIRST_TOKENS[:16], FIRST_TOKENS[16:]


def lengths_after_blocks(model, ids):
    """How long the stream is after every block, [L, N, T]."""
    return torch.stack(
        [caught(block, lambda: model(ids), "output").view(*ids.shape, -1).norm(dim=-1) for block in blocks(model)]
    )


def test_the_block_that_makes_first_tokens_long_is_found():
    """Of a model in which the second one does; measured anew, on other windows and by hand."""
    assert DenseStream(tiny_gpt2(), WINDOWS, batch_size=5, first_tokens=FIRST_TOKENS).sink_layer is None
    for layer in range(LAYERS):
        model = with_long_first_tokens(tiny_gpt2(), layer=layer)
        lengths = lengths_after_blocks(model, WINDOWS.flip(0))
        first, usual = lengths[..., 0].median(-1).values, lengths.flatten(1).median(-1).values
        assert (first > 10 * usual).tolist() == [number >= layer for number in range(LAYERS)]
        assert DenseStream(model, WINDOWS, batch_size=5, first_tokens=FIRST_TOKENS).sink_layer == layer


def test_windows_of_one_token_are_read_up_to_the_sink_layer_and_no_further():
    """Each projection is the brute-force solution on the rows that it may read: with first tokens up to the attention of
    the layer that makes them long, without them from its MLP on."""
    model, mask = with_long_first_tokens(tiny_gpt2()), MASKS["uneven"].clone()
    mask[0, 0] = False
    compact, original = remove_heads(model, mask), remove_heads(model, mask)
    dense = DenseStream(model, WINDOWS, batch_size=5, first_tokens=FIRST_TOKENS)
    assert torch.equal(dense.first_tokens, FIRST_TOKENS)
    assert [stream.of_first_tokens for stream in dense.start()] == [False] * 3 + [True]
    assert {layer for layer, _ in dense._kept[3]} == {0, 1}
    assert {layer for layer, _ in dense._kept[0]} == {0, 1, 2}
    cost = adapt(dense, compact, ridge=0.05, mlp_ridge=0.2)
    assert cost.tokens == WINDOWS.numel() + 80

    def both(module, of, what="input"):
        return torch.cat([caught(module, lambda: of(WINDOWS), what), caught(module, lambda: of(FIRST_TOKENS), what)])

    for layer in range(2):
        block, dense_block, before = (one.transformer.h[layer] for one in (compact, model, original))
        rows = slice(None if layer < 1 else WINDOWS.numel())
        targets = both(dense_block.ln_2, model) - both(block.ln_1, compact)
        weight, _ = brute_force(both(block.attn.c_proj, compact), targets, before.attn.c_proj.weight, 0.05)
        np.testing.assert_allclose(block.attn.c_proj.weight.numpy(), weight, rtol=1e-3, atol=1e-3)
        targets = both(dense_block, model, "output") - both(block.ln_2, compact)
        weight, _ = brute_force(both(block.mlp.c_proj, compact)[rows], targets[rows], before.mlp.c_proj.weight, 0.2)
        np.testing.assert_allclose(block.mlp.c_proj.weight.numpy(), weight, rtol=1e-3, atol=1e-2)


def test_first_tokens_keep_their_length_where_windows_of_one_token_are_read():
    """All windows begin with one token; of others, not read at a first place, the length stays within 10 %."""
    model, mask, windows = with_long_first_tokens(tiny_gpt2()), MASKS["all kept"].clone(), WINDOWS.clone()
    mask[0, :2] = mask[1, :2] = False
    windows[:, 0] = 5
    dense = lengths_after_blocks(model, OF_UNREAD_IDS)[1, :, 0]
    errors = []
    for first_tokens in (None, FIRST_TOKENS):
        compact = remove_heads(model, mask)
        text = DenseStream(model, windows, batch_size=5, first_tokens=first_tokens)
        adapt(text, compact, ridge=1e-3, mlp_ridge=1e-3)
        errors.append(float((lengths_after_blocks(compact, OF_UNREAD_IDS)[1, :, 0] / dense - 1).abs().max()))
    without, read = errors
    assert without > 0.2
    assert read < 0.1


def test_without_a_sink_layer_nothing_changes_bit_for_bit(model):
    plain, given = (remove_heads(model, MASKS["uneven"]) for _ in range(2))
    dense = DenseStream(model, WINDOWS, batch_size=5, first_tokens=FIRST_TOKENS)
    costs = adapt(DenseStream(model, WINDOWS, batch_size=5), plain), adapt(dense, given)
    assert dense.first_tokens is None
    assert costs[0].tokens == costs[1].tokens == WINDOWS.numel()
    for name, parameter in given.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_the_constant_of_lost_heads_is_of_the_text_alone():
    model = with_long_first_tokens(tiny_gpt2())
    plain, given = (remove_heads(model, MASKS["uneven"]) for _ in range(2))
    adapt(DenseStream(model, WINDOWS, batch_size=5), plain, steps="bias")
    cost = adapt(DenseStream(model, WINDOWS, batch_size=5, first_tokens=FIRST_TOKENS), given, steps="bias")
    assert cost.tokens == WINDOWS.numel()
    for name, parameter in given.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_first_tokens_are_drawn_from_the_windows_alone():
    """A sixteenth of 240 tokens; of 131,072 not 8,192 but the limit. The generator decides."""
    assert streams.drawn_first_tokens(WINDOWS, torch.Generator().manual_seed(1)).shape == (15, 1)
    windows = torch.arange(131072).view(256, 512)
    one, same, other = (streams.drawn_first_tokens(windows, torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert one.shape == (4096, 1)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= int(one.min()) < 200
    assert 130872 < int(one.max()) < 131072


def test_the_sink_layer_is_where_first_tokens_reach_half_of_their_greatest_length():
    usual = torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert streams._sink_layer(torch.tensor([1.0, 12.0, 40.0, 30.0]), usual) == 2
    assert streams._sink_layer(torch.tensor([1.0, 25.0, 40.0, 30.0]), usual) == 1
    assert streams._sink_layer(torch.tensor([1.0, 9.0, 19.0, 20.0]), usual) is None
