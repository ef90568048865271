"""What a terminal shows at the end: every sentence, row and verdict of the answer, within 80 columns."""

from __future__ import annotations

import json
import math
import re

import pytest

from pruning_comparison.checkpoint.model_card import BeforeAndAfter
from pruning_comparison.report.answer import Answer, AnswerRow, Chip
from pruning_comparison.report.terminal import answer_text, before_and_after_text, stored_answer, stored_form

NAN = math.nan


def row(level, variant="agency", method="entropy", **changes):
    values = {
        "perplexity": 1.031, "perplexity_low": 1.011, "perplexity_high": 1.052, "tokens_per_second": 1.08,
        "tokens_per_second_low": 1.02, "tokens_per_second_high": 1.15, "safe": False, **changes,
    }  # fmt: skip
    return AnswerRow(method, variant, level, **values)


CHIPS = (
    Chip("E1", "Speed", "no meaningful difference", "no meaningful difference", "+1.2 %", "The details."),
    Chip("E2", "Quality at high levels", "supported", "supported: 3 of 4 methods", "−45.3 %", ""),
    Chip("Q2", "Optimal level", "answered", "answered", "up to 40 %", ""),
    Chip("Q3", "Temperature " * 9, "not enough data", "not enough data", "", ""),
    Chip("Q4", "Tight resources", "refuted", "refuted: all 4 methods", "+12 %", ""),
)
ANSWER = Answer(
    "Pruning the attention heads of bundled",
    ("Agency's perplexity is 1.03 and the baseline's 1.2 times the dense model's. " * 2, "The second sentence."),
    (row(20.0, safe=True), row(20.0, "baseline"), row(40.0, perplexity_low=NAN, perplexity_high=NAN)),
    CHIPS,
)


def test_sentences_table_and_one_line_per_verdict():
    shown = answer_text(ANSWER)
    lines = shown.splitlines()
    flat = " ".join(shown.split())
    assert lines[0] == ANSWER.title
    assert all(" ".join(sentence.split()) in flat for sentence in ANSWER.sentences)
    assert "20 % safe agency 1.03 1.01 to 1.05 1.08 1.02 to 1.15" in flat
    assert "20 % baseline 1.03 1.01 to 1.05" in flat
    assert "40 % agency 1.03 1.08 1.02 to 1.15" in flat  # without an interval of perplexity
    verdicts = [line for line in lines if re.match(r"[EQ]\d ", line)]
    assert len(verdicts) == len(CHIPS)
    assert re.fullmatch(r"E1 +Speed +no meaningful difference +\+1.2 %", verdicts[0])
    assert re.fullmatch(r"E2 +Quality at high levels +supported: 3 of 4 methods +−45.3 %", verdicts[1])
    assert re.fullmatch(r"Q3 +Temperature .*… +not enough data", verdicts[3])
    assert "The details." not in shown


@pytest.mark.parametrize("width", [80, 100, 200])
def test_it_fits_the_terminal_whatever_the_names(width):
    rows = [
        row(77.5, variant, method, perplexity=1234.5, safe=True)
        for method in ("fisher-interactions", "my_methods:a_rather_long_name_of_a_method")
        for variant in ("baseline-progressive", "agency-always-yes")
    ]
    shown = answer_text(Answer(ANSWER.title, ANSWER.sentences, tuple(rows), CHIPS), width=width)
    assert max(map(len, shown.splitlines())) <= min(width, 100)
    assert shown.count("over 1,000") == 4
    for name in ("baseline-progressive", "agency-always-yes"):
        folded = re.sub(r"\s", "", shown)
        assert name in folded or name[:12] in folded


def test_a_table_for_each_method_and_what_is_too_much_is_said():
    rows = [row(float(level), method=method) for method in ("entropy", "random") for level in range(1, 31)]
    shown = answer_text(Answer("t", (), tuple(rows), ()))
    assert "Heads pruned by entropy" in shown
    assert "Heads pruned by random" in shown
    assert "20 more rows in the report." in shown  # 60 of which 40 are shown
    assert "Expectations" not in shown


def test_colour_only_where_it_is_asked_for():
    assert "\x1b" not in answer_text(ANSWER)
    coloured = answer_text(ANSWER, coloured=True)
    assert "\x1b[32msupported: 3 of 4 methods" in coloured
    assert "\x1b[31mrefuted: all 4 methods" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == answer_text(ANSWER).splitlines()


def test_an_answer_is_read_back_as_it_was_stored(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"answer": stored_form(ANSWER)}, allow_nan=False))
    again = stored_answer(tmp_path)
    assert again is not None
    assert repr(again) == repr(ANSWER)  # NaN is not equal to itself


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"answer": null}', '{"answer": {"title": "t"}}', '{"answer": 3}'])
def test_results_without_an_answer_have_none(tmp_path, text):
    assert stored_answer(tmp_path) is None
    (tmp_path / "results.json").write_text(text)
    assert stored_answer(tmp_path) is None


def test_before_and_after_by_hand():
    shown = before_and_after_text(
        [
            BeforeAndAfter("perplexity", "on the evaluation text", 60.0, 75.0),
            BeforeAndAfter("speed", "tokens per second", 100.0, 90.0),
            BeforeAndAfter("first-token latency", "s", 0.002, None),
            BeforeAndAfter("key-value cache", "bytes, after a timed prompt", 300_000.0, 150_000.0),
            BeforeAndAfter("parameters", "bytes", 4e6, 4e6),
            BeforeAndAfter("perplexity of another", "on the evaluation text", 20.0, 60.0),
        ]
    )
    cells = [re.split(r" {2,}", line.strip()) for line in shown.splitlines()[3:]]
    assert cells == [
        ["perplexity, on the evaluation text", "60", "75", "+25 %"],
        ["speed, tokens per second", "100", "90", "−10 %"],
        ["first-token latency", "2 ms", "not measured"],
        ["key-value cache, after a timed prompt", "300 kB", "150 kB", "−50 %"],
        ["parameters", "4 MB", "4 MB", "none"],
        ["perplexity of another, on the evaluation text", "20", "60", "3 times"],
    ]
    assert max(map(len, shown.splitlines())) <= 80
