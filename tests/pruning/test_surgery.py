"""Masked and compact pruning agree with each other and with the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from builders import random_masks, stepwise_logits, tiny_gpt2, token_ids
from transformers import DynamicCache

from pruning_comparison.measure.memory import cache_bytes, parameter_bytes
from pruning_comparison.models.heads import live_heads
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import HeadGates, converted_copy, mask_heads, remove_heads, sharing_copy

LAYERS, HEADS, WIDTH = 3, 4, 32
MASKS = random_masks(LAYERS, HEADS)
TOLERANCE = 1e-4


def test_all_gates_open_is_the_original_model(model):
    expected = model(token_ids()).logits
    with HeadGates(model, torch.ones(LAYERS, HEADS)):
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(remove_heads(model, MASKS["all kept"])(token_ids()).logits, expected, rtol=0, atol=0)


def test_gates_are_reversible(model):
    expected = model(token_ids()).logits
    gates = mask_heads(model, MASKS["uneven"])
    assert (model(token_ids()).logits - expected).abs().max() > 0.01
    gates.remove()
    torch.testing.assert_close(model(token_ids()).logits, expected, rtol=0, atol=0)


def test_a_gate_scales_its_head_and_no_other(model):
    """By hand: attention output = sum over heads of gate * (head output @ its rows of the projection) + bias."""
    captured = {}
    projection = model.transformer.h[1].attn.c_proj
    handle = projection.register_forward_pre_hook(lambda m, x: captured.update(x=x[0]))
    model(token_ids())
    handle.remove()
    gates = torch.ones(LAYERS, HEADS)
    gates[1] = torch.tensor([0.0, 0.25, 1.0, 0.5])
    by_head = captured["x"].unflatten(-1, (HEADS, -1))
    rows = projection.weight.unflatten(0, (HEADS, -1))
    expected = torch.einsum("h,bthd,hde->bte", gates[1], by_head, rows) + projection.bias
    outputs = {}
    handle = projection.register_forward_hook(lambda m, x, y: outputs.update(y=y))
    with HeadGates(model, gates):
        model(token_ids())
    handle.remove()
    torch.testing.assert_close(outputs["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_masked_equals_compact_in_one_pass(model, name):
    compact = remove_heads(model, MASKS[name])
    with mask_heads(model, MASKS[name]):
        expected = model(token_ids()).logits
    torch.testing.assert_close(compact(token_ids()).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("level", [0, 10, 30, 50, 70, 90])
def test_masked_equals_compact_at_every_level(level):
    model = tiny_gpt2(layers=4, heads=8)
    scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(level))
    keep = select_heads(scores, level)
    compact = remove_heads(model, keep)
    with mask_heads(model, keep):
        expected = model(token_ids()).logits
        expected_steps, _ = stepwise_logits(model, token_ids())
    torch.testing.assert_close(compact(token_ids()).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(stepwise_logits(compact, token_ids())[0], expected_steps, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", MASKS)
def test_masked_equals_compact_in_cached_decoding(model, name):
    compact = remove_heads(model, MASKS[name])
    actual, _ = stepwise_logits(compact, token_ids())
    with mask_heads(model, MASKS[name]):
        expected, _ = stepwise_logits(model, token_ids())
        at_once = model(token_ids()).logits
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(actual, at_once, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", MASKS)
def test_masked_equals_compact_with_left_padding(model, name):
    tokens, visible = token_ids(), torch.ones(2, 11, dtype=torch.long)
    tokens[0, :3] = 0
    visible[0, :3] = 0
    compact = remove_heads(model, MASKS[name])
    actual, _ = stepwise_logits(compact, tokens, visible)
    with mask_heads(model, MASKS[name]):
        expected, _ = stepwise_logits(model, tokens, visible)
    torch.testing.assert_close(actual[0, 3:], expected[0, 3:], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(actual[1], expected[1], rtol=TOLERANCE, atol=TOLERANCE)
    alone, _ = stepwise_logits(compact, tokens[:1, 3:])
    torch.testing.assert_close(actual[0, 3:], alone[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", MASKS)
def test_parameter_and_cache_bytes_fall_as_computed_by_hand(model, name):
    keep = MASKS[name]
    compact = remove_heads(model, keep)
    head_size, tokens = WIDTH // HEADS, token_ids()
    # Per head: q, k, v columns (3 * E * D weights and 3 * D biases) and D rows of the output projection (D * E weights).
    per_head = 3 * WIDTH * head_size + 3 * head_size + head_size * WIDTH
    gone = int((~keep).sum())
    # A layer without heads also loses the norm before its attention, E weights and E biases.
    norms_gone = 2 * WIDTH * int((~keep.any(1)).sum())
    assert parameter_bytes(model) - parameter_bytes(compact) == 4 * (per_head * gone + norms_gone)
    _, cache = stepwise_logits(compact, tokens)
    batch, length = tokens.shape
    assert cache_bytes(cache) == 4 * 2 * batch * length * head_size * int(keep.sum())
    assert list(live_heads(compact)) == keep.sum(1).tolist()


def test_the_original_keeps_its_weights_and_shares_the_rest(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compact = remove_heads(model, MASKS["uneven"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    assert compact.transformer.wte.weight is model.transformer.wte.weight
    assert compact.transformer.h[0].mlp.c_fc.weight is model.transformer.h[0].mlp.c_fc.weight
    assert sharing_copy(model).lm_head.weight is model.transformer.wte.weight


def test_copies_in_another_precision_share_what_pruning_left_alone(model):
    dense = converted_copy(model, torch.bfloat16)
    keep = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    keep[1, 2] = False
    pruned = converted_copy(remove_heads(model, keep), torch.bfloat16, like=(model, dense))
    of_dense = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {name for name, parameter in pruned.named_parameters() if parameter.data_ptr() not in of_dense}
    # The pruned layer's fused projection and the weight of its output projection, whose bias stays.
    assert own == {f"transformer.h.1.attn.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")}
    alone = converted_copy(remove_heads(model, keep), torch.bfloat16)
    assert torch.equal(pruned(token_ids()).logits, alone(token_ids()).logits)


@pytest.mark.parametrize("name", ["uneven", "first layer emptied", "one head left"])
def test_generate_works_on_a_pruned_model(model, name):
    """transformers' own decoding, which asks the cache's first layer how long it is."""
    compact = remove_heads(model, MASKS[name])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    actual = compact.generate(token_ids(), attention_mask=torch.ones_like(token_ids()), **settings)
    with mask_heads(model, MASKS[name]):
        expected = model.generate(token_ids(), attention_mask=torch.ones_like(token_ids()), **settings)
    assert actual.tolist() == expected.tolist()


def test_an_emptied_first_layer_counts_tokens(model):
    _, cache = stepwise_logits(remove_heads(model, MASKS["first layer emptied"]), token_ids())
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 11
    assert cache.get_seq_length(1) == 11


def test_masks_of_the_wrong_kind_are_refused(model):
    with pytest.raises(ValueError, match="bool"):
        remove_heads(model, torch.ones(LAYERS, HEADS))
    with pytest.raises(ValueError, match="keep mask"):
        mask_heads(model, torch.ones(HEADS, LAYERS, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        HeadGates(model, torch.full((LAYERS, HEADS), 1.5))
