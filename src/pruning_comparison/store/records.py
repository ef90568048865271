"""What is stored of a run, as records: the manifest, and the rows of the journal's tables.

The journal's columns and every insert derive from the rows here, and ``manifest.json`` from ``Manifest``. Both carry the
version of their schema; what older versions have left is read by a function of its own, and what a newer one has left is
refused in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pruning_comparison import __version__
from pruning_comparison.errors import StoreError
from pruning_comparison.spec import Cell, Revisions

if TYPE_CHECKING:
    from pruning_comparison.agency import RoundRecord

MANIFEST_SCHEMA = 1
"""Version of the manifest's schema, its ``schema_version``. Manifests of 0.1.0 have none, and count as 0."""

Status = Literal["done", "failed"]


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
class TimingEffort:
    """What the timings of a level took: pairs of each two models, of whole generations and of first tokens, and seconds.

    The half widths are those of the widest 95 % interval among the ratios of two models, of end-to-end time and of
    first-token latency, as shares; None where there was nothing to compare. ``ended`` says why there are no more pairs:
    "precise", "time limit", or "all alike" where all variants have the same model.
    """

    pairs: int
    first_token_pairs: int
    seconds: float
    speed_half_width: float | None
    latency_half_width: float | None
    ended: str


@dataclass(frozen=True)
class EngineTiming:
    """One timed generation of a batch of prompts in one engine, or, with a ``reason`` alone, why there is none.

    ``tokens`` is how many new ones all rows have together. ``warm_up_s`` are the seconds that it took before anything was
    timed: compiling, where the engine does, and one generation. ``differing_share`` is the share of these tokens that are
    others than the native engine's on the same draws; where an engine cannot draw, of places with another likeliest token.
    ``weights`` says what they were stored as where the engine read them from a file of its own, such as "f32".
    """

    engine: str
    prompt: int | None = None
    repeat: int | None = None
    first_token_latency_s: float | None = None
    end_to_end_s: float | None = None
    tokens: int | None = None
    warm_up_s: float | None = None
    differing_share: float | None = None
    reason: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class CellResult:
    """All that is known of a cell, apart from its timings. ``status`` is "done" or, with a reason, "failed".

    ``rest``: only what was missing of a cell whose heads and perplexity another run has measured. ``traceback`` of a failure
    is for the log, and not kept in the journal.
    """

    cell: Cell
    status: Status
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


# The rows of the journal


@dataclass(frozen=True)
class _RowOfCell:
    """What every row of a cell begins with."""

    variant: str
    method: str
    iteration: int
    level: float


@dataclass(frozen=True)
class CellRow(_RowOfCell):
    """One cell. ``status`` is a ``Status`` or "part": heads and perplexity are there, and texts are missing.

    Levels are in per cent; ``fingerprint`` names weights and heads; ``details`` are JSON.
    """

    status: str
    reason: str | None
    achieved_level: float | None
    heads_pruned: int | None
    heads_total: int | None
    fingerprint: str | None
    details: str | None
    code_commit: str | None


@dataclass(frozen=True)
class MeasurementRow(_RowOfCell):
    """One ``Measurement``; ``phase`` is "quality" or "timing".

    Timings of the dense model in a level's turns have the variant ``variants.DENSE``, which has no cell of its own.
    """

    phase: str
    temperature: float | None
    prompt: int | None
    document: str | None
    window: int | None
    repeat: int | None
    metric: str
    value: float | None
    unit: str
    reason: str | None


@dataclass(frozen=True)
class HeadRow(_RowOfCell):
    """One head of one cell: the score it was ranked by, and whether it was kept."""

    layer: int
    head: int
    score: float
    kept: bool


@dataclass(frozen=True)
class SignalRow(_RowOfCell):
    """A head's state and signals before the round that led to ``round_level``; None where a withdrawn head has none."""

    round_level: float
    layer: int
    head: int
    state: str
    utilisation: float | None
    contribution: float | None
    alignment: float | None
    redundancy: float | None
    importance: float | None
    withdrawal_cost: float | None


@dataclass(frozen=True)
class ReplyRow(_RowOfCell):
    """The answer of a head that was asked in a round, with its price and the limit that the price was compared with."""

    round_level: float
    layer: int
    head: int
    answer: str
    state: str
    asked_rank: int
    cost: float | None
    cost_limit: float | None
    left_rank: int | None
    left_cost: float | None


@dataclass(frozen=True)
class TextRow(_RowOfCell):
    """One ``GeneratedText``."""

    temperature: float
    prompt: int
    prompt_text: str
    text: str


@dataclass(frozen=True)
class TimingRow:
    """A level whose timings are complete: all variants, and the dense model, are timed at it together.

    The rest is as in ``TimingEffort``; None in runs that took none down.
    """

    method: str
    iteration: int
    level: float
    pairs: int | None = None
    first_token_pairs: int | None = None
    seconds: float | None = None
    speed_half_width: float | None = None
    latency_half_width: float | None = None
    ended: str | None = None


@dataclass(frozen=True)
class LayerTimeRow:
    """Seconds that a decoding step of the dense model spends on one layer that has so many ``heads``, with all else in it.

    Measured once per run, where heads are held by what they save in time; whoever goes on with the run uses it.
    """

    heads: int
    seconds: float


@dataclass(frozen=True)
class EngineTimingRow(EngineTiming, _RowOfCell):
    """One ``EngineTiming``; those of the dense model have the variant ``variants.DENSE``."""


Row = CellRow | MeasurementRow | HeadRow | SignalRow | ReplyRow | TextRow | TimingRow | LayerTimeRow | EngineTimingRow

TABLES: dict[str, type[Row]] = {
    "cells": CellRow,
    "measurements": MeasurementRow,
    "heads": HeadRow,
    "signals": SignalRow,
    "replies": ReplyRow,
    "texts": TextRow,
    "timings": TimingRow,
    "layer_times": LayerTimeRow,
    "engine_timings": EngineTimingRow,
}
"""The record of a row of each of the journal's tables."""


# The manifest


@dataclass(frozen=True)
class ModelFacts:
    """The model that a run prunes, as ``ModelPreview.describe`` gives it. Sizes are counts.

    ``others`` are facts that this version does not know, kept as they are.
    """

    name: str
    model_type: str
    layers: int
    heads_per_layer: int
    head_size: int
    context_tokens: int
    vocabulary: int
    hub_commit: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelFacts:
        """The inverse of ``as_dict``. ValueError for what are no facts of a model."""
        known, others = _sorted_out(cls, raw)
        for name in ("name", "model_type"):
            _checked(f"model.{name}", known.get(name), str)
        for name in ("layers", "heads_per_layer", "head_size", "context_tokens", "vocabulary"):
            _checked(f"model.{name}", known.get(name), int)
        _checked("model.hub_commit", known.get("hub_commit"), str, type(None))
        return cls(**known, others=others)

    def as_dict(self) -> dict[str, Any]:
        """The facts as plain values."""
        return _as_plain(self)


@dataclass(frozen=True)
class Reused:
    """What was taken over from an earlier run: its folder's name, the commit that measured it, and how much of what."""

    run: str
    commit: str | None
    counts: Mapping[str, int]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Reused:
        """The inverse of ``as_dict``. ValueError for what says nothing of that kind."""
        counts = {name: value for name, value in raw.items() if name not in ("run", "commit")}
        _checked("reused.run", raw.get("run"), str)
        _checked("reused.commit", raw.get("commit"), str, type(None))
        for name, count in counts.items():
            _checked(f"reused.{name}", count, int)
        return cls(raw["run"], raw.get("commit"), counts)

    def as_dict(self) -> dict[str, Any]:
        """As plain values: the counts beside the others."""
        return {"run": self.run, "commit": self.commit, **self.counts}


@dataclass(frozen=True)
class LookRecord:
    """What a look at a run has found after so many iterations: the verdict of each method's primary answer.

    ``decided``: all of them are, so that the run ended. ``measured_s`` is how long the run had been measured by then.
    """

    iterations: int
    decided: bool
    verdicts: Mapping[str, str]
    measured_s: float

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LookRecord:
        """The inverse of ``as_dict``. ValueError for what is no look."""
        verdicts: Mapping[str, str] = _checked("looks.verdicts", raw.get("verdicts"), Mapping)
        for method, verdict in verdicts.items():
            _checked(f"looks.verdicts.{method}", verdict, str)
        if not isinstance(raw.get("decided"), bool):
            raise ValueError(f"looks.decided is {raw.get('decided')!r}")
        return cls(
            _checked("looks.iterations", raw.get("iterations"), int),
            raw["decided"],
            dict(verdicts),
            float(_checked("looks.measured_s", raw.get("measured_s"), int, float)),
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "verdicts": dict(self.verdicts)}


@dataclass(frozen=True)
class Manifest:
    """What a run is and how it was made; its ``manifest.json``.

    ``spec`` are the settings as they were stored, so that a run can be reported whose settings, methods or variants this
    version no longer has. ``spec_hash`` is the run's identity. ``revisions`` is None for a run of 0.1.0, which stored none.
    ``inputs`` are hashes of the contents that were read. ``started`` and ``finished`` are times in UTC; ``finished`` is None
    until every cell is measured. ``margins`` are those of the last report.

    Of a run that goes on until it has decided, ``looks`` are those that were taken, ``measured_s`` is how long it has been
    measured, in all sessions together, and ``ended`` says why it measures no more: "decided", "looks" where the last of
    them decided nothing either, or "budget"; None while it goes on. ``thread_times_s`` are the times, by number of CPU
    threads, that the number of this run was chosen by; None where it was given. ``others`` are keys that this version does
    not know, kept as they are.
    """

    spec: Mapping[str, Any]
    spec_hash: str = ""
    revisions: Revisions | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    model: ModelFacts | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    started: str | None = None
    finished: str | None = None
    warnings: tuple[str, ...] = ()
    margins: Mapping[str, float] | None = None
    reused: tuple[Reused, ...] = ()
    looks: tuple[LookRecord, ...] = ()
    measured_s: float = 0.0
    ended: str | None = None
    thread_times_s: Mapping[str, float] | None = None
    schema_version: int = MANIFEST_SCHEMA
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def made_by(self) -> str:
        """The version of this package that began the run, in words."""
        name = "pruning-comparison"
        return f"version {self.versions[name]}" if name in self.versions else "an unknown version"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Manifest:
        """A manifest as it was stored, by whatever version.

        ValueError, saying what, where it is not the manifest of a run; StoreError where a newer version has written it.
        """
        version = raw.get("schema_version", 0)
        if not isinstance(version, int) or version < 0:
            raise ValueError(f"schema_version is {version!r}")
        if version not in _READERS:
            versions = raw.get("versions")
            refuse_newer("manifest", version, versions if isinstance(versions, Mapping) else {})
        return _READERS[version](raw)

    def as_dict(self) -> dict[str, Any]:
        """The manifest as plain values, with no more keys than its schema had."""
        plain = _as_plain(self)
        plain["warnings"] = list(self.warnings)
        plain["model"] = None if self.model is None else self.model.as_dict()
        plain["revisions"] = None if self.revisions is None else self.revisions.as_dict()
        plain["reused"] = [one.as_dict() for one in self.reused]
        plain["looks"] = [one.as_dict() for one in self.looks]
        absent = [
            name for name in ("margins", "reused", "looks", "measured_s", "ended", "thread_times_s") if not plain[name]
        ]
        if self.schema_version == 0:
            absent += ["schema_version", "revisions"]
        return {name: value for name, value in plain.items() if name not in absent}


def _read_manifest_1(raw: Mapping[str, Any]) -> Manifest:
    known, others = _sorted_out(Manifest, raw)
    spec: Mapping[str, Any] = _checked("spec", raw.get("spec"), Mapping)
    for name, kind in (("model_name", str), ("variants", list), ("seed", int)):
        _checked(f"spec.{name}", spec.get(name), kind)
    for name, kinds in _KINDS.items():
        if name in known:
            _checked(name, known[name], *kinds)
    for name in ("inputs", "versions"):
        for part, value in known.get(name, {}).items():
            _checked(f"{name}.{part}", value, str)
    for warning in known.get("warnings", ()):
        _checked("warnings", warning, str)
    known["warnings"] = tuple(known.get("warnings", ()))
    for name, read in (("model", ModelFacts.from_dict), ("revisions", Revisions.from_dict)):
        if known.get(name) is not None:
            known[name] = read(known[name])
    for one in known.get("reused", ()):
        _checked("reused", one, Mapping)
    known["reused"] = tuple(Reused.from_dict(one) for one in known.get("reused", ()))
    for one in known.get("looks", ()):
        _checked("looks", one, Mapping)
    known["looks"] = tuple(LookRecord.from_dict(one) for one in known.get("looks", ()))
    return Manifest(**known, others=others)


def _read_manifest_0(raw: Mapping[str, Any]) -> Manifest:
    """Manifests of 0.1.0 have neither ``schema_version`` nor ``revisions``; what else they have is as in version 1."""
    return _read_manifest_1({**raw, "schema_version": 0, "revisions": None})


_READERS: dict[int, Callable[[Mapping[str, Any]], Manifest]] = {0: _read_manifest_0, 1: _read_manifest_1}

_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "spec_hash": (str,),
    "revisions": (Mapping, _NONE),
    "inputs": (Mapping,),
    "model": (Mapping, _NONE),
    "versions": (Mapping,),
    "hardware": (Mapping,),
    "commit": (str, _NONE),
    "started": (str, _NONE),
    "finished": (str, _NONE),
    "warnings": (list,),
    "margins": (Mapping, _NONE),
    "reused": (list,),
    "looks": (list,),
    "measured_s": (int, float),
    "ended": (str, _NONE),
    "thread_times_s": (Mapping, _NONE),
}


def refuse_newer(what: str, version: int, versions: Mapping[str, Any]) -> NoReturn:
    """Raises StoreError for a schema that is newer than this version of the package.

    ``versions`` are those of the run's manifest, which name the package that can read it.
    """
    name = "pruning-comparison"
    needed = f"{name} {versions[name]}" if name in versions else f"a newer {name}"
    raise StoreError(
        f"its {what} has schema version {version}, which {name} {__version__} does not know. Install {needed} to read it."
    )


def _sorted_out(record: type, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a record has a field for, and what it has not."""
    names = {one.name for one in fields(record)} - {"others"}
    known = {name: value for name, value in raw.items() if name in names}
    return known, {name: value for name, value in raw.items() if name not in names}


def _as_plain(record: Any) -> dict[str, Any]:
    """A record's fields by their names, those it does not know among them."""
    known = {one.name: getattr(record, one.name) for one in fields(record) if one.name != "others"}
    return {**record.others, **known}


def _checked(name: str, value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name} is {str(value)[:60]!r}")
    return value
