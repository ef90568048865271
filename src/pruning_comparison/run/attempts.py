"""Making and measuring models where failures become results."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from transformers import PreTrainedModel

from pruning_comparison.errors import MethodError
from pruning_comparison.run.cell import rebuild, run_cell
from pruning_comparison.run.measure_cell import measure_texts_and_size, time_level, untimed
from pruning_comparison.run.pruned_model import KeptHeads, PrunedModel
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell
from pruning_comparison.store import CellResult, Measurement

LOGGER = logging.getLogger(__name__)


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
        return None, CellResult(cell=cell, status="failed", reason=reason_of(error, cell.describe()))


def attempt_rebuild(
    workspace: Workspace, cell: Cell, kept: KeptHeads, *, raise_failures: bool
) -> tuple[PrunedModel | None, str | None]:
    """The model of a measured cell made again, and None; where that fails, None and the reason."""
    try:
        return rebuild(workspace, cell, kept), None
    except Exception as error:
        if raise_failures:
            raise
        return None, reason_of(error, cell.describe())


def attempt_timing(
    workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int, *, raise_failures: bool
) -> tuple[list[tuple[str, Measurement]], str | None]:
    """Timings of one level and None; where they fail, missing values that say why, and the reason."""
    try:
        return time_level(workspace, models, iteration), None
    except Exception as error:
        if raise_failures:
            raise
        reason = reason_of(error, "timing")
        return untimed(models, reason), reason


def reason_of(error: BaseException, what: str = "") -> str:
    """The kind of an error and the first line of its message; its traceback is logged, where ``what`` is named."""
    if what:
        LOGGER.error("%s failed", what, exc_info=error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
