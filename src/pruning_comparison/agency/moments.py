"""Moments: what the heads of a model hand to their output projections, gathered in one streamed pass over calibration text.

The pass keeps sums only, so that memory does not depend on how much text there is.

Dimension letters: N windows, B batch, T time, S samples, L layers, H heads, D head size, E embedding, F features (live heads
of one layer x D).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning_comparison.agency.rounded import gram_of, is_rounded, origin_of
from pruning_comparison.models.devices import exact_sums
from pruning_comparison.models.heads import (
    attention_implementation,
    attentions,
    head_columns,
    head_grid,
    input_major_weight,
    live_heads,
    output_projections,
)
from pruning_comparison.scoring.prices import Prices


@dataclass
class LayerMoments:
    """First and second moments of what the live heads of one layer hand to its output projection, X [S, F].

    Sums are kept for two halves of the text apart, windows of even and of odd number, so that what is fitted on one can be
    judged on the other. Products are taken in float32 (or better) around the first batch's mean and added up in float64:
    activations can be far from zero compared with their spread. Moving to any other centre later is exact. Where X comes in
    bfloat16 on a CPU, products are those of ``agency.rounded``.

    ``heads`` are the layer's live heads in the order of the features, ``weight`` [F, E] the output projection's rows of
    these heads, as they were in the pass.
    """

    heads: tuple[int, ...]
    head_size: int
    weight: Tensor
    counts: list[int] = field(default_factory=lambda: [0, 0])
    shift: Tensor | None = None
    sums: Tensor = field(init=False)
    products: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size, device = len(self.heads) * self.head_size, self.weight.device
        self.sums = torch.zeros(2, size, dtype=torch.float64, device=device)
        self.products = torch.zeros(2, size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, first_window: int) -> None:
        """Adds a batch [B, T, F] whose first window has the number ``first_window``."""
        rounded = is_rounded(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.shift is None:
            self.shift = origin_of(x.flatten(0, 1)) if rounded else x.mean((0, 1))
        x = x - self.shift
        with exact_sums(x):
            for half in (0, 1):
                part = x[(half - first_window) % 2 :: 2].flatten(0, 1)
                self.counts[half] += len(part)
                if rounded:
                    self.sums[half] += part.sum(0).double()
                    self.products[half] += gram_of(part)
                    continue
                self.sums[half] += part.double().sum(0)
                self.products[half] += (part.T @ part).double()

    def count(self, half: int | None = None) -> int:
        """Tokens in one half of the text, or in all of it."""
        return sum(self.counts) if half is None else self.counts[half]

    def mean(self, half: int | None = None) -> Tensor:
        """Mean of X [F] over one half of the text, or over all of it; float64."""
        sums = self.sums.sum(0) if half is None else self.sums[half]
        return self._origin() + sums / self.count(half)

    def gram(self, half: int | None = None, *, about: Tensor | None = None) -> Tensor:
        """(X - c)'(X - c) [F, F], float64: a sum over tokens. ``about`` c [F] is the mean of the same tokens if None."""
        sums, products = (
            (self.sums.sum(0), self.products.sum(0)) if half is None else (self.sums[half], self.products[half])
        )
        step = (self.mean(half) if about is None else about) - self._origin()
        cross = torch.outer(sums, step)
        return products - cross - cross.T + self.count(half) * torch.outer(step, step)

    def covariance(self, *, centred: bool = True) -> Tensor:
        """The Gram matrix per token [F, F]; about zero instead of the mean where not ``centred``."""
        about = None if centred else torch.zeros_like(self.sums[0])
        return self.gram(about=about) / self.count()

    def of(self, heads: Sequence[int], weight: Tensor) -> LayerMoments:
        """Those of some of the heads alone, as if the output projection's rows of these were ``weight`` [F', E]."""
        places = torch.tensor([self.heads.index(head) for head in heads], device=self.weight.device)
        own = torch.arange(self.head_size, device=self.weight.device)
        rows = (places[:, None] * self.head_size + own).flatten()
        part = LayerMoments(tuple(heads), self.head_size, weight, list(self.counts))
        part.shift = None if self.shift is None else self.shift[rows]
        part.sums = self.sums[:, rows]
        part.products = self.products[:, rows][:, :, rows]
        return part

    def columns(self, inputs: int) -> Tensor:
        """Where the features stand among the ``inputs`` of the projection: of all heads', or of the live ones' alone."""
        of_live = torch.arange(len(self.heads) * self.head_size, device=self.weight.device)
        if inputs == len(of_live):
            return of_live
        heads = torch.tensor(self.heads, device=self.weight.device).repeat_interleave(self.head_size)
        return heads * self.head_size + of_live % self.head_size

    def _origin(self) -> Tensor:
        assert self.shift is not None
        return self.shift.double()


@dataclass(frozen=True)
class HeadMoments:
    """What one pass over calibration text has seen of a model's heads.

    ``moments`` per layer, None where a layer has no head left; ``utilisation`` [L, H] (see ``observe``), NaN for withdrawn
    heads and where it was not asked for; ``keep`` bool [L, H].
    """

    moments: tuple[LayerMoments | None, ...]
    utilisation: Tensor
    keep: Tensor

    def after(self, prices: Prices) -> HeadMoments:
        """What would be seen of the heads that ``prices`` still has, if those that have left changed nothing but the output
        projection, refitted in closed form. No pass is made: later layers would in truth read another stream.
        """
        layers = tuple(
            None if seen is None or left is None else seen.of(left.heads, left.weight)
            for seen, left in zip(self.moments, prices.layers, strict=True)
        )
        live = torch.zeros_like(self.keep)
        for number, layer in enumerate(layers):
            if layer is not None:
                live[number, list(layer.heads)] = True
        return HeadMoments(layers, self.utilisation.masked_fill(~live.cpu(), torch.nan), live)


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    keep: Tensor,
    batch_size: int,
    utilisation: bool = True,
    exclude_first: bool = False,
) -> HeadMoments:
    """One streamed pass of a model over calibration ``windows`` [N, T] of token ids, at least two of two tokens each.

    The model may be physically pruned or of full size with the gates of lost heads closed (``mask_heads``); ``keep`` bool
    [L, H] says which heads are live. ``exclude_first`` leaves the first token of every window out of the moments: there
    attention sees one token only, and many models park their attention on it.

    With a_h(t, s) the attention that head h pays from position t to s, and v_h(s) the value that it reads there,

        utilisation_h = sum over t > 0, 0 < s <= t of a_h(t, s) |v_h(s)| / sum over s > 0 of |v_h(s)|,

    sums over windows as well: attention mass weighted by value norms (Kobayashi et al. 2020, "Attention is not only a
    weight"), first token excluded, relative to the head's mean value norm. It is 0 for a head that only parks on the first
    token, or on tokens with nothing to read, and about 1 for one that spreads its attention evenly over the others.
    Attention maps need not exist for it: attention is asked a second time, for the norms in place of the values. It can be
    switched off, which saves that.

    Models in half precision are accumulated in float32 and better. ValueError for too little text, for a mask that does not
    fit the model or whose lost heads still write, and for activations that are not finite.
    """
    if windows.ndim != 2 or windows.shape[0] < 2 or windows.shape[1] < 2:
        raise ValueError(
            f"signals need at least 2 windows of 2 tokens, got {tuple(windows.shape)}; give more calibration text"
        )
    moments = _empty_moments(model, keep)
    used = torch.zeros(keep.shape, dtype=torch.float64)
    available = torch.zeros(keep.shape, dtype=torch.float64)
    done = 0
    with ExitStack() as stack:
        if utilisation:
            stack.enter_context(_watched_attention(model, keep, used, available))

        def watch_inputs(layer: int, projection: nn.Module, layer_moments: LayerMoments) -> None:
            columns = _live_columns(model, projection, keep[layer])

            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                x = inputs[0][:, 1:] if exclude_first else inputs[0]
                if columns is not None:
                    if done == 0:
                        _check_silent(x, columns, layer)
                    x = x[..., columns]
                layer_moments.add(x, done)

            stack.callback(projection.register_forward_pre_hook(hook).remove)

        for layer, projection in enumerate(output_projections(model)):
            layer_moments = moments[layer]
            if layer_moments is not None:
                assert projection is not None
                watch_inputs(layer, projection, layer_moments)
        for batch in windows.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
            done += len(batch)
    for layer, layer_moments in enumerate(moments):
        if layer_moments is not None and not bool(layer_moments.products.isfinite().all()):
            raise ValueError(f"activations of layer {layer} are not finite; use a higher precision")
    ratio = torch.where(available > 0, used / available, torch.zeros_like(used))
    seen = keep.cpu() if utilisation else torch.zeros_like(keep.cpu())
    return HeadMoments(tuple(moments), ratio.masked_fill(~seen, torch.nan), keep.clone())


def _empty_moments(model: PreTrainedModel, keep: Tensor) -> list[LayerMoments | None]:
    """One accumulator for every layer with live heads. ValueError where ``keep`` does not fit the model."""
    grid = head_grid(model.config)
    if keep.dtype != torch.bool or keep.shape != (grid.n_layers, grid.n_heads):
        raise ValueError(
            f"the keep mask must be bool {(grid.n_layers, grid.n_heads)}, got {keep.dtype} {tuple(keep.shape)}"
        )
    moments: list[LayerMoments | None] = []
    present = zip(output_projections(model), live_heads(model), keep, strict=True)
    for layer, (projection, live, kept) in enumerate(present):
        if live not in (grid.n_heads, int(kept.sum())):
            raise ValueError(
                f"layer {layer} has {live} heads, but the keep mask has {int(kept.sum())} of {grid.n_heads}"
            )
        if projection is None or not bool(kept.any()):
            moments.append(None)
            continue
        columns = _live_columns(model, projection, kept)
        weight = input_major_weight(projection).detach()
        heads = tuple(kept.nonzero().squeeze(1).tolist())
        moments.append(LayerMoments(heads, grid.head_size, weight if columns is None else weight[columns]))
    return moments


def _live_columns(model: PreTrainedModel, projection: nn.Module, kept: Tensor) -> Tensor | None:
    """Which of a projection's input features belong to live heads; None if all do."""
    head_size = head_grid(model.config).head_size
    weight = input_major_weight(projection)
    if len(weight) == int(kept.sum()) * head_size:
        return None
    return head_columns(kept, head_size).to(weight.device)


def _check_silent(x: Tensor, columns: Tensor, layer: int) -> None:
    silent = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
    silent[columns] = False
    if bool((x[..., silent] != 0).any()):
        raise ValueError(
            f"heads of layer {layer} that the keep mask calls withdrawn still write; close their gates with mask_heads"
        )


@contextmanager
def _watched_attention(model: PreTrainedModel, keep: Tensor, used: Tensor, available: Tensor) -> Iterator[None]:
    """Within it, attention adds to ``used`` and ``available`` [L, H], the two sums of the utilisation of live heads.

    The stock implementation is overridden rather than a new one registered, because masks are chosen by its name.
    """
    layers = {module: layer for layer, module in enumerate(attentions(model))}
    name = attention_implementation(model.config)
    registered = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Eager attention is registered nowhere: it is a function beside each family's attention.
        stock = registered or sys.modules[type(module).__module__].eager_attention_forward
        if module in layers:
            norm = torch.linalg.vector_norm(value, dim=-1)  # [B, K, T]
            norm[..., 0] = 0
            # The norms stand where values would, filled up to the size that fast kernels ask for.
            carrier = nn.functional.pad(norm.unsqueeze(-1), (0, value.shape[-1] - 1))
            weighed = stock(module, query, key, carrier, *args, **kwargs)[0][..., 0]  # [B, T, H]
            layer, group = layers[module], query.shape[1] // norm.shape[1]
            sums = [weighed.double().sum((0, 1)), norm.double().sum((0, 2)).repeat_interleave(group)]
            for total, part in zip((used, available), sums, strict=True):
                part = part.cpu()
                total[layer, keep[layer].cpu()] += (
                    part if len(part) == int(keep[layer].sum()) else part[keep[layer].cpu()]
                )
        return stock(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        model.set_attn_implementation(before)
