"""A loaded comparison, and what of it has been computed once and is needed again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency import DenseStream, NegotiatedTrajectory, ProgressiveTrajectory
from pruning_comparison.agency.moments import HeadMoments
from pruning_comparison.agency.prices_across_layers import measure_prices, observe_for_prices
from pruning_comparison.agency.savings import Savings, cache_savings, time_savings
from pruning_comparison.agency.streams import drawn_first_tokens
from pruning_comparison.measure.perplexity import DensePredictions, WindowLoss
from pruning_comparison.methods import IMPORTANCE, IMPORTANCE_TOKENS
from pruning_comparison.models import HeadGrid, LoadedModel, load_model
from pruning_comparison.models.devices import asked_products, prepare_in
from pruning_comparison.pruning.rectangles import numbers_leaving
from pruning_comparison.pruning.surgery import converted_copy, remove_heads
from pruning_comparison.run.inputs import Inputs, heads_leaving_together, rectangle_of
from pruning_comparison.run.layer_times import PROMPT_TOKENS, measure_layer_times
from pruning_comparison.run.phases import PhaseClock
from pruning_comparison.scoring.prices import Prices
from pruning_comparison.scoring.scores import HeadScores, ScoreSettings, score_heads
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.records import GeneratedText, Measurement
from pruning_comparison.texts import sample_windows, unread_windows
from pruning_comparison.variants import VARIANTS, Variant


@dataclass(frozen=True)
class PricedHeads:
    """Prices of a model's heads, the moments they were made of, and what measuring both took, in seconds."""

    prices: Prices
    moments: HeadMoments
    seconds: float


HELD_OUT_TOKENS = 2048
"""Calibration text that nothing reads but choices between models: of recovery's grid, and of the strongest baseline."""


@dataclass
class Workspace:
    """A loaded comparison: the dense model, its inputs, and what has been computed once and is needed again.

    ``folder`` is the run's, where training is kept from time to time; None where there is none, or none within reach.
    Without ``describes`` nothing is measured that only describes heads and changes no model: one model to keep records none.
    ``clock`` counts the processor time of what is computed.
    """

    spec: ComparisonSpec
    inputs: Inputs
    reference: PreTrainedModel
    dense: PreTrainedModel
    folder: Path | None = None
    describes: bool = True
    clock: PhaseClock = field(default_factory=PhaseClock)
    _rankings: dict[tuple[str, int], HeadScores] = field(default_factory=dict)
    _importances: dict[int, Tensor] = field(default_factory=dict)
    _calibration: dict[int, Tensor] = field(default_factory=dict)
    _progressive: dict[tuple[str, int], ProgressiveTrajectory] = field(default_factory=dict)
    _priced: dict[int, PricedHeads] = field(default_factory=dict)
    _negotiated: dict[tuple[str, str, int], NegotiatedTrajectory] = field(default_factory=dict)
    _dense_streams: dict[int, DenseStream] = field(default_factory=dict)
    _predictions: DensePredictions | None = None
    _losses: dict[str, list[WindowLoss]] = field(default_factory=dict)
    _page_nats: dict[str, list[float]] = field(default_factory=dict)
    _layer_times_s: Mapping[int, float] | None = None
    _texts: dict[tuple[str, int], tuple[list[Measurement], list[GeneratedText]]] = field(default_factory=dict)
    _answers: dict[str, list[Measurement]] = field(default_factory=dict)

    @property
    def grid(self) -> HeadGrid:
        return self.inputs.preview.grid

    @property
    def group_size(self) -> int:
        """How many heads leave together."""
        return heads_leaving_together(self.grid, self.spec.prune_unit)

    @property
    def rectangle(self) -> int | None:
        """The query heads per key-value group where every layer keeps as many of each; None where it need not."""
        return rectangle_of(self.grid, self.spec.prune_unit)

    @property
    def possible_levels(self) -> list[float]:
        """One level for every number of heads that the rule of levels can ask for, above none and below all, rising."""
        layers = 1 if self.spec.scope == "layer" else self.grid.n_layers
        most = layers * self.grid.n_heads
        if self.rectangle is None:
            return [100 * count / most for count in range(self.group_size, most, self.group_size)]
        return [100 * count / most for count in numbers_leaving(layers, self.grid.n_heads, self.rectangle)[1:-1]]

    def generator(self, purpose: str, iteration: int) -> torch.Generator:
        """An independent stream of random numbers for each purpose and iteration."""
        seed = hashlib.sha256(f"{self.spec.seed}/{purpose}/{iteration}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") % 2**63)

    def calibration(self, iteration: int) -> Tensor:
        """This iteration's calibration windows [N, T]."""
        if iteration not in self._calibration:
            self._calibration[iteration] = sample_windows(
                self.inputs.calibration, self.spec.calibration_tokens, self.generator("calibration", iteration)
            )
        return self._calibration[iteration]

    def held_out(self, iteration: int) -> Tensor:
        """Calibration windows [N, T] that this iteration's scores, prices, adaptation and recovery do not read.

        At most ``HELD_OUT_TOKENS``, and a quarter of what the iteration's sample leaves; none where it leaves nothing.
        """
        unread = self._unread(iteration)
        return unread[len(unread) - self._held_out_count(len(unread)) :]

    def recovery_windows(self, iteration: int) -> Tensor:
        """Calibration windows [N, T] for recovery to train on, which nothing else reads."""
        unread = self._unread(iteration)
        return unread[: len(unread) - self._held_out_count(len(unread))]

    def unread_windows(self, iteration: int, tokens: int) -> Tensor:
        """Calibration windows [N, T] that nothing has read, as many as hold ``tokens``, or all that there are.

        They are outside this iteration's sample; where recovery trains on such windows, only the ones held out of it count.
        """
        unread = self.held_out(iteration) if self.spec.recovery_steps else self._unread(iteration)
        return unread[max(0, len(unread) - -(-tokens // unread.shape[1])) :]

    def _unread(self, iteration: int) -> Tensor:
        generator = self.generator("calibration", iteration)
        return unread_windows(self.inputs.calibration, self.spec.calibration_tokens, generator)

    def _held_out_count(self, unread: int) -> int:
        return min(-(-unread // 4), -(-HELD_OUT_TOKENS // self.inputs.calibration.shape[1]))

    def score_windows(self, iteration: int, enough: int | None = None) -> Tensor:
        """The part of this iteration's calibration windows that heads are scored on, [N, T]: what the spec asks for, else so
        many tokens as are ``enough``, else all."""
        windows = self.calibration(iteration)
        tokens = enough if self.spec.score_tokens is None else self.spec.score_tokens
        return windows if tokens is None else windows[: -(-tokens // windows.shape[1])]

    def dense_stream(self, iteration: int) -> DenseStream:
        """What adaptation aims at, on this iteration's calibration text. Only the latest is kept: it may be large."""
        if iteration not in self._dense_streams:
            for stream in self._dense_streams.values():
                stream.close()
            self._dense_streams.clear()
            with self.clock.phase("dense stream"):
                self._dense_streams[iteration] = DenseStream(
                    self.reference,
                    self.calibration(iteration),
                    batch_size=self.spec.quality_batch_size,
                    first_tokens=self._first_tokens(iteration),
                )
        return self._dense_streams[iteration]

    def _first_tokens(self, iteration: int) -> Tensor | None:
        """Windows of one token [M, 1] for models whose first tokens are sinks. None where all texts begin with one token:
        every window then has it."""
        if self.inputs.bos is not None:
            return None
        return drawn_first_tokens(self.calibration(iteration), self.generator("first tokens", iteration))

    @property
    def dense_predictions(self) -> DensePredictions:
        """What the dense model, in the precision that is measured, predicts for the evaluation windows."""
        if self._predictions is None:
            self._predictions = DensePredictions(self.dense)
        return self._predictions

    def ranking(self, method: str, iteration: int) -> HeadScores:
        """The method's scores on the dense model, computed once per iteration."""
        key = (method, iteration if self.spec.method(method).varies else 0)
        if key not in self._rankings:
            self._rankings[key] = self._score(self.reference, method, iteration)
        return self._rankings[key]

    def progressive(self, method: str, iteration: int) -> ProgressiveTrajectory:
        """The path of ``baseline-progressive``. Only the latest is kept: cells come trajectory by trajectory."""
        key = (method, iteration)
        if key not in self._progressive:
            self._progressive.clear()
            self._progressive[key] = ProgressiveTrajectory(
                self.reference,
                score=lambda model: self._rank_again(model, method, iteration),
                all_heads=self.grid.all_heads(),
                scope=self.spec.scope,
                group_size=self.group_size,
                rectangle=self.rectangle,
                scores_pruned=self.spec.method(method).runs_on_pruned,
            )
        return self._progressive[key]

    def priced(self, iteration: int) -> PricedHeads:
        """The prices of the dense model's heads, and what they were made of. Only the latest are kept: they are large."""
        if iteration not in self._priced:
            self._priced.clear()
            started = time.perf_counter()
            settings = self._price_settings
            windows, batch, bos = self.score_windows(iteration), settings["batch_size"], settings["exclude_first"]
            with self.clock.phase("moments"):
                moments = observe_for_prices(
                    self.reference, windows, batch_size=batch, exclude_first=bos, utilisation=self.describes
                )
            with self.clock.phase("prices"):
                prices = measure_prices(self.reference, windows, moments=moments, **settings)
            self._priced[iteration] = PricedHeads(prices, moments, time.perf_counter() - started)
        return self._priced[iteration]

    def predicted_nats(self, iteration: int, keep: Tensor) -> float:
        """What the heads that are false in ``keep`` (bool [L, H]) cost together, by the prices of the dense model."""
        return self.priced(iteration).prices.total(~keep)

    def negotiated(self, variant: Variant, method: str, iteration: int) -> NegotiatedTrajectory:
        """The path of a variant whose heads are asked; variants that ask alike share one. Only the latest are kept."""
        rules = negotiation_rules(variant)
        key = (rules, method, iteration)
        if key not in self._negotiated:
            for other in [other for other in self._negotiated if other[1:] != key[1:]]:
                del self._negotiated[other]
            priced = self.priced(iteration)
            self._negotiated[key] = NegotiatedTrajectory(
                self.ranking(method, iteration),
                priced.prices,
                moments=priced.moments,
                importance=self._importance(iteration) if self.describes else None,
                scope=self.spec.scope,
                everyone_consents=VARIANTS[rules].consent == "always",
                group_size=self.group_size,
                rectangle=self.rectangle,
                savings=self._savings() if VARIANTS[rules].consent == "by cost" else None,
                seconds=priced.seconds,
                describes=self.describes,
            )
        return self._negotiated[key]

    def _importance(self, iteration: int) -> Tensor:
        """How sensitive the loss is to each head, [L, H], to be recorded: from little text unless heads are ranked by it."""
        if IMPORTANCE in self.spec.pruning_methods:
            return self.ranking(IMPORTANCE, iteration).scores
        if iteration not in self._importances:
            scores = self._score(self.reference, IMPORTANCE, iteration, enough=IMPORTANCE_TOKENS).scores
            self._importances[iteration] = scores
        return self._importances[iteration]

    def layer_times_s(self) -> Mapping[int, float]:
        """Seconds that a decoding step spends on a layer by its live heads: those of the run, or measured now."""
        if self._layer_times_s is None:
            self._layer_times_s = measure_layer_times(
                self.dense,
                lambda keep: at_precision(remove_heads(self.reference, keep), self.spec.precision, self),
                self.grid,
                self.inputs.calibration[0, :PROMPT_TOKENS].tolist(),
                batch_size=self.spec.batch_size,
                group_size=self.group_size,
                rectangle=self.rectangle,
            )
        return self._layer_times_s

    def _savings(self) -> Savings | None:
        """What heads that may refuse are held by beside their prices; None where that is nothing."""
        if self.spec.consent == "time":
            return time_savings(self.layer_times_s(), self.group_size)
        if self.spec.consent == "cache":
            grid = self.grid
            return cache_savings(grid.group_size, 2 * grid.head_size * self.dense.dtype.itemsize)
        return None

    def trajectory(self, variant: Variant, method: str, iteration: int) -> ProgressiveTrajectory | NegotiatedTrajectory:
        """The path of a variant whose heads leave in rounds."""
        if variant.negotiates:
            return self.negotiated(variant, method, iteration)
        return self.progressive(method, iteration)

    def _rank_again(self, model: PreTrainedModel, method: str, iteration: int) -> HeadScores:
        """The method's scores on a model that has been pruned further.

        What "auto" chose for the dense model stays: the direction of entropy, and the precision of gradients.
        """
        dense = self.ranking(method, iteration)
        if model is self.reference:
            return dense
        return self._score(model, method, iteration, dense.details)

    def _score(
        self,
        model: PreTrainedModel,
        method: str,
        iteration: int,
        decided: Mapping[str, Any] | None = None,
        *,
        enough: int | None = None,
    ) -> HeadScores:
        of_method = self.spec.method(method)
        windows = self.score_windows(iteration, enough or of_method.tokens)
        settings = ScoreSettings(
            batch_size=self.spec.quality_batch_size,
            generator=self.generator("random ranking", iteration),
            entropy_direction=self.spec.entropy_direction,
            smallest_level=next((level for level in self.spec.pruning_levels if level > 0), 10.0),
            scope=self.spec.scope,
            group_size=self.group_size,
            rectangle=self.rectangle,
            prices=lambda: self._prices_of(model, iteration),
        )
        with self.clock.phase(f"scores by {method}"), asked_products(model):
            return score_heads(of_method, model, windows, settings.as_decided(decided or {}))

    def _prices_of(self, model: PreTrainedModel, iteration: int) -> Prices:
        """The prices of the dense model's heads, or of those that one which has lost heads physically still has."""
        if model is self.reference:
            return self.priced(iteration).prices
        return measure_prices(model, self.score_windows(iteration), **self._price_settings)

    @property
    def _price_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.spec.quality_batch_size,
            "exclude_first": self.inputs.bos is not None,
            "new_bias": self.spec.new_bias,
            "group_size": self.group_size,
        }


def negotiation_rules(variant: Variant) -> str:
    """The first variant that asks its heads by the same rules: those that ask alike share one path."""
    return next(name for name, one in VARIANTS.items() if one.negotiates and one.consent == variant.consent)


def load_workspace(
    spec: ComparisonSpec,
    inputs: Inputs,
    folder: Path | None = None,
    *,
    layer_times_s: Mapping[int, float] | None = None,
    describes: bool = True,
    clock: PhaseClock | None = None,
) -> Workspace:
    """Loads the weights. Scores, prices and adaptation start from float32 weights whatever precision is measured, and their
    matrix products are in the spec's ``prepare_precision``.

    ``layer_times_s`` are the layer times that the run has; without them they are measured where they are needed.
    ``describes`` and ``clock`` are those of ``Workspace``.
    """
    torch.set_num_threads(spec.threads)
    loaded: LoadedModel = load_model(inputs.preview, device=spec.device, dtype=torch.float32)
    prepare_in(loaded.model, spec.prepare_precision)
    dense = at_precision(loaded.model, spec.precision)
    return Workspace(
        spec, inputs, loaded.model, dense, folder, describes, clock or PhaseClock(), _layer_times_s=layer_times_s
    )


def at_precision(model: PreTrainedModel, precision: str, workspace: Workspace | None = None) -> PreTrainedModel:
    """The model in the precision to measure in: itself where it already is, else a converted copy.

    What it has in common with the workspace's reference model, the copy has in common with the workspace's dense one.
    """
    dtype = getattr(torch, precision)
    like = None if workspace is None else (workspace.reference, workspace.dense)
    return model if model.dtype == dtype else converted_copy(model, dtype, like=like)
