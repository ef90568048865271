"""The two charts that answer: perplexity relative to the dense model over the levels, and method against method."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pruning_comparison.report.charts.panels import (
    draw_line,
    level_axis,
    line_values,
    methods_in,
    model_of,
    new_figure,
    placeholder,
    say_nothing_to_draw,
    spread,
    variants_in,
)
from pruning_comparison.report.charts.style import (
    INK,
    MUTED,
    FigureSize,
    drawable,
    finite,
    format_methods,
    format_n,
    in_style,
    looks_of,
    wrapped,
)

__all__ = ["FIRST", "perplexity_over_levels", "rankings"]

FIRST = FigureSize(width_in=6.6, columns=3, title_pt=140, smallest_pt=5)
"""As wide as the first screen has room for beside the verdicts: 9 points are then 12 pixels high or more."""

_REACH = 4.0
"""The axis goes so many times as far (in logarithms) as the estimates; bars that go on are cut at the edge."""


@in_style
def perplexity_over_levels(relative: pd.DataFrame, *, tolerance: float = math.nan, size: FigureSize = FIRST) -> Figure:
    """Perplexity over the dense model's at every level, a panel per method, a line per variant, with 95 % intervals.

    ``relative`` holds ratios (``RELATIVE_COLUMNS``). A dashed line marks 1 + ``tolerance``, up to which a loss is safe. All
    panels share one logarithmic axis.
    """
    title = "Perplexity relative to the dense model"
    rows = relative[(relative["metric"] == "perplexity") & (relative["level"] > 0)]
    methods, variants, model = methods_in(rows), variants_in(rows), model_of(relative)
    if not finite(rows["estimate"]).any():
        return placeholder(title, model, "No pruned level was compared with the dense model.", size)
    columns = min(size.columns, len(methods) if len(methods) != 4 else 2)
    count = math.ceil(len(methods) / columns)
    height_in = {1: 3.3, 2: 4.0}.get(count, 1.75 * count)
    caption = f"{format_n([('perplexity', rows)])} Lower is better; 1 is the dense model."
    extra = []
    if math.isfinite(tolerance):
        extra = [
            Line2D([], [], color=MUTED, linewidth=1.1, linestyle=(0, (1, 2)), label=f"safe up to {1 + tolerance:g}")
        ]
    subtitle = f"{model} · {format_methods(methods)}"
    figure = new_figure(title, subtitle, caption, height_in, looks_of(variants), extra, size=size)
    grid = np.asarray(figure.subplots(count, columns, squeeze=False, sharex=True, sharey=True)).ravel()
    for axes, method in zip(grid, methods, strict=False):
        _draw_relative(axes, rows[rows["method"] == method], variants, tolerance)
        if len(methods) > 1:
            axes.set_title("\n".join(wrapped(drawable(method), 72 * size.width_in / columns - 50, 9, "bold")))
    for axes in grid[len(methods) :]:
        axes.set_axis_off()
    _ratio_axis(grid[0], rows)
    levels = sorted({0.0, *(float(level) for level in rows["level"])})
    for axes in grid[: len(methods)]:
        level_axis(axes, levels)
    for index, axes in enumerate(grid[: len(methods)]):
        below = index + columns >= len(methods)
        axes.tick_params(labelbottom=below)
        axes.set_xlabel("Heads pruned (%)" if below else "")
        axes.set_ylabel("times the dense model's" if index % columns == 0 else "")
    return figure


def _draw_relative(axes: Axes, rows: pd.DataFrame, variants: Sequence[str], tolerance: float) -> None:
    axes.axhline(1.0, color=INK, linewidth=0.9, zorder=1)
    if math.isfinite(tolerance):
        axes.axhline(1 + tolerance, color=MUTED, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
    levels = sorted({float(level) for level in rows["level"]})
    looks = looks_of(variants)
    for index, variant in enumerate(variants):
        values = line_values(rows[rows["variant"] == variant], levels, 1.0)
        values[values <= 0] = np.nan
        shift = spread(index, len(variants), [0.0, *levels])
        # Every line starts at the dense model: at level 0 the ratio is 1 by its definition.
        start = np.array([[1.0], [np.nan], [np.nan]])
        xs = [0.0, *(level + shift for level in levels)]
        draw_line(axes, xs, np.concatenate([start, values], axis=1), looks[variant], variant)


def _ratio_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """A logarithmic axis around 1 that shows every estimate; intervals that go much farther are cut."""
    estimates = rows["estimate"].to_numpy(dtype=float)
    estimates = np.log(estimates[np.isfinite(estimates) & (estimates > 0)])
    ends = rows[["ci_low", "ci_high"]].to_numpy(dtype=float).ravel()
    ends = np.log(np.clip(ends[np.isfinite(ends)], 1e-30, 1e30))
    low, high = min(0.0, float(estimates.min())), max(0.0, float(estimates.max()))
    reach = max(0.5 * (high - low), 0.05)
    low = max(low - reach, float(ends.min(initial=low)))
    high = min(high + reach, float(ends.max(initial=high)))
    room = 0.06 * max(high - low, 0.05)
    axes.set_yscale("log")
    axes.set_ylim(math.exp(low - room), math.exp(high + room))
    span = high - low
    if span < math.log(3):
        axes.yaxis.set_major_locator(FixedLocator(_round_ratios(math.exp(low - room), math.exp(high + room))))
    else:
        subs = (1.0, 2.0, 5.0) if span < math.log(300) else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _round_ratios(low: float, high: float) -> list[float]:
    return [
        float(value) for value in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= value <= high
    ]


@in_style
def rankings(ranked: pd.DataFrame, *, size: FigureSize = FIRST) -> Figure:
    """Methods in order within each variant, and each against the next.

    The first of each pair of panels shows how much perplexity a method costs (mean over high levels, times dense), the
    second the next rank's perplexity over its own, by pairs: a filled dot has been decided after correction.
    """
    title = "Method against method"
    rows = ranked[(ranked["compared"] == "method") & finite(ranked["estimate"])]
    model = model_of(ranked)
    counts = rows.groupby("within")["name"].nunique()
    withins = [name for name in variants_in(rows.assign(variant=rows["within"])) if counts.get(name, 0) > 1]
    if not withins:
        return placeholder(title, model, "A ranking takes two methods or more.", size)
    names = max(int(counts[name]) for name in withins)
    caption = (
        "First perplexity over the dense model's, mean over the levels ranked; then that of the next rank over this one's, "
        "paired by iteration and document. Filled: decided after Holm's correction; hollow: cannot be told apart. Bars: "
        "95 % intervals."
    )
    height_in = (0.75 + 0.3 * names) * len(withins)
    figure = new_figure(title, model, caption, height_in, {}, [], size=size)
    grid = np.asarray(figure.subplots(len(withins), 2, squeeze=False, sharey="row"))
    for line, within in zip(grid, withins, strict=True):
        here = rows[rows["within"] == within].sort_values("rank")
        colour = looks_of([within])[within].colour
        _draw_dots(line[0], here, "estimate", "ci_low", "ci_high", colour, [True] * len(here))
        _draw_dots(line[1], here, "next_estimate", "next_ci_low", "next_ci_high", colour, list(here["decided"]))
        line[0].set_title(drawable(within))
        line[0].set_xlabel("times the dense model's")
        line[1].set_xlabel("next rank over this one")
        line[1].axvline(1.0, color=INK, linewidth=0.9, zorder=1)
        line[0].set_yticks(range(len(here)), [drawable(name) for name in here["name"]])
        line[0].set_ylim(len(here) - 0.5, -0.5)
    return figure


def _draw_dots(
    axes: Axes, rows: pd.DataFrame, middle: str, low: str, high: str, colour: str, filled: Sequence[bool]
) -> None:
    values = rows[[middle, low, high]].to_numpy(dtype=float)
    for place, ((estimate, bottom, top), full) in enumerate(zip(values, filled, strict=True)):
        if not math.isfinite(estimate):
            continue
        if math.isfinite(bottom) and math.isfinite(top):
            axes.plot([bottom, top], [place, place], color=colour, linewidth=1.4, zorder=2, marker="|", markersize=6)
        axes.plot(
            [estimate], [place], marker="o", markersize=6, color=colour, zorder=3, markeredgewidth=1.4,
            markerfacecolor=colour if bool(full) else "white",
        )  # fmt: skip
    if not np.isfinite(values[:, 0]).any():
        say_nothing_to_draw(axes, "no figures")
        return
    axes.set_xscale("log")
    bottom, top = axes.get_xlim()
    if top < 4 * bottom:
        axes.xaxis.set_major_locator(FixedLocator(_round_ratios(bottom, top)))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if top < 100 * bottom else (1.0,), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
