"""Accuracy on zero-shot tasks: of each task, and whether a level loses any. Pure functions on tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, fit_of
from pruning_comparison.analysis.hypotheses import (
    HYPOTHESIS_COLUMNS,
    HypothesisResult,
    answer_of,
    beside_dense,
    hypothesis_table,
)
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.random_effects import Estimate
from pruning_comparison.analysis.verdict_rules import level_of
from pruning_comparison.metrics import of_kind
from pruning_comparison.variants import variant_order

__all__ = ["ACCURACY_COLUMNS", "ALL_TASKS", "TASK_COLUMNS", "answer_accuracy", "compare_tasks"]

ALL_TASKS = "all tasks"
"""What stands in place of a task where every question of all of them counts alike."""

TASK_COLUMNS = (
    "model", "method", "metric", "task", "level", "variant", "estimate", "ci_low", "ci_high", "questions", "n", "vs_dense",
    "vs_dense_low", "vs_dense_high", "vs_baseline", "vs_baseline_low", "vs_baseline_high",
)  # fmt: skip

ACCURACY_COLUMNS = (*HYPOTHESIS_COLUMNS, "level")

_NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def compare_tasks(model: str, tables: Mapping[str, MetricTable]) -> pd.DataFrame:
    """Accuracy of every variant and level on each task, and on all together, columns ``TASK_COLUMNS``; empty without tasks.

    ``estimate`` is a share of 1, with the 95 % interval over iterations and questions. ``vs_dense`` is the mean difference
    from the unpruned model on the same questions, ``vs_baseline`` that of any other variant from the baseline, with paired
    95 % intervals; NaN where there is none. Nothing is corrected for the number of rows.
    """
    rows = []
    for metric in of_kind("task"):
        if metric.name not in tables:
            continue
        whole = tables[metric.name]
        names = [str(name) for name in dict.fromkeys(whole.table["task"])]
        for task in [*names, *([ALL_TASKS] if len(names) > 1 else [])]:
            part = whole.table if task == ALL_TASKS else whole.table[whole.table["task"] == task]
            rows += _of_task(model, metric.name, task, MetricTable(metric.name, part, False))
    table = pd.DataFrame(rows, columns=list(TASK_COLUMNS))
    order = table["variant"].map(variant_order)
    sorted_rows = table.assign(order=order).sort_values(["method", "metric", "task", "level", "order"], kind="stable")
    return sorted_rows.drop(columns="order").reset_index(drop=True)


def _of_task(model: str, metric: str, task: str, data: MetricTable) -> list[dict[str, Any]]:
    """The rows of one task."""
    questions = data.table["cluster"].nunique()
    variants = [str(name) for name in data.table["variant"].unique()]
    against_dense = {variant: _by_place(data.pairs_with_dense(variant)) for variant in variants}
    against_baseline = {
        variant: _by_place(data.pairs(variant, "baseline"))
        for variant in variants
        if variant != "baseline" and "baseline" in variants
    }
    rows = []
    for (variant, method, level, _), estimate in data.estimates():
        dense = against_dense[variant].get((method, level), _NOTHING)
        baseline = against_baseline.get(variant, {}).get((method, level), _NOTHING) if level > 0 else _NOTHING
        rows.append(
            {
                "model": model, "method": method, "metric": metric, "task": task, "level": level, "variant": variant,
                "estimate": estimate.estimate, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high,
                "questions": questions, "n": estimate.n,
                **_named("vs_dense", dense), **_named("vs_baseline", baseline),
            }
        )  # fmt: skip
    return rows


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.estimate, f"{name}_low": estimate.ci_low, f"{name}_high": estimate.ci_high}


def _by_place(pairs: pd.DataFrame) -> dict[tuple[str, float], Estimate]:
    """The mean difference at every (method, level)."""
    found: dict[tuple[str, float], Estimate] = {}
    for (method, level), group in pairs.groupby(["method", "level"]):
        fit = fit_of(group, "difference", "pair")
        if fit is not None:
            found[str(method), float(str(level))] = fit.estimate().within(-1.0, 1.0)
    return found


def answer_accuracy(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    looks: int = 1,
) -> pd.DataFrame:
    """P2, how much accuracy each variant loses at each level above 0: columns ``ACCURACY_COLUMNS``, one family of its own.

    The levels of a variant and method are a fixed sequence, the highest first, where pruning loses most.

    *Supported*: certainly more than the margin is lost. *No meaningful difference*: certainly less than it is lost or
    gained. *Refuted*: no more than the margin is lost, and more may be gained. The estimate is the mean difference from the
    unpruned model over all questions, as a share of 1. Empty where no task was asked.
    """
    margins = margins or Margins()
    rows: list[HypothesisResult] = []
    places: list[float] = []
    chains: list[list[int]] = []
    if "accuracy" in tables:
        for method, source in beside_dense(model, cells, tables):
            chains.append([])
            for level in reversed(source.levels(method, 1e-9)):
                chains[-1].append(len(rows))
                rows.append(
                    answer_of(
                        source, method, "P2", "accuracy", source.sample("accuracy", method, [level]),
                        f"mean difference of accuracy at level {level:g}", margin=margins.accuracy, better="lower",
                    )
                )  # fmt: skip
                places.append(level)
    table = hypothesis_table(
        rows, level=level_of("accuracy", looks, tasks=True), chains=[chain for chain in chains if chain]
    )
    table = table.assign(level=pd.Series(places, dtype=float))[list(ACCURACY_COLUMNS)]
    return table.sort_values(["method", "level", "contrast"], ignore_index=True)
