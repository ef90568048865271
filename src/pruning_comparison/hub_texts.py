"""Texts of the Hugging Face hub, through the package datasets: which rows of which data set, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import reason_of, unknown_name

PREFIX = "hf:"
"""What the name of a text of the hub begins with."""

INSTALL_DATASETS = "pip install 'pruning-comparison[datasets]'"
_FORM = (
    "hf:DATASET:SPLIT, hf:DATASET:CONFIG:SPLIT, or either with #COLUMN, such as "
    "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"
)
_BETWEEN_PARTS = re.compile(r":(?![^\[]*\])")
"""A colon that is not inside the brackets of a slice, as in train[:1000]."""

_USUAL_COLUMNS = ("text", "page", "content", "document", "article", "story", "sentence")
"""Columns that hold a data set's text by custom, the most usual first."""


@dataclass(frozen=True)
class HubText:
    """A split of a data set: its id on the hub, or its folder, its configuration (None: its only one), and the column.

    ``split`` is what datasets takes: a name, or a slice such as train[:1000]. ``column`` is None where it is to be found.
    """

    dataset: str
    config: str | None
    split: str
    column: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the data set is named by an id of the hub, and not by a folder."""
        return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.dataset) is not None

    @property
    def name(self) -> str:
        """As it was asked for, without the prefix and the column; of a folder the last part."""
        dataset = self.dataset if self.on_hub else Path(self.dataset).name
        return ":".join(part for part in (dataset, self.config, self.split) if part)


def hub_text_of(source: str, option: str) -> HubText:
    """The split that ``hf:DATASET:CONFIG:SPLIT#COLUMN`` names. InputError, naming ``option``, for another form."""
    named, _, column = source.removeprefix(PREFIX).partition("#")
    parts = [part.strip() for part in _BETWEEN_PARTS.split(named)]
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"{source!r} names no split of a data set. Write {_FORM}.", option=option)
    return HubText(parts[0], parts[1] if len(parts) == 3 else None, parts[-1], column.strip() or None)


def rows_of_hub_text(wanted: HubText, option: str, *, most_bytes: int) -> list[str]:
    """The text of every row, in order, read through the package datasets: from its cache where it lies there.

    Nothing of a data set is executed: versions of datasets that run scripts are not accepted. InputError, naming
    ``option``, where the package is not installed, the data set cannot be reached or lacks what is asked for, no column is
    the text, or there are more than ``most_bytes`` of it.
    """
    table = _load(wanted, option)
    column = wanted.column or _text_column(table, wanted, option)
    if column not in table.column_names:
        raise InputError(f"{wanted.name}: {unknown_name('column', column, table.column_names)}", option=option)
    rows, size = [], 0
    for text in _values(table, column):
        if not isinstance(text, str):
            raise InputError(
                f"the column {column!r} of {wanted.name} holds a {type(text).__name__} and not text. Name another with "
                f"#COLUMN, from {', '.join(table.column_names)}.",
                option=option,
            )
        size += len(text.encode("utf-8", "surrogatepass"))
        if size > most_bytes:
            raise InputError(
                f"{wanted.name} holds more than {most_bytes:,} bytes of text. Give a part of it, such as "
                f"{wanted.split.partition('[')[0]}[:1000].",
                option=option,
            )
        rows.append(text)
    return rows


def _load(wanted: HubText, option: str) -> Any:
    """The split as datasets loads it; without a network, the copy in its cache."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(
            f"{wanted.name} is a data set of the hub, which needs the package datasets, and it is not installed: "
            f"{INSTALL_DATASETS}.",
            option=option,
        ) from None
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(wanted.dataset, wanted.config, split=wanted.split)
    except Exception as error:  # whatever keeps a data set from being read, it is the text that was asked for
        raise InputError(
            f"{wanted.name} cannot be read: {reason_of(error)}. {_advice(error)}", option=option
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _advice(error: Exception) -> str:
    """What to do where a data set cannot be read: its name may be wrong, or the hub out of reach."""
    kinds = {one.__name__ for one in type(error).__mro__}
    if (
        kinds & {"ConnectionError", "ConnectError", "HTTPError", "OfflineModeIsEnabled"}
        or "offline" in str(error).lower()
    ):
        return (
            "Without a network only what datasets has in its cache can be read: load it once with a network, or give a "
            "text file or a folder."
        )
    return f"Check the names of data set, configuration and split: {_FORM}."


def _text_column(table: Any, wanted: HubText, option: str) -> str:
    """The one column of text, or the one that holds it by custom."""
    kinds: dict[str, str] = {name: str(getattr(feature, "dtype", "")) for name, feature in table.features.items()}
    of_text: list[str] = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    usual = [name for name in _USUAL_COLUMNS if name in of_text]
    if usual:
        return usual[0]
    if len(of_text) == 1:
        return of_text[0]
    found = f"{len(of_text)} columns of text" if of_text else "no column of text"
    raise InputError(
        f"{wanted.name} has {found}. Name one with #COLUMN, from {', '.join(of_text or table.column_names)}.",
        option=option,
    )


def _values(table: Any, column: str) -> Iterator[Any]:
    """The values of a column, without those of the others being decoded."""
    for row in table.select_columns([column]):
        yield row[column]
