"""Where each architecture keeps its attention heads: the only file that knows.

Dimension letters: L layers, H query heads, D head size, E embedding, B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from pruning_comparison.errors import ModelLoadError


@dataclass(frozen=True)
class Layout:
    """Where one family keeps its attention.

    ``layers`` leads from the model to its list of blocks, ``attention`` from a block to its attention module; ``fused_qkv``
    and ``output`` name projections inside the attention module. ``fused_qkv`` holds all queries, then all keys, then all
    values. ``sizes`` gives the attributes that the family's own ``forward`` reads, and what each counts.
    """

    layers: str
    attention: str
    fused_qkv: str
    output: str
    sizes: Mapping[str, str]


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "gpt2": Layout(
            layers="transformer.h",
            attention="attn",
            fused_qkv="c_attn",
            output="c_proj",
            sizes=MappingProxyType({"num_heads": "heads", "split_size": "width"}),
        ),
    }
)
"""Layout by the ``model_type`` of the Hugging Face config."""


@dataclass(frozen=True)
class HeadGrid:
    """How many heads a model has: L layers of H query heads of size D each."""

    n_layers: int
    n_heads: int
    head_size: int

    @property
    def total(self) -> int:
        return self.n_layers * self.n_heads

    def all_heads(self) -> Tensor:
        """bool [L, H], all true: the keep mask of the dense model."""
        return torch.ones(self.n_layers, self.n_heads, dtype=torch.bool)


def check_supported(config: Any) -> None:
    """Raises ModelLoadError where the config's architecture has no layout, or has parts that pruning would break."""
    model_type = getattr(config, "model_type", None)
    if model_type not in LAYOUTS:
        raise ModelLoadError(
            f"architecture {model_type!r} is not supported. Supported model types: {', '.join(sorted(LAYOUTS))}. "
            "Choose a model of one of these families."
        )
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(
            "the model has cross-attention; only decoder-only causal language models can be compared. "
            "Choose one whose config has add_cross_attention off."
        )


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a loaded model's architecture; ModelLoadError if there is none."""
    check_supported(model.config)
    return LAYOUTS[model.config.model_type]


def head_grid(config: Any) -> HeadGrid:
    """Heads of the *dense* model, as its config states them."""
    check_supported(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadGrid(config.num_hidden_layers, config.num_attention_heads, head_size)


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


def input_major_weight(projection: nn.Module) -> Tensor:
    """The weight as [inputs, outputs], whichever way the module stores it. A view: writing to it writes the module."""
    weight = projection.get_parameter("weight")
    return weight if isinstance(projection, Conv1D) else weight.T


def head_parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Weights of one layer of a dense model by head: ``query``, ``key``, ``value`` [H, E, D] and ``output`` [H, D, E]."""
    layout, grid = layout_of(model), head_grid(model.config)
    attention = attentions(model)[layer]
    fused = input_major_weight(attention.get_submodule(layout.fused_qkv))
    by_head = fused.unflatten(1, (3, grid.n_heads, grid.head_size)).permute(1, 2, 0, 3)
    output = input_major_weight(attention.get_submodule(layout.output)).unflatten(0, (grid.n_heads, grid.head_size))
    return {"query": by_head[0], "key": by_head[1], "value": by_head[2], "output": output}


def head_columns(heads: Tensor, head_size: int) -> Tensor:
    """Indices of the features of the heads that are true in ``heads`` (bool [H]) in an [.., H * D] activation."""
    return heads.repeat_interleave(head_size).nonzero().squeeze(1)


def set_projection(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces a projection's parameters by ``weight`` [inputs, outputs] and ``bias`` [outputs], whatever their old sizes.

    New parameters are made, so that a module that shares its old ones with another model does not change that model.
    """
    stored = weight if isinstance(projection, Conv1D) else weight.T
    projection.weight = nn.Parameter(stored.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        projection.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    names = ("nx", "nf") if isinstance(projection, Conv1D) else ("in_features", "out_features")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(projection, name, size)


def shrink_attention(model: PreTrainedModel, layer: int, keep: Tensor) -> None:
    """Removes from one layer of a dense model the heads that are false in ``keep`` (bool [H]), physically.

    The queries, keys, values and output inputs of removed heads leave the matrices, and so do their keys and values the
    cache. A layer without heads becomes an ``EmptiedAttention``.
    """
    layout, grid = layout_of(model), head_grid(model.config)
    block = blocks(model)[layer]
    attention: Any = block.get_submodule(layout.attention)
    output = attention.get_submodule(layout.output)
    if not keep.any():
        setattr(block, layout.attention, EmptiedAttention(output.bias, layer))
        return
    columns = head_columns(keep, grid.head_size).to(output.weight.device)
    width = grid.n_heads * grid.head_size
    fused = attention.get_submodule(layout.fused_qkv)
    fused_columns = torch.cat([columns + part * width for part in range(3)])
    set_projection(fused, input_major_weight(fused)[:, fused_columns], fused.bias[fused_columns])
    set_projection(output, input_major_weight(output)[columns], output.bias)
    sizes = {"heads": int(keep.sum()), "width": len(columns)}
    for attribute, what in layout.sizes.items():
        setattr(attention, attribute, sizes[what])


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
    """Attention of a layer that has lost all its heads: what is left is the output bias, if the family has one."""

    bias: Tensor | None

    def __init__(self, bias: Tensor | None, layer_idx: int) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            cache_layers: list[Any] = past_key_values.layers
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
    attribute = next(name for name, what in layout_of(model).sizes.items() if what == "heads")
    for attention in attentions(model):
        yield 0 if isinstance(attention, EmptiedAttention) else int(getattr(attention, attribute))
