"""Two stored runs side by side: what differs between them, what can be compared, and what cannot and why.

A comparison of two runs is made after the fact, so all of it is exploratory; and two runs differ in whatever their
manifests say they differ in, so no difference is put down to one cause here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis.between_runs import RunTables, compare_runs
from pruning_comparison.formatting import listed, per_cent
from pruning_comparison.metrics import METRICS, Alike, Kind, in_role, metric_named, of_kind
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.verdicts import interval_shown, shown
from pruning_comparison.store import Run

__all__ = [
    "Difference", "LeftOut", "compare", "comparison_findings", "differences", "limits",
]  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in both runs."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class LeftOut:
    """Something that is not compared, or compared with a reservation, and why.

    ``metrics`` are left out altogether; those of ``reserved`` are shown with ``note`` beside them.
    """

    what: str
    why: str
    metrics: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    note: str = ""


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """What the manifests of two runs say differently: settings, contents, model, versions, machine, commit."""
    found: list[Difference] = []
    for part, words in (
        ("spec", ""),
        ("inputs", "content of "),
        ("model", "model: "),
        ("versions", ""),
        ("hardware", "machine: "),
    ):
        one, other = _mapping(first.get(part)), _mapping(second.get(part))
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                found.append(Difference(f"{words}{key}", _words(one.get(key)), _words(other.get(key))))
    if first.get("commit") != second.get("commit"):
        found.append(Difference("commit", _words(first.get("commit")), _words(second.get("commit"))))
    return found


def limits(first: Run, second: Run) -> list[LeftOut]:
    """What is not compared, or only with a reservation, and why."""
    return [
        *_only_in_one(first.manifest.spec, second.manifest.spec),
        *_texts(first, second),
        *_generation(first.manifest.as_dict(), second.manifest.as_dict()),
        *_speed(first.manifest.as_dict(), second.manifest.as_dict()),
    ]


def same_tokens(first: Run, second: Run) -> bool:
    """Whether both runs scored the same windows with as many tokens and bytes in each, so that a token means the same."""
    return _window_sizes(first.measurements) == _window_sizes(second.measurements)


def other_machine(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the manifests name another machine, device, number of threads or version of torch."""
    one, other = _mapping(first.get("hardware")), _mapping(second.get("hardware"))
    torch = [_mapping(manifest.get("versions")).get("torch") for manifest in (first, second)]
    return one != other or torch[0] != torch[1]


def _only_in_one(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[LeftOut]:
    found = []
    for field, word in (
        ("pruning_methods", "method"),
        ("variants", "variant"),
        ("pruning_levels", "level"),
        ("temperatures", "temperature"),
    ):
        if word == "method" and not set(one[field]) & set(other[field]):
            why = "the runs share none, so every method of the second is set against every method of the first"
            found.append(LeftOut("methods", why))
            continue
        for mine, theirs, where in ((one, other, "first"), (other, one, "second")):
            for value in mine[field]:
                if value not in theirs[field]:
                    shown = per_cent(value) if word == "level" else f"{value:g}" if word == "temperature" else value
                    found.append(LeftOut(f"{word} {shown}", f"only the {where} run has it"))
    return found


def _texts(first: Run, second: Run) -> list[LeftOut]:
    contents = [run.manifest.inputs.get("eval_text") for run in (first, second)]
    if contents[0] != contents[1]:
        why = "the runs were evaluated on different texts, so there are no pairs of documents"
        return [LeftOut("perplexity and bits per byte", why, _compared("loss"))]
    if same_tokens(first, second):
        return []
    return [
        LeftOut(
            "perplexity",
            "the runs cut the evaluation text into other tokens or other windows, and a perplexity is per token. Bits per "
            "byte are compared instead; where the windows cover other stretches of a document, that adds noise.",
            _that_need("tokenizer", _compared("loss")),
        )
    ]


def _compared(*kinds: Kind) -> tuple[str, ...]:
    """Metrics of these kinds by which two runs are compared."""
    return tuple(metric.name for metric in of_kind(*kinds) if metric.compared and metric.direction != "none")


def _that_need(what: Alike, metrics: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics that mean the same in two runs only where both have the same of it."""
    return tuple(metric for metric in metrics if what in METRICS[metric].alike)


def _generation(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[LeftOut]:
    of_generation = _compared("text", "distance", "timing")
    if _mapping(one.get("inputs")).get("prompts") != _mapping(other.get("inputs")).get("prompts"):
        why = "the runs have different prompts, so there are no pairs of prompts"
        return [LeftOut("generated text and speed", why, of_generation)]
    found = []
    if one["spec"]["num_tokens"] != other["spec"]["num_tokens"]:
        why = "the runs generated texts of different length, on which these figures depend"
        left_out = _that_need("length", of_generation)
        found.append(LeftOut("generated text, tokens per second, end-to-end time", why, left_out))
    if _mapping(one.get("inputs")).get("model") != _mapping(other.get("inputs")).get("model"):
        why = "each run's texts were judged by its own unpruned model"
        judged = _that_need("dense model", of_generation)
        found.append(LeftOut("plausibility of the generated text", why, judged))
        why = (
            "they are counted in tokens, and where two models have different tokenizers a token is not the same amount of "
            "text. They are shown with this reservation."
        )
        counted = _that_need("tokenizer", of_generation)
        found.append(LeftOut("diversity, repetition, tokens per second", why, (), counted, "counted in other tokens"))
    return found


def _speed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[LeftOut]:
    """Timings are what a clock measured, and so what another machine measures differently."""
    timings = _compared("timing")
    if one["spec"]["batch_size"] != other["spec"]["batch_size"]:
        return [LeftOut("speed", "the runs were timed with batches of different size", timings)]
    if other_machine(one, other):
        why = (
            "the runs were timed on different machines, devices, numbers of threads or versions of torch: a difference "
            "says what these do, not what pruning does. It is shown and make_result so."
        )
        return [LeftOut("speed", why, (), timings, "another machine")]
    why = (
        "the runs were timed one after the other, not side by side: whatever else the machine did then counts too. It is "
        "shown and make_result so."
    )
    return [LeftOut("speed", why, (), timings, "timed at another time")]


# The comparison


def compare(first: Run, second: Run, *, seed: int = 0) -> pd.DataFrame:
    """The second run against the first: ``RUN_COLUMNS`` and "note", the reservations that a row is shown with.

    What ``limits`` leaves out is not in it.
    """
    found = limits(first, second)
    names = _model_names(first, second)
    tables = [
        RunTables(label, name, run.cells, run.measurements)
        for label, name, run in zip(("first run", "second run"), names, (first, second), strict=True)
    ]
    table = compare_runs(*tables, seed=seed)
    left_out = {metric for limit in found for metric in limit.metrics}
    kept = table[~table["metric"].isin(left_out)].reset_index(drop=True)
    notes = ["; ".join(limit.note for limit in found if metric in limit.reserved) for metric in kept["metric"]]
    return kept.assign(note=notes)


def _model_names(first: Run, second: Run) -> tuple[str, str]:
    """The models' names, told apart by their digests where two models have the same."""
    digests = [str(run.manifest.inputs.get("model")) for run in (first, second)]
    if first.model == second.model and digests[0] != digests[1]:
        return f"{first.model} ({digests[0]})", f"{second.model} ({digests[1]})"
    return first.model, second.model


def comparison_findings(compared: pd.DataFrame) -> list[Finding]:
    """What a comparison says, one finding for each method and variant: what is clearly different, and at which levels."""
    rows = [{str(key): value for key, value in row.items()} for row in compared.to_dict("records")]
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
                elif all(row["verdict"] == "inconclusive" for row in chosen):
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
    heat = "" if pd.isna(row["temperature"]) else f" at temperature {float(row['temperature']):g}"
    note = f" ({row['note']})" if row["note"] else ""
    return f"{label[:1].lower()}{label[1:]}{heat}{note}"


def _told(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One metric over the levels: where the second run is clearly lower or higher, and where the data do not decide."""
    parts = []
    for word, sign in (("lower", -1), ("higher", 1)):
        clear = [row for row in rows if row["verdict"] != "inconclusive" and sign * float(row["estimate"]) > 0]
        if clear:
            good = word == clear[0]["better"]
            levels = listed([f"{per_cent(row['level'])} ({shown(row, 'estimate')})" for row in clear])
            parts.append(f"{word} at {levels}, which is {'better' if good else 'worse'}")
    unclear = [per_cent(row["level"]) for row in rows if row["verdict"] == "inconclusive"]
    if unclear:
        parts.append(f"not clearly different at {listed(unclear)}")
    return f"{name[:1].upper()}{name[1:]} of the second run: {'; '.join(parts)}."


def _place(row: Mapping[str, Any]) -> str:
    heat = "" if pd.isna(row["temperature"]) else f", temperature {float(row['temperature']):g}"
    return f"{per_cent(float(row['level']))}{heat}"


def _window_sizes(measurements: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    rows = measurements[measurements["metric"].isin(["window_tokens", "window_bytes"])]
    rows = rows.drop_duplicates(["document", "window", "metric"])
    keys = zip(rows["document"], rows["window"], rows["metric"], strict=True)
    return dict(zip(keys, rows["value"], strict=True))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _words(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
