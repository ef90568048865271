"""Does the speed-up follow the ceiling? Time saved by pruning beside what the bytes and FLOPs that are left allow.

    python benchmarks/speed_ceiling.py [--models=smollm2-135m,gpt2-small-random] [--batches=1,8] [--profile]

Heads are pruned at random (seed 0), because which ones leave does not matter to the clock, but how uneven they leave the
layers does; grouped models also by whole key-value groups, and so that layers keep rectangles. A prompt of 1,000 tokens is
read (prefill) and decoded from, in each of the ``--batches``. Dense and pruned take turns.

``allowed`` is the share of time that could be saved: for decoding, of the bytes of weights and key-value cache that a step
reads; for prefill, of the FLOPs of all matrix products and of causal attention. ``saved`` is the share of time that was
saved, with its 95 % interval over pairs of neighbouring runs, and ``share_of_allowed`` is one over the other. ``--profile``
lists what dense and pruned models spend their time on.

Target: share_of_allowed at least 0.8, and the interval of ``saved`` above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import benchmark_model, emit, emit_machine, mean_and_half_width, operations, parser, random_ids, take_turns

from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import Generation, generate
from pruning_comparison.measure.memory import decode_bytes
from pruning_comparison.models.decoding import decode_steps
from pruning_comparison.models.heads import head_grid
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.run import heads_leaving_together, rectangle_of
from pruning_comparison.scoring.weights import score_random


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="smollm2-135m,gpt2-small-random", repeats=8)
    made.add_argument("--levels", default="50,80")
    made.add_argument("--units", default="head,rectangle,kv_group", help="what leaves, of grouped models; others: head")
    made.add_argument("--batches", default="1", help="rows of the prompt, comma-separated")
    made.add_argument("--context", type=int, default=1000, help="tokens of the prompt")
    made.add_argument("--tokens", type=int, default=20, help="new tokens")
    made.add_argument("--profile", action="store_true", help="list what models spend their time on")
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    emit_machine("speed_ceiling", options.threads)
    for name in options.models.split(","):
        dense = benchmark_model(name)
        grid = head_grid(dense.config)
        scores = score_random(dense, torch.Generator().manual_seed(0))
        prompt = random_ids(dense, options.context).tolist()

        models = {"dense": dense}
        for level in (float(level) for level in options.levels.split(",")):
            for unit in options.units.split(",") if 1 < grid.group_size < grid.n_heads else ["head"]:
                together, rectangle = heads_leaving_together(grid, unit), rectangle_of(grid, unit)
                keep = select_heads(scores, level, group_size=together, rectangle=rectangle)
                models[f"{level:g} % by {unit}"] = remove_heads(dense, keep)
        step_of = decode_steps(models)

        def run(
            key: str, batch: int, tokens: int, models: Any = models, prompt: Any = prompt, step_of: Any = step_of
        ) -> Generation:
            return generate(models[key], [prompt] * batch, tokens, temperatures=[0.0] * batch, step=step_of[key])

        steps = options.tokens - 1
        for batch in map(int, options.batches.split(",")):
            runs = take_turns({key: partial(run, key, batch, options.tokens) for key in models}, options.repeats)
            cost = {key: prefill_flops(model, options.context) for key, model in models.items()}
            read = {key: decode_bytes(model) + runs[key][0].cache_bytes for key, model in models.items()}
            for key in list(models)[1:]:
                for phase, needed in (("prefill", cost), ("decode", read)):
                    times = {
                        side: np.array(
                            [
                                one.first_token_latency_s
                                if phase == "prefill"
                                else (one.end_to_end_s - one.first_token_latency_s) / steps
                                for one in runs[side]
                            ]
                        )
                        for side in ("dense", key)
                    }
                    allowed = 1 - needed[key] / needed["dense"]
                    saved, half = mean_and_half_width(1 - times[key] / times["dense"])
                    emit(
                        "speed_ceiling",
                        model=name,
                        pruned=key,
                        batch=batch,
                        phase=phase,
                        dense_s=round(float(times["dense"].mean()), 5),
                        pruned_s=round(float(times[key].mean()), 5),
                        cache_share=round(runs[key][0].cache_bytes / runs["dense"][0].cache_bytes, 4),
                        allowed=round(allowed, 4),
                        saved=round(saved, 4),
                        interval=[round(saved - half, 4), round(saved + half, 4)],
                        share_of_allowed=round(saved / allowed, 3),
                        n=options.repeats,
                    )
        if options.profile:
            for key in models:
                profile(name, key, partial(run, key, 1), options.tokens)


def profile(name: str, key: str, run: Callable[[int], Any], tokens: int) -> None:
    """Milliseconds of self time by operation, for the prefill alone and for the decoding after it."""
    found = {}
    for phase, count in (("prefill", 1), ("both", tokens)):
        taken = operations(partial(run, count))
        found[phase] = {op: 1e3 * time for op, time in taken.items()}
    found["decode"] = {op: ms - found["prefill"].get(op, 0.0) for op, ms in found.pop("both").items()}
    for phase, table in found.items():
        top = sorted(table.items(), key=lambda item: -item[1])[:8]
        emit("speed_ceiling", model=name, pruned=key, phase=phase, profile_ms={op: round(ms, 1) for op, ms in top})


if __name__ == "__main__":
    main()
