"""How many heads can go for a given loss: predicted by prices, then measured on text that nothing has read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.trajectory import ROUND_LEVEL
from pruning_comparison.errors import InputError
from pruning_comparison.formatting import counted, plain_number
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.run.cell import build, choose
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.saved_models import note_pruning
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.variants import VARIANTS, variant_named

CHECK_TOKENS = 8192
"""At most so many tokens of calibration text that nothing has read are measured on, in whole windows."""

UNKNOWN_LEVELS = (ROUND_LEVEL, 50.0)
"""What a spec names as levels while the level is still to be found: methods that try something out do so at the lowest."""


@dataclass(frozen=True)
class Trial:
    """A model that was made: its level in per cent, and the rise of perplexity in per cent, as predicted and measured."""

    level: float
    heads: int
    predicted_percent: float
    measured_percent: float


@dataclass(frozen=True)
class WithinLoss:
    """The model with the most heads gone that keeps within a loss, and every model tried, the last of which it is."""

    pruned: PrunedModel
    cell: Cell
    trials: tuple[Trial, ...]
    heads_total: int
    tokens: int

    def in_words(self, max_loss_percent: float) -> str:
        """What was predicted, what was measured, and what was tried before."""
        last = self.trials[-1]
        said = (
            f"--max_loss={max_loss_percent:g}: {last.heads} of {self.heads_total} heads ({last.level:.3g} %) are gone. "
            f"Perplexity was predicted to rise by {_per_cent(last.predicted_percent)} and rose by "
            f"{_per_cent(last.measured_percent)}, on {self.tokens} tokens of calibration text that nothing has read."
        )
        tried = [
            f"{one.heads} heads, predicted at {_per_cent(one.predicted_percent)}, rose by "
            f"{_per_cent(one.measured_percent)}"
            for one in self.trials[:-1]
        ]
        return f"{said} Before, too many were tried: {'; '.join(tried)}." if tried else said


def check_max_loss(spec: ComparisonSpec, max_loss_percent: float) -> None:
    """InputError for a loss that makes no sense, or a model whose loss prices do not predict."""
    if not (math.isfinite(max_loss_percent) and 0 < max_loss_percent <= 1000):
        raise InputError(
            f"{max_loss_percent} must be above 0 and at most 1000 per cent of perplexity. Give a loss such as 5.",
            option="--max_loss",
        )
    variant = variant_named(spec.variants[0])
    if not variant.adapts:
        adapting = ", ".join(name for name, one in VARIANTS.items() if one.adapts)
        raise InputError(
            f"prices predict what heads cost once the others have adapted, and {variant.name} does not adapt. Choose "
            f"--variant from {adapting}, or give --level.",
            option="--max_loss",
        )
    if spec.adaptation not in ("refit", "refit-mlp"):
        raise InputError(
            "prices predict what heads cost once the output projections are refitted, which "
            f"--adaptation={spec.adaptation} does not do. Leave it out, or give --level.",
            option="--max_loss",
        )


def build_within(
    workspace: Workspace, max_loss_percent: float, on_step: Callable[[str], None] = lambda what: None
) -> WithinLoss:
    """The model with the most heads gone whose perplexity rises by at most ``max_loss_percent``, with what was done noted.

    The first model tried is the one with the most heads that prices predict to keep within the loss. The rise is then
    measured, against the dense model, on windows of calibration text that neither scores, prices nor adaptation have read:
    evaluation text is left for what the model's card says. Where it is more than allowed, the next model is one with fewer
    heads, those for which the prediction, made larger by as much as it fell short, keeps within the loss; until it holds.

    ``on_step`` is told what begins. InputError where not even one head can go, or where no calibration text is left.
    """
    spec, limit = workspace.spec, math.log1p(max_loss_percent / 100)
    check_max_loss(spec, max_loss_percent)
    windows = workspace.unread_windows(0, CHECK_TOKENS)
    if len(windows) < 2:
        raise InputError(
            f"of the calibration text, {len(windows)} windows are left that nothing has read, and the loss is measured on "
            "at least 2. Give a longer --calibration_text, or fewer --calibration_tokens.",
            option="--max_loss",
        )
    on_step("predicting what heads cost")
    predicted = _Predicted(workspace)
    dense_nats = _mean_nats(workspace, workspace.dense, windows)
    trials: list[Trial] = []
    place = predicted.most_within(limit)
    while place >= 0:
        level = predicted.levels[place]
        cell = Cell(spec.variants[0], spec.pruning_methods[0], 0, level)
        on_step(f"pruning to {level:.3g} %")
        pruned = build(workspace, cell)
        on_step("measuring the loss on text that nothing has read")
        rise = _mean_nats(workspace, pruned.model, windows) - dense_nats
        heads = int((~pruned.keep).sum())
        expected = predicted.nats(place)
        trials.append(Trial(level, heads, _rise_percent(expected), _rise_percent(rise)))
        if rise <= limit:
            found = WithinLoss(pruned, cell, tuple(trials), workspace.grid.total, _tokens(windows))
            note_pruning(workspace, pruned, cell)
            pruned.model.config.pruning |= {
                "max_loss_percent": max_loss_percent,
                "predicted_loss_percent": round(trials[-1].predicted_percent, 4),
                "measured_loss_percent": round(trials[-1].measured_percent, 4),
                "loss_measured_on": f"{found.tokens} tokens of calibration text that nothing else has read",
            }
            return found
        share = expected / rise if math.isfinite(rise) else 0.0
        place = min(place - 1, predicted.most_within(limit * share))
    raise InputError(_too_strict(max_loss_percent, trials, predicted), option="--max_loss")


class _Predicted:
    """What prices predict at every number of heads that can go; nothing is made or run."""

    def __init__(self, workspace: Workspace) -> None:
        self.levels = workspace.possible_levels
        self._workspace = workspace
        self._known: dict[int, float] = {}

    def nats(self, place: int) -> float:
        """The predicted divergence from the dense model at a level, in nats per token."""
        if place not in self._known:
            spec = self._workspace.spec
            cell = Cell(spec.variants[0], spec.pruning_methods[0], 0, self.levels[place])
            self._known[place] = self._workspace.predicted_nats(0, choose(self._workspace, cell).keep)
        return self._known[place]

    def heads(self, place: int) -> int:
        """How many heads are gone there."""
        grid, spec = self._workspace.grid, self._workspace.spec
        return expected_heads_pruned(
            self.levels[place],
            grid.n_layers,
            grid.n_heads,
            spec.scope,
            self._workspace.group_size,
            self._workspace.rectangle,
        )

    def most_within(self, limit: float) -> int:
        """The last place up to which the prediction keeps within ``limit``; -1 where the first does not.

        Rounds are walked up to the first that does not, and the levels within it bisected: a path of rounds begins anew for
        every lower level, but not for those within its next round.
        """
        low, high = -1, len(self.levels)
        for place in range(len(self.levels)):
            last = place + 1 == len(self.levels)
            if last or int(self.levels[place + 1] / ROUND_LEVEL) > int(self.levels[place] / ROUND_LEVEL):
                if self.nats(place) > limit:
                    high = place
                    break
                low = place
        while high - low > 1:
            middle = (low + high) // 2
            if self.nats(middle) <= limit:
                low = middle
            else:
                high = middle
        return low


def _mean_nats(workspace: Workspace, model: PreTrainedModel, windows: Tensor) -> float:
    nats, tokens = window_losses(model, list(windows), batch_size=workspace.spec.quality_batch_size)
    return float(nats.sum() / tokens.sum())


def _tokens(windows: Tensor) -> int:
    """Tokens that are predicted: all but the first of every window."""
    return windows.shape[0] * (windows.shape[1] - 1)


def _rise_percent(nats: float) -> float:
    return 100 * math.expm1(min(nats, 700.0)) if not math.isnan(nats) else math.nan


def _per_cent(value: float) -> str:
    return f"{plain_number(float(f'{value:.3g}'))} %" if math.isfinite(value) else "more than can be told"


def _too_strict(max_loss_percent: float, trials: list[Trial], predicted: _Predicted) -> str:
    if trials:
        least = trials[-1]
        what = f"{counted(least.heads, 'head')} without which it rose by"
        found = f"the fewest tried are {what} {_per_cent(least.measured_percent)}"
    else:
        what = counted(predicted.heads(0), "head")
        found = f"{what} alone is predicted to cost {_per_cent(_rise_percent(predicted.nats(0)))}"
    return f"no head can go for {max_loss_percent:g} % of perplexity: {found}. Give a larger loss, or --level."
