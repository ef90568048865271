"""A run that goes on until it has decided: three looks, a budget, and nothing else that says when it ends."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from builders import no_model, stand_in, tiny_spec, unmeasured

from pruning_comparison import cli
from pruning_comparison.analysis import Margins, answer_hypotheses
from pruning_comparison.analysis.stopping import PrimaryAnswers
from pruning_comparison.errors import InputError, Interrupted
from pruning_comparison.report import write
from pruning_comparison.run import attempts, looks
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import CellResult, LookRecord, RunStore, load_run, read_manifest


@pytest.fixture
def spec(folder):
    return tiny_spec(folder, until_decided=True, iterations=12)


def deciding(monkeypatch, after):
    """Looks that decide after so many iterations; the iterations and cells that each of them was shown."""
    seen = []

    def answers(look, model, cells, measurements):
        seen.append((look, int((cells["iteration"] < look).sum())))
        verdict = "supported" if look >= after else "not enough data"
        return PrimaryAnswers(pd.DataFrame({"method": ["magnitude"], "verdict": [verdict]}), look >= after)

    monkeypatch.setattr(looks, "primary_answers_at", answers)
    return seen


def iterations_of(run):
    with RunStore(run) as store:
        return sorted({cell.iteration for cell in store.finished_cells()})


@pytest.mark.parametrize(("after", "measured", "why"), [(3, 3, "decided"), (6, 6, "decided"), (99, 12, "looks")])
def test_it_ends_at_the_first_look_that_decides_or_at_the_last(spec, tmp_path, monkeypatch, after, measured, why):
    stand_in(monkeypatch)
    seen = deciding(monkeypatch, after)
    run = run_comparison(spec, output_dir=tmp_path)
    assert iterations_of(run) == list(range(measured))
    # 2 variants at 2 levels in each iteration.
    assert seen == [(look, 4 * look) for look in (3, 6, 12) if look <= measured]
    manifest = read_manifest(run)
    assert manifest.ended == why
    assert manifest.finished is not None
    assert [(look.iterations, look.decided) for look in manifest.looks] == [
        (look, look >= after) for look in (3, 6, 12) if look <= measured
    ]
    assert manifest.looks[-1].verdicts == {"magnitude": "supported" if why == "decided" else "not enough data"}
    assert 0 < manifest.looks[0].measured_s <= manifest.looks[-1].measured_s <= manifest.measured_s


def test_what_a_real_look_decides_follows_from_its_iterations_alone(folder, tmp_path):
    """Tiny random models, four iterations: a look at the first three says what it says where there are only three."""
    run = run_comparison(tiny_spec(folder, iterations=4), output_dir=tmp_path)
    with RunStore(run) as store:
        cells, measurements = store.table("cells"), store.table("measurements")
    whole = looks.primary_answers_at(3, "tiny", cells, measurements)
    cut = [table[table["iteration"] < 3] for table in (cells, measurements)]
    assert whole.rows.to_csv() == looks.primary_answers_at(3, "tiny", *cut).rows.to_csv()
    assert list(whole.rows["id"]) == ["E2"]


def test_the_report_claims_at_a_third_of_the_error_rate(folder, tmp_path, monkeypatch):
    """An interval that is tested at a third of the rate is wider, whichever look the run ended at."""
    stand_in(monkeypatch)
    deciding(monkeypatch, 3)
    asked = []

    def answers(*arguments, looks=1, **more):
        asked.append(looks)
        return answer_hypotheses(*arguments, looks=looks, **more)

    monkeypatch.setattr(write, "answer_hypotheses", answers)
    for number, settings in enumerate(({"iterations": 3}, {"iterations": 12, "until_decided": True})):
        run = load_run(run_comparison(tiny_spec(folder, **settings), output_dir=tmp_path / str(number)))
        write._answers(run, {}, run.variants, Margins())
        assert run.looks == asked[-1]
    assert asked == [1, 3]


def test_it_is_continued_where_it_was_and_looks_are_not_taken_twice(spec, tmp_path, monkeypatch):
    """Cut off in the fifth iteration, after the first look; another session ends as an uninterrupted run does."""
    stand_in(monkeypatch)
    seen = deciding(monkeypatch, 6)
    left = [4 * 4 + 2]

    def cut(workspace, cell):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return no_model(), CellResult(cell, "done", fingerprint="x")

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "run_cell", cut)
        with pytest.raises(Interrupted, match=r"of 36 steps are kept"):
            run_comparison(spec, output_dir=tmp_path)
    run = run_comparison(spec, output_dir=tmp_path)
    assert seen == [(3, 12), (6, 24)]
    assert iterations_of(run) == list(range(6))
    whole = run_comparison(spec, output_dir=tmp_path / "whole")
    assert unmeasured(run) == unmeasured(whole)
    assert [(one.iterations, one.decided) for one in read_manifest(run).looks] == [
        (one.iterations, one.decided) for one in read_manifest(whole).looks
    ]


def test_only_what_a_look_needs_is_taken_over(folder, spec, tmp_path, monkeypatch):
    """A run of 8 iterations lies beside it; the look after three decides, so that five of them are not wanted."""
    stand_in(monkeypatch)
    run_comparison(tiny_spec(folder, iterations=8), output_dir=tmp_path)
    seen = deciding(monkeypatch, 3)
    run = run_comparison(spec, output_dir=tmp_path)
    assert iterations_of(run) == [0, 1, 2]
    assert seen == [(3, 12)]
    assert [reused.counts["cells"] for reused in read_manifest(run).reused] == [12]


def clock_of(monkeypatch, seconds):
    """A clock that is ``seconds`` later after every cell; quick stands in for measuring."""
    now = [100.0]

    def measured(workspace, cell):
        now[0] += seconds
        return no_model(), CellResult(cell, "done", fingerprint="x")

    stand_in(monkeypatch)
    monkeypatch.setattr(attempts, "run_cell", measured)
    monkeypatch.setattr(looks.time, "monotonic", lambda: now[0])


def test_a_look_that_the_budget_does_not_reach_is_not_begun(spec, tmp_path, monkeypatch, caplog):
    """12 cells of 10 s are 120 s for three iterations; three more would end at 240 s."""
    clock_of(monkeypatch, 10)
    deciding(monkeypatch, 99)
    run = run_comparison(spec, output_dir=tmp_path, budget_s=239)
    manifest = read_manifest(run)
    assert iterations_of(run) == [0, 1, 2]
    assert (manifest.ended, manifest.finished) == ("budget", None)
    assert manifest.measured_s == 120
    assert any("the budget of 4 min does not reach any further" in line for line in caplog.messages)
    assert run_comparison(spec, output_dir=tmp_path, budget_s=240) == run
    manifest = read_manifest(run)
    assert iterations_of(run) == list(range(6))
    assert (manifest.ended, manifest.measured_s) == ("budget", 240)
    assert [look.measured_s for look in manifest.looks] == [120, 240]
    assert run_comparison(spec, output_dir=tmp_path) == run
    assert (read_manifest(run).ended, read_manifest(run).measured_s) == ("looks", 480)
    assert read_manifest(run).finished is not None


def test_a_budget_that_is_used_ends_the_run_at_once(spec, tmp_path, monkeypatch):
    clock_of(monkeypatch, 10)
    seen = deciding(monkeypatch, 3)
    run = run_comparison(spec, output_dir=tmp_path, budget_s=45)
    with RunStore(run) as store:
        assert len(store.finished_cells()) == 5
    assert seen == []
    assert (read_manifest(run).ended, read_manifest(run).finished) == ("budget", None)


def test_a_look_whose_iterations_are_there_is_taken_even_if_the_budget_is_just_used(spec, tmp_path, monkeypatch):
    clock_of(monkeypatch, 10)
    deciding(monkeypatch, 3)
    run = run_comparison(spec, output_dir=tmp_path, budget_s=120)
    assert read_manifest(run).ended == "decided"


def test_a_failed_cell_is_tried_again_before_anything_is_looked_at(spec, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    seen = deciding(monkeypatch, 3)

    def failing(workspace, cell):
        return None, CellResult(cell, "failed", "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "run_cell", failing)
        run = run_comparison(spec, output_dir=tmp_path)
    assert seen == []
    assert (read_manifest(run).ended, read_manifest(run).finished) == (None, None)
    assert run_comparison(spec, output_dir=tmp_path) == run
    assert seen == [(3, 12)]


def test_what_cannot_go_together(spec, tmp_path, capsys):
    with pytest.raises(InputError, match=r"--iterations: 5 cannot be chosen with --until_decided"):
        ComparisonSpec(until_decided=True, iterations=5)
    with pytest.raises(InputError, match=r"--budget: it limits a run that goes on until it has decided"):
        run_comparison(ComparisonSpec(model_name="bundled"), output_dir=tmp_path, budget_s=60)
    options = ["run", "--model_name=bundled", f"--output_dir={tmp_path}", "--until_decided"]
    assert cli.main([*options, "--iterations=3"]) == 2
    assert "--iterations: 3 cannot be chosen with --until_decided" in capsys.readouterr().err
    assert cli.main([*options, "--budget=soon"]) == 2
    assert "'soon' is not a time such as 90s, 30m or 2h" in capsys.readouterr().err
    assert cli.main([*options, "--budget=0s"]) == 2
    assert "--budget: 0 s must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_times_are_read(text, seconds):
    options = cli.make_parser().parse_args(["run", f"--budget={text}", "--until_decided"])
    assert options.budget == seconds
    spec = cli._spec_of(options)
    assert (spec.until_decided, spec.iterations, spec.looks) == (True, 12, (3, 6, 12))


def test_iterations_mean_what_they_say(folder, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    assert tiny_spec(folder, iterations=5).looks == (5,)
    run = run_comparison(tiny_spec(folder, iterations=5), output_dir=tmp_path)
    assert iterations_of(run) == list(range(5))
    manifest = read_manifest(run)
    assert (manifest.looks, manifest.ended) == ((), None)
    assert not {"looks", "ended", "measured_s"} & set(json.loads((run / "manifest.json").read_text()))


def test_a_look_is_read_back_as_it_was_written():
    look = LookRecord(6, False, {"entropy": "not enough data"}, 12.5)
    assert LookRecord.from_dict(json.loads(json.dumps(look.as_dict()))) == look
    with pytest.raises(ValueError, match=r"looks\.decided is 'yes'"):
        LookRecord.from_dict({**look.as_dict(), "decided": "yes"})
