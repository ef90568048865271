"""What a run leaves on the disk: records, the journal, the run folder, and reading them back."""

from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import (
    CellResult,
    GeneratedText,
    LookRecord,
    Manifest,
    Measurement,
    ModelFacts,
    Reused,
)
from pruning_comparison.store.run_folder import (
    JOURNAL,
    MANIFEST,
    check_writable,
    create_run,
    journal_damage,
    latest_run,
    point_latest,
    read_manifest,
    stored_runs,
    unfinished_run,
    write_atomically,
    write_manifest,
    write_table,
)
from pruning_comparison.store.tables import Run, load_run

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "CellResult",
    "GeneratedText",
    "LookRecord",
    "Manifest",
    "Measurement",
    "ModelFacts",
    "Reused",
    "Run",
    "RunStore",
    "check_writable",
    "create_run",
    "journal_damage",
    "latest_run",
    "load_run",
    "point_latest",
    "read_manifest",
    "stored_runs",
    "unfinished_run",
    "write_atomically",
    "write_manifest",
    "write_table",
]
