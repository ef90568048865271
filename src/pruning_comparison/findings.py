"""What the tables say, in plain sentences for readers who know no statistics.

A difference is claimed only where its interval leaves out zero, in agency's favour and against it alike; else the
sentence says that the data do not tell. Nothing is estimated here, and no formal verdict is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

__all__ = ["Finding", "interval_with_unit", "plain_findings", "plain_number", "with_unit"]

AGENCY_VS_BASELINE = "agency vs baseline"
_DO_NOT_TELL = "the data do not tell"
_ONE_OBSERVATION = "one observation, no interval"

_Direction = Literal["higher", "lower", "unclear", "single"]


@dataclass(frozen=True)
class Finding:
    """One thing the tables say: what it is about, the sentence, and the numbers that stand behind it."""

    heading: str
    sentence: str
    evidence: str


@dataclass(frozen=True)
class _Question:
    """A metric on which agency is set beside the baseline, and the words for more and less of it."""

    metric: str
    heading: str
    subject: str
    more: str
    less: str


_QUESTIONS = (
    _Question("perplexity", "quality, agency beside baseline", "agency's perplexity", "higher", "lower"),
    _Question("tokens_per_second", "speed, agency beside baseline", "agency's speed", "higher", "lower"),
    _Question("first_token_latency_s", "first-token latency", "agency's wait for the first token", "longer", "shorter"),
    _Question(
        "distinct_2_distance",
        "diversity of the text",
        "the distance of agency's diversity (distinct-2) from that of the unpruned model",
        "larger",
        "smaller",
    ),
    _Question(
        "seq_rep_4_distance",
        "repetition in the text",
        "the distance of agency's repetition (seq-rep-4) from that of the unpruned model",
        "larger",
        "smaller",
    ),
)


# Numbers in words


def plain_number(value: float) -> str:
    """A number with three significant digits and thousands separated; "missing" where there is none."""
    if not math.isfinite(value):
        return "missing" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e15:
        return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "\N{MINUS SIGN}")


def with_unit(value: float, unit: str) -> str:
    """A number and its unit, bytes and seconds scaled so that they read well."""
    if not math.isfinite(value):
        return plain_number(value)
    if unit == "byte":
        for power, word in ((9, "GB"), (6, "MB"), (3, "kB")):
            if abs(value) >= 10**power:
                return f"{plain_number(value / 10**power)} {word}"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{plain_number(value * 1000)} ms"
    return plain_number(value) if unit in ("1", "") else f"{plain_number(value)} {unit}"


def interval_with_unit(low: float, high: float, unit: str) -> str:
    """Both ends of an interval, the unit written once where both have the same."""
    first, second = with_unit(low, unit), with_unit(high, unit)
    number, _, word = first.partition(" ")
    return f"{number if word and second.endswith(f' {word}') else first} to {second}"


def _per_cent(level: float) -> str:
    return f"{level:g} %"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _interval(row: Mapping[str, Any], unit: str) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    n = "n unknown" if pd.isna(row["n"]) else f"n = {int(row['n'])}"
    if math.isnan(low) or math.isnan(high):
        return f"{with_unit(float(row['estimate']), unit)} (no interval, {n})"
    return f"{with_unit(float(row['estimate']), unit)} [{interval_with_unit(low, high, unit)}], {n}"


# Reading the tables


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _measured(summary: pd.DataFrame, metric: str, method: str, variant: str) -> list[dict[str, Any]]:
    """The rows with a finite estimate, by level and temperature."""
    chosen = (summary["metric"] == metric) & (summary["method"] == method) & (summary["variant"] == variant)
    rows = summary[chosen].sort_values(["level", "temperature"])
    return [row for row in _records(rows) if math.isfinite(row["estimate"])]


def _compared(contrasts: pd.DataFrame, metric: str, method: str) -> list[dict[str, Any]]:
    """All rows of agency against the baseline, those without an estimate too, by level and temperature."""
    chosen = (
        (contrasts["metric"] == metric)
        & (contrasts["method"] == method)
        & (contrasts["contrast"] == AGENCY_VS_BASELINE)
    )
    return _records(contrasts[chosen].sort_values(["level", "temperature"]))


def _direction(row: Mapping[str, Any]) -> _Direction:
    """What an interval lets one say: which way the difference goes, nothing, or that there is no interval to ask."""
    if pd.isna(row["n"]) or row["n"] < 2:
        return "single"
    if row["ci_low"] > 0:
        return "higher"
    return "lower" if row["ci_high"] < 0 else "unclear"


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> _Direction:
    """Whether two intervals leave a gap, and to which side the second lies. Overlap says nothing."""
    if min(first["n"], second["n"]) < 2 or pd.isna(first["n"]) or pd.isna(second["n"]):
        return "single"
    if second["ci_low"] > first["ci_high"]:
        return "higher"
    return "lower" if second["ci_high"] < first["ci_low"] else "unclear"


def _where(row: Mapping[str, Any], several_temperatures: bool) -> str:
    place = _per_cent(float(row["level"]))
    return f"{place} (temperature {float(row['temperature']):g})" if several_temperatures else place


# The findings


def plain_findings(
    summary: pd.DataFrame, contrasts: pd.DataFrame, cells: pd.DataFrame, manifest: Mapping[str, Any]
) -> list[Finding]:
    """Say what was found, method by method, then what holds for the run as a whole.

    ``summary`` has one row per estimate, ``contrasts`` one per comparison with the baseline, ``cells`` one per
    (variant, method, iteration, level). ``manifest`` supplies the number of heads where ``cells`` has none.
    """
    found: list[Finding] = []
    for method in [str(name) for name in summary["method"].dropna().unique()]:
        quality, speed, latency, diversity, repetition = (
            _difference(contrasts, method, question) for question in _QUESTIONS
        )
        candidates = [
            _baseline_quality(summary, method),
            quality,
            _change_of_speed(summary, method),
            speed,
            latency,
            diversity,
            repetition,
            _by_temperature(summary, contrasts, method),
            _cost_of_adaptation(summary, method),
        ]
        found += [finding for finding in candidates if finding is not None]
    closing = [_same_at_level_0(contrasts), _levels_reached(cells, manifest), _failures(cells)]
    found += [finding for finding in closing if finding is not None]
    if not (contrasts["contrast"] == AGENCY_VS_BASELINE).any():
        found.append(
            Finding(
                "No comparison",
                "Agency and baseline were not compared in this run, so nothing can be said about which is better.",
                "No row of the contrasts table compares them.",
            )
        )
    return found


def _baseline_quality(summary: pd.DataFrame, method: str) -> Finding | None:
    """What pruning alone does: the baseline's perplexity at each level beside its own value at level 0."""
    rows = _measured(summary, "perplexity", method, "baseline")
    if not rows:
        return None
    heading = f"{method}: what pruning does to the baseline"
    dense = next((row for row in rows if row["level"] == 0), None)
    of_baseline = (
        (summary["variant"] == "baseline") & (summary["metric"] == "perplexity") & (summary["method"] == method)
    )
    levels = sorted(set(summary.loc[of_baseline, "level"].dropna()) - {row["level"] for row in rows})
    missing = f" It is missing at {_listed([_per_cent(level) for level in levels])}." if levels else ""
    if dense is None:
        told = _listed([f"{with_unit(row['estimate'], '1')} at {_per_cent(row['level'])}" for row in rows])
        sentence = (
            f"The baseline's perplexity (how surprised the model is by text; lower is better) is {told}. "
            f"Level 0 was not measured, so {_DO_NOT_TELL} what pruning changed.{missing}"
        )
        return Finding(heading, sentence, _evidence(rows, False, "1"))
    parts, unclear, single = [], [], False
    for row in rows:
        if row["level"] == 0:
            continue
        times = row["estimate"] / dense["estimate"] if dense["estimate"] else math.nan
        parts.append(f"{plain_number(row['estimate'])} at {_per_cent(row['level'])} ({plain_number(times)} times)")
        way = _apart(dense, row)
        single = single or way == "single"
        if way == "unclear":
            unclear.append(_per_cent(row["level"]))
    start = (
        f"Without pruning, the baseline's perplexity (how surprised the model is by text; lower is better) is "
        f"{plain_number(dense['estimate'])}"
    )
    sentence = f"{start}. With heads pruned by {method} it is {_listed(parts)}." if parts else f"{start}."
    sentence += missing
    if unclear:
        sentence += (
            f" At {_listed(unclear)} the interval overlaps that of level 0, so by these intervals {_DO_NOT_TELL} "
            "whether pruning changed it there."
        )
    if single:
        sentence += f" This is {_ONE_OBSERVATION}: how much of it is chance cannot be said."
    return Finding(heading, sentence, _evidence(rows, False, "1"))


def _difference(contrasts: pd.DataFrame, method: str, question: _Question) -> Finding | None:
    """Agency against baseline on one metric: where it is clearly more, clearly less, and where the data do not tell."""
    every = [row for row in _compared(contrasts, question.metric, method) if row["level"] > 0]
    rows = [row for row in every if math.isfinite(row["estimate"])]
    if not rows:
        return None
    temperatures = sorted({float(row["temperature"]) for row in every if not pd.isna(row["temperature"])})
    if len(temperatures) > 1:
        told = []
        for value in temperatures:
            there = [row for row in every if row["temperature"] == value]
            told.append(f"At temperature {value:g} {_told(there, question)}.")
        sentence = " ".join(told)
    else:
        sentence = f"{_told(every, question)}."
        sentence = f"{sentence[0].upper()}{sentence[1:]}"
    better = str(rows[0]["better"])
    if better in ("higher", "lower") and any(_direction(row) == _against(better) for row in rows):
        sentence += " This goes against the expectation that agency is better."
    evidence = _evidence(rows, len(temperatures) > 1, str(rows[0]["unit"]))
    return Finding(f"{method}: {question.heading}", sentence, evidence)


def _told(rows: Sequence[Mapping[str, Any]], question: _Question) -> str:
    """One clause per kind of outcome, each with its levels."""
    finite = [row for row in rows if math.isfinite(row["estimate"])]
    parts = []
    way: _Direction
    for way, word in (("lower", question.less), ("higher", question.more)):
        there = [row for row in finite if _direction(row) == way]
        if there:
            better = str(there[0]["better"])
            verdict = "" if better == "none" else ", which is better" if better == way else ", which is worse"
            places = _listed([f"{_per_cent(row['level'])} (by {_size(row)})" for row in there])
            parts.append(f"{question.subject} is {word} than the baseline's at {places}{verdict}")
    unclear = [_per_cent(row["level"]) for row in finite if _direction(row) == "unclear"]
    if unclear:
        parts.append(f"{_DO_NOT_TELL} whether {question.subject} differs from the baseline's at {_listed(unclear)}")
    single = [f"{_signed(row)} at {_per_cent(row['level'])}" for row in finite if _direction(row) == "single"]
    if single:
        parts.append(
            f"{question.subject} differed from the baseline's by {_listed(single)}, but each is {_ONE_OBSERVATION}"
        )
    missing = [_per_cent(row["level"]) for row in rows if not math.isfinite(row["estimate"])]
    if missing:
        parts.append(f"the comparison is missing at {_listed(missing)}")
    return "; ".join(parts)


def _against(better: str) -> _Direction:
    return "lower" if better == "higher" else "higher"


def _size(row: Mapping[str, Any]) -> str:
    return f"{plain_number(abs(row['estimate']))}{' %' if row['unit'] == '%' else ''}"


def _signed(row: Mapping[str, Any]) -> str:
    sign = "+" if row["estimate"] > 0 else ""
    return f"{sign}{plain_number(row['estimate'])}{' %' if row['unit'] == '%' else ''}"


def _evidence(rows: Sequence[Mapping[str, Any]], several_temperatures: bool, unit: str) -> str:
    return "; ".join(f"at {_where(row, several_temperatures)}: {_interval(row, unit)}" for row in rows)


def _change_of_speed(summary: pd.DataFrame, method: str) -> Finding | None:
    """Whether speed at the highest level differs from speed at level 0, for each of the two, and what was possible."""
    sentences, evidence = [], []
    for variant in ("baseline", "agency"):
        rows = _measured(summary, "tokens_per_second", method, variant)
        dense = next((row for row in rows if row["level"] == 0), None)
        if not rows or dense is None or rows[-1]["level"] == 0:
            continue
        top = rows[-1]
        went = f"{plain_number(dense['estimate'])} to {plain_number(top['estimate'])} tokens per second"
        between = f"from level 0 to {_per_cent(top['level'])}"
        change = {
            "higher": f"The {variant} model gets faster: {went} {between}.",
            "lower": f"The {variant} model gets slower: {went} {between}.",
            "unclear": (
                f"The {variant} model went from {went} {between}; the intervals overlap, so by these intervals "
                f"{_DO_NOT_TELL} whether its speed changed."
            ),
            "single": f"The {variant} model went from {went} {between}: {_ONE_OBSERVATION} at a level.",
        }
        sentences.append(change[_apart(dense, top)])
        evidence.append(f"{variant}: {_evidence([dense, top], False, 'token/s')}")
        ceiling = [
            row
            for row in _measured(summary, "tokens_per_second_ceiling", method, variant)
            if row["level"] == top["level"]
        ]
        if ceiling:
            evidence.append(f"the bytes left would allow {plain_number(ceiling[0]['estimate'])} token/s")
    if not sentences:
        return None
    return Finding(f"{method}: what pruning does to speed", " ".join(sentences), "; ".join(evidence))


def _by_temperature(summary: pd.DataFrame, contrasts: pd.DataFrame, method: str) -> Finding | None:
    """At the highest level, whose generated text is nearer to the dense model's, temperature by temperature."""
    compared = _compared(contrasts, "generation_perplexity_distance", method)
    rows = [row for row in compared if math.isfinite(row["estimate"])]
    if not rows or max(row["level"] for row in rows) == 0:
        return None
    top = max(row["level"] for row in rows)
    rows = [row for row in rows if row["level"] == top and not pd.isna(row["temperature"])]
    if not rows:
        return None
    words = {
        "lower": "agency's text stays nearer to the unpruned model's than the baseline's does",
        "higher": "agency's text is further from the unpruned model's than the baseline's is, against the expectation",
        "unclear": f"{_DO_NOT_TELL} which of the two is nearer to the unpruned model",
        "single": f"there is {_ONE_OBSERVATION}",
    }
    told = [f"at temperature {row['temperature']:g} {words[_direction(row)]}" for row in rows]
    sentence = (
        f"With {_per_cent(top)} of the heads pruned, by how plausible the unpruned model finds the generated text: "
        f"{'; '.join(told)}."
    )
    if len(rows) > 1 and all(_direction(row) != "single" for row in rows):
        pairs = [_apart(first, second) for index, first in enumerate(rows) for second in rows[index + 1 :]]
        if all(way == "unclear" for way in pairs):
            sentence += (
                f" By these intervals {_DO_NOT_TELL} whether temperature changes the difference between the two."
            )
        else:
            sentence += " The difference between the two is not the same at every temperature."
    raw = [
        f"{variant}, temperature {row['temperature']:g}: generation perplexity {_interval(row, '1')}"
        for variant in ("baseline", "agency")
        for row in _measured(summary, "generation_perplexity", method, variant)
        if row["level"] == top
    ]
    differences = [f"difference at temperature {row['temperature']:g}: {_interval(row, '1')}" for row in rows]
    return Finding(f"{method}: temperature", sentence, "; ".join([*differences, *raw]))


def _cost_of_adaptation(summary: pd.DataFrame, method: str) -> Finding | None:
    seconds = _measured(summary, "adaptation_s", method, "agency")
    tokens = {row["level"]: row for row in _measured(summary, "adaptation_tokens", method, "agency")}
    seconds = [row for row in seconds if row["level"] > 0] or seconds
    if not seconds and not tokens:
        return None
    parts = []
    for level in sorted({row["level"] for row in seconds} | {level for level in tokens if level > 0}):
        time = next((with_unit(row["estimate"], "s") for row in seconds if row["level"] == level), "time not measured")
        text = f" and {plain_number(tokens[level]['estimate'])} tokens of text" if level in tokens else ""
        parts.append(f"{time}{text} at {_per_cent(level)}")
    if not parts:
        return None
    sentence = f"Agency's adaptation took {_listed(parts)}. The baseline does not adapt and has no such cost."
    return Finding(f"{method}: what adaptation cost", sentence, f"time: {_evidence(seconds, False, 's') or 'missing'}")


def _same_at_level_0(contrasts: pd.DataFrame) -> Finding | None:
    """Before anything is pruned both must be the same model; a perplexity that differs is a fault to look into."""
    chosen = contrasts[
        (contrasts["metric"] == "perplexity")
        & (contrasts["level"] == 0)
        & (contrasts["contrast"] == AGENCY_VS_BASELINE)
        & (contrasts["estimate"].abs() > 0.01)
    ]
    if chosen.empty:
        return None
    rows = _records(chosen)
    sentence = (
        "At level 0 nothing is pruned and both should be the same model, but their perplexities differ. "
        "Look into this before trusting the rest."
    )
    return Finding(
        "Not the same at level 0", sentence, "; ".join(f"{row['method']}: {_interval(row, '%')}" for row in rows)
    )


def _levels_reached(cells: pd.DataFrame, manifest: Mapping[str, Any]) -> Finding | None:
    """Where the achieved level is not the requested one: rounding to whole heads, or more than that."""
    done = cells[cells["status"] == "done"].dropna(subset=["level", "achieved_level"])
    off = done[(done["level"] - done["achieved_level"]).abs() > 1e-6]
    if off.empty:
        return None
    model = manifest.get("model")
    heads = model.get("heads") if isinstance(model, Mapping) else None
    rows = _records(off.drop_duplicates(["level", "achieved_level"]).sort_values(["level", "achieved_level"]))
    pairs = [f"{_per_cent(row['level'])} became {row['achieved_level']:.4g} %" for row in rows]
    rounding = True
    for row in rows:
        total = row["heads_total"] if not pd.isna(row["heads_total"]) else heads
        step = 50.0 / float(total) if total else 0.0
        rounding = rounding and abs(row["level"] - row["achieved_level"]) <= step + 1e-6
    reason = (
        "because only whole heads can be pruned"
        if rounding
        else "by more than rounding to whole heads explains, unless the heads were counted within each layer"
    )
    sentence = f"The level reached differs from the level asked for, {reason}: {_listed(pairs)}."
    evidence = "; ".join(
        f"{_per_cent(row['level'])}: {plain_number(row['heads_pruned'])} of {plain_number(row['heads_total'])} heads"
        for row in rows
    )
    return Finding("Levels asked for and reached", sentence, evidence)


def _failures(cells: pd.DataFrame) -> Finding | None:
    failed = cells[cells["status"] == "failed"]
    if failed.empty:
        return None
    counts = failed["reason"].fillna("no reason recorded").astype(str).value_counts()
    sentence = (
        f"{len(failed)} of {len(cells)} cells failed, so their figures are missing from everything above and below."
        if len(failed) > 1
        else f"One of {len(cells)} cells failed, so its figures are missing from everything above and below."
    )
    return Finding(
        "Cells that failed", sentence, "; ".join(f"{count} times: {reason}" for reason, count in counts.items())
    )
