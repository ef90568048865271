"""Progressive pruning against the plain loop it stands for, and what has to hold for any scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from builders import save_tiny_model, tiny_gpt2, tiny_model, write_short_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.agency import NegotiatedTrajectory, ProgressiveTrajectory
from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices, measure_prices, score_obs
from pruning_comparison.agency.signals import measure_signals
from pruning_comparison.models.heads import head_grid, live_heads
from pruning_comparison.pruning.selection import heads_to_prune, select_heads
from pruning_comparison.pruning.surgery import mask_heads
from pruning_comparison.run import workspace as workspaces
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.scoring.entropy import mean_attention_entropy
from pruning_comparison.scoring.gradients import score_fisher
from pruning_comparison.scoring.prices import RIDGE, Prices
from pruning_comparison.scoring.scores import HeadScores, score_heads
from pruning_comparison.spec import Cell, ComparisonSpec

LAYERS, HEADS = 3, 4
WINDOWS = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(5))
ALL = torch.ones(LAYERS, HEADS, dtype=torch.bool)


def fisher(model):
    return score_fisher(model, WINDOWS, batch_size=3, gradient_precision="float32")


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


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3 with windows", "opt with norms after"])
@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_chooses_the_same_heads_on_the_pruned_model_as_on_the_masked_one(family, sign):
    model = tiny_model(family, layers=LAYERS)
    seen = []

    def score(scored):
        seen.append(sum(live_heads(scored)))
        return HeadScores(sign * mean_attention_entropy(scored, WINDOWS, batch_size=3), {})

    every = head_grid(model.config).all_heads()
    masked, pruned = (
        ProgressiveTrajectory(model, score=score, all_heads=every, scope="model", scores_pruned=scores_pruned)
        for scores_pruned in (False, True)
    )
    for level in (10, 30, 45, 60, 90):
        one, other = masked.at(level), pruned.at(level)
        assert torch.equal(one.keep, other.keep)
        live = one.scores.scores[one.keep]
        torch.testing.assert_close(other.scores.scores[other.keep], live, rtol=1e-5, atol=1e-6)
    assert len(seen) == 2 * 11  # 10 to 90, and 45
    assert set(seen[1:]) - {every.numel()} == {every.numel() - heads_to_prune(level, 18) for level in range(10, 90, 10)}
    assert seen.count(every.numel()) == 13  # all 11 of one; of the other those before anything has left: 2


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
    alone = trajectory()
    rising = [alone.at(level).keep for level in range(0, 100, 10)]
    assert all(bool((later <= sooner).all()) for sooner, later in itertools.pairwise(rising))


def negotiated(model, *, scores=None, prices=None, scope="model", **others):
    moments = observe(model, WINDOWS, keep=ALL, batch_size=3)
    prices = prices or Prices.of(layer_prices(model, moments), [1.0, 0.5, 2.0], HEADS)
    return NegotiatedTrajectory(scores or fisher(model), prices, moments=moments, scope=scope, **others)


@pytest.mark.parametrize("level", [0, 30, 55, 80])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_where_all_consent_the_methods_heads_leave(level, scope):
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    asked = negotiated(model, everyone_consents=True, scope=scope).at(level)
    assert torch.equal(asked.keep, select_heads(fisher(model).scores, level, scope))
    assert all(reply.answer == "consented" for round_record in asked.round_records for reply in round_record.replies)


def test_consent_chooses_other_heads_than_the_method_does():
    """Otherwise the test above would pass whatever is asked."""
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    assert any(
        not torch.equal(negotiated(model).at(level).keep, select_heads(fisher(model).scores, level))
        for level in (30, 50, 70)
    )


@pytest.mark.parametrize("seed", range(5))
def test_consent_changes_nothing_where_heads_are_asked_in_the_order_of_their_prices(seed):
    """Who is asked next is then the cheapest of all, and if it refuses so do the others, and it is overridden."""
    model = tiny_gpt2(layers=LAYERS, heads=HEADS, seed=seed)
    prices = measure_prices(model, WINDOWS, batch_size=3)
    scores = score_obs(model, WINDOWS, batch_size=3, prices=lambda: prices)
    for level in (10, 30, 50, 55, 70, 90):
        reached = negotiated(model, scores=scores, prices=prices).at(level)
        assert torch.equal(reached.keep, select_heads(scores.scores, level))


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_negotiated_level_means_the_same_whatever_else_was_asked_for(scope):
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    together = negotiated(model, scope=scope)
    kept = []
    for level in (20, 35, 55, 80, 50):
        reached = together.at(level)
        assert torch.equal(reached.keep, negotiated(model, scope=scope).at(level).keep)
        total = LAYERS * heads_to_prune(level, HEADS) if scope == "layer" else heads_to_prune(level, LAYERS * HEADS)
        assert int((~reached.keep).sum()) == total
        # A level off the grid branches off from the last round before it.
        rounds = [*range(10, level, 10), level]
        assert [round_record.level for round_record in reached.round_records] == rounds
        replies = [reply for round_record in reached.round_records for reply in round_record.replies]
        lost = [(reply.layer, reply.head) for reply in replies if reply.left is not None]
        assert len(set(lost)) == len(lost) == total
        assert sorted(lost) == [tuple(place) for place in (~reached.keep).nonzero().tolist()]
        kept.append(reached.keep)
    assert all(bool((kept[later] <= kept[sooner]).all()) for sooner, later in ((0, 1), (0, 4), (4, 3)))


def test_what_is_paid_in_all_rounds_is_what_the_heads_cost_together():
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    prices = measure_prices(model, WINDOWS, batch_size=3)
    reached = negotiated(model, prices=prices).at(75)
    paid = sum(
        reply.left_cost for record in reached.round_records for reply in record.replies if reply.left is not None
    )
    assert paid == pytest.approx(prices.total(~reached.keep), rel=1e-6)


def test_signals_before_a_round_are_those_of_the_heads_that_are_left_as_prices_see_them():
    """By hand for one layer: the survivors' part of the dense moments, with the weights that least squares gives them."""
    model = tiny_gpt2(layers=LAYERS, heads=HEADS)
    moments = observe(model, WINDOWS, keep=ALL, batch_size=3)
    prices = Prices.of(layer_prices(model, moments), None, HEADS)
    first, second = negotiated(model, prices=prices).at(20).round_records
    plain = measure_signals(moments, prices, ridge=RIDGE)
    torch.testing.assert_close(first.signals.contribution, plain.contribution)
    assert first.signals.importance.isnan().all()
    gone = [(reply.layer, reply.head) for reply in first.replies if reply.left is not None]
    assert len(gone) == 1
    layer, head = gone[0]
    assert second.signals.contribution.isnan().nonzero().tolist() == [[layer, head]]
    assert second.states[layer][head] == "withdrawn"
    seen = moments.moments[layer]
    left = [other for other in range(HEADS) if other != head]
    rows = torch.cat([torch.arange(other * 8, other * 8 + 8) for other in left])
    weight = prices.layers[layer].withdraw(head).weight
    gram = seen.covariance()[rows][:, rows]
    parts = [slice(8 * place, 8 * place + 8) for place in range(3)]
    energy = [float((gram[part, part] * (weight[part] @ weight[part].T)).sum()) for part in parts]
    assert second.signals.contribution[layer, left].tolist() == pytest.approx([e / sum(energy) for e in energy])


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


def test_only_methods_that_can_score_a_pruned_model_do(tmp_path, monkeypatch):
    """On the path of the progressive baseline. Where heads are asked, they are scored once, on the dense model."""
    spec = ComparisonSpec(
        model_name=str(save_tiny_model(tmp_path)),
        variants=("baseline-progressive", "agency"),
        pruning_levels=(0, 35),
        pruning_methods=("entropy", "obs", "fisher"),
        max_prompts=1,
        num_tokens=4,
        eval_tokens=500,
        calibration_tokens=256,
        calibration_window=64,
        **write_short_texts(tmp_path / "texts"),
    )
    workspace = load_workspace(spec, prepare(spec))
    heads: dict[tuple[str, str], set[int]] = {}

    def watch(method, model, *arguments, **settings):
        heads.setdefault((variant, method.name), set()).add(sum(live_heads(model)))
        return score_heads(method, model, *arguments, **settings)

    monkeypatch.setattr(workspaces, "score_heads", watch)
    for variant in spec.variants:
        workspace._rankings.clear()
        for method in spec.pruning_methods:
            build(workspace, Cell(variant, method, 0, 35.0))
    left = {8, 7, 6}  # of 2 layers of 4, before the rounds to 10, 20, 30 and 35 per cent: 8, 7, 6, 6
    assert heads == {
        ("baseline-progressive", "entropy"): left,
        ("baseline-progressive", "obs"): left,
        ("baseline-progressive", "fisher"): {8},
        ("agency", "entropy"): {8},
        ("agency", "obs"): {8},
        ("agency", "fisher"): {8},
    }
