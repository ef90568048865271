"""When a run may end that goes on until it has decided: three looks, fixed in advance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, observations
from pruning_comparison.analysis.hypotheses import answer_hypotheses
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.verdict_rules import NOT_ENOUGH
from pruning_comparison.spec import LOOKS
from pruning_comparison.variants import PRIMARY

__all__ = ["LOOKS", "PrimaryAnswers", "next_look", "primary_answers", "primary_answers_at"]

PRIMARY_ID = "E2"


@dataclass(frozen=True)
class PrimaryAnswers:
    """The primary answer of each method (columns ``HYPOTHESIS_COLUMNS``), and whether all of them are decided."""

    rows: pd.DataFrame
    decided: bool


def next_look(iterations: int) -> int | None:
    """The look that comes after so many iterations; None after the last."""
    return next((look for look in LOOKS if look > iterations), None)


def primary_answers(
    model: str,
    cells: pd.DataFrame,
    tables: Mapping[str, MetricTable],
    *,
    margins: Margins | None = None,
    looks: int = len(LOOKS),
) -> PrimaryAnswers:
    """The primary answers as the final report will give them, at one of so many ``looks``.

    Not decided where agency and baseline are not both measured. What is decided follows from the tables alone.
    """
    variant, reference = PRIMARY
    table = answer_hypotheses(model, cells, tables, margins=margins, variant=variant, reference=reference, looks=looks)
    rows = table[table["id"] == PRIMARY_ID].reset_index(drop=True)
    return PrimaryAnswers(rows, len(rows) > 0 and bool((rows["verdict"] != NOT_ENOUGH).all()))


def primary_answers_at(
    look: int, model: str, cells: pd.DataFrame, measurements: pd.DataFrame, *, margins: Margins | None = None
) -> PrimaryAnswers:
    """The same from a journal's tables, of the first ``look`` iterations alone: what a look sees depends on nothing else."""
    cells = cells[cells["iteration"] < look]
    measurements = measurements[measurements["iteration"] < look]
    return primary_answers(model, cells, observations(cells, measurements), margins=margins)
