"""Half precision tells the same story as float32 on the bundled model."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_gpt2

from pruning_comparison.agency import DenseStream
from pruning_comparison.agency.moments import LayerMoments
from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.models import devices
from pruning_comparison.models.devices import (
    asked_products,
    exact_sums,
    fast_products,
    prepare_in,
    room_for_streams_bytes,
)
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec, identity

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


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        pytest.param("float16", 0.005, marks=pytest.mark.slow),  # processors compute in it slowly
        ("bfloat16", 0.03),
    ],
)
def test_levels_rank_as_in_float32(precision, tolerance, exact):
    rounded = perplexities(precision)
    for case in CASES:
        assert rounded[case] == pytest.approx(exact[case], rel=tolerance)
        order = sorted(range(len(LEVELS)), key=exact[case].__getitem__)
        assert sorted(range(len(LEVELS)), key=rounded[case].__getitem__) == order, case


# The precision of preparing


def products_of(model, context):
    with context(model):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_products_are_rounded_only_where_that_was_asked_for(model, precision):
    assert products_of(model, fast_products) == products_of(model, asked_products) == torch.float32
    prepare_in(model, precision)
    assert products_of(model, fast_products) == products_of(model, asked_products) == getattr(torch, precision)
    pruned = remove_heads(model, torch.eye(3, 4, dtype=torch.bool))
    assert products_of(pruned, fast_products) == getattr(torch, precision)
    prepare_in(model, "float32")
    assert products_of(model, fast_products) == torch.float32


def test_a_processor_takes_bfloat16_by_itself_and_a_gpu_does_not(model, monkeypatch):
    monkeypatch.setattr(devices, "gains_from_bfloat16", lambda model: True)
    assert products_of(model, fast_products) == torch.bfloat16
    assert products_of(model, asked_products) == torch.float32
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("cuda"), raising=False)
    assert products_of(model, fast_products) == torch.float32


def test_sums_leave_float16_alone():
    """300 tokens of 20 times 20 add up to 120,000: more than float16 can say."""
    moments = LayerMoments((0,), 2, torch.ones(2, 3))
    x = torch.cat([torch.full((2, 150, 2), 20.0), torch.full((2, 150, 2), -20.0)], 1)
    with torch.autocast("cpu", dtype=torch.float16):
        moments.add(x, 0)
        with exact_sums(x):
            assert (x[0] @ x[0].T).dtype == torch.float32
    assert float(moments.covariance()[0, 1]) == pytest.approx(400.0)


def test_scores_prices_and_adaptation_are_prepared_in_what_was_asked_for(monkeypatch):
    """Autocast is on in every pass that prepares, and weights come out in float32."""
    seen = set()
    forward = torch.nn.Module.__call__

    def watched(self, *arguments, **more):
        if type(self).__name__ == "GPT2Block":
            seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *arguments, **more)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    spec = ComparisonSpec(
        model_name="bundled", pruning_levels=(50,), pruning_methods=("entropy",), prepare_precision="bfloat16",
        calibration_tokens=512, eval_tokens=512, num_tokens=1, max_prompts=1, entropy_direction="low",
    )  # fmt: skip
    pruned = build(load_workspace(spec, prepare(spec)), Cell("agency", "entropy", 0, 50.0)).model
    assert pruned.dtype == torch.float32
    assert True in seen
    rounded = [p for p in pruned.parameters() if p.ndim == 2 and torch.equal(p, p.bfloat16().float())]
    assert not rounded


def test_streams_stay_where_the_model_is_while_they_fit(monkeypatch, model):
    """A GPU with 900 bytes free and 100 of those that torch holds unused: 40 % of 1,000."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert room_for_streams_bytes(torch.device("cuda")) == 400
    assert room_for_streams_bytes(torch.device("cpu")) == 256 * 2**20
    windows = torch.arange(64).view(4, 16)
    # 2 places in each of 3 layers, 64 tokens, 32 features, 4 bytes
    for room, file in ((2 * 3 * 64 * 32 * 4, False), (2 * 3 * 64 * 32 * 4 - 1, True)):
        monkeypatch.setattr(devices, "MOST_STREAM_BYTES", room)
        stream = DenseStream(tiny_gpt2(), windows, batch_size=2)
        assert (stream.scratch_bytes > 0) == file
        stream.close()


def test_runs_of_before_the_option_are_still_the_same_runs():
    settings = ComparisonSpec().as_dict()
    before = {key: value for key, value in settings.items() if key != "prepare_precision"}
    assert identity(before, {}, {}) == identity(settings, {}, {})
    assert identity({**settings, "prepare_precision": "bfloat16"}, {}, {}) != identity(settings, {}, {})
    assert ComparisonSpec.from_dict(before) == ComparisonSpec()
