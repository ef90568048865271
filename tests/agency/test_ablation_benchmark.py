"""The benchmark of what each part of agency brings, in small: every configuration runs, and contrasts are what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import save_tiny_model, tiny_gpt2, write_short_texts

PATH = Path(__file__).parents[2] / "benchmarks" / "agency_ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("agency_ablation", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def lines_of(ablation, capsys, tmp_path, configurations, *more):
    texts = write_short_texts(tmp_path)
    ablation.main(
        [
            f"--model_name={save_tiny_model(tmp_path / 'model', layers=3)}",
            f"--calibration_text={texts['calibration_text']}",
            f"--eval_text={texts['eval_text']}",
            "--tokens=96",
            "--eval_tokens=64",
            "--window=12",
            "--levels=50",
            f"--configurations={configurations}",
            f"--to={tmp_path / 'rows.jsonl'}",
            *more,
        ]
    )
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_configuration_runs_and_those_that_fail_do_not_stop_the_others(ablation, capsys, tmp_path, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("this part is broken")

    monkeypatch.setattr(ablation, "measured_curves", broken)
    names = [*(name for name in ablation.DEFAULT if "weights=curve" not in name), "openings=3,opening_tokens=4"]
    lines = lines_of(
        ablation, capsys, tmp_path, ";".join(["weights=curve", *names]), "--methods=magnitude", "--factors=1,2"
    )
    names += ["method=magnitude", "method=magnitude,consent=1", "method=magnitude,consent=2"]
    measured = {line["configuration"]: line for line in lines if "ratio" in line}
    assert list(measured) == names
    assert all(sum(line["lost"]) == 6 and math.isfinite(line["ratio"] + line["kl"]) for line in measured.values())
    (failed,) = (line for line in lines if "failed" in line)
    assert failed["configuration"] == "weights=curve"
    assert "this part is broken" in failed["failed"]
    assert {line["configuration"] for line in lines if "to_dense" in line} == {*names}


def test_contrasts_are_ratios_of_perplexities_over_samples_and_windows(ablation, capsys, tmp_path):
    lines = lines_of(ablation, capsys, tmp_path, "reference;ridge=3", "--samples=0,1")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    tokens, dense = np.array(rows[0]["tokens"]), np.array(rows[0]["dense"])
    nats = {
        name: np.mean([np.sum(row["losses"]) for row in rows if row["configuration"] == name]) / tokens.sum()
        for name in ("reference", "ridge=3")
    }
    dense_nats = dense.sum() / tokens.sum()
    assert lines[0]["dense_perplexity"] == pytest.approx(math.exp(dense_nats), abs=1e-4)
    by_name = {line["configuration"]: line for line in lines if "to_dense" in line}
    for name, found in by_name.items():
        assert found["samples"] == [0, 1]
        assert found["to_dense"][0] == pytest.approx(math.exp(nats[name] - dense_nats), abs=1e-4)
        assert found["to_dense"][1] < found["to_dense"][0] < found["to_dense"][2]
    contrast = by_name["ridge=3"]["to_reference"]
    assert contrast[0] == pytest.approx(math.exp(nats["ridge=3"] - nats["reference"]), abs=1e-4)
    assert "to_reference" not in by_name["reference"]


def test_a_model_is_compared_with_the_dense_one(ablation):
    """Of the model itself nothing is lost; of one whose stream is doubled the first token is."""
    model = tiny_gpt2()
    windows = [
        ablation.EvaluationWindow(
            "d", n, torch.randint(1, 97, (10,), generator=torch.Generator().manual_seed(n)), 9, 1, 1
        )
        for n in range(3)
    ]
    same = ablation.outcome_of(tiny_gpt2(), model, windows)
    assert same.kl == pytest.approx([0] * 3, abs=1e-9)
    assert same.first_token == pytest.approx([1] * 3)
    for window, loss in zip(windows, same.losses, strict=True):
        log = model(window.ids[None]).logits[0].log_softmax(-1)
        assert loss == pytest.approx(-float(log[range(9), window.ids[1:]].sum()), rel=1e-5)
    other = tiny_gpt2()
    for block in other.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: output * 30)
    changed = ablation.outcome_of(other, model, windows)
    assert (changed.first_token > 10).all()
    assert changed.strays.tolist() == [9] * 3
    assert (changed.kl > 0).all()


@pytest.mark.parametrize("name", ["weight=context", "weights=contex", "consent=perhaps"])
def test_unknown_settings_are_refused(ablation, name):
    with pytest.raises(ValueError, match=r"Did you mean weights|Did you mean context|could not convert"):
        ablation.Configuration.named(name)
