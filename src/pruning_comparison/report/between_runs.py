"""Stored runs in words: what differs between them, what cannot be compared and why, and what was found.

Every run is compared with the first of them. What is compared, and what is not, is decided in ``analysis.between_runs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis import (
    RUN_COLUMNS,
    Difference,
    Limit,
    LimitReason,
    Part,
    RunTables,
    compare_runs,
    differences,
    limits,
)
from pruning_comparison.formatting import capitalised, format_value, listed, per_cent
from pruning_comparison.metrics import in_role, metric_named
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.rows import rows_of
from pruning_comparison.report.verdicts import interval_shown, shown
from pruning_comparison.store import Run

__all__ = [
    "ComparedRuns", "DifferenceInWords", "LimitInWords", "between_runs_findings", "compare", "compare_all",
    "differences_in_words", "limits_in_words", "run_name",
]  # fmt: skip

_CLEAR = ("supported", "refuted")
"""Verdicts of a row whose interval, after correction, leaves out no difference."""

_PART_WORDS: Mapping[Part, str] = {
    "spec": "", "inputs": "content of ", "model": "model: ", "revisions": "revision of ", "versions": "",
    "hardware": "machine: ", "commit": "",
}  # fmt: skip

_LIMIT_WORDS: Mapping[LimitReason, tuple[str, str]] = {
    "no method in common": (
        "methods",
        "the runs share no method, so every method of one run is compared with every method of the other",
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
        "generated text, speed and memory",
        "the runs have different prompts, on which all of these depend, and there are no pairs of prompts",
    ),
    "other text length": (
        "generated text, tokens per second, end-to-end time, memory while generating",
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
    "other batch size": ("speed and memory", "the runs were timed with batches of different size"),
    "other formula": (
        "metrics of another revision",
        "their formula has changed between the two versions of this package that measured the runs",
    ),
    "other protocol": (
        "everything that is measured",
        "the way in which cells are measured has changed between the two versions of this package. It is shown and "
        "labelled so.",
    ),
    "another machine": (
        "speed",
        "the runs were timed on different machines, devices, numbers of threads or versions of torch, so a difference "
        "may come from these and not from pruning. It is shown and labelled so.",
    ),
    "timed at another time": (
        "speed",
        "the runs were timed one after the other, not side by side, so a difference may come from what else the machine "
        "did then. It is shown and labelled so.",
    ),
}
"""What is limited, and why."""

_NOTES: Mapping[LimitReason, str] = {
    "other tokenizer": "counted in other tokens",
    "another machine": "another machine",
    "timed at another time": "timed at another time",
    "other protocol": "measured in another way",
}
"""What stands beside a figure that is shown with a reservation."""


@dataclass(frozen=True)
class ComparedRuns:
    """The first of several runs and another one.

    ``table`` has ``RUN_COLUMNS``, and "note": the reservations that a row is shown with.
    """

    name: str
    table: pd.DataFrame
    limits: tuple[Limit, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class DifferenceInWords:
    """One thing that is not the same in all runs, with its value in each."""

    what: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class LimitInWords:
    """Something that is not compared, or compared with a reservation, and why."""

    what: str
    why: str


def run_name(number: int) -> str:
    """What a run is called in its place among all, counted from 0: "run 1"."""
    return f"run {number + 1}"


def compare_all(runs: Sequence[Run]) -> list[ComparedRuns]:
    """Every run but the first against the first."""
    found = []
    for number, other in enumerate(runs[1:], start=1):
        table, left_out = compare(runs[0], other, names=(run_name(0), run_name(number)))
        changed = differences(runs[0].manifest.as_dict(), other.manifest.as_dict())
        found.append(ComparedRuns(run_name(number), table, tuple(left_out), tuple(changed)))
    return found


def compare(
    first: Run, second: Run, *, names: tuple[str, str] = ("run 1", "run 2")
) -> tuple[pd.DataFrame, list[Limit]]:
    """The second run against the first, and what is left out or reserved.

    The table has ``RUN_COLUMNS`` and "note", the reservations that a row is shown with. What the limits leave out is not in
    it.
    """
    tables = [
        RunTables(label, name, run.cells, run.measurements, run.manifest.as_dict())
        for label, name, run in zip(names, _model_names(first, second), (first, second), strict=True)
    ]
    found = limits(*tables)
    compared = compare_runs(*tables, left_out={metric for limit in found for metric in limit.left_out})
    notes = [
        "; ".join(_NOTES[limit.reason] for limit in found if metric in limit.reserved) for metric in compared["metric"]
    ]
    return compared.assign(note=notes), found


def joined(compared: Sequence[ComparedRuns]) -> pd.DataFrame:
    """All tables below one another, with "run" before ``RUN_COLUMNS``: which run is compared with the first."""
    columns = ["run", *RUN_COLUMNS, "note"]
    filled = [one.table.assign(run=one.name) for one in compared if len(one.table)]
    return pd.concat(filled, ignore_index=True)[columns] if filled else pd.DataFrame(columns=columns)


def differences_in_words(compared: Sequence[ComparedRuns]) -> list[DifferenceInWords]:
    """What is not the same in all runs: one row each, with the first run's value and those of the others."""
    rows: dict[tuple[Part, str], Difference] = {}
    for one in compared:
        for difference in one.differences:
            rows.setdefault((difference.part, difference.name), difference)
    others = [{(d.part, d.name): d.second for d in one.differences} for one in compared]
    return [
        DifferenceInWords(
            f"{_PART_WORDS[part]}{name}",
            tuple(
                _format_entry(value) for value in (row.first, *(other.get((part, name), row.first) for other in others))
            ),
        )
        for (part, name), row in rows.items()
    ]


def limits_in_words(compared: Sequence[ComparedRuns]) -> list[LimitInWords]:
    """What is not compared, or only with a reservation, as the report lists it.

    With several runs, what holds for some of them alone says for which.
    """
    known: dict[LimitInWords, list[str]] = {}
    for one in compared:
        for limit in one.limits:
            known.setdefault(_limit_in_words(limit, one.name), []).append(one.name)
    return [
        words
        if len(compared) == 1 or len(names) == len(compared)
        else LimitInWords(f"{words.what} ({listed(names)})", words.why)
        for words, names in known.items()
    ]


def _limit_in_words(limit: Limit, other: str) -> LimitInWords:
    if limit.only_in is None:
        return LimitInWords(*_LIMIT_WORDS[limit.reason])
    axis, value = limit.only_in.axis, limit.only_in.value
    shown_value = per_cent(value) if axis == "level" else f"{value:g}" if axis == "temperature" else value
    return LimitInWords(
        f"{axis} {shown_value}", f"only {run_name(0) if limit.only_in.run == 'first' else other} has it"
    )


def _model_names(first: Run, second: Run) -> tuple[str, str]:
    """The models' names, told apart by their digests where two models have the same."""
    digests = [str(run.manifest.inputs.get("model")) for run in (first, second)]
    if first.model == second.model and digests[0] != digests[1]:
        return f"{first.model} ({digests[0]})", f"{second.model} ({digests[1]})"
    return first.model, second.model


def between_runs_findings(compared: pd.DataFrame, name: str = "run 2") -> list[Finding]:
    """What a comparison says, one finding for each method and variant: what is clearly different, and at which levels.

    ``name`` is the run that is compared with the first.
    """
    rows = rows_of(compared)
    found = []
    for method, variant in dict.fromkeys((row["method"], row["variant"]) for row in rows):
        here = [row for row in rows if (row["method"], row["variant"]) == (method, variant) and row["level"] > 0]
        sentences: list[str] = []
        figures: list[str] = []
        unclear: list[str] = []
        same: list[str] = []
        for metric in in_role("two runs"):
            for temperature in dict.fromkeys(str(row["temperature"]) for row in here if row["metric"] == metric):
                chosen = [row for row in here if row["metric"] == metric and str(row["temperature"]) == temperature]
                label = _format_metric(metric, chosen[0])
                if all(float(row["ci_low"]) == 0 == float(row["ci_high"]) for row in chosen):
                    same.append(label)
                elif not any(row["verdict"] in _CLEAR for row in chosen):
                    unclear.append(label)
                else:
                    sentences.append(f"{capitalised(label)}: {_changes(chosen)}.")
                figures += [
                    f"{metric} at {_place(row)}: {shown(row, 'estimate')} [{interval_shown(row)}], n = {int(row['n'])}"
                    for row in chosen
                    if not pd.isna(row["estimate"])
                ]
        if same:
            sentences.append(f"Exactly the same at every level: {listed(same)}.")
        if unclear:
            sentences.append(f"No clear difference at any level: {listed(unclear)}.")
        if sentences:
            found.append(Finding(f"{capitalised(name)}: {variant}, {method}", " ".join(sentences), "; ".join(figures)))
    return found


def _format_metric(metric: str, row: Mapping[str, Any]) -> str:
    """A metric's name inside a sentence, with its temperature and what it is reserved for."""
    label = metric_named(metric).label.replace(": distance", " (distance")
    label += ")" if "(distance" in label else ""
    temperature = "" if pd.isna(row["temperature"]) else f" at temperature {float(row['temperature']):g}"
    note = f" ({row['note']})" if row["note"] else ""
    return f"{label[:1].lower()}{label[1:]}{temperature}{note}"


def _changes(rows: Sequence[Mapping[str, Any]]) -> str:
    """One metric over the levels: where the run is clearly lower or higher than the first, and where that is unclear."""
    parts = []
    for word, sign in (("lower", -1), ("higher", 1)):
        clear = [row for row in rows if row["verdict"] in _CLEAR and sign * float(row["estimate"]) > 0]
        if clear:
            good = word == clear[0]["better"]
            levels = listed([f"{per_cent(row['level'])} ({shown(row, 'estimate')})" for row in clear])
            parts.append(f"{word} at {levels}, which is {'better' if good else 'worse'}")
    unclear = [per_cent(row["level"]) for row in rows if row["verdict"] not in _CLEAR]
    if unclear:
        parts.append(f"unclear at {listed(unclear)}")
    return "; ".join(parts)


def _place(row: Mapping[str, Any]) -> str:
    temperature = "" if pd.isna(row["temperature"]) else f", temperature {float(row['temperature']):g}"
    return f"{per_cent(float(row['level']))}{temperature}"


def _format_entry(value: Any) -> str:
    return "not recorded" if value is None else format_value(value)
