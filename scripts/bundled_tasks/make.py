"""Makes the bundled tasks' questions from the bundled held-out addresses, which no calibration and no training reads.

    python scripts/bundled_tasks/make.py

The rules are about words alone: no model chooses questions. What they ask for:

* ``sotu_last_word``: a passage of whole sentences, whose last word occurs in it before. Its length and the repetition make
  the word one that can be known, as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031).
* ``sotu_continuation``: the beginning of a passage, broken off in the middle of a sentence, and four ways to go on with as
  many words: the true one, and three that follow other breaks in the same address, as in HellaSwag (Zellers et al. 2019,
  arXiv:1905.07830), whose wrong endings a model has written.

Questions are spread evenly over each address and take turns by address, so that ``--limit`` takes of all alike.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pruning_comparison.texts import load_documents

FOLDER = Path(__file__).resolve().parents[2] / "src" / "pruning_comparison" / "data" / "tasks"
PER_ADDRESS = 10
SEED = 0

LAST_WORD_CONTEXT = (50, 100)
"""Words before the last one."""
LETTERS = 5
"""The last word has at least so many, which leaves out most words that carry no meaning."""

SAME_WORD = 5
"""The last word of so many passages at most, so that always saying one and the same word gains nothing."""

BREAK_CONTEXT = (30, 60)
BREAK_AFTER = 6
"""Words of its sentence before a break."""
GO_ON = 10
"""Words of a continuation."""

_END_OF_SENTENCE = re.compile(r"(?:(?<=[a-z]{4}[.?!])|(?<=[a-z]{4}[.?!]['\"]))\s+(?=[A-Z])")
_PLAIN_WORD = re.compile(r"[a-z]+")
_PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
_NO_PROSE = re.compile(r"[\[\]()]|[A-Z]{4}|\d\.\s")
"""Remarks of the reporter, headings, and numbered lists."""


def sentences_of(text: str) -> list[list[str]]:
    """The sentences of an address as words. One that holds no prose is an empty list, so that no passage runs across it."""
    plain = re.sub(r"\s+", " ", text.translate(_PLAIN_QUOTES))
    return [[] if _NO_PROSE.search(one) else one.split() for one in _END_OF_SENTENCE.split(plain)]


def context_before(
    sentences: Sequence[list[str]], number: int, words: int, bounds: tuple[int, int]
) -> list[str] | None:
    """Whole sentences before the sentence ``number``, and the first ``words`` of it, as many as lie within ``bounds``."""
    found = list(sentences[number][:words])
    for before in reversed(sentences[:number]):
        if len(found) >= bounds[0] or not before:
            break
        found = [*before, *found]
    return found if bounds[0] <= len(found) <= bounds[1] else None


def last_words(sentences: Sequence[list[str]]) -> list[dict[str, str]]:
    """All passages of an address whose last word occurs in them before."""
    found = []
    for number, sentence in enumerate(sentences):
        if len(sentence) < BREAK_AFTER or not sentence[-1].endswith("."):
            continue
        word = sentence[-1][:-1]
        context = context_before(sentences, number, len(sentence) - 1, LAST_WORD_CONTEXT)
        if len(word) < LETTERS or not _PLAIN_WORD.fullmatch(word) or context is None:
            continue
        known = {re.sub(r"[^a-z]", "", one.lower()) for one in context}
        if word in known:
            found.append({"context": " ".join(context), "word": word})
    return found


def breaks(sentences: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Passages broken off in the middle of a sentence, one a sentence at most, and how each goes on."""
    found = []
    for number, sentence in enumerate(sentences):
        words = (BREAK_AFTER + len(sentence) - GO_ON) // 2
        if len(sentence) < BREAK_AFTER + GO_ON or not sentence[words - 1][-1].isalpha():
            continue
        context = context_before(sentences, number, words, BREAK_CONTEXT)
        if context is not None:
            found.append((" ".join(context), " ".join(sentence[words : words + GO_ON])))
    return found


def spread(found: Sequence[object], count: int) -> list[int]:
    """Positions of at most ``count`` of them, evenly spread."""
    count = min(count, len(found))
    return [(2 * number + 1) * len(found) // (2 * count) for number in range(count)]


def in_turns(by_address: Sequence[Sequence[dict[str, object]]]) -> list[dict[str, object]]:
    """The first question of every address, then the second of every address, and so on."""
    longest = max(map(len, by_address))
    return [address[turn] for turn in range(longest) for address in by_address if turn < len(address)]


def main() -> None:
    generator = random.Random(SEED)
    words, continuations = [], []
    said: Counter[str] = Counter()
    for address in load_documents("bundled:held_out", option="--text"):
        sentences = sentences_of(address.text)
        chosen = []
        found = [one for one in last_words(sentences) if said[one["word"]] < SAME_WORD]
        for place in spread(found, PER_ADDRESS):
            if said[found[place]["word"]] < SAME_WORD:
                said[found[place]["word"]] += 1
                chosen.append({"address": address.name, **found[place]})
        words.append(chosen)
        broken = breaks(sentences)
        questions = []
        for place in spread(broken, PER_ADDRESS):
            context, true = broken[place]
            others = [end for number, (_, end) in enumerate(broken) if abs(number - place) > 3 and end != true]
            choices = [true, *generator.sample(others, 3)]
            order = generator.sample(range(4), 4)
            questions.append(
                {
                    "address": address.name,
                    "context": context,
                    "choices": [choices[one] for one in order],
                    "answer": order.index(0),
                }
            )
        continuations.append(questions)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, questions in (("sotu_last_word", words), ("sotu_continuation", continuations)):
        lines = [json.dumps(one, ensure_ascii=False) for one in in_turns(questions)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{name}: {len(lines)} questions")


if __name__ == "__main__":
    main()
