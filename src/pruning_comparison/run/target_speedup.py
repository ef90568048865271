"""How few heads have to go for a speed: predicted by a table of layer times, then measured in turns with the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import counted
from pruning_comparison.run.cell import build, choose
from pruning_comparison.run.layer_times import PROMPT_TOKENS, measured_ratio
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.saved_models import note_pruning
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell

MOST_TRIALS = 4
"""So many models are made at most: each further one is to be faster than the last by what that fell short."""


@dataclass(frozen=True)
class SpeedTrial:
    """A model that was made: its level in per cent, and its speed over the dense model's, as predicted and measured."""

    level: float
    heads: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class FastEnough:
    """The model with the fewest heads gone that is fast enough, and every model tried, the last of which it is."""

    pruned: PrunedModel
    cell: Cell
    trials: tuple[SpeedTrial, ...]
    heads_total: int

    def in_words(self, target: float) -> str:
        """What was predicted, what was measured, and what was tried before."""
        last = self.trials[-1]
        said = (
            f"--target_speedup={target:g}: {last.heads} of {self.heads_total} heads ({last.level:.3g} %) are gone. A "
            f"decoding step was predicted to be {last.predicted:.3g} times as fast and was {last.measured:.3g} times as "
            "fast, in turns with the dense model."
        )
        before = [f"{one.heads} heads, {one.measured:.3g} times" for one in self.trials[:-1]]
        return f"{said} Before, too few were tried: {'; '.join(before)}." if before else said


def check_target_speedup(target: float) -> None:
    """InputError for a speed that makes no sense."""
    if not (math.isfinite(target) and 1 < target <= 100):
        raise InputError(
            f"{target} must be above 1 and at most 100 times the dense model's speed. Give a speed such as 1.2.",
            option="--target_speedup",
        )


def build_fast_enough(
    workspace: Workspace, target: float, on_step: Callable[[str], None] = lambda what: None
) -> FastEnough:
    """The model with the fewest heads gone whose decoding step is ``target`` times as fast as the dense model's.

    The first model tried is the one with the fewest heads gone that the table of layer times predicts to be fast enough: a
    layer with so many heads takes what it took in a model all of whose layers have as many. Its step is then measured in
    turns with the dense model's, on calibration text; where it falls short, more heads go, by as much as the prediction was
    off.

    InputError where even the last level is predicted, or found, to be too slow.
    """
    check_target_speedup(target)
    spec = workspace.spec
    on_step("predicting speed from how long a step spends on layers")
    times_s = workspace.layer_times_s()
    levels = workspace.possible_levels

    def cell_at(place: int) -> Cell:
        return Cell(spec.variants[0], spec.pruning_methods[0], 0, levels[place])

    @cache
    def predicted(place: int) -> float:
        return predicted_speedup(choose(workspace, cell_at(place)).keep, times_s)

    trials: list[SpeedTrial] = []
    place, wanted = 0, target
    while len(trials) < MOST_TRIALS:
        found = _first_fast_enough(predicted, place, len(levels), wanted)
        if found is None:
            break
        on_step(f"pruning to {levels[found]:.3g} %")
        pruned = build(workspace, cell_at(found))
        on_step("measuring speed in turns with the dense model")
        speed = 1 / measured_ratio(
            workspace.dense,
            pruned.model,
            workspace.inputs.calibration[0, :PROMPT_TOKENS].tolist(),
            batch_size=spec.batch_size,
        )
        trials.append(SpeedTrial(levels[found], int((~pruned.keep).sum()), predicted(found), speed))
        if speed >= target:
            note_pruning(workspace, pruned, cell_at(found))
            pruned.model.config.pruning |= {
                "target_speedup": target,
                "predicted_speedup": round(trials[-1].predicted, 4),
                "measured_speedup": round(speed, 4),
            }
            return FastEnough(pruned, cell_at(found), tuple(trials), workspace.grid.total)
        place, wanted = found + 1, wanted * target / speed
    raise InputError(_too_fast(target, trials, levels, predicted), option="--target_speedup")


def predicted_speedup(keep: Tensor, layer_times_s: Mapping[int, float]) -> float:
    """How many times as fast a step is with the heads that are true in ``keep`` (bool [L, H]), by the times of layers."""
    left = keep.sum(1).tolist()
    return len(left) * layer_times_s[keep.shape[1]] / sum(_time_of(count, layer_times_s) for count in left)


def _time_of(count: int, times: Mapping[int, float]) -> float:
    """Seconds of a layer with ``count`` heads: from the table, or between its two nearest entries."""
    if count in times:
        return times[count]
    below, above = max(one for one in times if one < count), min(one for one in times if one > count)
    share = (count - below) / (above - below)
    return (1 - share) * times[below] + share * times[above]


def _first_fast_enough(predicted: Callable[[int], float], low: int, high: int, wanted: float) -> int | None:
    """The first place from ``low`` to below ``high`` that is predicted to be fast enough; None where the last is not.

    Speeds rise with the heads that go but for the noise of the table, so places are bisected.
    """
    if low >= high or predicted(high - 1) < wanted:
        return None
    last = high - 1
    while low < last:
        middle = (low + last) // 2
        if predicted(middle) >= wanted:
            last = middle
        else:
            low = middle + 1
    return last


def _too_fast(target: float, trials: list[SpeedTrial], levels: list[float], predicted: Callable[[int], float]) -> str:
    if trials:
        most = max(trials, key=lambda one: one.measured)
        found = f"the fastest made, without {counted(most.heads, 'head')}, was {most.measured:.3g} times as fast"
    else:
        found = f"at {levels[-1]:.3g} % a step is predicted to be {predicted(len(levels) - 1):.3g} times as fast"
    return f"pruning does not make a decoding step {target:g} times as fast here: {found}. Give less, or --level."
