"""Accuracy on zero-shot tasks in sentences, verdicts and a table, from ``compare_tasks`` and ``answer_accuracy``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pruning_comparison.analysis import ALL_TASKS, NO_DIFFERENCE, NOT_ENOUGH, QUESTIONS, REFUTED
from pruning_comparison.formatting import capitalised, counted, listed, per_cent, plain_number, rounded_up
from pruning_comparison.metrics import metric_named
from pruning_comparison.report.rows import rows_of
from pruning_comparison.report.tables import Table, TableCell, TableRow, sort_key, variants_in
from pruning_comparison.report.verdicts import Verdict
from pruning_comparison.variants import reported_variant

__all__ = ["accuracy_verdicts", "task_lines", "task_sentences", "tasks_table"]

_SPOKEN_LEVEL = 50.0


def accuracy_verdicts(lost: pd.DataFrame) -> list[Verdict]:
    """One verdict for each method, variant and level; ``lost`` has the columns ``ACCURACY_COLUMNS``."""
    question = QUESTIONS["P2"]
    several = lost["method"].nunique() > 1
    found = []
    for row in rows_of(lost):
        variant = str(row["contrast"]).partition(" vs ")[0]
        about = [*([str(row["method"])] if several else []), variant, per_cent(row["level"])]
        found.append(
            Verdict(
                "P2", question.title, question.asked, ", ".join(about), str(row["verdict"]), _sentence(row, variant)
            )
        )
    return found


def _sentence(row: Mapping[str, Any], variant: str) -> str:
    """What is known of the accuracy that one variant loses at one level."""
    if pd.isna(row["estimate"]):
        return "This was not measured."
    place = f"With {per_cent(row['level'])} of the heads pruned by {row['method']}"
    claim = f"{_possessive(variant)} accuracy on tasks is {_points(row['estimate'])} than the dense model's"
    if pd.isna(row["ci_low"]):
        return f"Not enough data. {place}, {claim} in this sample, but there is too little data for an interval."
    told = f"{claim} (95 % interval: {_points_range(row)}; {counted(int(row['n_clusters']), 'question')})"
    margin = f"{plain_number(100 * row['margin'])} points"
    if row["verdict"] == NOT_ENOUGH:
        more = row["more_clusters"]
        enough = (
            "" if pd.isna(more) or more < 1
            else f" About {rounded_up(more):,} more questions would settle it, if the loss is as large as it looks now."
        )  # fmt: skip
        clear = not row["ci_low"] <= -row["margin"] <= row["ci_high"]
        why = ", after correction for all levels and variants" if clear else ""
        return f"Not enough data. {place}, {told}: whether more than {margin} are lost is open{why}.{enough}"
    end = {
        NO_DIFFERENCE: f"less than {margin}, which counts as no loss",
        REFUTED: f"so that a loss of more than {margin} is ruled out",
    }.get(str(row["verdict"]), f"certainly more than {margin} are lost")
    return f"{place}, {told}: {end}."


def _possessive(variant: str) -> str:
    return f"{reported_variant(variant).title}'s"


def _points(difference: float) -> str:
    size = f"{100 * abs(difference):.1f} points"
    return f"{size} {'higher' if difference > 0 else 'lower'}" if abs(difference) > 1e-12 else "no lower"


def _points_range(row: Mapping[str, Any], name: str = "ci") -> str:
    return f"{100 * row[f'{name}_low']:+.1f} to {100 * row[f'{name}_high']:+.1f} points"


def _of_all(tasks: pd.DataFrame) -> pd.DataFrame:
    """The rows of accuracy on all tasks together, or on the only one."""
    rows = tasks[tasks["metric"] == "accuracy"]
    return rows[rows["task"] == ALL_TASKS] if (rows["task"] == ALL_TASKS).any() else rows


def task_lines(tasks: pd.DataFrame) -> list[str]:
    """One line for the first screen: accuracy at the level nearest to 50 %; nothing where no task was asked."""
    rows = _of_all(tasks)
    pruned = sorted(level for level in rows["level"].unique() if level > 0)
    if not pruned:
        return []
    level = min(pruned, key=lambda one: (abs(one - _SPOKEN_LEVEL), one))
    method = str(rows["method"].iloc[0])
    here = rows[(rows["method"] == method) & (rows["level"] == level)]
    dense = rows[(rows["method"] == method) & (rows["level"] == 0)]
    told = [f"{_share(row['estimate'])} for {reported_variant(str(row['variant'])).title}" for row in rows_of(here)]
    of_dense = "" if dense.empty else f" ({_share(dense['estimate'].iloc[0])} unpruned)"
    return [f"Accuracy on tasks at {per_cent(level)}, by {method}: {listed(told)}{of_dense}."]


def task_sentences(tasks: pd.DataFrame) -> list[str]:
    """What each variant loses at the level nearest to 50 %, and how agency compares with the baseline there."""
    sentences = []
    for method, rows in _of_all(tasks).groupby("method", sort=False):
        pruned = sorted(level for level in rows["level"].unique() if level > 0)
        if not pruned:
            continue
        level = min(pruned, key=lambda one: (abs(one - _SPOKEN_LEVEL), one))
        for row in rows_of(rows[rows["level"] == level]):
            if pd.isna(row["vs_dense"]):
                continue
            name = reported_variant(str(row["variant"])).title
            share = _share(row["estimate"])
            told = f"{name} answers {share} of the questions, {_points(row['vs_dense'])} than the dense model"
            interval = "" if pd.isna(row["vs_dense_low"]) else f" (95 % interval: {_points_range(row, 'vs_dense')})"
            against = ""
            if not pd.isna(row["vs_baseline"]):
                known = "" if pd.isna(row["vs_baseline_low"]) else f" ({_points_range(row, 'vs_baseline')})"
                against = f", and {_points(row['vs_baseline'])} than the baseline{known}"
            sentences.append(
                f"With {per_cent(level)} of the heads gone, ranked by {method}, {told}{interval}{against}."
            )
    return [capitalised(sentence) for sentence in sentences]


def tasks_table(tasks: pd.DataFrame | None) -> Table | None:
    """Accuracy on every task; None in a run that asked none."""
    if tasks is None or tasks.empty:
        return None
    methods, metrics = tasks["method"].nunique() > 1, tasks["metric"].nunique() > 1
    baseline = "baseline" in variants_in(tasks) and len(variants_in(tasks)) > 1
    rows = [
        TableRow(
            TableCell(str(row["task"])),
            (
                *([TableCell(metric_named(str(row["metric"])).short_label)] if metrics else []),
                *([TableCell(str(row["method"]))] if methods else []),
                TableCell(per_cent(row["level"]), sort=f"{row['level']:g}"),
                TableCell(str(row["variant"])),
                TableCell(
                    _share(row["estimate"]),
                    "no interval" if pd.isna(row["ci_low"]) else f"{_share(row['ci_low'])} to {_share(row['ci_high'])}",
                    sort_key(row["estimate"]),
                ),
                _difference(row, "vs_dense"),
                *([_difference(row, "vs_baseline")] if baseline else []),
                TableCell(f"{int(row['questions'])}"),
            ),
        )
        for row in rows_of(tasks)
    ]
    columns = (
        "Task", *(["Metric"] if metrics else []), *(["Method"] if methods else []), "Level", "Variant", "Accuracy",
        "From dense, points", *(["From baseline, points"] if baseline else []), "Questions",
    )  # fmt: skip
    return Table("Accuracy on each task", columns, tuple(rows))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _difference(row: Mapping[str, Any], name: str) -> TableCell:
    value, low, high = (float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return TableCell("")
    tone = "better" if low > 0 else "worse" if high < 0 else ""
    interval = "no interval" if math.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return TableCell(f"{100 * value:+.1f}", interval, sort_key(value), tone)
