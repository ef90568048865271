"""Parts that charts are made of: figures, panels, lines, axes, and reading the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from pruning_comparison.errors import InputError
from pruning_comparison.metrics import metric_named
from pruning_comparison.report.charts.style import (
    MUTED,
    SQUARES,
    WIDE,
    FigureSize,
    drawable,
    finite,
    looks_of,
    metric_label,
    tick,
    unit_scale,
    wrapped,
)
from pruning_comparison.variants import Look, variant_order

_FARTHEST = 1e30


REACH = 1.5
"""An axis reaches so many times the span of the estimates beyond them: bars that go farther are cut, not the lines."""


NARROW_PANEL_IN = 1.85


def model_of(*tables: pd.DataFrame) -> str:
    names = sorted({str(name) for table in tables for name in table["model"].dropna().unique()})
    if len(names) > 1:
        raise InputError(f"a chart shows one model, but the tables hold {len(names)}: {names}. Draw one at a time")
    return drawable(names[0]) if names else "no model"


def methods_in(table: pd.DataFrame) -> list[str]:
    return [str(method) for method in table["method"].dropna().unique()]


def variants_in(table: pd.DataFrame) -> list[str]:
    present = {str(variant) for variant in table["variant"].dropna().unique()}
    return sorted(present, key=variant_order)


def temperatures(table: pd.DataFrame, metrics: Sequence[str]) -> list[float]:
    rows = table[table["metric"].isin(metrics)]
    return sorted(float(value) for value in rows["temperature"].dropna().unique())


def main_temperature(rows: pd.DataFrame) -> float:
    """The temperature nearest to 1, which is plain sampling from the model; NaN where the rows have none."""
    values = [float(value) for value in rows["temperature"].dropna().unique()]
    return min(values, key=lambda value: (abs(value - 1.0), value)) if values else math.nan


def rows_at(table: pd.DataFrame, metric: str, method: str, at_temperature: float | None = None) -> pd.DataFrame:
    """The rows of one metric and method; at the main temperature where the metric has any and none is named."""
    rows = table[(table["metric"] == metric) & (table["method"] == method)]
    if at_temperature is None:
        at_temperature = main_temperature(table[table["metric"] == metric])
    return rows if math.isnan(at_temperature) else rows[rows["temperature"] == at_temperature]


def line_values(rows: pd.DataFrame, levels: Sequence[float], factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimate, low end and high end at every level, ``[3, levels]``; NaN where a row or a number is missing."""
    by_level = rows.drop_duplicates("level").set_index("level")[["estimate", "ci_low", "ci_high"]].reindex(list(levels))
    values = by_level.to_numpy(dtype=float).T * factor
    values[~np.isfinite(values)] = np.nan
    # An interval from two observations can reach beyond anything that an axis can carry.
    values = np.clip(values, -_FARTHEST, _FARTHEST)
    values[(values > 0) & (values < 1 / _FARTHEST)] = 1 / _FARTHEST
    return np.asarray(values, dtype=np.float64)


def new_figure(
    title: str,
    subtitle: str,
    caption: str,
    panels_height_in: float,
    looks: Mapping[str, Look],
    extra: Sequence[Line2D] | Sequence[Patch],
    row_gap: float = 0.02,
    *,
    size: FigureSize = WIDE,
) -> Figure:
    """A figure with title, subtitle, legend and caption at fixed places, and room for the panels between them."""
    head = wrapped(title, size.width_pt, 11.5, "bold")
    under = wrapped(subtitle, size.width_pt, 9.5)
    note = wrapped(caption, size.width_pt, 8.5)
    handles: list[Line2D | Patch] = [*_handles(looks), *extra]
    columns = _legend_columns(handles, size)
    rows = math.ceil(len(handles) / columns) if handles else 0
    under_in = 0.36 + 0.21 * (len(head) - 1)
    legend_in = under_in + 0.19 * len(under)
    top_in = legend_in + 0.2 * rows + 0.1
    bottom_in = 0.08 + 0.165 * len(note)
    height_in = top_in + panels_height_in + bottom_in
    engine = ConstrainedLayoutEngine(rect=(0, bottom_in / height_in, 1, panels_height_in / height_in), hspace=row_gap)
    figure = Figure(figsize=(size.width_in, height_in), layout=engine, facecolor="white")
    texts: tuple[tuple[float, list[str], dict[str, Any]], ...] = (
        (1 - 0.1 / height_in, head, {"va": "top", "fontsize": 11.5, "fontweight": "bold"}),
        (1 - under_in / height_in, under, {"va": "top", "fontsize": 9.5, "color": MUTED, "linespacing": 1.3}),
        (0.07 / height_in, note, {"va": "bottom", "fontsize": 8.5, "color": MUTED, "linespacing": 1.3}),
    )
    for y, lines, look in texts:
        figure.text(0.102 / size.width_in, y, "\n".join(lines), **look)
    if handles:
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.034 / size.width_in, 1 - legend_in / height_in),
            ncols=columns,
            borderaxespad=0.0,
            **(SQUARES if isinstance(handles[0], Patch) else {"handlelength": 3.2, "columnspacing": 1.6}),
        )
        legend.set_in_layout(False)
    return figure


def _handles(looks: Mapping[str, Look]) -> list[Line2D]:
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle=look.line, label=drawable(name),
            markerfacecolor="white" if look.hollow else look.colour,
        )
        for name, look in looks.items()
    ]  # fmt: skip


def _legend_columns(handles: Sequence[Line2D | Patch], size: FigureSize) -> int:
    """One row where the entries fit, else as many columns as the widest entry lets stand side by side."""
    widths = [
        (0.37 + 0.068 * length if isinstance(handle, Patch) else 0.85 + 0.075 * length)
        for handle in handles
        for length in (len(str(handle.get_label())),)
    ]
    if sum(widths) <= size.width_in:
        return max(1, len(widths))
    return max(1, int(size.width_in / max(widths)))


def panels_across(columns: int, size: FigureSize) -> int:
    """How many of ``columns`` panels stand side by side: all, or else as many as divide them into equal rows."""
    return max(across for across in range(1, size.columns + 1) if columns % across == 0)


def panel_grid(figure: Figure, rows: int, columns: int, size: FigureSize) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Axes ``[rows, columns]`` that share the value axis by column; a row takes several where the figure is too narrow."""
    across = panels_across(columns, size)
    if columns == across:
        return np.asarray(figure.subplots(rows, columns, squeeze=False, sharey="col"))
    grid = np.asarray(figure.subplots(rows * columns // across, across, squeeze=False)).reshape(rows, columns)
    for row in grid[1:]:
        for axes, first in zip(row, grid[0], strict=True):
            axes.sharey(first)
    return grid


def label_values(axes: Axes, words: str, size: FigureSize, points: float = 8.5) -> None:
    """What the values are: along the axis, or, where panels are flat, in a line of its own under the title."""
    if size.columns > 1:
        axes.set_ylabel(words, fontsize=points)
        return
    words = words.replace("\n", " ")
    axes.set_ylabel(words, fontsize=8, rotation="horizontal", ha="left", va="bottom", color=MUTED)
    place = ScaledTranslation(0, 3 / 72, axes.figure.dpi_scale_trans)
    axes.yaxis.set_label_coords(0, 1, axes.transAxes + place)
    if words:
        axes.set_title(axes.get_title(loc="left"), pad=15)


def label_levels(panels: Sequence[Axes], columns: int, size: FigureSize) -> None:
    """Name the level axis below each column; below each panel where a screen shows only a few of a column."""
    for axes in panels if size.columns == 1 else panels[max(0, len(panels) - columns) :]:
        axes.set_xlabel("Heads pruned (%)")


def placeholder(title: str, subtitle: str, reason: str, size: FigureSize) -> Figure:
    figure = new_figure(title, subtitle, "", 1.4, {}, [], size=size)
    axes = figure.subplots()
    say_nothing_to_draw(axes, reason)
    return figure


def say_nothing_to_draw(axes: Axes, reason: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", color=MUTED, transform=axes.transAxes, wrap=True)


def spread(index: int, count: int, levels: Sequence[float]) -> float:
    """How far to shift a line sideways, in per cent of heads, so that bars at the same level do not hide each other."""
    span = (max(levels) - min(levels)) or 10.0
    return (index - (count - 1) / 2) * span * 0.014


def draw_line(
    axes: Axes, xs: Sequence[float], values: np.ndarray[Any, np.dtype[np.float64]], look: Look, label: str
) -> None:
    estimate, low, high = values
    axes.plot(
        xs, estimate, color=look.colour, marker=look.marker, linestyle=look.line, label=drawable(label), zorder=3,
        markerfacecolor="white" if look.hollow else look.colour,
    )  # fmt: skip
    has_bar = np.isfinite(estimate) & np.isfinite(low) & np.isfinite(high)
    if has_bar.any():
        where = np.asarray(xs, dtype=float)[has_bar]
        axes.vlines(where, low[has_bar], high[has_bar], color=look.colour, linewidth=1.1, zorder=2)
        for end in (low, high):
            axes.plot(
                where, end[has_bar], linestyle="none", marker="_", markersize=6, color=look.colour, zorder=2,
                label="_interval end",
            )  # fmt: skip


def draw_variants(axes: Axes, rows: pd.DataFrame, metric: str, variants: Sequence[str]) -> str:
    """Draw one metric against the level, one line per variant. Returns the unit that the numbers are in."""
    levels = sorted(float(level) for level in rows["level"].dropna().unique())
    factor, unit = unit_scale(metric, [float(value) for value in rows["estimate"].dropna()])
    if not levels or not finite(rows["estimate"]).any():
        say_nothing_to_draw(axes, "no figures")
        return unit
    for index, variant in enumerate(variants):
        values = line_values(rows[rows["variant"] == variant], levels, factor)
        shift = spread(index, len(variants), levels)
        draw_line(axes, [level + shift for level in levels], values, looks_of([variant])[variant], variant)
    level_axis(axes, levels)
    return unit


def level_axis(axes: Axes, levels: Sequence[float]) -> None:
    span = (max(levels) - min(levels)) or 10.0
    axes.set_xlim(min(levels) - 0.07 * span, max(levels) + 0.07 * span)
    gaps = np.diff(sorted(levels))
    roomy = len(levels) <= 7 and (len(gaps) == 0 or gaps.min() >= 0.09 * span)
    axes.xaxis.set_major_locator(FixedLocator(list(levels)) if roomy else MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def value_axis(axes: Axes, drawn: pd.DataFrame, metric: str | None, factor: float) -> None:
    """Choose linear or logarithmic, and never blow up differences below a few per cent to the height of the panel.

    Always linear where no metric is named.
    """
    estimates = drawn["estimate"].to_numpy(dtype=float) * factor
    estimates = estimates[np.isfinite(estimates)]
    numbers = drawn[["estimate", "ci_low", "ci_high"]].to_numpy(dtype=float) * factor
    numbers = numbers[np.isfinite(numbers)]
    if not estimates.size:
        return
    reach = REACH * (float(np.ptp(estimates)) or float(np.abs(estimates).max()) or 1.0)
    low = max(float(numbers.min()), float(estimates.min()) - reach)
    high = min(float(numbers.max()), float(estimates.max()) + reach)
    if estimates.min() > 0:
        low = max(low, float(estimates.min()) / 10**REACH)
    if metric is not None and metric_named(metric).scale == "log" and low > 0 and high > 10 * low:
        axes.set_yscale("log")
        decades = math.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator() if decades < 2.5 else LogLocator(subs=(2.0, 5.0), numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        least = 0.04 * max(abs(low), abs(high)) or 0.1
        middle = (low + high) / 2
        half = max((high - low) / 2 * 1.12, least / 2)
        bottom = middle - half
        axes.set_ylim(-0.03 * (middle + half) if low >= 0 > bottom else bottom, middle + half)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))


def panel_title(size: FigureSize, metric: str, method: str | None, at_temperature: float = math.nan) -> str:
    tail = "" if math.isnan(at_temperature) else f", T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{at_temperature:g}"
    return wrapped_title(size.title_pt, method, metric_label(metric) + tail)


def wrapped_title(width_pt: float, method: str | None, what: str) -> str:
    head = f"{drawable(method)}: " if method is not None else ""
    return "\n".join(wrapped(head + what, width_pt, 9, "bold"))


def dense_value(rows: pd.DataFrame) -> float:
    """What the unpruned model gives: the baseline at level 0, or NaN."""
    dense = rows[(rows["level"] == 0) & (rows["variant"] == "baseline")]["estimate"].to_numpy(dtype=float)
    return float(dense[0]) if len(dense) and math.isfinite(dense[0]) else math.nan


def dense_line(axes: Axes, value: float) -> None:
    if math.isfinite(value):
        axes.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1, label="_dense model")


def dense_handle() -> Line2D:
    return Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="dense model (level 0)")


def name_if_several(methods: Sequence[str], method: str) -> str | None:
    return None if len(methods) == 1 else method


def panels_height(row_in: float, rows: int, columns: int, size: FigureSize) -> float:
    """How high the panels are together, in inches, where a row of them is ``row_in`` high in a wide figure."""
    across = panels_across(columns, size)
    return (NARROW_PANEL_IN if across < columns and across == 1 else row_in) * rows * columns / across
