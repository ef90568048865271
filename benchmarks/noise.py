"""Does a busy machine make two identical variants look different? It should not.

    python benchmarks/noise.py [--models=bundled] [--runs=20]

Two variants that are the same model are timed as a comparison times its variants, while another process keeps the machine
busy: it works for random stretches and pauses for random stretches. Each run has 3 iterations of 5 prompts, as a comparison
by default. Its ratio is the geometric mean of end-to-end times, A over B, over pairs of the same iteration, prompt and
repeat; its 95 % interval is that of the mean logarithm over iterations and prompts (t distribution).

Prints one JSON line per run, and one for all. Target: ratio within 3 % of 1 and interval covering 1 in at least 17 of 20.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timing import benchmark_model, emit, emit_machine, mean_and_half_width, parser, random_ids

from pruning_comparison.measure.generation import common_uniforms, time_generation
from pruning_comparison.pruning.surgery import sharing_copy

NEAR = 0.03


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="bundled", repeats=3)
    made.add_argument("--runs", type=int, default=20)
    made.add_argument("--prompts", type=int, default=5)
    made.add_argument("--tokens", type=int, default=100, help="new tokens, as a comparison has by default")
    made.add_argument("--load", type=int, default=1, help="processes that keep the machine busy")
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    emit_machine("noise", options.threads)
    context = multiprocessing.get_context("spawn")
    load = [context.Process(target=keep_busy, args=(seed,), daemon=True) for seed in range(options.load)]
    for process in load:
        process.start()
    try:
        for name in options.models.split(","):
            model = benchmark_model(name)
            held = [measure(name, model, number, options) for number in range(options.runs)]
            emit("noise", model=name, runs=len(held), good=sum(held), load_processes=options.load)
    finally:
        for process in load:
            process.terminate()
            process.join()


def keep_busy(seed: int) -> None:
    """Works and pauses for random stretches of up to half a second, until it is ended."""
    draw = random.Random(seed)
    while True:
        until = time.perf_counter() + draw.uniform(0, 0.5)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.uniform(0, 0.5))


def measure(name: str, model: Any, number: int, options: Any) -> bool:
    """One run: whether its ratio is near 1 and its interval covers 1."""
    twins = {"A": model, "B": sharing_copy(model)}
    logs = []
    for iteration in range(options.repeats):
        for prompt in range(options.prompts):
            timings = time_generation(
                twins,
                [random_ids(model, 16, seed=prompt).tolist()],
                options.tokens,
                temperature=0.7,
                uniforms=common_uniforms(number, iteration, prompt, options.tokens)[None],
                measure_peak=False,
            )
            times = {(timing.variant, timing.repeat): math.log(timing.end_to_end_s) for timing in timings}
            logs.append(np.mean([times["A", repeat] - times["B", repeat] for repeat in (0, 1)]))
    mean, half = mean_and_half_width(logs)
    covers, near = abs(mean) <= half, abs(math.expm1(mean)) <= NEAR
    interval = [round(math.exp(mean - half), 4), round(math.exp(mean + half), 4)]
    emit("noise", model=name, run=number, ratio=round(math.exp(mean), 4), interval=interval, covers=covers, near=near)
    return covers and near


if __name__ == "__main__":
    main()
