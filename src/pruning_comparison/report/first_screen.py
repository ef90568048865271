"""The report's opening: what was compared, what to know before relying on it, and the margins that the verdicts used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pruning_comparison.formatting import counted, listed
from pruning_comparison.report.tables import variants_in

__all__ = ["effective_settings", "format_margins", "model_name", "notices", "opening", "tolerance_of"]


def model_name(summary: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    model = manifest.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    known = summary["model"].dropna()
    return str(name) if name else str(known.iloc[0]) if len(known) else "unnamed model"


def effective_settings(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A run's settings, windows as the model's context made them."""
    settings, model = manifest.get("spec"), manifest.get("model")
    if not isinstance(settings, Mapping) or not isinstance(model, Mapping):
        return settings
    context = model["context_tokens"]
    cut = {
        name: f"{context} (of {settings[name]} asked for: the model's context)"
        for name in ("eval_window", "eval_stride", "calibration_window")
        if settings.get(name, 0) > context
    }
    return {**settings, **cut}


def tolerance_of(manifest: Mapping[str, Any]) -> float:
    """The share of perplexity that a safe level may lose; NaN where the manifest has no margins."""
    margins = manifest.get("margins")
    return float(margins["tolerance"]) if isinstance(margins, Mapping) and "tolerance" in margins else math.nan


def opening(name: str, summary: pd.DataFrame, cells: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    methods = [str(method) for method in summary["method"].dropna().unique()]
    model = manifest.get("model")
    size = name
    if isinstance(model, Mapping):
        size += f", {counted(model['layers'], 'layer')} of {counted(model['heads_per_layer'], 'head')}"
    if not methods:
        return f"{size}: nothing was measured."
    variants = listed([str(v) for v in variants_in(summary)])
    return (
        f"{size}; {variants}; heads ranked by {listed(methods)}; {counted(cells['iteration'].nunique(), 'iteration')}."
    )


def notices(warnings: Sequence[str], missing: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    failed = int((cells["status"] == "failed").sum())
    found = [
        (len(warnings), "warning", "warnings"),
        (int(missing["count"].sum()), "missing figure", "missing figures"),
        (failed, "failed cell", "failed cells"),
    ]
    return [counted(count, word, plural) for count, word, plural in found if count]


def format_margins(margins: Any) -> str:
    """The margins that the verdicts used, in the units of their options."""
    if not isinstance(margins, Mapping):
        return ""
    return (
        f"Differences of less than {100 * margins['speed']:g} % of speed, {100 * margins['quality']:g} % of perplexity, "
        f"{margins['diversity']:g} in distance of distinct-2 and {100 * margins['latency']:g} % of latency count as none; "
        f"the optimal level may lose {100 * margins['tolerance']:g} % of perplexity."
    )
