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
    has_parallel_blocks,
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


@torch.no_grad()
def refit_output_projections(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    *,
    ridge: float,
    batch_size: int,
    measure_peak: bool = False,
    allow_new_bias: bool = True,
) -> AdaptationCost:
    """Refits, in place, the attention output projections of a physically pruned model towards its dense original.

    Both models walk the layers in lock-step over the calibration ``windows`` [N, T] of token ids. At each layer the target
    is what attention has to add for the pruned model's residual stream to meet the dense model's, so that later layers make
    up for what earlier ones lost. With h the stream that enters a block, A what attention and M what the MLP adds, it is

        T = A_dense + (h_dense - h_pruned)                                 where the MLP reads what attention has added to,
        T = (h_dense + A_dense + M_dense) - (h_pruned + M_pruned)          where both read h and are added up together:

    there M_pruned does not depend on attention, so the block's whole output can be met. With X [S, F] the surviving heads'
    outputs in the *pruned* model, centred, and W [F, E] the original weights,

        dW = (X'X + lambda I)^-1 X'(T - X W),  bias = mean(T) - mean(X) (W + dW),  lambda = ridge * mean diagonal of X'X,

    ridge regression towards the original weights (Hoerl and Kennard 1970, shrunk to a prior other than zero). A layer
    without heads keeps its bias term, refitted to mean(T). Where the family has no output bias, one is added, unless
    ``allow_new_bias`` is off: then X is not centred and there is no bias, and a layer without heads goes on adding nothing.

    Sums accumulate in float64 from products in the model's dtype, which must be float32 or better, and are solved in
    float64; a singular matrix gets more ridge until the solution is finite. Layers before the first pruned one are
    untouched.

    ValueError if a model is not float32 or float64.
    """
    if dense.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adaptation needs float32 weights, got {dense.dtype}: coarser streams cannot be accumulated")
    started = time.perf_counter()
    with PeakMemory(dense.device, enabled=measure_peak) as peak:
        batches = [batch.to(dense.device) for batch in windows.split(batch_size)]
        dense_stream = _block_inputs(dense, batches)
        pruned_stream = [_Stream(entry.hidden, entry.calls) for entry in dense_stream]
        changed = False
        for layer in range(len(blocks(dense))):
            changed = changed or _is_pruned(dense, pruned, layer)
            if not changed:
                for dense_entry, pruned_entry in zip(dense_stream, pruned_stream, strict=True):
                    pruned_entry.hidden = dense_entry.hidden = dense_entry.run(dense, layer)
                continue
            targets = [
                _target(dense, pruned, layer, dense_entry, pruned_entry)
                for dense_entry, pruned_entry in zip(dense_stream, pruned_stream, strict=True)
            ]
            _refit_layer(pruned, layer, pruned_stream, targets, ridge, allow_new_bias)
            for entry in pruned_stream:
                entry.hidden = entry.run(pruned, layer)
    return AdaptationCost(time.perf_counter() - started, windows.numel(), peak.bytes, peak.reason)


def ridge_towards(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The weights [F, E] that minimise |T - X V|^2 + lambda |V - W|^2, lambda = ridge * mean diagonal of the Gram matrix.

    ``gram`` X'X [F, F] and ``cross`` X'T [F, E] are float64 sums, centred if a bias takes up the means; ``weight`` W [F, E].
    Always finite: where the Cholesky factor does not exist or the solution overflows, the ridge grows tenfold.
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
class _Stream:
    """The residual stream [B, T, E] of one batch before a block, and what else the model hands to each of its blocks."""

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, model: PreTrainedModel, layer: int) -> Tensor:
        """The stream after the block."""
        args, kwargs = self.calls[layer]
        output: Any = blocks(model)[layer](self.hidden, *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def run_apart(self, model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
        """The stream after the block, and what its attention adds."""
        caught: list[Tensor] = []
        handle = attentions(model)[layer].register_forward_hook(
            lambda module, inputs, outputs: caught.append(outputs[0])
        )
        try:
            return self.run(model, layer), caught[0]
        finally:
            handle.remove()


def _block_inputs(model: PreTrainedModel, batches: list[Tensor]) -> list[_Stream]:
    """What the blocks receive, per batch: the model's own code makes masks and positions, not ours.

    Masks may differ between layers (sliding windows), but not between batches of one shape: nothing is padded.
    """
    every_block = blocks(model)
    calls_by_shape: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    streams: list[_Stream] = []
    for batch in batches:
        known = batch.shape in calls_by_shape
        calls = calls_by_shape.setdefault(batch.shape, [])
        last = every_block[0] if known else every_block[-1]
        hidden: list[Tensor] = []

        def catch(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            *,
            known: bool = known,
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = calls,
            last: nn.Module = last,
            hidden: list[Tensor] = hidden,
        ) -> None:
            hidden.append(args[0])
            if not known:
                calls.append((args[1:], kwargs))
            if module is last:
                raise _Stop

        handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in every_block]
        try:
            model(input_ids=batch, use_cache=False)
        except _Stop:
            streams.append(_Stream(hidden[0], calls))
        finally:
            for handle in handles:
                handle.remove()
    return streams


def _is_pruned(dense: PreTrainedModel, pruned: PreTrainedModel, layer: int) -> bool:
    before, after = output_projections(dense)[layer], output_projections(pruned)[layer]
    return after is None or before is None or before.weight.shape != after.weight.shape


def _target(
    dense: PreTrainedModel, pruned: PreTrainedModel, layer: int, dense_entry: _Stream, pruned_entry: _Stream
) -> Tensor:
    """What the pruned layer's attention should add to one batch, [B, T, E]. Moves the dense stream on past the block."""
    before = dense_entry.hidden
    after, added = dense_entry.run_apart(dense, layer)
    dense_entry.hidden = after
    if not has_parallel_blocks(dense):
        return before + added - pruned_entry.hidden
    pruned_after, pruned_added = pruned_entry.run_apart(pruned, layer)
    return after - (pruned_after - pruned_added)


def _refit_layer(
    model: PreTrainedModel,
    layer: int,
    stream: list[_Stream],
    targets: list[Tensor],
    ridge: float,
    allow_new_bias: bool,
) -> None:
    attention = attentions(model)[layer]
    samples = sum(target.shape[0] * target.shape[1] for target in targets)
    # Activations can be far from zero compared with their spread: products are taken around the first batch's means, or
    # float32 would lose in the mean what the regression needs of the spread. Moving to any other centre later is exact.
    target_shift = targets[0].mean((0, 1))
    target_sum = sum((target - target_shift).double().sum((0, 1)) for target in targets)
    assert isinstance(target_sum, Tensor)
    target_mean = target_shift.double() + target_sum / samples
    if isinstance(attention, EmptiedAttention):
        if attention.bias is not None or allow_new_bias:
            attention.bias = nn.Parameter(target_mean.to(targets[0]), requires_grad=False)
        return
    projection = output_projections(model)[layer]
    assert projection is not None
    with_bias = getattr(projection, "bias", None) is not None or allow_new_bias
    weight = input_major_weight(projection)
    features, outputs = weight.shape
    gram = torch.zeros(features, features, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(features, outputs, dtype=torch.float64, device=weight.device)
    input_sum = torch.zeros(features, dtype=torch.float64, device=weight.device)
    input_shift: Tensor | None = None
    for entry, target in zip(stream, targets, strict=True):
        with _stop_before(projection) as inputs:
            entry.run(model, layer)
        x = inputs[0].flatten(0, 1)
        if input_shift is None:
            input_shift = x.mean(0)
        x = x - input_shift
        gram += (x.T @ x).double()
        cross += (x.T @ (target.flatten(0, 1) - target_shift)).double()
        input_sum += x.double().sum(0)
    assert input_shift is not None
    input_mean = input_shift.double() + input_sum / samples
    gram -= torch.outer(input_sum, input_sum) / samples
    cross -= torch.outer(input_sum, target_sum) / samples
    if not with_bias:
        gram += samples * torch.outer(input_mean, input_mean)
        cross += samples * torch.outer(input_mean, target_mean)
    solution = ridge_towards(gram, cross, weight, ridge)
    bias = (target_mean - input_mean @ solution).to(weight) if with_bias else None
    set_projection(projection, solution.to(weight), bias)


@contextmanager
def _stop_before(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the forward pass ends where ``module`` starts, and the list holds the module's input."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield caught
    except _Stop:
        pass
    finally:
        handle.remove()
