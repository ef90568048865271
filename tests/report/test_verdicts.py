"""Each verdict's sentence says what the verdict, its interval and its margin allow, and nothing beyond."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.analysis.questions import QUESTIONS
from pruning_comparison.report.verdicts import (
    Verdict,
    exploratory_findings,
    interval_shown,
    part_findings,
    shown,
    verdicts,
)

NAN = math.nan
LOG = math.log
OPTIMUM = [
    "model", "method", "variant", "highest_level", "tolerance", "share", "knee_level", "levels", "n", "n_iterations",
    "n_clusters", "reason",
]  # fmt: skip
PLACES = {
    "E1": ("tokens_per_second", "log_ratio", 0.02, "higher"),
    "E1p": ("tokens_per_second", "log_ratio", 0.02, "higher"),
    "E2": ("perplexity", "log_ratio", 0.05, "lower"),
    "E3": ("distinct_2_distance", "difference", 0.02, "lower"),
    "E4": ("first_token_latency_s", "log_ratio", 0.02, "lower"),
    "Q1": ("perplexity", "slope", NAN, "lower"),
    "Q3": ("generation_perplexity_distance", "slope", NAN, "lower"),
    "Q4": ("perplexity", "slope", NAN, "higher"),
    "Q5": ("perplexity", "standardised", NAN, "higher"),
    "P1": ("tokens_per_second", "log_ratio", 0.02, "higher"),
}


_REASONS = {
    "supported": "better", "answered": "better", "refuted": "worse", "no meaningful difference": "no difference",
    "not enough data": "wide interval",
}  # fmt: skip


def answer(name, verdict, estimate=NAN, low=NAN, high=NAN, **other):
    """A row of answers. Estimates of ratios are logarithms."""
    metric, scale, margin, better = PLACES[name]
    metric = other.pop("metric", metric)
    unit = "log ratio" if scale == "log_ratio" else "1"
    if scale == "slope":
        unit = "log ratio per 10 % of heads" if metric == "perplexity" else "per 10 % of heads"
    row = {
        "model": "tiny", "method": "entropy", "temperature": NAN, "id": name,
        "kind": "expectation" if name.startswith("E") else "question", "family": "expectations",
        "contrast": "agency vs baseline", "metric": metric, "estimand": "mean", "scale": scale,
        "estimate": estimate, "ci_low": low, "ci_high": high, "unit": unit, "n": 15, "n_iterations": 3, "n_clusters": 5,
        "cluster": "document" if metric == "perplexity" else "prompt", "p": 0.01, "p_holm": 0.02,
        "test": "crossed random effects", "claim_low": low, "claim_high": high, "claim_level": 0.01,
        "effect_size": -1.0, "effect_size_low": -2.0, "effect_size_high": -0.5,
        "effect_size_name": "standardised paired difference", "margin": margin, "better": better, "verdict": verdict,
        "reason": _REASONS[verdict],
        "more_iterations": NAN, "more_clusters": NAN,
    }  # fmt: skip
    return {**row, **other}


def told(*rows, optimal=()) -> list[Verdict]:
    return verdicts(pd.DataFrame(list(rows)), pd.DataFrame(list(optimal), columns=OPTIMUM))


def one(row, name=None) -> Verdict:
    (found,) = [verdict for verdict in told(row) if verdict.id == (name or row["id"])]
    return found


# Expectations: each of the four verdicts


def test_supported_states_size_interval_levels_and_method():
    found = one(answer("E2", "supported", LOG(0.65), LOG(0.60), LOG(0.70)))
    assert found.verdict == "supported"
    assert found.title == "Quality"
    assert found.sentence == (
        "With 40 % of the heads or more pruned by entropy, agency's perplexity is 35 % lower than the baseline's "
        "(95 % interval: 30 to 40 % lower)."
    )


def test_refuted_because_worse_says_so_plainly():
    found = one(answer("E4", "refuted", LOG(1.10), LOG(1.05), LOG(1.15)))
    assert found.verdict == "refuted"
    assert found.sentence == (
        "With heads pruned by entropy, agency's wait for the first token is 10 % longer than the baseline's "
        "(95 % interval: 5 to 15 % longer). This is the opposite of what was expected."
    )


def test_refuted_because_no_gain_is_left_says_what_is_ruled_out():
    found = one(answer("E1", "refuted", LOG(0.99), LOG(0.96), LOG(1.012), reason="no gain beyond the margin"))
    assert found.sentence == (
        "With heads pruned by entropy, agency generates text 1 % slower than the baseline (95 % interval: 4 % slower to "
        "1.2 % faster), so that a gain of more than 2 % is ruled out. The expectation is not met."
    )


def test_no_meaningful_difference_says_what_counts_as_none():
    found = one(answer("E1", "no meaningful difference", LOG(1.001), LOG(0.99), LOG(1.012)))
    assert found.verdict == "no meaningful difference"
    assert found.sentence == (
        "With heads pruned by entropy, agency and the baseline differ by too little to matter (95 % interval: 1 % slower "
        "to 1.2 % faster; less than ±2 % counts as no difference). The expectation is not met."
    )


def test_not_enough_data_claims_nothing_and_says_how_much_would_settle_it():
    found = one(
        answer("E2", "not enough data", LOG(0.97), LOG(0.88), LOG(1.07), more_iterations=6.0, more_clusters=35.0),
    )
    assert found.verdict == "not enough data"
    assert found.sentence == (
        "Not enough data. With 40 % of the heads or more pruned by entropy, agency's perplexity is 3 % lower than "
        "the baseline's in this sample (95 % interval: 12 % lower to 7 % higher). "
        "About 6 more iterations or 35 more documents would settle it, if the difference is as large as it looks now."
    )


def test_no_difference_at_all_is_no_range():
    found = one(answer("E3", "not enough data", 0.0, 0.0, 0.0))
    assert (
        "agency and the baseline do not differ at all in this sample, which would be clear on its own" in found.sentence
    )


def test_what_no_number_of_one_kind_would_settle_is_said():
    found = one(answer("E2", "not enough data", LOG(0.97), LOG(0.88), LOG(1.07)))
    assert found.sentence.endswith(
        "More iterations alone, or more documents alone, would not settle it, but more of both might."
    )
    single = one(answer("E1", "not enough data", LOG(1.1), LOG(0.9), LOG(1.4), more_iterations=1.0))
    assert "About 1 more iteration would settle it" in single.sentence


def test_an_interval_that_would_decide_on_its_own_says_why_it_is_open_all_the_same():
    """Gains have to be beyond +2 %: 3 to 15 % is, 1 to 5 % is not, and a distance of -0.01 to 0.012 is short of -0.02."""
    corrected = one(answer("E1", "not enough data", LOG(1.09), LOG(1.03), LOG(1.15)))
    assert "(95 % interval: 3 to 15 % faster), which would be clear on its own, but not after" in corrected.sentence
    small = one(answer("E1", "not enough data", LOG(1.03), LOG(1.01), LOG(1.05)))
    assert "(95 % interval: 1 to 5 % faster), and a gain has to be more than 2 % to count." in small.sentence
    inside = one(answer("E3", "not enough data", 0.001, -0.01, 0.012))
    assert "which would be clear on its own" in inside.sentence
    wide = one(answer("E1", "not enough data", LOG(1.03), LOG(0.9), LOG(1.2)))
    assert "20 % faster). " in wide.sentence
    question = one(answer("Q1", "not enough data", LOG(0.97), LOG(0.95), LOG(0.99)))
    assert "which would be clear on its own" in question.sentence


def test_no_change_in_per_cent_has_more_than_three_digits():
    found = one(answer("E1", "supported", LOG(1567.66), LOG(12.0), LOG(3000.0)))
    assert "agency generates text more than 999 % faster than the baseline" in found.sentence
    assert "(95 % interval: more than 999 to more than 999 % faster)" in found.sentence


@pytest.mark.parametrize(("count", "words"), [(9.0, "9"), (47.0, "47"), (347.0, "350"), (2188.0, "2,200")])
def test_large_estimates_of_what_is_needed_are_rounded(count, words):
    found = one(answer("E1", "not enough data", LOG(1.03), LOG(0.9), LOG(1.2), more_iterations=count))
    assert f"About {words} more iterations would settle it" in found.sentence


def test_too_little_data_and_missing_data_are_told_apart():
    little = one(answer("E1", "not enough data", LOG(1.5), reason="too little data"))
    assert little.sentence == (
        "Not enough data. With heads pruned by entropy, agency generates text 50 % faster than the baseline in "
        "this sample, but there is too little data for an interval."
    )
    missing = one(answer("E1", "not enough data", reason="missing"))
    assert missing.sentence == "This was not measured."
    reason = one(answer("E1p", "not enough data", reason="no perplexity that both reach"))
    assert reason.sentence == "This was not measured (no perplexity that both reach)."


def test_distances_are_absolute_and_name_their_temperature():
    rows = [
        answer("E3", "supported", -0.05, -0.07, -0.03, temperature=0.7),
        answer("E3", "not enough data", -0.01, -0.04, 0.02, temperature=1.0),
    ]
    first, second = [verdict for verdict in told(*rows) if verdict.id == "E3"]
    assert (first.about, second.about) == ("temperature 0.7", "temperature 1")
    assert first.sentence == (
        "With 40 % of the heads or more pruned by entropy at temperature 0.7, the distance of agency's diversity "
        "(distinct-2) from the unpruned model's is 0.05 smaller than the baseline's (95 % interval: 0.03 to 0.07 smaller)."
    )
    assert "at temperature 1, " in second.sentence
    assert "(95 % interval: 0.04 smaller to 0.02 larger)" in second.sentence


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["E1", "E1p", "E2", "E3", "E4", "Q1"]),
    verdict=st.sampled_from(["supported", "refuted", "no meaningful difference", "not enough data"]),
    low=st.floats(-0.5, 0.5),
    width=st.floats(0.001, 0.5),
    reason=st.sampled_from(["better", "worse", "no difference", "no gain beyond the margin", "wide interval"]),
)
def test_nothing_is_claimed_beyond_the_verdict(name, verdict, low, width, reason):
    row = answer(name, verdict, low + width / 2, low, low + width, reason=reason)
    found = one(row)
    assert found.verdict == verdict
    assert found.sentence.startswith("Not enough data. ") == (verdict == "not enough data")
    assert ("in this sample" in found.sentence) == (verdict == "not enough data")
    met = "The expectation is not met." in found.sentence or "opposite of what was expected" in found.sentence
    assert met == (verdict in ("refuted", "no meaningful difference") and name != "Q1")
    assert ("too little to matter" in found.sentence) == (verdict == "no meaningful difference")


# Questions


def test_resilience_is_a_change_for_every_further_ten_per_cent():
    supported = one(answer("Q1", "supported", LOG(0.97), LOG(0.95), LOG(0.99)))
    assert supported.sentence == (
        "With heads pruned by entropy, every further 10 % makes agency's perplexity 3 % lower relative to the baseline's "
        "(95 % interval: 1 to 5 % lower)."
    )
    refuted = one(answer("Q1", "refuted", LOG(1.03), LOG(1.01), LOG(1.05)))
    assert refuted.sentence.endswith("So agency is less resilient here, not more.")


def test_optimal_level_is_reported_for_each_variant():
    rows = [
        ("tiny", "entropy", "baseline", 0.0, 0.05, 0.98, 40.0, 5, 15, 3, 5, ""),
        ("tiny", "entropy", "agency", 20.0, 0.05, 0.75, 60.0, 5, 15, 3, 5, ""),
    ]
    (found,) = [v for v in told(answer("E2", "not enough data", 0.0, -1.0, 1.0), optimal=rows) if v.id == "Q2"]
    assert found.verdict == "answered"
    assert found.sentence == (
        "The highest safe level, at which the upper end of perplexity's 95 % interval is at most 5 % above the unpruned "
        "model's, is 20 % for agency and none of the levels above 0 for the baseline. Resampling the data leads to the same "
        "level in 98 % for the baseline and 75 % for agency. "
        "The best trade of speed for quality (the knee) is at 40 % for the baseline and "
        "60 % for agency."
    )


def test_an_optimal_level_that_is_not_known_is_not_enough_data():
    rows = [("tiny", "entropy", "agency", NAN, 0.05, NAN, NAN, 2, 1, 1, 1, "too little data")]
    (found,) = [v for v in told(answer("E2", "not enough data"), optimal=rows) if v.id == "Q2"]
    assert found.verdict == "not enough data"


def test_temperature_names_the_direction_and_claims_it_only_when_supported():
    better = one(answer("Q3", "supported", -0.2, -0.3, -0.1))
    assert "agency does better against the baseline at the higher temperature than at the lower" in better.sentence
    worse = one(answer("Q3", "supported", 0.2, 0.1, 0.3, reason="worse"))
    assert "agency does worse against the baseline at the higher temperature" in worse.sentence
    open_one = one(answer("Q3", "not enough data", 0.2, -0.1, 0.5, more_clusters=4.0))
    assert open_one.sentence.startswith("Not enough data. In this sample, ")
    assert "About 4 more prompts would settle it" in open_one.sentence
    assert "on its own" not in open_one.sentence
    corrected = one(answer("Q3", "not enough data", 0.2, 0.1, 0.3))
    assert "which would be clear on its own" in corrected.sentence
    alone = one(answer("Q3", "not enough data", reason="too little data"))
    assert alone.sentence == "It takes two temperatures to answer this."


def test_which_metrics_is_answered_in_one_list_from_gains_to_losses():
    rows = [
        answer("Q5", "answered", 2.5, 2.0, 3.0),
        answer("Q5", "answered", 0.8, 0.4, 1.2, metric="distinct_2_distance"),
        answer("Q5", "answered", -1.5, -2.0, -1.0, metric="tokens_per_second", reason="worse"),
        answer("Q5", "not enough data", 0.1, -0.3, 0.5, metric="first_token_latency_s", more_iterations=12.0),
        answer("Q5", "not enough data", metric="peak_memory_bytes"),
    ]
    (found,) = [verdict for verdict in told(*rows) if verdict.id == "Q5"]
    assert found.verdict == "answered"
    assert found.sentence == (
        "Agency does better than the baseline, the largest effect first, in perplexity (2.5 standard deviations) and "
        "diversity (0.8 standard deviations). It does worse in speed (−1.5 standard deviations). It is unclear for "
        "first-token latency (about 12 more iterations) and peak memory (not measured)."
    )
    (unclear,) = [verdict for verdict in told(rows[3]) if verdict.id == "Q5"]
    assert unclear.verdict == "not enough data"


def test_whether_pruning_makes_the_model_faster_is_answered_for_each_variant():
    rows = [
        answer("P1", "supported", LOG(1.2), LOG(1.1), LOG(1.3), kind="pruning", contrast="agency vs dense"),
        answer("P1", "refuted", LOG(0.8), LOG(0.7), LOG(0.9), kind="pruning", contrast="baseline vs dense"),
    ]
    found = [verdict for verdict in told(*rows) if verdict.id == "P1"]
    assert [(verdict.about, verdict.verdict) for verdict in found] == [("agency", "supported"), ("baseline", "refuted")]
    assert found[0].sentence == (
        "With heads pruned by entropy, the agency model generates text 20 % faster than the unpruned model (95 % interval: "
        "10 to 30 % faster)."
    )
    assert found[1].sentence.endswith("20 % slower than the unpruned model (95 % interval: 10 to 30 % slower).")
    assert [verdict.id for verdict in told(rows[0])].count("E2") == 1


def test_tight_resources_metric_by_metric():
    rows = [
        answer("Q4", "supported", LOG(1.04), LOG(1.02), LOG(1.06)),
        answer("Q4", "refuted", LOG(0.98), LOG(0.97), LOG(0.99), metric="tokens_per_second", unit="log ratio per 10 %"),
    ]
    found = [verdict for verdict in told(*rows) if verdict.id == "Q4"]
    assert [verdict.sentence for verdict in found] == [
        "The more is pruned, the larger agency's gain is in perplexity (+4 % for every further 10 %).",
        "The more is pruned, the smaller agency's gain is, or the larger its loss, in speed "
        "(−2 % for every further 10 %).",
    ]


# What the whole is about


def test_all_nine_are_answered_in_order_and_what_is_absent_was_not_measured():
    found = told(answer("E2", "supported", LOG(0.65), LOG(0.60), LOG(0.70)))
    assert [verdict.id for verdict in found] == ["E1", "E2", "E3", "E4", "Q1", "Q2", "Q3", "Q4", "Q5"]
    assert [verdict.verdict for verdict in found].count("not enough data") == 8
    assert all(verdict.sentence == "This was not measured." for verdict in found if verdict.id != "E2")
    assert list(QUESTIONS) == ["E1", "E1p", "E2", "E3", "E4", "Q1", "Q2", "Q3", "Q4", "Q5", "P1", "P2"]


def test_methods_and_models_are_named_where_there_are_several():
    rows = [
        answer("E2", "supported", LOG(0.6), LOG(0.5), LOG(0.7), method=method, model=model)
        for model in ("one", "two")
        for method in ("entropy", "random")
    ]
    found = [verdict for verdict in told(*rows) if verdict.id == "E2"]
    assert [verdict.about for verdict in found] == ["one, entropy", "one, random", "two, entropy", "two, random"]
    assert "pruned by random, " in found[1].sentence
    assert one(rows[0]).about == ""


def test_no_answers_give_no_verdicts():
    empty = pd.DataFrame(columns=list(answer("E1", "supported")))
    assert verdicts(empty, pd.DataFrame(columns=OPTIMUM)) == []
    assert exploratory_findings(empty) == []


# Other variants


def test_other_contrasts_are_hints_apart_from_the_verdicts():
    contrast = {"kind": "exploratory", "contrast": "agency vs baseline-progressive"}
    rows = [
        answer("E2", "supported", LOG(0.8), LOG(0.75), LOG(0.85), **contrast),
        answer("E1", "not enough data", LOG(1.01), LOG(0.95), LOG(1.07), **contrast),
        answer("E3", "not enough data", 0.0, -0.1, 0.1, temperature=0.7, **contrast),
        answer("E3", "not enough data", 0.0, -0.1, 0.1, temperature=1.0, **contrast),
    ]
    table = pd.DataFrame(rows)
    assert verdicts(table, pd.DataFrame(columns=OPTIMUM)) == []
    (found,) = exploratory_findings(table)
    assert found.heading == "entropy: agency against baseline-progressive (exploratory)"
    assert found.sentence == (
        "Not asked beforehand, so these are hints, not verdicts. With 40 % of the heads or more pruned by entropy, "
        "agency's perplexity is 20 % lower than baseline-progressive's (95 % interval: 15 to 25 % lower). "
        "There is not enough data about speed and diversity."
    )
    assert "quality: −20 % [−25 % to −15 %], n = 15" in found.evidence


def test_each_part_of_agency_is_told_by_the_variant_that_lacks_it():
    def against(variant, *rest, **other):
        return answer("E2", *rest, kind="exploratory", contrast=f"agency vs {variant}", **other)

    rows = [
        against("agency-always-yes", "supported", LOG(0.8), LOG(0.75), LOG(0.85)),
        against("agency-heeds-states", "no meaningful difference", LOG(0.99), LOG(0.98), LOG(1.0)),
        against("agency-adaptation", "refuted", LOG(1.2), LOG(1.1), LOG(1.3)),
        against("agency-selection", "not enough data", LOG(0.9), LOG(0.7), LOG(1.2)),
        answer("E2", "supported", LOG(0.5), LOG(0.4), LOG(0.6)),
    ]
    (found,) = part_findings(pd.DataFrame(rows))
    assert found.heading == "entropy: what each part of agency brings"
    assert found.sentence == (
        "With 40 % of the heads or more pruned by entropy, perplexity shows what each part brings (hints, not verdicts). "
        "Asking heads does harm: agency's perplexity is 20 % higher than where the baseline's heads leave "
        "and the survivors adapt all the same (95 % interval: 10 to 30 % higher). "
        "Adapted weights: not enough data; in this sample agency's perplexity is 10 % lower than where the same "
        "heads leave and the weights stay as they were. "
        "Consent helps: agency's perplexity is 20 % lower than where nobody may refuse (95 % interval: 15 to 25 % lower). "
        "Leaving the heads' states out of their answers brings nothing that matters: agency's perplexity is 1 % lower than "
        "where misaligned heads are asked first and overloaded ones refuse sooner (95 % interval: 0 to 2 % lower), and less "
        "than ±5 % does not count."
    )
    assert "agency-heeds-states: −1 % [−2 % to 0 %], n = 15" in found.evidence
    assert part_findings(pd.DataFrame(rows[-1:])) == []


# Figures


@pytest.mark.parametrize(
    ("row", "estimate", "interval", "margin"),
    [
        (answer("E2", "supported", LOG(0.65), LOG(0.6), LOG(0.7)), "−35 %", "−40 % to −30 %", "±5 %"),
        (answer("E3", "supported", -0.05, -0.07, -0.03), "−0.05", "−0.07 to −0.03", "±0.02"),
        (answer("Q1", "refuted", LOG(1.03), LOG(1.01), LOG(1.05)), "+3 %", "+1 % to +5 %", None),
        (answer("Q5", "supported", 2.5, 2.0, 3.0), "+2.5", "+2 to +3", None),
        (answer("E1", "not enough data", LOG(1.5)), "+50 %", "no interval", "±2 %"),
    ],
)
def test_figures_as_the_expert_table_shows_them(row, estimate, interval, margin):
    assert shown(row, "estimate") == estimate
    assert interval_shown(row) == interval
    if margin is not None:
        assert shown(row, "margin") == margin
