"""Word perplexity of WikiText as lm-evaluation-harness has it, from whole pages.

Its task "wikitext" rates the page after undoing WikiText's spacing, in windows that follow one another, and divides by the
number of words of the page before that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import InputError
from pruning_comparison.measure.perplexity import most_windows_at_once
from pruning_comparison.texts import Document, has_wikitext_title, tokenize

_SPACING: tuple[tuple[str, str], ...] = (
    ("s '", "s'"),
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_ENCLOSED: tuple[tuple[str, str], ...] = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
)  # fmt: skip
_REST: tuple[tuple[str, str], ...] = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"),
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """One page: the windows of its detokenised text, each of ids and how many of the last ones are scored, and its words."""

    document: str
    windows: tuple[tuple[Tensor, int], ...]
    words: int


def detokenised(page: str) -> str:
    """A page without the spaces that WikiText puts around punctuation: what the harness gives to the model.

    The steps and their order are those of its ``preprocess_wikitext.py`` (MIT licence); one step there, for years such as
    '90, has a slash too many in its pattern, changes nothing, and is left out.
    """
    for spaced, close in _SPACING:
        page = page.replace(spaced, close)
    for pattern, close in _ENCLOSED:
        page = re.sub(pattern, close, page)
    for spaced, close in _REST:
        page = page.replace(spaced, close)
    return page


def words_of(page: str) -> int:
    """Words of the page before its spacing is undone, as the harness counts them: one more for white space at each end."""
    return len(re.split(r"\s+", page))


def pages_of(documents: Sequence[Document], wanted: set[str], tokenizer: Any, *, window: int) -> list[Page]:
    """The pages among the documents whose names are ``wanted``, in windows of at most ``window`` predicted tokens.

    Windows follow one another; the first one's context is the tokenizer's begin-of-sequence token (end-of-text where it has
    none), later ones' the tokens before, of which the last window takes as many as fit. So does the harness with
    ``max_length`` set to ``window``. InputError where a document is not a page of WikiText, or the tokenizer has neither of
    the two tokens.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise InputError(
            "the tokenizer has neither a begin-of-sequence nor an end-of-text token, and the first word needs one before "
            "it. Leave it out.",
            option="--wikitext_words",
        )
    pages = []
    for number, document in enumerate(documents):
        if document.name not in wanted:
            continue
        if not has_wikitext_title(document.text):
            raise InputError(
                f"{document.name} does not begin with a title such as ' = Title = ', as pages of WikiText do. Give "
                "WikiText as --eval_text, or leave it out.",
                option="--wikitext_words",
            )
        # The line feed before the next title belongs to no page.
        page = document.text if number == len(documents) - 1 else document.text.removesuffix("\n")
        ids, _ = tokenize(tokenizer, detokenised(page))
        pages.append(Page(document.name, tuple(_rolling(ids, prefix, window)), words_of(page)))
    return pages


def _rolling(ids: list[int], prefix: int, window: int) -> list[tuple[Tensor, int]]:
    """Windows of context and scored tokens, and how many are scored."""
    found = [(torch.tensor([prefix, *ids[:window]]), min(window, len(ids)))] if ids else []
    for start in range(window, len(ids), window):
        end = min(start + window, len(ids))
        found.append((torch.tensor(ids[end - window - 1 : end]), end - start))
    return found


@torch.inference_mode()
def page_nats(model: PreTrainedModel, pages: Sequence[Page], *, batch_size: int) -> list[float]:
    """Negative log-likelihood of every page in nats. Windows of one length share a batch, so that no padding enters."""
    nats = [0.0] * len(pages)
    by_length: defaultdict[int, list[tuple[int, Tensor, int]]] = defaultdict(list)
    for number, page in enumerate(pages):
        for ids, scored in page.windows:
            by_length[len(ids)].append((number, ids, scored))
    vocabulary = int(model.config.get_text_config().vocab_size)
    for length, windows in by_length.items():
        at_once = most_windows_at_once(length, vocabulary, batch_size, on_gpu=model.device.type == "cuda")
        for start in range(0, len(windows), at_once):
            batch = windows[start : start + at_once]
            ids = torch.stack([one for _, one, _ in batch]).to(model.device)
            most = max(scored for _, _, scored in batch)
            # The last token is predicted and never read: a window may be as long as the model's context.
            logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=most).logits
            for row, (number, _, scored) in enumerate(batch):
                loss = torch.nn.functional.cross_entropy(
                    logits[row, -scored:].float(), ids[row, -scored:], reduction="sum"
                )
                nats[number] += float(loss.double())
    return nats
