"""Does a busy machine make two equal variants look different? It should not, and the report should say that they are equal.

    python benchmarks/noise.py [--models=bundled] [--runs=20] [--load=1]

Two variants that lose the same heads are timed as a comparison times its variants, at its default levels, iterations,
prompts and rule of when a level has been timed enough; each has weights of its own, as two variants have. Meanwhile other
processes keep the machine busy: each works for random stretches and pauses for random stretches (``--load=0``: none). The
answer to expectation E1, speed at equal level, comes from the report's own analysis, and with it the interval.

Prints one JSON line per run, and one for all. ``dense_half_width_per_cent`` is the half width of the 95 % interval of the
speed of a variant relative to the dense model at the same level, paired within turns: the median over levels and variants.
Target: *no meaningful difference* in at least 17 of 20 runs, with and without load.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from timing import emit, emit_machine, mean_and_half_width, parser

from pruning_comparison.analysis import answer_hypotheses, observations
from pruning_comparison.pruning import remove_heads, select_heads
from pruning_comparison.run import load_workspace, prepare
from pruning_comparison.run.measure_cell import time_level
from pruning_comparison.scoring.weights import score_random
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.variants import DENSE

METHOD = "random"
VARIANTS = ("baseline", "agency")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="bundled", repeats=3)
    made.add_argument("--runs", type=int, default=20)
    made.add_argument("--prompts", type=int, default=5)
    made.add_argument("--tokens", type=int, default=100, help="new tokens, as a comparison has by default")
    made.add_argument("--limit_s", type=float, default=60.0, help="seconds that a level may be timed for")
    made.add_argument("--load", type=int, default=1, help="processes that keep the machine busy")
    options = made.parse_args(argv)
    emit_machine("noise", options.threads)
    context = multiprocessing.get_context("spawn")
    load = [context.Process(target=keep_busy, args=(seed,), daemon=True) for seed in range(options.load)]
    for process in load:
        process.start()
    try:
        for name in options.models.split(","):
            spec = ComparisonSpec(
                model_name=name,
                pruning_methods=(METHOD,),
                iterations=options.repeats,
                max_prompts=options.prompts,
                num_tokens=options.tokens,
                threads=options.threads,
                timing_limit_s=options.limit_s,
            )
            workspace = load_workspace(spec, prepare(spec, identify=False))
            verdicts = [measure(workspace, number) for number in range(options.runs)]
            equal = verdicts.count("no meaningful difference")
            emit("noise", model=name, runs=len(verdicts), no_difference=equal, load_processes=options.load)
    finally:
        for process in load:
            process.terminate()
            process.join()


def keep_busy(seed: int) -> None:
    """Works and pauses for random stretches of up to half a second, until it is ended, or the benchmark has been."""
    draw, parent = random.Random(seed), os.getppid()
    while os.getppid() == parent:
        until = time.perf_counter() + draw.uniform(0, 0.5)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.uniform(0, 0.5))


def measure(workspace: Any, number: int) -> str:
    """One run: the verdict on the speed of two equal variants."""
    spec, started = workspace.spec, time.perf_counter()
    cells, rows, efforts = [], [], []
    for iteration in range(spec.iterations):
        scores = score_random(workspace.reference, torch.Generator().manual_seed(100 * number + iteration))
        for level in spec.pruning_levels:
            keep = select_heads(scores, level)
            models = {
                name: workspace.dense if level == 0 else remove_heads(workspace.reference, keep) for name in VARIANTS
            }
            timings = time_level(workspace, models, iteration)
            efforts.append(timings.effort)
            place = {"method": METHOD, "iteration": iteration, "level": level}
            cells += [{"variant": name, **place, "status": "done", "fingerprint": f"{iteration}"} for name in VARIANTS]
            rows += [{"variant": name, **place, **vars(row)} for name, row in timings.rows]
    measurements = pd.DataFrame(rows)
    table = pd.DataFrame(cells)
    answers = answer_hypotheses(spec.model_name, table, observations(table, measurements))
    answer = answers[(answers["id"] == "E1") & (answers["metric"] == "tokens_per_second")].iloc[0]
    emit(
        "noise",
        model=spec.model_name,
        run=number,
        verdict=answer["verdict"],
        estimate=round(float(answer["estimate"]), 3),
        interval=[round(float(answer[edge]), 3) for edge in ("ci_low", "ci_high")],
        unit=answer["unit"],
        pairs=[effort.pairs for effort in efforts],
        first_token_pairs=[effort.first_token_pairs for effort in efforts],
        at_the_limit=sum(effort.ended == "time limit" for effort in efforts),
        dense_half_width_per_cent=round(dense_half_width(measurements), 2),
        seconds=round(time.perf_counter() - started, 1),
    )
    return str(answer["verdict"])


def dense_half_width(measurements: pd.DataFrame) -> float:
    """See the top; in per cent."""
    timed = measurements[(measurements["metric"] == "end_to_end_s") & (measurements["level"] > 0)]
    keys = ["iteration", "level", "prompt", "repeat"]
    dense = timed[timed["variant"] == DENSE].set_index(keys)["value"]
    widths = defaultdict(list)
    for name in VARIANTS:
        ratios = np.log(timed[timed["variant"] == name].set_index(keys)["value"]) - np.log(dense)
        for _level, of_level in ratios.groupby("level"):
            widths[name].append(100 * math.expm1(mean_and_half_width(of_level)[1]))
    return float(np.median([width for found in widths.values() for width in found]))


if __name__ == "__main__":
    main()
