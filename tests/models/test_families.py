"""Every family, and everything a family can do differently: pruned for real it computes what masking computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import (
    FAMILIES,
    MASKS,
    left_padded,
    save_tiny_model,
    stepwise_logits,
    tiny_model,
    token_ids,
    write_short_texts,
)

from pruning_comparison.agency import DenseStream, adapt
from pruning_comparison.errors import InputError
from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import generate
from pruning_comparison.measure.memory import cache_bytes, cache_bytes_after, decode_bytes, parameter_bytes
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.heads import (
    LAYOUTS,
    NOT_YET,
    UnsupportedModelError,
    attentions,
    check_supported,
    has_experts,
    head_grid,
    head_parameters,
    input_major_weight,
    live_heads,
    output_projections,
)
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import (
    HeadGates,
    converted_copy,
    mask_heads,
    masked_copy,
    remove_heads,
    sharing_copy,
)
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare_pruning
from pruning_comparison.scoring.weights import score_magnitude
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore

LAYERS, HEADS, WIDTH = 3, 6, 48
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SLIDING = {
    "mistral with a window": (True, True, True),
    "qwen3 with windows": (False, True, True),
    "ministral": (False, True, True),
    "gemma2": (True, False, True),
    "gemma3": (True, False, True),
    "gpt_oss": (True, False, True),
}
"""Which layers of a family see a window of five tokens."""

EAGER_ALONE = {"gemma2", "gpt_oss"}

families = pytest.mark.parametrize("family", FAMILIES)
masks = pytest.mark.parametrize("name", MASKS)


def kv_heads_left(model, keep):
    """Key-value heads that any kept query head reads, per layer."""
    grid = head_grid(model.config)
    return [
        sum(bool(row[g * grid.group_size : (g + 1) * grid.group_size].any()) for g in range(grid.n_kv_heads))
        for row in keep
    ]


def test_every_supported_model_type_is_tested():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(LAYOUTS)


@families
def test_all_gates_open_is_the_original_model(family):
    model = tiny_model(family)
    expected = model(token_ids()).logits
    with HeadGates(model, torch.ones(LAYERS, HEADS)):
        assert torch.equal(model(token_ids()).logits, expected)
    assert torch.equal(remove_heads(model, MASKS["all kept"])(token_ids()).logits, expected)


@families
def test_the_grid_is_the_configs(family):
    model = tiny_model(family)
    grid = head_grid(model.config)
    assert (grid.n_layers, grid.n_heads) == (LAYERS, HEADS)
    assert grid.head_size == FAMILIES[family][1].get("head_dim", WIDTH // HEADS)
    assert grid.n_kv_heads == FAMILIES[family][1].get("num_key_value_heads", HEADS)
    assert grid.group_size * grid.n_kv_heads == HEADS
    assert model.config.max_position_embeddings == 64


@families
@masks
def test_masked_equals_compact_in_one_pass(family, name):
    model = tiny_model(family)
    compact = remove_heads(model, MASKS[name])
    with mask_heads(model, MASKS[name]):
        expected = model(token_ids()).logits
    torch.testing.assert_close(compact(token_ids()).logits, expected, **CLOSE)
    if name != "all kept":
        assert (expected - model(token_ids()).logits).abs().max() > 0.01


@families
@masks
def test_masked_equals_compact_in_cached_decoding(family, name):
    model = tiny_model(family)
    compact = remove_heads(model, MASKS[name])
    actual, _ = stepwise_logits(compact, token_ids())
    with mask_heads(model, MASKS[name]):
        expected, _ = stepwise_logits(model, token_ids())
        at_once = model(token_ids()).logits
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(actual, at_once, **CLOSE)


@families
@masks
def test_masked_equals_compact_with_left_padding(family, name):
    model = tiny_model(family)
    tokens, visible = left_padded()
    compact = remove_heads(model, MASKS[name])
    actual, _ = stepwise_logits(compact, tokens, visible)
    with mask_heads(model, MASKS[name]):
        expected, _ = stepwise_logits(model, tokens, visible)
    torch.testing.assert_close(actual[0, 3:], expected[0, 3:], **CLOSE)
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)
    alone, _ = stepwise_logits(compact, tokens[:1, 3:])
    torch.testing.assert_close(actual[0, 3:], alone[0], **CLOSE)


@families
@pytest.mark.parametrize("level", [10, 30, 50, 70, 90])
def test_masked_equals_compact_at_every_level(family, level):
    model = tiny_model(family)
    keep = select_heads(torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(level)), level)
    compact = remove_heads(model, keep)
    with mask_heads(model, keep):
        expected = model(token_ids()).logits
    torch.testing.assert_close(compact(token_ids()).logits, expected, **CLOSE)
    torch.testing.assert_close(stepwise_logits(compact, token_ids())[0], expected, **CLOSE)


def test_nine_heads_in_three_groups_of_which_three_one_and_none_stay():
    model = tiny_model("llama", width=72, num_attention_heads=9, num_key_value_heads=3, layers=2)
    keep = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    compact = remove_heads(model, keep)
    with mask_heads(model, keep):
        torch.testing.assert_close(compact(token_ids()).logits, model(token_ids()).logits, **CLOSE)
    assert [a.kv_index.tolist() for a in attentions(compact)] == [[0, 0, 0, 1], [0, 1, 1]]
    assert [a.k_proj.out_features for a in attentions(compact)] == [16, 16]


@families
def test_an_emptied_layer_skips_the_norm_that_only_its_attention_read(family):
    model = tiny_model(family)
    compact = remove_heads(model, MASKS["first layer emptied"])
    calls = []
    for name, module in compact.named_modules():
        if "norm" in name.rsplit(".", 1)[-1] or name.rsplit(".", 1)[-1] in ("ln_1", "ln_2"):
            if isinstance(module, torch.nn.Identity):
                continue
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    compact(token_ids())
    before = {"gpt2": "ln_1", "opt": "self_attn_layer_norm", "opt with norms after": "self_attn_layer_norm"}
    name = before.get(family, "input_layernorm")
    called = sum(call.endswith(name) for call in calls)
    # OPT with norms after its sums keeps it, OLMo 2 has none.
    assert called == {"opt with norms after": LAYERS, "olmo2": 0}.get(family, LAYERS - 1)


def test_a_decoding_step_over_uneven_groups_copies_no_keys(monkeypatch):
    """Three key-value heads of which 3, 1 and 2 query heads stay: the stored keys are handed on as they lie."""
    model = tiny_model("qwen2", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    keep = torch.ones(LAYERS, 9, dtype=torch.bool)
    keep[1] = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)
    compact = remove_heads(model, keep)
    stock, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, *args, **kwargs):
        shapes.append((query.shape[1:3], key.shape[1], key.untyped_storage().nbytes() // 4))
        return stock(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    run = generate(compact, [[1, 2, 3, 4]], 3, temperatures=[0.0])
    # Queries [K, largest group], K key heads, in a cache reserved for keys and values of 4 + 3 - 1 tokens of 8 features.
    assert shapes[LAYERS + 1] == (torch.Size([3, 3]), 3, 2 * 3 * 6 * 8)
    with mask_heads(model, keep):
        expected = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert run.tokens.tolist() == expected[:, 4:].tolist()


def test_even_groups_keep_the_stock_path():
    model = tiny_model("llama")
    keep = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    compact = remove_heads(model, keep)
    assert [a.num_key_value_groups for a in attentions(compact)] == [2, 3, 1]
    assert not any(hasattr(a, "kv_index") for a in attentions(compact))
    with mask_heads(model, keep):
        torch.testing.assert_close(compact(token_ids()).logits, model(token_ids()).logits, **CLOSE)


@families
@masks
def test_parameter_and_cache_bytes_fall_as_computed_by_hand(family, name):
    model, keep = tiny_model(family), MASKS[name]
    compact = remove_heads(model, keep)
    grid = head_grid(model.config)
    size, biases = (
        grid.head_size,
        {name.rsplit(".", 2)[1] for name, _ in model.named_parameters() if name.endswith("bias")},
    )
    qkv_bias = int(bool(biases & {"c_attn", "q_proj", "query_key_value", "qkv_proj"}))
    query_heads_gone = int((~keep).sum())
    kv_left = kv_heads_left(model, keep)
    kv_heads_gone = LAYERS * grid.n_kv_heads - sum(kv_left)
    # A query head has E * D query weights and D * E output weights, a key-value head twice E * D; each with its biases.
    per_query_head = 2 * WIDTH * size + qkv_bias * size + (family == "gpt_oss")  # a sink
    per_kv_head = 2 * (WIDTH * size + qkv_bias * size)
    if family == "olmo2":  # queries and keys stay, for the norms that run over all of them, until the layer is empty
        per_query_head, per_kv_head = WIDTH * size, WIDTH * size
    # A layer without heads also loses the query and key norms, D weights each, and the norm before its attention, E weights
    # and, where norms have them, E biases. OPT with norms after its sums keeps that: it is not before attention.
    emptied = int((~keep.any(1)).sum())
    norm = {"gpt2": 2, "gpt_neox": 2, "gpt_neox in sequence": 2, "opt": 2, "opt with norms after": 0}.get(family, 1)
    norms_gone = ((2 * size if family.startswith(("qwen3", "gemma3")) else 0) + norm * WIDTH) * emptied
    if family == "olmo2":
        norms_gone = emptied * (HEADS + grid.n_kv_heads) * (WIDTH * size + size)
    gone = query_heads_gone * per_query_head + kv_heads_gone * per_kv_head + norms_gone
    assert parameter_bytes(model) - parameter_bytes(compact) == 4 * gone
    tokens = token_ids()
    _, cache = stepwise_logits(compact, tokens)
    batch, length = tokens.shape
    kept_tokens = [length] * LAYERS
    if family in SLIDING:  # a window of 5 tokens needs the 4 before the newest
        kept_tokens = [4 if sliding else length for sliding in SLIDING[family]]
    assert cache_bytes(cache) == sum(
        4 * 2 * batch * count * size * heads for count, heads in zip(kept_tokens, kv_left, strict=True)
    )
    assert cache.get_seq_length() == length
    assert list(live_heads(compact)) == keep.sum(1).tolist()


@families
@pytest.mark.parametrize("name", ["uneven groups", "first layer emptied", "one head left"])
def test_generate_and_our_own_decoding_agree_with_the_masked_model(family, name):
    """transformers' own decoding, which asks the cache's first layer how long it is, on a batch with padding."""
    model = tiny_model(family)
    compact = remove_heads(model, MASKS[name])
    tokens, visible = left_padded()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    actual = compact.generate(tokens, attention_mask=visible, **settings)
    with mask_heads(model, MASKS[name]):
        expected = model.generate(tokens, attention_mask=visible, **settings)
    assert actual.tolist() == expected.tolist()
    prompts = [tokens[0, 3:].tolist(), tokens[1].tolist()]
    ours = generate(compact, prompts, 8, temperatures=[0.0, 0.0])
    assert ours.tokens.tolist() == actual[:, 11:].tolist()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EAGER_ALONE])
def test_eager_and_sdpa_agree_on_a_pruned_model_and_the_dense_one_is_left_alone(family):
    model = tiny_model(family)
    before = model(token_ids()).logits
    compact = remove_heads(model, MASKS["uneven groups"])
    expected = compact(token_ids()).logits
    compact.set_attn_implementation("eager")
    torch.testing.assert_close(compact(token_ids()).logits, expected, **CLOSE)
    tokens, visible = left_padded()
    eager, _ = stepwise_logits(compact, tokens, visible)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(token_ids()).logits, before)
    other = sharing_copy(compact)
    other.set_attn_implementation("sdpa")
    assert compact.config._attn_implementation == "eager"
    assert torch.equal(other(token_ids()).logits, expected)
    torch.testing.assert_close(stepwise_logits(other, tokens, visible)[0][0, 3:], eager[0, 3:], **CLOSE)


def test_a_pruned_layer_hands_out_the_maps_of_its_heads():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    keep = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    keep[0] = MASKS["uneven groups"][0]
    expected = model(token_ids(), output_attentions=True).attentions[0][:, keep[0]]
    compact = remove_heads(model, keep)
    torch.testing.assert_close(compact(token_ids(), output_attentions=True).attentions[0], expected, **CLOSE)


def test_magnitude_of_grouped_heads_by_hand():
    model = tiny_model("llama", layers=1, width=8, num_attention_heads=4, num_key_value_heads=2)
    attention = attentions(model)[0]
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight.data.zero_()
    attention.q_proj.weight.data[3, 0] = 2.0  # query of head 1
    attention.k_proj.weight.data[1, 5] = 3.0  # key of key-value head 0: heads 0 and 1
    attention.v_proj.weight.data[2, 7] = 4.0  # value of key-value head 1: heads 2 and 3
    attention.o_proj.weight.data[6, 7] = 1.0  # output of head 3
    expected = torch.tensor([[3.0, math.sqrt(4 + 9), 4.0, math.sqrt(16 + 1)]]).double()
    torch.testing.assert_close(score_magnitude(model), expected)


def test_interleaved_heads_by_hand():
    """GPT-NeoX: the outputs of the fused projection are query, key, value of head 0, then of head 1, D = 4 each."""
    model = tiny_model("gpt_neox", layers=1, width=8, num_attention_heads=2)
    weight = attentions(model)[0].query_key_value.weight
    parts = head_parameters(model, 0)
    torch.testing.assert_close(parts["query"][1], weight[12:16].T)
    torch.testing.assert_close(parts["key"][0], weight[4:8].T)
    torch.testing.assert_close(parts["value"][1], weight[20:24].T)
    compact = remove_heads(model, torch.tensor([[False, True]]))
    torch.testing.assert_close(attentions(compact)[0].query_key_value.weight, weight[12:])


@families
def test_the_output_of_attention_is_the_sum_over_its_heads(family):
    """What a head writes is its features times its own rows, in every family: gates and refits rest on it."""
    model = tiny_model(family)
    projection, seen = output_projections(model)[1], {}
    handle = projection.register_forward_hook(lambda module, x, y: seen.update(x=x[0], y=y))
    model(token_ids())
    handle.remove()
    by_head = torch.einsum("bthd,hde->bte", seen["x"].unflatten(-1, (HEADS, -1)), head_parameters(model, 1)["output"])
    bias = 0 if projection.bias is None else projection.bias
    torch.testing.assert_close(by_head + bias, seen["y"], **CLOSE)


@families
@pytest.mark.parametrize("name", ["uneven groups", "middle layer emptied", "only the first layer pruned"])
@pytest.mark.parametrize("allow_new_bias", [True, False])
def test_adaptation_helps_and_masked_execution_follows_it(family, name, allow_new_bias):
    model = tiny_model(family)
    if name in MASKS:
        keep = MASKS[name]
    else:
        keep = torch.ones(LAYERS, HEADS, dtype=torch.bool)
        keep[0, 1:3] = False
    windows = torch.randint(1, 97, (12, 20), generator=torch.Generator().manual_seed(7))
    plain, adapted = remove_heads(model, keep), remove_heads(model, keep)
    adapt(DenseStream(model, windows, batch_size=5), adapted, steps="refit", ridge=0.01, allow_new_bias=allow_new_bias)
    dense = model(windows).logits
    errors = [float((other(windows).logits - dense).square().mean()) for other in (adapted, plain)]
    assert errors[0] < 0.9 * errors[1]
    had_bias = getattr(output_projections(model)[0], "bias", None) is not None
    for attention, projection in zip(attentions(adapted), output_projections(adapted), strict=True):
        bias = attention.bias if projection is None else projection.bias
        assert (bias is not None) == (had_bias or allow_new_bias)
    full = masked_copy(model, adapted, keep)
    with mask_heads(full, keep):
        torch.testing.assert_close(full(windows).logits, adapted(windows).logits, rtol=1e-3, atol=1e-3)


def test_memory_that_a_decoding_step_reads_by_hand():
    def linear(inputs, outputs, bias=0):
        return inputs * outputs + bias * outputs

    llama = tiny_model("llama", layers=1)
    block = 2 * linear(48, 48) + 2 * linear(48, 16) + 3 * linear(48, 40) + 2 * 48
    head = linear(48, 97)
    assert decode_bytes(llama) == 4 * (block + 48 + head)
    assert parameter_bytes(llama) - decode_bytes(llama) == 4 * 97 * 48
    tied = tiny_model("llama", layers=1, tie_word_embeddings=True)
    assert decode_bytes(tied) == parameter_bytes(tied) == decode_bytes(llama)
    opt = tiny_model("opt", layers=1)
    block = 4 * linear(48, 48, 1) + linear(48, 40, 1) + linear(40, 48, 1) + 4 * 48
    assert decode_bytes(opt) == 4 * (block + 2 * 48 + head)
    assert parameter_bytes(opt) - decode_bytes(opt) == 4 * (64 + 2) * 48


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_a_copy_in_half_precision_is_what_transformers_loads_in_it(family, tmp_path):
    """Rotary frequencies stay in float32: rounded ones would turn late positions by whole radians."""
    model = tiny_model(family, vocab_size=257)
    save_tiny_model(tmp_path, model=model)
    loaded = load_model(preview_model(str(tmp_path)), dtype=torch.bfloat16).model
    converted = converted_copy(model, torch.bfloat16)
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted(token_ids()).logits, loaded(token_ids()).logits)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(converted(token_ids()).logits, rounded(token_ids()).logits) == (family == "opt")
    compact = converted_copy(remove_heads(model, MASKS["uneven groups"]), torch.bfloat16)
    assert compact(token_ids()).logits.isfinite().all()


def test_a_grouped_model_goes_through_the_whole_comparison(tmp_path):
    model = tiny_model("llama", vocab_size=257, max_position_embeddings=128, layers=2)
    save_tiny_model(tmp_path / "model", model=model)
    spec = ComparisonSpec(
        model_name=str(tmp_path / "model"),
        pruning_levels=(0, 50),
        pruning_methods=("entropy", "magnitude"),
        temperatures=(0.0,),
        num_tokens=4,
        iterations=1,
        max_prompts=2,
        eval_tokens=256,
        calibration_tokens=256,
        calibration_window=64,
        variants=("baseline", "agency", "agency-adaptation"),
        timing_limit_s=0.0,
        **write_short_texts(tmp_path),
    )
    with RunStore(run_comparison(spec, output_dir=tmp_path, raise_failures=True)) as store:
        cells, rows = store.table("cells"), store.table("measurements")
    assert (cells["status"] == "done").all()
    assert (cells.loc[cells["level"] == 50, "heads_pruned"] == 6).all()
    sizes = rows[rows["metric"] == "parameter_bytes"].set_index(["variant", "method", "level"])["value"]
    for method in spec.pruning_methods:  # agency pays for two new biases of 48 float32 numbers per refitted layer
        assert sizes["agency-adaptation", method, 50] - sizes["baseline", method, 50] in (8 * 48, 16 * 48)
    perplexity = rows[rows["metric"] == "window_nats"].groupby(["variant", "level"])["value"].sum()
    assert perplexity["agency", 0] == perplexity["baseline", 0]


@families
def test_every_family_can_be_previewed(family, tmp_path):
    save_tiny_model(tmp_path, model=tiny_model(family, vocab_size=257))
    preview = preview_model(str(tmp_path))
    assert preview.context == 64
    assert preview.grid.total == LAYERS * HEADS
    assert torch.equal(
        load_model(preview).model(token_ids()).logits, tiny_model(family, vocab_size=257)(token_ids()).logits
    )


def test_refitting_the_mlps_of_experts_is_refused_before_any_weight_is_read(tmp_path):
    save_tiny_model(tmp_path, model=tiny_model("qwen3_moe", vocab_size=257))
    settings = {"model_name": str(tmp_path), "calibration_tokens": 64, "calibration_window": 32}
    with pytest.raises(InputError, match=r"mixtures of experts\. Give --adaptation=refit"):
        prepare_pruning(ComparisonSpec(variants=("agency",), **settings))
    texts = write_short_texts(tmp_path)
    for allowed in ({"variants": ("agency",), "adaptation": "refit"}, {"variants": ("baseline",)}):
        prepare_pruning(ComparisonSpec(**allowed, **settings, **texts))
    assert not has_experts(tiny_model("qwen3_moe", num_experts=0).config)


def test_what_is_not_supported_says_what_is():
    config = tiny_model("llama").config
    with pytest.raises(UnsupportedModelError, match=rf"{', '.join(sorted(LAYOUTS))}.*adding-a-family"):
        check_supported(type("Config", (), {"model_type": "martian"}))
    with pytest.raises(UnsupportedModelError, match=r"'falcon' is not supported yet: .*cache"):
        check_supported(type("Config", (), {"model_type": "falcon"}))
    assert not set(NOT_YET) & set(LAYOUTS)
    ahead = tiny_model("gemma3").config
    ahead.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        check_supported(ahead)
    config.num_key_value_heads = 4
    with pytest.raises(UnsupportedModelError, match="6 query heads and 4 key-value heads"):
        check_supported(config)
    config = tiny_model("opt").config
    config.quantization_config = {"bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        check_supported(config)
    config = tiny_model("mistral").config
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        check_supported(config)


def test_weights_are_given_by_input_and_output_in_every_family():
    for family in FAMILIES:
        projection = output_projections(tiny_model(family))[0]
        x = torch.randn(2, input_major_weight(projection).shape[0])
        bias = 0 if projection.bias is None else projection.bias
        torch.testing.assert_close(x @ input_major_weight(projection) + bias, projection(x))


def test_prefill_flops_of_a_pruned_gpt2_are_those_counted_by_hand():
    model = tiny_model("gpt2", layers=2, width=48)
    keep = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    compact = remove_heads(model, keep)
    # Per layer: q, k, v and output of the heads left (8 wide each), and the MLP there and back (48 to 192).
    weights = sum(4 * 48 * 8 * heads + 2 * 48 * 192 for heads in (6, 2))
    for tokens in (1, 10):
        by_hand = 2 * tokens * weights + (6 + 2) * 2 * tokens**2 * 8 + 2 * 97 * 48
        assert prefill_flops(compact, tokens) == by_hand


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bytes_of_the_cache_are_those_that_a_text_leaves_in_it(family):
    """Layer 0 keeps two heads, of one group where there are groups, layer 1 none, the last all."""
    dense = tiny_model(family)
    keep = head_grid(dense.config).all_heads()
    keep[0, 2:], keep[1] = False, False
    pruned = remove_heads(dense, keep)
    for model in (dense, pruned, converted_copy(pruned, torch.bfloat16)):
        cache = model(input_ids=torch.arange(1, 8).view(1, 7), use_cache=True).past_key_values
        assert cache_bytes_after(model, 7) == cache_bytes(cache)
        assert cache_bytes_after(model) == cache_bytes(cache) // 7 * 1000
