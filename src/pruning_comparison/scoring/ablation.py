"""Scores by cutting every head alone.

Dimension letters: N windows, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models.heads import (
    blocks,
    head_grid,
    output_projections,
)
from pruning_comparison.pruning.surgery import mask_heads


def score_ablation(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """What cutting each head alone adds to the loss over ``windows`` [N, T], in mean nats per token, [L, H].

    Exact where the other methods estimate, blind to what heads do for one another like them, and slow: the reference for the
    others. Negative where the model is better without the head. A head whose output is zero for every token, as that of a
    masked head, costs nothing and is not tried.

    Blocks before the head's own do not change, so each trial starts from what they left: L * H half passes on average.
    """
    keep = head_grid(model.config).all_heads()
    nats = torch.zeros(keep.shape, dtype=torch.float64)
    tokens = 0
    for batch in windows.split(batch_size):

        def loss(batch: Tensor = batch) -> float:
            return float(window_losses(model, list(batch), batch_size=batch_size)[0].sum())

        with recorded_blocks(model) as outputs, _watched_for_silence(model) as silent:
            dense = loss()
        tokens += batch.shape[0] * (batch.shape[1] - 1)
        for layer, head in (~silent).nonzero().tolist():
            keep[layer, head] = False
            with mask_heads(model, keep), resumed_at(model, layer, outputs):
                nats[layer, head] += loss() - dense
            keep[layer, head] = True
    return nats / tokens


@contextmanager
def recorded_blocks(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Within it, one forward pass records what each block returns."""
    outputs: list[Any] = [None] * len(blocks(model))

    def keep_output(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    handles = [block.register_forward_hook(keep_output(layer)) for layer, block in enumerate(blocks(model))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_for_silence(model: PreTrainedModel) -> Iterator[Tensor]:
    """Within it, one forward pass of a model with all its heads tells which of them write nothing: bool [L, H]."""
    grid = head_grid(model.config)
    silent = ~grid.all_heads()

    def look_for_silence(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            written = inputs[0].unflatten(-1, (-1, grid.head_size)).abs().amax((0, 1, 3))
            silent[layer] = (written == 0).cpu()

        return hook

    handles = [
        projection.register_forward_pre_hook(look_for_silence(layer))
        for layer, projection in enumerate(output_projections(model))
        if projection is not None
    ]
    try:
        yield silent
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed_at(model: PreTrainedModel, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Within it, the blocks before ``layer`` return their recorded ``outputs`` and compute nothing."""
    before = blocks(model)[:layer]
    for block, output in zip(before, outputs, strict=False):
        block.forward = lambda *args, recorded=output, **kwargs: recorded
    try:
        yield
    finally:
        for block in before:
            del block.forward
