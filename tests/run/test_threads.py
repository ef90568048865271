"""How many threads a new run uses, whose threads others use, and that idle ones sleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import save_tiny_model, stopped, tiny_gpt2, tiny_model, write_short_texts

from pruning_comparison import cli
from pruning_comparison.environment import let_threads_sleep
from pruning_comparison.run import attempts as measuring
from pruning_comparison.run import threads as choosing
from pruning_comparison.run.threads import choose_threads, measure_threads, stored_threads, thread_counts, with_threads
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.run_folder import read_manifest


def test_powers_of_two_and_all_cores_are_tried():
    assert {cores: thread_counts(cores) for cores in (1, 2, 3, 4, 6, 16)} == {
        1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6], 16: [1, 2, 4, 8, 16],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 1.0, 2: 0.96}, 1),  # 4 % are not worth another core
        ({1: 1.0, 2: 6.5}, 1),  # beside a busy process, with threads that spin
        ({1: 4.0, 2: 2.05, 4: 2.0, 8: 2.3}, 2),
    ],
)
def test_the_fewest_threads_that_are_nearly_as_fast_as_any(times, chosen):
    assert choose_threads(times) == chosen


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_few_layers_of_the_models_shape_are_timed_and_nothing_else_changes(family, monkeypatch):
    config = (tiny_gpt2() if family == "gpt2" else tiny_model(family)).config
    monkeypatch.setattr(choosing, "available_cores", lambda: 2)
    layers, before, state = config.num_hidden_layers, torch.get_num_threads(), torch.get_rng_state()
    times = measure_threads(config, ComparisonSpec())
    assert list(times) == [1, 2]
    assert all(seconds > 0 for seconds in times.values())
    assert torch.get_num_threads() == before
    assert config.num_hidden_layers == layers == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_times_are_medians_of_turns_without_the_first(monkeypatch):
    """A pass and a step take turns: with one thread 4 s and 1 s, so 2 s; with two 1 s and 1 s, and 9 s and 9 s once."""
    taken, now = [], {"count": 0}
    monkeypatch.setattr(choosing, "available_cores", lambda: 2)
    monkeypatch.setattr(choosing.torch, "set_num_threads", lambda count: now.update(count=count))

    def timed(what):
        taken.append(now["count"])
        number = taken.count(now["count"])  # two for every turn
        if number <= 2:
            return 100.0
        if now["count"] == 1:
            return 4.0 if number % 2 else 1.0
        return 9.0 if number in (3, 4) else 1.0

    monkeypatch.setattr(choosing, "_timed", timed)
    assert measure_threads(tiny_gpt2().config, ComparisonSpec()) == {1: 2.0, 2: 1.0}
    # Who begins changes from turn to turn.
    assert taken == [2, 2, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1, 2, 2]


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measurement, which finds 2 threads best, then 1; it says how often it was asked."""
    found, asked = [{1: 0.01, 2: 0.006}, {1: 0.01, 2: 0.02}], []

    def measure(config, spec):
        asked.append(spec.model_name)
        return found[(len(asked) - 1) % 2]

    monkeypatch.setattr(choosing, "measure_threads", measure)
    monkeypatch.setattr(choosing, "available_cores", lambda: 2)
    return asked


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("dense"))
    texts = write_short_texts(folder / "texts")
    return [
        f"--model_name={folder}", "--device=cpu", "--pruning_levels=50", "--pruning_method=magnitude", "--iterations=1",
        "--variants=baseline", "--temperatures=1.0", "--num_tokens=3", "--max_prompts=1", "--eval_tokens=100",
        "--calibration_tokens=64", "--calibration_window=32", "--timing_pairs=2", "--timing_limit_s=0", "--quiet",
        *(f"--{name}={value}" for name, value in texts.items()),
    ]  # fmt: skip


def runs_in(folder):
    return [path for path in sorted(folder.glob("run_*")) if path.is_dir()]


def test_a_new_run_measures_and_whoever_continues_repeats_or_grows_it_uses_its_threads(
    options, measured, tmp_path, monkeypatch, no_charts
):
    given = ["run", *options, f"--output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "time_level", stopped)
        assert cli.main(given) == 130
    (run,) = runs_in(tmp_path)
    manifest = read_manifest(run)
    assert (manifest.spec["threads"], manifest.hardware["threads"]) == (2, 2)
    assert manifest.thread_times_s == {"1": 0.01, "2": 0.006}
    assert cli.would_resume(given[1:])
    assert len(measured) == 1
    # Continued: the measurement would find one thread now, and is not asked.
    assert cli.main(given) == 0
    assert runs_in(tmp_path) == [run]
    assert read_manifest(run).finished is not None
    assert cli.main(given) == 0  # shown again
    assert runs_in(tmp_path) == [run]
    # Grown by a method: what is there is taken over, which other threads would keep from it.
    assert cli.main([*given, "--pruning_method=magnitude,random"]) == 0
    grown = runs_in(tmp_path)[-1]
    assert read_manifest(grown).spec["threads"] == 2
    assert [one.run for one in read_manifest(grown).reused] == [run.name]
    assert read_manifest(grown).thread_times_s is None
    assert len(measured) == 1
    # Measured anew, it is a new run.
    assert cli.main([*given, "--fresh"]) == 0
    fresh = runs_in(tmp_path)[-1]
    assert len(measured) == 2
    assert (read_manifest(fresh).spec["threads"], read_manifest(fresh).thread_times_s) == (1, {"1": 0.01, "2": 0.02})


def test_threads_that_are_given_are_used_and_nothing_is_measured(options, measured, tmp_path, no_charts):
    assert cli.main(["run", *options, f"--output_dir={tmp_path}", "--threads=1"]) == 0
    (run,) = runs_in(tmp_path)
    assert read_manifest(run).spec["threads"] == 1
    assert read_manifest(run).thread_times_s is None
    assert "thread_times_s" not in json.loads((run / "manifest.json").read_text())
    assert not measured


def test_plan_and_prune_choose_as_well(options, measured, tmp_path, capsys):
    assert cli.main(["plan", *options, f"--output_dir={tmp_path}"]) == 0
    assert len(measured) == 1
    no_comparison = ("--pruning_levels", "--iterations", "--variants", "--temperatures", "--pruning_method")
    of_one = [word for word in options if not word.startswith(no_comparison)]
    words = ["prune", *of_one, "--level=50", "--method=magnitude", "--variant=baseline", "--no_measure"]
    assert cli.main([*words, f"--output_dir={tmp_path / 'kept'}"]) == 0
    assert len(measured) == 2


def test_only_runs_that_differ_in_nothing_else_give_their_threads(options, measured, tmp_path, monkeypatch, no_charts):
    assert cli.main(["run", *options, f"--output_dir={tmp_path}"]) == 0
    (run,) = runs_in(tmp_path)
    stored = read_manifest(run).spec
    spec = ComparisonSpec.from_dict({**stored, "threads": 1})
    assert stored_threads(spec, tmp_path) == 2
    assert stored_threads(replace(spec, iterations=2, num_tokens=4), tmp_path) == 2
    for change in ({"seed": 1}, {"calibration_tokens": 32}, {"model_name": "bundled"}, {"precision": "bfloat16"}):
        assert stored_threads(replace(spec, **change), tmp_path) is None
    # What only grows takes nothing over from another machine, so it need not have its threads.
    monkeypatch.setattr(choosing, "hardware", lambda spec: {"processor": "another"})
    assert stored_threads(replace(spec, iterations=2), tmp_path) is None
    assert stored_threads(spec, tmp_path) == 2


def test_one_core_and_graphics_cards_need_no_measurement(measured, monkeypatch):
    spec = ComparisonSpec()
    assert with_threads(replace(spec, device="cuda"), None, lambda: None)[0].threads == 2
    monkeypatch.setattr(choosing, "available_cores", lambda: 1)
    assert with_threads(spec, None, lambda: None) == (replace(spec, threads=1), None)
    assert not measured


def policy_after(code, **environment):
    """OMP_WAIT_POLICY after some code in a process of its own, and whether torch was loaded by then."""
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    source = str(Path(cli.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport os, sys\nprint(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"],
        env={**clean, "PYTHONPATH": source, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.split()[-2:]


def test_commands_let_idle_threads_sleep_before_torch_is_loaded_and_importing_does_nothing():
    call = "from pruning_comparison.cli import main; main(['--version'])"
    assert policy_after(call) == ["PASSIVE", "False"]
    assert policy_after(call, OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE", "False"]
    script = "from pathlib import Path; from pruning_comparison.self_update import run_latest"
    script += "; run_latest(Path('.'), ['script'], ['--help'])"
    assert policy_after(script, PRUNING_COMPARISON_NO_UPDATE="1") == ["PASSIVE", "False"]
    assert policy_after("import pruning_comparison, pruning_comparison.cli") == ["None", "False"]
    assert policy_after("import pruning_comparison.run")[0] == "None"


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
