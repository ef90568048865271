"""Prices across layers: what an error that a layer's surviving heads cannot make up for costs the model, measured.

Dimension letters: N windows, T time, L layers, H heads, E embedding, F features (live heads of one layer x head size),
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.cuts import Cut, cut_layer, divergences, has_bias
from pruning_comparison.agency.moments import HeadMoments, observe
from pruning_comparison.models.devices import fast_products
from pruning_comparison.models.heads import kept_heads, output_projections
from pruning_comparison.scoring.prices import RIDGE, LayerPrices, Prices, elimination
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
    rectangle: int | None = None,
) -> HeadScores:
    """The step at which each head leaves when the one with the least price always goes first, [L, H].

    ``prices`` gives the prices of the model's heads when it is called; they are measured on ``windows`` [N, T] if None. The
    backward greedy selection of Hassibi and Stork's (1993) optimal brain surgeon on whole heads, with layers weighed by what
    an error in them was measured to cost. With a ``rectangle``, the query heads per key-value group, also what every layer
    can keep at what price: heads are chosen by that then.
    """
    measured = prices or (lambda: measure_prices(model, windows, batch_size=batch_size, group_size=group_size))
    found = measured()
    order, paid = elimination(found, group_size)
    details = {"layer_weights": list(found.weights), "prices_nats": paid.tolist()}
    return HeadScores(order, details, None if rectangle is None else found.rectangles(rectangle))


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
            of_layer.covariance(centred=has_bias(projection, new_bias)), of_layer.weight, of_layer.heads, ridge=ridge
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
    reference: PreTrainedModel | None = None,
) -> Tensor:
    """What a unit of squared error in what each layer writes costs the model, nats per token, float64 [L].

    For one layer at a time: its cheaper half leaves, its output projection is refitted from the moments alone (ridge
    regression in closed form, the bias from the means), and the model runs on from there over the ``fresh`` windows [N, T];

        w_l = mean over positions of KL(model || model with that layer changed) / C_l(half).

    With a ``reference`` model, KL(reference || model with that layer changed) less KL(reference || model) instead: what the
    cut adds for a model that has been pruned already.

    A measured slope where a second-order expansion would need the Hessian of everything that follows. 0 for a layer that
    has no heads, or whose heads can go without an error.
    """
    curves = [None if layer is None else layer.cheapest_first(group_size) for layer in layers]
    halves = torch.ones(len(layers), dtype=torch.float64)
    cut: list[int] = []
    trials: list[dict[int, Cut]] = []
    for number, (layer, curve, of_layer) in enumerate(zip(layers, curves, moments.moments, strict=True)):
        if layer is not None and curve is not None and of_layer is not None and curve.sums[curve.half] > 0:
            leaving = curve.first(curve.half)
            cut.append(number)
            trials.append({number: cut_layer(model, number, of_layer, layer, leaving, new_bias=new_bias)})
            halves[number] = curve.sums[curve.half]
    start, found = divergences(model, trials, fresh, reference=reference, exclude_first=exclude_first)
    nats = torch.zeros(len(layers), dtype=torch.float64)
    nats[cut] = (found - start).mean(1)
    return (nats / halves).clamp(min=0)
