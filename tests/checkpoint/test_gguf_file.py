"""Pruned models as GGUF files: what llama.cpp's graph makes of them, what they hold, what is refused, and loading again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    GGUF_CASES,
    GROUPS_LEFT,
    ascii_tokenizer,
    pruned_to_rectangles,
    save_tiny_model,
    sentencepiece_tokenizer,
    tiny_gpt2,
    tiny_model,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pruning_comparison import cli
from pruning_comparison.checkpoint import gguf_file
from pruning_comparison.checkpoint.forms import (
    export_gguf,
    forms_that_hold,
    gguf_ruled_out,
    load_pruned,
    save_pruned,
)
from pruning_comparison.checkpoint.gguf_file import reason_against_gguf
from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields
from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.models import preview_model
from pruning_comparison.models.heads import LAYOUTS
from pruning_comparison.pruning.surgery import converted_copy, remove_heads

IDS = torch.randint(1, 118, (1, 20), generator=torch.Generator().manual_seed(1))


def contents(path):
    """All fields and, dequantised, all tensors of a file, read by the package gguf itself."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {one.name: np.array(dequantize(one.data, one.tensor_type), dtype=np.float64) for one in reader.tensors}
    return fields, tensors


def logits_as_llama_cpp(path, ids):
    """Logits [T, V] by the graph that llama.cpp builds for the architecture deci, written anew from its source in NumPy.

    A layer without heads reads no tensor of attention at all, whatever the file holds; every tensor must be read.
    """
    fields, tensors = contents(path)
    assert fields["general.architecture"] == "deci"

    def value(key):
        return fields[f"deci.{key}"]

    read = set()

    def tensor(name, default=None):
        read.add(name)
        return tensors[name] if default is None else tensors.get(name, default)

    def norm(x, name):
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + value("attention.layer_norm_rms_epsilon")) * tensor(f"{name}.weight")

    def project(x, name):
        return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias", np.zeros(1))

    size = value("attention.key_length")
    assert size == value("attention.value_length") == value("rope.dimension_count")
    factors = tensor("rope_freqs.weight", np.ones(size // 2))
    angles = np.arange(len(ids))[:, None] * value("rope.freq_base") ** (-np.arange(0, size, 2) / size) / factors
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(x):
        """Two neighbouring features are turned by one angle."""
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    x = tensor("token_embd.weight")[ids]
    for layer in range(value("block_count")):
        heads, kv_heads = value("attention.head_count")[layer], value("attention.head_count_kv")[layer]
        block = f"blk.{layer}"
        if heads:
            normed = norm(x, f"{block}.attn_norm")
            query = turned(project(normed, f"{block}.attn_q").reshape(len(ids), heads, size))
            key = turned(project(normed, f"{block}.attn_k").reshape(len(ids), kv_heads, size))
            worth = project(normed, f"{block}.attn_v").reshape(len(ids), kv_heads, size)
            assert heads % kv_heads == 0
            key, worth = key.repeat(heads // kv_heads, 1), worth.repeat(heads // kv_heads, 1)
            scores = np.einsum("thd,shd->hts", query, key) / math.sqrt(size)
            scores = np.where(np.tril(np.ones(scores.shape[1:])) > 0, scores, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            attended = np.einsum("hts,shd->thd", shares / shares.sum(-1, keepdims=True), worth)
            x = x + project(attended.reshape(len(ids), -1), f"{block}.attn_output")
        normed = norm(x, f"{block}.ffn_norm")
        gate = project(normed, f"{block}.ffn_gate")
        x = x + project(gate / (1 + np.exp(-gate)) * project(normed, f"{block}.ffn_up"), f"{block}.ffn_down")
    x = norm(x, "output_norm")
    logits = x @ (tensor("output.weight") if "output.weight" in tensors else tensor("token_embd.weight")).T
    assert set(tensors) <= read
    return logits


def saved(model, folder, tokenizer=None, **options):
    folder = save_pruned(model, tokenizer or ascii_tokenizer(), folder, form="gguf", **options)
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("case", GGUF_CASES)
def test_llama_cpps_graph_computes_what_the_pruned_model_does(case, tmp_path):
    family, settings = GGUF_CASES[case]
    model = pruned_to_rectangles(family, **settings)
    path = saved(model, tmp_path / "model")
    assert path.name == "model-f32.gguf"
    expected = model(IDS).logits[0].double().numpy()
    assert np.abs(logits_as_llama_cpp(path, IDS[0].numpy()) - expected).max() < 1e-4


@pytest.mark.parametrize("case", GGUF_CASES)
def test_the_file_is_loaded_again_as_the_same_model(case, tmp_path):
    family, settings = GGUF_CASES[case]
    model = pruned_to_rectangles(family, **settings)
    tokenizer = ascii_tokenizer()
    again, read = load_pruned(saved(model, tmp_path / "model", tokenizer))
    assert (again(IDS).logits - model(IDS).logits).abs().max() < 1e-5
    assert again.config.kept_heads == model.config.kept_heads
    text = "the dogs and 12 foxes"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert (read.eos_token, read.bos_token_id) == ("<|endoftext|>", 0)


def test_sizes_are_lists_over_layers_and_an_emptied_layer_has_no_attention(tmp_path):
    """By hand from GROUPS_LEFT: rectangles of 3 x 2, 2 x 2, none, 3 x 1 and 4 x 2 heads of 16 features, width 64."""
    fields, tensors = contents(saved(pruned_to_rectangles("qwen2"), tmp_path / "model"))
    assert fields["deci.attention.head_count"] == [6, 4, 0, 3, 8]
    assert fields["deci.attention.head_count_kv"] == [3, 2, 0, 3, 4]
    assert tensors["blk.1.attn_q.weight"].shape == (64, 64)
    assert tensors["blk.3.attn_q.bias"].shape == (48,)
    assert tensors["blk.0.attn_k.weight"].shape == (48, 64)
    assert not [name for name in tensors if name.startswith("blk.2.attn")]
    fields, tensors = contents(saved(pruned_to_rectangles("qwen2", first_emptied=True), tmp_path / "emptied"))
    assert fields["deci.attention.head_count"] == [1, 4, 0, 3, 8]
    assert fields["deci.attention.head_count_kv"] == [1, 2, 0, 3, 4]
    assert all(not tensors[f"blk.0.attn_{part}.weight"].any() for part in ("q", "k", "v", "output"))
    assert tensors["blk.0.attn_output.bias"].any()


def test_two_emptied_layers_behind_one_another_keep_both_biases(tmp_path):
    keep = GROUPS_LEFT.clone()
    keep[3] = False
    both = remove_heads(
        tiny_model("llama", layers=5, vocab_size=128, width=64, num_attention_heads=8, num_key_value_heads=4), keep
    )
    for layer in (2, 3):
        both.model.layers[layer].self_attn.bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
    path = saved(both, tmp_path / "model")
    expected = both(IDS).logits[0].double().numpy()
    assert np.abs(logits_as_llama_cpp(path, IDS[0].numpy()) - expected).max() < 1e-4
    assert {"blk.1.ffn_down.bias", "blk.2.ffn_down.bias"} <= set(contents(path)[1])


def test_half_precision_and_eight_bits_store_matrices_smaller(tmp_path):
    """In float16 a weight is off by at most 2^-11 of itself, in eight bits by half of a 127th of its row's largest."""
    model = pruned_to_rectangles("llama")
    found = {}
    for dtype in ("f32", "f16", "q8_0"):
        path = saved(model, tmp_path / dtype, gguf_dtype=dtype)
        assert path.name == f"model-{dtype}.gguf"
        found[dtype] = contents(path)
    weight = found["f32"][1]["blk.0.ffn_up.weight"]
    assert np.abs(found["f16"][1]["blk.0.ffn_up.weight"] - weight).max() <= 2**-11 * np.abs(weight).max()
    error = np.abs(found["q8_0"][1]["blk.0.ffn_up.weight"] - weight)
    assert 0 < error.max() <= 0.51 / 127 * np.abs(weight).max()
    # Three heads of 16 features make rows of 48, no multiple of 32.
    short = np.abs(found["q8_0"][1]["blk.3.attn_output.weight"] - found["f32"][1]["blk.3.attn_output.weight"])
    assert 0 < short.max() <= 2**-11 * np.abs(found["f32"][1]["blk.3.attn_output.weight"]).max()
    assert [found[dtype][0]["general.file_type"] for dtype in found] == [0, 1, 7]
    for name, values in found["f32"][1].items():
        if values.ndim == 1:
            assert np.array_equal(found["q8_0"][1][name], values)
    half = saved(converted_copy(model, torch.bfloat16), tmp_path / "of bfloat16")
    assert half.name == "model-f16.gguf"


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(tmp_path):
    model = pruned_to_rectangles("llama")
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight has weights beyond.*--dtype=f32"):
        saved(model, tmp_path / "model", gguf_dtype="f16")
    assert list(tmp_path.iterdir()) == []


def test_every_family_is_written_or_refused_with_its_own_reason():
    for family in LAYOUTS:
        reason = reason_against_gguf(tiny_model("gemma3" if family == "gemma3_text" else family).config)
        if family in ("llama", "mistral", "qwen2"):
            assert reason is None, family
        else:
            assert f"a {family} model cannot be one" in reason
            assert "nobody has described" not in reason
    assert set(gguf_file._NOT_LLAMA) >= set(LAYOUTS) - {"llama", "mistral", "qwen2"}


def test_what_the_architecture_lacks_is_named():
    assert "sees a window of 5 tokens" in reason_against_gguf(tiny_model("mistral with a window").config)
    assert reason_against_gguf(tiny_model("mistral", sliding_window=64).config) is None  # as long as the context
    assert "activation is gelu" in reason_against_gguf(tiny_model("llama", hidden_act="gelu").config)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    assert "of the type yarn" in reason_against_gguf(tiny_model("llama", rope_parameters=yarn).config)


def test_ragged_groups_are_refused_and_the_unit_that_helps_is_named():
    """Two and one of three query heads left of two key-value heads."""
    ragged = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    dense = tiny_model("llama")
    reason = forms_that_hold(remove_heads(dense, ragged))["gguf"]
    assert "in layer 1, key-value heads are read by 1 and 2 query heads" in reason
    assert "--unit=rectangle or --unit=kv_group" in reason
    assert "chosen one by one" in gguf_ruled_out(dense.config, group_size=1)
    assert gguf_ruled_out(dense.config, group_size=3) is None
    assert gguf_ruled_out(dense.config, group_size=1, rectangle=3) is None
    # Whatever goes, one key-value head is read by all that are left.
    assert gguf_ruled_out(tiny_model("llama", num_key_value_heads=1).config, group_size=1) is None
    ungrouped = tiny_model("llama with biases, not grouped")
    assert gguf_ruled_out(ungrouped.config, group_size=1) is None
    assert forms_that_hold(remove_heads(ungrouped, ragged))["gguf"] is None


def test_without_the_package_or_a_tokenizer_nothing_is_written(tmp_path, monkeypatch):
    model = pruned_to_rectangles("llama")
    with pytest.raises(InputError, match="has no tokenizer"):
        save_pruned(model, None, tmp_path / "model", form="gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'pruning-comparison\[gguf\]'"):
        saved(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Loading again


def edited(path, change):
    """The file again with another config in it."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    target = path.with_name("edited.gguf")
    writer = GGUFWriter(target, "deci")
    config = change(json.loads(reader.fields[gguf_file.CONFIG_FIELD].contents()))
    if config is not None:
        writer.add_key_value(gguf_file.CONFIG_FIELD, config, GGUFValueType.STRING)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_file_that_is_none_of_ours_or_lies_is_refused(tmp_path):
    path = saved(pruned_to_rectangles("llama"), tmp_path / "model")
    for change, message in (
        (lambda config: None, "no pruned model that pruning-comparison has written"),
        (lambda config: "{", "not readable JSON"),
        (lambda config: "[1]", "no fields by name"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load_pruned(edited(path, change))
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelLoadError, match=r"short\.gguf cannot be read as GGUF.*Export the model again"):
        load_pruned(tmp_path / "short.gguf")
    with pytest.raises(ModelLoadError, match=r"is a pruned model for llama\.cpp.*load_pruned"):
        preview_model(str(path))


def test_shapes_that_the_config_does_not_promise_are_refused(tmp_path, monkeypatch):
    path = saved(pruned_to_rectangles("llama"), tmp_path / "model")
    real = gguf_file._folded_config

    def lying(config):
        fields = real(config)
        fields["kept_heads"][1] = [0, 1]
        return fields

    monkeypatch.setattr(gguf_file, "_folded_config", lying)
    lie = saved(pruned_to_rectangles("llama"), tmp_path / "lie")
    with pytest.raises(ModelLoadError, match=r"layers\.1\.self_attn\.q_proj\.weight has shape \[64, 64\]"):
        load_pruned(lie)
    assert load_pruned(path)[0].config.num_hidden_layers == 5


# Tokenizers


def test_the_tokenizers_fields_are_what_its_file_says():
    tokenizer = ascii_tokenizer(digits=True)
    tokenizer.chat_template = "{{ messages }}"
    fields = tokenizer_fields(tokenizer, 123)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "!"]
    assert fields["tokenizer.ggml.tokens"][len(tokenizer) :] == [f"[PAD{n}]" for n in range(len(tokenizer), 123)]
    assert fields["tokenizer.ggml.token_type"] == [3, *[1] * (len(tokenizer) - 1), *[5] * (123 - len(tokenizer))]
    first = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"][0]
    assert fields["tokenizer.ggml.merges"][0] == " ".join(first)
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (0, False)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert tokenizer_fields(ascii_tokenizer(), 120)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(("family", "rule"), [("qwen2", "qwen2"), ("llama3", "llama-bpe")])
def test_the_rules_of_qwen2_and_llama_3_are_those_that_transformers_has(family, rule):
    """transformers writes both from its own sources."""
    if family == "qwen2":
        from transformers import Qwen2Tokenizer

        made = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, merges=[("a", "b")])
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        pattern = TikTokenConverter().pattern
        backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end_of_text|>")
    assert tokenizer_fields(made, 8)["tokenizer.ggml.pre"] == rule


def test_sentencepiece_gets_scores_from_the_order_of_its_merges():
    fields = tokenizer_fields(sentencepiece_tokenizer(), 266)
    assert fields["tokenizer.ggml.model"] == "llama"
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]
    assert types[258:260] == [6, 1]
    numbers = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = [fields["tokenizer.ggml.scores"][numbers[piece]] for piece in ("he", "the", "\u2581the")]
    assert scores == [0.0, -1.0, -2.0]
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_space_prefix"]) == (True, True)
    with pytest.raises(InputError, match="merges of different rank"):
        tokenizer_fields(
            sentencepiece_tokenizer(merges=(("h", "e"), ("t", "h"), ("t", "he"), ("h", "t"), ("th", "e"))), 300
        )


def changed(change, **settings):
    tokenizer = ascii_tokenizer()
    change(tokenizer.backend_tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{"eos_token": "<|endoftext|>", **settings}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.Whitespace()), "it splits by Whitespace in a way"),
        (lambda one: setattr(one, "normalizer", normalizers.Lowercase()), "after Lowercase"),
        (lambda one: setattr(one, "model", models.WordLevel({"a": 0})), "its model is WordLevel"),
        (lambda one: setattr(one, "model", models.BPE(vocab={"a": 0}, merges=[])), "it has no merges"),
        (
            lambda one: setattr(
                one, "post_processor", processors.TemplateProcessing(single="! $A", special_tokens=[("!", 1)])
            ),
            "it adds other tokens around a text",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        tokenizer_fields(changed(change), 130)


def test_a_tokenizer_with_too_many_tokens_or_no_end_is_refused():
    with pytest.raises(InputError, match="a token 119 and the model has 100 embeddings"):
        tokenizer_fields(ascii_tokenizer(), 100)
    with pytest.raises(InputError, match="no token that ends texts"):
        tokenizer_fields(PreTrainedTokenizerFast(tokenizer_object=ascii_tokenizer().backend_tokenizer), 120)


# The commands


@pytest.fixture
def compact(tmp_path):
    return save_pruned(pruned_to_rectangles("llama"), ascii_tokenizer(), tmp_path / "compact")


def test_export_writes_one_file_into_the_folder_or_where_it_is_told(compact, tmp_path, capsys):
    assert cli.main(["export", str(compact), "--quiet"]) == 0
    assert str(compact / "model-f16.gguf") in capsys.readouterr().out
    target = tmp_path / "new" / "mine.gguf"
    assert cli.main(["export", str(compact), "--to=gguf", "--dtype=f32", f"--output={target}", "--quiet"]) == 0
    expected = load_pruned(compact)[0](IDS).logits[0].double().numpy()
    assert np.abs(logits_as_llama_cpp(target, IDS[0].numpy()) - expected).max() < 1e-4
    assert sorted(path.name for path in target.parent.iterdir()) == ["mine.gguf"]
    capsys.readouterr()
    assert cli.main(["export", str(compact), "--dtype=f32", f"--output={target}"]) == 2
    assert f"--output: {str(target)!r} exists" in capsys.readouterr().err


def test_export_refuses_before_weights_are_read(compact, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", str(compact), "--to=onnx"]) == 2
    assert "--to: 'onnx' is unknown. Choose from gguf" in capsys.readouterr().err
    assert cli.main(["export", str(compact), "--dtype=q4"]) == 2
    assert "--dtype: 'q4' is unknown" in capsys.readouterr().err
    keep = torch.tensor([[1, 1, 0, 0]] * 3, dtype=torch.bool)
    gpt2 = save_pruned(remove_heads(tiny_gpt2(), keep), None, tmp_path / "gpt2")
    monkeypatch.setattr("pruning_comparison.checkpoint.forms.load_file", None)
    assert cli.main(["export", str(gpt2)]) == 2
    assert "a gpt2 model cannot be one: its blocks have layer norms" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (compact / name).unlink()
    assert cli.main(["export", str(compact)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        export_gguf(tmp_path / "nowhere")


def test_prune_also_saves_the_file_or_refuses_before_it_begins(tmp_path, capsys):
    source = save_tiny_model(tmp_path / "dense", model=tiny_model("llama", layers=2, vocab_size=257))
    argv = ["prune", f"--model_name={source}", "--method=magnitude", "--variant=baseline", "--level=50", "--no_measure"]
    argv += ["--quiet", "--threads=1", "--calibration_window=32", "--calibration_tokens=64", "--also=gguf"]
    target = tmp_path / "pruned"
    assert cli.main([*argv, f"--output_dir={target}"]) == 2
    error = capsys.readouterr().err
    assert "--also: the gguf form is not possible: heads that are chosen one by one" in error
    assert "Nothing has been pruned yet" in error
    # The bytes of save_tiny_model's tokenizer are never merged.
    assert cli.main([*argv, "--unit=kv_group", f"--output_dir={target}"]) == 2
    assert "it has no merges" in capsys.readouterr().err
    assert not target.exists()
    ascii_tokenizer().save_pretrained(source)
    assert cli.main([*argv, "--unit=rectangle", f"--output_dir={target}"]) == 0
    assert sorted(path.name for path in (target / "gguf").iterdir()) == ["README.md", "model-f32.gguf"]
    card = Path(target / "gguf" / "README.md").read_text()
    assert "This folder is in gguf form. Weights are in the .gguf file." in card
    again, tokenizer = load_pruned(target / "gguf" / "model-f32.gguf")
    ids = tokenizer("the dog", return_tensors="pt").input_ids
    assert (again(ids).logits - load_pruned(target)[0](ids).logits).abs().max() < 1e-5
    assert isinstance(AutoTokenizer.from_pretrained(target), PreTrainedTokenizerFast)
