"""Quality of generated text: diversity and repetition over tokens, and perplexity under the dense model."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.metrics import of_kind


@dataclass(frozen=True)
class WrittenText:
    """A generated text: what the function of a text metric may ask for by naming it.

    ``tokens`` are the text's token ids before its end, ``text`` is what they say. ``vocabulary`` is the number of token ids
    that there are. ``nats`` is the loss of the tokens, summed, under the *dense* model and given the prompt.
    """

    tokens: Sequence[int]
    text: str
    vocabulary: int
    nats: float


def text_functions() -> dict[str, Callable[[WrittenText], float | None]]:
    """The function of every text metric by the metric's name, in the order of the records.

    InputError where one names a parameter that is neither a field of ``WrittenText`` nor among the metric's settings, and
    has no default.
    """
    offered = [one.name for one in fields(WrittenText)]
    return {
        metric.name: _on_written_text(metric.name, metric.function(), dict(metric.settings), offered)
        for metric in of_kind("text")
    }


def _on_written_text(
    name: str, function: Callable[..., float | None], settings: dict[str, object], offered: Sequence[str]
) -> Callable[[WrittenText], float | None]:
    wanted = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in settings:
            continue
        if parameter.name in offered:
            wanted.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise InputError(unknown_name(f"a parameter of the function of metric {name}", parameter.name, offered))
    return lambda written: function(**{one: getattr(written, one) for one in wanted}, **settings)


def generation_perplexity(tokens: Sequence[int], nats: float) -> float | None:
    """exp of the text's mean loss per token under the dense model; unit 1. None for an empty text.

    Neither direction is better in itself: a loop is most predictable. Verdicts use the distance from the dense model.
    """
    return float(torch.tensor(nats / len(tokens), dtype=torch.float64).exp()) if tokens else None


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
