"""Measurements against independent computations."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pandas as pd
import pytest
import torch
from builders import Letters, tiny_gpt2, tiny_model

from pruning_comparison.losses import bits_per_byte, mean_loss
from pruning_comparison.measure import generation, perplexity
from pruning_comparison.measure.generation import (
    common_uniforms,
    generate,
    sample,
    time_generation,
    turn_order,
)
from pruning_comparison.measure.perplexity import (
    DensePredictions,
    EvaluationWindow,
    WindowLoss,
    evaluation_windows,
    kl_of,
    measure_perplexity,
    perplexity_of,
    window_losses,
)
from pruning_comparison.measure.text_quality import (
    compression_ratio,
    cut_at_end_of_text,
    distinct_n,
    expectation_adjusted_distinct_n,
    generation_losses,
    generation_perplexity,
    seq_rep_n,
)
from pruning_comparison.texts import Document


def guide_perplexity(model, ids, max_length, stride):
    """The loop of the Hugging Face guide "Perplexity of fixed-length models", with its weighting by number of targets."""
    seq_len, nll_sum, n_tokens, prev_end = len(ids), 0.0, 0, 0
    for begin in range(0, seq_len, stride):
        end = min(begin + max_length, seq_len)
        trg_len = end - prev_end
        input_ids = ids[begin:end][None]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        loss = model(input_ids, labels=target_ids).loss
        valid = int((target_ids[:, 1:] != -100).sum())
        if not valid:
            break
        nll_sum += float(loss) * valid
        n_tokens += valid
        prev_end = end
        if end == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"])
@pytest.mark.parametrize("dense_first", [True, False])
def test_divergence_from_the_dense_model_is_that_of_all_scored_tokens(family, dense_first):
    """Against the definition, summed over the whole vocabulary in float64, on windows of which only a part is scored."""
    dense, other = (tiny_model(family, seed=seed) for seed in (0, 1))
    ids = [torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 9, 14)]
    windows = [
        EvaluationWindow("d", at, one, targets, 1, 1) for at, one, targets in zip(range(3), ids, (8, 3, 5), strict=True)
    ]
    predictions = DensePredictions(dense)
    if dense_first:
        first = measure_perplexity(dense, windows, batch_size=2, dense=predictions)
        assert [loss.kl_nats for loss in first] == [0.0, 0.0, 0.0]
        assert [loss.nats for loss in first] == [loss.nats for loss in measure_perplexity(dense, windows, batch_size=2)]
        assert kl_of(first) == 0
    losses = measure_perplexity(other, windows, batch_size=2, dense=predictions)
    total = 0.0
    for window, loss in zip(windows, losses, strict=True):
        p, q = (
            model(window.ids[None]).logits[0, -window.targets - 1 : -1].double().softmax(-1) for model in (dense, other)
        )
        by_hand = float((p * (p / q).log()).sum())
        assert by_hand > 1e-3
        assert loss.kl_nats == pytest.approx(by_hand, rel=1e-4)
        total += by_hand
    assert kl_of(losses) == pytest.approx(total / 16, rel=1e-4)
    assert [loss.nats for loss in losses] == [loss.nats for loss in measure_perplexity(other, windows, batch_size=2)]


def test_divergence_is_missing_where_it_was_not_measured_or_is_not_finite():
    model = tiny_gpt2()
    windows = [EvaluationWindow("d", 0, torch.arange(1, 9), 7, 1, 1)]
    assert measure_perplexity(model, windows, batch_size=1)[0].kl_nats is None
    assert math.isnan(kl_of(measure_perplexity(model, windows, batch_size=1)))
    broken = tiny_gpt2(seed=1)
    broken.transformer.ln_f.weight.fill_(math.nan)
    losses = measure_perplexity(broken, windows, batch_size=1, dense=DensePredictions(model))
    assert math.isnan(losses[0].kl_nats)
    assert math.isnan(kl_of(losses))


def test_divergence_of_a_copy_of_the_dense_model_is_never_below_zero():
    model, copy = tiny_gpt2(), tiny_gpt2()
    windows = [EvaluationWindow("d", at, torch.randint(1, 90, (20,)), 19, 1, 1) for at in range(4)]
    losses = measure_perplexity(copy, windows, batch_size=4, dense=DensePredictions(model))
    assert all(0 <= loss.kl_nats < 1e-4 for loss in losses)


@pytest.mark.parametrize(
    ("window", "stride", "length"), [(16, 16, 50), (16, 8, 50), (32, 5, 61), (64, 64, 30), (16, 16, 33)]
)
def test_perplexity_equals_the_guides_loop(model, window, stride, length):
    text = "".join(chr(32 + (7 * place * place + 3 * place) % 90) for place in range(length))
    windows = evaluation_windows([Document("d", text)], Letters(), window=window, stride=stride, tokens=10_000)
    losses = measure_perplexity(model, windows, batch_size=3)
    ids = torch.tensor(Letters()(text)["input_ids"])
    assert perplexity_of(losses) == pytest.approx(guide_perplexity(model, ids, window, stride), rel=1e-4)
    if stride < window:
        assert sum(loss.tokens for loss in losses) == length - 1


def test_windows_never_cross_documents_and_the_budget_is_shared():
    documents = [Document("a", "x" * 40), Document("b", "y" * 7), Document("c", "z" * 40)]
    windows = evaluation_windows(documents, Letters(), window=8, stride=8, tokens=48)
    by_document = {name: [w for w in windows if w.document == name] for name in "abc"}
    assert [len(found) for found in by_document.values()] in ([2, 1, 3], [3, 1, 2])
    assert [w.targets for w in by_document["b"]] == [6]
    assert all(w.targets == 7 for w in by_document["a"] + by_document["c"])
    assert all(len(set(w.ids.tolist())) == 1 for w in windows)


def test_windows_are_spread_within_a_document_and_over_documents():
    text = "".join(chr(33 + place % 60) for place in range(96))
    chosen = evaluation_windows([Document("d", text)], Letters(), window=8, stride=4, tokens=16)
    whole = evaluation_windows([Document("d", text)], Letters(), window=8, stride=4, tokens=96)
    assert [w.index for w in chosen] == [2, 8, 14, 20]
    assert len(whole) == 23
    for window in chosen:
        assert torch.equal(window.ids, whole[window.index].ids)
        assert (window.targets, window.targets_bytes) == (4, 4)
    few = evaluation_windows([Document(str(n), text) for n in range(9)], Letters(), window=8, stride=8, tokens=24)
    assert [w.document for w in few] == ["1", "4", "7"]


def test_bits_per_byte_counts_utf8_bytes(model):
    text = "aé€b" * 3  # 1 + 2 + 3 + 1 bytes
    windows = evaluation_windows([Document("d", text)], Letters(), window=32, stride=32, tokens=100)
    assert [w.targets_bytes for w in windows] == [3 * 7 - 1]
    losses = measure_perplexity(model, windows, batch_size=1)
    assert [loss.text_bytes for loss in losses] == [20]


def test_words_are_counted_where_they_begin():
    """22 characters, one token each, of which the first is not scored; windows of 8 tokens cut words in two."""
    text = "One  two\nthree four fi"
    windows = evaluation_windows([Document("d", text)], Letters(), window=8, stride=8, tokens=100)
    # Scored are "ne  two", "three f" and "ur fi": the first token of a window has no context.
    assert [w.targets_words for w in windows] == [1, 2, 1]
    overlapping = evaluation_windows([Document("d", text)], Letters(), window=8, stride=4, tokens=100)
    assert sum(w.targets_words for w in overlapping) == len(text.split()) - 1


def test_a_uniform_model_has_the_vocabulary_as_perplexity(model):
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.zero_()
    windows = [EvaluationWindow("d", 0, torch.arange(1, 20), 18, 18, 4)]
    assert perplexity_of(measure_perplexity(model, windows, batch_size=1)) == pytest.approx(97, rel=1e-5)


def test_perplexity_of_a_broken_model_is_missing_not_a_number(model):
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    windows = [EvaluationWindow("d", 0, torch.arange(1, 20), 18, 18, 4)]
    assert math.isnan(perplexity_of(measure_perplexity(model, windows, batch_size=1)))


def test_no_batch_has_more_logits_than_fit(model, monkeypatch):
    windows = [torch.arange(1, 11) + number for number in range(5)]
    nats, tokens = window_losses(model, windows, batch_size=4)
    rows = []
    handle = model.register_forward_hook(lambda module, inputs, output: rows.append(output.logits.shape[:2]))
    # 9 scored tokens and the position that predicts the first of them: 10 positions, of 4 bytes per entry of the vocabulary.
    monkeypatch.setattr(perplexity, "_MOST_LOGIT_BYTES", 2 * 10 * 4 * model.config.vocab_size)
    of_two = window_losses(model, windows, batch_size=4)
    monkeypatch.setattr(perplexity, "_MOST_LOGIT_BYTES", 1)
    of_one = window_losses(model, windows, batch_size=4)
    handle.remove()
    assert rows == [(2, 10), (2, 10), (1, 10), *[(1, 10)] * 5]
    for found in (of_two, of_one):
        torch.testing.assert_close(found[0], nats)
        assert torch.equal(found[1], tokens)


def test_batches_of_unequal_lengths_do_not_mix(model):
    windows = [torch.arange(1, 20), torch.arange(3, 9), torch.arange(5, 24), torch.tensor([4, 9])]
    together, tokens = window_losses(model, windows, batch_size=4)
    alone = torch.cat([window_losses(model, [ids], batch_size=1)[0] for ids in windows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [18, 5, 18, 1]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_decoding_equals_generate(seed):
    model = tiny_gpt2(seed=seed)
    prompt = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(seed))
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(model, prompt.tolist(), 30, temperatures=[0.0]).tokens.tolist() == expected[:, 9:].tolist()


def test_left_padding_changes_nothing(model):
    prompts = [[5, 9, 11, 40, 2, 8], [7, 3], [1, 2, 3, 4]]
    draws = torch.stack([common_uniforms(0, 0, row, 12) for row in range(3)])
    together = generate(model, prompts, 12, temperatures=[0.7, 0.0, 1.3], uniforms=draws).tokens
    for row, (prompt, temperature) in enumerate(zip(prompts, [0.7, 0.0, 1.3], strict=True)):
        alone = generate(model, [prompt], 12, temperatures=[temperature], uniforms=draws[row : row + 1]).tokens
        assert together[row].tolist() == alone[0].tolist()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sample(logits.expand(20_000, -1), torch.full((20_000,), 0.7, dtype=torch.float64), uniforms)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(0), rtol=0, atol=1e-3)


def test_common_random_numbers_repeat_and_differ():
    first = common_uniforms(0, 1, 2, 50)
    assert torch.equal(first, common_uniforms(0, 1, 2, 50))
    assert torch.equal(first[:20], common_uniforms(0, 1, 2, 20))
    for other in (common_uniforms(1, 1, 2, 50), common_uniforms(0, 2, 2, 50), common_uniforms(0, 1, 3, 50)):
        assert not torch.equal(first, other)


def test_timings_add_up_and_variants_are_interleaved(model):
    twin = tiny_gpt2(seed=1)
    timings = time_generation(
        {"a": model, "b": twin},
        [[1, 2, 3], [4, 5, 6]],
        7,
        temperature=1.0,
        uniforms=torch.rand(2, 7, dtype=torch.float64),
        measure_peak=True,
    )
    assert [(t.variant, t.repeat) for t in timings] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    for timing in timings:
        assert timing.time_per_output_token_s is not None
        total = timing.first_token_latency_s + 6 * timing.time_per_output_token_s
        assert timing.end_to_end_s == pytest.approx(total, rel=1e-12)
        assert timing.tokens_per_second == pytest.approx(2 * 7 / timing.end_to_end_s)
        # keys and values, 2 prompts, 3 + 7 tokens of which the last is never fed back, 3 layers of 32 features, 4 bytes
        assert timing.cache_bytes == 2 * 2 * 9 * 3 * 32 * 4


def test_timing_of_one_token_has_no_time_per_output_token(model):
    timing = time_generation(
        {"a": model}, [[1, 2]], 1, temperature=0.0, uniforms=torch.zeros(1, 1), measure_peak=False
    )[0]
    assert timing.time_per_output_token_s is None
    assert timing.end_to_end_s == timing.first_token_latency_s


def test_the_latency_is_the_mean_of_several_first_tokens(model, monkeypatch):
    """A clock is a second later at each reading, so that each turn takes 1 s, but for one first token of five, 6 s:
    (6 + 4 * 1) / 5 = 2 s. Then 6 more tokens come in turns of 2, which take 3 s."""
    readings = 0

    def clock():
        nonlocal readings
        readings += 1
        # Two turns to warm up have read it 4 times; the second first token reads it for the 7th and 8th time.
        return readings + (5 if readings >= 8 else 0)

    monkeypatch.setattr(generation.time, "perf_counter", clock)
    (timing,) = time_generation(
        {"a": model},
        [[1, 2]],
        7,
        temperature=0.0,
        uniforms=torch.zeros(1, 7),
        measure_peak=False,
        tokens_per_turn=2,
        repeats=(3,),
    )
    assert timing.repeat == 3
    assert timing.first_token_latency_s == pytest.approx(2)
    assert timing.time_per_output_token_s == pytest.approx(3 / 6)
    assert timing.end_to_end_s == pytest.approx(2 + 3)
    assert timing.tokens_per_second == pytest.approx(7 / 5)


@pytest.mark.parametrize(("names", "repeats"), [("ab", 2), ("abc", 6), ("abcde", 20)])
def test_everyone_waits_for_all_others_and_follows_each_of_them_equally_often(names, repeats):
    follows, begins = Counter(), Counter()
    for repeat in range(repeats):
        order = turn_order(names, repeat)
        assert sorted(order) == sorted(names)  # whose turns come back after one of each other
        turns = order * 7
        follows.update(pairwise([turns[-1], *turns]))
        begins[order[0]] += 1
    assert set(follows) == set(permutations(names, 2))
    assert len(set(follows.values())) == len(set(begins.values())) == 1


def test_who_takes_turns_after_whom():
    assert [turn_order("abc", repeat) for repeat in range(4)] == [list("abc"), list("acb"), list("bca"), list("bac")]
    assert [turn_order("ab", repeat) for repeat in range(3)] == [list("ab"), list("ba"), list("ab")]
    assert [turn_order("abcd", repeat) for repeat in range(3)] == [list("abcd"), list("adcb"), list("bcda")]
    assert turn_order("a", 5) == ["a"]


def test_perplexity_is_of_all_tokens_together():
    """8 bits over 3 tokens, and a window of 5 more without loss: one bit per token."""
    losses = [WindowLoss("d", 0, 8 * math.log(2), 3, 4, 1), WindowLoss("d", 1, 0.0, 5, 4, 1)]
    assert perplexity_of(losses) == pytest.approx(2.0)


def test_figures_of_summed_losses_are_the_same_of_numbers_and_of_columns():
    """8 bits over 8 bytes are 1 bit per byte; 16 = 2 ** 4 over 4 words are 2 per word."""
    assert bits_per_byte(8 * math.log(2), 8) == pytest.approx(1.0)
    assert math.exp(mean_loss(math.log(16), 4)) == pytest.approx(2.0)
    nats, counts = pd.Series([8 * math.log(2), math.log(16)]), pd.Series([8, 2])
    assert list(bits_per_byte(nats, counts)) == pytest.approx([1.0, 2.0])
    assert list(np.exp(mean_loss(nats, counts))) == pytest.approx([2.0, 4.0])


def test_generation_perplexity_by_hand():
    assert generation_perplexity([3, 4], 2 * math.log(7)) == pytest.approx(7.0)
    assert generation_perplexity([], 0.0) is None
    assert generation_perplexity([3], 1000.0) == math.inf


def test_seq_rep_4_of_a_loop_and_of_a_sentence_that_comes_twice():
    # abcabcabca: 7 fourgrams, abca bcab cabc abca bcab cabc abca -> 3 distinct
    assert seq_rep_n([1, 2, 3] * 3 + [1], 4) == pytest.approx(1 - 3 / 7)
    # abcdef abcdef: 9 fourgrams, of which abcd, bcde and cdef come twice -> 6 distinct
    assert seq_rep_n([1, 2, 3, 4, 5, 6] * 2, 4) == pytest.approx(1 - 6 / 9)
    assert distinct_n([1, 2, 3, 4, 5, 6] * 2, 3) == pytest.approx(6 / 10)


def test_compression_ratio_counts_utf8_bytes():
    """A stored block: zlib adds 2 bytes of header, 5 of block header and 4 of checksum, or 8 in all for a fixed block."""
    text = "é"  # two bytes; the smallest deflate stream of two literals is one fixed block
    fixed_block_bits = 3 + 9 + 9 + 7  # block header, two literals above 143 of 9 bits each, end of block
    assert compression_ratio(text) == pytest.approx(2 / (2 + -(-fixed_block_bits // 8) + 4))


def test_diversity_by_hand():
    tokens = [1, 2, 1, 2, 1, 3]
    # bigrams: 12 21 12 21 13 -> 3 distinct of 5; fourgrams: 1212 2121 1213 -> all distinct
    assert distinct_n(tokens, 1) == pytest.approx(3 / 6)
    assert distinct_n(tokens, 2) == pytest.approx(3 / 5)
    assert seq_rep_n(tokens, 4) == 0.0
    assert seq_rep_n([1] * 8, 4) == pytest.approx(1 - 1 / 5)
    assert distinct_n([1], 2) is None
    assert seq_rep_n([1, 2, 3], 4) is None


def test_expectation_adjusted_distinct_by_hand():
    # two draws from two values show 2 * (1 - (1/2)^2) = 1.5 distinct values on average
    assert expectation_adjusted_distinct_n([0, 1], 1, 2) == pytest.approx(2 / 1.5)
    assert expectation_adjusted_distinct_n([0, 0], 1, 2) == pytest.approx(1 / 1.5)
    assert expectation_adjusted_distinct_n([], 1, 2) is None


def test_compression_ratio_is_bytes_over_compressed_bytes():
    assert compression_ratio("abc" * 100) == pytest.approx(300 / len(zlib.compress(b"abc" * 100, 9)))
    assert compression_ratio("") is None


def test_text_is_cut_at_end_of_text():
    assert cut_at_end_of_text([4, 5, 0, 6], frozenset({0})) == [4, 5]
    assert cut_at_end_of_text([4, 5], frozenset({0})) == [4, 5]


def test_generation_losses_score_only_the_continuation(model):
    prompt, continuation = torch.tensor([3, 4, 5]), torch.tensor([6, 7])
    (nats, tokens), empty = generation_losses(
        model, [prompt, prompt], [continuation, torch.tensor([], dtype=torch.long)], batch_size=2
    )
    logprobs = model(torch.tensor([[3, 4, 5, 6, 7]])).logits[0].log_softmax(-1)
    assert nats == pytest.approx(-float(logprobs[2, 6] + logprobs[3, 7]), rel=1e-5)
    assert tokens == 2
    assert empty == (0.0, 0)
