"""Scores against direct computation, and selection's rules."""

from __future__ import annotations

import math

import pytest
import torch
from builders import tiny_gpt2
from hypothesis import given
from hypothesis import strategies as st

from pruning_comparison.errors import InputError
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.methods import method_named
from pruning_comparison.models import devices
from pruning_comparison.pruning.selection import expected_heads_pruned, heads_to_prune, select_heads
from pruning_comparison.pruning.surgery import mask_heads, remove_heads
from pruning_comparison.scoring import entropy as entropy_scores
from pruning_comparison.scoring.entropy import mean_attention_entropy, score_entropy
from pruning_comparison.scoring.weights import score_magnitude, score_random

WINDOWS = torch.randint(1, 97, (5, 16), generator=torch.Generator().manual_seed(2))


def test_entropy_equals_the_maps_that_transformers_returns(model):
    streamed = mean_attention_entropy(model, WINDOWS, batch_size=2)
    model.set_attn_implementation("eager")
    maps = torch.stack(model(WINDOWS, output_attentions=True).attentions)  # [L, N, H, T, T]
    entropy = -(maps * maps.clamp(min=1e-30).log()).sum(-1)[..., 1:]
    expected = (entropy / torch.arange(2, 17).log()).mean((1, 3))
    torch.testing.assert_close(streamed.float(), expected, rtol=1e-4, atol=1e-5)
    assert streamed.min() > 0
    assert streamed.max() <= 1


def test_entropy_of_uniform_attention_is_one(model):
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :64] = 0
        block.attn.c_attn.bias.data[:64] = 0
    torch.testing.assert_close(mean_attention_entropy(model, WINDOWS, batch_size=5), torch.ones(3, 4).double())


def test_entropy_leaves_the_model_as_it_was(model):
    before = model(WINDOWS).logits
    mean_attention_entropy(model, WINDOWS, batch_size=2)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(WINDOWS).logits, before)


@pytest.mark.parametrize("level", [10.0, 40.0])
def test_auto_direction_takes_the_cheaper_one(model, level):
    result = score_entropy(model, WINDOWS, batch_size=5, entropy_direction="auto", smallest_level=level, scope="model")
    losses = {}
    for direction in ("high", "low"):
        scores = score_entropy(
            model, WINDOWS, batch_size=5, entropy_direction=direction, smallest_level=level, scope="model"
        )
        with mask_heads(model, select_heads(scores.scores, level)):
            nats, tokens = window_losses(model, list(WINDOWS)[::2], batch_size=5)
        losses[direction] = float(nats.sum() / tokens.sum())
    assert result.details["entropy_direction"] == min(losses, key=losses.__getitem__)
    assert result.details["entropy_direction_losses_nats"] == pytest.approx(losses)


def test_direction_says_which_heads_leave_first(model):
    entropy = mean_attention_entropy(model, WINDOWS, batch_size=5)
    for direction, extreme in (("high", entropy.argmax()), ("low", entropy.argmin())):
        scores = score_entropy(
            model, WINDOWS, batch_size=5, entropy_direction=direction, smallest_level=10, scope="model"
        ).scores
        assert select_heads(scores, 100 / 12).flatten().logical_not().nonzero().item() == extreme


@pytest.fixture
def gains(monkeypatch):
    """As on a processor with units for bfloat16, with a model large enough to gain from them."""
    monkeypatch.setattr(devices, "gains_from_bfloat16", lambda model: True)


MANY = torch.randint(1, 97, (8, 16), generator=torch.Generator().manual_seed(3))


def test_entropies_are_rounded_where_ranks_agree(model, gains):
    exact = mean_attention_entropy(model, MANY, batch_size=4)
    found = score_entropy(model, MANY, batch_size=4, entropy_direction="low", smallest_level=10, scope="model")
    assert found.details["entropy_precision"] == "bfloat16"
    assert 0.99 <= found.details["entropy_precision_spearman"] <= 1
    assert not torch.equal(found.scores, exact)
    torch.testing.assert_close(found.scores, exact, rtol=0, atol=2e-3)


def test_entropies_are_not_rounded_where_ranks_disagree(model, gains, monkeypatch):
    monkeypatch.setattr(entropy_scores, "rank_agreement", lambda one, other: 0.98)
    found = score_entropy(model, MANY, batch_size=4, entropy_direction="low", smallest_level=10, scope="model")
    assert found.details["entropy_precision"] == "float32"
    assert torch.equal(found.scores, mean_attention_entropy(model, MANY, batch_size=4))


def test_entropies_of_few_windows_or_on_other_processors_are_not_rounded(model, gains, monkeypatch):
    def details(windows):
        asked = {"batch_size": 4, "entropy_direction": "low", "smallest_level": 10, "scope": "model"}
        return score_entropy(model, windows, **asked).details

    assert details(MANY[:7]) == {"entropy_direction": "low"}
    devices.prepare_in(model, "bfloat16")  # asked for: whoever calls has it done
    assert details(MANY) == {"entropy_direction": "low"}
    devices.prepare_in(model, "float32")
    assert details(MANY)["entropy_precision"] == "bfloat16"
    monkeypatch.setattr(devices, "gains_from_bfloat16", lambda model: False)
    assert details(MANY) == {"entropy_direction": "low"}


def test_ranks_agree_over_the_heads_that_a_pruned_model_has(model, gains, monkeypatch):
    """Lost heads are 0 in either precision, and would make any two orders look alike."""
    compared = []
    monkeypatch.setattr(entropy_scores, "rank_agreement", lambda *both: compared.append([len(one) for one in both]))
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[0, 1] = keep[1] = False
    pruned = remove_heads(model, keep)
    score_entropy(pruned, MANY, batch_size=4, entropy_direction="low", smallest_level=10, scope="model")
    assert compared == [[7, 7]]


def test_magnitude_by_hand():
    model = tiny_gpt2(layers=1, heads=2, width=4)
    attention = model.transformer.h[0].attn
    attention.c_attn.weight.data.zero_()
    attention.c_proj.weight.data.zero_()
    attention.c_attn.weight.data[0, 2] = 3.0  # query of head 1
    attention.c_attn.weight.data[1, 4] = 1.0  # key of head 0
    attention.c_attn.weight.data[3, 11] = 4.0  # value of head 1
    attention.c_proj.weight.data[1, 2] = 2.0  # output of head 0
    torch.testing.assert_close(score_magnitude(model), torch.tensor([[math.sqrt(1 + 4), 5.0]]).double())


def test_random_scores_repeat_under_a_seed(model):
    first = score_random(model, torch.Generator().manual_seed(5))
    assert first.shape == (3, 4)
    assert torch.equal(first, score_random(model, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, score_random(model, torch.Generator().manual_seed(6)))


def test_unknown_method_lists_the_known_ones_and_names_the_nearest():
    with pytest.raises(
        InputError, match=r"'entrpy' is unknown. Did you mean entropy\? Choose from entropy, random, magni"
    ):
        method_named("entrpy")


@given(st.integers(1, 12), st.integers(1, 16), st.floats(0, 99.99), st.integers(0, 10**6))
def test_selection_prunes_exactly_what_the_rule_says(layers, heads, level, seed):
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    keep = select_heads(scores, level)
    assert (
        int((~keep).sum())
        == round(level / 100 * layers * heads)
        == expected_heads_pruned(level, layers, heads, "model")
    )
    if keep.any() and not keep.all():
        assert scores[~keep].max() <= scores[keep].min()
    by_layer = select_heads(scores, level, "layer")
    assert ((~by_layer).sum(1) == round(level / 100 * heads)).all()
    assert int((~by_layer).sum()) == expected_heads_pruned(level, layers, heads, "layer")


@given(st.integers(0, 10**6), st.floats(0, 99), st.floats(0, 99))
def test_masks_of_rising_levels_are_nested(seed, one, other):
    scores = torch.randint(0, 4, (6, 8), generator=torch.Generator().manual_seed(seed)).float()
    small, large = (select_heads(scores, level) for level in sorted((one, other)))
    assert (large <= small).all()


@pytest.mark.parametrize("level", [-1, 100, 250])
def test_levels_outside_the_range_are_refused(level):
    with pytest.raises(ValueError, match="below 100"):
        heads_to_prune(level, 48)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        select_heads(torch.tensor([[1.0, float("nan")]]), 50)
    with pytest.raises(ValueError, match="unknown scope"):
        select_heads(torch.rand(2, 2), 50, "planet")


def test_key_value_groups_leave_as_a_whole_by_hand():
    """Groups of two: sums 3, 7 and 11 in the first layer, 2, 9 and 10 in the second."""
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6], [1, 1, 4, 5, 9, 1]])
    keep = select_heads(scores, 40, group_size=2)  # round(0.4 * 6 groups) = 2 groups: sums 2 and 3
    assert keep.tolist() == [[False, False, True, True, True, True]] * 2
    further = select_heads(-scores, 50, gone=~keep, group_size=2)  # of what is left, the largest sum goes: 11
    assert further.tolist() == [[False, False, True, True, False, False], [False, False, True, True, True, True]]
    by_layer = select_heads(scores, 34, "layer", group_size=2)
    assert by_layer.tolist() == keep.tolist()
    assert expected_heads_pruned(40, 2, 6, "model", 2) == 4
    assert expected_heads_pruned(34, 2, 6, "layer", 2) == 4
    with pytest.raises(ValueError, match="a part of a group"):
        select_heads(scores, 50, gone=scores == 2, group_size=2)
