"""Tables in, matplotlib figures out. Nothing is estimated here: points and intervals are drawn as the tables give them.

Every function takes the ``summary`` table (one row per estimate), the ``contrasts`` table (agency beside baseline), or
both, for one model, and returns a ``matplotlib.figure.Figure`` that belongs to no window and no global state. A missing
number leaves a gap. Methods are stacked as rows of panels, so that any number of them keeps panels readable when the
picture is shown 800 pixels wide. ``size=NARROW`` stacks all panels in one column for a picture 400 pixels wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pruning_comparison.errors import InputError
from pruning_comparison.metrics import METRICS, in_role, metric_named
from pruning_comparison.report.charts.panels import (
    NARROW_PANEL_IN,
    REACH,
    dense_handle,
    dense_line,
    dense_value,
    draw_line,
    draw_variants,
    label_levels,
    label_values,
    level_axis,
    line_values,
    main_temperature,
    methods_in,
    model_of,
    name_if_several,
    new_figure,
    panel_grid,
    panel_title,
    panels_across,
    panels_height,
    placeholder,
    rows_at,
    say_nothing_to_draw,
    spread,
    temperatures,
    value_axis,
    variants_in,
    wrapped_title,
)
from pruning_comparison.report.charts.radar import radar
from pruning_comparison.report.charts.style import (
    INK,
    MUTED,
    NARROW,
    WIDE,
    FigureSize,
    finite,
    format_axis,
    format_methods,
    format_n,
    in_style,
    looks_of,
    method_looks,
    metric_label,
    save_charts,
    tick,
    to_png,
    unit_scale,
)
from pruning_comparison.variants import AGENCY_VS_BASELINE, Look

__all__ = [
    "NARROW",
    "WIDE",
    "FigureSize",
    "chart_jobs",
    "comprehensive_summary",
    "draw_all",
    "quality_metrics",
    "radar",
    "relative_improvement",
    "save_charts",
    "speed_comparison",
    "temperature",
    "to_png",
]


@in_style
def speed_comparison(summary: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Tokens per second and first-token latency against the level, and speed against perplexity.

    A dotted line without markers shows the speed if time went by the bytes left, the latency if it went by the FLOPs
    left. The third panel shows where resilience turns into speed: who is faster at the same perplexity.
    """
    title = "Speed under head pruning"
    speed = summary[summary["metric"].isin(("tokens_per_second", "first_token_latency_s"))]
    methods, model = methods_in(speed), model_of(summary)
    if not finite(speed["estimate"]).any():
        return placeholder(title, model, "No speed was measured.", size)
    variants = variants_in(speed)
    caption = format_n(
        [(metric_label(metric), speed[speed["metric"] == metric]) for metric in speed["metric"].unique()]
    )
    both = summary[summary["metric"].isin(("tokens_per_second", "tokens_per_second_in_proportion"))]
    references = {"tokens_per_second_in_proportion": "bytes", "first_token_latency_in_proportion_s": "FLOPs"}
    referred = [word for metric, word in references.items()
               if finite(summary.loc[summary["metric"] == metric, "estimate"]).any()]  # fmt: skip
    words = f"in proportion to the {' or '.join(referred)} left"
    extra = [Line2D([], [], color=MUTED, linestyle=":", linewidth=1.1, label=words)] if referred else []
    subtitle = f"{model} · {format_methods(methods)}"
    height_in = panels_height(2.6, len(methods), 3, size)
    figure = new_figure(title, subtitle, caption, height_in, looks_of(variants), extra, size=size)
    grid = panel_grid(figure, len(methods), 3, size)
    for row, method in zip(grid, methods, strict=True):
        measured = rows_at(summary, "tokens_per_second", method)
        draw_variants(row[0], measured, "tokens_per_second", variants)
        _draw_reference(row[0], rows_at(summary, "tokens_per_second_in_proportion", method), variants, 1.0)
        row[0].set_title(panel_title(size, "tokens_per_second", name_if_several(methods, method)))
        label_values(row[0], "token/s (higher is better)", size)
        latency = rows_at(summary, "first_token_latency_s", method)
        row[1].set_title(panel_title(size, "first_token_latency_s", name_if_several(methods, method)))
        unit = draw_variants(row[1], latency, "first_token_latency_s", variants)
        factor, _ = unit_scale("first_token_latency_s", [float(value) for value in latency["estimate"].dropna()])
        _draw_reference(row[1], rows_at(summary, "first_token_latency_in_proportion_s", method), variants, factor)
        label_values(row[1], format_axis("first_token_latency_s", unit), size)
        _draw_speed_against_quality(row[2], measured, rows_at(summary, "perplexity", method), variants)
        row[2].set_title(wrapped_title(size.title_pt, name_if_several(methods, method), "Speed against perplexity"))
        label_values(row[2], "token/s (higher is better)", size)
    value_axis(grid[0, 0], both, None, 1.0)
    latency = summary[summary["metric"].isin(("first_token_latency_s", "first_token_latency_in_proportion_s"))]
    factor, _ = unit_scale("first_token_latency_s", [float(value) for value in latency["estimate"].dropna()])
    value_axis(grid[0, 1], latency, "first_token_latency_s", factor)
    value_axis(grid[0, 2], speed[speed["metric"] == "tokens_per_second"], None, 1.0)
    label_levels(list(grid[:, :2].ravel()), 2, size)
    return figure


def _draw_reference(axes: Axes, reference: pd.DataFrame, variants: Sequence[str], factor: float) -> None:
    """A dotted line without markers: time in proportion to the bytes or FLOPs left."""
    for variant in variants:
        line = reference[reference["variant"] == variant].sort_values("level")
        axes.plot(
            line["level"], line["estimate"] * factor, color=looks_of([variant])[variant].colour, linestyle=":",
            linewidth=1.1, marker="_" if len(line) == 1 else "", markersize=12, label="_reference",
        )  # fmt: skip


def _draw_speed_against_quality(
    axes: Axes, speed: pd.DataFrame, perplexity: pd.DataFrame, variants: Sequence[str]
) -> None:
    drawn = []
    for variant in variants:
        fast = speed[speed["variant"] == variant].drop_duplicates("level").set_index("level")["estimate"]
        good = perplexity[perplexity["variant"] == variant].drop_duplicates("level").set_index("level")["estimate"]
        both = pd.DataFrame({"fast": fast, "good": good}).replace([math.inf, -math.inf], math.nan).sort_index()
        if not both.dropna().empty:
            look = looks_of([variant])[variant]
            axes.plot(
                both["good"], both["fast"], color=look.colour, marker=look.marker, linestyle=look.line, zorder=3,
                markerfacecolor="white" if look.hollow else look.colour,
            )  # fmt: skip
            drawn.append(both.dropna())
    if not drawn:
        say_nothing_to_draw(axes, "needs speed and perplexity")
        return
    for both in drawn:
        last = both.iloc[-1]
        axes.annotate(
            f"{both.index[-1]:g} %", (last["good"], last["fast"]), xytext=(0, 6), textcoords="offset points",
            fontsize=8, color=MUTED, ha="center",
        )  # fmt: skip
    good = pd.concat(drawn)["good"]
    low, high = float(good.min()), float(good.max())
    if low > 0 and high > 3 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.set_xlabel("Perplexity (lower is better)")


@in_style
def quality_metrics(summary: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Perplexity, divergence from the dense model, diversity (distinct-2) and repetition (seq-rep-4) against the level.

    One row of panels per method; runs of earlier versions did not measure divergence, and have no panel for it.
    """
    measured = set(summary["metric"])
    metrics = [name for name in in_role("quality chart") if METRICS[name].kind != "divergence" or name in measured]
    return _metric_rows(
        summary,
        metrics,
        "Quality under head pruning",
        [(method, None) for method in methods_in(summary[summary["metric"].isin(metrics)])],
        "Diversity and repetition are best near the dense model: word salad is diverse, a loop repeats.",
        size,
    )


@in_style
def temperature(summary: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Generation perplexity, distinct-2 and seq-rep-4 against the level, one row per method and temperature."""
    metrics = in_role("temperature chart")
    rows = summary[summary["metric"].isin(metrics)]
    return _metric_rows(
        summary,
        metrics,
        "Generated text by sampling temperature",
        [(method, value) for method in methods_in(rows) for value in temperatures(rows, metrics)],
        "Generation perplexity is that of the generated text under the dense model. Near the dense line is best.",
        size,
    )


def _metric_rows(
    summary: pd.DataFrame,
    metrics: Sequence[str],
    title: str,
    panels: Sequence[tuple[str, float | None]],
    note: str,
    size: FigureSize,
) -> Figure:
    """One column per metric, one row per (method, temperature); a temperature of None takes the main one."""
    rows = summary[summary["metric"].isin(metrics)]
    model, methods, variants = model_of(summary), methods_in(rows), variants_in(rows)
    if not panels or not finite(rows["estimate"]).any():
        return placeholder(title, model, "Nothing of this was measured.", size)
    caption = f"{format_n([(metric_label(metric), rows[rows['metric'] == metric]) for metric in metrics])} {note}"
    has_dense = any(
        math.isfinite(dense_value(rows[(rows["metric"] == metric) & (rows["method"] == method)]))
        for metric in metrics
        if METRICS[metric].kind == "text"
        for method in methods
    )
    extra = [dense_handle()] if has_dense else []
    subtitle = f"{model} · {format_methods(methods)}"
    height_in = panels_height(2.5, len(panels), len(metrics), size)
    figure = new_figure(title, subtitle, caption, height_in, looks_of(variants), extra, size=size)
    grid = panel_grid(figure, len(panels), len(metrics), size)
    for row, (method, value) in zip(grid, panels, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            shown = main_temperature(rows[rows["metric"] == metric]) if value is None else value
            drawn = rows_at(summary, metric, method, shown)
            unit = draw_variants(axes, drawn, metric, variants)
            if METRICS[metric].kind == "text":
                dense_line(axes, dense_value(drawn))
            axes.set_title(panel_title(size, metric, name_if_several(methods, method), shown))
            label_values(axes, format_axis(metric, unit), size)
    for axes, metric in zip(grid[0], metrics, strict=True):
        value_axis(axes, rows[rows["metric"] == metric], metric, 1.0)
    label_levels(list(grid.ravel()), panels_across(len(metrics), size), size)
    return figure


@in_style
def relative_improvement(contrasts: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """How much better agency does than the baseline at each level: one panel per metric, one line per method.

    The sign is turned where lower is better, so that upward always means that agency is better.
    """
    title = "Relative improvement: agency against the baseline"
    rows = contrasts[(contrasts["contrast"] == AGENCY_VS_BASELINE) & contrasts["better"].isin(("higher", "lower"))]
    metrics = [
        metric
        for metric in in_role("improvement chart")
        if finite(rows.loc[rows["metric"] == metric, "estimate"]).any()
    ]
    model, methods = model_of(contrasts), methods_in(rows[rows["metric"].isin(metrics)])
    if not metrics:
        return placeholder(title, model, "There is no comparison of agency with the baseline to draw.", size)
    caption = (
        f"{format_n([(metric_label(metric), rows[rows['metric'] == metric]) for metric in metrics])} Above the zero line "
        "agency is better, below it worse; where a bar crosses the line, the difference is unclear."
    )
    columns = min(size.columns, len(metrics))
    count = math.ceil(len(metrics) / columns)
    looks = method_looks(methods)
    subtitle = f"{model} · {format_methods(methods)}"
    height_in = (2.6 if size.columns > 1 else NARROW_PANEL_IN) * count
    shown = looks if len(methods) > 1 else {}
    figure = new_figure(title, subtitle, caption, height_in, shown, [], size=size)
    grid = figure.subplots(count, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        at = main_temperature(rows[rows["metric"] == metric])
        axes.set_title(panel_title(size, metric, None, at))
        _draw_improvement(axes, rows, metric, methods, looks, size)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    label_levels(list(grid[: len(metrics)]), columns, size)
    return figure


def _draw_improvement(
    axes: Axes, rows: pd.DataFrame, metric: str, methods: Sequence[str], looks: Mapping[str, Look], size: FigureSize
) -> None:
    chosen = rows[rows["metric"] == metric]
    levels = sorted(float(level) for level in chosen["level"].dropna().unique())
    lower_is_better = (chosen["better"] == "lower").any()
    extent = 0.0
    points: list[float] = [0.0]
    for index, method in enumerate(methods):
        values = line_values(rows_at(rows, metric, method), levels, 1.0)
        if lower_is_better:
            values = -values[[0, 2, 1]]
        shift = spread(index, len(methods), levels)
        draw_line(axes, [level + shift for level in levels], values, looks[method], method)
        extent = max(extent, float(np.nanmax(np.abs(values[0]), initial=0.0)))
        points.extend(values[0][np.isfinite(values[0])])
    relative = (chosen["unit"] == "%").any()
    level_axis(axes, levels)
    if relative and extent > 1000:
        axes.set_yscale("symlog", linthresh=100)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    low, high = axes.get_ylim()
    least = 2.0 if relative else 0.02
    reach = 2 * REACH * max(float(np.ptp(points)), least)
    low, high = max(low, min(points) - reach), min(high, max(points) + reach)
    axes.set_ylim(min(low, -least, -0.2 * high), max(high, least, -0.2 * low))
    axes.yaxis.set_major_formatter(FuncFormatter(_signed_tick))
    axes.axhline(0.0, color=INK, linewidth=1.1, zorder=1.5)
    axes.axhspan(0.0, axes.get_ylim()[1], color="#0072B2", alpha=0.05, linewidth=0, zorder=0)
    label_values(axes, f"{'Change, %' if relative else 'Difference'}\n(positive = agency better)", size)


def _signed_tick(value: float, position: object = None) -> str:
    return f"+{tick(value)}" if value > 0 else tick(value)


@in_style
def comprehensive_summary(summary: pd.DataFrame, *, method: str | None = None, size: FigureSize = WIDE) -> Figure:
    """Every metric of one method on one page, a panel each, at the temperature nearest to 1.

    ``method`` may be left out where the table holds one method only.
    """
    methods = methods_in(summary)
    title = "All measurements on one page"
    if not methods:
        return placeholder(title, model_of(summary), "Nothing was measured.", size)
    if method is None and len(methods) > 1:
        raise InputError(f"the page shows one method, but the table holds {methods}. Pass method=")
    if method is not None and method not in methods:
        raise InputError(f"no method {method!r} in the table. It holds {methods}")
    chosen = summary[summary["method"] == (method or methods[0])]
    measured = {metric_named(str(metric)).name for metric in chosen["metric"].dropna().unique()}
    present = [metric for metric in METRICS if metric in measured]
    metrics = [metric for metric in present if finite(chosen.loc[chosen["metric"] == metric, "estimate"]).any()]
    subtitle = f"{model_of(summary)} · {format_methods([method or methods[0]])}"
    if not metrics:
        return placeholder(title, subtitle, "Nothing was measured.", size)
    variants = variants_in(chosen)
    caption = format_n([(metric_label(metric), chosen[chosen["metric"] == metric]) for metric in metrics])
    without = [metric_label(metric) for metric in present if metric not in metrics]
    if without:
        caption += f" No figures for: {', '.join(without)}."
    columns = min(size.columns, len(metrics))
    count = math.ceil(len(metrics) / columns)
    height_in = 0.3 + 1.9 * count if size.columns > 1 else NARROW_PANEL_IN * count
    figure = new_figure(title, subtitle, caption, height_in, looks_of(variants), [], size=size)
    grid = figure.subplots(count, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        at = main_temperature(chosen[chosen["metric"] == metric])
        rows = rows_at(chosen, metric, method or methods[0], at)
        unit = draw_variants(axes, rows, metric, variants)
        if not finite(rows["estimate"]).any():
            continue
        factor, _ = unit_scale(metric, [float(value) for value in rows["estimate"].dropna()])
        value_axis(axes, rows, metric, factor)
        axes.set_title(panel_title(size, metric, None, at), fontsize=8.5)
        label_values(axes, format_axis(metric, unit), size, 8)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    label_levels(list(grid[: len(metrics)]), columns, size)
    return figure


def chart_jobs(
    summary: pd.DataFrame, contrasts: pd.DataFrame, *, size: FigureSize = WIDE
) -> dict[str, Callable[[], Figure]]:
    """What draws each chart, by name, in reading order; several methods have a ``comprehensive_summary_<method>`` each."""
    methods = methods_in(summary)
    pages: dict[str, Callable[[], Figure]] = (
        {
            f"comprehensive_summary_{method}": partial(comprehensive_summary, summary, method=method, size=size)
            for method in methods
        }
        if len(methods) > 1
        else {"comprehensive_summary": partial(comprehensive_summary, summary, size=size)}
    )
    return {
        "speed_comparison": partial(speed_comparison, summary, size=size),
        "quality_metrics": partial(quality_metrics, summary, size=size),
        "relative_improvement": partial(relative_improvement, contrasts, size=size),
        "radar": partial(radar, summary, contrasts, size=size),
        "temperature": partial(temperature, summary, size=size),
        **pages,
    }


def draw_all(summary: pd.DataFrame, contrasts: pd.DataFrame, *, size: FigureSize = WIDE) -> dict[str, Figure]:
    """Every chart by its name, in reading order."""
    return {name: draw() for name, draw in chart_jobs(summary, contrasts, size=size).items()}
