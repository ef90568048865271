"""Two arms that are the same variant, measured through the whole pipeline: how often do the answers claim a difference?

Both arms are the baseline on the bundled model, pruned at random with head choices of their own, and timed side by side as
two variants are. Which of them is called "agency" is drawn anew for every run. Nothing is shared between the arms but the
model, the texts and the prompts: pairs do not even share their iteration's draws. A claim is an answer that says better or
worse. Prints one JSON line per run and one for all; finished cells are kept, and the same command continues.

    python benchmarks/statistics_end_to_end.py --output_dir=/tmp/end_to_end

Target: no claim in at least 17 of 20 runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from pruning_comparison.analysis import NOT_ENOUGH, answer_hypotheses, observations
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.measure_cell import measure_quality, time_level
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.journal import RunStore

METHOD = "random"


def measure(folder: Path, first: Workspace, second: Workspace, labels: Sequence[str]) -> None:
    """Measures what one run's journal does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with RunStore(folder, lock=True) as store:
        done = store.finished_timings()
        for iteration in range(first.spec.iterations):
            for level in first.spec.pruning_levels:
                if (METHOD, iteration, level) in done:
                    continue
                models = {}
                for workspace, label in zip((first, second), labels, strict=True):
                    pruned = build(workspace, Cell("baseline", METHOD, iteration, level))
                    store.write_cell(measure_quality(workspace, Cell(label, METHOD, iteration, level), pruned), None)
                    models[label] = pruned.model
                timings = time_level(first, models, iteration)
                store.write_timings(METHOD, iteration, level, timings.rows, effort=timings.effort)


def claims(folder: Path) -> tuple[list[str], pd.DataFrame]:
    """The differences that the answers to one run claim, and all answers but the exploratory ones."""
    with RunStore(folder) as store:
        cells, measurements = store.table("cells"), store.table("measurements")
    table = answer_hypotheses("bundled", cells, observations(cells, measurements))
    table = table[table["kind"] != "exploratory"]
    claimed = table[(table["verdict"] != NOT_ENOUGH) & table["reason"].isin(["better", "worse"])]
    return [f"{row.id} {row.metric}: {row.verdict}, {row.reason}" for row in claimed.itertuples()], table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results/end_to_end"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    spec = ComparisonSpec(
        model_name="bundled", pruning_methods=(METHOD,), variants=("baseline",), pruning_levels=(0.0, 40.0, 60.0),
        iterations=options.iterations, num_tokens=8, max_prompts=3, temperatures=(0.7, 1.0), eval_tokens=4096,
        calibration_tokens=4096, threads=1,
    )  # fmt: skip
    loaded = load_workspace(spec, prepare(spec))
    free, uncorrected, tested = 0, 0, 0
    for run in range(options.runs):
        arms = [
            Workspace(
                replace(spec, seed=10_000 * options.seed + 2 * run + arm), loaded.inputs, loaded.reference, loaded.dense
            )
            for arm in (0, 1)
        ]
        swap = bool(np.random.default_rng([options.seed, run]).integers(2))
        folder = options.output_dir / f"run_{run:02d}"
        measure(folder, arms[0], arms[1], ("agency", "baseline") if swap else ("baseline", "agency"))
        found, table = claims(folder)
        free += not found
        uncorrected += int((table["p"] <= 0.05).sum())
        tested += int(table["p"].notna().sum())
        print(json.dumps({"run": run, "claims": found, "smallest_p": float(table["p"].min())}), flush=True)
    summary = {"runs": options.runs, "without_claim": free, "target": "at least 17 of 20"}
    print(json.dumps(summary | {"tests": tested, "p_at_most_0.05_uncorrected": uncorrected}))


if __name__ == "__main__":
    main()
