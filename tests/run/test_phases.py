"""Processor time by phase: nested phases count once, and the log's line is read back."""

from __future__ import annotations

import pytest
from builders import tiny_spec

from pruning_comparison.run import phases
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.phases import PhaseClock, phases_in


@pytest.fixture
def clock(monkeypatch):
    """A clock whose processor has used so many seconds at each call."""
    times = iter([0.0, 3.0, 5.0, 9.0, 10.0, 10.5])
    monkeypatch.setattr(phases.time, "process_time", lambda: next(times))
    made = PhaseClock()
    with made.phase("outer"), made.phase("inner"):  # 0 to 9, and within it 3 to 5
        pass
    with made.phase("inner"):  # 10 to 10.5
        pass
    return made


def test_what_a_phase_spends_within_another_counts_for_the_inner_one(clock):
    assert list(clock.seconds().items()) == [("outer", 7.0), ("inner", 2.5)]


def test_a_phase_that_fails_counts_all_the_same(monkeypatch):
    times = iter([1.0, 4.0])
    monkeypatch.setattr(phases.time, "process_time", lambda: next(times))
    clock = PhaseClock()
    with pytest.raises(ValueError, match="broken"), clock.phase("adaptation"):
        raise ValueError("broken")
    assert clock.seconds() == {"adaptation": 3.0}


def test_the_line_of_the_log_is_read_back_and_sessions_add_up(clock):
    line = clock.log_line()
    assert line == "processor time by phase: outer 7.0 s, inner 2.5 s"
    log = f"2026-11-26 INFO loading\n2026-11-26 INFO {line}\n2026-11-27 INFO {line}\nother 5.0 s, lines 1.0 s\n"
    assert phases_in(log) == {"outer": 14.0, "inner": 5.0}
    assert phases_in("nothing") == {}


def test_a_run_logs_what_each_of_its_phases_has_taken(folder, tmp_path):
    spec = tiny_spec(folder, variants=("baseline", "agency"), pruning_methods=("entropy",), timing_limit_s=0)
    found = phases_in((run_comparison(spec, output_dir=tmp_path) / "run.log").read_text("utf-8"))
    computing = {"perplexity", "texts", "timing", "moments", "prices", "choice of heads", "dense stream", "adaptation"}
    assert {"loading", "scores by entropy", "scores by fisher", "removing heads", *computing} == set(found)
