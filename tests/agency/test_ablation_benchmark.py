"""The benchmark of what each part of agency brings, in small: every configuration runs, and contrasts are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import load_script, save_tiny_model, tiny_gpt2, write_short_texts

PATH = Path(__file__).parents[2] / "benchmarks" / "agency_ablation.py"


@pytest.fixture(scope="module")
def ablation():
    return load_script(PATH)


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

    monkeypatch.setattr(ablation, "continued", broken)
    # Windows are of 12 tokens here.
    default = [name.replace("fresh_window=128", "fresh_window=4") for name in ablation.DEFAULT]
    names = [name for name in default if name != "sampled=1"]
    lines = lines_of(
        ablation, capsys, tmp_path, ";".join(["sampled=1", *names]), "--methods=magnitude", "--factors=1,2"
    )
    names += ["method=magnitude", "method=magnitude,consent=1", "method=magnitude,consent=2"]
    measured = {line["configuration"]: line for line in lines if "ratio" in line}
    assert list(measured) == names
    assert all(sum(line["lost"]) == 6 and math.isfinite(line["ratio"] + line["kl"]) for line in measured.values())
    (failed,) = (line for line in lines if "failed" in line)
    assert failed["configuration"] == "sampled=1"
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
    judge = ablation.Judge(model, windows)
    same = judge.outcome_of(tiny_gpt2())
    assert same.kl == pytest.approx([0] * 3, abs=1e-9)
    assert same.first_token == pytest.approx([1] * 3)
    assert judge.dense == pytest.approx(same.losses)
    for window, loss in zip(windows, same.losses, strict=True):
        log = model(window.ids[None]).logits[0].log_softmax(-1)
        assert loss == pytest.approx(-float(log[range(9), window.ids[1:]].sum()), rel=1e-5)
    other = tiny_gpt2()
    for block in other.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: output * 30)
    changed = judge.outcome_of(other)
    assert (changed.first_token > 10).all()
    assert changed.strays.tolist() == [9] * 3
    assert (changed.kl > 0).all()


@pytest.mark.parametrize("name", ["weight=rounds", "weights=round", "consent=perhaps"])
def test_unknown_settings_are_refused(ablation, name):
    with pytest.raises(ValueError, match=r"Did you mean weights|Did you mean rounds|could not convert"):
        ablation.Configuration.named(name)


def test_the_best_is_lowest_over_levels_and_samples_unless_it_is_clearly_worse_at_one(ablation):
    """Nats of two windows of 10 tokens, the same in both samples; 30 and 20 at the two levels are the reference's."""
    nats = {"reference": (30, 20), "even": (29, 20), "lopsided": (40, 2), "short": (1, 1), "close": (30, 19.5)}
    found = {
        (name, level): {sample: np.array([total / 2] * 2) for sample in (0, 1)}
        for name, totals in nats.items()
        for level, total in zip((50.0, 70.0), totals, strict=True)
    }
    del found["short", 70.0][1]  # was not reached
    lines = [
        {"configuration": "lopsided", "level": 50.0, "to_reference": [1.1, 1.05, 1.2]},
        {"configuration": "lopsided", "level": 70.0, "to_reference": [0.4, 0.3, 0.5]},
        {"configuration": "even", "level": 50.0, "to_reference": [0.95, 0.9, 1.001]},
        {"configuration": "reference", "level": 50.0},
    ]
    tokens = np.array([10, 10])
    assert ablation.best_of(found, lines, tokens) == "even"
    assert ablation.best_of(found, [], tokens) == "lopsided"
    alone = {key: losses for key, losses in found.items() if key[0] in ("reference", "short")}
    assert ablation.best_of(alone, [], tokens) == "reference"


@pytest.mark.slow
def test_the_best_is_measured_beside_the_reference_on_another_text(ablation, capsys, tmp_path):
    texts = write_short_texts(tmp_path / "final")
    kept = tmp_path / "windows.npz"
    more = [
        f"--final_text={texts['eval_text']}", "--final_tokens=48", "--final_levels=30,50", "--final_samples=0,1",
        f"--windows_file={kept}",
    ]  # fmt: skip
    lines = lines_of(ablation, capsys, tmp_path, "reference;ridge=3;mlp_ridge=3", *more)
    assert kept.exists()
    (chosen,) = (line["chosen"] for line in lines if "chosen" in line)
    ratios = {
        line["configuration"]: line["ratio"] for line in lines if line.get("phase") == "ablation" and "kl" in line
    }
    assert ratios[chosen] <= ratios["reference"]
    final = [line for line in lines if line.get("phase") == "final" and "kl" in line]
    assert [(line["sample"], line["configuration"], line["level"]) for line in final] == [
        (sample, name, level)
        for sample in (0, 1)
        for name in dict.fromkeys(["reference", chosen])
        for level in (30.0, 50.0)
    ]
    again = lines_of(ablation, capsys, tmp_path / "again", "reference;ridge=3;mlp_ridge=3", *more)
    assert [line["ratio"] for line in again if "kl" in line] == [line["ratio"] for line in lines if "kl" in line]
    with pytest.raises(ValueError, match="another text or window"):
        lines_of(ablation, capsys, tmp_path / "other", "reference", *more, "--window=10")


def test_nothing_is_begun_when_time_is_up(ablation, capsys, tmp_path):
    lines = lines_of(ablation, capsys, tmp_path, "reference;ridge=3", "--time_limit_s=0")
    assert [line["skipped"] for line in lines if "skipped" in line] == ["time limit"] * 2
    assert not any("kl" in line for line in lines)
