"""What is handed out, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pruning_comparison.run.attempts import Failure
from pruning_comparison.run.inputs import Inputs
from pruning_comparison.run.layer_times import needs_layer_times
from pruning_comparison.run.measure_cell import LevelTimings
from pruning_comparison.run.pruned_model import KeptHeads
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.records import CellResult, EngineTiming, Measurement, TimingEffort

LAYER_TIMES = "layer times, by the heads of a layer"
"""What is under way while they are measured."""

TimingKey = tuple[str, int, float]
"""(method, iteration, level): what all variants are timed at together."""


def format_timing(level: TimingKey) -> str:
    """What is under way, as people say it; iterations are counted from 1."""
    method, iteration, at = level
    return f"timing, {method}, iteration {iteration + 1}, level {at:g} %"


@dataclass(frozen=True)
class Work:
    """What a run still lacks: ``cells`` to measure, ``timings`` to take, and ``models`` to save in the run's ``folder``.

    Of the cells in ``parts`` heads and perplexity are there, and texts are missing. ``known`` reads, from the journal,
    heads and fingerprint of a cell that has been measured, or of a part; None of any other. ``layer_times_s`` are those
    that the run has measured, None where it has none yet. False where nothing is lacking.
    """

    spec: ComparisonSpec
    inputs: Inputs
    folder: Path
    cells: frozenset[Cell]
    parts: frozenset[Cell]
    timings: frozenset[TimingKey]
    models: frozenset[Cell]
    known: Callable[[Cell], KeptHeads | None]
    raise_failures: bool = False
    layer_times_s: Mapping[int, float] | None = None

    def __bool__(self) -> bool:
        return bool(self.cells or self.timings or self.models)

    @property
    def lacks_layer_times(self) -> bool:
        """Whether layer times have to be measured before the cells that are left."""
        return bool(self.cells) and self.layer_times_s is None and needs_layer_times(self.spec)


@dataclass(frozen=True)
class Begun:
    """Something is under way; its first word names the phase, a variant or "timing"."""

    what: str


@dataclass(frozen=True)
class LayersTimed:
    """The layer times of the run, seconds by live heads; they are kept before any cell that rests on them."""

    layer_times_s: Mapping[int, float]


@dataclass(frozen=True)
class Timed:
    """Timings of all variants at one level. Those that are not ``complete`` are taken again by the same command."""

    level: TimingKey
    rows: Sequence[tuple[str, Measurement]]
    complete: bool
    reason: str | None = None
    traceback: str = ""
    effort: TimingEffort | None = None
    engines: Sequence[tuple[str, EngineTiming]] = ()


@dataclass(frozen=True)
class Trouble:
    """A model that has been measured could not be made again, or not be saved."""

    what: str
    reason: str
    traceback: str = ""


def timed_event(level: TimingKey, timings: LevelTimings, failure: Failure | None, *, all_there: bool) -> Timed:
    """The timings of a level as an event; they are complete if nothing failed and all variants were ``all_there``."""
    reasons = {} if failure is None else {"reason": failure.reason, "traceback": failure.traceback}
    complete = failure is None and all_there
    return Timed(level, timings.rows, complete, effort=timings.effort, engines=timings.engines, **reasons)


Event = Begun | CellResult | LayersTimed | Timed | Trouble


class Launcher(Protocol):
    """Does the work, and gives every result as soon as it is there. It writes nothing but ``models``."""

    def __call__(self, work: Work) -> Iterator[Event]: ...
