"""Signals: what every head does for its layer. Recorded and drawn; they change no answer.

Dimension letters: S samples, L layers, H heads, D head size, E embedding, F features (live heads of one layer x D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning_comparison.agency.moments import HeadMoments, LayerMoments
from pruning_comparison.scoring.prices import Prices, ridged_inverse


@dataclass(frozen=True)
class HeadSignals:
    """Every signal of every head, float64 [L, H] on the CPU, NaN for withdrawn heads.

    * ``utilisation``: attention that is at work rather than parked, see ``observe``; NaN where it was not measured.
    * ``contribution``: share of the energy its layer writes, see ``contributions``.
    * ``alignment``: correlation with what the rest of its layer writes, see ``alignments``.
    * ``redundancy``: share of what it writes that the layer's other live heads can reconstruct, see ``redundancies``.
    * ``importance``: Fisher score, as given; NaN where it was not.
    * ``withdrawal_cost``: what its withdrawal costs after the survivors have adapted, see ``Prices``.
    """

    utilisation: Tensor
    contribution: Tensor
    alignment: Tensor
    redundancy: Tensor
    importance: Tensor
    withdrawal_cost: Tensor


def measure_signals(
    observations: HeadMoments,
    prices: Prices,
    *,
    ridge: float,
    importance: Tensor | None = None,
) -> HeadSignals:
    """All signals of the observed heads. ``prices`` are those of the same heads; ``importance`` [L, H] a Fisher score."""
    keep = observations.keep.cpu()
    nothing = torch.full(keep.shape, torch.nan, dtype=torch.float64)
    given = nothing if importance is None else importance.cpu().double()

    def by_head(measure: Any) -> Tensor:
        signal = nothing.clone()
        for layer, moments in enumerate(observations.moments):
            if moments is not None:
                signal[layer, list(moments.heads)] = measure(moments).cpu()
        return signal

    return HeadSignals(
        utilisation=observations.utilisation,
        contribution=by_head(contributions),
        alignment=by_head(alignments),
        redundancy=by_head(lambda moments: redundancies(moments, ridge=ridge)),
        importance=given.masked_fill(~keep, torch.nan),
        withdrawal_cost=prices.table(),
    )


def written_products(moments: LayerMoments, *, centred: bool = True) -> Tensor:
    """Inner products per token of what the heads of a layer write, M [H', H'] over its live heads.

    M_hg = tr(W_h' G_hg W_g) with G = X'X / S, so that M_hh is the energy per token that head h writes, |X_h W_h|^2 / S.
    Where ``centred``, what is constant over tokens does not count: a bias could write it as well.
    """
    weight = moments.weight.double()
    by_feature = moments.covariance(centred=centred) * (weight @ weight.T)
    heads = len(moments.heads)
    return by_feature.view(heads, moments.head_size, heads, moments.head_size).sum((1, 3))


def contributions(moments: LayerMoments) -> Tensor:
    """Share of each live head in the energy that its layer writes, [H']: |X_h W_h|^2 / sum over g of |X_g W_g|^2, centred.

    Shares add up to 1; they are equal where the layer writes nothing.
    """
    energy = written_products(moments).diagonal().clamp(min=0)
    total = energy.sum()
    return energy / total if bool(total > 0) else torch.full_like(energy, 1 / len(energy))


def alignments(moments: LayerMoments) -> Tensor:
    """Correlation of what each live head writes with what the rest of its layer writes, [H'] in [-1, 1].

    With y_h = X_h W_h and r_h = sum over g != h of y_g, centred over tokens: <y_h, r_h> / (|y_h| |r_h|), inner products over
    tokens and embedding. 0 where one of the two is nothing.
    """
    products = written_products(moments)
    own, row = products.diagonal(), products.sum(1)
    rest = products.sum() - 2 * row + own
    scale = (own.clamp(min=0) * rest.clamp(min=0)).sqrt()
    # What remains of a sum that cancels out is rounding, not a direction.
    nothing = (own <= _ROUNDING * products.diagonal().max()) | (rest <= _ROUNDING * own) | (scale <= 0)
    return torch.where(nothing, torch.zeros_like(own), (row - own) / scale.clamp(min=1e-300)).clamp(-1, 1)


def redundancies(moments: LayerMoments, *, ridge: float) -> Tensor:
    """Share of what each live head writes that the layer's other live heads can reconstruct, [H']: an R^2, at most 1.

    X_h is regressed on the other heads' X_o by ridge regression on one half of the text and judged on the other, both ways:

        B = (X_o'X_o + lambda I)^-1 X_o'X_h,   R^2 = 1 - sum |(X_h - X_o B) W_h|^2 / sum |X_h W_h|^2,

    with lambda = ``ridge`` * mean diagonal of the fitted half's X'X, everything around the fitted half's mean and the sums
    over the half that was not fitted (the out-of-sample R^2 of Campbell and Thompson 2008). What counts is what reaches the
    residual stream, so errors are weighed by W_h. Below 0 where the others predict worse than the mean does; 1 for a head
    that writes nothing, because nothing would be missed.
    """
    heads, weight = len(moments.heads), moments.weight.double()
    missed = torch.zeros(heads, dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(missed)
    for fitted, judged in ((0, 1), (1, 0)):
        gram = moments.gram(judged, about=moments.mean(fitted))
        inverse = ridged_inverse(moments.gram(fitted), ridge)
        for position in range(heads):
            own = slice(position * moments.head_size, (position + 1) * moments.head_size)
            # The columns of the inverse hold the regression of this head on all others: -P_oh = B P_hh.
            unexplained = torch.linalg.solve(inverse[own, own], inverse[own])  # [D, F]
            written = weight[own] @ weight[own].T
            missed[position] += (written * (unexplained @ gram @ unexplained.T)).sum()
            total[position] += (written * gram[own, own]).sum()
    nothing = total <= _ROUNDING * total.max()
    return torch.where(nothing, torch.ones_like(total), 1 - missed / total.clamp(min=1e-300))


_ROUNDING = 1e-12
