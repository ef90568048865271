"""Several runs in words, and from the command line."""

from __future__ import annotations

import base64
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
    ComparedRuns,
    DifferenceInWords,
    LimitInWords,
    between_runs_findings,
    compare,
    differences_in_words,
    limits_in_words,
)
from pruning_comparison.report.charts import draw_between_runs
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import load_run, read_manifest

NAN = math.nan


# In words


def others(*found, limits=()):
    """Comparisons with run 1, one for each list of differences or limits."""
    empty = pd.DataFrame()
    count = max(len(found), len(limits))
    pairs = zip([*found, *[()] * (count - len(found))], [*limits, *[()] * (count - len(limits))], strict=True)
    return [ComparedRuns(f"run {n}", empty, tuple(lim), tuple(diff)) for n, (diff, lim) in enumerate(pairs, start=2)]


def test_a_difference_names_its_part_and_what_is_not_recorded():
    found = [
        Difference("spec", "pruning_levels", [0.0, 50.0], [0.0, 30.0]),
        Difference("inputs", "model", "m", "n"),
        Difference("model", "heads", 12, 8),
        Difference("revisions", "metric perplexity", 1, 2),
        Difference("versions", "torch", "2.11.0", "2.12.0"),
        Difference("hardware", "processor", "slow", "fast"),
        Difference("commit", "commit", "abc", None),
    ]
    assert differences_in_words(others(found)) == [
        DifferenceInWords("pruning_levels", ("0, 50", "0, 30")),
        DifferenceInWords("content of model", ("m", "n")),
        DifferenceInWords("model: heads", ("12", "8")),
        DifferenceInWords("revision of metric perplexity", ("1", "2")),
        DifferenceInWords("torch", ("2.11.0", "2.12.0")),
        DifferenceInWords("machine: processor", ("slow", "fast")),
        DifferenceInWords("commit", ("abc", "not recorded")),
    ]


def test_a_run_that_does_not_differ_from_the_first_has_its_value():
    seed, threads = Difference("spec", "seed", 0, 1), Difference("spec", "threads", 1, 2)
    assert differences_in_words(others([seed], [threads])) == [
        DifferenceInWords("seed", ("0", "1", "0")),
        DifferenceInWords("threads", ("1", "1", "2")),
    ]


def test_what_only_one_run_has_is_told_with_its_unit():
    limits = [
        Limit("only in one run", only_in=OnlyIn(axis, value, run))
        for axis, value, run in (
            ("method", "random", "first"),
            ("level", 30.0, "second"),
            ("temperature", 0.7, "second"),
        )
    ]
    assert limits_in_words(others(limits=[limits])) == [
        LimitInWords("method random", "only run 1 has it"),
        LimitInWords("level 30 %", "only run 2 has it"),
        LimitInWords("temperature 0.7", "only run 2 has it"),
    ]


def test_what_holds_for_some_of_several_runs_says_for_which():
    speed, prompts = Limit("timed at another time"), Limit("other prompts")
    found = limits_in_words(others(limits=[[speed, prompts], [speed], [speed, prompts]]))
    assert [limit.what for limit in found] == ["speed", "generated text, speed and memory (run 2 and run 4)"]


@pytest.mark.parametrize(
    ("reason", "what", "why"),
    [
        ("no method in common", "methods", "every method of one run is compared with every method of the other"),
        ("other evaluation text", "perplexity and bits per byte", "different texts"),
        ("other tokens", "perplexity", "Bits per byte are compared instead"),
        ("another machine", "speed", "may come from these and not from pruning. It is shown"),
        ("timed at another time", "speed", "one after the other"),
    ],
)
def test_a_limit_says_what_and_why(reason, what, why):
    (words,) = limits_in_words(others(limits=[[Limit(reason)]]))
    assert words.what == what
    assert why in words.why


def test_every_reason_has_words():
    for reason in get_args(LimitReason):
        if reason != "only in one run":
            assert limits_in_words(others(limits=[[Limit(reason)]]))[0].why


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
    assert found.heading == "Run 2: agency, entropy"
    assert found.sentence == (
        "Perplexity: lower at 20 % (−10 %), which is better; higher at 40 % (+20 %), which is worse; unclear at 60 %. "
        "Tokens per second (another machine): higher at 20 % (+100 %), which is better. "
        "Exactly the same at every level: bits per byte. "
        "No clear difference at any level: distinct-2 (distance from dense) at temperature 0.7."
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
        "calibration_window": 64, "temperatures": (1.0,), "prompt_file": str(root / "prompts.txt"), "timing_pairs": 2,
        "timing_limit_s": 0.0, **texts,
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
    assert "only run 2 has it" in html
    assert "judged by its own unpruned model" in html


def test_any_number_of_runs_are_compared_with_the_first_and_drawn(runs, tmp_path, capsys):
    """Run 3 has other prompts: what depends on them is left out of its comparison, and stays in that of run 2."""
    spec = ComparisonSpec.from_dict(load_run((runs / "out0" / "latest").resolve()).manifest.spec)
    (tmp_path / "prompts.txt").write_text("three\nfour\n")
    run_comparison(replace(spec, prompt_file=str(tmp_path / "prompts.txt")), output_dir=tmp_path / "out2")
    argv = [
        "report",
        str(runs / "out0"),
        str(runs / "out1"),
        str(tmp_path / "out2"),
        f"--output_dir={tmp_path}",
        "--quiet",
    ]
    assert cli.main(argv) == 0
    (folder,) = tmp_path.glob("between_runs_*")
    table = pd.read_csv(folder / "between_runs.csv")
    assert list(table["run"].unique()) == ["run 2", "run 3"]
    metrics = {run: set(rows["metric"]) for run, rows in table.groupby("run")}
    of_prompts = {"tokens_per_second", "distinct_2_distance", "cache_bytes", "prefill_flops"}
    assert of_prompts <= metrics["run 2"]
    sizes = {"parameter_bytes", "decode_bytes", "thousand_token_cache_bytes"}
    assert metrics["run 3"] == {"perplexity", "bits_per_byte", "kl_to_dense", *sizes}
    html = (folder / "report.html").read_text("utf-8")
    assert "generated text, speed and memory (run 3)" in html
    assert html.count('<th scope="col">Run ') == 3
    assert html.count("data:image/svg+xml;base64,") == 2  # one method, wide and narrow
    assert {path.name for path in (folder / "charts").iterdir()} == {"magnitude.png", "magnitude.svg"}
    svg = (folder / "charts" / "magnitude.svg").read_bytes()
    assert base64.b64encode(svg).decode() in html


def test_a_chart_shows_per_cent_of_run_1_and_only_what_is_compared():
    row = {
        "method": "entropy",
        "variant": "agency",
        "metric": "perplexity",
        "temperature": NAN,
        "scale": "log_ratio",
        "n": 4,
    }
    rows = [
        {**row, "run": run, "level": level, "estimate": math.log(ratio), "ci_low": math.log(ratio) - 0.1,
         "ci_high": math.log(ratio) + 0.1}
        for run, level, ratio in (("run 2", 0.0, 1.0), ("run 2", 50.0, 1.5), ("run 3", 0.0, 1.0), ("run 3", 50.0, 0.8))
    ]  # fmt: skip
    missing = {**row, "run": "run 2", "metric": "bits_per_byte", "level": 50.0, "scale": "difference"}
    missing |= {"estimate": NAN, "ci_low": NAN, "ci_high": NAN}
    figure = draw_between_runs(pd.DataFrame([*rows, missing]))["entropy"]
    (panel,) = [axes for axes in figure.axes if axes.axison]
    lines = {line.get_label(): line.get_ydata() for line in panel.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["run 2, agency", "run 3, agency"]
    assert list(lines["run 2, agency"]) == pytest.approx([0.0, 50.0])
    assert list(lines["run 3, agency"]) == pytest.approx([0.0, -20.0])
    assert draw_between_runs(pd.DataFrame([missing])) == {}


def test_runs_that_cannot_be_compared_exit_2(runs, tmp_path, capsys):
    first = str(runs / "out0")
    for argv, message in (
        ([first, first], "two names lead to the same run"),
        ([first, str(runs / "out1"), first], "two names lead to the same run"),
        ([first, str(tmp_path)], "holds no run"),
        ([first, str(runs / "out1"), "--margin_speed=3"], "margins belong to the verdicts of one run"),
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
