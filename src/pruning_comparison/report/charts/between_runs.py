"""Several runs over the levels: how far each is from the first, metric by metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pruning_comparison.metrics import in_role, metric_named
from pruning_comparison.report.charts.panels import (
    draw_line,
    label_levels,
    label_values,
    level_axis,
    line_values,
    main_temperature,
    new_figure,
    panel_title,
    panels_height,
    spread,
    value_axis,
    variants_in,
)
from pruning_comparison.report.charts.style import INK, WIDE, FigureSize, drawable, finite, format_n, in_style
from pruning_comparison.variants import Look, reported_variant

__all__ = ["draw_between_runs"]

_COLUMNS = 2


def draw_between_runs(compared: pd.DataFrame, *, size: FigureSize = WIDE) -> dict[str, Figure]:
    """A chart for each method: every run against the first, over the levels.

    ``compared`` has the columns of ``report.between_runs.joined``. Figures that cannot be compared are not in it, and so are
    not drawn; metrics of which nothing is there have no panel, and a method without any has no chart.
    """
    methods = list(dict.fromkeys(map(str, compared["method"])))
    drawn = {method: compared[(compared["method"] == method) & finite(compared["estimate"])] for method in methods}
    return {method: _runs_over_levels(method, rows, size) for method, rows in drawn.items() if _panels(rows)}


def _panels(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The metrics that have figures at more than the dense level, each with its rows at the temperature nearest to 1."""
    found = []
    for metric in in_role("two runs"):
        chosen = rows[rows["metric"] == metric]
        temperature = main_temperature(chosen)
        if not math.isnan(temperature):
            chosen = chosen[chosen["temperature"] == temperature]
        if (chosen["level"] > 0).any():
            found.append((metric, chosen))
    return found


@in_style
def _runs_over_levels(method: str, rows: pd.DataFrame, size: FigureSize) -> Figure:
    panels = [(metric, _as_change(chosen)) for metric, chosen in _panels(rows)]
    runs, variants = list(dict.fromkeys(map(str, rows["run"]))), variants_in(rows)
    looks = _looks(runs, variants)
    columns = min(_COLUMNS, len(panels))
    count = math.ceil(len(panels) / columns)
    title = f"Compared with run 1: heads pruned by {method}"
    caption = format_n([(metric_named(metric).short_label, chosen) for metric, chosen in panels])
    figure = new_figure(
        drawable(title),
        "The zero line is run 1.",
        caption,
        panels_height(2.1, count, columns, size),
        looks,
        [],
        size=size,
    )
    narrow = size.columns == 1
    grid = np.asarray(
        figure.subplots(count * columns if narrow else count, 1 if narrow else columns, squeeze=False)
    ).ravel()
    for axes, (metric, chosen) in zip(grid, panels, strict=False):
        _draw_panel(axes, chosen, looks)
        axes.set_title(panel_title(size, metric, None, main_temperature(chosen)))
        wish = {"higher": "higher is better", "lower": "lower is better", "none": ""}[metric_named(metric).direction]
        unit = "%" if chosen["scale"].iloc[0] == "log_ratio" else "difference"
        label_values(axes, f"{unit} ({wish})" if wish else unit, size)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    label_levels(list(grid[: len(panels)]), columns, size)
    return figure


def _draw_panel(axes: Axes, rows: pd.DataFrame, looks: dict[str, Look]) -> None:
    levels = sorted({float(level) for level in rows["level"]})
    axes.axhline(0.0, color=INK, linewidth=0.9, zorder=1)
    for index, (name, look) in enumerate(looks.items()):
        values = line_values(rows[_names(rows) == name], levels, 1.0)
        shift = spread(index, len(looks), levels)
        draw_line(axes, [level + shift for level in levels], values, look, name)
    level_axis(axes, levels)
    value_axis(axes, rows, None, 1.0)


def _as_change(rows: pd.DataFrame) -> pd.DataFrame:
    """Log ratios as per cent, so that 0 is "as run 1" in every panel; differences as they are."""
    ends = rows[["estimate", "ci_low", "ci_high"]].astype(float)
    ratio = rows["scale"].to_numpy() == "log_ratio"
    per_cent = 100 * np.expm1(np.clip(ends.to_numpy(), -60.0, 60.0))
    return rows.assign(**dict(zip(ends.columns, np.where(ratio[:, None], per_cent, ends.to_numpy()).T, strict=True)))


def _names(rows: pd.DataFrame) -> pd.Series[str]:
    return rows["run"].astype(str) + ", " + rows["variant"].astype(str)


def _looks(runs: Sequence[str], variants: Sequence[str]) -> dict[str, Look]:
    """A colour for each run; markers and dashes are those of the variants, so that both can be read off a line."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(2, len(runs))))
    return {
        f"{run}, {variant}": Look(matplotlib.colors.to_hex(shade), look.marker, look.line, hollow=look.hollow)
        for run, shade in zip(runs, shades, strict=False)
        for variant in variants
        for look in (reported_variant(variant).look,)
    }
