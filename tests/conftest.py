"""Tiny models and texts that every test can share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PRUNING_COMPARISON_NO_UPDATE", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pruning_comparison.texts import load_documents


def tiny_gpt2(*, layers: int = 3, heads: int = 4, width: int = 32, context: int = 64, seed: int = 0) -> PreTrainedModel:
    """A random GPT-2 with random biases and norms: zeros and ones would hide a forgotten bias."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=97,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2)
    model.tie_weights()
    return model.eval().requires_grad_(False)


GROUPED = {"num_attention_heads": 6, "intermediate_size": 40, "head_dim": 12}
FAMILIES = {
    "gpt2": ("gpt2", {"n_head": 6, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "llama": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}),
    "llama with biases, not grouped": ("llama", {**GROUPED, "num_key_value_heads": 6, "attention_bias": True}),
    "mistral": ("mistral", {**GROUPED, "num_key_value_heads": 3, "sliding_window": None}),
    "mistral with a window": ("mistral", {**GROUPED, "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {**GROUPED, "num_key_value_heads": 2}),
    "qwen3 with windows": (
        "qwen3",
        {**GROUPED, "num_key_value_heads": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 6, "intermediate_size": 40, "use_parallel_residual": True}),
    "gpt_neox in sequence": (
        "gpt_neox",
        {"num_attention_heads": 6, "intermediate_size": 40, "use_parallel_residual": False, "attention_bias": False},
    ),
    "opt": ("opt", {"num_attention_heads": 6, "ffn_dim": 40, "dropout": 0.0}),
    "opt with norms after": (
        "opt",
        {
            "num_attention_heads": 6,
            "ffn_dim": 40,
            "dropout": 0.0,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 20,
        },
    ),
}
"""Model type and settings of a small config for everything that a family can do differently."""


def tiny_model(family: str, *, layers: int = 3, width: int = 48, seed: int = 0, **settings) -> PreTrainedModel:
    """A random model of one of ``FAMILIES``, or of a model type, with random biases and norms."""
    model_type, defaults = FAMILIES.get(family, (family, {}))
    shape = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 97, "max_position_embeddings": 64}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**shape, **special, **defaults, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2)
    model.tie_weights()
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread():
    """Timings and rounding do not depend on the machine's load."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_gpt2()


def random_masks(layers: int, heads: int) -> dict[str, torch.Tensor]:
    """Masks by name: uneven layers, an emptied first, middle and last layer, and all but one head gone."""
    generator = torch.Generator().manual_seed(1)
    uneven = torch.rand(layers, heads, generator=generator) > 0.5
    uneven[:, 0] = True
    masks = {"all kept": torch.ones(layers, heads, dtype=torch.bool), "uneven": uneven}
    for name, layer in (("first", 0), ("middle", layers // 2), ("last", layers - 1)):
        mask = uneven.clone()
        mask[layer] = False
        masks[f"{name} layer emptied"] = mask
    one_left = torch.zeros(layers, heads, dtype=torch.bool)
    one_left[layers - 1, 1] = True
    masks["one head left"] = one_left
    return masks


def write_short_texts(folder: Path) -> dict[str, str]:
    """The beginnings of bundled documents as folders of a user's own: a tokenizer of bytes takes long for them in full.

    As settings of a comparison. No two documents are alike.
    """
    settings = {}
    for option, name, characters in (("eval_text", "held_out", 400), ("calibration_text", "calibration", 3_000)):
        (folder / name).mkdir(parents=True)
        for document in load_documents(f"bundled:{name}", option=f"--{option}"):
            (folder / name / f"{document.name}.txt").write_text(document.text[:characters], encoding="utf-8")
        settings[option] = str(folder / name)
    return settings


def save_tiny_model(folder, *, seed: int = 0, layers: int = 2, model: PreTrainedModel | None = None):
    """A tiny model (GPT-2 unless given) with a byte-level tokenizer of 257 tokens, saved as a user's folder would be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|endoftext|>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    if model is None:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=257, n_positions=128, n_embd=32, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        model.tie_weights()
    model.save_pretrained(folder)
    return folder
