"""How heads are ranked for pruning: one record per method, from which everything else derives. Without torch.

A method is added by a record here, a function, and a test; CONTRIBUTING.md has a worked example. Functions are named and
looked up when they are first needed, so that reading the records costs nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pruning_comparison.errors import InputError, MethodError
from pruning_comparison.formatting import unknown_name

ScoreFunction = Callable[..., Any]
"""From a model, calibration windows and whatever else it names among ``ScoreSettings`` to scores [L, H], higher = keep."""

OFFERED = (
    "model", "windows", "generator", "batch_size", "entropy_direction", "gradient_precision", "smallest_level", "scope",
    "group_size", "rectangle", "prices",
)  # fmt: skip
"""What a score function may name as parameters: ``model``, ``windows``, and the fields of ``scoring.ScoreSettings``."""


@dataclass(frozen=True)
class Method:
    """How heads are ranked: one of this package's methods, or a user's own, given to ``ComparisonSpec`` or ``prune``.

    ``score`` is the function, or where it is found as "package.module:function". It names what it wants among ``model`` (the
    dense model, to be left as it is), ``windows`` (token ids, int64 [N, T]), ``generator`` (the only source of random
    numbers) and the other settings that ``scoring.ScoreSettings`` has, and returns float [L, H], higher = keep, or
    ``scoring.HeadScores``. ``summary`` ends the sentence "a head is pruned early if it ...".

    ``runs_on_pruned``: it can score a physically pruned model too, needing neither gates nor the weights of heads that have
    left. ``reads_text`` and ``draws`` say what makes its scores differ between iterations: the calibration text, and random
    numbers. ``tries_directions``: which end leaves first is tried out at the smallest level above 0, unless it is given.

    ``tokens`` is how much calibration text its ranks need, and so all that it reads unless ``--score_tokens`` asks for more
    or less; None for all that there is.

    ``passes`` is what it costs in forward passes over the text, ``trial_passes`` what trying directions adds, and
    ``passes_per_head`` what every head adds: for ``plan`` alone.

    ``revision`` is raised whenever the same inputs give other scores; results of different revisions are never mixed. For a
    user's own method ``source`` does that: the hash of the file that its function stands in, which a spec fills in.
    """

    name: str
    score: str | ScoreFunction
    summary: str = "has a low score"
    runs_on_pruned: bool = False
    reads_text: bool = True
    draws: bool = False
    tries_directions: bool = False
    tokens: int | None = None
    passes: float = 2.0
    trial_passes: float = 0.0
    passes_per_head: float = 0.0
    revision: int = 1
    source: str = ""

    @property
    def own(self) -> bool:
        """Whether it is a user's own, and not one of this package."""
        return METHODS.get(self.name) is not self

    @property
    def varies(self) -> bool:
        """Whether iterations differ in their scores."""
        return self.reads_text or self.draws

    def function(self) -> ScoreFunction:
        """The function itself, imported where it is only named. MethodError where there is none such."""
        return _imported(self.name, self.score) if isinstance(self.score, str) else self.score

    @property
    def place(self) -> str:
        """Where its function is found, as "package.module:function"."""
        if isinstance(self.score, str):
            return self.score
        return f"{self.score.__module__}:{self.score.__qualname__}"

    def identity(self) -> dict[str, Any]:
        """What scores of a user's own method depend on, as plain values."""
        names = ("source", "runs_on_pruned", "reads_text", "draws", "tries_directions", "revision")
        return {"score": self.place, **{name: getattr(self, name) for name in names}}


METHODS: dict[str, Method] = {
    "entropy": Method(
        "entropy",
        score="pruning_comparison.scoring.entropy:score_entropy",
        summary="spreads its attention (or concentrates it: `--entropy_direction`)",
        runs_on_pruned=True,
        tries_directions=True,
        tokens=4096,
        passes=0.7,
        trial_passes=1.0,
        # 1 divided entropies in sliding layers by the log of all positions; 2 read all of the text; 3 was all in float32.
        revision=4,
    ),
    "random": Method(
        "random",
        score="pruning_comparison.scoring.weights:score_random",
        summary="is drawn at random; the control that every method has to beat",
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
        summary="has a small squared gradient of the loss with respect to its gate, summed over sequences",
    ),
    "ablation": Method(
        "ablation",
        score="pruning_comparison.scoring.ablation:score_ablation",
        summary="costs little loss when it alone is removed: exact, and slow (one pass over the calibration text per head)",
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
            "varies little around its mean, weighted by its output weights and standardised by layer (An et al. 2024); "
            "its compensation is `--adaptation=bias`"
        ),
        passes=1.0,
        revision=2,
    ),
    "llm-pruner": Method(
        "llm-pruner",
        score="pruning_comparison.scoring.gradients:score_llm_pruner",
        summary=(
            "has weights whose removal, to first order, hardly moves the loss; the same share of every layer but the first "
            "and last ones, which go last (Ma et al. 2023)"
        ),
        passes=3.0,
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
        summary="has the smallest `fisher` score on what is left, computed again in about fifty steps: as many times slower",
        passes=100.0,
    ),
    "obs": Method(
        "obs",
        score="pruning_comparison.agency.prices_across_layers:score_obs",
        summary=(
            "has the lowest price: what removing it costs once the others have adapted (the optimal brain surgeon of "
            "Hassibi and Stork 1993 on heads, layers weighed by what an error in them was measured to cost)"
        ),
        runs_on_pruned=True,
        passes=3.0,
        revision=2,  # 1 took the divergence of large models from two softmaxes, and sums in float32
    ),
}
"""Every method of this package by its name, in the order in which help and tables list them."""


IMPORTANCE = "fisher"
"""The method whose scores agency records as how sensitive the loss is to a head; they change no answer."""

IMPORTANCE_TOKENS = 2048
"""Calibration text that these scores are made of where the method itself is not asked for."""

PRICED = "obs"
"""The method by whose prices heads consent, whatever the method that they are asked by."""


def method_named(name: str, own: Iterable[Method] = ()) -> Method:
    """The method of that name, of this package or among a user's ``own``. InputError, with the nearest, for any other."""
    known = {**METHODS, **{method.name: method for method in own}}
    if name not in known:
        hint = f" One of your own is given as Method({name!r}, score={name!r})." if ":" in name else ""
        raise InputError(unknown_name("", name, known) + hint, option=_OPTION)
    return known[name]


def checked_own_method(method: Method) -> Method:
    """A user's own method with its function, imported where it is only named, and the hash of its source.

    MethodError, before any work is done, for a name that cannot be one, a function that is not there or cannot be called
    with what is offered, and one whose source cannot be read: without it nothing could tell old results from new ones.
    """
    name = method.name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.:-]*", name, re.ASCII):
        raise MethodError(
            f"{_OPTION}: {name!r} is not a valid name for a method. Use letters, digits and any of _ . : - after "
            "the first letter."
        )
    if name in METHODS:
        raise MethodError(f"{_OPTION}: {name!r} is a method of this package. Give your own another name.")
    function = method.function()
    if not callable(function):
        raise MethodError(f"{_OPTION}: {name}: {method.place} is a {type(function).__name__}. Name a function.")
    written = inspect.unwrap(function)
    if not inspect.isfunction(written):
        raise MethodError(
            f"{_OPTION}: {name} is a {type(function).__name__}, and what it computes is not all in its source. "
            "Give a function that is defined with def."
        )
    _check_parameters(name, function)
    return replace(method, score=function, source=_source_hash(name, written))


_OPTION = "--pruning_method"


def _imported(name: str, place: str) -> ScoreFunction:
    """The function at "package.module:function". MethodError where it is not there."""
    module_name, colon, attribute = place.partition(":")
    if not (module_name and colon and attribute):
        raise MethodError(f"{_OPTION}: {place!r} names no function. Write package.module:function.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise MethodError(
                f"{_OPTION}: {place}: there is no module {error.name!r}. Start in the folder that holds it, or install it."
            ) from error
        raise MethodError(f"{_OPTION}: {place}: its module needs {error.name!r}, which is not there.") from error
    except (Exception, SystemExit) as error:
        raise MethodError(
            f"{_OPTION}: {place}: its module cannot be imported: {type(error).__name__}: {_one_line(error)}. Fix it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [one for one, value in vars(found).items() if inspect.isfunction(value)]
            raise MethodError(
                unknown_name(f"{_OPTION}: {place}: function", part, functions)
                if functions
                else f"{_OPTION}: {place}: {module_name} has no {part!r}, and no function at all."
            )
        found = getattr(found, part)
    result: ScoreFunction = found
    return result


def _check_parameters(name: str, function: ScoreFunction) -> None:
    """MethodError where a function cannot be called with what is offered, each by its name."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        if needed and (parameter.name not in OFFERED or parameter.kind is parameter.POSITIONAL_ONLY):
            raise MethodError(
                f"{_OPTION}: {name} has a parameter {parameter.name!r}, which nothing can be given for. Parameters are "
                f"given by name; they may be {', '.join(OFFERED)}."
            )


def _source_hash(name: str, function: Any) -> str:
    """Hash of the file that a function stands in, or of its own source where that is no file (a notebook), 16 digits.

    Plain values that the function has from the function around it count as well. MethodError for anything else it has from
    there, and where no source can be read.
    """
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    try:
        content = Path(file).read_bytes() if file else inspect.getsource(function).encode()
    except (OSError, TypeError) as error:
        raise MethodError(
            f"{_OPTION}: the source of {name} cannot be read ({_one_line(error)}), so nothing would tell its results from "
            "those of another version. Put the function in a file."
        ) from error
    taken = inspect.getclosurevars(function).nonlocals
    for variable, value in taken.items():
        if not isinstance(value, (int, float, str, bytes, bool, type(None))):
            raise MethodError(
                f"{_OPTION}: {name} takes {variable!r}, a {type(value).__name__}, from the function around it, which is not "
                "in its source. Define the function at the top of a module."
            )
    marks = [content, *(f"{variable}={value!r}".encode() for variable, value in sorted(taken.items()))]
    return hashlib.sha256(b"\0".join(marks)).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
