"""A level found from a speed: predicted from times of layers, checked by a measurement, and refused where out of reach."""

from __future__ import annotations

import json

import pytest
import torch
from builders import save_tiny_model, tiny_spec, write_short_texts

from pruning_comparison import cli
from pruning_comparison.errors import InputError
from pruning_comparison.run import target_speedup
from pruning_comparison.run.inputs import prepare_pruning
from pruning_comparison.run.target_speedup import build_fast_enough, predicted_speedup
from pruning_comparison.run.workspace import load_workspace

TIMES_S = {0: 1.0, 1: 1.25, 2: 1.5, 3: 1.75, 4: 2.0}
"""A layer of 4 heads; two layers take 4 seconds dense, and a quarter of a second less for every head that goes."""


@pytest.fixture
def workspace(tmp_path):
    folder = save_tiny_model(tmp_path / "dense")
    write_short_texts(folder / "texts")
    spec = tiny_spec(folder, variants=("baseline",), pruning_levels=(50,))
    return load_workspace(spec, prepare_pruning(spec), layer_times_s=TIMES_S, describes=False)


def test_a_step_is_predicted_from_the_heads_of_each_layer():
    keep = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert predicted_speedup(keep, TIMES_S) == pytest.approx(4 / (1.5 + 1.25))
    # Between two entries of a table that only knows whole groups.
    assert predicted_speedup(keep, {0: 1.0, 2: 1.5, 4: 2.0}) == pytest.approx(4 / (1.5 + 1.25))
    assert predicted_speedup(torch.ones(2, 4, dtype=torch.bool), TIMES_S) == 1


def measure(monkeypatch, speeds):
    """Measurements that give these speeds one after the other."""
    left = iter(speeds)
    monkeypatch.setattr(target_speedup, "measured_ratio", lambda *a, **k: 1 / next(left))


def test_the_fewest_heads_go_that_are_predicted_to_be_enough(workspace, monkeypatch):
    """4 / (4 - 0.25 n) is at least 1.2 from n = 3 on (1.231; 2 heads give 1.143)."""
    measure(monkeypatch, [1.25])
    found = build_fast_enough(workspace, 1.2)
    assert [(one.heads, round(one.predicted, 3), one.measured) for one in found.trials] == [(3, 1.231, 1.25)]
    assert int((~found.pruned.keep).sum()) == 3
    made = found.pruned.model.config.pruning
    assert (made["level"], made["target_speedup"], made["measured_speedup"]) == (37.5, 1.2, 1.25)
    assert "3 of 8 heads (37.5 %) are gone" in found.in_words(1.2)


def test_where_a_measurement_finds_less_more_heads_go(workspace, monkeypatch):
    """3 heads are found to be 1.1 times as fast: 1.2 x 1.2 / 1.1 = 1.309 has to be predicted, which 4 heads are (1.333)."""
    measure(monkeypatch, [1.1, 1.21])
    found = build_fast_enough(workspace, 1.2)
    assert [one.heads for one in found.trials] == [3, 4]
    assert found.in_words(1.2).endswith("Before, too few were tried: 3 heads, 1.1 times.")


def test_what_is_out_of_reach_is_refused(workspace, monkeypatch):
    """7 of 8 heads: 4 / 2.25 = 1.78."""
    with pytest.raises(InputError, match=r"--target_speedup: .* 1\.9 times as fast here: at 87\.5 % .* 1\.78 times"):
        build_fast_enough(workspace, 1.9)
    measure(monkeypatch, [1.0, 1.05, 1.02])
    with pytest.raises(InputError, match=r"the fastest made, without 5 heads, was 1\.05 times as fast"):
        build_fast_enough(workspace, 1.2)


def test_the_command_says_what_was_predicted_and_measured(tmp_path, capsys, monkeypatch):
    folder = save_tiny_model(tmp_path / "dense")
    texts = write_short_texts(tmp_path / "texts")
    options = [f"--model_name={folder}", *(f"--{name}={value}" for name, value in texts.items()), "--threads=1"]
    options += ["--calibration_window=64", "--calibration_tokens=128", "--method=magnitude", "--variant=baseline"]
    monkeypatch.setattr("pruning_comparison.run.workspace.Workspace.layer_times_s", lambda self: TIMES_S)
    measure(monkeypatch, [1.3])
    target = tmp_path / "kept"
    assert cli.main(["prune", *options, "--target-speedup=1.2", "--no_measure", f"--output_dir={target}"]) == 0
    shown = capsys.readouterr().out
    assert (
        "--target_speedup=1.2: 3 of 8 heads (37.5 %) are gone. A decoding step was predicted to be 1.23 times" in shown
    )
    assert json.loads((target / "config.json").read_text())["pruning"]["predicted_speedup"] == 1.2308
