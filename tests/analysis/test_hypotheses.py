"""The expectations and questions on synthetic tables whose answers are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from builders import answer, gain, noise, observed, run_of

from pruning_comparison.analysis.between_runs import RUN_COLUMNS, RunTables, compare_runs
from pruning_comparison.analysis.hypotheses import (
    CHAINS,
    HYPOTHESIS_COLUMNS,
    answer_hypotheses,
    answer_pruning,
    chains_of,
)
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.pairs import curve_area, slope_weights
from pruning_comparison.analysis.rankings import rank_methods, rank_variants
from pruning_comparison.analysis.relative import relative_to_dense
from pruning_comparison.analysis.tradeoffs import (
    EQUAL_COLUMNS,
    OPTIMUM_COLUMNS,
    optimal_levels,
    speed_at_equal_perplexity,
)
from pruning_comparison.analysis.verdict_rules import VERDICTS
from pruning_comparison.variants import DENSE


def answers(cells, measurements, **settings):
    return answer_hypotheses("tiny", *observed(cells, measurements), **settings)


def test_a_better_perplexity_is_supported_with_the_estimate_known_beforehand():
    row = answer(answers(*run_of(gain(-0.2))), "E2")
    expected = np.mean(
        [-0.2 + 0.01 * noise(level, i, d) for level in (40, 60, 80) for i in range(4) for d in range(10)]
    )
    assert row["estimate"] == pytest.approx(expected)
    assert row["ci_low"] < expected < row["ci_high"] < math.log(0.95)
    assert (row["verdict"], row["reason"]) == ("supported", "better")
    assert (row["n"], row["n_iterations"], row["n_clusters"], row["cluster"]) == (40, 4, 10, "document")
    assert (row["kind"], row["family"], row["contrast"]) == ("expectation", "m", "agency vs baseline")
    assert row["claim_low"] < row["ci_low"]
    assert row["ci_high"] < row["claim_high"] < math.log(0.95)


@pytest.mark.parametrize(
    ("effect", "verdict_", "reason"),
    [
        (0.2, "refuted", "worse"),
        (0.0, "no meaningful difference", "no difference"),
        (-0.03, "no meaningful difference", "no difference"),
    ],
)
def test_expectations_that_are_not_met(effect, verdict_, reason):
    row = answer(answers(*run_of(gain(effect))), "E2")
    assert (row["verdict"], row["reason"]) == (verdict_, reason)


def test_no_gain_beyond_the_margin_is_refuted_even_where_a_loss_is_open():
    def loss(variant, level, i, d):
        return level / 100 + ((0.03 + 0.03 * noise(4, i) + 0.005 * noise(level, i, d)) if variant == "agency" else 0)

    row = answer(answers(*run_of(loss)), "E2")
    assert math.log(0.95) < row["claim_low"] < 0
    assert row["claim_high"] > math.log(1.05)
    assert (row["verdict"], row["reason"]) == ("refuted", "no gain beyond the margin")


def test_an_effect_between_zero_and_the_margin_that_is_wide_stays_open_and_says_how_much_more_it_takes():
    def loss(variant, level, i, d):
        return level / 100 + ((-0.08 + 0.3 * noise(1, i) + 0.05 * noise(level, i, d)) if variant == "agency" else 0)

    row = answer(answers(*run_of(loss)), "E2")
    assert (row["verdict"], row["reason"]) == ("not enough data", "wide interval")
    assert row["more_iterations"] > 1
    assert math.isnan(row["more_clusters"])


def test_speed_and_latency_have_their_own_margins_and_directions():
    def faster(variant, level, i, p):
        return (0.1 + 0.005 * noise(level, i, p)) if variant == "agency" and level else 0.0

    table = answers(*run_of(gain(-0.2), speed=faster, latency=faster))
    assert answer(table, "E1")["verdict"] == "supported"
    assert answer(table, "E4")["reason"] == "worse"
    wide = answers(*run_of(gain(-0.2), speed=faster, latency=faster), margins=Margins(speed=0.2, latency=0.2))
    assert answer(wide, "E1")["reason"] == "no difference"
    assert answer(wide, "E4")["reason"] == "no difference"


def test_diversity_is_answered_at_every_temperature():
    def distinct(variant, level, i, p, t):
        lost = level / 200 * (0.5 if variant == "agency" and t == 1.0 else 1.0)
        return 0.9 - lost + (0.001 * noise(level, i, p) if level else 0)

    table = answers(*run_of(distinct=distinct))
    cool, warm = (answer(table, "E3", temperature=t) for t in (0.7, 1.0))
    # Distances shrink by half of 0.2, 0.3 and 0.4: a mean of 0.15. The noise is the same in both variants.
    assert warm["estimate"] == pytest.approx(-0.15, abs=1e-9)
    assert cool["estimate"] == 0


def test_slopes_are_per_ten_per_cent_of_the_heads():
    table = answers(*run_of(lambda variant, level, i, d: level / (200 if variant == "agency" else 100)))
    row = answer(table, "Q1")
    assert row["estimate"] == pytest.approx(-0.05)
    gained = answer(table, "Q4", metric="perplexity")
    assert gained["estimate"] == pytest.approx(0.05)
    assert gained["better"] == "higher"
    # The mean of 0.005 * level over levels 0 to 80 by trapezoids is 0.2.
    assert answer(table, "X:area")["estimate"] == pytest.approx(-0.2)
    assert answer(table, "X:area")["kind"] == "exploratory"


def test_temperature_interaction_by_hand():
    """At 0.7 agency's distance is the baseline's; at 1.0 it is lower by 0.01 per level: a slope of -0.1 per 10 %."""

    def judged(variant, level, i, p, t):
        less = 0.01 * level if variant == "agency" and t == 1.0 else 0.0
        return 4 + 0.02 * level - less + (0.02 * noise(level, i, p, variant == "agency", t * 10) if level else 0)

    row = answer(answers(*run_of(judged=judged)), "Q3")
    assert row["estimate"] == pytest.approx(-0.1, abs=0.01)
    assert (row["verdict"], row["reason"]) == ("supported", "better")


def test_effects_are_sorted_with_gains_first():
    def faster(variant, level, i, p):
        return (0.3 + 0.02 * noise(level, i, p)) if variant == "agency" and level else 0.0

    table = answers(*run_of(gain(-0.2, 0.1), speed=faster, latency=faster))
    rows = table[table["id"] == "Q5"]
    known = rows["estimate"].dropna().tolist()
    assert known == sorted(known, reverse=True)
    by_metric = rows.set_index("metric")["estimate"]
    assert by_metric["tokens_per_second"] > by_metric["perplexity"] > 0 > by_metric["first_token_latency_s"]


def test_models_that_are_the_same_count_once():
    cells, measurements = run_of(lambda v, level, i, d: level / 100 - (0.1 * level / 80 + 0.001 * d) * (v == "agency"))
    cells["fingerprint"] = np.where(cells["level"] == 0, "dense", cells["variant"] + cells["level"].astype(str))
    row = answer(answers(cells, measurements), "E2")
    assert (row["n_iterations"], row["n_clusters"], row["n"]) == (1, 10, 10)


def test_every_method_is_a_family_and_all_share_the_error_rate():
    one = run_of(gain(-0.2))
    two = run_of(gain(-0.2), method="n")
    both = [pd.concat(parts, ignore_index=True) for parts in zip(one, two, strict=True)]
    alone, together = answers(*one), answers(*both)
    assert set(together.loc[together["kind"] != "exploratory", "family"]) == {"m", "n"}
    first = answer(alone, "E2"), answer(together, "E2", method="m")
    # 2.25 % for the run, 85 % of it for answers, two fifths of that for quality; half of it for each of two methods.
    assert first[1]["claim_level"] == pytest.approx(first[0]["claim_level"] / 2)
    assert first[0]["claim_level"] == pytest.approx(0.0225 * 0.85 * 0.4)
    assert first[1]["p_holm"] == pytest.approx(2 * first[0]["p_holm"])


def test_a_run_that_is_looked_at_three_times_has_a_third_of_the_error_rate_at_each():
    tables = run_of(gain(-0.2))
    once, thrice = answer(answers(*tables), "E2"), answer(answers(*tables, looks=3), "E2")
    assert thrice["claim_level"] == pytest.approx(once["claim_level"] / 3)
    assert thrice["claim_low"] < once["claim_low"]


def test_answers_about_quality_are_one_chain_and_what_is_absent_is_skipped():
    names = [
        ("E1", "tokens_per_second"),
        ("Q1", "perplexity"),
        ("E2", "perplexity"),
        ("Q3", "x"),
        ("E3", "y"),
        ("E3", "y"),
    ]
    chains, weights = chains_of(names)
    assert chains == [[2, 1], [0], [3], [4], [5]]
    rest = 1 - sum(weight for weight, _ in CHAINS)
    assert weights == pytest.approx([0.4, 0.175, rest / 3, rest / 3, rest / 3])


def test_a_question_behind_an_open_one_of_its_chain_has_no_level_left():
    def loss(variant, level, i, d):
        return level / 100 + ((-0.08 + 0.3 * noise(1, i) + 0.05 * noise(level, i, d)) if variant == "agency" else 0)

    row = answer(answers(*run_of(loss)), "Q1")
    assert (row["claim_level"], row["verdict"]) == (0.0, "not enough data")
    assert math.isnan(row["claim_low"])


def test_pruning_itself_is_asked_about_for_each_variant():
    """Agency gains 0.002 of log speed a level: 0.04 to 0.16, a mean of 0.1. The baseline gains nothing."""

    def speed(variant, level, i, p):
        return (0.002 * level if variant == "agency" else 0.0) + 0.01 * p + (0.001 * noise(level, i, p) if level else 0)

    table = answer_pruning("tiny", *observed(*run_of(speed=speed)))
    agency, baseline = (answer(table, "P1", contrast=f"{name} vs dense") for name in ("agency", "baseline"))
    assert agency["estimate"] == pytest.approx(0.1, abs=0.001)
    assert (agency["verdict"], baseline["verdict"]) == ("supported", "no meaningful difference")
    assert (agency["kind"], agency["family"]) == ("pruning", "pruning")


def test_other_contrasts_are_exploratory():
    cells, measurements = run_of(gain(-0.2), variants=("baseline-progressive", "agency"))
    table = answers(cells, measurements, reference="baseline-progressive")
    assert set(table["kind"]) == {"exploratory"}
    assert answer(table, "E2")["contrast"] == "agency vs baseline-progressive"
    assert answers(cells, measurements).empty


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"iterations": 1, "documents": 1}, "E2", "too little data"),
        ({"levels": (0.0,)}, "E2", "too little data"),
        ({"levels": (0.0,)}, "Q1", "too little data"),
        ({"levels": (0.0, 20.0)}, "E2", "too little data"),
        ({"levels": (0.0, 20.0)}, "E1p", "no perplexity that both reach"),
        ({"temperatures": (1.0,)}, "Q3", "too little data"),
        ({"temperatures": ()}, "E3", "missing"),
    ],
)
def test_too_little_data_is_an_answer(settings, name, reason):
    flat = {"loss": lambda *place: 0.0} if reason.startswith("no perp") else {}
    row = answer(answers(*run_of(**flat, **settings)), name)
    assert (row["verdict"], row["reason"]) == ("not enough data", reason)


def test_losses_that_are_missing_are_not_taken_for_chance():
    cells, measurements = run_of(gain(-0.2))
    lost = (measurements["metric"] == "window_nats") & (measurements["variant"] == "agency")
    lost &= (measurements["level"] == 80) & measurements["document"].isin(["d1", "d2", "d3", "d4"])
    measurements.loc[lost, "value"] = math.nan
    row = answer(answers(cells, measurements), "E2")
    assert (row["verdict"], row["reason"], row["n_clusters"]) == ("not enough data", "missing", 6)


def test_a_failed_level_is_missing_and_the_rest_is_shown():
    cells, measurements = run_of(gain(-0.2))
    gone = (cells["variant"] == "agency") & (cells["level"] == 80)
    cells.loc[gone, "status"] = "failed"
    measurements = measurements[~((measurements["variant"] == "agency") & (measurements["level"] == 80))]
    row = answer(answers(cells, measurements), "E2")
    assert (row["verdict"], row["reason"]) == ("not enough data", "missing")
    assert row["estimate"] == pytest.approx(-0.2, abs=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_holes_anywhere_never_stop_the_answers(seed):
    generator = np.random.default_rng(seed)
    cells, measurements = run_of(gain(-0.1), iterations=2, documents=3, prompts=2)
    measurements = measurements[generator.random(len(measurements)) > 0.3 * generator.random()].copy()
    measurements.loc[generator.random(len(measurements)) < 0.2 * generator.random(), "value"] = math.nan
    cells.loc[generator.random(len(cells)) < 0.3 * generator.random(), "status"] = "failed"
    table = answers(cells, measurements)
    assert tuple(table.columns) == HYPOTHESIS_COLUMNS
    assert set(table["verdict"]) <= set(VERDICTS)
    assert (table["reason"] != "").all()
    assert set(relative_to_dense("tiny", observed(cells, measurements)[1])["change"]) <= {"higher", "lower", "unclear"}
    for rank in (rank_methods, rank_variants):
        rank("tiny", observed(cells, measurements)[1])
    optimal_levels("tiny", *observed(cells, measurements))
    speed_at_equal_perplexity("tiny", *observed(cells, measurements))
    compare_runs(RunTables("a", "tiny", cells, measurements), RunTables("b", "tiny", cells, measurements))


def test_answers_to_nothing_measured():
    cells, measurements = run_of()
    table = answers(cells, measurements.iloc[:0])
    assert set(table["verdict"]) == {"not enough data"}


def test_same_tables_same_answers():
    tables = run_of(gain(-0.2))
    pd.testing.assert_frame_equal(answers(*tables), answers(*tables))


def test_margins_are_shares():
    with pytest.raises(ValueError, match="speed is 2"):
        Margins(speed=2)


# Curves


def test_area_and_slope_of_a_curve_by_hand():
    levels = np.array([0.0, 20.0, 60.0])
    assert curve_area(levels, np.array([0.0, 1.0, 3.0])) == pytest.approx((20 * 0.5 + 40 * 2) / 60)
    assert (0.03 * levels + 1) @ slope_weights(levels) == pytest.approx(0.3)


def test_speed_at_equal_perplexity_by_hand():
    """Log perplexity 0.01 a level for the baseline, 0.005 for agency; log speed 0.002 a level for both.

    Both reach 0.4. Targets 0.1 to 0.4: levels 10 to 40 for the baseline, 20 to 80 for agency, so 0.02 to 0.08 faster.
    """
    tables = run_of(
        lambda variant, level, i, d: level * (0.005 if variant == "agency" else 0.01) + 0.01 * d,
        speed=lambda variant, level, i, p: 0.002 * level + 0.01 * p,
    )
    table = speed_at_equal_perplexity("tiny", *observed(*tables))
    assert tuple(table.columns) == EQUAL_COLUMNS
    assert table["baseline_level"].tolist() == pytest.approx([10, 20, 30, 40])
    assert table["agency_level"].tolist() == pytest.approx([20, 40, 60, 80])
    assert np.log(table["speed_ratio"]).tolist() == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert np.log(table["perplexity"]).tolist() == pytest.approx([4.145, 4.245, 4.345, 4.445])
    row = answer(answers(*tables), "E1p")
    assert row["estimate"] == pytest.approx(0.05)


def test_drift_between_levels_falls_out_where_the_dense_model_is_timed_beside_them():
    """Log speed 0.002 a level over dense, as above, while the machine slows or speeds by up to 1 from level to level."""

    def loss(variant, level, i, d):
        return level * (0.005 if variant == "agency" else 0.01) + 0.01 * d

    def speed(variant, level, i, p):
        return noise(level, i) + (0.0 if variant == DENSE else 0.002 * level) + 0.01 * p

    cells, measurements = run_of(loss, speed=speed, variants=("baseline", "agency", DENSE))
    # As in a journal: the dense model is timed beside pruned ones alone, since at level 0 each variant is that model.
    timed = measurements["metric"].isin(["tokens_per_second", "first_token_latency_s"]) & (measurements["level"] > 0)
    measurements = measurements[timed | (measurements["variant"] != DENSE)]
    row = answer(answers(cells[cells["variant"] != DENSE], measurements), "E1p")
    assert row["estimate"] == pytest.approx(0.05)
    assert row["ci_high"] - row["ci_low"] < 1e-9
    alone = answer(answers(cells[cells["variant"] != DENSE], measurements[measurements["variant"] != DENSE]), "E1p")
    assert alone["ci_high"] - alone["ci_low"] > 0.5


def test_interval_of_speed_at_equal_perplexity_widens_with_what_varies():
    def speed(variant, level, i, p):
        return 0.002 * level + 0.1 * noise(i, variant == "agency")

    def loss(variant, level, i, d):
        return level * (0.005 if variant == "agency" else 0.01)

    still = answer(answers(*run_of(loss, speed=lambda v, level, i, p: 0.002 * level)), "E1p")
    row = answer(answers(*run_of(loss, speed=speed)), "E1p")
    assert still["ci_high"] - still["ci_low"] < 1e-9
    # The mean of four iterations' differences: Student's interval with three degrees of freedom.
    differences = [0.1 * (noise(i, True) - noise(i, False)) for i in range(4)]
    half = 3.182446 * np.std(differences, ddof=1) / 2
    assert row["ci_high"] - row["ci_low"] == pytest.approx(2 * half, rel=1e-3)


def test_optimal_level_is_the_last_one_within_the_tolerance():
    """Losses of 0.001 a level: 0.04 at 40 is below log 1.05 = 0.0488, 0.06 at 60 is not."""
    tables = run_of(
        lambda variant, level, i, d: 0.001 * level + (0.002 * noise(level, i, d) if level else 0),
        speed=lambda variant, level, i, p: {0: 0.0, 20: 0.3, 40: 0.4, 60: 0.42, 80: 0.43}[level],
    )
    table = optimal_levels("tiny", *observed(*tables))
    assert tuple(table.columns) == OPTIMUM_COLUMNS
    assert table["highest_level"].tolist() == [40, 40]
    assert (table["share"] > 0.95).all()
    # Shares of speed less shares of loss: 0.70 - 0.25, 0.93 - 0.50, 0.98 - 0.75, 0.
    assert table["knee_level"].tolist() == [20, 20]
    assert optimal_levels("tiny", *observed(*tables), margins=Margins(tolerance=0.01))["highest_level"].tolist() == [
        0,
        0,
    ]


def test_search_for_the_optimal_level_ends_at_a_level_without_data():
    cells, measurements = run_of(lambda variant, level, i, d: 0.0001 * level * (1 + 0.1 * noise(level, i, d)))
    measurements = measurements[measurements["level"] != 60]
    row = optimal_levels("tiny", *observed(cells, measurements)).iloc[0]
    assert (row["highest_level"], row["levels"], row["reason"]) == (40, "0,20,40", "missing from level 60 on")


# Two runs


def test_two_runs_are_paired_where_they_can_be():
    first = RunTables("here", "tiny", *run_of(lambda v, level, i, d: level / 100 + d / 10))
    second = RunTables(
        "there", "tiny", *run_of(lambda v, level, i, d: level / 100 + d / 10 - 0.2 + 0.01 * noise(level, i, d))
    )
    table = compare_runs(first, second)
    assert tuple(table.columns) == RUN_COLUMNS
    row = table[(table["metric"] == "perplexity") & (table["variant"] == "agency") & (table["level"] == 40)].iloc[0]
    assert row["estimate"] == pytest.approx(-0.2, abs=0.005)
    assert row["contrast"] == "there vs here"
    assert row["ci_high"] - row["ci_low"] < 0.01
    assert (row["kind"], row["reason"]) == ("exploratory", "better")


def test_runs_without_a_common_document_are_compared_by_their_means():
    cells, measurements = run_of(lambda v, level, i, d: level / 100 + 0.1 * noise(i, d))
    other = measurements.assign(document=measurements["document"].map({f"d{d}": f"e{d}" for d in range(10)}))
    table = compare_runs(RunTables("a", "x", cells, measurements), RunTables("b", "x", cells, other))
    row = table[(table["metric"] == "bits_per_byte") & (table["variant"] == "agency") & (table["level"] == 40)].iloc[0]
    assert row["estimate"] == pytest.approx(0)
    assert row["ci_high"] > 0.001
    assert "Welch" in row["test"]


def test_perplexity_is_not_compared_across_tokenizers():
    cells, measurements = run_of(iterations=2, documents=3, prompts=2)
    tokens = measurements["metric"] == "window_tokens"
    other = measurements.assign(value=measurements["value"].where(~tokens, 90))
    table = compare_runs(RunTables("a", "x", cells, measurements), RunTables("b", "y", cells, other))
    assert "perplexity" not in set(table["metric"])
    assert "bits_per_byte" in set(table["metric"])


def test_runs_of_other_methods_are_compared_all_the_same():
    one, two = run_of(iterations=2, documents=3, prompts=2), run_of(iterations=2, documents=3, prompts=2, method="n")
    table = compare_runs(RunTables("a", "x", *one), RunTables("b", "x", *two))
    assert set(table["method"]) == {"n vs m"}
