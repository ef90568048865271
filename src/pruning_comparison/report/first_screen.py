"""The report's opening: what was compared, what to know before relying on it, and the margins that the verdicts used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pruning_comparison.formatting import counted, listed, plain_number
from pruning_comparison.report.tables import variants_in
from pruning_comparison.variants import PRIMARY

__all__ = ["effective_settings", "format_margins", "model_name", "notices", "opening"]


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


def opening(name: str, summary: pd.DataFrame, cells: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """What was compared, in one paragraph, with the perplexities at the highest level and no claim beyond them."""
    methods = [str(method) for method in summary["method"].dropna().unique()]
    levels = sorted(float(level) for level in summary["level"].dropna().unique())
    model = manifest.get("model")
    size = ""
    if isinstance(model, Mapping):
        size = f" ({counted(model['layers'], 'layer')} of {counted(model['heads_per_layer'], 'head')})"
    if not methods:
        return f"{name}{size}: nothing was measured."
    iterations = cells["iteration"].nunique()
    text = (
        f"{name}{size} was measured with {listed([f'{level:g}' for level in levels])} % of its attention heads "
        f"pruned, ranked by {listed(methods)}, as {listed([str(v) for v in variants_in(summary)])}, in "
        f"{counted(iterations, 'iteration')}."
    )
    quality = summary[summary["metric"] == "perplexity"]
    for method in methods if len(methods) <= 2 else ():
        told = []
        for variant in PRIMARY[::-1]:
            rows = quality[(quality["method"] == method) & (quality["variant"] == variant)].dropna(subset=["estimate"])
            if not rows.empty:
                row = rows.sort_values("level").iloc[-1]
                told.append(f"{plain_number(float(row['estimate']))} for the {variant} model at {row['level']:g} %")
        dense = quality[(quality["method"] == method) & (quality["variant"] == "baseline") & (quality["level"] == 0)][
            "estimate"
        ].dropna()
        if told:
            before = f" (unpruned: {plain_number(float(dense.iloc[0]))})" if len(dense) else ""
            text += f" With {method}, perplexity is {listed(told)}{before}."
    return text


def notices(warnings: Sequence[str], missing: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    failed = int((cells["status"] == "failed").sum())
    found = [
        (len(warnings), "warning", "warnings"),
        (len(missing), "kind of missing figure", "kinds of missing figures"),
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
