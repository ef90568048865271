"""The answer of a run: a few sentences with numbers, a small table, and a verdict for each expectation and question.

It stands on the first screen of the report and at the end of the terminal's output, so that both say the same. Every
sentence about a change rests on a paired contrast: a level against the dense model, or a variant against another. Nothing is
estimated here, and torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis import ANSWERED, NO_DIFFERENCE, NOT_ENOUGH, QUESTIONS, REFUTED, SUPPORTED
from pruning_comparison.analysis.questions import QUALITY_LEVEL
from pruning_comparison.formatting import capitalised, counted, listed, per_cent, plain_number, with_unit
from pruning_comparison.metrics import metric_named
from pruning_comparison.report.rows import rows_of
from pruning_comparison.variants import PRIMARY, reported_variant, variant_order

__all__ = ["Answer", "AnswerRow", "Chip", "answer_of", "format_change", "format_times"]

_WORST_FIRST = (REFUTED, NOT_ENOUGH, NO_DIFFERENCE, ANSWERED, SUPPORTED)
_MOST_LEVELS = 5
"""A sentence lists so many levels; the table and the chart have them all."""


@dataclass(frozen=True)
class AnswerRow:
    """One pruned level of one variant and method, relative to the dense model.

    ``perplexity`` and ``tokens_per_second`` are ratios to the dense model's value (1.03 is 3 % more), with the ends of their
    95 % intervals; NaN where there is none. ``safe``: the level is at most the highest safe one.
    """

    method: str
    variant: str
    level: float
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    safe: bool


@dataclass(frozen=True)
class Chip:
    """One expectation or question in the fewest words: its verdict, one number, and a sentence or two of detail.

    ``verdict`` is the worst one over methods, temperatures and metrics, by which a chip is coloured; ``label`` says in how
    many methods the expectation is supported, where there are several, and else repeats the verdict.
    """

    id: str
    title: str
    verdict: str
    label: str
    number: str
    detail: str


@dataclass(frozen=True)
class Answer:
    """What a run has to say: title, sentences, a table of variant by level, and nine chips."""

    title: str
    sentences: tuple[str, ...]
    rows: tuple[AnswerRow, ...]
    chips: tuple[Chip, ...]


def answer_of(
    name: str,
    *,
    relative: pd.DataFrame,
    optimal: pd.DataFrame,
    ranked: pd.DataFrame,
    answers: pd.DataFrame,
) -> Answer:
    """The answer of a run of the model ``name``.

    ``relative`` holds each level against the dense model (``RELATIVE_COLUMNS``), ``optimal`` the highest safe levels
    (``OPTIMUM_COLUMNS``), ``ranked`` methods and variants in order (``RANKING_COLUMNS``), and ``answers`` the expectations
    and questions (``HYPOTHESIS_COLUMNS``). Any of them may be empty: what was not measured is then left out or said to be
    missing.
    """
    rows = _rows(relative, optimal)
    method = _leading_method(ranked, rows)
    sentences = [
        *_quality_sentences(method, [row for row in rows if row.method == method], relative),
        *_versus_sentences(method, [row for row in rows if row.method == method], answers),
        *_safe_sentences(method, optimal, relative),
        *_method_sentences(ranked, [row.method for row in rows]),
    ]
    if not sentences:
        sentences = ["No pruned level was compared with the dense model, so there is nothing to say about pruning."]
    return Answer(f"Pruning the attention heads of {name}", tuple(sentences), tuple(rows), _chips(answers, optimal))


# Numbers in words


def format_times(ratio: float) -> str:
    """A ratio of at most three digits: "1.03", "12.4", "over 1,000"."""
    if ratio >= 1000:
        return "over 1,000"
    return plain_number(ratio) if ratio >= 0.001 or math.isnan(ratio) else "under 0.001"


def format_change(ratio: float) -> str:
    """A ratio as a signed change: "+3.2 %", and from twice on as a factor: "×2.5"."""
    if math.isnan(ratio):
        return "missing"
    if ratio >= 2:
        return f"×{format_times(ratio)}"
    change = 100 * (ratio - 1)
    if abs(change) < 0.05:
        return "±0 %"
    sign = "+" if change > 0 else "\N{MINUS SIGN}"
    return f"{sign}{plain_number(abs(round(change, 1)))} %"


def _more_or_less(ratio: float, more: str, less: str) -> str:
    """A ratio as a size and a direction: "3.2 % more", "2.5 times as many" where per cent would mislead."""
    if ratio >= 2:
        return f"{format_times(ratio)} times"
    change = 100 * (ratio - 1)
    return f"{plain_number(abs(round(change, 1)))} % {more if change >= 0 else less}"


def _range(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"{format_change(low)} to {format_change(high)}"


# The table


def _rows(relative: pd.DataFrame, optimal: pd.DataFrame) -> list[AnswerRow]:
    """Perplexity and speed at every pruned level, by method, variant and level."""
    safe = {(str(row["method"]), str(row["variant"])): float(row["highest_level"]) for row in rows_of(optimal)}
    found: dict[tuple[str, str, float], dict[str, tuple[float, float, float]]] = {}
    for row in rows_of(relative):
        if row["metric"] in ("perplexity", "tokens_per_second") and row["level"] > 0:
            key = (str(row["method"]), str(row["variant"]), float(row["level"]))
            ends = (float(row["estimate"]), float(row["ci_low"]), float(row["ci_high"]))
            found.setdefault(key, {})[str(row["metric"])] = ends
    methods = list(dict.fromkeys(method for method, _, _ in found))
    order = sorted(found, key=lambda key: (methods.index(key[0]), variant_order(key[1]), key[2]))
    missing = (math.nan, math.nan, math.nan)
    return [
        AnswerRow(
            *key,
            *found[key].get("perplexity", missing),
            *found[key].get("tokens_per_second", missing),
            safe=key[2] <= safe.get(key[:2], math.nan),
        )
        for key in order
    ]


def _leading_method(ranked: pd.DataFrame, rows: Sequence[AnswerRow]) -> str:
    """The method that sentences are about: the one ranked first within agency, else within any variant, else the first.

    Random is a control: it is spoken of only where it is decidedly best, or alone.
    """
    methods = ranked[ranked["compared"] == "method"]
    order = sorted(rows_of(methods), key=lambda row: (str(row["within"]) != "agency", float(row["rank"])))
    for row in order:
        if row["name"] != "random" or bool(row["decided"]):
            return str(row["name"])
    return str(order[0]["name"]) if order else rows[0].method if rows else ""


# The sentences


def _named(variant: str) -> str:
    return reported_variant(variant).title


def _possessive(variant: str) -> str:
    return f"{_named(variant)}'s"


def _primary(variants: Sequence[str]) -> list[str]:
    """Agency and the baseline, agency first; where neither was measured, the first variant that was."""
    chosen = [variant for variant in PRIMARY if variant in variants]
    return chosen or list(variants[:1])


def _quality_sentences(method: str, rows: Sequence[AnswerRow], relative: pd.DataFrame) -> list[str]:
    """What each variant's perplexity is at each level, times the dense model's."""
    measured = [row for row in rows if not math.isnan(row.perplexity)]
    variants = _primary(list(dict.fromkeys(row.variant for row in measured)))
    if not variants:
        return []
    levels = _few(sorted({row.level for row in measured if row.variant in variants}))
    told: list[str] = []
    for variant in variants:
        at = {row.level: row for row in measured if row.variant == variant}
        values = listed([format_times(at[level].perplexity) if level in at else "unknown" for level in levels])
        told.append(
            f"{_possessive(variant)} is {values}"
            if told
            else f"{_possessive(variant)} perplexity is {values} times the dense model's"
        )
    sentence = f"With {_levels(levels)} of the heads pruned by {method}, {'; '.join(told)}."
    return [" ".join([sentence, *_reservations(relative, method, variants, levels)])]


def _few(levels: Sequence[float]) -> list[float]:
    if len(levels) <= _MOST_LEVELS:
        return list(levels)
    step = (len(levels) - 1) / (_MOST_LEVELS - 1)
    return [levels[round(index * step)] for index in range(_MOST_LEVELS)]


def _levels(levels: Sequence[float]) -> str:
    return f"{listed([f'{level:g}' for level in levels])} %"


def _reservations(relative: pd.DataFrame, method: str, variants: Sequence[str], levels: Sequence[float]) -> list[str]:
    """Where it is open whether perplexity changed at all, and where it is likely, but not certain after correction."""
    quality = relative[(relative["metric"] == "perplexity") & (relative["method"] == method)]
    quality = quality[~quality["certain"].astype(bool)]
    sentences = []
    for open_still, said in (
        (True, "The 95 % interval includes no change"),
        (False, "Corrected for the number of comparisons, the change is likely but not certain"),
    ):
        rows = quality[(quality["change"] == "unclear") == open_still]
        told = []
        for variant in variants:
            here = [float(row["level"]) for row in rows_of(rows[rows["variant"] == variant])]
            here = [level for level in levels if level in here]
            if here:
                told.append(f"at {_levels(here)} for {_named(variant)}")
        if told:
            sentences.append(f"{said} {listed(told)}.")
    return sentences


def _versus_sentences(method: str, of_levels: Sequence[AnswerRow], answers: pd.DataFrame) -> list[str]:
    """Agency against the baseline in perplexity at high levels: the primary answer."""
    chosen = answers[(answers["id"] == "E2") & (answers["kind"] == "expectation") & (answers["method"] == method)]
    rows = [row for row in rows_of(chosen) if not pd.isna(row["estimate"])]
    if not rows:
        return []
    row = rows[0]
    ratio, low, high = (math.exp(float(row[key])) for key in ("estimate", "ci_low", "ci_high"))
    interval = f"{_range(low, high)}" if not math.isnan(low) else "no interval"
    high_levels = sorted(
        {row.level for row in of_levels if row.level >= QUALITY_LEVEL and not math.isnan(row.perplexity)}
    )
    place = f"with {_levels(high_levels)} of the heads pruned" if len(high_levels) == 1 else QUESTIONS["E2"].place
    verdict = str(row["verdict"])
    if verdict == NO_DIFFERENCE:
        return [f"{capitalised(place)}, agency and the baseline do not differ meaningfully in perplexity ({interval})."]
    size = _more_or_less(ratio, "higher than the baseline's", "lower than the baseline's")
    size = f"{size} the baseline's" if ratio >= 2 else size
    unsure = " There is not enough data to decide whether that matters." if verdict == NOT_ENOUGH else ""
    return [f"{capitalised(place)}, agency's perplexity is {size} (95 % interval {interval}).{unsure}"]


def _safe_sentences(method: str, optimal: pd.DataFrame, relative: pd.DataFrame) -> list[str]:
    """The highest safe level of each variant, and what it brings there."""
    known = [row for row in rows_of(optimal) if row["method"] == method and not pd.isna(row["highest_level"])]
    levels = {str(row["variant"]): float(row["highest_level"]) for row in known}
    variants = _primary(list(levels))
    if not variants:
        return []
    tolerance = f"{100 * float(known[0]['tolerance']):g} %"
    reached = [f"{per_cent(levels[variant])} with {_named(variant)}" for variant in variants if levels[variant] > 0]
    none = [_named(variant) for variant in variants if levels[variant] <= 0]
    rule = f"perplexity rises by at most {tolerance}, the upper end of its 95 % interval included"
    if not reached:
        return [f"No level measured is safe with {' or '.join(none)}: at a safe one {rule}."]
    but = f"; no level measured is safe with {listed(none)}" if none else ""
    sentences = [f"Safe levels, where {rule}: {listed(reached)}{but}."]
    told = [_gain(method, variant, levels[variant], relative) for variant in variants if levels[variant] > 0]
    return [*sentences, *(sentence for sentence in told if sentence)]


def _gain(method: str, variant: str, level: float, relative: pd.DataFrame) -> str:
    """What a safe level brings in speed, latency and bytes, against the dense model."""
    here = relative[(relative["method"] == method) & (relative["variant"] == variant) & (relative["level"] == level)]
    rows = {str(row["metric"]): row for row in rows_of(here) if not pd.isna(row["estimate"])}
    parts = []
    for metric, what, faster, slower in (
        ("tokens_per_second", "tokens per second", "more", "fewer"),
        ("first_token_latency_s", "first-token latency", "more", "less"),
    ):
        if metric in rows:
            parts.append(_timed(rows[metric], what, faster, slower))
    for metric, what in (("parameter_bytes", "parameters"), ("cache_bytes", "key-value cache")):
        if metric in rows:
            parts.append(_size(rows[metric], what))
    if not parts:
        return ""
    return f"At {per_cent(level)}, {_named(variant)} has, against the dense model, {listed(parts)}."


def _timed(row: Mapping[str, Any], what: str, more: str, less: str) -> str:
    ratio, low, high = (float(row[key]) for key in ("estimate", "ci_low", "ci_high"))
    if math.isnan(low) or math.isnan(high):
        return f"{format_change(ratio)} {what} (no interval)"
    if row["change"] == "unclear":
        return f"an unclear change in {what} ({_range(low, high)})"
    size = f"{format_times(ratio)} times the" if ratio >= 2 else _more_or_less(ratio, more, less)
    # After correction for all that a report says of levels, an interval that leaves out "no change" may not be enough.
    return f"{'' if row['certain'] else 'likely '}{size} {what} ({_range(low, high)})"


def _size(row: Mapping[str, Any], what: str) -> str:
    """An exact size: a difference in bytes, or a ratio where the row is one."""
    change = float(row["estimate"])
    if row["unit"] == "byte":
        return f"{with_unit(abs(change), 'byte')} {'more' if change > 0 else 'less'} of {what}"
    return f"{_more_or_less(change, 'more', 'less')} bytes of {what}"


def _method_sentences(ranked: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Which method is best within agency (else within the first variant), and whether it beats random."""
    count = len(set(methods))
    rows = [row for row in rows_of(ranked) if row["compared"] == "method"]
    withins = list(dict.fromkeys(str(row["within"]) for row in rows))
    if count < 2 or not withins:
        if count == 1 and "random" not in methods:
            return [
                "Only one method was run, and no random control: whether its choice of heads beats chance is unknown "
                "(add random to --pruning_method)."
            ]
        return []
    within = "agency" if "agency" in withins else withins[0]
    ours = sorted((row for row in rows if row["within"] == within), key=lambda row: float(row["rank"]))
    first = ours[0]
    if pd.isna(first["next_name"]) or not str(first["next_name"]):
        return []
    if bool(first["decided"]):
        ratio = float(first["next_estimate"])
        size = _more_or_less(ratio, "higher", "lower")
        size = f"{size} as high" if ratio >= 2 else size
        sentence = (
            f"Best method with {_named(within)}: {first['name']}. The runner-up {first['next_name']}'s perplexity is {size} "
            f"({_range(float(first['next_ci_low']), float(first['next_ci_high']))})"
        )
    else:
        tied = [str(first["name"])]
        for row in ours:
            if bool(row["decided"]) or pd.isna(row["next_name"]) or not str(row["next_name"]):
                break
            tied.append(str(row["next_name"]))
        sentence = f"With {_named(within)}, {listed(tied)} cannot be told apart in perplexity"
    return [f"{sentence}{_versus_random(first)}"]


def _versus_random(row: Mapping[str, Any]) -> str:
    verdict, name = str(row["versus_random_verdict"]), str(row["name"])
    if name == "random":
        return "; random ranks first."
    ends = (float(row["versus_random_ci_low"]), float(row["versus_random_ci_high"]))
    interval = "" if any(map(math.isnan, ends)) else f" ({_range(*ends)} perplexity)"
    words = {
        "better": f"; {name} beats random{interval}.",
        "worse": f"; {name} is worse than random{interval}.",
        "no meaningful difference": f"; {name} and random do not differ meaningfully{interval}.",
        "not enough data": f"; whether {name} beats random is unclear{interval}.",
        "no random control": "; random was not run, so that there is no control.",
    }
    return words[verdict]


# The chips


def _chips(answers: pd.DataFrame, optimal: pd.DataFrame) -> tuple[Chip, ...]:
    """Nine chips in the order of the questions; speed at equal perplexity is in the detail of speed."""
    rows = rows_of(answers[answers["kind"] != "exploratory"])
    methods = list(dict.fromkeys(str(row["method"]) for row in rows)) or list(
        dict.fromkeys(str(method) for method in optimal["method"])
    )
    names = [name for name in QUESTIONS if name in ("E1", "E2", "E3", "E4", "Q1", "Q2", "Q3", "Q4", "Q5")]
    return tuple(_optimal_chip(methods, optimal) if name == "Q2" else _chip(name, methods, rows) for name in names)


def _chip(name: str, methods: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Chip:
    title = QUESTIONS[name].title
    by_method = {method: [row for row in rows if row["id"] == name and row["method"] == method] for method in methods}
    measured = {method: found for method, found in by_method.items() if found}
    if not measured:
        return Chip(name, title, NOT_ENOUGH, NOT_ENOUGH, "", f"{QUESTIONS[name].asked} This was not measured.")
    verdicts = {
        method: _worst([str(row["verdict"]) for row in _deciding(name, found)]) for method, found in measured.items()
    }
    worst = _worst(list(verdicts.values()))
    label, told = worst, worst
    if len(methods) > 1 and worst != ANSWERED:
        best = ANSWERED if name == "Q5" else SUPPORTED
        good = sum(verdict == best for verdict in verdicts.values())
        told = best if good else worst
        same = len(set(verdicts.values())) == 1 and len(verdicts) == len(methods)
        label = (
            f"{worst}: {'both' if len(methods) == 2 else f'all {len(methods)}'} methods"
            if same
            else f"{best}: {good} of {counted(len(methods), 'method')}"
        )
    shown = _shown_row(name, measured, verdicts, told)
    several = len(methods) > 1
    detail = [QUESTIONS[name].asked]
    for method, found in measured.items():
        figures = "; ".join(_figure(row, len(found) > 1) for row in found[:8])
        detail.append(f"{method}: {figures}." if several else f"{capitalised(figures)}.")
    if name == "E1":
        detail += [_equal_speed(row, several) for row in rows if row["id"] == "E1p"]
    return Chip(name, title, worst, label, _number(shown), " ".join(detail))


def _deciding(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that a chip's verdict is about: perplexity's of tight resources, and of metrics those that are answered."""
    first: list[Mapping[str, Any]] = []
    if name == "Q4":
        first = [row for row in rows if row["metric"] == "perplexity"]
    elif name == "Q5":
        first = [row for row in rows if row["verdict"] == ANSWERED]
    return first or list(rows)


def _worst(verdicts: Sequence[str]) -> str:
    for verdict in verdicts:
        if verdict not in _WORST_FIRST:
            raise ValueError(f"the verdict {verdict!r} is unknown: one of {', '.join(_WORST_FIRST)} was expected")
    return min(verdicts, key=_WORST_FIRST.index)


def _shown_row(
    name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], verdicts: Mapping[str, str], told: str
) -> Mapping[str, Any]:
    """The row whose number stands on a chip: of methods with the verdict ``told`` the one with the smallest estimate."""
    found = []
    for method, verdict in verdicts.items():
        if verdict == told:
            candidates = _deciding(name, rows[method])
            found.append(next((row for row in candidates if row["verdict"] == told), candidates[0]))
    known = [row for row in found if not pd.isna(row["estimate"])]
    return min(known or found, key=lambda row: abs(float(row["estimate"])))


def _number(row: Mapping[str, Any]) -> str:
    value = float(row["estimate"])
    if math.isnan(value):
        return ""
    if row["scale"] == "log_ratio" or str(row["unit"]).startswith("log ratio"):
        return format_change(math.exp(value))
    sign = "+" if value > 0 else ""
    return f"{sign}{plain_number(value)}{' SD' if row['scale'] == 'standardised' else ''}"


def _figure(row: Mapping[str, Any], several: bool) -> str:
    """One row of a chip's detail: what, how much, with what interval, and the verdict where there are several."""
    temperature = "" if pd.isna(row["temperature"]) else f" at temperature {float(row['temperature']):g}"
    what = f"{metric_named(str(row['metric'])).phrase}{temperature}"
    if pd.isna(row["estimate"]):
        return f"{what} was not measured"
    ends = [_number({**row, "estimate": row[key]}) for key in ("ci_low", "ci_high")]
    interval = f"95 % interval {ends[0]} to {ends[1]}" if all(ends) else "no interval"
    n = "" if pd.isna(row["n"]) else f", n = {int(row['n'])}"
    verdict = f", {row['verdict']}" if several else ""
    return f"{what} {_number(row)} ({interval}{n}){verdict}"


def _equal_speed(row: Mapping[str, Any], several: bool) -> str:
    if pd.isna(row["estimate"]):
        return ""
    where = f" by {row['method']}" if several else ""
    return f"At equal perplexity{where}: {_figure(row, False)}, {row['verdict']}."


def _optimal_chip(methods: Sequence[str], optimal: pd.DataFrame) -> Chip:
    """Q2: the highest safe level of agency and of the baseline, method by method."""
    question = QUESTIONS["Q2"]
    rows = [row for row in rows_of(optimal) if not pd.isna(row["highest_level"])]
    if not rows:
        return Chip("Q2", question.title, NOT_ENOUGH, NOT_ENOUGH, "", f"{question.asked} This was not measured.")
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(str(row["method"]), []).append(row)
    told, best = [], 0.0
    for method, found in by_method.items():
        each = [f"{per_cent(row['highest_level'])} with {_named(str(row['variant']))}" for row in found]
        told.append(f"{method}: {listed(each)}." if len(methods) > 1 else f"Highest safe level: {listed(each)}.")
        best = max(
            [best, *(float(row["highest_level"]) for row in found if row["variant"] in ("agency", *PRIMARY[:1]))]
        )
    number = f"up to {per_cent(best)}" if best > 0 else "no level"
    return Chip("Q2", question.title, ANSWERED, ANSWERED, number, " ".join([question.asked, *told]))
