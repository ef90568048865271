"""The run folder: an SQLite journal of everything measured, a manifest, and the tidy export."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_comparison.errors import StoreError
from pruning_comparison.spec import Cell

if TYPE_CHECKING:
    from pruning_comparison.agency import RoundRecord

from pruning_comparison.store.records import CellResult, Measurement
from pruning_comparison.store.run_folder import JOURNAL

LOCK = "run.lock"


_KEY = "variant TEXT, method TEXT, iteration INTEGER, level REAL"


_KEY_NAMES = "variant, method, iteration, level"


_OF_CELL = "WHERE variant = ? AND method = ? AND iteration = ? AND level = ?"


_CELL_TABLES = ("cells", "heads", "signals", "replies", "texts")


_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS cells (
    {_KEY}, status TEXT, reason TEXT, achieved_level REAL, heads_pruned INTEGER, heads_total INTEGER,
    fingerprint TEXT, details TEXT, code_commit TEXT,
    PRIMARY KEY (variant, method, iteration, level));
CREATE TABLE IF NOT EXISTS measurements (
    {_KEY}, phase TEXT, temperature REAL, prompt INTEGER, document TEXT, "window" INTEGER, repeat INTEGER,
    metric TEXT, value REAL, unit TEXT, reason TEXT);
CREATE INDEX IF NOT EXISTS measurements_by_cell ON measurements (method, iteration, level, variant, phase);
CREATE TABLE IF NOT EXISTS heads ({_KEY}, layer INTEGER, head INTEGER, score REAL, kept INTEGER);
CREATE INDEX IF NOT EXISTS heads_by_cell ON heads (method, iteration, level, variant);
CREATE TABLE IF NOT EXISTS signals ({_KEY}, round_level REAL, layer INTEGER, head INTEGER, state TEXT, utilisation REAL,
    contribution REAL, alignment REAL, redundancy REAL, importance REAL, withdrawal_cost REAL);
CREATE TABLE IF NOT EXISTS replies ({_KEY}, round_level REAL, layer INTEGER, head INTEGER, answer TEXT, state TEXT,
    asked_rank INTEGER, cost REAL, cost_limit REAL, left_rank INTEGER, left_cost REAL);
CREATE TABLE IF NOT EXISTS texts ({_KEY}, temperature REAL, prompt INTEGER, prompt_text TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS timings (method TEXT, iteration INTEGER, level REAL, PRIMARY KEY (method, iteration, level));
"""


def columns_of(table: str) -> list[str]:
    """Names of a journal table's columns, in order; ValueError for an unknown table."""
    with closing(sqlite3.connect(":memory:")) as journal:
        journal.executescript(_SCHEMA)
        columns = [str(row[1]) for row in journal.execute(f"PRAGMA table_info({table})")]
    if not columns:
        raise ValueError(f"unknown table {table!r}")
    return columns


class RunStore:
    """One run folder. Every cell is written in one transaction: it is there whole, or not at all.

    ``lock`` keeps every other process from writing to the run until the store is closed or its process ends, however it
    ends; reading stays possible. StoreError where another process has it, or where the journal cannot be used.
    """

    def __init__(self, folder: Path, *, lock: bool = False) -> None:
        self.folder = folder
        self._lock = _locked(folder) if lock else None
        try:
            self._journal = sqlite3.connect(folder / JOURNAL)
            self._journal.executescript(_SCHEMA)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if self._lock is not None:
                self._lock.close()
            raise StoreError(f"the journal {folder / JOURNAL} cannot be opened: {error}. Start a new run.") from error

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
        rows = self._read("SELECT variant, method, iteration, level FROM cells WHERE status = 'done'")[1]
        return {Cell(*row) for row in rows}

    def parts(self) -> set[Cell]:
        """Cells whose heads and perplexity were taken over from another run, and whose texts are missing."""
        rows = self._read("SELECT variant, method, iteration, level FROM cells WHERE status = 'part'")[1]
        return {Cell(*row) for row in rows}

    def finished_timings(self) -> set[tuple[str, int, float]]:
        """(method, iteration, level) whose timings are stored."""
        return {(m, i, level) for m, i, level in self._read("SELECT * FROM timings")[1]}

    def known(self, cell: Cell) -> tuple[list[list[bool]], str] | None:
        """Heads [n_layers, n_heads] that a measured cell has kept, and its model's fingerprint; None if not measured."""
        found = self._read(f"SELECT fingerprint FROM cells {_OF_CELL} AND status IN ('done', 'part')", tuple(cell))[1]
        if not found:
            return None
        rows = self._read(f"SELECT layer, kept FROM heads {_OF_CELL} ORDER BY layer, head", tuple(cell))[1]
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
                self._insert("measurements", [self._row(result.cell, "quality", row) for row in result.measurements])
                self._insert("texts", [(*key, t.temperature, t.prompt, t.prompt_text, t.text) for t in result.texts])
                return
            for table in _CELL_TABLES:
                self._journal.execute(f"DELETE FROM {table} {_OF_CELL}", key)
            self._journal.execute(f"DELETE FROM measurements {_OF_CELL} AND phase = 'quality'", key)
            self._insert(
                "cells",
                [
                    (
                        *key,
                        result.status,
                        result.reason,
                        result.achieved_level,
                        result.heads_pruned,
                        result.heads_total,
                        result.fingerprint,
                        json.dumps(dict(result.details), sort_keys=True),
                        code_commit,
                    )
                ],
            )
            self._insert("measurements", [self._row(result.cell, "quality", row) for row in result.measurements])
            self._insert("heads", [(*key, *row) for row in result.heads])
            for round_record in result.round_records:
                self._insert("signals", [(*key, *row) for row in _signal_rows(round_record)])
                self._insert("replies", [(*key, *row) for row in _reply_rows(round_record)])
            self._insert("texts", [(*key, t.temperature, t.prompt, t.prompt_text, t.text) for t in result.texts])

    def write_timings(
        self,
        method: str,
        iteration: int,
        level: float,
        rows: Iterable[tuple[str, Measurement]],
        *,
        complete: bool = True,
    ) -> None:
        """Stores the timings of all variants at one level: (variant, measurement) pairs.

        Timings that are not ``complete`` are shown, and taken again when the run is continued.
        """
        with self._transaction():
            self._journal.execute(
                "DELETE FROM measurements WHERE method = ? AND iteration = ? AND level = ? AND phase = 'timing'",
                (method, iteration, level),
            )
            self._insert(
                "measurements",
                [self._row(Cell(variant, method, iteration, level), "timing", row) for variant, row in rows],
            )
            if complete:
                self._insert("timings", [(method, iteration, level)])

    def copy_from(self, other: RunStore, cells: Collection[Cell], timings: Collection[tuple[str, int, float]]) -> None:
        """Takes over finished cells and timings of another run, all or none of them, with the commit that measured them."""
        with self._transaction():
            for cell in cells:
                for table in _CELL_TABLES:
                    self._journal.execute(f"DELETE FROM {table} {_OF_CELL}", tuple(cell))
                    self._insert(table, other._read(f"SELECT * FROM {table} {_OF_CELL}", tuple(cell))[1])
                self._journal.execute(f"DELETE FROM measurements {_OF_CELL} AND phase = 'quality'", tuple(cell))
                rows = other._read(f"SELECT * FROM measurements {_OF_CELL} AND phase = 'quality'", tuple(cell))[1]
                self._insert("measurements", rows)
            for timing in timings:
                where_timed = "WHERE method = ? AND iteration = ? AND level = ? AND phase = 'timing'"
                self._insert("measurements", other._read(f"SELECT * FROM measurements {where_timed}", timing)[1])
                self._insert("timings", [timing])

    def copy_parts_from(self, other: RunStore, cells: Collection[Cell]) -> None:
        """Takes over heads, negotiation and perplexity of cells that another run has measured with other prompts."""
        keep = "phase = 'quality' AND (\"window\" IS NOT NULL OR metric = 'negotiation_s')"
        with self._transaction():
            for cell in cells:
                for table in ("cells", "heads", "signals", "replies"):
                    self._journal.execute(f"DELETE FROM {table} {_OF_CELL}", tuple(cell))
                    self._insert(table, other._read(f"SELECT * FROM {table} {_OF_CELL}", tuple(cell))[1])
                self._journal.execute(f"UPDATE cells SET status = 'part' {_OF_CELL}", tuple(cell))
                self._journal.execute(f"DELETE FROM measurements {_OF_CELL} AND phase = 'quality'", tuple(cell))
                rows = other._read(f"SELECT * FROM measurements {_OF_CELL} AND {keep}", tuple(cell))[1]
                self._insert("measurements", rows)

    def table(self, name: str) -> pd.DataFrame:
        """A journal table (cells, measurements, heads, signals, replies, texts) in a stable order, without parts."""
        order = {
            "cells": "method, iteration, level, variant",
            "measurements": "method, iteration, level, variant, phase, "
            'temperature, prompt, document, "window", repeat, rowid',
            "heads": "method, iteration, level, variant, layer, head",
            "signals": "method, iteration, level, variant, round_level, layer, head",
            "replies": "method, iteration, level, variant, round_level, asked_rank",
            "texts": "method, iteration, level, variant, temperature, prompt",
        }
        if name not in order:
            raise ValueError(f"unknown table {name!r}; choose one of {', '.join(order)}")
        whole = f"({_KEY_NAMES}) NOT IN (SELECT {_KEY_NAMES} FROM cells WHERE status = 'part')"
        columns, rows = self._read(f"SELECT * FROM {name} WHERE {whole} ORDER BY {order[name]}")
        return pd.DataFrame.from_records(rows, columns=columns)

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Names of columns, and rows."""
        try:
            with closing(self._journal.execute(query, values)) as cursor:
                return [column[0] for column in cursor.description], cursor.fetchall()
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

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._journal.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    @staticmethod
    def _row(cell: Cell, phase: str, m: Measurement) -> tuple[Any, ...]:
        place = (m.temperature, m.prompt, m.document, m.window, m.repeat)
        return (*cell, phase, *place, m.metric, m.value, m.unit, m.reason)


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


def _signal_rows(round_record: RoundRecord) -> list[tuple[Any, ...]]:
    """State and signals of every head before a round; NULL where a withdrawn head has none."""
    signals = round_record.signals
    tables = (
        signals.utilisation,
        signals.contribution,
        signals.alignment,
        signals.redundancy,
        signals.importance,
        signals.withdrawal_cost,
    )
    rows: list[tuple[Any, ...]] = []
    for layer, states in enumerate(round_record.states):
        for head, state in enumerate(states):
            values = [float(table[layer, head]) for table in tables]
            finite = [value if math.isfinite(value) else None for value in values]
            rows.append((round_record.level, layer, head, str(state), *finite))
    return rows


def _reply_rows(round_record: RoundRecord) -> list[tuple[Any, ...]]:
    """What every head that was asked in a round has answered, in the order in which they were asked."""
    return [
        (
            round_record.level,
            reply.layer,
            reply.head,
            str(reply.answer),
            str(reply.state),
            reply.rank,
            reply.cost,
            reply.limit,
            reply.left,
            reply.left_cost,
        )
        for reply in round_record.replies
    ]
