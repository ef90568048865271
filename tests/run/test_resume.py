"""Nothing is measured twice and nothing is lost: what a run continues and takes over, and that killing it is harmless."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from dataclasses import replace

import pytest
import torch
from builders import stand_in, stopped, tiny_spec, unmeasured
from processes import run_and_log

from pruning_comparison.errors import Interrupted
from pruning_comparison.methods import METHODS
from pruning_comparison.metrics import METRICS
from pruning_comparison.run import attempts as measuring
from pruning_comparison.run import measure_cell
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import PROTOCOL_REVISION, Cell
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import Reused
from pruning_comparison.store.run_folder import read_manifest, write_manifest
from pruning_comparison.variants import DENSE, VARIANTS


def counted(monkeypatch, name):
    """The cells, or whatever else is the second argument, with which a function of the comparison is called."""
    calls, original = [], getattr(measuring, name)
    monkeypatch.setattr(measuring, name, lambda w, *rest: (calls.append(rest[0]), original(w, *rest))[1])
    return calls


def test_added_levels_methods_and_iterations_take_over_what_is_there(folder, tmp_path, monkeypatch, caplog):
    small = run_comparison(tiny_spec(folder), output_dir=tmp_path / "grown", code_commit="old")
    grown = tiny_spec(folder, pruning_levels=(0, 30, 50), pruning_methods=("magnitude", "random"), iterations=2)
    measured, timed = counted(monkeypatch, "run_cell"), counted(monkeypatch, "time_level")
    run = run_comparison(grown, output_dir=tmp_path / "grown", code_commit="new")
    # 2 variants x 2 methods x 2 iterations x 3 levels are 24 cells; 2 variants x 2 levels are there, timed at 2 levels.
    assert len(measured) == 24 - 4
    assert len(timed) == 12 - 2
    assert not {cell for cell in measured if cell[1:3] == ("magnitude", 0) and cell.level != 30}
    assert f"taken over from {small}: 4 cells and 2 timings" in caplog.messages
    assert read_manifest(run).reused == (Reused(small.name, "old", {"cells": 4, "timings": 2}),)
    with RunStore(run) as store:
        commits = store.table("cells")["code_commit"].value_counts().to_dict()
    assert commits == {"old": 4, "new": 20}
    whole = run_comparison(grown, output_dir=tmp_path / "whole")
    assert unmeasured(run).replace(b",old\n", b",\n").replace(b",new\n", b",\n") == unmeasured(whole)


def test_added_prompts_take_over_heads_and_perplexity_even_when_cut_off(folder, tmp_path, monkeypatch, caplog):
    """Nothing is scored, negotiated or evaluated again; texts and timings are those of a run that starts from nothing."""
    common = {"variants": ("baseline", "agency", "agency-selection"), "memory_logging": True}
    small = run_comparison(tiny_spec(folder, **common), output_dir=tmp_path / "grown", code_commit="old")
    grown = tiny_spec(
        folder, **common, max_prompts=2, temperatures=(0.7, 1.0), num_tokens=4, pruning_levels=(0, 50, 75)
    )
    built, evaluated = counted(monkeypatch, "run_cell"), []
    original, rest, left = measure_cell.measure_perplexity, measuring.measure_texts_and_size, [2]

    def stops_at_the_third(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rest(*arguments)

    monkeypatch.setattr(measure_cell, "measure_perplexity", lambda *a, **k: (evaluated.append(1), original(*a, **k))[1])
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "measure_texts_and_size", stops_at_the_third)
        with pytest.raises(Interrupted) as cut:
            run_comparison(grown, output_dir=tmp_path / "grown", code_commit="new")
    assert f"taken over from {small}: 6 cells without their texts" in caplog.messages
    assert read_manifest(cut.value.folder).reused == (Reused(small.name, "old", {"cells without their texts": 6}),)
    with RunStore(cut.value.folder) as store:
        for name in ("cells", "measurements", "heads"):
            assert len(store.table(name).groupby(["variant", "level"])) == 2, name
    run = run_comparison(grown, output_dir=tmp_path / "grown", code_commit="new")
    assert run == cut.value.folder
    assert {cell.level for cell in built} == {75}
    with RunStore(run) as store:
        assert len(evaluated) == store.table("cells").query("level == 75")["fingerprint"].nunique()
    monkeypatch.undo()
    torch.set_num_threads(1)
    whole = run_comparison(grown, output_dir=tmp_path / "whole", code_commit="new")
    assert unmeasured(run) == unmeasured(whole)
    with RunStore(run) as store:
        negotiated = store.table("measurements").query("metric == 'negotiation_s'")
        assert len(store.finished_timings()) == 3
    assert len(negotiated) == 4


def test_a_part_that_does_not_come_out_as_it_was_measured_fails(folder, tmp_path, caplog):
    small = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    with sqlite3.connect(small / "journal.sqlite") as journal:
        journal.execute("UPDATE cells SET fingerprint = 'another' WHERE level = 50 AND variant = 'agency'")
    run_comparison(tiny_spec(folder, max_prompts=2), output_dir=tmp_path)
    (failure,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert failure.getMessage().startswith(
        "failed: agency, magnitude, iteration 1, level 50 %: AssertionError: made again, the model is"
    )


def test_added_variants_take_over_cells_and_are_timed_anew(folder, tmp_path, monkeypatch):
    run_comparison(tiny_spec(folder, variants=("baseline",)), output_dir=tmp_path)
    measured, timed = counted(monkeypatch, "run_cell"), counted(monkeypatch, "time_level")
    run = run_comparison(tiny_spec(folder, variants=("baseline", "agency-adaptation")), output_dir=tmp_path)
    assert [cell.variant for cell in measured] == ["agency-adaptation"] * 2
    assert len(timed) == 2
    with RunStore(run) as store:
        rows = store.table("measurements").query("metric == 'tokens_per_second'")
    assert rows.groupby("variant").size().to_dict() == {"agency-adaptation": 4, "baseline": 4, DENSE: 2}


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"iterations": 2, "seed": 1}, 0),
        ({"iterations": 2, "ridge": 0.2}, 0),
        ({"iterations": 2, "eval_tokens": 100}, 0),
        ({"pruning_levels": (0, 25, 50)}, 0),
        ({"pruning_levels": (0, 25, 50), "entropy_direction": "low"}, 0),
        ({"pruning_levels": (0, 50, 75)}, 2),
        ({}, 0),
    ],
    ids=str,
)
def test_only_what_would_come_out_the_same_is_taken_over(folder, tmp_path, monkeypatch, changes, taken):
    """The direction of entropy is tried at the smallest level, so that another smallest level may turn it round."""
    stand_in(monkeypatch)
    common = {"pruning_methods": ("entropy",), "variants": ("baseline",)}
    run_comparison(tiny_spec(folder, **common), output_dir=tmp_path)
    run = run_comparison(tiny_spec(folder, **{**common, **changes}), output_dir=tmp_path)
    assert sum(reused.counts["cells"] for reused in read_manifest(run).reused) == taken


@pytest.mark.parametrize("part", ["versions", "hardware"])
def test_nothing_is_taken_over_from_other_versions_or_machines(folder, tmp_path, monkeypatch, part):
    stand_in(monkeypatch)
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    write_manifest(run, replace(read_manifest(run), **{part: {"torch": "0.4"}}))
    assert read_manifest(run_comparison(tiny_spec(folder, iterations=2), output_dir=tmp_path)).reused == ()


RAISED = {
    "protocol": ("pruning_comparison.spec.PROTOCOL_REVISION", None, None),
    "metric": ("pruning_comparison.spec.METRICS", METRICS, "perplexity"),
    "method": ("pruning_comparison.methods.METHODS", METHODS, "magnitude"),
    "variant": ("pruning_comparison.variants.VARIANTS", VARIANTS, "agency"),
    "importance": ("pruning_comparison.methods.METHODS", METHODS, "fisher"),
    "prices": ("pruning_comparison.methods.METHODS", METHODS, "obs"),
}
"""What is raised, and the record whose revision that is."""


def raise_revision(monkeypatch, what):
    place, records, name = RAISED[what]
    if records is None:
        monkeypatch.setattr(place, PROTOCOL_REVISION + 1)
    else:
        monkeypatch.setitem(records, name, replace(records[name], revision=records[name].revision + 1))


@pytest.mark.parametrize(
    ("what", "cells"),
    [("protocol", 0), ("metric", 0), ("method", 4), ("variant", 4), ("importance", 4), ("prices", 4)],
)
def test_nothing_is_taken_over_from_another_revision(folder, tmp_path, monkeypatch, what, cells):
    """Of two methods and two variants at two levels: all 8 cells, less those whose method or variant has changed.

    Prices decide which of the heads that agency asks consent, and Fisher scores tell how important they are, whatever the
    method.
    """
    stand_in(monkeypatch)
    spec = {"pruning_methods": ("magnitude", "random")}
    run_comparison(tiny_spec(folder, **spec), output_dir=tmp_path)
    raise_revision(monkeypatch, what)
    run = run_comparison(tiny_spec(folder, **spec, iterations=2), output_dir=tmp_path)
    assert sum(reused.counts["cells"] for reused in read_manifest(run).reused) == cells


def _raised(what, revision):
    return f"{what} has revision {revision + 1}, and had {revision}"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("protocol", _raised("the protocol", PROTOCOL_REVISION)),
        ("metric", "metric perplexity has revision 2, and had 1"),
        ("method", "method magnitude has revision 2, and had 1"),
        ("variant", _raised("variant agency", VARIANTS["agency"].revision)),
        ("importance", "method fisher has revision 2, and had 1"),
        ("prices", _raised("method obs", METHODS["obs"].revision)),
    ],
)
def test_a_run_of_another_revision_is_not_continued(folder, tmp_path, monkeypatch, caplog, what, said):
    stand_in(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", stopped)
        with pytest.raises(Interrupted) as cut:
            run_comparison(tiny_spec(folder), output_dir=tmp_path)
    raise_revision(monkeypatch, what)
    caplog.clear()
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path) != cut.value.folder
    assert f"whose results differ: {said}. It stays as it is and can be reported. This starts a new run" in caplog.text


def test_a_changed_spec_says_what_differs_and_leaves_the_unfinished_run_alone(folder, tmp_path, monkeypatch, caplog):
    stand_in(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", stopped)
        with pytest.raises(Interrupted) as cut:
            run_comparison(tiny_spec(folder), output_dir=tmp_path)
    before = (cut.value.folder / "manifest.json").read_bytes()
    run = run_comparison(tiny_spec(folder, seed=7, num_tokens=5), output_dir=tmp_path)
    assert run != cut.value.folder
    assert [line for line in caplog.messages if "stays as it is" in line] == [
        f"{cut.value.folder} is unfinished and stays as it is: num_tokens, seed differ. This starts a new run"
    ]
    assert (cut.value.folder / "manifest.json").read_bytes() == before


def test_another_commit_and_other_versions_are_warned_of_and_kept_per_cell(folder, tmp_path, monkeypatch, caplog):
    stand_in(monkeypatch)
    original, left = measuring.run_cell, [2]

    def two_cells(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", two_cells)
        with pytest.raises(Interrupted) as cut:
            run_comparison(tiny_spec(folder), output_dir=tmp_path, code_commit="one")
    manifest = read_manifest(cut.value.folder)
    write_manifest(cut.value.folder, replace(manifest, versions={**manifest.versions, "torch": "0.4"}))
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path, code_commit="two")
    assert run == cut.value.folder
    expected = [
        "continued at commit two after starting at one",
        "continued with other versions, so that cells of one run may differ in rounding",
    ]
    assert list(read_manifest(run).warnings) == expected
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == expected
    with RunStore(run) as store:
        assert store.table("cells")["code_commit"].value_counts().to_dict() == {"one": 2, "two": 2}


def test_a_failed_cell_is_tried_again_by_the_same_command_and_then_timed(folder, tmp_path, monkeypatch):
    original = measuring.run_cell

    def failing(workspace, cell):
        if cell == Cell("agency", "magnitude", 0, 50.0):
            raise torch.OutOfMemoryError("no room")
        return original(workspace, cell)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "run_cell", failing)
        run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    assert read_manifest(run).finished is None
    measured = counted(monkeypatch, "run_cell")
    assert run_comparison(tiny_spec(folder), output_dir=tmp_path) == run
    assert measured == [Cell("agency", "magnitude", 0, 50.0)]
    with RunStore(run) as store:
        assert (store.table("cells")["status"] == "done").all()
        rows = store.table("measurements").query("metric == 'tokens_per_second' and level == 50")
    assert sorted(rows["variant"]) == ["agency"] * 2 + ["baseline"] * 2 + [DENSE] * 2
    assert read_manifest(run).finished is not None


def kill_at_random_moments(folder, tmp_path, kills, seed):
    """Kills runs of one spec at random moments until that has happened ``kills`` times, and continues each to its end.

    Returns the folders of the runs, that of the uninterrupted one apart. Moments are drawn from the time that one took.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pruning_comparison.run.comparison", "builders"])
    spec = tiny_spec(folder, pruning_methods=("magnitude", "random"))
    draw, log, finished = random.Random(seed), tmp_path / "cells.log", []

    def start(output_dir):
        process = processes.Process(target=run_and_log, args=(spec, output_dir, log))
        process.start()
        return process

    for output_dir in ("warm up", "whole"):
        began = time.monotonic()
        whole = start(tmp_path / output_dir)
        whole.join()
        assert whole.exitcode == 0
        took = time.monotonic() - began
    attempt = 0
    while kills > 0:
        attempt += 1
        output_dir, kept = tmp_path / f"killed_{attempt}", set()
        output_dir.mkdir()
        while True:
            log.write_text("")
            process = start(output_dir)
            process.join(draw.uniform(0, took) if kills > 0 else None)
            killed = process.exitcode is None
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills -= 1
            begun = [Cell(*json.loads(line)) for line in log.read_text().splitlines()]
            assert not set(begun) & kept
            assert len(set(begun)) == len(begun)
            # A process that ended by itself a moment before it would have been killed has finished its run.
            if not killed or process.exitcode == 0:
                assert process.exitcode == 0
                break
            for journal in output_dir.glob("run_*/journal.sqlite"):
                with RunStore(journal.parent) as store:
                    assert kept <= store.finished_cells()
                    kept = store.finished_cells()
        runs = [path.parent for path in output_dir.glob("run_*/manifest.json")]
        assert len(runs) == 1
        finished += runs
    (whole_run,) = (tmp_path / "whole").glob("run_*")
    return whole_run, finished


def test_killed_at_a_few_random_moments_nothing_is_lost_or_repeated(folder, tmp_path):
    whole, finished = kill_at_random_moments(folder, tmp_path, kills=3, seed=1)
    assert finished
    for run in finished:
        assert unmeasured(run) == unmeasured(whole)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments_nothing_is_lost_or_repeated(folder, tmp_path):
    kills = int(os.environ.get("PRUNING_COMPARISON_KILLS", "100"))
    seed = int(os.environ.get("PRUNING_COMPARISON_SEED", time.time_ns()))
    sys.stderr.write(f"PRUNING_COMPARISON_SEED={seed}\n")
    whole, finished = kill_at_random_moments(folder, tmp_path, kills=kills, seed=seed)
    for run in finished:
        assert unmeasured(run) == unmeasured(whole)


def test_two_processes_measure_the_same(folder, tmp_path):
    """Each process with its own hash seed, one after the other, all unmeasured fields byte for byte."""
    runs = []
    for number in range(2):
        process = multiprocessing.get_context("spawn").Process(
            target=run_and_log, args=(tiny_spec(folder), tmp_path / str(number), tmp_path / "log")
        )
        os.environ["PYTHONHASHSEED"] = str(number)
        process.start()
        process.join()
        assert process.exitcode == 0
        runs += (tmp_path / str(number)).glob("run_*")
    assert unmeasured(runs[0]) == unmeasured(runs[1])
