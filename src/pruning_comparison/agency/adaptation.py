"""Adaptation: what survives is refitted, in closed form, so that the residual stream is kept.

Dimension letters: B batch, T time, S samples, E embedding, F features, H' live heads of a layer, D head size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.agency.before_norms import added_to_stream, output_that_adds
from pruning_comparison.agency.streams import DenseStream, Stream, replaced_output, silent_inputs
from pruning_comparison.measure.memory import PeakMemory
from pruning_comparison.models.devices import fast_products
from pruning_comparison.models.heads import (
    EmptiedAttention,
    attentions,
    blocks,
    has_parallel_blocks,
    head_grid,
    input_major_weight,
    last_norms,
    mlp_output_projections,
    output_projections,
    set_projection,
)
from pruning_comparison.spec import ADAPTATIONS

_GRAM_BLOCK = 192


@dataclass(frozen=True)
class AdaptationCost:
    """What adapting one model cost: seconds, calibration tokens, and peak memory (None with a reason if not measured).

    ``seconds`` counts the dense pass, which models that are adapted on the same text share, as if this were the only one.
    """

    seconds: float
    tokens: int
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    scratch_bytes: int = 0


@torch.no_grad()
def adapt(
    dense: DenseStream,
    pruned: PreTrainedModel,
    *,
    steps: str = "refit-mlp",
    ridge: float = 0.1,
    mlp_ridge: float = 0.3,
    most_tokens: int | None = None,
    measure_peak: bool = False,
    allow_new_bias: bool = True,
    parts: int = 1,
    part_layers: int = 1,
    lost_ratio: float | None = None,
    error_share: float = 1.0,
    longest: float | None = None,
    sinks_apart: bool = False,
    openings_to_sink: bool = False,
) -> AdaptationCost:
    """Adapts a physically pruned model, in place, to its dense original on the calibration text of ``dense``.

    The pruned stream walks the layers towards the dense one, which is known at every place. At each layer the target is what
    attention, and then the MLP, has to add for the two to meet, so that later layers make up for what earlier ones lost.
    With h the stream that enters a block, A what attention and M what the MLP adds, attention's target is

        T = (h + A)_dense - h_pruned                 where the MLP reads what attention has added to,
        T = (h + A + M)_dense - (h + M)_pruned       where both read h and are added up together,

    and the MLP's is what then is left: T = (h + A + M)_dense - (h + A')_pruned, A' being adapted. ``steps`` names how
    far adaptation goes:

    * "none": nothing is changed;
    * "bias": a constant on the output projections of layers that have lost heads, the mean over the text of what these heads
      add in the *dense* model, mean(X_lost) W_lost (bias compensation; An et al. 2024, FLAP). What earlier layers have lost
      is not made up for: each layer is taken by itself;
    * "gate": the constant mean(T) - mean(X) W, and a gate for each surviving head, fitted by least squares and folded into
      its weights (mask tuning; Kwon et al. 2022). It may exceed 1;
    * "refit": also attention's whole output projection, W [F, E], from X [S, F], the surviving heads' outputs in the
      *pruned* model, centred:

          dW = (X'X + lambda I)^-1 X'(T - X W),  bias = mean(T) - mean(X) (W + dW),  lambda = ridge * mean diagonal of X'X,

      ridge regression towards the original weights (Hoerl and Kennard 1970, shrunk to a prior other than zero);
    * "refit-mlp": the MLP's output projection as well, with ``mlp_ridge``.

    Where a norm or a factor comes between what attention or the MLP writes and what is added to the stream (Gemma 2 and 3,
    OLMo 2, Granite), T is what has to enter it (``before_norms``). A mixture of experts has no one projection to refit:
    "refit-mlp" is refused for it.

    A layer without heads keeps its bias term, refitted to mean(T). Where the family has no output bias, one is added, unless
    ``allow_new_bias`` is off: then X is not centred and there is no bias, and a layer without heads goes on adding nothing.
    ``most_tokens`` leaves out what comes after the batch that reaches so many.

    With ``parts`` above 1 batches are dealt out in so many, and ``part_layers`` layers after one another are fitted on one
    part, the next on the next: what a layer makes up for is then error that was not fitted on its text. With a
    ``lost_ratio`` positions whose stream is that many times longer, or shorter, than the dense model's are left out of the
    regressions. ``error_share`` is how much of the difference that a layer finds is part of its target.

    With ``openings_to_sink`` openings are read only up to where first tokens become long (``DenseStream.sink_layer``): by
    attention in that layer and by everything before it. A first token depends on nothing but its id there, so an opening of
    one token holds all of it; a whole window has but one such token, and where that comes out wrong it has no sink.

    Sums accumulate in float64 from products in float32 or better, and are solved in float64; a singular matrix gets more
    ridge until the solution is finite. Layers before the first pruned one are untouched. ValueError for unknown steps.
    """
    if steps not in ADAPTATIONS:
        raise ValueError(f"unknown adaptation {steps!r}; choose one of {', '.join(ADAPTATIONS)}")
    if steps == "refit-mlp" and None in mlp_output_projections(pruned):
        raise ValueError(
            "refit-mlp needs one projection that writes what the MLP adds, and this model has mixtures of experts; "
            "choose refit"
        )
    if steps == "none":
        return AdaptationCost(0.0, 0, None, "nothing was adapted")
    started = time.perf_counter()
    with PeakMemory(dense.model.device, enabled=measure_peak) as peak:
        streams = dense.start(most_tokens)
        tokens = sum(stream.hidden.shape[0] * stream.hidden.shape[1] for stream in streams)
        last_with_openings = len(blocks(pruned))
        if openings_to_sink:
            last_with_openings = -1 if dense.sink_layer is None else dense.sink_layer
        changed = False
        for layer in range(len(blocks(pruned))):
            if layer > last_with_openings:
                streams = [stream for stream in streams if not stream.opening]
            changed = changed or _is_pruned(dense.model, pruned, layer)
            if not changed:
                _follow(dense, streams, layer)
                continue
            if steps == "bias":
                # On the dense stream T is what all heads add, and X what the survivors do: the difference is the lost ones'.
                if _is_pruned(dense.model, pruned, layer):
                    _adapt_attention(
                        dense, pruned, layer, streams, steps, ridge, allow_new_bias, _FittedText(0, 1, None)
                    )
                _follow(dense, streams, layer)
                continue
            text = _FittedText(layer // part_layers % parts, parts, lost_ratio, 1 - error_share, longest, sinks_apart)
            added = _adapt_attention(dense, pruned, layer, streams, steps, ridge, allow_new_bias, text)
            if layer == last_with_openings:
                streams = [stream for stream in streams if not stream.opening]
                added = added[: len(streams)]
            refits_mlp = steps == "refit-mlp"
            _adapt_mlp(dense, pruned, layer, streams, added, mlp_ridge if refits_mlp else None, allow_new_bias, text)
    seconds = time.perf_counter() - started + dense.seconds
    return AdaptationCost(seconds, tokens, peak.bytes, peak.reason, dense.scratch_bytes)


def ridge_towards(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The weights [F, E] that minimise |T - X V|^2 + lambda |V - W|^2, lambda = ridge * mean diagonal of the Gram matrix.

    ``gram`` X'X [F, F] and ``cross`` X'T [F, E] are float64 sums, centred if a bias takes up the means; ``weight`` W [F, E].
    Always finite: where the Cholesky factor does not exist or the solution overflows, the ridge grows tenfold.
    """
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        return weight.double()
    right = cross - gram @ weight.double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    strength = ridge
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + strength * scale * identity)
        if not bool(failed):
            solution = weight.double() + torch.cholesky_solve(right, factor)
            if bool(torch.isfinite(solution).all()):
                return solution
        if strength > 1e12:
            return weight.double()
        strength *= 10


@dataclass(frozen=True)
class _FittedText:
    """What a layer is fitted on: one of ``parts`` of the batches, and in them positions that are not lost."""

    part: int
    parts: int
    lost_ratio: float | None
    given_up: float = 0.0
    longest: float | None = None
    sinks_apart: bool = False

    def has(self, number: int, batches: int) -> bool:
        """Whether a batch is read; with fewer batches than parts all are."""
        return batches < self.parts or number % self.parts == self.part

    def of(
        self, x: Tensor, targets: Tensor, dense: Tensor, pruned: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Of X [B, T, F] and targets [B, T, E] the positions where the two streams [B, T, E] are about as long; and what
        each of them counts for."""
        weights: float | Tensor = weight
        if self.longest is not None:
            length = torch.linalg.vector_norm(dense, dim=-1)
            weights = weight * (self.longest * length.median() / length).clamp(max=1).square()
        if self.lost_ratio is None:
            return x, targets, weights
        ratio = torch.linalg.vector_norm(pruned, dim=-1) / torch.linalg.vector_norm(dense, dim=-1)
        here = (ratio < self.lost_ratio) & (ratio > 1 / self.lost_ratio)
        if bool(here.all()) or not bool(here.any()):
            return x, targets, weights
        return x[here], targets[here], weights[here] if isinstance(weights, Tensor) else weights


@dataclass
class _Moments:
    """Sums of what a projection reads, X [S, F], and of its targets, T [S, E], from which it is refitted.

    Activations can be far from zero compared with their spread: products are taken around the first batch's means, or
    float32 would lose in the mean what the regression needs of the spread. Moving to any other centre later is exact.
    """

    samples: float = 0.0
    shifts: tuple[Tensor, Tensor] | None = None
    sums: tuple[Tensor, Tensor] = field(init=False)
    gram: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    apart: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def add(self, x: Tensor, targets: Tensor, weight: float | Tensor = 1.0) -> None:
        """Adds samples of ``x`` [.., F] and ``targets`` [.., E], each of which counts ``weight`` (one, or [..]) times."""
        x, targets = x.flatten(0, -2), targets.flatten(0, -2)
        if self.shifts is None:
            self.shifts = x.to(targets.dtype).mean(0), targets.mean(0)
            self.sums = self.shifts[0].double() * 0, self.shifts[1].double() * 0
            self.gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.cross = x.new_zeros(x.shape[1], targets.shape[1], dtype=torch.float64)
        # In float32 or better, whatever x is in: the shifts are. Each further copy of x would cost as much as a product.
        x, targets = x - self.shifts[0], targets - self.shifts[1]
        if isinstance(weight, Tensor):
            root = weight.flatten().sqrt()[:, None]
            self.samples += float(weight.sum())
            x, targets = x * root, targets * root
            self.sums = (
                self.sums[0] + (x * root).sum(0, dtype=torch.float64),
                self.sums[1] + (targets * root).sum(0, dtype=torch.float64),
            )
            self.gram += _gram(x).double()
            self.cross += (x.T @ targets).double()
            return
        self.samples += weight * len(x)
        self.sums = (
            self.sums[0] + weight * x.sum(0, dtype=torch.float64),
            self.sums[1] + weight * targets.sum(0, dtype=torch.float64),
        )
        self.gram += weight * _gram(x).double()
        self.cross += weight * (x.T @ targets).double()

    def set_apart(
        self, sinks: Tensor, x: Tensor, targets: Tensor, dense: Tensor, pruned: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keeps the rows at ``sinks`` (bool [B, T]) for later; x, targets and both streams without them."""
        if not bool(sinks.any()):
            return x, targets, dense, pruned
        self.apart.append((x[sinks], targets[sinks], weight))
        rest = ~sinks
        return x[rest], targets[rest], dense[rest], pruned[rest]

    def _add_those_apart(self, weight: Tensor) -> None:
        """Adds the rows kept for later; their target is what ``weight`` gives, moved for all alike to where the mean is."""
        if not self.apart:
            return
        x = torch.cat([rows for rows, _, _ in self.apart]).to(self.apart[0][1].dtype)
        targets = torch.cat([rows for _, rows, _ in self.apart])
        counts = torch.cat([rows.new_full((len(rows),), count) for _, rows, count in self.apart])
        own = x @ weight.to(x.dtype)
        lacking = ((targets - own) * counts[:, None]).sum(0) / counts.sum()
        self.add(x, own + lacking, counts)
        self.apart = []

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of X [F] and of T [E], float64."""
        assert self.shifts is not None
        x, targets = (
            shift.double() + total / self.samples for shift, total in zip(self.shifts, self.sums, strict=True)
        )
        return x, targets

    def products(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """X'X [F, F] and X'T [F, E] around the means, or around zero."""
        x_mean, target_mean = self.means()
        gram = self.gram - torch.outer(self.sums[0], self.sums[0]) / self.samples
        cross = self.cross - torch.outer(self.sums[0], self.sums[1]) / self.samples
        if not centred:
            gram = gram + self.samples * torch.outer(x_mean, x_mean)
            cross = cross + self.samples * torch.outer(x_mean, target_mean)
        return gram, cross

    def solve(
        self, weight: Tensor, steps: str, ridge: float, head_size: int, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The adapted weight [F, E] and bias [E], float64."""
        self._add_those_apart(weight)
        solution = weight.double()
        if steps != "bias":
            gram, cross = self.products(centred=with_bias)
            if steps == "gate":
                gates = _fitted_gates(gram, cross, solution, ridge, head_size)
                solution = solution * gates.repeat_interleave(head_size)[:, None]
            else:
                solution = ridge_towards(gram, cross, weight, ridge)
        x_mean, target_mean = self.means()
        return solution, target_mean - x_mean @ solution if with_bias else None


def _gram(x: Tensor) -> Tensor:
    """X'X [F, F] of X [S, F]. Only one triangle is multiplied out, in blocks: it is the largest cost of adaptation.

    Except on a GPU, where a few large products take less time than many small ones.
    """
    if x.is_cuda:
        return x.T @ x
    gram = x.new_empty(x.shape[1], x.shape[1])
    for first in range(0, x.shape[1], _GRAM_BLOCK):
        last = first + _GRAM_BLOCK
        block = x[:, first:last].T @ x[:, first:]
        gram[first:last, first:] = block
        gram[first:, first:last] = block.T
    return gram


def _fitted_gates(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float, head_size: int) -> Tensor:
    """The gates g [H'] that minimise |T - sum over h of g_h X_h W_h|^2 + lambda |g - 1|^2, none below 0."""
    heads = len(weight) // head_size
    written = (gram * (weight @ weight.T)).view(heads, head_size, heads, head_size).sum((1, 3))
    towards = (cross * weight).view(heads, -1).sum(1)
    gates = ridge_towards(written, towards[:, None], weight.new_ones(heads, 1), ridge)
    return gates.squeeze(1).clamp(min=0)


def _is_pruned(dense: PreTrainedModel, pruned: PreTrainedModel, layer: int) -> bool:
    before, after = output_projections(dense)[layer], output_projections(pruned)[layer]
    return after is None or before is None or before.weight.shape != after.weight.shape


def _follow(dense: DenseStream, streams: list[Stream], layer: int) -> None:
    """Moves the streams past a block that is still the dense model's."""
    norm = last_norms(dense.model)[layer]
    for number, stream in enumerate(streams):
        total = dense.at(number, layer, "after block")
        stream.hidden = total if norm is None else norm(total)


def _adapt_attention(
    dense: DenseStream,
    pruned: PreTrainedModel,
    layer: int,
    streams: list[Stream],
    steps: str,
    ridge: float,
    allow_new_bias: bool,
    text: _FittedText,
) -> list[Tensor]:
    """Adapts one layer's attention; what it then writes for every batch, [B, T, E]."""
    attention, projection = attentions(pruned)[layer], output_projections(pruned)[layer]
    moments = _Moments()
    if projection is None:
        assert isinstance(attention, EmptiedAttention)
        for number, stream in enumerate(streams):
            wanted = _wanted_of_attention(dense, pruned, layer, number, stream)
            target = output_that_adds(pruned, layer, "attention", wanted, dense.lengths(number, layer, "attention"))
            if text.has(number, len(streams)):
                moments.add(*text.of(target[..., :0], target, stream.hidden + wanted, stream.hidden, stream.weight))
        if attention.bias is not None or allow_new_bias:
            attention.bias = nn.Parameter(moments.means()[1].to(streams[0].hidden), requires_grad=False)
        bias = attention.bias
        return [torch.zeros_like(s.hidden) if bias is None else bias.expand_as(s.hidden) for s in streams]
    inputs = []
    for number, stream in enumerate(streams):
        with fast_products(dense.model):
            x = caught = stream.run_to(pruned, layer, projection)
        if text.has(number, len(streams)):
            wanted = _wanted_of_attention(dense, pruned, layer, number, stream)
            if text.given_up:
                wanted = wanted - text.given_up * (dense.before(number, layer) - stream.hidden)
            target = output_that_adds(pruned, layer, "attention", wanted, dense.lengths(number, layer, "attention"))
            full, rest = stream.hidden + wanted, stream.hidden
            if text.sinks_apart:
                x, target, full, rest = moments.set_apart(dense.sinks[number], x, target, full, rest, stream.weight)
            moments.add(*text.of(x, target, full, rest, stream.weight))
        inputs.append(caught)
    with_bias = getattr(projection, "bias", None) is not None or allow_new_bias
    head_size = head_grid(pruned.config).head_size
    solution = moments.solve(input_major_weight(projection), steps, ridge, head_size, with_bias)
    return _replaced(projection, solution, inputs, streams[0].hidden)


def _wanted_of_attention(
    dense: DenseStream, pruned: PreTrainedModel, layer: int, number: int, stream: Stream
) -> Tensor:
    """What the stream of one batch should gain by the pruned layer's attention, [B, T, E]."""
    if not has_parallel_blocks(pruned):
        return dense.at(number, layer, "after attention") - stream.hidden
    silent = torch.zeros_like(stream.hidden)
    with replaced_output(attentions(pruned)[layer], (silent, None)), fast_products(dense.model):
        without_attention = stream.run(pruned, layer)
    return dense.at(number, layer, "after block") - without_attention


def _adapt_mlp(
    dense: DenseStream,
    pruned: PreTrainedModel,
    layer: int,
    streams: list[Stream],
    added: list[Tensor],
    ridge: float | None,
    allow_new_bias: bool,
    text: _FittedText,
) -> None:
    """Adapts one layer's MLP, unless ``ridge`` is None, and moves the streams past the block.

    ``added`` is what attention writes for every batch.
    """
    projection, norm = mlp_output_projections(pruned)[layer], last_norms(pruned)[layer]
    if projection is None:
        for stream, attention_adds in zip(streams, added, strict=True):
            with replaced_output(attentions(pruned)[layer], (attention_adds, None)), fast_products(dense.model):
                stream.hidden = stream.run(pruned, layer).to(stream.hidden)
        return
    weight, old_bias = input_major_weight(projection), getattr(projection, "bias", None)
    moments = _Moments()
    inputs, totals = [], []
    for number, (stream, attention_adds) in enumerate(zip(streams, added, strict=True)):
        with (
            replaced_output(attentions(pruned)[layer], (attention_adds, None)),
            silent_inputs(projection, weight.shape[1]) as caught,
            fast_products(dense.model),
        ):
            total = stream.run_apart(pruned, layer)[1].to(stream.hidden)
        z = caught[0].view(*total.shape[:-1], -1)
        if ridge is not None and text.has(number, len(streams)):
            aim = dense.at(number, layer, "after block")
            now = total
            if text.lost_ratio is not None:
                now = total + added_to_stream(pruned, layer, "mlp", z.to(total) @ weight)
            wanted = aim - total
            if text.given_up:
                wanted = wanted - text.given_up * (dense.at(number, layer, "after attention") - total)
            target, read = output_that_adds(pruned, layer, "mlp", wanted, dense.lengths(number, layer, "mlp")), z
            if text.sinks_apart:
                read, target, aim, now = moments.set_apart(dense.sinks[number], z, target, aim, now, stream.weight)
            moments.add(*text.of(read, target, aim, now, stream.weight))
        inputs.append(z)
        totals.append(total)
    if ridge is None:
        solution = weight.double(), None if old_bias is None else old_bias.double()
    else:
        solution = moments.solve(weight, "refit", ridge, 1, old_bias is not None or allow_new_bias)
    written = _replaced(projection, solution, inputs, streams[0].hidden, write=ridge is not None)
    for stream, total, adds in zip(streams, totals, written, strict=True):
        after = total + added_to_stream(pruned, layer, "mlp", adds)
        stream.hidden = after if norm is None else norm(after)


def _replaced(
    projection: nn.Module,
    solution: tuple[Tensor, Tensor | None],
    inputs: list[Tensor],
    like: Tensor,
    write: bool = True,
) -> list[Tensor]:
    """Writes a solution into its projection; what the projection then makes of every batch of ``inputs``.

    Inputs are let go of one by one: they are the largest thing in memory.
    """
    weight, bias = solution[0].to(like), None if solution[1] is None else solution[1].to(like)
    if write:
        set_projection(projection, weight, bias)
    outputs = []
    while inputs:
        product = inputs.pop(0).to(like) @ weight
        outputs.append(product if bias is None else product + bias)
    return outputs
