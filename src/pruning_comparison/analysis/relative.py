"""Every level against the unpruned model, by pairs: what pruning changes. Pure functions on tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, fit_of
from pruning_comparison.analysis.random_effects import CrossedFit, ratio_of
from pruning_comparison.analysis.verdict_rules import ERROR_RATE, in_chains, level_of
from pruning_comparison.metrics import METRICS, Metric, in_role, of_kind

__all__ = ["RELATIVE_COLUMNS", "RELATIVE_WEIGHTS", "Change", "relative_to_dense"]

RELATIVE_COLUMNS = (
    "model", "variant", "method", "level", "temperature", "metric", "estimate", "ci_low", "ci_high", "n", "p", "change",
    "unit", "p_holm", "certain",
)  # fmt: skip

Change = Literal["higher", "lower", "same", "unclear"]

RELATIVE_WEIGHTS: Mapping[str, float] = {"perplexity": 0.5, "tokens_per_second": 0.15, "first_token_latency_s": 0.15}
"""How metrics share this part of the error rate; all others together have what is left."""


def relative_to_dense(model: str, tables: Mapping[str, MetricTable], *, looks: int = 1) -> pd.DataFrame:
    """Each level above 0 against level 0 of the same variant and method, columns ``RELATIVE_COLUMNS``.

    Pairs are of the same iteration and document or prompt (and temperature and draws). For metrics on the log scale
    ``estimate`` is a ratio (1.03: 3 % more than unpruned) of unit "1"; for the others it is a difference in the metric's
    unit. Sizes are exact: they have no interval. ``ci_low`` and ``ci_high`` are the paired 95 % interval.

    ``change`` is "higher" or "lower" where that interval leaves out no change, else "unclear"; "same" is for exact sizes
    alone. Among so many rows some are clear by chance: ``certain`` says which are so after correction as well (``p_holm``
    at most 0.05), and only those are claims that a run may err in by its error rate. The levels of a curve are a fixed
    sequence, the highest first, where pruning changes most; curves share this part of the error rate by
    ``RELATIVE_WEIGHTS``.
    """
    rows: list[dict[str, Any]] = []
    curves: dict[tuple[Any, ...], list[int]] = {}
    p_values: list[float] = []
    for name in _claimed(tables):
        for key, fit in _fits(tables[name]):
            variant, method, _, temperature = key
            p = fit.p_value()
            if not math.isnan(p):
                curve = (name, variant, method, -1.0 if math.isnan(temperature) else temperature)
                curves.setdefault(curve, []).append(len(rows))
            p_values.append(p)
            row = _row(model, name, key, fit)
            rows.append(row | {"p": p, "change": _change(row, METRICS[name]), "p_holm": math.nan, "certain": False})
    _correct(rows, np.array(p_values), curves, level_of("relative to dense", looks))
    for metric in of_kind("size", "memory"):
        if metric.name in tables and metric.name not in _claimed(tables):
            rows += [_exact_row(model, metric.name, key, fit) for key, fit in _fits(tables[metric.name])]
    table = pd.DataFrame(rows, columns=list(RELATIVE_COLUMNS))
    return table.sort_values(["method", "metric", "temperature", "level", "variant"], ignore_index=True)


def _claimed(tables: Mapping[str, MetricTable]) -> list[str]:
    """Main measurements that are uncertain, and that mean something at level 0: a distance from the dense model does not."""
    kinds = ("loss", "text", "task", "timing", "memory")
    return [name for name in in_role("main table") if name in tables and METRICS[name].kind in kinds]


def _fits(data: MetricTable) -> list[tuple[tuple[str, str, float, float], CrossedFit]]:
    found: list[tuple[Any, CrossedFit]] = []
    for variant in data.table["variant"].unique():
        pairs = data.pairs_with_dense(variant)
        for (method, level, temperature), group in pairs.groupby(["method", "level", "temperature"], dropna=False):
            fit = fit_of(group, "difference", "pair")
            if fit is not None:
                found.append(((variant, method, level, temperature), fit))
    return found


def _row(model: str, metric: str, key: tuple[str, str, float, float], fit: CrossedFit) -> dict[str, Any]:
    variant, method, level, temperature = key
    record = METRICS[metric]
    low, high = record.bounds
    estimate = fit.estimate()
    shown = estimate.map(ratio_of) if record.scale == "log" else estimate.within(low - high, high - low)
    return {
        "model": model, "variant": variant, "method": method, "level": level, "temperature": temperature,
        "metric": metric, "estimate": shown.estimate, "ci_low": shown.ci_low, "ci_high": shown.ci_high, "n": shown.n,
        "unit": "1" if record.scale == "log" else record.unit,
    }  # fmt: skip


def _exact_row(model: str, metric: str, key: tuple[str, str, float, float], fit: CrossedFit) -> dict[str, Any]:
    change: Change = "higher" if fit.mean > 0 else "lower" if fit.mean < 0 else "same"
    nothing = dict.fromkeys(("ci_low", "ci_high", "p", "p_holm"), math.nan)
    return _row(model, metric, key, fit) | nothing | {"change": change, "certain": True}


def _change(row: Mapping[str, Any], metric: Metric) -> Change:
    """By the paired interval; unclear where there is none."""
    neutral = 1.0 if metric.scale == "log" else 0.0
    if row["ci_low"] > neutral:
        return "higher"
    return "lower" if row["ci_high"] < neutral else "unclear"


def _correct(
    rows: list[dict[str, Any]],
    p_values: np.ndarray[Any, Any],
    curves: Mapping[tuple[Any, ...], list[int]],
    level: float,
) -> None:
    """Sets ``p_holm`` and ``certain`` of the rows that have a p."""
    if not curves:
        return
    known = [place for chain in curves.values() for place in chain]
    position = {place: index for index, place in enumerate(known)}
    chains = [
        [position[place] for place in sorted(chain, key=lambda place: -rows[place]["level"])]
        for chain in curves.values()
    ]
    adjusted, _ = in_chains(p_values[known][None], chains, curve_weights([str(curve[0]) for curve in curves]), level)
    for place, p_holm in zip(known, adjusted[0], strict=True):
        row = rows[place]
        row["p_holm"] = min(1.0, float(p_holm) * ERROR_RATE / level)
        row["certain"] = row["change"] != "unclear" and row["p_holm"] <= ERROR_RATE


def curve_weights(metrics: list[str]) -> list[float]:
    """The weight of each curve, by its metric: curves of one metric, or of all the others, share its weight."""
    rest = 1 - sum(RELATIVE_WEIGHTS.values())
    names = [name if name in RELATIVE_WEIGHTS else "" for name in metrics]
    return [RELATIVE_WEIGHTS.get(name, rest) / names.count(name) for name in names]
