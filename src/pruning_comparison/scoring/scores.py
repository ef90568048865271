"""Scores of heads by any method, ``float [L, H]``, higher = keep: dispatch alone. Functions stand in modules of their own.

Dimension letters: N windows, T time, L layers, H heads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import MethodError
from pruning_comparison.methods import Method
from pruning_comparison.models.heads import head_grid
from pruning_comparison.pruning.rectangles import Rectangle
from pruning_comparison.spec import EntropyDirection, Scope


@dataclass(frozen=True)
class HeadScores:
    """Scores [L, H] with what a reader needs to know of how they came about.

    Where layers keep rectangles, ``rectangles`` may hold, for every layer, what it can keep and what the going of the others
    costs together. They are chosen by that then, and not by the sum of their heads' scores.
    """

    scores: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    rectangles: Sequence[Sequence[Rectangle]] | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """What a score function may ask for by naming it, beside ``model`` and ``windows``.

    ``batch_size`` windows are passed at once. ``generator`` is the only source of random numbers, the same for every
    method of an iteration. ``entropy_direction`` and ``gradient_precision`` are "auto" until a method has decided.
    Heads will be chosen at ``smallest_level`` per cent and above, within ``scope``, ``group_size`` at a time.
    ``rectangle`` is the number of query heads per key-value group where layers keep as many heads of each, else None.
    ``prices`` measures, when it is called, the ``scoring.prices.Prices`` of the model's heads.
    """

    batch_size: int = 8
    generator: torch.Generator = field(default_factory=torch.Generator)
    entropy_direction: EntropyDirection = "auto"
    gradient_precision: str = "auto"
    smallest_level: float = 10.0
    scope: Scope = "model"
    group_size: int = 1
    rectangle: int | None = None
    prices: Callable[[], Any] | None = None

    def as_decided(self, details: Mapping[str, Any]) -> ScoreSettings:
        """With what was decided when the dense model was scored, so that models pruned further are scored alike."""
        decided = {one.name: details[one.name] for one in fields(self) if one.name in details}
        return replace(self, **decided)


def score_heads(
    method: Method, model: PreTrainedModel, windows: Tensor | None = None, settings: ScoreSettings | None = None
) -> HeadScores:
    """The method's scores of a model's heads, float [L, H] on the CPU, higher = keep.

    Its function is given those settings that it names, the defaults where there are none. ``windows``, token ids int64
    [N, T], may be left out for methods that read no text; ValueError for others. MethodError where a user's own function
    raises, or returns no finite [L, H].
    """
    settings = settings or ScoreSettings()
    if windows is None and method.reads_text:
        raise ValueError(f"{method.name} reads text: give windows of token ids [N, T]")
    if method.own:
        return _scores_of_own(method, model, windows, settings)
    return _as_scores(_call(method, model, windows, settings))


def _call(method: Method, model: PreTrainedModel, windows: Tensor | None, settings: ScoreSettings) -> Any:
    function = method.function()
    offered = {
        "model": model,
        "windows": windows,
        **{one.name: getattr(settings, one.name) for one in fields(settings)},
    }
    return function(**{name: offered[name] for name in inspect.signature(function).parameters if name in offered})


def _as_scores(result: Any) -> HeadScores:
    return result if isinstance(result, HeadScores) else HeadScores(result)


def _scores_of_own(
    method: Method, model: PreTrainedModel, windows: Tensor | None, settings: ScoreSettings
) -> HeadScores:
    """What a user's function returns, checked: an error in it is the user's to fix, and costs nothing measured."""
    grid = head_grid(model.config)
    where = f"--pruning_method: {method.name}"
    try:
        found = _as_scores(_call(method, model, windows, settings))
    except Exception as error:
        raise MethodError(
            f"{where} raised {type(error).__name__}: {error}. Fix it; --debug_traceback shows where."
        ) from error
    scores = found.scores
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise MethodError(f"{where} returned {kind}; return a floating-point tensor [{grid.n_layers}, {grid.n_heads}].")
    if scores.shape != (grid.n_layers, grid.n_heads):
        raise MethodError(
            f"{where} returned shape {tuple(scores.shape)}; return [{grid.n_layers}, {grid.n_heads}], as the model has "
            f"{grid.n_layers} layers of {grid.n_heads} heads."
        )
    if not bool(scores.isfinite().all()):
        place = tuple((~scores.isfinite()).nonzero()[0].tolist())
        raise MethodError(
            f"{where} gave head {place} the score {scores[place].item()}; give every head a finite score."
        )
    try:
        json.dumps(dict(found.details))
    except (TypeError, ValueError) as error:
        raise MethodError(f"{where} returned details that JSON cannot hold: {error}. Return plain values.") from error
    return replace(found, scores=scores.detach().cpu().double())
