"""What a command ends with in a terminal: the answer of a run as its report begins with it, and what one pruned model costs.

Texts are returned, never printed. They fit 80 columns.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning_comparison.analysis import ANSWERED, NO_DIFFERENCE, NOT_ENOUGH, REFUTED, SUPPORTED
from pruning_comparison.formatting import counted, per_cent, plain_number, with_unit
from pruning_comparison.report.answer import Answer, AnswerRow, Chip, format_times

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pruning_comparison.checkpoint.model_card import BeforeAndAfter

__all__ = ["answer_text", "before_and_after_text", "stored_answer", "stored_form"]

_WIDEST = 100
"""Sentences are hard to read in longer lines."""
_MOST_ROWS = 40
_COLOURS = {SUPPORTED: "green", REFUTED: "red", NO_DIFFERENCE: "blue", NOT_ENOUGH: "yellow", ANSWERED: "cyan"}


def stored_form(answer: Answer) -> dict[str, Any]:
    """An answer as ``results.json`` keeps it under "answer": plain values, null where a number is missing."""
    values = asdict(answer)
    values["rows"] = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in values["rows"]
    ]
    return values


def stored_answer(folder: Path) -> Answer | None:
    """The answer of a run whose report has been drawn; None where its ``results.json`` has none that can be read."""
    try:
        stored: Mapping[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))["answer"]
        rows: list[dict[str, Any]] = [
            {name: math.nan if value is None else value for name, value in row.items()} for row in stored["rows"]
        ]
        return Answer(
            str(stored["title"]),
            tuple(map(str, stored["sentences"])),
            tuple(AnswerRow(**row) for row in rows),
            tuple(Chip(**chip) for chip in stored["chips"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # drawn by another version, or changed by hand: the report itself still has it


def answer_text(answer: Answer, *, width: int = 80, coloured: bool = False) -> str:
    """An answer as a terminal shows it: title, sentences, a table for each method, and a line for each verdict."""
    from rich.text import Text

    parts: list[RenderableType] = [Text(answer.title, style="bold"), Text()]
    parts += [Text(_filled(sentence, min(width, _WIDEST))) for sentence in answer.sentences]
    parts.append(Text())
    shown = answer.rows[:_MOST_ROWS]
    methods = list(dict.fromkeys(row.method for row in shown))
    for method in methods:
        parts += [_level_table([row for row in shown if row.method == method], method), Text()]
    if len(shown) < len(answer.rows):
        more = counted(len(answer.rows) - len(shown), "more row")
        parts += [Text(f"{more} in the report."), Text()]
    if answer.chips:
        parts.append(_verdict_table(answer.chips, min(width, _WIDEST)))
    return _as_text(parts, width=min(width, _WIDEST), coloured=coloured)


def _filled(sentence: str, width: int) -> str:
    """A sentence in lines that keep a number and its per cent sign together."""
    return textwrap.fill(sentence.replace(" %", "\N{NO-BREAK SPACE}%"), width).replace("\N{NO-BREAK SPACE}", " ")


def _level_table(rows: Sequence[AnswerRow], method: str) -> Table:
    """Perplexity and speed of one method, a row for each level and variant."""
    table = _table(f"Heads pruned by {method}, times the dense model's value")
    table.add_column("pruned", no_wrap=True)
    table.add_column("variant", overflow="fold")
    for heading in ("perplexity", "95 % interval", "tokens/s", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for level in sorted({row.level for row in rows}):
        for row in (row for row in rows if row.level == level):
            table.add_row(
                f"{per_cent(level)}{' safe' if row.safe else ''}",
                row.variant,
                *_ratio(row.perplexity, row.perplexity_low, row.perplexity_high),
                *_ratio(row.tokens_per_second, row.tokens_per_second_low, row.tokens_per_second_high),
            )
    return table


def _ratio(value: float, low: float, high: float) -> tuple[str, str]:
    if math.isnan(value):
        return "", ""
    return format_times(value), "" if math.isnan(low) or math.isnan(
        high
    ) else f"{format_times(low)} to {format_times(high)}"


def _verdict_table(chips: Sequence[Chip], width: int) -> Table:
    """A line for each verdict; a title that leaves no room for it is cut."""
    from rich.text import Text

    table = _table("Expectations and questions")
    for justify in ("left", "left", "left", "right"):
        table.add_column("", no_wrap=True, justify=justify)
    table.show_header = False
    others = [
        max(len(text) for text in texts) for texts in zip(*((c.id, c.label, c.number) for c in chips), strict=True)
    ]
    room = max(8, width - sum(others) - 2 * len(others))
    for chip in chips:
        title = chip.title if len(chip.title) <= room else f"{chip.title[: room - 1]}…"
        table.add_row(chip.id, title, Text(chip.label, style=_COLOURS[chip.verdict]), chip.number)
    return table


def before_and_after_text(figures: Sequence[BeforeAndAfter], *, width: int = 80) -> str:
    """What was measured of a model before and after it was pruned, as a table, with the change in per cent."""
    table = _table("Before and after")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        unit, _, where = figure.unit.partition(",")
        scaled = {"bytes": "byte", "s": "s"}.get(unit, "")
        shown = ["not measured" if one is None else with_unit(one, scaled) for one in (figure.before, figure.after)]
        label = f"{figure.label}{',' if where else ''}{where}" if scaled else f"{figure.label}, {figure.unit}"
        table.add_row(label, *shown, _change(figure.before, figure.after))
    return _as_text([table], width=width, coloured=False)


def _change(before: float | None, after: float | None) -> str:
    """How much more or less, in per cent of what it was; a factor where it is far more."""
    if before is None or after is None or not before or not math.isfinite(after / before):
        return ""
    ratio = after / before
    if ratio >= 2:
        return f"{format_times(ratio)} times"
    change = 100 * (ratio - 1)
    return "none" if change == 0 else f"{'+' if change > 0 else ''}{plain_number(change)} %"


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip


def _as_text(parts: Sequence[RenderableType], *, width: int, coloured: bool) -> str:
    """What rich would print, without the spaces that it fills lines with."""
    from rich.console import Console

    screen = io.StringIO()
    console = Console(
        file=screen, width=width, force_terminal=coloured, color_system="standard" if coloured else None, highlight=False,
        legacy_windows=False, no_color=not coloured,
    )  # fmt: skip
    for part in parts:
        console.print(part, markup=False)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()).strip("\n")
