"""Arithmetic: what reading a prompt takes, which bounds the wait for the first token on any machine."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pruning_comparison.models.heads import head_grid, live_heads


def prefill_flops(model: PreTrainedModel, tokens: int) -> float:
    """FLOPs of reading T ``tokens``: 2 T per weight in every matrix product, 2 T T D per head in causal attention.

    The output head counts for the last token only; norms, activations and softmax, which are few, are left out. Causal
    attention is two products of T x T x D, at 2 FLOPs each, of which half is masked. Lower is better.
    """
    head = model.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    attention = sum(live_heads(model)) * 2.0 * tokens * tokens * head_grid(model.config).head_size
    return 2.0 * weights * tokens + attention + (0.0 if head is None else 2.0 * head.weight.numel())
