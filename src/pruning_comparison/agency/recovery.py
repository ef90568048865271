"""Recovery: a few steps of training towards the dense model's predictions, the same for every variant.

Dimension letters: N windows, B batch, T time, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import blocks


@dataclass(frozen=True)
class RecoveryCost:
    """What recovery cost: seconds and the tokens it has seen, repeats included."""

    seconds: float
    tokens: int


def recover(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> tuple[PreTrainedModel, RecoveryCost]:
    """A copy of a pruned model after ``steps`` of distillation from its dense original.

    The loss is the Kullback-Leibler divergence of the pruned model's next-token distribution from the dense model's at every
    position of ``windows`` [N, T] (Hinton et al. 2015, "Distilling the knowledge in a neural network", at temperature 1).
    AdamW without weight decay trains what the blocks consist of; embeddings and output head stay shared with ``pruned``. The
    learning rate rises over the first tenth of the steps and falls to zero along a cosine; gradients are clipped at norm 1.
    ``generator`` draws the windows, so that every variant of an iteration trains on the same ones in the same order.
    """
    started = time.perf_counter()
    shared = {id(p): p for p in (*pruned.parameters(), *pruned.buffers())}
    for block in blocks(pruned):
        for parameter in block.parameters():
            shared[id(parameter)] = nn.Parameter(parameter.detach().clone())
    student = copy.deepcopy(pruned, shared)
    trained = [parameter for block in blocks(student) for parameter in block.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    order = _drawn(len(windows), steps * batch_size, generator)
    tokens = 0
    with torch.enable_grad():
        for step in range(steps):
            ids = windows[order[step * batch_size : (step + 1) * batch_size]].to(dense.device)
            rise = min(1.0, (step + 1) / warmup)
            optimizer.param_groups[0]["lr"] = learning_rate * rise * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.no_grad():
                targets = dense(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            predictions = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            loss = nn.functional.kl_div(predictions, targets, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            tokens += ids.numel()
    student.requires_grad_(False)
    return student, RecoveryCost(time.perf_counter() - started, tokens)


def _drawn(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices of ``wanted`` windows: all of them in random order, then all again in another, and so on."""
    rounds = -(-wanted // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:wanted]
