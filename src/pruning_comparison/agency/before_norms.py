"""What attention or an MLP has to write for the residual stream to gain what it should, where more than a sum lies between.

Most families add what a projection writes. Granite multiplies it first; Gemma 2 and 3 and OLMo 2 add its norm. Dimension
letters: B batch, T time, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import Part, gains_of, norms_of_outputs, residual_multiplier, set_gains

_MOST_STEPS = 100
_CLOSE = 1e-12


def added_to_stream(model: PreTrainedModel, layer: int, part: Part, output: Tensor) -> Tensor:
    """What the stream gains [B, T, E] where attention or the MLP of a block writes ``output`` [B, T, E]."""
    norm, multiplier = norms_of_outputs(model, part)[layer], residual_multiplier(model)
    if norm is not None:
        output = norm(output)
    return output if multiplier == 1 else output * multiplier


def output_that_adds(model: PreTrainedModel, wanted: Tensor, norm: nn.Module | None, lengths: Tensor | None) -> Tensor:
    """What attention or the MLP of a block should write for the stream to gain ``wanted`` [B, T, E], or come nearest to it.

    ``norm`` is what it passes through, if anything; ``lengths`` [B, T, 1] are those of what is written in the dense model,
    which only a norm needs, see ``before_norm``.
    """
    multiplier = residual_multiplier(model)
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


def refit_gains(norm: nn.Module, written: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """Gives ``norm`` the gains with which what is ``written`` adds what is nearest to ``wanted``, by least squares.

    Both are batches of [B, T, E]. With n = N(a) as the gains are, that of every feature e is multiplied by

        f_e = sum over tokens of wanted_e n_e / sum over tokens of n_e^2,

    and left as it is where n_e is 0 throughout. Regression shrinks what it cannot tell towards the mean, so that it errs
    less; the norm stretches that to full length again, as if it were certain. The gains take it back: f is about 1 where
    what is written can be relied upon, and towards 0 where it cannot.
    """
    products = squares = torch.zeros(())
    for output, target in zip(written, wanted, strict=True):
        added = norm(output)
        tokens = tuple(range(added.ndim - 1))
        products = (target * added).sum(tokens, dtype=torch.float64) + products.to(added.device)
        squares = added.square().sum(tokens, dtype=torch.float64) + squares.to(added.device)
    factors = torch.where(squares > 0, products / squares.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    set_gains(norm, gains_of(norm).double() * factors)


def pass_through(norm: nn.Module, constant: Tensor) -> None:
    """Sets the gains of ``norm`` so that it leaves one vector ``constant`` [E] as it is: all to its root mean square.

    A norm has no other way to add something small: whatever small constant enters, it comes out at full length.
    """
    set_gains(norm, constant.double().square().mean().sqrt().expand_as(constant))
