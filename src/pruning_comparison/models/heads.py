"""Where each architecture keeps its attention heads: the only file that knows. And what a model without some of them is.

This file needs torch and transformers and nothing else: saved with a pruned model, as ``modeling_pruned_heads.py``, it is
the code that transformers loads the model with where the package pruning-comparison is not installed.

Dimension letters: L layers, H query heads, K key-value heads, D head size, E embedding, B batch, T time.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

# Before what older versions of transformers lack: this file lies beside saved models, and whoever opens one may have any.
if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < (5, 15):
    raise ImportError(
        f"this pruned model needs transformers 5.15 or later, and {transformers.__version__} is installed. "
        "pip install -U 'transformers>=5.15'"
    )

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

FAMILY_PAGE = "docs/adding-a-family.md"
PRUNED = "pruned_"
"""Begins the ``model_type`` of a pruned model's config: ``pruned_gpt2`` is a GPT-2 without some of its heads."""

MODELING_FILE = "modeling_pruned_heads.py"
"""What this file is called beside the weights of a pruned model."""


Part = Literal["attention", "mlp"]


class UnsupportedModelError(ValueError):
    """A config that describes no model whose heads can be cut, or heads that its model does not have."""


@dataclass(frozen=True)
class FamilyLayout:
    """Where one family keeps its attention.

    ``layers`` leads from the model to its list of blocks, ``attention`` from a block to its attention module; ``query``,
    ``key``, ``value`` and ``output`` name projections inside it. Where the first three are one fused projection they have
    one name, and ``fused`` says how its outputs are ordered: "parts" for all queries, then all keys, then all values;
    "heads" for the query, key and value of the first head, then those of the second, and so on.

    ``attention_norm`` names the norm of a block whose output attention reads and nothing else, so that it leaves with the
    last head; None where something else reads it too.

    ``mlp_output`` leads from a block to the projection that writes what the MLP adds. Where a block has what ``experts``
    leads to, its MLP is a mixture of experts, and no single projection does. ``norm_after`` is the config attribute
    that is false where the block's last norm, named ``last_norm``, comes after that sum; None where no norm does.

    ``attention_output_norm`` and ``mlp_output_norm`` name norms of a block through which what attention, and the MLP, has
    written passes before it is added to the residual stream; None where it is added as it is. ``multiplier`` is the config
    attribute that it is multiplied by.

    ``soft_cap`` is the config attribute that bounds the scores of attention, which transformers does in its eager
    implementation alone. ``sinks`` names a parameter of attention with a number for each query head; those of heads that go
    are cut, and only the eager implementation reads them. ``joint_norms`` names norms that run over the queries, and the
    keys, of all heads together: what they divide by is the dense model's only if all queries and keys are made, so these
    projections stay whole, and those of heads that have gone are dropped behind the norm.

    ``sizes`` names the attributes that the family's own ``forward`` reads and that differ in a smaller layer, and what each
    counts: "heads" (query heads), "width" (their features), "kv_heads" or "groups" (query heads per key-value head); one
    that begins with ``config.`` is read from the config, and a smaller layer sees another there. ``parallel`` is the
    config attribute that says that attention and MLP read the same input and are added up together; None if they never do.

    ``reads`` names the config attributes that the family's attention takes its sizes from where they are set: ``head_dim``,
    ``num_key_value_heads``. A config may hold others, which the family's own code never looks at.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    fused: str | None
    sizes: Mapping[str, str]
    mlp_output: str
    attention_norm: str | None = None
    parallel: str | None = None
    norm_after: str | None = None
    last_norm: str | None = None
    experts: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    multiplier: str | None = None
    soft_cap: str | None = None
    sinks: str | None = None
    joint_norms: tuple[str, str] | None = None
    reads: tuple[str, ...] = ()


_LLAMA = FamilyLayout(
    layers="model.layers",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    fused=None,
    sizes=MappingProxyType({"num_key_value_groups": "groups"}),
    mlp_output="mlp.down_proj",
    attention_norm="input_layernorm",
    reads=("head_dim", "num_key_value_heads"),
)

_GEMMA = replace(_LLAMA, attention_output_norm="post_attention_layernorm", mlp_output_norm="post_feedforward_layernorm")

_DESCRIBED = {
    "gemma2": replace(_GEMMA, soft_cap="attn_logit_softcapping"),
    "gemma3_text": _GEMMA,
    "granite": replace(_LLAMA, multiplier="residual_multiplier"),
    "gpt_oss": replace(_LLAMA, experts="mlp.experts", sinks="sinks"),
    "ministral": _LLAMA,
    "olmo2": replace(_GEMMA, attention_norm=None, joint_norms=("q_norm", "k_norm")),
    "smollm3": _LLAMA,
    "gpt2": FamilyLayout(
        layers="transformer.h",
        attention="attn",
        query="c_attn",
        key="c_attn",
        value="c_attn",
        output="c_proj",
        fused="parts",
        sizes=MappingProxyType({"num_heads": "heads", "split_size": "width"}),
        mlp_output="mlp.c_proj",
        attention_norm="ln_1",
    ),
    "gpt_neox": FamilyLayout(
        layers="gpt_neox.layers",
        attention="attention",
        query="query_key_value",
        key="query_key_value",
        value="query_key_value",
        output="dense",
        fused="heads",
        sizes=MappingProxyType({}),
        mlp_output="mlp.dense_4h_to_h",
        attention_norm="input_layernorm",
        parallel="use_parallel_residual",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": FamilyLayout(
        layers="model.decoder.layers",
        attention="self_attn",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="out_proj",
        fused=None,
        sizes=MappingProxyType({"num_heads": "heads"}),
        mlp_output="fc2",
        attention_norm="self_attn_layer_norm",
        norm_after="do_layer_norm_before",
        last_norm="final_layer_norm",
    ),
    "phi3": FamilyLayout(
        layers="model.layers",
        attention="self_attn",
        query="qkv_proj",
        key="qkv_proj",
        value="qkv_proj",
        output="o_proj",
        fused="parts",
        sizes=MappingProxyType(
            {
                "config.num_attention_heads": "heads",
                "num_key_value_heads": "kv_heads",
                "num_key_value_groups": "groups",
            }
        ),
        mlp_output="mlp.down_proj",
        attention_norm="input_layernorm",
        reads=("head_dim", "num_key_value_heads"),
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": replace(_LLAMA, experts="mlp.experts"),
}

LAYOUTS: Mapping[str, FamilyLayout] = MappingProxyType(
    {family: layout for family, layout in sorted(_DESCRIBED.items()) if family in CONFIG_MAPPING}
)
"""FamilyLayout by the ``model_type`` of the Hugging Face config, of those that the installed transformers has."""


_LATENT = "it has latent attention, whose heads share one compressed key and value (MLA)"
_LINEAR = "some of its layers have linear or gated attention, which has no heads of this kind"

NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        "bloom": "the slopes of its positions (ALiBi) belong to heads, and a smaller layer would need those of its own",
        "deepseek_v2": _LATENT,
        "deepseek_v3": _LATENT,
        "falcon": "its fused projection is in an order of its own, and its cache holds keys and values once for every head",
        "falcon_h1": _LINEAR,
        "gemma3": "it reads images too; its text model alone, of the type gemma3_text, is supported",
        "gptj": "nobody has described its attention and parallel blocks yet",
        "jamba": _LINEAR,
        "minimax": _LINEAR,
        "mpt": "the slopes of its positions (ALiBi) belong to heads, and a smaller layer would need those of its own",
        "olmo3": "its sliding layers have not been checked yet; OLMo 2 is supported",
        "qwen3_5": _LINEAR,
        "qwen3_next": _LINEAR,
    }
)
"""Model types that people ask for and that cannot be pruned yet, with the reason."""


@dataclass(frozen=True)
class HeadGrid:
    """How many heads a model has: L layers of H query heads of size D each, which share K key-value heads.

    Query heads ``g * group_size`` to ``(g + 1) * group_size - 1`` read key-value head ``g``.
    """

    n_layers: int
    n_heads: int
    head_size: int
    n_kv_heads: int

    @property
    def total(self) -> int:
        return self.n_layers * self.n_heads

    @property
    def group_size(self) -> int:
        """Query heads per key-value head; 1 where every head has its own."""
        return self.n_heads // self.n_kv_heads

    def all_heads(self) -> Tensor:
        """bool [L, H], all true: the keep mask of the dense model."""
        return torch.ones(self.n_layers, self.n_heads, dtype=torch.bool)


def check_supported(config: Any) -> None:
    """Raises UnsupportedModelError where the config's architecture has no layout, or has parts that pruning would break."""
    model_type = family_of(config)
    if model_type not in LAYOUTS:
        reason = f" yet: {NOT_YET[model_type]}" if model_type is not None and model_type in NOT_YET else ""
        raise UnsupportedModelError(
            f"architecture {model_type!r} is not supported{reason}. Supported model types: {', '.join(sorted(LAYOUTS))}. "
            f"Choose a model of one of these families; {FAMILY_PAGE} in the repository shows how one is added."
        )
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "the model has cross-attention; only decoder-only causal language models can be compared. "
            "Choose one whose config has add_cross_attention off."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the model's weights are quantised (its config has a quantization_config); heads can only be cut from plain "
            "weights. Choose the model's float version."
        )
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"the config has {heads} query heads and {kv_heads} key-value heads, which do not divide evenly. "
            "Check num_attention_heads and num_key_value_heads in config.json."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            "the model's attention looks ahead (use_bidirectional_attention); only causal language models can be compared. "
            "Choose one whose config has it off."
        )
    if model_type == "mistral" and len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise UnsupportedModelError(
            "the Mistral config has layers of several types (layer_types), which transformers' Mistral ignores. "
            "Choose a model whose model_type is made for them."
        )


def family_of(config: Any) -> str | None:
    """The ``model_type`` of the dense model: a pruned model's own says that it is pruned as well."""
    model_type = getattr(config, "model_type", None)
    return None if model_type is None else str(model_type).removeprefix(PRUNED)


def layout_of(model: PreTrainedModel) -> FamilyLayout:
    """The layout of a loaded model's architecture; UnsupportedModelError if there is none."""
    check_supported(model.config)
    return LAYOUTS[str(family_of(model.config))]


def head_grid(config: Any) -> HeadGrid:
    """Heads of the *dense* model, as its config states them."""
    check_supported(config)
    head_size = _read(config, "head_dim") or config.hidden_size // config.num_attention_heads
    return HeadGrid(config.num_hidden_layers, config.num_attention_heads, head_size, _kv_heads(config))


def has_parallel_blocks(model: PreTrainedModel) -> bool:
    """Whether attention and MLP of a block both read the block's input, instead of the MLP what attention has added to."""
    attribute = layout_of(model).parallel
    return attribute is not None and bool(getattr(model.config, attribute))


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks, in order."""
    return list(model.get_submodule(layout_of(model).layers).children())


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every block, in order; an ``EmptiedAttention`` where a layer has lost all its heads."""
    name = layout_of(model).attention
    return [block.get_submodule(name) for block in blocks(model)]


def output_projections(model: PreTrainedModel) -> list[nn.Module | None]:
    """The output projection of every layer; None where a layer has lost all its heads."""
    name = layout_of(model).output
    return [None if isinstance(a, EmptiedAttention) else a.get_submodule(name) for a in attentions(model)]


def mlp_output_projections(model: PreTrainedModel) -> list[nn.Module | None]:
    """The projection of every layer that writes what its MLP adds to the residual stream; None for a mixture of experts."""
    layout = layout_of(model)
    return [
        None
        if layout.experts is not None and _has_module(block, layout.experts)
        else block.get_submodule(layout.mlp_output)
        for block in blocks(model)
    ]


def has_experts(config: Any) -> bool:
    """Whether a model with this config has layers whose MLP is a mixture of experts, counted without making its weights."""
    layout = LAYOUTS[str(family_of(config))]
    if layout.experts is None:
        return False
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[str(family_of(config))]]
    with torch.device("meta"):
        model = model_class(config)
    return None in mlp_output_projections(model)


def last_norms(model: PreTrainedModel) -> list[nn.Module | None]:
    """The norm of every block that comes after what its MLP has added; None where blocks end with the sum."""
    layout = layout_of(model)
    after = layout.norm_after is not None and not getattr(model.config, layout.norm_after)
    return [block.get_submodule(layout.last_norm) if after and layout.last_norm else None for block in blocks(model)]


def attention_implementation(config: Any) -> str:
    """The name of transformers' attention that computes what the family means: "sdpa", or "eager" where only that does."""
    layout = LAYOUTS[str(family_of(config))]
    capped = layout.soft_cap is not None and getattr(config, layout.soft_cap, None) is not None
    return "eager" if capped or layout.sinks is not None else "sdpa"


def norms_of_outputs(model: PreTrainedModel, part: Part) -> list[nn.Module | None]:
    """The norm of every layer through which what attention, or the MLP, writes passes before it is added; None if none."""
    layout = layout_of(model)
    name = layout.attention_output_norm if part == "attention" else layout.mlp_output_norm
    return [None if name is None else block.get_submodule(name) for block in blocks(model)]


def gains_of(norm: nn.Module) -> Tensor:
    """What a root-mean-square norm multiplies its features by, [E]: its weight, or, as Gemma stores it, that and 1.

    Families differ in it, so the norm itself is asked: ones have a root mean square of 1, but for what keeps it from
    dividing by zero.
    """
    gains: Tensor = norm(torch.ones_like(norm.get_parameter("weight")))
    return gains


def set_gains(norm: nn.Module, gains: Tensor) -> None:
    """Makes a root-mean-square norm multiply by ``gains`` [E], in a parameter of its own: others may share the old one."""
    weight = norm.get_parameter("weight")
    changed = weight.detach().double() + gains.double() - gains_of(norm).double()
    norm.weight = nn.Parameter(changed.to(weight), requires_grad=False)


def mlp_output_is_normed(config: Any) -> bool:
    """Whether a model with this config has norms between what its MLPs write and the residual stream."""
    return LAYOUTS[str(family_of(config))].mlp_output_norm is not None


def residual_multiplier(model: PreTrainedModel) -> float:
    """What the output of attention and MLP is multiplied by before it is added to the residual stream."""
    attribute = layout_of(model).multiplier
    return 1.0 if attribute is None else float(getattr(model.config, attribute))


def input_major_weight(projection: nn.Module) -> Tensor:
    """The weight as [inputs, outputs], whichever way the module stores it. A view: writing to it writes the module."""
    weight = projection.get_parameter("weight")
    return weight if isinstance(projection, Conv1D) else weight.T


def head_parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Weights of one layer of a dense model by head: ``query``, ``key``, ``value`` [H, E, D] and ``output`` [H, D, E].

    Query heads that share a key-value head each get its key and value weights: those of a group repeat, and their sum over
    heads is not the layer's.
    """
    layout, grid = layout_of(model), head_grid(model.config)
    attention = attentions(model)[layer]
    parameters = {}
    for part, columns in _part_columns(layout, grid).items():
        weight = input_major_weight(attention.get_submodule(getattr(layout, part)))
        by_head = weight[:, columns.flatten().to(weight.device)].unflatten(1, columns.shape).permute(1, 0, 2)
        parameters[part] = by_head.repeat_interleave(grid.n_heads // len(columns), 0)
    output = input_major_weight(attention.get_submodule(layout.output))
    return {**parameters, "output": output.unflatten(0, (grid.n_heads, grid.head_size))}


def head_columns(heads: Tensor, head_size: int) -> Tensor:
    """Indices of the features of the heads that are true in ``heads`` (bool [H]) in an [.., H * D] activation."""
    return heads.repeat_interleave(head_size).nonzero().squeeze(1)


def set_projection(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces a projection's parameters by ``weight`` [inputs, outputs] and ``bias`` [outputs], whatever their old sizes.

    New parameters are made, so that a module that shares its old ones with another model does not change that model. A bias
    may be given to an ``nn.Linear`` that was made without one; None leaves the old bias, or its absence.
    """
    stored = weight if isinstance(projection, Conv1D) else weight.T
    projection.weight = nn.Parameter(stored.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        projection.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    names = ("nx", "nf") if isinstance(projection, Conv1D) else ("in_features", "out_features")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(projection, name, size)


def kept_columns(layout: FamilyLayout, grid: HeadGrid, keep: Tensor) -> dict[str, Tensor]:
    """What a layer keeps of the projections that make queries, keys and values: sorted indices of their outputs, by name.

    ``keep`` bool [H]. A key-value head is kept as long as any query head that reads it is. Projections that stay whole are
    not named.
    """
    read = _readers(grid, keep) > 0
    kept = {"query": keep, "key": read, "value": read}
    left: dict[str, list[Tensor]] = {}
    for part, columns in _part_columns(layout, grid).items():
        if layout.joint_norms is not None and part != "value":
            continue
        left.setdefault(getattr(layout, part), []).append(columns[kept[part]].flatten())
    return {name: torch.cat(indices).sort().values for name, indices in left.items()}


def shrink_attention(model: PreTrainedModel, layer: int, keep: Tensor) -> None:
    """Removes from one layer of a dense model the heads that are false in ``keep`` (bool [H]), physically.

    The queries and output inputs of removed heads leave the matrices; keys and values leave them, and the cache, with the
    last query head that reads them. A layer without heads becomes an ``EmptiedAttention``, and the norm that only attention
    read is passed through unchanged.
    """
    layout, grid = layout_of(model), head_grid(model.config)
    block = blocks(model)[layer]
    attention: Any = block.get_submodule(layout.attention)
    output = attention.get_submodule(layout.output)
    if not keep.any():
        setattr(block, layout.attention, EmptiedAttention(output.bias, layer))
        if layout.attention_norm is not None and last_norms(model)[layer] is None:
            setattr(block, layout.attention_norm, nn.Identity())
        return
    for name, indices in kept_columns(layout, grid, keep).items():
        projection = attention.get_submodule(name)
        columns = indices.to(projection.weight.device)
        bias = None if projection.bias is None else projection.bias[columns]
        set_projection(projection, input_major_weight(projection)[:, columns], bias)
    rows = head_columns(keep, grid.head_size).to(output.weight.device)
    set_projection(output, input_major_weight(output)[rows], None)
    if layout.sinks is not None:
        sinks = attention.get_parameter(layout.sinks)
        kept = sinks[head_columns(keep, 1).to(sinks.device)].detach().clone()
        setattr(attention, layout.sinks, nn.Parameter(kept, requires_grad=False))
    if layout.joint_norms is not None:
        for name, heads in zip(layout.joint_norms, (keep, _readers(grid, keep) > 0), strict=True):
            attention.get_submodule(name).register_forward_hook(_Kept(head_columns(heads, grid.head_size)))
    group_sizes = live_groups(grid, keep)
    even = len(set(group_sizes)) == 1
    sizes = {
        "heads": sum(group_sizes),
        "width": len(rows),
        "kv_heads": len(group_sizes),
        "groups": group_sizes[0] if even else 1,
    }
    of_config = {}
    for attribute, what in layout.sizes.items():
        if attribute.startswith("config."):
            of_config[attribute.removeprefix("config.")] = sizes[what]
        else:
            setattr(attention, attribute, sizes[what])
    if not even:
        attention.register_buffer("kv_index", _kv_index(grid, keep, output.weight.device), persistent=False)
    if of_config or not even:
        attention.config = _LayerConfig(attention.config, of_config, even)


class _Kept:
    """A forward hook that hands on the features with the given indices, int64, of a module's output [.., F]."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.indices.device != output.device:
            self.indices = self.indices.to(output.device)
        return output.index_select(-1, self.indices)


def live_groups(grid: HeadGrid, keep: Tensor) -> list[int]:
    """For each key-value head that a layer keeps: how many of the kept query heads (bool [H]) read it."""
    return [count for count in _readers(grid, keep).tolist() if count]


def cut_heads(model: PreTrainedModel, keep: Tensor) -> None:
    """Removes from a dense model, in place, the heads that are false in ``keep`` (bool [L, H]); its config notes the rest.

    AssertionError if other heads are left than were to be.
    """
    for layer, kept in enumerate(keep):
        if not kept.all():
            shrink_attention(model, layer, kept)
    left = list(live_heads(model))
    if left != keep.sum(1).tolist():
        raise AssertionError(f"heads left per layer {left}, expected {keep.sum(1).tolist()}")
    model.config.kept_heads = [row.nonzero().flatten().tolist() for row in keep]


def kept_heads(config: Any) -> Tensor:
    """bool [L, H]: the heads that a model with this config has; all of them, unless ``kept_heads`` in it says otherwise.

    UnsupportedModelError where that names heads that its dense model has not.
    """
    grid = head_grid(config)
    keep = torch.ones(grid.n_layers, grid.n_heads, dtype=torch.bool, device="cpu")
    rows = getattr(config, "kept_heads", None)
    if rows is None:
        return keep
    if not isinstance(rows, list) or len(rows) != grid.n_layers:
        found = len(rows) if isinstance(rows, list) else repr(rows)
        raise UnsupportedModelError(f"kept_heads must be a list for each of the {grid.n_layers} layers, not {found}")
    for layer, heads in enumerate(rows):
        if not _indices_below(grid.n_heads, heads):
            raise UnsupportedModelError(
                f"kept_heads of layer {layer} must be different heads from 0 to {grid.n_heads - 1}, not {heads!r}"
            )
        keep[layer] = False
        for head in heads:
            keep[layer, head] = True
    return keep


def restore_output_rows(full: PreTrainedModel, compact: PreTrainedModel, layer: int, rows: Tensor) -> None:
    """Writes a pruned layer's output projection into the same layer of a full-size model, at the given input rows."""
    projection, pruned = output_projections(full)[layer], output_projections(compact)[layer]
    assert projection is not None
    weight, bias = input_major_weight(projection).clone(), getattr(projection, "bias", None)
    if pruned is None:
        bias = attentions(compact)[layer].bias
    else:
        weight[rows.to(weight.device)] = input_major_weight(pruned)
        bias = getattr(pruned, "bias", None)
    set_projection(projection, weight, bias)  # type: ignore[arg-type]


class EmptiedCacheLayer(DynamicLayer):
    """The cache of a layer without heads: no keys, no values, but it still knows how many tokens went by.

    Some caches ask layer 0 for the sequence length, so a layer that forgets it would shift every position.
    """

    def __init__(self, seen: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def count(self, hidden_states: Tensor) -> None:
        """Notes the tokens of ``hidden_states`` [B, T, E]."""
        if not self.is_initialized:
            self.lazy_initialization(hidden_states, hidden_states)
        self.seen += hidden_states.shape[1]

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.seen = max(0, self.seen - abs(tokens_to_remove))


class EmptiedAttention(nn.Module):
    """Attention of a layer that has lost all its heads: what is left is the output bias, if there is one, else zeros.

    Families name the argument that brings the cache differently; it is known by its class.
    """

    bias: Tensor | None

    def __init__(self, bias: Tensor | None, layer_idx: int) -> None:
        super().__init__()
        left = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", left)
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        key_values = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if key_values is not None:
            cache_layers: list[Any] = key_values.layers
            while len(cache_layers) <= self.layer_idx:
                cache_layers.append(EmptiedCacheLayer())
            if not isinstance(cache_layers[self.layer_idx], EmptiedCacheLayer):
                cache_layers[self.layer_idx] = EmptiedCacheLayer(cache_layers[self.layer_idx].get_seq_length())
            cache_layers[self.layer_idx].count(hidden_states)
        if self.bias is None:
            return torch.zeros_like(hidden_states), None
        return self.bias.expand_as(hidden_states), None


def live_heads(model: PreTrainedModel) -> Iterator[int]:
    """Number of heads that are physically present in each layer."""
    head_size = head_grid(model.config).head_size
    for projection in output_projections(model):
        yield 0 if projection is None else input_major_weight(projection).shape[0] // head_size


def _kv_heads(config: Any) -> int:
    return int(_read(config, "num_key_value_heads") or config.num_attention_heads)


def _read(config: Any, attribute: str) -> Any:
    """A config's attribute, None where it is not set or the family's own code does not read it."""
    return getattr(config, attribute, None) if attribute in LAYOUTS[str(family_of(config))].reads else None


def _has_module(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _readers(grid: HeadGrid, keep: Tensor) -> Tensor:
    """How many of the kept query heads (bool [H]) read each key-value head: int64 [K]."""
    return keep.view(grid.n_kv_heads, grid.group_size).sum(1)


def _kv_index(grid: HeadGrid, keep: Tensor, device: torch.device) -> Tensor:
    """Which of a layer's surviving key-value heads each of its surviving query heads reads, int64."""
    reads = [group for group, readers in enumerate(live_groups(grid, keep)) for _ in range(readers)]
    return torch.tensor(reads, device=device)


def _indices_below(count: int, values: Any) -> bool:
    """Whether ``values`` is a list of different whole numbers from 0 to ``count - 1``."""
    return (
        isinstance(values, list)
        and all(type(value) is int and 0 <= value < count for value in values)
        and len(set(values)) == len(values)
    )


def _part_columns(layout: FamilyLayout, grid: HeadGrid) -> dict[str, Tensor]:
    """For ``query``, ``key`` and ``value``: indices [heads, D] of each head's outputs in the projection that makes them."""
    counts = {"query": grid.n_heads, "key": grid.n_kv_heads, "value": grid.n_kv_heads}
    if layout.fused == "heads":
        every = torch.arange(3 * grid.n_heads * grid.head_size, device="cpu").view(grid.n_heads, 3, grid.head_size)
        return {part: every[:, number] for number, part in enumerate(counts)}
    columns, start = {}, 0
    for part, count in counts.items():
        columns[part] = start + torch.arange(count * grid.head_size, device="cpu").view(count, grid.head_size)
        start += count * grid.head_size if layout.fused == "parts" else 0
    return columns


class _LayerConfig:
    """The model's config as a smaller layer sees it: the same but for ``sizes``, and where its key-value groups are not
    even, attention is called through us.

    It refers to the model's own config, so that changing the attention implementation of that model, and of no other, is
    seen here as well. A copy of the model copies both together.
    """

    def __init__(self, config: Any, sizes: Mapping[str, int], even: bool) -> None:
        self.model_config = config
        self.even = even
        vars(self).update(sizes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("model_config", "even"):
            raise AttributeError(name)
        return getattr(self.model_config, name)

    @property
    def _attn_implementation(self) -> str:
        stock: str = self.model_config._attn_implementation
        if self.even:
            return stock
        name = f"uneven groups, {stock}"
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend_in_uneven_groups, stock))
        return name


def _attend_in_uneven_groups(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The stock attention ``implementation`` with every query head given its own key and value, [B, H, T, D].

    The stock functions take the same number of query heads per key-value head for granted; ``module.kv_index`` says which
    one each of the surviving query heads reads. A decoding step (T = 1) copies no keys or values, see ``attend_packed``.
    """
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if implementation == "sdpa" and query.shape[2] == 1 and shared_mask and not kwargs.get("dropout"):
        slots = query_slots(module)
        attended = attend_packed(query[:, :, 0], key, value, attention_mask, kwargs.get("scaling"), slots)
        return attended.unsqueeze(1), None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    index = module.get_buffer("kv_index")
    return attend(module, query, key.index_select(1, index), value.index_select(1, index), attention_mask, **kwargs)


def attend_packed(
    queries: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, slots: tuple[Tensor, int]
) -> Tensor:
    """Attention of one new token, queries [B, H, D] to [B, H, D]: the query heads of a group stand where tokens would.

    So every key-value head is read where it lies. Groups that are smaller than the largest are filled up with queries of
    zeros, whose answers nobody reads. ``slots`` are those of ``query_slots``.
    """
    batch, _, size = queries.shape
    places, largest = slots
    packed = queries.new_zeros(batch, key.shape[1] * largest, size)
    packed[:, places] = queries
    attended = nn.functional.scaled_dot_product_attention(
        packed.view(batch, key.shape[1], largest, size), key, value, attn_mask=mask, scale=scaling
    )
    return attended.reshape(batch, -1, value.shape[-1])[:, places]


def query_slots(module: Any) -> tuple[Tensor, int]:
    """Where each query head stands when every group has room for the largest, int64 [H], and how many that one has.

    Worked out at the first decoding step, from ``kv_index``, and kept: the copying of a model copies it too.
    """
    index = module.get_buffer("kv_index")
    known: tuple[Tensor, int] | None = module.__dict__.get("_packing")
    if known is None or known[0].device != index.device:
        counts = torch.bincount(index)
        largest = int(counts.max())
        places = torch.cat([torch.arange(int(count), device=index.device) for count in counts])
        known = index * largest + places, largest
        module.__dict__["_packing"] = known
    return known


# A pruned model as transformers knows it


@cache
def pruned_classes(family: str) -> tuple[type[Any], type[Any]]:
    """Config and model class of a family's pruned models: the family's own, with heads cut as the config says.

    The config is the dense model's with three more fields: ``kept_heads``, for each layer the heads that are left, and
    ``attention_output_biases`` and ``mlp_output_biases``, the layers in which an output projection has a bias, since
    adaptation may give it one that the family has not. The model is built dense, which costs nothing where it is built
    without memory, as ``from_pretrained`` does, and then cut by what cuts heads everywhere else.
    """
    config_base = CONFIG_MAPPING[family]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_base]
    body: dict[str, Any] = {"model_type": PRUNED + family, "__module__": __name__}
    config_class = type(f"Pruned{config_base.__name__}", (config_base,), body)
    body = {"config_class": config_class, "__module__": __name__}
    if LAYOUTS[family].soft_cap is not None:
        body["_supports_sdpa"] = False  # transformers 5.15 would take it by itself, and leave the cap out in silence
    return config_class, type(f"Pruned{model_base.__name__}", (_PrunedModel, model_base), body)


def __getattr__(name: str) -> Any:
    """The classes of ``pruned_classes`` by name: transformers asks this module for the one that a saved config names."""
    if name.startswith("Pruned"):
        for family in LAYOUTS:
            for made in pruned_classes(family):
                if made.__name__ == name:
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _PrunedModel:
    """What the model classes of ``pruned_classes`` add to their family's."""

    config: Any

    def __init__(self, config: Any, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)  # type: ignore[call-arg]
        model: Any = self
        cut_heads(model, kept_heads(config))
        _give_biases(model)

    def initialize_weights(self) -> None:
        """Also writes what follows from the config and is not stored: transformers leaves such buffers unwritten."""
        super().initialize_weights()  # type: ignore[misc]
        model: Any = self
        grid, keep = head_grid(model.config), kept_heads(model.config)
        for layer, attention in enumerate(attentions(model)):
            if hasattr(attention, "kv_index"):
                device = attention.get_buffer("kv_index").device
                attention.kv_index = _kv_index(grid, keep[layer], device)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **settings: Any) -> None:
        """Also saves this file, with which the model is loaded again."""
        module = MODELING_FILE.removesuffix(".py")
        config_class, model_class = pruned_classes(str(family_of(self.config)))
        self.config.auto_map = {
            "AutoConfig": f"{module}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
        }
        super().save_pretrained(save_directory, *arguments, **settings)  # type: ignore[misc]
        target = Path(save_directory) / MODELING_FILE
        if not target.exists() or not target.samefile(__file__):
            shutil.copyfile(__file__, target)


def _give_biases(model: PreTrainedModel) -> None:
    """Gives output projections the biases that the config says they have; those the family has not are zero until loaded."""
    for field, found in (
        ("attention_output_biases", attention_outputs(model)),
        ("mlp_output_biases", mlp_output_projections(model)),
    ):
        layers = getattr(model.config, field, None) or []
        if not _indices_below(len(found), layers):
            raise UnsupportedModelError(f"{field} must be different layers from 0 to {len(found) - 1}, not {layers!r}")
        for layer in layers:
            owner = found[layer]
            if owner is None:
                raise UnsupportedModelError(f"{field} names layer {layer}, whose MLP is a mixture of experts")
            if getattr(owner, "bias", None) is None:
                width, like = model.config.hidden_size, next(model.parameters())
                owner.bias = nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device), requires_grad=False)


def attention_outputs(model: PreTrainedModel) -> list[nn.Module]:
    """What holds the output bias of every layer's attention: its output projection, or what is left of an emptied layer."""
    pairs = zip(output_projections(model), attentions(model), strict=True)
    return [attention if projection is None else projection for projection, attention in pairs]
