"""Scores and signals stream over the calibration text: nothing they hold grows with its length."""

from __future__ import annotations

import pytest
import torch
from builders import LargestTensor

from pruning_comparison.agency.moments import observe
from pruning_comparison.scoring.ablation import score_ablation
from pruning_comparison.scoring.entropy import mean_attention_entropy
from pruning_comparison.scoring.gradients import score_fisher, score_taylor

WINDOWS = torch.randint(1, 97, (32, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "measure",
    [
        mean_attention_entropy,
        score_fisher,
        score_taylor,
        score_ablation,
        lambda model, windows, batch_size: observe(
            model, windows, keep=torch.ones(3, 4, dtype=torch.bool), batch_size=batch_size
        ),
    ],
    ids=["entropy", "fisher", "taylor", "ablation", "signals"],
)
def test_no_tensor_grows_with_the_length_of_the_text(model, measure):
    sizes = []
    for windows in (WINDOWS[:8], WINDOWS):
        with LargestTensor() as largest:
            measure(model, windows, batch_size=4)
        sizes.append(largest.bytes)
    # Logits of a batch are among the largest: 4 windows of 16 tokens, 97 words, 4 bytes.
    assert sizes[0] == sizes[1]
    assert sizes[0] <= 8 * 4 * 16 * 97 * 4


def test_a_text_that_is_held_whole_would_be_seen(model):
    sizes = []
    for windows in (WINDOWS[:8], WINDOWS):
        with LargestTensor() as largest:
            model(windows)
        sizes.append(largest.bytes)
    assert sizes[1] > 3 * sizes[0]
