"""Looks fixed in advance: what one sees, and at which level it decides."""

from __future__ import annotations

import pandas as pd
import pytest
from builders import answer, gain, noise, run_of

from pruning_comparison.analysis.estimates import observations
from pruning_comparison.analysis.hypotheses import answer_hypotheses
from pruning_comparison.analysis.stopping import LOOKS, next_look, primary_answers, primary_answers_at


def wide(variant, level, i, d):
    shift = -0.08 + 0.3 * noise(1, i) + 0.05 * noise(level, i, d)
    return level / 100 + (shift if variant == "agency" and level else 0)


def test_looks_are_after_3_6_and_12_iterations():
    assert LOOKS == (3, 6, 12)
    assert [next_look(count) for count in (0, 2, 3, 5, 6, 11, 12, 40)] == [3, 3, 6, 6, 12, 12, None, None]


def test_decided_is_when_the_primary_answer_of_every_method_is():
    clear, unclear = run_of(gain(-0.3)), run_of(wide, method="n")
    both = [pd.concat(parts, ignore_index=True) for parts in zip(clear, unclear, strict=True)]
    alone = primary_answers("tiny", clear[0], observations(*clear))
    assert (alone.decided, alone.rows["id"].tolist()) == (True, ["E2"])
    together = primary_answers("tiny", both[0], observations(*both))
    assert not together.decided
    assert together.rows["method"].tolist() == ["m", "n"]
    assert together.rows["verdict"].tolist() == ["supported", "not enough data"]


def test_a_look_decides_as_the_report_of_such_a_run_will():
    cells, measurements = run_of(gain(-0.3))
    tables = observations(cells, measurements)
    level = primary_answers("tiny", cells, tables).rows.iloc[0]["claim_level"]
    assert level == answer(answer_hypotheses("tiny", cells, tables, looks=3), "E2")["claim_level"]
    assert level == pytest.approx(answer(answer_hypotheses("tiny", cells, tables), "E2")["claim_level"] / 3)


def test_a_look_sees_its_own_iterations_alone():
    cells, measurements = run_of(gain(-0.3), iterations=7)
    seen = primary_answers_at(3, "tiny", cells, measurements).rows.iloc[0]
    fewer = run_of(gain(-0.3), iterations=3)
    pd.testing.assert_series_equal(seen, primary_answers("tiny", fewer[0], observations(*fewer)).rows.iloc[0])
    assert seen["n_iterations"] == 3


def test_nothing_is_decided_without_both_variants():
    tables = run_of(gain(-0.3), variants=("baseline",))
    assert not primary_answers("tiny", tables[0], observations(*tables)).decided
