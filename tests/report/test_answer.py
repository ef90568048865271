"""The answer of a run: its sentences claim what the tables allow, with the numbers of the tables."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from builders import ranking_row, relative_row

from pruning_comparison.analysis import HYPOTHESIS_COLUMNS, OPTIMUM_COLUMNS, RANKING_COLUMNS, RELATIVE_COLUMNS
from pruning_comparison.report.answer import Answer, answer_of, format_change, format_times

NAN = math.nan


def verdict_row(name, verdict, estimate=0.0, low=0.0, high=0.0, **other):
    """A row of answers; log ratios unless said otherwise."""
    row = dict.fromkeys(HYPOTHESIS_COLUMNS, NAN) | {
        "model": "tiny", "method": "entropy", "id": name, "contrast": "agency vs baseline", "metric": "perplexity",
        "kind": "expectation" if name[0] == "E" else "question", "scale": "log_ratio", "unit": "log ratio",
        "estimate": estimate, "ci_low": low, "ci_high": high, "n": 15, "verdict": verdict,
    }  # fmt: skip
    return row | other


def optimum_row(variant, level, method="entropy"):
    row = dict.fromkeys(OPTIMUM_COLUMNS, NAN)
    return row | {"method": method, "variant": variant, "highest_level": level, "tolerance": 0.05, "reason": ""}


def answered(*, relative=(), optimal=(), ranked=(), answers=()) -> Answer:
    return answer_of(
        "tiny",
        relative=pd.DataFrame(list(relative), columns=list(RELATIVE_COLUMNS)),
        optimal=pd.DataFrame(list(optimal), columns=list(OPTIMUM_COLUMNS)),
        ranked=pd.DataFrame(list(ranked), columns=list(RANKING_COLUMNS)),
        answers=pd.DataFrame(list(answers), columns=list(HYPOTHESIS_COLUMNS)),
    )


CURVES = [
    relative_row("perplexity", variant, level, value, value * 0.98, value * 1.02)
    for variant, values in (("agency", (1.02, 1.2, 1.81)), ("baseline", (1.15, 2.5, 12.44)))
    for level, value in zip((20, 50, 80), values, strict=True)
]


@pytest.mark.parametrize(
    ("ratio", "shown"),
    # 1566.66 times is "over 1,000": three digits at most. Half is a loss of 50 %, and twice is a factor.
    [(1.0324, "+3.2 %"), (0.5, "−50 %"), (2.0, "×2"), (12.44, "×12.4"), (1567.66, "×over 1,000"), (1.0001, "±0 %")],
)
def test_a_ratio_is_a_change_with_three_digits_at_most(ratio, shown):
    assert format_change(ratio) == shown


def test_times_have_three_digits_at_most():
    assert [format_times(value) for value in (1.0324, 123.4, 99_999.0)] == ["1.03", "123", "over 1,000"]


def test_the_first_sentence_says_what_each_variant_keeps_at_each_level():
    (sentence, *_) = answered(relative=CURVES).sentences
    assert sentence == (
        "With 20, 50 and 80 % of the heads pruned by entropy, agency's perplexity is 1.02, 1.2 and 1.81 times the dense "
        "model's; the baseline's is 1.15, 2.5 and 12.4."
    )


def test_a_change_whose_interval_holds_none_is_called_unclear():
    rows = [relative_row("perplexity", "agency", 20, 1.01, 0.99, 1.03, certain=False), *CURVES[1:]]
    assert answered(relative=rows).sentences[0].endswith("baseline's is 1.15, 2.5 and 12.4. The 95 % interval includes "
                                                         "no change at 20 % for agency.")  # fmt: skip


def test_a_change_that_does_not_stand_after_correction_is_called_likely():
    """Two iterations leave wide claims: "unclear" beside an interval far from none would contradict itself."""
    rows = [
        relative_row("perplexity", "agency", 20, 1.02, 1.01, 1.03, certain=False),
        *CURVES[1:],
        relative_row("tokens_per_second", "agency", 20, 0.5, 0.43, 0.74, certain=False),
    ]
    said = answered(relative=rows, optimal=[optimum_row("agency", 20.0)])
    assert said.sentences[0].endswith(
        "12.4. Corrected for the number of comparisons, the change is likely but not certain at 20 % for agency."
    )
    assert "likely 50 % fewer tokens per second (−57 % to −26 %)" in said.sentences[2]


def test_safe_levels_and_what_they_bring():
    rows = [
        *CURVES,
        relative_row("tokens_per_second", "agency", 20, 1.124, 1.08, 1.17),
        relative_row("first_token_latency_s", "agency", 20, 0.95, 0.91, 1.01, certain=False),
        relative_row("parameter_bytes", "agency", 20, -1_310_000.0, unit="byte"),
        relative_row("cache_bytes", "agency", 20, -112_000.0, unit="byte"),
    ]
    said = answered(relative=rows, optimal=[optimum_row("agency", 20.0), optimum_row("baseline", 0.0)])
    assert said.sentences[1:3] == (
        "Safe levels, where perplexity rises by at most 5 %, the upper end of its 95 % interval included: 20 % with agency; "
        "no level measured is safe with the baseline.",
        "At 20 %, agency has, against the dense model, 12.4 % more tokens per second (+8 % to +17 %), an unclear change in "
        "first-token latency (−9 % to +1 %), 1.31 MB less of parameters and 112 kB less of key-value cache.",
    )
    assert [row.level for row in said.rows if row.safe] == [20]


def test_no_safe_level_is_said():
    said = answered(relative=CURVES, optimal=[optimum_row("agency", 0.0), optimum_row("baseline", 0.0)])
    assert said.sentences[1].startswith("No level measured is safe with agency or the baseline")


def test_a_winner_is_named_only_where_it_is_decided():
    rows = [*CURVES, *(relative_row("perplexity", "agency", 20, 1.1, 1.0, 1.2, method=m) for m in ("fisher", "random"))]
    ranking = [
        ranking_row(1, "fisher", 1.2, "entropy", 1.25, 1.1, 1.42, decided=True, random="better"),
        ranking_row(2, "entropy", 1.5, "random", 1.01, 0.9, 1.13, random="not enough data"),
        ranking_row(3, "random", 1.52, random=""),
    ]
    named = answered(relative=rows, ranked=ranking).sentences[-1]
    assert named == (
        "Best method with agency: fisher. The runner-up entropy's perplexity is 25 % higher (+10 % to +42 %); "
        "fisher beats random."
    )
    undecided = [ranking_row(1, "fisher", 1.2, "entropy", 1.05, 0.9, 1.2, random="not enough data"), *ranking[1:]]
    tied = answered(relative=rows, ranked=undecided).sentences[-1]
    assert tied == (
        "With agency, fisher, entropy and random cannot be told apart in perplexity; whether fisher beats random is unclear."
    )


def test_sentences_are_about_random_only_where_it_is_decidedly_best():
    rows = [*CURVES, relative_row("perplexity", "agency", 20, 1.1, 1.0, 1.2, method="random")]
    for decided, named in ((False, "entropy"), (True, "random")):
        ranking = [
            ranking_row(1, "random", 1.5, "entropy", 1.01, 0.9, 1.13, decided=decided),
            ranking_row(2, "entropy", 1.52),
        ]
        assert f"of the heads pruned by {named}," in answered(relative=rows, ranked=ranking).sentences[0]


def test_a_missing_control_is_said():
    assert "no random control" in answered(relative=CURVES).sentences[-1]
    rows = [*CURVES, relative_row("perplexity", "agency", 20, 1.1, 1.0, 1.2, method="fisher")]
    ranking = [ranking_row(1, "fisher", 1.2, "entropy", 1.25, 1.1, 1.42, decided=True), ranking_row(2, "entropy", 1.5)]
    assert (
        answered(relative=rows, ranked=ranking)
        .sentences[-1]
        .endswith("; random was not run, so that there is no control.")
    )


def test_agency_against_the_baseline_is_the_primary_answer():
    """exp(-0.6033) = 0.547: 45.3 % lower."""
    row = verdict_row("E2", "supported", math.log(0.547), math.log(0.482), math.log(0.621))
    assert answered(relative=CURVES, answers=[row]).sentences[1] == (
        "With 40 % of the heads or more pruned, agency's perplexity is 45.3 % lower than the baseline's "
        "(95 % interval −51.8 % to −37.9 %)."
    )
    same = verdict_row("E2", "no meaningful difference", math.log(1.01), math.log(0.99), math.log(1.03))
    assert "do not differ meaningfully in perplexity" in answered(relative=CURVES, answers=[same]).sentences[1]
    few = verdict_row("E2", "not enough data", math.log(0.9), math.log(0.6), math.log(1.3))
    assert (
        answered(relative=CURVES, answers=[few])
        .sentences[1]
        .endswith("There is not enough data to decide whether that matters.")
    )


def test_no_safe_level_is_said_in_words():
    chips = {
        chip.id: chip for chip in answered(optimal=[optimum_row("agency", 0.0), optimum_row("baseline", 0.0)]).chips
    }
    assert chips["Q2"].number == "no level"


def test_one_high_level_is_named():
    row = verdict_row("E2", "supported", math.log(0.5), math.log(0.4), math.log(0.6))
    one = [*CURVES[:2], *CURVES[3:5]]
    assert answered(relative=one, answers=[row]).sentences[1].startswith("With 50 % of the heads pruned, agency's ")


def test_there_are_nine_chips_in_order_whatever_was_measured():
    chips = answered().chips
    assert [chip.id for chip in chips] == ["E1", "E2", "E3", "E4", "Q1", "Q2", "Q3", "Q4", "Q5"]
    assert {chip.verdict for chip in chips} == {"not enough data"}
    assert all(chip.detail.endswith("This was not measured.") for chip in chips)


def test_a_chip_has_verdict_number_and_detail():
    chip = answered(answers=[verdict_row("E2", "supported", math.log(0.65), math.log(0.6), math.log(0.7))]).chips[1]
    assert (chip.verdict, chip.label, chip.number) == ("supported", "supported", "−35 %")
    assert "95 % interval −40 % to −30 %, n = 15" in chip.detail


def test_with_several_methods_a_chip_counts_and_has_the_colour_of_the_worst():
    """Its number is of those that it counts, the smaller one; where it counts none, of those with the worst verdict."""
    words = {-0.4: "supported", -0.2: "supported", 0.1: "refuted", -4.0: "not enough data"}
    rows = [verdict_row("E2", word, size, 0.0, 0.2, method=f"m{size}") for size, word in words.items()]
    chip = answered(answers=rows).chips[1]
    assert (chip.verdict, chip.label, chip.number) == ("refuted", "supported: 2 of 4 methods", "−18.1 %")  # exp(-0.2)
    chip = answered(answers=rows[2:]).chips[1]
    assert (chip.verdict, chip.label, chip.number) == ("refuted", "supported: 0 of 2 methods", "+10.5 %")  # exp(0.1)
    alike = [verdict_row("E2", "supported", method=f"m{at}") for at in range(4)]
    assert answered(answers=alike).chips[1].label == "supported: all 4 methods"
    assert answered(answers=alike[:2]).chips[1].label == "supported: both methods"


def test_questions_that_ask_for_a_figure_are_answered():
    levels = [optimum_row("agency", 40.0), optimum_row("baseline", 20.0)]
    effects = [
        verdict_row("Q5", "answered", 6.68, 5.0, 8.0, scale="standardised", unit="standard deviation"),
        verdict_row(
            "Q5",
            "not enough data",
            0.1,
            -1.0,
            1.2,
            scale="standardised",
            unit="standard deviation",
            metric="distinct_2",
        ),
    ]
    chips = {chip.id: chip for chip in answered(optimal=levels, answers=effects).chips}
    assert (chips["Q2"].verdict, chips["Q2"].number) == ("answered", "up to 40 %")
    assert "40 % with agency and 20 % with the baseline" in chips["Q2"].detail
    assert (chips["Q5"].verdict, chips["Q5"].number) == ("answered", "+6.68 SD")


def test_an_unknown_verdict_is_an_error():
    with pytest.raises(ValueError, match="'perhaps' is unknown"):
        answered(answers=[verdict_row("E2", "perhaps")])
