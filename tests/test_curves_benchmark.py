"""What ``benchmarks/curves.py`` reads off its inputs, and that it draws."""

import json
import subprocess
import sys
from pathlib import Path

from builders import load_script

CURVES = Path(__file__).parents[1] / "benchmarks" / "curves.py"

LINES = [
    {"model": "tiny", "device": "cpu"},
    {"configuration": "reference", "level": 30.0, "sample": 0, "perplexity": 3.0},
    {"configuration": "reference", "level": 30.0, "to_dense": [1.5, 1.25, 2.0]},
    {"configuration": "steps=none", "level": 30.0, "to_dense": [400.0, 20.0, 9000.0]},
    {"configuration": "method=random,consent=1", "level": 30.0, "to_dense": [1.75, 1.5, 2.0]},
]


def test_an_ablation_has_a_panel_for_each_method(tmp_path):
    curves = load_script(CURVES)
    file = tmp_path / "printed.jsonl"
    file.write_text("\n".join(["not JSON", *map(json.dumps, LINES)]), "utf-8")
    (obs, of_obs), (random, of_random) = curves.of_ablation(file)
    assert [obs, random] == ["tiny, obs", "tiny, random"]
    columns = ["variant", "level", "estimate", "ci_low", "ci_high"]
    assert of_obs[columns].values.tolist() == [["agency", 30, 1.5, 1.25, 2], ["baseline", 30, 400, 20, 9000]]
    assert of_random[columns].values.tolist() == [["agency", 30, 1.75, 1.5, 2]]


def test_a_run_has_a_panel_for_each_of_its_methods_in_their_order(tmp_path):
    curves = load_script(CURVES)
    settings = {"model_name": "tiny", "pruning_methods": ["random", "obs"], "variants": ["baseline"], "seed": 0}
    (tmp_path / "manifest.json").write_text(json.dumps({"spec": settings}), "utf-8")
    rows = ["perplexity_ratio,obs,agency,50,1.5", "perplexity_ratio,random,agency,50,2", "perplexity,obs,agency,50,9"]
    (tmp_path / "summary.csv").write_text("\n".join(["metric,method,variant,level,estimate", *rows]), "utf-8")
    panels = {title: found["estimate"].tolist() for title, found in curves.of_run(tmp_path)}
    assert list(panels.items()) == [("tiny, random", [2.0]), ("tiny, obs", [1.5])]


def test_curves_are_drawn(tmp_path):
    file, picture = tmp_path / "printed.jsonl", tmp_path / "curves.png"
    file.write_text("\n".join(map(json.dumps, LINES)), "utf-8")
    subprocess.run([sys.executable, CURVES, file, f"--to={picture}"], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
