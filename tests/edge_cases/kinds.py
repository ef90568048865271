"""Models and tokenizers at the edge of what loads: one small builder per kind, random weights, the bundled tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders import tiny_model
from safetensors.torch import load_file, save_file

from pruning_comparison.models.loading import TOKENIZER_FILES, bundled_model_folder

VOCABULARY = 4096
"""Tokens of the bundled tokenizer, ids 0 to 4095."""


@dataclass(frozen=True)
class Kind:
    """One kind of model folder. ``refused`` is what the error has to say, a regular expression; None where it loads."""

    name: str
    build: Callable[[Path], None]
    refused: str | None = None


def base(folder: Path, family: str = "llama", **settings: Any) -> dict[str, torch.Tensor]:
    """A random model of the bundled tokenizer's vocabulary, saved as a user's folder would be; returns its tensors."""
    model = tiny_model(family, layers=2, vocab_size=VOCABULARY, max_position_embeddings=128, **settings)
    model.save_pretrained(folder)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "merges.txt"):
        if (bundled_model_folder() / name).is_file():
            shutil.copy(bundled_model_folder() / name, folder / name)
    return dict(load_file(folder / "model.safetensors"))


def with_tensors(
    family: str, change: Callable[[dict[str, torch.Tensor]], object], **settings: Any
) -> Callable[[Path], None]:
    """A builder of a folder whose stored tensors are changed."""

    def build(folder: Path) -> None:
        tensors = base(folder, family, **settings)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return build


def with_json(name: str, values: dict[str, Any], family: str = "llama", **settings: Any) -> Callable[[Path], None]:
    """A builder of a folder in one of whose JSON files some values are changed."""

    def build(folder: Path) -> None:
        base(folder, family, **settings)
        path = folder / name
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**known, **values}), "utf-8")

    return build


def plain(folder: Path) -> None:
    base(folder)


def broken_generation_config(folder: Path) -> None:
    base(folder)
    (folder / "generation_config.json").write_text("{")


def output_biases(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.randn(48, generator=_generator())


def old_masks(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


def old_neox_buffers(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 128, 128)
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(1)


def frequencies(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def tied_head_stored_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.randn(VOCABULARY, 48, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def added_word(folder: Path) -> None:
    """A word that was added to the tokenizer, and no row for it in the model."""
    base(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text("utf-8"))
    stored["added_tokens"].append(
        {"id": VOCABULARY, "content": "Zyzzyva", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
    )  # fmt: skip
    path.write_text(json.dumps(stored), "utf-8")


def trimmed_offsets(folder: Path) -> None:
    """Offsets that leave the space before a word out."""
    base(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text("utf-8"))
    stored["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(stored), "utf-8")


def without_offsets(folder: Path) -> None:
    """A tokenizer in Python, one token per byte, that cannot say which characters a token stands for."""
    base(folder)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}), "utf-8")
    (folder / "vocab.txt").write_text("", "utf-8")


GENERATION = {"eos_token_id": [0, 17], "repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6}
REFUSED_GENERATION = {"eos_token_id": 0, "temperature": 0.6, "top_p": 0.9, "do_sample": False}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("a plain model", plain),
        Kind("masks that GPT-2 once stored", with_tensors("gpt2", old_masks)),
        Kind("masks and frequencies that GPT-NeoX once stored", with_tensors("gpt_neox", old_neox_buffers)),
        Kind("rotary frequencies of each layer", with_tensors("llama", frequencies)),
        Kind("a tied output head, stored twice", with_tensors("llama", tied_head_stored_twice, tie_word_embeddings=True)),
        Kind("an output head of its own where the config ties it",
             with_tensors("llama", another_head, tie_word_embeddings=True)),
        Kind("stray head_dim and num_key_value_heads, GPT-2",
             with_json("config.json", {"head_dim": 24, "num_key_value_heads": 2}, "gpt2")),
        Kind("stray head_dim and num_key_value_heads, OPT",
             with_json("config.json", {"head_dim": 24, "num_key_value_heads": 2}, "opt")),
        Kind("stray num_key_value_heads, GPT-NeoX", with_json("config.json", {"num_key_value_heads": 2}, "gpt_neox")),
        Kind("a config that asks for attention maps",
             with_json("config.json", {"output_attentions": True, "output_hidden_states": True})),
        Kind("a config that asks for tuples and no cache",
             with_json("config.json", {"return_dict": False, "use_cache": False})),
        Kind("several end tokens in generation_config.json", with_json("generation_config.json", GENERATION)),
        Kind("a generation config that transformers refuses to save",
             with_json("generation_config.json", REFUSED_GENERATION)),
        Kind("an added word that no text contains", added_word),
        Kind("offsets without the space before a word", trimmed_offsets),
        Kind("output biases that the config does not switch on", with_tensors("llama", output_biases),
             r"layers\.0\.self_attn\.o_proj\.bias would not be read.*\(and 1 more\).*attention_bias is False"),
        Kind("an MLP bias that the config does not switch on",
             with_tensors("llama", lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(40)})),
             r"layers\.1\.mlp\.up_proj\.bias would not be read.*mlp_bias is False"),
        Kind("one layer more than the config has",
             with_tensors("llama", lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(48)})),
             r"layers\.2\.input_layernorm\.weight would not be read.*num_hidden_layers is 2"),
        Kind("norms of queries, which Llama does not have",
             with_tensors("llama", lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
             r"q_norm\.weight would not be read.*model_type is 'llama'"),
        Kind("a missing tensor", with_tensors("llama", lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
             r"layers\.1\.mlp\.down_proj\.weight is not among them"),
        Kind("a missing output head that is not tied", with_tensors("llama", lambda t: t.pop("lm_head.weight")),
             r"lm_head\.weight is not among them.*tie_word_embeddings is False"),
        Kind("a tensor of another shape",
             with_tensors("llama", lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.ones(48, 39)})),
             r"stored as \(48, 39\), and the config makes it \(48, 40\).*intermediate_size is 40"),
        Kind("more key-value heads in the config than are stored", with_json("config.json", {"num_key_value_heads": 3}),
             r"k_proj\.weight is stored as \(16, 48\), and the config makes it \(24, 48\).*num_key_value_heads is 3"),
        Kind("a generation config that is not JSON",
             broken_generation_config,
             r"generation_config\.json of .* cannot be read.*Fix it, or delete it"),
        Kind("a tokenizer without offsets", without_offsets, "does not say which characters a token stands for"),
    )
}  # fmt: skip
"""Every kind by its name: what a user may bring, as ``docs/what-is-checked.md`` lists it."""
