"""Trajectories on a local Ray cluster: the same results as in one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import cut_off_after, save_tiny_model, tiny_spec, unmeasured, with_long_first_tokens, write_short_texts
from transformers import AutoModelForCausalLM

from pruning_comparison import cli
from pruning_comparison.errors import ClusterError, InputError
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.launchers import RayLauncher
from pruning_comparison.run.launchers import on_ray as launching
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import read_manifest
from pruning_comparison.variants import DENSE

pytest.importorskip("ray")

VARIANTS = ("baseline", "baseline-progressive", "agency", "agency-selection")


class Mortal(launching.Worker):
    """A worker that dies at a cell, once, or at every attempt, and notes what it begins."""

    def measure(self, cells, parts):
        folder = Path(self._spec.model_name)
        for cell in cells:
            with (folder / "begun").open("a") as log:
                log.write(f"{os.getpid()} {cell.describe()}\n")
            deadly = cell.describe() in (folder / "deadly").read_text().splitlines()
            first = cell.describe() not in (folder / "died").read_text().splitlines()
            if deadly and (first or (folder / "always").exists()):
                with (folder / "died").open("a") as log:
                    log.write(cell.describe() + "\n")
                time.sleep(1)  # so that what came before is out
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().measure([cell], parts)


@pytest.fixture(scope="module")
def spec(folder):
    return tiny_spec(folder, pruning_methods=("magnitude", "random"), iterations=2, variants=VARIANTS)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """The same comparison in one process."""
    return run_comparison(spec, output_dir=tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True, scope="module")
def workers_find_these_tests():
    """Workers are other processes, and import what they are told to run."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *([before] if before else [])])
    yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_two_workers_measure_what_one_process_measures_whoever_dies(spec, whole, folder, tmp_path, caplog):
    """Also: a worker that is killed is replaced, its trajectory goes on where it was, and nobody else is disturbed."""
    deadly = Cell("agency", "random", 1, 50.0).describe()
    (folder / "deadly").write_text(deadly)
    (folder / "died").write_text("")
    (folder / "begun").write_text("")
    progress = []
    run = run_comparison(
        spec,
        output_dir=tmp_path,
        launcher=RayLauncher(workers=2, worker=Mortal),
        on_progress=lambda done, total, what: progress.append((done, total)),
    )
    assert unmeasured(run) == unmeasured(whole)
    assert read_manifest(run).finished is not None
    assert f"a worker died at {deadly}; another one goes on from there" in caplog.messages
    begun = [line.split(" ", 1) for line in (folder / "begun").read_text().splitlines()]
    words = [what for _, what in begun]
    assert sorted(words) == sorted([*(cell.describe() for cell in spec.cells()), deadly])
    assert len({process for process, _ in begun}) >= 2
    for tables in (run, whole):
        with RunStore(tables) as store:
            timed = store.table("measurements").query("metric == 'tokens_per_second'")
            assert len(store.finished_timings()) == 8
        assert timed["value"].notna().all()
        assert (
            timed.groupby(["variant", "method", "iteration", "level"]).ngroups == 32 + 4
        )  # the dense model at level 50
    assert progress[-1] == (40, 40)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


@pytest.mark.slow
def test_workers_read_the_first_tokens_that_one_process_reads(tmp_path):
    """In a model whose first tokens are sinks; also of a run that is continued, and each iteration reads its own."""
    place, texts = save_tiny_model(tmp_path / "model"), write_short_texts(tmp_path / "texts")
    model = with_long_first_tokens(AutoModelForCausalLM.from_pretrained(place).requires_grad_(False), layer=0)
    model.save_pretrained(place)
    spec = tiny_spec(place, variants=("agency-adaptation",), iterations=2, adaptation="refit-mlp", **texts)
    workspaces = [load_workspace(spec, prepare(spec, identify=False)) for _ in range(2)]
    orders = (0, 1), (1, 0)
    # Asked in another order: a generator for both iterations would give others.
    drawn = [
        {n: one.dense_stream(n).first_tokens for n in order} for one, order in zip(workspaces, orders, strict=True)
    ]
    assert drawn[0][0].shape == (8, 1)
    assert all(torch.equal(drawn[0][n], drawn[1][n]) for n in (0, 1))
    assert not torch.equal(drawn[0][0], drawn[0][1])
    whole = run_comparison(spec, output_dir=tmp_path / "whole")
    on_ray = run_comparison(spec, output_dir=tmp_path / "ray", launcher=RayLauncher(workers=2))
    assert unmeasured(on_ray) == unmeasured(whole)
    with RunStore(whole) as store:
        read = store.table("measurements").query("metric == 'adaptation_tokens' and level == 50")["value"]
    assert read.tolist() == [128 + 8] * 2


@pytest.mark.slow
def test_a_run_is_continued_by_the_other_launcher_and_keeps_its_models(spec, whole, tmp_path):
    """Begun in one process and cut off, finished by workers, which also save what has been measured before."""
    with cut_off_after(5):
        run_comparison(spec, output_dir=tmp_path)
    run = run_comparison(spec, output_dir=tmp_path, launcher=RayLauncher(workers=2), save_models=True)
    assert [path.name for path in tmp_path.glob("run_*")] == [run.name]
    assert unmeasured(run) == unmeasured(whole)
    saved = {path.parent.name for path in (run / "models").glob("*/model.safetensors")}
    assert saved == {f"{v}_{m}_{i}_50" for v in VARIANTS for m in ("magnitude", "random") for i in (0, 1)}


class Asleep(launching.Worker):
    """A worker that notes how its idle threads wait."""

    def start(self):
        (Path(self._spec.model_name) / "waiting").write_text(os.environ.get("OMP_WAIT_POLICY", "not set"))
        return super().start()


@pytest.mark.slow
def test_workers_choose_heads_by_the_layer_times_of_the_run(folder, tmp_path, monkeypatch):
    """One of them measures them, alone, and all are told; one process that is given the same chooses the same heads.

    Also: their idle threads sleep.
    """
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    spec = tiny_spec(folder, consent="time", pruning_methods=("magnitude", "random"), pruning_levels=(0, 25, 50))
    run = run_comparison(spec, output_dir=tmp_path / "ray", launcher=RayLauncher(workers=2, worker=Asleep))
    assert (folder / "waiting").read_text() == "PASSIVE"
    with RunStore(run) as store:
        times = store.layer_times_s()
    assert list(times) == [0, 1, 2, 3, 4]
    monkeypatch.setattr("pruning_comparison.run.workspace.measure_layer_times", lambda *given, **settings: times)
    assert unmeasured(run_comparison(spec, output_dir=tmp_path / "serial")) == unmeasured(run)


@pytest.mark.slow
def test_a_trajectory_that_kills_every_worker_is_given_up_and_the_rest_is_kept(folder, tmp_path):
    deadly = Cell("agency", "magnitude", 0, 50.0)
    (folder / "deadly").write_text(deadly.describe())
    (folder / "died").write_text("")
    (folder / "always").write_text("")
    try:
        run = run_comparison(tiny_spec(folder), output_dir=tmp_path, launcher=RayLauncher(workers=1, worker=Mortal))
    finally:
        (folder / "always").unlink()
    with RunStore(run) as store:
        cells = store.table("cells")
        rows = store.table("measurements").query("metric == 'tokens_per_second'")
    failed = cells[cells["status"] == "failed"]
    assert [tuple(row) for row in failed[["variant", "level"]].to_numpy()] == [("agency", 50.0)]
    assert "the worker died 3 times" in failed["reason"].item()
    assert (cells["status"] == "done").sum() == 3
    assert rows.groupby(["variant", "level"]).size().to_dict() == {
        ("agency", 0.0): 2,
        ("baseline", 0.0): 2,
        ("baseline", 50.0): 2,
        (DENSE, 50.0): 2,
    }
    assert read_manifest(run).finished is None


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the cluster's processes in /proc")
@pytest.mark.slow
def test_a_lost_cluster_is_started_again_and_goes_on_with_what_is_missing(spec, whole, tmp_path, caplog):
    lost = []

    def lose(done, total, what):
        if done >= 3 and not lost:
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text() == "gcs_server\n":
                    os.kill(int(child), signal.SIGKILL)
                    lost.append(done)

    run = run_comparison(spec, output_dir=tmp_path, launcher=RayLauncher(workers=2), on_progress=lose)
    assert len(lost) == 1
    assert "the cluster was lost; a new one goes on with what is missing" in caplog.messages
    assert unmeasured(run) == unmeasured(whole)
    assert read_manifest(run).finished is not None


@pytest.mark.slow
def test_a_node_that_would_measure_otherwise_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "versions", lambda: {"torch": "0.4"})
    with pytest.raises(ClusterError, match=r"has .*torch .*unlike the driver"):
        run_comparison(tiny_spec(folder), output_dir=tmp_path, launcher=RayLauncher())
    assert [folder.name for folder in tmp_path.iterdir() if folder.name.startswith("run_")]


@pytest.mark.slow
def test_timings_without_a_node_of_their_own_are_missing_with_the_reason(folder, tmp_path):
    """An existing cluster whose only node has other work on it."""
    import ray

    spec = tiny_spec(folder, threads=1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    address = ray.get_runtime_context().gcs_address
    script = (
        "import logging, sys; from pathlib import Path\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from builders import tiny_spec; from pruning_comparison.run.comparison import run_comparison\n"
        "from pruning_comparison.run.launchers import RayLauncher\n"
        f"run_comparison(tiny_spec(Path({str(folder)!r}), threads=1), output_dir=Path({str(tmp_path)!r}),\n"
        f"    launcher=RayLauncher({address!r}, node_timeout_s=3))\n"
    )
    try:
        # Somebody else's work, for as long as this test takes.
        other = ray.remote(num_cpus=1)(launching.Worker).remote(spec, {})
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        del other
    finally:
        ray.shutdown()
    assert "joining the Ray cluster" in done.stdout
    (run,) = tmp_path.glob("run_*")
    with RunStore(run) as store:
        rows = store.table("measurements")
        assert store.finished_cells() == set(spec.cells())
        assert not store.finished_timings()
    timed = rows[rows["phase"] == "timing"]
    assert len(timed) == 2 * 2 * 5
    assert timed["value"].isna().all()
    assert timed["reason"].str.contains("no node was free of other work within 3 s").all()
    assert read_manifest(run).finished is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray_address=auto"], "--ray_address: 'auto' needs --launcher=ray"),
        (["--workers=2"], "--workers: 2 needs --launcher=ray"),
        (["--launcher=ray", "--workers=0"], "--workers: 0 must be at least 1"),
        (["--launcher=slurm"], "--launcher: 'slurm' is unknown. Choose from serial, ray"),
    ],
)
def test_options_that_make_no_sense(options, message, tmp_path, capsys):
    assert cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path}", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_error_names_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path}", "--launcher=ray"]) == 2
    assert "pip install 'pruning-comparison[ray]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("run_*"))


def test_a_cluster_that_is_not_there(folder, tmp_path):
    with pytest.raises(ClusterError, match=r"no cluster answers at 127\.0\.0\.1:1: .*ray start --head"):
        run_comparison(tiny_spec(folder), output_dir=tmp_path, launcher=RayLauncher("127.0.0.1:1"))


def test_more_threads_than_cores(folder, tmp_path):
    with pytest.raises(InputError, match="--threads: 4000 is more than the"):
        run_comparison(tiny_spec(folder, threads=4000), output_dir=tmp_path, launcher=RayLauncher())


def test_long_trajectories_come_first_and_those_that_share_their_rounds_stay_together(spec):
    tasks = launching.tasks_of(spec, set(spec.cells()))
    assert [task.path[0] for task in tasks] == ["agency"] * 4 + ["baseline-progressive"] * 4 + ["baseline"] * 4
    first = [
        Cell(variant, "magnitude", 0, level) for level in (0.0, 50.0) for variant in ("agency", "agency-selection")
    ]
    assert list(tasks[0].cells) == first
    assert sorted(cell for task in tasks for cell in task.cells) == sorted(spec.cells())
