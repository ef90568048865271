"""The decode loop: batched, left-padded, with common random numbers, and its timings.

Dimension letters: B batch, T time (prompt), N new tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.memory import PeakMemory, cache_bytes
from pruning_comparison.models.decoding import DecodeStep, StaticStep, decode_steps, reserved_cache

TOKENS_PER_TURN = 10
"""Variants that are timed take turns of so many tokens."""

FIRST_TOKENS = 5
"""A timed generation has the mean latency of so many first tokens: one is so short that whatever else runs shows in it."""


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
    divisors = temperatures.masked_fill(~drawing, 1.0).unsqueeze(1)

    def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
        if none_draws:
            return logits.argmax(-1)
        logits = logits.float()
        cumulative = (logits / divisors.to(logits)).double().softmax(-1).cumsum(-1)
        aims = (uniforms.to(cumulative) * cumulative[:, -1]).unsqueeze(1)
        drawn = torch.searchsorted(cumulative, aims, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
        return drawn if all_draw else torch.where(drawing.to(drawn.device), drawn, logits.argmax(-1))

    return draw


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Token ids of B prompts, int64 [B, T], shorter ones padded on the left, and by how many tokens each is."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    return torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]), padding


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
    return GenerationUnderWay(
        model, prompts, num_tokens, temperatures=temperatures, uniforms=uniforms, check_finite=check_finite, step=step
    ).finish()


class GenerationUnderWay:
    """``generate`` in pieces, so that several can take turns: only the time within ``advance`` counts.

    ``left`` says how many of the ``num_tokens`` tokens are still to come.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        temperatures: Sequence[float],
        uniforms: Tensor | None = None,
        check_finite: bool = False,
        step: DecodeStep | None = None,
    ) -> None:
        device, rows = model.device, len(prompts)
        self.ids, padding = left_padded(prompts)
        longest = self.ids.shape[1]
        self.model, self.step, self.longest, self.left = model, step, longest, num_tokens
        draws = torch.zeros(rows, num_tokens, dtype=torch.float64) if uniforms is None else uniforms
        self.draws = draws.to(device)
        self.choose = sampler(torch.tensor(list(temperatures), dtype=torch.float64, device=device))
        self.capacity = longest + num_tokens - 1
        self.visible: Tensor | None = None
        self.added: Tensor | None = None
        self.positions = torch.arange(longest).expand(rows, -1)
        if any(padding):
            pads = torch.tensor(padding).unsqueeze(1)
            self.visible = (torch.arange(longest + num_tokens) >= pads).long().to(device)
            added = torch.zeros(self.visible.shape, dtype=model.dtype, device=device)
            self.added = added.masked_fill(self.visible == 0, -torch.inf)[:, None, None]
            self.positions = (self.positions - pads).clamp(min=0)
        self.static: StaticStep | None = None
        if step is not None and step.static:
            self.static = step.reserved(self, rows, self.capacity)
        elif step is not None:
            step.reserve(self.capacity)
        self.cache: Any = None
        self.tokens: list[Tensor] = []
        self.finite = torch.ones(rows, dtype=torch.bool, device=device) if check_finite else None
        self.first_token_latency = self.end_to_end = 0.0

    @torch.inference_mode()
    def advance(self, tokens: int) -> None:
        """The next ``tokens`` tokens, or only the first one, which has a time of its own; no more than are left."""
        tokens = min(tokens, self.left if self.tokens else 1)
        synchronize(self.model.device)
        started = time.perf_counter()
        if not self.tokens:
            self.cache = reserved_cache(self.model, self.capacity) if self.static is None else self.static.cache
            self.ids, self.positions = self.ids.to(self.model.device), self.positions.to(self.model.device)
            self._next()
            self.tokens[0].tolist()
        else:
            for _ in range(tokens):
                self._next()
            synchronize(self.model.device)
        self.left -= tokens
        self.end_to_end += time.perf_counter() - started
        if len(self.tokens) == 1:
            self.first_token_latency = self.end_to_end

    def finish(self) -> Generation:
        """The whole generation, after all tokens that are left."""
        while self.left:
            self.advance(self.left)
        if self.static is not None:
            self.static.end()
        return Generation(
            torch.stack(self.tokens, 1).cpu(),
            cache_bytes(self.cache),
            self.first_token_latency,
            self.end_to_end,
            None if self.finite is None else self.finite.cpu(),
        )

    def _next(self) -> None:
        number = len(self.tokens)
        seen = self.longest + number
        if number == 0 or self.step is None:
            output = self.model(
                input_ids=self.ids,
                attention_mask=None if self.visible is None else self.visible[:, :seen],
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]
            if self.static is not None:
                prompt = None if self.visible is None else self.visible[:, :seen]
                self.static.begin(seen, self.positions[:, -1] + 1, prompt)
        elif self.static is not None:
            logits = self.static(self.ids[:, 0])
        else:
            mask = None if self.added is None else self.added[..., :seen]
            logits = self.step(self.ids[:, 0], self.positions[:, 0], self.cache, mask)
        chosen = self.choose(logits, self.draws[:, number])
        self.tokens.append(chosen)
        if self.finite is not None:
            self.finite &= logits.isfinite().all(-1)
        self.ids, self.positions = chosen.unsqueeze(1), self.positions[:, -1:] + 1


def warm_up_tokens(num_tokens: int, *, measure_peak: bool) -> int:
    """How many tokens a variant generates before its ``num_tokens`` are timed: all, once, where their peak is measured."""
    return num_tokens if measure_peak else min(4, num_tokens)


def time_generation(
    models: Mapping[str, PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float,
    uniforms: Tensor,
    measure_peak: bool,
    tokens_per_turn: int = TOKENS_PER_TURN,
    steps: Mapping[str, DecodeStep | None] | None = None,
    repeats: Sequence[int] = (0, 1),
    first_tokens: int = FIRST_TOKENS,
) -> list[Timing]:
    """Times every variant on the same prompts, in turns of a few tokens, so that a noisy machine hits all alike.

    In each of ``repeats`` every variant gives ``first_tokens - 1`` first tokens, then generates all tokens; whose turn it is
    goes by ``turn_order``. Its first-token latency is the mean of those and of the generation's own first token, its time
    per token that of all later tokens, and the end-to-end time follows from both. One timing per variant and repeat comes
    back.

    Each variant is first warmed up on the same prompts; with ``measure_peak`` by a whole generation of its own, whose peak
    all repeats are given. ``steps`` are those of the models, made by ``decode_steps`` here if they are not given: all decode
    alike. Python collects no garbage meanwhile: one collection takes as long as many steps of a small model.
    """
    steps = decode_steps(models) if steps is None else steps

    def begun(name: str, count: int) -> GenerationUnderWay:
        temperatures = [temperature] * len(prompts)
        return GenerationUnderWay(
            models[name], prompts, count, temperatures=temperatures, uniforms=uniforms, step=steps[name]
        )

    peaks = {}
    for name, model in models.items():
        with PeakMemory(model.device, enabled=measure_peak) as peaks[name]:
            begun(name, warm_up_tokens(num_tokens, measure_peak=measure_peak)).finish()
        if measure_peak and (step := steps[name]) is not None:
            step.release()  # or the next one's peak would hold this one's cache
    timings = []
    for repeat in repeats:
        order = turn_order(list(models), repeat)
        latencies: dict[str, list[float]] = {name: [] for name in models}
        with no_collection():
            for _ in range(first_tokens - 1):
                alone = {name: begun(name, num_tokens) for name in models}
                for name in order:
                    alone[name].advance(1)
                    latencies[name].append(alone[name].first_token_latency)
                del alone
            under_way = {name: begun(name, num_tokens) for name in models}
            while any(generation.left for generation in under_way.values()):
                for name in order:
                    under_way[name].advance(tokens_per_turn)
        for name, generation in under_way.items():
            latency = mean([*latencies[name], generation.first_token_latency])
            timings.append(_timing(name, repeat, len(prompts), num_tokens, latency, generation.finish(), peaks[name]))
    return timings


def turn_order(names: Sequence[str], repeat: int) -> list[str]:
    """Who takes a turn after whom in all turns of a repeat: a ring, A B C A B C, and in the next repeat A C B A C B.

    Everyone's turn comes back after one of each other, so that nobody finds more of its weights in the processor's cache
    than others do. (In A B C A C B the turns of B and C come back after one other or three, those of A after two, which
    makes a small model 1 to 2 % slower.) Rings are strides through the names, so that over the repeats each follows each
    other equally often where their number is 2, 3 or any prime. Who begins moves on after every ring has been used.
    """
    count = len(names)
    strides = [stride for stride in range(1, count) if math.gcd(stride, count) == 1] or [1]
    stride, first = strides[repeat % len(strides)], repeat // len(strides)
    return [names[(first + stride * place) % count] for place in range(count)]


def _timing(
    name: str, repeat: int, rows: int, num_tokens: int, latency: float, timed: Generation, peak: PeakMemory
) -> Timing:
    later = timed.end_to_end_s - timed.first_token_latency_s
    total = latency + later
    return Timing(
        variant=name,
        repeat=repeat,
        tokens_per_second=rows * num_tokens / total,
        first_token_latency_s=latency,
        time_per_output_token_s=later / (num_tokens - 1) if num_tokens > 1 else None,
        end_to_end_s=total,
        cache_bytes=timed.cache_bytes,
        peak_memory_bytes=peak.bytes,
        peak_memory_reason=peak.reason,
    )


@contextmanager
def no_collection() -> Iterator[None]:
    """Within it, Python's garbage collector rests."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
