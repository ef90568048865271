"""A run of 0.1.0, with a variant that is gone since, is reported; it is not continued, taken over from or changed."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from builders import stand_in, stopped, tiny_spec

from pruning_comparison import cli
from pruning_comparison.errors import InputError, Interrupted, StoreError
from pruning_comparison.run import attempts
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import RunStore, load_run, read_manifest, unfinished_run, write_manifest

(RECORDED,) = (Path(__file__).parent.parent / "recorded" / "run_of_0.1.0").glob("run_*")
RETIRED = "agency-heeds-states"


@pytest.fixture
def old_run(tmp_path):
    return shutil.copytree(RECORDED, tmp_path / "old" / RECORDED.name)


def files_of(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def pooled_perplexities(journal):
    """exp(nats / tokens) over all windows and iterations, by (variant, method, level)."""
    with closing(sqlite3.connect(journal)) as connection:
        sums = connection.execute(
            "SELECT variant, method, level, sum(CASE metric WHEN 'window_nats' THEN value END), "
            "sum(CASE metric WHEN 'window_tokens' THEN value END) FROM measurements GROUP BY variant, method, level"
        ).fetchall()
    return {(variant, method, level): math.exp(nats / tokens) for variant, method, level, nats, tokens in sums}


def test_it_is_reported_with_its_retired_variant(old_run, capsys):
    before = files_of(old_run)
    assert cli.main(["report", "--quiet", str(old_run)]) == 0
    assert f"report: {old_run / 'report.html'}" in capsys.readouterr().out
    assert RETIRED in (old_run / "report.html").read_text("utf-8")
    table = pd.read_csv(old_run / "summary.csv")
    shown = table[table["metric"] == "perplexity"].set_index(["variant", "method", "level"])["estimate"]
    expected = pooled_perplexities(old_run / "journal.sqlite")
    # 3 variants x 2 methods x 2 levels.
    assert len(shown) == len(expected) == 12
    for key, perplexity in expected.items():
        assert shown[key] == pytest.approx(perplexity, rel=1e-9), key
    after = files_of(old_run)
    assert {name: after[name] for name in before} == before


def test_reading_it_writes_nothing(old_run):
    before = files_of(old_run)
    run = load_run(old_run)
    assert files_of(old_run) == before
    assert run.manifest.schema_version == 0
    assert run.manifest.revisions is None
    assert run.manifest.made_by == "version 0.1.0"
    assert run.variants == ["baseline", "agency", RETIRED]
    # 6 layers of 8 heads in each of 3 variants x 2 methods x 2 iterations x 2 levels.
    assert len(run.heads) == 48 * 24
    assert (len(run.cells), len(run.texts)) == (24, 24 * 2)


def test_what_is_written_back_keeps_to_what_its_version_wrote(old_run):
    raw = json.loads((old_run / "manifest.json").read_text())
    write_manifest(old_run, read_manifest(old_run))
    assert json.loads((old_run / "manifest.json").read_text()) == raw


def test_its_journal_cannot_be_written_to(old_run):
    before = (old_run / "journal.sqlite").read_bytes()
    with pytest.raises(StoreError, match="made by an earlier version"):
        RunStore(old_run, lock=True)
    assert (old_run / "journal.sqlite").read_bytes() == before


def test_the_command_that_would_continue_it_is_refused_in_words(old_run, capsys):
    manifest = read_manifest(old_run)
    write_manifest(old_run, replace(manifest, finished=None))
    before = files_of(old_run)
    variants = ",".join(manifest.spec["variants"])
    argv = ["run", "--model_name=bundled", f"--variants={variants}", f"--output_dir={old_run.parent}", "--quiet"]
    assert cli.main(argv) == 2
    assert f"{RETIRED!r} is no longer measured" in capsys.readouterr().err
    with pytest.raises(InputError, match="its old runs can still be reported"):
        ComparisonSpec(variants=tuple(manifest.spec["variants"]))
    assert files_of(old_run) == before
    assert [path.name for path in old_run.parent.iterdir()] == [old_run.name]


# Runs of today's settings, as 0.1.0 would have left them


def age(run):
    """Takes from a run what 0.1.0 did not write: the numbers of the schemas, and revisions."""
    raw = json.loads((run / "manifest.json").read_text())
    raw = {name: value for name, value in raw.items() if name not in ("schema_version", "revisions")}
    (run / "manifest.json").write_text(json.dumps(raw))
    if (run / "journal.sqlite").exists():
        with closing(sqlite3.connect(run / "journal.sqlite")) as journal:
            journal.execute("PRAGMA user_version = 0")


def test_an_unfinished_one_is_not_continued_and_said_to_be_old(folder, tmp_path, monkeypatch, caplog):
    stand_in(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "run_cell", stopped)
        with pytest.raises(Interrupted) as cut:
            run_comparison(tiny_spec(folder), output_dir=tmp_path)
    old = cut.value.folder
    age(old)
    before = files_of(old)
    caplog.clear()
    assert unfinished_run(tmp_path, read_manifest(old).spec_hash) is None
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    assert run != old
    (told,) = [line for line in caplog.messages if str(old) in line]
    made_by = re.escape(read_manifest(old).made_by)
    assert re.fullmatch(
        rf".* was made by {made_by}, whose results may differ; it stays as it is and can be reported. This starts a new run",
        told,
    )
    assert files_of(old) == before


def test_nothing_is_taken_over_from_a_finished_one(folder, tmp_path, monkeypatch):
    """As it is written, its settings and versions are equal, so that only the missing revisions tell it apart."""
    stand_in(monkeypatch)
    old = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    age(old)
    before = files_of(old)
    run = run_comparison(tiny_spec(folder, iterations=2), output_dir=tmp_path)
    assert read_manifest(run).reused == ()
    assert files_of(old) == before
