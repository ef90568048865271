"""What attention or an MLP has to write for the residual stream to gain what it should, where more than a sum lies between.

Most families add what a projection writes. Granite multiplies it first; Gemma 2 and 3 and OLMo 2 add its norm. Dimension
letters: B batch, T time, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import Part, norms_of_outputs, residual_multiplier

_MOST_STEPS = 100
_CLOSE = 1e-12


def added_to_stream(model: PreTrainedModel, layer: int, part: Part, output: Tensor) -> Tensor:
    """What the stream gains [B, T, E] where attention or the MLP of a block writes ``output`` [B, T, E]."""
    norm, multiplier = norms_of_outputs(model, part)[layer], residual_multiplier(model)
    if norm is not None:
        output = norm(output)
    return output if multiplier == 1 else output * multiplier


def output_that_adds(model: PreTrainedModel, layer: int, part: Part, wanted: Tensor, lengths: Tensor | None) -> Tensor:
    """What attention or the MLP of a block should write for the stream to gain ``wanted`` [B, T, E], or come nearest to it.

    ``lengths`` [B, T, 1] are those of what it writes in the dense model; only a norm needs them, see ``before_norm``.
    """
    norm, multiplier = norms_of_outputs(model, part)[layer], residual_multiplier(model)
    if multiplier != 1:
        wanted = wanted / multiplier
    if norm is None:
        return wanted
    assert lengths is not None
    return before_norm(norm, wanted, lengths)


def before_norm(norm: nn.Module, wanted: Tensor, lengths: Tensor) -> Tensor:
    """The vectors a [B, T, E] of given ``lengths`` [B, T, 1] whose norm comes nearest to ``wanted`` [B, T, E].

    A root-mean-square norm N(a) = g a / sqrt(|a|^2 / E + eps) forgets how long a is, so that every length will do: the dense
    model's own is taken, with which a vector that nothing was lost of comes out as it was. With a = l v, |v| = 1 and
    c = g l / sqrt(l^2 / E + eps), what remains is

        v = argmin |c v - wanted|^2 over |v| = 1,  so  v = c wanted / (c^2 + m),

    where m, the multiplier of the constraint, is the one root of |v| = 1 above -min c^2. 1 / |v| is concave in m, so
    Newton's method from a start below the root climbs to it without passing it (Conn, Gould and Toint 2000, "Trust-region
    methods", section 7.3). Division by g alone would let features that the norm all but drops rule over the length.
    """
    length, root = lengths.double(), wanted.shape[-1] ** 0.5
    # What the norm makes of a vector of this length whose features are alike is c v, and v is 1 / sqrt(E) throughout.
    factors = norm((lengths / root).expand_as(wanted)).double() * root
    products, squares = factors * wanted.double(), factors.square()
    multiplier = (products.abs() - squares).amax(-1, keepdim=True)
    for _ in range(_MOST_STEPS):
        below = (squares + multiplier).clamp(min=torch.finfo(torch.float64).tiny)
        parts = (products / below).square()
        norm_squared = parts.sum(-1, keepdim=True)
        excess = norm_squared.sqrt() - 1
        if bool((excess <= _CLOSE).all()):
            break
        multiplier = multiplier + norm_squared * excess.clamp(min=0) / (parts / below).sum(-1, keepdim=True)
    found = products / (squares + multiplier).clamp(min=torch.finfo(torch.float64).tiny)
    return (length * nn.functional.normalize(found, dim=-1)).to(wanted)
