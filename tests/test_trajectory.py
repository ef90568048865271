"""Progressive pruning against the plain loop it stands for, and what has to hold for any scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import save_tiny_model, tiny_gpt2, write_short_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.agency.trajectory import ProgressiveTrajectory
from pruning_comparison.comparison import build, load_workspace, prepare
from pruning_comparison.pruning import mask_heads
from pruning_comparison.scoring import HeadScores, score_fisher
from pruning_comparison.selection import heads_to_prune, select_heads
from pruning_comparison.spec import Cell, ComparisonSpec

LAYERS, HEADS = 3, 4
WINDOWS = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(5))
ALL = torch.ones(LAYERS, HEADS, dtype=torch.bool)


def fisher(model):
    return score_fisher(model, WINDOWS, batch_size=3, precision="float32")


@pytest.mark.parametrize("level", [0, 10, 30, 50, 55, 80])
def test_heads_leave_in_rounds_and_are_scored_anew_on_what_is_left(level):
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    keep = ALL.clone()
    for target in [*range(10, level + 1, 10), *([level] if level % 10 else [])]:
        gates = mask_heads(model, keep)
        scores = fisher(model).scores
        gates.remove()
        live = [(scores[place].item(), place) for place in map(tuple, keep.nonzero().tolist())]
        wanted = round(target / 100 * keep.numel()) - int((~keep).sum())
        for _, place in sorted(live)[:wanted]:
            keep[place] = False
    reached = ProgressiveTrajectory(model, score=fisher, all_heads=ALL, scope="model").at(level)
    assert torch.equal(reached.keep, keep)
    with mask_heads(model, keep):
        expected = model(WINDOWS).logits
    torch.testing.assert_close(reached.model(WINDOWS).logits, expected, rtol=1e-4, atol=1e-4)


def test_scoring_anew_matters():
    """Otherwise the test above would pass without it."""
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    trajectory = ProgressiveTrajectory(model, score=fisher, all_heads=ALL, scope="model")
    scores = fisher(model).scores
    assert any(not torch.equal(trajectory.at(level).keep, select_heads(scores, level)) for level in (30, 55, 80))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 95), min_size=1, max_size=5), st.sampled_from(["model", "layer"]), st.integers(0, 99))
def test_a_level_means_the_same_whatever_else_was_asked_for(levels, scope, seed):
    model = tiny_gpt2(layers=2, heads=6, width=12)

    def score(pruned):
        seen = int(pruned.transformer.h[0].attn.c_proj._forward_pre_hooks != {})
        return HeadScores(torch.rand(2, 6, generator=torch.Generator().manual_seed(seed + seen)), {})

    def trajectory():
        return ProgressiveTrajectory(model, score=score, all_heads=torch.ones(2, 6, dtype=torch.bool), scope=scope)

    together = trajectory()
    for level in levels:
        reached = together.at(level)
        assert torch.equal(reached.keep, trajectory().at(level).keep)
        total = 2 * heads_to_prune(level, 6) if scope == "layer" else heads_to_prune(level, 12)
        assert int((~reached.keep).sum()) == total
    rising = [trajectory().at(level).keep for level in range(0, 100, 10)]
    assert all(bool((later <= sooner).all()) for sooner, later in itertools.pairwise(rising))


def test_the_variant_is_the_baseline_where_scores_do_not_change(tmp_path):
    spec = ComparisonSpec(
        model_name=str(save_tiny_model(tmp_path)),
        variants=("baseline", "baseline-progressive"),
        pruning_levels=(0, 35, 70),
        pruning_methods=("random", "magnitude", "taylor"),
        max_prompts=1,
        num_tokens=4,
        eval_tokens=500,
        calibration_tokens=256,
        calibration_window=64,
        **write_short_texts(tmp_path / "texts"),
    )
    workspace = load_workspace(spec, prepare(spec))
    for method, same in (("random", True), ("magnitude", True), ("taylor", False)):
        for level in (0.0, 35.0, 70.0):
            plain, rounds = (
                build(workspace, Cell(name, method, 0, level)) for name in ("baseline", "baseline-progressive")
            )
            assert int(plain.keep.sum()) == int(rounds.keep.sum())
            if same or level == 0:
                assert torch.equal(plain.keep, rounds.keep)
                assert plain.fingerprint == rounds.fingerprint
