"""Perplexity over strided windows, kept as sums per window so that statistics can resample documents."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import InputError
from pruning_comparison.losses import mean_loss
from pruning_comparison.texts import Document, tokenize

_DIVERGENCE_ROWS = 64
"""Tokens whose distributions are held at once where two models are compared: their rows stay in the processor's cache."""

_MOST_LOGIT_BYTES = 2**28
"""Of a batch, in float32: with a vocabulary of 49,152 eight windows of 512 tokens would have more than the model's weights.
More windows at once are no faster on a CPU."""

_MOST_LOGIT_BYTES_ON_GPU = 2**32
"""The same on a GPU, which small batches leave idle."""

Observer = Callable[[int, int, Tensor], None]
"""Is shown the position of a window, its row in the batch, and the logits [C, V] of its C scored tokens."""


@dataclass(frozen=True)
class EvaluationWindow:
    """A stretch of one document: the last ``targets`` tokens of ``ids`` are scored, those before are context.

    ``targets_bytes`` is the length in UTF-8 bytes of the text that the scored tokens stand for, ``targets_words`` the number
    of words (what white space separates) that begin in it.
    """

    document: str
    index: int
    ids: Tensor
    targets: int
    targets_bytes: int
    targets_words: int


@dataclass(frozen=True)
class WindowLoss:
    """Negative log-likelihood in nats, summed over the scored tokens of a window.

    ``kl_nats`` is how far the predictions of these tokens are from the dense model's, summed; None if not measured.
    """

    document: str
    index: int
    nats: float
    tokens: int
    text_bytes: int
    text_words: int
    kl_nats: float | None = None


class DensePredictions:
    """What the dense model predicts for the scored tokens of evaluation windows, to hold other models against.

    Kept is what enters the output head, E numbers per token and not the V of the vocabulary, so that memory stays small:
    the head is run again, a few rows at a time. That costs a cell about a third of its pass over the text where the head is
    a fifth of the model (135 million parameters, 49,152 tokens), and less in larger models; another pass of the dense model
    would double it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._head: torch.nn.Module = model.get_output_embeddings()
        self._hidden: list[Tensor] = []

    @property
    def known(self) -> bool:
        """Whether the dense model has read the windows."""
        return bool(self._hidden)

    def read(self, windows: Sequence[EvaluationWindow], *, batch_size: int) -> Tensor:
        """Lets the dense model read the windows, and returns its summed losses in nats, float64 [N]."""
        entered: list[Tensor] = []
        hidden: list[Tensor | None] = [None] * len(windows)

        def keep(position: int, row: int, logits: Tensor) -> None:
            hidden[position] = entered[-1][row, -len(logits) - 1 : -1].clone()

        handle = self._head.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
        try:
            nats = _losses_of(self.model, windows, batch_size=batch_size, observe=keep)
        finally:
            handle.remove()
        self._hidden = [one for one in hidden if one is not None]
        return nats

    def divergence(self, position: int, logits: Tensor) -> float:
        """KL(dense || other) in nats, summed over the scored tokens of window ``position``, from ``logits`` [C, V].

        With p the dense model's probabilities and z its logits, q and y the other's,

            KL = sum p (z - y) - logsumexp(z) + logsumexp(y)

        (Kullback and Leibler 1951), in float32 from logits of the models' precision. What rounding leaves below 0 is 0.
        """
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), _DIVERGENCE_ROWS):
            rows = slice(start, start + _DIVERGENCE_ROWS)
            dense, other = self._head(self._hidden[position][rows]).float(), logits[rows].float()
            difference = dense - other
            normaliser = dense.logsumexp(-1)
            probabilities = dense.sub_(normaliser[:, None]).exp_()
            each = difference.mul_(probabilities).sum(-1) - normaliser + other.logsumexp(-1)
            total += each.double().sum()
        value = float(total)
        return value if math.isnan(value) else max(0.0, value)


def evaluation_windows(
    documents: Sequence[Document], tokenizer: Any, *, window: int, stride: int, tokens: int, bos: int | None = None
) -> list[EvaluationWindow]:
    """Strided windows over the documents, as in the Hugging Face guide "Perplexity of fixed-length models".

    Each window of at most ``window`` tokens starts ``stride`` after the one before and scores only what that one has not;
    the first token of a document has no context and is not scored. Windows never cross documents. Where the text is longer
    than about ``tokens``, whole windows are left out: those that stay are shared out evenly over the documents and spread
    evenly within each, because the openings of documents are easier to predict than what follows them.

    Where the model's texts begin with a token ``bos``, each window does, and holds one token less of the text. It is never
    scored; the first token of a document then has a context and is. On documents of one window that is what
    lm-evaluation-harness computes; in longer ones the harness gives later windows the token before instead.
    """
    of_text = window - (bos is not None)
    stride = min(stride, of_text)
    by_document = [_windows_of(document, tokenizer, of_text, stride, bos) for document in documents]
    shares = _share_out([len(windows) for windows in by_document], -(-tokens // stride))
    chosen = [
        windows[position]
        for windows, share in zip(by_document, shares, strict=True)
        for position in _spread(len(windows), share)
    ]
    if not chosen:
        raise InputError("--eval_text: no document has two tokens, so there is nothing to predict. Give a longer text.")
    return chosen


def _windows_of(
    document: Document, tokenizer: Any, window: int, stride: int, bos: int | None
) -> list[EvaluationWindow]:
    """All windows of one document, in order, of ``window`` tokens of its text and ``bos`` before them, if given."""
    before = [] if bos is None else [bos]
    ids, spans = tokenize(tokenizer, document.text)
    word_starts = [match.start() for match in re.finditer(r"\S+", document.text)]
    windows: list[EvaluationWindow] = []
    scored_to = 0
    for index, start in enumerate(range(0, len(ids), stride)):
        end = min(start + window, len(ids))
        # Without a context nothing is predicted. A token that begins texts says little in the middle of one.
        first = max(scored_to, start if before and start == 0 else start + 1)
        if first >= end:
            break
        # From where the token before ends, so that a space that offsets leave out of both counts once.
        begin, stop = spans[first - 1][1] if first else 0, spans[end - 1][1]
        size = len(document.text[begin:stop].encode("utf-8"))
        words = bisect_left(word_starts, stop) - bisect_left(word_starts, begin)
        windows.append(
            EvaluationWindow(document.name, index, torch.tensor([*before, *ids[start:end]]), end - first, size, words)
        )
        scored_to = end
        if end == len(ids):
            break
    return windows


def _share_out(available: Sequence[int], wanted: int) -> list[int]:
    """How many of ``wanted`` windows each document gives: as evenly as what is ``available`` allows."""
    shares = [0] * len(available)
    while wanted > 0:
        able = [position for position, count in enumerate(available) if shares[position] < count]
        if not able:
            break
        if wanted < len(able):
            able = [able[position] for position in _spread(len(able), wanted)]
        for position in able:
            shares[position] += 1
        wanted -= len(able)
    return shares


def _spread(length: int, count: int) -> list[int]:
    """``count`` distinct positions below ``length``, evenly spread."""
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    *,
    batch_size: int,
    targets: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats, float64 [N], and number of scored tokens, int64 [N], of each window.

    ``windows`` are N tensors of token ids; the last ``targets[n]`` of each are scored (default: all but the first). Windows
    of one length share a batch, at most ``batch_size`` and no more than have logits of ``_MOST_LOGIT_BYTES``, so that no
    padding enters. ``observe`` is shown the logits of every window as they are made.
    """
    counts = [len(ids) - 1 for ids in windows] if targets is None else list(targets)
    nats = torch.zeros(len(windows), dtype=torch.float64)
    vocabulary = int(model.config.get_text_config().vocab_size)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for position, ids in enumerate(windows):
        by_length[len(ids)].append(position)
    for positions in by_length.values():
        longest = max(counts[position] for position in positions)
        at_once = most_windows_at_once(longest + 1, vocabulary, batch_size, on_gpu=model.device.type == "cuda")
        for start in range(0, len(positions), at_once):
            batch = positions[start : start + at_once]
            ids = torch.stack([windows[position] for position in batch]).to(model.device)
            longest = max(counts[position] for position in batch)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1).logits
            for row, position in enumerate(batch):
                count = counts[position]
                scored = logits[row, -count - 1 : -1]
                nats[position] = torch.nn.functional.cross_entropy(
                    scored.float(), ids[row, -count:], reduction="sum"
                ).double()
                if observe is not None:
                    observe(position, row, scored)
    return nats, torch.tensor(counts)


def most_windows_at_once(tokens: int, vocabulary: int, batch_size: int, *, on_gpu: bool) -> int:
    """How many windows with logits at so many tokens share a batch: at most ``batch_size``, at least one."""
    most = _MOST_LOGIT_BYTES_ON_GPU if on_gpu else _MOST_LOGIT_BYTES
    return max(1, min(batch_size, most // (4 * vocabulary * tokens)))


def measure_perplexity(
    model: PreTrainedModel,
    windows: Sequence[EvaluationWindow],
    *,
    batch_size: int,
    dense: DensePredictions | None = None,
) -> list[WindowLoss]:
    """Losses of every window; perplexity is exp(sum of nats / sum of tokens) over any set of them (``perplexity_of``).

    With ``dense``, how far the model is from it is measured in the same pass; the dense model itself is at 0 by definition.
    Where the dense model has not read the windows yet, it does first.
    """
    divergences: list[float | None] = [None] * len(windows)
    if dense is not None and model is dense.model:
        nats = dense.read(windows, batch_size=batch_size)
        divergences = [0.0] * len(windows)
    elif dense is not None:
        if not dense.known:
            dense.read(windows, batch_size=batch_size)

        def observe(position: int, row: int, logits: Tensor) -> None:
            divergences[position] = dense.divergence(position, logits)

        nats = _losses_of(model, windows, batch_size=batch_size, observe=observe)
    else:
        nats = _losses_of(model, windows, batch_size=batch_size)
    return [
        WindowLoss(w.document, w.index, loss, w.targets, w.targets_bytes, w.targets_words, divergence)
        for w, loss, divergence in zip(windows, nats.tolist(), divergences, strict=True)
    ]


def _losses_of(
    model: PreTrainedModel, windows: Sequence[EvaluationWindow], *, batch_size: int, observe: Observer | None = None
) -> Tensor:
    ids, targets = [window.ids for window in windows], [window.targets for window in windows]
    return window_losses(model, ids, batch_size=batch_size, targets=targets, observe=observe)[0]


def kl_of(losses: Sequence[WindowLoss]) -> float:
    """Mean KL(dense || model) in nats per token; lower is better. NaN where it was not measured or is not finite."""
    divergences = [loss.kl_nats for loss in losses]
    if not losses or any(value is None or not math.isfinite(value) for value in divergences):
        return math.nan
    return mean_loss(
        math.fsum(value for value in divergences if value is not None), sum(loss.tokens for loss in losses)
    )


def perplexity_of(losses: Sequence[WindowLoss]) -> float:
    """exp(mean negative log-likelihood per token); unit 1, lower is better. NaN where a loss is not finite."""
    mean = mean_loss(sum(loss.nats for loss in losses), sum(loss.tokens for loss in losses))
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else math.nan
