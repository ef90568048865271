"""The figures of ``docs/results.json``, and whether documents print them as they are recorded there.

A table is checked if a comment of its own stands before it, and a figure on a line if a comment stands behind it:

    <!-- results: smollm2-obs metric=perplexity_ratio method=obs -->
    | | 30 % | 50 % |
    |---|---|---|
    | `agency` | 1.098 [1.082 to 1.114] | 1.260 [1.221 to 1.300] |

    At 50 % it has 1.260 [1.221 to 1.300] times the perplexity. <!-- results: smollm2-obs metric=perplexity_ratio ... -->

The comment names an entry and whatever of ``table``, ``metric``, ``method``, ``variant`` and ``level`` holds for all its
figures; the table's rows and columns name the rest. Where no ``table`` is named it is "contrasts" for a contrast, such as
"agency against baseline", and else "summary".
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import measured_number, per_cent, unknown_name
from pruning_comparison.methods import METHODS
from pruning_comparison.metrics import METRICS
from pruning_comparison.store import write_atomically
from pruning_comparison.variants import VARIANTS

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results.json"

AXES = ("table", "metric", "method", "variant", "level")
"""What says which figure of an entry it is. ``table`` is the file of a run that has it, without its ending."""

_DIGITS = 8
"""Significant digits that are recorded: more than anybody prints, and fewer than repeated runs always share."""


@dataclass(frozen=True)
class Figure:
    """One estimate of a run as its tables have it, with its 95 % interval; None for an end that is not finite.

    ``variant`` of a contrast is "agency vs baseline".
    """

    table: str
    metric: str
    method: str
    variant: str
    level: float
    estimate: float
    ci_low: float | None
    ci_high: float | None
    n: int
    unit: str

    @property
    def key(self) -> tuple[str, str, str, float, str]:
        """What figures are sorted and paired by."""
        return (self.table, self.metric, self.method, self.level, self.variant)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, infinite where one is not finite; None where there is no interval."""
        if self.ci_low is None and self.ci_high is None:
            return None
        return (
            -math.inf if self.ci_low is None else self.ci_low,
            math.inf if self.ci_high is None else self.ci_high,
        )

    def describe(self) -> str:
        """Which figure it is, in words."""
        return f"{self.table} {self.metric}, {self.method}, {self.variant}, {per_cent(self.level)}"

    def shown(self) -> str:
        """The estimate and its interval."""
        ends = "" if self.interval is None else " [{} to {}]".format(*map(measured_number, self.interval))
        return f"{measured_number(self.estimate)}{'' if self.unit == '1' else f' {self.unit}'}{ends}"


@dataclass(frozen=True)
class Entry:
    """A command of ``pruning-comparison run``, and the figures that it gave.

    ``minutes`` is what it took, and ``recorded`` where and when that was; None where there are no figures yet.
    """

    command: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    minutes: float | None = None
    recorded: Mapping[str, Any] | None = None


def rounded(value: float) -> float | None:
    """A number as it is recorded; None where it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def read_recorded(path: Path = RECORDED) -> dict[str, Entry]:
    """Every entry by its name. InputError where the file cannot be read."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        return {
            name: Entry(
                tuple(entry["command"]),
                tuple(Figure(**figure) for figure in entry["figures"]),
                entry["minutes"],
                entry["recorded"],
            )
            for name, entry in stored.items()
        }
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Name the file of figures by --recorded.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not hold recorded figures: {error!r}. Restore it, or record anew.") from error


def write_recorded(entries: Mapping[str, Entry], path: Path = RECORDED) -> None:
    """Writes all entries with sorted keys and one figure per line, so that a diff shows which figures are new."""
    parts = []
    for name, entry in sorted(entries.items()):
        lines = [
            json.dumps(asdict(figure), sort_keys=True) for figure in sorted(entry.figures, key=lambda one: one.key)
        ]
        figures = "[\n   " + ",\n   ".join(lines) + "\n  ]" if lines else "[]"
        values = {
            "command": json.dumps(list(entry.command), ensure_ascii=False),
            "figures": figures,
            "minutes": json.dumps(entry.minutes),
            "recorded": json.dumps(entry.recorded, sort_keys=True),
        }
        inner = ",\n".join(f"  {json.dumps(key)}: {value}" for key, value in values.items())
        parts.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")


_COMMENT = re.compile(r"<!--\s*results:(.*?)-->")
_SIGNED = r"[+\u2212-]?\d[\d,]*(?:\.\d+)?"
_UNIT = r"(?:\s?(?:%|ms|s|kB|MB|GB)(?![\w]))?"
_FIGURE = re.compile(
    rf"(?P<estimate>{_SIGNED})\**(?P<unit>{_UNIT})\**\s?\[(?P<low>{_SIGNED}){_UNIT} to (?P<high>{_SIGNED}){_UNIT}\]"
)
_INTERVAL = re.compile(r"\[[^\]]*\d[^\]]*\](?!\()")
_BETWEEN = r"(?:against|over|relative to|vs)(?: the)?"


def check_page(text: str, entries: Mapping[str, Entry]) -> list[str]:
    """What a Markdown page prints otherwise than it is recorded, with the line; empty where all marked figures agree.

    A figure is an estimate with its interval, ``1.26 [1.22 to 1.30]``. It agrees if the recorded one, rounded to as many
    decimals as are printed, is the same. Of a marked table every row with a figure must be one that the entry has. What is
    not marked, and what stands in a block of code, is not checked.
    """
    lines, wrong = text.splitlines(), []
    in_code = False
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        comments = [] if in_code else list(_COMMENT.finditer(line))
        alone = len(comments) == 1 and line.strip() == comments[0][0]
        start = 0
        for comment in comments:
            try:
                known, place = _read_comment(comment[1], entries)
                if alone:
                    wrong += _check_table(lines, number + 1, known, place)
                else:
                    printed = line[start : comment.start()]
                    wrong += [f"line {number + 1}: {what}" for what in _check_cell(printed, known, place, needed=True)]
            except ValueError as error:
                wrong.append(f"line {number + 1}: {error}")
            start = comment.end()
    return wrong


def _read_comment(text: str, entries: Mapping[str, Entry]) -> tuple[tuple[Figure, ...], dict[str, Any]]:
    """The figures of the entry that a comment names, and what it says of all that it marks."""
    name, *words = shlex.split(text) or [""]
    if name not in entries:
        raise ValueError(unknown_name("results", name, entries))
    figures = entries[name].figures
    if not figures:
        raise ValueError(f"{name} has no figures yet. Record them with --record={name}.")
    place: dict[str, Any] = {}
    for word in words:
        axis, _, value = word.partition("=")
        if axis not in AXES:
            raise ValueError(unknown_name("results", axis, AXES))
        known = {f"{getattr(figure, axis):g}" if axis == "level" else getattr(figure, axis) for figure in figures}
        if value not in known:
            raise ValueError(unknown_name(f"results: {axis}", value, sorted(known)))
        place[axis] = float(value) if axis == "level" else value
    return figures, place


def _check_table(lines: Sequence[str], after: int, known: Sequence[Figure], place: Mapping[str, Any]) -> Iterator[str]:
    """Every figure of the table that begins on the first line that is not empty."""
    first = next((number for number in range(after, len(lines)) if lines[number].strip()), len(lines))
    rows = []
    for line in lines[first:]:
        if not line.lstrip().startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
    if len(rows) < 3:
        yield f"line {after}: no table follows the comment. Put it right before one, or behind a figure on its line."
        return
    seen = False
    for offset, cells in enumerate(rows[2:], 2):
        where = f"line {first + offset + 1}"
        with_figures = [column for column, cell in enumerate(cells) if _INTERVAL.search(cell)]
        seen = seen or bool(with_figures)
        for column in with_figures:
            heading = rows[0][column] if column < len(rows[0]) else ""
            try:
                full = _joined(place, [*cells[: with_figures[0]], heading], known)
                yield from (f"{where}: {what}" for what in _check_cell(cells[column], known, full))
            except ValueError as error:
                yield f"{where}: {error}"
    if not seen:
        yield f"line {first + 1}: the table has no figure with an interval, so there is nothing to check."


def _check_cell(text: str, known: Sequence[Figure], place: Mapping[str, Any], *, needed: bool = False) -> Iterator[str]:
    """What is wrong with the figures of one cell, or of one line before its comment."""
    found = list(_FIGURE.finditer(text))
    if not found and needed:
        yield "no figure with an interval stands before the comment."
    if len(found) < len(_INTERVAL.findall(text)):
        yield f"{text!r} cannot be read: write a figure as 1.26 [1.22 to 1.30]."
    if not found:
        return
    figure = _figure_at(known, place)
    recorded = (figure.estimate, *(figure.interval or (math.nan, math.nan)))
    for one in found:
        unit = one["unit"].strip()
        printed = [one[name] for name in ("estimate", "low", "high")]
        values = [_in_unit(value, figure, unit) for value in recorded]
        if not all(_agree(text, value) for text, value in zip(printed, values, strict=True)):
            yield f"{one[0]!r} is recorded as {figure.shown()} ({figure.describe()})."


def _figure_at(known: Sequence[Figure], place: Mapping[str, Any]) -> Figure:
    """The one figure at a place; ValueError where there is none, or where more than one is meant."""
    table = "contrasts" if " vs " in str(place.get("variant")) else "summary"
    full = {"table": table, **place}
    found = [one for one in known if all(getattr(one, axis) == value for axis, value in full.items())]
    said = ", ".join(f"{axis}={value:g}" if axis == "level" else f"{axis}={value}" for axis, value in full.items())
    if not found:
        raise ValueError(f"the entry has no figure with {said}.")
    if len(found) > 1:
        open_axes = [axis for axis in AXES if len({getattr(one, axis) for one in found}) > 1]
        raise ValueError(f"{len(found)} figures of the entry have {said}. Say {' and '.join(open_axes)} as well.")
    return found[0]


def _joined(place: Mapping[str, Any], labels: Sequence[str], known: Sequence[Figure]) -> dict[str, Any]:
    """What comment, row and column say together. ValueError where they contradict each other.

    A metric in the comment settles it: columns are often headed by a shorter name.
    """
    full = dict(place)
    for label in labels:
        for axis, value in _named_in(label, known).items():
            if axis == "metric" and "metric" in place:
                continue
            if full.setdefault(axis, value) != value:
                raise ValueError(f"{axis} is both {full[axis]} and {value}, which {label!r} says.")
    return full


def _named_in(label: str, known: Sequence[Figure]) -> dict[str, Any]:
    """Metric, method, variant and level as the heading of a row or column has them; what it does not name is left out."""
    text = re.sub(r"[*`]", "", label).lower()
    words = [word.strip(".,;:()") for word in text.split()]
    variants = [word for word in words if word in VARIANTS]
    contrast = re.search(rf"([\w-]+) {_BETWEEN} ([\w-]+)", text)
    if contrast and contrast[1] in VARIANTS and contrast[2] in VARIANTS:
        variants = [f"{contrast[1]} vs {contrast[2]}"]
    named: dict[str, list[Any]] = {
        "variant": variants,
        "method": [word for word in words if word in METHODS],
        "level": [float(level) for level in re.findall(r"(\d+(?:\.\d+)?)\s?%", text)],
        "metric": [name for phrase, name in _phrases(known) if phrase in text][:1],
    }
    for axis, values in named.items():
        if len(set(values)) > 1:
            raise ValueError(f"{label!r} names more than one {axis}: {', '.join(map(str, values))}.")
    return {axis: values[0] for axis, values in named.items() if values}


def _phrases(known: Sequence[Figure]) -> list[tuple[str, str]]:
    """What the recorded metrics are called in headings, the longest first."""
    names = {figure.metric for figure in known if figure.metric in METRICS}
    phrases = [(text.lower(), name) for name in names for text in (name, METRICS[name].label, METRICS[name].phrase)]
    if "tokens_per_second" in names:
        phrases.append(("tokens/s", "tokens_per_second"))
    return sorted(set(phrases), key=lambda pair: -len(pair[0]))


def _in_unit(value: float, figure: Figure, unit: str) -> float:
    """A recorded value in the unit that is printed. ValueError where one cannot be made of the other."""
    if unit == "%" and figure.unit == "1":
        return 100 * (value - 1)
    factors = {("%", "%"): 1.0, ("s", "s"): 1.0, ("ms", "s"): 1e3, ("kB", "byte"): 1e-3, ("MB", "byte"): 1e-6}
    factors[("GB", "byte")] = 1e-9
    if unit and (unit, figure.unit) not in factors:
        raise ValueError(f"{figure.describe()} is recorded in {figure.unit}, and printed in {unit}.")
    return value * factors.get((unit, figure.unit), 1.0)


def _agree(printed: str, value: float) -> bool:
    """Whether a value, rounded to the decimals that are printed, is what is printed; a tie may go either way."""
    text = printed.replace(",", "").replace("\N{MINUS SIGN}", "-")
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return abs(float(text) - value) <= half * (1 + 1e-6)
