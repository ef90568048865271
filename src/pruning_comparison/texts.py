"""Calibration text, evaluation text and prompts: bundled, from a file or folder of the user's, or from the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning_comparison.errors import InputError
from pruning_comparison.hub_texts import PREFIX, hub_text_of, rows_of_hub_text
from pruning_comparison.paths import kind_of, names_in

BUNDLED_TEXTS = ("held_out", "validation", "calibration")
DEFAULT_EVAL_TEXT = "bundled:held_out"
DEFAULT_CALIBRATION_TEXT = "bundled:calibration"
_MOST_TEXT_BYTES = 1 << 30
_DOCUMENTS_AT_ONCE = 64
"""Documents that a tokenizer reads side by side: enough for its threads, few enough for memory."""
"""No text that is read is larger, unpacked: a small .gz file can hold any amount."""

_WIKITEXT_TITLE = re.compile(r"^ = (?!=)\S(?:[^\r\n]*\S)?(?<!=) = ?\r?$", re.MULTILINE)
"""A title, of one letter or more, between single signs; sections of an article have two or more. Lines may end in CRLF."""


@dataclass(frozen=True)
class Document:
    """One text that belongs together: windows of one document are one cluster in the statistics."""

    name: str
    text: str


def load_documents(source: str, *, option: str) -> list[Document]:
    """The documents of ``source``: ``bundled:<name>``, a text file, or a folder of ``.txt`` files (one document each).

    A file is one document, unless it has WikiText headings (``= Title =``): then every article is one. ``.gz`` files are
    unpacked. ``hf:DATASET:CONFIG:SPLIT`` is a data set of the hub: every row is one document, unless rows are lines of
    WikiText, which are joined into articles. InputError, naming ``option``, where there is nothing to read.
    """
    if source.startswith("bundled:"):
        return _bundled_documents(source.removeprefix("bundled:"), option)
    if source.startswith(PREFIX):
        return _hub_documents(source, option)
    path, kind = Path(source), kind_of(source, option)
    if kind == "folder":
        files_of_text = [path / name for name in names_in(path, option) if name.endswith(".txt")]
        documents = [Document(file.name, _read_text(file, option)) for file in files_of_text]
    elif kind == "file":
        documents = _split_articles(path.name, _read_text(path, option))
    else:
        raise InputError(
            f"{option}: {source!r} does not exist. Give a text file, a folder of .txt files, hf:DATASET:SPLIT of the hub, "
            f"or one of {', '.join('bundled:' + name for name in BUNDLED_TEXTS)}."
        )
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InputError(f"{option}: {source!r} holds no text. Give a file with text, or a folder of .txt files.")
    return documents


def has_wikitext_title(text: str) -> bool:
    """Whether a text begins with a title of WikiText, as an article of it does."""
    return _WIKITEXT_TITLE.match(text) is not None


def text_name(source: str) -> str:
    """What a text is called where its place does not matter: the last part of a path, or the split of a data set."""
    return hub_text_of(source, "text").name if source.startswith(PREFIX) else Path(source).name


def text_facts(source: str) -> dict[str, str]:
    """Which text it is: its name as ``text``, and of a data set of the hub ``dataset``, ``config`` and ``split`` too."""
    if not source.startswith(PREFIX):
        return {"text": text_name(source)}
    found = hub_text_of(source, "text")
    known = {"dataset": found.dataset, "config": found.config, "split": found.split} if found.on_hub else {}
    return {"text": found.name, **{name: value for name, value in known.items() if value is not None}}


def load_prompts(prompt_file: str | None, max_prompts: int) -> list[str]:
    """The first ``max_prompts`` prompts: one per line of ``prompt_file``, empty lines left out; bundled ones if None."""
    if prompt_file is None:
        lines = files("pruning_comparison").joinpath("data", "texts", "prompts.txt").read_text("utf-8").splitlines()
    else:
        path = Path(prompt_file)
        if kind_of(prompt_file, "--prompt_file") != "file":
            raise InputError(
                f"--prompt_file: {prompt_file!r} does not exist. Give a text file with one prompt per line."
            )
        lines = _read_text(path, "--prompt_file").splitlines()
    prompts = [line.strip() for line in lines if line.strip()][:max_prompts]
    if not prompts:
        raise InputError(f"--prompt_file: {prompt_file!r} holds no prompt. Write one prompt per line.")
    return prompts


def digest(parts: list[str]) -> str:
    """Short content hash of texts, for the identity of a run."""
    joined = json.dumps(parts, ensure_ascii=True)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of ``text`` without special tokens, and the [start, end) characters that each stands for."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def whole_windows(documents: list[Document], tokenizer: Any, window: int, *, bos: int | None = None) -> Tensor:
    """All windows [M, window] of token ids that follow one another in a document; what is left at its end is left out.

    Where the model's texts begin with a token ``bos``, each window does, and holds one token less of the text.
    """
    pieces: list[Tensor] = []
    of_text = window - (bos is not None)
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for found in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            whole = len(found) // of_text
            if whole:
                pieces.append(torch.tensor(found[: whole * of_text]).view(whole, of_text))
    if not pieces:
        return torch.empty(0, window, dtype=torch.long)
    windows = torch.cat(pieces)
    return windows if bos is None else torch.cat([torch.full((len(windows), 1), bos), windows], 1)


def sample_windows(available: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """A random sample of the windows [M, window], without replacement: ceil(tokens / window) of them.

    InputError where there are fewer.
    """
    check_enough(available, tokens)
    return available[torch.randperm(len(available), generator=generator)[: -(-tokens // available.shape[1])]]


def unread_windows(available: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """The windows [M, window] that ``sample_windows`` leaves behind with the same arguments, in random order."""
    return available[torch.randperm(len(available), generator=generator)[-(-tokens // available.shape[1]) :]]


def check_enough(available: Tensor, tokens: int) -> None:
    """InputError where the windows [M, window] do not hold ``tokens``."""
    if available.numel() < tokens:
        raise InputError(
            f"--calibration_tokens: {tokens} tokens asked for, but the calibration text has only {available.numel()} in "
            f"whole windows of {available.shape[1]}. Ask for fewer, or give a longer --calibration_text."
        )


def _bundled_documents(name: str, option: str) -> list[Document]:
    if name not in BUNDLED_TEXTS:
        raise InputError(f"{option}: there is no bundled text {name!r}. Choose one of {', '.join(BUNDLED_TEXTS)}.")
    packed = files("pruning_comparison").joinpath("data", "texts", f"{name}.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return [Document(row["name"], row["text"]) for row in rows]


def _hub_documents(source: str, option: str) -> list[Document]:
    """Rows of a data set as documents; lines of WikiText joined into articles, blank lines as WikiText's files have them.

    Rows are lines where one is a title alone. Then a document is what lm-evaluation-harness's document-level WikiText calls
    a page, and what the raw file gives.
    """
    wanted = hub_text_of(source, option)
    rows = rows_of_hub_text(wanted, option, most_bytes=_MOST_TEXT_BYTES)
    if any(_WIKITEXT_TITLE.fullmatch(row.removesuffix("\n")) for row in rows):
        lines = [row if row.strip() else " \n" for row in rows]
        documents = _split_articles(
            wanted.name, "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
        )
    else:
        documents = [Document(f"{wanted.name}#{number}", row) for number, row in enumerate(rows)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InputError(f"{option}: {source!r} holds no text. Give another split or column.")
    return documents


def _read_text(path: Path, option: str) -> str:
    """A file's text, unpacked. InputError, naming ``option``, for what is no file, no UTF-8, or too much."""
    if kind_of(path, option) != "file":
        raise InputError(f"{option}: {str(path)!r} is not a file. Give a text file, or a folder of .txt files.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(_MOST_TEXT_BYTES + 1)
        if len(raw) > _MOST_TEXT_BYTES:
            raise InputError(f"{option}: {str(path)!r} holds more than {_MOST_TEXT_BYTES:,} bytes. Give a part of it.")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{option}: {str(path)!r} is not UTF-8 text (byte {error.start}). Convert it to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{option}: {str(path)!r} cannot be read: {error}.") from error


def _split_articles(name: str, text: str) -> list[Document]:
    starts = [match.start() for match in _WIKITEXT_TITLE.finditer(text)]
    if not starts:
        return [Document(name, text)]
    ends = [*starts[1:], len(text)]
    return [
        Document(f"{name}#{number}", text[start:end])
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
