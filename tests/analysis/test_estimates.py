"""Estimates and intervals against hand computation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruning_comparison.analysis.estimates import (
    CONTRAST_COLUMNS,
    SUMMARY_COLUMNS,
    contrast,
    missing_figures,
    observations,
    summarize,
)
from pruning_comparison.analysis.random_effects import crossed_p_values, fit_crossed
from pruning_comparison.variants import DENSE

COLUMNS = [
    "variant", "method", "iteration", "level", "phase", "temperature", "prompt", "document", "window", "repeat",
    "metric", "value", "unit", "reason",
]  # fmt: skip


def test_crossed_fit_by_hand():
    """Values 1..6 as [2, 3]: grand mean 3.5; MS_A = 13.5, MS_B = 2, MS_E = 0."""
    fit = fit_crossed(np.arange(1.0, 7.0).reshape(2, 3))
    assert fit.mean == 3.5
    assert fit.mean_squares == pytest.approx((13.5, 2.0, 0.0))
    assert fit.variance == pytest.approx((13.5 + 2 - 0) / 6)
    assert fit.df == pytest.approx(15.5**2 / (13.5**2 / 1 + 2**2 / 2))
    assert (fit.components.iterations, fit.components.clusters) == pytest.approx((13.5 / 3, 2 / 2))


def test_a_factor_below_the_residual_is_pooled_with_it():
    """Rows (1, 3), (3, 1): MS_A = MS_B = 0, MS_E = 4 with one degree of df; pooled (0 + 0 + 4) / 3."""
    fit = fit_crossed(np.array([[1.0, 3.0], [3.0, 1.0]]))
    assert fit.mean_squares == pytest.approx((0, 0, 4))
    assert fit.variance == pytest.approx(4 / 3 / 4)
    assert fit.df == pytest.approx(3)


def test_interval_ends_where_the_mixture_of_student_and_fiducial_says():
    """The fiducial part by plain simulation: chi-squared draws for the three mean squares."""
    generator = np.random.default_rng(1)
    values = generator.standard_normal((4, 1)) + generator.standard_normal((1, 13)) + generator.standard_normal((4, 13))
    fit = fit_crossed(values)
    result = fit.estimate()
    a, b, e = (
        square * df / generator.chisquare(df, 400_000) for square, df in zip(fit.mean_squares, (3, 12, 36), strict=True)
    )
    spread = np.sqrt(np.maximum(a + b - e, 1e-3 * fit.mean_squares[2]) / 52)
    margin = result.ci_high - result.estimate
    fiducial = 2 * stats.norm.sf(margin / spread).mean()
    student = 2 * stats.t.sf(margin / math.sqrt(fit.variance), fit.df)
    share = 0.7 * (1 - 2 * 3 / 12)
    assert (1 - share) * student + share * fiducial == pytest.approx(0.05, abs=1e-3)
    assert fit.p_value(result.ci_low) == pytest.approx(0.05, abs=1e-6)
    assert crossed_p_values(values[None], result.ci_low)[0] == pytest.approx(0.05, abs=1e-6)


def test_one_factor_is_students_interval():
    values = np.array([[1.0, 2.0, 4.0, 9.0]])
    low, high = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values[0]))
    for matrix in (values, values.T):
        result = fit_crossed(matrix).estimate()
        assert (result.ci_low, result.ci_high) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    result = fit_crossed(np.array([[2.0]])).estimate()
    assert result.estimate == 2.0
    assert math.isnan(result.ci_low)
    assert result.n == 1


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        fit_crossed(np.array([[1.0, math.nan]])).estimate()


@pytest.mark.parametrize(
    ("iterations", "clusters", "spread"), [(3, 5, (1, 1, 1)), (5, 30, (1, 3, 1)), (5, 30, (3, 1, 1))]
)
def test_intervals_cover(iterations, clusters, spread):
    """95 % intervals of crossed Gaussian data cover the truth in 92 to 98 % of 600 data sets."""
    generator = np.random.default_rng(0)
    values = (
        spread[0] * generator.standard_normal((600, iterations, 1))
        + spread[1] * generator.standard_normal((600, 1, clusters))
        + spread[2] * generator.standard_normal((600, iterations, clusters))
    )
    covered = (crossed_p_values(values) > 0.05).mean()
    assert 0.92 <= covered <= 0.98


def rows_of(variant, iteration, level, metric, value, **place):
    row = dict.fromkeys(COLUMNS)
    row |= {"variant": variant, "method": "m", "iteration": iteration, "level": float(level), "phase": "quality"}
    row |= {"metric": metric, "value": value, "unit": "1"} | place
    return row


def cells_of(entries):
    return pd.DataFrame(
        [
            {"variant": v, "method": "m", "iteration": i, "level": float(level), "status": "done", "fingerprint": f}
            for v, i, level, f in entries
        ]
    )


def losses(variant, iteration, level, by_document):
    rows = []
    for document, (nats, tokens) in by_document.items():
        place = {"document": document, "window": 0}
        rows.append(rows_of(variant, iteration, level, "window_nats", nats, **place))
        rows.append(rows_of(variant, iteration, level, "window_tokens", tokens, **place))
        rows.append(rows_of(variant, iteration, level, "window_bytes", 4 * tokens, **place))
    return rows


def test_perplexity_is_weighted_by_tokens_and_identical_iterations_count_once():
    by_document = {"a": (20.0, 10), "b": (30.0, 30)}
    rows = [row for i in range(3) for row in losses("baseline", i, 0, by_document)]
    cells = cells_of([("baseline", i, 0, "dense") for i in range(3)])
    summary = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS))).set_index("metric")
    assert summary.loc["perplexity", "estimate"] == pytest.approx(math.exp(50 / 40))
    assert summary.loc["perplexity", "n"] == 2
    assert summary.loc["bits_per_byte", "estimate"] == pytest.approx(50 / math.log(2) / 160)


def test_contrast_is_paired_and_relative():
    rows = losses("baseline", 0, 50, {"a": (20.0, 10), "b": (40.0, 10)})
    rows += losses("agency", 0, 50, {"a": (19.0, 10), "b": (38.8, 10)})
    cells = cells_of([("baseline", 0, 50, "x"), ("agency", 0, 50, "y")])
    table = contrast("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS))).set_index("metric")
    expected = stats.t.interval(0.95, 1, loc=-0.11, scale=stats.sem([-0.1, -0.12]))
    row = table.loc["perplexity"]
    assert list(contrast("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS))).columns) == list(
        CONTRAST_COLUMNS
    )
    assert row["estimate"] == pytest.approx(100 * math.expm1(-0.11))
    assert row["ci_low"] == pytest.approx(100 * math.expm1(expected[0]))
    assert row["unit"] == "%"
    assert row["better"] == "lower"


def test_distance_is_from_the_dense_text_of_the_same_prompt():
    rows, entries = [], []
    for variant, values in (("baseline", (0.5, 0.2)), ("agency", (0.5, 0.6))):
        for level, value in zip((0, 50), values, strict=True):
            entries.append((variant, 0, level, f"{variant}{level}"))
            rows += [
                rows_of(variant, 0, level, "distinct_2", value + 0.01 * prompt, temperature=1.0, prompt=prompt)
                for prompt in range(2)
            ]
    summary = summarize("tiny", observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS)))
    distance = summary[summary["metric"] == "distinct_2_distance"].set_index(["variant", "level"])["estimate"]
    assert distance["baseline", 50] == pytest.approx(0.3)
    assert distance["agency", 50] == pytest.approx(0.1)
    assert distance["agency", 0] == 0
    table = contrast("tiny", observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS)))
    row = table[(table["metric"] == "distinct_2_distance") & (table["level"] == 50)].iloc[0]
    assert row["estimate"] == pytest.approx(-0.2)


def test_speed_in_proportion_to_bytes_is_the_dense_speed_times_their_ratio():
    rows, entries = [], []
    for level, size, cache, speed in ((0, 900, 100, 10.0), (50, 450, 50, 11.0)):
        entries.append(("baseline", 0, level, str(level)))
        rows.append(rows_of("baseline", 0, level, "decode_bytes", size))
        rows.append(rows_of("baseline", 0, level, "cache_bytes", cache, prompt=0, repeat=0))
        rows.append(rows_of("baseline", 0, level, "tokens_per_second", speed, prompt=0, repeat=0))
    summary = summarize("tiny", observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS)))
    by_bytes = summary[summary["metric"] == "tokens_per_second_in_proportion"].set_index("level")["estimate"]
    assert by_bytes[50] == pytest.approx(20.0)
    assert list(summary.columns) == list(SUMMARY_COLUMNS)


def test_speed_relative_to_dense_is_paired_within_a_levels_turns():
    """The machine is twice as slow while level 50 is timed: 12 token/s beside the dense model's 10 there are 1.2 times, and
    not 0.6 times the 20 of level 0. A run that timed no dense model beside has nothing but level 0."""
    entries = [("baseline", 0, level, str(level)) for level in (0, 50)]
    speeds = (("baseline", 0, 20.0), ("baseline", 50, 12.0), (DENSE, 50, 10.0))
    rows = [
        rows_of(variant, 0, level, "tokens_per_second", speed, prompt=prompt, repeat=repeat)
        for variant, level, speed in speeds
        for prompt in (0, 1)
        for repeat in (0, 1)
    ]
    measurements = pd.DataFrame(rows, columns=COLUMNS)
    data = observations(cells_of(entries), measurements)["tokens_per_second"]
    assert set(data.table["variant"]) == {"baseline"}
    pairs = data.pairs_with_dense("baseline")
    assert pairs[["level", "cluster"]].to_numpy().tolist() == [[50, 0], [50, 1]]
    assert pairs["difference"].tolist() == pytest.approx([math.log(1.2)] * 2)
    older = measurements[measurements["variant"] != DENSE]
    pairs = observations(cells_of(entries), older)["tokens_per_second"].pairs_with_dense("baseline")
    assert pairs["difference"].tolist() == pytest.approx([math.log(0.6)] * 2)


def test_missing_values_are_counted_not_filled():
    rows = [
        rows_of("baseline", 0, 50, "distinct_2", None, reason="too short", prompt=p, temperature=1.0) for p in range(3)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    missing = missing_figures(table)
    assert missing[["metric", "reason", "count"]].to_numpy().tolist() == [["distinct_2", "too short", 3]]
    assert summarize("tiny", observations(cells_of([("baseline", 0, 50, "x")]), table)).empty


def test_a_document_with_a_loss_that_is_not_finite_is_left_out_whole():
    rows = losses("baseline", 0, 50, {"a": (20.0, 10), "b": (40.0, 10)})
    rows += [
        rows_of("baseline", 0, 50, "window_nats", None, reason="not finite", document="b", window=1),
        rows_of("baseline", 0, 50, "window_tokens", 10, document="b", window=1),
        rows_of("baseline", 0, 50, "window_bytes", 40, document="b", window=1),
    ]
    summary = summarize("tiny", observations(cells_of([("baseline", 0, 50, "x")]), pd.DataFrame(rows, columns=COLUMNS)))
    row = summary.set_index("metric").loc["perplexity"]
    assert row["estimate"] == pytest.approx(math.exp(2.0))
    assert row["n"] == 1


def test_the_ratio_to_the_dense_model_is_paired_by_document_and_weighted_by_tokens():
    """By hand: per token a goes from 2.0 to 2.5 and b from 1.0 to 1.2, with 10 and 30 tokens. c has no dense loss."""
    rows = losses("agency", 0, 0, {"a": (20.0, 10), "b": (30.0, 30)})
    rows += losses("agency", 0, 50, {"a": (25.0, 10), "b": (36.0, 30), "c": (90.0, 10)})
    cells = cells_of([("agency", 0, 0, "dense"), ("agency", 0, 50, "x")])
    summary = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS)))
    (row,) = summary[summary["metric"] == "perplexity_ratio"].to_dict("records")
    assert row["level"] == 50
    assert row["estimate"] == pytest.approx(math.exp((10 * 0.5 + 30 * 0.2) / 40))
    assert row["ci_low"] < row["estimate"] < row["ci_high"]
    assert row["n"] == 2


def test_word_perplexity_is_weighted_by_words_and_missing_where_none_were_counted():
    rows = losses("baseline", 0, 0, {"a": (20.0, 10), "b": (30.0, 30), "c": (7.0, 7)})
    cells = cells_of([("baseline", 0, 0, "dense")])
    before = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS)))
    assert "word_perplexity" not in set(before["metric"])
    rows += [
        rows_of("baseline", 0, 0, "window_words", words, document=document, window=0)
        for document, words in (("a", 8), ("b", 17), ("c", 0))
    ]
    summary = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS))).set_index("metric")
    assert summary.loc["word_perplexity", "estimate"] == pytest.approx(math.exp(50 / 25))
    assert summary.loc["perplexity", "estimate"] == pytest.approx(math.exp(57 / 47))


def test_divergence_is_weighted_by_tokens_and_missing_in_runs_that_did_not_measure_it():
    """By hand: a is 0.3 and b 0.1 nats from the dense model, 10 and 30 tokens; of c one window of two has no number."""
    rows = losses("baseline", 0, 50, {"a": (20.0, 10), "b": (30.0, 30)})
    cells = cells_of([("baseline", 0, 50, "x")])
    before = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS)))
    assert "kl_to_dense" not in set(before["metric"])
    rows += [
        rows_of("baseline", 0, 50, "window_kl_nats", nats, document=document, window=0)
        for document, nats in (("a", 3.0), ("b", 3.0))
    ]
    for window, nats in ((0, 4.0), (1, None)):
        place = {"document": "c", "window": window}
        rows += [
            rows_of("baseline", 0, 50, metric, value, **place)
            for metric, value in (
                ("window_nats", 5.0),
                ("window_tokens", 5),
                ("window_bytes", 20),
                ("window_kl_nats", nats),
            )
        ]
    summary = summarize("tiny", observations(cells, pd.DataFrame(rows, columns=COLUMNS))).set_index("metric")
    assert summary.loc["kl_to_dense", "estimate"] == pytest.approx(6 / 40)
    assert (summary.loc["kl_to_dense", "n"], summary.loc["perplexity", "n"]) == (2, 3)
    assert summary.loc["perplexity", "estimate"] == pytest.approx(math.exp(60 / 50))


def test_latency_in_proportion_to_flops_is_the_dense_latency_times_their_ratio():
    rows, entries = [], []
    for level, flops, seconds in ((0, 8e9, 0.04), (50, 6e9, 0.039)):
        entries.append(("baseline", 0, level, str(level)))
        rows.append(rows_of("baseline", 0, level, "prefill_flops", flops))
        rows.append(rows_of("baseline", 0, level, "first_token_latency_s", seconds, prompt=0, repeat=0))
    summary = summarize("tiny", observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS)))
    by_flops = summary[summary["metric"] == "first_token_latency_in_proportion_s"].set_index("level")["estimate"]
    assert by_flops.to_dict() == pytest.approx({0: 0.04, 50: 0.03})
    assert not (summary["metric"] == "tokens_per_second_in_proportion").any()


def test_pairs_are_made_once_for_each_two_variants():
    entries = [
        (variant, iteration, 50, f"{variant}{iteration}") for variant in ("baseline", "agency") for iteration in (0, 1)
    ]
    rows = [
        rows_of(variant, iteration, 50, "tokens_per_second", value, prompt=0)
        for variant, iteration, value in (
            ("baseline", 0, 10),
            ("baseline", 1, 10),
            ("agency", 0, 20),
            ("agency", 1, 40),
        )
    ]
    speed = observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS))["tokens_per_second"]
    pairs = speed.pairs("agency", "baseline")
    assert pairs["difference"].tolist() == pytest.approx([math.log(2), math.log(4)])
    assert speed.pairs("agency", "baseline") is pairs
    assert speed.pairs("baseline", "agency")["difference"].tolist() == pytest.approx([-math.log(2), -math.log(4)])


def test_an_interval_beyond_every_float_is_cut_and_no_error():
    """Both factors vary hardly more than the rest, so that there is about half a degree of freedom."""
    rows = [
        rows_of(variant, i, 50, "tokens_per_second", math.exp(sign * 20 * (1.01 * a + 1.01 * b + a * b)), prompt=p)
        for variant, sign in (("baseline", 0), ("agency", 1))
        for i, a in ((0, -1), (1, 1))
        for p, b in ((0, -1), (1, 1))
    ]
    entries = [(variant, i, 50, f"{variant}{i}") for variant in ("baseline", "agency") for i in (0, 1)]
    tables = observations(cells_of(entries), pd.DataFrame(rows, columns=COLUMNS))
    agency = summarize("tiny", tables).set_index("variant").loc["agency"]
    assert (agency["estimate"], agency["ci_low"], agency["ci_high"]) == pytest.approx((1.0, 0.0, math.exp(700)))
    change = contrast("tiny", tables).iloc[0]
    assert (change["ci_low"], change["ci_high"]) == pytest.approx((-100.0, 100 * math.exp(700)))
