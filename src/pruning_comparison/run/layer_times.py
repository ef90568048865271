"""How long a decoding step spends on a layer, by how many heads it has: what ``--consent=time`` divides prices by.

Measured once per run, since another measurement would give other times, and so other heads: it is kept in the journal.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.generation import time_generation
from pruning_comparison.models import HeadGrid
from pruning_comparison.pruning.rectangles import heads_kept
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.variants import variant_named

STEPS = 16
"""Decoding steps of each model in one turn of a pair."""

TURNS = 5
"""Turns of every pair; the median of their ratios counts."""

PROMPT_TOKENS = 64
"""What the steps go on from: so many tokens of calibration text, never of prompts, which must not decide what is pruned."""


def needs_layer_times(spec: ComparisonSpec) -> bool:
    """Whether heads of this spec are held by what they save in time."""
    return any(held_by_layer_times(spec, variant) for variant in spec.variants)


def held_by_layer_times(spec: ComparisonSpec, variant: str) -> bool:
    """Whether the heads of one of its variants are."""
    record = variant_named(variant)
    return spec.consent == "time" and record.negotiates and record.consent == "by cost"


def measure_layer_times(
    dense: PreTrainedModel,
    pruned: Callable[[Tensor], PreTrainedModel],
    grid: HeadGrid,
    prompt: list[int],
    *,
    batch_size: int = 1,
    group_size: int = 1,
    rectangle: int | None = None,
) -> dict[int, float]:
    """Seconds of a decoding step per layer, by the layer's live heads, from none to all, in steps of ``group_size``.

    Or, with a ``rectangle`` of so many query heads per key-value group, for the numbers that rectangles keep.

    For each count a model that has so many heads in every layer, which ``pruned`` makes of a keep mask, takes turns with the
    dense one; its time is the median ratio of the two times the dense model's median. A step is divided by the layers, so
    the times contain, beside attention, an equal share of all else; only their differences count. ``prompt`` is read first,
    in ``batch_size`` rows.
    """
    ratios: dict[int, float] = {grid.n_heads: 1.0}
    dense_s: list[float] = []
    counts = range(0, grid.n_heads, group_size) if rectangle is None else heads_kept(grid.n_heads, rectangle)[:-1]
    for count in counts:
        smaller = pruned(even_mask(grid, count, group_size, rectangle))
        ratios[count], taken_s = _in_turns(dense, smaller, prompt, batch_size)
        dense_s += taken_s
    layer_s = median(dense_s) / grid.n_layers
    return {count: ratio * layer_s for count, ratio in sorted(ratios.items())}


def measured_ratio(dense: PreTrainedModel, pruned: PreTrainedModel, prompt: list[int], *, batch_size: int = 1) -> float:
    """A pruned model's time of a decoding step over the dense model's: the median over pairs of turns."""
    return _in_turns(dense, pruned, prompt, batch_size)[0]


def _in_turns(
    dense: PreTrainedModel, pruned: PreTrainedModel, prompt: list[int], batch_size: int
) -> tuple[float, list[float]]:
    """The median ratio of a decoding step's time to the dense model's over ``TURNS`` turns, and the dense one's seconds."""
    timings = time_generation(
        {"dense": dense, "pruned": pruned},
        [prompt] * batch_size,
        STEPS + 1,
        temperature=0.0,
        uniforms=torch.zeros(batch_size, STEPS + 1),
        measure_peak=False,
        repeats=range(TURNS),
        first_tokens=1,
    )
    dense_s, pruned_s = (
        [timing.time_per_output_token_s or 0.0 for timing in timings if timing.variant == name]
        for name in ("dense", "pruned")
    )
    return median(mine / its for mine, its in zip(pruned_s, dense_s, strict=True)), dense_s


def even_mask(grid: HeadGrid, count: int, group_size: int = 1, rectangle: int | None = None) -> Tensor:
    """A keep mask, bool [L, H], with ``count`` heads in every layer.

    Heads that leave one by one are spread over the key-value heads, the last of which go last, as they are where nobody
    chooses heads for their neighbours; those that leave in groups of ``group_size`` are whole groups. With a ``rectangle``
    of so many query heads per group it is the one with the most key-value heads, which is the slowest of that many heads.
    """
    if rectangle is not None:
        each = next((r for r in range(1, rectangle + 1) if count % r == 0 and count // r <= grid.n_kv_heads), 1)
        kept = torch.arange(grid.n_heads).view(grid.n_kv_heads, rectangle) % rectangle < each
        kept[count // each :] = False
        return kept.flatten().expand(grid.n_layers, -1).clone()
    order = torch.arange(grid.n_heads)
    if group_size == 1:
        order = order % grid.group_size * grid.n_kv_heads + order // grid.group_size
    return (order < count).expand(grid.n_layers, -1).clone()
