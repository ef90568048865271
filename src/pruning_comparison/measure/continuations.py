"""Log-likelihoods of continuations, in which a context that several of them share is read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pruning_comparison.measure.perplexity import most_windows_at_once
from pruning_comparison.models.heads import EmptiedCacheLayer

Ids = tuple[int, ...]


class Likelihood(NamedTuple):
    """Of one continuation: its log-likelihood in nats, summed over tokens, and whether each is the likeliest token."""

    log_likelihood: float
    greedy: bool


def continuation_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int
) -> list[Likelihood]:
    """The likelihood of each continuation after its context; ``pairs`` are token ids of both.

    A context with several continuations is read once, and they go on from its keys and values, side by side and padded on
    the right, where no token that counts sees the padding. Contexts of one length are read together. What is asked twice is
    computed once. ValueError where a context or a continuation is empty.
    """
    asked: defaultdict[Ids, defaultdict[Ids, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {position} has {len(context)} tokens of context and {len(continuation)} after it")
        asked[tuple(context)][tuple(continuation)].append(position)
    alone = [(context, next(iter(ends))) for context, ends in asked.items() if len(ends) == 1]
    found: dict[tuple[Ids, Ids], Likelihood] = _of_single(model, alone, batch_size)
    by_length: defaultdict[int, dict[Ids, list[Ids]]] = defaultdict(dict)
    for context, continuations in asked.items():
        if len(continuations) > 1:
            by_length[len(context)][context] = list(continuations)
    vocabulary = int(model.config.get_text_config().vocab_size)
    for shared in by_length.values():
        most = max(map(len, shared.values()))
        longest = max(len(one) for continuations in shared.values() for one in continuations)
        rows = most_windows_at_once(longest, vocabulary, batch_size, on_gpu=model.device.type == "cuda")
        contexts = list(shared)
        at_once = max(1, rows // most)
        for start in range(0, len(contexts), at_once):
            found |= _of_shared(model, {one: shared[one] for one in contexts[start : start + at_once]})
    result = [Likelihood(0.0, False)] * len(pairs)
    for context, continuations in asked.items():
        for continuation, positions in continuations.items():
            for position in positions:
                result[position] = found[context, continuation]
    return result


def tokens_read(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """How many tokens ``continuation_likelihoods`` lets a model read; the last of a continuation is only predicted."""
    asked: defaultdict[Ids, set[Ids]] = defaultdict(set)
    for context, continuation in pairs:
        asked[tuple(context)].add(tuple(continuation))
    return sum(len(context) + sum(len(one) - 1 for one in ends) for context, ends in asked.items())


@torch.inference_mode()
def _of_single(
    model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]], batch_size: int
) -> dict[tuple[Ids, Ids], Likelihood]:
    """Those of continuations that have a context for themselves; pairs of one length are read together."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    by_length: defaultdict[int, list[tuple[Ids, Ids]]] = defaultdict(list)
    for pair in pairs:
        by_length[len(pair[0]) + len(pair[1])].append(pair)
    found = {}
    for alike in by_length.values():
        longest = max(len(after) for _, after in alike)
        at_once = most_windows_at_once(longest, vocabulary, batch_size, on_gpu=model.device.type == "cuda")
        for start in range(0, len(alike), at_once):
            batch = alike[start : start + at_once]
            # Nothing is asked of what comes after the last token, which a full context has no room for either.
            ids = torch.tensor([(before + after)[:-1] for before, after in batch], device=model.device)
            longest = max(len(after) for _, after in batch)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest).logits
            for row, pair in enumerate(batch):
                found[pair] = _scored(logits[row, -len(pair[1]) :], pair[1])
    return found


@torch.inference_mode()
def _of_shared(model: PreTrainedModel, continuations: Mapping[Ids, Sequence[Ids]]) -> dict[tuple[Ids, Ids], Likelihood]:
    """Those of contexts of one length, each with its ``continuations``."""
    rows = [(context, one) for context, ends in continuations.items() for one in ends]
    numbers = [number for number, ends in enumerate(continuations.values()) for _ in ends]
    owner = torch.tensor(numbers, device=model.device)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(list(continuations), device=model.device)
    # The context's last token predicts the first one after it.
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[owner]
    longest = max(len(one) for _, one in rows)
    if longest > 1:
        layers: list[Any] = cache.layers
        for layer in layers:
            if not isinstance(layer, EmptiedCacheLayer):  # which keeps nothing of any row
                layer.batch_select_indices(owner)
        read = torch.zeros(len(rows), longest - 1, dtype=torch.long, device=model.device)
        for row, (_, one) in enumerate(rows):
            read[row, : len(one) - 1] = torch.tensor(one[:-1], device=model.device)
        logits = torch.cat([logits, model(input_ids=read, past_key_values=cache, use_cache=True).logits], 1)
    return {pair: _scored(logits[row, : len(pair[1])], pair[1]) for row, pair in enumerate(rows)}


def _scored(logits: Tensor, continuation: Ids) -> Likelihood:
    """The likelihood of C tokens from the logits [C, V] that predict them."""
    targets = torch.tensor(continuation, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return Likelihood(-float(loss.double()), bool((logits.argmax(-1) == targets).all()))
