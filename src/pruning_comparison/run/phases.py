"""Processor time of a run by phase, so that its log says what it went into."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_TITLE = "processor time by phase: "


class PhaseClock:
    """Processor seconds of this process, all of its threads, by phase. What a phase spends within another counts for the
    inner one alone, so that phases add up to no more than the process has used.

    Processor time and not time on the wall: on a shared machine it says what was done, whoever else computes.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, processor time counts for ``name``."""
        started = time.process_time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took, inner = time.process_time() - started, self._inner.pop()
            self._seconds[name] += took - inner
            self._inner[-1] += took

    def seconds(self) -> dict[str, float]:
        """What each phase has taken so far, the longest first."""
        return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))

    def log_line(self) -> str:
        """The same as one line for the run's log; ``phases_in`` reads it."""
        return _TITLE + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds().items())


def phases_in(log: str) -> dict[str, float]:
    """Processor seconds by phase from the text of a ``run.log``, over all starts of the run; empty if it has none."""
    total: dict[str, float] = defaultdict(float)
    for line in re.findall(re.escape(_TITLE) + "(.*)$", log, re.MULTILINE):
        for name, seconds in re.findall(r"(.+?) ([\d.]+) s(?:, |$)", line):
            total[name] += float(seconds)
    return dict(total)
