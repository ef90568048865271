"""Quality of generated text: diversity and repetition over tokens, and perplexity under the dense model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.perplexity import window_losses


def cut_at_end_of_text(tokens: Sequence[int], end_of_text: frozenset[int]) -> list[int]:
    """The tokens before the first end-of-text token."""
    for position, token in enumerate(tokens):
        if token in end_of_text:
            return list(tokens[:position])
    return list(tokens)


def distinct_n(tokens: Sequence[int], n: int) -> float | None:
    """Distinct n-grams over all n-grams (Li et al. 2016); unit 1; None for fewer than n tokens.

    Neither direction is better in itself: word salad is maximally diverse. Verdicts use the distance from the dense model.
    """
    grams = _ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else None


def expectation_adjusted_distinct_n(tokens: Sequence[int], n: int, vocabulary: int) -> float | None:
    """Distinct n-grams over the number expected of as many uniform draws (Liu et al. 2022, EAD); unit 1.

    Plain distinct-n punishes length. With C n-grams and V = vocabulary ** n possible ones, EAD divides by
    V * (1 - ((V - 1) / V) ** C). None for fewer than n tokens.
    """
    grams = _ngrams(tokens, n)
    if not grams:
        return None
    possible = float(vocabulary) ** n
    expected = -possible * math.expm1(len(grams) * math.log1p(-1.0 / possible))
    return len(set(grams)) / expected


def seq_rep_n(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams that repeat earlier ones: 1 - distinct-n (Welleck et al. 2019, seq-rep-4); unit 1."""
    distinct = distinct_n(tokens, n)
    return None if distinct is None else 1.0 - distinct


def compression_ratio(text: str) -> float | None:
    """UTF-8 bytes over their zlib-compressed size at level 9; unit 1; a loop compresses well. None for empty text."""
    raw = text.encode("utf-8", "replace")
    return len(raw) / len(zlib.compress(raw, 9)) if raw else None


def generation_losses(
    dense: PreTrainedModel, prompts: Sequence[Tensor], continuations: Sequence[Tensor], *, batch_size: int
) -> list[tuple[float, int]]:
    """(nats, tokens) of each continuation, given its prompt, under the *dense* model: generation perplexity's parts.

    Empty continuations give (0.0, 0).
    """
    filled = [index for index, continuation in enumerate(continuations) if len(continuation)]
    windows = [torch.cat([prompts[index], continuations[index]]) for index in filled]
    targets = [len(continuations[index]) for index in filled]
    nats, _ = window_losses(dense, windows, batch_size=batch_size, targets=targets)
    result = [(0.0, 0)] * len(continuations)
    for index, loss, count in zip(filled, nats.tolist(), targets, strict=True):
        result[index] = (loss, count)
    return result


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
