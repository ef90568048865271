"""The decode loop: batched, left-padded, with common random numbers, and its timings.

Dimension letters: B batch, T time (prompt), N new tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.memory import PeakMemory, cache_bytes
from pruning_comparison.models.decoding import DecodeStep, decode_steps, reserved_cache


@dataclass(frozen=True)
class Generation:
    """New tokens, int64 [B, N] on the host, the cache in bytes after the last step, and the two times in seconds.

    ``finite`` [B] says whose logits were finite numbers at every step; what the others hold is no text. None where nobody
    asked.
    ``first_token_latency_s`` (TTFT) runs from handing over the token ids to the first sampled token on the host;
    ``end_to_end_s`` to the last one.
    """

    tokens: Tensor
    cache_bytes: int
    first_token_latency_s: float
    end_to_end_s: float
    finite: Tensor | None = None


@dataclass(frozen=True)
class Timing:
    """One timed generation of a batch of ``rows`` prompts by one variant.

    ``end_to_end_s = first_token_latency_s + (n - 1) * time_per_output_token_s`` holds exactly for n new tokens;
    ``time_per_output_token_s`` is None for n = 1. ``tokens_per_second`` = rows * n / end-to-end.
    """

    variant: str
    repeat: int
    tokens_per_second: float
    first_token_latency_s: float
    time_per_output_token_s: float | None
    end_to_end_s: float
    cache_bytes: int
    peak_memory_bytes: int | None
    peak_memory_reason: str | None


def common_uniforms(seed: int, iteration: int, prompt: int, num_tokens: int) -> Tensor:
    """Uniform draws, float64 [N], for one prompt of one iteration: the same in every variant, level and temperature.

    With common random numbers a difference between variants is a difference between models, not between draws.
    """
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + iteration) * 1_000_003 + prompt) % 2**63)
    return torch.rand(num_tokens, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """One token id per row, int64 [B], by inverting the cumulative distribution of softmax(logits / temperature).

    ``logits`` [B, V], ``temperatures`` [B] (0 = greedy), ``uniforms`` [B] in [0, 1). Tokens are taken in order of their
    ids, so that equal draws meet equal tokens as long as the distributions agree.
    """
    return sampler(temperatures)(logits, uniforms)


def sampler(temperatures: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``sample`` with what depends on the temperatures alone worked out once."""
    drawing = temperatures > 0
    all_draw, none_draws = bool(drawing.all()), not bool(drawing.any())
    divisors = temperatures.where(drawing, 1.0).unsqueeze(1)

    def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
        if none_draws:
            return logits.argmax(-1)
        logits = logits.float()
        cumulative = (logits / divisors.to(logits)).double().softmax(-1).cumsum(-1)
        aims = (uniforms.to(cumulative) * cumulative[:, -1]).unsqueeze(1)
        drawn = torch.searchsorted(cumulative, aims, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
        return drawn if all_draw else torch.where(drawing.to(drawn.device), drawn, logits.argmax(-1))

    return draw


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperatures: Sequence[float],
    uniforms: Tensor | None = None,
    check_finite: bool = False,
    step: DecodeStep | None = None,
) -> Generation:
    """Continues B prompts of token ids by exactly ``num_tokens`` tokens each, whatever end-of-text says.

    Shorter prompts are padded on the left. ``temperatures`` [B]; ``uniforms`` [B, N] may be None if all are 0. Tokens stay
    on the device until the last one; only the first is waited for, to take its time. ``check_finite`` looks at all logits,
    which takes time that nobody should measure.

    The prompts are read by the model's own forward; all further tokens come from ``step``, made of this model by
    ``decode_step``, or from its forward where that is None.
    """
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    heat = torch.tensor(list(temperatures), dtype=torch.float64, device=device)
    draws = torch.zeros(len(prompts), num_tokens, dtype=torch.float64) if uniforms is None else uniforms
    draws = draws.to(device)
    choose = sampler(heat)
    capacity = longest + num_tokens - 1
    visible: Tensor | None = None
    added: Tensor | None = None
    positions = torch.arange(longest).expand(len(prompts), -1)
    if any(padding):
        pads = torch.tensor(padding).unsqueeze(1)
        visible = (torch.arange(longest + num_tokens) >= pads).long().to(device)
        added = torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill(visible == 0, -torch.inf)
        added = added[:, None, None]
        positions = (positions - pads).clamp(min=0)
    if step is not None:
        step.reserve(capacity)
    _synchronize(device)
    started = time.perf_counter()
    step_ids, step_positions = ids.to(device), positions.to(device)
    cache: Any = reserved_cache(model, capacity)
    tokens: list[Tensor] = []
    finite = torch.ones(len(prompts), dtype=torch.bool, device=device) if check_finite else None
    first_token_latency = 0.0
    for number in range(num_tokens):
        seen = longest + number
        if number == 0 or step is None:
            output = model(
                input_ids=step_ids,
                attention_mask=None if visible is None else visible[:, :seen],
                position_ids=step_positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]
        else:
            mask = None if added is None else added[..., :seen]
            logits = step(step_ids[:, 0], step_positions[:, 0], cache, mask)
        chosen = choose(logits, draws[:, number])
        tokens.append(chosen)
        if finite is not None:
            finite &= logits.isfinite().all(-1)
        if number == 0:
            chosen.tolist()
            first_token_latency = time.perf_counter() - started
        step_ids, step_positions = chosen.unsqueeze(1), step_positions[:, -1:] + 1
    result = torch.stack(tokens, 1).cpu()
    end_to_end = time.perf_counter() - started if num_tokens > 1 else first_token_latency
    checked = None if finite is None else finite.cpu()
    return Generation(result, cache_bytes(cache), first_token_latency, end_to_end, checked)


def time_generation(
    models: Mapping[str, PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float,
    uniforms: Tensor,
    measure_peak: bool,
    warm_up_tokens: int = 4,
    steps: Mapping[str, DecodeStep | None] | None = None,
) -> list[Timing]:
    """Times every variant on the same prompts, in the order A B .. B A, so that a noisy machine hits all alike.

    Each variant is first warmed up on the same prompts. Two timings per variant come back (``repeat`` 0 and 1). ``steps``
    are those of the models, made by ``decode_steps`` here if they are not given: all decode alike. Python collects no
    garbage meanwhile: one collection takes as long as many steps of a small model.
    """
    temperatures = [temperature] * len(prompts)
    steps = decode_steps(models) if steps is None else steps

    def run(name: str, count: int) -> Generation:
        return generate(models[name], prompts, count, temperatures=temperatures, uniforms=uniforms, step=steps[name])

    for name in models:
        run(name, min(warm_up_tokens, num_tokens))
    order = [*((name, 0) for name in models), *((name, 1) for name in reversed(list(models)))]
    timings = []
    for name, repeat in order:
        with PeakMemory(models[name].device, enabled=measure_peak) as peak, _no_collection():
            timed = run(name, num_tokens)
        per_token = (timed.end_to_end_s - timed.first_token_latency_s) / (num_tokens - 1) if num_tokens > 1 else None
        timings.append(
            Timing(
                name,
                repeat,
                len(prompts) * num_tokens / timed.end_to_end_s,
                timed.first_token_latency_s,
                per_token,
                timed.end_to_end_s,
                timed.cache_bytes,
                peak.bytes,
                peak.reason,
            )
        )
    return timings


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, Python's garbage collector rests."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
