"""The comparison as it is written on transformers alone without much thought: the slower yardstick of ``whole_run.py``.

    python benchmarks/plain_straightforward.py CASE.json      (``whole_run.py --write_case CASE.json`` writes one)

Eager attention throughout, because entropy needs the maps; all layers' maps at once; heads masked by hooks on a model of
full size; one ``generate`` per prompt, temperature and iteration, which is timed as it goes; perplexity window by window,
once per cell and temperature. Nothing of this project is imported. A case is plain data, see ``whole_run.py``.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from transformers.generation.streamers import BaseStreamer


def compare(case: dict[str, Any], load: Callable[[], Any], tokenizer: Any) -> dict[str, Any]:
    """All numbers of the comparison that ``case`` describes: {"cells": [...], "timings": [...]}."""
    model = load()
    model.set_attn_implementation("eager")
    cells, timings = [], []
    for iteration in range(case["iterations"]):
        windows = torch.tensor(case["calibration"][iteration])
        for variant in case["variants"]:
            for level, keep in masks(model, case, variant, windows):
                for temperature in case["temperatures"]:
                    with masked(model, keep):
                        perplexity = perplexity_of(model, case["windows"])
                    texts = []
                    for number, prompt in enumerate(case["prompts"]):
                        draws = torch.tensor(case["draws"][iteration][number], dtype=torch.float64)
                        with masked(model, keep):
                            tokens, seconds = write(model, prompt, case["num_tokens"], temperature, draws)
                        timings.append(
                            {"variant": variant, "iteration": iteration, "level": level, "prompt": number, **seconds}
                        )
                        tokens = cut(tokens, case["end_of_text"])
                        texts.append(judge(model, prompt, tokens, tokenizer))
                    cells.append(
                        {
                            "variant": variant,
                            "iteration": iteration,
                            "level": level,
                            "temperature": temperature,
                            "keep": keep.int().tolist(),
                            "perplexity": perplexity,
                            "texts": texts,
                        }
                    )
    return {"cells": cells, "timings": timings}


def masks(model: Any, case: dict[str, Any], variant: str, windows: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Levels and the heads that stay, bool [L, H]. The progressive variant ranks anew after every 10 % of the heads."""
    direction, entropy = direction_of(model, windows, case)
    if variant == "baseline":
        for level in case["levels"]:
            yield level, lowest_leave(direction * entropy, level, None)
        return
    keep, reached = torch.ones_like(entropy, dtype=torch.bool), 0.0
    for level in case["levels"]:
        while reached < level:
            step = min(level, (reached // 10 + 1) * 10)
            with masked(model, keep):
                scores = direction * entropies(model, windows, case["quality_batch_size"])
            keep, reached = lowest_leave(scores, step, keep), step
        yield level, keep


def direction_of(model: Any, windows: Tensor, case: dict[str, Any]) -> tuple[int, Tensor]:
    """-1 where cutting high-entropy heads costs less on every other window, else 1; and the dense entropies [L, H]."""
    entropy = entropies(model, windows, case["quality_batch_size"])
    smallest = min(level for level in case["levels"] if level > 0)
    losses = {}
    for direction in (-1, 1):
        with masked(model, lowest_leave(direction * entropy, smallest, None)):
            losses[direction] = sum(loss_of(model, row, len(row) - 1) for row in windows[::2])
    return (-1 if losses[-1] <= losses[1] else 1), entropy


@torch.no_grad()
def entropies(model: Any, windows: Tensor, batch_size: int) -> Tensor:
    """Mean attention entropy over log of the visible length, [L, H]; the first position is left out."""
    total: Any = 0
    for batch in windows.split(batch_size):
        rows = []
        for attention in model(input_ids=batch, output_attentions=True, use_cache=False).attentions:
            visible = torch.arange(2, attention.shape[-1] + 1, dtype=torch.float32).log()
            entropy = torch.special.entr(attention).sum(-1)[..., 1:] / visible
            rows.append(entropy.double().mean(-1).sum(0))
        total = total + torch.stack(rows)
    return total / len(windows)


def lowest_leave(scores: Tensor, level: float, before: Tensor | None) -> Tensor:
    """bool [L, H]: all but the round(level / 100 * total) lowest-scored heads; those that left before stay away."""
    if before is not None:
        scores = scores.masked_fill(~before, -math.inf)
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort(stable=True)[: round(level / 100 * scores.numel())]] = False
    return keep.view_as(scores)


def projections(model: Any) -> list[Any]:
    """Attention's output projections, where GPT-2 and Llama keep them."""
    if hasattr(model, "transformer"):
        return [block.attn.c_proj for block in model.transformer.h]
    return [block.self_attn.o_proj for block in model.model.layers]


@contextmanager
def masked(model: Any, keep: Tensor) -> Iterator[None]:
    """Within it, heads that are false in ``keep`` [L, H] write nothing."""
    handles = []
    for projection, kept in zip(projections(model), keep, strict=True):
        width = projection.weight.shape[0] if hasattr(projection, "nf") else projection.weight.shape[1]
        gate = kept.float().repeat_interleave(width // len(kept))
        handles.append(projection.register_forward_pre_hook(lambda _, inputs, gate=gate: (inputs[0] * gate,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def loss_of(model: Any, ids: Tensor, targets: int) -> float:
    """Negative log-likelihood in nats of the last ``targets`` tokens of ``ids`` [T]."""
    labels = ids.clone()
    labels[:-targets] = -100
    return float(model(input_ids=ids[None], labels=labels[None], use_cache=False).loss) * targets


def perplexity_of(model: Any, windows: list[tuple[list[int], int]]) -> float:
    nats = sum(loss_of(model, torch.tensor(ids), targets) for ids, targets in windows)
    return math.exp(nats / sum(targets for _, targets in windows))


class Draws(LogitsProcessor):
    """Leaves only the token that inverting the cumulative distribution at this step's draw gives."""

    def __init__(self, temperature: float, draws: Tensor) -> None:
        self.temperature, self.draws, self.step = temperature, draws, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = (scores / self.temperature).double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulative, self.draws[self.step] * cumulative[:, -1:], right=True)
        self.step += 1
        return torch.full_like(scores, -math.inf).scatter(1, token.clamp(max=scores.shape[1] - 1), 0.0)


class Clock(BaseStreamer):
    """Notes when tokens arrive on the host; the first arrival is the prompt itself."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def write(
    model: Any, prompt: list[int], num_tokens: int, temperature: float, draws: Tensor
) -> tuple[list[int], dict[str, float]]:
    """New tokens of one prompt, and first-token latency and end-to-end time in seconds."""
    ids, clock = torch.tensor([prompt]), Clock()
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[Draws(temperature, draws)],
        streamer=clock,
    )
    finished = time.perf_counter()
    return output[0, len(prompt) :].tolist(), {
        "first_token_latency_s": clock.times[1] - started,
        "end_to_end_s": finished - started,
    }


def cut(tokens: list[int], end_of_text: list[int]) -> list[int]:
    """The tokens before the first end-of-text token."""
    ends = [place for place, token in enumerate(tokens) if token in end_of_text]
    return tokens[: ends[0]] if ends else tokens


def judge(dense: Any, prompt: list[int], tokens: list[int], tokenizer: Any) -> dict[str, Any]:
    """One text's quality: perplexity under the dense model, diversity, repetition, compression."""
    if not tokens:
        return measures(tokens, tokenizer, None)
    return measures(tokens, tokenizer, loss_of(dense, torch.tensor(prompt + tokens), len(tokens)))


def measures(tokens: list[int], tokenizer: Any, nats: float | None) -> dict[str, Any]:
    text = tokenizer.decode(tokens)
    raw = text.encode("utf-8", "replace")

    def distinct(n: int) -> float | None:
        grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        return len(set(grams)) / len(grams) if grams else None

    return {
        "text": text,
        "generation_perplexity": None if nats is None else math.exp(nats / len(tokens)),
        "distinct_1": distinct(1),
        "distinct_2": distinct(2),
        "distinct_3": distinct(3),
        "seq_rep_4": None if distinct(4) is None else 1 - distinct(4),
        "compression_ratio": len(raw) / len(zlib.compress(raw, 9)) if raw else None,
    }


def main(path: str, compare: Callable[..., Any]) -> None:
    """Prints what ``compare`` makes of the case in a file."""
    case = json.loads(Path(path).read_text("utf-8"))
    torch.set_num_threads(case["threads"])
    results = compare(
        case,
        lambda: AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32),
        AutoTokenizer.from_pretrained(case["model"]),
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], compare)
