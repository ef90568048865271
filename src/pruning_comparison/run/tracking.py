"""Runs in trackers: settings, every estimate as it becomes known, charts and report, in MLflow, W&B or TensorBoard.

A tracker shows what is measured and changes nothing of it. One that fails is warned of once and left out from then on. All
of it happens between two measurements, in the process that keeps the run, so that nothing is timed beside it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from pruning_comparison.analysis import observations, summarize
from pruning_comparison.errors import InputError
from pruning_comparison.formatting import format_value, reason_of, unknown_name
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import read_manifest, write_atomically

LOGGER = logging.getLogger(__name__)

TRACKED_RUNS = "tracking.json"
"""In a run's folder: what each tracker calls the run, so that a run that is continued is continued there, too."""

PROJECT = "pruning-comparison"
"""MLflow's experiment and W&B's project, unless their environment variables name others."""

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_./: -]")
_MOST_SETTING_CHARACTERS = 500
_MOST_AT_ONCE = 1000
_ARTEFACTS = ("report.html", "results.json", "summary.csv", "run.yaml")


class Tracker(Protocol):
    """One run in one tracker. Any method may raise: ``Tracking`` sees to what follows from that."""

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        """Starts the run, or goes on with the one that is ``known`` by this name; what the tracker calls it."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures by name, known after ``step`` iterations."""

    def keep(self, files: Sequence[Path], charts: Sequence[Path]) -> None:
        """Report, tables and pictures of the charts."""

    def end(self, *, failed: bool) -> None:
        """Everything is sent or written."""


class MlflowTracker:
    """A run of MLflow, in the store and experiment that its environment variables name.

    The client of one run: what the process else has to do with MLflow is left alone.
    """

    def __init__(self) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self._run = ""

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        from mlflow.entities import Param

        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        parameters = [Param(name, format_value(value)[:_MOST_SETTING_CHARACTERS]) for name, value in settings.items()]
        self._client.log_batch(self._run, params=parameters)
        return self._run

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        rows = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(rows), _MOST_AT_ONCE):
            self._client.log_batch(self._run, metrics=rows[start : start + _MOST_AT_ONCE])

    def keep(self, files: Sequence[Path], charts: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run, str(file))
        for chart in charts:
            self._client.log_artifact(self._run, str(chart), "charts")

    def end(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandbTracker:
    """A run of Weights & Biases. It reads neither the console, nor the code, nor the machine."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = None

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        quiet = self._wandb.Settings(
            silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True, disable_git=True,
            disable_code=True, login_timeout=30,
        )  # fmt: skip
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=known,
            resume="allow",
            reinit="create_new",
            dir=os.environ.get("WANDB_DIR", str(folder)),
            config=dict(settings),
            settings=quiet,
        )
        # What is known after more iterations may come before what is known after fewer, and steps only go up.
        self._run.define_metric("iterations")
        self._run.define_metric("*", step_metric="iterations")
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "iterations": step})

    def keep(self, files: Sequence[Path], charts: Sequence[Path]) -> None:
        self._run.log({f"charts/{chart.stem}": self._wandb.Image(str(chart)) for chart in charts})
        artefact = self._wandb.Artifact(f"report-{self._run.id}", type="report")
        for file in files:
            artefact.add_file(str(file))
        for chart in charts:
            artefact.add_file(str(chart), f"charts/{chart.name}")
        self._run.log_artifact(artefact)

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class TensorboardTracker:
    """TensorBoard's event files, in ``tensorboard`` of the run's folder, with report and tables beside them.

    Every estimate is also drawn between the ends of its interval, on the page of custom scalars.
    """

    def __init__(self) -> None:
        # torch's writer needs the package tensorboard, and nothing of TensorFlow.
        from torch.utils.tensorboard import SummaryWriter

        self._make: Callable[[str], Any] = SummaryWriter
        self._writer: Any = None
        self._folder = Path()
        self._names: dict[str, None] = {}

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        self._folder = folder / "tensorboard"
        self._writer = self._make(str(self._folder))
        if known is None:
            rows = [f"| {name} | {format_value(value)} |" for name, value in settings.items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))
        self._writer.flush()
        return self._folder.name

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._names[name] = None
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def keep(self, files: Sequence[Path], charts: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for chart in charts:
            with Image.open(chart) as picture:
                self._writer.add_image(f"charts/{chart.stem}", np.asarray(picture.convert("RGB")), dataformats="HWC")
        for file in files:
            shutil.copyfile(file, self._folder / file.name)

    def end(self, *, failed: bool) -> None:
        with_interval = [name for name in self._names if _with(name, "ci_low") in self._names]
        layout: dict[str, dict[str, list[Any]]] = {}
        for name in with_interval:
            place = name.removesuffix("/estimate")
            metric, _, rest = place.partition("/")
            layout.setdefault(metric, {})[rest] = ["Margin", [name, _with(name, "ci_low"), _with(name, "ci_high")]]
        if layout:
            self._writer.add_custom_scalars(layout)
        self._writer.close()


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that there is: what makes one, the module that it needs, and the extra that installs it."""

    name: str
    make: Callable[[], Tracker]
    module: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'pruning-comparison[{self.name}]'"


TRACKERS: Mapping[str, TrackerKind] = {
    one.name: one
    for one in (
        TrackerKind("mlflow", MlflowTracker, "mlflow"),
        TrackerKind("wandb", WandbTracker, "wandb"),
        TrackerKind("tensorboard", TensorboardTracker, "tensorboard"),
    )
}
"""By the names that ``--track`` takes."""


@dataclass
class Tracking:
    """The trackers of one run. Without any, every method does nothing."""

    trackers: dict[str, Tracker] = field(default_factory=dict)
    _folder: Path | None = None
    _logged: dict[tuple[str, float], int] = field(default_factory=dict)

    def begin(self, store: RunStore, spec: ComparisonSpec) -> None:
        """Starts the run in every tracker, or goes on with it, and sends what is known of it already."""
        if not self.trackers:
            return
        self._folder = folder = store.folder
        known = _tracked_runs(folder)
        settings = {**spec.as_options(), **_facts(folder)}
        names: dict[str, str] = {}

        def begin(name: str, tracker: Tracker) -> None:
            names[name] = tracker.begin(folder, settings, known.get(name))

        self._each(begin)
        write_atomically(folder / TRACKED_RUNS, json.dumps({**known, **names}, indent=1) + "\n")
        self.measured(store, spec)

    def measured(self, store: RunStore, spec: ComparisonSpec) -> None:
        """Sends the estimates of every level that is complete in more iterations than before."""
        if not self.trackers:
            return
        complete = _complete_iterations(store, spec)
        news = {place: count for place, count in complete.items() if count > self._logged.get(place, 0)}
        if news:
            self._send(store, spec, news)

    def finish(self, *, failed: bool) -> None:
        """Sends report, charts and tables, where they have been drawn, and ends; nothing where the run never began."""
        folder = self._folder
        if not self.trackers or folder is None:
            return
        files = [folder / name for name in _ARTEFACTS if (folder / name).is_file()]
        charts = sorted((folder / "charts").glob("*.png"))
        if (folder / "report.html").is_file():
            self._each(lambda name, tracker: tracker.keep(files, charts))
        self._each(lambda name, tracker: tracker.end(failed=failed))
        self.trackers.clear()

    def _send(self, store: RunStore, spec: ComparisonSpec, places: Mapping[tuple[str, float], int]) -> None:
        cells, measurements = store.table("cells"), store.table("measurements")
        for (method, level), count in places.items():
            values = estimates_at(spec.model_name, cells, measurements, method, level)
            self._each(lambda name, tracker, values=values, count=count: tracker.log(values, count))  # type: ignore[misc]
            self._logged[method, level] = count

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        """Does something with every tracker; one that fails is warned of and takes part no more."""
        for name, tracker in list(self.trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:  # whatever a tracker does, the run goes on
                del self.trackers[name]
                _warn_of(name, error)


def start_tracking(names: Sequence[str]) -> Tracking:
    """The trackers of these names. InputError for a name that is none, or where its package is not installed.

    One whose package is there and cannot be loaded is warned of and left out.
    """
    tracking = Tracking()
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise InputError(unknown_name("", name, TRACKERS), option="--track")
        kind = TRACKERS[name]
        if importlib.util.find_spec(kind.module) is None:
            raise InputError(
                f"{name} needs the package {kind.module}, which is not installed: {kind.install}.", option="--track"
            )
        try:
            tracking.trackers[name] = kind.make()
        except Exception as error:  # a tracker never keeps a run from being made
            _warn_of(name, error)
    return tracking


def track_again(tracking: Tracking, folder: Path, spec: ComparisonSpec) -> None:
    """Sends a run that is finished already, whole."""
    if tracking.trackers:
        with RunStore(folder) as store:
            tracking.begin(store, spec)
        tracking.finish(failed=False)


def estimates_at(
    model: str, cells: pd.DataFrame, measurements: pd.DataFrame, method: str, level: float
) -> dict[str, float]:
    """Every estimate of one method and level, with the ends of its interval and n, as ``summarize`` makes them.

    By ``metric/method/variant/level_40/estimate``, ``.../ci_low``, ``.../ci_high`` and ``.../n``; those of generated texts
    have ``temperature_0.7`` behind the level. What has no finite value, such as the interval of an exact size, is left out.
    """
    levels = {0.0, level}  # ratios and distances are taken to level 0
    kept = [table[(table["method"] == method) & table["level"].isin(levels)] for table in (cells, measurements)]
    summary = summarize(model, observations(*kept))
    values: dict[str, float] = {}
    for row in summary[summary["level"] == level].to_dict("records"):
        place = f"{row['metric']}/{row['method']}/{row['variant']}/level_{level:g}"
        if not math.isnan(row["temperature"]):
            place += f"/temperature_{row['temperature']:g}"
        for column in ("estimate", "ci_low", "ci_high", "n"):
            if math.isfinite(row[column]):
                values[_NOT_IN_A_NAME.sub("-", f"{place}/{column}")] = float(row[column])
    return values


def _complete_iterations(store: RunStore, spec: ComparisonSpec) -> dict[tuple[str, float], int]:
    """For every method and level, in how many iterations all variants are measured and timed."""
    cells, timings = store.finished_cells(), store.finished_timings()
    found: dict[tuple[str, float], int] = {}
    for method, iteration, level in timings:
        if all((variant, method, iteration, level) in cells for variant in spec.variants):
            found[method, level] = found.get((method, level), 0) + 1
    return dict(sorted(found.items()))


def _facts(folder: Path) -> dict[str, Any]:
    """What a run is beside its settings: versions, machine and commit."""
    manifest = read_manifest(folder)
    facts = {f"version {name}": value for name, value in manifest.versions.items()}
    facts |= {f"machine {name}": value for name, value in manifest.hardware.items()}
    return {**facts, "spec_hash": manifest.spec_hash, "commit": manifest.commit or "unknown"}


def _tracked_runs(folder: Path) -> dict[str, str]:
    """What trackers call a run that was begun before; empty where that cannot be read."""
    try:
        stored = json.loads((folder / TRACKED_RUNS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in stored.items()} if isinstance(stored, dict) else {}


def _warn_of(name: str, error: Exception) -> None:
    LOGGER.warning("%s failed and is left out from here on: %s. The run goes on", name, reason_of(error))


def _with(name: str, column: str) -> str:
    return f"{name.removesuffix('/estimate')}/{column}" if name.endswith("/estimate") else ""
