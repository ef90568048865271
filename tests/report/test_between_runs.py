"""Two runs in words, and from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args

import pandas as pd
import pytest
from builders import save_tiny_model, write_short_texts

from pruning_comparison import cli
from pruning_comparison.analysis.between_runs import Difference, Limit, LimitReason, OnlyIn
from pruning_comparison.report.between_runs import (
    DifferenceInWords,
    LimitInWords,
    between_runs_findings,
    compare,
    difference_in_words,
    limit_in_words,
)
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import load_run, read_manifest

NAN = math.nan


# In words


def test_a_difference_names_its_part_and_what_is_not_recorded():
    found = [
        Difference("spec", "pruning_levels", [0.0, 50.0], [0.0, 30.0]),
        Difference("inputs", "model", "m", "n"),
        Difference("model", "heads", 12, 8),
        Difference("versions", "torch", "2.11.0", "2.12.0"),
        Difference("hardware", "processor", "slow", "fast"),
        Difference("commit", "commit", "abc", None),
    ]
    assert [difference_in_words(difference) for difference in found] == [
        DifferenceInWords("pruning_levels", "0, 50", "0, 30"),
        DifferenceInWords("content of model", "m", "n"),
        DifferenceInWords("model: heads", "12", "8"),
        DifferenceInWords("torch", "2.11.0", "2.12.0"),
        DifferenceInWords("machine: processor", "slow", "fast"),
        DifferenceInWords("commit", "abc", "not recorded"),
    ]


def test_what_only_one_run_has_is_told_with_its_unit():
    told = [
        limit_in_words(Limit("only in one run", only_in=OnlyIn(axis, value, run)))
        for axis, value, run in (
            ("method", "random", "first"),
            ("level", 30.0, "second"),
            ("temperature", 0.7, "second"),
        )
    ]
    assert told == [
        LimitInWords("method random", "only the first run has it"),
        LimitInWords("level 30 %", "only the second run has it"),
        LimitInWords("temperature 0.7", "only the second run has it"),
    ]


@pytest.mark.parametrize(
    ("reason", "what", "why"),
    [
        ("no method in common", "methods", "every method of the second is set against every method of the first"),
        ("other evaluation text", "perplexity and bits per byte", "different texts"),
        ("other tokens", "perplexity", "Bits per byte are compared instead"),
        ("another machine", "speed", "not what pruning does. It is shown and labelled so."),
        ("timed at another time", "speed", "one after the other"),
    ],
)
def test_a_limit_says_what_and_why(reason, what, why):
    told = limit_in_words(Limit(reason))
    assert told.what == what
    assert why in told.why


def test_every_reason_has_words():
    for reason in get_args(LimitReason):
        if reason != "only in one run":
            assert limit_in_words(Limit(reason)).why


def row(metric, level, verdict, estimate, *, better="lower", note="", temperature=NAN):
    return {
        "method": "entropy", "variant": "agency", "metric": metric, "level": level, "temperature": temperature,
        "verdict": verdict, "estimate": estimate, "ci_low": estimate - 0.01, "ci_high": estimate + 0.01, "n": 6,
        "scale": "log_ratio", "unit": "log ratio", "better": better, "note": note,
    }  # fmt: skip


def test_differences_are_claimed_only_where_they_are_clear():
    (found,) = between_runs_findings(
        pd.DataFrame(
            [
                row("perplexity", 0.0, "supported", math.log(0.5)),
                row("perplexity", 20.0, "supported", math.log(0.9)),
                row("perplexity", 40.0, "refuted", math.log(1.2)),
                row("perplexity", 60.0, "inconclusive", math.log(0.99)),
                row("tokens_per_second", 20.0, "supported", math.log(2.0), better="higher", note="another machine"),
                row("distinct_2_distance", 20.0, "inconclusive", 0.1, temperature=0.7),
                {**row("bits_per_byte", 20.0, "inconclusive", 0.0), "ci_low": 0.0, "ci_high": 0.0},
            ]
        )
    )
    assert found.heading == "agency, entropy"
    assert found.sentence == (
        "Perplexity of the second run: lower at 20 % (−10 %), which is better; higher at 40 % (+20 %), which is worse; "
        "not clearly different at 60 %. "
        "Tokens per second (another machine) of the second run: higher at 20 % (+100 %), which is better. "
        "Exactly the same at every level: bits per byte. "
        "The data do not tell the two runs apart at any level: distinct-2 (distance from dense) at temperature 0.7."
    )
    assert "perplexity at 60 %: −1 % [" in found.evidence


# From the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    texts = write_short_texts(root / "texts")
    (root / "prompts.txt").write_text("one\ntwo\n")
    settings = {
        "pruning_levels": (0, 50), "num_tokens": 5, "iterations": 2, "eval_tokens": 300, "calibration_tokens": 256,
        "calibration_window": 64, "timing_limit_s": 0.0, "temperatures": (1.0,),
        "prompt_file": str(root / "prompts.txt"), **texts,
    }  # fmt: skip
    for number, methods in ((0, ("magnitude",)), (1, ("magnitude", "random"))):
        folder = save_tiny_model(root / f"model{number}", seed=number)
        spec = ComparisonSpec(model_name=str(folder), pruning_methods=methods, **settings)
        run_comparison(spec, output_dir=root / f"out{number}", raise_failures=True)
    return root


def test_two_runs_of_other_models_are_compared_from_the_command_line(runs, tmp_path, capsys):
    argv = ["report", str(runs / "out0"), str(runs / "out1"), f"--output_dir={tmp_path}", "--quiet"]
    assert cli.main(argv) == 0
    (folder,) = tmp_path.glob("between_runs_*")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    table = pd.read_csv(folder / "between_runs.csv")
    assert set(table["method"]) == {"magnitude"}
    assert set(table["variant"]) == {"baseline", "agency"}
    assert {"perplexity", "bits_per_byte", "tokens_per_second"} <= set(table["metric"])
    assert "generation_perplexity_distance" not in set(table["metric"])
    assert (table["kind"] == "exploratory").all()
    dense = table[(table["metric"] == "perplexity") & (table["level"] == 0) & (table["variant"] == "baseline")]
    losses = []
    for number in (0, 1):
        run = load_run((runs / f"out{number}" / "latest").resolve())
        rows = run.measurements[run.measurements["level"] == 0].query("variant == 'baseline' and iteration == 0")
        rows = rows[rows["method"] == "magnitude"]
        sums = rows.pivot_table(index="document", columns="metric", values="value", aggfunc="sum")
        losses.append((sums["window_nats"] / sums["window_tokens"]).mean())
    assert dense["estimate"].item() == pytest.approx(losses[1] - losses[0], abs=1e-9)
    html = (folder / "report.html").read_text("utf-8")
    assert "only the second run has it" in html
    assert "judged by its own unpruned model" in html


def test_runs_that_cannot_be_compared_exit_2(runs, tmp_path, capsys):
    first = str(runs / "out0")
    for argv, message in (
        ([first, first], "both names lead to the same run"),
        ([first, first, first], "3 were given"),
        ([first, str(tmp_path)], "holds no run"),
        ([first, str(runs / "out1"), "--margin_speed=3"], "margins are about the verdicts of one run"),
    ):
        assert cli.main(["report", *argv, f"--output_dir={tmp_path}"]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("between_runs_*"))


def test_a_run_against_its_copy_shows_no_difference(runs):
    run = load_run((runs / "out0" / "latest").resolve())
    compared, limits = compare(run, run)
    assert [limit.reason for limit in limits] == ["timed at another time"]
    timed = compared["metric"] == "tokens_per_second"
    assert set(compared.loc[timed, "note"]) == {"timed at another time"}
    measured = compared[compared["metric"] == "perplexity"]
    assert len(measured) == 4
    assert (measured["estimate"] == 0).all()
    assert not measured["verdict"].isin(["supported", "refuted"]).any()


@pytest.mark.usefixtures("no_charts")
def test_margins_are_kept_with_the_run_and_change_verdicts_only(runs, capsys):
    folder = (runs / "out0" / "latest").resolve()
    before = read_manifest(folder)
    assert cli.main(["report", str(folder), "--quiet", "--margin_quality=30", "--tolerance=99"]) == 0
    kept = read_manifest(folder)
    assert kept.margins is not None
    assert kept.margins["quality"] == 0.3
    assert kept == replace(before, margins=kept.margins)
    answers = pd.read_csv(folder / "answers.csv").set_index("id")
    assert answers.loc["E2", "margin"] == 0.3
    assert cli.main(["report", str(folder), "--quiet"]) == 0
    assert read_manifest(folder).margins == kept.margins
    document = json.loads((folder / "results.json").read_text())
    assert {verdict["id"] for verdict in document["verdicts"]} >= {"E1", "E2", "E3", "E4", "Q1", "Q2", "Q3", "Q4", "Q5"}
    assert len(document["answers"]) == len(answers)
    optimum = pd.read_csv(folder / "optimal_levels.csv")
    assert (optimum["tolerance"] == 0.99).all()
    assert len(document["optimal_levels"]) == len(optimum) == 2
    assert len(document["equal_perplexity"]) == len(pd.read_csv(folder / "equal_perplexity.csv"))
