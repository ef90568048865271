"""The numbers behind the page's interactive charts, as JSON, and the library that draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib
import pandas as pd
from markupsafe import Markup

from pruning_comparison.metrics import METRICS, metric_named
from pruning_comparison.report.rows import rows_of
from pruning_comparison.variants import reported_variant, variant_order

__all__ = ["explorer_data", "vega"]

_DATA_BYTES = 250_000
_DASHES: Mapping[str, list[float]] = {"-": [], "--": [6, 3], "-.": [6, 2, 1, 2], ":": [1, 2]}


def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which offers ``vegaEmbed``."""
    return files("pruning_comparison.report").joinpath("vega/vega.js").read_text("utf-8")


def explorer_data(
    summary: pd.DataFrame, relative: pd.DataFrame, contrasts: pd.DataFrame, *, tolerance: float = math.nan
) -> tuple[Markup, int]:
    """What the charts draw, as JSON that is safe inside a script element, and how many measurements did not fit.

    Every view ("value", "dense": relative to the dense model, "baseline": agency against it) has rows of (metric, method,
    variant, level, temperature, estimate, low end, high end, n), with names as places in the lists beside them.
    """
    variants = sorted({str(name) for name in summary["variant"].dropna().unique()}, key=variant_order)
    methods = [str(name) for name in summary["method"].dropna().unique()]
    present = {metric_named(str(name)).name for name in summary["metric"].dropna().unique()}
    metrics = sorted((name for name in METRICS if name in present), key=_place)
    views: dict[str, tuple[pd.DataFrame, Callable[[Mapping[str, Any]], str]]] = {
        "value": (summary, lambda row: str(row["variant"])),
        "dense": (relative[relative["level"] > 0], lambda row: str(row["variant"])),
        "baseline": (contrasts, lambda row: str(row["contrast"]).partition(" vs ")[0]),
    }
    told: dict[str, Any] = {
        "tolerance": tolerance if math.isfinite(tolerance) else None,
        "methods": methods,
        "variants": [_look(name) for name in variants],
        "metrics": [],
        "views": {view: [] for view in views},
    }
    left = _DATA_BYTES
    by_metric = {view: _by_metric(table) for view, (table, _) in views.items()}
    left_out = 0
    for name in metrics:
        metric = METRICS[name]
        place = len(told["metrics"])
        rows = {
            view: [_row(row, place, methods, variants, variant_of(row)) for row in by_metric[view].get(name, ())]
            for view, (_, variant_of) in views.items()
        }
        rows = {view: [row for row in found if row is not None] for view, found in rows.items()}
        left -= len(json.dumps(rows, separators=(",", ":")))
        if left < 0:
            left_out += 1
            continue
        unit = {view: str(by_metric[view][name][0]["unit"]) for view in views if by_metric[view].get(name)}
        told["metrics"].append(
            {
                "name": name,
                "label": metric.label,
                "better": metric.direction,
                "log": metric.scale == "log",
                "unit": unit,
            }
        )
        for view, found in rows.items():
            told["views"][view] += found
    text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")), left_out


def _place(name: str) -> float:
    """Metrics of the main table first, in its order."""
    return METRICS[name].roles.get("main table", 1000)


def _by_metric(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(table):
        if not pd.isna(row["metric"]) and not pd.isna(row["estimate"]) and math.isfinite(row["estimate"]):
            found.setdefault(metric_named(str(row["metric"])).name, []).append(row)
    return found


def _row(
    row: Mapping[str, Any], metric: int, methods: Sequence[str], variants: Sequence[str], variant: str
) -> list[float | int | None] | None:
    if str(row["method"]) not in methods or variant not in variants:
        return None
    ends = (row[key] for key in ("level", "temperature", "estimate", "ci_low", "ci_high", "n"))
    return [metric, methods.index(str(row["method"])), variants.index(variant), *map(_number, ends)]


def _number(value: Any) -> float | int | None:
    if pd.isna(value) or not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def _look(name: str) -> dict[str, Any]:
    look = reported_variant(name).look
    colour = matplotlib.colors.to_hex(look.colour)
    dash = _DASHES[look.line] if isinstance(look.line, str) else [2 * part for part in look.line[1]]
    page = {"#0072b2": "var(--blue)", "#d55e00": "var(--orange)"}
    return {"name": name, "colour": page.get(colour, colour), "dash": dash, "hollow": look.hollow}
