"""Products of activations that come in bfloat16, added up in float32 on a processor's matrix units.

Where a model's blocks run in bfloat16, what their projections read are bfloat16 numbers. A product of two of them is exact
in float32, so X'X loses nothing on units that multiply bfloat16 and add up float32; only targets are rounded for X'T.

Dimension letters: S samples, F features, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from pruning_comparison.models.devices import rounded_products

LONG = 16.0
"""Rows so many times as long as the median one are added up in float64: rounding them would drown the others."""

FAR = 4.0
"""Features whose mean is further from zero than so many standard deviations are taken around it."""

_BLOCK = 512
_ROWS_THAT_TELL = 256


@dataclass
class Buffer:
    """Memory for one float32 copy after the other: a fresh one takes as long to be given as to be filled."""

    memory: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """A float32 copy of ``x`` [S, F], good until the next one is asked for."""
        if self.memory is None or self.memory.numel() < x.numel():
            self.memory = torch.empty(x.numel(), dtype=torch.float32, device=x.device)
        return self.memory[: x.numel()].view(x.shape).copy_(x)


def is_rounded(x: Tensor) -> bool:
    """Whether activations come in bfloat16 on a processor. GPUs multiply in float32, which costs little there."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def origin_of(x: Tensor) -> Tensor:
    """The numbers [F] to take products of ``x`` [S, F] around, float32.

    Zero, so that products stay exact, but for features far from it compared with their spread: there float32 would lose in
    the mean what regression needs of the spread. Their mean is rounded to bfloat16, so that numbers between half of it and
    twice it have exact differences from it. A few hundred rows are enough to tell.
    """
    some = x[:: max(1, len(x) // _ROWS_THAT_TELL)].float()
    mean, square = some.mean(0), some.square().mean(0)
    far = mean.square() > FAR**2 * (square - mean.square())
    return torch.where(far, mean.bfloat16().float(), torch.zeros_like(mean))


def gram_of(x: Tensor) -> Tensor:
    """X'X [F, F], float64, as ``add_products`` adds it up; uses up ``x`` [S, F], float32."""
    gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    add_products(gram, x.new_zeros(x.shape[1], 0, dtype=torch.float64), x, x[:, :0])
    return mirror(gram)


def add_products(gram: Tensor, cross: Tensor, x: Tensor, targets: Tensor) -> None:
    """Adds X'X to the upper triangle of ``gram`` and X'T to ``cross``, both float64; uses up ``x`` [S, F] and
    ``targets`` [S, E], float32.

    What stands below the diagonal of ``gram`` is meaningless afterwards, see ``mirror``. X loses what bfloat16 cannot
    hold, which is nothing where it came in bfloat16 and its origin is zero; of T each number loses up to 1/512 of itself.
    Rows far longer than the others, such as those of attention sinks, are added in float64.
    """
    long = (_are_long(x) | _are_long(targets)).nonzero().squeeze(1)
    if len(long):
        rows = x[long].double()
        gram.addmm_(rows.T, rows)
        cross.addmm_(rows.T, targets[long].double())
        x.index_fill_(0, long, 0)
        targets.index_fill_(0, long, 0)
    features = x.shape[1]
    size = ceil(features / max(1, ceil(features / _BLOCK)))
    with rounded_products():
        for first in range(0, features, max(1, size)):
            last = first + size
            gram[first:last, first:] += x[:, first:last].T @ x[:, first:]
        cross += x.T @ targets


def mirror(gram: Tensor) -> Tensor:
    """The matrix [F, F] itself, with the upper triangle's numbers below the diagonal as well."""
    for first in range(0, len(gram), _BLOCK):
        last = first + _BLOCK
        block = gram[first:last, first:last]
        block.copy_(block.triu() + block.triu(1).T)
        gram[last:, first:last] = gram[first:last, last:].T
    return gram


def _are_long(x: Tensor) -> Tensor:
    """Which rows of [S, F] are far longer than the median one, bool [S]; none where there are no features."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1)
    return lengths.gt(LONG * lengths.median())
