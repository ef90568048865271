"""The verdicts in plain words: four expectations, five questions, and whether pruning makes the model faster.

The verdict of a row is the statistics' alone; a sentence claims what the verdict, its interval and its margin allow, and
nothing beyond. Where there is not enough data it says how much more would settle it. Nothing is estimated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis import (
    ANSWERED,
    NO_DIFFERENCE,
    NOT_ENOUGH,
    QUESTIONS,
    REFUTED,
    SUPPORTED,
    Question,
    relative_change,
)
from pruning_comparison.formatting import capitalised, listed, per_cent, plain_number, rounded_up
from pruning_comparison.metrics import metric_named
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.rows import rows_of
from pruning_comparison.variants import DENSE, RETIRED, VARIANTS, Variant, reported_variant

__all__ = ["Verdict", "exploratory_findings", "interval_shown", "part_findings", "shown", "verdicts"]

_NOISE = 1e-12
"""What rounding of floating-point numbers leaves of a difference that is none."""

_LARGEST_SHOWN = 999.0
"""Beyond it a change in per cent is no figure that anyone can picture."""


@dataclass(frozen=True)
class Verdict:
    """One expectation or question answered, for a reader who knows no statistics.

    ``about`` names method, temperature and model where the run has several; ``verdict`` is one of ``VERDICTS``, or
    ``ANSWERED`` for a question that asks for a figure and not whether something holds.
    """

    id: str
    title: str
    asked: str
    about: str
    verdict: str
    sentence: str


# Numbers in words


def shown(row: Mapping[str, Any], column: str) -> str:
    """A figure of a row of answers as the expert table shows it: log ratios as per cent, the others as they are."""
    value = float(row[column])
    if column == "margin":
        return f"±{100 * value:g} %" if _is_ratio(row) else f"±{value:g}"
    amount = _amount(row, value)
    return f"{'+' if amount > 0 else ''}{plain_number(amount)}{_unit(row)}"


def interval_shown(row: Mapping[str, Any]) -> str:
    """The interval of a row of answers, both ends as ``shown``."""
    if not _has_interval(row):
        return "no interval"
    return f"{shown(row, 'ci_low')} to {shown(row, 'ci_high')}"


def _is_ratio(row: Mapping[str, Any]) -> bool:
    return row["scale"] == "log_ratio" or str(row["unit"]).startswith("log ratio")


def _amount(row: Mapping[str, Any], value: float) -> float:
    amount = 100 * relative_change(value) if _is_ratio(row) else value
    return amount if abs(amount) > _NOISE else 0.0


def _unit(row: Mapping[str, Any]) -> str:
    return " %" if _is_ratio(row) else ""


def _size(row: Mapping[str, Any], value: float, question: Question) -> str:
    """A difference as a size and a direction: "5 % lower"."""
    amount = _amount(row, value)
    return f"{_magnitude(row, amount)}{_unit(row)} {question.more if amount > 0 else question.less}"


def _magnitude(row: Mapping[str, Any], amount: float) -> str:
    if _is_ratio(row) and abs(amount) > _LARGEST_SHOWN:
        return f"more than {_LARGEST_SHOWN:.0f}"
    return plain_number(abs(amount))


def _range(row: Mapping[str, Any], question: Question) -> str:
    """Both ends of the interval as sizes, the smaller change first where they point the same way."""
    low, high = float(row["ci_low"]), float(row["ci_high"])
    if low < 0 < high:
        return f"{_size(row, low, question)} to {_size(row, high, question)}"
    near, far = (high, low) if high <= 0 else (low, high)
    return f"{_magnitude(row, _amount(row, near))} to {_size(row, far, question)}"


def _has_interval(row: Mapping[str, Any]) -> bool:
    return not (pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]))


# What one row says


def _names(row: Mapping[str, Any]) -> dict[str, str]:
    variant, _, reference = str(row["contrast"]).partition(" vs ")
    if reference == DENSE:
        name = "the unpruned model"
        variant = f"the {variant} model"
    else:
        name = reported_variant(reference).title
    return {"variant": variant, "reference": name, "of_reference": f"{name}'s"}


def _claim(row: Mapping[str, Any], question: Question) -> str:
    return question.claim.format(**_names(row), size=_size(row, float(row["estimate"]), question))


def _statement(row: Mapping[str, Any], question: Question) -> str:
    """What a row allows one to say, without a first capital and without a full stop."""
    if row["verdict"] == NOT_ENOUGH:
        return _open_statement(row, question)
    if not _has_interval(row):
        return _claim(row, question)
    interval = f"95 % interval: {_range(row, question)}"
    if row["verdict"] == NO_DIFFERENCE:
        names = _names(row)
        return (
            f"{names['variant']} and {names['reference']} differ by too little to matter ({interval}; less than "
            f"{shown(row, 'margin')} counts as no difference)"
        )
    told = f"{_claim(row, question)} ({interval})"
    if row["verdict"] == REFUTED and row["reason"] != "worse":
        return f"{told}, so that a gain of more than {shown(row, 'margin').removeprefix('±')} is ruled out"
    return told


def _open_statement(row: Mapping[str, Any], question: Question) -> str:
    if pd.isna(row["estimate"]):
        return "this was not measured"
    if not _has_interval(row):
        return f"{_claim(row, question)} in this sample, but there is too little data for an interval"
    if not any(_amount(row, float(row[column])) for column in ("estimate", "ci_low", "ci_high")):
        names = _names(row)
        return f"{names['variant']} and {names['reference']} do not differ at all in this sample{_why_open(row)}"
    return f"{_claim(row, question)} in this sample (95 % interval: {_range(row, question)}){_why_open(row)}"


def _why_open(row: Mapping[str, Any]) -> str:
    """Why a row is open although its own interval leaves out what it would have to; else nothing."""
    low, high = float(row["ci_low"]), float(row["ci_high"])
    margin = 0.0 if pd.isna(row["margin"]) else float(row["margin"])
    size = math.log1p(margin if row["better"] == "higher" else -margin) if _is_ratio(row) else margin
    favourable = size if _is_ratio(row) or row["better"] == "higher" else -size
    if not low <= favourable <= high:
        return ", which would be clear on its own, but not after correction for all that this run compares"
    if margin > 0 and (low > 0 or high < 0):
        return f", and a gain has to be more than {shown(row, 'margin').removeprefix('±')} to count"
    return ""


def _more(row: Mapping[str, Any]) -> str:
    """How much more would settle an inconclusive row, in a few words; nothing where that is not known or would not do."""
    ways = [
        f"{rounded_up(row[column]):,} more {word}{'' if row[column] == 1 else 's'}"
        for column, word in (("more_iterations", "iteration"), ("more_clusters", row["cluster"]))
        if not pd.isna(row[column]) and row[column] >= 1
    ]
    return f"about {' or '.join(ways)}" if ways else ""


def _more_sentence(row: Mapping[str, Any]) -> str:
    more = _more(row)
    if more:
        return f" {capitalised(more)} would settle it, if the difference is as large as it looks now."
    if row["reason"] == "wide interval":
        return f" More iterations alone, or more {row['cluster']}s alone, would not settle it, but more of both might."
    return ""


def _where(row: Mapping[str, Any], place: str) -> str:
    """Where a row holds: the levels, the method, and the temperature if there is one."""
    temperature = "" if pd.isna(row["temperature"]) else f" at temperature {float(row['temperature']):g}"
    by = f"by {row['method']}{temperature}"
    return f"{place} {by}" if place else f"with heads pruned {by}"


def _sentence(row: Mapping[str, Any], question: Question, disappointed: str) -> str:
    """One whole sentence, or two: where, what, and what that means for the expectation."""
    if pd.isna(row["estimate"]):
        return f"This was not measured{_because(row)}."
    place = _where(row, question.place)
    told = f"{capitalised(place)}, {_statement(row, question)}."
    if row["verdict"] == NOT_ENOUGH:
        return f"Not enough data. {told}{_more_sentence(row)}"
    return f"{told} {disappointed}".rstrip() if row["verdict"] in (REFUTED, NO_DIFFERENCE) else told


def _because(row: Mapping[str, Any]) -> str:
    reason = row["reason"]
    return f" ({reason})" if isinstance(reason, str) and reason and reason != "missing" else ""


# The verdicts


def verdicts(answers: pd.DataFrame, optimal: pd.DataFrame) -> list[Verdict]:
    """Every expectation and question in order, for each model, method and temperature that has an answer of its own.

    ``answers`` has columns ``HYPOTHESIS_COLUMNS``, ``optimal`` ``OPTIMUM_COLUMNS``; exploratory rows of ``answers`` are
    passed over. One that has no row at all was not measured. Nothing comes of empty tables.
    """
    rows = rows_of(answers[answers["kind"] != "exploratory"])
    if not rows:
        return []
    levels = rows_of(optimal)
    places = list(dict.fromkeys((str(row["model"]), str(row["method"])) for row in rows))
    named = _Named(len({model for model, _ in places}) > 1, len({method for _, method in places}) > 1)
    found: list[Verdict] = []
    for name, question in QUESTIONS.items():
        for model, method in places:
            here = [r for r in rows if (r["id"], str(r["model"]), str(r["method"])) == (name, model, method)]
            there = [r for r in levels if (str(r["model"]), str(r["method"])) == (model, method)]
            about = named.about(model, method)
            if name == "Q2":
                found.append(_optimal_level(question, about, there))
            elif name in ("Q4", "Q5") and here:
                found.extend(_over_metrics(name, question, about, here))
            elif here:
                several = len(here) > 1
                found.extend(
                    _one(name, question, named.about(model, method, row if several else None), row) for row in here
                )
            elif name not in ("E1p", "P1", "P2"):
                found.append(Verdict(name, question.title, question.asked, about, NOT_ENOUGH, _NOT_MEASURED))
    return found


_NOT_MEASURED = "This was not measured."
_DISAPPOINTED = {
    "worse": "This is the opposite of what was expected.",
    "otherwise": "The expectation is not met.",
}


@dataclass(frozen=True)
class _Named:
    """Which of model and method have to be named, because there are several."""

    model: bool
    method: bool

    def about(self, model: str, method: str, row: Mapping[str, Any] | None = None) -> str:
        parts = [model] if self.model else []
        if self.method:
            parts.append(method)
        if row is not None and row["id"] == "P1":
            parts.append(str(row["contrast"]).partition(" vs ")[0])
        if row is not None and not pd.isna(row["temperature"]):
            parts.append(f"temperature {float(row['temperature']):g}")
        return ", ".join(parts)


def _one(name: str, question: Question, about: str, row: Mapping[str, Any]) -> Verdict:
    if name == "Q3":
        sentence = _temperature_sentence(row)
    elif name == "Q1":
        sentence = _sentence(row, question, "So agency is less resilient here, not more.")
    elif name == "P1":
        sentence = _sentence(row, question, "")
    else:
        sentence = _sentence(row, question, _DISAPPOINTED["worse" if row["reason"] == "worse" else "otherwise"])
    return Verdict(name, question.title, question.asked, about, str(row["verdict"]), sentence)


def _optimal_level(question: Question, about: str, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Q2: per variant the highest level within the tolerance, how sure that is, and the knee."""
    known = [row for row in rows if not pd.isna(row["highest_level"])]
    if not known:
        return Verdict("Q2", question.title, question.asked, about, NOT_ENOUGH, _NOT_MEASURED)
    tolerance = f"{100 * float(known[0]['tolerance']):g} %"
    at: dict[float, list[str]] = {}
    sure = []
    for row in known:
        name = reported_variant(str(row["variant"])).title
        at.setdefault(float(row["highest_level"]), []).append(name)
        if not pd.isna(row["share"]):
            sure.append(f"{100 * float(row['share']):.0f} % for {name}")
    told = [
        f"{per_cent(level) if level > 0 else 'none of the levels above 0'} for {listed(names)}"
        for level, names in sorted(at.items(), reverse=True)
    ]
    sentence = (
        f"The highest safe level, at which the upper end of perplexity's 95 % interval is at most {tolerance} above the "
        f"unpruned model's, is {listed(told)}."
    )
    if sure:
        sentence += f" Resampling the data leads to the same level in {listed(sure)}."
    knees = [row for row in known if not pd.isna(row["knee_level"])]
    if knees:
        bends = [f"{per_cent(row['knee_level'])} for {reported_variant(str(row['variant'])).title}" for row in knees]
        sentence += f" The best trade of speed for quality (the knee) is at {listed(bends)}."
    return Verdict("Q2", question.title, question.asked, about, ANSWERED, sentence)


def _temperature_sentence(row: Mapping[str, Any]) -> str:
    """Q3 asks for any change, so that a supported answer may be to agency's favour or not."""
    if pd.isna(row["estimate"]):
        return "It takes two temperatures to answer this." if row["reason"] == "too little data" else _NOT_MEASURED
    helped = "better" if float(row["estimate"]) < 0 else "worse"
    claim = (
        f"as more is pruned, agency does {helped} against the baseline at the higher temperature than at the lower, by how "
        "close the generated text's perplexity stays to the unpruned model's"
    )
    figures = f"95 % interval of the change: {interval_shown(row)} in log generation perplexity per 10 % of the heads"
    if row["verdict"] == NOT_ENOUGH:
        if not _has_interval(row):
            return f"Not enough data: there is too little for an interval.{_more_sentence(row)}"
        return f"Not enough data. In this sample, {claim} ({figures}){_why_open(row)}.{_more_sentence(row)}"
    return f"{capitalised(_where(row, ''))}, {claim} ({figures})."


def _over_metrics(name: str, question: Question, about: str, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Q4 asks metric by metric: one verdict for the metrics that it holds for, one for those that it does not hold for, one
    for those that are open. Q5 asks which metrics, and has one answer.
    """
    better, worse, unclear = ([row for row in rows if _way(row) == way] for way in ("better", "worse", "unclear"))
    if name == "Q5":
        parts = [
            f"{told} {listed([_metric_told(name, row) for row in chosen])}"
            for told, chosen in (
                ("Agency does better than the baseline, the largest effect first, in", better),
                ("It does worse in" if better else "Agency does worse than the baseline in", worse),
                ("It is unclear for", unclear),
            )
            if chosen
        ]
        verdict = ANSWERED if better or worse else NOT_ENOUGH
        return [Verdict(name, question.title, question.asked, about, verdict, ". ".join(parts) + ".")]
    found = []
    for verdict, chosen, sentence in (
        (SUPPORTED, better, "The more is pruned, the larger agency's gain is in {}."),
        (REFUTED, worse, "The more is pruned, the smaller agency's gain is, or the larger its loss, in {}."),
        (NOT_ENOUGH, unclear, "Not enough data to say whether agency's gain grows with the level in {}."),
    ):
        if chosen:
            told = sentence.format(listed([_metric_told(name, row) for row in chosen]))
            found.append(Verdict(name, question.title, question.asked, about, verdict, told))
    return found


def _way(row: Mapping[str, Any]) -> str:
    if row["verdict"] == NOT_ENOUGH:
        return "unclear"
    return "better" if float(row["estimate"]) > 0 else "worse"


def _metric_told(name: str, row: Mapping[str, Any]) -> str:
    metric = metric_named(str(row["metric"])).phrase
    if row["verdict"] == NOT_ENOUGH:
        more = "not measured" if pd.isna(row["estimate"]) else _more(row)
        return f"{metric} ({more})" if more else metric
    if name == "Q4":
        return f"{metric} ({shown(row, 'estimate')} for every further 10 %)"
    return f"{metric} ({plain_number(float(row['estimate']))} standard deviations)"


# What each part of agency brings


def part_findings(answers: pd.DataFrame) -> list[Finding]:
    """What each part of agency brings to quality: agency against the variant that lacks it, one finding per method.

    A part that makes no difference that matters is said to bring nothing. Contrasts of variants were not asked beforehand,
    so these are hints. Nothing comes of a run without such variants.
    """
    question = QUESTIONS["E2"]
    rows = [
        row
        for row in rows_of(answers[answers["kind"] == "exploratory"])
        if row["id"] == "E2" and not pd.isna(row["estimate"])
    ]
    found = []
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        by_contrast = {row["contrast"]: row for row in rows if (row["model"], row["method"]) == (model, method)}
        told, figures = [], []
        for variant in (*VARIANTS.values(), *RETIRED.values()):
            row = by_contrast.get(f"agency vs {variant.name}")
            if row is not None and variant.lacks is not None:
                told.append(_part_told(row, variant))
                figures.append(f"{variant.name}: {shown(row, 'estimate')} [{interval_shown(row)}], n = {int(row['n'])}")
        if told:
            place = capitalised(_where(next(iter(by_contrast.values())), question.place))
            sentence = f"{place}, perplexity shows what each part brings (hints, not verdicts). {' '.join(told)}"
            found.append(Finding(f"{method}: what each part of agency brings", sentence, "; ".join(figures)))
    return found


def _part_told(row: Mapping[str, Any], variant: Variant) -> str:
    question, part = QUESTIONS["E2"], variant.lacks
    size = f"agency's perplexity is {_size(row, float(row['estimate']), question)} than where {variant.instead}"
    if row["verdict"] == NOT_ENOUGH:
        return f"{part}: not enough data; in this sample {size}."
    interval = f"(95 % interval: {_range(row, question)})"
    if row["verdict"] == SUPPORTED:
        return f"{part} {'help' if variant.plural else 'helps'}: {size} {interval}."
    if row["verdict"] == NO_DIFFERENCE:
        verb = "bring" if variant.plural else "brings"
        return f"{part} {verb} nothing that matters: {size} {interval}, and less than {shown(row, 'margin')} does not count."
    if row["reason"] == "worse":
        return f"{part} {'do' if variant.plural else 'does'} harm: {size} {interval}."
    gain = shown(row, "margin").removeprefix("±")
    return f"{part} {'bring' if variant.plural else 'brings'} less than {gain}: {size} {interval}."


# Exploratory contrasts


def exploratory_findings(answers: pd.DataFrame) -> list[Finding]:
    """What exploratory rows of answers say, one finding for each contrast, method and model: hints, not verdicts."""
    rows = [row for row in rows_of(answers[answers["kind"] == "exploratory"]) if row["id"] in QUESTIONS]
    found = []
    for model, method, contrast in dict.fromkeys((row["model"], row["method"], row["contrast"]) for row in rows):
        here = [row for row in rows if (row["model"], row["method"], row["contrast"]) == (model, method, contrast)]
        claims = [(row, QUESTIONS[row["id"]]) for row in here if QUESTIONS[row["id"]].claim]
        clear = [(row, question) for row, question in claims if row["verdict"] != NOT_ENOUGH]
        told = [f"{capitalised(_where(row, question.place))}, {_statement(row, question)}." for row, question in clear]
        unclear = list(
            dict.fromkeys(question.title.lower() for row, question in claims if row["verdict"] == NOT_ENOUGH)
        )
        if unclear:
            told.append(f"There is not enough data about {listed(unclear)}.")
        if told:
            sentence = " ".join(["Not asked beforehand, so these are hints, not verdicts.", *told])
            figures = "; ".join(
                f"{question.title.lower()}: {shown(row, 'estimate')} [{interval_shown(row)}], n = {int(row['n'])}"
                for row, question in claims
                if not pd.isna(row["estimate"])
            )
            found.append(
                Finding(f"{method}: {str(contrast).replace(' vs ', ' against ')} (exploratory)", sentence, figures)
            )
    return found
