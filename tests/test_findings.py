"""The sentences claim what the intervals allow, for and against agency alike, and nothing more."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.findings import Finding, interval_with_unit, plain_findings, plain_number, with_unit
from pruning_comparison.measure.metrics import METRICS

NAN = math.nan
SUMMARY = ["model", "variant", "method", "level", "temperature", "metric", "estimate", "ci_low", "ci_high", "n", "unit"]
CONTRASTS = [
    "model", "method", "level", "temperature", "metric", "contrast",
    "estimate", "ci_low", "ci_high", "n", "unit", "better",
]  # fmt: skip
CELLS = [
    "model",
    "variant",
    "method",
    "iteration",
    "level",
    "achieved_level",
    "heads_pruned",
    "heads_total",
    "status",
    "reason",
]


def estimate(metric, variant, level, value, low=NAN, high=NAN, *, t=NAN, n=15):
    return ("tiny", variant, "entropy", float(level), t, metric, value, low, high, n, METRICS[metric].unit)


def contrast(metric, level, value, low=NAN, high=NAN, *, t=NAN, n=15, unit="%"):
    better = METRICS[metric].better
    return ("tiny", "entropy", float(level), t, metric, "agency vs baseline", value, low, high, n, unit, better)


def findings(*, estimates=(), contrasts=(), cells=(), manifest=None) -> list[Finding]:
    rows = list(estimates) or [estimate("perplexity", "agency", 0, 30.0)]
    return plain_findings(
        pd.DataFrame(rows, columns=SUMMARY),
        pd.DataFrame(list(contrasts), columns=CONTRASTS),
        pd.DataFrame(list(cells), columns=CELLS),
        manifest or {},
    )


def one(heading: str, **tables) -> Finding:
    (found,) = [finding for finding in findings(**tables) if heading in finding.heading]
    return found


# What pruning does to the baseline


def test_baseline_perplexity_from_level_0_to_each_level():
    found = one(
        "what pruning does to the baseline",
        estimates=[
            estimate("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "baseline", 10, 31.5, 29.0, 34.0),
            estimate("perplexity", "baseline", 50, 90.0, 80.0, 101.0),
        ],
    )
    assert (
        "is 30. With heads pruned by entropy it is 31.5 at 10 % (1.05 times) and 90 at 50 % (3 times)."
        in found.sentence
    )
    assert "At 10 % the interval overlaps that of level 0, so by these intervals the data do not tell" in found.sentence
    assert "at 50 %: 90 [80 to 101], n = 15" in found.evidence


def test_without_level_0_nothing_is_said_about_change():
    found = one(
        "what pruning does to the baseline", estimates=[estimate("perplexity", "baseline", 50, 90.0, 80.0, 101.0)]
    )
    assert "Level 0 was not measured, so the data do not tell what pruning changed." in found.sentence
    assert "times" not in found.sentence


def test_one_observation_is_called_that():
    found = one(
        "what pruning does to the baseline",
        estimates=[estimate("perplexity", "baseline", 0, 30.0, n=1), estimate("perplexity", "baseline", 50, 90.0, n=1)],
    )
    assert "one observation, no interval" in found.sentence


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_level_without_a_figure_is_named(value):
    found = one(
        "what pruning does to the baseline",
        estimates=[
            estimate("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "baseline", 50, value),
        ],
    )
    assert "It is missing at 50 %." in found.sentence


# Agency beside the baseline


def test_lower_higher_and_unclear_levels_are_told_apart():
    found = one(
        "quality, agency beside baseline",
        contrasts=[
            contrast("perplexity", 10, 3.0, 1.0, 5.0),
            contrast("perplexity", 20, -1.0, -4.0, 2.0),
            contrast("perplexity", 40, -35.2, -40.0, -30.0),
        ],
    )
    assert found.sentence == (
        "Agency's perplexity is lower than the baseline's at 40 % (by 35.2 %), which is better; "
        "agency's perplexity is higher than the baseline's at 10 % (by 3 %), which is worse; "
        "the data do not tell whether agency's perplexity differs from the baseline's at 20 %. "
        "This goes against the expectation that agency is better."
    )
    assert "at 40 %: −35.2 % [−40 to −30 %], n = 15" in found.evidence


def test_speed_and_latency_know_which_way_is_better():
    slower = one("speed, agency beside baseline", contrasts=[contrast("tokens_per_second", 50, -8.0, -12.0, -4.0)])
    assert "agency's speed is lower than the baseline's at 50 % (by 8 %), which is worse" in slower.sentence.lower()
    assert "goes against the expectation" in slower.sentence
    longer = one("first-token latency", contrasts=[contrast("first_token_latency_s", 50, 8.0, 4.0, 12.0)])
    assert "wait for the first token is longer than the baseline's at 50 % (by 8 %), which is worse" in longer.sentence
    assert "goes against the expectation" in longer.sentence
    shorter = one("first-token latency", contrasts=[contrast("first_token_latency_s", 50, -8.0, -12.0, -4.0)])
    assert "is shorter than the baseline's at 50 % (by 8 %), which is better" in shorter.sentence
    assert "against" not in shorter.sentence


def test_an_interval_that_touches_zero_claims_nothing():
    found = one("quality, agency", contrasts=[contrast("perplexity", 50, -5.0, -10.0, 0.0)])
    assert found.sentence == "The data do not tell whether agency's perplexity differs from the baseline's at 50 %."


def test_no_interval_claims_nothing():
    several = one("quality, agency", contrasts=[contrast("perplexity", 50, -50.0, n=3)])
    assert "do not tell" in several.sentence
    single = one("quality, agency", contrasts=[contrast("perplexity", 50, -50.0, -60.0, -40.0, n=1)])
    assert "differed from the baseline's by −50 % at 50 %, but each is one observation, no interval" in single.sentence
    assert "better" not in single.sentence


def test_distances_are_told_temperature_by_temperature():
    found = one(
        "diversity of the text",
        contrasts=[
            contrast("distinct_2_distance", 50, -0.1, -0.15, -0.05, t=0.7, unit="1"),
            contrast("distinct_2_distance", 50, 0.01, -0.02, 0.04, t=1.0, unit="1"),
        ],
    )
    first, second = found.sentence.split(". At temperature 1 ")
    assert "is smaller than the baseline's at 50 % (by 0.1), which is better" in first
    assert second.startswith("the data do not tell")


def test_a_missing_comparison_is_named():
    found = one(
        "quality, agency", contrasts=[contrast("perplexity", 20, -5.0, -6.0, -4.0), contrast("perplexity", 50, NAN)]
    )
    assert "the comparison is missing at 50 %" in found.sentence


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-1e3, 1e3),
    width=st.floats(0, 1e3),
    metric=st.sampled_from(["perplexity", "tokens_per_second", "first_token_latency_s"]),
    n=st.integers(1, 50),
)
def test_a_side_is_claimed_only_where_the_interval_leaves_out_zero(low, width, metric, n):
    high = low + width
    found = findings(contrasts=[contrast(metric, 50, (low + high) / 2, low, high, n=n)])
    text = " ".join(finding.sentence for finding in found)
    claimed = "which is better" in text or "which is worse" in text
    assert claimed == (n >= 2 and (low > 0 or high < 0))
    if claimed:
        good = (low > 0) == (METRICS[metric].better == "higher")
        assert ("which is better" in text) == good
        assert ("against the expectation" in text) == (not good)


def test_differing_at_level_0_is_a_warning():
    found = one("Not the same at level 0", contrasts=[contrast("perplexity", 0, 0.5, 0.4, 0.6)])
    assert "both should be the same model" in found.sentence
    same = findings(contrasts=[contrast("perplexity", 0, 0.0, 0.0, 0.0)])
    assert not [finding for finding in same if "level 0" in finding.heading]


def test_no_comparison_is_said():
    assert "nothing can be said about which is better" in one("No comparison").sentence


# Speed, temperature, adaptation


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ((40.0, 38.0, 42.0), "The baseline model gets faster: 28 to 40 tokens per second from level 0 to 50 %."),
        ((20.0, 18.0, 22.0), "The baseline model gets slower: 28 to 20 tokens per second from level 0 to 50 %."),
        ((29.0, 26.5, 31.5), "the data do not tell whether its speed changed"),
    ],
)
def test_change_of_speed_with_the_level(top, expected):
    found = one(
        "what pruning does to speed",
        estimates=[
            estimate("tokens_per_second", "baseline", 0, 28.0, 27.0, 29.0),
            estimate("tokens_per_second", "baseline", 50, *top),
            estimate("tokens_per_second_ceiling", "baseline", 50, 36.0),
        ],
    )
    assert expected in found.sentence
    assert "the bytes left would allow 36 token/s" in found.evidence


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((-0.9, -1.3, -0.5), "By these intervals the data do not tell whether temperature changes the difference"),
        ((0.2, 0.1, 0.3), "The difference between the two is not the same at every temperature."),
    ],
)
def test_temperature(second, expected):
    found = one(
        ": temperature",
        contrasts=[
            contrast("generation_perplexity_distance", 20, 5.0, 4.0, 6.0, t=0.7, unit="1"),
            contrast("generation_perplexity_distance", 50, -1.0, -1.2, -0.8, t=0.7, unit="1"),
            contrast("generation_perplexity_distance", 50, *second, t=1.0, unit="1"),
        ],
    )
    assert found.sentence.startswith("With 50 % of the heads pruned")
    assert "at temperature 0.7 agency's text stays nearer to the unpruned model's" in found.sentence
    assert expected in found.sentence
    assert ("against the expectation" in found.sentence) == (second[0] > 0)


def test_cost_of_adaptation():
    found = one(
        "what adaptation cost",
        estimates=[
            estimate("adaptation_s", "agency", 50, 12.5, 12.0, 13.0),
            estimate("adaptation_tokens", "agency", 50, 49_000.0),
        ],
    )
    assert "took 12.5 s and 49,000 tokens of text at 50 %" in found.sentence


# Levels and failures


def cell(level, achieved, pruned, *, total=144, status="done", reason=None):
    return ("tiny", "baseline", "entropy", 0, float(level), achieved, pruned, total, status, reason)


def test_rounding_to_whole_heads_is_explained():
    found = one("Levels asked for", cells=[cell(20, 100 * 29 / 144, 29), cell(50, 50.0, 72)])
    assert found.sentence == (
        "The level reached differs from the level asked for, because only whole heads can be pruned: "
        "20 % became 20.14 %."
    )
    assert found.evidence == "20 %: 29 of 144 heads"


def test_a_level_missed_by_more_than_rounding_is_said():
    found = one("Levels asked for", cells=[cell(20, 25.0, 36)])
    assert "more than rounding to whole heads explains" in found.sentence


def test_levels_that_are_met_need_no_sentence():
    assert not [finding for finding in findings(cells=[cell(50, 50.0, 72)]) if "Levels" in finding.heading]


def test_failed_cells_are_counted_with_reasons():
    failed = [cell(50, NAN, NAN, status="failed", reason=reason) for reason in ("out of memory", "out of memory", None)]
    found = one("Cells that failed", cells=[cell(0, 0.0, 0), *failed])
    assert found.sentence.startswith("3 of 4 cells failed")
    assert "2 times: out of memory" in found.evidence
    assert "1 times: no reason recorded" in found.evidence


def test_no_verdict_words_and_no_empty_sentences():
    found = findings(
        estimates=[estimate("perplexity", "baseline", 0, 30.0, 29.0, 31.0)],
        contrasts=[contrast(name, 50, -5.0, -6.0, -4.0) for name in ("perplexity", "tokens_per_second")],
    )
    text = " ".join(f"{finding.heading} {finding.sentence} {finding.evidence}" for finding in found)
    assert "supported" not in text
    assert "refuted" not in text
    assert all(finding.sentence.endswith(".") for finding in found)


def test_empty_tables_say_only_that_nothing_was_compared():
    empty = plain_findings(
        pd.DataFrame(columns=SUMMARY), pd.DataFrame(columns=CONTRASTS), pd.DataFrame(columns=CELLS), {}
    )
    assert [finding.heading for finding in empty] == ["No comparison"]


# Numbers in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (29.46, "29.5"), (11_832.4, "11,832"), (0.01234, "0.0123"), (-35.2, "−35.2"), (1.0, "1"),
        (0.000012, "1.20e−05"), (NAN, "missing"), (math.inf, "infinite"), (100.0, "100"), (0.5, "0.5"),
    ],
)  # fmt: skip
def test_plain_number(value, text):
    assert plain_number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"), (2.5, "s", "2.5 s"), (498_000_000.0, "byte", "498 MB"), (3.0, "1", "3"),
        (28.0, "token/s", "28 token/s"), (999.0, "byte", "999 byte"), (NAN, "s", "missing"),
    ],
)  # fmt: skip
def test_with_unit(value, unit, text):
    assert with_unit(value, unit) == text


@pytest.mark.parametrize(
    ("low", "high", "unit", "text"),
    [
        (0.9, 1.1, "s", "900 ms to 1.1 s"), (24.8, 31.6, "token/s", "24.8 to 31.6 token/s"),
        (-6.0, 6.0, "%", "−6 to 6 %"), (1.0, 2.0, "1", "1 to 2"),
    ],
)  # fmt: skip
def test_interval_with_unit(low, high, unit, text):
    assert interval_with_unit(low, high, unit) == text
