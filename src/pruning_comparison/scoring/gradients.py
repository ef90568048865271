"""Scores from gradients of the loss with respect to every head's gate: Taylor and Fisher.

Dimension letters: N windows, B batch, T time, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.devices import gains_from_bfloat16
from pruning_comparison.models.heads import (
    attentions,
    head_grid,
    head_parameters,
    live_heads,
    output_projections,
)
from pruning_comparison.pruning.surgery import converted_copy
from pruning_comparison.scoring.scores import HeadScores

LEAST_RANK_AGREEMENT = 0.99
"""Spearman correlation over all heads from which on scores from bfloat16 gradients may stand in for float32 ones."""


_MOST_LOGIT_BYTES = 64 * 2**20
"""Of a batch that is differentiated, in float32: a backward pass holds many times as much. One window is always taken."""

_MOST_LOGIT_BYTES_ON_GPU = 2**30
"""The same on a GPU, which small batches leave idle."""


_AGREEMENT_WINDOWS = 8

PROTECTED_LAYERS = (4 / 32, 2 / 32)
"""Shares of the layers, first and last, that ``score_llm_pruner`` leaves alone: those of its authors' commands."""


# Below this, comparing the precisions first costs about what the faster pass then saves.
_LEAST_WINDOWS_FOR_BFLOAT16 = 32


def gate_gradients(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Iterator[Tensor]:
    """Gradients of every sequence's loss with respect to every head's gate, batch after batch, float64 [B, L, H] on the CPU.

    A gate multiplies what its head hands to the output projection; all gates stand at 1. Each sequence of ``windows`` [N, T]
    has gates of its own, so that one backward pass gives the gradients of all sequences of a batch apart. The loss is the
    *summed* negative log-likelihood of the T - 1 next tokens, in nats: minus the log-likelihood of the sequence, whose
    squared gradient is its Fisher information. (The mean per token would differ by a factor that all heads share.)

    Nothing is kept from one batch to the next, so memory does not grow with N, and batches are at most so large that their
    logits take ``_MOST_LOGIT_BYTES``. The parameters need no gradients and get none. ValueError for a model that has lost
    heads physically.
    """
    for batch in windows.split(_windows_at_once(model, windows, batch_size)):
        yield _batch_gate_gradients(model, batch)


def _windows_at_once(model: PreTrainedModel, windows: Tensor, batch_size: int) -> int:
    """How many of ``windows`` [N, T] are differentiated at once: at most ``batch_size``, at least one."""
    most = _MOST_LOGIT_BYTES_ON_GPU if model.device.type == "cuda" else _MOST_LOGIT_BYTES
    logit_bytes = 4 * windows.shape[1] * int(model.config.get_text_config().vocab_size)
    return max(1, min(batch_size, most // logit_bytes))


def _batch_gate_gradients(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """One batch of ``gate_gradients``: ids [B, T] to [B, L, H]. Works under a caller's ``inference_mode``, too."""
    with torch.inference_mode(False), torch.enable_grad():
        ids = ids.clone().to(model.device)
        nothing_follows = torch.full_like(ids[:, :1], -100)
        targets = torch.cat([ids[:, 1:], nothing_follows], 1)
        with _sequence_gates(model, len(ids)) as gates:
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = nn.functional.cross_entropy(precise, targets.flatten(), reduction="sum", ignore_index=-100)
            gradients = torch.autograd.grad(loss, gates)
    return torch.stack(gradients, 1).cpu().double()


@contextmanager
def _sequence_gates(model: PreTrainedModel, batch: int) -> Iterator[Sequence[Tensor]]:
    """Open gates for each sequence of a batch, one tensor [B, H] for each layer.

    Gates, and so the sums in their gradients, are in float32 where the model computes in less.
    """
    grid = head_grid(model.config)
    dtype = torch.promote_types(model.dtype, torch.float32)
    gates: list[Tensor] = []
    handles = []
    try:
        for projection, live in zip(output_projections(model), live_heads(model), strict=True):
            if projection is None or live != grid.n_heads:
                raise ValueError("gates need a model with all its heads; this one has been pruned physically")
            gate = torch.ones(batch, grid.n_heads, dtype=dtype, device=model.device, requires_grad=True)
            handles.append(projection.register_forward_pre_hook(_multiply_heads(gate, grid.head_size)))
            gates.append(gate)
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _multiply_heads(gate: Tensor, head_size: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that multiplies the first input [B, T, H * D] by ``gate`` [B, H], in the gate's precision."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        factors = gate.repeat_interleave(head_size, 1).unsqueeze(1)
        return ((inputs[0] * factors).to(inputs[0].dtype), *inputs[1:])

    return hook


def score_taylor(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int, gradient_precision: str = "auto"
) -> HeadScores:
    """Sum over the sequences of |dLoss/dgate|, [L, H]: how far closing the gate moves the losses, to first order.

    The head importance of Michel et al. (2019, "Are sixteen heads really better than one?"), without their scaling within
    layers; Molchanov et al. (2019, "Importance estimation for neural network pruning") rank gates by the same expansion.
    ``gradient_precision`` as in ``score_fisher``.
    """
    return _score_by_gradients(lambda gradients: gradients.abs(), model, windows, batch_size, gradient_precision)


def score_fisher(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int, gradient_precision: str = "auto"
) -> HeadScores:
    """Sum over the sequences of (dLoss/dgate)^2, [L, H]: the diagonal of the gates' empirical Fisher information.

    Half of it approximates the loss that closing the gate costs, where the gradients cancel over the sequences: Kwon et al.
    (2022, "A fast post-training pruning framework for transformers").

    ``gradient_precision`` is "float32" (the model as it is), "bfloat16" or "auto", which tries bfloat16 where the processor
    has instructions for it and there is enough to do. Either way the ranks decide: where the scores of the first windows in
    both precisions correlate by less than ``LEAST_RANK_AGREEMENT`` (Spearman), everything is computed as the model is.
    ``details`` names the precision that the scores come from, and the correlation, None where none could be computed.
    """
    return _score_by_gradients(lambda gradients: gradients.square(), model, windows, batch_size, gradient_precision)


def _score_by_gradients(
    weigh: Callable[[Tensor], Tensor], model: PreTrainedModel, windows: Tensor, batch_size: int, precision: str
) -> HeadScores:
    """Sum over the sequences of ``weigh(gradients)``, in the precision that ``score_fisher`` explains."""

    def scores_of(gated: PreTrainedModel, some: Tensor) -> Tensor:
        grid = head_grid(gated.config)
        total = torch.zeros(grid.n_layers, grid.n_heads, dtype=torch.float64)
        for gradients in gate_gradients(gated, some, batch_size=batch_size):
            total += weigh(gradients).sum(0)
        return total

    agreement = None
    if _tries_bfloat16(model, windows, precision):
        rounded, few = converted_copy(model, torch.bfloat16), windows[:_AGREEMENT_WINDOWS]
        agreement = rank_agreement(scores_of(model, few), scores_of(rounded, few))
        if agreement is not None and agreement >= LEAST_RANK_AGREEMENT:
            model = rounded
    scores = scores_of(model, windows)
    name = str(model.dtype).removeprefix("torch.")
    return HeadScores(scores, {"gradient_precision": name, "gradient_precision_spearman": agreement})


def score_llm_pruner(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """The share of its layer that has to leave before a head does, by first-order Taylor terms of its weights, [L, H].

        importance_h = sum over the head's query, key, value and output weights w of |w * dLoss/dw|,

    Loss being the summed negative log-likelihood of all ``windows`` [N, T]: Ma et al. (2023, "LLM-Pruner: On the structural
    pruning of large language models"), the element-wise first-order criterion, summed over what leaves together. They prune
    the same share of every layer and leave the first and last ones alone, the first four and last two of 32; here these
    protected layers (in proportion to the number of layers, at least one at each end) leave when all others have. A key or
    value weight that several query heads read counts for each of them, with the gradient of all. Heads rank within their
    layer: the score is their rank over the number of heads, one more in protected layers, and -1 for heads without any
    effect, as masked ones.

    ValueError for a model that has lost heads physically.
    """
    importance = _weight_taylor(model, windows, batch_size)
    layers, heads = importance.shape
    ranks = importance.argsort(dim=1, stable=True).argsort(1).double() / heads
    first, last = (max(1, round(share * layers)) for share in PROTECTED_LAYERS)
    protected = torch.zeros(layers, 1, dtype=torch.float64)
    protected[:first] = 1
    protected[max(0, layers - last) :] = 1
    return torch.where(importance > 0, ranks + protected, -1.0)


def _weight_taylor(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Tensor:
    """The importance that ``score_llm_pruner`` ranks by, float64 [L, H]."""
    grid = head_grid(model.config)
    if any(live != grid.n_heads for live in live_heads(model)):
        raise ValueError("scores need a model with all its heads; this one has been pruned physically")
    weights = [p for attention in attentions(model) for p in attention.parameters() if p.ndim == 2]
    trained = [parameter.requires_grad for parameter in weights]
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in weights]
    try:
        for parameter in weights:
            parameter.requires_grad_(True)
        for batch in windows.split(_windows_at_once(model, windows, batch_size)):
            with torch.inference_mode(False), torch.enable_grad():
                ids = batch.clone().to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = nn.functional.cross_entropy(precise, ids[:, 1:].flatten(), reduction="sum")
                found = torch.autograd.grad(loss, weights)
            for total, gradient in zip(gradients, found, strict=True):
                total += gradient
    finally:
        for parameter, before in zip(weights, trained, strict=True):
            parameter.requires_grad_(before)
    terms = {id(parameter): (parameter.detach() * g).abs() for parameter, g in zip(weights, gradients, strict=True)}
    return torch.stack([_summed_by_head(model, layer, terms) for layer in range(grid.n_layers)])


def _summed_by_head(model: PreTrainedModel, layer: int, terms: dict[int, Tensor]) -> Tensor:
    """Sum of the terms of a head's weights, float64 [H]: what stands in the weights' places, by ``head_parameters``."""
    weights = [parameter for parameter in attentions(model)[layer].parameters() if id(parameter) in terms]
    before = [parameter.data for parameter in weights]
    try:
        for parameter in weights:
            parameter.data = terms[id(parameter)].to(parameter.dtype)
        parts = head_parameters(model, layer).values()
        return torch.stack([part.detach().double().sum((1, 2)) for part in parts]).sum(0).cpu()
    finally:
        for parameter, data in zip(weights, before, strict=True):
            parameter.data = data


def rank_agreement(one: Tensor, other: Tensor) -> float | None:
    """Spearman correlation of two sets of scores [L, H] over all heads; None where it is not defined."""
    if any(not bool(scores.isfinite().all()) or bool(scores.min() == scores.max()) for scores in (one, other)):
        return None
    return float(stats.spearmanr(one.flatten().tolist(), other.flatten().tolist()).statistic)


def _tries_bfloat16(model: PreTrainedModel, windows: Tensor, precision: str) -> bool:
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"unknown gradient precision {precision!r}; choose one of auto, float32, bfloat16")
    if precision != "auto":
        return precision == "bfloat16" and model.dtype != torch.bfloat16
    return len(windows) >= _LEAST_WINDOWS_FOR_BFLOAT16 and gains_from_bfloat16(model)
