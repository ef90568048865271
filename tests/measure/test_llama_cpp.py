"""The engine llama.cpp: what it is asked for, what it is taken to have done, and, with the package, real models in it."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from builders import ascii_tokenizer, pruned_to_rectangles, tiny_gpt2, tiny_model

from pruning_comparison.checkpoint.forms import write_as_gguf
from pruning_comparison.engines import LLAMA_CPP, engine_named
from pruning_comparison.errors import InputError
from pruning_comparison.measure import llama_cpp
from pruning_comparison.measure.engines import PromptBatch
from pruning_comparison.measure.llama_cpp import llama_cpp_runner

PROMPTS = [[5, 17, 3, 60], [42, 8], [11, 30, 9]]
NEW = 6
DENSE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 128}


def a_batch(prompts=PROMPTS, tokens=NEW):
    return PromptBatch(prompts, tokens, 1.0, torch.full((len(prompts), tokens), 0.5, dtype=torch.float64))


class FakeServer:
    """A server that continues every prompt by its length, its length + 1 and so on, out of order, in 0.5 s of a clock."""

    made: ClassVar[list[FakeServer]] = []
    clock: ClassVar = [0.0]
    short_by, refuses, likeliest = 0, "", 3

    def __init__(self, settings):
        self.settings, self.requests = settings, []
        FakeServer.made.append(self)

    def handle_completions(self, request):
        self.requests.append(request)
        FakeServer.clock[0] += 0.5
        if self.refuses:
            return {"error": {"code": 400, "message": self.refuses}}
        choices = []
        for index, prompt in enumerate(request["prompt"]):
            ids = range(len(prompt), len(prompt) + request["n_predict"])
            content = [{"id": one, "top_logprobs": [{"id": self.likeliest}]} for one in ids]
            logprobs = {"content": content} if "n_probs" in request else None
            choices.insert(0, {"index": index, "finish_reason": "length", "logprobs": logprobs})
        return {
            "choices": choices,
            "timings": {"predicted_n": request["n_predict"] - self.short_by, "predicted_ms": 300.0},
        }


@pytest.fixture
def binding(monkeypatch):
    """The package, in which nothing is computed."""

    def common_params():
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    types = SimpleNamespace(GGML_TYPE_F32="f32", GGML_TYPE_F16="f16")
    flash = SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED="off")
    package = SimpleNamespace(
        CommonParams=common_params, Server=FakeServer, ggml_type=types, llama_flash_attn_type=flash
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    monkeypatch.setattr(FakeServer, "made", [])
    monkeypatch.setattr(FakeServer, "clock", [10.0])
    monkeypatch.setattr(llama_cpp, "time", SimpleNamespace(perf_counter=lambda: FakeServer.clock[0]))
    return FakeServer


def runner_of(model, tmp_path, *, capacity=10, written=None):
    path = tmp_path / "model.gguf"

    def export():
        if written is not None:
            written.append(path)
        return path

    return llama_cpp_runner(model, capacity=capacity, step=None, export=export)


def test_llama_cpp_is_given_what_the_other_engines_have(binding, tmp_path):
    runner = runner_of(tiny_model("llama"), tmp_path, capacity=256)
    runner.make_ready(a_batch())
    (server,) = binding.made
    settings = server.settings
    assert settings.model.path == str(tmp_path / "model.gguf")
    assert settings.cpuparams.n_threads == settings.cpuparams_batch.n_threads == torch.get_num_threads()
    assert (settings.n_parallel, settings.n_ctx) == (3, 3 * 512)  # room for more than 256, in steps of 256
    assert settings.cache_type_k == settings.cache_type_v == "f32"
    assert settings.flash_attn_type == "off"
    assert settings.n_gpu_layers == 0
    assert settings.cache_prompt is False
    runner.generate(a_batch())
    ready, timed = server.requests
    assert ready == {**timed, "n_probs": 1}
    assert timed == {
        "prompt": PROMPTS, "n_predict": NEW, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip


def test_half_precision_has_half_the_cache_and_says_so(binding, tmp_path):
    run = runner_of(tiny_model("llama").to(torch.bfloat16), tmp_path).make_ready(a_batch())
    assert binding.made[0].settings.cache_type_k == "f16"
    assert not hasattr(binding.made[0].settings, "flash_attn_type")
    assert run.weights == "f16"


def test_tokens_are_those_of_the_prompts_in_their_order_and_times_are_taken_apart(binding, tmp_path):
    """An answer takes 0.5 s, of which llama.cpp decodes for 0.3 s after the first token."""
    runner = runner_of(tiny_model("llama"), tmp_path)
    ready = runner.make_ready(a_batch(tokens=2))
    assert ready.tokens.tolist() == [[4, 5], [2, 3], [3, 4]]
    assert ready.weights == "f32"
    run = runner.generate(a_batch(tokens=2))
    assert run.tokens.tolist() == [[4, 5], [2, 3], [3, 4]]
    assert run.end_to_end_s == 0.5
    assert run.first_token_latency_s == pytest.approx(0.2)
    runner.make_ready(a_batch(tokens=1))
    assert runner.generate(a_batch(tokens=1)).first_token_latency_s == 0.5


def test_the_likeliest_tokens_are_held_against_the_models_after_the_same_text(binding, tmp_path, monkeypatch):
    """llama.cpp finds token 3 the likeliest everywhere. The model is asked after what llama.cpp wrote: [4, 5] and [2, 3]."""
    model, prompts = tiny_model("llama"), PROMPTS[:2]
    own = [
        int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        for ids in (prompts[0], [*prompts[0], 4], prompts[1], [*prompts[1], 2])
    ]
    for token in {*own, 3}:
        monkeypatch.setattr(binding, "likeliest", token)
        ready = runner_of(model, tmp_path).make_ready(a_batch(prompts, tokens=2))
        assert ready.differing_share == sum(one != token for one in own) / 4
    assert len(set(own)) > 1


def test_the_file_is_written_once_for_batches_that_do_not_grow(binding, tmp_path):
    written = []
    runner = runner_of(tiny_model("llama"), tmp_path, written=written)
    for prompts in (PROMPTS, PROMPTS[:1]):
        runner.make_ready(a_batch(prompts))
    assert len(written) == len(binding.made) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"short_by": 1},
            "wrote 5 new tokens for the first of 3 prompts and ended by length, where 3 were to be continued by 6",
        ),
        ({"refuses": "too long"}, "llama.cpp refuses the prompts: too long"),
    ],
)
def test_other_work_than_was_asked_for_is_an_error(binding, tmp_path, monkeypatch, change, message):
    for name, value in change.items():
        monkeypatch.setattr(binding, name, value)
    with pytest.raises(RuntimeError, match=message):
        runner_of(tiny_model("llama"), tmp_path).make_ready(a_batch())


def test_a_model_elsewhere_than_on_the_cpu_is_refused():
    with pytest.raises(InputError, match=r"llama\.cpp is run on the CPU, and the other engines on meta"):
        llama_cpp_runner(tiny_gpt2().to("meta"), capacity=8, step=None, export=lambda: None)
    with pytest.raises(ValueError, match="export has to write it"):
        llama_cpp_runner(tiny_gpt2(), capacity=8, step=None)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("pruning_comparison.engines.find_spec", lambda name: None if name == "xllamacpp" else object())
    with pytest.raises(
        InputError,
        match=r"--engine: llama\.cpp needs the package xllamacpp, which is not installed: "
        r"pip install 'pruning-comparison\[llama-cpp\]'\.",
    ):
        engine_named(LLAMA_CPP).check_installed()
    engine_named("transformers").check_installed()


# With the package


@pytest.mark.extras
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_real_models_are_timed_and_write_the_likeliest_tokens(which, dtype, tmp_path):
    """Each prompt is continued as if alone, without the token that ends texts. In float16 rounding may turn a token."""
    model = pruned_to_rectangles("llama") if which == "pruned" else tiny_model("llama", layers=5, **DENSE)
    model, batch = model.to(dtype), a_batch()

    def export():
        write_as_gguf(model, ascii_tokenizer(), tmp_path / "model.gguf")
        return tmp_path / "model.gguf"

    runner = llama_cpp_runner(model, capacity=4 + NEW, step=None, export=export)
    ready = runner.make_ready(batch)
    by_hand = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[0] = -torch.inf
            ids.append(int(logits.argmax()))
        by_hand.append(ids[len(prompt) :])
    if dtype == torch.float32:
        assert ready.tokens.tolist() == by_hand
        assert ready.differing_share == 0
    assert ready.differing_share < 0.2
    assert ready.weights == ("f32" if dtype == torch.float32 else "f16")
    started = time.perf_counter()
    run = runner.generate(batch)
    assert 0 < run.first_token_latency_s < run.end_to_end_s <= time.perf_counter() - started
    assert run.tokens.shape == (3, NEW)
