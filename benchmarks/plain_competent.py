"""The comparison as someone who knows transformers well would write it, on transformers alone: the faster yardstick of
``whole_run.py``.

    python benchmarks/plain_competent.py CASE.json      (``whole_run.py --write_case CASE.json`` writes one)

Scaled-dot-product attention everywhere but where entropy needs the maps, which are reduced layer by layer; scores once per
iteration; perplexity in batches, once per cell; texts at all temperatures from one batched, left-padded ``generate``; what
level 0 gives is kept for all variants. Timings are apart, one ``generate`` per prompt and repeat, as many timed tokens as
the others have. Heads are masked by hooks: transformers can no longer remove them. What does not differ is imported from
``plain_straightforward.py``, nothing from this project.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from plain_straightforward import cut, lowest_leave, main, masked, measures, write
from torch import Tensor
from transformers import LogitsProcessor


def compare(case: dict[str, Any], load: Callable[[], Any], tokenizer: Any) -> dict[str, Any]:
    """All numbers of the comparison that ``case`` describes: {"cells": [...], "timings": [...]}."""
    model = load()
    model.set_attn_implementation("sdpa")
    windows = [(torch.tensor(ids), targets) for ids, targets in case["windows"]]
    batch_size, num_tokens = case["quality_batch_size"], case["num_tokens"]
    jobs = [(heat, prompt) for heat in case["temperatures"] for prompt in range(len(case["prompts"]))]
    cells, timings = [], []
    dense_perplexity: float | None = None
    for iteration in range(case["iterations"]):
        calibration = torch.tensor(case["calibration"][iteration])
        draws = torch.tensor(case["draws"][iteration], dtype=torch.float64)
        direction, entropy = direction_of(model, calibration, case)
        dense_texts: list[list[int]] | None = None
        for variant in case["variants"]:
            for level, keep in masks(model, case, variant, calibration, direction, entropy):
                with masked(model, keep) if level else nullcontext():
                    if level or dense_perplexity is None:
                        perplexity = perplexity_of(losses(model, windows, batch_size), windows)
                    if level or dense_texts is None:
                        texts = []
                        for first in range(0, len(jobs), batch_size):
                            texts += write_batch(model, case, jobs[first : first + batch_size], draws)
                    for number, prompt in enumerate(case["prompts"]):
                        for _ in range(2):
                            heat = case["temperatures"][0]
                            _, seconds = write(model, prompt, num_tokens, heat, draws[number])
                            place = {"variant": variant, "iteration": iteration, "level": level, "prompt": number}
                            timings.append({**place, **seconds})
                if not level:
                    dense_perplexity = perplexity if dense_perplexity is None else dense_perplexity
                    dense_texts = texts if dense_texts is None else dense_texts
                    perplexity, texts = dense_perplexity, dense_texts
                written = [cut(tokens, case["end_of_text"]) for tokens in texts]
                judged = judge_all(model, case, jobs, written, tokenizer)
                for temperature in case["temperatures"]:
                    rows = [row for (heat, _), row in zip(jobs, judged, strict=True) if heat == temperature]
                    cells.append(
                        {
                            "variant": variant,
                            "iteration": iteration,
                            "level": level,
                            "temperature": temperature,
                            "keep": keep.int().tolist(),
                            "perplexity": perplexity,
                            "texts": rows,
                        }
                    )
    return {"cells": cells, "timings": timings}


def masks(
    model: Any, case: dict[str, Any], variant: str, windows: Tensor, direction: int, entropy: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """Levels and the heads that stay, bool [L, H]. The progressive variant ranks anew after every 10 % of the heads."""
    keep, reached = torch.ones_like(entropy, dtype=torch.bool), 0.0
    for level in case["levels"]:
        if variant == "baseline":
            yield level, lowest_leave(direction * entropy, level, None)
            continue
        while reached < level:
            step = min(level, (reached // 10 + 1) * 10)
            scores = entropy
            if reached:
                with masked(model, keep):
                    scores = entropies(model, windows, case["quality_batch_size"])
            keep, reached = lowest_leave(direction * scores, step, keep), step
        yield level, keep


def direction_of(model: Any, windows: Tensor, case: dict[str, Any]) -> tuple[int, Tensor]:
    """-1 where cutting high-entropy heads costs less on every other window, else 1; and the dense entropies [L, H]."""
    entropy = entropies(model, windows, case["quality_batch_size"])
    smallest = min(level for level in case["levels"] if level > 0)
    rows = [(row, len(row) - 1) for row in windows[::2]]
    costs = {}
    for direction in (-1, 1):
        with masked(model, lowest_leave(direction * entropy, smallest, None)):
            costs[direction] = sum(losses(model, rows, case["quality_batch_size"]))
    return (-1 if costs[-1] <= costs[1] else 1), entropy


@torch.inference_mode()
def entropies(model: Any, windows: Tensor, batch_size: int) -> Tensor:
    """Mean attention entropy over log of the visible length, [L, H]; maps are reduced as they appear."""
    attentions = [b.attn for b in model.transformer.h] if hasattr(model, "transformer") else None
    attentions = attentions or [b.self_attn for b in model.model.layers]
    rows: list[Any] = [0] * len(attentions)
    visible = torch.arange(2, windows.shape[1] + 1, dtype=torch.float32).log()

    def reduce(layer: int) -> Callable[[Any, Any, Any], Any]:
        def hook(module: Any, inputs: Any, outputs: Any) -> Any:
            entropy = torch.special.entr(outputs[1]).sum(-1)[..., 1:] / visible
            rows[layer] = rows[layer] + entropy.double().mean(-1).sum(0)
            return (outputs[0], None, *outputs[2:])

        return hook

    model.set_attn_implementation("eager")
    handles = [attention.register_forward_hook(reduce(layer)) for layer, attention in enumerate(attentions)]
    for batch in windows.split(batch_size):
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    return torch.stack(rows) / len(windows)


@torch.inference_mode()
def losses(model: Any, windows: list[tuple[Tensor, int]], batch_size: int) -> list[float]:
    """Nats of the last ``targets`` tokens of every window; windows of one length share a batch."""
    nats = [0.0] * len(windows)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for place, (ids, _) in enumerate(windows):
        by_length[len(ids)].append(place)
    for places in by_length.values():
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            ids = torch.stack([windows[place][0] for place in batch])
            logits = model(input_ids=ids, use_cache=False).logits
            for row, place in enumerate(batch):
                count = windows[place][1]
                nats[place] = float(
                    torch.nn.functional.cross_entropy(logits[row, -count - 1 : -1], ids[row, -count:], reduction="sum")
                )
    return nats


def perplexity_of(nats: list[float], windows: list[tuple[Tensor, int]]) -> float:
    return math.exp(sum(nats) / sum(targets for _, targets in windows))


class BatchDraws(LogitsProcessor):
    """Leaves only the tokens that each row's temperature and draw give."""

    def __init__(self, temperatures: Tensor, draws: Tensor) -> None:
        self.temperatures, self.draws, self.step = temperatures, draws, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = (scores / self.temperatures[:, None]).double().softmax(-1).cumsum(-1)
        aims = self.draws[:, self.step, None] * cumulative[:, -1:]
        self.step += 1
        token = torch.searchsorted(cumulative, aims, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def write_batch(model: Any, case: dict[str, Any], jobs: list[tuple[float, int]], draws: Tensor) -> list[list[int]]:
    """New tokens of every (temperature, prompt), from one left-padded ``generate``."""
    prompts = [case["prompts"][prompt] for _, prompt in jobs]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    visible = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    chosen = BatchDraws(torch.tensor([heat for heat, _ in jobs]), draws[[prompt for _, prompt in jobs]])
    output = model.generate(
        ids,
        attention_mask=visible,
        max_new_tokens=case["num_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[chosen],
    )
    return [row[longest:].tolist() for row in output]


def judge_all(
    dense: Any, case: dict[str, Any], jobs: list[tuple[float, int]], written: list[list[int]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Every text's quality, with perplexity under the dense model in batches."""
    filled = [
        (torch.tensor(case["prompts"][prompt] + tokens), len(tokens))
        for (_, prompt), tokens in zip(jobs, written, strict=True)
        if tokens
    ]
    nats = iter(losses(dense, filled, case["quality_batch_size"]))
    return [measures(tokens, tokenizer, next(nats) if tokens else None) for tokens in written]


if __name__ == "__main__":
    main(sys.argv[1], compare)
