"""Runs that go on until they have decided: what a look finds, and what there is time for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

from pruning_comparison.analysis.stopping import primary_answers_at
from pruning_comparison.errors import InputError
from pruning_comparison.formatting import format_duration
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import LookRecord
from pruning_comparison.store.run_folder import read_manifest, write_manifest

LOGGER = logging.getLogger(__name__)

_KEPT_EVERY_S = 10.0


def check_budget(spec: ComparisonSpec, budget_s: float | None) -> None:
    """InputError for a budget that nothing can be done with."""
    if budget_s is None:
        return
    if not spec.until_decided:
        raise InputError(
            "--budget: it limits a run that goes on until it has decided. Give --until_decided as well, or leave it out."
        )
    if not budget_s > 0:
        raise InputError(f"--budget: {budget_s:g} s must be above 0. Give a time such as 30m.")


@dataclass
class Stopwatch:
    """How long a run has been measured, in all its sessions, and what is left of its budget. Kept in the manifest.

    A process that is killed loses the last seconds.
    """

    store: RunStore
    budget_s: float | None
    _before: float = field(init=False)
    _started: float = field(init=False)
    _kept: float = field(init=False)

    def __post_init__(self) -> None:
        self._before = read_manifest(self.store.folder).measured_s
        self._started = self._kept = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def keep(self, *, now: bool = False) -> None:
        """Writes it down, now or every few seconds."""
        if now or time.monotonic() - self._kept >= _KEPT_EVERY_S:
            self._kept = time.monotonic()
            manifest = read_manifest(self.store.folder)
            write_manifest(self.store.folder, replace(manifest, measured_s=self.seconds))

    def used(self) -> bool:
        """Whether the budget is used."""
        return self.budget_s is not None and self.seconds > self.budget_s

    def has_room(self, done: int, left: int) -> bool:
        """Whether ``left`` more steps fit the budget, if they take as long as the ``done`` ones. True where none is done."""
        if self.budget_s is None or not left or not done:
            return True
        return self.seconds * (1 + left / done) <= self.budget_s


def look(store: RunStore, spec: ComparisonSpec, iterations: int, measured_s: float) -> LookRecord:
    """Looks at the first ``iterations`` of a run, and keeps what it finds; a look that was taken before is that one.

    What it decides depends on these iterations alone, and on margins that are fixed: not on the time, on who measured, or on
    what the report is later asked for.
    """
    manifest = read_manifest(store.folder)
    for earlier in manifest.looks:
        if earlier.iterations == iterations:
            return earlier
    answers = primary_answers_at(iterations, spec.model_name, store.table("cells"), store.table("measurements"))
    verdicts = {str(row["method"]): str(row["verdict"]) for row in answers.rows.to_dict("records")}
    found = LookRecord(iterations, answers.decided, verdicts, measured_s)
    write_manifest(store.folder, replace(manifest, looks=(*manifest.looks, found), measured_s=measured_s))
    told = "; ".join(f"{method}: {verdict}" for method, verdict in verdicts.items()) or "nothing to decide"
    LOGGER.info("look after %d iterations: %s", iterations, told)
    return found


def end(store: RunStore, why: str, stopwatch: Stopwatch) -> None:
    """Keeps why a run measures no more."""
    manifest = read_manifest(store.folder)
    write_manifest(store.folder, replace(manifest, ended=why, measured_s=stopwatch.seconds))
    if why == "budget":
        LOGGER.info(
            "the budget of %s does not reach any further; the same command with a larger --budget goes on",
            format_duration(stopwatch.budget_s or 0.0).removeprefix("about "),
        )
