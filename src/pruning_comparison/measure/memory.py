"""Memory: parameters and key-value cache in exact bytes, peak use as measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.models.heads import head_grid, kept_heads, live_groups

CACHE_TOKENS = 1000
"""The length of context at which the cache of different runs, whatever their prompts, is compared."""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones counted once. Exact; lower is better."""
    return _total_bytes(model.parameters())


def decode_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters that one decoding step has to read: all but embedding tables, of which it reads a row.

    A table that is tied to the output head is read whole. With the cache, this is what bounds the speed of decoding at
    batch 1 on any memory-bound machine.
    """
    head = model.get_output_embeddings()
    read_whole = None if head is None else id(head.weight)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) != read_whole]
    return parameter_bytes(model) - _total_bytes(tables)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache. Exact; lower is better."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cache_bytes_after(model: PreTrainedModel, tokens: int = CACHE_TOKENS) -> int:
    """Bytes of keys and values that one text of ``tokens`` tokens leaves in the cache, in layers that keep all tokens.

    From the heads that the model has: a key-value head stays for as long as a query head reads it. A model whose lost heads
    are only masked keeps them all. Exact; lower is better.
    """
    grid = head_grid(model.config)
    kept = sum(len(live_groups(grid, row)) for row in kept_heads(model.config))
    return 2 * kept * grid.head_size * tokens * model.dtype.itemsize


class PeakMemory:
    """Context that measures the peak memory in use within it: of the device on CUDA, of the process on Linux.

    ``bytes`` is None where it was not measured or cannot be, and ``reason`` then says why. The process's peak includes
    all that was resident before: it compares variants, it does not isolate one model.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.device = device
        self.bytes: int | None = None
        self.reason: str | None = None if enabled else "peak memory is measured with --memory_logging"

    def __enter__(self) -> PeakMemory:
        if self.reason is None:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            else:
                try:
                    _CLEAR_REFS.write_text("5")
                except OSError as error:
                    self.reason = f"the peak of the process cannot be reset on this system: {error.strerror}"
        return self

    def __exit__(self, *exception: object) -> None:
        if self.reason is not None:
            return
        if self.device.type == "cuda":
            self.bytes = int(torch.cuda.max_memory_allocated(self.device))
            return
        match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        self.bytes = int(match[1]) * 1024 if match else None
        self.reason = None if match else "the system does not report the peak of the process"


def _total_bytes(parameters: Iterable[Tensor]) -> int:
    unique = {id(parameter): parameter for parameter in parameters}
    return sum(parameter.numel() * parameter.element_size() for parameter in unique.values())
