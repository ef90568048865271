"""All work in this process, level by level, so that models are timed as soon as they are measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from transformers import PreTrainedModel

from pruning_comparison.run.attempts import attempt, attempt_rebuild, attempt_saving, attempt_timing
from pruning_comparison.run.launchers.work import (
    LAYER_TIMES,
    Begun,
    Event,
    LayersTimed,
    Trouble,
    Work,
    format_timing,
    timed_event,
)
from pruning_comparison.run.phases import PhaseClock
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell

LOGGER = logging.getLogger(__name__)


def launch_serially(work: Work) -> Iterator[Event]:
    """Measures the cells in the order of ``ComparisonSpec.cells``."""
    spec = work.spec
    if not work:
        return
    LOGGER.info("loading %s", spec.model_name)
    clock = PhaseClock()
    with clock.phase("loading"):
        workspace = load_workspace(spec, work.inputs, work.folder, layer_times_s=work.layer_times_s, clock=clock)
    if work.lacks_layer_times:
        yield Begun(LAYER_TIMES)
        yield LayersTimed(workspace.layer_times_s())
    for place in spec.levels():
        method, iteration, level = place
        to_time = place in work.timings
        models: dict[str, PreTrainedModel] = {}
        for variant in spec.variants:
            cell = Cell(variant, method, iteration, level)
            if not (to_time or cell in work.cells or cell in work.models):
                continue
            yield Begun(cell.describe())
            known = work.known(cell)
            if known is None or cell in work.cells:
                pruned, result = attempt(workspace, cell, known, raise_failures=work.raise_failures)
                yield result
            else:
                pruned, failure = attempt_rebuild(workspace, cell, known, raise_failures=work.raise_failures)
                if failure is not None:
                    yield Trouble(cell.describe(), failure.reason, failure.traceback)
            if pruned is not None:
                models[variant] = pruned.model
                if (
                    cell in work.models
                    and (failure := attempt_saving(workspace, pruned, cell, work.folder)) is not None
                ):
                    yield Trouble(f"saving {cell.describe()}", failure.reason, failure.traceback)
        if to_time and models:
            yield Begun(format_timing(place))
            with clock.phase("timing"):
                timings, failure = attempt_timing(workspace, models, iteration, raise_failures=work.raise_failures)
            yield timed_event(place, timings, failure, all_there=len(models) == len(spec.variants))
    LOGGER.info(clock.log_line())
