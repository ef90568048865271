"""Cutting heads, reversibly (``masked``) or for real (``compact``)."""

from __future__ import annotations

import copy
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import (
    Part,
    cut_heads,
    head_columns,
    head_grid,
    input_major_weight,
    mlp_output_projections,
    norms_of_outputs,
    output_projections,
    restore_output_rows,
    set_projection,
)


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules that shares every parameter and buffer with the original.

    Pruning then replaces only what it changes, so that variants cost no more memory than their differences.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def converted_copy(
    model: PreTrainedModel, dtype: torch.dtype, *, like: tuple[PreTrainedModel, PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A copy of the model whose parameters are in ``dtype``; buffers keep their precision.

    ``like`` is a model and its converted copy: parameters that ``model`` shares with the former, the copy shares with the
    latter, so that what pruning has left alone is converted, and held, once.

    ``model.to(dtype)`` would round the rotary frequencies as well, which transformers keeps in float32 whatever the
    weights are loaded in: by position 500 the angles would be wrong by a radian in bfloat16.
    """
    known = {}
    if like is not None:
        known = {id(p): q for p, q in zip(like[0].parameters(), like[1].parameters(), strict=True) if q.dtype == dtype}
    converted: dict[int, Any] = {
        id(parameter): known[id(parameter)]
        if id(parameter) in known
        else nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, converted)


def remove_heads(model: PreTrainedModel, keep: Tensor) -> PreTrainedModel:
    """A pruned copy of a dense model: heads that are false in ``keep`` (bool [L, H]) are physically gone.

    Matrices and key-value cache shrink; a layer may lose all its heads. The original is unchanged and shares what is
    left alone. The copy's config notes which heads are left.
    """
    _check_mask(model, keep)
    pruned = sharing_copy(model)
    cut_heads(pruned, keep)
    return pruned


def masked_copy(dense: PreTrainedModel, compact: PreTrainedModel, keep: Tensor) -> PreTrainedModel:
    """The dense model with the output projections of a physically pruned one written into its rows of surviving heads, and
    that model's MLP output projections and norms of what these add.

    With the gates of the other heads closed (``mask_heads``) it computes what ``compact`` computes, at full size. A layer
    that has lost no head may have been refitted too.
    """
    _check_mask(dense, keep)
    copied = sharing_copy(dense)
    grid = head_grid(dense.config)
    projections = zip(output_projections(dense), output_projections(compact), strict=True)
    for layer, (before, after) in enumerate(projections):
        if before is None or after is None or before.weight is not after.weight:
            restore_output_rows(copied, compact, layer, head_columns(keep[layer], grid.head_size))
    mlps = zip(mlp_output_projections(copied), mlp_output_projections(compact), strict=True)
    for before, after in mlps:
        if before is not None and after is not None and before.weight is not after.weight:
            set_projection(before, input_major_weight(after), getattr(after, "bias", None))
    for part in get_args(Part):
        for norm, adapted in zip(norms_of_outputs(copied, part), norms_of_outputs(compact, part), strict=True):
            if norm is not None and adapted is not None:
                norm.weight = adapted.weight
    return copied


class HeadGates:
    """Multiplies every head's output by its gate until ``remove`` is called. Also a context manager."""

    def __init__(self, model: PreTrainedModel, gates: Tensor) -> None:
        """``gates`` [L, H] in [0, 1]; ValueError for any other shape or value."""
        grid = head_grid(model.config)
        if gates.shape != (grid.n_layers, grid.n_heads):
            raise ValueError(f"gates have shape {tuple(gates.shape)}, expected {(grid.n_layers, grid.n_heads)}")
        if not bool(((gates >= 0) & (gates <= 1)).all()):
            raise ValueError(f"gates must lie in [0, 1], got {gates.min().item()} to {gates.max().item()}")
        self.gates = gates.detach().clone()
        self._handles = []
        for projection, layer_gates in zip(output_projections(model), self.gates, strict=True):
            if projection is None:
                raise ValueError("gates need a model with all its heads; this one has been pruned physically")
            if bool((layer_gates == 1).all()):
                continue
            weight = projection.get_parameter("weight")
            factors = layer_gates.repeat_interleave(grid.head_size).to(weight)
            self._handles.append(projection.register_forward_pre_hook(_Multiply(factors)))

    def remove(self) -> None:
        """Opens all gates again: the model is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeadGates:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Multiply:
    """A forward pre-hook that multiplies the first input, [.., H * D], by fixed factors [H * D]."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * self.factors.to(inputs[0].dtype), *inputs[1:])


def mask_heads(model: PreTrainedModel, keep: Tensor) -> HeadGates:
    """Closes the gates of the heads that are false in ``keep`` (bool [L, H]); undo with ``.remove()`` or as a context."""
    _check_mask(model, keep)
    return HeadGates(model, keep.float())


def _check_mask(model: PreTrainedModel, keep: Tensor) -> None:
    grid = head_grid(model.config)
    if keep.dtype != torch.bool or keep.shape != (grid.n_layers, grid.n_heads):
        raise ValueError(
            f"the keep mask must be bool {(grid.n_layers, grid.n_heads)}, got {keep.dtype} {tuple(keep.shape)}"
        )
