"""What is said while a command works: how far it is and how long it takes, and what is known so far.

On a terminal: a table, what is under way, and a bar with count and time left, all within 80 columns. Elsewhere: plain lines.
Nothing when quiet. All of it goes to standard error, so that standard output holds the answer alone.

The screen is rich's. The time left is our own: rich and tqdm take every step to be like the last ones, while an agency cell
takes many times as long as one of the baseline, and the two alternate.
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
    from rich.console import RenderableType
    from rich.live import Live as RichLive
    from rich.progress import Progress
    from rich.table import Table

    from pruning_comparison.store.records import Measurement

__all__ = ["Live", "Pace", "RunningMeans", "steps_of"]

_LINES_BESIDE_THE_TABLE = 8
"""Title, head and rules of the table, the step and the bar, and some lines of news above."""


def steps_of(spec: ComparisonSpec) -> dict[str, int]:
    """How many steps a whole run has, by phase: the cells of each variant, and one timing of all variants per level."""
    each = len(spec.pruning_methods) * spec.iterations * len(spec.pruning_levels)
    return {**dict.fromkeys(spec.variants, each), "timing": each}


class Pace:
    """How long steps of each phase take, and so how long is left.

    Steps left in a phase are its share of all steps that are left, so that a run that is continued is reckoned right. A
    phase that has not been timed yet is taken to be as fast as the others. Without steps, all are taken to be alike.
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
        if not known or steps_left <= 0:
            return {}
        typical = sum(known) / len(known)
        if not total:
            return {"": steps_left * typical}
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

    def rows(self) -> list[tuple[str, float, str, dict[str, float]]]:
        """(method, level, variant, {metric: mean}), by method and level in the order in which they became known."""
        means: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
        for (method, level, variant, metric), logs in self._logs.items():
            of_level = means.setdefault((method, level), {})
            of_level.setdefault(variant, {})[metric] = math.exp(sum(logs) / len(logs))
        return [
            (method, level, variant, figures)
            for (method, level), variants in means.items()
            for variant, figures in variants.items()
        ]


class Live:
    """Progress, news and the running table of one command, on standard error. Within it, what the package logs is news."""

    def __init__(
        self, *, quiet: bool, steps: Mapping[str, int] | None = None, clock: Callable[[], float] | None = None
    ):
        self._quiet = quiet
        self._pace = Pace(steps or {})
        self._known = RunningMeans()
        self._clock = clock or time.monotonic
        self._step: tuple[str, int, float] | None = None
        self._progress: Progress | None = None
        self._screen: RichLive | None = None
        self._listening = ExitStack()

    def __enter__(self) -> Live:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            # At most 20 + 11 + 8 + 24 characters and four spaces between them.
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            console = Console(stderr=True)
            self._progress = Progress(*columns, console=console)
            self._screen = RichLive(console=console, transient=True, refresh_per_second=4)
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
        self._step = (what.replace(",", " ").split(" ")[0], done, now)
        left = self._format_left(total - done)
        if self._progress is None:
            print(f"[{done}/{total}] {what}{', ' if left else ''}{left}", file=sys.stderr, flush=True)
            return
        if not self._progress.tasks:
            self._progress.add_task("", total=total, completed=done, left=left)
        else:
            self._progress.update(self._progress.tasks[0].id, total=total, completed=done, left=left)
        self._draw(what)

    def measured(self, cell: Cell, measurements: Sequence[Measurement]) -> None:
        """A cell's quality, or its timings, are known: the running table, or a line, shows them."""
        if self._quiet:
            return
        found = self._known.add(cell, measurements)
        if self._screen is None and found:
            words = {"perplexity": "perplexity {:.4g}", "tokens_per_second": "{:.4g} tokens/s"}
            told = ", ".join(words[metric].format(value) for metric, value in found.items())
            print(f"  {cell.describe()}: {told}", file=sys.stderr, flush=True)

    def _draw(self, what: str) -> None:
        if self._screen is None or self._progress is None:
            return
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(printable(what), no_wrap=True, overflow="ellipsis"), self._progress]
        if self._known.rows():
            parts.insert(0, self._table(self._screen.console.height))
        self._screen.update(Group(*parts))

    def _table(self, lines: int) -> Table:
        """The last rows that leave room for the bar below them."""
        from rich.table import Table

        table = Table(title="Known so far: means over iterations", title_justify="left", header_style="")
        rows = self._known.rows()
        several = len({method for method, *_ in rows}) > 1
        for column in (*(["method"] if several else []), "level", "variant"):
            table.add_column(column, no_wrap=True)
        metrics = {"perplexity": "perplexity", "tokens_per_second": "tokens/s"}
        for heading in metrics.values():
            table.add_column(heading, justify="right")
        for method, level, variant, means in rows[-max(2, lines - _LINES_BESIDE_THE_TABLE) :]:
            figures = [f"{means[metric]:.4g}" if metric in means else "" for metric in metrics]
            table.add_row(*([method] if several else []), f"{level:g} %", variant, *figures)
        return table

    def _format_left(self, steps_left: int) -> str:
        left = self._pace.left(steps_left)
        return f"{format_duration(sum(left.values()))} left" if left else ""


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
