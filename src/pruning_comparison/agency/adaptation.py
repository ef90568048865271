"""Adaptation: the survivors' output projections are refitted, in closed form, so that the residual stream is kept.

Dimension letters: N windows, T time, E embedding, F features (surviving heads x head size), S = N * T samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.measure.memory import PeakMemory
from pruning_comparison.models.heads import (
    EmptiedAttention,
    attentions,
    blocks,
    input_major_weight,
    output_projections,
    set_projection,
)


@dataclass(frozen=True)
class AdaptationCost:
    """What adapting one model cost: seconds, calibration tokens, and peak memory (None with a reason if not measured)."""

    seconds: float
    tokens: int
    peak_memory_bytes: int | None
    peak_memory_reason: str | None


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for is known."""


@torch.inference_mode()
def refit_output_projections(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    *,
    ridge: float,
    batch_size: int,
    measure_peak: bool = False,
) -> AdaptationCost:
    """Refits, in place, the attention output projections of a physically pruned model towards its dense original.

    Both models walk the layers in lock-step over the calibration ``windows`` [N, T] of token ids. At each layer the target
    is the dense model's residual stream after attention, less the pruned model's before it:
    T = dense attention output + (dense residual - pruned residual), so that later layers make up for what earlier ones
    lost. With X [S, F] the surviving heads' outputs in the *pruned* model, centred, and W [F, E] the original weights,

        dW = (X'X + lambda I)^-1 X'(T - X W),  bias = mean(T) - mean(X) (W + dW),  lambda = ridge * mean diagonal of X'X,

    ridge regression towards the original weights (Hoerl and Kennard 1970, shrunk to a prior other than zero). A layer
    without heads keeps its bias term, refitted to mean(T). Sums accumulate in float64 from products in the model's dtype,
    which must be float32 or better, and are solved in float64; a singular matrix gets more ridge until the solution is
    finite. Layers before the first pruned one are untouched.

    ValueError if a model is not float32 or float64, or if the output projections have no bias to refit.
    """
    if dense.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adaptation needs float32 weights, got {dense.dtype}: coarser streams cannot be accumulated")
    started = time.perf_counter()
    with PeakMemory(dense.device, enabled=measure_peak) as peak:
        batches = [batch.to(dense.device) for batch in windows.split(batch_size)]
        dense_stream = _block_inputs(dense, batches)
        pruned_stream = [_BlockInput(entry.hidden, entry.args, entry.kwargs) for entry in dense_stream]
        changed = False
        for layer, (dense_block, pruned_block) in enumerate(zip(blocks(dense), blocks(pruned), strict=True)):
            changed = changed or _is_pruned(dense, pruned, layer)
            if changed:
                targets = [
                    residual - entry.hidden
                    for residual, entry in zip(_after_attention(dense, layer, dense_stream), pruned_stream, strict=True)
                ]
                _refit_layer(pruned, layer, pruned_stream, targets, ridge)
            for dense_entry, pruned_entry in zip(dense_stream, pruned_stream, strict=True):
                dense_entry.advance(dense_block)
                if changed:
                    pruned_entry.advance(pruned_block)
                else:
                    pruned_entry.hidden = dense_entry.hidden
    return AdaptationCost(time.perf_counter() - started, windows.numel(), peak.bytes, peak.reason)


def ridge_towards(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The weights [F, E] that minimise |T - X V|^2 + lambda |V - W|^2, lambda = ridge * mean diagonal of the Gram matrix.

    ``gram`` X'X [F, F] and ``cross`` X'T [F, E] are centred float64 sums; ``weight`` W [F, E]. Always finite: where the
    Cholesky factor does not exist or the solution overflows, the ridge grows tenfold.
    """
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        return weight.double()
    right = cross - gram @ weight.double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    strength = ridge
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + strength * scale * identity)
        if not bool(failed):
            solution = weight.double() + torch.cholesky_solve(right, factor)
            if bool(torch.isfinite(solution).all()):
                return solution
        if strength > 1e12:
            return weight.double()
        strength *= 10


@dataclass
class _BlockInput:
    """The hidden states [B, T, E] that enter a block, and what else the model hands to its blocks."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        output: Any = block(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def advance(self, block: nn.Module) -> None:
        self.hidden = self.run(block)


def _block_inputs(model: PreTrainedModel, batches: list[Tensor]) -> list[_BlockInput]:
    """What the first block receives, per batch: the model's own code makes masks and positions, not ours."""
    caught: list[_BlockInput] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_BlockInput(args[0], args[1:], kwargs))
        raise _Stop

    handle = blocks(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(input_ids=batch, use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return caught


def _is_pruned(dense: PreTrainedModel, pruned: PreTrainedModel, layer: int) -> bool:
    before, after = output_projections(dense)[layer], output_projections(pruned)[layer]
    return after is None or before is None or before.weight.shape != after.weight.shape


def _after_attention(model: PreTrainedModel, layer: int, stream: list[_BlockInput]) -> Iterator[Tensor]:
    """The residual stream between attention and MLP of one block, per batch."""
    block, attention = blocks(model)[layer], attentions(model)[layer]
    for entry in stream:
        with _stop_after(attention) as outputs:
            entry.run(block)
        yield entry.hidden + outputs[0]


def _refit_layer(
    model: PreTrainedModel, layer: int, stream: list[_BlockInput], targets: list[Tensor], ridge: float
) -> None:
    attention = attentions(model)[layer]
    samples = sum(target.shape[0] * target.shape[1] for target in targets)
    # Activations can be far from zero compared with their spread: products are taken around the first batch's means, or
    # float32 would lose in the mean what the regression needs of the spread. Centring later is exact for any shift.
    target_shift = targets[0].mean((0, 1))
    target_sum = sum((target - target_shift).double().sum((0, 1)) for target in targets)
    assert isinstance(target_sum, Tensor)
    target_mean = target_shift.double() + target_sum / samples
    if isinstance(attention, EmptiedAttention):
        if attention.bias is None:
            return
        attention.bias = nn.Parameter(target_mean.to(attention.bias), requires_grad=False)
        return
    projection = output_projections(model)[layer]
    assert projection is not None
    if getattr(projection, "bias", None) is None:
        raise ValueError("the output projection has no bias; the bias-free refit is not part of this version")
    weight = input_major_weight(projection)
    features, outputs = weight.shape
    gram = torch.zeros(features, features, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(features, outputs, dtype=torch.float64, device=weight.device)
    input_sum = torch.zeros(features, dtype=torch.float64, device=weight.device)
    input_shift: Tensor | None = None
    block = blocks(model)[layer]
    for entry, target in zip(stream, targets, strict=True):
        with _stop_before(projection) as inputs:
            entry.run(block)
        x = inputs[0].flatten(0, 1)
        if input_shift is None:
            input_shift = x.mean(0)
        x = x - input_shift
        gram += (x.T @ x).double()
        cross += (x.T @ (target.flatten(0, 1) - target_shift)).double()
        input_sum += x.double().sum(0)
    gram -= torch.outer(input_sum, input_sum) / samples
    cross -= torch.outer(input_sum, target_sum) / samples
    solution = ridge_towards(gram, cross, weight, ridge)
    assert input_shift is not None
    bias = target_mean - (input_shift.double() + input_sum / samples) @ solution
    set_projection(projection, solution.to(weight), bias.to(weight))


@contextmanager
def _stop_before(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the forward pass ends where ``module`` starts, and the list holds the module's input."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])
        raise _Stop

    yield from _with_hook(module.register_forward_pre_hook(hook), caught)


@contextmanager
def _stop_after(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the forward pass ends where ``module`` ends, and the list holds the module's first output."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        caught.append(outputs[0] if isinstance(outputs, tuple) else outputs)
        raise _Stop

    yield from _with_hook(module.register_forward_hook(hook), caught)


def _with_hook(handle: Any, caught: list[Tensor]) -> Iterator[list[Tensor]]:
    try:
        yield caught
    except _Stop:
        pass
    finally:
        handle.remove()
