"""What is stored of a run, as records: measurements, texts, results of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pruning_comparison.spec import Cell

if TYPE_CHECKING:
    from pruning_comparison.agency import RoundRecord


@dataclass(frozen=True)
class Measurement:
    """One measured value. ``value`` is None where it could not be measured; ``reason`` then says why, in words."""

    metric: str
    value: float | None
    unit: str
    reason: str | None = None
    temperature: float | None = None
    prompt: int | None = None
    document: str | None = None
    window: int | None = None
    repeat: int | None = None


@dataclass(frozen=True)
class GeneratedText:
    """What one variant wrote on one prompt."""

    temperature: float
    prompt: int
    prompt_text: str
    text: str


@dataclass(frozen=True)
class CellResult:
    """All that is known of a cell, apart from its timings. ``status`` is "done" or, with a reason, "failed".

    ``rest``: only what was missing of a cell whose heads and perplexity another run has measured. ``traceback`` of a failure
    is for the log, and not kept in the journal.
    """

    cell: Cell
    status: str
    reason: str | None = None
    achieved_level: float | None = None
    heads_pruned: int | None = None
    heads_total: int | None = None
    fingerprint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    measurements: Sequence[Measurement] = ()
    heads: Sequence[tuple[int, int, float, bool]] = ()
    texts: Sequence[GeneratedText] = ()
    round_records: Sequence[RoundRecord] = ()
    rest: bool = False
    traceback: str = ""
