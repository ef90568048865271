"""Weights of layers where the other layers have lost heads as well, and what a layer's loss costs at several sizes.

``prices_across_layers.layer_weights`` cuts half of one layer while all others are whole. Here are two finer measurements.

Dimension letters: N windows, T time, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.cuts import Cut, cut_layer, divergences
from pruning_comparison.agency.moments import HeadMoments
from pruning_comparison.scoring.prices import Curve, LayerPrices

LEAST_SHARE = 0.25
"""A weight in context is at least this share of the layer's own: errors that cancel on a few windows are no free lunch."""


def weights_in_context(
    model: PreTrainedModel,
    moments: HeadMoments,
    layers: Sequence[LayerPrices | None],
    leaving: Tensor,
    weights: Sequence[float],
    fresh: Tensor,
    *,
    exclude_first: bool = False,
    new_bias: bool = True,
    group_size: int = 1,
) -> Tensor:
    """What a unit of squared error in each layer costs where the heads ``leaving`` (bool [L, H]) have left, float64 [L].

    All layers are cut at once. A layer then gets its heads back,

        w_l = (KL(dense || all cut) - KL(dense || all cut but l)) / C_l(its heads that leave),

    or, where it loses none, loses its cheapest group, and w_l is what that adds over what it costs. At least ``LEAST_SHARE``
    of the layer's own ``weights``. ``fresh`` windows [N, T] are those that the moments have not read.
    """
    base: dict[int, Cut] = {}
    trials: list[dict[int, Cut]] = []
    costs: list[float] = []
    numbers: list[int] = []
    for number, (layer, seen) in enumerate(zip(layers, moments.moments, strict=True)):
        if layer is None or seen is None:
            continue
        heads = leaving[number].nonzero().squeeze(1).tolist()
        tried: Sequence[int] = [] if heads else layer.cheapest_first(group_size).first(1)
        if heads:
            base[number] = cut_layer(model, number, seen, layer, heads, new_bias=new_bias)
        trials.append({number: cut_layer(model, number, seen, layer, tried, new_bias=new_bias)})
        costs.append(-layer.joint_cost(heads) if heads else layer.joint_cost(tried))
        numbers.append(number)
    start, found = divergences(model, trials, fresh, base=base, exclude_first=exclude_first)
    own = torch.tensor(list(weights), dtype=torch.float64)
    context = own.clone()
    changes, divided_by = (found - start).mean(1), torch.tensor(costs, dtype=torch.float64)
    context[numbers] = torch.where(divided_by != 0, changes / divided_by, own[numbers])
    return torch.maximum(context, LEAST_SHARE * own)


def measured_curves(
    model: PreTrainedModel,
    moments: HeadMoments,
    layers: Sequence[LayerPrices | None],
    fresh: Tensor,
    *,
    points: int = 3,
    exclude_first: bool = False,
    new_bias: bool = True,
    group_size: int = 1,
) -> list[Curve | None]:
    """Each layer's curve in nats: KL measured at ``points`` sizes of the cut, evenly spaced up to all of its heads.

    Between two of them nats grow in proportion to squared error. They never fall.
    """
    curves = [None if layer is None else layer.cheapest_first(group_size) for layer in layers]
    trials: list[dict[int, Cut]] = []
    places: list[tuple[int, int]] = []
    for number, (layer, curve, seen) in enumerate(zip(layers, curves, moments.moments, strict=True)):
        if layer is None or curve is None or seen is None:
            continue
        groups = len(curve.sums) - 1
        for size in sorted({max(1, round(groups * (point + 1) / points)) for point in range(points)}):
            trials.append({number: cut_layer(model, number, seen, layer, curve.first(size), new_bias=new_bias)})
            places.append((number, size))
    _, found = divergences(model, trials, fresh, exclude_first=exclude_first)
    measured: dict[int, dict[int, float]] = {}
    for (number, size), nats in zip(places, found.mean(1).tolist(), strict=True):
        measured.setdefault(number, {})[size] = nats
    return [
        None if curve is None else Curve(curve.order, tuple(_interpolated(curve, measured[number])), group_size)
        for number, curve in enumerate(curves)
    ]


def _interpolated(curve: Curve, measured: Mapping[int, float]) -> list[float]:
    """Nats of the first k groups for every k, linear in squared error between the sizes that were measured."""
    nats = [0.0]
    last_size, last_nats = 0, 0.0
    for size, found in sorted(measured.items()):
        reached = max(found, last_nats)
        span = curve.sums[size] - curve.sums[last_size]
        for one in range(last_size + 1, size + 1):
            share = (curve.sums[one] - curve.sums[last_size]) / span if span > 0 else 1.0
            nats.append(last_nats + share * (reached - last_nats))
        last_size, last_nats = size, reached
    return nats
