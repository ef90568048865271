"""Accuracy on tasks in the report: verdicts in sentences, the table, the line of the first screen, and the chart."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from builders import render_page

from pruning_comparison.analysis import ACCURACY_COLUMNS, NO_DIFFERENCE, NOT_ENOUGH, REFUTED, SUPPORTED, TASK_COLUMNS
from pruning_comparison.report.charts import draw_tasks, to_svg
from pruning_comparison.report.tasks import accuracy_verdicts, task_lines, task_sentences, tasks_table

NAN = math.nan


def lost(verdict, estimate, low, high, *, variant="agency", level=50.0, **more):
    row = {
        "method": "fisher", "contrast": f"{variant} vs dense", "verdict": verdict, "estimate": estimate, "ci_low": low,
        "ci_high": high, "margin": 0.02, "level": level, "n_clusters": 400, "more_clusters": NAN,
    }  # fmt: skip
    return pd.DataFrame([{**row, **more}], columns=list(ACCURACY_COLUMNS))


def said(*row, **more):
    (verdict,) = accuracy_verdicts(lost(*row, **more))
    return verdict.sentence


def test_each_verdict_has_its_sentence():
    place = "With 50 % of the heads pruned by fisher, agency's accuracy on tasks is"
    assert said(SUPPORTED, -0.25, -0.3, -0.2) == (
        f"{place} 25.0 points lower than the dense model's (95 % interval: -30.0 to -20.0 points; 400 questions): certainly "
        "more than 2 points are lost."
    )
    assert said(NO_DIFFERENCE, 0.002, -0.01, 0.014).endswith(
        "0.2 points higher than the dense model's (95 % interval: -1.0 to +1.4 points; 400 questions): less than 2 points, "
        "which counts as no loss."
    )
    assert said(REFUTED, 0.05, 0.01, 0.09).endswith("so that a loss of more than 2 points is ruled out.")
    assert said(NOT_ENOUGH, -0.03, -0.06, 0.0, more_clusters=812.2).endswith(
        "whether more than 2 points are lost is open. About 820 more questions would settle it, if the loss is as large as "
        "it looks now."
    )
    assert "is open, after correction for all levels and variants." in said(NOT_ENOUGH, -0.08, -0.13, -0.03)
    assert said(NOT_ENOUGH, NAN, NAN, NAN) == "This was not measured."
    assert "too little data for an interval" in said(NOT_ENOUGH, -1.0, NAN, NAN)


def test_a_verdict_says_what_it_is_about():
    (verdict,) = accuracy_verdicts(lost(SUPPORTED, -0.25, -0.3, -0.2, variant="baseline", level=30.0))
    assert (verdict.id, verdict.title, verdict.about, verdict.verdict) == (
        "P2", "Accuracy lost", "baseline, 30 %", SUPPORTED,
    )  # fmt: skip
    assert verdict.sentence.startswith("With 30 % of the heads pruned by fisher, the baseline's accuracy")


def tasks(*, several=True):
    rows = []
    for task in ["last_word", "ending", "all tasks"] if several else ["last_word"]:
        for level, variant, estimate, dense, base in (
            (0.0, "baseline", 0.6, (NAN,) * 3, (NAN,) * 3),
            (0.0, "agency", 0.6, (NAN,) * 3, (NAN,) * 3),
            (50.0, "baseline", 0.3, (-0.3, -0.4, -0.2), (NAN,) * 3),
            (50.0, "agency", 0.5, (-0.1, -0.2, 0.0), (0.2, 0.1, 0.3)),
        ):
            rows.append(
                ["tiny", "fisher", "accuracy", task, level, variant, estimate, estimate - 0.05, estimate + 0.05, 40, 40,
                 *dense, *base]
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(TASK_COLUMNS))


def test_sentences_and_the_line_are_about_all_tasks_or_the_only_one():
    for table in (tasks(), tasks(several=False)):
        assert task_sentences(table) == [
            "With 50 % of the heads gone, ranked by fisher, the baseline answers 30.0 % of the questions, 30.0 points lower "
            "than the dense model (95 % interval: -40.0 to -20.0 points).",
            "With 50 % of the heads gone, ranked by fisher, agency answers 50.0 % of the questions, 10.0 points lower than "
            "the dense model (95 % interval: -20.0 to +0.0 points), and 20.0 points higher than the baseline (+10.0 to "
            "+30.0 points).",
        ]
        assert task_lines(table) == [
            "Accuracy on tasks at 50 %, by fisher: 30.0 % for the baseline and 50.0 % for agency (60.0 % unpruned)."
        ]
    assert task_lines(pd.DataFrame(columns=list(TASK_COLUMNS))) == []


def test_the_table_has_a_row_for_every_task_level_and_variant():
    table = tasks_table(tasks())
    assert table is not None
    assert table.columns == (
        "Task", "Level", "Variant", "Accuracy", "From dense, points", "From baseline, points", "Questions",
    )  # fmt: skip
    assert len(table.rows) == 12
    last = table.rows[-1]
    assert last.heading.text == "all tasks"
    assert [cell.text for cell in last.cells] == ["50 %", "agency", "50.0 %", "-10.0", "+20.0", "40"]
    assert [cell.tone for cell in last.cells] == ["", "", "", "", "better", ""]
    assert tasks_table(tasks().iloc[:0]) is None


def test_the_page_shows_them_and_only_where_tasks_were_asked():
    page = render_page(tasks=tasks(), accuracy_lost=lost(SUPPORTED, -0.25, -0.3, -0.2, metric="accuracy", id="P2"))
    assert 'id="tasks"' in page
    assert "Accuracy on each task" in page
    assert "Accuracy lost: estimates" in page
    assert 'id="tasks"' not in render_page()


@pytest.mark.parametrize("several", [True, False])
def test_the_chart_has_a_panel_for_each_task_and_draws_the_table(several):
    figure = draw_tasks(tasks(several=several))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == (["all tasks", "last_word", "ending"] if several else ["last_word"])
    (agency,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "agency"]
    assert list(agency.get_ydata()) == [0.6, 0.5]
    assert "last_word 40" in to_svg(figure).decode()
    assert draw_tasks(tasks().assign(estimate=NAN)) is not None
