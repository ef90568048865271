"""benchmarks/peers.py: the row that is measured here, and the table. Torch-Pruning has an environment of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from builders import load_script, save_tiny_model, tiny_gpt2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers():
    return load_script(SCRIPT)


def test_perplexity_is_the_mean_over_all_tokens_but_the_first(peers):
    model, ids = tiny_gpt2(), torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)
    nats = -sum(float(logs[row, place, ids[row, place + 1]]) for row in range(2) for place in range(6))
    assert peers.perplexity_of(model, ids) == pytest.approx(math.exp(nats / 12), rel=1e-5)


def test_a_row_prunes_measures_and_leaves_what_the_peer_needs(peers, tmp_path, capsys):
    """The second row removes the first one's heads again, by their list: the same perplexity."""
    folder = save_tiny_model(tmp_path / "model")
    for name, text in (("eval", "Peace and law. " * 40), ("calibration", "War and trade, " * 80)):
        (tmp_path / f"{name}.txt").write_text(text)
    options = [
        f"--model={folder}", "--level=50", f"--eval_text={tmp_path / 'eval.txt'}", "--window=32", "--windows=3",
        f"--calibration_text={tmp_path / 'calibration.txt'}", "--taylor_windows=2", f"--work={tmp_path / 'work'}",
    ]  # fmt: skip
    (tmp_path / "calibration.txt").write_text("War and trade, " * 200)
    assert peers.main([*options, "--row=magnitude, heads alone", "--calibration_tokens=512"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(map(len, row["leave"])) == 4  # half of 2 x 4
    assert row["reloads"] == {"load_pruned": "yes"}
    texts = load_file(tmp_path / "work" / "windows.safetensors")
    assert texts["evaluation"].shape == (3, 32)
    assert texts["calibration"].shape[0] == 2
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "dense", dtype=torch.float32)
    assert peers.perplexity_of(dense, texts["evaluation"]) == pytest.approx(row["dense_perplexity"], rel=1e-6)
    (tmp_path / "leave.json").write_text(json.dumps({"leave": row["leave"]}))
    assert peers.main([*options, "--row=magnitude, heads alone", f"--leave={tmp_path / 'leave.json'}"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["leave"] == row["leave"]
    assert again["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)


def test_the_table_has_ratios_and_says_what_failed(peers):
    row = {
        "leave": [[0, 1], [2]], "perplexity": 30.0, "processor_s": 1.25, "peak_memory_bytes": 2e9, "parameters": 5e6,
        "reloads": {"load_pruned": "yes"},
    }  # fmt: skip
    lines = peers.table({"here": row, "there": {"failed": "RuntimeError: no"}}, 20.0).splitlines()
    assert lines[2] == "| here | 3 | 30.000, 1.500 | 1.2 | 2.00 | 5.0 M | load_pruned: yes |"
    assert lines[3].startswith("| there | fails: RuntimeError: no |")
