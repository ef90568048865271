"""Head maps say who left when, who refused, and how far choices agree; drawn, and told in the report."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from builders import GONE, REPLY_COLUMNS, SIGNAL_COLUMNS, asked_tables, heads_table
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

from pruning_comparison.analysis.head_maps import AGREEMENT_COLUMNS, SIGNALS, agreement, map_heads, map_rounds
from pruning_comparison.report.charts.heads import draw_head_charts, head_departures
from pruning_comparison.report.charts.style import to_png
from pruning_comparison.report.head_tables import head_tables
from pruning_comparison.report.tables import agreement_table

NOBODY = (pd.DataFrame(columns=SIGNAL_COLUMNS), pd.DataFrame(columns=REPLY_COLUMNS))


def test_a_head_goes_at_the_lowest_level_without_it_and_the_median_is_over_iterations():
    table = heads_table(
        {
            ("baseline", "entropy", iteration, level): pruned
            for iteration, at in enumerate(((25, 50), (50, 75), (75, math.inf)))
            for level, pruned in (
                (0.0, set()),
                *((float(level), {head for head, first in zip(((0, 0), (1, 1)), at, strict=True) if level >= first})
                  for level in (25, 50, 75)),
            )
        }
    )  # fmt: skip
    (one,) = map_heads(table, *NOBODY)
    assert one.gone_at.tolist() == [[50.0, math.inf], [math.inf, 75.0]]
    assert one.by_iteration[:, 0, 0].tolist() == [25.0, 50.0, 75.0]
    assert one.levels == (0.0, 25.0, 50.0, 75.0)
    assert not one.asked


def test_of_two_middle_iterations_the_lower_counts():
    rows = {("baseline", "entropy", i, level): {(0, 0)} if level >= (50, 25)[i] else set()
            for i in range(2) for level in (0.0, 25.0, 50.0)}  # fmt: skip
    (one,) = map_heads(heads_table(rows), *NOBODY)
    assert one.gone_at[0, 0] == 25.0


def test_signals_are_those_of_the_dense_model_and_answers_are_counted_once_per_iteration():
    (one,) = map_heads(heads_table(GONE), *asked_tables())
    assert one.asked
    assert one.values["redundancy"].tolist() == [[1.0, 2.0], [4.0, 8.0]]
    assert one.values["score"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert one.refused.tolist() == [[0, 1], [0, 0]]
    assert one.overridden.tolist() == [[0, 1], [0, 0]]


def test_a_round_tells_the_answer_of_those_asked_and_the_state_of_the_others():
    first, second = map_rounds(*asked_tables())
    assert (first.level, second.level) == (25.0, 50.0)
    assert first.words == (("active", "refused"), ("consented", "misaligned"))
    assert first.states == (("active", "overloaded"), ("active", "misaligned"))
    assert second.words == (("active", "overridden"), ("withdrawn", "active"))


def test_agreement_of_iterations_methods_and_variants():
    gone = {
        ("baseline", "entropy", 0, 50.0): {(0, 0), (0, 1)},
        ("baseline", "entropy", 1, 50.0): {(0, 0), (1, 0)},
        ("agency", "entropy", 0, 50.0): {(0, 0), (0, 1)},
        ("agency", "entropy", 1, 50.0): {(0, 1), (1, 1)},
        ("baseline", "random", 0, 50.0): {(1, 0), (1, 1)},
        ("baseline", "random", 1, 50.0): {(0, 0), (1, 0)},
    }
    dense = {(*key[:3], 0.0): set() for key in gone}
    scores = {key[:3]: [1, 2, 3, 4] if key[1] == "entropy" else [4, 3, 2, 1] for key in gone}
    table = agreement(heads_table({**dense, **gone}, scores=scores))
    assert list(table.columns) == list(AGREEMENT_COLUMNS)
    found = {
        (row.kind, row.variant, row.method, row.other_variant, row.other_method): row for row in table.itertuples()
    }
    same = found["iterations", "baseline", "entropy", "baseline", "entropy"]
    assert (same.common, same.chance, same.score_correlation, same.n) == (0.5, 0.5, 1.0, 1)
    variants = next(row for key, row in found.items() if key[0] == "variants")
    assert (variants.common, variants.n) == (0.5, 2)  # (2 of 2 + 0 of 2) / 2
    methods = next(row for key, row in found.items() if key[0] == "methods")
    assert (methods.common, methods.score_correlation) == (0.5, -1.0)  # (0 of 2 + 2 of 2) / 2
    assert len(table) == 5  # agency by entropy and the baseline by random differ in both: not compared


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (30, 9)])
def test_every_map_is_drawn_without_warnings(shape):
    layers, heads = shape
    gone = {("baseline", "entropy", 0, 0.0): set(), ("baseline", "entropy", 0, 50.0): {(0, 0)}}
    table = heads_table(gone, layers=layers, heads=heads)
    maps = map_heads(table, *NOBODY)
    for figure in draw_head_charts("$a$ <b>", maps, [], agreement(table)).values():
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_charts_of_a_negotiation_say_what_happened():
    signals, replies = asked_tables()
    table = heads_table(GONE)
    figures = draw_head_charts(
        "tiny", map_heads(table, signals, replies), map_rounds(signals, replies), agreement(table)
    )
    assert list(figures) == ["head_departures", "head_values", "head_negotiation"]  # one iteration agrees with nothing
    words = [text.get_text() for text in figures["head_negotiation"].findobj(Text)]
    assert words.count("r") == words.count("c") == words.count("x") == 1
    assert "overridden, leaves" in words
    assert "to 25 %" in words
    assert draw_head_charts("tiny", [], [], pd.DataFrame()) == {}


def test_colours_of_departures_follow_the_levels():
    (one,) = map_heads(heads_table(GONE), *NOBODY)
    (picture,) = head_departures("tiny", [one]).axes[0].findobj(QuadMesh)
    drawn = np.ma.filled(picture.get_array(), np.nan).reshape(2, 2)
    assert drawn[1, 0] == 25.0
    assert drawn[0, 1] == 50.0
    assert np.isnan(drawn[0, 0])


def test_the_reports_map_has_the_levels_the_marks_and_safe_data():
    maps = map_heads(heads_table(GONE), *asked_tables())
    (table,), data, left_out = head_tables(maps)
    assert [[cell.text for cell in row] for row in table.rows] == [["–", "50×"], ["25", "–"]]
    assert left_out == 0
    (told,) = json.loads(data)
    assert told["iterations"] == [[None, 50.0, 25.0, None]]
    assert told["overridden"] == [0.0, 1.0, 0.0, 0.0]
    assert {view["name"] for view in told["views"]} == {"score", *(name.replace("_", " ") for name in SIGNALS)}
    assert not re.search("[<>&]", data)


def test_maps_that_do_not_fit_are_counted():
    large = heads_table({("baseline", "entropy", 0, 0.0): set()}, layers=100, heads=100)
    maps = map_heads(large, *NOBODY)
    tables, data, left_out = head_tables(maps)
    assert (len(tables), str(data), left_out) == (0, "[]", 1)


def test_agreement_is_a_table_of_the_report():
    gone = {("baseline", "random", i, level): {(0, i)} if level else set() for i in range(2) for level in (0.0, 25.0)}
    table = agreement_table(agreement(heads_table(gone)))
    assert table is not None
    assert [cell.text for cell in table.rows[0].cells] == ["25 %", "0 %", "25 %", "1.00", "1"]
    assert agreement_table(None) is None
