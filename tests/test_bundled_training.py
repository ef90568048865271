"""The training script of the bundled model goes on exactly where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from builders import load_script
from transformers import GPT2Config, GPT2LMHeadModel

SCRIPTS = Path(__file__).parents[1] / "scripts" / "bundled_model"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.delitem(sys.modules, "addresses", raising=False)
    return load_script(SCRIPTS / "train.py")


def test_a_checkpoint_brings_back_weights_and_optimizers(train, tmp_path):
    def fresh():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0, resid_pdrop=0)
        config.embd_pdrop = 0
        model = GPT2LMHeadModel(config)
        return model, train.make_optimizers(model, 6e-3, 3e-3)

    def steps(model, optimizers, numbers):
        for number in numbers:
            ids = torch.randint(0, 31, (2, 16), generator=torch.Generator().manual_seed(number))
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    whole, whole_optimizers = fresh()
    steps(whole, whole_optimizers, range(4))
    first, first_optimizers = fresh()
    steps(first, first_optimizers, range(2))
    train.write_checkpoint(tmp_path / "c.safetensors", first, first_optimizers, 2, 1.5)
    torch.manual_seed(99)
    second, second_optimizers = fresh()
    steps(second, second_optimizers, range(7, 8))
    weights, states, step, seconds = train.read_checkpoint(tmp_path / "c.safetensors")
    assert (step, seconds) == (2, 1.5)
    second.load_state_dict(weights)
    for optimizer, state in zip(second_optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    steps(second, second_optimizers, range(2, 4))
    for (name, expected), actual in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(actual, expected), name
