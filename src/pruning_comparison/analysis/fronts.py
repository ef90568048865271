"""What speed and memory cost in perplexity: every variant and level as a point, and which of them no other beats."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from pruning_comparison.variants import DENSE

FRONT_COLUMNS = (
    "model", "method", "variant", "level", "perplexity_ratio", "perplexity_low", "perplexity_high", "speed_ratio",
    "speed_low", "speed_high", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high", "cache_bytes",
    "cache_low", "cache_high", "on_speed_front", "on_cache_front",
)  # fmt: skip


def find_fronts(model: str, summary: pd.DataFrame, relative: pd.DataFrame) -> pd.DataFrame:
    """Perplexity, speed and cache of every variant and level, columns ``FRONT_COLUMNS``, and of the dense model at level 0.

    Perplexity and speed are ratios to the dense model's, with their paired 95 % intervals (``relative_to_dense``); tokens
    per second and the bytes of the key-value cache at 1,000 tokens stand beside them as measured (``summary``). A point is
    on a front when, among all of its method, none is at least as good in both figures and better in one: lower perplexity,
    and more tokens per second or fewer bytes. Points are held against each other by their estimates.
    """
    measured = {
        metric: _by_place(summary[summary["metric"] == metric])
        for metric in ("tokens_per_second", "thousand_token_cache_bytes")
    }
    ratios = {
        metric: _by_place(relative[relative["metric"] == metric]) for metric in ("perplexity", "tokens_per_second")
    }
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(place[0] for place in ratios["perplexity"]):
        points = [place for place in ratios["perplexity"] if place[0] == method and place[2] > 0]
        dense = _dense_place(summary, str(method))
        found = [_point(model, dense, DENSE, (1.0, math.nan, math.nan), (1.0, math.nan, math.nan), measured)]
        nothing = (math.nan,) * 3
        for place in sorted(points, key=lambda place: (place[1], place[2])):
            speed = ratios["tokens_per_second"].get(place, nothing)
            found.append(_point(model, place, str(place[1]), ratios["perplexity"][place], speed, measured))
        for front, gain, better in (("on_speed_front", "speed_ratio", 1), ("on_cache_front", "cache_bytes", -1)):
            places = [(point["perplexity_ratio"], -better * point[gain]) for point in found]
            for point, mine in zip(found, places, strict=True):
                point[front] = _unbeaten(mine, places)
        rows += found
    return pd.DataFrame(rows, columns=list(FRONT_COLUMNS))


Ends = tuple[float, float, float]


def _by_place(rows: pd.DataFrame) -> dict[tuple[str, str, float], Ends]:
    """Estimate, low and high end by (method, variant, level)."""
    return {
        (str(row["method"]), str(row["variant"]), float(row["level"])): (
            float(row["estimate"]), float(row["ci_low"]), float(row["ci_high"]),
        )
        for row in rows.to_dict("records")
    }  # fmt: skip


def _dense_place(summary: pd.DataFrame, method: str) -> tuple[str, str, float]:
    """Where the dense model's own figures stand: at level 0 every variant is the dense model."""
    rows = summary[(summary["method"] == method) & (summary["level"] == 0)]
    variants = [str(name) for name in rows["variant"].dropna().unique()]
    return method, "baseline" if "baseline" in variants or not variants else variants[0], 0.0


def _point(
    model: str,
    place: tuple[str, str, float],
    variant: str,
    perplexity: Ends,
    speed: Ends,
    measured: dict[str, dict[tuple[str, str, float], Ends]],
) -> dict[str, Any]:
    nothing = (math.nan,) * 3
    values = (
        *perplexity,
        *speed,
        *measured["tokens_per_second"].get(place, nothing),
        *measured["thousand_token_cache_bytes"].get(place, nothing),
    )
    return dict(zip(FRONT_COLUMNS, (model, place[0], variant, place[2], *values, False, False), strict=True))


def _unbeaten(mine: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    """Whether no other is at least as low in both figures and lower in one; False where a figure is missing."""
    if any(math.isnan(value) for value in mine):
        return False
    return not any(
        other[0] <= mine[0] and other[1] <= mine[1] and other != mine
        for other in others
        if not any(math.isnan(value) for value in other)
    )
