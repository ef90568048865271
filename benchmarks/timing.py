"""What the benchmarks share: models, rounds in which all that is compared takes turns, and ratios with their intervals."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from pruning_comparison.models import load_model, preview_model
from pruning_comparison.run.provenance import hardware
from pruning_comparison.spec import ComparisonSpec

RANDOM_GPT2 = "gpt2-small-random"


def parser(text: str | None, *, models: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--models", default=models, help=f"comma-separated: bundled, smollm2-135m, {RANDOM_GPT2}, a folder"
    )
    made.add_argument(
        "--repeats", type=int, default=repeats, help="rounds in which all that is compared takes its turn"
    )
    made.add_argument("--threads", type=int, default=1)
    return made


def benchmark_model(name: str) -> Any:
    """A model by name; ``gpt2-small-random`` has GPT-2 small's shape and random weights, so it says nothing but time."""
    if name != RANDOM_GPT2:
        return load_model(preview_model(name)).model
    torch.manual_seed(0)
    config = GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def random_ids(model: Any, *shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids from all of the model's vocabulary."""
    return torch.randint(1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def operations(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of self time that a call of ``work`` takes on the CPU, by operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        work()
    return {row.key: row.self_cpu_time_total / 1e6 for row in seen.key_averages()}


def take_turns(work: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """What each of ``work`` returns, ``repeats`` times, in the order A B .. B A, after one call each to warm up.

    Entry ``i`` of every list was measured close to entry ``i`` of the others.
    """
    for function in work.values():
        function()
    results: dict[str, list[Any]] = {name: [] for name in work}
    for number in range(repeats):
        for name in list(work) if number % 2 == 0 else reversed(list(work)):
            results[name].append(work[name]())
    return results


def seconds(function: Callable[[], Any]) -> Callable[[], float]:
    """``function`` with its running time in seconds in place of its result."""

    def timed() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return timed


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of above / below over pairs, with the 95 % interval of the mean logarithm (t distribution)."""
    mean, half = mean_and_half_width(np.log(above) - np.log(below))
    return {
        "ratio": round(math.exp(mean), 4),
        "interval": [round(math.exp(mean - half), 4), round(math.exp(mean + half), 4)],
        "n": len(above),
    }


def mean_and_half_width(values: Any) -> tuple[float, float]:
    """Mean, and half width of its 95 % interval; NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    )


def emit(benchmark: str, **facts: Any) -> None:
    """One JSON line."""
    print(json.dumps({"benchmark": benchmark, **facts}), flush=True)


def emit_machine(benchmark: str, threads: int) -> None:
    """One JSON line about where and when."""
    machine = hardware(ComparisonSpec(threads=threads))
    when = time.strftime("%Y-%m-%d", time.gmtime())
    emit(benchmark, machine=machine, torch=torch.__version__, python=platform.python_version(), date=when)
