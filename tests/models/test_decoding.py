"""The decoding step of our own: what the model's forward computes, from the same weights and the same cache."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from builders import FAMILIES, MASKS, left_padded, stepwise_logits, tiny_gpt2, tiny_model, token_ids
from transformers import DynamicCache

from pruning_comparison.measure import generation
from pruning_comparison.measure.generation import common_uniforms, generate, time_generation
from pruning_comparison.measure.memory import cache_bytes
from pruning_comparison.models import decoding
from pruning_comparison.models.decoding import (
    STEP_LAYOUTS,
    DecodeStep,
    ReservedCacheLayer,
    StepLayout,
    decode_step,
    decode_steps,
    reserved_cache,
)
from pruning_comparison.models.heads import LAYOUTS, blocks
from pruning_comparison.pruning.surgery import converted_copy, mask_heads, remove_heads, sharing_copy

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BY_THEIR_OWN_FORWARD = {"mistral with a window", "qwen3 with windows", "opt with norms after"}
"""Caches that forget, and tokens that are embedded narrowly."""
WITHOUT_A_STEP = {"gemma2", "gemma3_text", "gpt_oss", "granite", "ministral", "olmo2", "phi3", "qwen3_moe", "smollm3"}
"""Model types that nobody has described a step for: they decode by their own forward."""
MODELS = {
    **{
        family: {}
        for family, (model_type, _) in FAMILIES.items()
        if family not in BY_THEIR_OWN_FORWARD and model_type not in WITHOUT_A_STEP
    },
    "opt": {"do_layer_norm_before": True},
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
}


def step_of(model):
    step = decode_step(model)
    assert step is not None
    return step


@torch.inference_mode()
def logits_step_by_step(model, tokens, mask=None, first=4):
    """As ``stepwise_logits`` gives them, but all after the first few tokens by ``decode_step``."""
    step, length = step_of(model), tokens.shape[1]
    cache = reserved_cache(model, length)
    positions = torch.arange(length).expand_as(tokens) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    start = model(
        input_ids=tokens[:, :first],
        attention_mask=None if mask is None else mask[:, :first],
        position_ids=positions[:, :first],
        past_key_values=cache,
        use_cache=True,
    )
    step.reserve(length)
    added = None if mask is None else torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
    rest = [
        step(tokens[:, at], positions[:, at], cache, None if added is None else added[..., : at + 1])
        for at in range(first, length)
    ]
    return torch.cat([start.logits, torch.stack(rest, 1)], 1), cache


def test_every_family_that_can_be_pruned_has_a_step_or_is_known_to_have_none():
    assert set(STEP_LAYOUTS) == set(LAYOUTS) - WITHOUT_A_STEP
    for family in WITHOUT_A_STEP:
        assert decode_step(tiny_model(family)) is None


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", MASKS)
def test_it_computes_what_the_forward_computes(family, name):
    model = remove_heads(tiny_model(family, **MODELS[family]), MASKS[name])
    expected, stock = stepwise_logits(model, token_ids())
    actual, cache = logits_step_by_step(model, token_ids())
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert cache_bytes(cache) == cache_bytes(stock)
    assert cache.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["all kept", "uneven groups"])
def test_it_computes_what_the_forward_computes_with_left_padding(family, name):
    model = remove_heads(tiny_model(family), MASKS[name])
    tokens, visible = left_padded()
    expected, _ = stepwise_logits(model, tokens, visible)
    actual, _ = logits_step_by_step(model, tokens, visible)
    torch.testing.assert_close(actual[0, 3:], expected[0, 3:], **CLOSE)
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)


def test_norms_after_the_sum():
    model = tiny_model("opt", do_layer_norm_before=False)
    torch.testing.assert_close(
        logits_step_by_step(model, token_ids())[0], stepwise_logits(model, token_ids())[0], **CLOSE
    )


def test_weights_that_adaptation_has_given_a_bias():
    model = tiny_model("llama")
    pruned = remove_heads(model, MASKS["uneven groups"])
    projection = blocks(pruned)[0].self_attn.o_proj
    projection.bias = torch.nn.Parameter(torch.ones(48), requires_grad=False)
    torch.testing.assert_close(
        logits_step_by_step(pruned, token_ids())[0], stepwise_logits(pruned, token_ids())[0], **CLOSE
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_are_those_of_the_forward(model, temperature):
    prompts = [[5, 9, 11, 40, 2, 8], [7, 3], [1, 2, 3, 4]]
    draws = torch.stack([common_uniforms(0, 0, row, 12) for row in range(3)])
    temperatures = [temperature] * 3
    expected = generate(model, prompts, 12, temperatures=temperatures, uniforms=draws)
    actual = generate(model, prompts, 12, temperatures=temperatures, uniforms=draws, step=step_of(model))
    assert torch.equal(actual.tokens, expected.tokens)
    assert actual.cache_bytes == expected.cache_bytes


@pytest.mark.parametrize("family", sorted(BY_THEIR_OWN_FORWARD))
def test_what_it_cannot_compute_it_leaves_to_the_model(family):
    assert decode_step(tiny_model(family)) is None


def test_it_is_for_float32_without_hooks_alone(model):
    assert decode_step(converted_copy(model, torch.bfloat16)) is None
    with mask_heads(model, MASKS_OF_GPT2):
        assert decode_step(model) is None
    assert decode_step(sharing_copy(model).train()) is None
    step_of(model)


MASKS_OF_GPT2 = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)


def test_a_rope_that_changes_with_the_length_is_left_to_the_model():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    assert decode_step(tiny_model("llama", rope_parameters=rope)) is None


def test_a_layout_that_is_wrong_is_found_out(model, monkeypatch):
    """Norms the wrong way round: everything has its shape, and the logits are other ones."""
    wrong = StepLayout(**{**vars(STEP_LAYOUTS["gpt2"]), "norms": ("ln_2", "ln_1")})
    monkeypatch.setattr(decoding, "STEP_LAYOUTS", {"gpt2": wrong})
    assert decode_step(model) is None


def test_logits_that_are_no_numbers_agree_with_nothing(model):
    model.transformer.ln_f.weight.data[0] = torch.nan
    assert decode_step(model) is None


def test_models_that_are_compared_decode_alike(model):
    other = tiny_gpt2(seed=1)
    assert None not in decode_steps({"a": model, "b": other}).values()
    with mask_heads(other, MASKS_OF_GPT2):
        assert decode_steps({"a": model, "b": other}) == {"a": None, "b": None}


def test_models_that_share_weights_share_their_other_order(model):
    reordered = {}
    decode_step(model, reordered)
    # of a GPT-2 with tied embeddings: the output head, and what the MLPs write
    assert set(reordered) == {id(model.lm_head.weight), *(id(block.mlp.c_proj.weight) for block in blocks(model))}
    before = dict(reordered)
    decode_step(remove_heads(model, MASKS_OF_GPT2), reordered)
    assert all(reordered[key] is kept for key, kept in before.items())


def test_large_models_get_no_second_copy(model, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_REORDERED_BYTES", 1000)
    reordered = {}
    assert decode_step(model, reordered) is not None
    assert not reordered


def test_timing_takes_the_step_for_all_or_for_none(model, monkeypatch):
    taken = []

    class Watched(generation.GenerationUnderWay):
        def __init__(self, *arguments, step=None, **more):
            taken.append(step)
            super().__init__(*arguments, step=step, **more)

    monkeypatch.setattr(generation, "GenerationUnderWay", Watched)
    settings = {"temperature": 0.7, "uniforms": torch.rand(1, 5), "measure_peak": False}
    twin = tiny_gpt2(seed=1)
    time_generation({"a": model, "b": twin}, [[1, 2]], 5, **settings)
    assert len(set(taken)) == 2
    assert None not in taken
    taken.clear()
    with mask_heads(twin, MASKS_OF_GPT2):
        time_generation({"a": model, "b": twin}, [[1, 2]], 5, **settings)
    assert set(taken) == {None}


def test_timed_variants_take_turns_and_nothing_is_collected_meanwhile(model, monkeypatch):
    """Five first tokens of each, then three tokens at a time, in turns; B begins in repeat 1."""
    turns, collecting = [], []

    class Watched(generation.GenerationUnderWay):
        def advance(self, tokens):
            before = self.left
            super().advance(tokens)
            collecting.append(gc.isenabled())
            turns.append((names[id(self.model)], before - self.left))

    monkeypatch.setattr(generation, "GenerationUnderWay", Watched)
    twin = tiny_gpt2(seed=1)
    names = {id(model): "a", id(twin): "b"}
    settings = {"temperature": 0.7, "uniforms": torch.rand(1, 9), "measure_peak": False}
    assert gc.isenabled()
    time_generation({"a": model, "b": twin}, [[1, 2]], 9, tokens_per_turn=3, **settings)
    assert turns == [
        *[("a", 1), ("a", 3), ("b", 1), ("b", 3)],  # to warm up
        *[("a", 1), ("b", 1)] * 5,
        *[("a", 3), ("b", 3), ("a", 3), ("b", 3), ("a", 2), ("b", 2)],
        *[("b", 1), ("a", 1)] * 5,
        *[("b", 3), ("a", 3), ("b", 3), ("a", 3), ("b", 2), ("a", 2)],
    ]
    assert collecting == [True] * 4 + [False] * 32
    assert gc.isenabled()


def test_a_generation_in_turns_is_the_same_and_counts_only_its_own_time(model):
    uniforms = common_uniforms(0, 0, 0, 12)[None]
    whole = generate(model, [[1, 2, 3]], 12, temperatures=[0.7], uniforms=uniforms)
    pieces = generation.GenerationUnderWay(model, [[1, 2, 3]], 12, temperatures=[0.7], uniforms=uniforms)
    pieces.advance(5)
    assert pieces.left == 11  # the first token comes alone
    pieces.advance(4)
    time.sleep(0.3)
    found = pieces.finish()
    assert pieces.left == 0
    assert torch.equal(found.tokens, whole.tokens)
    assert found.cache_bytes == whole.cache_bytes
    assert found.first_token_latency_s < found.end_to_end_s < 0.3


def test_the_reserved_cache_holds_what_transformers_holds(model):
    """Layers with different numbers of heads, filled in steps of 3, 1 and 2 tokens."""
    generator = torch.Generator().manual_seed(0)
    ours, stock = reserved_cache(model, 6), DynamicCache(config=model.config)
    for tokens in (3, 1, 2):
        for layer, heads in enumerate((4, 1, 2)):
            keys, values = torch.rand(2, 2, heads, tokens, 8, generator=generator)
            for mine, theirs in zip(ours.update(keys, values, layer), stock.update(keys, values, layer), strict=True):
                assert torch.equal(mine, theirs)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert cache_bytes(ours) == cache_bytes(stock)
    with pytest.raises(ValueError, match="7 tokens do not fit"):
        ours.update(*torch.rand(2, 2, 4, 1, 8), 0)


def test_one_token_is_appended_as_any_number_is():
    one, other = ReservedCacheLayer(4), ReservedCacheLayer(4)
    pairs = torch.rand(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))  # tokens, batch, two, heads, features
    for number, pair in enumerate(pairs):
        keys, values = one.update(pair[:, 0, :, None], pair[:, 1, :, None])
        if number == 0:
            other.update(pair[:, 0, :, None], pair[:, 1, :, None])
            continue
        for mine, theirs in zip(other.append(pair), (keys, values), strict=True):
            assert torch.equal(mine, theirs)
    assert other.get_seq_length() == 3


@pytest.mark.parametrize("own", [False, True])
def test_decoding_copies_no_cache_and_reserves_it_once(model, monkeypatch, own):
    rooms = set()

    def watched(method):
        def inner(layer, *arguments, **more):
            keys, values = method(layer, *arguments, **more)
            rooms.add(keys.untyped_storage().data_ptr())
            return keys, values

        return inner

    for name in ("update", "append"):
        monkeypatch.setattr(ReservedCacheLayer, name, watched(getattr(ReservedCacheLayer, name)))
    step = step_of(model) if own else None
    rooms.clear()
    generate(model, [[1, 2, 3]], 9, temperatures=[0.0], step=step)
    assert len(rooms) == 3


# Steps whose tensors stay in their place: what a GPU records. Here they are called as they are.


def static_step_of(model):
    step = decode_step(model, static=True)
    assert step is not None
    assert step.static
    return step


@torch.inference_mode()
def logits_of_a_static_step(model, tokens, mask=None, first=4):
    """As ``logits_step_by_step``, by a ``StaticStep``."""
    rows, length = tokens.shape
    static = static_step_of(model).reserved(model, rows, length)
    positions = torch.arange(length).expand_as(tokens) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    seen = None if mask is None else mask[:, :first]
    start = model(
        input_ids=tokens[:, :first],
        attention_mask=seen,
        position_ids=positions[:, :first],
        past_key_values=static.cache,
        use_cache=True,
    )
    static.begin(first, positions[:, first], seen)
    rest = [static(tokens[:, at]).clone() for at in range(first, length)]
    static.end()
    return torch.cat([start.logits, torch.stack(rest, 1)], 1), static.cache


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", MASKS)
def test_a_static_step_computes_what_the_forward_computes(family, name):
    """Uneven groups, emptied layers, and a cache that is longer than what is in it."""
    model = remove_heads(tiny_model(family, **MODELS[family]), MASKS[name])
    expected, stock = stepwise_logits(model, token_ids())
    actual, cache = logits_of_a_static_step(model, token_ids())
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert cache_bytes(cache) == cache_bytes(stock)
    assert cache.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["all kept", "uneven groups", "first layer emptied"])
def test_a_static_step_computes_what_the_forward_computes_with_left_padding(family, name):
    model = remove_heads(tiny_model(family), MASKS[name])
    tokens, visible = left_padded()
    expected, _ = stepwise_logits(model, tokens, visible)
    actual, _ = logits_of_a_static_step(model, tokens, visible)
    torch.testing.assert_close(actual[0, 3:], expected[0, 3:], **CLOSE)
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_of_a_static_step_are_those_of_the_forward(model, temperature):
    prompts = [[5, 9, 11, 40, 2, 8], [7, 3], [1, 2, 3, 4]]
    draws = torch.stack([common_uniforms(0, 0, row, 12) for row in range(3)])
    settings = {"temperatures": [temperature] * 3, "uniforms": draws, "check_finite": True}
    expected = generate(model, prompts, 12, **settings)
    step = static_step_of(model)
    for _ in range(2):  # the second takes over the first one's cache
        actual = generate(model, prompts, 12, step=step, **settings)
        assert torch.equal(actual.tokens, expected.tokens)
        assert torch.equal(actual.finite, expected.finite)
        assert actual.cache_bytes == expected.cache_bytes


def test_static_steps_are_taken_over_when_nobody_needs_them_and_emptied(model):
    class Owner:
        pass

    step, one, other = static_step_of(model), Owner(), Owner()
    first = step.reserved(one, 2, 100)
    assert first.capacity == 128
    assert step.reserved(other, 2, 100) is not first
    assert step.reserved(Owner(), 3, 100) is not first
    with torch.inference_mode():
        first.cache.layers[0].room.fill_(torch.nan)
    del one
    again = step.reserved(other, 2, 120)
    assert again is first
    assert not bool(again.cache.layers[0].room.any())
    again.end()
    assert step.reserved(Owner(), 2, 3) is first
    step.release()
    assert step.reserved(other, 2, 100) is not first


def test_what_an_earlier_text_left_in_the_cache_does_not_spread(model):
    """A text of numbers that are none, then one like any other: masks cannot hide what is not finite."""
    step = static_step_of(model)
    with torch.inference_mode():
        step.reserved(model, 1, 8).cache.layers[1].room.fill_(torch.inf)
    step._static_steps[0][0].end()
    expected = generate(model, [[1, 2, 3]], 6, temperatures=[0.0])
    assert torch.equal(generate(model, [[1, 2, 3]], 6, temperatures=[0.0], step=step).tokens, expected.tokens)


def test_a_static_step_keeps_its_rotations_and_nobody_keeps_it():
    """A longer text makes longer tables; what was recorded before goes on reading its own. No garbage is left to collect."""
    step = static_step_of(tiny_model("llama"))
    owner = token_ids()
    short = step.reserved(owner, 2, 8)
    before = short._step.rotations
    step.reserved(owner, 2, 300)
    assert short._step.rotations is before
    assert step.rotations is not before
    gone = weakref.ref(short)
    gc.disable()
    try:
        del step, short
        assert gone() is None
    finally:
        gc.enable()


def test_a_full_static_cache_says_so(model):
    static = static_step_of(model).reserved(model, 1, 1)
    static.begin(static.capacity, torch.tensor([3]), None)
    with pytest.raises(ValueError, match="129 tokens do not fit a cache that was reserved for 128"):
        static(torch.tensor([1]))


class Replayed:
    """Stands in for a CUDA graph: a replay calls the step again, and writes its logits where the recorded ones are."""

    def __init__(self, static, error=0.0):
        self.static, self.error = static, error

    def capture_begin(self, **settings):
        pass

    def capture_end(self):
        pass

    def replay(self):
        self.static._logits.copy_(self.static._next() + self.error)


def recorded(monkeypatch, static, **settings):
    class Stream:
        def wait_stream(self, other):
            pass

    for name, stands_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: Replayed(static, **settings),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    with torch.inference_mode():
        static._try_to_record(torch.device("cpu"))


def test_a_recorded_step_is_replayed_from_an_empty_cache(model, monkeypatch):
    step = static_step_of(model)
    expected = generate(model, [[1, 2, 3]], 6, temperatures=[0.0]).tokens
    static = step.reserved(model, 1, 8)
    recorded(monkeypatch, static)
    assert static.recorded
    static.end()
    assert torch.equal(generate(model, [[1, 2, 3]], 6, temperatures=[0.0], step=step).tokens, expected)


def test_a_replay_that_differs_is_not_used_and_one_warning_says_so(model, monkeypatch, caplog):
    decoding._warn_once.cache_clear()
    for _ in range(2):
        static = static_step_of(model).reserved(model, 1, 8)
        recorded(monkeypatch, static, error=1.0)
        assert not static.recorded
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "are not recorded as CUDA graphs on this GPU: a replay differs by 1 from a plain call" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision_is_as_close_as_its_tolerance_says(dtype, monkeypatch):
    """Only GPUs take it; the arithmetic is the same. Norms the wrong way round are not within rounding."""
    monkeypatch.setattr(decoding, "_can_be_taken_apart", lambda model, layout: True)
    rounded = remove_heads(converted_copy(tiny_model("llama"), dtype), MASKS["uneven groups"])
    assert decode_step(rounded, static=True) is not None
    wrong = StepLayout(**{**vars(STEP_LAYOUTS["llama"]), "norms": ("post_attention_layernorm", "input_layernorm")})
    monkeypatch.setattr(decoding, "STEP_LAYOUTS", {"llama": wrong})
    assert decode_step(rounded, static=True) is None


def amplifying(by):
    """A Llama in every layer of which two query heads that differ by a thousandth write ``by`` times as much, with opposite
    signs: what is left of that is no larger than before, and its rounding is.
    """
    model = tiny_model("llama")
    first, second = slice(0, 8), slice(8, 16)  # features of query heads 0 and 1, which read the same keys
    for block in blocks(model):
        query, output = block.self_attn.q_proj.weight.data, block.self_attn.o_proj.weight.data
        query[second] = query[first] * 1.001
        output[:, first] *= by
        output[:, second] = -output[:, first]
    return model


@pytest.fixture(
    params=[(torch.float32, 1e5), (torch.float16, 1e3), (torch.bfloat16, 1e2)], ids=lambda pair: str(pair[0])
)
def amplifies(request, monkeypatch):
    """A model whose step is off by more than rounding usually is. Half precision is as on GPUs."""
    dtype, by = request.param
    monkeypatch.setattr(decoding, "_can_be_taken_apart", lambda model, layout: True)
    model = converted_copy(amplifying(by), dtype)
    step = DecodeStep(model, STEP_LAYOUTS["llama"], {})
    found, expected = decoding._logits_by_steps(step, model), decoding._logits_at_once(model)
    assert decoding._difference(found, expected) > 2 * decoding.CLOSE[dtype]
    return model


def with_wrong_norms(monkeypatch):
    wrong = StepLayout(**{**vars(STEP_LAYOUTS["llama"]), "norms": ("post_attention_layernorm", "input_layernorm")})
    monkeypatch.setattr(decoding, "STEP_LAYOUTS", {"llama": wrong})


def with_two_heads_swapped_in_one_layer(monkeypatch):
    right = decoding._mixed

    def mixed(attention, layout):
        matrix, bias, parameter = right(attention, layout)
        if attention.layer_idx == 2:
            order = torch.arange(matrix.shape[1])
            order[16:32] = order[16:32].roll(8)  # queries of heads 2 and 3
            matrix = matrix[:, order]
        return matrix, bias, parameter

    monkeypatch.setattr(decoding, "_mixed", mixed)


def with_rotations_backwards(monkeypatch):
    right = DecodeStep.reserve

    def reserve(step, capacity):
        before = step.rotations
        right(step, capacity)
        if step.rotations is not before:
            step.rotations = step.rotations[0], -step.rotations[1]

    monkeypatch.setattr(DecodeStep, "reserve", reserve)


@pytest.mark.parametrize("static", [False, True])
def test_a_model_that_amplifies_rounding_has_a_step(amplifies, static):
    assert decode_step(amplifies, static=static) is not None


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("wrong", [with_wrong_norms, with_two_heads_swapped_in_one_layer, with_rotations_backwards])
def test_what_is_wrong_is_found_out_in_a_model_that_amplifies_rounding(amplifies, monkeypatch, wrong, static):
    wrong(monkeypatch)
    assert decode_step(amplifies, static=static) is None


def test_a_step_that_is_less_exact_than_the_forward_is_not_taken(amplifies, monkeypatch):
    """In a finer precision it is right. Its logits are off by four times as much as the forward's."""
    right, exact = DecodeStep.__call__, decoding._logits_at_once(converted_copy(amplifies, torch.float64))
    error = decoding._difference(decoding._logits_at_once(amplifies), exact)

    def call(step, *arguments):
        logits = right(step, *arguments)
        return logits + (4 * error * float(exact.abs().max()) if step.embedding.dtype == amplifies.dtype else 0)

    monkeypatch.setattr(DecodeStep, "__call__", call)
    assert decode_step(amplifies) is None


def test_a_copy_that_does_not_fit_leaves_the_model_its_forward(amplifies, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoding.copy, "deepcopy", full)
    assert decode_step(amplifies) is None


def test_a_model_in_float64_has_no_finer_precision(monkeypatch):
    monkeypatch.setattr(decoding, "_can_be_taken_apart", lambda model, layout: True)
    model = converted_copy(tiny_model("llama"), torch.float64)
    assert decode_step(model) is not None
    with_rotations_backwards(monkeypatch)
    assert decode_step(model) is None
