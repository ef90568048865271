"""benchmarks/units.py: how a unit's perplexity is held against that of single heads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from builders import load_script
from scipy import stats

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "units.py"


def line(unit, logs, *, variant="agency", measured=True):
    place = {"unit": unit, "method": "obs", "level": 50.0, "variant": variant, "measured": measured}
    return {**place, **({"log_by_window": logs} if measured else {"ratio": 1.3})}


def test_units_are_paired_with_single_heads_of_the_same_variant_by_window():
    lines = [
        line("rectangle", [0.9, 0.9, 0.9], measured=False),
        line("head", [0.10, 0.30, 0.50]),
        line("rectangle", [0.12, 0.36, 0.51]),
        line("rectangle", [0.4, 0.4, 0.4], variant="baseline"),  # its single heads were not measured
    ]
    (found,) = load_script(SCRIPT).beside_heads(lines)
    assert (found["method"], found["level"], found["variant"], found["unit"]) == ("obs", 50.0, "agency", "rectangle")
    # By hand: differences 0.02, 0.06 and 0.01, mean 0.03, standard deviation sqrt(0.0007).
    half = stats.t.ppf(0.975, 2) * math.sqrt(0.0007 / 3)
    assert found["over_heads"] == pytest.approx(math.exp(0.03), abs=1e-4)
    assert found["over_heads_ci"] == pytest.approx([math.exp(0.03 - half), math.exp(0.03 + half)], abs=1e-4)


def test_without_a_file_nothing_has_been_measured(tmp_path):
    units = load_script(SCRIPT)
    assert units.read(None) == units.read(tmp_path / "none.jsonl") == []
    (tmp_path / "some.jsonl").write_text('{"unit": "head"}\n{"unit": "rectangle"}\n', "utf-8")
    assert units.read(tmp_path / "some.jsonl") == [{"unit": "head"}, {"unit": "rectangle"}]
