"""Taylor, Fisher and ablation against finite differences and models cut by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref

import pytest
import torch
from builders import tiny_gpt2, tiny_model

from pruning_comparison.methods import METHODS
from pruning_comparison.models import devices
from pruning_comparison.models.heads import blocks
from pruning_comparison.pruning.surgery import mask_heads, remove_heads
from pruning_comparison.scoring import gradients as scoring
from pruning_comparison.scoring.ablation import score_ablation
from pruning_comparison.scoring.gradients import gate_gradients, rank_agreement, score_fisher, score_taylor
from pruning_comparison.scoring.scores import ScoreSettings, score_heads

LAYERS, HEADS, HEAD_SIZE = 3, 4, 8
WINDOWS = torch.randint(1, 97, (5, 16), generator=torch.Generator().manual_seed(2))
SCORES = {
    "taylor": lambda model, windows, **options: score_taylor(model, windows, batch_size=2, **options).scores,
    "fisher": lambda model, windows, **options: score_fisher(model, windows, batch_size=2, **options).scores,
    "ablation": lambda model, windows: score_ablation(model, windows, batch_size=2),
}


def output_rows(model, layer, head):
    """The rows of a layer's output projection that read one head: scaling them is what its gate does."""
    return model.transformer.h[layer].attn.c_proj.weight.data[head * HEAD_SIZE : (head + 1) * HEAD_SIZE]


def all_heads():
    return [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@torch.no_grad()
def sequence_losses(model):
    """Summed negative log-likelihood of every window, [N], written out."""
    log_probabilities = model(WINDOWS).logits.log_softmax(-1)
    return torch.stack(
        [
            -sum(log_probabilities[n, t, ids[t + 1]] for t in range(len(ids) - 1))
            for n, ids in enumerate(WINDOWS.tolist())
        ]
    )


def finite_differences(model, step=1e-5):
    """Central differences of every window's loss in every gate, [N, L, H]."""
    slopes = torch.zeros(len(WINDOWS), LAYERS, HEADS, dtype=torch.float64)
    for layer, head in all_heads():
        losses = []
        for gate in (1 + step, 1 - step):
            moved = copy.deepcopy(model)
            output_rows(moved, layer, head).mul_(gate)
            losses.append(sequence_losses(moved))
        slopes[:, layer, head] = (losses[0] - losses[1]) / (2 * step)
    return slopes


@pytest.fixture(scope="module")
def slopes():
    return finite_differences(tiny_gpt2().double())


@pytest.fixture
def separated():
    """Heads whose influence falls by a factor of three from one to the next, in an order that is not theirs."""
    model = tiny_gpt2()
    order = torch.randperm(LAYERS * HEADS, generator=torch.Generator().manual_seed(4)).tolist()
    for (layer, head), rank in zip(all_heads(), order, strict=True):
        output_rows(model, layer, head).mul_(3.0 ** -(rank - 4))
    return model


@pytest.fixture
def eager_for_bfloat16(monkeypatch):
    """A machine and a model for which the automatic choice tries bfloat16 from two windows on."""
    monkeypatch.setattr(devices, "has_bfloat16_matrix_units", lambda device: True)
    monkeypatch.setattr(devices, "LEAST_PARAMETERS_FOR_BFLOAT16", 1)
    monkeypatch.setattr(scoring, "_LEAST_WINDOWS_FOR_BFLOAT16", 2)


def test_gradients_of_every_sequence_and_gate_equal_finite_differences(model, slopes):
    gradients = list(gate_gradients(model.double(), WINDOWS, batch_size=2))
    assert [batch.shape for batch in gradients] == [(2, LAYERS, HEADS), (2, LAYERS, HEADS), (1, LAYERS, HEADS)]
    torch.testing.assert_close(torch.cat(gradients), slopes, rtol=1e-6, atol=1e-7)


def test_taylor_sums_magnitudes_and_fisher_sums_squares_over_the_sequences(model, slopes):
    model.double()
    assert (slopes.sum(0).abs() < 0.9 * slopes.abs().sum(0)).any(), "no head's gradients differ in sign"
    torch.testing.assert_close(SCORES["taylor"](model, WINDOWS), slopes.abs().sum(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(SCORES["fisher"](model, WINDOWS), (slopes**2).sum(0), rtol=1e-6, atol=1e-7)


def test_float32_comes_close_to_finite_differences(model, slopes):
    torch.testing.assert_close(SCORES["taylor"](model, WINDOWS), slopes.abs().sum(0), rtol=1e-3, atol=1e-3)


def test_ablation_is_what_losing_the_head_costs(model):
    model.double()
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for layer, head in all_heads():
        cut = copy.deepcopy(model)
        output_rows(cut, layer, head).zero_()
        expected[layer, head] = cut(WINDOWS, labels=WINDOWS).loss - model(WINDOWS, labels=WINDOWS).loss
    assert expected.min() < 0 < expected.max()
    # Losses are taken in float32, whatever the model's precision.
    torch.testing.assert_close(SCORES["ablation"](model, WINDOWS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt with norms after"])
def test_ablation_that_starts_from_recorded_blocks_is_the_whole_models(family):
    model = tiny_model(family)
    gone = torch.ones(3, 6, dtype=torch.bool)
    gone[1, 2] = False

    def loss(keep):
        with mask_heads(model, keep):
            return model(WINDOWS, labels=WINDOWS).loss

    with mask_heads(model, gone):
        scores = score_ablation(model, WINDOWS, batch_size=3)
    assert scores[1, 2] == 0
    for layer, head in [(0, 0), (1, 1), (2, 5)]:
        keep = gone.clone()
        keep[layer, head] = False
        torch.testing.assert_close(scores[layer, head], (loss(keep) - loss(gone)).double(), rtol=1e-4, atol=1e-5)
    # Nothing is left behind.
    assert all("forward" not in vars(block) for block in blocks(model))


def test_ablation_does_not_try_heads_that_write_nothing(model, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "pruning_comparison.scoring.ablation.mask_heads", lambda model, keep: tried.append(1) or mask_heads(model, keep)
    )
    gone = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    gone[0] = False
    with mask_heads(model, gone):
        score_ablation(model, WINDOWS, batch_size=len(WINDOWS))
    assert len(tried) == (LAYERS - 1) * HEADS


@pytest.mark.parametrize("method", SCORES)
def test_a_head_that_writes_nothing_scores_exactly_zero(model, method):
    output_rows(model, 1, 2).zero_()
    scores = SCORES[method](model, WINDOWS)
    assert (scores == 0).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("score", [score_taylor, score_fisher])
def test_batches_do_not_change_scores(model, score):
    one, other = (score(model.double(), WINDOWS, batch_size=size).scores for size in (1, 5))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["taylor", "fisher", "ablation"])
def test_score_heads_knows_the_method(model, method):
    def scored(batch_size):
        return score_heads(METHODS[method], model, WINDOWS, ScoreSettings(batch_size=batch_size))

    torch.testing.assert_close(scored(2).scores, SCORES[method](model, WINDOWS), rtol=0, atol=0)
    assert scored(2).scores.dtype == torch.float64
    assert method in METHODS
    named = {} if method == "ablation" else {"gradient_precision": "float32", "gradient_precision_spearman": None}
    assert scored(2).details == named


def test_the_models_state_is_left_alone(model):
    before = model(WINDOWS).logits
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            stream = gate_gradients(model, WINDOWS, batch_size=2)
            next(stream)
            assert torch.is_grad_enabled() == grad_mode
            assert torch.equal(model(WINDOWS).logits, before), "gates are left between batches"
            stream.close()
    for method in SCORES:
        SCORES[method](model, WINDOWS)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(WINDOWS).logits, before)
    assert model.config._attn_implementation == "sdpa"


def test_gates_go_when_the_model_fails(model):
    with pytest.raises(IndexError):
        next(gate_gradients(model, torch.full((1, 8), 10_000), batch_size=1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_parameters_that_require_gradients_get_none(model):
    expected = SCORES["fisher"](model, WINDOWS)
    model.requires_grad_(True)
    torch.testing.assert_close(SCORES["fisher"](model, WINDOWS), expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_callers_in_inference_mode_get_gradients_too(model, trainable):
    model.requires_grad_(trainable)
    expected = torch.cat(list(gate_gradients(model, WINDOWS, batch_size=2)))
    with torch.inference_mode():
        assert torch.equal(torch.cat(list(gate_gradients(model, WINDOWS.clone(), batch_size=2))), expected)
        assert torch.is_inference_mode_enabled()


def test_a_batch_leaves_nothing_of_the_one_before(model, monkeypatch):
    seen, alive = [], []
    differentiate = torch.autograd.grad

    def watch(loss, gates):
        alive.append(sum(reference() is not None for reference in seen))
        seen.extend(weakref.ref(tensor) for tensor in (loss, *gates))
        return differentiate(loss, gates)

    monkeypatch.setattr(torch.autograd, "grad", watch)
    handle = model.lm_head.register_forward_hook(lambda m, inputs, logits: seen.append(weakref.ref(logits)))
    score_fisher(model, WINDOWS, batch_size=1)
    handle.remove()
    # Each call sees its own logits alive and nothing else; with a graph left over it would see six tensors more.
    assert alive == [1, 1, 1, 1, 1]
    assert len(seen) == 5 * (1 + 1 + LAYERS)


@pytest.mark.parametrize("gone", [[(0, 1)], [(2, head) for head in range(HEADS)]])
def test_physically_pruned_models_are_refused(model, gone):
    keep = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    for layer, head in gone:
        keep[layer, head] = False
    with pytest.raises(ValueError, match="pruned physically"):
        next(gate_gradients(remove_heads(model, keep), WINDOWS, batch_size=2))


def test_closed_gates_score_zero(model):
    keep = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    keep[0, 3] = False
    with mask_heads(model, keep):
        scores = SCORES["fisher"](model, WINDOWS)
    assert (scores == 0).nonzero().tolist() == [[0, 3]]
    assert not torch.allclose(scores[keep], SCORES["fisher"](model, WINDOWS)[keep], rtol=1e-3)


@pytest.mark.parametrize("score", [score_taylor, score_fisher])
def test_bfloat16_gradients_are_used_where_the_ranks_agree(separated, score):
    exact = score(separated, WINDOWS, batch_size=2, gradient_precision="float32")
    fast = score(separated, WINDOWS, batch_size=2, gradient_precision="bfloat16")
    assert exact.details == {"gradient_precision": "float32", "gradient_precision_spearman": None}
    assert fast.details["gradient_precision"] == "bfloat16"
    assert fast.details["gradient_precision_spearman"] >= 0.99
    assert not torch.equal(fast.scores, exact.scores)
    torch.testing.assert_close(fast.scores, exact.scores, rtol=0.2, atol=1e-3)
    assert separated.dtype == torch.float32


def test_gradients_of_bfloat16_models_are_summed_in_float32(model):
    differences = next(gate_gradients(model.bfloat16(), WINDOWS, batch_size=5))
    assert not torch.equal(differences, differences.bfloat16().double())


def test_ranks_that_disagree_fall_back_to_the_models_own_precision(model, monkeypatch):
    exact = score_taylor(model, WINDOWS, batch_size=2, gradient_precision="float32")
    monkeypatch.setattr(scoring, "converted_copy", lambda model, dtype: tiny_gpt2(seed=1).bfloat16())
    result = score_taylor(model, WINDOWS, batch_size=2, gradient_precision="bfloat16")
    assert torch.equal(result.scores, exact.scores)
    assert result.details["gradient_precision"] == "float32"
    assert -1 <= result.details["gradient_precision_spearman"] < 0.99


@pytest.mark.parametrize(("agreement", "precision"), [(0.99, "bfloat16"), (0.9899, "float32"), (None, "float32")])
def test_the_limit_of_agreement(model, monkeypatch, agreement, precision):
    monkeypatch.setattr(scoring, "rank_agreement", lambda one, other: agreement)
    details = score_fisher(model, WINDOWS, batch_size=2, gradient_precision="bfloat16").details
    assert details == {"gradient_precision": precision, "gradient_precision_spearman": agreement}


def test_only_the_first_eight_windows_are_compared(model, monkeypatch):
    seen = []
    monkeypatch.setattr(scoring, "rank_agreement", lambda one, other: seen.append((one, other)))
    windows = WINDOWS.repeat(2, 1)
    score_fisher(model, windows, batch_size=3, gradient_precision="bfloat16")
    (one, other), *rest = seen
    assert not rest
    assert torch.equal(one, score_fisher(model, windows[:8], batch_size=3, gradient_precision="float32").scores)
    assert not torch.equal(one, other)


def test_rank_agreement_by_hand():
    # Ranks 1 2 3 4 5 against 1 2 3 5 4: 1 - 6 * (1 + 1) / (5 * 24) = 0.9.
    one, other = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[1.0, 4, 9, 25, 16]])
    assert rank_agreement(one, other) == pytest.approx(0.9)
    assert rank_agreement(one, torch.zeros(1, 5)) is None
    assert rank_agreement(one, torch.tensor([[1.0, 2, 3, 4, float("nan")]])) is None
    assert rank_agreement(one, torch.tensor([[1.0, 2, 3, 4, float("inf")]])) is None


@pytest.mark.usefixtures("eager_for_bfloat16")
def test_auto_tries_bfloat16_only_where_it_pays(separated, monkeypatch):
    def chosen(model, windows=WINDOWS):
        return score_taylor(model, windows, batch_size=2).details["gradient_precision"]

    assert chosen(separated) == "bfloat16"
    assert chosen(separated, WINDOWS[:1]) == "float32"
    assert chosen(copy.deepcopy(separated).double()) == "float64"
    with monkeypatch.context() as patch:
        patch.setattr(devices, "LEAST_PARAMETERS_FOR_BFLOAT16", 10**6)
        assert chosen(separated) == "float32"
    monkeypatch.setattr(devices, "has_bfloat16_matrix_units", lambda device: False)
    assert chosen(separated) == "float32"


def test_unknown_gradient_precision_lists_the_known_ones(model):
    with pytest.raises(ValueError, match="'float8'; choose one of auto, float32, bfloat16"):
        score_taylor(model, WINDOWS, batch_size=2, gradient_precision="float8")


def test_the_bfloat16_copy_keeps_buffers_and_tied_weights(model):
    model.register_buffer("frequencies", torch.tensor([1 / 3]))
    rounded = scoring.converted_copy(model, torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert torch.equal(rounded.frequencies, torch.tensor([1 / 3]))
    assert rounded.lm_head.weight is rounded.transformer.wte.weight
    assert not any(parameter.requires_grad for parameter in rounded.parameters())
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "there"),
    [
        ({"avx512_bf16": True, "avx2": True}, True),
        ({"amx_bf16": True, "l1d_cache_size": 32768}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, False),
        ({"neon": True, "architecture": "arm64"}, False),
    ],
)
def test_processors_with_bfloat16_instructions(monkeypatch, tmp_path, features, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert devices.has_bfloat16_matrix_units("cpu") == there
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    listing = tmp_path / "cpuinfo"
    listing.write_text("flags\t\t: " + " ".join(name for name, value in features.items() if value is True) + "\n")
    monkeypatch.setattr(devices, "Path", lambda path: {"/proc/cpuinfo": listing}[path])
    assert devices.has_bfloat16_matrix_units(torch.device("cpu")) == there
    listing.unlink()
    assert not devices.has_bfloat16_matrix_units("cpu")


@pytest.mark.parametrize(("capability", "there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_with_bfloat16_units(monkeypatch, capability, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_bfloat16_matrix_units("cuda:1") == there
    assert not devices.has_bfloat16_matrix_units("mps")


def test_the_names_of_methods_cost_no_torch():
    code = "import sys, pruning_comparison.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
