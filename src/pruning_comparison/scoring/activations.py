"""Scores from what heads hand to their output projection: Wanda and FLAP.

Dimension letters: N windows, L layers, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import (
    head_grid,
    input_major_weight,
    live_heads,
    output_projections,
)


@dataclass(frozen=True)
class _Features:
    """Means of x and of x^2, float64 [L, H, D], of what every head hands to its output projection."""

    mean: Tensor
    mean_square: Tensor


@torch.inference_mode()
def _head_features(model: PreTrainedModel, windows: Tensor, batch_size: int) -> _Features:
    """Over all positions of ``windows`` [N, T]. ValueError for a model that has lost heads physically."""
    grid = head_grid(model.config)
    sums = torch.zeros(2, grid.n_layers, grid.n_heads * grid.head_size, dtype=torch.float64)

    def add(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[0, layer] += x.sum(0).cpu()
            sums[1, layer] += x.square().sum(0).cpu()

        return hook

    handles = []
    try:
        for layer, projection in enumerate(_whole_projections(model)):
            handles.append(projection.register_forward_pre_hook(add(layer)))
        for batch in windows.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    mean, mean_square = (sums / windows.numel()).unflatten(-1, (grid.n_heads, grid.head_size))
    return _Features(mean, mean_square)


def _whole_projections(model: PreTrainedModel) -> list[nn.Module]:
    """Every layer's output projection; ValueError for a model that has lost heads physically."""
    heads = head_grid(model.config).n_heads
    found = [
        projection
        for projection, live in zip(output_projections(model), live_heads(model), strict=True)
        if projection is not None and live == heads
    ]
    if len(found) != head_grid(model.config).n_layers:
        raise ValueError("scores need a model with all its heads; this one has been pruned physically")
    return found


def _output_weights(model: PreTrainedModel) -> Tensor:
    """The output projections by head, float64 [L, H, D, E]."""
    grid = head_grid(model.config)
    weights = [input_major_weight(projection).double().cpu() for projection in _whole_projections(model)]
    by_head: Tensor = torch.stack(weights).unflatten(1, (grid.n_heads, grid.head_size))
    return by_head


def score_wanda(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """Sum over a head's slice of the output projection of |W_ij| * |X_j|, [L, H]: weights times what they are fed with.

    |X_j| is the root mean square of the head's feature j over the calibration tokens. The criterion of Sun et al. (2024, "A
    simple and effective pruning approach for large language models", Wanda), which is meant for single weights, summed over
    a head as An et al. (2024) do for comparison. Their method ranks within a layer; between layers the sums are compared as
    they are, unless ``scope`` is "layer".
    """
    features = _head_features(model, windows, batch_size)
    return (_output_weights(model).abs().sum(-1) * features.mean_square.sqrt()).sum(-1)


def score_flap(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """How much a head's features vary, weighed by the output projection and standardised over its layer's features, [L, H].

        m_j = (Var(X_j) * |W_j|^2)^2,   z_j = (m_j - mean of the layer's m) / their standard deviation,
        score = mean over the head's features j of z_j,

    W_j being the row of the output projection that reads feature j: An et al. (2024, "Fluctuation-based adaptive structured
    pruning for large language models", FLAP) as their code has it (metric WIFV, structure AL-AM), attention alone. A head
    that hardly varies can be replaced by a constant: their compensation is ``adaptation`` "bias". Heads whose output never
    changes, as that of masked ones, are left out of mean and deviation and score below all others.
    """
    features = _head_features(model, windows, batch_size)
    variance = (features.mean_square - features.mean.square()).clamp(min=0) * windows.numel() / (windows.numel() - 1)
    metric = (_output_weights(model).square().sum(-1) * variance).square()  # [L, H, D]
    scores = torch.zeros(metric.shape[:2], dtype=torch.float64)
    live = (metric > 0).any(-1)
    for layer, varies in enumerate(live):
        values = metric[layer, varies]
        deviation = values.std() if values.numel() > 1 else torch.zeros(())
        if deviation > 0:
            scores[layer, varies] = ((values - values.mean()) / deviation).mean(-1)
    return torch.where(live, scores, scores.min() - 1)
