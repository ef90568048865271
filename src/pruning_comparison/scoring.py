"""How heads are ranked for pruning: ``score_<method>(...) -> float [L, H]``, higher = keep.

Dimension letters: N windows, T time, L layers, H heads, D head size, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models.heads import attentions, head_grid, head_parameters
from pruning_comparison.pruning import mask_heads
from pruning_comparison.selection import Scope, select_heads


@dataclass(frozen=True)
class HeadScores:
    """Scores [L, H] with what a reader needs to know of how they came about."""

    scores: Tensor
    details: dict[str, Any]


def score_random(n_layers: int, n_heads: int, generator: torch.Generator) -> Tensor:
    """Uniform random scores [L, H]: the control that any method has to beat."""
    return torch.rand(n_layers, n_heads, generator=generator, dtype=torch.float64)


def score_magnitude(model: PreTrainedModel) -> Tensor:
    """Euclidean norm of each head's query, key, value and output weights together, [L, H].

    The classic criterion of Han et al. (2015, "Learning both weights and connections") on whole heads; biases are left out.
    """
    rows = []
    for layer in range(head_grid(model.config).n_layers):
        parts = head_parameters(model, layer).values()
        rows.append(sum(part.double().square().sum((1, 2)) for part in parts).sqrt().cpu())  # type: ignore[union-attr]
    return torch.stack(rows)


@torch.inference_mode()
def mean_attention_entropy(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """Mean entropy of each head's attention in [0, 1], [L, H], over ``windows`` [N, T] of token ids.

    At each position the entropy is divided by the log of the number of visible positions, so that 1 is uniform attention;
    the first position, where log 1 = 0, is left out. Maps are reduced as they appear: at no time does more than one layer's
    [batch, H, T, T] exist. Follows the attention entropy of Ghader and Monz (2017, "What does attention in neural machine
    translation pay attention to?"), normalised.
    """
    grid = head_grid(model.config)
    total = torch.zeros(grid.n_layers, grid.n_heads, dtype=torch.float64)
    visible = torch.arange(2, windows.shape[1] + 1, device=model.device, dtype=torch.float32).log()

    def reduce_maps(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
            maps = outputs[1]
            entropy = torch.special.entr(maps.float()).sum(-1)[..., 1:] / visible
            total[layer] += entropy.double().mean(-1).sum(0).cpu()
            return (outputs[0], None, *outputs[2:])

        return hook

    with _eager_attention(model):
        handles = [a.register_forward_hook(reduce_maps(layer)) for layer, a in enumerate(attentions(model))]
        try:
            for batch in windows.split(batch_size):
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    return total / len(windows)


def score_entropy(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int,
    direction: str,
    smallest_level: float,
    scope: Scope,
) -> HeadScores:
    """Scores by attention entropy. ``direction`` says which heads leave first: "high", "low" or "auto".

    Published evidence contradicts itself on the direction, so "auto" takes the one that costs less loss on the calibration
    windows when ``smallest_level`` per cent of the heads are cut; both losses are recorded.
    """
    entropy = mean_attention_entropy(model, windows, batch_size=batch_size)
    by_direction = {"high": -entropy, "low": entropy}
    if direction != "auto":
        return HeadScores(by_direction[direction], {"entropy_direction": direction})
    losses = {}
    for name, scores in by_direction.items():
        with mask_heads(model, select_heads(scores, smallest_level, scope)):
            nats, tokens = window_losses(model, list(windows), batch_size=batch_size)
        losses[name] = float(nats.sum() / tokens.sum())
    best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    details = {
        "entropy_direction": best,
        "entropy_direction_level": smallest_level,
        "entropy_direction_losses_nats": losses,
    }
    return HeadScores(by_direction[best], details)


def score_heads(
    method: str,
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int,
    generator: torch.Generator,
    entropy_direction: str,
    smallest_level: float,
    scope: Scope,
) -> HeadScores:
    """The scores of the named method. ValueError, listing the names, for any other."""
    grid = head_grid(model.config)
    if method == "random":
        return HeadScores(score_random(grid.n_layers, grid.n_heads, generator), {})
    if method == "magnitude":
        return HeadScores(score_magnitude(model), {})
    if method == "entropy":
        return score_entropy(
            model,
            windows,
            batch_size=batch_size,
            direction=entropy_direction,
            smallest_level=smallest_level,
            scope=scope,
        )
    raise ValueError(f"unknown method {method!r}; choose one of entropy, random, magnitude")


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Only the eager implementation hands out attention maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
