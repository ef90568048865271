"""Which device and precision to work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning_comparison.errors import InputError

LEAST_PARAMETERS_FOR_BFLOAT16 = 10_000_000


_NO_DEVICE = "--device: {!r} is not a device. Choose cpu, cuda or cuda:N."


def resolve_device(asked: str | None) -> str:
    """The device asked for, checked, or the best one there is. InputError if it is not there."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(_NO_DEVICE.format(asked)) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: {asked!r} is not supported. Choose cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(
                f"--device: {asked!r} was asked for, but this machine has no CUDA GPU that torch "
                f"{torch.__version__} can use. Leave --device out, or give --device=cpu."
            )
        if device.index is not None and device.index >= count:
            raise InputError(f"--device: {asked!r} does not exist; there are {count} GPUs, counted from 0.")
    return asked


def planned_device(asked: str | None) -> str:
    """The device asked for; a GPU even where this machine has none, since runs are planned for others. InputError for what
    is no device."""
    if asked is None or not asked.startswith("cuda"):
        return resolve_device(asked)
    try:
        return str(torch.device(asked))
    except RuntimeError:
        raise InputError(_NO_DEVICE.format(asked)) from None


def resolve_precision(asked: str | None, device: str) -> str:
    """The precision asked for, checked against the device; float16 on a CUDA GPU and float32 elsewhere by default."""
    if asked is None:
        return "float16" if device.startswith("cuda") else "float32"
    if (
        asked == "bfloat16"
        and device.startswith("cuda")
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise InputError(
            "--precision: 'bfloat16' is not supported by this GPU, only emulated. Choose float16 or float32."
        )
    return asked


def has_bfloat16_matrix_units(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, and so faster than float32 ones.

    CUDA GPUs do from compute capability 8.0 on, x86 processors with AMX or AVX-512 instructions for bfloat16. False where
    it cannot be told.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not _cpu_features().isdisjoint({"amx_bf16", "avx512_bf16"})


def gains_from_bfloat16(model: nn.Module) -> bool:
    """Whether a float32 model's matrix products are worth taking in bfloat16: on hardware with units for it, if it is large.

    Half of the time from 14 million parameters on, three quarters at 4 million (measured on an AMD EPYC).
    """
    parameters = list(model.parameters())
    large = sum(parameter.numel() for parameter in parameters) >= LEAST_PARAMETERS_FOR_BFLOAT16
    return large and parameters[0].dtype == torch.float32 and has_bfloat16_matrix_units(parameters[0].device)


def fast_products(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, the model's matrix products run in the precision it is to be prepared in (``prepare_in``).

    Where none was named, that is bfloat16 on a processor that gains from it, and float32 on a GPU, which prepares in seconds
    either way. The residual stream itself stays in float32: what is rounded is what a block adds to it.
    """
    where = next(model.parameters()).device.type
    asked: torch.dtype | None = getattr(model, _PREPARED_IN, None)
    if asked is not None:
        return torch.autocast(where, dtype=asked)
    return torch.autocast(where, dtype=torch.bfloat16) if chooses_bfloat16(model) else nullcontext()


def chooses_bfloat16(model: nn.Module) -> bool:
    """Whether ``fast_products`` takes bfloat16 of its own accord: nothing else was asked for, and the processor gains."""
    asked = getattr(model, _PREPARED_IN, None)
    return asked is None and next(model.parameters()).device.type != "cuda" and gains_from_bfloat16(model)


def prepare_in(model: nn.Module, precision: str) -> None:
    """Has the matrix products of all passes that prepare (scores, prices, adaptation) run in ``precision``.

    "float32" leaves the choice to ``fast_products``. Copies of the model are prepared alike. Weights, residual streams and
    sums stay in float32 whatever is asked for.
    """
    setattr(model, _PREPARED_IN, None if precision == "float32" else getattr(torch, precision))


def asked_products(model: nn.Module) -> AbstractContextManager[Any]:
    """``fast_products``, but only where ``prepare_in`` has named a precision: for passes that have a rule of their own."""
    return fast_products(model) if getattr(model, _PREPARED_IN, None) is not None else nullcontext()


_PREPARED_IN = "prepared_in"
"""Attribute of a model that holds the precision ``prepare_in`` has named."""


def exact_sums(x: Tensor) -> AbstractContextManager[Any]:
    """Within it, products of activations ``x`` that are added up are in the precision of ``x``, whatever autocast is on.

    On a GPU, where that costs little, and in float16, whose range sums would leave.
    """
    where = x.device.type
    if where == "cpu":
        half = torch.is_autocast_enabled(where) and torch.get_autocast_dtype(where) == torch.float16
        return torch.autocast(where, enabled=False) if half else nullcontext()
    return torch.autocast(where, enabled=False) if where == "cuda" else nullcontext()


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within it, and within one autocast that is begun in it, each weight is rounded once, not in every pass.

    Autocast keeps rounded weights only of parameters that are trained. It takes as much memory as the rounded model.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within it, float32 products on a processor with matrix units for bfloat16 round their factors to it, and nothing else.

    Sums and results stay in float32, where autocast would round results as well. So a product of factors that are bfloat16
    numbers already is exact but for the order of its sums. Processors without such units multiply in float32, and GPUs do
    what they do elsewhere. The switch is the process's: no other thread should multiply meanwhile.
    """
    switch: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - it is made when torch is imported
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def room_for_streams_bytes(device: torch.device) -> int:
    """How many bytes of residual streams may be kept where the model is: a share of a GPU's free memory, or what a host's
    memory can spare; more goes to a file.
    """
    if device.type != "cuda":
        return MOST_STREAM_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(STREAM_SHARE * (free + unused))


MOST_STREAM_BYTES = 256 * 2**20
"""A dense stream larger than this, in float32, does not stay in the memory of a host."""

STREAM_SHARE = 0.4
"""Of a GPU's free memory, for dense streams: walking a pruned model beside them takes half as much again."""


def _cpu_features() -> set[str]:
    """Names of the processor's features, from torch or, where it is too old to tell, from Linux."""
    ask: Any = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return {name for name, there in ask().items() if there is True}
    listing = Path("/proc/cpuinfo")
    return set(listing.read_text().split()) if listing.is_file() else set()
