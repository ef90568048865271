"""A level's models in the engines that people run them in, each on the same prompts and draws, taking turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from pruning_comparison.engines import NATIVE, engine_named
from pruning_comparison.formatting import reason_of
from pruning_comparison.measure.engines import EngineRun, PromptBatch, Runner
from pruning_comparison.measure.generation import common_uniforms, no_collection, turn_order
from pruning_comparison.models.decoding import DecodeStep
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.store.records import EngineTiming

LEAST_REPEATS = 3
MOST_REPEATS = 10
"""Every batch of prompts is generated at least and at most so often by each model in each engine."""

Unit = tuple[str, str]
"""(variant, engine)."""


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
        self._runners: dict[Unit, Runner] = {}
        self._ready: dict[tuple[Unit, int], tuple[EngineRun, float]] = {}
        self._runs: dict[tuple[Unit, int], list[EngineRun]] = {}
        self._reasons: dict[Unit, str] = {}

    def _batch(self, prompts: Sequence[Sequence[int]], first: int, iteration: int) -> PromptBatch:
        count = self._spec.num_tokens
        draws = [common_uniforms(self._spec.seed, iteration, first + row, count) for row in range(len(prompts))]
        return PromptBatch(prompts, count, self._spec.temperatures[0], torch.stack(draws))

    def timings(self) -> list[tuple[str, EngineTiming]]:
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
            self._runners[unit] = build(self._models[variant], capacity=self._capacity, step=self._steps[variant])
            for first, batch in self._batches.items():
                started = time.perf_counter()
                run = self._runners[unit].make_ready(batch)
                self._ready[unit, first] = run, time.perf_counter() - started
        except Exception as error:
            self._drop(unit, error)

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
        self._reasons[unit] = reason_of(error)

    def _timings_of(self, unit: Unit) -> list[EngineTiming]:
        variant, engine = unit
        if unit in self._reasons:
            return [EngineTiming(engine, reason=self._reasons[unit])]
        found = []
        for first, batch in self._batches.items():
            run, warm_up_s = self._ready[unit, first]
            native = self._ready.get(((variant, NATIVE), first))
            differing = None if native is None else float((run.tokens != native[0].tokens).double().mean())
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
                    )
                )
        return found
