"""Half precision tells the same story as float32 on the bundled model."""

from __future__ import annotations

import pytest

from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec

LEVELS = (0.0, 30.0, 60.0, 90.0)
CASES = [("baseline", "magnitude"), ("agency", "random"), ("baseline-progressive", "taylor")]


def perplexities(precision: str) -> dict[tuple[str, str], list[float]]:
    spec = ComparisonSpec(
        model_name="bundled",
        precision=precision,
        pruning_levels=LEVELS,
        pruning_methods=("magnitude", "random", "taylor"),
        variants=("baseline", "agency", "baseline-progressive"),
        eval_tokens=1024,
        calibration_tokens=512,
        num_tokens=1,
        max_prompts=1,
    )
    workspace = load_workspace(spec, prepare(spec))
    windows = workspace.inputs.windows
    return {
        (variant, method): [
            perplexity_of(
                measure_perplexity(build(workspace, Cell(variant, method, 0, level)).model, windows, batch_size=8)
            )
            for level in LEVELS
        ]
        for variant, method in CASES
    }


@pytest.fixture(scope="module")
def exact() -> dict[tuple[str, str], list[float]]:
    return perplexities("float32")


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.005), ("bfloat16", 0.03)])
def test_levels_rank_as_in_float32(precision, tolerance, exact):
    rounded = perplexities(precision)
    for case in CASES:
        assert rounded[case] == pytest.approx(exact[case], rel=tolerance)
        order = sorted(range(len(LEVELS)), key=exact[case].__getitem__)
        assert sorted(range(len(LEVELS)), key=rounded[case].__getitem__) == order, case
