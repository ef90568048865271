"""What is stored is what its records say: columns, versions of schemas, and what is neither known nor lost."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import fields, replace

import pytest

from pruning_comparison import __version__
from pruning_comparison.errors import StoreError
from pruning_comparison.methods import METHODS
from pruning_comparison.spec import Cell, ComparisonSpec, Revisions, revisions_of
from pruning_comparison.store import (
    CellResult,
    GeneratedText,
    Manifest,
    Measurement,
    ModelFacts,
    Reused,
    RunStore,
    load_run,
    read_manifest,
    stored_runs,
    write_manifest,
)
from pruning_comparison.store.journal import JOURNAL_SCHEMA, columns_of
from pruning_comparison.store.records import MANIFEST_SCHEMA, TABLES
from pruning_comparison.variants import VARIANTS

SPEC = {"model_name": "tiny", "variants": ["baseline"], "seed": 3}
FACTS = ModelFacts("tiny", "gpt2", layers=2, heads_per_layer=4, head_size=8, context_tokens=64, vocabulary=97)
CELL = Cell("baseline", "random", 1, 50.0)


def whole_manifest():
    """A manifest in which nothing is left at its default."""
    return Manifest(
        spec=SPEC,
        spec_hash="0123",
        revisions=Revisions(2, {"random": 3}, {"baseline": 4}, {"perplexity": 5}),
        inputs={"model": "ab"},
        model=replace(FACTS, hub_commit="cd"),
        versions={"pruning-comparison": "9.8"},
        hardware={"threads": 1},
        commit="ef",
        started="now",
        finished="then",
        warnings=("careful",),
        margins={"speed": 0.1},
        reused=(Reused("run_1", "gh", {"cells": 2}),),
    )


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, whole_manifest())
    assert read_manifest(tmp_path) == whole_manifest()


def test_the_keys_on_the_disk(tmp_path):
    """They are what 0.1.0 wrote, with two more: users and notebooks read them."""
    write_manifest(tmp_path, whole_manifest())
    raw = json.loads((tmp_path / "manifest.json").read_text())
    assert set(raw) == {
        "spec", "spec_hash", "inputs", "model", "versions", "hardware", "commit", "started", "finished", "warnings",
        "margins", "reused", "schema_version", "revisions",
    }  # fmt: skip
    assert raw["schema_version"] == MANIFEST_SCHEMA
    assert raw["reused"] == [{"run": "run_1", "commit": "gh", "cells": 2}]
    assert raw["model"]["heads_per_layer"] == 4
    assert raw["revisions"]["methods"] == {"random": 3}


def test_what_is_not_known_is_kept(tmp_path):
    raw = {**whole_manifest().as_dict(), "note": {"mine": 1}}
    raw["model"] = {**raw["model"], "colour": "green"}
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    write_manifest(tmp_path, replace(read_manifest(tmp_path), finished=None))
    assert json.loads((tmp_path / "manifest.json").read_text()) == {**raw, "finished": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec": None}, "spec is 'None'"),
        ({"spec": {**SPEC, "variants": "baseline"}}, "spec.variants is 'baseline'"),
        ({"spec": {"model_name": "tiny", "variants": []}}, "spec.seed is 'None'"),
        ({"inputs": {"model": 3}}, "inputs.model is '3'"),
        ({"model": {"name": "tiny"}}, "model.model_type is 'None'"),
        ({"model": {**FACTS.as_dict(), "layers": "two"}}, "model.layers is 'two'"),
        ({"finished": True}, "finished is 'True'"),
        ({"warnings": [1]}, "warnings is '1'"),
        ({"reused": [{"run": "r", "cells": None}]}, "reused.cells is 'None'"),
        ({"revisions": {"protocol": 1}}, "revisions are"),
        ({"schema_version": "1"}, "schema_version is '1'"),
    ],
    ids=str,
)
def test_what_a_manifest_cannot_be_is_named(tmp_path, change, said):
    (tmp_path / "manifest.json").write_text(json.dumps({**whole_manifest().as_dict(), **change}))
    with pytest.raises(StoreError, match=f"does not hold the manifest of a run: {re.escape(said)}"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_newer_version_is_refused_with_the_version_it_takes(tmp_path):
    run = tmp_path / "run_1"
    run.mkdir()
    raw = {**whole_manifest().as_dict(), "schema_version": MANIFEST_SCHEMA + 1}
    (run / "manifest.json").write_text(json.dumps(raw))
    said = f"schema version {MANIFEST_SCHEMA + 1}, which pruning-comparison {__version__} does not know"
    with pytest.raises(StoreError, match=rf"{re.escape(said)}\. Install pruning-comparison 9\.8"):
        load_run(run)
    assert list(stored_runs(tmp_path)) == []


def write_one_of_each(folder):
    with RunStore(folder, lock=True) as store:
        measurement = Measurement("perplexity", 2.5, "1", temperature=0.7, prompt=4, window=5, repeat=6, document="d")
        store.write_cell(
            CellResult(
                CELL,
                "done",
                achieved_level=50.0,
                heads_pruned=4,
                heads_total=8,
                fingerprint="f",
                details={"b": 1},
                measurements=[measurement],
                heads=[(0, 1, 0.25, True), (0, 2, 0.5, False)],
                texts=[GeneratedText(0.7, 4, "Once", "upon")],
            ),
            "commit",
        )
        store.write_timings("random", 1, 50.0, [("baseline", Measurement("end_to_end_s", 3.0, "s"))])


def test_every_value_stands_in_the_column_of_its_name(tmp_path):
    write_one_of_each(tmp_path)
    write_manifest(tmp_path, Manifest(SPEC))
    run = load_run(tmp_path)
    key = {"variant": "baseline", "method": "random", "iteration": 1, "level": 50.0}
    (cell,) = run.cells.to_dict("records")
    assert cell == {
        **key, "status": "done", "reason": None, "achieved_level": 50.0, "heads_pruned": 4, "heads_total": 8,
        "fingerprint": "f", "details": '{"b": 1}', "code_commit": "commit",
    }  # fmt: skip
    quality, timing = run.measurements.to_dict("records")
    assert quality == {
        **key, "phase": "quality", "temperature": 0.7, "prompt": 4, "document": "d", "window": 5, "repeat": 6,
        "metric": "perplexity", "value": 2.5, "unit": "1", "reason": None,
    }  # fmt: skip
    assert (timing["phase"], timing["metric"], timing["value"], timing["unit"]) == ("timing", "end_to_end_s", 3.0, "s")
    assert run.heads.to_dict("records") == [
        {**key, "layer": 0, "head": 1, "score": 0.25, "kept": 1},
        {**key, "layer": 0, "head": 2, "score": 0.5, "kept": 0},
    ]
    assert run.texts.to_dict("records") == [
        {**key, "temperature": 0.7, "prompt": 4, "prompt_text": "Once", "text": "upon"}
    ]


def reordered(journal):
    """Makes every table anew, empty, with its columns in alphabetical order."""
    for table in TABLES:
        names = ", ".join(f"[{name}]" for name in sorted(columns_of(table)))
        journal.execute(f"CREATE TABLE other AS SELECT {names} FROM {table}")
        journal.execute(f"DROP TABLE {table}")
        journal.execute(f"ALTER TABLE other RENAME TO {table}")
        journal.execute(f"DELETE FROM {table}")
    journal.commit()


def test_the_order_of_a_tables_columns_does_not_matter(tmp_path):
    """Neither for what is read nor for what is written: every insert names its columns."""
    tables = []
    for name in ("as they are", "reordered"):
        folder = tmp_path / name
        folder.mkdir()
        write_one_of_each(folder)
        if name == "reordered":
            with closing(sqlite3.connect(folder / "journal.sqlite")) as journal:
                reordered(journal)
            write_one_of_each(folder)
        with RunStore(folder) as store:
            tables.append({table: store.table(table).to_csv() for table in TABLES if table != "timings"})
            assert store.finished_timings() == {("random", 1, 50.0)}
    assert tables[0] == tables[1]


def test_the_journals_columns_are_the_records_fields(tmp_path):
    write_one_of_each(tmp_path)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as journal:
        for table, record in TABLES.items():
            columns = [row[1] for row in journal.execute(f"PRAGMA table_info({table})")]
            assert columns == [one.name for one in fields(record)]
        assert journal.execute("PRAGMA user_version").fetchone() == (JOURNAL_SCHEMA,)
    with pytest.raises(ValueError, match="Did you mean cells"):
        columns_of("cell")


@pytest.mark.parametrize("lock", [False, True])
def test_a_journal_of_a_newer_version_is_refused_with_the_version_it_takes(tmp_path, lock):
    write_one_of_each(tmp_path)
    write_manifest(tmp_path, whole_manifest())
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as journal:
        journal.execute(f"PRAGMA user_version = {JOURNAL_SCHEMA + 1}")
    with pytest.raises(StoreError, match=r"journal .* Install pruning-comparison 9\.8"):
        RunStore(tmp_path, lock=lock)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="Install a newer pruning-comparison"):
        RunStore(tmp_path, lock=lock)


def test_reading_makes_no_journal_and_writes_to_none(tmp_path):
    with RunStore(tmp_path) as store:
        assert store.finished_cells() == set()
        assert list(store.table("heads").columns) == columns_of("heads")
    assert list(tmp_path.iterdir()) == []
    write_one_of_each(tmp_path)
    before = (tmp_path / "journal.sqlite").read_bytes()
    with RunStore(tmp_path) as store, pytest.raises(StoreError, match="cannot be written"):
        store.write_cell(CellResult(CELL, "failed", "late"), None)
    assert (tmp_path / "journal.sqlite").read_bytes() == before


def test_a_run_without_a_finished_cell_is_none_to_load(tmp_path):
    write_manifest(tmp_path, Manifest(SPEC))
    with pytest.raises(StoreError, match="no finished cell yet"):
        load_run(tmp_path)
    with RunStore(tmp_path, lock=True) as store:
        store.write_cell(CellResult(CELL, "failed", "no room"), None)
    with pytest.raises(StoreError, match="no finished cell yet"):
        load_run(tmp_path)


def test_the_revisions_of_a_spec_are_those_of_what_it_uses():
    """Where heads are asked, ``obs`` prices them and Fisher scores tell their importance, whatever the method."""
    plain = revisions_of(ComparisonSpec(pruning_methods=("random",), variants=("baseline",)))
    assert (plain.methods, plain.variants) == ({"random": 1}, {"baseline": 1})
    asked = revisions_of(ComparisonSpec(pruning_methods=("random",), variants=("baseline", "agency")))
    assert (asked.methods, asked.variants) == (
        {name: METHODS[name].revision for name in ("random", "obs", "fisher")},
        {"baseline": 1, "agency": VARIANTS["agency"].revision},
    )
    assert Revisions.from_dict(asked.as_dict()) == asked
