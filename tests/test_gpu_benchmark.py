"""The script for a GPU works: in small, on a CPU, as people start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = [sys.executable, str(SCRIPT), "--small", "--device=cpu", f"--output={folder}", *options]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    results = folder / "results.jsonl"
    return done, [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def test_every_check_passes_in_small_and_everything_is_written_at_once(tmp_path):
    done, rows = run(tmp_path, "--minutes=8", "--parts=machine,parity,decoding,trajectory")
    assert done.returncode == 0, done.stderr
    assert [row for row in rows if "error" in row] == []
    checks = [row for row in rows if "passed" in row]
    assert len(checks) == 11
    assert all(row["passed"] and row.get("heads_passed", True) for row in checks)
    decoded = {(row["kind"], row["rows"]) for row in rows if "step_ms" in row}
    assert decoded == {("dense", 1), ("50 %", 1), ("dense", 16), ("50 %", 16)}
    assert (tmp_path / "table.txt").read_text("utf-8") in done.stdout
    assert "NOT KEPT" not in done.stdout


@pytest.mark.slow
def test_the_main_script_s_command_runs_in_small(tmp_path):
    done, rows = run(tmp_path, "--minutes=8", "--parts=comparison")
    assert done.returncode == 0, done.stderr
    assert [row for row in rows if "error" in row] == []
    results = next(row for row in rows if "cells" in row)
    assert results["cells"] == {"done": 4}
    assert set(results["perplexity"]) == {"baseline 0 %", "baseline 50 %", "agency 0 %", "agency 50 %"}


@pytest.mark.slow
def test_a_job_that_fails_does_not_stop_the_others_and_no_time_is_no_failure(tmp_path):
    done, rows = run(tmp_path, "--minutes=1", "--device=cuda:7", "--parts=machine,trajectory")
    assert done.returncode == 0, done.stderr
    failed = [row for row in rows if row["what"] == "job failed"]
    assert [row["job"] for row in failed] == ["machine", "obs 16k"]
    assert all("no CUDA GPU" in row["error"] and "Traceback" in row["traceback"] for row in failed)
    done, rows = run(tmp_path / "no time", "--minutes=0.01", "--parts=machine")
    assert done.returncode == 0, done.stderr
    assert [row["error"] for row in rows] == ["the minutes are over"]


def test_a_job_can_be_begun_anew_in_a_process_of_its_own(tmp_path):
    done, rows = run(tmp_path, "--only=machine")
    assert done.returncode == 0, done.stderr
    assert {row["job"] for row in rows} == {"machine"}
    assert [row["what"] for row in rows][:2] == ["machine", "bandwidth"]


@pytest.mark.slow
def test_jobs_are_done_in_the_order_in_which_they_are_named(tmp_path):
    done, rows = run(tmp_path, "--minutes=0.01", "--jobs=obs 16k,machine")
    assert done.returncode == 0, done.stderr
    assert [row["job"] for row in rows] == ["obs 16k", "machine"]
    done, _ = run(tmp_path, "--jobs=obs 64k")
    assert done.returncode == 2
    assert "--jobs: 'obs 64k' is unknown. Choose from machine, parity bundled, decoding" in done.stderr


def test_an_unknown_part_is_named(tmp_path):
    done, rows = run(tmp_path, "--parts=speed")
    assert done.returncode == 2
    assert "--parts: 'speed' is unknown. Choose from machine, parity" in done.stderr
    assert rows == []
