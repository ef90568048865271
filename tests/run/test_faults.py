"""What goes wrong outside the program, one test for every row of docs/reliability.md that test_resume.py has not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import no_model, save_tiny_model, stand_in, stopped, tiny_gpt2, tiny_spec, write_short_texts
from processes import slow_command
from transformers import AutoTokenizer

from pruning_comparison import cli
from pruning_comparison.errors import Interrupted, StoreError
from pruning_comparison.report.write import write_results
from pruning_comparison.run import attempts as measuring
from pruning_comparison.run import comparison, measure_cell
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import Cell
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import CellResult, GeneratedText, Manifest
from pruning_comparison.store.run_folder import latest_run, read_manifest, write_atomically, write_manifest

CELL, OTHER = Cell("baseline", "random", 0, 0.0), Cell("agency", "random", 0, 0.0)


def large(cell, size=400_000):
    return CellResult(cell, "done", texts=[GeneratedText(1.0, 0, "", "x" * size)])


def test_a_full_disk_stops_the_run_and_the_same_command_continues(folder, tmp_path, monkeypatch):
    """A file system of 3 MB, in which the second of four cells has no room until a stranger's file has gone."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here (it takes root)")
    try:
        stranger = mount / "stranger"
        stranger.write_bytes(b"x" * 2_300_000)
        stand_in(monkeypatch)
        measured = []
        monkeypatch.setattr(
            measuring, "run_cell", lambda w, cell: (measured.append(cell), (no_model(), large(cell)))[1]
        )
        spec = tiny_spec(folder)
        with pytest.raises(StoreError, match=r"full.*What was finished before is kept\. Make room"):
            run_comparison(spec, output_dir=mount)
        run = latest_run(mount)
        with RunStore(run) as store:
            kept = store.finished_cells()
        cells = list(spec.cells())
        assert kept == {cells[0]}
        stranger.unlink()
        assert run_comparison(spec, output_dir=mount).resolve() == run
        assert measured == [*cells[:2], *cells[1:]]
        with RunStore(run) as store:
            assert store.finished_cells() == set(cells)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_journal_that_cannot_grow_keeps_what_it_has(tmp_path):
    """SQLite's own limit of pages answers as a full disk does."""
    with RunStore(tmp_path, lock=True) as store:
        store.write_cell(CellResult(CELL, "done"), None)
        pages = store._journal.execute("PRAGMA page_count").fetchone()[0]
        store._journal.execute(f"PRAGMA max_page_count = {pages + 4}")
        with pytest.raises(StoreError, match="full"):
            store.write_cell(large(OTHER), None)
        assert store.finished_cells() == {CELL}
        store._journal.execute("PRAGMA max_page_count = 100000")
        store.write_cell(large(OTHER), None)
        assert store.finished_cells() == {CELL, OTHER}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of folders are those of POSIX")
def test_a_folder_that_becomes_read_only(monkeypatch):
    user, place = os.geteuid(), Path(tempfile.mkdtemp())
    try:
        if user == 0:
            os.chown(place, 65534, 65534)
            os.seteuid(65534)
        with RunStore(place, lock=True) as store:
            store.write_cell(CellResult(CELL, "done"), None)
            write_atomically(place / "table.csv", "old")
            place.chmod(0o555)
            with pytest.raises(StoreError, match=r"cannot be written.*What was finished before is kept"):
                store.write_cell(large(OTHER), None)
            with pytest.raises(StoreError, match=r"table\.csv cannot be written: Permission denied"):
                write_atomically(place / "table.csv", "new")
            assert (place / "table.csv").read_text() == "old"
            assert store.finished_cells() == {CELL}
            place.chmod(0o755)
            store.write_cell(large(OTHER), None)
            assert store.finished_cells() == {CELL, OTHER}
        (place / "run.lock").unlink()
        place.chmod(0o555)
        with pytest.raises(StoreError, match="cannot be written"):
            RunStore(place, lock=True)
        with RunStore(place) as store:
            assert store.finished_cells() == {CELL, OTHER}
    finally:
        os.seteuid(user)
        place.chmod(0o755)
        shutil.rmtree(place)


def test_any_other_refusal_of_the_system_is_told_in_words(tmp_path, capsys, monkeypatch):
    def refused(*arguments, **options):
        raise OSError(28, "No space left on device", str(tmp_path / "models"))

    monkeypatch.setattr(comparison, "run_comparison", refused)
    assert cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path}", "--quiet"]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'models'}: No space left on device.\n"  # nothing is said to be kept
    )


def test_two_runs_in_one_folder(folder, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    run = cut_short(folder, tmp_path, monkeypatch)
    with RunStore(run, lock=True):
        with pytest.raises(StoreError, match=r"another process is writing to .*give another --output_dir"):
            run_comparison(tiny_spec(folder), output_dir=tmp_path)
        with RunStore(run) as reader:
            assert reader.finished_cells() == set()
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path) == run


def cut_short(folder, tmp_path, monkeypatch):
    """An unfinished run of ``tiny_spec`` without a finished cell."""
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", stopped)
        with pytest.raises(Interrupted) as cut:
            run_comparison(tiny_spec(folder), output_dir=tmp_path)
    return cut.value.folder


def truncated(journal):
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])


def no_database(journal):
    journal.write_bytes(b"this is no database" * 1000)


def overwritten(journal):
    raw = bytearray(journal.read_bytes())
    raw[4096:-4096] = b"\xff" * (len(raw) - 8192)
    journal.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", [truncated, no_database, overwritten])
def test_a_damaged_journal_is_left_alone_and_a_new_run_started(folder, tmp_path, monkeypatch, capsys, caplog, damage):
    stand_in(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", lambda w, cell: (no_model(), large(cell, 50_000)))
        run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    write_manifest(run, replace(read_manifest(run), finished=None))
    damage(run / "journal.sqlite")
    before = (run / "journal.sqlite").read_bytes()
    assert cli.main(["report", str(run)]) == 1
    assert "cannot be" in capsys.readouterr().err
    again = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    assert again != run
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith(f"the journal of {run} is damaged")
    assert (run / "journal.sqlite").read_bytes() == before
    with RunStore(again) as store:
        assert store.finished_cells() == set(tiny_spec(folder).cells())


@pytest.mark.parametrize("content", [None, b""])
def test_an_empty_or_lost_journal_means_that_nothing_was_measured(folder, tmp_path, monkeypatch, content):
    stand_in(monkeypatch)
    run = cut_short(folder, tmp_path, monkeypatch)
    (run / "journal.sqlite").unlink()
    if content is not None:
        (run / "journal.sqlite").write_bytes(content)
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path) == run
    with RunStore(run) as store:
        assert store.finished_cells() == set(tiny_spec(folder).cells())


MANIFEST = Manifest({"model_name": "m", "variants": [], "seed": 0})


@pytest.mark.parametrize("pointer", ["gone", "text", "elsewhere", "binary", "itself", "none", "folder"])
def test_a_pointer_to_nowhere_leads_to_the_newest_run(tmp_path, pointer):
    runs = tmp_path / "runs"
    for place in (runs / "run_20260101_000000", runs / "run_20260102_000000", tmp_path / "other"):
        place.mkdir(parents=True)
        write_manifest(place, MANIFEST)
    latest = runs / "latest"
    if pointer in ("gone", "elsewhere", "itself"):
        latest.symlink_to({"gone": "run_20260103_000000", "elsewhere": "../other", "itself": "latest"}[pointer])
    elif pointer in ("text", "binary"):
        latest.write_bytes({"text": b"../other\n", "binary": b"\xff\x00\xfe"}[pointer])
    elif pointer == "folder":
        latest.mkdir()
    assert latest_run(runs) == (runs / "run_20260102_000000").resolve()
    shutil.rmtree(runs / "run_20260101_000000")
    shutil.rmtree(runs / "run_20260102_000000")
    assert latest_run(runs) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_leaves_a_partial_report_and_exit_code_130(folder, tmp_path, number):
    spec, begun = tiny_spec(folder), tmp_path / "begun"
    argv = ["run", f"--model_name={folder}", "--device=cpu", "--threads=1", f"--output_dir={tmp_path / 'runs'}"]
    argv += ["--pruning_levels=0,50", "--pruning_method=magnitude"]
    for name in (
        "num_tokens",
        "timing_limit_s",
        "iterations",
        "max_prompts",
        "eval_tokens",
        "calibration_tokens",
        "calibration_window",
    ):
        argv.append(f"--{name}={getattr(spec, name)}")
    argv += [f"--eval_text={spec.eval_text}", f"--calibration_text={spec.calibration_text}", "--temperatures=1"]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["pruning_comparison.run.comparison", "pruning_comparison.report.write", "processes"]
    )
    process = processes.Process(target=slow_command, args=(argv, begun))
    process.start()
    while not begun.exists():
        assert process.exitcode is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    run = latest_run(tmp_path / "runs")
    assert (run / "report.html").is_file()
    assert read_manifest(run).finished is None
    with RunStore(run) as store:
        assert len(store.finished_cells()) == 2


def test_out_of_memory_is_recorded_and_no_batch_gets_smaller(folder, tmp_path, monkeypatch):
    """Once while a cell is measured and once while a level is timed: with a smaller batch, figures would not be pairs."""
    measure, timed, batches = measure_cell.measure_perplexity, measuring.time_level, []

    def measured(model, windows, *, batch_size, dense):
        batches.append(batch_size)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return measure(model, windows, batch_size=batch_size, dense=dense)

    def too_large(workspace, models, iteration):
        if set(models) == {"baseline", "agency"} and models["baseline"] is models["agency"]:
            raise MemoryError
        return timed(workspace, models, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(measure_cell, "measure_perplexity", measured)
        patch.setattr(measuring, "time_level", too_large)
        run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    assert batches == [8] * 3
    with RunStore(run) as store:
        cells, rows = store.table("cells"), store.table("measurements")
        assert store.finished_timings() == set()
    failed = cells[cells["status"] == "failed"]
    assert failed["reason"].tolist() == ["OutOfMemoryError: CUDA out of memory. Tried to allocate"]
    missing = rows[(rows["metric"] == "tokens_per_second") & rows["value"].isna()]
    assert missing[["level", "reason"]].to_numpy().tolist() == [[0.0, "MemoryError"]] * 2
    assert "MemoryError" in write_results(run, save_outputs=False).read_text("utf-8")
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path) == run
    with RunStore(run) as store:
        rows = store.table("measurements").query("metric == 'tokens_per_second'")
    # Twice: both variants at two levels, and the dense model at level 50.
    assert len(rows) == 2 * (2 * 2 + 1)
    assert rows["value"].notna().all()


def test_a_model_that_emits_nan_has_no_figures_and_says_why(tmp_path):
    """Weights that are finite, and overflow in the first product."""
    model = tiny_gpt2(context=128)
    model.resize_token_embeddings(257)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 1e30
    folder = save_tiny_model(tmp_path / "model", model=model)
    write_short_texts(folder / "texts")
    run = run_comparison(tiny_spec(folder, variants=("baseline",)), output_dir=tmp_path / "runs")
    with RunStore(run) as store:
        cells, rows, texts = store.table("cells"), store.table("measurements"), store.table("texts")
    assert (cells["status"] == "done").all()
    nats = rows[rows["metric"] == "window_nats"]
    assert nats["value"].isna().all()
    assert set(nats["reason"]) == {"the model's loss is not a finite number"}
    for metric in ("distinct_1", "seq_rep_4", "compression_ratio", "generation_perplexity"):
        chosen = rows[rows["metric"] == metric]
        assert len(chosen) == 2
        assert chosen["value"].isna().all()
        assert set(chosen["reason"]) == {"the model's logits are not finite"}
    assert set(texts["text"]) == {""}
    assert "not finite" in write_results(run, save_outputs=True).read_text("utf-8")


def test_a_tokenizer_without_pad_and_end_of_text(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            kept = {key: value for key, value in json.loads(path.read_text()).items() if "os_token" not in key}
            path.write_text(
                json.dumps({**kept, "eos_token_id": None, "bos_token_id": None} if "onfig" in name else kept)
            )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if "_id" not in k}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token is None
    assert tokenizer.pad_token is None
    write_short_texts(folder / "texts")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Short\nA longer prompt, so that the first one is padded\n")
    spec = tiny_spec(folder, prompt_file=str(prompts), max_prompts=2)
    run = run_comparison(spec, output_dir=tmp_path / "runs", raise_failures=True)
    with RunStore(run) as store:
        rows = store.table("measurements").query("metric == 'distinct_1'")
    assert len(rows) == 2 * 2 * 2
    assert rows["value"].notna().all()


def test_a_clock_that_jumps_back_spoils_nothing(folder, tmp_path, monkeypatch):
    """Durations come from clocks that nobody can set; dates only name folders, and ``latest`` does not go by them."""
    stand_in(monkeypatch)
    stamps = iter(["run_20260601_120000", "run_20250101_000000", "run_20250101_000000"])
    written = time.strftime

    def jumping(pattern, *moment):
        return next(stamps) if pattern.startswith("run_") else written(pattern, *moment)

    monkeypatch.setattr(time, "strftime", jumping)
    runs = [run_comparison(tiny_spec(folder), output_dir=tmp_path) for _ in range(3)]
    assert [run.name for run in runs] == ["run_20260601_120000", "run_20250101_000000", "run_20250101_000000_1"]
    assert latest_run(tmp_path) == runs[-1].resolve()
    source = Path(comparison.__file__).parent
    assert [path for path in source.rglob("*.py") if "time.time()" in path.read_text("utf-8")] == []


def test_a_run_killed_within_a_transaction_has_the_cell_not_at_all(tmp_path):
    """What SIGKILL leaves behind: a journal and the pages from before the transaction, which SQLite puts back."""
    with RunStore(tmp_path, lock=True) as store:
        store.write_cell(CellResult(CELL, "done"), None)
    copy = tmp_path / "copy"
    copy.mkdir()
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as journal:
        journal.execute("PRAGMA cache_size = 1")
        journal.execute("INSERT INTO cells (variant, method, iteration, level, status) VALUES ('a', 'b', 0, 0, 'done')")
        for number in range(300):
            journal.execute("INSERT INTO texts (variant, text) VALUES ('a', ?)", ("x" * 2000 + str(number),))
        assert (tmp_path / "journal.sqlite-journal").stat().st_size > 0
        for name in ("journal.sqlite", "journal.sqlite-journal"):
            shutil.copy(tmp_path / name, copy / name)
        journal.rollback()
    with RunStore(copy) as store:
        assert store.finished_cells() == {CELL}
        assert len(store.table("texts")) == 0
