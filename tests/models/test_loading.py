"""Every way in which a model cannot be loaded is its own clear error, before anything else happens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders import save_tiny_model
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.heads import head_grid


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def test_a_local_folder_loads_in_evaluation_mode_with_the_dtype_asked_for(folder):
    preview = preview_model(str(folder))
    assert (preview.grid.n_layers, preview.grid.n_heads, preview.grid.head_size) == (2, 4, 8)
    assert preview.context == 128
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(preview, dtype=dtype).model
        assert model.dtype == dtype
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loaded_logits_equal_the_saved_models(folder):
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(load_model(preview_model(str(folder))).model(ids).logits, expected)


def test_generation_penalties_of_a_model_are_not_used(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    settings = load_model(preview_model(str(folder))).model.generation_config
    assert settings.repetition_penalty in (None, 1.0)
    assert not settings.do_sample


def test_the_bundled_model_loads():
    preview = preview_model("bundled")
    assert preview.grid.n_layers >= 6
    assert preview.grid.n_heads >= 8
    assert "/" not in preview.describe()["name"]


def expect(match, name):
    with pytest.raises(ModelLoadError, match=match) as caught:
        load_model(preview_model(str(name)))
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, InputError)
    return str(caught.value)


def test_no_network_and_no_cache(monkeypatch, tmp_path, caplog):
    """Asking a hub that does not answer takes a while, so it is said beforehand."""
    with caplog.at_level("INFO", "pruning_comparison"):
        message = expect("cannot be reached", "gpt2")
    assert "bundled" in message
    assert "looking for gpt2 in the local cache and on the Hugging Face hub" in caplog.messages


def test_a_missing_folder():
    expect("does not exist", "./no/such/folder")


def test_an_id_that_cannot_exist():
    expect("Check the spelling|cannot be reached", "no spaces allowed!")


def test_a_folder_without_config(tmp_path):
    expect("no config.json", tmp_path)


def test_an_unsupported_architecture(folder):
    BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=50).save_pretrained(folder)
    message = expect("'bloom' is not supported", folder)
    assert "gpt2" in message


def test_an_architecture_that_transformers_does_not_know(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "martian"}))
    expect("not known to the installed transformers", folder)


def test_cross_attention_is_refused(folder):
    GPT2Config(n_layer=2, n_embd=32, n_head=4, add_cross_attention=True).save_pretrained(folder)
    expect("cross-attention", folder)


def test_pickle_only_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    expect("pickle", folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    expect("no .safetensors weights", folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    expect("corrupt", folder)


def test_a_header_of_garbage(folder):
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[8:40] = b"\xff" * 32
    path.write_bytes(whole)
    expect("corrupt", folder)


def test_weights_that_do_not_fit_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    expect("do not fit its config", folder)


def test_weights_with_nan(folder):
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    expect("NaN", folder)


def test_a_missing_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    expect("tokenizer", folder)


def test_an_unreadable_config(folder):
    (folder / "config.json").write_text("{not json")
    expect("JSON|cannot be read", folder)


def test_the_identity_follows_the_weights_not_the_place(folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert preview_model(str(folder)).identity() == preview_model(str(moved)).identity()
    save_tiny_model(moved, seed=5)
    assert preview_model(str(folder)).identity() != preview_model(str(moved)).identity()


@pytest.mark.hub
def test_gpt2_of_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert head_grid(preview_model("gpt2").config).total == 144
