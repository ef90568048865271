"""Pruned models as GGUF files that llama.cpp runs as it is, and such files read again.

llama.cpp builds layers of different sizes, and layers without attention, for one architecture only: ``deci``, whose blocks
are Llama's. Decision 36 says what follows from it. Dimension letters: L layers, H query heads, K key-value heads, D head
size, E embedding, F features of the MLP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields, tokenizer_from
from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.models.gguf import LLAMA_TENSORS, field_value, join_halves, let_go, open_file, split_halves
from pruning_comparison.models.heads import family_of, head_grid, kept_heads, live_groups
from pruning_comparison.spec import PRUNE_UNITS

GGUF_DTYPES = ("f32", "f16", "q8_0")
"""What matrices can be stored as; norms and biases are always float32."""

INSTALL_GGUF = "pip install 'pruning-comparison[gguf]'"
ARCHITECTURE = "deci"
CONFIG_FIELD = "pruning_comparison.config"
"""The field that holds the pruned model's config as JSON, so that the file can be loaded again; not for llama.cpp."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
_ROTARY = ("attn_q", "attn_k")
_ROPE_TYPES = ("default", "linear", "llama3")
_LAYER_NORMS = "its blocks have layer norms and an MLP without a gate"
_NOT_LLAMA = {
    "gemma2": "its blocks have norms behind attention and MLP, and scores of attention are capped",
    "gemma3_text": "its blocks have norms behind attention and MLP, and some of its layers see a window only",
    "gpt2": f"{_LAYER_NORMS}, and its positions are learned",
    "gpt_neox": f"{_LAYER_NORMS}, and attention and MLP read the same input",
    "gpt_oss": "its MLPs are mixtures of experts, and its heads have sinks",
    "granite": "what its blocks add is multiplied by a factor",
    "ministral": "some of its layers see a window only",
    "olmo2": "its norms run over the queries and keys of all heads together, and stand behind attention and MLP",
    "opt": f"{_LAYER_NORMS}, and its positions are learned",
    "phi3": "its fused projections are not taken apart here",
    "qwen3": "its queries and keys pass through norms",
    "qwen3_moe": "its queries and keys pass through norms, and its MLPs are mixtures of experts",
    "smollm3": "some of its layers have no rotary positions",
}
_EXPRESSIBLE = ("llama", "mistral", "qwen2")


def reason_against_gguf(config: Any) -> str | None:
    """Why a model with this config, dense or pruned, cannot be a GGUF file for llama.cpp; None where it can.

    Of a pruned model's config, that of its pruned class, the heads that are left are looked at as well.
    """
    family = str(family_of(config))
    if family not in _EXPRESSIBLE:
        what = _NOT_LLAMA.get(family, "nobody has described how its blocks differ")
        return _reason(
            f"llama.cpp builds layers of different sizes for one architecture only, {ARCHITECTURE}, whose blocks are "
            f"Llama's, and a {family} model cannot be one: {what}. Use the compact form; llama.cpp can be given models of "
            f"the types {', '.join(_EXPRESSIBLE)}."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return _reason(
            f"the model's attention sees a window of {window} tokens (sliding_window), which the architecture "
            f"{ARCHITECTURE} does not have. Use the compact form."
        )
    if config.hidden_act != "silu":
        return _reason(
            f"the MLP's activation is {config.hidden_act}, and the architecture {ARCHITECTURE} has silu alone. Use the "
            "compact form."
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        what = kind if kind not in _ROPE_TYPES else f"partial, {rope['partial_rotary_factor']}"
        return _reason(
            f"its rotary positions are of the type {what}, and {', '.join(_ROPE_TYPES)} are translated. Use the compact "
            "form."
        )
    grid, keep = head_grid(config), kept_heads(config)
    for layer, row in enumerate(keep):
        sizes = live_groups(grid, row)
        if len(set(sizes)) > 1:
            return _reason(
                f"in layer {layer}, key-value heads are read by {' and '.join(map(str, sorted(set(sizes))))} query heads, "
                f"and llama.cpp wants as many for each. {_prune_whole_groups()}."
            )
    return None


def reason_against_free_choice(config: Any) -> str | None:
    """Why a model of this config, pruned head by head, cannot be a GGUF file; None where any choice of heads can."""
    grid = head_grid(config)
    if grid.group_size == 1 or grid.n_kv_heads == 1:
        return None
    return _reason(
        "heads that are chosen one by one leave key-value heads that are read by different numbers of query heads, and "
        f"llama.cpp wants as many for each of a layer. {_prune_whole_groups()}."
    )


def check_gguf_package() -> None:
    """InputError where the package that writes GGUF files is not installed."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"the gguf form needs the package gguf, which is not installed: {INSTALL_GGUF}.") from None


def write_gguf(model: PreTrainedModel, config: Any, tokenizer: Any, path: Path, *, dtype: str, name: str) -> None:
    """Writes a pruned model into a GGUF file.

    ``config`` is that of the model's pruned class, ``name`` what the file says the model is called. Matrices are stored as
    ``dtype``; with "q8_0" those whose rows are no multiple of 32 long as float16. InputError, with the reason, where the
    model or its tokenizer cannot be written.
    """
    if dtype not in GGUF_DTYPES:
        raise InputError(f"dtype: {dtype!r} is unknown. Choose from {', '.join(GGUF_DTYPES)}.")
    check_gguf_package()
    reason = reason_against_gguf(config)
    if reason is not None:
        raise InputError(reason)
    fields = {**_model_fields(model, config, dtype, name), **tokenizer_fields(tokenizer, config.vocab_size)}
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType[_value_type(value)])
    for tensor_name, tensor in _tensors(model, config).items():
        _add_tensor(writer, tensor_name, tensor, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, list[int]], Any]:
    """What a file that ``write_gguf`` has written says of its model: fields of its config, shapes, and its tokenizer.

    Shapes are those of the tensors by transformers' names; weights are not read. ModelLoadError where the file is none of
    ours or cannot be read.
    """
    reader = _open(path)
    if CONFIG_FIELD not in reader.fields:
        raise ModelLoadError(
            f"{path.name} is no pruned model that pruning-comparison has written: it has no {CONFIG_FIELD!r}. Give one that "
            "export has written, or the folder of the compact form."
        )
    try:
        fields = json.loads(field_value(reader.fields, CONFIG_FIELD, path))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"the config in {path.name} is not readable JSON: {error}. Export it again.") from error
    if not isinstance(fields, dict):
        raise ModelLoadError(f"the config in {path.name} holds no fields by name. Export the model again.")
    shapes = {}
    for tensor in reader.tensors:
        key = _name_in_transformers(tensor.name, fields, path)
        if key is not None:
            shapes[key] = [int(size) for size in reversed(tensor.shape)]
    wanted = (key for key in reader.fields if key.startswith("tokenizer."))
    values = {key: field_value(reader.fields, key, path) for key in wanted}
    return fields, shapes, tokenizer_from(values, path.name)


def read_gguf_weights(path: Path, config: Any) -> dict[str, Tensor]:
    """The weights in a file that ``read_gguf`` has read, dequantised to float32, by transformers' names."""
    from gguf import dequantize

    fields, size, weights = config.to_dict(), head_grid(config).head_size, {}
    for tensor in _open(path).tensors:
        key = _name_in_transformers(tensor.name, fields, path)
        if key is None:
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name.split(".")[-2] in _ROTARY:
            values = _each_head(split_halves, values, size)
        weights[key] = torch.from_numpy(values.copy())
    let_go()
    return weights


def _open(path: Path) -> Any:
    try:
        return open_file(path)
    except ModelLoadError as error:
        cause = error.__cause__
        if cause is None:
            raise ModelLoadError(
                f"{path.name} needs the package gguf, which is not installed: {INSTALL_GGUF}."
            ) from None
        raise ModelLoadError(f"{path.name} cannot be read as GGUF: {cause}. Export the model again.") from cause


def _reason(text: str) -> str:
    return f"the gguf form is not possible: {text}"


def _prune_whole_groups() -> str:
    # The unit that comes last in the list keeps the most of what free choice gives.
    units = [f"--unit={unit}" for unit in reversed(PRUNE_UNITS) if unit != "head"]
    return f"Prune with {' or '.join(units)}"


def _value_type(value: Any) -> str:
    """GGUF's name for the type of a field that is no list."""
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, int):
        return "UINT32"
    return "FLOAT32" if isinstance(value, float) else "STRING"


def _model_fields(model: PreTrainedModel, config: Any, dtype: str, name: str) -> dict[str, Any]:
    """All fields but those of the tokenizer, by their full names."""
    grid, keep = head_grid(config), kept_heads(config)
    heads = [int(row.sum()) for row in keep]
    kv_heads = [len(live_groups(grid, row)) for row in keep]
    if heads[0] == 0:
        heads[0] = kv_heads[0] = 1  # the head of zeros, see _layer_tensors
    made: Mapping[str, Any] = getattr(config, "pruning", None) or {}
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }
    if made.get("licence"):
        general["general.license"] = str(made["licence"])
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": grid.n_layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": grid.head_size,
        "attention.value_length": grid.head_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": grid.head_size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    stored = json.dumps(_folded_config(config))
    return {**general, **{f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()}, CONFIG_FIELD: stored}


def _folded_config(config: Any) -> dict[str, Any]:
    """The config's fields as the file has the model: biases of emptied layers are with the MLP of the layer before."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    emptied = {layer for layer, row in enumerate(kept_heads(config)) if layer and not bool(row.any())}
    folded = emptied & set(config.attention_output_biases)
    fields["attention_output_biases"] = sorted(set(config.attention_output_biases) - folded)
    fields["mlp_output_biases"] = sorted({*config.mlp_output_biases, *(layer - 1 for layer in folded)})
    return fields


def _tensors(model: PreTrainedModel, config: Any) -> dict[str, Tensor]:
    """The file's tensors by their names, float32, in llama.cpp's order of rotary features."""
    weights = {key: value.detach().to("cpu", torch.float32) for key, value in model.state_dict().items()}
    tied = bool(config.tie_word_embeddings)
    found = {
        f"{name}.weight": weights[f"{LLAMA_TENSORS[name]}.weight"]
        for name in ("token_embd", "output_norm", *(() if tied else ("output",)))
    }
    factors = _rotary_factors(model)
    if factors is not None:
        found["rope_freqs.weight"] = factors
    keep, size = kept_heads(config), head_grid(config).head_size
    for layer, row in enumerate(keep):
        found |= _layer_tensors(weights, layer, size, emptied=not bool(row.any()))
    _check_all_written(weights, tied)
    for layer, row in enumerate(keep):
        bias = weights.get(f"model.layers.{layer}.self_attn.bias")
        if layer and not bool(row.any()) and bias is not None:
            # llama.cpp ignores an attention bias where there are no heads. The layer before ends with its MLP's output, so
            # that added there is exactly what this layer would have added first.
            name = f"blk.{layer - 1}.ffn_down.bias"
            found[name] = found[name] + bias if name in found else bias
    return found


def _check_all_written(weights: Mapping[str, Tensor], tied: bool) -> None:
    """AssertionError where the model has weights that the file has no place for: what it computes would be another's."""
    places = {*LLAMA_TENSORS.values(), "self_attn"}
    left = [
        key
        for key in weights
        if re.sub(r"^model\.layers\.\d+\.", "", key).rpartition(".")[0] not in places
        and not key.endswith("kv_index")
        and not (tied and key == "lm_head.weight")
    ]
    if left or "lm_head.bias" in weights:
        raise AssertionError(f"the gguf form has no place for {(left or ['lm_head.bias'])[0]}")


def _layer_tensors(weights: Mapping[str, Tensor], layer: int, size: int, *, emptied: bool) -> dict[str, Tensor]:
    """One layer's tensors. An emptied layer has none of attention, but for layer 0.

    llama.cpp works out sizes of the whole model from the heads of layer 0, so there it gets a head of zeros, which writes
    nothing but the layer's bias.
    """
    prefix, found = f"model.layers.{layer}.", {}
    for name, place in LLAMA_TENSORS.items():
        for kind in ("weight", "bias"):
            tensor = weights.get(f"{prefix}{place}.{kind}")
            if tensor is None or (emptied and name == "attn_norm"):
                continue
            if name in _ROTARY:
                tensor = torch.from_numpy(_each_head(join_halves, tensor.numpy(), size))
            found[f"blk.{layer}.{name}.{kind}"] = tensor
    if emptied and layer == 0:
        width = found[f"blk.{layer}.ffn_norm.weight"].shape[0]
        for name in ("attn_q", "attn_k", "attn_v"):
            found[f"blk.0.{name}.weight"] = torch.zeros(size, width)
        found["blk.0.attn_output.weight"] = torch.zeros(width, size)
        found["blk.0.attn_norm.weight"] = torch.ones(width)
        bias = weights.get("model.layers.0.self_attn.bias")
        if bias is not None:
            found["blk.0.attn_output.bias"] = bias
    return found


def _each_head(change: Any, values: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """A change of the order of rotary features, of weights [H * D, E] or a bias [H * D]."""
    rows = values if values.ndim == 2 else values[:, None]
    changed = np.ascontiguousarray(change(rows, len(rows) // size))
    return changed.reshape(values.shape)


def _rotary_factors(model: PreTrainedModel) -> Tensor | None:
    """By what each rotary frequency is divided, [D / 2]; None where by nothing.

    The model's own frequencies are compared with those of the base alone, so that every fixed scaling is covered.
    """
    rotary: Any = model.get_submodule("model.rotary_emb")
    if float(rotary.attention_scaling) != 1.0:
        raise InputError(
            _reason("its rotary positions scale attention, which is not translated. Use the compact form.")
        )
    own = rotary.inv_freq.detach().to("cpu", torch.float64)
    base = float(model.config.rope_parameters["rope_theta"])
    plain = base ** (-torch.arange(len(own), dtype=torch.float64) / len(own))
    factors = plain / own
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors.float()


def _add_tensor(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    from gguf import GGMLQuantizationType, quantize

    values = tensor.numpy()
    if dtype == "f32" or values.ndim == 1:
        writer.add_tensor(name, values)
        return
    if dtype == "q8_0" and values.shape[1] % 32 == 0:
        writer.add_tensor(name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        return
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError(f"{name} has weights beyond what float16 holds (65504). Export the model with --dtype=f32.")
    writer.add_tensor(name, half)


def _name_in_transformers(name: str, config: Mapping[str, Any], path: Path) -> str | None:
    """transformers' name for a tensor of the file; None for one that the config stands for."""
    *block, part, kind = name.split(".")
    if name == "rope_freqs.weight":
        return None
    if part not in LLAMA_TENSORS or kind not in ("weight", "bias") or len(block) not in (0, 2):
        raise ModelLoadError(f"{path.name} has a tensor {name!r} that a pruned Llama has not. Export the model again.")
    if block == ["blk", "0"] and part.startswith("attn_") and not _kept_in(config, 0):
        return "model.layers.0.self_attn.bias" if (part, kind) == ("attn_output", "bias") else None
    place = f"model.layers.{block[1]}." if block else ""
    return f"{place}{LLAMA_TENSORS[part]}.{kind}"


def _kept_in(config: Mapping[str, Any], layer: int) -> Sequence[int]:
    rows = config.get("kept_heads")
    return rows[layer] if isinstance(rows, list) and layer < len(rows) and isinstance(rows[layer], list) else []
