"""How long a run will take, and how much memory and disk, reckoned before it starts.

A model of the same shape with random weights is built and timed for a few seconds on the machine as it is: passes over
windows, and steps of decoding. The run's passes and steps are then counted. No weights are read or downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning_comparison.agency.recovery import recovery_grid
from pruning_comparison.engines import NATIVE
from pruning_comparison.formatting import format_duration
from pruning_comparison.measure import FIRST_TOKENS, generate, load_tasks, warm_up_tokens
from pruning_comparison.methods import IMPORTANCE, IMPORTANCE_TOKENS, METHODS, PRICED, Method
from pruning_comparison.metrics import RAW, of_kind
from pruning_comparison.models import attention_implementation, decode_step
from pruning_comparison.plan.memory import ModelSizes, files_bytes, forecast_memory
from pruning_comparison.run import LEAST_REPEATS, TEXT_BATCHES, Inputs, timing_rounds
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.variants import variant_named

__all__ = ["Speeds", "available_bytes", "expected", "format_forecast", "measure_speeds", "passes"]

ROUND_LEVEL = 10.0
_PROBE_TOKENS = 256
_PROBE_STEPS = 6
_OVERHEAD_S = 25.0
"""Loading, statistics, charts and report."""

# Costs in forward passes over the tokens concerned, as processor time of the bundled model had them.
_ADAPT_PASSES = 0.9
_DIVERGENCE_PASSES = 0.3
_SAVED_BY_PRUNING = 0.4
"""Of a model's time, the share that goes to attention: cutting all heads would save it."""

_ROW_BYTES = 330
"""Of a measurement, in the journal and in measurements.csv."""

_HEAD_ROW_BYTES = 260
_CHART_BYTES = 4_000_000


class Speeds:
    """Seconds per token of a pass over text, and per step of decoding at two batch sizes."""

    def __init__(self, per_token_s: float, timed_step_s: float, text_step_s: float) -> None:
        self.per_token_s = per_token_s
        self.timed_step_s = timed_step_s
        self.text_step_s = text_step_s


def expected(spec: ComparisonSpec, inputs: Inputs, speeds: Speeds | None, sizes: ModelSizes) -> dict[str, Any]:
    """Seconds by phase, peak bytes in memory and bytes on the disk. Seconds are None where ``speeds`` are."""
    counts = passes(spec, inputs)
    size = 1 - _SAVED_BY_PRUNING * sum(spec.pruning_levels) / len(spec.pruning_levels) / 100
    seconds: dict[str, float] | None = None
    if speeds is not None:
        seconds = {
            "scores and negotiation": counts["score_tokens"] * speeds.per_token_s,
            "adaptation": counts["adaptation_tokens"] * speeds.per_token_s,
            "perplexity": size
            * (counts["evaluation_tokens"] + _DIVERGENCE_PASSES * counts["compared_tokens"])
            * speeds.per_token_s,
            "texts": size * (counts["text_steps"] * speeds.text_step_s + counts["text_tokens"] * speeds.per_token_s),
            **({"tasks": size * counts["task_tokens"] * speeds.per_token_s} if spec.tasks else {}),
            "timing": size * counts["timed_steps"] * speeds.timed_step_s,
            "loading and report": _OVERHEAD_S,
        }
    return {
        "seconds": seconds,
        "memory_bytes": forecast_memory(spec, inputs, sizes).peak_bytes,
        "disk_bytes": _disk_bytes(spec, inputs) + files_bytes(spec, sizes),
    }


def passes(spec: ComparisonSpec, inputs: Inputs) -> dict[str, float]:
    """What a run does, counted: tokens that are passed over, and steps of decoding, one for each batch.

    Timing is counted as it is on a quiet machine, where the least number of pairs is precise enough; what an engine compiles
    and the files that one reads are not counted.
    """
    methods, iterations = len(spec.pruning_methods), spec.iterations
    pruned = [level for level in spec.pruning_levels if level > 0]
    models = len(spec.variants) * methods * iterations * len(pruned)
    windows = spec.calibration_tokens

    def read_by(method: Method, enough: int | None = None) -> int:
        tokens = spec.score_tokens or enough or method.tokens
        return windows if tokens is None else min(windows, tokens)

    rounds = _rounds(pruned)
    variants = [variant_named(name) for name in spec.variants]
    asked = {PRICED: None, IMPORTANCE: IMPORTANCE_TOKENS} if any(variant.negotiates for variant in variants) else {}
    scored = 0.0
    for name, enough in asked.items():
        if name not in spec.pruning_methods:
            scored += METHODS[name].passes * read_by(METHODS[name], enough)
    for name in spec.pruning_methods:
        method = spec.method(name)
        once = method.passes + method.passes_per_head * inputs.preview.grid.total
        trials = method.trial_passes if method.tries_directions and spec.entropy_direction == "auto" else 0.0
        again = rounds * once if any(variant.selection == "progressive" for variant in variants) else 0.0
        scored += (once + trials + again) * read_by(method)
    adapted = sum(variant.adapts for variant in variants) if spec.adaptation != "none" else 0
    prompts = [len(prompt) for prompt in inputs.prompt_ids]
    jobs = len(spec.temperatures) * len(prompts)
    batches = -(-jobs // (TEXT_BATCHES * spec.quality_batch_size))
    timed_batches = -(-len(prompts) // spec.batch_size)
    rounds = timing_rounds(spec, timed_batches)
    # At a pruned level the dense model takes part; at level 0 it is all that there is.
    timed = ((len(spec.variants) + 1) * len(pruned) + 1) * methods * iterations * timed_batches
    each = rounds * (FIRST_TOKENS - 1 + spec.num_tokens + warm_up_tokens(spec.num_tokens, measure_peak=False))
    if spec.memory_logging:
        each += spec.num_tokens - warm_up_tokens(spec.num_tokens, measure_peak=False)
    in_engines = 0
    if spec.engines != (NATIVE,):
        generations = len(spec.engines) * (1 + LEAST_REPEATS)
        in_engines = timed * generations * spec.num_tokens
    trials = len(recovery_grid(spec.recovery_rate, spec.recovery_parameters))
    recovery = 4.0 * trials * spec.recovery_steps * spec.quality_batch_size * inputs.calibration.shape[1] * models
    return {
        "score_tokens": iterations * scored,
        "adaptation_tokens": _ADAPT_PASSES * windows * adapted * methods * iterations * len(pruned) + recovery,
        "evaluation_tokens": (models + 1) * float(sum(len(window.ids) for window in inputs.windows)),
        "compared_tokens": models * float(sum(window.targets for window in inputs.windows)),
        "text_tokens": (models + iterations)
        * len(spec.temperatures)
        * float(sum(prompts) + len(prompts) * spec.num_tokens),
        "text_steps": float((models + iterations) * batches * spec.num_tokens),
        "timed_steps": float(timed * each + in_engines),
        "task_tokens": (models + 1) * float(_task_tokens(spec, inputs)),
    }


def _task_tokens(spec: ComparisonSpec, inputs: Inputs) -> int:
    """Tokens that a model reads to answer the questions of the spec's tasks; what it generates is not counted."""
    if not spec.tasks:
        return 0
    return load_tasks(spec.tasks, spec.task_limit).tokens(inputs.preview.tokenizer, inputs.bos)


def _rounds(levels: list[float]) -> int:
    """Rounds on the grid up to the highest level, and one for each level off it."""
    on_grid = int(max(levels, default=0.0) / ROUND_LEVEL)
    return on_grid + sum(1 for level in levels if level % ROUND_LEVEL)


def measure_speeds(spec: ComparisonSpec, inputs: Inputs) -> Speeds:
    """Times a model of the same shape with random weights; takes seconds."""
    torch.set_num_threads(spec.threads)
    # Weights are drawn here and nowhere else, so the caller's generators are left as they are.
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(
            inputs.preview.config,
            dtype=torch.float32,
            attn_implementation=attention_implementation(inputs.preview.config),
        )
    model = model.to(spec.device).eval().requires_grad_(False)
    window = min(spec.eval_window, inputs.preview.context)
    rows = max(1, min(spec.quality_batch_size, _PROBE_TOKENS // window))
    ids = torch.zeros(rows, window, dtype=torch.long, device=spec.device)
    pass_s = _fastest(lambda: _forward(model, ids), spec.device)
    model = model.to(getattr(torch, spec.precision))
    prompt = inputs.prompt_ids[0]
    jobs = min(spec.quality_batch_size, len(spec.temperatures) * len(inputs.prompt_ids))
    timed = _step_s(model, [prompt] * min(spec.batch_size, len(inputs.prompt_ids)), spec)
    return Speeds(
        pass_s / ids.numel(), timed, timed if jobs == spec.batch_size else _step_s(model, [prompt] * jobs, spec)
    )


@torch.inference_mode()
def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _step_s(model: PreTrainedModel, prompts: list[Any], spec: ComparisonSpec) -> float:
    steps = min(_PROBE_STEPS, spec.num_tokens)
    times = []
    step = decode_step(model)
    for _ in range(3):
        run = generate(model, prompts, steps, temperatures=[0.0] * len(prompts), step=step)
        times.append(run.end_to_end_s / steps)
    return min(times[1:])


def _fastest(what: Callable[[], None], device: str) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        what()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def available_bytes() -> int | None:
    """Memory that a new program could have, on Linux; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _disk_bytes(spec: ComparisonSpec, inputs: Inputs) -> int:
    cells = len(list(spec.cells()))
    jobs = len(spec.temperatures) * len(inputs.prompt_ids)
    of_model = len(of_kind("size", "cost"))
    per_cell = len(RAW) * len(inputs.windows) + len(of_kind("text")) * jobs + of_model
    if spec.tasks:
        per_cell += sum(load_tasks(spec.tasks, spec.task_limit).questions.values())
    batches = -(-len(inputs.prompt_ids) // spec.batch_size)
    timed = 1.5 * timing_rounds(spec, batches) * len(of_kind("timing", "memory")) * batches
    heads = inputs.preview.grid.total
    pruned = [level for level in spec.pruning_levels if level > 0]
    asked = sum(variant_named(name).negotiates for name in spec.variants) * len(spec.pruning_methods) * spec.iterations
    signals = 2 * asked * heads * sum(_rounds([level]) for level in pruned)
    return int(cells * (per_cell + timed) * _ROW_BYTES + (cells * heads + signals) * _HEAD_ROW_BYTES + _CHART_BYTES)


def format_forecast(cost: dict[str, Any]) -> list[str]:
    """The same as lines of text."""
    seconds = cost["seconds"]
    if seconds is None:
        lines = [f"time         unknown: {cost['reason']}"]
    else:
        parts = [
            f"{name} {format_duration(value).removeprefix('about ')}" for name, value in seconds.items() if value >= 1
        ]
        lines = [
            f"time         {format_duration(sum(seconds.values()))} on this machine as it is now: {', '.join(parts)}"
        ]
    memory, disk = cost["memory_bytes"], cost["disk_bytes"]
    lines.append(f"memory       about {memory / 1e9:.1f} GB")
    lines.append(f"disk         about {max(1, round(disk / 1e6))} MB")
    return lines
