"""A model run by the engines of ``engines.py``: the same prompts, and the same tokens for the same logits.

Dimension letters: B batch, T time (prompt), N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StaticCache

from pruning_comparison.measure.generation import generate, left_padded, sampler, synchronize
from pruning_comparison.models.decoding import DecodeStep
from pruning_comparison.models.heads import EmptiedAttention, EmptiedCacheLayer, attentions, query_slots


@dataclass(frozen=True)
class PromptBatch:
    """What is to be continued by ``num_tokens`` tokens each: B prompts of token ids, and ``uniforms`` [B, N] to draw by."""

    prompts: Sequence[Sequence[int]]
    num_tokens: int
    temperature: float
    uniforms: Tensor

    def sampler(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """What draws the next tokens from logits [B, V] and uniforms [B]: that of all engines."""
        temperatures = torch.full((len(self.prompts),), self.temperature, dtype=torch.float64, device=device)
        return sampler(temperatures)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Token ids and what of them is visible, int64 [B, T] each, shorter prompts padded on the left."""
        ids, padding = left_padded(self.prompts)
        return ids, (torch.arange(ids.shape[1]) >= torch.tensor(padding).unsqueeze(1)).long()


@dataclass(frozen=True)
class EngineRun:
    """One generation: new tokens, int64 [B, N] on the host, and its two times in seconds, as in ``Generation``.

    An engine that cannot draw by the uniforms of a batch takes the likeliest tokens. ``differing_share`` is then in how many
    places another token is the likeliest than the model has after the same text. ``weights`` says what they are stored as
    where the engine reads them from a file of its own.
    """

    tokens: Tensor
    first_token_latency_s: float
    end_to_end_s: float
    differing_share: float | None = None
    weights: str | None = None


class Runner(Protocol):
    """One model in one engine."""

    def make_ready(self, batch: PromptBatch) -> EngineRun:
        """Does whatever has to be done once for batches of this shape, and generates once. Its times mean nothing."""
        ...

    def generate(self, batch: PromptBatch) -> EngineRun:
        """One timed generation of a batch that it has been made ready for."""
        ...


Export = Callable[[], Path]
"""Writes the model that a runner is made for as a GGUF file, which stays as long as the runner, and returns its path."""


def native_runner(
    model: PreTrainedModel, *, capacity: int, step: DecodeStep | None, export: Export | None = None
) -> Runner:
    """The decoding loop of this package. ``step`` is that of ``decode_steps``."""
    return _Native(model, step)


def transformers_runner(
    model: PreTrainedModel, *, capacity: int, step: DecodeStep | None, export: Export | None = None
) -> Runner:
    """``model.generate`` as people call it."""
    return _Transformers(model)


def compiled_runner(
    model: PreTrainedModel,
    *,
    capacity: int,
    step: DecodeStep | None,
    export: Export | None = None,
    backend: str = "inductor",
) -> Runner:
    """The model's forward as ``torch.compile`` makes it, with a static cache for ``capacity`` tokens."""
    return _Compiled(model, capacity, backend)


class _Native:
    def __init__(self, model: PreTrainedModel, step: DecodeStep | None) -> None:
        self._model, self._step = model, step

    def make_ready(self, batch: PromptBatch) -> EngineRun:
        return self.generate(batch)

    def generate(self, batch: PromptBatch) -> EngineRun:
        run = generate(
            self._model,
            batch.prompts,
            batch.num_tokens,
            temperatures=[batch.temperature] * len(batch.prompts),
            uniforms=batch.uniforms,
            step=self._step,
        )
        return EngineRun(run.tokens, run.first_token_latency_s, run.end_to_end_s)


class _Transformers:
    """Greedy ``generate``, told by a logits processor which token is the largest: the one that our sampler draws."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def make_ready(self, batch: PromptBatch) -> EngineRun:
        return self.generate(batch)

    def generate(self, batch: PromptBatch) -> EngineRun:
        model: Any = self._model
        ids, visible = batch.padded()
        draws = _DrawnToken(batch, model.device)
        settings = GenerationConfig(
            min_new_tokens=batch.num_tokens,
            max_new_tokens=batch.num_tokens,
            do_sample=False,
            use_cache=True,
        )
        with _without_stored_settings(model):
            synchronize(model.device)
            started = time.perf_counter()
            found = model.generate(
                ids.to(model.device),
                attention_mask=visible.to(model.device),
                generation_config=settings,
                logits_processor=[draws],
            )
            synchronize(model.device)
            ended = time.perf_counter()
        tokens = found[:, ids.shape[1] :].cpu()
        if tokens.shape[1] != batch.num_tokens:
            raise RuntimeError(f"generate gave {tokens.shape[1]} new tokens where {batch.num_tokens} were asked for")
        return EngineRun(tokens, draws.first_at - started, ended - started)


class _DrawnToken(LogitsProcessor):
    """Leaves the token finite that is drawn by the batch's uniforms, and notes when the first one is on the host."""

    def __init__(self, batch: PromptBatch, device: torch.device) -> None:
        self._choose, self._draws = batch.sampler(device), batch.uniforms.to(device)
        self._number = 0
        self.first_at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._choose(scores, self._draws[:, self._number])
        if self._number == 0:
            chosen.tolist()
            self.first_at = time.perf_counter()
        self._number += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.unsqueeze(1), 0.0)


@contextmanager
def _without_stored_settings(model: Any) -> Iterator[None]:
    """Within it the model has no generation settings of its own, such as an end of text that would cut texts short."""
    stored = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored


class _Compiled:
    """Prompts are read by the model's own forward, as ``generate`` does, and each further token by its compiled one.

    One graph for every number of rows. It has to hold the whole forward: a graph that breaks is an error, and so is
    compiling again once it is ready.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, backend: str) -> None:
        self._model, self._capacity, self._backend = model, capacity, backend
        self._by_rows: dict[int, tuple[StaticCache, Callable[..., Tensor]]] = {}
        for module in model.modules():
            if hasattr(module, "kv_index"):
                query_slots(module)  # worked out by a loop over heads, which no graph can hold

    def make_ready(self, batch: PromptBatch) -> EngineRun:
        if batch.num_tokens == 1:
            raise ValueError("one new token takes no decoding step, and nothing else is compiled")
        rows = len(batch.prompts)
        if rows not in self._by_rows:
            self._by_rows[rows] = static_cache(self._model, self._capacity), self._new_step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own parts
            return self._run(batch)

    def generate(self, batch: PromptBatch) -> EngineRun:
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._run(batch)

    def _new_step(self) -> Callable[..., Tensor]:
        model: Any = self._model

        def step(ids: Tensor, visible: Tensor | None, positions: Tensor, cache: StaticCache) -> Tensor:
            output = model(
                input_ids=ids,
                attention_mask=visible,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: Tensor = output.logits[:, -1]
            return logits

        # What is compiled is kept by code object, at most eight times each: so every model gets one of its own.
        step.__code__ = step.__code__.replace()
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend=self._backend, mode=mode)
        return compiled

    @torch.no_grad()
    def _run(self, batch: PromptBatch) -> EngineRun:
        model: Any = self._model
        cache, step = self._by_rows[len(batch.prompts)]
        ids, seen = batch.padded()
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        visible: Tensor | None = None
        if not bool(seen.all()):
            later = torch.ones(len(ids), self._capacity - ids.shape[1], dtype=torch.long)
            visible = torch.cat([seen, later], 1).to(model.device)  # of one size, or each step would have another shape
        choose, draws = batch.sampler(model.device), batch.uniforms.to(model.device)
        synchronize(model.device)
        started = time.perf_counter()
        cache.reset()
        ids, positions = ids.to(model.device), positions.to(model.device)
        output = model(
            input_ids=ids,
            attention_mask=None if visible is None else visible[:, : ids.shape[1]],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = [choose(output.logits[:, -1], draws[:, 0])]
        tokens[0].tolist()
        first = time.perf_counter()
        positions = positions[:, -1:]
        for number in range(1, batch.num_tokens):
            positions = positions + 1
            logits = step(tokens[-1].unsqueeze(1), visible, positions, cache)
            tokens.append(choose(logits, draws[:, number]))
        synchronize(model.device)
        ended = time.perf_counter()
        return EngineRun(torch.stack(tokens, 1).cpu(), first - started, ended - started)


def static_cache(model: PreTrainedModel, capacity: int) -> StaticCache:
    """transformers' static cache for ``capacity`` tokens, in which layers that have lost all their heads only count tokens.

    The others find out how many key-value heads they have when their first keys come, so layers may differ.
    """
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.layers = [
        _EmptiedStaticLayer(capacity, model.device) if isinstance(attention, EmptiedAttention) else layer
        for attention, layer in zip(attentions(model), cache.layers, strict=True)
    ]
    return cache


class _EmptiedStaticLayer(EmptiedCacheLayer):
    """``EmptiedCacheLayer`` that counts in a tensor: a number would be part of the graph, and each token need another."""

    is_compileable = True

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__()
        self._capacity = capacity
        self.seen: Any = torch.zeros((), dtype=torch.long, device=device)
        self.is_initialized = True
        torch._dynamo.mark_static_address(self.seen)

    def count(self, hidden_states: Tensor) -> None:
        self.seen.add_(hidden_states.shape[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._capacity, 0

    def reset(self) -> None:
        self.seen.zero_()
