"""How many CPU threads a new run uses: measured on this machine as it is, in seconds, before anything else.

Threads change rounding, so they belong to the spec. They are chosen for a new run alone; whoever continues or repeats one,
or takes over what it has measured, uses its threads.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning_comparison.measure.generation import generate
from pruning_comparison.models.decoding import decode_step
from pruning_comparison.run.provenance import hardware, versions
from pruning_comparison.spec import (
    NAMES_OF_FILES,
    REUSE_AXES,
    TEXT_AXES,
    ComparisonSpec,
    available_cores,
)
from pruning_comparison.store.run_folder import stored_runs

LOGGER = logging.getLogger(__name__)

LAYERS = 2
"""So many layers of the model's shape, with random weights, are timed: they are all alike."""

WINDOW = 128
STEPS = 8
TURNS = 3
"""A pass over so many tokens and so many decoding steps are timed as often with each number of threads, in turns."""

WORTH_MORE_THREADS = 0.05
"""More threads are taken only where they save more than this share of the time: whatever else runs loses by them."""


def thread_counts(cores: int) -> list[int]:
    """The numbers of threads that are tried: powers of two below the cores, and all of them."""
    counts = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return [*counts, cores]


def choose_threads(times_s: Mapping[int, float]) -> int:
    """The fewest threads within ``WORTH_MORE_THREADS`` of the least time."""
    least = min(times_s.values())
    return min(count for count, seconds in times_s.items() if seconds <= least * (1 + WORTH_MORE_THREADS))


def measure_threads(config: Any, spec: ComparisonSpec) -> dict[int, float]:
    """Seconds by number of threads: the geometric mean of a pass over a window and of decoding steps, by the model's shape.

    Times are those by the wall's clock, as the machine is now: beside other work, threads that wait for one another can take
    longer than one alone. Numbers take turns, so that what else runs meets all of them. The number of threads of this
    process is left as it was.
    """
    counts, before = thread_counts(available_cores()), torch.get_num_threads()
    model = _small_model(config)
    window = torch.zeros(1, min(WINDOW, int(config.max_position_embeddings)), dtype=torch.long)
    taken: dict[int, list[float]] = {count: [] for count in counts}
    try:
        step = decode_step(model)

        def decode() -> None:
            generate(model, [[0, 0]] * spec.batch_size, STEPS, temperatures=[0.0] * spec.batch_size, step=step)

        for turn in range(TURNS + 1):
            for count in counts if turn % 2 else reversed(counts):
                torch.set_num_threads(count)
                seconds = (_timed(lambda: _read(model, window)) * _timed(decode)) ** 0.5
                if turn:  # the first turn warms up
                    taken[count].append(seconds)
    finally:
        torch.set_num_threads(before)
    return {count: median(seconds) for count, seconds in taken.items()}


def stored_threads(spec: ComparisonSpec, output_dir: Path) -> int | None:
    """The threads of the newest run here that is this one but for its threads, or that this one could take cells over from.

    None where there is none, so that this would be a new run. Contents of files are not looked at: a run whose texts have
    changed since gives its threads as well, and nothing else.
    """
    here = (versions(), _machine(hardware(spec)))
    for without in (frozenset[str](), REUSE_AXES | TEXT_AXES):
        for _, manifest in stored_runs(output_dir):
            threads = manifest.spec.get("threads")
            if not isinstance(threads, int) or manifest.revisions is None:
                continue
            if without and (manifest.versions, _machine(manifest.hardware)) != here:
                continue
            same = replace(spec, threads=threads).as_dict()
            if _settings(same, without) == _settings(manifest.spec, without):
                return threads
    return None


def with_threads(
    spec: ComparisonSpec, output_dir: Path | None, config: Callable[[], Any]
) -> tuple[ComparisonSpec, dict[int, float] | None]:
    """The spec with the threads of the run it goes on with, or, for a new run, with those that are measured to be best.

    ``output_dir`` holds earlier runs, None where there are none to go on with. ``config`` gives the model's, and is called
    only to measure. The times that decided are the second part, None where nothing was measured: for a run that goes on, on
    a graphics card, to which threads hardly matter, and where there is one core.
    """
    known = None if output_dir is None else stored_threads(spec, output_dir)
    if known is not None:
        return replace(spec, threads=known), None
    if spec.device != "cpu" or available_cores() == 1:
        return replace(spec, threads=available_cores()), None
    times_s = measure_threads(config(), spec)
    threads = choose_threads(times_s)
    told = ", ".join(f"{count}: {1000 * seconds:.3g} ms" for count, seconds in times_s.items())
    LOGGER.info("%d of %d CPU threads are used (%s); --threads chooses", threads, available_cores(), told)
    return replace(spec, threads=threads), times_s


def _settings(settings: Mapping[str, Any], without: frozenset[str]) -> dict[str, Any]:
    left_out = NAMES_OF_FILES | without
    return {name: value for name, value in settings.items() if name not in left_out}


def _machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "threads"}


def _small_model(config: Any) -> PreTrainedModel:
    """A few layers of the config's shape with random weights; the caller's generators are left as they are."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(LAYERS, int(config.num_hidden_layers))
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types)[: small.num_hidden_layers]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="sdpa")
    small_model: PreTrainedModel = model.eval().requires_grad_(False)
    return small_model


@torch.inference_mode()
def _read(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _timed(what: Callable[[], None]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started
