"""Recovery: what it trains, on what, and what it leaves alone."""

from __future__ import annotations

import torch
from builders import random_masks, tiny_gpt2, tiny_model

from pruning_comparison.agency.recovery import recover
from pruning_comparison.pruning.surgery import remove_heads

WINDOWS = torch.randint(1, 97, (6, 16), generator=torch.Generator().manual_seed(3))
MASK = random_masks(3, 4)["uneven"]


def recovered(dense, pruned, steps=12, seed=0):
    return recover(
        dense,
        pruned,
        WINDOWS,
        steps=steps,
        batch_size=2,
        learning_rate=3e-3,
        generator=torch.Generator().manual_seed(seed),
    )


def divergence(dense, other):
    """Mean Kullback-Leibler divergence per token, written out."""
    p, q = (model(WINDOWS).logits.log_softmax(-1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_comes_closer_to_the_dense_model_and_counts_what_it_saw():
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    student, cost = recovered(dense, pruned, steps=40)
    assert divergence(dense, student) < 0.7 * divergence(dense, pruned)
    assert cost.tokens == 40 * 2 * 16
    assert cost.seconds > 0


def test_dense_and_pruned_models_stay_as_they_were_and_share_embeddings():
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    before = {name: p.clone() for model in (dense, pruned) for name, p in model.named_parameters()}
    logits = pruned(WINDOWS).logits
    student, _ = recovered(dense, pruned)
    assert torch.equal(pruned(WINDOWS).logits, logits)
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert student.transformer.wte.weight is dense.transformer.wte.weight
    assert student.lm_head.weight is dense.lm_head.weight
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_the_seed_decides():
    dense = tiny_model("llama")
    pruned = remove_heads(dense, random_masks(3, 6)["first layer emptied"])
    one, same, other = (recovered(dense, pruned, seed=seed)[0](WINDOWS).logits for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_window_is_seen_before_one_is_seen_again(monkeypatch):
    dense = tiny_gpt2()
    pruned = remove_heads(dense, MASK)
    seen = []
    forward = dense.forward
    monkeypatch.setattr(
        dense, "forward", lambda input_ids, **rest: seen.extend(input_ids.tolist()) or forward(input_ids, **rest)
    )
    recovered(dense, pruned, steps=6)
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(WINDOWS.tolist())
    assert seen[:6] != seen[6:]
