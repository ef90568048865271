"""How heads are ranked for pruning: one record per method, from which everything else derives. Without torch.

A method is added by a record here, a function, and a test; CONTRIBUTING.md has a worked example. Functions are named and
looked up when they are first needed, so that reading the records costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name

ScoreFunction = Callable[..., Any]
"""From a model, calibration windows and whatever else it names among ``ScoreSettings`` to scores [L, H], higher = keep."""


@dataclass(frozen=True)
class Method:
    """How heads are ranked.

    ``score`` is the function, or where it is found as "package.module:function". It takes ``model``, ``windows`` (token ids
    [N, T]) and any of the settings that ``scoring.ScoreSettings`` has, by name, and returns float [L, H], higher = keep, or
    ``scoring.HeadScores``. ``summary`` ends the sentence "a head leaves early that ...".

    ``runs_on_pruned``: it can score a physically pruned model too, needing neither gates nor the weights of heads that have
    left. ``reads_text`` and ``draws`` say what makes its scores differ between iterations: the calibration text, and random
    numbers. ``tries_directions``: which end leaves first is tried out at the smallest level above 0, unless it is given.

    ``passes`` is what it costs in forward passes over the text, ``trial_passes`` what trying directions adds, and
    ``passes_per_head`` what every head adds: for ``plan`` alone.

    ``revision`` is raised whenever the same inputs give other scores; results of different revisions are never mixed.
    """

    name: str
    score: str | ScoreFunction
    summary: str = "has a low score"
    runs_on_pruned: bool = False
    reads_text: bool = True
    draws: bool = False
    tries_directions: bool = False
    passes: float = 2.0
    trial_passes: float = 0.0
    passes_per_head: float = 0.0
    revision: int = 1

    @property
    def own(self) -> bool:
        """Whether it is a user's own, and not one of this package."""
        return METHODS.get(self.name) is not self

    @property
    def varies(self) -> bool:
        """Whether iterations differ in their scores."""
        return self.reads_text or self.draws

    def function(self) -> ScoreFunction:
        """The function itself, imported where it is only named. InputError where there is none such."""
        if not isinstance(self.score, str):
            return self.score
        module_name, _, name = self.score.partition(":")
        found: ScoreFunction = getattr(importlib.import_module(module_name), name)
        return found


METHODS: dict[str, Method] = {
    "entropy": Method(
        "entropy",
        score="pruning_comparison.scoring.entropy:score_entropy",
        summary="spreads its attention (or concentrates it: `--entropy_direction`)",
        runs_on_pruned=True,
        tries_directions=True,
        passes=0.7,
        trial_passes=1.0,
    ),
    "random": Method(
        "random",
        score="pruning_comparison.scoring.weights:score_random",
        summary="is drawn; the control that every method has to beat",
        reads_text=False,
        draws=True,
        passes=0.0,
    ),
    "magnitude": Method(
        "magnitude",
        score="pruning_comparison.scoring.weights:score_magnitude",
        summary="has small weights",
        reads_text=False,
        passes=0.1,
    ),
    "taylor": Method(
        "taylor",
        score="pruning_comparison.scoring.gradients:score_taylor",
        summary="has a small gradient of the loss with respect to its gate, in absolute value, summed over sequences",
    ),
    "fisher": Method(
        "fisher",
        score="pruning_comparison.scoring.gradients:score_fisher",
        summary="the same with squares",
    ),
    "ablation": Method(
        "ablation",
        score="pruning_comparison.scoring.ablation:score_ablation",
        summary="costs little loss when it alone is cut: exact, and slow (one pass over the calibration text per head)",
        passes=0.0,
        passes_per_head=1.0,
    ),
    "wanda": Method(
        "wanda",
        score="pruning_comparison.scoring.activations:score_wanda",
        summary="has small output weights times what they are fed with (Sun et al. 2024, summed over a head)",
        passes=1.0,
    ),
    "flap": Method(
        "flap",
        score="pruning_comparison.scoring.activations:score_flap",
        summary=(
            "strays little from its mean, weighed by its output weights and standardised by layer (An et al. 2024); "
            "its compensation is `--adaptation=bias`"
        ),
        passes=1.0,
    ),
    "fisher-interactions": Method(
        "fisher-interactions",
        score="pruning_comparison.scoring.set_scores:score_fisher_interactions",
        summary=(
            "adds least to the cost of all that have left, by the Fisher information of its layer (the objective of "
            "Kwon et al. 2022)"
        ),
    ),
    "fisher-greedy": Method(
        "fisher-greedy",
        score="pruning_comparison.scoring.set_scores:score_fisher_greedy",
        summary="has the smallest `fisher` score on what is left, taken anew in about fifty steps: as many times slower",
        passes=100.0,
    ),
}
"""Every method of this package by its name, in the order in which help and tables list them."""


IMPORTANCE = "fisher"
"""The method whose scores agency takes for how much the loss minds a head."""


def method_named(name: str, own: Iterable[Method] = ()) -> Method:
    """The method of that name, of this package or among a user's ``own``. InputError, with the nearest, for any other."""
    known = {**METHODS, **{method.name: method for method in own}}
    if name not in known:
        raise InputError(unknown_name("--pruning_method", name, known))
    return known[name]
