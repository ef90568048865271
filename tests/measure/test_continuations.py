"""Likelihoods of continuations equal those of one pass each, and a context that several share is read once."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES, random_masks, tiny_model

from pruning_comparison.measure.continuations import continuation_likelihoods, tokens_read
from pruning_comparison.pruning import remove_heads


def ids(seed, length):
    return torch.randint(1, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def questions():
    """Two contexts of one length with three and two answers, one of another length with two of one token each, one alone."""
    first, second, third, alone = ids(0, 9), ids(1, 9), ids(2, 5), ids(3, 7)
    pairs = [(first, ids(10, 4)), (first, ids(11, 1)), (first, ids(12, 6)), (second, ids(13, 2)), (second, ids(14, 3))]
    return [*pairs, (third, [7]), (third, [8]), (alone, ids(15, 5)), (first, ids(10, 4))]


def one_by_one(model, context, continuation):
    """A pass for this pair alone, without a cache: summed log-probabilities, and whether each token is the likeliest."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].double()
    scored = logits[len(context) - 1 : -1]
    chosen = scored.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return float(chosen.sum()), scored.argmax(-1).tolist() == list(continuation)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_a_pass_for_each_pair(family):
    model = tiny_model(family)
    for batch_size in (1, 8):
        found = continuation_likelihoods(model, questions(), batch_size=batch_size)
        for pair, (log_likelihood, greedy) in zip(questions(), found, strict=True):
            expected = one_by_one(model, *pair)
            assert log_likelihood == pytest.approx(expected[0], abs=1e-4)
            assert greedy == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_so_are_those_of_pruned_models_with_layers_that_have_lost_all_heads(family):
    dense = tiny_model(family)
    layers, heads = dense.config.num_hidden_layers, dense.config.num_attention_heads
    for keep in random_masks(layers, heads).values():
        model = remove_heads(dense, keep)
        found = continuation_likelihoods(model, questions(), batch_size=8)
        for pair, (log_likelihood, _) in zip(questions(), found, strict=True):
            assert log_likelihood == pytest.approx(one_by_one(model, *pair)[0], abs=1e-4)


def test_pairs_of_one_length_that_are_read_together_are_split_where_each_has_its_own_context_end():
    model = tiny_model("llama")
    pairs = [(ids(0, 7), ids(1, 5)), (ids(2, 10), ids(3, 2)), (ids(4, 11), ids(5, 1))]
    for (context, continuation), (log_likelihood, _) in zip(
        pairs, continuation_likelihoods(model, pairs, batch_size=8), strict=True
    ):
        assert log_likelihood == pytest.approx(one_by_one(model, context, continuation)[0], abs=1e-4)


def test_what_the_model_would_say_itself_is_greedy():
    model = tiny_model("llama")
    context, said = ids(0, 6), []
    for _ in range(3):
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([[*context, *said]])).logits[0, -1].argmax()))
    other = [said[0], said[1], (said[2] + 1) % 60]
    alone, (greedy, not_greedy) = (
        continuation_likelihoods(model, [(context, said)], batch_size=2)[0],
        continuation_likelihoods(model, [(context, said), (context, other)], batch_size=2),
    )
    assert alone.greedy
    assert greedy.greedy
    assert not not_greedy.greedy
    assert greedy.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)


def test_a_shared_context_is_read_once():
    """9 tokens and 3 + 0 + 5 more; 9 and 1 + 2; 5 and none, as one token is only predicted; alone 7 and 4. In all 45, where
    a pass for each pair reads 9 + 3 + 9 + 9 + 5 + 9 + 1 + 9 + 2 + 5 + 5 + 7 + 4 + 9 + 3 = 89.
    """
    assert tokens_read(questions()) == 17 + 12 + 5 + 11
    model = tiny_model("llama")
    read = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape))
    try:
        continuation_likelihoods(model, questions(), batch_size=8)
    finally:
        handle.remove()
    # Contexts of one length together, then their five answers padded to five tokens; those of one token need no pass.
    assert sorted(map(tuple, read)) == [(1, 5), (1, 11), (2, 9), (5, 5)]


def test_a_context_may_fill_the_model_but_for_the_last_token():
    """A model of 64 positions reads 64 tokens and predicts one more, whether the context is shared or not."""
    model = tiny_model("gpt2")
    context, ends = ids(0, 60), [ids(1, 5), ids(2, 5)]
    alone = [continuation_likelihoods(model, [(context, end)], batch_size=1)[0].log_likelihood for end in ends]
    shared = continuation_likelihoods(model, [(context, end) for end in ends], batch_size=4)
    assert [one.log_likelihood for one in shared] == pytest.approx(alone, abs=1e-4)


def test_an_empty_context_or_continuation_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="pair 1 has 0 tokens of context"):
        continuation_likelihoods(model, [([1], [2]), ([], [2])], batch_size=1)
    with pytest.raises(ValueError, match="pair 0 has 1 tokens of context and 0 after it"):
        continuation_likelihoods(model, [([1], [])], batch_size=1)
