"""How heads are ranked for pruning: ``score_<method>(...) -> float [L, H]``, higher = keep.

Dimension letters: N windows, T time, L layers, H heads, D head size, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.devices import gains_from_bfloat16
from pruning_comparison.entropy_attention import entropies_in_place_of_maps
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models.heads import (
    attentions,
    blocks,
    head_grid,
    head_parameters,
    input_major_weight,
    kept_heads,
    live_heads,
    output_projections,
)
from pruning_comparison.pruning import converted_copy, mask_heads
from pruning_comparison.selection import Scope, select_heads
from pruning_comparison.spec import METHODS

LEAST_RANK_AGREEMENT = 0.99
"""Spearman correlation over all heads from which on scores from bfloat16 gradients may stand in for float32 ones."""

SCORED_ON_PRUNED = frozenset({"entropy"})
"""Methods that score a physically pruned model, too: they need neither gates nor the weights of heads that have left."""

_MOST_LOGIT_BYTES = 64 * 2**20
"""Of a batch that is differentiated, in float32: a backward pass holds many times as much. One window is always taken."""

_AGREEMENT_WINDOWS = 8
_GREEDY_STEPS = 50
# Below this, comparing the precisions first costs about what the faster pass then saves.
_LEAST_WINDOWS_FOR_BFLOAT16 = 32


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


class _NothingMoreWanted(Exception):
    """Ends a forward pass from within."""


@torch.inference_mode()
def mean_attention_entropy(model: PreTrainedModel, windows: Tensor, *, batch_size: int) -> Tensor:
    """Mean entropy of each head's attention in [0, 1], [L, H], over ``windows`` [N, T] of token ids.

    At each position the entropy is divided by the log of the number of positions up to it, so that 1 is uniform attention;
    the first position, where log 1 = 0, is left out. Maps are made block by block and reduced at once: no [batch, H, T, T]
    exists, see ``entropy_attention``, and a pass ends with the last attention. Heads that a pruned model has lost get 0.
    Follows the attention entropy of Ghader and Monz (2017, "What does attention in neural machine translation pay attention
    to?"), normalised.
    """
    keep = kept_heads(model.config)
    last = max((layer for layer, kept in enumerate(keep) if kept.any()), default=-1)
    total = torch.zeros(keep.shape, dtype=torch.float64)
    positions = torch.arange(2, windows.shape[1] + 1, device=model.device, dtype=torch.float32).log()

    def add(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
            entropies = outputs[1]
            if entropies is not None:
                total[layer, keep[layer]] += (entropies[..., 1:] / positions).double().mean(-1).sum(0).cpu()
            if layer == last:
                raise _NothingMoreWanted
            return (outputs[0], None, *outputs[2:])

        return hook

    with entropies_in_place_of_maps(model):
        handles = [a.register_forward_hook(add(layer)) for layer, a in enumerate(attentions(model))]
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
    direction: str,
    smallest_level: float,
    scope: Scope,
    group_size: int = 1,
) -> HeadScores:
    """Scores by attention entropy. ``direction`` says which heads leave first: "high", "low" or "auto".

    Published evidence contradicts itself on the direction, so "auto" takes the one that costs less loss on every other
    calibration window when ``smallest_level`` per cent of the heads are cut; both losses are recorded. On all windows the
    two trials would cost more than the scores themselves.
    """
    entropy = mean_attention_entropy(model, windows, batch_size=batch_size)
    by_direction = {"high": -entropy, "low": entropy}
    if direction != "auto":
        return HeadScores(by_direction[direction], {"entropy_direction": direction})
    losses = {}
    for name, scores in by_direction.items():
        with mask_heads(model, select_heads(scores, smallest_level, scope, group_size=group_size)):
            nats, tokens = window_losses(model, list(windows[::2]), batch_size=batch_size)
        losses[name] = float(nats.sum() / tokens.sum())
    best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    details = {
        "entropy_direction": best,
        "entropy_direction_level": smallest_level,
        "entropy_direction_losses_nats": losses,
    }
    return HeadScores(by_direction[best], details)


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
    logit_bytes = 4 * windows.shape[1] * model.config.get_text_config().vocab_size
    for batch in windows.split(max(1, min(batch_size, _MOST_LOGIT_BYTES // logit_bytes))):
        yield _batch_gate_gradients(model, batch)


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


def score_taylor(model: PreTrainedModel, windows: Tensor, *, batch_size: int, precision: str = "auto") -> HeadScores:
    """Sum over the sequences of |dLoss/dgate|, [L, H]: how far closing the gate moves the losses, to first order.

    The head importance of Michel et al. (2019, "Are sixteen heads really better than one?"), without their scaling within
    layers; Molchanov et al. (2019, "Importance estimation for neural network pruning") rank gates by the same expansion.
    ``precision`` as in ``score_fisher``.
    """
    return _score_by_gradients(lambda gradients: gradients.abs(), model, windows, batch_size, precision)


def score_fisher(model: PreTrainedModel, windows: Tensor, *, batch_size: int, precision: str = "auto") -> HeadScores:
    """Sum over the sequences of (dLoss/dgate)^2, [L, H]: the diagonal of the gates' empirical Fisher information.

    Half of it approximates the loss that closing the gate costs, where the gradients cancel over the sequences: Kwon et al.
    (2022, "A fast post-training pruning framework for transformers").

    ``precision`` is "float32" (the model as it is), "bfloat16" or "auto", which tries bfloat16 where the processor has
    instructions for it and there is enough to do. Either way the ranks decide: where the scores of the first windows in
    both precisions correlate by less than ``LEAST_RANK_AGREEMENT`` (Spearman), everything is computed as the model is.
    ``details`` names the precision that the scores come from, and the correlation, None where none could be computed.
    """
    return _score_by_gradients(lambda gradients: gradients.square(), model, windows, batch_size, precision)


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
    """How far a head's output strays from its mean, weighed by the output projection and standardised by layer, [L, H].

        S_h = sum over the head's features j of Var(X_j) * |W_j|^2,   score = (S_h - mean of the layer) / its deviation,

    W_j being the row of the output projection that reads feature j: An et al. (2024, "Fluctuation-based adaptive structured
    pruning for large language models", FLAP). A head that hardly strays can be replaced by a constant: their compensation is
    ``adaptation`` "bias". Heads whose output never changes, as that of masked ones, are left out of mean and deviation and
    score below all others.
    """
    features = _head_features(model, windows, batch_size)
    variance = (features.mean_square - features.mean.square()).clamp(min=0) * windows.numel() / (windows.numel() - 1)
    fluctuation = (_output_weights(model).square().sum(-1) * variance).sum(-1)
    scores = torch.zeros_like(fluctuation)
    live = fluctuation > 0
    for layer, strays in enumerate(live):
        values = fluctuation[layer, strays]
        deviation = values.std() if len(values) > 1 else torch.zeros(())
        if deviation > 0:
            scores[layer, strays] = (values - values.mean()) / deviation
    return torch.where(live, scores, scores.min() - 1)


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

        with _recorded_blocks(model) as (outputs, silent):
            dense = loss()
        tokens += batch.shape[0] * (batch.shape[1] - 1)
        for layer, head in (~silent).nonzero().tolist():
            keep[layer, head] = False
            with mask_heads(model, keep), _resumed_at(model, layer, outputs):
                nats[layer, head] += loss() - dense
            keep[layer, head] = True
    return nats / tokens


@contextmanager
def _recorded_blocks(model: PreTrainedModel) -> Iterator[tuple[list[Any], Tensor]]:
    """Within it, one forward pass records what each block returns, and which heads write nothing: bool [L, H]."""
    grid = head_grid(model.config)
    outputs: list[Any] = [None] * grid.n_layers
    silent = ~grid.all_heads()

    def keep_output(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    def look_for_silence(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            written = inputs[0].unflatten(-1, (-1, grid.head_size)).abs().amax((0, 1, 3))
            silent[layer] = (written == 0).cpu()

        return hook

    handles = [block.register_forward_hook(keep_output(layer)) for layer, block in enumerate(blocks(model))]
    for layer, projection in enumerate(output_projections(model)):
        if projection is not None:
            handles.append(projection.register_forward_pre_hook(look_for_silence(layer)))
    try:
        yield outputs, silent
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _resumed_at(model: PreTrainedModel, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Within it, the blocks before ``layer`` return their recorded ``outputs`` and compute nothing."""
    before = blocks(model)[:layer]
    for block, output in zip(before, outputs, strict=False):
        block.forward = lambda *args, recorded=output, **kwargs: recorded
    try:
        yield
    finally:
        for block in before:
            del block.forward


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
    group_size: int = 1,
    gradient_precision: str = "auto",
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
            group_size=group_size,
        )
    if method in ("taylor", "fisher"):
        score = score_taylor if method == "taylor" else score_fisher
        return score(model, windows, batch_size=batch_size, precision=gradient_precision)
    if method in ("fisher-interactions", "fisher-greedy"):
        search = score_fisher_interactions if method == "fisher-interactions" else score_fisher_greedy
        return search(model, windows, batch_size=batch_size)
    if method in ("wanda", "flap"):
        weigh = score_wanda if method == "wanda" else score_flap
        return HeadScores(weigh(model, windows, batch_size=batch_size), {})
    if method == "ablation":
        return HeadScores(score_ablation(model, windows, batch_size=batch_size), {})
    raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
