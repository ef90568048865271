"""The run folder: its manifest, where runs lie, and files written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_comparison.errors import StoreError

if TYPE_CHECKING:
    pass


LOGGER = logging.getLogger(__name__)

JOURNAL = "journal.sqlite"


MANIFEST = "manifest.json"


LATEST = "latest"


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


def unfinished_run(output_dir: Path, spec_hash: str) -> Path | None:
    """The newest run of the same spec that has not finished, if any; one with a damaged journal is logged and passed by."""
    for folder, manifest in stored_runs(output_dir):
        if manifest.get("spec_hash") == spec_hash and manifest.get("finished") is None:
            damage = journal_damage(folder)
            if damage is None:
                return folder
            LOGGER.warning("the journal of %s is damaged (%s); it is left as it is and not continued", folder, damage)
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
