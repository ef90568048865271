"""One look for every chart: sizes, colours, fonts, words and numbers on the page."""

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextToPath

from pruning_comparison.errors import InputError
from pruning_comparison.metrics import metric_named
from pruning_comparison.variants import VARIANTS, Look, reported_variant

_FONT = "DejaVu Sans"


_RULER = TextToPath()


INK = "#222222"


MUTED = "#666666"


SQUARES = {"handlelength": 1.1, "handleheight": 1.0, "columnspacing": 1.3, "fontsize": 8.5}


@dataclass(frozen=True)
class FigureSize:
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


WIDE = FigureSize(width_in=8.5, columns=3, title_pt=172, smallest_pt=5)


NARROW = FigureSize(width_in=4.0, columns=1, title_pt=225, smallest_pt=7)
"""400 pixels at 100 to the inch: 7 points, the smallest text, are then 10 pixels high."""


_METHOD_MARKERS = ("s", "o", "^", "D", "v", "P")


_METHOD_LINES: tuple[Any, ...] = ("-", (0, (4, 1.6)), "-.", ":", (0, (6, 1.5, 1, 1.5)), "-")


_P = ParamSpec("_P")


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": _FONT,
                "font.size": 9,
                "text.parse_math": False,
                "text.color": INK,
                "axes.titlesize": 9,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                # No ticks stand above: to look for them at every drawing takes longer than the lines do.
                "axes.titley": 1.0,
                "axes.labelsize": 8.5,
                "axes.labelcolor": INK,
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


def in_style(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with _style():
            figure = draw(*args, **kwargs)
            # Places are found once, not again for each file that is written of the figure.
            engine = figure.get_layout_engine()
            if engine is not None:
                engine.execute(figure)
            figure.set_layout_engine("none")
        return figure

    return styled


@cache
def _drawable_characters() -> frozenset[int]:
    regular, bold = (get_font(findfont(FontProperties(family=_FONT, weight=weight))) for weight in ("normal", "bold"))
    return frozenset(regular.get_charmap()) & frozenset(bold.get_charmap())


def drawable(name: object) -> str:
    """A name as the font can draw it: a box for each character it lacks, so that no name can make matplotlib warn."""
    known = _drawable_characters()
    return "".join(
        " " if character.isspace() else character if ord(character) in known else "\N{WHITE SQUARE}"
        for character in str(name)
    )


def wrapped(text: str, width_pt: float, size: float, weight: str = "normal") -> list[str]:
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


def metric_label(metric: str) -> str:
    return drawable(metric_named(metric).short_label)


def tick(value: float, position: object = None) -> str:
    whole = 1e3 <= abs(value) < 1e7 and value == round(value)
    text = f"{value:,.0f}" if whole else f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def unit_scale(metric: str, values: Sequence[float]) -> tuple[float, str]:
    """What to multiply by and the unit to write, so that bytes and seconds come out as readable numbers."""
    unit = metric_named(metric).unit
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


def format_axis(metric: str, unit: str) -> str:
    wish = {"higher": "higher is better", "lower": "lower is better", "none": ""}[metric_named(metric).direction]
    return f"{unit} ({wish})" if unit and wish else wish or unit


def format_n(parts: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """How many observations stand behind the points, metric by metric, and what that means for the bars."""
    told = []
    largest = 0
    for label, rows in parts:
        counts = sorted({int(count) for count in rows.loc[finite(rows["estimate"]), "n"] if _is_number(count)})
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


def finite(column: pd.Series[Any]) -> pd.Series[bool]:
    return pd.Series(np.isfinite(pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)), index=column.index)


def looks_of(variants: Sequence[str]) -> dict[str, Look]:
    return {name: reported_variant(name).look for name in variants}


def format_methods(methods: Sequence[str]) -> str:
    names = ", ".join(drawable(method) for method in methods)
    return f"pruning method: {names}" if len(methods) == 1 else f"pruning methods: {names}"


def method_looks(methods: Sequence[str]) -> dict[str, Look]:
    if len(methods) == 1:
        return {methods[0]: VARIANTS["agency"].look}
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, len(methods)))
    return {
        method: Look(matplotlib.colors.to_hex(shade), _METHOD_MARKERS[index % 6], _METHOD_LINES[index % 6])
        for index, (method, shade) in enumerate(zip(methods, shades, strict=True))
    }


def to_png(figure: Figure, *, dpi: float = 150) -> bytes:
    """The figure as the bytes of a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _style(), _at_resolution(figure, dpi):
        canvas: Any = FigureCanvasAgg(figure)  # whose methods have no types
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG document; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _style(), _at_resolution(figure, 72):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@contextmanager
def _at_resolution(figure: Figure, dpi: float) -> Iterator[None]:
    """The figure at so many dots per inch, for the canvases: ``savefig`` would draw it twice, once for a layout it has."""
    before = figure.dpi
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.dpi = before


def stems_of(names: Sequence[str]) -> dict[str, str]:
    """The name of each chart's files, without ending. InputError where two charts would have the same."""
    stems = {name: re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".") or "chart" for name in names}
    if len(set(stems.values())) < len(stems):
        raise InputError(f"two charts would have the same file name: {sorted(stems.values())}. Rename one")
    return stems


def save_charts(figures: Mapping[str, Figure], folder: Path, *, svg: bool = True) -> dict[str, bytes]:
    """Write each figure as ``<name>.png`` (150 dots per inch) and, with ``svg``, ``<name>.svg``; same figures, same bytes.

    The PNGs come back by the figures' names.
    """
    stems = stems_of(list(figures))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: to_png(figure) for name, figure in figures.items()}
    for name, figure in figures.items():
        (folder / f"{stems[name]}.png").write_bytes(pictures[name])
        if svg:
            (folder / f"{stems[name]}.svg").write_bytes(to_svg(figure))
    return pictures
