"""Adaptation: what survives is refitted, in closed form, so that the residual stream is kept.

Dimension letters: B batch, T time, S samples, E embedding, F features, H' live heads of a layer, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_comparison.agency.before_norms import added_to_stream, output_that_adds, pass_through, refit_gains
from pruning_comparison.agency.rounded import Buffer, add_products, is_rounded, mirror, origin_of
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
    norms_of_outputs,
    output_projections,
    set_projection,
)
from pruning_comparison.spec import ADAPTATIONS

_GRAM_BLOCK = 192


@dataclass(frozen=True)
class AdaptationCost:
    """What adapting one model cost: seconds, calibration tokens, and peak memory (None with a reason if not measured).

    ``tokens`` counts windows of one token as well (``DenseStream``), although only layers up to the sink layer read them.
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
    measure_peak: bool = False,
    allow_new_bias: bool = True,
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

    Where a norm or a factor comes between what attention writes and what is added to the stream (Gemma 2 and 3, OLMo 2,
    Granite), T is what has to enter it (``before_norms``). After the projection before a norm the norm's gains are fitted
    (``refit_gains``), and of an MLP whose output passes through a norm the gains alone: its projection is left as it is,
    since refitting it made models worse. A mixture of experts has no one projection to refit: "refit-mlp" is refused for it.

    A layer without heads keeps its bias term, refitted to mean(T), which a norm that follows then passes through as it is
    (``pass_through``). Where the family has no output bias, one is added, unless
    ``allow_new_bias`` is off: then X is not centred and there is no bias, and a layer without heads goes on adding nothing.
    Where ``dense`` has windows of one token, they are read up to its sink layer, by attention there and by everything
    before it ("bias" does without them: it is FLAP's). The MLP there makes first tokens long: it would be fitted to little
    else. What a first token is up to there depends on nothing but its id, so a window of one token holds all of it.

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
        streams = [stream for stream in dense.start() if not (stream.of_first_tokens and steps == "bias")]
        tokens = sum(stream.hidden.shape[0] * stream.hidden.shape[1] for stream in streams)
        changed = False
        for layer in range(len(blocks(pruned))):
            is_pruned = _is_pruned(dense.model, pruned, layer)
            if is_pruned and (not changed or steps == "bias"):
                _follow(dense, streams, layer)
            changed = changed or is_pruned
            added: list[Tensor] = []
            if changed and (steps != "bias" or is_pruned):
                # With "bias" on the dense stream: T is what all heads add, and X what the survivors do.
                added = _adapt_attention(dense, pruned, layer, streams, steps, ridge, allow_new_bias)
            if layer == dense.sink_layer:
                # They come after all others.
                streams = [stream for stream in streams if not stream.of_first_tokens]
                added = added[: len(streams)]
            if not changed or steps == "bias":
                continue
            refits_mlp = steps == "refit-mlp"
            _adapt_mlp(dense, pruned, layer, streams, added, mlp_ridge if refits_mlp else None, allow_new_bias)
    seconds = time.perf_counter() - started + dense.seconds
    return AdaptationCost(seconds, tokens, peak.bytes, peak.reason, dense.scratch_bytes)


def ridge_towards(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The weights [F, E] that minimise |T - X V|^2 + lambda |V - W|^2, lambda = ridge * mean diagonal of the Gram matrix.

    ``gram`` X'X [F, F] and ``cross`` X'T [F, E] are float64 sums, centred if a bias takes up the means; ``weight`` W [F, E].
    Always finite: where the Cholesky factor does not exist or the solution overflows, the ridge grows tenfold.
    """
    prior = weight.double()
    right = cross - gram @ prior
    return _first_finite(gram.clone(), prior, ridge, lambda factor, _: prior + torch.cholesky_solve(right, factor))


def ridge_towards_at_once(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """``ridge_towards`` in the order that takes least: (X'X + lambda I)^-1 (X'T + lambda W); uses up ``gram``.

    Without the product X'X W, which takes as long as the Cholesky factor, and without another matrix of that size.
    """
    prior = weight.double()

    def solved(factor: Tensor, strength: float) -> Tensor:
        return torch.cholesky_solve(torch.add(cross, prior, alpha=strength), factor)

    return _first_finite(gram, prior, ridge, solved)


def _first_finite(gram: Tensor, prior: Tensor, ridge: float, solved: Callable[[Tensor, float], Tensor]) -> Tensor:
    """What ``solved`` makes of the Cholesky factor of X'X + lambda I and lambda, with the least of tenfold ridges for which
    there is a factor and all is finite; ``prior`` where there is none. Uses up ``gram``."""
    scale, diagonal = float(gram.diagonal().mean()), gram.diagonal().clone()
    if not scale > 0:
        return prior
    strength = ridge
    while True:
        gram.diagonal().copy_(diagonal + strength * scale)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not bool(failed):
            solution = solved(factor, strength * scale)
            if bool(solution.isfinite().all()):
                return solution
        if strength > 1e12:
            return prior
        strength *= 10


@dataclass
class _Moments:
    """Sums of what a projection reads, X [S, F], and of its targets, T [S, E], from which it is refitted.

    Activations can be far from zero compared with their spread: products are taken around the first batch's means, or
    float32 would lose in the mean what the regression needs of the spread. Moving to any other centre later is exact.

    Where X comes in bfloat16 on a CPU, products are those of ``agency.rounded``.
    """

    samples: int = 0
    rounded: bool = False
    shifts: tuple[Tensor, Tensor] | None = None
    sums: tuple[Tensor, Tensor] = field(init=False)
    gram: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    _buffers: tuple[Buffer, Buffer] = field(default_factory=lambda: (Buffer(), Buffer()), repr=False)

    def add(self, x: Tensor, targets: Tensor) -> None:
        """Adds samples of ``x`` [.., F] and ``targets`` [.., E]."""
        x, targets = x.flatten(0, -2), targets.flatten(0, -2)
        rounded = self.rounded = is_rounded(x) and targets.dtype == torch.float32
        if self.shifts is None:
            self.shifts = origin_of(x) if rounded else x.to(targets.dtype).mean(0), targets.mean(0)
            self.sums = self.shifts[0].double() * 0, self.shifts[1].double() * 0
            self.gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.cross = x.new_zeros(x.shape[1], targets.shape[1], dtype=torch.float64)
        self.samples += len(x)
        if rounded:
            x = self._buffers[0].of(x)
            if bool(self.shifts[0].any()):
                x -= self.shifts[0]
            targets = self._buffers[1].of(targets).sub_(self.shifts[1])
            self.sums = self.sums[0] + x.sum(0).double(), self.sums[1] + targets.sum(0).double()
            add_products(self.gram, self.cross, x, targets)
            return
        # In float32 or better, whatever x is in: the shifts are. Each further copy of x would cost as much as a product.
        x, targets = x - self.shifts[0], targets - self.shifts[1]
        self.sums = (
            self.sums[0] + x.sum(0, dtype=torch.float64),
            self.sums[1] + targets.sum(0, dtype=torch.float64),
        )
        self.gram += _gram(x).double()
        self.cross += (x.T @ targets).double()

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
        if self.rounded:
            # In place, since matrices of this size are: nothing is added after this.
            gram = mirror(self.gram).addr_(self.sums[0], self.sums[0], alpha=-1 / self.samples)
        else:
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
        solution = weight.double()
        if steps != "bias":
            gram, cross = self.products(centred=with_bias)
            if steps == "gate":
                gates = _fitted_gates(gram, cross, solution, ridge, head_size)
                solution = solution * gates.repeat_interleave(head_size)[:, None]
            else:
                fit = ridge_towards_at_once if self.rounded else ridge_towards
                solution = fit(gram, cross, weight, ridge)
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
    """Moves the streams to where a block begins, past blocks that are still the dense model's."""
    if layer == 0:
        return
    norm = last_norms(dense.model)[layer - 1]
    for number, stream in enumerate(streams):
        total = dense.at(number, layer - 1, "after block")
        stream.hidden = total if norm is None else norm(total)


def _adapt_attention(
    dense: DenseStream,
    pruned: PreTrainedModel,
    layer: int,
    streams: list[Stream],
    steps: str,
    ridge: float,
    allow_new_bias: bool,
) -> list[Tensor]:
    """Adapts one layer's attention; what it then writes for every batch, [B, T, E]."""
    attention, projection = attentions(pruned)[layer], output_projections(pruned)[layer]
    moments = _Moments()
    norm = norms_of_outputs(pruned, "attention")[layer]
    if projection is None:
        assert isinstance(attention, EmptiedAttention)
        for number, stream in enumerate(streams):
            target = _wanted_of_attention(dense, pruned, layer, number, stream)
            # A norm will pass the constant through.
            target = output_that_adds(pruned, target, None, None)
            moments.add(target[..., :0], target)
        if attention.bias is not None or allow_new_bias:
            attention.bias = nn.Parameter(moments.means()[1].to(streams[0].hidden), requires_grad=False)
            if norm is not None:
                pass_through(norm, attention.bias)
        bias = attention.bias
        return [torch.zeros_like(s.hidden) if bias is None else bias.expand_as(s.hidden) for s in streams]
    inputs = []
    for number, stream in enumerate(streams):
        with fast_products(dense.model):
            x = stream.run_to(pruned, layer, projection)
        wanted = _wanted_of_attention(dense, pruned, layer, number, stream)
        moments.add(x, output_that_adds(pruned, wanted, norm, dense.lengths(number, layer)))
        inputs.append(x)
    with_bias = getattr(projection, "bias", None) is not None or allow_new_bias
    head_size = head_grid(pruned.config).head_size
    solution = moments.solve(input_major_weight(projection), steps, ridge, head_size, with_bias)
    written = list(_replaced(projection, solution, inputs, streams[0].hidden))
    if norm is not None and steps != "bias":
        wanted_of_all = (_wanted_of_attention(dense, pruned, layer, *numbered) for numbered in enumerate(streams))
        refit_gains(norm, written, wanted_of_all)
    return written


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
) -> None:
    """Adapts one layer's MLP, or where a norm follows the gains of that, unless ``ridge`` is None, and moves the streams
    past the block.

    ``added`` is what attention writes for every batch; it is used up, since all batches together take up much memory.
    """
    projection, norm = mlp_output_projections(pruned)[layer], last_norms(pruned)[layer]
    if projection is None:
        for stream, attention_adds in zip(streams, added, strict=True):
            with replaced_output(attentions(pruned)[layer], (attention_adds, None)), fast_products(dense.model):
                stream.hidden = stream.run(pruned, layer).to(stream.hidden)
        return
    weight, old_bias = input_major_weight(projection), getattr(projection, "bias", None)
    norm_of_output = norms_of_outputs(pruned, "mlp")[layer]
    refitted = ridge is not None and norm_of_output is None
    moments = _Moments()
    inputs = []
    for number, stream in enumerate(streams):
        attention_adds = added.pop(0)
        with (
            replaced_output(attentions(pruned)[layer], (attention_adds, None)),
            silent_inputs(projection, weight.shape[1]) as caught,
            fast_products(dense.model),
        ):
            total = stream.run_apart(pruned, layer)[1].to(stream.hidden)
        z = caught[0].view(*total.shape[:-1], -1)
        if refitted:
            wanted = dense.at(number, layer, "after block") - total
            moments.add(z, output_that_adds(pruned, wanted, None, None))
        inputs.append(z)
        stream.hidden = total
    if ridge is not None and refitted:
        solution = moments.solve(weight, "refit", ridge, 1, old_bias is not None or allow_new_bias)
    else:
        solution = weight.double(), None if old_bias is None else old_bias.double()
    written: Iterable[Tensor] = _replaced(projection, solution, inputs, streams[0].hidden, write=refitted)
    if norm_of_output is not None and ridge is not None:
        left = (dense.at(number, layer, "after block") - stream.hidden for number, stream in enumerate(streams))
        written = list(written)
        refit_gains(norm_of_output, written, left)
    for stream, adds in zip(streams, written, strict=True):
        after = stream.hidden + added_to_stream(pruned, layer, "mlp", adds)
        stream.hidden = after if norm is None else norm(after)


def _replaced(
    projection: nn.Module,
    solution: tuple[Tensor, Tensor | None],
    inputs: list[Tensor],
    like: Tensor,
    write: bool = True,
) -> Iterator[Tensor]:
    """Writes a solution into its projection; what the projection then makes of every batch of ``inputs``, one by one.

    Inputs are let go of one by one as well: they are the largest thing in memory.
    """
    weight, bias = solution[0].to(like), None if solution[1] is None else solution[1].to(like)
    if write:
        set_projection(projection, weight, bias)
    while inputs:
        x = inputs.pop(0)
        # Where it comes in bfloat16, as the block itself would have it.
        product = (x @ weight.to(x)).to(like) if is_rounded(x) else x.to(like) @ weight
        yield product if bias is None else product + bias
