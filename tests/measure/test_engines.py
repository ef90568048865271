"""Every engine writes the tokens that drawing by hand gives, whatever heads a model has left."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from builders import random_masks, tiny_gpt2, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig

from pruning_comparison.engines import ENGINES, engine_named, engines_of
from pruning_comparison.errors import InputError
from pruning_comparison.measure.engines import (
    PromptBatch,
    compiled_runner,
    native_runner,
    static_cache,
    transformers_runner,
)
from pruning_comparison.models.decoding import decode_step
from pruning_comparison.pruning import mask_heads, remove_heads

PROMPTS = [[5, 17, 3, 60], [42, 8], [11, 30, 9]]
NEW = 6
CAPACITY = 4 + NEW


def a_batch(prompts=PROMPTS, *, temperature=1.0):
    uniforms = torch.rand(len(prompts), NEW, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return PromptBatch(prompts, NEW, temperature, uniforms)


def drawn_by_hand(model, batch):
    """Each prompt alone, read anew for every token: the first token whose cumulative share exceeds the draw."""
    written = []
    for prompt, draws in zip(batch.prompts, batch.uniforms.tolist(), strict=True):
        ids = list(prompt)
        for draw in draws:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            if batch.temperature == 0:
                ids.append(int(logits.argmax()))
                continue
            total, token = 0.0, -1
            shares = (logits.double() / batch.temperature).softmax(-1).tolist()
            while total <= draw:
                token += 1
                total += shares[token]
            ids.append(token)
        written.append(ids[len(prompt) :])
    return written


def pruned(family, mask):
    model = tiny_gpt2(heads=6, width=48) if family == "gpt2" else tiny_model(family)
    return remove_heads(model, random_masks(3, 6)[mask])


def in_time(run):
    return 0 < run.first_token_latency_s <= run.end_to_end_s


@pytest.mark.parametrize("mask", ["uneven", "first layer emptied", "middle layer emptied"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral with a window", "gpt_neox", "qwen3", "opt"])
def test_native_and_transformers_write_the_same_tokens(family, mask):
    model, batch = pruned(family, mask), a_batch()
    expected = drawn_by_hand(model, batch)
    for build in (native_runner, transformers_runner):
        runner = build(model, capacity=CAPACITY, step=decode_step(model))
        assert runner.make_ready(batch).tokens.tolist() == expected
        again = runner.generate(batch)
        assert again.tokens.tolist() == expected
        assert in_time(again)


@pytest.mark.parametrize(
    ("family", "prompts"), [("llama", PROMPTS), ("llama", PROMPTS[:1]), ("mistral with a window", PROMPTS)]
)
def test_a_compiled_model_writes_the_same_tokens(family, prompts):
    """Layers with different numbers of key-value heads, and a first one without any, which caches ask for the length."""
    model, batch = pruned(family, "first layer emptied"), a_batch(prompts)
    runner = compiled_runner(model, capacity=CAPACITY, step=None, backend="eager")
    expected = drawn_by_hand(model, batch)
    assert runner.make_ready(batch).tokens.tolist() == expected
    again = runner.generate(batch)
    assert again.tokens.tolist() == expected
    assert in_time(again)


def test_nothing_is_compiled_while_it_is_timed():
    model, counter = tiny_gpt2(layers=1), CompileCounter()
    runner = compiled_runner(model, capacity=CAPACITY, step=None, backend=counter)
    runner.make_ready(a_batch())
    compiled = counter.frame_count
    assert compiled == 1
    runner.generate(a_batch())
    assert counter.frame_count == compiled
    torch._dynamo.reset()  # now it would have to compile again
    with pytest.raises(RuntimeError, match="recompile"):
        runner.generate(a_batch())
    assert counter.frame_count == compiled


def test_models_that_share_the_code_of_their_forward_are_compiled_beside_one_another():
    """What is compiled of one piece of code is kept so many times, eight by default, and not at all after that."""
    batch = a_batch(PROMPTS[:1])
    dense = tiny_gpt2(layers=1)
    models = [dense, remove_heads(dense, torch.tensor([[True, False, True, True]]))]
    runners = [compiled_runner(model, capacity=CAPACITY, step=None, backend="eager") for model in models]
    with torch._dynamo.config.patch(recompile_limit=1):
        for model, runner in zip(models, runners, strict=True):
            assert runner.make_ready(batch).tokens.tolist() == drawn_by_hand(model, batch)
        for model, runner in zip(models, runners, strict=True):
            assert runner.generate(batch).tokens.tolist() == drawn_by_hand(model, batch)


def test_masked_heads_are_run_by_every_engine():
    model, batch = tiny_gpt2(layers=1), a_batch()
    mask_heads(model, torch.tensor([[True, False, True, True]]))
    expected = drawn_by_hand(model, batch)
    compiled = partial(compiled_runner, backend="eager")
    for build in (native_runner, transformers_runner, compiled):
        assert build(model, capacity=CAPACITY, step=None).make_ready(batch).tokens.tolist() == expected


@pytest.mark.slow  # half a minute of processor time, most of it a C++ compiler's
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_a_model_that_is_really_compiled_writes_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, batch = tiny_gpt2(layers=1), a_batch(PROMPTS[:1])
    runner = engine_named("compiled").builder()(model, capacity=CAPACITY, step=None)
    expected = drawn_by_hand(model, batch)
    assert runner.make_ready(batch).tokens.tolist() == expected
    assert runner.generate(batch).tokens.tolist() == expected


def test_greedy_tokens_and_texts_that_the_models_own_settings_would_end():
    """The model's settings forbid the token that comes first, and would end the text with the second."""
    model, batch = tiny_gpt2(), a_batch(PROMPTS[:1], temperature=0.0)
    expected = drawn_by_hand(model, batch)
    stored = GenerationConfig(eos_token_id=expected[0][1], suppress_tokens=[expected[0][0]])
    model.generation_config = stored
    assert transformers_runner(model, capacity=CAPACITY, step=None).generate(batch).tokens.tolist() == expected
    assert model.generation_config is stored


def test_one_new_token_compiles_nothing():
    batch = PromptBatch(PROMPTS, 1, 1.0, torch.zeros(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="one new token takes no decoding step"):
        compiled_runner(tiny_gpt2(layers=1), capacity=5, step=None).make_ready(batch)


def test_an_emptied_layer_counts_in_a_static_cache():
    model = pruned("llama", "first layer emptied")
    cache = static_cache(model, 7)
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [3, 3, 3]
    assert cache.layers[0].get_mask_sizes(1) == (7, 0)
    cache.reset()
    assert int(cache.layers[0].get_seq_length()) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_consistent(name):
    engine = engine_named(name)
    assert engine.name == name
    assert callable(engine.builder())
    assert "\n" not in engine.summary
    assert not engine.summary.endswith(".")


def test_native_is_always_among_the_engines_and_unknown_names_are_refused():
    assert engines_of(["compiled", "transformers", "compiled"]) == ("native", "transformers", "compiled")
    with pytest.raises(
        InputError, match=r"--engine: 'compile' is unknown\. Did you mean compiled\? Choose from native, "
    ):
        engines_of(["compile"])
