"""What is said while a comparison runs: progress with time left per phase, and a running table of what is known.

A bar and a table on a terminal, plain lines elsewhere, nothing when quiet.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pruning_comparison.formatting import format_duration, printable
from pruning_comparison.losses import mean_loss
from pruning_comparison.spec import Cell, ComparisonSpec

if TYPE_CHECKING:
    from rich.live import Live as RichLive
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from pruning_comparison.store.records import Measurement

__all__ = ["Live", "Pace", "RunningMeans", "steps_of"]


def steps_of(spec: ComparisonSpec) -> dict[str, int]:
    """How many steps a whole run has, by phase: the cells of each variant, and one timing of all variants per level."""
    each = len(spec.pruning_methods) * spec.iterations * len(spec.pruning_levels)
    return {**dict.fromkeys(spec.variants, each), "timing": each}


class Pace:
    """How long steps of each phase take, and so how long is left.

    Steps left in a phase are its share of all steps that are left, so that a run that is continued is reckoned right. A
    phase that has not been timed yet is taken to be as fast as the others.
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self._steps = dict(steps)
        self._seconds: dict[str, list[float]] = {phase: [] for phase in steps}

    def took(self, phase: str, seconds: float) -> None:
        """A step of a phase has ended."""
        self._seconds.setdefault(phase, []).append(seconds)

    def left(self, steps_left: int) -> dict[str, float]:
        """Seconds left by phase; empty while nothing is known."""
        known = [value for values in self._seconds.values() for value in values]
        total = sum(self._steps.values())
        if not known or not total or steps_left <= 0:
            return {}
        typical = sum(known) / len(known)
        return {
            phase: steps_left * count / total * (sum(self._seconds[phase]) / len(self._seconds[phase])
                                                 if self._seconds[phase] else typical)
            for phase, count in self._steps.items()
        }  # fmt: skip


class RunningMeans:
    """Means so far: perplexity and tokens per second by method, level and variant. Geometric, as the report's are."""

    def __init__(self) -> None:
        self._logs: dict[tuple[str, float, str, str], list[float]] = {}

    def add(self, cell: Cell, measurements: Sequence[Measurement]) -> dict[str, float]:
        """Takes in what was measured of a cell, and returns the figures found in it."""
        sums: dict[str, list[float]] = {}
        for one in measurements:
            if one.value is not None:
                sums.setdefault(one.metric, []).append(one.value)
        found = {}
        if sum(sums.get("window_tokens", [])) and len(sums.get("window_nats", [])) == len(sums["window_tokens"]):
            loss = mean_loss(sum(sums["window_nats"]), sum(sums["window_tokens"]))
            found["perplexity"] = math.exp(min(700.0, loss))
        if speeds := [value for value in sums.get("tokens_per_second", []) if value > 0]:
            found["tokens_per_second"] = math.exp(sum(map(math.log, speeds)) / len(speeds))
        for metric, value in found.items():
            self._logs.setdefault((cell.method, cell.level, cell.variant, metric), []).append(math.log(value))
        return found

    def rows(self) -> list[tuple[str, float, dict[tuple[str, str], float]]]:
        """(method, level, {(variant, metric): mean}), in the order in which they became known."""
        table: dict[tuple[str, float], dict[tuple[str, str], float]] = {}
        for (method, level, variant, metric), logs in self._logs.items():
            table.setdefault((method, level), {})[variant, metric] = math.exp(sum(logs) / len(logs))
        return [(method, level, means) for (method, level), means in table.items()]


class Live:
    """Progress, news and the running table of one run, on standard error. Within it, what the package logs is news."""

    def __init__(
        self, *, quiet: bool, steps: Mapping[str, int] | None = None, clock: Callable[[], float] | None = None
    ):
        self._quiet = quiet
        self._pace = Pace(steps or {})
        self._known = RunningMeans()
        self._clock = clock or time.monotonic
        self._step: tuple[str, int, float] | None = None
        self._variants = [phase for phase in steps or {} if phase != "timing"]
        self._progress: Progress | None = None
        self._screen: RichLive | None = None
        self._task: TaskID | None = None
        self._listening = ExitStack()

    def __enter__(self) -> Live:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            console = Console(stderr=True)
            self._progress = Progress(*columns, console=console)
            self._screen = RichLive(self._progress, console=console, transient=True, refresh_per_second=4)
            self._screen.start()
        self._listening.enter_context(_heard(self.say))
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening.close()
        if self._screen is not None:
            self._screen.stop()

    def say(self, message: str) -> None:
        """One line of news."""
        if self._quiet:
            return
        message = printable(message)
        if self._screen is not None:
            self._screen.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` steps are finished and ``what`` is under way; its first word names the phase."""
        if self._quiet:
            return
        now = self._clock()
        if self._step is not None and done > self._step[1]:
            self._pace.took(self._step[0], (now - self._step[2]) / (done - self._step[1]))
        self._step = (what.partition(",")[0], done, now)
        left = self._format_left(total - done)
        if self._progress is None:
            print(f"[{done}/{total}] {what}{', ' if left else ''}{left}", file=sys.stderr, flush=True)
        elif self._task is None:
            self._task = self._progress.add_task(what, total=total, completed=done, left=left)
        else:
            self._progress.update(self._task, description=what, completed=done, left=left)

    def measured(self, cell: Cell, measurements: Sequence[Measurement]) -> None:
        """A cell's quality, or its timings, are known: the running table, or a line, shows them."""
        if self._quiet:
            return
        found = self._known.add(cell, measurements)
        if self._screen is not None and self._progress is not None:
            from rich.console import Group

            self._screen.update(Group(self._table(), self._progress))
        elif found:
            words = {"perplexity": "perplexity {:.4g}", "tokens_per_second": "{:.4g} token/s"}
            told = ", ".join(words[metric].format(value) for metric, value in found.items())
            print(f"  {cell.describe()}: {told}", file=sys.stderr, flush=True)

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title="Known so far: means over iterations", title_justify="left", header_style="")
        several = len({method for method, _, _ in self._known.rows()}) > 1
        for column in (*(["method"] if several else []), "level"):
            table.add_column(column)
        shown = [(v, metric) for metric in ("perplexity", "tokens_per_second") for v in self._variants]
        for variant, metric in shown:
            table.add_column(f"{variant}\n{'perplexity' if metric == 'perplexity' else 'token/s'}", justify="right")
        for method, level, means in self._known.rows()[-20:]:
            figures = [f"{means[key]:.4g}" if key in means else "" for key in shown]
            table.add_row(*([method] if several else []), f"{level:g} %", *figures)
        return table

    def _format_left(self, steps_left: int) -> str:
        left = self._pace.left(steps_left)
        if not left:
            return ""
        quality = sum(seconds for phase, seconds in left.items() if phase != "timing")
        parts = [f"quality {format_duration(quality).removeprefix('about ')}"] if self._variants else []
        if "timing" in left:
            parts.append(f"timing {format_duration(left['timing']).removeprefix('about ')}")
        detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        return f"{format_duration(sum(left.values()))} left{detail}"


class _Hearing(logging.Handler):
    """Says what is logged, in one line each: tracebacks are for ``run.log``."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno == logging.WARNING
        self._say(f"{'warning: ' if warns else ''}{record.getMessage()}")


@contextmanager
def _heard(say: Callable[[str], None]) -> Iterator[None]:
    """Within it, what this package logs from INFO on is said as well."""
    logger, hearing = logging.getLogger("pruning_comparison"), _Hearing(say)
    before = logger.level
    logger.addHandler(hearing)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(hearing)
