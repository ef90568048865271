"""Prices across layers: what an error that a layer's surviving heads cannot make up for costs the model, measured.

Dimension letters: N windows, T time, L layers, H heads, E embedding, F features (live heads of one layer x head size),
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.agency.moments import HeadMoments, LayerMoments, observe
from pruning_comparison.models.devices import fast_products
from pruning_comparison.models.heads import input_major_weight, kept_heads, output_projections
from pruning_comparison.scoring.ablation import recorded_blocks, resumed_at
from pruning_comparison.scoring.prices import RIDGE, Curve, LayerPrices, Prices, elimination
from pruning_comparison.scoring.scores import HeadScores

FRESH_SHARE = 1 / 8
"""Of the calibration windows, kept out of the Gram matrices for the weights of layers to be measured on."""

MOST_FRESH_TOKENS = 4096
"""No more than that are kept out: weights of layers need few."""


def measure_prices(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int,
    exclude_first: bool = False,
    new_bias: bool = True,
    group_size: int = 1,
    moments: HeadMoments | None = None,
) -> Prices:
    """The prices of a model's heads, in nats of Kullback-Leibler divergence per token, from ``windows`` [N, T] of token ids.

    Moments of head outputs come from all windows but the last few, and what an error in each layer costs from those last
    ones, which no regression has read (``split_windows``). The model may be physically pruned. ``exclude_first`` leaves the
    first token of every window out of both. ``new_bias`` says whether layers without an output bias may be given one; it
    takes up the mean of what leaves. ``group_size`` heads leave together. ``moments``, of ``observe_for_prices``, saves the
    first pass.
    """
    if moments is None:
        moments = observe_for_prices(model, windows, batch_size=batch_size, exclude_first=exclude_first)
    layers = layer_prices(model, moments, new_bias=new_bias)
    fresh = split_windows(windows)[1]
    weights = layer_weights(
        model, moments, layers, fresh, exclude_first=exclude_first, new_bias=new_bias, group_size=group_size
    )
    return Prices.of(layers, weights.tolist(), moments.keep.shape[1])


def score_obs(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    group_size: int = 1,
    prices: Callable[[], Prices] | None = None,
) -> HeadScores:
    """The step at which each head leaves when the one with the least price always goes first, [L, H].

    ``prices`` gives the prices of the model's heads when it is called; they are measured on ``windows`` [N, T] if None. The
    backward greedy selection of Hassibi and Stork's (1993) optimal brain surgeon on whole heads, with layers weighed by what
    an error in them was measured to cost.
    """
    measured = prices or (lambda: measure_prices(model, windows, batch_size=batch_size, group_size=group_size))
    found = measured()
    order, paid = elimination(found, group_size)
    return HeadScores(order, {"layer_weights": list(found.weights), "prices_nats": paid.tolist()})


def observe_for_prices(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int,
    exclude_first: bool = False,
    utilisation: bool = False,
) -> HeadMoments:
    """Moments of the heads of a model that may have lost some physically, from all windows but the fresh ones."""
    fitted = split_windows(windows)[0]
    with fast_products(model):
        return observe(
            model,
            fitted,
            keep=kept_heads(model.config),
            batch_size=batch_size,
            exclude_first=exclude_first,
            utilisation=utilisation,
        )


def split_windows(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The windows [N, T] that moments come from, and the fresh ones: the last eighth, at most 4,096 tokens, at least one.

    Fewer than three windows all serve for both: moments need two, and nothing is left to hold out.
    """
    if len(windows) < 3:
        return windows, windows
    fresh = max(1, min(int(len(windows) * FRESH_SHARE), MOST_FRESH_TOKENS // windows.shape[1]))
    return windows[:-fresh], windows[-fresh:]


def layer_prices(
    model: PreTrainedModel, moments: HeadMoments, *, new_bias: bool = True, ridge: float = RIDGE
) -> tuple[LayerPrices | None, ...]:
    """Every layer's withdrawal costs, None where it has no head left.

    Moments are centred where the layer has an output bias, or may be given one.
    """
    return tuple(
        None
        if of_layer is None
        else LayerPrices.of(
            of_layer.covariance(centred=_has_bias(projection, new_bias)), of_layer.weight, of_layer.heads, ridge=ridge
        )
        for of_layer, projection in zip(moments.moments, output_projections(model), strict=True)
    )


@torch.no_grad()
def layer_weights(
    model: PreTrainedModel,
    moments: HeadMoments,
    layers: Sequence[LayerPrices | None],
    fresh: Tensor,
    *,
    exclude_first: bool = False,
    new_bias: bool = True,
    group_size: int = 1,
) -> Tensor:
    """What a unit of squared error in what each layer writes costs the model, nats per token, float64 [L].

    For one layer at a time: its cheaper half leaves, its output projection is refitted from the moments alone (ridge
    regression in closed form, the bias from the means), and the model runs on from there over the ``fresh`` windows [N, T];

        w_l = mean over positions of KL(model || model with that layer changed) / C_l(half).

    A measured slope where a second-order expansion would need the Hessian of everything that follows. 0 for a layer that
    has no heads, or whose heads can go without an error.
    """
    curves = [None if layer is None else layer.cheapest_first(group_size) for layer in layers]
    changed: dict[int, tuple[Tensor, Tensor | None]] = {}
    for number, (layer, curve, of_layer) in enumerate(zip(layers, curves, moments.moments, strict=True)):
        if layer is not None and curve is not None and of_layer is not None and curve.sums[curve.half] > 0:
            changed[number] = _half_cut(model, number, of_layer, layer, curve, new_bias)
    nats = torch.zeros(len(layers), dtype=torch.float64)
    positions = 0
    for window in fresh:
        ids = window.unsqueeze(0).to(model.device)
        with fast_products(model), _exact_logits(model):
            with recorded_blocks(model) as outputs:
                reference = _log_probabilities(model, ids, exclude_first)
            positions += len(reference)
            for number, (weight, bias) in changed.items():
                with resumed_at(model, number, outputs), _projecting(model, number, weight, bias):
                    now = _log_probabilities(model, ids, exclude_first)
                nats[number] += float(nn.functional.kl_div(now, reference, reduction="sum", log_target=True))
    halves = torch.ones(len(layers), dtype=torch.float64)
    for number, curve in enumerate(curves):
        if number in changed and curve is not None:
            halves[number] = curve.sums[curve.half]
    return (nats / positions / halves).clamp(min=0)


def _half_cut(
    model: PreTrainedModel, number: int, moments: LayerMoments, layer: LayerPrices, curve: Curve, new_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias [E] of a layer's output projection when its cheaper half has left and the others have adapted.

    The weight has as many rows as the projection, those of heads that have left zero.
    """
    projection = output_projections(model)[number]
    assert projection is not None
    old_weight, old_bias = input_major_weight(projection), getattr(projection, "bias", None)
    left: LayerPrices | None = layer
    for head in curve.first(curve.half):
        assert left is not None
        left = None if len(left.heads) == 1 else left.withdraw(head)
    adapted = torch.zeros_like(layer.weight)
    if left is not None:
        staying = torch.tensor([head in left.heads for head in moments.heads], device=adapted.device)
        adapted[staying.repeat_interleave(moments.head_size)] = left.weight
    bias = None
    if _has_bias(projection, new_bias):
        # What the heads write on average is kept up: the mean of what is missing goes into the bias.
        bias = moments.mean() @ (moments.weight.double() - adapted)
        bias = bias if old_bias is None else bias + old_bias.double()
    weight = torch.zeros_like(old_weight)
    weight[moments.columns(len(old_weight))] = adapted.to(old_weight)
    return weight, None if bias is None else bias.to(old_weight)


@contextmanager
def _projecting(model: PreTrainedModel, number: int, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Within it, a layer's output projection multiplies by ``weight`` and adds ``bias``."""
    projection: Any = output_projections(model)[number]

    def forward(x: Tensor) -> Tensor:
        product = x @ weight.to(x.dtype)
        return product if bias is None else product + bias.to(x.dtype)

    projection.forward = forward
    try:
        yield
    finally:
        del projection.forward


@contextmanager
def _exact_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within it, logits are computed in the precision of the weights whatever the blocks are computed in.

    Rounded to bfloat16 they would differ by a twentieth of a nat between two runs, more than many a layer's half costs.
    """
    head: Any = model.get_output_embeddings()
    plain = head.forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = plain(x.to(head.weight.dtype))
            return logits

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _log_probabilities(model: PreTrainedModel, ids: Tensor, exclude_first: bool) -> Tensor:
    """Of every next token, [positions, V], for one window of ids [1, T]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, int(exclude_first) :]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _has_bias(projection: nn.Module | None, new_bias: bool) -> bool:
    return new_bias or getattr(projection, "bias", None) is not None
