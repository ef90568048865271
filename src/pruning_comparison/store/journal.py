"""The journal of a run folder: an SQLite database of everything measured, whose columns are the fields of its rows."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pandas as pd

from pruning_comparison.errors import StoreError
from pruning_comparison.formatting import unknown_name
from pruning_comparison.spec import Cell
from pruning_comparison.store.records import (
    TABLES,
    CellResult,
    CellRow,
    EngineTiming,
    EngineTimingRow,
    HeadRow,
    LayerTimeRow,
    Measurement,
    MeasurementRow,
    ReplyRow,
    Row,
    SignalRow,
    TextRow,
    TimingEffort,
    TimingRow,
    refuse_newer,
)
from pruning_comparison.store.run_folder import JOURNAL, read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from pruning_comparison.agency import RoundRecord

LOCK = "run.lock"

JOURNAL_SCHEMA = 5
"""Version of the journal's schema, its ``user_version``. Journals of 0.1.0 have none, and count as 0.

2: ``timings`` says what they took, and ``measurements`` has timings of the dense model at every level.
3: ``layer_times``.
4: ``engine_timings``.
5: they say what weights were stored as.
"""

_KEY = ("variant", "method", "iteration", "level")
_KEYS = {"cells": _KEY, "timings": ("method", "iteration", "level"), "layer_times": ("heads",)}
"""Primary keys of the tables that have one."""
_INDICES = {
    "measurements": ("method", "iteration", "level", "variant", "phase"),
    "heads": ("method", "iteration", "level", "variant"),
}
_ORDER = {
    "cells": ("method", "iteration", "level", "variant"),
    "measurements": (
        "method", "iteration", "level", "variant", "phase", "temperature", "prompt", "document", "window", "repeat", "rowid",
    ),
    "heads": ("method", "iteration", "level", "variant", "layer", "head"),
    "signals": ("method", "iteration", "level", "variant", "round_level", "layer", "head"),
    "replies": ("method", "iteration", "level", "variant", "round_level", "asked_rank"),
    "texts": ("method", "iteration", "level", "variant", "temperature", "prompt"),
    "timings": ("method", "iteration", "level"),
    "layer_times": ("heads",),
    "engine_timings": ("method", "iteration", "level", "engine", "variant", "prompt", "repeat"),
}  # fmt: skip
"""The tables that are read as a whole, and what their rows are sorted by."""
_OF_CELL = "WHERE variant = ? AND method = ? AND iteration = ? AND level = ?"
_CELL_TABLES = ("cells", "heads", "signals", "replies", "texts")
_SQL_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL", bool: "INTEGER"}


def columns_of(table: str) -> list[str]:
    """Names of a journal table's columns, in order; ValueError for an unknown table."""
    return [one.name for one in fields(_record_of(table))]


def _record_of(table: str) -> type[Row]:
    if table not in TABLES:
        raise ValueError(unknown_name("table of the journal", table, TABLES))
    return TABLES[table]


def _listed(names: Iterable[str]) -> str:
    """Names as SQL takes them. In brackets: what is no column is then an error, and not a text of that name."""
    return ", ".join(f"[{name}]" for name in names)


def _schema() -> str:
    """The statements that make an empty journal."""
    statements = []
    for table, record in TABLES.items():
        kinds = get_type_hints(record)
        parts = [f"[{name}] {_sql_type(kinds[name])}" for name in columns_of(table)]
        if table in _KEYS:
            parts.append(f"PRIMARY KEY ({_listed(_KEYS[table])})")
        statements.append(f"CREATE TABLE {table} ({', '.join(parts)})")
    statements += [f"CREATE INDEX {table}_by_cell ON {table} ({_listed(names)})" for table, names in _INDICES.items()]
    return f"BEGIN; {'; '.join(statements)}; PRAGMA user_version = {JOURNAL_SCHEMA}; COMMIT;"


def _sql_type(kind: Any) -> str:
    """The column type of a field's type, which may be None as well."""
    (plain,) = {part for part in get_args(kind) or (kind,) if part is not type(None)}
    return _SQL_TYPES[plain]


def _selected(table: str) -> str:
    """What is selected of a table, as its record has it."""
    return _listed(columns_of(table))


_ADDED_IN_2 = {"timings": {one.name for one in fields(TimingEffort)}}
_ADDED_IN_5 = {"engine_timings": {"weights"}}


def _selected_but(table: str, added: Collection[str]) -> str:
    """What is selected of a table that does not have the columns yet that were ``added``."""
    return ", ".join(f"NULL AS [{name}]" if name in added else f"[{name}]" for name in columns_of(table))


def _selected_of_1(table: str) -> str:
    """Version 1 did not say what timings took. Journals of 0.1.0 are like it, but for the number of their schema."""
    return _selected_but(table, _ADDED_IN_2.get(table, set()))


def _selected_of_4(table: str) -> str:
    """Version 4 did not say what an engine's weights were stored as."""
    return _selected_but(table, _ADDED_IN_5.get(table, set()))


_ADDED_TABLES = {"layer_times": 3, "engine_timings": 4}
"""Tables that journals of earlier versions do not have, and the version that brought them."""

_READERS: dict[int, Callable[[str], str]] = {
    0: _selected_of_1,
    1: _selected_of_1,
    2: _selected,
    3: _selected,
    4: _selected_of_4,
    5: _selected,
}
"""What is selected of a table, by the version of the journal's schema."""


class RunStore:
    """The journal of one run folder. Every cell is written in one transaction: it is there whole, or not at all.

    Opened for reading, unless ``lock``: then nothing is written, a journal that is not there yet reads as an empty one, and
    those of earlier versions are read as they are. ``lock`` opens it for writing, and keeps every other process from that
    until the store is closed or its process ends, however it ends; reading stays possible. StoreError where another process
    has it, where the journal cannot be used, or where a newer version has written it.
    """

    def __init__(self, folder: Path, *, lock: bool = False) -> None:
        self.folder = folder
        with ExitStack() as opened:
            self._lock = opened.enter_context(closing(_locked(folder))) if lock else None
            try:
                self._journal = opened.enter_context(closing(_opened(folder / JOURNAL, writing=lock)))
                self._select = self._reader(writing=lock)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise StoreError(
                    f"the journal {folder / JOURNAL} cannot be opened: {error}. Start a new run."
                ) from error
            opened.pop_all()

    def _reader(self, *, writing: bool) -> Callable[[str], str]:
        """What is selected of a table of this journal. StoreError where its schema is none to read, or to write."""
        version = self._version = int(self._journal.execute("PRAGMA user_version").fetchone()[0])
        if version not in _READERS:
            try:
                versions = read_manifest(self.folder).versions
            except StoreError:
                versions = {}
            refuse_newer(f"journal {self.folder / JOURNAL}", version, versions)
        if writing and version != JOURNAL_SCHEMA:
            raise StoreError(
                f"the journal {self.folder / JOURNAL} was made by an earlier version, whose results may differ. It can be "
                "reported and not written to; give another --output_dir."
            )
        return _READERS[version]

    def close(self) -> None:
        self._journal.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def finished_cells(self) -> set[Cell]:
        """Cells whose measurements are stored."""
        rows = self._read("SELECT variant, method, iteration, level FROM cells WHERE status = 'done'")
        return {Cell(*row) for row in rows}

    def parts(self) -> set[Cell]:
        """Cells whose heads and perplexity were taken over from another run, and whose texts are missing."""
        rows = self._read("SELECT variant, method, iteration, level FROM cells WHERE status = 'part'")
        return {Cell(*row) for row in rows}

    def finished_timings(self) -> set[tuple[str, int, float]]:
        """(method, iteration, level) whose timings are stored."""
        return {(row[0], row[1], row[2]) for row in self._rows("timings")}

    def known(self, cell: Cell) -> tuple[list[list[bool]], str] | None:
        """Heads [n_layers, n_heads] that a measured cell has kept, and its model's fingerprint; None if not measured."""
        found = self._read(f"SELECT fingerprint FROM cells {_OF_CELL} AND status IN ('done', 'part')", tuple(cell))
        if not found:
            return None
        rows = self._read(f"SELECT layer, kept FROM heads {_OF_CELL} ORDER BY layer, head", tuple(cell))
        keep: dict[int, list[bool]] = {}
        for layer, kept in rows:
            keep.setdefault(layer, []).append(bool(kept))
        return list(keep.values()), str(found[0][0])

    def write_cell(self, result: CellResult, code_commit: str | None) -> None:
        """Stores a cell, in place of an earlier failed attempt; the rest of a part is added to it."""
        key = tuple(result.cell)
        with self._transaction():
            if result.rest:
                self._journal.execute(
                    f"UPDATE cells SET status = ?, code_commit = ? {_OF_CELL}", (result.status, code_commit, *key)
                )
                self._insert("measurements", _measurement_rows(result.cell, "quality", result.measurements))
                self._insert("texts", _text_rows(result))
                return
            for table in _CELL_TABLES:
                self._journal.execute(f"DELETE FROM {table} {_OF_CELL}", key)
            self._journal.execute(f"DELETE FROM measurements {_OF_CELL} AND phase = 'quality'", key)
            self._insert("cells", [_cell_row(result, code_commit)])
            self._insert("measurements", _measurement_rows(result.cell, "quality", result.measurements))
            self._insert("heads", [HeadRow(*result.cell, *row) for row in result.heads])
            for round_record in result.round_records:
                self._insert("signals", _signal_rows(result.cell, round_record))
                self._insert("replies", _reply_rows(result.cell, round_record))
            self._insert("texts", _text_rows(result))

    def write_timings(
        self,
        method: str,
        iteration: int,
        level: float,
        rows: Iterable[tuple[str, Measurement]],
        *,
        complete: bool = True,
        effort: TimingEffort | None = None,
        engines: Iterable[tuple[str, EngineTiming]] = (),
    ) -> None:
        """Stores the timings of all variants at one level: (variant, measurement) pairs, and what they took.

        ``engines`` are (variant, timing) pairs of the same level, which are there or missing with the others.

        Timings that are not ``complete`` are shown, and taken again when the run is continued.
        """
        with self._transaction():
            self._journal.execute(
                "DELETE FROM measurements WHERE method = ? AND iteration = ? AND level = ? AND phase = 'timing'",
                (method, iteration, level),
            )
            self._journal.execute(
                "DELETE FROM engine_timings WHERE method = ? AND iteration = ? AND level = ?",
                (method, iteration, level),
            )
            self._insert(
                "engine_timings",
                [EngineTimingRow(variant, method, iteration, level, **vars(one)) for variant, one in engines],
            )
            for variant, row in rows:
                self._insert(
                    "measurements", _measurement_rows(Cell(variant, method, iteration, level), "timing", [row])
                )
            if complete:
                took = {} if effort is None else vars(effort)
                self._insert("timings", [TimingRow(method, iteration, level, **took)])

    def layer_times_s(self) -> dict[int, float] | None:
        """Seconds of a decoding step per layer, by the layer's live heads; None where the run has not measured them."""
        rows = self._rows("layer_times", "ORDER BY [heads]")
        return {int(heads): float(seconds) for heads, seconds in rows} or None

    def write_layer_times(self, layer_times_s: Mapping[int, float]) -> None:
        """Stores the layer times of the run, once. ValueError where it has others already, by which heads were chosen."""
        known = self.layer_times_s()
        if known is not None:
            if known != dict(layer_times_s):
                raise ValueError("the run has layer times already, and heads have been chosen by them")
            return
        with self._transaction():
            self._insert("layer_times", [LayerTimeRow(heads, seconds) for heads, seconds in layer_times_s.items()])

    def copy_from(self, other: RunStore, cells: Collection[Cell], timings: Collection[tuple[str, int, float]]) -> None:
        """Takes over finished cells and timings of another run, all or none of them, with the commit that measured them."""
        with self._transaction():
            for cell in cells:
                for table in _CELL_TABLES:
                    self._take_over(other, table, _OF_CELL, tuple(cell))
                self._take_over(other, "measurements", f"{_OF_CELL} AND phase = 'quality'", tuple(cell))
            for timing in timings:
                where_timed = "WHERE method = ? AND iteration = ? AND level = ? AND phase = 'timing'"
                self._take_over(other, "measurements", where_timed, timing)
                for table in ("timings", "engine_timings"):
                    self._take_over(other, table, "WHERE method = ? AND iteration = ? AND level = ?", timing)

    def copy_parts_from(self, other: RunStore, cells: Collection[Cell]) -> None:
        """Takes over heads, negotiation and perplexity of cells that another run has measured with other prompts."""
        others = "'negotiation_s', 'predicted_perplexity_ratio', 'held_out_perplexity'"
        keep = f"AND ([window] IS NOT NULL OR metric IN ({others}))"
        with self._transaction():
            for cell in cells:
                for table in ("cells", "heads", "signals", "replies"):
                    self._take_over(other, table, _OF_CELL, tuple(cell))
                self._journal.execute(f"UPDATE cells SET status = 'part' {_OF_CELL}", tuple(cell))
                self._take_over(other, "measurements", f"{_OF_CELL} AND phase = 'quality'", tuple(cell), keep)

    def table(self, name: str) -> pd.DataFrame:
        """One of the journal's tables, of those in ``_ORDER``, in a stable order and without parts."""
        if name not in _ORDER:
            raise ValueError(unknown_name("table of the journal", name, _ORDER))
        whole = f"WHERE ({_listed(_KEY)}) NOT IN (SELECT {_listed(_KEY)} FROM cells WHERE status = 'part')"
        where = "" if name in ("timings", "layer_times", "engine_timings") else whole
        rows = self._rows(name, f"{where} ORDER BY {_listed(_ORDER[name])}")
        return pd.DataFrame.from_records(rows, columns=columns_of(name))

    def _rows(self, table: str, where: str = "", values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Rows of a table, with the columns of its record; none of a table that the journal's version did not have."""
        if self._version < _ADDED_TABLES.get(table, 0):
            return []
        return self._read(f"SELECT {self._select(table)} FROM {table} {where}", values)

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(self._journal.execute(query, values)) as cursor:
                return cursor.fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreError(
                f"the journal {self.folder / JOURNAL} cannot be read: {error}. Nothing can be drawn from it; run the "
                "comparison again, which starts a new run."
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._journal:
                yield
        except sqlite3.Error as error:
            raise StoreError(
                f"the journal {self.folder / JOURNAL} cannot be written: {error}. What was finished before is kept. Make "
                "room, or the folder writable; then the same command continues."
            ) from error

    def _insert(self, table: str, rows: Sequence[Row]) -> None:
        names = columns_of(table)
        statement = f"INSERT INTO {table} ({_listed(names)}) VALUES ({', '.join('?' * len(names))})"
        self._journal.executemany(statement, [[getattr(row, name) for name in names] for row in rows])

    def _take_over(self, other: RunStore, table: str, where: str, values: tuple[Any, ...], and_those: str = "") -> None:
        """Puts another run's rows in place of this one's; of the other's, ``and_those`` may be fewer."""
        self._journal.execute(f"DELETE FROM {table} {where}", values)
        record = _record_of(table)
        self._insert(table, [record(*row) for row in other._rows(table, f"{where} {and_those}", values)])


def _opened(path: Path, *, writing: bool) -> sqlite3.Connection:
    """The journal; where none is there yet or it has no tables, an empty one, which reading does not put on the disk.

    SQLite may write even where it only reads: after a process was killed it puts back what an unfinished transaction left.
    """
    if not writing and not path.exists():
        return _filled(sqlite3.connect(":memory:"))
    journal = sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rwc' if writing else 'rw'}", uri=True)
    try:
        if not writing:
            journal.execute("PRAGMA query_only = ON")
        if journal.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return journal
        if writing:
            return _filled(journal)
    except BaseException:
        journal.close()
        raise
    journal.close()
    return _filled(sqlite3.connect(":memory:"))


def _filled(journal: sqlite3.Connection) -> sqlite3.Connection:
    journal.executescript(_schema())
    return journal


def _locked(folder: Path) -> sqlite3.Connection:
    """Holds the run until it is closed. SQLite's own lock on an empty file: it works alike on every system, and the system
    itself frees it when a process is killed."""
    lock: sqlite3.Connection | None = None
    try:
        lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if lock is not None:
            lock.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise StoreError(
                f"another process is writing to {folder}. Wait until it has finished, or give another --output_dir."
            ) from error
        raise StoreError(f"{folder} cannot be written: {error}. Make it writable, or give --output_dir.") from error
    return lock


def _cell_row(result: CellResult, code_commit: str | None) -> CellRow:
    return CellRow(
        *result.cell,
        status=result.status,
        reason=result.reason,
        achieved_level=result.achieved_level,
        heads_pruned=result.heads_pruned,
        heads_total=result.heads_total,
        fingerprint=result.fingerprint,
        details=json.dumps(dict(result.details), sort_keys=True),
        code_commit=code_commit,
    )


def _measurement_rows(cell: Cell, phase: str, measurements: Iterable[Measurement]) -> list[MeasurementRow]:
    return [MeasurementRow(*cell, phase=phase, **vars(one)) for one in measurements]


def _text_rows(result: CellResult) -> list[TextRow]:
    return [TextRow(*result.cell, **vars(text)) for text in result.texts]


def _signal_rows(cell: Cell, round_record: RoundRecord) -> list[SignalRow]:
    """State and signals of every head before a round."""
    signals, rows = round_record.signals, []
    for layer, states in enumerate(round_record.states):
        for head, state in enumerate(states):
            rows.append(
                SignalRow(
                    *cell,
                    round_level=round_record.level,
                    layer=layer,
                    head=head,
                    state=str(state),
                    utilisation=_finite(signals.utilisation[layer, head]),
                    contribution=_finite(signals.contribution[layer, head]),
                    alignment=_finite(signals.alignment[layer, head]),
                    redundancy=_finite(signals.redundancy[layer, head]),
                    importance=_finite(signals.importance[layer, head]),
                    withdrawal_cost=_finite(signals.withdrawal_cost[layer, head]),
                )
            )
    return rows


def _finite(value: Tensor) -> float | None:
    """None for a number that is none: a withdrawn head has no signals."""
    number = float(value)
    return number if math.isfinite(number) else None


def _reply_rows(cell: Cell, round_record: RoundRecord) -> list[ReplyRow]:
    """What every head that was asked in a round has answered, in the order in which they were asked."""
    return [
        ReplyRow(
            *cell,
            round_level=round_record.level,
            layer=reply.layer,
            head=reply.head,
            answer=str(reply.answer),
            state=str(reply.state),
            asked_rank=reply.rank,
            cost=reply.cost,
            cost_limit=reply.limit,
            left_rank=reply.left,
            left_cost=reply.left_cost,
        )
        for reply in round_record.replies
    ]
