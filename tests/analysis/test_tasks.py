"""Accuracy by question: estimates, paired differences and verdicts, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from builders import gain, observed, run_of
from scipy import stats

from pruning_comparison.analysis import (
    ACCURACY_COLUMNS,
    ALL_TASKS,
    NO_DIFFERENCE,
    NOT_ENOUGH,
    REFUTED,
    SUPPORTED,
    TASK_COLUMNS,
    Margins,
    answer_accuracy,
    answer_hypotheses,
    compare_tasks,
    contrast,
    level_of,
    relative_to_dense,
    summarize,
)
from pruning_comparison.analysis.verdict_rules import SHARES, SHARES_WITH_TASKS, SPENT

QUESTIONS = {"last_word": 6, "ending": 4}


def run_with(
    scores, *, iterations=1, levels=(0.0, 50.0), variants=("baseline", "agency"), questions=QUESTIONS, fixed=True
):
    """A run whose accuracy on a question is ``scores(variant, level, iteration, number)``, counted over all tasks."""
    cells, rows = [], []
    for variant in variants:
        for level in levels:
            for iteration in range(iterations):
                place = {"variant": variant, "method": "m", "iteration": iteration, "level": level}
                own = f"{variant} {level}" if fixed else f"{variant} {level} {iteration}"
                cells.append(place | {"status": "done", "fingerprint": "dense" if level == 0 else own})
                number = 0
                for task, count in questions.items():
                    for question in range(count):
                        score = scores(variant, level, iteration, number)
                        here = {"document": task, "prompt": question, "metric": "accuracy", "value": score}
                        rows.append(place | here)
                        number += 1
    columns = ["variant", "method", "iteration", "level", "temperature", "prompt", "document", "window", "repeat", "metric",
               "value"]  # fmt: skip
    return observed(pd.DataFrame(cells), pd.DataFrame(rows, columns=columns))


def by_hand(variant, level, iteration, number):
    """Unpruned, questions 0 to 7 of 10 are right. At 50 % the baseline keeps 0 to 3, and agency 0 to 5 and gains 9."""
    right = range(8) if level == 0 else range(4) if variant == "baseline" else (*range(6), 9)
    return float(number in right)


def row_of(table, **where):
    chosen = np.logical_and.reduce([table[name] == value for name, value in where.items()])
    (row,) = table[chosen].to_dict("records")
    return row


def half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def test_every_task_has_its_accuracy_and_its_paired_differences():
    _, tables = run_with(by_hand)
    found = compare_tasks("tiny", tables)
    assert tuple(found.columns) == TASK_COLUMNS
    assert list(dict.fromkeys(found["task"])) == [ALL_TASKS, "ending", "last_word"]
    row = row_of(found, task="last_word", variant="agency", level=50.0)
    # Of the first six questions all are right, as they were unpruned; the baseline has four of them.
    assert (row["estimate"], row["vs_dense"], row["questions"]) == (1.0, 0.0, 6)
    differences = [0, 0, 0, 0, 1, 1]
    assert row["vs_baseline"] == pytest.approx(np.mean(differences))
    assert row["vs_baseline_low"] == pytest.approx(np.mean(differences) - half_width(differences))
    assert row["vs_baseline_high"] == pytest.approx(np.mean(differences) + half_width(differences))
    row = row_of(found, task="ending", variant="agency", level=50.0)
    # Questions 6 to 9: two were right, one is now, another one.
    differences = [-1, -1, 0, 1]
    assert (row["estimate"], row["vs_dense"]) == (pytest.approx(0.25), pytest.approx(-0.25))
    assert row["vs_dense_low"] == pytest.approx(max(-1, -0.25 - half_width(differences)))
    whole = row_of(found, task=ALL_TASKS, variant="baseline", level=50.0)
    assert (whole["estimate"], whole["vs_dense"], whole["questions"]) == (0.4, pytest.approx(-0.4), 10)
    assert math.isnan(whole["vs_baseline"])
    dense = row_of(found, task=ALL_TASKS, variant="agency", level=0.0)
    assert dense["estimate"] == 0.8
    assert math.isnan(dense["vs_dense"])


def test_one_task_has_no_row_for_all_and_a_run_without_tasks_has_none():
    _, tables = run_with(by_hand, questions={"last_word": 10})
    assert set(compare_tasks("tiny", tables)["task"]) == {"last_word"}
    _, tables = observed(*run_of())
    assert compare_tasks("tiny", tables).empty
    assert tuple(compare_tasks("tiny", tables).columns) == TASK_COLUMNS


def test_accuracy_is_a_metric_like_others():
    _, tables = run_with(by_hand)
    row = row_of(summarize("tiny", tables), metric="accuracy", variant="agency", level=50.0)
    right = [1] * 6 + [0, 0, 0, 1]
    assert row["estimate"] == pytest.approx(0.7)
    assert row["ci_high"] == pytest.approx(min(1.0, 0.7 + half_width(right)))
    assert row["n"] == 10
    row = row_of(contrast("tiny", tables), metric="accuracy", level=50.0)
    differences = [0] * 4 + [1, 1, 0, 0, 0, 1]
    assert row["estimate"] == pytest.approx(0.3)
    assert row["ci_low"] == pytest.approx(0.3 - half_width(differences))
    assert (row["unit"], row["better"]) == ("1", "higher")
    row = row_of(relative_to_dense("tiny", tables), metric="accuracy", variant="baseline", level=50.0)
    assert row["estimate"] == pytest.approx(-0.4)


def test_iterations_and_questions_are_crossed():
    """Of three models that differ, one by iteration; the interval is that of the crossed model over 3 x 10 differences."""
    _, tables = run_with(
        lambda v, level, i, n: 1.0 if level == 0 else float((n + i) % 3 > 0), iterations=3, fixed=False
    )
    row = row_of(compare_tasks("tiny", tables), task=ALL_TASKS, variant="agency", level=50.0)
    values = np.array([[float((n + i) % 3 > 0) - 1 for n in range(10)] for i in range(3)])
    grand, a, b = values.mean(), 3, 10
    rows_ms = b * ((values.mean(1) - grand) ** 2).sum() / (a - 1)
    columns_ms = a * ((values.mean(0) - grand) ** 2).sum() / (b - 1)
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + grand
    residual_ms = (rest**2).sum() / ((a - 1) * (b - 1))
    assert row["n"] == 30
    assert row["vs_dense"] == pytest.approx(grand)
    # No component shows beyond the residual here, so that the error is the residual's: sqrt(MS / (a b)).
    assert max(rows_ms, columns_ms) < residual_ms
    assert row["vs_dense_high"] - grand > math.sqrt(residual_ms / (a * b))


def lost(scores, **more):
    cells, tables = run_with(scores, questions={"t": 400}, **more)
    return answer_accuracy("tiny", cells, tables, margins=Margins(accuracy=0.02))


def share_lost(share):
    """So many of 400 questions that were right are wrong at every level above 0."""
    return lambda variant, level, i, n: float(level == 0 or n >= 400 * share)


def test_four_verdicts_on_what_is_lost():
    many = lost(share_lost(0.25), variants=("baseline",))
    assert tuple(many.columns) == ACCURACY_COLUMNS
    row = row_of(many, level=50.0)
    assert row["estimate"] == pytest.approx(-0.25)
    assert row["verdict"] == SUPPORTED
    assert row["cluster"] == "question"
    # One question of 400 is -0.25 points, with a standard error as large: all of it within two points.
    few = row_of(lost(share_lost(1 / 400), variants=("baseline",)), level=50.0)
    assert few["verdict"] == NO_DIFFERENCE
    open_ = row_of(lost(share_lost(12 / 400), variants=("baseline",)), level=50.0)  # 3 points, with an error of 0.9
    assert open_["verdict"] == NOT_ENOUGH
    assert open_["more_clusters"] > 0

    def better(variant, level, i, n):
        return float(n % 2 == 0 or (level > 0 and n % 4 == 1))

    assert row_of(lost(better, variants=("baseline",)), level=50.0)["verdict"] == REFUTED


def test_the_margin_decides():
    cells, tables = run_with(share_lost(0.25), questions={"t": 400}, variants=("baseline",))
    wide = answer_accuracy("tiny", cells, tables, margins=Margins(accuracy=0.4))
    assert row_of(wide, level=50.0)["verdict"] == NO_DIFFERENCE


def test_variants_share_a_part_of_the_error_rate_and_levels_are_tested_from_the_highest_down():
    """Two variants, each with half of 0.25 of what a run spends for its highest level, and nothing behind one that is open.
    What is decided hands its level on: to the next one of its chain, and when that is through, to the other chain."""
    found = lost(share_lost(12 / 400), levels=(0.0, 30.0, 50.0))
    assert len(found) == 4
    by_level = found.sort_values(["contrast", "level"])["claim_level"].tolist()
    assert by_level == pytest.approx([0, SPENT * 0.25 / 2] * 2)
    clear = lost(
        lambda v, level, i, n: share_lost(12 / 400 if v == "agency" else 0.5)(v, level, i, n), levels=(0, 30, 50)
    )
    baseline = clear[clear["contrast"] == "baseline vs dense"]
    assert set(baseline["verdict"]) == {SUPPORTED}
    assert row_of(clear, contrast="agency vs dense", level=50.0)["claim_level"] == pytest.approx(SPENT * 0.25)
    assert set(found["id"]) == {"P2"}
    assert sorted(found["level"]) == [30.0, 30.0, 50.0, 50.0]


def test_the_part_is_taken_from_the_answers_and_only_where_tasks_are_asked():
    assert sum(SHARES.values()) == pytest.approx(1)
    assert sum(SHARES_WITH_TASKS.values()) == pytest.approx(1)
    assert level_of("answers", tasks=True) == pytest.approx(SPENT * 0.60)
    assert level_of("answers") == pytest.approx(SPENT * 0.85)
    cells, tables = observed(*run_of(gain(-0.3)))
    without = answer_hypotheses("tiny", cells, tables)
    _, of_tasks = run_with(by_hand)
    both = answer_hypotheses("tiny", cells, {**tables, "accuracy": of_tasks["accuracy"]})
    first = without["id"].eq("E2")
    ratio = both.loc[first, "claim_level"].iloc[0] / without.loc[first, "claim_level"].iloc[0]
    assert ratio == pytest.approx(0.60 / 0.85)
    assert answer_accuracy("tiny", cells, tables).empty


def test_what_was_not_finite_leaves_questions_out_and_many_of_them_no_answer():
    cells, tables = run_with(lambda v, level, i, n: math.nan if level and n < 100 else 1.0, questions={"t": 400})
    row = row_of(answer_accuracy("tiny", cells, tables), level=50.0, contrast="baseline vs dense")
    assert (row["verdict"], row["reason"]) == (NOT_ENOUGH, "missing")
