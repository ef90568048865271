"""Draws the charts of a run into files, each of them only where what it shows has changed since the last time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pruning_comparison.report.charts import stems_of, to_png, to_svg
from pruning_comparison.store import write_atomically

__all__ = ["DRAWN", "draw_charts"]

DRAWN = "drawn.json"
"""Beside the charts: what each of them was drawn from, as a digest."""

LOGGER = logging.getLogger(__name__)


def draw_charts(
    jobs: Mapping[str, Callable[[], Figure]],
    folder: Path,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, str]:
    """Each chart as ``<name>.png`` and ``<name>.svg``; returns the SVGs as text, by name.

    ``jobs`` are partial calls of drawing functions. A chart whose function, arguments and files are those of the last time
    is left as it is. Charts of the last time that are no longer drawn are removed. ``on_progress`` is told how many of
    how many are done and which comes next; without it, that is logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stems = stems_of(list(jobs))
    before = _drawn_before(folder)
    for stem in set(before) - set(stems.values()):
        for ending in ("png", "svg"):
            (folder / f"{stem}.{ending}").unlink(missing_ok=True)
    now: dict[str, str] = {}
    drawings: dict[str, str] = {}
    keys = {name: digest_of(job) for name, job in jobs.items()}
    for done, (name, job) in enumerate(jobs.items()):
        stem = stems[name]
        picture, drawing = folder / f"{stem}.png", folder / f"{stem}.svg"
        text = _same_as_before(before.get(stem), keys[name], picture, drawing)
        if text is None:
            (on_progress or _log)(done, len(jobs), f"drawing {name}")
            figure = job()
            text = to_svg(figure).decode("utf-8")
            write_atomically(drawing, text)
            picture.write_bytes(to_png(figure))
        drawings[name] = text
        now[stem] = f"{keys[name]} {_digest_of_files(picture, text)}"
        write_atomically(folder / DRAWN, json.dumps({**before, **now}, indent=1, sort_keys=True) + "\n")
    write_atomically(folder / DRAWN, json.dumps(now, indent=1, sort_keys=True) + "\n")
    return drawings


def _log(done: int, total: int, what: str) -> None:
    LOGGER.info("%s (chart %d of %d)", what, done + 1, total)


def _drawn_before(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / DRAWN).read_text("utf-8"))
    except (OSError, ValueError):  # Nothing has been drawn yet, or by a version that kept no record.
        return {}
    return {str(stem): str(key) for stem, key in found.items()} if isinstance(found, dict) else {}


def _same_as_before(known: str | None, key: str, picture: Path, drawing: Path) -> str | None:
    """The SVG's text where it and the PNG are what the same job has drawn; else None."""
    try:
        text = drawing.read_text("utf-8")
        return text if known == f"{key} {_digest_of_files(picture, text)}" else None
    except (OSError, ValueError):
        return None


def _digest_of_files(picture: Path, text: str) -> str:
    return hashlib.sha256(picture.read_bytes() + text.encode()).hexdigest()[:24]


def digest_of(job: Callable[[], Figure]) -> str:
    """What a chart is drawn from: the function, its arguments, this package's drawing code and matplotlib's version."""
    if not isinstance(job, partial):
        raise TypeError(f"a chart's job is a functools.partial, not {job!r}: its arguments say whether it has changed")
    digest = hashlib.sha256(_code().encode())
    for part in (job.func.__qualname__, list(job.args), dict(job.keywords)):
        _add(digest, part)
    return digest.hexdigest()[:24]


@cache
def _code() -> str:
    root = files("pruning_comparison")
    charts = sorted(root.joinpath("report", "charts").iterdir(), key=lambda one: one.name)
    sources = [*charts, *(root.joinpath(name) for name in ("formatting.py", "metrics.py", "variants.py"))]
    digest = hashlib.sha256(matplotlib.__version__.encode())
    for source in sources:
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Adds a value to a digest, so that different values give different digests."""
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, pd.DataFrame):
        digest.update("|".join(map(str, value.columns)).encode())
        for column in value:
            # Mixed columns are hashed as text; numbers as they are.
            series = value[column]
            plain = series if pd.api.types.is_numeric_dtype(series.dtype) else series.astype(str)
            digest.update(pd.util.hash_pandas_object(plain, index=False).to_numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(
            str(value.shape).encode() + (repr(value.tolist()).encode() if value.dtype == object else value.tobytes())
        )
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            _add(digest, one.name)
            _add(digest, getattr(value, one.name))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _add(digest, key)
            _add(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}:".encode())
        for part in value:
            _add(digest, part)
    elif value is None or isinstance(value, (str, bool, int, float)):
        digest.update(f"{value!r};".encode())
    else:
        raise TypeError(f"a chart is drawn from a {type(value).__name__}, of which no digest can be made")
