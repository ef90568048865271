"""A model that a user hands over in Python comes back as it was, and what is made of it is the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import save_tiny_model, tiny_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pruning_comparison.run.one_model import prune

SETTINGS = {
    "calibration_tokens": 256,
    "calibration_window": 32,
    "calibration": ["some text to look at. " * 60],
    "level": 50,
}


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))


@pytest.fixture
def dense():
    """A GPT-2 with dropout everywhere, which training mode switches on."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.tie_weights()
    return model


@pytest.mark.parametrize("variant", ["baseline", "agency"])
@pytest.mark.parametrize("method", ["fisher", "entropy"])
def test_training_mode_changes_nothing_and_comes_back(dense, tokenizer, variant, method):
    expected = prune(dense.eval(), tokenizer, method=method, variant=variant, **SETTINGS)
    dense.train()
    dense.transformer.h[0].eval()
    modes = {name: module.training for name, module in dense.named_modules()}
    found = prune(dense, tokenizer, method=method, variant=variant, **SETTINGS)
    assert {name: module.training for name, module in dense.named_modules()} == modes
    assert found.config.kept_heads == expected.config.kept_heads
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=0)
    assert found.training
    assert not expected.training


@pytest.mark.parametrize("variant", ["baseline", "agency"])
def test_training_the_copy_leaves_the_original_alone(dense, tokenizer, variant):
    before = copy.deepcopy(dense.state_dict())
    pruned = prune(dense, tokenizer, variant=variant, **SETTINGS)
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*dense.parameters(), *dense.buffers())}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*pruned.parameters(), *pruned.buffers())}
    assert not ours & theirs
    optimiser = torch.optim.SGD(pruned.parameters(), lr=1.0)
    pruned(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert pruned.lm_head.weight is pruned.transformer.wte.weight  # still tied


def test_what_was_frozen_stays_frozen_and_new_biases_go_with_their_weights(tokenizer):
    dense = tiny_model("llama", layers=2, vocab_size=257).requires_grad_(False)
    dense.model.layers[1].requires_grad_(True)
    pruned = prune(dense, tokenizer, **SETTINGS)
    trained = {name for name, parameter in pruned.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in pruned.named_parameters() if name.startswith("model.layers.1.")}
    assert "model.layers.1.mlp.down_proj.bias" in trained  # adaptation's own
