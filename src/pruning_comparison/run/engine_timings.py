"""A level's models in the engines that people run them in, each on the same prompts and draws, taking turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from pruning_comparison.checkpoint.forms import gguf_ruled_out, write_as_gguf
from pruning_comparison.checkpoint.gguf_file import reason_against_gguf
from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields
from pruning_comparison.engines import LLAMA_CPP, NATIVE, engine_named
from pruning_comparison.errors import InputError
from pruning_comparison.formatting import reason_of
from pruning_comparison.measure.engines import EngineRun, PromptBatch, Runner
from pruning_comparison.measure.generation import common_uniforms, no_collection, turn_order
from pruning_comparison.models.decoding import DecodeStep
from pruning_comparison.run.inputs import Inputs, heads_leaving_together, rectangle_of
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.records import EngineTiming
from pruning_comparison.variants import DENSE

LEAST_REPEATS = 3
MOST_REPEATS = 10
"""Every batch of prompts is generated at least and at most so often by each model in each engine."""

Unit = tuple[str, str]
"""(variant, engine)."""

_FOLDER = "engine_files_"
"""What the names of folders begin with that hold files of models while they are timed."""


def check_engines(spec: ComparisonSpec) -> None:
    """InputError where an engine of the spec needs a package that is not installed."""
    for name in spec.engines:
        engine_named(name).check_installed()


def remove_left_files(folder: Path) -> None:
    """Removes files of models that a run which was killed has left in its ``folder``."""
    for left in folder.glob(f"{_FOLDER}*"):
        shutil.rmtree(left, ignore_errors=True)


def known_to_be_missing(spec: ComparisonSpec, inputs: Inputs) -> list[str]:
    """Which models an engine of the spec cannot run, and why, as far as spec, config and tokenizer say: sentences."""
    if LLAMA_CPP not in spec.engines:
        return []
    try:
        _check_llama_cpp(spec, inputs)
    except InputError as error:
        return [f"no model can be timed in llama.cpp: {error}"]
    if not any(spec.pruning_levels):
        return []
    if spec.execution == "masked":
        return [f"no pruned model can be timed in llama.cpp: {_MASKED}"]
    grid, unit = inputs.preview.grid, spec.prune_unit
    together, rectangle = heads_leaving_together(grid, unit), rectangle_of(grid, unit)
    reason = gguf_ruled_out(inputs.preview.config, group_size=together, rectangle=rectangle)
    return [] if reason is None else [f"no pruned model with ragged groups can be timed in llama.cpp: {reason}"]


def _check_llama_cpp(spec: ComparisonSpec, inputs: Inputs) -> None:
    """InputError where not even the dense model can be timed in llama.cpp."""
    if spec.device != "cpu":
        raise InputError(f"it is run on the CPU, and the other engines on {spec.device}. Give --device=cpu.")
    config = inputs.preview.config
    reason = reason_against_gguf(config)
    if reason is not None:
        raise InputError(reason)
    if not inputs.preview.stand_in:
        tokenizer_fields(inputs.preview.tokenizer, config.vocab_size)


_MASKED = "with --execution=masked no head is removed, and the file would have them all. Give --execution=compact."


def time_engines(
    workspace: Workspace,
    models: Mapping[str, PreTrainedModel],
    steps: Mapping[str, DecodeStep | None],
    iteration: int,
) -> list[tuple[str, EngineTiming]]:
    """Whole generations of every model in every engine of the spec, as (variant, timing) pairs; none for the native alone.

    ``models`` are by variant, all different, and ``steps`` what they decode by in the native engine. Each is first made
    ready, which is where compilers work, and generates once; tokens are those of that generation, because the same draws
    give the same ones. Then all models and engines take turns, a whole generation each, in an order in which everyone
    follows everyone, ``LEAST_REPEATS`` times and on while another time would end within ``timing_limit_s``.

    A model that an engine cannot run has one row, which says why; the others go on.
    """
    if workspace.spec.engines == (NATIVE,):
        return []
    return _Turns(workspace, models, steps, iteration).timings()


class _Turns:
    """What is timed at one level, and what has been measured of it so far."""

    def __init__(
        self,
        workspace: Workspace,
        models: Mapping[str, PreTrainedModel],
        steps: Mapping[str, DecodeStep | None],
        iteration: int,
    ) -> None:
        self._spec = workspace.spec
        prompts = workspace.inputs.prompt_ids
        self._batches = {
            first: self._batch(prompts[first : first + self._spec.batch_size], first, iteration)
            for first in range(0, len(prompts), self._spec.batch_size)
        }
        self._models, self._steps = models, steps
        self._capacity = max(map(len, prompts)) + self._spec.num_tokens
        # Native first: the tokens of all others are held against its own.
        self._units: list[Unit] = [(variant, engine) for engine in self._spec.engines for variant in models]
        self._workspace, self._files = workspace, ExitStack()
        self._runners: dict[Unit, Runner] = {}
        self._ready: dict[tuple[Unit, int], tuple[EngineRun, float]] = {}
        self._runs: dict[tuple[Unit, int], list[EngineRun]] = {}
        self._reasons: dict[Unit, str] = {}

    def _batch(self, prompts: Sequence[Sequence[int]], first: int, iteration: int) -> PromptBatch:
        count = self._spec.num_tokens
        draws = [common_uniforms(self._spec.seed, iteration, first + row, count) for row in range(len(prompts))]
        return PromptBatch(prompts, count, self._spec.temperatures[0], torch.stack(draws))

    def timings(self) -> list[tuple[str, EngineTiming]]:
        try:
            return self._measured()
        finally:
            self._runners.clear()  # they have files open, which some systems do not let go then
            self._files.close()

    def _measured(self) -> list[tuple[str, EngineTiming]]:
        for unit in self._units:
            self._make_ready(unit)
        spent_s, repeat = 0.0, 0
        while repeat < LEAST_REPEATS or (
            repeat < MOST_REPEATS and spent_s * (repeat + 1) / repeat <= self._spec.timing_limit_s
        ):
            started = time.perf_counter()
            self._take(repeat)
            spent_s += time.perf_counter() - started
            repeat += 1
        return [(unit[0], timing) for unit in self._units for timing in self._timings_of(unit)]

    def _make_ready(self, unit: Unit) -> None:
        variant, engine = unit
        try:
            build = engine_named(engine).builder()
            self._runners[unit] = build(
                self._models[variant],
                capacity=self._capacity,
                step=self._steps[variant],
                export=partial(self._export, variant),
            )
            for first, batch in self._batches.items():
                started = time.perf_counter()
                run = self._runners[unit].make_ready(batch)
                self._ready[unit, first] = run, time.perf_counter() - started
        except Exception as error:
            self._drop(unit, error)

    def _export(self, variant: str) -> Path:
        """Writes a model as a GGUF file into a folder that is removed when all is timed, and returns its path."""
        if self._spec.execution == "masked" and variant != DENSE:
            raise InputError(_MASKED)
        place = TemporaryDirectory(prefix=_FOLDER, dir=self._workspace.folder, ignore_cleanup_errors=True)
        path = Path(self._files.enter_context(place)) / "model.gguf"
        write_as_gguf(self._models[variant], self._workspace.inputs.preview.tokenizer, path)
        return path

    def _take(self, repeat: int) -> None:
        """A turn of everyone on every batch."""
        by_name = {", ".join(unit): unit for unit in self._runners}
        for number, (first, batch) in enumerate(self._batches.items()):
            for name in turn_order(list(by_name), repeat * len(self._batches) + number):
                unit = by_name[name]
                if unit not in self._runners:
                    continue
                try:
                    with no_collection():
                        self._runs.setdefault((unit, first), []).append(self._runners[unit].generate(batch))
                except Exception as error:
                    self._drop(unit, error)

    def _drop(self, unit: Unit, error: Exception) -> None:
        self._runners.pop(unit, None)
        self._reasons[unit] = str(error) if isinstance(error, InputError) else reason_of(error)

    def _timings_of(self, unit: Unit) -> list[EngineTiming]:
        variant, engine = unit
        if unit in self._reasons:
            return [EngineTiming(engine, reason=self._reasons[unit])]
        found = []
        for first, batch in self._batches.items():
            run, warm_up_s = self._ready[unit, first]
            native = self._ready.get(((variant, NATIVE), first))
            differing = run.differing_share
            if differing is None and native is not None:
                differing = float((run.tokens != native[0].tokens).double().mean())
            for repeat, timed in enumerate(self._runs[unit, first]):
                found.append(
                    EngineTiming(
                        engine,
                        prompt=first,
                        repeat=repeat,
                        first_token_latency_s=timed.first_token_latency_s,
                        end_to_end_s=timed.end_to_end_s,
                        tokens=len(batch.prompts) * batch.num_tokens,
                        warm_up_s=warm_up_s,
                        differing_share=differing,
                        weights=run.weights,
                    )
                )
        return found
