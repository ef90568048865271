"""Residual streams: a model walked block by block, and what the dense model's stream is at every block.

Dimension letters: N windows, B batch, T time, L layers, E embedding.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.agency.before_norms import added_to_stream
from pruning_comparison.models.devices import fast_products, room_for_streams_bytes
from pruning_comparison.models.heads import attentions, blocks, last_norms, norms_of_outputs

Place = Literal["after attention", "after block", "attention length"]


SINK_RATIO = 10.0
"""First tokens are sinks where their stream is in some block so many times as long as that of the median position.

Many models park attention on them (Xiao et al. 2024; Sun et al. 2024, "Massive activations in large language models").
"""

FIRST_TOKEN_SHARE = 1 / 16
"""Windows of one token per calibration token, ..."""

MOST_FIRST_TOKENS = 4096
"""... and how many there are at most."""


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for is known."""


@dataclass
class Stream:
    """The residual stream [B, T, E] of one batch before a block, and what else the model hands to each of its blocks.

    Those ``of_first_tokens``, of windows of one token, come after all others.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    of_first_tokens: bool = False

    def run(self, model: PreTrainedModel, layer: int) -> Tensor:
        """The stream after the block."""
        args, kwargs = self.calls[layer]
        output: Any = blocks(model)[layer](self.hidden, *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def run_to(self, model: PreTrainedModel, layer: int, module: nn.Module) -> Tensor:
        """What enters ``module`` of the block; nothing after it is computed."""
        with _caught_inputs(module, stop=True) as caught:
            self.run(model, layer)
        return caught[0]

    def run_apart(self, model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The stream after the block, the sum that the block ends with (before its last norm, if it has one there), and
        what its attention writes."""
        added: list[Tensor] = []
        norm = last_norms(model)[layer]
        handle = attentions(model)[layer].register_forward_hook(
            lambda module, inputs, outputs: added.append(outputs[0])
        )
        try:
            if norm is None:
                after = self.run(model, layer)
                return after, after, added[0]
            with _caught_inputs(norm) as caught:
                after = self.run(model, layer)
            return after, caught[0].view_as(after), added[0]
        finally:
            handle.remove()


class DenseStream:
    """What the dense model's residual stream is after attention and after the MLP of every block, over calibration text.

    It is what adaptation aims at, whatever has been pruned, so it is computed once for all levels, methods and variants. It
    stays on the model's device while it fits (``room_for_streams_bytes``). A larger one is kept in a scratch file, which
    ``scratch_bytes`` reports and ``close`` (or the end of the process) removes: memory then holds one batch at a time. In a
    file values are in float16, each piece scaled by a power of two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        *,
        batch_size: int,
        first_tokens: Tensor | None = None,
        scratch_folder: Path | None = None,
    ) -> None:
        """Walks the dense ``model`` over ``windows`` [N, T] of token ids.

        Where their first tokens are sinks, ``sink_layer`` is the block that makes them long, and the model is walked over
        the windows of one token ``first_tokens`` [M, 1] as well, if given, up to that block. Heads that park on a first
        token depend on its coming out right for every id, and a long window has but one. Where they are not, or none are
        given, ``first_tokens`` is None.

        ValueError if it is not float32 or float64: streams in less are too coarse to accumulate regression statistics in.
        """
        if model.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"adaptation needs float32 weights, got {model.dtype}: coarser streams cannot be accumulated"
            )
        started = time.perf_counter()
        self.model = model
        self.windows = windows
        batches = [batch.to(model.device) for batch in windows.split(batch_size)]
        self._starts = block_inputs(model, batches)
        layers, width = len(blocks(model)), self._starts[0].hidden.shape[-1]
        size = 2 * layers * windows.numel() * width * model.dtype.itemsize
        self._kept: list[dict[tuple[int, Place], Tensor]] = []
        self._scratch = _Scratch(scratch_folder) if size > room_for_streams_bytes(model.device) else None
        lengths = [self._walk(start, layers) for start in self._starts]
        self.sink_layer = _sink_layer(*lengths[0])
        self.first_tokens = None if self.sink_layer is None else first_tokens
        if self.sink_layer is not None and first_tokens is not None:
            # As many tokens at once as of the windows, so that memory is the same.
            more = [batch.to(model.device) for batch in first_tokens.split(batch_size * windows.shape[1])]
            for start in block_inputs(model, more):
                start.of_first_tokens = True
                self._starts.append(start)
                self._walk(start, self.sink_layer + 1)
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def _walk(self, start: Stream, layers: int) -> tuple[Tensor, Tensor]:
        """Keeps what the next batch is in the first so many ``layers``; after each, how long the stream is at the first
        and at the median position, both [L]."""
        model, number = self.model, len(self._kept)
        self._kept.append({})
        stream = Stream(start.hidden, start.calls)
        first_lengths, usual_lengths = [], []
        with fast_products(model):
            for layer in range(layers):
                before = stream.hidden
                with _caught_lengths(model, layer) as lengths:
                    after, total, written = stream.run_apart(model, layer)
                stream.hidden = after.to(model.dtype)
                added = added_to_stream(model, layer, "attention", written)
                self._keep(number, layer, "after attention", before + added)
                for place, length in lengths.items():
                    self._keep(number, layer, place, length)
                total = total.to(model.dtype)
                self._keep(number, layer, "after block", total)
                length = torch.linalg.vector_norm(total, dim=-1)
                first_lengths.append(length[:, 0].median())
                usual_lengths.append(length.median())
        return torch.stack(first_lengths), torch.stack(usual_lengths)

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch file; 0 where everything is kept in memory."""
        return 0 if self._scratch is None else self._scratch.size

    def start(self) -> list[Stream]:
        """The streams of all batches before the first block; those of first tokens are last."""
        return [Stream(stream.hidden, stream.calls, stream.of_first_tokens) for stream in self._starts]

    def at(self, batch: int, layer: int, place: Place) -> Tensor:
        """The stream [B, T, E] of a batch at a place of a block: the sum that attention, or the block, ends with."""
        if self._scratch is None:
            return self._kept[batch][layer, place]
        return self._scratch.read(batch, layer, place).to(self._starts[batch].hidden)

    def lengths(self, batch: int, layer: int) -> Tensor | None:
        """Of what the attention of a block writes, [B, T, 1]; None where no norm comes before it is added."""
        return (
            None
            if norms_of_outputs(self.model, "attention")[layer] is None
            else self.at(batch, layer, "attention length")
        )

    def close(self) -> None:
        """Removes the scratch file."""
        if self._scratch is not None:
            self._scratch.close()

    def _keep(self, batch: int, layer: int, place: Place, value: Tensor) -> None:
        if self._scratch is None:
            self._kept[batch][layer, place] = value
        else:
            self._scratch.write(batch, layer, place, value)


def drawn_first_tokens(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows of one token [M, 1], drawn from the tokens of ``windows`` [N, T]: ``FIRST_TOKEN_SHARE`` of these, at most
    ``MOST_FIRST_TOKENS``."""
    count = min(MOST_FIRST_TOKENS, max(1, round(FIRST_TOKEN_SHARE * windows.numel())))
    return windows.reshape(-1, 1)[torch.randint(windows.numel(), (count,), generator=generator)]


def _sink_layer(first: Tensor, usual: Tensor) -> int | None:
    """The block that makes first tokens long: the first after which they have half the greatest length that they reach.

    ``first`` and ``usual`` [L] are the lengths of the stream after every block, at first tokens and at the median position.
    None where first tokens are nowhere ``SINK_RATIO`` times as long as others.
    """
    if not bool((first > SINK_RATIO * usual).any()):
        return None
    return int((first >= first.max() / 2).nonzero()[0])


class _Scratch:
    """Streams in a temporary file, in float16, read and written in pieces: no page of it counts as the process's memory."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(prefix="dense_stream_", dir=folder)  # noqa: SIM115
        self._places: dict[tuple[int, int, Place], tuple[int, torch.Size, float]] = {}
        self.size = 0

    def write(self, batch: int, layer: int, place: Place, value: Tensor) -> None:
        least, most = torch.aminmax(value)
        largest = max(-float(least), float(most))
        # Powers of two lose nothing; what is left of the range keeps small values out of float16's coarse end.
        scale = 2.0 ** np.floor(np.log2(32768 / largest)) if 0 < largest < float("inf") else 1.0
        data = (value.float() * scale).half().cpu().contiguous().numpy().data.cast("B")
        self._file.seek(self.size)
        self._file.write(data)
        self._places[batch, layer, place] = (self.size, value.shape, scale)
        self.size += len(data)

    def read(self, batch: int, layer: int, place: Place) -> Tensor:
        offset, shape, scale = self._places[batch, layer, place]
        self._file.flush()
        half = torch.empty(shape, dtype=torch.float16)
        os.preadv(self._file.fileno(), [half.numpy().data.cast("B")], offset)
        return half.float().div_(scale)

    def close(self) -> None:
        self._file.close()


def block_inputs(model: PreTrainedModel, batches: Sequence[Tensor]) -> list[Stream]:
    """What the blocks receive, per batch: the model's own code makes masks and positions, not ours.

    Masks may differ between layers (sliding windows), but not between batches of one shape: nothing is padded.
    """
    every_block = blocks(model)
    calls_by_shape: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    streams: list[Stream] = []
    for batch in batches:
        known = batch.shape in calls_by_shape
        calls = calls_by_shape.setdefault(batch.shape, [])
        last = every_block[0] if known else every_block[-1]
        hidden: list[Tensor] = []

        def catch(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            *,
            known: bool = known,
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = calls,
            last: nn.Module = last,
            hidden: list[Tensor] = hidden,
        ) -> None:
            hidden.append(args[0])
            if not known:
                calls.append((args[1:], kwargs))
            if module is last:
                raise _Stop

        with ExitStack() as stack:
            for block in every_block:
                stack.callback(block.register_forward_pre_hook(catch, with_kwargs=True).remove)
            stack.enter_context(_passing_on(every_block))
            try:
                with torch.no_grad():
                    model(input_ids=batch, use_cache=False)
            except _Stop:
                streams.append(Stream(hidden[0], calls))
    return streams


@contextmanager
def _passing_on(every_block: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, blocks return what the first one does, with the stream as it came: only that one computes anything.

    What a model hands to its blocks does not depend on the stream, and a pass through all of them is not cheap.
    """
    output: list[Any] = []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, *output[0][1:]) if isinstance(output[0], tuple) else hidden

    handle = every_block[0].register_forward_hook(lambda module, inputs, outputs: output.append(outputs))
    for block in every_block[1:]:
        block.forward = forward
    try:
        yield
    finally:
        handle.remove()
        for block in every_block[1:]:
            del block.forward


@contextmanager
def replaced_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Within it, ``module`` returns ``output`` whatever it is called with, and computes nothing."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward


@contextmanager
def silent_inputs(module: nn.Module, features: int) -> Iterator[list[Tensor]]:
    """Within it, ``module`` adds nothing, zeros [.., features], and the list holds what it was called with."""
    caught: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        caught.append(x)
        return x.new_zeros(*x.shape[:-1], features)

    module.forward = forward
    try:
        yield caught
    finally:
        del module.forward


@contextmanager
def _caught_lengths(model: PreTrainedModel, layer: int) -> Iterator[dict[Place, Tensor]]:
    """Filled at its end with the length of what entered the norm of what a block's attention writes, [B, T, 1], if any."""
    lengths: dict[Place, Tensor] = {}
    norm = norms_of_outputs(model, "attention")[layer]
    if norm is None:
        yield lengths
        return
    with _caught_inputs(norm) as inputs:
        yield lengths
    lengths["attention length"] = torch.linalg.vector_norm(inputs[0].to(model.dtype), dim=-1, keepdim=True)


@contextmanager
def _caught_inputs(module: nn.Module, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Within it, the list holds the first inputs of ``module``; with ``stop`` the pass ends there."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])
        if stop:
            raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield caught
    except _Stop:
        pass
    finally:
        handle.remove()
