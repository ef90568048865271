"""Accuracy on zero-shot tasks against the level: a panel for each task, a row for each method."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pruning_comparison.analysis import ALL_TASKS
from pruning_comparison.report.charts.panels import (
    draw_variants,
    label_levels,
    label_values,
    methods_in,
    model_of,
    name_if_several,
    new_figure,
    panel_grid,
    panels_height,
    placeholder,
    value_axis,
    variants_in,
    wrapped_title,
)
from pruning_comparison.report.charts.style import (
    WIDE,
    FigureSize,
    finite,
    format_axis,
    format_methods,
    in_style,
    looks_of,
)

__all__ = ["draw_tasks"]

_MOST_PANELS = 4
"""Of a row: all tasks together come first where there are several, then as many as there is room for."""


@in_style
def draw_tasks(tasks: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Accuracy against the level with its 95 % interval, from the rows of ``compare_tasks`` (columns ``TASK_COLUMNS``)."""
    title = "Accuracy on zero-shot tasks"
    rows = tasks[tasks["metric"] == "accuracy"]
    if not finite(rows["estimate"]).any():
        return placeholder(title, model_of(tasks), "No accuracy was measured.", size)
    names = [str(name) for name in dict.fromkeys(rows["task"])]
    shown = sorted(names, key=lambda name: name != ALL_TASKS)[:_MOST_PANELS]
    methods, variants = methods_in(rows), variants_in(rows)
    asked = rows.drop_duplicates("task").set_index("task")["questions"]
    caption = f"Questions: {', '.join(f'{name} {asked[name]}' for name in shown)}."
    if len(names) > len(shown):
        caption += f" The table has {len(names) - len(shown)} more."
    height_in = panels_height(2.6, len(methods), len(shown), size)
    subtitle = f"{model_of(rows)} · {format_methods(methods)}"
    figure = new_figure(title, subtitle, caption, height_in, looks_of(variants), [], size=size)
    grid = panel_grid(figure, len(methods), len(shown), size)
    for row, method in zip(grid, methods, strict=True):
        for axes, name in zip(row, shown, strict=True):
            drawn = rows[(rows["method"] == method) & (rows["task"] == name)]
            unit = draw_variants(axes, drawn, "accuracy", variants)
            axes.set_title(wrapped_title(size.title_pt, name_if_several(methods, method), name))
            label_values(axes, format_axis("accuracy", unit), size)
    for axes, name in zip(grid[0], shown, strict=True):
        value_axis(axes, rows[rows["task"] == name], "accuracy", 1.0)
    label_levels(list(grid.ravel()), len(shown), size)
    return figure
