"""Exported files in llama.cpp itself: the tokens and log-probabilities of the pruned model, and its tokenizer's tokens.

llama.cpp comes with the package xllamacpp (extra llama-cpp), which `make test-extras` installs.
"""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch
from builders import GGUF_CASES, ascii_tokenizer, pruned_to_rectangles, sentencepiece_tokenizer

from pruning_comparison.checkpoint.forms import save_pruned
from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields
from pruning_comparison.models import gguf, preview_model

pytestmark = pytest.mark.extras

IDS = torch.randint(1, 118, (1, 20), generator=torch.Generator().manual_seed(1))
NEW = 12


def server_of(path):
    """llama.cpp with weights and cache as they are in the file and float32, one thread, no flash attention."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, 0
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(settings)


def greedy(server, ids, vocabulary):
    """Greedy tokens after a prompt of ids, and for each the log-probabilities of the whole vocabulary, by token."""
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": NEW, "temperature": 0, "n_probs": vocabulary, "ignore_eos": True}
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    return [(step["id"], {one["id"]: one["logprob"] for one in step["top_logprobs"]}) for step in steps]


def compare(model, found, ids, *, within):
    """The tokens are the model's own greedy ones, and log-probabilities are off by at most ``within``."""
    sequence, worst = ids.clone(), 0.0
    assert len(found) == NEW
    for token, nats in found:
        expected = torch.log_softmax(model(sequence).logits[0, -1].double(), -1)
        expected[0] = expected[0] if 0 in nats else -torch.inf
        assert token == int(expected.argmax())
        worst = max(worst, max(abs(float(expected[one]) - value) for one, value in nats.items() if value > -50))
        sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
    assert worst < within


@pytest.mark.parametrize("case", GGUF_CASES)
def test_llama_cpp_writes_what_the_pruned_model_writes(case, tmp_path):
    family, settings = GGUF_CASES[case]
    model = pruned_to_rectangles(family, **settings)
    save_pruned(model, ascii_tokenizer(), tmp_path / "model", form="gguf")
    server = server_of(tmp_path / "model" / "model-f32.gguf")
    compare(model, greedy(server, IDS[0].tolist(), 128), IDS, within=3e-4)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_smaller_files_run_and_are_near(dtype, tmp_path):
    """No equal tokens are promised: at the first one, log-probabilities are near, and farther with fewer bits."""
    model = pruned_to_rectangles("llama")
    save_pruned(model, ascii_tokenizer(), tmp_path / "model", form="gguf", gguf_dtype=dtype)
    _, nats = greedy(server_of(tmp_path / "model" / f"model-{dtype}.gguf"), IDS[0].tolist(), 128)[0]
    expected = torch.log_softmax(model(IDS).logits[0, -1].double(), -1)
    worst = max(abs(float(expected[one]) - value) for one, value in nats.items() if value > -50)
    assert 1e-6 < worst < (0.02 if dtype == "f16" else 0.3)


def tokens_of(server, text):
    """llama.cpp's tokens for a text, with those that it adds around it."""
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        data=json.dumps({"content": text, "add_special": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


TEXTS = ("the dog and 12 foxes\njumps  over", "  The 3 others,\n\nquick: 4711!", "e")


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "sentencepiece"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(kind, tmp_path):
    tokenizer = sentencepiece_tokenizer() if kind == "sentencepiece" else ascii_tokenizer(digits=kind == "smollm")
    model = pruned_to_rectangles("llama", vocab_size=max(128, len(tokenizer)))
    save_pruned(model, tokenizer, tmp_path / "model", form="gguf")
    server = server_of(tmp_path / "model" / "model-f32.gguf")
    for text in TEXTS:
        assert tokens_of(server, text) == tokenizer(text).input_ids, text


def test_smollm2s_tokenizer_has_the_fields_of_the_file_it_came_from():
    preview = preview_model("smollm2-135m")
    written = tokenizer_fields(preview.tokenizer, preview.config.vocab_size)
    source = gguf.open_file(gguf.smollm2_file()).fields
    for name in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "padding_token_id"):
        key = f"tokenizer.ggml.{name}"
        assert written[key] == gguf.field_value(source, key, gguf.smollm2_file()), name


def test_the_code_in_the_card_runs_as_pasted(tmp_path, monkeypatch, capsys):
    save_pruned(pruned_to_rectangles("llama"), ascii_tokenizer(), tmp_path / "model", form="gguf")
    monkeypatch.chdir(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code, {})
    assert len(capsys.readouterr().out.strip()) > 5
    assert "llama-cli -m model-f32.gguf -p " in card
