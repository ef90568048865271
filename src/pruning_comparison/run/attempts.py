"""Making and measuring models where failures become results."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pruning_comparison.errors import MethodError
from pruning_comparison.formatting import reason_of
from pruning_comparison.run.cell import rebuild, run_cell
from pruning_comparison.run.measure_cell import LevelTimings, measure_texts_and_size, time_level, untimed
from pruning_comparison.run.pruned_model import KeptHeads, PrunedModel
from pruning_comparison.run.saved_models import save_model
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell
from pruning_comparison.store import CellResult


@dataclass(frozen=True)
class Failure:
    """Why something could not be measured: the reason in one line, and the traceback, for the log."""

    reason: str
    traceback: str = ""


def attempt(
    workspace: Workspace, cell: Cell, part: KeptHeads | None = None, *, raise_failures: bool
) -> tuple[PrunedModel | None, CellResult]:
    """Makes a cell's model and measures it; where its heads and perplexity are known, ``part``, only the rest.

    A failure becomes a failed result, unless ``raise_failures``. MethodError is raised in any case: every other cell of the
    user's method would fail alike.
    """
    try:
        if part is None:
            return run_cell(workspace, cell)
        pruned = rebuild(workspace, cell, part)
        return pruned, measure_texts_and_size(workspace, cell, pruned)
    except MethodError:
        raise
    except Exception as error:
        if raise_failures:
            raise
        failure = failure_of(error)
        return None, CellResult(cell=cell, status="failed", reason=failure.reason, traceback=failure.traceback)


def attempt_rebuild(
    workspace: Workspace, cell: Cell, kept: KeptHeads, *, raise_failures: bool
) -> tuple[PrunedModel | None, Failure | None]:
    """The model of a measured cell made again, and None; where that fails, None and why."""
    try:
        return rebuild(workspace, cell, kept), None
    except Exception as error:
        if raise_failures:
            raise
        return None, failure_of(error)


def attempt_timing(
    workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int, *, raise_failures: bool
) -> tuple[LevelTimings, Failure | None]:
    """Timings of one level and None; where they fail, missing values that say why, and the failure."""
    try:
        return time_level(workspace, models, iteration), None
    except Exception as error:
        if raise_failures:
            raise
        failure = failure_of(error)
        return LevelTimings(untimed(models, failure.reason)), failure


def attempt_saving(workspace: Workspace, pruned: PrunedModel, cell: Cell, run: Path) -> Failure | None:
    """Keeps a cell's model in the run's folder; where that fails, why: what was measured of it does not depend on it."""
    try:
        save_model(workspace, pruned, cell, run)
    except Exception as error:
        return failure_of(error)
    return None


def failure_of(error: BaseException) -> Failure:
    """What is kept of an error: it may have arisen in another process than the one that logs it."""
    return Failure(reason_of(error), "".join(traceback.format_exception(error)).rstrip())
