"""Scores from weights alone, and the random control: ``score_<method>(...) -> float [L, H]``, higher = keep.

Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.models.heads import (
    head_grid,
    head_parameters,
)


def score_random(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    """Uniform random scores [L, H]: the control that any method has to beat."""
    grid = head_grid(model.config)
    return torch.rand(grid.n_layers, grid.n_heads, generator=generator, dtype=torch.float64)


def score_magnitude(model: PreTrainedModel) -> Tensor:
    """Euclidean norm of each head's query, key, value and output weights together, [L, H].

    The classic criterion of Han et al. (2015, "Learning both weights and connections") on whole heads; biases are left out.
    """
    rows = []
    for layer in range(head_grid(model.config).n_layers):
        parts = head_parameters(model, layer).values()
        rows.append(sum(part.double().square().sum((1, 2)) for part in parts).sqrt().cpu())  # type: ignore[union-attr]
    return torch.stack(rows)
