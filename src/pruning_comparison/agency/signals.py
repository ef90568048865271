"""Signals: what every head does for its layer, and what its withdrawal would cost once the survivors have adapted.

One streamed pass over calibration text keeps sums only, so that memory does not depend on how much text there is.

Dimension letters: N windows, B batch, T time, S samples, L layers, H heads, D head size, E embedding, F features (live heads
of one layer x D).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning_comparison.models.heads import (
    attentions,
    head_columns,
    head_grid,
    input_major_weight,
    live_heads,
    output_projections,
)


@dataclass
class LayerMoments:
    """First and second moments of what the live heads of one layer hand to its output projection, X [S, F].

    Sums are kept for two halves of the text apart, windows of even and of odd number, so that what is fitted on one can be
    judged on the other. Products are taken in float32 (or better) around the first batch's mean and added up in float64:
    activations can be far from zero compared with their spread. Moving to any other centre later is exact.

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
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.shift is None:
            self.shift = x.mean((0, 1))
        x = x - self.shift
        for half in (0, 1):
            part = x[(half - first_window) % 2 :: 2].flatten(0, 1)
            self.counts[half] += len(part)
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


@dataclass(frozen=True)
class HeadSignals:
    """Every signal of every head, float64 [L, H] on the CPU, NaN for withdrawn heads.

    * ``utilisation``: attention that is at work rather than parked, see ``observe``; NaN where it was not measured.
    * ``contribution``: share of the energy its layer writes, see ``contributions``.
    * ``alignment``: correlation with what the rest of its layer writes, see ``alignments``.
    * ``redundancy``: share of what it writes that the layer's other live heads can reconstruct, see ``redundancies``.
    * ``importance``: Fisher score, as given; NaN where it was not.
    * ``withdrawal_cost``: what its withdrawal costs after the survivors have adapted, see ``CostModel``.
    """

    utilisation: Tensor
    contribution: Tensor
    alignment: Tensor
    redundancy: Tensor
    importance: Tensor
    withdrawal_cost: Tensor


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


def measure_signals(
    observations: HeadMoments,
    costs: CostModel,
    *,
    ridge: float,
    importance: Tensor | None = None,
) -> HeadSignals:
    """All signals of the observed heads. ``costs`` is the model of the same heads; ``importance`` [L, H] a Fisher score."""
    keep = observations.keep.cpu()
    nothing = torch.full(keep.shape, torch.nan, dtype=torch.float64)
    given = nothing if importance is None else importance.cpu().double()

    def by_head(measure: Any) -> Tensor:
        signal = nothing.clone()
        for layer, moments in enumerate(observations.moments):
            if moments is not None:
                signal[layer, list(moments.heads)] = measure(moments).cpu()
        return signal

    return HeadSignals(
        utilisation=observations.utilisation,
        contribution=by_head(contributions),
        alignment=by_head(alignments),
        redundancy=by_head(lambda moments: redundancies(moments, ridge=ridge)),
        importance=given.masked_fill(~keep, torch.nan),
        withdrawal_cost=costs.costs(),
    )


def written_products(moments: LayerMoments, *, centred: bool = True) -> Tensor:
    """Inner products per token of what the heads of a layer write, M [H', H'] over its live heads.

    M_hg = tr(W_h' G_hg W_g) with G = X'X / S, so that M_hh is the energy per token that head h writes, |X_h W_h|^2 / S.
    Where ``centred``, what is constant over tokens does not count: a bias could write it as well.
    """
    weight = moments.weight.double()
    by_feature = moments.covariance(centred=centred) * (weight @ weight.T)
    heads = len(moments.heads)
    return by_feature.view(heads, moments.head_size, heads, moments.head_size).sum((1, 3))


def written_energy(observations: HeadMoments, *, centred: bool = False) -> Tensor:
    """Energy per token that every head writes, |X_h W_h|^2 / S, [L, H]; 0 for withdrawn heads."""
    energy = torch.zeros(observations.keep.shape, dtype=torch.float64)
    for layer, moments in enumerate(observations.moments):
        if moments is not None:
            energy[layer, list(moments.heads)] = (
                written_products(moments, centred=centred).diagonal().clamp(min=0).cpu()
            )
    return energy


def contributions(moments: LayerMoments) -> Tensor:
    """Share of each live head in the energy that its layer writes, [H']: |X_h W_h|^2 / sum over g of |X_g W_g|^2, centred.

    Shares add up to 1; they are equal where the layer writes nothing.
    """
    energy = written_products(moments).diagonal().clamp(min=0)
    total = energy.sum()
    return energy / total if bool(total > 0) else torch.full_like(energy, 1 / len(energy))


def alignments(moments: LayerMoments) -> Tensor:
    """Correlation of what each live head writes with what the rest of its layer writes, [H'] in [-1, 1].

    With y_h = X_h W_h and r_h = sum over g != h of y_g, centred over tokens: <y_h, r_h> / (|y_h| |r_h|), inner products over
    tokens and embedding. 0 where one of the two is nothing.
    """
    products = written_products(moments)
    own, row = products.diagonal(), products.sum(1)
    rest = products.sum() - 2 * row + own
    scale = (own.clamp(min=0) * rest.clamp(min=0)).sqrt()
    # What remains of a sum that cancels out is rounding, not a direction.
    nothing = (own <= _ROUNDING * products.diagonal().max()) | (rest <= _ROUNDING * own) | (scale <= 0)
    return torch.where(nothing, torch.zeros_like(own), (row - own) / scale.clamp(min=1e-300)).clamp(-1, 1)


def redundancies(moments: LayerMoments, *, ridge: float) -> Tensor:
    """Share of what each live head writes that the layer's other live heads can reconstruct, [H']: an R^2, at most 1.

    X_h is regressed on the other heads' X_o by ridge regression on one half of the text and judged on the other, both ways:

        B = (X_o'X_o + lambda I)^-1 X_o'X_h,   R^2 = 1 - sum |(X_h - X_o B) W_h|^2 / sum |X_h W_h|^2,

    with lambda = ``ridge`` * mean diagonal of the fitted half's X'X, everything around the fitted half's mean and the sums
    over the half that was not fitted (the out-of-sample R^2 of Campbell and Thompson 2008). What counts is what reaches the
    residual stream, so errors are weighed by W_h. Below 0 where the others predict worse than the mean does; 1 for a head
    that writes nothing, because nothing would be missed.
    """
    heads, weight = len(moments.heads), moments.weight.double()
    missed = torch.zeros(heads, dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(missed)
    for fitted, judged in ((0, 1), (1, 0)):
        gram = moments.gram(judged, about=moments.mean(fitted))
        inverse = ridged_inverse(moments.gram(fitted), ridge)
        for position in range(heads):
            own = slice(position * moments.head_size, (position + 1) * moments.head_size)
            # The columns of the inverse hold the regression of this head on all others: -P_oh = B P_hh.
            unexplained = torch.linalg.solve(inverse[own, own], inverse[own])  # [D, F]
            written = weight[own] @ weight[own].T
            missed[position] += (written * (unexplained @ gram @ unexplained.T)).sum()
            total[position] += (written * gram[own, own]).sum()
    nothing = total <= _ROUNDING * total.max()
    return torch.where(nothing, torch.ones_like(total), 1 - missed / total.clamp(min=1e-300))


def withdrawal_costs(gram: Tensor, weight: Tensor, *, heads: int, ridge: float) -> Tensor:
    """What the withdrawal of each head alone costs its layer after the survivors have adapted, [H].

    With G [F, F] the Gram matrix per token plus lambda I, lambda = ``ridge`` * its mean diagonal, and W [F, E] the output
    projection: tr(W_h' [(G^-1)_hh]^-1 W_h), the optimal-brain-surgeon cost (Hassibi and Stork 1993) of a block. It is the
    least squared error per token in what the layer writes, plus lambda |change of W|^2, over all output projections whose
    rows of head h are zero.
    """
    return _block_costs(ridged_inverse(gram.double(), ridge), weight.double(), heads)


@dataclass(frozen=True)
class LayerCosts:
    """Withdrawal costs of one layer's live heads, with those already granted taken into account.

    ``inverse`` [F, F] is the inverse of the live features' ridged Gram matrix per token, ``weight`` [F, E] the output
    projection as the survivors would have adapted it, ``costs`` [H'] what each live head would cost next.
    """

    heads: tuple[int, ...]
    inverse: Tensor
    weight: Tensor
    costs: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, heads: Sequence[int], *, ridge: float) -> LayerCosts:
        """From the Gram matrix per token [F, F] and the output projection [F, E] of the live ``heads``."""
        inverse, rows = ridged_inverse(gram.double(), ridge), weight.double()
        return cls(tuple(heads), inverse, rows, _block_costs(inverse, rows, len(heads)))

    def withdraw(self, head: int) -> LayerCosts:
        """The costs after ``head`` has left and the others have adapted.

        Block elimination: with P = G^-1, the inverse of G without head h is P_oo - P_oh P_hh^-1 P_ho, and the best weights
        without it are W_o - P_oh P_hh^-1 W_h. Constraints add up on a quadratic, so costs paid one after the other sum to
        the joint cost of the set, in whatever order.
        """
        place = self.heads.index(head)
        size = len(self.inverse) // len(self.heads)
        gone = torch.zeros(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        gone[place * size : (place + 1) * size] = True
        left = self.heads[:place] + self.heads[place + 1 :]
        cross = self.inverse[gone][:, ~gone]
        gain = torch.linalg.solve(self.inverse[gone][:, gone], cross)
        inverse = self.inverse[~gone][:, ~gone] - cross.T @ gain
        inverse = (inverse + inverse.T) / 2
        weight = self.weight[~gone] - gain.T @ self.weight[gone]
        return LayerCosts(left, inverse, weight, _block_costs(inverse, weight, len(left)))


@dataclass(frozen=True)
class CostModel:
    """What the withdrawal of every live head would cost now, weighed across layers. Immutable: granting gives a new one.

    ``weights`` [L] turns a layer's squared error per token into what the run counts in: nats per token with half of
    ``layer_sensitivity``, plain squared error with ones.
    """

    layers: tuple[LayerCosts | None, ...]
    weights: tuple[float, ...]
    n_heads: int

    def cost(self, layer: int, head: int) -> float:
        """Weighed cost of one live head; KeyError if it has left."""
        of_layer = self.layers[layer]
        if of_layer is None or head not in of_layer.heads:
            raise KeyError(f"head {head} of layer {layer} has left")
        return self.weights[layer] * float(of_layer.costs[of_layer.heads.index(head)])

    def joint_cost(self, layer: int, heads: Iterable[int]) -> float:
        """Weighed cost of several live heads of a layer that leave together; KeyError if one has left."""
        total, model = 0.0, self
        for head in heads:
            total += model.cost(layer, head)
            model = model.withdraw(layer, head)
        return total

    def costs(self) -> Tensor:
        """Weighed costs, float64 [L, H] on the CPU; NaN for withdrawn heads."""
        table = torch.full((len(self.layers), self.n_heads), torch.nan, dtype=torch.float64)
        for layer, of_layer in enumerate(self.layers):
            if of_layer is not None:
                table[layer, list(of_layer.heads)] = self.weights[layer] * of_layer.costs.cpu()
        return table

    def withdraw(self, layer: int, head: int) -> CostModel:
        """The model after this head's withdrawal. KeyError if it has left already."""
        of_layer = self.layers[layer]
        if of_layer is None or head not in of_layer.heads:
            raise KeyError(f"head {head} of layer {layer} has left")
        changed = None if len(of_layer.heads) == 1 else of_layer.withdraw(head)
        return CostModel((*self.layers[:layer], changed, *self.layers[layer + 1 :]), self.weights, self.n_heads)


def cost_model(
    observations: HeadMoments, *, ridge: float, weights: Tensor | None = None, centred: bool = True
) -> CostModel:
    """The withdrawal costs of the observed heads.

    ``weights`` [L] weigh the layers, ones if None. ``centred`` where the layer has, or may get, an output bias that takes up
    the mean of what leaves; otherwise the survivors have to make up for it. ValueError for weights that are negative or not
    finite.
    """
    layers = len(observations.moments)
    factors = torch.ones(layers, dtype=torch.float64) if weights is None else weights.cpu().double()
    if factors.shape != (layers,) or not bool((factors.isfinite() & (factors >= 0)).all()):
        raise ValueError(f"weights must be {layers} finite numbers of at least 0, got {factors.tolist()}")
    of_layers = tuple(
        None
        if moments is None
        else LayerCosts.of(moments.covariance(centred=centred), moments.weight, moments.heads, ridge=ridge)
        for moments in observations.moments
    )
    return CostModel(of_layers, tuple(factors.tolist()), observations.keep.shape[1])


def layer_sensitivity(fisher: Tensor, energy: Tensor) -> Tensor:
    """How much the loss minds an error written by each layer, [L]: sum of Fisher scores / sum of written energies.

    ``fisher`` [L, H]: sum over sequences of (dLoss/dgate)^2; ``energy`` [L, H]: sum of |X_h W_h|^2 over the tokens of the
    same text, not centred (or both divided by the number of tokens).

    The gradient of a gate is the sum over positions of g_t . y_t, with y_t = (X_h W_h)_t and g_t the gradient of the
    sequence's summed loss by what the layer writes there. If the g_t have mean zero, are independent of one another and of
    y, and have the covariance c I, the expected square is c times the sum of |y_t|^2, so the ratio estimates c. Gradients
    of a log-likelihood have the Fisher information as their covariance, which stands in for the Hessian: an error e_t costs
    c/2 |e_t|^2. **Half** of the sensitivity times a squared error per token is therefore an estimate in nats per token.
    Errors are not isotropic and reach later layers' attention, so it is a scale, not a prediction. 0 for a layer that
    writes nothing.
    """
    minded, written = fisher.cpu().double().sum(1), energy.cpu().double().sum(1)
    return torch.where(written > 0, minded / written.clamp(min=1e-300), torch.zeros_like(written))


def nats_weights(fisher: Tensor, fisher_tokens: int, observations: HeadMoments) -> Tensor:
    """Weights [L] for ``cost_model`` that make costs estimates in nats per token: half of ``layer_sensitivity``.

    ``fisher`` [L, H] is a sum over ``fisher_tokens`` tokens, of the same model and kind of text as the observations.
    """
    return layer_sensitivity(fisher / fisher_tokens, written_energy(observations)) / 2


def ridged_inverse(gram: Tensor, ridge: float) -> Tensor:
    """(G + lambda I)^-1 of a float64 Gram matrix [F, F], lambda = ``ridge`` * mean diagonal of G; always finite.

    Where the Cholesky factor does not exist or the inverse overflows, the ridge grows tenfold. ValueError unless ``ridge``
    is above 0.
    """
    if not ridge > 0:
        raise ValueError(f"the ridge must be above 0, got {ridge}")
    # A layer whose heads hand over nothing has no scale of its own; any small one makes its costs next to nothing.
    scale = max(float(gram.diagonal().mean()), _LEAST_SCALE)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    strength = ridge
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + strength * scale * identity)
        if not bool(failed):
            inverse = torch.cholesky_inverse(factor)
            if bool(inverse.isfinite().all()):
                return inverse
        if not strength < 1e12:
            raise ValueError("the Gram matrix of the head outputs is not finite")
        strength *= 10


_ATTENTION = "sdpa"
_ROUNDING = 1e-12
_LEAST_SCALE = 1e-100


def _block_costs(inverse: Tensor, weight: Tensor, heads: int) -> Tensor:
    """tr(W_h' [P_hh]^-1 W_h) for every head, [H]; squares of a Cholesky solve, so never negative."""
    size = len(inverse) // heads
    blocks = inverse.view(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors = torch.linalg.cholesky(blocks)
    solved = torch.linalg.solve_triangular(factors, weight.view(heads, size, -1), upper=False)
    costs: Tensor = solved.square().sum((1, 2))
    return costs


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
    stock = ALL_ATTENTION_FUNCTIONS[_ATTENTION]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
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
    model.set_attn_implementation(_ATTENTION)
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]
        model.set_attn_implementation(before)
