"""Attention that hands out entropies: against whole maps, block by block, and without ever making one."""

from __future__ import annotations

import pytest
import torch
from builders import ATTENTIONS, GROUPS_OF_TWO_AND_THREE, LargestTensor, tiny_gpt2, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.models.heads import attentions, blocks, mlp_output_projections
from pruning_comparison.pruning.surgery import converted_copy, mask_heads, remove_heads
from pruning_comparison.scoring import entropy_attention
from pruning_comparison.scoring.entropy import mean_attention_entropy
from pruning_comparison.scoring.entropy_attention import (
    IMPLEMENTATION,
    attend_with_entropies,
    entropies_in_place_of_maps,
)

LENGTH = 45  # no multiple of a block, and more than one
WINDOWS = torch.randint(1, 97, (3, LENGTH), generator=torch.Generator().manual_seed(2))
EMPTIED = GROUPS_OF_TWO_AND_THREE.clone()
EMPTIED[1] = False
LAST_EMPTIED = GROUPS_OF_TWO_AND_THREE.clone()
LAST_EMPTIED[2] = False
MASKS = {
    "dense": torch.ones(3, 6, dtype=torch.bool),
    "uneven groups": GROUPS_OF_TWO_AND_THREE,
    "emptied layer": EMPTIED,
    "last layer emptied": LAST_EMPTIED,
}
WINDOW = 5
SLIDING = {"mistral": (0, 1, 2), "qwen3": (1, 2), "gemma2": (0, 2), "gpt_oss": (0, 2)}
"""Layers of the tiny models that see five tokens, by model type, where their config has a window."""

families = pytest.mark.parametrize("family", ATTENTIONS)
masks = pytest.mark.parametrize("keep", MASKS.values(), ids=list(MASKS))


@torch.inference_mode()
def entropy_of_eager_maps(model, keep):
    """[L, H] from whole maps; 0 where a head has gone. Keys are seen where the map is not 0, and sinks are left out."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = [m for m in model(WINDOWS, output_attentions=True, use_cache=False).attentions if m is not None]
    model.set_attn_implementation(before)
    expected = torch.zeros(keep.shape, dtype=torch.float64)
    for layer, of_layer in zip([layer for layer in range(len(keep)) if keep[layer].any()], maps, strict=True):
        slides = layer in SLIDING.get(model.config.model_type, ()) and model.config.sliding_window is not None
        window = WINDOW if slides else LENGTH
        seen = torch.arange(2, LENGTH + 1).clamp(max=window)
        maps_of_tokens = of_layer.double() / of_layer.double().sum(-1, keepdim=True)
        entropy = torch.special.entr(maps_of_tokens).sum(-1)[..., 1:] / seen.log()
        expected[layer, keep[layer]] = entropy.mean((0, 2))
    return expected


@pytest.fixture(params=["blocks as they are", "rows apart", "heads apart"])
def block_size(request, monkeypatch):
    """Blocks of a tiny model hold everything; smaller ones hold a row of the batch, or a head, and few queries."""
    if request.param != "blocks as they are":
        monkeypatch.setattr(entropy_attention, "_BLOCK_QUERIES", 7)
        numbers = 7 * LENGTH * (8 if request.param == "rows apart" else 4)
        monkeypatch.setattr(entropy_attention, "_BLOCK_NUMBERS", numbers)


@families
@masks
@pytest.mark.usefixtures("block_size")
def test_entropies_are_those_of_whole_maps(family, keep):
    model = remove_heads(tiny_model(family), keep)
    found = mean_attention_entropy(model, WINDOWS, batch_size=2)
    torch.testing.assert_close(found, entropy_of_eager_maps(model, keep), rtol=1e-6, atol=1e-6)
    assert (found > 0).equal(keep)


@pytest.mark.parametrize("window", [9, 1])
def test_uniform_attention_scores_one_in_a_window_too(window):
    """Queries of zeros attend to all that they see alike: 9 keys of up to 45, or the token itself alone."""
    model = tiny_model("mistral with a window", sliding_window=window)
    for attention in attentions(model):
        attention.q_proj.weight.data.zero_()
    expected = torch.full((3, 6), float(window > 1), dtype=torch.float64)
    torch.testing.assert_close(mean_attention_entropy(model, WINDOWS, batch_size=2), expected, rtol=1e-5, atol=1e-6)


@families
def test_a_masked_model_has_the_entropies_of_the_pruned_one(family):
    model = tiny_model(family)
    pruned = mean_attention_entropy(remove_heads(model, EMPTIED), WINDOWS, batch_size=2)
    with mask_heads(model, EMPTIED):
        masked = mean_attention_entropy(model, WINDOWS, batch_size=2)
    torch.testing.assert_close(masked[EMPTIED], pruned[EMPTIED], rtol=1e-6, atol=1e-6)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [MASKS["dense"], GROUPS_OF_TWO_AND_THREE], ids=["dense", "uneven groups"])
def test_entropies_of_models_in_half_precision(family, dtype, keep):
    model = remove_heads(converted_copy(tiny_model(family), dtype), keep)
    found = mean_attention_entropy(model, WINDOWS, batch_size=2)
    torch.testing.assert_close(found, entropy_of_eager_maps(model, keep), rtol=2e-3, atol=0)


@families
@masks
def test_the_model_computes_what_it_computes_with_any_attention(family, keep):
    model = remove_heads(tiny_model(family), keep)
    expected = model(WINDOWS, use_cache=False).logits
    with entropies_in_place_of_maps(model):
        found = model(WINDOWS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def whole(query, key, value, mask):
    """In float64 from whole maps; what is hidden is the least number of the mask's type."""
    shared = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    maps = (scores if mask is None else scores + mask).softmax(-1)
    return (maps @ value).transpose(1, 2), torch.special.entr(maps).sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(["none", "shared", "by row", "by head", "any"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 2000),
    st.integers(0, 10**6),
)
def test_any_mask_and_any_block_size(batch, groups, shared, length, kind, dtype, numbers, seed):
    """Masks of holes and of added numbers, for all alike or by row or head; queries that see nothing attend to all alike."""
    draw = torch.Generator().manual_seed(seed)
    heads, size = groups * shared, 4
    query, key, value = (
        (3 * torch.randn(batch, length, count, size, generator=draw)).to(dtype).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    mask = None
    if kind != "none":
        shape = {"shared": (1, 1), "by row": (batch, 1), "by head": (1, heads), "any": (batch, heads)}[kind]
        places = (*shape, length, length)
        added = torch.where(torch.rand(places, generator=draw) < 0.5, 0.0, torch.randn(places, generator=draw))
        hidden = torch.rand(places, generator=draw) < torch.rand(*shape, length, 1, generator=draw)
        hidden |= ~torch.ones(length, length).tril().bool()
        mask = added.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
    whole_mask = mask if mask is None else mask.double().masked_fill(mask == torch.finfo(dtype).min, -1e30)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(entropy_attention, "_BLOCK_NUMBERS", numbers)
        patched.setattr(entropy_attention, "_BLOCK_QUERIES", 1 + seed % 6)
        output, entropies = attend_with_entropies(torch.nn.Identity(), query, key, value, mask, scaling=0.3, dropout=0)
    expected = whole(query, key, value, whole_mask)
    assert output.dtype == dtype
    assert entropies.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(output, expected[0].to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=2e-5)
    assert entropies.min() >= 0


def test_minus_infinity_hides_as_the_least_number_does():
    query, key, value = torch.randn(3, 2, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    hidden = ~torch.ones(9, 9).tril().bool()[None, None]
    results = [
        attend_with_entropies(
            torch.nn.Identity(), query, key, value, torch.zeros(1, 1, 9, 9).masked_fill(hidden, least)
        )
        for least in (torch.finfo(torch.float32).min, -torch.inf)
    ]
    assert all(one.isfinite().all() and torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_shift_that_all_scores_share_costs_no_precision():
    """As that of keys with a large bias: softmax does not see it, and a difference of large sums would lose digits."""
    query, key, value = torch.randn(3, 1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    query, key = (512 * query).round() / 512, (512 * key).round() / 512
    query[..., 0], key[..., 0] = 64.0, 64.0
    _, entropies = attend_with_entropies(torch.nn.Identity(), query, key, value, None, scaling=1.0)
    key[..., 0] = 0
    _, plain = attend_with_entropies(
        torch.nn.Identity(), query.double(), key.double(), value.double(), None, scaling=1.0
    )
    torch.testing.assert_close(entropies.double(), plain, rtol=0, atol=1e-3)


def test_keys_that_no_query_of_a_block_sees_are_not_visited(monkeypatch):
    """Nor added to where the mask says nothing: causal, and with a window of 8 keys."""
    monkeypatch.setattr(entropy_attention, "_BLOCK_QUERIES", 16)
    causal = torch.zeros(1, 1, 48, 48).masked_fill(~torch.ones(48, 48).tril().bool(), torch.finfo(torch.float32).min)
    window = causal.masked_fill(torch.ones(48, 48).tril(-8).bool(), torch.finfo(torch.float32).min)
    visited = []
    for mask in (causal, window):
        readable, visible = entropy_attention._readable(mask, torch.float32)
        stretches = entropy_attention._stretches(readable, visible, 48, 48, 16)
        visited.append([(seen.start, seen.stop, said.start, said.stop) for _, seen, said in stretches])
    assert visited[0] == [(0, 16, 1, 16), (0, 32, 17, 32), (0, 48, 33, 48)]
    assert visited[1] == [(0, 16, 0, 16), (9, 32, 9, 32), (25, 48, 25, 48)]


def test_no_whole_map_is_ever_made():
    model = tiny_gpt2(context=256)
    windows = torch.randint(1, 97, (8, 250), generator=torch.Generator().manual_seed(0))
    whole_maps = 8 * 4 * 250 * 250 * 4
    with LargestTensor() as largest:
        mean_attention_entropy(model, windows, batch_size=8)
    assert largest.bytes < whole_maps / 3
    model.set_attn_implementation("eager")
    with LargestTensor() as largest, torch.inference_mode():
        model(windows, use_cache=False, logits_to_keep=1)
    assert largest.bytes >= whole_maps


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [MASKS["dense"], EMPTIED], ids=["dense", "emptied layer"])
def test_the_attention_that_the_model_had_is_restored(before, keep):
    model = remove_heads(tiny_model("llama"), keep)
    model.set_attn_implementation(before)
    expected = model(WINDOWS).logits
    mean_attention_entropy(model, WINDOWS, batch_size=2)

    def fail(module, inputs):
        assert model.config._attn_implementation == IMPLEMENTATION
        raise RuntimeError("no")

    handle = blocks(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        mean_attention_entropy(model, WINDOWS, batch_size=2)
    handle.remove()
    assert model.config._attn_implementation == before
    assert not any(attention._forward_hooks for attention in attentions(model))
    assert torch.equal(model(WINDOWS).logits, expected)


@masks
def test_a_pass_ends_with_the_last_attention(keep):
    model = remove_heads(tiny_model("gpt2"), keep)
    ran = []
    for layer, projection in enumerate(mlp_output_projections(model)):
        projection.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    mean_attention_entropy(model, WINDOWS, batch_size=3)
    assert ran == [0] if not keep[2].any() else ran == [0, 1]


def test_a_model_without_heads_has_no_entropies():
    model = remove_heads(tiny_model("gpt2"), torch.zeros(3, 6, dtype=torch.bool))
    assert not mean_attention_entropy(model, WINDOWS, batch_size=2).any()
