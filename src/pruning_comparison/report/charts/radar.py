"""Agency relative to the baseline at the highest level: the radar and its dot chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from pruning_comparison.formatting import label_number
from pruning_comparison.metrics import in_role, metric_named
from pruning_comparison.report.charts.panels import (
    main_temperature,
    methods_in,
    model_of,
    new_figure,
    placeholder,
    rows_at,
    say_nothing_to_draw,
)
from pruning_comparison.report.charts.style import (
    MUTED,
    WIDE,
    FigureSize,
    drawable,
    finite,
    format_methods,
    format_n,
    in_style,
    looks_of,
    metric_label,
    unit_scale,
    wrapped,
)
from pruning_comparison.variants import AGENCY_VS_BASELINE, VARIANTS

_RADAR_LIMIT_DOUBLINGS = 4


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
        & contrasts["metric"].isin(in_role("radar"))
        & finite(contrasts["estimate"])
    ]
    if rows.empty:
        return math.nan, []
    level = float(rows["level"].max())
    rows = rows[rows["level"] == level]
    scores = []
    for metric in in_role("radar"):
        found = rows_at(rows, metric, method)
        if found.empty:
            continue
        raw = rows_at(summary, metric, method, main_temperature(found))
        raw = raw[raw["level"] == level]
        by_variant = raw.drop_duplicates("variant").set_index("variant")["estimate"]
        baseline, agency = (float(by_variant.get(variant, math.nan)) for variant in ("baseline", "agency"))
        score = _score(metric, found.iloc[0], baseline, agency)
        if not math.isnan(score.value):
            scores.append(score)
    return level, scores


@in_style
def radar(summary: pd.DataFrame, contrasts: pd.DataFrame, *, size: FigureSize = WIDE) -> Figure:
    """Agency relative to the baseline at the highest level, as a radar and as a sorted dot chart, one row per method.

    Outward is better on every spoke: lower-is-better metrics show baseline / agency. The scale doubles from ring to
    ring and the baseline is the 100 % ring. For distances, whose contrast is a difference, the difference and its
    interval are put over the baseline's value.
    """
    title = "Agency relative to the baseline at the highest level"
    model = model_of(summary, contrasts)
    scored = {method: _scores(summary, contrasts, method) for method in methods_in(summary)}
    scored = {method: found for method, found in scored.items() if found[1]}
    if not scored:
        return placeholder(title, model, "There is no comparison of agency with the baseline to draw.", size)
    limit = _doublings([score for _, scores in scored.values() for score in scores])
    parts = [
        (metric_label(m), contrasts[(contrasts["metric"] == m) & contrasts["method"].isin(scored)])
        for m in in_role("radar")
    ]
    caption = (
        f"{format_n([part for part in parts if not part[1].empty])} Outward and to the right is better for agency: "
        "lower-is-better quantities are shown as baseline / agency. The 100 % ring is the baseline; the scale doubles "
        "from ring to ring. Spoke labels: baseline → agency."
    )
    if any(not 2.0**-limit <= score.value <= 2.0**limit for _, scores in scored.values() for score in scores):
        caption += " A triangle points at what lies beyond the scale."
    subtitle = f"{model} · {format_methods(list(scored))}"
    ring = Line2D([], [], color=VARIANTS["baseline"].look.colour, lw=1.6, label="baseline = 100 %")
    beside = size.columns > 1
    height_in = (4.1 if beside else 6.6) * len(scored)
    figure = new_figure(
        title, subtitle, caption, height_in, looks_of(["agency"]), [ring], row_gap=0.06 if beside else 0.02, size=size
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
        head = f"{drawable(method)}, {level:g} % of heads pruned"
        if len(scores) >= 3:
            _draw_radar(figure.add_subplot(first, projection="polar"), scores, limit, head)
        else:
            say_nothing_to_draw(figure.add_subplot(first), "a radar needs three quantities")
        _draw_dots(figure.add_subplot(second), scores, limit, head)
    return figure


def _doublings(scores: Sequence[_Score]) -> int:
    """How many doublings the scale reaches to each side: enough for what is drawn, but at most a factor of 16."""
    values = [value for score in scores for value in (score.value, score.low, score.high) if 0 < value < math.inf]
    widest = max((abs(math.log2(value)) for value in values), default=1.0)
    return max(1, min(_RADAR_LIMIT_DOUBLINGS, math.ceil(widest)))


def position(value: float, limit: int) -> float:
    """Where a ratio lies on the doubling scale, cut at its ends."""
    if math.isnan(value):
        return math.nan
    if value <= 0:
        return float(-limit)
    return float(min(limit, max(-limit, math.log2(value) if value < math.inf else limit)))


def _format_ring(doubling: float, index: object = None) -> str:
    return f"{100 * 2.0**doubling:g} %"


def _format_raw(score: _Score) -> str:
    factor, unit = unit_scale(score.metric, [score.baseline, score.agency])
    return f"{label_number(score.baseline * factor)} → {label_number(score.agency * factor)} {unit}".rstrip()


def _draw_radar(axes: Any, scores: Sequence[_Score], limit: int, head: str) -> None:
    look = VARIANTS["agency"].look
    hub = -limit - 0.45
    angles = [2 * math.pi * index / len(scores) for index in range(len(scores))]
    at = [position(score.value, limit) for score in scores]
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(hub, limit + 0.15)
    axes.spines["polar"].set_visible(False)
    circle = np.linspace(0, 2 * math.pi, 200)
    axes.plot(circle, np.zeros(200), color=VARIANTS["baseline"].look.colour, linewidth=1.6, zorder=2)
    axes.plot([*angles, angles[0]], [*at, at[0]], color=look.colour, marker=look.marker, markersize=5, zorder=4)
    axes.fill(angles, at, color=look.colour, alpha=0.12, zorder=1)
    for angle, score, radius in zip(angles, scores, at, strict=True):
        low, high = position(score.low, limit), position(score.high, limit)
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
    shown = [_format_ring(ring) if limit <= 2 or ring % 2 == 0 else "" for ring in rings]
    axes.set_yticklabels(shown, fontsize=7.5, color=MUTED)
    axes.set_rlabel_position(math.degrees(math.pi / len(scores)))
    axes.set_xticks(angles)
    labels = axes.set_xticklabels(
        [f"{metric_named(score.metric).spoke}\n{_format_raw(score)}" for score in scores], fontsize=8
    )
    for label, angle in zip(labels, angles, strict=True):
        across, up = math.sin(angle), math.cos(angle)
        label.set_horizontalalignment("center" if abs(across) < 0.1 else "left" if across > 0 else "right")
        label.set_verticalalignment("bottom" if up > 0.7 else "top" if up < -0.7 else "center")
    axes.tick_params(axis="x", pad=1)
    with matplotlib.rc_context({"axes.titley": None}):  # above the label of the first spoke, wherever that ends
        axes.set_title("\n".join(wrapped(head, 230, 9, "bold")), pad=14)


def _draw_dots(axes: Axes, scores: Sequence[_Score], limit: int, head: str) -> None:
    look = VARIANTS["agency"].look
    ranked = sorted(scores, key=lambda score: score.value)
    for height, score in enumerate(ranked):
        at = position(score.value, limit)
        low, high = position(score.low, limit), position(score.high, limit)
        if not math.isnan(low + high):
            axes.plot([low, high], [height, height], color=look.colour, linewidth=1.4, zorder=2)
            axes.plot([low, high], [height, height], color=look.colour, linestyle="none", marker="|", markersize=7)
        beyond = ">" if score.value > 2.0**limit else "<" if score.value < 2.0**-limit else look.marker
        size = 6 if beyond == look.marker else 9
        axes.plot([at], [height], marker=beyond, markersize=size, color=look.colour, zorder=3)
        axes.annotate(
            f"{label_number(100 * score.value)} %", (at, height), xytext=(0, 6), textcoords="offset points", ha="center",
            fontsize=8, bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}, zorder=2.5,
        )  # fmt: skip
    axes.axvline(0.0, color=VARIANTS["baseline"].look.colour, linewidth=1.6, zorder=1)
    axes.set_xlim(-limit - 0.25, limit + 0.25)
    axes.set_ylim(-0.6, len(ranked) - 0.25)
    rings = list(range(-limit, limit + 1))
    axes.xaxis.set_major_locator(FixedLocator([ring for ring in rings if limit <= 2 or ring % 2 == 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(_format_ring))
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(ranked)))))
    axes.set_yticklabels([metric_named(score.metric).spoke for score in ranked])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("baseline = 100 % (right: agency better)")
    axes.set_title("The same numbers, sorted")
