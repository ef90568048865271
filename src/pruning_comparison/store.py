"""The run folder: an SQLite journal of everything measured, a manifest, and the tidy export."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_comparison.errors import StoreError
from pruning_comparison.spec import Cell

if TYPE_CHECKING:
    from pruning_comparison.agency import Hearing

JOURNAL = "journal.sqlite"
MANIFEST = "manifest.json"
LATEST = "latest"
_KEY = "variant TEXT, method TEXT, iteration INTEGER, level REAL"
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
    """All that is known of a cell, apart from its timings. ``status`` is "done" or, with a reason, "failed"."""

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


class RunStore:
    """One run folder. Every cell is written in one transaction: it is there whole, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._journal = sqlite3.connect(folder / JOURNAL)
            self._journal.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(f"the journal {folder / JOURNAL} cannot be opened: {error}. Start a new run.") from error

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def finished_cells(self) -> set[Cell]:
        """Cells whose measurements are stored."""
        rows = self._journal.execute("SELECT variant, method, iteration, level FROM cells WHERE status = 'done'")
        return {Cell(*row) for row in rows}

    def finished_timings(self) -> set[tuple[str, int, float]]:
        """(method, iteration, level) whose timings are stored."""
        return {(m, i, level) for m, i, level in self._journal.execute("SELECT * FROM timings")}

    def write_cell(self, result: CellResult, code_commit: str | None) -> None:
        """Stores a cell, in place of an earlier failed attempt."""
        key = tuple(result.cell)
        where = "WHERE variant = ? AND method = ? AND iteration = ? AND level = ?"
        with self._transaction():
            for table in ("cells", "heads", "signals", "replies", "texts"):
                self._journal.execute(f"DELETE FROM {table} {where}", key)
            self._journal.execute(f"DELETE FROM measurements {where} AND phase = 'quality'", key)
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

    def write_timings(self, method: str, iteration: int, level: float, rows: Iterable[tuple[str, Measurement]]) -> None:
        """Stores the timings of all variants at one level: (variant, measurement) pairs."""
        with self._transaction():
            self._journal.execute(
                "DELETE FROM measurements WHERE method = ? AND iteration = ? AND level = ? AND phase = 'timing'",
                (method, iteration, level),
            )
            self._insert(
                "measurements",
                [self._row(Cell(variant, method, iteration, level), "timing", row) for variant, row in rows],
            )
            self._insert("timings", [(method, iteration, level)])

    def table(self, name: str) -> pd.DataFrame:
        """A journal table (cells, measurements, heads, signals, replies, texts) in a stable order."""
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
        with closing(self._journal.execute(f"SELECT * FROM {name} ORDER BY {order[name]}")) as cursor:
            columns = [column[0] for column in cursor.description]
            return pd.DataFrame.from_records(cursor.fetchall(), columns=columns)

    def _transaction(self) -> sqlite3.Connection:
        return self._journal

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._journal.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    @staticmethod
    def _row(cell: Cell, phase: str, m: Measurement) -> tuple[Any, ...]:
        place = (m.temperature, m.prompt, m.document, m.window, m.repeat)
        return (*cell, phase, *place, m.metric, m.value, m.unit, m.reason)


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
        for reply in hearing.negotiation.replies
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
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is not a run folder: its {MANIFEST} cannot be read ({error}).") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{folder / MANIFEST} does not hold a manifest.")
    return manifest


def point_latest(output_dir: Path, folder: Path) -> None:
    """Makes ``latest`` lead to the run: a symbolic link, or a text file with its name where links are not possible."""
    pointer, fresh = output_dir / LATEST, output_dir / f".{LATEST}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        fresh.write_text(folder.name + "\n", "utf-8")
    fresh.replace(pointer)


def latest_run(output_dir: Path) -> Path | None:
    """The run that ``latest`` leads to; ``output_dir`` itself if it is a run folder; None if there is none."""
    if (output_dir / MANIFEST).is_file():
        return output_dir
    pointer = output_dir / LATEST
    folder = output_dir / pointer.read_text("utf-8").strip() if pointer.is_file() else pointer
    return folder.resolve() if (folder / MANIFEST).is_file() else None


def unfinished_run(output_dir: Path, spec_hash: str) -> Path | None:
    """The newest run of the same spec that has not finished, if any."""
    for manifest_path in sorted(output_dir.glob(f"run_*/{MANIFEST}"), reverse=True):
        try:
            manifest = read_manifest(manifest_path.parent)
        except StoreError:
            continue
        if manifest.get("spec_hash") == spec_hash and manifest.get("finished") is None:
            return manifest_path.parent
    return None


def write_atomically(path: Path, text: str) -> None:
    """Writes text so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8", errors="replace", newline="\n")
    temporary.replace(path)


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
