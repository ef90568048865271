"""Every level against the unpruned model: ratios and differences by hand, and what may be claimed of them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from builders import noise, observed, run_of
from scipy import stats

from pruning_comparison.analysis.relative import RELATIVE_COLUMNS, RELATIVE_WEIGHTS, curve_weights, relative_to_dense


def relative(cells, measurements, **settings):
    return relative_to_dense("tiny", observed(cells, measurements)[1], **settings)


def row_of(table, metric, level, variant="agency", **where):
    rows = table[(table["metric"] == metric) & (table["level"] == level) & (table["variant"] == variant)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_perplexity_is_a_ratio_of_the_same_documents():
    """Documents differ by far more than pruning does; pairs take that out. Log ratio at 20 %: 0.2 and a little noise."""

    def loss(variant, level, i, d):
        return 0.5 * d + level / 100 + (0.01 * noise(i, d) if level else 0)

    table = relative(*run_of(loss, iterations=4, documents=6))
    assert tuple(table.columns) == RELATIVE_COLUMNS
    row = row_of(table, "perplexity", 20)
    expected = 0.2 + 0.01 * np.mean([noise(i, d) for i in range(4) for d in range(6)])
    assert row["estimate"] == pytest.approx(math.exp(expected))
    assert 1.2 < row["ci_low"] < row["estimate"] < row["ci_high"] < 1.25
    assert (row["n"], row["unit"], row["change"]) == (24, "1", "higher")


def test_one_iteration_is_students_interval_over_documents():
    def loss(variant, level, i, d):
        return d + (0.05 + 0.02 * noise(d) if level else 0)

    row = row_of(relative(*run_of(loss, iterations=1, documents=7)), "perplexity", 20)
    ratios = np.array([0.05 + 0.02 * noise(d) for d in range(7)])
    low, high = stats.t.interval(0.95, 6, ratios.mean(), stats.sem(ratios))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((math.exp(low), math.exp(high)))
    assert row["p"] == pytest.approx(stats.ttest_1samp(ratios, 0).pvalue)


def test_text_metrics_are_differences_on_the_same_prompt_and_draws_at_each_temperature():
    def distinct(variant, level, i, p, t):
        return (
            0.5
            + 0.05 * p
            + 0.01 * noise(i, p)
            - (0.1 * t if level else 0)
            + (0.001 * noise(level, i, p) if level else 0)
        )

    table = relative(*run_of(distinct=distinct))
    cool, warm = (row_of(table, "distinct_2", 40, temperature=t) for t in (0.7, 1.0))
    assert (cool["estimate"], warm["estimate"]) == (pytest.approx(-0.07, abs=0.001), pytest.approx(-0.1, abs=0.001))
    assert (cool["change"], cool["unit"]) == ("lower", "1")


def test_what_is_clear_alone_is_certain_only_after_correction():
    """At 20 % the paired interval leaves out 1, but its corrected p has to count all curves of the run."""

    def loss(variant, level, i, d):
        shift = level / 100 if level > 20 else 0.02 + 0.03 * noise(level, i, d) + 0.002 * noise(7, i)
        return 0.2 * d + (shift + 0.02 * noise(level, i, d, 1) if level else 0)

    table = relative(*run_of(loss, iterations=3, documents=8))
    high, low = row_of(table, "perplexity", 80), row_of(table, "perplexity", 20)
    assert (high["change"], high["certain"]) == ("higher", True)
    assert low["change"] == "higher"
    assert low["certain"] == (low["p_holm"] <= 0.05)
    assert low["p_holm"] > low["p"]


def test_levels_are_a_fixed_sequence_from_the_highest():
    """Nothing changes at 80 %, so nothing is certain at 60 %, however clear."""

    def loss(variant, level, i, d):
        return (0.3 if level == 60 else 0.0) + (0.01 * noise(level, i, d) if level else 0)

    table = relative(*run_of(loss, levels=(0.0, 60.0, 80.0)))
    assert (row_of(table, "perplexity", 60)["change"], row_of(table, "perplexity", 60)["certain"]) == ("higher", False)
    assert row_of(table, "perplexity", 80)["change"] == "unclear"


def test_sizes_are_exact_and_have_no_interval():
    cells, measurements = run_of(levels=(0.0, 50.0), iterations=2)
    sizes = [
        {"variant": v, "method": "m", "iteration": i, "level": level, "metric": "parameter_bytes", "value": size}
        for v in ("baseline", "agency")
        for i in range(2)
        for level, size in ((0.0, 1000.0), (50.0, 700.0))
    ]
    table = relative(cells, pd.concat([measurements, pd.DataFrame(sizes)], ignore_index=True))
    row = row_of(table, "parameter_bytes", 50)
    assert (row["estimate"], row["unit"], row["change"], row["n"]) == (-300.0, "byte", "lower", 2)
    assert row[["ci_low", "ci_high", "p"]].isna().all()


def test_level_0_alone_and_one_observation_claim_nothing():
    assert relative(*run_of(levels=(0.0,))).empty
    single = row_of(relative(*run_of(iterations=1, documents=1)), "perplexity", 20)
    assert (single["change"], single["certain"], single["n"]) == ("unclear", False, 1)
    assert math.isnan(single["ci_low"])


def test_curves_of_a_metric_share_its_weight():
    weights = curve_weights(["perplexity", "perplexity", "tokens_per_second", "distinct_2", "seq_rep_4"])
    rest = 1 - sum(RELATIVE_WEIGHTS.values())
    assert weights == pytest.approx([0.25, 0.25, 0.15, rest / 2, rest / 2])
