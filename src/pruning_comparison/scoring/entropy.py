"""Scores by attention entropy.

Dimension letters: N windows, T time, L layers, H heads.
"""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models.devices import chooses_bfloat16, fast_products
from pruning_comparison.models.heads import (
    attentions,
    kept_heads,
)
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import mask_heads
from pruning_comparison.scoring.entropy_attention import entropies_in_place_of_maps, keys_seen
from pruning_comparison.scoring.gradients import LEAST_RANK_AGREEMENT, rank_agreement
from pruning_comparison.scoring.scores import HeadScores
from pruning_comparison.spec import Scope

_AGREEMENT_WINDOWS = 2

_LEAST_WINDOWS_FOR_BFLOAT16 = 8
"""With fewer, comparing both precisions costs about what the faster one saves."""


class _NothingMoreWanted(Exception):
    """Ends a forward pass from within."""


@torch.inference_mode()
def mean_attention_entropy(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """Mean entropy of each head's attention in [0, 1], [L, H], over ``windows`` [N, T] of token ids.

    At each position the entropy is divided by the log of the number of keys that can be seen there, so that 1 is uniform
    attention: of all positions up to it, or of as many as a sliding layer's window holds. The first position, where
    log 1 = 0, is left out, and a head that never sees more than one key gets 0. Maps are made block by block and reduced at
    once: no [batch, H, T, T] exists, see ``entropy_attention``, and a pass ends with the last attention. Heads that a pruned
    model has lost get 0. Follows the attention entropy of Ghader and Monz (2017, "What does attention in neural machine
    translation pay attention to?"), normalised.
    """
    keep = kept_heads(model.config)
    last = max((layer for layer, kept in enumerate(keep) if kept.any()), default=-1)
    total = torch.zeros(keep.shape, dtype=torch.float64)

    def add(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, kwargs: Any, outputs: Any) -> Any:
            entropies = outputs[1]
            if entropies is not None:
                most = keys_seen(kwargs.get("attention_mask"), entropies)[..., 1:].log()
                shares = entropies[..., 1:] / most.masked_fill(most == 0, 1)
                total[layer, keep[layer]] += shares.double().mean(-1).sum(0).cpu()
            if layer == last:
                raise _NothingMoreWanted
            return (outputs[0], None, *outputs[2:])

        return hook

    with entropies_in_place_of_maps(model):
        handles = [a.register_forward_hook(add(layer), with_kwargs=True) for layer, a in enumerate(attentions(model))]
        try:
            for batch in windows.split(batch_size):
                with suppress(_NothingMoreWanted):
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
    entropy_direction: str,
    smallest_level: float,
    scope: Scope,
    group_size: int = 1,
    rectangle: int | None = None,
) -> HeadScores:
    """Scores by attention entropy. ``entropy_direction`` says which heads leave first: "high", "low" or "auto".

    Published evidence contradicts itself on the direction, so "auto" takes the one that costs less loss on every other
    calibration window when ``smallest_level`` per cent of the heads are cut; both losses are recorded. On all windows the
    two trials would cost more than the scores themselves. Which loss is larger is all that counts, so the trials may run in
    bfloat16 where that is faster (``fast_products``). So may the entropies, as long as ranks agree (``_entropies``).
    """
    entropy, precision = _entropies(model, windows, batch_size)
    by_direction = {"high": -entropy, "low": entropy}
    if entropy_direction != "auto":
        return HeadScores(by_direction[entropy_direction], {"entropy_direction": entropy_direction, **precision})
    losses = {}
    for name, scores in by_direction.items():
        keep = select_heads(scores, smallest_level, scope, group_size=group_size, rectangle=rectangle)
        with mask_heads(model, keep), fast_products(model):
            nats, tokens = window_losses(model, list(windows[::2]), batch_size=batch_size)
        losses[name] = float(nats.sum() / tokens.sum())
    best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    details = {
        "entropy_direction": best,
        "entropy_direction_level": smallest_level,
        "entropy_direction_losses_nats": losses,
        **precision,
    }
    return HeadScores(by_direction[best], details)


def _entropies(model: PreTrainedModel, windows: Tensor, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
    """``mean_attention_entropy``, with products in bfloat16 where ``fast_products`` chooses it, and what was decided.

    The ranks decide, as they do for gradients: where entropies of the first windows in both precisions correlate by less
    than ``LEAST_RANK_AGREEMENT`` (Spearman, over all heads that are there), everything is computed as the model is.
    """
    live = kept_heads(model.config)
    if len(windows) < _LEAST_WINDOWS_FOR_BFLOAT16 or not live.any() or not chooses_bfloat16(model):
        return mean_attention_entropy(model, windows, batch_size=batch_size), {}
    few = windows[:_AGREEMENT_WINDOWS]
    exact = mean_attention_entropy(model, few, batch_size=batch_size)
    with fast_products(model):
        rounded = mean_attention_entropy(model, few, batch_size=batch_size)
    agreement = rank_agreement(exact[live], rounded[live])
    agree = agreement is not None and agreement >= LEAST_RANK_AGREEMENT
    with fast_products(model) if agree else nullcontext():
        entropy = mean_attention_entropy(model, windows, batch_size=batch_size)
    return entropy, {"entropy_precision": "bfloat16" if agree else "float32", "entropy_precision_spearman": agreement}
