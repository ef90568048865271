"""Two runs: what differs is named, what cannot be compared is left out with its reason, and the rest is compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from builders import save_tiny_model, write_short_texts

from pruning_comparison import cli
from pruning_comparison.report.between_runs import (
    Difference,
    compare,
    comparison_findings,
    differences,
    limits,
    same_tokens,
)  # fmt: skip
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import Manifest, Run, load_run, read_manifest

NAN = math.nan


def manifest(**changes):
    spec = ComparisonSpec(model_name="one", pruning_levels=(0, 50), temperatures=(1.0,)).as_dict()
    base = {
        "spec": {**spec, **changes.pop("spec", {})},
        "inputs": {"prompts": "p", "eval_text": "e", "calibration_text": "c", "model": "m"},
        "model": {"name": "one"},
        "versions": {"torch": "2.11.0"},
        "hardware": {"processor": "slow", "threads": 1},
        "commit": "abc",
    }
    return {key: {**value, **changes[key]} if isinstance(value, dict) and key in changes else changes.get(key, value)
            for key, value in base.items()}  # fmt: skip


def stored(tokens=(10.0, 12.0), **changes):
    windows = [
        {"document": f"d{number}", "window": 0, "metric": metric, "value": value}
        for number, count in enumerate(tokens)
        for metric, value in (("window_tokens", count), ("window_bytes", 50.0))
    ]
    stored_manifest = Manifest.from_dict({**manifest(**changes), "model": None})
    return Run(Path(), stored_manifest, measurements=pd.DataFrame(windows))


def left_out(first, second):
    return {metric for limit in limits(first, second) for metric in limit.metrics}


# What differs


def test_everything_that_differs_is_named_and_nothing_else():
    found = differences(
        manifest(),
        manifest(
            spec={"model_name": "two", "pruning_levels": [0.0, 30.0]}, inputs={"model": "n"}, versions={"torch": "2.12.0"},
            hardware={"processor": "fast"}, commit=None,
        ),
    )  # fmt: skip
    assert found == [
        Difference("model_name", "one", "two"),
        Difference("pruning_levels", "0, 50", "0, 30"),
        Difference("content of model", "m", "n"),
        Difference("torch", "2.11.0", "2.12.0"),
        Difference("machine: processor", "slow", "fast"),
        Difference("commit", "abc", "not recorded"),
    ]
    assert differences(manifest(), manifest()) == []


# What cannot be compared


def test_like_runs_are_compared_in_everything():
    (found,) = limits(stored(), stored())
    assert (found.metrics, found.note) == ((), "timed at another time")


def test_another_evaluation_text_leaves_no_pairs_of_documents():
    found = limits(stored(), stored(inputs={"eval_text": "other"}))
    assert [limit.what for limit in found] == ["perplexity and bits per byte", "speed"]
    assert "different texts" in found[0].why
    assert found[0].metrics == ("perplexity", "bits_per_byte")


def test_another_tokenizer_leaves_bits_per_byte():
    assert same_tokens(stored(), stored())
    assert not same_tokens(stored(), stored(tokens=(10.0, 11.0)))
    assert left_out(stored(), stored(tokens=(10.0, 11.0))) == {"perplexity"}
    assert "Bits per byte are compared instead" in limits(stored(), stored(tokens=(9.0, 11.0)))[0].why


def test_other_prompts_leave_neither_texts_nor_speed():
    found = left_out(stored(), stored(inputs={"prompts": "q"}))
    assert {"distinct_2_distance", "generation_perplexity_distance", "tokens_per_second", "end_to_end_s"} <= found
    assert "perplexity" not in found


def test_texts_of_other_lengths_keep_the_times_that_do_not_depend_on_it():
    found = left_out(stored(), stored(spec={"num_tokens": 7}))
    assert "tokens_per_second" in found
    assert "first_token_latency_s" not in found


def test_another_model_judges_its_own_texts():
    found = limits(stored(), stored(inputs={"model": "n"}))
    assert {metric for limit in found for metric in limit.metrics} == {"generation_perplexity_distance"}
    assert [limit.note for limit in found if limit.note] == ["counted in other tokens", "timed at another time"]


@pytest.mark.parametrize(
    "change", [{"hardware": {"processor": "fast"}}, {"versions": {"torch": "2.12.0"}}, {"hardware": {"threads": 2}}]
)
def test_speed_of_other_machines_is_labelled_and_not_left_out(change):
    (found,) = limits(stored(), stored(**change))
    assert found.metrics == ()
    assert "tokens_per_second" in found.reserved
    assert found.note == "another machine"
    assert "not what pruning does" in found.why


def test_other_batches_leave_no_speed():
    assert "tokens_per_second" in left_out(stored(), stored(spec={"batch_size": 4}))


def test_what_only_one_run_has_is_listed():
    found = limits(
        stored(spec={"pruning_methods": ["entropy", "random"]}),
        stored(spec={"pruning_methods": ["entropy"], "pruning_levels": [0.0, 30.0, 50.0], "temperatures": [0.7, 1.0]}),
    )
    assert [(limit.what, limit.why) for limit in found if limit.what != "speed"] == [
        ("method random", "only the first run has it"),
        ("level 30 %", "only the second run has it"),
        ("temperature 0.7", "only the second run has it"),
    ]
    apart = limits(stored(spec={"pruning_methods": ["entropy"]}), stored(spec={"pruning_methods": ["random"]}))
    assert [limit.what for limit in apart] == ["methods", "speed"]
    assert "every method of the second is set against every method of the first" in apart[0].why


# In words


def row(metric, level, verdict, estimate, *, better="lower", note="", temperature=NAN):
    return {
        "method": "entropy", "variant": "agency", "metric": metric, "level": level, "temperature": temperature,
        "verdict": verdict, "estimate": estimate, "ci_low": estimate - 0.01, "ci_high": estimate + 0.01, "n": 6,
        "scale": "log_ratio", "unit": "log ratio", "better": better, "note": note,
    }  # fmt: skip


def test_differences_are_claimed_only_where_they_are_clear():
    (found,) = comparison_findings(
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
        "calibration_window": 64, "temperatures": (1.0,), "prompt_file": str(root / "prompts.txt"), **texts,
    }  # fmt: skip
    for number, methods in ((0, ("magnitude",)), (1, ("magnitude", "random"))):
        folder = save_tiny_model(root / f"model{number}", seed=number)
        spec = ComparisonSpec(model_name=str(folder), pruning_methods=methods, **settings)
        run_comparison(spec, output_dir=root / f"out{number}", raise_failures=True)
    return root


def test_two_runs_of_other_models_are_compared_from_the_command_line(runs, tmp_path, capsys):
    argv = ["report", str(runs / "out0"), str(runs / "out1"), f"--output_dir={tmp_path}", "--quiet"]
    assert cli.main(argv) == 0
    (folder,) = tmp_path.glob("comparison_*")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    table = pd.read_csv(folder / "comparison.csv")
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
    assert not list(tmp_path.glob("comparison_*"))


def test_a_run_against_its_copy_shows_no_difference(runs):
    run = load_run((runs / "out0" / "latest").resolve())
    compared = compare(run, run)
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
