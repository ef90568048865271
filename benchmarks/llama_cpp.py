"""What does pruning bring in llama.cpp, and how does our decoding step stand beside llama.cpp's?

    python benchmarks/llama_cpp.py [--models=smollm2-135m] [--threads=1] [--parts=pruned,anchor] [--contexts=16,1500]

Needs ``pip install 'pruning-comparison[llama-cpp]'``. Models are exported to GGUF files in a temporary folder and loaded
in llama.cpp: weights, cache and attention in float32. Prompts are random tokens, ``--tokens`` new ones follow each, and all
that is compared takes turns, a whole generation each.

``pruned``: dense against ``--level`` per cent of heads fewer, at random (seed 0) in the shapes of ``--unit``, in llama.cpp
and, for comparison, in our native loop. ``ratio`` is time of dense over pruned, of the prompt and of decoding after it:
above 1 pruned is faster. Its 95 % interval is over pairs of neighbouring runs. ``allowed`` is what the bytes of weights and
cache that a step reads would give, or the FLOPs of a prompt.

``anchor``: the dense model. ``ratio`` is our decoding speed over llama.cpp's, in tokens per second after the first token;
``gigabytes_per_second`` are those of weights and cache that a step reads. ``head_gigabytes_per_second`` is the best of
products of one row with the output head, in turns with the rest: what a step could reach in torch. ``--profile`` lists what
our step spends its time on.

Target: decoding at 1,500 tokens faster in llama.cpp than dense, interval above 1; anchor at least 0.8 on 1 and on 2 threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from timing import (
    benchmark_model,
    emit,
    emit_machine,
    operations,
    paired_ratio,
    parser,
    random_ids,
    seconds,
    take_turns,
)
from transformers import PreTrainedModel

from pruning_comparison.checkpoint.forms import write_as_gguf
from pruning_comparison.engines import LLAMA_CPP, NATIVE, engine_named
from pruning_comparison.measure.engines import EngineRun, PromptBatch, Runner
from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.memory import cache_bytes_after, decode_bytes
from pruning_comparison.models import preview_model
from pruning_comparison.models.decoding import decode_steps
from pruning_comparison.models.heads import head_grid, input_major_weight
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.run import heads_leaving_together, rectangle_of
from pruning_comparison.scoring.weights import score_random


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="smollm2-135m", repeats=10)
    made.add_argument("--parts", default="pruned,anchor")
    made.add_argument("--level", type=float, default=44.0, help="per cent of heads")
    made.add_argument("--unit", default="rectangle")
    made.add_argument("--contexts", default="16,1500", help="tokens of the prompts, comma-separated")
    made.add_argument("--tokens", type=int, default=32, help="new tokens")
    made.add_argument("--profile", action="store_true", help="list what our step spends its time on")
    options = made.parse_args(argv)
    engine_named(LLAMA_CPP).check_installed()
    torch.set_num_threads(options.threads)
    emit_machine("llama_cpp", options.threads)
    for name in options.models.split(","):
        dense = benchmark_model(name)
        models = {"dense": dense}
        if "pruned" in options.parts.split(","):
            models["pruned"] = pruned_at_random(dense, options.level, options.unit)
        contexts = [int(tokens) for tokens in options.contexts.split(",")]
        with TemporaryDirectory() as folder:
            runners = runners_of(models, preview_model(name).tokenizer, max(contexts) + options.tokens, Path(folder))
            for context in contexts:
                compare(name, models, runners, context, options)
            runners.clear()  # they read the files


def pruned_at_random(dense: PreTrainedModel, level: float, unit: Any) -> PreTrainedModel:
    """The model without heads that are chosen at random, in the shapes of a unit of pruning."""
    grid, scores = head_grid(dense.config), score_random(dense, torch.Generator().manual_seed(0))
    together, rectangle = heads_leaving_together(grid, unit), rectangle_of(grid, unit)
    return remove_heads(dense, select_heads(scores, level, group_size=together, rectangle=rectangle))


def runners_of(
    models: dict[str, PreTrainedModel], tokenizer: Any, capacity: int, folder: Path
) -> dict[tuple[str, str], Runner]:
    """Each model in both engines, by (model, engine)."""

    def export(name: str) -> Path:
        path = folder / f"{name}.gguf"
        write_as_gguf(models[name], tokenizer, path)
        return path

    steps = decode_steps(models)
    return {
        (name, engine): engine_named(engine).builder()(
            model, capacity=capacity, step=steps[name], export=partial(export, name)
        )
        for name, model in models.items()
        for engine in (LLAMA_CPP, NATIVE)
    }


def compare(
    name: str, models: dict[str, PreTrainedModel], runners: dict[tuple[str, str], Runner], context: int, options: Any
) -> None:
    """One length of prompt: everything takes turns, and ratios are printed."""
    prompt = random_ids(models["dense"], context).tolist()
    draws = torch.zeros(1, options.tokens, dtype=torch.float64)
    batch = PromptBatch([prompt], options.tokens, 0.0, draws)
    differing = {unit: runner.make_ready(batch).differing_share for unit, runner in runners.items()}
    work: dict[Any, Callable[[], Any]] = {unit: partial(runner.generate, batch) for unit, runner in runners.items()}
    head = input_major_weight(models["dense"].get_output_embeddings())
    if "anchor" in options.parts.split(","):
        rows = torch.ones(1, len(head))
        matrix = head.contiguous()
        work["head"] = seconds(lambda: [torch.mm(rows, matrix) for _ in range(8)])
    found = take_turns({str(key): function for key, function in work.items()}, options.repeats)
    runs = {unit: found[str(unit)] for unit in runners}
    read = {key: decode_bytes(model) + cache_bytes_after(model, context) for key, model in models.items()}
    common = {"model": name, "context": context, "tokens": options.tokens, "threads": options.threads}
    if "pruned" in models:
        cost = {key: prefill_flops(model, context) for key, model in models.items()}
        for engine in (LLAMA_CPP, NATIVE):
            sides = [runs[key, engine] for key in ("dense", "pruned")]
            for phase, times_of, needed in (("prompt", prompt_s, cost), ("decode", decode_s, read)):
                dense_s, pruned_s = (times_of(side) for side in sides)
                emit(
                    "llama_cpp",
                    part="pruned",
                    **common,
                    level=options.level,
                    unit=options.unit,
                    engine=engine,
                    phase=phase,
                    dense_s=round(float(dense_s.mean()), 5),
                    pruned_s=round(float(pruned_s.mean()), 5),
                    allowed=round(needed["dense"] / needed["pruned"], 3),
                    differing_share=differing["pruned", engine],
                    **paired_ratio(dense_s, pruned_s),
                )
    if "head" in work:
        ours, theirs = decode_s(runs["dense", NATIVE]), decode_s(runs["dense", LLAMA_CPP])
        steps, best = options.tokens - 1, np.array(found["head"]).min() / 8
        emit(
            "llama_cpp",
            part="anchor",
            **common,
            tokens_per_second={
                engine: round(float(steps / times.mean()), 2) for engine, times in ((NATIVE, ours), (LLAMA_CPP, theirs))
            },
            gigabytes_per_second={
                engine: round(float(read["dense"] * steps / times.mean() / 1e9), 2)
                for engine, times in ((NATIVE, ours), (LLAMA_CPP, theirs))
            },
            head_gigabytes_per_second=round(float(head.numel() * head.element_size() / best / 1e9), 2),
            **paired_ratio(theirs, ours),
        )
    if options.profile:
        native = runners["dense", NATIVE]
        one = PromptBatch([prompt], 1, 0.0, draws[:, :1])
        first, whole = (operations(partial(native.generate, part)) for part in (one, batch))
        steps = options.tokens - 1
        taken = {op: 1e3 * (spent - first.get(op, 0.0)) / steps for op, spent in whole.items()}
        top = sorted(taken, key=lambda op: -taken[op])[:10]
        emit("llama_cpp", part="profile", **common, step_ms={op: round(taken[op], 3) for op in top})


def prompt_s(runs: list[EngineRun]) -> Any:
    """Seconds until the first token, of each run."""
    return np.array([run.first_token_latency_s for run in runs])


def decode_s(runs: list[EngineRun]) -> Any:
    """Seconds of all tokens after the first, of each run."""
    return np.array([run.end_to_end_s - run.first_token_latency_s for run in runs])


if __name__ == "__main__":
    main()
