"""benchmarks/tasks.py without the harness: what it tells of models that answer as they are told to, and what it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from builders import load_script, save_tiny_model, write_short_texts
from scipy import stats

from pruning_comparison.measure.tasks import TaskAnswer
from pruning_comparison.models import live_heads
from pruning_comparison.run import inputs

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tasks.py"
RIGHT = {8: (1, 1, 1, 0), 4: (1, 0, 0, 0)}
"""Scores of the four questions of the task, by the heads that a model has left."""


class Answers:
    """Two tasks: a model answers the first by its number of heads, and the second always."""

    asked = 0

    def content(self):
        return "the same"

    def answers(self, model, tokenizer, *, bos, batch_size):
        Answers.asked += 1
        first = [TaskAnswer("a", n, {"accuracy": right}) for n, right in enumerate(RIGHT[sum(live_heads(model))])]
        return [*first, *(TaskAnswer("b", n, {"accuracy": 1.0}) for n in range(2))]


@pytest.fixture
def benchmark(monkeypatch):
    module = load_script(SCRIPT)
    for where in (inputs, module):
        monkeypatch.setattr(where, "load_tasks", lambda names, limit: Answers())
    return module


def test_it_tells_accuracy_and_pairs_beside_perplexity_and_measures_nothing_twice(benchmark, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    texts = [f"--{name}={place}" for name, place in write_short_texts(tmp_path).items()]
    command = [
        f"--model_path={model}", *texts, "--eval_tokens=150", "--tokens=128", "--calibration_window=64", "--levels=50",
        "--variants=baseline:magnitude,baseline:random", "--tasks=a,b", f"--output={tmp_path / 'kept.jsonl'}",
    ]  # fmt: skip
    benchmark.main(command)
    first = capsys.readouterr().out
    dense, one, other = map(json.loads, first.splitlines())
    assert (dense["variant"], dense["questions"], dense["times_dense"]) == ("dense", 6, 1.0)
    assert dense["a"]["accuracy"][0] == 0.75
    assert one["a"]["accuracy"][0] == 0.25
    lost = [0, -1, -1, 0]
    half = stats.t.ppf(0.975, 3) * np.std(lost, ddof=1) / 2
    assert one["a"]["vs_dense"] == pytest.approx([-0.5, -0.5 - half, -0.5 + half], abs=1e-4)
    assert one["all tasks"]["vs_dense"][0] == pytest.approx(-2 / 6, abs=1e-4)
    assert "vs_first" not in one["a"]
    assert other["a"]["vs_first"] == [0.0, 0.0, 0.0]
    assert math.isfinite(one["perplexity"])
    assert Answers.asked == 3
    benchmark.main(command)
    assert capsys.readouterr().out == first
    assert Answers.asked == 3
