"""The questions of the bundled tasks, as lm-evaluation-harness asks for them; nothing is downloaded or cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def _questions(name: str) -> dict[str, Any]:
    from datasets import Dataset

    lines = (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def last_word(**_: Any) -> dict[str, Any]:
    """The passages of sotu_last_word, as its one split."""
    return _questions("sotu_last_word")


def continuation(**_: Any) -> dict[str, Any]:
    """The passages of sotu_continuation, as its one split."""
    return _questions("sotu_continuation")
