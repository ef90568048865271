"""What agency costs: a whole trajectory in rounds of 10 %, adapted at every level, and the speed of what it leaves.

    python benchmarks/agency_cost.py [--model=smollm2-135m] [--calibration_text=FILE] [--threads=2]

Prints one JSON line: seconds and peak resident memory of the trajectory from 0 to 80 % of the heads, everything counted
(dense stream, scores, signals, negotiation, adaptation of rounds and of every level) but for loading the model; the bytes
of the scratch file; and how fast the adapted model decodes beside the same heads merely removed, timed in turns, with the
95 % interval of the ratio. Without a file, calibration text is the bundled one.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from scipy import stats

from pruning_comparison.measure.generation import time_generation
from pruning_comparison.measure.memory import PeakMemory, parameter_bytes
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec

LEVELS = (10, 20, 30, 40, 50, 60, 70, 80)
TURNS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--calibration_tokens", type=int, default=65536)
    parser.add_argument("--score_tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--method", default="fisher")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--levels", default=",".join(map(str, LEVELS)), help="comma-separated, for a part of the trajectory"
    )
    args = parser.parse_args()
    levels = [float(level) for level in args.levels.split(",")]
    spec = ComparisonSpec(
        model_name=args.model,
        pruning_levels=(0, *levels),
        pruning_methods=(args.method,),
        calibration_text=args.calibration_text,
        calibration_tokens=args.calibration_tokens,
        calibration_window=args.window,
        score_tokens=args.score_tokens,
        threads=args.threads,
        num_tokens=64,
        max_prompts=1,
    )
    workspace = load_workspace(spec, prepare(spec, identify=False))
    started, seconds = time.perf_counter(), {}
    with PeakMemory(workspace.reference.device) as peak:
        for level in levels:
            adapted = build(workspace, Cell("agency", args.method, 0, level))
            seconds[level] = round(time.perf_counter() - started, 1)
    dense = parameter_bytes(workspace.reference)
    plain = remove_heads(workspace.reference, adapted.keep)
    prompts, logs = [workspace.inputs.prompt_ids[0]], []
    draws = torch.rand(1, spec.num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(TURNS):
        timings = time_generation(
            {"adapted": adapted.model, "removed": plain},
            prompts,
            spec.num_tokens,
            temperature=1.0,
            uniforms=draws,
            measure_peak=False,
        )
        speed = {(timing.variant, timing.repeat): timing.tokens_per_second for timing in timings}
        logs.append(sum(math.log(speed["adapted", r] / speed["removed", r]) for r in (0, 1)) / 2)
    ratio = torch.tensor(logs, dtype=torch.float64)
    error = float(stats.t.ppf(0.975, TURNS - 1) * ratio.std() / math.sqrt(TURNS))
    result = {
        "benchmark": "agency_cost",
        "model": args.model,
        "method": args.method,
        "threads": args.threads,
        "calibration_tokens": args.calibration_tokens,
        "score_tokens": args.score_tokens,
        "seconds": seconds[levels[-1]],
        "seconds_up_to_level": seconds,
        "negotiation_seconds": adapted.negotiation_s,
        "peak_memory_bytes": peak.bytes,
        "model_bytes": dense,
        "peak_limit_bytes": 3 * dense + 2**30,
        "scratch_bytes": 0 if adapted.cost is None else adapted.cost.scratch_bytes,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapted.model.modules()),
        "adapted_vs_removed_speed": round(math.exp(float(ratio.mean())), 4),
        "adapted_vs_removed_ci": [round(math.exp(float(ratio.mean()) + side * error), 4) for side in (-1, 1)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
