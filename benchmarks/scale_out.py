"""Quality cells per second of a local Ray cluster beside one process: python benchmarks/scale_out.py --help

Two workers of one thread each against one process with one thread, in turns, in one run; the results have to be the same.
One JSON line: the ratio once the workers have loaded the model, as a long run has it, and with their start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.launchers import Begun, Event, Launcher, RayLauncher, Work, launch_serially
from pruning_comparison.run.provenance import hardware
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import load_run
from pruning_comparison.store.records import CellResult

MEASURED = ("_s", "peak_memory_bytes", "scratch_bytes")


class Clocked:
    """A launcher that leaves out timings and notes when the first cell begins and the last one ends."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.started = self.begun = self.ended = 0.0
        self.cells = 0

    def __call__(self, work: Work) -> Iterator[Event]:
        self.started = time.perf_counter()
        for event in self._launcher(replace(work, timings=frozenset())):
            if isinstance(event, Begun) and not self.begun:
                self.begun = time.perf_counter()
            if isinstance(event, CellResult):
                self.cells += 1
                self.ended = time.perf_counter()
            yield event


def results(run: Path) -> list[str]:
    """Everything that a clock or the memory's meter has not measured."""
    stored = load_run(run)
    unmeasured = stored.measurements[~stored.measurements["metric"].str.endswith(MEASURED)]
    tables = (stored.cells, unmeasured, stored.heads, stored.signals, stored.replies, stored.texts)
    return [table.to_csv(index=False) for table in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="bundled")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4, help="trajectories per variant")
    parser.add_argument("--rounds", type=int, default=1, help="how often both are measured, in turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = ComparisonSpec(
        model_name=options.model_name,
        pruning_methods=("fisher",),
        pruning_levels=(0, 20, 40, 60, 80),
        iterations=options.iterations,
        num_tokens=32,
        threads=1,
    )
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(options.rounds):
            found = {}
            for name, launcher in (("serial", launch_serially), ("ray", RayLauncher(workers=options.workers))):
                clocked = Clocked(launcher)
                run = run_comparison(spec, output_dir=Path(place) / f"{name}{turn}", launcher=clocked)
                found[name] = results(run)
                seconds.setdefault(name, []).append(clocked.ended - clocked.begun)
                seconds.setdefault(f"{name} with start", []).append(clocked.ended - clocked.started)
            if found["serial"] != found["ray"]:
                raise SystemExit("the results differ")
    whole = {name: sum(values) for name, values in seconds.items()}
    figures = {
        "benchmark": "scale_out",
        "model": options.model_name,
        "workers": options.workers,
        "cells": clocked.cells * options.rounds,
        "results_are_the_same": True,
        "seconds": {name: round(value, 1) for name, value in whole.items()},
        "ratio": round(whole["serial"] / whole["ray"], 3),
        "ratio_with_start": round(whole["serial with start"] / whole["ray with start"], 3),
        "machine": hardware(spec),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
