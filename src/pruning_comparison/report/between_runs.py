"""Two stored runs in words: what differs between them, what cannot be compared and why, and what was found.

What is compared, and what is not, is decided in ``analysis.between_runs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis import (
    NOT_ENOUGH,
    Difference,
    Limit,
    LimitReason,
    Part,
    RunTables,
    compare_runs,
    limits,
)
from pruning_comparison.formatting import capitalised, listed, per_cent
from pruning_comparison.metrics import in_role, metric_named
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.rows import rows_of
from pruning_comparison.report.verdicts import interval_shown, shown
from pruning_comparison.store import Run

__all__ = [
    "DifferenceInWords", "LimitInWords", "between_runs_findings", "compare", "difference_in_words",
    "limit_in_words",
]  # fmt: skip

_PART_WORDS: Mapping[Part, str] = {
    "spec": "", "inputs": "content of ", "model": "model: ", "versions": "", "hardware": "machine: ", "commit": "",
}  # fmt: skip

_LIMIT_WORDS: Mapping[LimitReason, tuple[str, str]] = {
    "no method in common": (
        "methods",
        "the runs share none, so every method of the second is set against every method of the first",
    ),
    "other evaluation text": (
        "perplexity and bits per byte",
        "the runs were evaluated on different texts, so there are no pairs of documents",
    ),
    "other tokens": (
        "perplexity",
        "the runs cut the evaluation text into other tokens or other windows, and a perplexity is per token. Bits per "
        "byte are compared instead; where the windows cover other stretches of a document, that adds noise.",
    ),
    "other prompts": (
        "generated text and speed",
        "the runs have different prompts, so there are no pairs of prompts",
    ),
    "other text length": (
        "generated text, tokens per second, end-to-end time",
        "the runs generated texts of different length, on which these figures depend",
    ),
    "other judge": (
        "plausibility of the generated text",
        "each run's texts were judged by its own unpruned model",
    ),
    "other tokenizer": (
        "diversity, repetition, tokens per second",
        "they are counted in tokens, and where two models have different tokenizers a token is not the same amount of "
        "text. They are shown with this reservation.",
    ),
    "other batch size": ("speed", "the runs were timed with batches of different size"),
    "another machine": (
        "speed",
        "the runs were timed on different machines, devices, numbers of threads or versions of torch: a difference "
        "says what these do, not what pruning does. It is shown and labelled so.",
    ),
    "timed at another time": (
        "speed",
        "the runs were timed one after the other, not side by side: whatever else the machine did then counts too. It is "
        "shown and labelled so.",
    ),
}
"""What is limited, and why."""

_NOTES: Mapping[LimitReason, str] = {
    "other tokenizer": "counted in other tokens",
    "another machine": "another machine",
    "timed at another time": "timed at another time",
}
"""What stands beside a figure that is shown with a reservation."""


@dataclass(frozen=True)
class DifferenceInWords:
    """One thing that is not the same in both runs."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class LimitInWords:
    """Something that is not compared, or compared with a reservation, and why."""

    what: str
    why: str


def difference_in_words(difference: Difference) -> DifferenceInWords:
    """A difference as a row of the report's table."""
    return DifferenceInWords(
        f"{_PART_WORDS[difference.part]}{difference.name}",
        _format_entry(difference.first),
        _format_entry(difference.second),
    )


def limit_in_words(limit: Limit) -> LimitInWords:
    """A limit as the report tells it."""
    if limit.only_in is None:
        return LimitInWords(*_LIMIT_WORDS[limit.reason])
    axis, value = limit.only_in.axis, limit.only_in.value
    shown_value = per_cent(value) if axis == "level" else f"{value:g}" if axis == "temperature" else value
    return LimitInWords(f"{axis} {shown_value}", f"only the {limit.only_in.run} run has it")


def compare(first: Run, second: Run) -> tuple[pd.DataFrame, list[Limit]]:
    """The second run against the first, and what is left out or reserved.

    The table has ``RUN_COLUMNS`` and "note", the reservations that a row is shown with. What the limits leave out is not in
    it.
    """
    tables = [
        RunTables(label, name, run.cells, run.measurements, run.manifest.as_dict())
        for label, name, run in zip(
            ("first run", "second run"), _model_names(first, second), (first, second), strict=True
        )
    ]
    found = limits(*tables)
    compared = compare_runs(*tables, left_out={metric for limit in found for metric in limit.left_out})
    notes = [
        "; ".join(_NOTES[limit.reason] for limit in found if metric in limit.reserved) for metric in compared["metric"]
    ]
    return compared.assign(note=notes), found


def _model_names(first: Run, second: Run) -> tuple[str, str]:
    """The models' names, told apart by their digests where two models have the same."""
    digests = [str(run.manifest.inputs.get("model")) for run in (first, second)]
    if first.model == second.model and digests[0] != digests[1]:
        return f"{first.model} ({digests[0]})", f"{second.model} ({digests[1]})"
    return first.model, second.model


def between_runs_findings(compared: pd.DataFrame) -> list[Finding]:
    """What a comparison says, one finding for each method and variant: what is clearly different, and at which levels."""
    rows = rows_of(compared)
    found = []
    for method, variant in dict.fromkeys((row["method"], row["variant"]) for row in rows):
        here = [row for row in rows if (row["method"], row["variant"]) == (method, variant) and row["level"] > 0]
        told: list[str] = []
        figures: list[str] = []
        unclear: list[str] = []
        same: list[str] = []
        for metric in in_role("two runs"):
            for temperature in dict.fromkeys(str(row["temperature"]) for row in here if row["metric"] == metric):
                chosen = [row for row in here if row["metric"] == metric and str(row["temperature"]) == temperature]
                name = _format_metric(metric, chosen[0])
                if all(float(row["ci_low"]) == 0 == float(row["ci_high"]) for row in chosen):
                    same.append(name)
                elif all(row["verdict"] == NOT_ENOUGH for row in chosen):
                    unclear.append(name)
                else:
                    told.append(_told(name, chosen))
                figures += [
                    f"{metric} at {_place(row)}: {shown(row, 'estimate')} [{interval_shown(row)}], n = {int(row['n'])}"
                    for row in chosen
                    if not pd.isna(row["estimate"])
                ]
        if same:
            told.append(f"Exactly the same at every level: {listed(same)}.")
        if unclear:
            told.append(f"The data do not tell the two runs apart at any level: {listed(unclear)}.")
        if told:
            found.append(Finding(f"{variant}, {method}", " ".join(told), "; ".join(figures)))
    return found


def _format_metric(metric: str, row: Mapping[str, Any]) -> str:
    """A metric's name inside a sentence, with its temperature and what it is reserved for."""
    label = metric_named(metric).label.replace(": distance", " (distance")
    label += ")" if "(distance" in label else ""
    temperature = "" if pd.isna(row["temperature"]) else f" at temperature {float(row['temperature']):g}"
    note = f" ({row['note']})" if row["note"] else ""
    return f"{label[:1].lower()}{label[1:]}{temperature}{note}"


def _told(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One metric over the levels: where the second run is clearly lower or higher, and where the data do not decide."""
    parts = []
    for word, sign in (("lower", -1), ("higher", 1)):
        clear = [row for row in rows if row["verdict"] != NOT_ENOUGH and sign * float(row["estimate"]) > 0]
        if clear:
            good = word == clear[0]["better"]
            levels = listed([f"{per_cent(row['level'])} ({shown(row, 'estimate')})" for row in clear])
            parts.append(f"{word} at {levels}, which is {'better' if good else 'worse'}")
    unclear = [per_cent(row["level"]) for row in rows if row["verdict"] == NOT_ENOUGH]
    if unclear:
        parts.append(f"not clearly different at {listed(unclear)}")
    return f"{capitalised(name)} of the second run: {'; '.join(parts)}."


def _place(row: Mapping[str, Any]) -> str:
    temperature = "" if pd.isna(row["temperature"]) else f", temperature {float(row['temperature']):g}"
    return f"{per_cent(float(row['level']))}{temperature}"


def _format_entry(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, (list, tuple)):
        return ", ".join(_format_entry(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
