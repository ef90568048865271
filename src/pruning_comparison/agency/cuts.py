"""Layers whose heads have left and whose output projection is refitted from moments alone, and what the model says then.

Nothing is removed: a cut stands in for the output projection while the model runs, so that many can be tried on one text.

Dimension letters: N windows, B batch, T time, E embedding, V vocabulary, Q trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.agency.moments import LayerMoments
from pruning_comparison.models.devices import fast_products, rounded_once
from pruning_comparison.models.heads import input_major_weight, output_projections
from pruning_comparison.scoring.ablation import recorded_blocks, resumed_at
from pruning_comparison.scoring.prices import LayerPrices


@dataclass(frozen=True)
class Cut:
    """Weight and bias [E] of a layer's output projection after some of its heads have left and the others have adapted.

    The weight has as many rows as the projection, those of heads that have left zero.
    """

    weight: Tensor
    bias: Tensor | None


def cut_layer(
    model: PreTrainedModel,
    number: int,
    moments: LayerMoments,
    layer: LayerPrices,
    heads: Sequence[int],
    *,
    new_bias: bool = True,
) -> Cut:
    """The cut of a layer that loses ``heads``: ridge regression in closed form, the bias from the means.

    ``layer`` and ``moments`` are of the same live heads. With no heads to lose the projection is as it is.
    """
    projection = output_projections(model)[number]
    assert projection is not None
    old_weight, old_bias = input_major_weight(projection), getattr(projection, "bias", None)
    left: LayerPrices | None = layer
    for head in heads:
        assert left is not None
        left = None if len(left.heads) == 1 else left.withdraw(head)
    adapted = torch.zeros_like(layer.weight)
    if left is not None:
        staying = torch.tensor([head in left.heads for head in moments.heads], device=adapted.device)
        adapted[staying.repeat_interleave(moments.head_size)] = left.weight
    bias = None
    if has_bias(projection, new_bias):
        # What the heads write on average is kept up: the mean of what is missing goes into the bias.
        bias = moments.mean() @ (moments.weight.double() - adapted)
        bias = bias if old_bias is None else bias + old_bias.double()
    weight = torch.zeros_like(old_weight)
    weight[moments.columns(len(old_weight))] = adapted.to(old_weight)
    return Cut(weight, None if bias is None else bias.to(old_weight))


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    trials: Sequence[Mapping[int, Cut]],
    windows: Tensor,
    *,
    reference: PreTrainedModel | None = None,
    exclude_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL(reference || model), nats per token, over each of the ``windows`` [N, T]: as the model is, float64 [N], and with
    the cuts of each trial, float64 [Q, N].

    A trial holds cuts by number of the layer. ``reference`` is the model itself if None. ``exclude_first`` leaves the first
    position of every window out. Blocks before a trial's first cut are not run again. Where the device gains from it blocks
    run in bfloat16. Logits are not rounded to it: they would differ by a twentieth of a nat between two runs, more than many
    a cut costs.
    """
    judged_by = reference or model
    at_once = 1 if model.device.type == "cpu" else WINDOWS_AT_ONCE_ON_GPU
    uncut, of_trials = [], []
    for batch in windows.split(at_once):
        ids = batch.to(model.device)
        with ExitStack() as stack:
            models = {id(one): one for one in (judged_by, model)}.values()
            for one in models:
                stack.enter_context(rounded_once(one))
            stack.enter_context(fast_products(model))
            logits = _Logits()
            for one in models:
                stack.enter_context(logits.of(one))
            with recorded_blocks(judged_by) as outputs:
                divergence_of = _Divergence(judged_by, ids, exclude_first, logits)
            if judged_by is not model:
                with recorded_blocks(model) as outputs:
                    uncut.append(divergence_of(model))
            else:
                uncut.append(torch.zeros(len(batch), dtype=torch.float64))
            row = torch.zeros(len(trials), len(batch), dtype=torch.float64)
            for number, trial in enumerate(trials):
                with resumed_at(model, min(trial), outputs), _projecting(model, trial):
                    row[number] = divergence_of(model)
            of_trials.append(row)
    return torch.cat(uncut), torch.cat(of_trials, 1)


def has_bias(projection: nn.Module | None, new_bias: bool) -> bool:
    """Whether an output projection has a bias, or may be given one."""
    return new_bias or getattr(projection, "bias", None) is not None


WINDOWS_AT_ONCE_ON_GPU = 4
"""On a GPU. On a CPU one is as fast as several, and log probabilities of a large vocabulary are what takes up memory."""


@contextmanager
def _projecting(model: PreTrainedModel, cuts: Mapping[int, Cut]) -> Iterator[None]:
    """Within it, the output projections of these layers multiply by the cuts' weights and add their biases."""
    changed: list[Any] = []
    every = output_projections(model)
    for number, cut in cuts.items():
        projection: Any = every[number]

        def forward(x: Tensor, cut: Cut = cut) -> Tensor:
            product = x @ cut.weight.to(x.dtype)
            return product if cut.bias is None else product + cut.bias.to(x.dtype)

        projection.forward = forward
        changed.append(projection)
    try:
        yield
    finally:
        for projection in changed:
            del projection.forward


class _Logits:
    """Logits in the precision of the weights, whatever the blocks are computed in; the first ones are the reference.

    Multiplying out a vocabulary takes most of a pass that is resumed in the middle. Where blocks run in half precision only
    the reference is multiplied in full, and of every other pass what differs from it in half precision as well: the rounding
    is then relative to the difference. With ``differences`` on, those passes return the difference alone.
    """

    def __init__(self) -> None:
        self.differences = False
        self._first: tuple[Tensor, Tensor] | None = None
        self._rounded: dict[int, Tensor] = {}

    def is_reference(self, logits: Tensor) -> bool:
        """Whether these are the reference as they were multiplied out, in half precision from then on: no cap, no factor."""
        half = torch.is_autocast_enabled(logits.device.type)
        return half and self._first is not None and logits is self._first[1]

    @contextmanager
    def of(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, a model's logits are these. All models share one matrix from the stream to logits."""
        head: Any = model.get_output_embeddings()
        plain = head.forward

        def forward(x: Tensor) -> Tensor:
            where = x.device.type
            half = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
            with torch.autocast(where, enabled=False):
                x = x.to(head.weight.dtype)
                if self._first is None or half is None:
                    logits: Tensor = plain(x)
                    self._first = self._first or (x, logits)
                    return logits
                start, logits = self._first
                if id(head) not in self._rounded:
                    self._rounded[id(head)] = head.weight.to(half)
                difference = nn.functional.linear((x - start).to(half), self._rounded[id(head)])
                return difference if self.differences else logits + difference

        head.forward = forward
        try:
            yield
        finally:
            del head.forward


class _Divergence:
    """KL(reference || model) over windows of ids [B, T], mean over positions, float64 [B] on the CPU."""

    def __init__(self, reference: PreTrainedModel, ids: Tensor, exclude_first: bool, logits: _Logits) -> None:
        """Runs the ``reference``, whose head multiplies out ``logits``."""
        self._ids, self._positions = ids, slice(int(exclude_first), None)
        raw: Tensor = reference(input_ids=ids, use_cache=False).logits
        self._by_differences = logits.differences = logits.is_reference(raw)
        self._expected = _log_softmax(raw[:, self._positions])
        self._likely = self._expected.exp()

    def __call__(self, model: PreTrainedModel) -> Tensor:
        now: Tensor = model(input_ids=self._ids, use_cache=False).logits[:, self._positions]
        if self._by_differences:
            found = divergence_of_differences(self._likely, now)
            if bool(found.isfinite().all()):
                return found.mean(1, dtype=torch.float64).cpu()
            now = self._expected + now
        now = _log_softmax(now)
        # In place: fresh memory of this size costs as much as filling it.
        nats = torch.sub(self._expected, now, out=now).mul_(self._likely)
        return nats.sum(-1).mean(1, dtype=torch.float64).cpu()


def divergence_of_differences(likely: Tensor, differences: Tensor) -> Tensor:
    """KL(p || q) from probabilities p [B, T, V], ``likely``, and what the logits of q have more, d [B, T, V]; [B, T].

    With c = sum p d, KL(p || q) = log sum p exp(d - c): no softmax is needed. In pieces that a processor's cache holds,
    since fresh memory of this size costs as much as filling it. Infinite where exp overflows.
    """
    nats = likely.new_empty(likely.shape[:-1])
    at_once = max(1, _NUMBERS_AT_ONCE // likely.shape[-1]) if nats.device.type == "cpu" else nats.numel()
    buffer = likely.new_empty(at_once, likely.shape[-1])
    pieces = zip(
        likely.flatten(0, 1).split(at_once),
        differences.flatten(0, 1).split(at_once),
        nats.view(-1).split(at_once),
        strict=True,
    )
    with torch.autocast(nats.device.type, enabled=False):
        for p, rounded, out in pieces:
            d, total = buffer[: len(p)].copy_(rounded), p.sum(-1)
            mean = _row_products(p, d) / total
            torch.log(_row_products(p, d.sub_(mean[:, None]).exp_()) / total, out=out)
    return nats


_NUMBERS_AT_ONCE = 2**20


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """Of each row of one matrix with that of the other. On a CPU one by one: a batched product takes five times as long."""
    if x.device.type != "cpu":
        return (x * y).sum(-1)
    return torch.stack([torch.dot(one, other) for one, other in zip(x, y, strict=True)])


def _log_softmax(logits: Tensor) -> Tensor:
    """Log probabilities of every next token, [B, T, V]."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
