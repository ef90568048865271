"""Maps of heads that tell about a head when it is pointed at."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pruning_comparison.analysis import Array, HeadMap

_HEAD_BYTES = 450_000


@dataclass(frozen=True)
class HeadCell:
    """A head on a map: what is written on it, the level at which it goes, and which of ten shades it has."""

    text: str
    gone: str
    shade: int | None


@dataclass(frozen=True)
class HeadTable:
    caption: str
    heads: int
    rows: tuple[tuple[HeadCell, ...], ...]
    views: tuple[str, ...]


def head_tables(maps: Sequence[HeadMap]) -> tuple[list[HeadTable], Markup, int]:
    """The maps that fit, the data behind them as JSON that is safe inside a script element, and how many did not fit."""
    tables, data = [], []
    left = _HEAD_BYTES
    for one in maps:
        levels = [level for level in one.levels if level > 0]
        views = [(name.replace("_", " "), _plain_values(values)) for name, values in one.values.items()]
        told: dict[str, Any] = {
            "heads": one.gone_at.shape[1],
            "iterations": [_plain_values(values) for values in one.by_iteration],
            "views": [{"name": name, "values": values} for name, values in views],
        }
        if one.asked:
            told["refused"], told["overridden"] = (_plain_values(grid) for grid in (one.refused, one.overridden))
        text = json.dumps(told, separators=(",", ":"), allow_nan=False)
        left -= len(text) + 55 * one.gone_at.size
        if left < 0:
            continue
        rows = tuple(
            tuple(
                _head_cell(float(level), levels, bool(refused), bool(overridden))
                for level, refused, overridden in zip(*parts, strict=True)
            )
            for parts in zip(one.gone_at, one.refused, one.overridden, strict=True)
        )
        caption = f"{one.variant}, {one.method}: level at which each head is pruned, %"
        tables.append(HeadTable(caption, one.gone_at.shape[1], rows, tuple(name for name, _ in views)))
        data.append(text)
    safe = f"[{','.join(data)}]".replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return tables, Markup(safe), len(maps) - len(tables)


def _head_cell(level: float, levels: Sequence[float], refused: bool, overridden: bool) -> HeadCell:
    mark = "×" if overridden else "·" if refused else ""
    if math.isinf(level):
        return HeadCell(f"–{mark}", "", None)
    return HeadCell(f"{level:g}{mark}", f"{level:g}", round(9 * levels.index(level) / max(1, len(levels) - 1)))


def _plain_values(values: Array) -> list[float | None]:
    """Numbers of three digits, row by row; None for what is not finite."""
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values.ravel()]
