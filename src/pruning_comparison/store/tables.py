"""A stored run as one record: its manifest and the tables of its journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from pruning_comparison.errors import StoreError
from pruning_comparison.spec import LOOKS
from pruning_comparison.store.journal import RunStore, columns_of
from pruning_comparison.store.records import TABLES, Manifest
from pruning_comparison.store.run_folder import read_manifest


def _empty(table: str) -> pd.DataFrame:
    return pd.DataFrame(columns=columns_of(table))


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its folder holds it: what it is, and what has been measured so far.

    Each table has a row for every record of its name in ``store.records``, with a column for every field.
    """

    folder: Path
    manifest: Manifest
    cells: pd.DataFrame = field(default_factory=lambda: _empty("cells"))
    measurements: pd.DataFrame = field(default_factory=lambda: _empty("measurements"))
    heads: pd.DataFrame = field(default_factory=lambda: _empty("heads"))
    signals: pd.DataFrame = field(default_factory=lambda: _empty("signals"))
    replies: pd.DataFrame = field(default_factory=lambda: _empty("replies"))
    texts: pd.DataFrame = field(default_factory=lambda: _empty("texts"))
    timings: pd.DataFrame = field(default_factory=lambda: _empty("timings"))
    layer_times: pd.DataFrame = field(default_factory=lambda: _empty("layer_times"))
    engine_timings: pd.DataFrame = field(default_factory=lambda: _empty("engine_timings"))

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return str(self.manifest.spec["model_name"])

    @property
    def variants(self) -> list[str]:
        """The variants that were asked for, which may be of an earlier release."""
        return [str(name) for name in self.manifest.spec["variants"]]

    @property
    def looks(self) -> int:
        """How many looks share the error rate of the run's claims: those of ``--until_decided``, taken or not; else one."""
        return len(LOOKS) if self.manifest.spec.get("until_decided") else 1

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return int(self.manifest.spec["seed"])


def load_run(folder: Path) -> Run:
    """Reads a run, finished or not, of this version or an earlier one. Nothing is written.

    StoreError where nothing has been measured yet, where manifest or journal cannot be read, or where a newer version has
    written them.
    """
    manifest = read_manifest(folder)
    with RunStore(folder) as store:
        tables = {name: store.table(name) for name in TABLES}
    if not (tables["cells"]["status"] == "done").any():
        raise StoreError(
            f"{folder} holds no finished cell yet, so there is nothing to report. Run the comparison first."
        )
    return Run(folder, manifest, **tables)
