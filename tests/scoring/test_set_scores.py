"""Activation-weighted magnitude, fluctuation, and the two Fisher searches against slow and obvious computations."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from builders import tiny_gpt2, tiny_model

from pruning_comparison.methods import METHODS
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import mask_heads, remove_heads
from pruning_comparison.scoring.activations import score_flap, score_wanda
from pruning_comparison.scoring.gradients import gate_gradients, score_fisher, score_llm_pruner
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.scoring.set_scores import elimination_order, score_fisher_greedy, score_fisher_interactions

LAYERS, HEADS, HEAD_SIZE = 3, 4, 8
WINDOWS = torch.randint(1, 97, (5, 16), generator=torch.Generator().manual_seed(2))
NEW = ("wanda", "flap", "llm-pruner", "fisher-interactions", "fisher-greedy")


def scored(method, model):
    return score_heads(METHODS[method], model, WINDOWS, ScoreSettings(batch_size=2)).scores


def head_outputs(model):
    """What each head hands on, from attention maps and values written out: [L, tokens, H, D]."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    output = model(WINDOWS, output_attentions=True, output_hidden_states=True)
    layers = []
    for block, maps, hidden in zip(model.transformer.h, output.attentions, output.hidden_states, strict=False):
        values = block.attn.c_attn(block.ln_1(hidden))[..., 2 * HEADS * HEAD_SIZE :].unflatten(-1, (HEADS, HEAD_SIZE))
        layers.append(torch.einsum("bhts,bshd->bthd", maps, values).flatten(0, 1))
    return torch.stack(layers).double().numpy()


def output_rows(model, layer, head):
    return model.transformer.h[layer].attn.c_proj.weight[head * HEAD_SIZE : (head + 1) * HEAD_SIZE].double().numpy()


def test_wanda_sums_weight_times_input_over_a_heads_slice(model):
    outputs = head_outputs(model)
    expected = np.zeros((LAYERS, HEADS))
    for layer in range(LAYERS):
        for head in range(HEADS):
            for feature, row in enumerate(output_rows(model, layer, head)):
                norm = math.sqrt(np.mean(outputs[layer, :, head, feature] ** 2))
                expected[layer, head] += sum(abs(weight) * norm for weight in row)
    np.testing.assert_allclose(score_wanda(model, WINDOWS, batch_size=2).numpy(), expected, rtol=1e-4)


def test_flap_squares_and_standardises_features_and_then_takes_the_mean_of_a_head(model):
    outputs = head_outputs(model)
    metric = np.array(
        [
            [
                [
                    (np.var(outputs[layer, :, head, feature], ddof=1) * sum(row**2)) ** 2
                    for feature, row in enumerate(output_rows(model, layer, head))
                ]
                for head in range(HEADS)
            ]
            for layer in range(LAYERS)
        ]
    )
    by_layer = metric.reshape(LAYERS, -1)
    deviation = by_layer.std(1, ddof=1)[:, None, None]
    expected = ((metric - by_layer.mean(1)[:, None, None]) / deviation).mean(2)
    np.testing.assert_allclose(score_flap(model, WINDOWS, batch_size=2).numpy(), expected, rtol=1e-3, atol=1e-3)


def terms_of(model, loss_windows=WINDOWS):
    """|w * dLoss/dw| of every parameter by its name, the loss written out."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    log_probabilities = model(loss_windows).logits.log_softmax(-1)
    loss = -sum(log_probabilities[n, t, ids[t + 1]] for n, ids in enumerate(loss_windows) for t in range(len(ids) - 1))
    loss.backward()
    found = {name: (p.detach() * p.grad).abs() for name, p in model.named_parameters()}
    model.zero_grad()
    model.requires_grad_(False)
    return found


def ranked_within_layers(importance):
    """Rank within the layer over the number of heads."""
    return np.array([[sum(other < one for other in row) / len(row) for one in row] for row in importance])


def test_llm_pruner_sums_first_order_terms_of_all_weights_of_a_head():
    """Seven layers: round(7 * 4 / 32) = 1 first and at least one last are protected. GPT-2 keeps q, k and v fused."""
    model = tiny_gpt2(layers=7).double()
    terms = terms_of(model)
    importance = np.zeros((7, HEADS))
    for layer in range(7):
        fused, output = (terms[f"transformer.h.{layer}.attn.{part}.weight"] for part in ("c_attn", "c_proj"))
        for head in range(HEADS):
            own = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            importance[layer, head] = output[own].sum() + sum(part[:, own].sum() for part in fused.chunk(3, 1))
    expected = ranked_within_layers(importance)
    expected[[0, -1]] += 1
    np.testing.assert_allclose(score_llm_pruner(model, WINDOWS, batch_size=2), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert select_heads(score_llm_pruner(model, WINDOWS, batch_size=2), 60)[[0, -1]].all()


def test_llm_pruner_counts_shared_keys_and_values_for_every_head_that_reads_them():
    model = tiny_model("llama", layers=4).double()
    terms = terms_of(model)
    heads, size, group = 6, model.config.head_dim, 6 // model.config.num_key_value_heads
    importance = np.zeros((4, heads))
    for layer in range(4):
        query, key, value, output = (terms[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkvo")
        for head in range(heads):
            own, shared = (slice(h * size, (h + 1) * size) for h in (head, head // group))
            importance[layer, head] = query[own].sum() + output[:, own].sum() + key[shared].sum() + value[shared].sum()
    expected = ranked_within_layers(importance)
    expected[[0, -1]] += 1
    assert group == 3
    np.testing.assert_allclose(score_llm_pruner(model, WINDOWS, batch_size=5), expected)


def test_a_head_that_always_says_the_same_leaves_first_by_flap_and_not_by_wanda(model):
    """Values that are their bias alone: attention, which sums to one, hands that on at every token."""
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, 2 * HEADS * HEAD_SIZE : 2 * HEADS * HEAD_SIZE + HEAD_SIZE] = 0
        block.attn.c_attn.bias.data[2 * HEADS * HEAD_SIZE : 2 * HEADS * HEAD_SIZE + HEAD_SIZE] = 9.0
    flap, wanda = (score(model.double(), WINDOWS, batch_size=2) for score in (score_flap, score_wanda))
    assert (flap[:, 0] < flap[:, 1:].min(1).values).all()
    assert (wanda[:, 0] > wanda[:, 1:].max(1).values).all()


def test_interactions_by_hand():
    """Closing both heads of the first layer costs 1 + 2 - 2 * 1.4 = 0.2, less than closing the first alone."""
    fisher = torch.tensor([[[1.0, -1.4], [-1.4, 2.0]], [[1.5, 0.0], [0.0, 1.8]]], dtype=torch.float64)
    assert elimination_order(fisher).tolist() == [[0, 1], [2, 3]]
    without = torch.diag_embed(fisher.diagonal(dim1=1, dim2=2))
    assert elimination_order(without).tolist() == [[0, 3], [1, 2]]
    fisher[0, 0, 1] = math.nan
    assert elimination_order(fisher).isnan().all()


def test_the_search_takes_out_what_raises_the_cost_of_the_whole_set_least(model):
    model.double()
    gradients = torch.cat(list(gate_gradients(model, WINDOWS, batch_size=5)))

    def cost(gone):
        return sum(
            float(sum(gradients[:, layer, head] for at, head in gone if at == layer).square().sum())
            for layer in {layer for layer, _ in gone}
        )

    left = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    gone, expected = [], torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    while left:
        costs = [cost([*gone, head]) for head in left]
        gone.append(left.pop(costs.index(min(costs))))
        expected[gone[-1]] = len(gone) - 1
    found = score_fisher_interactions(model, WINDOWS, batch_size=2)
    assert torch.equal(found.scores, expected)
    diagonal = score_fisher(model, WINDOWS, batch_size=2).scores.flatten().argsort().argsort().view(LAYERS, HEADS)
    assert not torch.equal(expected.long(), diagonal)


def test_greedy_takes_scores_anew_on_what_is_left(model):
    """Heads are taken out by zeroing their rows in a copy, not by gates."""
    model.double()
    cut, expected, gone = copy.deepcopy(model), torch.zeros(LAYERS, HEADS, dtype=torch.float64), set()
    for step in range(LAYERS * HEADS):
        scores = score_fisher(cut, WINDOWS, batch_size=5).scores
        left = [(layer, head) for layer in range(LAYERS) for head in range(HEADS) if (layer, head) not in gone]
        layer, head = min(left, key=lambda place, scores=scores: float(scores[place]))
        expected[layer, head] = step
        gone.add((layer, head))
        cut.transformer.h[layer].attn.c_proj.weight.data[head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = 0
    found = score_fisher_greedy(model, WINDOWS, batch_size=2)
    assert torch.equal(found.scores, expected)
    assert found.details["heads_per_step"] == 1
    once = score_fisher(model, WINDOWS, batch_size=2).scores.flatten().argsort().argsort().view(LAYERS, HEADS)
    assert not torch.equal(expected.long(), once)


@pytest.mark.parametrize("method", NEW)
def test_heads_that_have_left_rank_below_all_others_and_scores_are_finite(method):
    assert method in METHODS
    model = tiny_gpt2()
    keep = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    before = model(WINDOWS).logits
    with mask_heads(model, keep):
        scores = scored(method, model)
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert scores[~keep].max() < scores[keep].min()
    assert torch.equal(model(WINDOWS).logits, before)
    assert torch.equal(select_heads(scores, 100 * 7 / 12, gone=~keep), keep)


@pytest.mark.parametrize("method", NEW)
def test_a_model_that_has_lost_heads_physically_is_refused(method):
    pruned = remove_heads(tiny_gpt2(), torch.tensor([[1, 1, 0, 0]] * 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="pruned physically"):
        scored(method, pruned)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "qwen3"])
def test_other_families_are_scored(family, method):
    scores = scored(method, tiny_model(family))
    assert scores.shape == (3, 6)
    assert scores.isfinite().all()
    # Ranks within layers are shared: by the one in the middle alone, and by the two protected ones.
    assert scores.unique().numel() == (12 if method == "llm-pruner" else 18)
