"""What tests are made of: tiny models, texts, tables and manifests, built from production's own columns.

A column that production renames is renamed here as well, so that no fixture says what production no longer says.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pruning_comparison.analysis.estimates import (
    CONTRAST_COLUMNS,
    MISSING_COLUMNS,
    SUMMARY_COLUMNS,
    MetricTable,
    observations,
)
from pruning_comparison.analysis.head_maps import SIGNALS
from pruning_comparison.analysis.hypotheses import HYPOTHESIS_COLUMNS
from pruning_comparison.analysis.rankings import RANKING_COLUMNS
from pruning_comparison.analysis.relative import RELATIVE_COLUMNS
from pruning_comparison.analysis.tradeoffs import EQUAL_COLUMNS, OPTIMUM_COLUMNS
from pruning_comparison.errors import Interrupted
from pruning_comparison.metrics import METRICS
from pruning_comparison.models.heads import attention_implementation, attention_outputs, mlp_output_projections
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.report.answer import Answer, Chip
from pruning_comparison.report.charts.style import to_svg
from pruning_comparison.report.page import render_report
from pruning_comparison.run import attempts
from pruning_comparison.run.measure_cell import LevelTimings
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.scoring.prices import LayerPrices, Prices
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore, columns_of
from pruning_comparison.store.records import CellResult, ModelFacts
from pruning_comparison.texts import load_documents

NAN = math.nan
TABLES = ("cells", "measurements", "heads", "signals", "replies", "texts")
MEASURED = ("tokens_per_second", "_s", "peak_memory_bytes", "scratch_bytes")
"""Ends of names of metrics that a clock or the memory's meter measures."""

CELL_COLUMNS, HEAD_COLUMNS, SIGNAL_COLUMNS, TEXT_COLUMNS = (
    columns_of(name) for name in ("cells", "heads", "signals", "texts")
)
REPLY_COLUMNS = columns_of("replies")


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
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def with_long_first_tokens(model: Any, *, layer: int = 1) -> Any:
    """A GPT-2 in which one neuron of a block's MLP tells first tokens from others and makes their stream very long.

    What it reads is the difference of the means of both, so that whatever attention fails to add at first tokens shows.
    """
    vocabulary, width = model.transformer.wte.weight.shape
    model.transformer.wpe.weight.data[0] *= 4
    block = model.transformer.h[layer]
    seen: list[torch.Tensor] = []
    handle = block.ln_2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randint(1, vocabulary, (64, 16), generator=torch.Generator().manual_seed(11)))
    handle.remove()
    first, others = seen[0][:, 0].mean(0), seen[0][:, 1:].mean((0, 1))
    reads = first - others
    # 1 at the mean of first tokens, and 0 half of the way to it: others are below.
    reads = 2 * reads / reads.square().sum()
    block.mlp.c_fc.weight.data[:, 0] = 10 * reads
    block.mlp.c_fc.bias.data[0] = -10 * float(reads @ (first + others) / 2)
    block.mlp.c_proj.weight.data[0] = 100 * torch.randn(width, generator=torch.Generator().manual_seed(12))
    return model


GROUPED = {"num_attention_heads": 6, "intermediate_size": 40, "head_dim": 12}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
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
    "qwen3_moe": (
        "qwen3_moe",
        {
            **GROUPED,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **GROUPED,
            "num_key_value_heads": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GROUPED,
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 3,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **GROUPED,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "olmo2": ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}),
    "smollm3": ("smollm3", {**GROUPED, "num_key_value_heads": 3, "no_rope_layers": [1, 0, 1]}),
    "granite": (
        "granite",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
        },
    ),
    "ministral": (
        "ministral",
        {
            **GROUPED,
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "phi3": (
        "phi3",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "partial_rotary_factor": 0.5,
            "attention_dropout": 0.0,
        },
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

ATTEND_AS_LLAMA = frozenset({"gemma3", "granite", "ministral", "olmo2", "phi3", "qwen3_moe", "smollm3"})
"""Of ``FAMILIES``: those whose attention function is Llama's. What concerns that function alone is tested with Llama."""

ATTENTIONS = tuple(family for family in FAMILIES if family not in ATTEND_AS_LLAMA)


def tiny_model(family: str, *, layers: int = 3, width: int = 48, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of one of ``FAMILIES``, or of a model type, with random biases and norms."""
    model_type, defaults = FAMILIES.get(family, (family, {}))
    shape = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 97, "max_position_embeddings": 64}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**shape, **special, **defaults, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2)
    model.tie_weights()
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


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


def plain_costs(table: Sequence[Sequence[float]]) -> Prices:
    """Prices of heads that have nothing to do with one another and cost what ``table`` [L, H] says; NaN: has left."""
    layers = []
    for row in torch.tensor(table, dtype=torch.float64):
        live = row.isfinite().nonzero().squeeze(1)
        weight = row[live].sqrt().unsqueeze(1)
        gram = torch.eye(len(live), dtype=torch.float64)
        layers.append(LayerPrices.of(gram, weight, live.tolist(), ridge=1e-12) if len(live) else None)
    return Prices(tuple(layers), (1.0,) * len(layers), len(table[0]))


def random_costs(layers: int, heads: int, seed: int, *, duplicates: bool = False) -> Prices:
    """Prices of heads whose outputs depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    of_layers = []
    for _ in range(layers):
        x = torch.randn(60, 2 * heads, generator=generator).double()
        x = x @ torch.randn(2 * heads, 2 * heads, generator=generator).double()
        if duplicates and heads > 1:
            x[:, 2:4] = x[:, :2]
        weight = torch.randn(2 * heads, 5, generator=generator).double()
        of_layers.append(LayerPrices.of(x.T @ x / 60, weight, range(heads), ridge=0.01))
    return Prices(tuple(of_layers), tuple(torch.rand(layers, generator=generator).tolist()), heads)


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


def save_tiny_model(folder: Path, *, seed: int = 0, layers: int = 2, model: PreTrainedModel | None = None) -> Path:
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


def ascii_tokenizer(*, size: int = 120, digits: bool = False) -> Any:
    """A byte-level tokenizer with some merges, whose tokens are all ASCII: whole texts, whatever a model writes.

    It splits as GPT-2's does; with ``digits``, every digit stands alone before that, as SmolLM2's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    bytes_rule = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), bytes_rule]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else bytes_rule
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        # Printable ASCII, and how byte-level tokenizers write a space and a newline.
        initial_alphabet=[*map(chr, range(33, 127)), "\u0120", "\u010a"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then 12 others"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


GROUPS_LEFT = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ],
    dtype=torch.bool,
)
"""What is left of five layers of 8 heads in groups of 2: rectangles of 3 x 2, 2 x 2, none, 3 x 1 and 4 x 2."""


def pruned_to_rectangles(family: str, *, first_emptied: bool = False, **settings: Any) -> PreTrainedModel:
    """A model of 5 layers and 128 tokens with ``GROUPS_LEFT``, and with random biases of its output projections.

    With ``first_emptied`` layer 0 has lost all its heads, too.
    """
    shape = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    sizes = {"layers": 5, "vocab_size": 128, "max_position_embeddings": 256, "intermediate_size": 96}
    keep = GROUPS_LEFT.clone()
    if first_emptied:
        keep[0] = False
    model = remove_heads(tiny_model(family, **{**sizes, **shape, **settings}), keep)
    generator = torch.Generator().manual_seed(5)
    for module in [*attention_outputs(model), *mlp_output_projections(model)]:
        assert module is not None
        bias = 0.3 * torch.randn(model.config.hidden_size, generator=generator)
        module.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


_LLAMA3_POSITIONS = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GGUF_CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, layer 0 emptied": ("llama", {"first_emptied": True}),
    "llama with all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3's positions": ("llama", {"rope_parameters": _LLAMA3_POSITIONS}),
    "positions stretched": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {}),
    "mistral, layer 0 emptied": ("mistral", {"first_emptied": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, layer 0 emptied": ("qwen2", {"first_emptied": True}),
}
"""Settings of ``pruned_to_rectangles`` for everything that a file for llama.cpp has to get right, by name."""


def sentencepiece_tokenizer(*, merges: Sequence[tuple[str, str]] = (("h", "e"), ("t", "he"), ("\u2581", "the"))) -> Any:
    """A tokenizer as SentencePiece's BPE is converted for transformers: spaces written out, bytes where no piece fits."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["\u2581", "h", "e", "t", *dict.fromkeys("".join(pair) for pair in merges)]:
        vocabulary.setdefault(piece, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


class Letters:
    """A tokenizer of one token per character, so that offsets and bytes can be counted by hand."""

    def __call__(self, text: str | list[str], **kwargs: Any) -> dict[str, list[Any]]:
        if isinstance(text, list):
            each = [self(one) for one in text]
            return {part: [one[part] for one in each] for part in each[0]}
        return {
            "input_ids": [ord(letter) % 96 + 1 for letter in text],
            "offset_mapping": [(place, place + 1) for place in range(len(text))],
        }


def tiny_spec(folder: Path, **changes: Any) -> ComparisonSpec:
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "pruning_levels": (0, 50),
        "pruning_methods": ("magnitude",),
        "temperatures": (1.0,),
        "num_tokens": 3,
        "iterations": 1,
        "max_prompts": 1,
        "eval_tokens": 150,
        "calibration_tokens": 128,
        "calibration_window": 64,
        "timing_pairs": 2,
        "timing_limit_s": 0.0,
        "adaptation": "refit",
        "eval_text": str(folder / "texts" / "held_out"),
        "calibration_text": str(folder / "texts" / "calibration"),
    }
    return ComparisonSpec(**{**settings, **changes})


def unmeasured(run: Path) -> bytes:
    """Every table of a run as text, without what a clock or the memory's meter says."""
    shown = []
    with RunStore(run) as store:
        for name in TABLES:
            table = store.table(name)
            if name == "measurements":
                table = table[~table["metric"].str.endswith(MEASURED)]
            shown.append(f"{name}\n{table.to_csv(index=False)}")
    return "\n".join(shown).encode()


def stopped(*arguments: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def cut_off_after(cells: int) -> Iterator[None]:
    """Within it a run is interrupted before it measures more than so many cells."""
    original: Any = vars(attempts)["run_cell"]
    left = [cells]

    def measured(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "run_cell", measured)
        with pytest.raises(Interrupted):
            yield


def failed_cell(variant: str, method: str, iteration: int, level: float, reason: str) -> tuple[Any, ...]:
    """A row of the journal's cells, in its order of columns."""
    known = {"variant": variant, "method": method, "iteration": iteration, "level": level}
    row = {**dict.fromkeys(CELL_COLUMNS), **known, "status": "failed", "reason": reason}
    return tuple(row.values())


def no_model() -> PrunedModel:
    """What stands for a pruned model where nothing is done with it."""
    nothing: Any = None
    return PrunedModel(nothing, torch.ones(1, 1, dtype=torch.bool), "dense")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick stands in for measuring: these tests are about which cells are measured and where they go."""
    monkeypatch.setattr("pruning_comparison.run.launchers.serial.load_workspace", lambda *given, **more: None)
    monkeypatch.setattr(attempts, "run_cell", lambda w, cell: (no_model(), CellResult(cell, "done", fingerprint="x")))
    monkeypatch.setattr(attempts, "time_level", lambda *arguments: LevelTimings([]))


def estimate_row(
    metric: str, variant: str, level: float, value: float, low: float = NAN, high: float = NAN,
    *, t: float = NAN, n: int = 15, method: str = "entropy", model: str = "tiny",
) -> tuple[Any, ...]:  # fmt: skip
    """A row of the summary."""
    return (model, variant, method, float(level), t, metric, value, low, high, n, METRICS[metric].unit)


def contrast_row(
    metric: str, level: float, value: float, low: float = NAN, high: float = NAN,
    *, t: float = NAN, n: int = 15, method: str = "entropy", model: str = "tiny", unit: str = "%",
) -> tuple[Any, ...]:  # fmt: skip
    """A row of the contrasts: agency against the baseline."""
    return (
        model,
        method,
        float(level),
        t,
        metric,
        "agency vs baseline",
        value,
        low,
        high,
        n,
        unit,
        METRICS[metric].direction,
    )


def relative_row(
    metric: str, variant: str, level: float, value: float, low: float = NAN, high: float = NAN,
    *, t: float = NAN, n: int = 15, method: str = "entropy", certain: bool = True, unit: str = "1", model: str = "tiny",
) -> tuple[Any, ...]:  # fmt: skip
    """A row of the levels against the dense model: a ratio, or a difference in ``unit``. An interval around 1 is unclear."""
    change = "unclear" if low < 1 < high else "higher" if value > 1 else "lower"
    values = {
        "model": model, "variant": variant, "method": method, "level": float(level), "temperature": t, "metric": metric,
        "estimate": value, "ci_low": low, "ci_high": high, "n": n, "p": 0.001, "change": change, "unit": unit,
        "p_holm": 0.001 if certain else 0.5, "certain": certain,
    }  # fmt: skip
    return tuple(values[column] for column in RELATIVE_COLUMNS)


def ranking_row(
    rank: int, name: str, value: float, following: str = "", ratio: float = NAN, low: float = NAN, high: float = NAN,
    *, decided: bool = False, random: str = "no random control", within: str = "agency", compared: str = "method",
) -> tuple[Any, ...]:  # fmt: skip
    """A row of a ranking: the rank, its perplexity over dense, and the next rank's perplexity over its own."""
    values = {
        **dict.fromkeys(RANKING_COLUMNS, NAN),
        "model": "tiny", "compared": compared, "within": within, "rank": rank, "name": name, "metric": "perplexity",
        "levels": "40,80", "estimate": value, "ci_low": 0.9 * value, "ci_high": 1.1 * value, "n": 15,
        "next_name": following, "next_estimate": ratio, "next_ci_low": low, "next_ci_high": high,
        "decided": decided, "versus_random_verdict": random,
    }  # fmt: skip
    return tuple(values[column] for column in RANKING_COLUMNS)


CHIPS = (
    Chip(
        "E1", "Speed", "no meaningful difference", "no meaningful difference", "+0.4 %", "Expected: faster. It is not."
    ),
    Chip("E2", "Quality", "refuted", "supported: 1 of 2 methods", "−3 %", "Details of quality."),
    Chip("E3", "Diversity", "not enough data", "not enough data", "", "Details of diversity."),
    Chip("E4", "Responsiveness", "supported", "supported", "−5 %", "Details of waiting."),
    Chip("Q1", "Resilience", "supported", "supported", "−15 %", "Details of resilience."),
    Chip("Q2", "Optimal level", "answered", "answered", "up to 40 %", "Details of levels."),
    Chip("Q3", "Temperature", "not enough data", "not enough data", "+0.1", "Details of temperature."),
    Chip("Q4", "Tight resources", "supported", "supported", "+2 %", "Details of resources."),
    Chip("Q5", "Which metrics", "answered", "answered", "+6.7 SD", "Details of metrics."),
)
SAID = Answer("Pruning the attention heads of tiny", ("First <b>sentence</b>.", "Second, with 5 %."), (), CHIPS)
"""An answer with a chip of every verdict."""


NASTY = "<script>alert('x')</script> & \"$quoted$\" \x00 \ud800 \u202eabc שלום \x1b[31m"


def text_row(
    variant: str, level: float, prompt: str, text: str,
    *, iteration: int = 0, temperature: float = 1.0, method: str = "entropy",
) -> tuple[Any, ...]:  # fmt: skip
    """As in the journal, where ``prompt`` is a number and the prompt itself stands beside it."""
    number = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
    return (variant, method, iteration, float(level), temperature, number, prompt, text)


def render_page(
    *, summary: Sequence[Any] = (), contrasts: Sequence[Any] = (), cells: Sequence[Any] = (), missing: Sequence[Any] = (),
    findings: Sequence[Any] = (), figures: Mapping[str, Figure] | None = None, manifest: Mapping[str, Any] | None = None,
    texts: Sequence[Any] | None = None, verdicts: Sequence[Any] = (), answers: Sequence[Any] = (),
    optimal: Sequence[Any] = (), equal: Sequence[Any] = (), heads: Sequence[Any] = (), agreed: pd.DataFrame | None = None,
    relative: Sequence[Any] = (), ranked: Sequence[Any] = (), said: Answer | None = None, hero: Figure | None = None,
    lines: Sequence[str] = (), tasks: pd.DataFrame | None = None, accuracy_lost: pd.DataFrame | None = None,
) -> str:  # fmt: skip
    given = dict(manifest or {})
    if isinstance(given.get("model"), Mapping):
        given["model"] = {**ModelFacts("tiny", "gpt2", 6, 8, 32, 256, 4096).as_dict(), **given["model"]}
    rows = list(summary) or [
        estimate_row("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
        estimate_row("perplexity", "baseline", 50, 90.0, 80.0, 101.0),
        estimate_row("perplexity", "agency", 50, 42.0, 40.0, 44.5),
    ]
    return render_report(
        summary=pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS)),
        contrasts=pd.DataFrame(list(contrasts), columns=list(CONTRAST_COLUMNS)),
        cells=pd.DataFrame(list(cells), columns=CELL_COLUMNS),
        missing=pd.DataFrame(list(missing), columns=list(MISSING_COLUMNS)),
        verdicts=list(verdicts),
        answers=pd.DataFrame(list(answers), columns=list(HYPOTHESIS_COLUMNS)),
        optimal=pd.DataFrame(list(optimal), columns=list(OPTIMUM_COLUMNS)),
        equal=pd.DataFrame(list(equal), columns=list(EQUAL_COLUMNS)),
        findings=list(findings),
        answer=said or Answer("Pruning the attention heads of tiny", ("A sentence.",), (), ()),
        relative=pd.DataFrame(list(relative), columns=list(RELATIVE_COLUMNS)),
        ranked=pd.DataFrame(list(ranked), columns=list(RANKING_COLUMNS)),
        hero=None if hero is None else to_svg(hero).decode("utf-8"),
        drawings={name: to_svg(figure).decode("utf-8") for name, figure in (figures or {}).items()},
        lines=lines,
        manifest=given,
        texts=None if texts is None else pd.DataFrame(list(texts), columns=TEXT_COLUMNS),
        heads=heads,
        agreed=agreed,
        tasks=tasks,
        accuracy_lost=accuracy_lost,
    )


def heads_table(
    gone: Mapping[tuple[str, str, int, float], set[tuple[int, int]]], *, layers: int = 2, heads: int = 2,
    scores: Mapping[tuple[str, str, int], Sequence[float]] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """``gone`` maps (variant, method, iteration, level) to the heads that are gone; scores are made to rank them."""
    rows: list[tuple[Any, ...]] = []
    for key, pruned in gone.items():
        for layer in range(layers):
            for head in range(heads):
                score = layer * heads + head if scores is None else scores[key[:3]][layer * heads + head]
                rows.append((*key, layer, head, float(score), int((layer, head) not in pruned)))
    return pd.DataFrame(rows, columns=HEAD_COLUMNS)


def asked_tables(variant: str = "agency") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Signals and replies of two rounds: (0, 1) refuses and is overridden later, (1, 0) consents at once."""
    key = {"variant": variant, "method": "entropy", "iteration": 0, "level": 50.0}
    signals = [
        {**key, "round_level": level, "layer": layer, "head": head, "state": state, **dict.fromkeys(SIGNALS, value)}
        for level, states in (
            (25.0, ("active", "overloaded", "active", "misaligned")),
            (50.0, ("active", "active", "withdrawn", "active")),
        )
        for (layer, head), state, value in zip(
            ((0, 0), (0, 1), (1, 0), (1, 1)), states, (1.0, 2.0, 4.0, 8.0), strict=True
        )
    ]
    replies = [
        {
            **key,
            "round_level": level,
            "layer": layer,
            "head": head,
            "answer": answer,
            "state": state,
            "asked_rank": rank,
        }
        for level, layer, head, answer, state, rank in (
            (25.0, 0, 1, "refused", "overloaded", 0),
            (25.0, 1, 0, "consented", "active", 1),
            (50.0, 0, 1, "overridden", "active", 0),
        )
    ]
    return pd.DataFrame(signals, columns=SIGNAL_COLUMNS), pd.DataFrame(replies, columns=REPLY_COLUMNS)


GONE = {
    ("agency", "entropy", 0, 0.0): set(),
    ("agency", "entropy", 0, 25.0): {(1, 0)},
    ("agency", "entropy", 0, 50.0): {(1, 0), (0, 1)},
}


def token_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def stepwise_logits(model: Any, tokens: Tensor, mask: Tensor | None = None, first: int = 4) -> tuple[Tensor, Any]:
    """Logits of cached decoding: ``first`` tokens at once, then one by one."""
    steps: list[Tensor] = []
    cache = None
    for start, end in [(0, first), *((t, t + 1) for t in range(first, tokens.shape[1]))]:
        positions = None
        if mask is not None:
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:end]
        output = model(
            input_ids=tokens[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    return torch.cat(steps, 1), cache


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest floating-point storage that any operation returns, backward passes included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() for t in tree_leaves(result) if torch.is_tensor(t) and t.is_floating_point()
        ]
        self.bytes = max([self.bytes, *sizes])
        return result


GROUPS_OF_TWO_AND_THREE = torch.tensor(
    [
        # In groups of three: 3 and 1 left, 0 and 2, 2 and 2. In groups of two: 2, 2, 0; 0, 1, 1; 1, 2, 1.
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [1, 0, 1, 1, 0, 1],
    ],
    dtype=torch.bool,
)

MASKS = {**random_masks(3, 6), "uneven groups": GROUPS_OF_TWO_AND_THREE}


def left_padded(batch: int = 2, length: int = 11, pads: int = 3) -> tuple[Tensor, Tensor]:
    tokens, visible = token_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    tokens[0, :pads] = 0
    visible[0, :pads] = 0
    return tokens, visible


# Synthetic runs whose answers are known beforehand

LEVELS = (0.0, 20.0, 40.0, 60.0, 80.0)
_TIDY = (
    "variant", "method", "iteration", "level", "temperature", "prompt", "document", "window", "repeat", "metric", "value",
    "reason",
)  # fmt: skip
Place = Callable[..., float]


def noise(*place: float) -> float:
    """A number in [-1, 1] that depends on its place alone, with no pattern along any part of it."""
    return 2 * float(np.random.default_rng([1 + int(part) for part in place]).random()) - 1


def run_of(
    loss: Place = lambda variant, level, i, d: level / 100,
    speed: Place = lambda variant, level, i, p: 0.0,
    latency: Place = lambda variant, level, i, p: 0.0,
    distinct: Place = lambda variant, level, i, p, t: 0.9,
    judged: Place = lambda variant, level, i, p, t: 4.0,
    *,
    levels: Sequence[float] = LEVELS,
    iterations: int = 4,
    documents: int = 10,
    prompts: int = 5,
    temperatures: Sequence[float] = (0.7, 1.0),
    fingerprint: str | None = None,
    variants: Sequence[str] = ("baseline", "agency"),
    method: str = "m",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and measurements from functions of the place; all but ``distinct`` give logarithms."""
    cells: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for variant in variants:
        for level in levels:
            for i in range(iterations):
                place = {"variant": variant, "method": method, "iteration": i, "level": level}
                name = "dense" if level == 0 else fingerprint or f"{variant} {level} {i}"
                cells.append(place | {"status": "done", "fingerprint": name})
                for d in range(documents):
                    nats = 100 * (4 + loss(variant, level, i, d))
                    for metric, value in (("window_nats", nats), ("window_tokens", 100), ("window_bytes", 400)):
                        rows.append(place | {"document": f"d{d}", "metric": metric, "value": value})
                for p in range(prompts):
                    for repeat in range(2):
                        here = place | {"prompt": p, "repeat": repeat}
                        rows.append(
                            here | {"metric": "tokens_per_second", "value": 50 * math.exp(speed(variant, level, i, p))}
                        )
                        wait = 0.01 * math.exp(latency(variant, level, i, p))
                        rows.append(here | {"metric": "first_token_latency_s", "value": wait})
                    for t in temperatures:
                        here = place | {"prompt": p, "temperature": t}
                        rows.append(here | {"metric": "distinct_2", "value": distinct(variant, level, i, p, t)})
                        perplexity = math.exp(judged(variant, level, i, p, t))
                        rows.append(here | {"metric": "generation_perplexity", "value": perplexity})
    return pd.DataFrame(cells), pd.DataFrame(rows, columns=list(_TIDY))


def gain(effect: float, wobble: float = 0.01) -> Place:
    """Agency's loss differs from the baseline's by ``effect`` and a little that varies over documents and iterations."""

    def loss(variant: str, level: float, i: int, d: int) -> float:
        shift = effect + wobble * noise(level, i, d) if variant == "agency" and level else 0.0
        return level / 100 + shift

    return loss


def observed(cells: pd.DataFrame, measurements: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, MetricTable]]:
    """A run's cells and what was observed of it."""
    return cells, observations(cells, measurements)


def answer(table: pd.DataFrame, name: str, **where: Any) -> pd.Series[Any]:
    """The one row of answers with that id."""
    rows = table[table["id"] == name]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def load_script(path: Path) -> ModuleType:
    """A script outside the package, imported without running it; it finds the scripts beside it, as when it is run."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    # Where dataclasses look for the names in their annotations.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module
