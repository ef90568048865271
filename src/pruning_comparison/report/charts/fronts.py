"""What speed and memory cost in perplexity, as a chart."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pruning_comparison.report.charts.panels import (
    REACH,
    label_values,
    methods_in,
    model_of,
    name_if_several,
    new_figure,
    panel_grid,
    panels_height,
    placeholder,
    say_nothing_to_draw,
    value_axis,
    variants_in,
    wrapped_title,
)
from pruning_comparison.report.charts.style import (
    INK,
    MUTED,
    WIDE,
    FigureSize,
    finite,
    format_methods,
    in_style,
    looks_of,
    tick,
    unit_scale,
)
from pruning_comparison.variants import DENSE

__all__ = ["draw_fronts"]

_TITLE = "What speed and memory cost in perplexity"
_CAPTION = (
    "Bars: 95 % intervals, of both figures. Numbers: per cent of the heads pruned. Cross: the dense model. A ring marks "
    "points that no other of the same method beats in both figures."
)


@in_style
def draw_fronts(table: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Perplexity against tokens per second and against cache bytes, a row of panels per method (``FRONT_COLUMNS``)."""
    pruned = table[table["variant"] != DENSE]
    if not finite(pruned["perplexity_ratio"]).any():
        return placeholder(_TITLE, model_of(table), "Nothing was compared with the dense model.", size)
    methods, variants = methods_in(pruned), variants_in(pruned)
    ring = Line2D(
        [], [], color=INK, marker="o", markersize=9, markerfacecolor="none", linestyle="none", label="on the front"
    )
    subtitle = f"{model_of(table)} · {format_methods(methods)}"
    height_in = panels_height(2.9, len(methods), 2, size)
    figure = new_figure(_TITLE, subtitle, _CAPTION, height_in, looks_of(variants), [ring], size=size)
    grid = panel_grid(figure, len(methods), 2, size)
    factor, unit = unit_scale("thousand_token_cache_bytes", [float(value) for value in table["cache_bytes"].dropna()])
    for row, method in zip(grid, methods, strict=True):
        here = table[table["method"] == method]
        name = name_if_several(methods, method)
        for axes, stem, scale, front, words, title in (
            (
                row[0],
                "speed",
                1.0,
                "on_speed_front",
                "Tokens per second, times the dense model's (higher is better)",
                "Speed",
            ),
            (row[1], "cache", factor, "on_cache_front", f"{unit} at 1,000 tokens (lower is better)", "Key-value cache"),
        ):
            gain = {"speed": "speed_ratio", "cache": "cache_bytes"}[stem]
            _draw(axes, here, variants, (gain, f"{stem}_low", f"{stem}_high"), scale, front)
            axes.set_title(
                wrapped_title(size.title_pt * 1.5, name, f"Perplexity against {title[0].lower()}{title[1:]}")
            )
            axes.set_xlabel(words)
        label_values(row[0], "Perplexity, times dense\n(lower is better)", size)
    drawn = table.rename(
        columns={"perplexity_ratio": "estimate", "perplexity_low": "ci_low", "perplexity_high": "ci_high"}
    )
    for axes in grid[0]:
        value_axis(axes, drawn, "perplexity", 1.0)
    return figure


def _draw(
    axes: Axes, rows: pd.DataFrame, variants: list[str], columns: tuple[str, str, str], factor: float, front: str
) -> None:
    gain = columns[0]
    known = rows[finite(rows[gain]) & finite(rows["perplexity_ratio"])]
    if known[known["variant"] != DENSE].empty:
        say_nothing_to_draw(axes, "no figures")
        return
    for variant in variants:
        line = known[known["variant"] == variant].sort_values("level")
        look = looks_of([variant])[variant]
        x, y = line[gain] * factor, line["perplexity_ratio"]
        axes.plot(
            x, y, color=look.colour, marker=look.marker, linestyle=look.line, zorder=3,
            markerfacecolor="white" if look.hollow else look.colour,
        )  # fmt: skip
        axes.hlines(y, line[columns[1]] * factor, line[columns[2]] * factor, color=look.colour, linewidth=1.0, zorder=2)
        axes.vlines(x, line["perplexity_low"], line["perplexity_high"], color=look.colour, linewidth=1.0, zorder=2)
        for row in line.to_dict("records"):
            axes.annotate(
                f"{row['level']:g}", (row[gain] * factor, row["perplexity_ratio"]), xytext=(5, 4),
                textcoords="offset points", fontsize=7, color=MUTED,
            )  # fmt: skip
    dense = known[known["variant"] == DENSE]
    axes.plot(dense[gain] * factor, dense["perplexity_ratio"], color=INK, marker="x", linestyle="none", zorder=4)
    rings = known[known[front].astype(bool)]
    axes.plot(
        rings[gain] * factor, rings["perplexity_ratio"], color=INK, marker="o", markersize=9, markerfacecolor="none",
        linestyle="none", linewidth=0.8, zorder=4,
    )  # fmt: skip
    values = known[gain].to_numpy(dtype=float) * factor
    ends = known[list(columns[1:])].to_numpy(dtype=float) * factor
    span = REACH * (float(np.ptp(values)) or abs(float(values.max())) or 1.0)
    ends = ends[np.isfinite(ends)]
    low = max(float(min([*values, *ends])), float(values.min()) - span)
    high = min(float(max([*values, *ends])), float(values.max()) + span)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
