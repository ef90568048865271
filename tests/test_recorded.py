"""Two comparisons give what they gave when they were recorded: the same heads, the same texts, the same perplexity.

``tests/recorded`` holds what the quick test (``--debug``) and the default comparison on the bundled model gave at the commit
that each file names. A change that means to give other results raises the revision of what it changes and records anew;
cells that were recorded at another revision of their variant are compared no more, and the baseline's stay what they were.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.variants import VARIANTS

RECORDED = Path(__file__).parent / "recorded"
RENAMED = {"unit": "prune_unit"}
"""Settings that were recorded under another name than today's."""

KEY = ["variant", "method", "iteration", "level"]


def spec_of(recorded: dict[str, Any]) -> ComparisonSpec:
    """The recorded settings; what has been added since has its default, but for how long is timed: that is not recorded."""
    known = {field.name for field in fields(ComparisonSpec)}
    settings: dict[str, Any] = {"timing_limit_s": 0.0}
    settings |= {name if name in known else RENAMED[name]: value for name, value in recorded["spec"].items()}
    return ComparisonSpec(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    )


def same_arithmetic(recorded: dict[str, Any]) -> bool:
    """Whether this machine rounds as the one did on which the results were recorded.

    Another processor or another torch adds up in another order. That moves perplexity in its last digits, and one token that
    is drawn otherwise makes another text.
    """
    here = (torch.backends.cpu.get_cpu_capability(), torch.__version__)
    return here == (recorded["cpu_capability"], recorded["torch"])


def results_of(run: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Heads kept, perplexity and texts of every cell, in the form in which they were recorded."""
    with RunStore(run) as store:
        heads, rows, texts = (store.table(name) for name in ("heads", "measurements", "texts"))
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    for key, of_cell in heads.sort_values(["layer", "head"]).groupby(KEY):
        kept = ["".join(str(int(k)) for k in layer["kept"]) for _, layer in of_cell.groupby("layer")]
        results[key] = {"kept": kept, "texts": {}}
    for key, of_cell in rows[rows["phase"] == "quality"].groupby(KEY):
        sums = of_cell[of_cell["metric"].isin(["window_nats", "window_tokens"])].groupby("metric")["value"].sum()
        results[key]["perplexity"] = math.exp(sums["window_nats"] / sums["window_tokens"])
    for row in texts.itertuples():
        key = tuple(getattr(row, name) for name in KEY)
        results[key]["texts"][f"{row.temperature:g}/{row.prompt}"] = row.text
    return results


def applies(cell: dict[str, Any]) -> bool:
    """Whether a cell was recorded at today's revision of its variant; at level 0 every variant is the dense model."""
    return cell["level"] == 0 or cell.get("revision", 1) == VARIANTS[cell["variant"]].revision


@pytest.mark.parametrize("name", ["debug", pytest.param("default", marks=pytest.mark.slow)])
def test_a_recorded_comparison_gives_the_same_results(name: str, tmp_path: Path) -> None:
    recorded = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))
    found = results_of(run_comparison(spec_of(recorded), output_dir=tmp_path))
    exact = same_arithmetic(recorded)
    assert set(found) == {tuple(cell[part] for part in KEY) for cell in recorded["cells"]}
    for cell in recorded["cells"]:
        key = tuple(cell[part] for part in KEY)
        pruned = ["".join(one["kept"]).count("0") for one in (found[key], cell)]
        assert pruned[0] == pruned[1], key
        if not applies(cell):
            continue
        assert found[key]["kept"] == cell["kept"], key
        assert found[key]["perplexity"] == pytest.approx(cell["perplexity"], rel=1e-6 if exact else 1e-3), key
        if exact:
            assert found[key]["texts"] == cell["texts"], key


@pytest.mark.parametrize("name", ["debug", "default"])
def test_the_baseline_is_still_what_was_recorded(name: str) -> None:
    """Raising every revision would silence the comparison above."""
    recorded = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))
    baseline = [cell for cell in recorded["cells"] if cell["variant"] == "baseline"]
    assert len(baseline) == len(recorded["cells"]) // 2
    assert all(applies(cell) for cell in baseline)
