"""Scores of heads as they leave one after the other: each where it then costs least.

Dimension letters: N windows, L layers, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.models.heads import (
    head_grid,
)
from pruning_comparison.pruning.surgery import mask_heads
from pruning_comparison.scoring.gradients import gate_gradients, score_fisher
from pruning_comparison.scoring.scores import HeadScores

_GREEDY_STEPS = 50


def score_fisher_interactions(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> HeadScores:
    """The step at which each head leaves when heads leave one by one, each where it then costs least, [L, H].

    The cost of a set S is what the Fisher information F of the gates says of closing them together, with the interactions
    of heads of one layer and none between layers:

        cost(S) = sum over layers of 1_S' F 1_S,   F = sum over the sequences of g g',   g = dLoss/dgate,

    the objective of the mask search of Kwon et al. (2022, "A fast post-training pruning framework for transformers"). They
    search with the diagonal alone and then rearrange each layer's mask for the number of heads it has lost. Such masks are
    not nested from level to level and so are no scores; here the interactions count at every step instead: the next to
    leave is the head h with the least F_hh + 2 * sum over s in S of F_hs. Ties leave in order of layer, then head.
    """
    grid = head_grid(model.config)
    fisher = torch.zeros(grid.n_layers, grid.n_heads, grid.n_heads, dtype=torch.float64)
    for gradients in gate_gradients(model, windows, batch_size=batch_size):
        fisher += torch.einsum("blh,blk->lhk", gradients, gradients)
    precision = str(model.dtype).removeprefix("torch.")
    return HeadScores(elimination_order(fisher), {"gradient_precision": precision})


def elimination_order(fisher: Tensor) -> Tensor:
    """The greedy order of ``score_fisher_interactions`` from the layers' blocks of F [L, H, H]: 0 leaves first, [L, H].

    All NaN where F is not finite: no order follows from it.
    """
    costs = fisher.diagonal(dim1=1, dim2=2).clone()
    if not bool(fisher.isfinite().all()):
        return torch.full_like(costs, math.nan)
    order = torch.zeros_like(costs)
    for step in range(costs.numel()):
        layer, head = divmod(int(costs.argmin()), costs.shape[1])
        order[layer, head] = step
        costs[layer] += 2 * fisher[layer, head]
        costs[layer, head] = math.inf
    return order


def score_fisher_greedy(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> HeadScores:
    """The order in which heads leave when diagonal Fisher scores are taken anew on what is left after every step, [L, H].

    A step takes out a fiftieth of the heads, at least one: those with the least ``score_fisher`` in the model in which all
    before them are masked. Scored and pruned in many small steps, as Molchanov et al. (2019, "Importance estimation for
    neural network pruning") iterate, with no training in between. It costs about fifty times what ``score_fisher`` does.
    Heads whose output is zero, as those of masked heads, leave first.
    """
    keep = head_grid(model.config).all_heads()
    order = torch.zeros(keep.shape, dtype=torch.float64)
    step = max(1, keep.numel() // _GREEDY_STEPS)
    details: dict[str, Any] = {}
    gone = 0
    while gone < keep.numel():
        with mask_heads(model, keep):
            found = score_fisher(model, windows, batch_size=batch_size)
        if not bool(found.scores.isfinite().all()):
            return found
        details = details or found.details
        scores = found.scores.masked_fill(~keep, math.inf)
        leaving = max(step, int((scores == 0).sum()))
        for index in scores.flatten().argsort(stable=True)[: min(leaving, keep.numel() - gone)].tolist():
            order.view(-1)[index] = gone
            keep.view(-1)[index] = False
            gone += 1
    return HeadScores(order, {**details, "heads_per_step": step})
