"""Tasks as a part of a run, with questions that stand in for those of the harness: what is asked, kept, and taken over."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import yaml
from builders import cut_off_after, save_tiny_model, tiny_spec, unmeasured, write_short_texts

from pruning_comparison import cli
from pruning_comparison.analysis import Margins, level_of
from pruning_comparison.errors import InputError
from pruning_comparison.measure import tasks as harness
from pruning_comparison.measure.tasks import TaskAnswer
from pruning_comparison.models import live_heads
from pruning_comparison.options import with_presets_and_files
from pruning_comparison.plan.forecast import Speeds, expected, passes
from pruning_comparison.plan.memory import ModelSizes
from pruning_comparison.plan.plan import format_plan, plan_run
from pruning_comparison.report.write import write_results
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.spec import LATER_SETTINGS, ComparisonSpec, revisions_of
from pruning_comparison.store import RunStore, load_run, read_manifest

QUESTIONS = 40


class Questions:
    """A task of which a model answers a question the worse, the fewer heads it has; the last one has no finite answer."""

    metrics: ClassVar = {"counting": ["accuracy"]}
    questions: ClassVar = {"counting": QUESTIONS}
    asked: ClassVar[list[int]] = []

    def __init__(self, content="as ever"):
        self._content = content

    def content(self):
        return self._content

    def tokens(self, tokenizer, bos):
        return 1_000

    def answers(self, model, tokenizer, *, bos, batch_size):
        heads = sum(live_heads(model))
        Questions.asked.append(heads)
        known = [TaskAnswer("counting", n, {"accuracy": float(n % 8 < heads)}) for n in range(QUESTIONS - 1)]
        return [*known, TaskAnswer("counting", QUESTIONS - 1, {}, (math.nan,), "not a finite number")]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    Questions.asked = []
    for module in ("run.inputs", "run.measure_cell", "plan.plan", "plan.forecast"):
        monkeypatch.setattr(f"pruning_comparison.{module}.load_tasks", lambda names, limit: Questions())
    model = save_tiny_model(tmp_path / "model")
    return tiny_spec(model, iterations=2, tasks=("counting",), threads=1, **write_short_texts(tmp_path))


def accuracies(run):
    table = load_run(run).measurements
    return table[table["metric"] == "accuracy"]


def test_every_question_is_a_row_of_the_journal(spec, tmp_path):
    run = run_comparison(spec, output_dir=tmp_path / "runs")
    rows = accuracies(run)
    assert len(rows) == QUESTIONS * len(list(spec.cells()))
    assert set(rows["document"]) == {"counting"}
    here = rows[(rows["variant"] == "baseline") & (rows["iteration"] == 0) & (rows["level"] == 50)]
    assert here["prompt"].tolist() == list(range(QUESTIONS))
    # 4 of 8 heads are left: of every eight questions the first four are right.
    assert here["value"].iloc[:-1].tolist() == [float(n % 8 < 4) for n in range(QUESTIONS - 1)]
    assert math.isnan(here["value"].iloc[-1])
    assert here["reason"].iloc[-1] == "not a finite number"
    # One baseline and, in each of two iterations, one agency; the unpruned model is asked once.
    assert sorted(Questions.asked) == [4, 4, 4, 8]


def test_the_report_shows_accuracy_and_what_is_lost(spec, tmp_path):
    run = run_comparison(spec, output_dir=tmp_path / "runs")
    page = write_results(run, save_outputs=False, margins={"accuracy": 0.1}).read_text("utf-8")
    assert 'id="tasks"' in page
    found = json.loads((run / "results.json").read_text("utf-8"))
    rows = [row for row in found["tasks"] if row["level"] == 50]
    # Of the first 39 questions 20 are right and 39 were.
    assert [row["estimate"] for row in rows] == pytest.approx([20 / 39] * 2)
    assert [row["vs_dense"] for row in rows] == pytest.approx([-19 / 39] * 2)
    lost = found["accuracy_lost"]
    assert [(row["level"], row["margin"], row["verdict"]) for row in lost] == [(50, 0.1, "supported")] * 2
    assert sum(verdict["id"] == "P2" for verdict in found["verdicts"]) == 2
    assert (run / "charts" / "tasks.png").is_file()
    assert (run / "tasks.csv").is_file()


def test_a_run_without_tasks_has_nothing_of_them_and_is_the_same_run_as_before(spec, tmp_path):
    without = replace(spec, tasks=())
    run = run_comparison(without, output_dir=tmp_path / "runs")
    write_results(run, save_outputs=False)
    assert Questions.asked == []
    assert not (run / "tasks.csv").exists()
    assert "tasks" not in json.loads((run / "results.json").read_text("utf-8"))
    assert not {"tasks", "limit"} & yaml.safe_load((run / "run.yaml").read_text("utf-8")).keys()
    # What earlier versions stored has no such settings: it counts as the same.
    settings = {name: value for name, value in without.as_dict().items() if name not in ("tasks", "task_limit")}
    older = ComparisonSpec.from_dict(settings)
    assert older.content_hash({}) == without.content_hash({})
    assert LATER_SETTINGS["tasks"] == []
    assert "accuracy" not in revisions_of(without).metrics
    assert revisions_of(spec).metrics["accuracy"] == 1


def test_a_run_that_was_interrupted_asks_the_rest(spec, tmp_path):
    whole = run_comparison(spec, output_dir=tmp_path / "whole")
    with cut_off_after(3):
        run_comparison(spec, output_dir=tmp_path / "cut")
    assert unmeasured(run_comparison(spec, output_dir=tmp_path / "cut")) == unmeasured(whole)


def test_another_limit_takes_heads_and_perplexity_over_and_asks_again(spec, tmp_path):
    run_comparison(spec, output_dir=tmp_path / "runs")
    Questions.asked = []
    second = run_comparison(replace(spec, task_limit=7), output_dir=tmp_path / "runs")
    (taken,) = read_manifest(second).reused
    assert taken.counts == {"cells without their texts": len(list(spec.cells()))}
    assert len(Questions.asked) == 4
    assert len(accuracies(second)) == QUESTIONS * len(list(spec.cells()))
    with RunStore(second) as store:
        assert not store.parts()


def test_other_questions_are_another_run(spec, tmp_path, monkeypatch):
    first = run_comparison(spec, output_dir=tmp_path / "runs")
    monkeypatch.setattr("pruning_comparison.run.inputs.load_tasks", lambda names, limit: Questions("others"))
    second = run_comparison(spec, output_dir=tmp_path / "runs")
    assert first != second
    assert read_manifest(first).inputs["tasks"] != read_manifest(second).inputs["tasks"]


def test_the_plan_counts_questions_time_and_what_can_be_found(spec):
    inputs = prepare(spec, identify=False)
    plan = plan_run(spec, Margins(), inputs)
    tasks = plan["tasks"]
    assert tasks["questions"] == {"counting": QUESTIONS}
    assert tasks["pairs"] == 2 * QUESTIONS
    # One level above 0, two variants, one method.
    assert tasks["claim_level"] == pytest.approx(level_of("accuracy", tasks=True) / 2)
    # Two iterations say too little of what varies between them to claim anything: all questions at once would be too few.
    assert tasks["detectable"] > 1
    assert "no loss is large enough" in format_plan({**plan, "expectations": []})
    # Of one model's answers, with a standard error of sqrt(0.33 / 40) = 9 points and t of 3.2 and 0.84 beside them, some 37.
    one = plan_run(replace(spec, iterations=1), Margins(), inputs)["tasks"]
    assert 0.3 < one["detectable"] < 0.5
    assert tasks["no_difference"] == 0.0
    said = format_plan(
        {**plan, "expected": {**expected(spec, inputs, Speeds(0.01, 0.1, 0.1), ModelSizes.of(inputs.preview))}}
    )
    assert "tasks        counting (40 questions)" in said
    assert "and none to be less than that in 0 % of runs" in said
    # Two variants in two iterations at one level, and the unpruned model: five times 1,000 tokens.
    assert passes(spec, inputs)["task_tokens"] == 5_000
    seconds = expected(spec, inputs, Speeds(0.01, 0.1, 0.1), ModelSizes.of(inputs.preview))["seconds"]
    assert seconds["tasks"] == pytest.approx(0.9 * 50)  # 0.9: at 50 % models are faster
    without = expected(replace(spec, tasks=()), inputs, Speeds(0.01, 0.1, 0.1), ModelSizes.of(inputs.preview))
    assert "tasks" not in without["seconds"]


def test_more_questions_find_smaller_losses(spec, monkeypatch):
    spec = replace(spec, iterations=1)
    inputs = prepare(spec, identify=False)
    few = plan_run(spec, Margins(), inputs)["tasks"]["detectable"]
    monkeypatch.setattr(Questions, "questions", {"counting": 100 * QUESTIONS})
    assert plan_run(spec, Margins(), inputs)["tasks"]["detectable"] < few / 3


# Options


def parsed(*words):
    options = cli.parse(["run", "--model_name=bundled", "--device=cpu", "--threads=1", *words])
    return cli._spec_of(options), cli._margins_of(options)


def test_options_name_tasks_limit_and_margin():
    spec, margins = parsed("--tasks=SOTU_Last_Word,hellaswag", "--limit=200", "--margin-accuracy=3")
    assert (spec.tasks, spec.task_limit) == (("sotu_last_word", "hellaswag"), 200)
    assert margins == {"accuracy": pytest.approx(0.03)}
    assert spec.as_options()["tasks"] == ["sotu_last_word", "hellaswag"]
    assert spec.as_options()["limit"] == 200
    spec, _ = parsed()
    assert (spec.tasks, spec.task_limit) == ((), None)


def test_a_limit_below_one_or_without_tasks_is_told():
    with pytest.raises(InputError, match=r"--limit: 0 must be at least 1"):
        parsed("--tasks=hellaswag", "--limit=0")
    spec, _ = parsed("--limit=5")
    assert spec.idle_settings() == ["--limit=5 changes nothing, because no task is asked: give --tasks as well"]


def test_a_file_of_options_may_name_a_tasks_file_only_where_it_is_trusted(tmp_path):
    known = cli.make_parser().commands["run"].options()
    place = tmp_path / "run.yaml"
    place.write_text("tasks: [sotu_last_word, folder/mine.yaml]\n")
    with pytest.raises(InputError, match=r"names folder/mine.yaml, a task's file.*--trust_methods"):
        with_presets_and_files(["run", f"--config={place}"], known)
    words = with_presets_and_files(["run", f"--config={place}", "--trust_methods"], known)
    assert "--tasks=sotu_last_word,folder/mine.yaml" in words
    place.write_text("tasks: [sotu_last_word]\n")
    assert "--tasks=sotu_last_word" in with_presets_and_files(["run", f"--config={place}"], known)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch, capsys, tmp_path):
    harness.load_tasks.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    words = ["run", "--model_name=bundled", "--device=cpu", "--threads=1", "--tasks=sotu_last_word"]
    assert cli.main([*words, f"--output_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "--tasks: lm-evaluation-harness, or a package that it needs, is not installed" in said
    assert "pip install 'pruning-comparison[tasks]'" in said
