"""What trackers are sent, and that none of them changes or ends a run. The trackers themselves: ``test_trackers.py``."""

from __future__ import annotations

import json
import logging
import math

import pandas as pd
import pytest
from builders import save_tiny_model, tiny_spec, unmeasured, write_short_texts

from pruning_comparison import cli
from pruning_comparison.errors import InputError, Interrupted
from pruning_comparison.report.write import write_results
from pruning_comparison.run import tracking as tracking_module
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.tracking import TRACKED_RUNS, TRACKERS, Tracking, estimates_at, start_tracking

SPEC = {"iterations": 2, "temperatures": (0.0, 1.0), "variants": ("baseline",), "eval_tokens": 300}


class Recorder:
    """A tracker that keeps what it is sent; it raises in the method named ``fails``."""

    def __init__(self, fails=""):
        self.calls, self.values, self.fails = [], [], fails

    def _called(self, name, *what):
        self.calls.append((name, *what))
        if name == self.fails:
            raise RuntimeError("the server is gone")

    def begin(self, folder, settings, known):
        self.settings = settings
        self._called("begin", known)
        return "run-7"

    def log(self, values, step):
        self._called("log", step)
        self.values.append((step, values))

    def keep(self, files, charts):
        self._called("keep", [file.name for file in files], [chart.name for chart in charts])

    def end(self, *, failed):
        self._called("end", failed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tracked") / "model")
    write_short_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def tracked(place, tmp_path_factory):
    """A run with a recorder and with one that fails at its second figures; the run without is beside it."""
    recorder, failing = Recorder(), Recorder(fails="log")
    tracking = Tracking({"good": recorder, "bad": failing})
    output = tmp_path_factory.mktemp("runs")
    run = run_comparison(tiny_spec(place, **SPEC), output_dir=output / "tracked", tracking=tracking)
    plain = run_comparison(tiny_spec(place, **SPEC), output_dir=output / "plain")
    return run, plain, tracking, recorder, failing


def test_every_level_is_sent_when_it_is_complete_and_again_with_each_iteration(tracked):
    _, _, _, recorder, _ = tracked
    assert [call[0] for call in recorder.calls] == ["begin", "log", "log", "log", "log"]
    levels = [{name.split("/")[3] for name in values} for _, values in recorder.values]
    assert levels == [{"level_0"}, {"level_50"}, {"level_0"}, {"level_50"}]
    assert [step for step, _ in recorder.values] == [1, 1, 2, 2]


def test_what_is_sent_last_is_what_the_report_says(tracked, no_charts):
    """Estimates, intervals and n of a level, whatever else is known by then, are those of summary.csv."""
    run, _, _, recorder, _ = tracked
    write_results(run, save_outputs=False)
    summary = pd.read_csv(run / "summary.csv")
    expected = {}
    for row in summary.to_dict("records"):
        name = f"{row['metric']}/{row['method']}/{row['variant']}/level_{row['level']:g}"
        if not math.isnan(row["temperature"]):
            name += f"/temperature_{row['temperature']:g}"
        for column in ("estimate", "ci_low", "ci_high", "n"):
            if math.isfinite(row[column]):
                expected[f"{name}/{column}"] = row[column]
    sent = {}
    for _, values in recorder.values:
        sent |= values
    assert sent.keys() == expected.keys()
    assert sent == pytest.approx(expected, rel=1e-9)
    assert sum(name.startswith("perplexity/magnitude/baseline/level_50/") for name in sent) == 4


def test_settings_versions_and_machine_are_sent(tracked):
    _, _, _, recorder, _ = tracked
    assert recorder.settings["seed"] == 0
    assert recorder.settings["pruning_levels"] == [0.0, 50.0]
    assert "version torch" in recorder.settings
    assert recorder.settings["machine device"] == "cpu"


def test_a_tracker_that_fails_is_warned_of_once_and_changes_nothing(tracked):
    run, plain, tracking, _, failing = tracked
    assert unmeasured(run) == unmeasured(plain)
    assert [call[0] for call in failing.calls] == ["begin", "log"]
    assert list(tracking.trackers) == ["good"]
    log = (run / "run.log").read_text()
    assert log.count("bad failed and is left out from here on: RuntimeError: the server is gone. The run goes on") == 1


def test_report_and_charts_are_sent_at_the_end(tmp_path):
    (tmp_path / "charts").mkdir()
    for name in ("report.html", "summary.csv", "charts/b.png", "charts/a.png", "charts/a.svg"):
        (tmp_path / name).write_text("x")
    recorder = Recorder()
    tracking = Tracking({"good": recorder}, _folder=tmp_path)
    tracking.finish(failed=False)
    assert recorder.calls == [("keep", ["report.html", "summary.csv"], ["a.png", "b.png"]), ("end", False)]
    tracking.finish(failed=False)  # once is enough
    assert len(recorder.calls) == 2


def test_a_run_that_is_continued_goes_on_in_the_tracker_too(tracked, place):
    run, *_ = tracked
    assert json.loads((run / TRACKED_RUNS).read_text())["good"] == "run-7"
    again = Recorder()
    tracking_module.track_again(Tracking({"good": again}), run, tiny_spec(place, **SPEC))
    assert again.calls[0] == ("begin", "run-7")
    assert [call[:2] for call in again.calls[1:3]] == [("log", 2), ("log", 2)]  # all that is known, at both levels
    assert again.calls[-1] == ("end", False)


NOWHERE = {
    "temperature": math.nan, "prompt": math.nan, "repeat": math.nan, "unit": "", "reason": None, "phase": "quality",
}  # fmt: skip


def test_ratios_are_those_to_level_0_worked_out_by_hand():
    """One document of 10 tokens: 20 nats dense, 25 pruned. exp(2.0), exp(2.5), and exp(0.5) times the dense model's."""
    cells, rows = [], []
    for level, nats in ((0.0, 20.0), (40.0, 25.0), (80.0, 60.0)):
        cell = {"variant": "agency", "method": "my.module:score it", "iteration": 0, "level": level}
        cells.append({**cell, "status": "done", "fingerprint": f"f{level}"})
        for metric, value in (
            ("window_nats", nats),
            ("window_tokens", 10.0),
            ("window_bytes", 40.0),
            ("window_words", 5.0),
        ):
            rows.append({**cell, **NOWHERE, "metric": metric, "value": value, "document": "d", "window": 0})
    values = estimates_at("m", pd.DataFrame(cells), pd.DataFrame(rows), "my.module:score it", 40.0)
    place = "my.module:score it/agency/level_40"
    assert values[f"perplexity/{place}/estimate"] == pytest.approx(math.exp(2.5))
    assert values[f"perplexity_ratio/{place}/estimate"] == pytest.approx(math.exp(0.5))
    assert values[f"word_perplexity/{place}/estimate"] == pytest.approx(math.exp(5.0))
    assert not [name for name in values if "level_80" in name or "level_0/" in name]
    assert f"perplexity/{place}/ci_low" not in values  # one document in one iteration has no interval


def test_names_that_are_unknown_or_not_installed_are_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    assert tuple(TRACKERS) == cli.TRACKER_NAMES
    with pytest.raises(InputError, match=r"--track: 'mlfow' is unknown\. Did you mean mlflow"):
        start_tracking(["mlfow"])
    monkeypatch.setattr(tracking_module.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path}", "--track=WandB"]) == 2
    assert "pip install 'pruning-comparison[wandb]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("run_*"))


def test_a_tracker_that_cannot_be_loaded_is_left_out(monkeypatch, caplog):
    def broken():
        raise ImportError("a library of its own is missing")

    monkeypatch.setitem(TRACKERS, "mlflow", tracking_module.TrackerKind("mlflow", broken, "json"))
    with caplog.at_level(logging.WARNING):
        assert start_tracking(["mlflow"]).trackers == {}
    assert "mlflow failed and is left out from here on: ImportError: a library of its own is missing" in caplog.text


def options_of(place, output):
    return [
        f"--model_name={place}", "--device=cpu", "--threads=1", f"--output_dir={output}", "--quiet", "--num_tokens=3",
        "--max_prompts=1", "--timing_limit_s=0", "--timing_pairs=2", "--eval_tokens=150", "--calibration_tokens=128",
        "--calibration_window=64", f"--eval_text={place / 'texts' / 'held_out'}", "--variants=baseline", "--temperatures=1",
        f"--calibration_text={place / 'texts' / 'calibration'}", "--pruning_levels=0,50", "--pruning_method=magnitude",
        "--iterations=1",
    ]  # fmt: skip


def test_the_command_tracks_a_run_its_repetition_and_its_interruption(place, tmp_path, monkeypatch, no_charts, capsys):
    made = []

    def make():
        made.append(Recorder())
        return made[-1]

    monkeypatch.setitem(TRACKERS, "mlflow", tracking_module.TrackerKind("mlflow", make, "json"))
    options = [*options_of(place, tmp_path / "out"), "--track=mlflow"]
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "log", lambda self, values, step: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["run", *options]) == Interrupted.exit_code
    assert made[0].calls[-1] == ("end", True)
    assert cli.main(["run", *options]) == 0
    assert made[1].calls[0] == ("begin", "run-7")  # continued
    assert [call[0] for call in made[1].calls] == ["begin", "log", "log", "keep", "end"]
    assert made[1].calls[-2][1] == ["report.html", "results.json", "summary.csv", "run.yaml"]
    assert made[1].calls[-1] == ("end", False)
    assert cli.main(["run", *options]) == 0  # finished before: shown, and sent whole
    assert [call[0] for call in made[2].calls] == ["begin", "log", "log", "keep", "end"]
    (run,) = (tmp_path / "out").glob("run_*")
    assert "track: mlflow" in (run / "run.yaml").read_text()
