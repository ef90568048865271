"""What a command ends with in a terminal: the answer of a run as its report begins with it, and what one pruned model costs.

Texts are returned, never printed. They fit any width from 60 columns on.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning_comparison.checkpoint.model_card import BeforeAndAfter
from pruning_comparison.formatting import plain_number, with_unit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["before_and_after_text"]


def before_and_after_text(figures: Sequence[BeforeAndAfter], *, width: int = 80) -> str:
    """What was measured of a model before and after it was pruned, as a table, with the change in per cent."""
    table = _table("Before and after")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for figure in figures:
        unit, _, where = figure.unit.partition(",")
        scaled = {"bytes": "byte", "s": "s"}.get(unit, "")
        shown = ["not measured" if one is None else with_unit(one, scaled) for one in (figure.before, figure.after)]
        label = f"{figure.label}, {figure.unit}" if not scaled else f"{figure.label}{',' if where else ''}{where}"
        table.add_row(label, *shown, _change(figure.before, figure.after))
    return _as_text([table], width=width, coloured=False)


def _change(before: float | None, after: float | None) -> str:
    """How much more or less, in per cent of what it was; a factor where that says more."""
    if before is None or after is None or not before or not math.isfinite(after / before):
        return ""
    ratio = after / before
    if ratio >= 3:
        return f"{plain_number(ratio)} times"
    change = 100 * (ratio - 1)
    return "none" if change == 0 else f"{'+' if change > 0 else ''}{plain_number(change)} %"


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, pad_edge=False
    )


def _as_text(parts: Sequence[RenderableType], *, width: int, coloured: bool) -> str:
    """What rich would print, without the spaces that it fills lines with."""
    from rich.console import Console

    screen = io.StringIO()
    console = Console(
        file=screen, width=width, force_terminal=coloured, color_system="standard" if coloured else None, highlight=False,
        legacy_windows=False,
    )  # fmt: skip
    for part in parts:
        console.print(part, markup=False)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()).strip("\n")


def stored_answer(folder: Path) -> Any | None:
    """The answer that a run's report begins with, as ``results.json`` keeps it; None where it keeps none."""
    return None


def terminal_text(answer: Any, *, width: int = 80, coloured: bool = False) -> str:
    """An answer as a terminal shows it: sentences, the table, and one line for each expectation and question."""
    return ""
