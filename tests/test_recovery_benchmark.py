"""benchmarks/recovery.py in small: what it tells, in which order, and that one failure does not stop the others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from builders import load_script, save_tiny_model, write_short_texts

from pruning_comparison.agency.recovery import recovery_grid
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import AUTO, Cell, ComparisonSpec

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "recovery.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    write_short_texts(folder / "texts")
    (folder / "texts" / "valid.txt").write_text("Words that are there to choose by, and for nothing else. " * 40)
    return folder


def options(folder, *more):
    texts = folder / "texts"
    return [
        f"--model_path={folder}", "--device=cpu", f"--calibration_text={texts / 'calibration'}",
        f"--valid_text={texts / 'valid.txt'}", f"--eval_text={texts / 'held_out'}", "--steps=3", "--grid_steps=2",
        "--tokens=256", "--window=64", "--valid_tokens=128", "--eval_tokens=256", "--batch_size=2", *more,
    ]  # fmt: skip


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_variant_chooses_once_and_is_measured_at_every_level(benchmark, folder, capsys, tmp_path):
    kept = tmp_path / "lines.jsonl"
    benchmark.main(
        options(folder, "--variants=agency:obs,baseline:magnitude", "--levels=50,25", "--samples=2", f"--output={kept}")
    )
    found = lines(capsys)
    assert [json.loads(line) for line in kept.read_text().splitlines()] == found
    first, *rest = found
    assert first["dense_perplexity"] > 1
    trials = [line for line in rest if line["what"] == "trial"]
    grid = recovery_grid(AUTO, AUTO)
    assert [(line["learning_rate"], line["parameters"]) for line in trials] == [*grid, *grid]
    assert {(line["level"], line["sample"], line["steps"]) for line in trials} == {(50.0, 0, 2)}
    models = [line for line in rest if line["what"] != "trial" and "samples" not in line]
    told = [(line["variant"], line["level"], line["what"]) for line in models if line["sample"] == 0]
    assert told == [
        ("agency", 50.0, "pruned"), ("agency", 50.0, "recovered"), ("agency", 25.0, "pruned"),
        ("agency", 25.0, "recovered"), ("baseline", 50.0, "pruned"), ("baseline", 50.0, "recovered"),
        ("baseline", 50.0, "recovered, equal seconds"), ("baseline", 25.0, "pruned"), ("baseline", 25.0, "recovered"),
    ]  # fmt: skip
    best = min((one["valid_kl_nats"], one["learning_rate"], one["parameters"]) for one in trials[:6])
    recovered = [line for line in models if line["variant"] == "agency" and line["what"] == "recovered"]
    assert {(line["learning_rate"], line["parameters"]) for line in recovered} == {best[1:]}
    assert {line["steps"] for line in recovered} == {3}
    over_samples = [line for line in rest if "samples" in line]
    assert len(over_samples) == len(told)
    assert all(line["times_dense_ci"][0] <= line["times_dense"] <= line["times_dense_ci"][1] for line in over_samples)


def test_of_a_grid_that_is_restricted_the_best_trial_is_what_is_reported(benchmark, folder, capsys):
    """Where trials are as long as recovery the chosen one is not trained again: it is the same model."""
    small = ["--levels=50", "--grid_steps=3", "--parameters=all", "--batch_size=2,1"]
    benchmark.main(options(folder, "--variants=baseline:magnitude", "--rates=0.001,0.003", *small))
    _, _, *trials, recovered, small_first, small_second, small_recovered = lines(capsys)
    assert [one["batch_size"] for one in (small_first, small_second, small_recovered)] == [1, 1, 1]
    assert small_recovered["by_window"] != recovered["by_window"]
    assert [(one["learning_rate"], one["parameters"]) for one in trials] == [(0.001, "all"), (0.003, "all")]
    best = min(trials, key=lambda one: one["valid_kl_nats"])
    assert (recovered["what"], recovered["steps"], recovered["recovery_s"]) == ("recovered", 3, best["seconds"])
    benchmark.main(
        options(folder, "--variants=baseline:magnitude", f"--rates={best['learning_rate']}", *small[:1], small[2])
    )
    *_, alone = lines(capsys)
    assert alone["by_window"] == recovered["by_window"]


def test_figures_of_a_pruned_model_are_those_of_its_windows(benchmark, folder, capsys):
    """Losses and divergence of the same model, written out window by window."""
    benchmark.main(options(folder, "--variants=baseline:magnitude", "--levels=50"))
    (line,) = [one for one in lines(capsys) if one.get("what") == "pruned"]
    texts = folder / "texts"
    spec = ComparisonSpec(
        model_name=str(folder), pruning_levels=(50.0,), pruning_methods=("magnitude",), variants=("baseline",),
        calibration_text=str(texts / "calibration"), calibration_tokens=256, calibration_window=64,
        eval_text=str(texts / "held_out"), eval_tokens=256, eval_window=64, eval_stride=64,
        num_tokens=2, max_prompts=1,
    )  # fmt: skip
    workspace = load_workspace(spec, prepare(spec, identify=False))
    model = build(workspace, Cell("baseline", "magnitude", 0, 50.0)).model
    ratios, divergences = [], []
    for window in workspace.inputs.windows:
        p, q = (
            one(window.ids[None]).logits[0, -window.targets - 1 : -1].double().log_softmax(-1)
            for one in (workspace.dense, model)
        )
        target = window.ids[-window.targets :, None]
        ratios.append(float((p.gather(-1, target) - q.gather(-1, target)).mean()))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert line["times_dense"] == pytest.approx(math.exp(sum(ratios) / len(ratios)), abs=1e-3)
    assert line["kl_nats"] == pytest.approx(sum(divergences) / len(divergences), abs=1e-3)
    assert line["by_window"] == pytest.approx([math.exp(ratio) for ratio in ratios], abs=1e-3)
    assert line["n"] == len(ratios)


def test_what_fails_is_told_and_the_rest_goes_on(benchmark, folder, capsys, monkeypatch):
    real = benchmark.build

    def failing(workspace, cell):
        if cell.level == 50:
            raise torch.OutOfMemoryError("too large")
        return real(workspace, cell)

    monkeypatch.setattr(benchmark, "build", failing)
    benchmark.main(options(folder, "--variants=baseline:magnitude", "--levels=50,25"))
    _, failed, *rest = lines(capsys)
    assert (failed["level"], failed["error"]) == (50.0, "OutOfMemoryError: too large")
    assert [line["what"] for line in rest] == ["pruned", *["trial"] * 6, "recovered"]


def test_what_there_is_no_time_for_is_told(benchmark, folder, capsys):
    benchmark.main(options(folder, "--variants=baseline:magnitude", "--levels=50,25", "--minutes=0"))
    _, *rest = lines(capsys)
    assert [line["left_out"] for line in rest] == ["0 minutes are over"] * 2
