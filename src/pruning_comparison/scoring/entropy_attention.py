"""Attention that hands out the entropies of its maps in place of the maps, which are never there as a whole.

Dimension letters: B batch, T queries, S keys, H query heads, K key-value heads, G query heads for each of them, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "entropies in place of maps"
"""The name under which transformers knows the attention of this file."""

_BLOCK_QUERIES = 32
_BLOCK_NUMBERS = 2**18
"""Scores of a block, at most: 1 MiB of float32, so that they are still in the cache when they are read again."""

_ACCELERATOR_BLOCK_NUMBERS = 2**24
"""The same where every operation has to be launched: few large blocks."""

_Stretch = tuple[slice, slice, slice]
"""A block's queries, the keys that any of them sees, and those of these keys for which the mask says anything."""


@contextmanager
def entropies_in_place_of_maps(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the attention modules return entropies [B, H, T] where the eager implementation returns maps."""
    # Registered here and not when this file is imported: importing changes nothing for anybody.
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend_with_entropies)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend_with_entropies(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention and its entropies in nats: query [B, H, T, D], key and value [B, K, S, D] to [B, T, H, D] and [B, H, T].

    The mask is added to the scores, as in eager attention. With s the scores of a query, m the largest of them and p their
    softmax, the entropy is

        H(p) = -sum p (s - m) - log(max p),   since p = exp(s - m) / Z and so max p = 1 / Z.

    ``softcap`` bounds the scores smoothly before the mask is added, to softcap tanh(s / softcap).
    ``s_aux`` [H] are sinks: scores of a key with the value zero, which takes its share of the attention. The entropy is that
    of what the other keys get, as shares of it, so that a sink changes the output and not the entropy.

    Both terms are at least 0, so nothing cancels, and no logarithm is taken for each key. Maps are made for a block of
    queries at a time, against the keys that any of them sees. Everything is in float32 where the model computes in less.
    """
    batch, heads, length, size = query.shape
    groups, span = key.shape[1:3]
    shared = heads // groups
    given, dtype = query.dtype, torch.promote_types(query.dtype, torch.float32)
    scale = size**-0.5 if scaling is None else scaling
    query = (query.to(dtype) * scale).unflatten(1, (groups, shared)).contiguous()
    key, value = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    sinks = None if s_aux is None else s_aux.to(dtype).view(groups, shared, 1)
    mask, visible = _readable(attention_mask, dtype)

    numbers = _BLOCK_NUMBERS if query.device.type == "cpu" else _ACCELERATOR_BLOCK_NUMBERS
    rows = min(length, max(_BLOCK_QUERIES, numbers // (batch * heads * span)))
    pairs = min(batch * groups, max(1, numbers // (shared * rows * span)))
    stretches = _stretches(mask, visible, length, span, rows)
    if mask is not None:
        by_group = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (groups, shared))
        mask = by_group.expand(batch, groups, shared, length, span)
    buffers = query.new_empty(2, pairs * shared * rows * span)
    output = query.new_empty(batch, length, heads, size)
    entropies = query.new_empty(batch, heads, length)
    output_by_group = output.unflatten(2, (groups, shared)).permute(0, 2, 3, 1, 4)
    entropies_by_group = entropies.unflatten(1, (groups, shared))

    for some in _pairs(batch, groups, pairs):
        keys, values = key[some].flatten(0, 1), value[some].flatten(0, 1)
        for queries, seen, masked in stretches:
            asked = query[(*some, slice(None), queries)]
            shape = asked.shape[:-1]
            asked = asked.reshape(len(keys), -1, size)
            sizes = (*asked.shape[:2], seen.stop - seen.start)
            scores, maps = (buffer[: sizes[0] * sizes[1] * sizes[2]].view(sizes) for buffer in buffers)
            torch.bmm(asked, keys[:, seen].transpose(1, 2), out=scores)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            if mask is not None and masked.stop > masked.start:
                inside = slice(masked.start - seen.start, masked.stop - seen.start)
                scores.view(*shape, -1)[..., inside] += mask[(*some, slice(None), queries, masked)]
            largest = scores.amax(-1, keepdim=True)
            scores -= largest
            torch.softmax(scores, -1, out=maps)
            most = maps.amax(-1)
            found = scores.mul_(maps).sum(-1).add_(most.log()).neg_()
            if sinks is not None:
                # With Z = 1 / max p the sum of exp(s - m), a sink leaves the others Z / (Z + exp(sink - m)) of the whole.
                taken = (sinks[some[1]].expand(shape) - largest.view(shape)).exp() * most.view(shape)
                maps.view(*shape, -1).mul_((1 / (1 + taken)).unsqueeze(-1))
            entropies_by_group[(*some, slice(None), queries)] = found.view(shape)
            output_by_group[(*some, slice(None), queries)] = torch.bmm(maps, values[:, seen]).view(*shape, size)
    return output.to(given), entropies


def keys_seen(mask: Tensor | None, entropies: Tensor) -> Tensor:
    """How many keys each query sees under an additive mask [1 or B, 1 or H, T, S], [1 or B, 1 or H, T]; float32.

    Without a mask, as many as there are queries in ``entropies`` [B, H, T].
    """
    _, visible = _readable(mask, torch.float32)
    if visible is None:
        return entropies.new_full(entropies.shape[-1:], entropies.shape[-1], dtype=torch.float32)
    return visible.sum(-1).float()


def _readable(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """An additive mask in ``dtype``, and which keys it leaves visible, bool, both [1 or B, 1 or H, T, S].

    What stands for hidden, the least number of the mask's own type or minus infinity, becomes one that scores can be added
    to and that 0 can be multiplied with.
    """
    if mask is None:
        return None, None
    visible = mask > torch.finfo(mask.dtype).min / 2
    return mask.to(dtype).masked_fill(~visible, torch.finfo(dtype).min / 2), visible


def _stretches(mask: Tensor | None, visible: Tensor | None, length: int, span: int, rows: int) -> list[_Stretch]:
    """The blocks of ``rows`` queries. A query that sees no key attends to all alike: its block visits all keys."""
    blocks = [slice(first, min(first + rows, length)) for first in range(0, length, rows)]
    if mask is None or visible is None:
        return [(block, slice(0, span), slice(0, 0)) for block in blocks]
    seen = (visible | ~visible.any(-1, keepdim=True)).flatten(0, 1).any(0).cpu()
    said = (mask != 0).flatten(0, 1).any(0).cpu()
    found = []
    for block in blocks:
        keys = _extent(seen[block].any(0), slice(0, span))
        found.append((block, keys, _extent(said[block].any(0), keys)))
    return found


def _extent(flags: Tensor, within: slice) -> slice:
    """From the first to the last that is true of ``flags`` [S] within a slice; empty where none is."""
    places = flags[within].nonzero()
    if not len(places):
        return slice(within.start, within.start)
    return slice(within.start + int(places[0]), within.start + int(places[-1]) + 1)


def _pairs(batch: int, groups: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch with key-value heads, at most ``most`` pairs at a time: whole rows, or parts of one."""
    whole, part = max(1, most // groups), min(groups, most)
    for row in range(0, batch, whole):
        for group in range(0, groups, part):
            yield slice(row, min(row + whole, batch)), slice(group, min(group + part, groups))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Eager attention's mask, once where all rows of the batch have the same."""
    mask: Tensor | None = eager_mask(*args, **kwargs)
    return mask[:1] if mask is not None and bool((mask == mask[:1]).all()) else mask
