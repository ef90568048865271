"""What is logged while a run goes on: kept in its folder with times and tracebacks, and shown in the terminal once."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace

import pytest
from builders import tiny_spec

from pruning_comparison import cli
from pruning_comparison.errors import InputError
from pruning_comparison.run import attempts
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.run_log import RunLog
from pruning_comparison.spec import Cell
from pruning_comparison.store.run_folder import latest_run, read_manifest, write_manifest

FAILING = Cell("agency", "magnitude", 0, 50.0)
PACKAGE = logging.getLogger("pruning_comparison")


@pytest.fixture
def failing(monkeypatch):
    original = attempts.run_cell

    def run_cell(workspace, cell):
        if cell == FAILING:
            raise RuntimeError("no such luck\nand a second line")
        return original(workspace, cell)

    monkeypatch.setattr(attempts, "run_cell", run_cell)


def test_a_failed_cell_is_in_the_log_with_its_time_and_traceback(folder, tmp_path, failing, caplog):
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    lines = (run / "run.log").read_text("utf-8").splitlines()
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(f"{at} INFO loading .*", lines[0])
    (first,) = [number for number, line in enumerate(lines) if " ERROR " in line]
    assert re.fullmatch(f"{at} ERROR failed: {FAILING.describe()}: RuntimeError: no such luck", lines[first])
    assert lines[first + 1] == "Traceback (most recent call last):"
    assert "in run_cell" in "\n".join(lines[first:])
    assert "RuntimeError: no such luck" in lines
    assert "and a second line" in lines
    # A program's own handlers get the same, once.
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "in run_cell" in logging.Formatter().format(record)


def test_a_continued_run_goes_on_with_its_log_and_leaves_the_logger_as_it_was(folder, tmp_path, failing):
    before = (PACKAGE.level, list(PACKAGE.handlers), logging.root.level, list(logging.root.handlers))
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path, code_commit="one")
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path, code_commit="two") == run
    assert (PACKAGE.level, list(PACKAGE.handlers), logging.root.level, list(logging.root.handlers)) == before
    text = (run / "run.log").read_text("utf-8")
    assert text.count("ERROR failed") == 2
    assert text.count(f"INFO continuing {run}") == 1
    assert text.count("WARNING continued at commit two after starting at one") == 1


def test_an_error_that_ends_a_run_is_kept_with_its_traceback(folder, tmp_path, failing):
    with pytest.raises(RuntimeError):
        run_comparison(tiny_spec(folder), output_dir=tmp_path, raise_failures=True)
    text = (latest_run(tmp_path) / "run.log").read_text("utf-8")
    assert "ERROR stopped: no such luck" in text
    assert "in run_cell" in text


def test_a_refused_spec_makes_no_log(folder, tmp_path):
    with pytest.raises(InputError):
        run_comparison(tiny_spec(folder, execution="masked"), output_dir=tmp_path, save_models=True)
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "run.log").mkdir()
    with RunLog() as log:
        assert log.kept_in(tmp_path) == tmp_path
        PACKAGE.warning("nobody keeps this")
    (tmp_path / "run.log").rmdir()
    if sys.platform == "linux":
        (tmp_path / "run.log").symlink_to("/dev/full")
        with RunLog() as log:
            PACKAGE.warning("before the folder was known")
            log.kept_in(tmp_path)
            PACKAGE.warning("nor this")
    assert "Logging error" not in capsys.readouterr().err


@pytest.fixture
def no_report(monkeypatch):
    """Charts take longer than all else here, and these tests are not about them."""
    monkeypatch.setattr(
        "pruning_comparison.report.write.write_results", lambda folder, **settings: folder / "report.html"
    )


def options_of(spec, output_dir):
    named = {"num_tokens", "iterations", "max_prompts", "eval_tokens", "calibration_tokens", "calibration_window"}
    named |= {"eval_text", "calibration_text", "adaptation", "timing_pairs", "timing_limit_s"}
    values = {name: getattr(spec, name) for name in named}
    return [
        "run", f"--model_name={spec.model_name}", "--device=cpu", "--threads=1", "--pruning_levels=0,50",
        "--pruning_method=magnitude", "--temperatures=1", f"--output_dir={output_dir}",
        *(f"--{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def test_the_terminal_shows_news_warnings_and_failures_once_and_no_traceback(
    folder, tmp_path, failing, capsys, request
):
    options = options_of(tiny_spec(folder), tmp_path)
    assert cli.main(options) == 1
    shown = capsys.readouterr().err
    assert shown.count(f"failed: {FAILING.describe()}: RuntimeError: no such luck\n") == 1
    assert "Traceback" not in shown
    assert shown.count("estimating\n") == shown.count("writing the report\n") == 1
    run = latest_run(tmp_path)
    write_manifest(run, replace(read_manifest(run), commit="another"))
    request.getfixturevalue("no_report")
    assert cli.main(options) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(f"continuing {run}") == 1
    (warning,) = [line for line in lines if "continued at commit" in line]
    assert warning.startswith("warning: continued at commit ")
    assert warning.endswith(" after starting at another")


def test_quiet_shows_no_news(folder, tmp_path, failing, capsys, no_report):
    assert cli.main([*options_of(tiny_spec(folder), tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().err == "error: 1 cells failed; the report names them. The same command tries again.\n"
    assert "ERROR failed" in (latest_run(tmp_path) / "run.log").read_text("utf-8")
