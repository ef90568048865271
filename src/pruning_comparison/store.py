"""The run folder: an SQLite journal of everything measured, a manifest, and the tidy export."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_comparison.errors import StoreError
from pruning_comparison.spec import Cell

if TYPE_CHECKING:
    from pruning_comparison.agency import Hearing

JOURNAL = "journal.sqlite"
LOCK = "run.lock"
MANIFEST = "manifest.json"
LATEST = "latest"
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

    ``rest``: only what was missing of a cell whose heads and perplexity another run has measured.
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
    hearings: Sequence[Hearing] = ()
    rest: bool = False


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
            for hearing in result.hearings:
                self._insert("signals", [(*key, *row) for row in _signal_rows(hearing)])
                self._insert("replies", [(*key, *row) for row in _reply_rows(hearing)])
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


def journal_damage(folder: Path) -> str | None:
    """What is wrong with the journal of a run; None where it is sound, or not there yet."""
    path = folder / JOURNAL
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as journal:
            found = str(journal.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:
        # Locked or unreachable is not damaged; opening it says which.
        return None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return str(error)
    return None if found == "ok" else found.splitlines()[-1]


def _signal_rows(hearing: Hearing) -> list[tuple[Any, ...]]:
    """State and signals of every head before a round; NULL where a withdrawn head has none."""
    signals = hearing.signals
    tables = (
        signals.utilisation,
        signals.contribution,
        signals.alignment,
        signals.redundancy,
        signals.importance,
        signals.withdrawal_cost,
    )
    rows: list[tuple[Any, ...]] = []
    for layer, states in enumerate(hearing.states):
        for head, state in enumerate(states):
            values = [float(table[layer, head]) for table in tables]
            finite = [value if math.isfinite(value) else None for value in values]
            rows.append((hearing.level, layer, head, str(state), *finite))
    return rows


def _reply_rows(hearing: Hearing) -> list[tuple[Any, ...]]:
    """What every head that was asked in a round has answered, in the order in which they were asked."""
    return [
        (
            hearing.level,
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
        for reply in hearing.replies
    ]


def create_run(output_dir: Path, manifest: Mapping[str, Any]) -> Path:
    """A new ``run_<timestamp>`` folder with its manifest; ``latest`` points to it. StoreError if it cannot be made."""
    stamp = time.strftime("run_%Y%m%d_%H%M%S")
    for attempt in range(1000):
        folder = output_dir / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(
                f"the run folder {folder} cannot be made: {error.strerror}. Choose --output_dir."
            ) from error
    else:
        raise StoreError(f"{output_dir} already holds 1000 runs of this second; wait a moment.")
    write_manifest(folder, manifest)
    point_latest(output_dir, folder)
    return folder


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest atomically."""
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True, default=str) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run; StoreError if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{folder} is not a run folder: its {MANIFEST} cannot be read ({error}).") from error
    spec = manifest.get("spec") if isinstance(manifest, dict) else None
    if not (
        isinstance(manifest, dict)
        and isinstance(spec, dict)
        and isinstance(spec.get("model_name"), str)
        and isinstance(spec.get("variants"), list)
        and isinstance(spec.get("seed"), int)
    ):
        raise StoreError(f"{folder / MANIFEST} does not hold the manifest of a run. Run the comparison again.")
    return manifest


def point_latest(output_dir: Path, folder: Path) -> None:
    """Makes ``latest`` lead to the run: a symbolic link, or a text file with its name where links are not possible."""
    pointer, fresh = output_dir / LATEST, output_dir / f".{LATEST}.{os.getpid()}"
    try:
        fresh.unlink(missing_ok=True)
        try:
            fresh.symlink_to(folder.name, target_is_directory=True)
        except OSError:
            fresh.write_text(folder.name + "\n", "utf-8")
        fresh.replace(pointer)
    except OSError as error:
        raise StoreError(f"{pointer} cannot be made to lead to the run: {error.strerror}. Move it away.") from error


def latest_run(output_dir: Path) -> Path | None:
    """The run that ``latest`` leads to, or the newest one where it leads nowhere; ``output_dir`` itself if it is a run.

    Of what ``latest`` holds only the last name counts, so that it leads to no run of another folder. None if there is none.
    """
    if (output_dir / MANIFEST).is_file():
        return output_dir
    pointer = output_dir / LATEST
    try:
        named = str(pointer.readlink()) if pointer.is_symlink() else pointer.read_text("utf-8").strip()
        folder = output_dir / (Path(named).name or LATEST)
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    except (OSError, ValueError):
        pass  # No pointer, or one that nobody can follow: the runs themselves are still there.
    newest = next(stored_runs(output_dir), None)
    return None if newest is None else newest[0].resolve()


def stored_runs(output_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every run folder whose manifest can be read, with the manifest, newest first."""
    for manifest_path in sorted(output_dir.glob(f"run_*/{MANIFEST}"), reverse=True):
        try:
            yield manifest_path.parent, read_manifest(manifest_path.parent)
        except StoreError:
            continue


def unfinished_run(output_dir: Path, spec_hash: str, say: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest run of the same spec that has not finished, if any; one with a damaged journal is named and passed by."""
    for folder, manifest in stored_runs(output_dir):
        if manifest.get("spec_hash") == spec_hash and manifest.get("finished") is None:
            damage = journal_damage(folder)
            if damage is None:
                return folder
            say(f"warning: the journal of {folder} is damaged ({damage}); it is left as it is and not continued")
    return None


def write_atomically(path: Path, text: str) -> None:
    """Writes text so that a reader sees the old file or the new one, never half of it. StoreError where it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8", errors="replace", newline="\n")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path} cannot be written: {error.strerror}. What was measured is kept in {JOURNAL}. Make room, or the folder "
            "writable, and run the command again."
        ) from error


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A table as CSV, atomically."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))


def check_writable(output_dir: Path) -> None:
    """StoreError, before any work is done, if the output folder cannot be made or written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".write_test_{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        problem = StoreError(
            f"--output_dir: {str(output_dir)!r} cannot be written: {error.strerror}. Choose another folder."
        )
        problem.exit_code = 2
        raise problem from error
