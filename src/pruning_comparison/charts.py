"""Tables in, matplotlib figures out. Nothing is estimated here: points and intervals are drawn as the tables give them.

Every function takes the ``summary`` table (one row per estimate), the ``contrasts`` table (agency beside baseline), or
both, for one model, and returns a ``matplotlib.figure.Figure`` that belongs to no window and no global state. A missing
number leaves a gap. Methods are stacked as rows of panels, so that any number of them keeps panels readable when the
picture is shown 800 pixels wide. ``layout=NARROW`` stacks all panels in one column for a picture 400 pixels wide.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextToPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from pruning_comparison.errors import InputError
from pruning_comparison.measure.metrics import METRICS

__all__ = [
    "NARROW",
    "WIDE",
    "Layout",
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

AGENCY_VS_BASELINE = "agency vs baseline"
_FARTHEST = 1e30
_REACH = 1.5
"""An axis reaches so many times the span of the estimates beyond them: bars that go farther are cut, not the lines."""
_FONT = "DejaVu Sans"
_RULER = TextToPath()
_NARROW_PANEL_IN = 1.85
_INK = "#222222"
_MUTED = "#666666"
_RADAR_LIMIT_DOUBLINGS = 4
_SQUARES = {"handlelength": 1.1, "handleheight": 1.0, "columnspacing": 1.3, "fontsize": 8.5}


@dataclass(frozen=True)
class Layout:
    """How wide a picture is, and how many panels may stand side by side.

    ``title_pt`` is the room for a panel's title in points. No letter is written on a map's square that would have to be
    smaller than ``smallest_pt``.
    """

    width_in: float
    columns: int
    title_pt: float
    smallest_pt: float

    @property
    def width_pt(self) -> float:
        """Room for text from margin to margin, in points."""
        return 72 * self.width_in - 24


WIDE = Layout(width_in=8.5, columns=3, title_pt=172, smallest_pt=5)
NARROW = Layout(width_in=4.0, columns=1, title_pt=225, smallest_pt=7)
"""400 pixels at 100 to the inch: 7 points, the smallest text, are then 10 pixels high."""


@dataclass(frozen=True)
class Look:
    """How one line looks. Marker and dashes differ as well as colour, so that greyscale prints stay readable."""

    colour: str
    marker: str
    line: Any  # a matplotlib line style: a name, or (offset, (on, off, ...)) in points
    hollow: bool = False


# Okabe-Ito colours: they stay apart for every common kind of colour blindness.
VARIANT_LOOKS: dict[str, Look] = {
    "baseline": Look("#D55E00", "o", (0, (4, 1.6)), hollow=True),
    "agency": Look("#0072B2", "s", "-"),
    "baseline-progressive": Look("#E69F00", "^", "-.", hollow=True),
    "agency-adaptation": Look("#56B4E9", "D", (0, (1, 1.2))),
    "agency-selection": Look("#009E73", "v", (0, (6, 1.5, 1, 1.5))),
    "agency-always-yes": Look("#CC79A7", "P", (0, (2, 1))),
    "agency-heeds-states": Look("#000000", "*", (0, (3, 1, 1, 1, 1, 1))),
}
_UNKNOWN_VARIANT = Look("#777777", "X", ":")
_METHOD_MARKERS = ("s", "o", "^", "D", "v", "P")
_METHOD_LINES: tuple[Any, ...] = ("-", (0, (4, 1.6)), "-.", ":", (0, (6, 1.5, 1, 1.5)), "-")

_SHORT_LABELS = {
    "distinct_2": "Diversity (distinct-2)",
    "generation_perplexity": "Generation perplexity",
    "tokens_per_second_ceiling": "Tokens/s the bytes left allow",
    "first_token_latency_floor_s": "First token, by FLOPs left",
    "distinct_2_distance": "Distinct-2 distance",
    "seq_rep_4_distance": "Seq-rep-4 distance",
    "generation_perplexity_distance": "Log gen. perpl. distance",
    "distinct_2_adjusted": "Distinct-2, adjusted",
    "adaptation_peak_memory_bytes": "Peak memory, adapting",
    "peak_memory_bytes": "Peak memory, generating",
    "cache_bytes": "Key-value cache",
    "parameter_bytes": "Parameters",
}
_QUALITY = ("perplexity", "distinct_2", "seq_rep_4")
_TEMPERATURE = ("generation_perplexity", "distinct_2", "seq_rep_4")
_IMPROVEMENT = (
    "perplexity",
    "tokens_per_second",
    "first_token_latency_s",
    "peak_memory_bytes",
    "distinct_2_distance",
    "seq_rep_4_distance",
)
_RADAR = (
    "perplexity",
    "tokens_per_second",
    "first_token_latency_s",
    "peak_memory_bytes",
    "distinct_2_distance",
    "seq_rep_4_distance",
    "generation_perplexity_distance",
)

_P = ParamSpec("_P")


# One look, whatever style the caller has set


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": _FONT,
                "font.size": 9,
                "text.parse_math": False,
                "text.color": _INK,
                "axes.titlesize": 9,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.labelsize": 8.5,
                "axes.labelcolor": _INK,
                "axes.edgecolor": "#888888",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": "#e4e4e4",
                "grid.linewidth": 0.7,
                "xtick.labelsize": 8.5,
                "ytick.labelsize": 8.5,
                "xtick.color": "#444444",
                "ytick.color": "#444444",
                "lines.linewidth": 1.6,
                "lines.markersize": 5,
                "legend.frameon": False,
                "legend.fontsize": 9,
                "svg.hashsalt": "pruning-comparison",
                "svg.fonttype": "path",
            }
        )
        yield


def _in_style(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with _style():
            figure = draw(*args, **kwargs)
            # Places are found once, not again for each file that is written of the figure.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return styled


# Words and numbers on the page


@cache
def _drawable_characters() -> frozenset[int]:
    regular, bold = (get_font(findfont(FontProperties(family=_FONT, weight=weight))) for weight in ("normal", "bold"))
    return frozenset(regular.get_charmap()) & frozenset(bold.get_charmap())


def _words(name: object) -> str:
    """A name as the font can draw it: a box for each character it lacks, so that no name can make matplotlib warn."""
    drawable = _drawable_characters()
    return "".join(
        " " if character.isspace() else character if ord(character) in drawable else "\N{WHITE SQUARE}"
        for character in str(name)
    )


def _wrapped(text: str, width_pt: float, size: float, weight: str = "normal") -> list[str]:
    """Lines no wider than ``width_pt`` points as the font draws them; a word too wide for a line is cut."""
    font = FontProperties(family=_FONT, size=size, weight=weight)

    def fits(line: str) -> bool:
        return float(_RULER.get_text_width_height_descent(line, font, ismath=False)[0]) <= width_pt

    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if fits(longer):
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _label(metric: str) -> str:
    return _SHORT_LABELS.get(metric) or (METRICS[metric].label if metric in METRICS else _words(metric))


def _number(value: float) -> str:
    """A number for a label: three significant digits, thousands separated."""
    if not math.isfinite(value):
        return "missing" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _tick(value: float, _position: object = None) -> str:
    whole = 1e3 <= abs(value) < 1e7 and value == round(value)
    text = f"{value:,.0f}" if whole else f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _scale(metric: str, values: Sequence[float]) -> tuple[float, str]:
    """What to multiply by and the unit to write, so that bytes and seconds come out as readable numbers."""
    unit = METRICS[metric].unit if metric in METRICS else "1"
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if unit == "byte":
        for power, word in ((9, "GB"), (6, "MB"), (3, "kB")):
            if largest >= 10**power:
                return 10.0**-power, word
        return 1.0, "byte"
    if unit == "FLOP":
        return (1e-9, "GFLOP") if largest >= 1e9 else (1e-6, "MFLOP") if largest >= 1e6 else (1.0, "FLOP")
    if unit == "s":
        return (1e3, "ms") if 0 < largest < 1 else (1.0, "s")
    return 1.0, "" if unit == "1" else unit


def _axis_words(metric: str, unit: str) -> str:
    direction = METRICS[metric].better if metric in METRICS else "none"
    wish = {"higher": "higher is better", "lower": "lower is better", "none": ""}[direction]
    return f"{unit} ({wish})" if unit and wish else wish or unit


def _temperature_words(value: float) -> str:
    return "" if math.isnan(value) else f"temperature {value:g}"


def _n_words(parts: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """How many observations stand behind the points, metric by metric, and what that means for the bars."""
    told = []
    largest = 0
    for label, rows in parts:
        counts = sorted({int(count) for count in rows.loc[_finite(rows["estimate"]), "n"] if _is_number(count)})
        if counts:
            largest = max(largest, counts[-1])
            told.append((label, f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"))
    if not told:
        return "No figures to draw."
    same = {count for _, count in told}
    per_metric = f"{told[0][1]} for every quantity" if len(same) == 1 else "; ".join(f"{a} {b}" for a, b in told)
    if largest < 2:
        return "n = 1: one observation per point, so there is no interval."
    return (
        f"Bars: 95 % intervals; bars at a panel's edge go on, points without one have none. n per point: {per_metric}."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(float(value))


def _finite(column: pd.Series[Any]) -> pd.Series[bool]:
    return pd.Series(np.isfinite(pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)), index=column.index)


# Reading the tables


def _model(*tables: pd.DataFrame) -> str:
    names = sorted({str(name) for table in tables for name in table["model"].dropna().unique()})
    if len(names) > 1:
        raise InputError(f"a chart shows one model, but the tables hold {len(names)}: {names}. Draw one at a time")
    return _words(names[0]) if names else "no model"


def _methods(table: pd.DataFrame) -> list[str]:
    return [str(method) for method in table["method"].dropna().unique()]


def _variants(table: pd.DataFrame) -> list[str]:
    present = {str(variant) for variant in table["variant"].dropna().unique()}
    return [name for name in VARIANT_LOOKS if name in present] + sorted(present - set(VARIANT_LOOKS))


def _temperatures(table: pd.DataFrame, metrics: Sequence[str]) -> list[float]:
    rows = table[table["metric"].isin(metrics)]
    return sorted(float(value) for value in rows["temperature"].dropna().unique())


def _main_temperature(rows: pd.DataFrame) -> float:
    """The temperature nearest to 1, which is plain sampling from the model; NaN where the rows have none."""
    values = [float(value) for value in rows["temperature"].dropna().unique()]
    return min(values, key=lambda value: (abs(value - 1.0), value)) if values else math.nan


def _at(table: pd.DataFrame, metric: str, method: str, at_temperature: float | None = None) -> pd.DataFrame:
    """The rows of one metric and method; at the main temperature where the metric has any and none is named."""
    rows = table[(table["metric"] == metric) & (table["method"] == method)]
    if at_temperature is None:
        at_temperature = _main_temperature(table[table["metric"] == metric])
    return rows if math.isnan(at_temperature) else rows[rows["temperature"] == at_temperature]


def _line(rows: pd.DataFrame, levels: Sequence[float], factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimate, low end and high end at every level, ``[3, levels]``; NaN where a row or a number is missing."""
    by_level = rows.drop_duplicates("level").set_index("level")[["estimate", "ci_low", "ci_high"]].reindex(list(levels))
    values = by_level.to_numpy(dtype=float).T * factor
    values[~np.isfinite(values)] = np.nan
    # An interval from two observations can reach beyond anything that an axis can carry.
    values = np.clip(values, -_FARTHEST, _FARTHEST)
    values[(values > 0) & (values < 1 / _FARTHEST)] = 1 / _FARTHEST
    return np.asarray(values, dtype=np.float64)


# Parts of figures


def _new_figure(
    title: str,
    subtitle: str,
    caption: str,
    panels_height_in: float,
    looks: Mapping[str, Look],
    extra: Sequence[Line2D] | Sequence[Patch],
    row_gap: float = 0.02,
    *,
    layout: Layout = WIDE,
) -> Figure:
    """A figure with title, subtitle, legend and caption at fixed places, and room for the panels between them."""
    head = _wrapped(title, layout.width_pt, 11.5, "bold")
    under = _wrapped(subtitle, layout.width_pt, 9.5)
    note = _wrapped(caption, layout.width_pt, 8.5)
    handles: list[Line2D | Patch] = [*_handles(looks), *extra]
    columns = _legend_columns(handles, layout)
    rows = math.ceil(len(handles) / columns) if handles else 0
    under_in = 0.36 + 0.21 * (len(head) - 1)
    legend_in = under_in + 0.19 * len(under)
    top_in = legend_in + 0.2 * rows + 0.1
    bottom_in = 0.08 + 0.165 * len(note)
    height_in = top_in + panels_height_in + bottom_in
    engine = ConstrainedLayoutEngine(rect=(0, bottom_in / height_in, 1, panels_height_in / height_in), hspace=row_gap)
    figure = Figure(figsize=(layout.width_in, height_in), layout=engine, facecolor="white")
    texts: tuple[tuple[float, list[str], dict[str, Any]], ...] = (
        (1 - 0.1 / height_in, head, {"va": "top", "fontsize": 11.5, "fontweight": "bold"}),
        (1 - under_in / height_in, under, {"va": "top", "fontsize": 9.5, "color": _MUTED, "linespacing": 1.3}),
        (0.07 / height_in, note, {"va": "bottom", "fontsize": 8.5, "color": _MUTED, "linespacing": 1.3}),
    )
    for y, lines, look in texts:
        figure.text(0.102 / layout.width_in, y, "\n".join(lines), **look)
    if handles:
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.034 / layout.width_in, 1 - legend_in / height_in),
            ncols=columns,
            borderaxespad=0.0,
            **(_SQUARES if isinstance(handles[0], Patch) else {"handlelength": 3.2, "columnspacing": 1.6}),
        )
        legend.set_in_layout(False)
    return figure


def _handles(looks: Mapping[str, Look]) -> list[Line2D]:
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle=look.line, label=_words(name),
            markerfacecolor="white" if look.hollow else look.colour,
        )
        for name, look in looks.items()
    ]  # fmt: skip


def _legend_columns(handles: Sequence[Line2D | Patch], layout: Layout) -> int:
    """One row where the entries fit, else as many columns as the widest entry lets stand side by side."""
    widths = [
        (0.37 + 0.068 * length if isinstance(handle, Patch) else 0.85 + 0.075 * length)
        for handle in handles
        for length in (len(str(handle.get_label())),)
    ]
    if sum(widths) <= layout.width_in:
        return max(1, len(widths))
    return max(1, int(layout.width_in / max(widths)))


def _panels(figure: Figure, rows: int, columns: int, layout: Layout) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Axes ``[rows, columns]`` that share the value axis by column; one below the other where the layout is narrow."""
    if columns <= layout.columns:
        return np.asarray(figure.subplots(rows, columns, squeeze=False, sharey="col"))
    grid = np.asarray(figure.subplots(rows * columns, 1, squeeze=False)).reshape(rows, columns)
    for row in grid[1:]:
        for axes, first in zip(row, grid[0], strict=True):
            axes.sharey(first)
    return grid


def _value_words(axes: Axes, words: str, layout: Layout, size: float = 8.5) -> None:
    """What the values are: along the axis, or, where panels are flat, in a line of its own under the title."""
    if layout.columns > 1:
        axes.set_ylabel(words, fontsize=size)
        return
    words = words.replace("\n", " ")
    axes.set_ylabel(words, fontsize=8, rotation="horizontal", ha="left", va="bottom", color=_MUTED)
    place = ScaledTranslation(0, 3 / 72, axes.figure.dpi_scale_trans)
    axes.yaxis.set_label_coords(0, 1, axes.transAxes + place)
    if words:
        axes.set_title(axes.get_title(loc="left"), pad=15)


def _level_words(panels: Sequence[Axes], columns: int, layout: Layout) -> None:
    """Name the level axis below each column; below each panel where a screen shows only a few of a column."""
    for axes in panels if layout.columns == 1 else panels[max(0, len(panels) - columns) :]:
        axes.set_xlabel("Heads pruned (%)")


def _placeholder(title: str, subtitle: str, reason: str, layout: Layout) -> Figure:
    figure = _new_figure(title, subtitle, "", 1.4, {}, [], layout=layout)
    axes = figure.subplots()
    _say_nothing_to_draw(axes, reason)
    return figure


def _say_nothing_to_draw(axes: Axes, reason: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", color=_MUTED, transform=axes.transAxes, wrap=True)


def _looks(variants: Sequence[str]) -> dict[str, Look]:
    return {name: VARIANT_LOOKS.get(name, _UNKNOWN_VARIANT) for name in variants}


def _spread(index: int, count: int, levels: Sequence[float]) -> float:
    """How far to shift a line sideways, in per cent of heads, so that bars at the same level do not hide each other."""
    span = (max(levels) - min(levels)) or 10.0
    return (index - (count - 1) / 2) * span * 0.014


def _draw_line(
    axes: Axes, xs: Sequence[float], values: np.ndarray[Any, np.dtype[np.float64]], look: Look, label: str
) -> None:
    estimate, low, high = values
    axes.plot(
        xs, estimate, color=look.colour, marker=look.marker, linestyle=look.line, label=_words(label), zorder=3,
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


def _draw_variants(axes: Axes, rows: pd.DataFrame, metric: str, variants: Sequence[str]) -> str:
    """Draw one metric against the level, one line per variant. Returns the unit that the numbers are in."""
    levels = sorted(float(level) for level in rows["level"].dropna().unique())
    factor, unit = _scale(metric, [float(value) for value in rows["estimate"].dropna()])
    if not levels or not _finite(rows["estimate"]).any():
        _say_nothing_to_draw(axes, "no figures")
        return unit
    for index, variant in enumerate(variants):
        values = _line(rows[rows["variant"] == variant], levels, factor)
        shift = _spread(index, len(variants), levels)
        _draw_line(axes, [level + shift for level in levels], values, _looks([variant])[variant], variant)
    _level_axis(axes, levels)
    return unit


def _level_axis(axes: Axes, levels: Sequence[float]) -> None:
    span = (max(levels) - min(levels)) or 10.0
    axes.set_xlim(min(levels) - 0.07 * span, max(levels) + 0.07 * span)
    gaps = np.diff(sorted(levels))
    roomy = len(levels) <= 7 and (len(gaps) == 0 or gaps.min() >= 0.09 * span)
    axes.xaxis.set_major_locator(FixedLocator(list(levels)) if roomy else MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def _value_axis(axes: Axes, drawn: pd.DataFrame, metric: str, factor: float) -> None:
    """Choose linear or logarithmic, and never blow up differences below a few per cent to the height of the panel."""
    estimates = drawn["estimate"].to_numpy(dtype=float) * factor
    estimates = estimates[np.isfinite(estimates)]
    numbers = drawn[["estimate", "ci_low", "ci_high"]].to_numpy(dtype=float) * factor
    numbers = numbers[np.isfinite(numbers)]
    if not estimates.size:
        return
    reach = _REACH * (float(np.ptp(estimates)) or float(np.abs(estimates).max()) or 1.0)
    low = max(float(numbers.min()), float(estimates.min()) - reach)
    high = min(float(numbers.max()), float(estimates.max()) + reach)
    if estimates.min() > 0:
        low = max(low, float(estimates.min()) / 10**_REACH)
    if metric in METRICS and METRICS[metric].log_scale and low > 0 and high > 10 * low:
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
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _panel_title(layout: Layout, metric: str, method: str | None, at_temperature: float = math.nan) -> str:
    tail = "" if math.isnan(at_temperature) else f", T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{at_temperature:g}"
    return _title(layout.title_pt, method, _label(metric) + tail)


def _title(width_pt: float, method: str | None, what: str) -> str:
    head = f"{_words(method)}: " if method is not None else ""
    return "\n".join(_wrapped(head + what, width_pt, 9, "bold"))


def _dense_value(rows: pd.DataFrame) -> float:
    """What the unpruned model gives: the baseline at level 0, or NaN."""
    dense = rows[(rows["level"] == 0) & (rows["variant"] == "baseline")]["estimate"].to_numpy(dtype=float)
    return float(dense[0]) if len(dense) and math.isfinite(dense[0]) else math.nan


def _dense_line(axes: Axes, value: float) -> None:
    if math.isfinite(value):
        axes.axhline(value, color=_MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1, label="_dense model")


def _dense_handle() -> Line2D:
    return Line2D([], [], color=_MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="dense model (level 0)")


def _method_words(methods: Sequence[str]) -> str:
    names = ", ".join(_words(method) for method in methods)
    return f"pruning method: {names}" if len(methods) == 1 else f"pruning methods: {names}"


def _only(methods: Sequence[str], method: str) -> str | None:
    return None if len(methods) == 1 else method


# The charts


@_in_style
def speed_comparison(summary: pd.DataFrame, *, layout: Layout = WIDE) -> Figure:
    """Tokens per second and first-token latency against the level, and speed against perplexity.

    A dotted line without markers is the bound: the speed that the bytes left allow, the latency that the FLOPs left
    allow. The third panel shows where resilience turns into speed: who is faster at the same perplexity.
    """
    title = "Speed under head pruning"
    speed = summary[summary["metric"].isin(("tokens_per_second", "first_token_latency_s"))]
    methods, model = _methods(speed), _model(summary)
    if not _finite(speed["estimate"]).any():
        return _placeholder(title, model, "No speed was measured.", layout)
    variants = _variants(speed)
    caption = _n_words([(_label(metric), speed[speed["metric"] == metric]) for metric in speed["metric"].unique()])
    both = summary[summary["metric"].isin(("tokens_per_second", "tokens_per_second_ceiling"))]
    bounds = {"tokens_per_second_ceiling": "bytes", "first_token_latency_floor_s": "FLOPs"}
    bounded = [word for metric, word in bounds.items()
               if _finite(summary.loc[summary["metric"] == metric, "estimate"]).any()]  # fmt: skip
    words = f"what the {' or '.join(bounded)} left allow"
    extra = [Line2D([], [], color=_MUTED, linestyle=":", linewidth=1.1, label=words)] if bounded else []
    subtitle = f"{model} · {_method_words(methods)}"
    height_in = _height(2.6, len(methods), 3, layout)
    figure = _new_figure(title, subtitle, caption, height_in, _looks(variants), extra, layout=layout)
    grid = _panels(figure, len(methods), 3, layout)
    for row, method in zip(grid, methods, strict=True):
        measured = _at(summary, "tokens_per_second", method)
        _draw_variants(row[0], measured, "tokens_per_second", variants)
        _draw_bound(row[0], _at(summary, "tokens_per_second_ceiling", method), variants, 1.0)
        row[0].set_title(_panel_title(layout, "tokens_per_second", _only(methods, method)))
        _value_words(row[0], "token/s (higher is better)", layout)
        latency = _at(summary, "first_token_latency_s", method)
        row[1].set_title(_panel_title(layout, "first_token_latency_s", _only(methods, method)))
        unit = _draw_variants(row[1], latency, "first_token_latency_s", variants)
        factor, _ = _scale("first_token_latency_s", [float(value) for value in latency["estimate"].dropna()])
        _draw_bound(row[1], _at(summary, "first_token_latency_floor_s", method), variants, factor)
        _value_words(row[1], _axis_words("first_token_latency_s", unit), layout)
        _draw_speed_against_quality(row[2], measured, _at(summary, "perplexity", method), variants)
        row[2].set_title(_title(layout.title_pt, _only(methods, method), "Speed against perplexity"))
        _value_words(row[2], "token/s (higher is better)", layout)
    _value_axis(grid[0, 0], both, "", 1.0)
    latency = summary[summary["metric"].isin(("first_token_latency_s", "first_token_latency_floor_s"))]
    factor, _ = _scale("first_token_latency_s", [float(value) for value in latency["estimate"].dropna()])
    _value_axis(grid[0, 1], latency, "first_token_latency_s", factor)
    _value_axis(grid[0, 2], speed[speed["metric"] == "tokens_per_second"], "", 1.0)
    _level_words(list(grid[:, :2].ravel()), 2, layout)
    return figure


def _height(row_in: float, rows: int, columns: int, layout: Layout) -> float:
    """How high the panels are together, in inches, where a row of them is ``row_in`` high in the wide layout."""
    return row_in * rows if columns <= layout.columns else _NARROW_PANEL_IN * rows * columns


def _draw_bound(axes: Axes, bound: pd.DataFrame, variants: Sequence[str], factor: float) -> None:
    """A dotted line without markers: what the bytes or FLOPs left allow."""
    for variant in variants:
        line = bound[bound["variant"] == variant].sort_values("level")
        axes.plot(
            line["level"], line["estimate"] * factor, color=_looks([variant])[variant].colour, linestyle=":",
            linewidth=1.1, marker="_" if len(line) == 1 else "", markersize=12, label="_bound",
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
            look = _looks([variant])[variant]
            axes.plot(
                both["good"], both["fast"], color=look.colour, marker=look.marker, linestyle=look.line, zorder=3,
                markerfacecolor="white" if look.hollow else look.colour,
            )  # fmt: skip
            drawn.append(both.dropna())
    if not drawn:
        _say_nothing_to_draw(axes, "needs speed and perplexity")
        return
    for both in drawn:
        last = both.iloc[-1]
        axes.annotate(
            f"{both.index[-1]:g} %", (last["good"], last["fast"]), xytext=(0, 6), textcoords="offset points",
            fontsize=8, color=_MUTED, ha="center",
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
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel("Perplexity (lower is better)")


@_in_style
def quality_metrics(summary: pd.DataFrame, *, layout: Layout = WIDE) -> Figure:
    """Perplexity, diversity (distinct-2) and repetition (seq-rep-4) against the level, one row of panels per method."""
    return _metric_rows(
        summary,
        _QUALITY,
        "Quality under head pruning",
        [(method, None) for method in _methods(summary[summary["metric"].isin(_QUALITY)])],
        "Diversity and repetition are best near the dense model: word salad is diverse, a loop repeats.",
        layout,
    )


@_in_style
def temperature(summary: pd.DataFrame, *, layout: Layout = WIDE) -> Figure:
    """Generation perplexity, distinct-2 and seq-rep-4 against the level, one row per method and temperature."""
    rows = summary[summary["metric"].isin(_TEMPERATURE)]
    return _metric_rows(
        summary,
        _TEMPERATURE,
        "Generated text by sampling temperature",
        [(method, value) for method in _methods(rows) for value in _temperatures(rows, _TEMPERATURE)],
        "Generation perplexity is that of the generated text under the dense model. Near the dense line is best.",
        layout,
    )


def _metric_rows(
    summary: pd.DataFrame,
    metrics: Sequence[str],
    title: str,
    panels: Sequence[tuple[str, float | None]],
    note: str,
    layout: Layout,
) -> Figure:
    """One column per metric, one row per (method, temperature); a temperature of None takes the main one."""
    rows = summary[summary["metric"].isin(metrics)]
    model, methods, variants = _model(summary), _methods(rows), _variants(rows)
    if not panels or not _finite(rows["estimate"]).any():
        return _placeholder(title, model, "Nothing of this was measured.", layout)
    caption = f"{_n_words([(_label(metric), rows[rows['metric'] == metric]) for metric in metrics])} {note}"
    has_dense = any(
        math.isfinite(_dense_value(rows[(rows["metric"] == metric) & (rows["method"] == method)]))
        for metric in metrics[-2:]
        for method in methods
    )
    extra = [_dense_handle()] if has_dense else []
    subtitle = f"{model} · {_method_words(methods)}"
    height_in = _height(2.5, len(panels), len(metrics), layout)
    figure = _new_figure(title, subtitle, caption, height_in, _looks(variants), extra, layout=layout)
    grid = _panels(figure, len(panels), len(metrics), layout)
    for row, (method, value) in zip(grid, panels, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            shown = _main_temperature(rows[rows["metric"] == metric]) if value is None else value
            drawn = _at(summary, metric, method, shown)
            unit = _draw_variants(axes, drawn, metric, variants)
            if metric != "perplexity":
                _dense_line(axes, _dense_value(drawn))
            axes.set_title(_panel_title(layout, metric, _only(methods, method), shown))
            _value_words(axes, _axis_words(metric, unit), layout)
    for axes, metric in zip(grid[0], metrics, strict=True):
        _value_axis(axes, rows[rows["metric"] == metric], metric, 1.0)
    _level_words(list(grid.ravel()), len(metrics), layout)
    return figure


@_in_style
def relative_improvement(contrasts: pd.DataFrame, *, layout: Layout = WIDE) -> Figure:
    """How much better agency does than the baseline at each level: one panel per metric, one line per method.

    The sign is turned where lower is better, so that upward always means that agency is better.
    """
    title = "Relative improvement: agency against the baseline"
    rows = contrasts[(contrasts["contrast"] == AGENCY_VS_BASELINE) & contrasts["better"].isin(("higher", "lower"))]
    metrics = [metric for metric in _IMPROVEMENT if _finite(rows.loc[rows["metric"] == metric, "estimate"]).any()]
    model, methods = _model(contrasts), _methods(rows[rows["metric"].isin(metrics)])
    if not metrics:
        return _placeholder(title, model, "There is no comparison of agency with the baseline to draw.", layout)
    caption = (
        f"{_n_words([(_label(metric), rows[rows['metric'] == metric]) for metric in metrics])} Above the zero line "
        "agency is better, below it worse; a bar that crosses the line does not tell."
    )
    columns = min(layout.columns, len(metrics))
    count = math.ceil(len(metrics) / columns)
    looks = _method_looks(methods)
    subtitle = f"{model} · {_method_words(methods)}"
    height_in = (2.6 if layout.columns > 1 else _NARROW_PANEL_IN) * count
    shown = looks if len(methods) > 1 else {}
    figure = _new_figure(title, subtitle, caption, height_in, shown, [], layout=layout)
    grid = figure.subplots(count, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        at = _main_temperature(rows[rows["metric"] == metric])
        axes.set_title(_panel_title(layout, metric, None, at))
        _draw_improvement(axes, rows, metric, methods, looks, layout)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    _level_words(list(grid[: len(metrics)]), columns, layout)
    return figure


def _method_looks(methods: Sequence[str]) -> dict[str, Look]:
    if len(methods) == 1:
        return {methods[0]: VARIANT_LOOKS["agency"]}
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, len(methods)))
    return {
        method: Look(matplotlib.colors.to_hex(shade), _METHOD_MARKERS[index % 6], _METHOD_LINES[index % 6])
        for index, (method, shade) in enumerate(zip(methods, shades, strict=True))
    }


def _draw_improvement(
    axes: Axes, rows: pd.DataFrame, metric: str, methods: Sequence[str], looks: Mapping[str, Look], layout: Layout
) -> None:
    chosen = rows[rows["metric"] == metric]
    levels = sorted(float(level) for level in chosen["level"].dropna().unique())
    lower_is_better = (chosen["better"] == "lower").any()
    extent = 0.0
    points: list[float] = [0.0]
    for index, method in enumerate(methods):
        values = _line(_at(rows, metric, method), levels, 1.0)
        if lower_is_better:
            values = -values[[0, 2, 1]]
        shift = _spread(index, len(methods), levels)
        _draw_line(axes, [level + shift for level in levels], values, looks[method], method)
        extent = max(extent, float(np.nanmax(np.abs(values[0]), initial=0.0)))
        points.extend(values[0][np.isfinite(values[0])])
    relative = (chosen["unit"] == "%").any()
    _level_axis(axes, levels)
    if relative and extent > 1000:
        axes.set_yscale("symlog", linthresh=100)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    low, high = axes.get_ylim()
    least = 2.0 if relative else 0.02
    reach = 2 * _REACH * max(float(np.ptp(points)), least)
    low, high = max(low, min(points) - reach), min(high, max(points) + reach)
    axes.set_ylim(min(low, -least, -0.2 * high), max(high, least, -0.2 * low))
    axes.yaxis.set_major_formatter(FuncFormatter(_signed_tick))
    axes.axhline(0.0, color=_INK, linewidth=1.1, zorder=1.5)
    axes.axhspan(0.0, axes.get_ylim()[1], color="#0072B2", alpha=0.05, linewidth=0, zorder=0)
    _value_words(axes, f"{'Change, %' if relative else 'Difference'}\n(positive = agency better)", layout)


def _signed_tick(value: float, _position: object = None) -> str:
    return f"+{_tick(value)}" if value > 0 else _tick(value)


@_in_style
def comprehensive_summary(summary: pd.DataFrame, *, method: str | None = None, layout: Layout = WIDE) -> Figure:
    """Every metric of one method on one page, a panel each, at the temperature nearest to 1.

    ``method`` may be left out where the table holds one method only.
    """
    methods = _methods(summary)
    title = "All measurements on one page"
    if not methods:
        return _placeholder(title, _model(summary), "Nothing was measured.", layout)
    if method is None and len(methods) > 1:
        raise InputError(f"the page shows one method, but the table holds {methods}. Pass method=")
    if method is not None and method not in methods:
        raise InputError(f"no method {method!r} in the table. It holds {methods}")
    chosen = summary[summary["method"] == (method or methods[0])]
    known = [metric for metric in METRICS if metric in set(chosen["metric"])]
    present = known + sorted(str(metric) for metric in set(chosen["metric"].dropna()) - set(METRICS))
    metrics = [metric for metric in present if _finite(chosen.loc[chosen["metric"] == metric, "estimate"]).any()]
    subtitle = f"{_model(summary)} · {_method_words([method or methods[0]])}"
    if not metrics:
        return _placeholder(title, subtitle, "Nothing was measured.", layout)
    variants = _variants(chosen)
    caption = _n_words([(_label(metric), chosen[chosen["metric"] == metric]) for metric in metrics])
    without = [_label(metric) for metric in present if metric not in metrics]
    if without:
        caption += f" No figures for: {', '.join(without)}."
    columns = min(layout.columns, len(metrics))
    count = math.ceil(len(metrics) / columns)
    height_in = 0.3 + 1.9 * count if layout.columns > 1 else _NARROW_PANEL_IN * count
    figure = _new_figure(title, subtitle, caption, height_in, _looks(variants), [], layout=layout)
    grid = figure.subplots(count, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        at = _main_temperature(chosen[chosen["metric"] == metric])
        rows = _at(chosen, metric, method or methods[0], at)
        unit = _draw_variants(axes, rows, metric, variants)
        if not _finite(rows["estimate"]).any():
            continue
        factor, _ = _scale(metric, [float(value) for value in rows["estimate"].dropna()])
        _value_axis(axes, rows, metric, factor)
        axes.set_title(_panel_title(layout, metric, None, at), fontsize=8.5)
        _value_words(axes, _axis_words(metric, unit), layout, 8)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    _level_words(list(grid[: len(metrics)]), columns, layout)
    return figure


# The radar and its dot chart


@dataclass(frozen=True)
class _Score:
    """Agency's value where the baseline's is 1 and more is better, with its interval and the two raw values."""

    metric: str
    value: float
    low: float
    high: float
    baseline: float
    agency: float


def _score(metric: str, contrast: pd.Series[Any], baseline: float, agency: float) -> _Score:
    ends = [float(contrast[key]) for key in ("estimate", "ci_low", "ci_high")]
    if contrast["unit"] == "%":
        ratios = [1.0 + end / 100.0 for end in ends]
    else:
        ratios = [_ratio(baseline + end, baseline) for end in ends]
    if contrast["better"] == "lower":
        value, high, low = (_ratio(1.0, ratio) for ratio in ratios)
    else:
        value, low, high = ratios
    return _Score(metric, value, low, high, baseline, agency)


def _ratio(top: float, bottom: float) -> float:
    if math.isnan(top) or math.isnan(bottom):
        return math.nan
    if bottom <= 0:
        return 1.0 if top <= 0 else math.inf
    return max(0.0, top / bottom)


def _scores(summary: pd.DataFrame, contrasts: pd.DataFrame, method: str) -> tuple[float, list[_Score]]:
    """The highest level at which agency and baseline were compared, and the scores there."""
    rows = contrasts[
        (contrasts["contrast"] == AGENCY_VS_BASELINE)
        & (contrasts["method"] == method)
        & contrasts["better"].isin(("higher", "lower"))
        & contrasts["metric"].isin(_RADAR)
        & _finite(contrasts["estimate"])
    ]
    if rows.empty:
        return math.nan, []
    level = float(rows["level"].max())
    rows = rows[rows["level"] == level]
    scores = []
    for metric in _RADAR:
        found = _at(rows, metric, method)
        if found.empty:
            continue
        raw = _at(summary, metric, method, _main_temperature(found))
        raw = raw[raw["level"] == level]
        by_variant = raw.drop_duplicates("variant").set_index("variant")["estimate"]
        baseline, agency = (float(by_variant.get(variant, math.nan)) for variant in ("baseline", "agency"))
        score = _score(metric, found.iloc[0], baseline, agency)
        if not math.isnan(score.value):
            scores.append(score)
    return level, scores


@_in_style
def radar(summary: pd.DataFrame, contrasts: pd.DataFrame, *, layout: Layout = WIDE) -> Figure:
    """Agency relative to the baseline at the highest level, as a radar and as a sorted dot chart, one row per method.

    Outward is better on every spoke: lower-is-better metrics show baseline / agency. The scale doubles from ring to
    ring and the baseline is the 100 % ring. For distances, whose contrast is a difference, the difference and its
    interval are put over the baseline's value.
    """
    title = "Agency relative to the baseline at the highest level"
    model = _model(summary, contrasts)
    scored = {method: _scores(summary, contrasts, method) for method in _methods(summary)}
    scored = {method: found for method, found in scored.items() if found[1]}
    if not scored:
        return _placeholder(title, model, "There is no comparison of agency with the baseline to draw.", layout)
    limit = _doublings([score for _, scores in scored.values() for score in scores])
    parts = [(_label(m), contrasts[(contrasts["metric"] == m) & contrasts["method"].isin(scored)]) for m in _RADAR]
    caption = (
        f"{_n_words([part for part in parts if not part[1].empty])} Outward and to the right is better for agency: "
        "lower-is-better quantities are shown as baseline / agency. The 100 % ring is the baseline; the scale doubles "
        "from ring to ring. Spoke labels: baseline → agency."
    )
    if any(not 2.0**-limit <= score.value <= 2.0**limit for _, scores in scored.values() for score in scores):
        caption += " A triangle points at what lies beyond the scale."
    subtitle = f"{model} · {_method_words(list(scored))}"
    ring = Line2D([], [], color=VARIANT_LOOKS["baseline"].colour, lw=1.6, label="baseline = 100 %")
    beside = layout.columns > 1
    height_in = (4.1 if beside else 6.6) * len(scored)
    figure = _new_figure(
        title, subtitle, caption, height_in, _looks(["agency"]), [ring], row_gap=0.06 if beside else 0.02, layout=layout
    )
    grid = (
        figure.add_gridspec(len(scored), 2, width_ratios=(1.35, 1.0))
        if beside
        else figure.add_gridspec(2 * len(scored), 1, height_ratios=(1.2, 1.0) * len(scored))
    )
    for index, (method, (level, scores)) in enumerate(scored.items()):
        # Each in a grid of its own where they are stacked: the room that the spokes' labels take is not the dots' to lose.
        first, second = (
            (grid[index, 0], grid[index, 1]) if beside else (grid[2 * index + at].subgridspec(1, 1)[0] for at in (0, 1))
        )
        head = f"{_words(method)}, {level:g} % of heads pruned"
        if len(scores) >= 3:
            _draw_radar(figure.add_subplot(first, projection="polar"), scores, limit, head)
        else:
            _say_nothing_to_draw(figure.add_subplot(first), "a radar needs three quantities")
        _draw_dots(figure.add_subplot(second), scores, limit, head)
    return figure


def _doublings(scores: Sequence[_Score]) -> int:
    """How many doublings the scale reaches to each side: enough for what is drawn, but at most a factor of 16."""
    values = [value for score in scores for value in (score.value, score.low, score.high) if 0 < value < math.inf]
    widest = max((abs(math.log2(value)) for value in values), default=1.0)
    return max(1, min(_RADAR_LIMIT_DOUBLINGS, math.ceil(widest)))


def _position(value: float, limit: int) -> float:
    """Where a ratio lies on the doubling scale, cut at its ends."""
    if math.isnan(value):
        return math.nan
    if value <= 0:
        return float(-limit)
    return float(min(limit, max(-limit, math.log2(value) if value < math.inf else limit)))


def _ring_words(doubling: float, _position: object = None) -> str:
    return f"{100 * 2.0**doubling:g} %"


def _raw_words(score: _Score) -> str:
    factor, unit = _scale(score.metric, [score.baseline, score.agency])
    return f"{_number(score.baseline * factor)} → {_number(score.agency * factor)} {unit}".rstrip()


_SPOKES = {
    "perplexity": "Perplexity",
    "tokens_per_second": "Tokens per\nsecond",
    "first_token_latency_s": "First-token\nlatency",
    "peak_memory_bytes": "Peak\nmemory",
    "distinct_2_distance": "Distinct-2\ndistance",
    "seq_rep_4_distance": "Seq-rep-4\ndistance",
    "generation_perplexity_distance": "Log gen. perpl.\ndistance",
}


def _draw_radar(axes: Any, scores: Sequence[_Score], limit: int, head: str) -> None:
    look = VARIANT_LOOKS["agency"]
    hub = -limit - 0.45
    angles = [2 * math.pi * index / len(scores) for index in range(len(scores))]
    at = [_position(score.value, limit) for score in scores]
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(hub, limit + 0.15)
    axes.spines["polar"].set_visible(False)
    circle = np.linspace(0, 2 * math.pi, 200)
    axes.plot(circle, np.zeros(200), color=VARIANT_LOOKS["baseline"].colour, linewidth=1.6, zorder=2)
    axes.plot([*angles, angles[0]], [*at, at[0]], color=look.colour, marker=look.marker, markersize=5, zorder=4)
    axes.fill(angles, at, color=look.colour, alpha=0.12, zorder=1)
    for angle, score, radius in zip(angles, scores, at, strict=True):
        low, high = _position(score.low, limit), _position(score.high, limit)
        if not math.isnan(low + high):
            axes.plot([angle, angle], [low, high], color=look.colour, linewidth=1.1, zorder=3)
            for end in (low, high):
                half = 0.11 * limit / max(end - hub, 0.2)
                axes.plot([angle - half, angle + half], [end, end], color=look.colour, linewidth=1.1, zorder=3)
        if score.value > 2.0**limit or score.value < 2.0**-limit:
            beyond = "^" if score.value > 1 else "v"
            axes.plot([angle], [radius], marker=beyond, markersize=9, color=look.colour, zorder=5)
    rings = list(range(-limit, limit + 1))
    axes.set_yticks(rings)
    shown = [_ring_words(ring) if limit <= 2 or ring % 2 == 0 else "" for ring in rings]
    axes.set_yticklabels(shown, fontsize=7.5, color=_MUTED)
    axes.set_rlabel_position(math.degrees(math.pi / len(scores)))
    axes.set_xticks(angles)
    labels = axes.set_xticklabels([f"{_SPOKES[score.metric]}\n{_raw_words(score)}" for score in scores], fontsize=8)
    for label, angle in zip(labels, angles, strict=True):
        across, up = math.sin(angle), math.cos(angle)
        label.set_horizontalalignment("center" if abs(across) < 0.1 else "left" if across > 0 else "right")
        label.set_verticalalignment("bottom" if up > 0.7 else "top" if up < -0.7 else "center")
    axes.tick_params(axis="x", pad=1)
    axes.set_title("\n".join(_wrapped(head, 230, 9, "bold")), pad=14)


def _draw_dots(axes: Axes, scores: Sequence[_Score], limit: int, head: str) -> None:
    look = VARIANT_LOOKS["agency"]
    ranked = sorted(scores, key=lambda score: score.value)
    for height, score in enumerate(ranked):
        at = _position(score.value, limit)
        low, high = _position(score.low, limit), _position(score.high, limit)
        if not math.isnan(low + high):
            axes.plot([low, high], [height, height], color=look.colour, linewidth=1.4, zorder=2)
            axes.plot([low, high], [height, height], color=look.colour, linestyle="none", marker="|", markersize=7)
        beyond = ">" if score.value > 2.0**limit else "<" if score.value < 2.0**-limit else look.marker
        size = 6 if beyond == look.marker else 9
        axes.plot([at], [height], marker=beyond, markersize=size, color=look.colour, zorder=3)
        axes.annotate(
            f"{_number(100 * score.value)} %", (at, height), xytext=(0, 6), textcoords="offset points", ha="center",
            fontsize=8, bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}, zorder=2.5,
        )  # fmt: skip
    axes.axvline(0.0, color=VARIANT_LOOKS["baseline"].colour, linewidth=1.6, zorder=1)
    axes.set_xlim(-limit - 0.25, limit + 0.25)
    axes.set_ylim(-0.6, len(ranked) - 0.25)
    rings = list(range(-limit, limit + 1))
    axes.xaxis.set_major_locator(FixedLocator([ring for ring in rings if limit <= 2 or ring % 2 == 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(_ring_words))
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(ranked)))))
    axes.set_yticklabels([_SPOKES[score.metric] for score in ranked])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("baseline = 100 % (right: agency better)")
    axes.set_title("The same numbers, sorted")


# All of them, and saving


def draw_all(summary: pd.DataFrame, contrasts: pd.DataFrame, *, layout: Layout = WIDE) -> dict[str, Figure]:
    """Every chart by its name, in reading order; several methods give a ``comprehensive_summary_<method>`` each."""
    methods = _methods(summary)
    pages = (
        {
            f"comprehensive_summary_{method}": comprehensive_summary(summary, method=method, layout=layout)
            for method in methods
        }
        if len(methods) > 1
        else {"comprehensive_summary": comprehensive_summary(summary, layout=layout)}
    )
    return {
        "speed_comparison": speed_comparison(summary, layout=layout),
        "quality_metrics": quality_metrics(summary, layout=layout),
        "relative_improvement": relative_improvement(contrasts, layout=layout),
        "radar": radar(summary, contrasts, layout=layout),
        "temperature": temperature(summary, layout=layout),
        **pages,
    }


def to_png(figure: Figure, *, dpi: float = 150) -> bytes:
    """The figure as the bytes of a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save_charts(figures: Mapping[str, Figure], folder: Path, *, svg: bool = True) -> dict[str, bytes]:
    """Write each figure as ``<name>.png`` (150 dots per inch) and, with ``svg``, ``<name>.svg``; same figures, same bytes.

    The PNGs come back by the figures' names.
    """
    stems = {name: re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".") or "chart" for name in figures}
    if len(set(stems.values())) < len(stems):
        raise InputError(f"two charts would have the same file name: {sorted(stems.values())}. Rename one")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: to_png(figure) for name, figure in figures.items()}
    for name, figure in figures.items():
        (folder / f"{stems[name]}.png").write_bytes(pictures[name])
        if svg:
            with _style():
                figure.savefig(folder / f"{stems[name]}.svg", format="svg", metadata={"Date": None, "Creator": None})
    return pictures
