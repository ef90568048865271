"""The sentences say what was measured and claim no more than the intervals allow; who is better is for the verdicts."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from pruning_comparison.analysis.relative import RELATIVE_COLUMNS
from pruning_comparison.formatting import interval_with_unit, plain_number, with_unit
from pruning_comparison.metrics import METRICS
from pruning_comparison.report.findings import Finding, plain_findings, recovery_findings, strongest_findings
from pruning_comparison.report.tables import strongest_table

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
    better = METRICS[metric].direction
    return ("tiny", "entropy", float(level), t, metric, "agency vs baseline", value, low, high, n, unit, better)


def ratio(metric, variant, level, value, low=NAN, high=NAN, *, certain=True, n=15):
    """A row of a level against the unpruned model, by pairs."""
    change = "higher" if low > 1 else "lower" if high < 1 else "unclear"
    p = 0.001
    return ("tiny", variant, "entropy", float(level), NAN, metric, value, low, high, n, p, change, "1", p, certain)


def findings(*, estimates=(), ratios=(), contrasts=(), cells=(), manifest=None) -> list[Finding]:
    rows = list(estimates) or [estimate("perplexity", "agency", 0, 30.0)]
    return plain_findings(
        pd.DataFrame(rows, columns=SUMMARY),
        pd.DataFrame(list(ratios), columns=list(RELATIVE_COLUMNS)),
        pd.DataFrame(list(contrasts), columns=CONTRASTS),
        pd.DataFrame(list(cells), columns=CELLS),
        manifest or {},
    )


def one(heading: str, **tables) -> Finding:
    (found,) = [finding for finding in findings(**tables) if heading in finding.heading]
    return found


# What pruning does to quality


def test_perplexity_from_level_0_to_each_level_for_both_without_setting_them_against_each_other():
    found = one(
        "what pruning does to quality",
        estimates=[
            estimate("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "baseline", 10, 31.5, 29.0, 34.0),
            estimate("perplexity", "baseline", 50, 90.0, 80.0, 101.0),
            estimate("perplexity", "agency", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "agency", 10, 31.5, 29.0, 34.0),
            estimate("perplexity", "agency", 50, 45.0, 40.0, 50.0),
        ],
        ratios=[
            ratio("perplexity", "baseline", 10, 1.05, 0.98, 1.12, certain=False),
            ratio("perplexity", "baseline", 50, 3.0, 2.8, 3.2),
            # The intervals of 30 and 31.5 overlap, the paired one leaves out no change.
            ratio("perplexity", "agency", 10, 1.05, 1.02, 1.08, certain=False),
            ratio("perplexity", "agency", 50, 1.5, 1.45, 1.55),
        ],
    )
    assert found.sentence == (
        "Perplexity is how surprised a model is by text; lower is better. "
        "The baseline model's is 30 unpruned and 31.5 at 10 % (1.05 times) and 90 at 50 % (3 times). "
        "At 10 % it is unclear whether pruning changed it. "
        "The agency model's is 30 unpruned and 31.5 at 10 % (1.05 times) and 45 at 50 % (1.5 times). "
        "At 10 % the change is likely, not certain: among so many figures some seem clear by chance."
    )
    assert "agency, by pairs: at 10 % 1.05 times the unpruned model's [1.02 to 1.08], n = 15" in found.evidence
    assert "baseline: at 0 %: 30 [28 to 32], n = 15" in found.evidence
    assert "at 50 %: 90 [80 to 101], n = 15" in found.evidence


def test_divergence_from_the_unpruned_model_is_told_beside_perplexity():
    found = one(
        "what pruning does to quality",
        estimates=[
            estimate("perplexity", "agency", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "agency", 50, 45.0, 40.0, 50.0),
            estimate("kl_to_dense", "agency", 0, 0.0, 0.0, 0.0),
            estimate("kl_to_dense", "agency", 50, 0.25, 0.2, 0.3),
        ],
    )
    assert found.sentence.endswith(
        "Its predictions differ from the unpruned model's by 0.25 nats per token at 50 % (KL)."
    )
    assert (
        "divergence from the unpruned model: at 50 %: 0.25 nat/token [0.2 to 0.3 nat/token], n = 15" in found.evidence
    )


def test_without_level_0_nothing_is_said_about_change():
    found = one("what pruning does to quality", estimates=[estimate("perplexity", "baseline", 50, 90.0, 80.0, 101.0)])
    assert "Level 0 was not measured, so what pruning changed is not known." in found.sentence
    assert "times" not in found.sentence


def test_one_observation_is_called_that():
    found = one(
        "what pruning does to quality",
        estimates=[estimate("perplexity", "baseline", 0, 30.0, n=1), estimate("perplexity", "baseline", 50, 90.0, n=1)],
        ratios=[ratio("perplexity", "baseline", 50, 3.0, n=1, certain=False)],
    )
    assert "one observation, no interval" in found.sentence


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_level_without_a_figure_is_named(value):
    found = one(
        "what pruning does to quality",
        estimates=[
            estimate("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
            estimate("perplexity", "baseline", 50, value),
        ],
    )
    assert "It is missing at 50 %." in found.sentence


STRONGEST = {
    "model": "tiny", "level": 50.0, "baseline_variant": "baseline-progressive", "baseline_method": "fisher", "candidates": 6,
    "held_out_perplexity": 60.0, "chosen": "lowest perplexity on held-out calibration text", "variant": "agency",
    "method": "obs", "metric": "perplexity", "estimate": 0.5, "ci_low": 0.45, "ci_high": 0.55, "n": 15, "unit": "1",
}  # fmt: skip


def test_agency_is_compared_with_the_strongest_baseline():
    rows = [STRONGEST, {**STRONGEST, "level": 20.0, "baseline_variant": "baseline", "estimate": 0.98, "ci_high": 1.02}]
    (found,) = strongest_findings(pd.DataFrame([*rows, {**STRONGEST, "variant": "agency-adaptation"}]))
    assert found.heading == "obs: agency and the strongest baseline"
    assert found.sentence == (
        "The best of 6 baselines at each level, chosen on held-out calibration text. Agency's perplexity with heads ranked "
        "by obs is at 20 % 0.98 times that of baseline by fisher (unclear whether that is a difference) and at 50 % 0.5 "
        "times that of baseline-progressive by fisher."
    )
    assert "at 50 %: 0.5 [0.45 to 0.55], n = 15, lowest perplexity on held-out calibration text" in found.evidence


def test_the_table_of_strongest_baselines_shows_the_choice_and_what_is_held_against_it():
    alone = {**STRONGEST, "level": 20.0, "variant": None, "method": None, "estimate": math.nan, "n": 0}
    alone |= {"candidates": 1, "held_out_perplexity": math.nan, "chosen": "the only baseline of the run"}
    table = strongest_table(pd.DataFrame([alone, STRONGEST]))
    first, second = [[(cell.text, cell.small) for cell in row.cells] for row in table.rows]
    assert first == [
        ("baseline-progressive, fisher", "the only baseline of the run"), ("", ""), ("nothing", ""), ("", ""), ("", ""),
    ]  # fmt: skip
    assert second == [
        ("baseline-progressive, fisher", "of 6 baselines: lowest perplexity on held-out calibration text"), ("60", ""),
        ("agency, obs", ""), ("×0.5", "0.45 to 0.55"), ("15", ""),
    ]  # fmt: skip
    assert strongest_table(pd.DataFrame(columns=list(STRONGEST))) is None


def test_a_run_with_one_baseline_says_so():
    (found,) = strongest_findings(
        pd.DataFrame([{**STRONGEST, "candidates": 1, "chosen": "the only baseline of the run"}])
    )
    assert found.sentence.startswith(
        "This run has one baseline, so nothing says how strong it is among others. Agency's"
    )
    assert strongest_findings(pd.DataFrame(columns=list(STRONGEST))) == []


def test_what_recovery_chose_is_told_with_what_was_tried():
    trial = {
        "learning_rate": 1e-4,
        "parameters": "all",
        "held_out_kl_nats": 0.3,
        "held_out_loss_nats": 3.0,
        "seconds": 1.0,
    }
    best = {**trial, "learning_rate": 1e-3, "parameters": "restricted", "held_out_kl_nats": 0.2}
    details = {"recovery": {"learning_rate": 1e-3, "parameters": "restricted", "trials": [trial, best]}}
    row = {"variant": "agency", "method": "obs", "iteration": 0, "level": 50.0, "status": "done"}
    table = pd.DataFrame([{**row, "details": json.dumps(details)}, {**row, "level": 0.0, "details": "{}"}])
    (found,) = recovery_findings(table)
    assert found.sentence.endswith("agency by obs at 50 %: 0.001 for output projections, norms and biases.")
    assert found.evidence.endswith("agency, obs, iteration 1, 50 %: 0.0001 all 0.3, 0.001 restricted 0.2")
    fixed = {"recovery": {"learning_rate": 1e-3, "parameters": "all", "trials": []}}
    assert recovery_findings(pd.DataFrame([{**row, "details": json.dumps(fixed)}])) == []


def test_differing_at_level_0_is_a_warning():
    found = one("Not the same at level 0", contrasts=[contrast("perplexity", 0, 0.5, 0.4, 0.6)])
    assert "both should be the same model" in found.sentence
    same = findings(contrasts=[contrast("perplexity", 0, 0.0, 0.0, 0.0)])
    assert not [finding for finding in same if "level 0" in finding.heading]


# Speed, temperature, adaptation


@pytest.mark.parametrize(
    ("change", "certain", "expected"),
    [
        (
            (1.43, 1.3, 1.6),
            True,
            "Pruning makes the baseline model faster: 40 tokens per second with 50 % of the heads pruned",
        ),
        ((1.43, 1.1, 1.9), False, "Pruning probably makes the baseline model faster: 40 tokens per second"),
        ((0.71, 0.6, 0.8), True, "Pruning makes the baseline model slower: 40 tokens per second"),
        (
            (1.04, 0.9, 1.2),
            False,
            "It is unclear whether pruning changes the baseline model's speed: 40 tokens per second",
        ),
        ((1.04, NAN, NAN), False, "The baseline model generates 40 tokens per second"),
    ],
)
def test_change_of_speed_rests_on_pairs(change, certain, expected):
    """The intervals of both levels are given as evidence alone: they overlap in every case."""
    found = one(
        "what pruning does to speed",
        estimates=[
            estimate("tokens_per_second", "baseline", 0, 28.0, 20.0, 45.0),
            estimate("tokens_per_second", "baseline", 50, 40.0, 20.0, 45.0),
            estimate("tokens_per_second_in_proportion", "baseline", 50, 36.0),
        ],
        ratios=[ratio("tokens_per_second", "baseline", 50, *change, certain=certain)],
    )
    assert found.sentence.startswith(expected)
    assert f"{plain_number(change[0])} times the unpruned model's speed" in found.sentence
    assert ("expected to slow down" in found.sentence) == (certain and change[0] == 1.43)
    assert "in proportion to the bytes left: 36 token/s" in found.evidence


def test_agency_that_loses_speed_goes_against_the_expectation():
    found = one(
        "what pruning does to speed",
        estimates=[
            estimate("tokens_per_second", "agency", 0, 28.0, 27.0, 29.0),
            estimate("tokens_per_second", "agency", 50, 20.0, 19.0, 21.0),
        ],
        ratios=[ratio("tokens_per_second", "agency", 50, 0.71, 0.68, 0.75)],
    )
    assert found.sentence.endswith("It was expected to keep its speed or gain; it does not.")


def test_temperature_sets_the_pruned_models_beside_the_unpruned_one():
    rows = [
        estimate("generation_perplexity", variant, level, value, value - 1, value + 1, t=temperature)
        for temperature, values in ((0.7, (6.0, 9.0, 7.0)), (1.0, (20.0, 40.0, 24.0)))
        for variant, level, value in zip(("baseline", "baseline", "agency"), (0, 50, 50), values, strict=True)
    ]
    found = one(": temperature", estimates=[*rows, estimate("generation_perplexity", "baseline", 20, 8.0, t=0.7)])
    assert found.sentence == (
        "How implausible the unpruned model finds the generated text (generation perplexity), with 50 % of the heads "
        "pruned by entropy: at temperature 0.7 unpruned 6, baseline 9 and agency 7; "
        "at temperature 1 unpruned 20, baseline 40 and agency 24."
    )
    assert "agency, temperature 1: 24 [23 to 25], n = 15" in found.evidence
    assert not [finding for finding in findings(estimates=rows[:3]) if "temperature" in finding.heading]


def test_cost_of_adaptation():
    found = one(
        "what agency cost",
        estimates=[
            estimate("adaptation_s", "agency", 50, 12.5, 12.0, 13.0),
            estimate("adaptation_tokens", "agency", 50, 49_000.0),
            estimate("negotiation_s", "agency", 50, 90.0, 80.0, 100.0),
        ],
    )
    assert "took 12.5 s and 49,000 tokens of text at 50 %" in found.sentence
    assert "Asking the heads, in all rounds up to a level, took 90 s at 50 %." in found.sentence
    assert "negotiation: at 50 %: 90 s [80 to 100 s]" in found.evidence


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


def test_neither_verdicts_nor_claims_of_who_is_better():
    found = findings(
        estimates=[
            estimate(metric, variant, level, value, value - 1, value + 1)
            for metric in ("perplexity", "tokens_per_second")
            for variant, level, value in (("baseline", 0, 30.0), ("baseline", 50, 90.0), ("agency", 50, 45.0))
        ],
        ratios=[
            ratio(metric, variant, 50, value / 30, value / 40, value / 20)
            for metric in ("perplexity", "tokens_per_second")
            for variant, value in (("baseline", 90.0), ("agency", 45.0))
        ],
        contrasts=[contrast(name, 50, -50.0, -60.0, -40.0) for name in ("perplexity", "tokens_per_second")],
    )
    text = " ".join(f"{finding.heading} {finding.sentence} {finding.evidence}" for finding in found)
    for word in ("supported", "refuted", "not enough data", "than the baseline", "which is"):
        assert word not in text
    assert all(finding.sentence.endswith(".") for finding in found)


def test_empty_tables_say_nothing():
    empty = plain_findings(
        pd.DataFrame(columns=SUMMARY),
        pd.DataFrame(columns=list(RELATIVE_COLUMNS)),
        pd.DataFrame(columns=CONTRASTS),
        pd.DataFrame(columns=CELLS),
        {},
    )
    assert empty == []


# Numbers in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (29.46, "29.5"), (11_832.4, "11,832"), (0.01234, "0.0123"), (-35.2, "−35.2"), (1.0, "1"),
        (0.000012, "1.20e−05"), (NAN, "missing"), (math.inf, "infinite"), (100.0, "100"), (0.5, "0.5"), (-5.6e-18, "0"),
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
