"""Maps of heads, layer by head: scores and signals, who leaves at which level, who refused, and how far choices agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pruning_comparison.analysis import Array, HeadMap, RoundMap
from pruning_comparison.formatting import label_number
from pruning_comparison.report.charts.panels import new_figure, placeholder, wrapped_title
from pruning_comparison.report.charts.style import WIDE, FigureSize, drawable, in_style
from pruning_comparison.variants import variant_order

__all__ = ["draw_head_charts", "head_agreement", "head_departures", "head_negotiation", "head_values"]

_STAYS = "#f2f2f2"
_MOST_PANELS = 24
_SHADES = 48
_WHITE_INK = "#fefefe"  # Not the white of the paper, which turns dark where the page does.
_HEADS_OF_HALF_A_COLUMN = 12
_LABELS = {
    "score": "Score (high = stays)",
    "utilisation": "Utilisation",
    "contribution": "Contribution",
    "alignment": "Alignment",
    "redundancy": "Redundancy",
    "importance": "Importance (Fisher)",
    "withdrawal_cost": "Withdrawal cost, nats/token",
}
# Lightness alone tells these apart; letters on the cells repeat it.
_ROUND_WORDS = {
    "active": ("#dfe9f2", "", "active, not asked"),
    "overloaded": ("#e3c16f", "o", "overloaded, not asked"),
    "misaligned": ("#c9a3c7", "m", "misaligned, not asked"),
    "refused": ("#6f9fc8", "r", "refused"),
    "consented": ("#0b5c8f", "c", "consented, leaves"),
    "overridden": ("#b3430e", "x", "overridden, leaves"),
    "withdrawn": ("#ffffff", "", "left earlier"),
}


def head_chart_jobs(
    model: str,
    maps: Sequence[HeadMap],
    rounds: Sequence[RoundMap],
    agreed: pd.DataFrame,
    *,
    size: FigureSize = WIDE,
) -> dict[str, Callable[[], Figure]]:
    """What draws each map, by its name, in reading order; nothing where no head was recorded."""
    if not maps:
        return {}
    jobs: dict[str, Callable[[], Figure]] = {
        "head_departures": partial(head_departures, model, maps, size=size),
        "head_values": partial(head_values, model, maps, size=size),
    }
    if rounds:
        jobs["head_negotiation"] = partial(head_negotiation, model, rounds, size=size)
    if len(agreed):
        jobs["head_agreement"] = partial(head_agreement, model, agreed, size=size)
    return jobs


def draw_head_charts(
    model: str,
    maps: Sequence[HeadMap],
    rounds: Sequence[RoundMap],
    agreed: pd.DataFrame,
    *,
    size: FigureSize = WIDE,
) -> dict[str, Figure]:
    """Every map by its name, in reading order; none where no head was recorded."""
    return {name: draw() for name, draw in head_chart_jobs(model, maps, rounds, agreed, size=size).items()}


@in_style
def head_departures(model: str, maps: Sequence[HeadMap], *, size: FigureSize = WIDE) -> Figure:
    """At which level each head leaves, a map per variant, a row of maps per method; refusals and overrides are marked."""
    title = "Which heads leave at which level"
    maps, left_out = maps[:_MOST_PANELS], max(0, len(maps) - _MOST_PANELS)
    levels = sorted({level for one in maps for level in one.levels if level > 0})
    if not levels:
        return placeholder(title, drawable(model), "No level above 0 was measured.", size)
    several = max(len(one.by_iteration) for one in maps)
    caption = (
        "Each square is a head. Its colour is the lowest level measured at which it has gone"
        + (f", the median of {several} iterations" if several > 1 else "")
        + "; grey heads stay."
    )
    if any(one.asked for one in maps):
        caption += " A dot: the head refused at least once. A cross: it was overridden at least once."
    if left_out:
        caption += f" {left_out} more maps are in heads.csv."
    columns = _columns(min(3, len({one.variant for one in maps})), maps[0].gone_at.shape[1], size)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, len(levels)))
    handles = [Patch(facecolor=shade, edgecolor="#888888", label=f"{level:g} %")
               for shade, level in zip(shades, levels, strict=True)]  # fmt: skip
    handles.append(Patch(facecolor=_STAYS, edgecolor="#888888", label="stays"))
    grid, figure, height = _map_grid(
        title, f"{drawable(model)}", caption, maps[0].gone_at.shape, len(maps), columns, handles, size
    )
    colours = ListedColormap(shades)
    norm = BoundaryNorm([*(np.array(levels) - 1e-6), levels[-1] + 1], len(levels))
    for axes, one in zip(grid, maps, strict=False):
        values = np.where(np.isfinite(one.gone_at), one.gone_at, np.nan)
        _draw_map(axes, values, colours, norm)
        axes.set_title(_map_title(size, columns, one.method, one.variant))
        points = _mark_size(height, one.gone_at.shape)
        for grid_of, marker, scale in ((one.refused, "o", 0.5), (one.overridden, "x", 1.0)):
            layer, head = np.nonzero(grid_of)
            dark = [_contrast(colours(norm(values[at]))) if np.isfinite(values[at]) else "#333333" for at in
                    zip(layer, head, strict=True)]  # fmt: skip
            axes.scatter(head, layer, marker=marker, s=(points * scale) ** 2, c=dark or None, linewidths=1.0, zorder=3)
    return figure


@in_style
def head_values(model: str, maps: Sequence[HeadMap], *, size: FigureSize = WIDE) -> Figure:
    """The dense model's scores by every method, and its signals, a map each."""
    panels: list[tuple[str, str, Array]] = []
    seen: set[tuple[str, str]] = set()
    for one in maps:
        for name, values in one.values.items():
            key = (one.method, name) if name == "score" else ("", name)
            if key not in seen and np.isfinite(values).any():
                seen.add(key)
                panels.append((one.method if name == "score" else "", name, values))
    panels.sort(key=lambda panel: panel[1] != "score")
    title = "Scores and signals of the dense model's heads"
    if not panels:
        return placeholder(title, drawable(model), "No scores were recorded.", size)
    caption = (
        "Means over iterations, on calibration text. Dark is low and light is high; alignment is white at 0. Scales that "
        "span more than two decades are logarithmic."
    )
    columns = min(size.columns, len(panels))
    grid, figure, _ = _map_grid(title, drawable(model), caption, panels[0][2].shape, len(panels), columns, [], size)
    for axes, (method, name, values) in zip(grid, panels, strict=False):
        norm, colours = _value_scale(name, values)
        picture = _draw_map(axes, values, matplotlib.colormaps[colours].resampled(_SHADES), norm)
        axes.set_title(_map_title(size, columns, method or None, _LABELS.get(name, drawable(name))))
        bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02, aspect=18)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5, length=2)
        if not isinstance(norm, LogNorm):
            bar.ax.yaxis.set_major_locator(MaxNLocator(4))
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label_number(value)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


@in_style
def head_negotiation(model: str, rounds: Sequence[RoundMap], *, size: FigureSize = WIDE) -> Figure:
    """What every head was, and answered, in every round of one trajectory: agency's, by the first method."""
    first = next((one for one in rounds if one.variant == "agency"), rounds[0])
    ours = [one for one in rounds if (one.variant, one.method) == (first.variant, first.method)][:_MOST_PANELS]
    caption = (
        f"{drawable(first.variant)}, method {drawable(first.method)}, iteration {first.iteration + 1}. Each map is a "
        "round; a square is a head, with its answer where it was asked, else its state. Letters repeat the colours: "
        "c consented, r refused, x overridden, o overloaded, m misaligned."
    )
    shape = (len(first.words), len(first.words[0]))
    columns = _columns(min(4, len(ours)), shape[1], size)
    told = {word for one in ours for row in one.words for word in row}
    handles = [Patch(facecolor=colour, edgecolor="#888888", label=label)
               for name, (colour, _, label) in _ROUND_WORDS.items() if name in told]  # fmt: skip
    grid, figure, height = _map_grid(
        "The negotiation, round by round", drawable(model), caption, shape, len(ours), columns, handles, size
    )
    names = list(_ROUND_WORDS)
    colours = ListedColormap([_ROUND_WORDS[name][0] for name in names])
    for axes, one in zip(grid, ours, strict=False):
        codes = np.array([[names.index(word) if word in names else np.nan for word in row] for row in one.words], float)
        _draw_map(axes, codes, colours, BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names)))
        axes.set_title(_map_title(size, columns, None, f"to {one.level:g} %"))
        points = 1.4 * _mark_size(height, shape)
        if points >= size.smallest_pt:
            for layer, row in enumerate(one.words):
                for head, word in enumerate(row):
                    letter = _ROUND_WORDS.get(word, ("", "", ""))[1]
                    if letter:
                        ink = _contrast(matplotlib.colors.to_rgba(_ROUND_WORDS[word][0]))
                        axes.text(head, layer, letter, ha="center", va="center", fontsize=min(8, points), color=ink)
    return figure


@in_style
def head_agreement(model: str, agreed: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Share of lost heads that two choices have in common, at the level nearest to 50 %, and scores' rank correlation."""
    title = "How far choices of heads agree"
    if agreed.empty:
        return placeholder(title, drawable(model), "There is nothing to compare.", size)
    level = min((float(value) for value in agreed["level"].unique()), key=lambda value: (abs(value - 50), value))
    rows = agreed[agreed["level"] == level]
    records = rows.to_dict("records")
    found = {(str(row["variant"]), str(row["method"])) for row in records}
    found |= {(str(row["other_variant"]), str(row["other_method"])) for row in records}
    names = sorted(found, key=lambda name: (name[1], variant_order(name[0])))
    common, correlation = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    for row in records:
        one = names.index((row["variant"], row["method"]))
        two = names.index((row["other_variant"], row["other_method"]))
        common[one, two] = common[two, one] = row["common"]
        correlation[one, two] = correlation[two, one] = row["score_correlation"]
    chance = float(rows["chance"].mean())
    beside = size.columns > 1
    caption = (
        f"In common: share of the heads gone at {level:g} % in one choice that are gone in the other too; two random "
        f"choices would have {100 * chance:.0f} % in common. Correlation: rank correlation of the two scores of the dense "
        "model. On the diagonal: between iterations of one choice. Off it: the same iteration. Empty: not comparable."
    )
    labels = [f"{drawable(variant)}, {drawable(method)}" for variant, method in names]
    points = max(size.smallest_pt, 5.5, 8.5 - 0.12 * len(names))
    longest = max(map(len, labels)) - 2
    side = max(1.7, min(4.0, 0.34 * len(names) + 0.9))
    wide, high = side, side + 0.055 * longest
    if not beside:
        labels = [f"{label}  {number}" for number, label in enumerate(labels, start=1)]
        wide = min(side, size.width_in - 0.0085 * points * longest - 0.7)
        high = max(wide, 0.02 * points * len(names))
    subtitle = f"{drawable(model)} · {level:g} % of heads pruned"
    figure = new_figure(title, subtitle, caption, (high + 0.5) * (1 if beside else 2), {}, [], size=size)
    for index, (axes, values, heading, norm, colours) in enumerate(
        zip(
            figure.subplots(1, 2) if beside else figure.subplots(2, 1),
            (common, correlation),
            ("Heads gone in common", "Rank correlation of scores"),
            (Normalize(0, 1), TwoSlopeNorm(0, -1, 1)),
            ("cividis", "RdBu"),
            strict=True,
        )
    ):
        shades = matplotlib.colormaps[colours]
        edges = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, edges, np.ma.masked_invalid(values), cmap=shades, norm=norm)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_aspect("equal" if beside or high == wide else "auto")
        axes.set_title(heading)
        axes.grid(visible=False)
        axes.set_yticks(range(len(names)), labels if index == 0 or not beside else [""] * len(names))
        if beside:
            axes.set_xticks(range(len(names)), labels, rotation=90)
        else:
            shown = range(0, len(names), math.ceil(0.02 * points * len(names) / wide))
            axes.set_xticks(shown, [str(at + 1) for at in shown])
        axes.tick_params(length=0, labelsize=points)
        told = len(names) <= 14 if beside else wide / len(names) >= 0.3
        for one, two in np.argwhere(np.isfinite(values)) if told else ():
            value = values[one, two]
            text = f"{100 * value:.0f} %" if index == 0 else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            ink = _contrast(shades(norm(value)))
            axes.text(two, one, text, ha="center", va="center", fontsize=7, color=ink)
    return figure


def _columns(wanted: int, heads: int, size: FigureSize) -> int:
    """How many maps stand side by side; two in a narrow picture, where squares stay large enough for a letter."""
    return wanted if size.columns > 1 else min(wanted, 2 if heads <= _HEADS_OF_HALF_A_COLUMN else 1)


def _map_title(size: FigureSize, columns: int, method: str | None, what: str) -> str:
    return wrapped_title(size.title_pt if size.columns > 1 or columns == 1 else 105, method, what)


def _map_grid(
    title: str,
    subtitle: str,
    caption: str,
    shape: tuple[int, ...],
    count: int,
    columns: int,
    handles: Sequence[Patch],
    size: FigureSize,
) -> tuple[Sequence[Axes], Figure, float]:
    """A figure with a grid of maps, its axes, and the height of a map in inches: squares where there is room for them."""
    rows = math.ceil(count / columns)
    width = (size.width_in - 0.4 * columns) / columns
    most = 4.5 if size.columns > 1 else 3.4
    height = min(most, max(1.1, width * shape[0] / shape[1])) if shape[1] else 1.1
    figure = new_figure(title, subtitle, caption, rows * (height + 0.62), {}, handles, size=size)
    grid = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    for index, axes in enumerate(grid[:count]):
        if index + columns >= count:
            axes.set_xlabel("Head")
        if index % columns == 0:
            axes.set_ylabel("Layer")
    return list(grid), figure, min(height, width * shape[0] / shape[1]) if shape[1] else height


def _draw_map(axes: Axes, values: Array, colours: Any, norm: Normalize) -> Any:
    layers, heads = values.shape
    axes.set_facecolor(_STAYS)
    # Squares of its own rather than a picture: they stay sharp in an SVG at any size.
    across, down = np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5
    lines: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.7} if heads * layers <= 2_500 else {}
    picture = axes.pcolormesh(across, down, np.ma.masked_invalid(values), cmap=colours, norm=norm, **lines)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(which="both", length=0)
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_major_locator(FixedLocator(list(range(0, count, max(1, math.ceil(count / 9))))))
    for side in axes.spines.values():
        side.set_visible(False)
    return picture


def _value_scale(name: str, values: Array) -> tuple[Normalize, str]:
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if name == "alignment":
        reach = max(abs(low), abs(high)) or 1.0
        return TwoSlopeNorm(0.0, -reach, reach), "RdBu"
    if low > 0 and high > 100 * low:
        return LogNorm(low, high), "viridis"
    return Normalize(low, high if high > low else low + 1.0), "viridis"


def _mark_size(height_in: float, shape: tuple[int, ...]) -> float:
    """How large a mark on a square may be, in points."""
    return max(1.5, min(8.0, 0.5 * 72 * height_in / max(shape)))


def _contrast(colour: Sequence[float]) -> str:
    """Black or white ink, whichever is read better on a colour."""
    red, green, blue = (float(part) for part in colour[:3])
    return _WHITE_INK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.3 else "#111111"
