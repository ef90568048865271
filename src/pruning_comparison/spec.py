"""What a comparison is: every setting that can change a result, validated once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from pruning_comparison.engines import ENGINES, NATIVE, engines_of
from pruning_comparison.errors import InputError, MethodError
from pruning_comparison.methods import IMPORTANCE, METHODS, PRICED, Method, checked_own_method, method_named
from pruning_comparison.metrics import METRICS, of_kind
from pruning_comparison.variants import VARIANTS, variant_named

Precision = Literal["float32", "float16", "bfloat16"]
Execution = Literal["compact", "masked"]
Scope = Literal["model", "layer"]
PruneUnit = Literal["head", "kv_group", "rectangle"]
EntropyDirection = Literal["auto", "high", "low"]
BosRule = Literal["auto", "always", "never"]
Adaptation = Literal["none", "bias", "gate", "refit", "refit-mlp"]
RecoveryParameters = Literal["all", "restricted", "auto"]
ConsentRule = Literal["quality", "time", "cache"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
SCOPES: tuple[Scope, ...] = get_args(Scope)
PRUNE_UNITS: tuple[PruneUnit, ...] = get_args(PruneUnit)
ENTROPY_DIRECTIONS: tuple[EntropyDirection, ...] = get_args(EntropyDirection)
BOS_RULES: tuple[BosRule, ...] = get_args(BosRule)
ADAPTATIONS: tuple[Adaptation, ...] = get_args(Adaptation)
CONSENT_RULES: tuple[ConsentRule, ...] = get_args(ConsentRule)

AUTO = "auto"
RECOVERY_RATES = (1e-4, 3e-4, 1e-3)
RECOVERY_GRID = ("all", "restricted")
"""What recovery chooses from where its learning rate, or the parameters that it trains, are "auto"."""

BUNDLED_TASKS = ("sotu_last_word", "sotu_continuation")
"""Zero-shot tasks whose questions are in the package."""

LOOKS = (3, 6, 12)
"""Iterations after which a run that goes on until it has decided is looked at. Each look may err in a third of the runs that
one look may err in, so that all three together keep what a run of fixed length promises, whatever they see (Bonferroni)."""

OPTION_OF_FIELD: Mapping[str, str] = {
    "pruning_methods": "pruning_method",
    "prune_unit": "unit",
    "engines": "engine",
    "recovery_rate": "recovery_learning_rate",
    "task_limit": "limit",
}
"""Fields of a spec whose option has another name."""


class Trajectory(NamedTuple):
    """The path of one variant, ranked by one method, in one iteration, from level 0 up."""

    variant: str
    method: str
    iteration: int


class Cell(NamedTuple):
    """One point of a trajectory, measured at every temperature and prompt."""

    variant: str
    method: str
    iteration: int
    level: float

    def describe(self) -> str:
        """As people say it; iterations are counted from 1."""
        return f"{self.variant}, {self.method}, iteration {self.iteration + 1}, level {self.level:g} %"


@dataclass(frozen=True)
class ComparisonSpec:
    """Every setting that can change a result. InputError, naming option and value, for what cannot work.

    ``precision`` is what models are measured in, ``prepare_precision`` what matrix products are taken in while scores,
    prices and adaptation are made, from float32 weights and with sums in float32 or better.

    Levels are in per cent of the model's heads; level 0 is always part of a comparison, because everything is measured
    against it. ``threads`` and ``quality_batch_size`` belong to the spec because they change floating point.

    ``consent`` says what a head that is asked to leave is held by: its price ("quality"), or its price over the decoding
    time, or the cache bytes, that removing it saves.

    ``prune_unit`` says what leaves: single heads, whole key-value groups, or heads so that every layer keeps a rectangle, as
    many query heads of each key-value group that it keeps.

    A level is timed in at least ``timing_pairs`` pairs, and on until every ratio of two timed models is known to
    +- ``timing_precision_percent`` at 95 %, for at most ``timing_limit_s``.

    ``tasks`` are zero-shot tasks of lm-evaluation-harness, of each of which at most ``task_limit`` questions are asked.

    In ``engines`` the models of a level are timed side by side after that; "native", in which all other speeds are measured,
    is always among them.

    Recovery trains on calibration text that nothing else has read. Where ``recovery_rate`` or ``recovery_parameters`` is
    "auto", each cell chooses its own from one grid on held-out windows.

    ``until_decided``: measures iterations until the primary answers are decided, at one of ``looks``, of which
    ``iterations`` is the last.

    Among ``pruning_methods`` may be a user's own, as ``Method`` objects. Their functions are imported and checked here,
    before any work; from then on ``pruning_methods`` holds names alone, and ``own_methods`` the records. The hash of the
    source of an own method is part of the spec: when its file changes, that is another run.
    """

    model_name: str = "gpt2"
    device: str = "cpu"
    precision: Precision = "float32"
    prepare_precision: Precision = "float32"
    pruning_levels: tuple[float, ...] = (0.0, 20.0, 40.0, 60.0, 80.0)
    pruning_methods: tuple[str, ...] = ("entropy",)
    variants: tuple[str, ...] = ("baseline", "agency")
    temperatures: tuple[float, ...] = (0.7, 1.0)
    num_tokens: int = 100
    iterations: int = 3
    until_decided: bool = False
    max_prompts: int = 5
    batch_size: int = 1
    execution: Execution = "compact"
    scope: Scope = "model"
    prune_unit: PruneUnit = "head"
    entropy_direction: EntropyDirection = "auto"
    consent: ConsentRule = "quality"
    seed: int = 0
    prompt_file: str | None = None
    eval_text: str = "bundled:held_out"
    eval_tokens: int = 8192
    eval_window: int = 512
    eval_stride: int = 512
    bos: BosRule = "auto"
    wikitext_words: bool = False
    calibration_text: str = "bundled:calibration"
    calibration_tokens: int = 16384
    calibration_window: int = 256
    score_tokens: int | None = None
    adaptation: Adaptation = "refit-mlp"
    ridge: float = 0.1
    mlp_ridge: float = 0.3
    new_bias: bool = True
    recovery_steps: int = 0
    recovery_rate: float | Literal["auto"] = 3e-4
    recovery_parameters: RecoveryParameters = "all"
    threads: int = 1
    quality_batch_size: int = 8
    timing_pairs: int = 10
    timing_precision_percent: float = 2.0
    timing_limit_s: float = 60.0
    engines: tuple[str, ...] = (NATIVE,)
    memory_logging: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    own_methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        self._take_own_methods()
        for field, known in (("pruning_methods", METHODS), ("variants", VARIANTS)):
            values = getattr(self, field)
            _require(bool(values), field, values, "must name at least one", f"Choose from {', '.join(known)}.")
            object.__setattr__(self, field, tuple(dict.fromkeys(values)))
        for name in self.pruning_methods:
            self.method(name)
        for name in self.variants:
            variant_named(name)
        _require(bool(self.engines), "engines", "", "must name at least one", f"Choose from {', '.join(ENGINES)}.")
        object.__setattr__(self, "engines", engines_of(self.engines))
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        for field, allowed in (
            ("precision", PRECISIONS),
            ("prepare_precision", PRECISIONS),
            ("execution", EXECUTIONS),
            ("scope", SCOPES),
            ("prune_unit", PRUNE_UNITS),
            ("entropy_direction", ENTROPY_DIRECTIONS),
            ("adaptation", ADAPTATIONS),
            ("recovery_parameters", (*RECOVERY_GRID, AUTO)),
            ("consent", CONSENT_RULES),
            ("bos", BOS_RULES),
        ):
            value = getattr(self, field)
            _require(value in allowed, field, value, "is unknown", f"Choose from {', '.join(allowed)}.")
        for field, least in (
            ("num_tokens", 1),
            ("iterations", 1),
            ("max_prompts", 1),
            ("batch_size", 1),
            ("eval_tokens", 2),
            ("eval_window", 2),
            ("eval_stride", 1),
            ("calibration_tokens", 2),
            ("calibration_window", 2),
            ("threads", 1),
            ("quality_batch_size", 1),
            ("seed", 0),
            ("recovery_steps", 0),
            ("timing_pairs", 1),
        ):
            value = getattr(self, field)
            _require(value >= least, field, value, f"must be at least {least}", "Give a larger whole number.")
            most = _MOST.get(field, 2**31 - 1)
            _require(value <= most, field, value, f"must be at most {most}", "Give a smaller whole number.")
        _require(
            not self.until_decided or self.iterations == LOOKS[-1],
            "iterations",
            self.iterations,
            "cannot be chosen with --until_decided, which ends after 3, 6 or 12 iterations",
            f"Leave one of the two out; from Python, give iterations={LOOKS[-1]}.",
        )
        _require(bool(self.pruning_levels), "pruning_levels", "", "must name at least one level", "Give 0,20,40.")
        for level in self.pruning_levels:
            _require(
                math.isfinite(level) and 0 <= level < 100,
                "pruning_levels",
                level,
                "must be at least 0 and below 100 per cent",
                "Give levels such as 0,20,40,60,80.",
            )
        levels = sorted({0.0, *(float(level) for level in self.pruning_levels)})
        object.__setattr__(self, "pruning_levels", tuple(levels))
        _require(bool(self.temperatures), "temperatures", "", "must name at least one", "Give 0.7,1.0.")
        for temperature in self.temperatures:
            _require(
                math.isfinite(temperature) and temperature >= 0,
                "temperatures",
                temperature,
                "must be a number of at least 0 (0 is greedy decoding)",
                "Give temperatures such as 0.7,1.0.",
            )
        object.__setattr__(self, "temperatures", tuple(sorted({float(value) for value in self.temperatures})))
        _require(
            self.eval_stride <= self.eval_window,
            "eval_stride",
            self.eval_stride,
            f"must not exceed the window of {self.eval_window} tokens, or tokens would be skipped",
            "Give a smaller stride.",
        )
        _require(
            self.execution == "compact" or not self.recovery_steps,
            "recovery_steps",
            self.recovery_steps,
            "needs --execution=compact: a masked model has full-size weights, which recovery would train",
            "Leave one of the two out.",
        )
        _require(
            self.prune_unit != "rectangle" or self.consent == "quality",
            "consent",
            self.consent,
            "needs heads that answer one by one; with --unit=rectangle those of a layer answer together, by their price",
            "Leave one of the two out.",
        )
        if self.score_tokens is not None:
            _require(
                2 <= self.score_tokens <= self.calibration_tokens,
                "score_tokens",
                self.score_tokens,
                f"must be at least 2 and at most the {self.calibration_tokens} calibration tokens, of which it is a part",
                "Leave it out to score on all of them.",
            )
        if self.task_limit is not None:
            _require(self.task_limit >= 1, "task_limit", self.task_limit, "must be at least 1", "Leave it out for all.")
        limit = self.timing_limit_s
        _require(math.isfinite(limit) and limit >= 0, "timing_limit_s", limit, "must be at least 0", "Give seconds.")
        rate: Any = self.recovery_rate
        _require(
            rate == AUTO or (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0),
            "recovery_rate",
            rate,
            "is neither a number above 0 nor auto",
            f"Give a rate such as 3e-4, or auto to choose from {', '.join(f'{one:g}' for one in RECOVERY_RATES)}.",
        )
        for field in ("ridge", "mlp_ridge", "timing_precision_percent"):
            strength = getattr(self, field)
            _require(math.isfinite(strength) and strength > 0, field, strength, "must be above 0", "Leave it out.")

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many iterations it is asked whether the answers are decided: once, at the end, or at ``LOOKS``."""
        return LOOKS if self.until_decided else (self.iterations,)

    def method(self, name: str) -> Method:
        """The record of one of the spec's methods; InputError for a name that is none."""
        return method_named(name, self.own_methods)

    def _take_own_methods(self) -> None:
        """Own methods among the names become records in ``own_methods``, checked, in the order of the names."""
        given: list[str | Method] = list(self.pruning_methods)
        records = [*self.own_methods, *(one for one in given if isinstance(one, Method) and one.own)]
        names = tuple(one.name if isinstance(one, Method) else one for one in given)
        own: dict[str, Method] = {}
        for record in records:
            method = checked_own_method(record)
            if own.setdefault(method.name, method) != method:
                raise MethodError(f"--pruning_method: two methods are called {method.name!r}. Rename one.")
        object.__setattr__(self, "pruning_methods", names)
        object.__setattr__(self, "own_methods", tuple(own[name] for name in dict.fromkeys(names) if name in own))

    def cells(self) -> Iterator[Cell]:
        """Every cell, in the order in which a serial run measures them: by iteration, method, level, then variant.

        What adaptation aims at depends on the iteration alone, and is large: so each iteration is finished with all methods.
        """
        for method, iteration, level in self.levels():
            for variant in self.variants:
                yield Cell(variant, method, iteration, level)

    def levels(self) -> Iterator[tuple[str, int, float]]:
        """(method, iteration, level), at which all variants are timed together, in the order of ``cells``."""
        for iteration in range(self.iterations):
            for method in self.pruning_methods:
                for level in self.pruning_levels:
                    yield method, iteration, level

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory once."""
        for iteration in range(self.iterations):
            for method in self.pruning_methods:
                for variant in self.variants:
                    yield Trajectory(variant, method, iteration)

    def idle_settings(self) -> list[str]:
        """Which settings differ from their defaults and change nothing here, a sentence each on what would need them."""
        variants = [variant_named(name) for name in self.variants]
        methods = [self.method(name) for name in self.pruning_methods]
        named = f"{', '.join(self.variants)}. Agency does"
        by_method = ", ".join(self.pruning_methods)
        settings = (
            (("adaptation", "ridge", "mlp_ridge"), any(v.adapts for v in variants), f"no variant adapts: {named}"),
            (("consent",), any(v.negotiates for v in variants), f"no variant asks heads: {named}"),
            (
                ("recovery_rate", "recovery_parameters"),
                self.recovery_steps > 0,
                "nothing is trained: give --recovery_steps as well",
            ),
            (("task_limit",), bool(self.tasks), "no task is asked: give --tasks as well"),
            (
                ("entropy_direction",),
                any(method.tries_directions for method in methods),
                f"no method has a direction: {by_method}. Entropy does",
            ),
            (
                ("score_tokens",),
                any(method.reads_text for method in methods) or any(v.negotiates for v in variants),
                f"no method reads text: {by_method}",
            ),
        )
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"{option_of(name)}={getattr(self, name)} changes nothing, because {why}"
            for names, used, why in settings
            for name in names
            if not used and getattr(self, name) != defaults[name]
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for the manifest. Own methods by name, with the hash of their source."""
        values = {**self.as_dict_of_tuples(), "own_methods": {one.name: one.identity() for one in self.own_methods}}
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    def as_options(self) -> dict[str, Any]:
        """The settings as options of the command line, by name; those that nothing was given for are left out.

        An own method is named by where its function is found, since that is all that the command line can name.
        """
        values = self.as_dict()
        del values["own_methods"]
        values["pruning_methods"] = [
            method.place if method.own else method.name for method in map(self.method, self.pruning_methods)
        ]
        if not values.pop("new_bias"):
            values["no_new_bias"] = True
        if not values["tasks"]:
            del values["tasks"]
        return {option_of(name).removeprefix("--"): value for name, value in values.items() if value is not None}

    def as_dict_of_tuples(self) -> dict[str, Any]:
        """The settings as the constructor takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, trust_methods: bool = False, known_methods: Collection[Method] = ()
    ) -> ComparisonSpec:
        """The inverse of ``as_dict``; unknown names raise InputError.

        A user's own methods are imported, which runs their module, only with ``trust_methods``: whoever wrote the stored
        settings chooses what that is. Without, they must be among ``known_methods``, as they were stored; InputError else.
        """
        values = dict(values)
        own = _own_methods_of(values.pop("own_methods", {}), trust_methods, known_methods)
        if "unit" in values:  # as runs of 0.1.0 have it
            values = {"prune_unit" if name == "unit" else name: value for name, value in values.items()}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"a stored spec has settings this version does not know: {', '.join(unknown)}. Update.")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain, own_methods=own)

    def content_hash(self, inputs: dict[str, str]) -> str:
        """Identity of a run, 16 hexadecimal digits: settings, content hashes of the texts and the model, and revisions.

        File names do not count, their contents do, so that a run is continued after its inputs have moved and not after
        they have changed.
        """
        return identity(self.as_dict(), inputs, revisions_of(self).as_dict())


_MOST = {"iterations": 10_000, "threads": 4096, "seed": 2**63 - 1}
"""Whole numbers that are larger are slips of the keyboard; a list of that many cells alone would fill the memory."""

REUSE_AXES = frozenset(
    {"pruning_levels", "pruning_methods", "own_methods", "variants", "iterations", "until_decided", "engines"}
)
"""Settings that say which cells there are, or what else is timed, and nothing about how one of them is measured."""
TEXT_AXES = frozenset(
    {
        "max_prompts", "temperatures", "num_tokens", "batch_size", "memory_logging", "timing_pairs",
        "timing_precision_percent", "timing_limit_s", "tasks", "task_limit",
    }
)  # fmt: skip
"""Settings that change which texts are written, which questions are asked and how a model is timed, and neither its heads
nor its perplexity."""
NAMES_OF_FILES = frozenset({"prompt_file", "eval_text", "calibration_text"})
LATER_SETTINGS: Mapping[str, Any] = {
    "prepare_precision": "float32",
    "engines": [NATIVE],
    "tasks": [],
    "task_limit": None,
    "wikitext_words": False,
}
"""Settings that came after runs had been stored without them, with the value that those runs had: it does not count in
the identity of a run, so that such a run is still the same run."""
_NO_DEFAULT = object()


PROTOCOL_REVISION = 2
"""Raised whenever it changes how a cell is measured: windows of text, sampling, timing, what is measured of a model.

2: the dense model is timed in every level's turns, and timing goes on until it is precise.
"""


@dataclass(frozen=True)
class Revisions:
    """Revisions of what a run's results rest on: the protocol, the methods and variants it has, and all metrics.

    Results of different revisions are never mixed within a run. Metrics of tasks are among them where tasks are asked.
    """

    protocol: int
    methods: Mapping[str, int]
    variants: Mapping[str, int]
    metrics: Mapping[str, int]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Revisions:
        """The inverse of ``as_dict``. ValueError for what are no revisions."""
        tables = [raw.get(name) for name in ("methods", "variants", "metrics")]
        numbers = [raw.get("protocol")]
        for table in tables:
            numbers += table.values() if isinstance(table, dict) else [None]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"revisions are {str(raw)[:60]!r}")
        return cls(raw["protocol"], raw["methods"], raw["variants"], raw["metrics"])

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**self.of_every_cell(), "methods": dict(self.methods), "variants": dict(self.variants)}

    def of_every_cell(self, *, tasks: bool = True) -> dict[str, Any]:
        """The part on which all cells rest, whatever their method and variant; that of tasks is left out on request."""
        of_tasks = {metric.name for metric in of_kind("task")} if not tasks else set()
        metrics = {name: revision for name, revision in self.metrics.items() if name not in of_tasks}
        return {"protocol": self.protocol, "metrics": metrics}

    def named(self) -> dict[str, int]:
        """Every revision by what it is of, in words."""
        named = {"the protocol": self.protocol}
        for kind, table in (("method", self.methods), ("variant", self.variants), ("metric", self.metrics)):
            named |= {f"{kind} {name}": revision for name, revision in table.items()}
        return named

    def same_for(self, cell: Cell, other: Revisions) -> bool:
        """Whether a cell's method and variant have the same revisions in both; False where one does not have them."""
        mine, theirs = self.named(), other.named()
        needed = [f"method {name}" for name in _methods_of((cell.method,), (cell.variant,))]
        return all(
            name in mine and name in theirs and mine[name] == theirs[name]
            for name in (*needed, f"variant {cell.variant}")
        )


def revisions_of(spec: ComparisonSpec) -> Revisions:
    """The revisions on which the results of a spec rest."""
    return Revisions(
        protocol=PROTOCOL_REVISION,
        methods={name: spec.method(name).revision for name in _methods_of(spec.pruning_methods, spec.variants)},
        variants={name: variant_named(name).revision for name in spec.variants},
        metrics={name: metric.revision for name, metric in METRICS.items() if spec.tasks or metric.kind != "task"},
    )


def _methods_of(methods: Collection[str], variants: Collection[str]) -> list[str]:
    """The methods that are used: those that rank, and where heads are asked, those for their prices and importance."""
    asked = any(variant_named(name).negotiates for name in variants)
    return list(dict.fromkeys([*methods, PRICED, IMPORTANCE] if asked else methods))


def identity(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    revisions: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> str:
    """Hash of settings (``as_dict``), of the contents of what is read, and of revisions, 16 hexadecimal digits."""
    counted = {
        key: value
        for key, value in settings.items()
        if key not in NAMES_OF_FILES and key not in without and LATER_SETTINGS.get(key, _NO_DEFAULT) != value
    }
    canonical = json.dumps({"settings": counted, "inputs": dict(inputs), "revisions": revisions}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def without_strange_methods(settings: Mapping[str, Any], known: Collection[Method]) -> dict[str, Any]:
    """Stored settings without those own methods that are not ``known``, or that were of another source then."""
    here = {method.name: method.identity() for method in known}
    stored = settings.get("own_methods", {})
    same = {name: stored[name] for name in stored if name in here and stored[name] == here[name]}
    names = [name for name in settings["pruning_methods"] if name in same or name not in stored]
    return {**settings, "pruning_methods": names, "own_methods": same}


def _own_methods_of(stored: Any, trust: bool, known: Collection[Method]) -> tuple[Method, ...]:
    """A user's own methods from stored settings."""
    if not isinstance(stored, Mapping):
        raise InputError(f"a stored spec has own_methods {stored!r}, which is not a mapping. Run the comparison again.")
    here = {method.name: method for method in known}
    found = []
    for name, values in stored.items():
        if not isinstance(values, Mapping):
            raise InputError(
                f"the stored method {name!r} is {values!r}, which is not a mapping. Run the comparison again."
            )
        if name in here and here[name].identity() == values:
            found.append(here[name])
        elif not trust:
            raise InputError(
                f"the stored method {name!r} is Python code of its author's, and importing it runs that code. Give "
                "--trust_methods if you trust it, or leave it out."
            )
        else:
            settings = {key: value for key, value in values.items() if key != "source"}
            try:
                method = checked_own_method(Method(name, **settings))
            except TypeError as error:
                raise InputError(f"the stored method {name!r} cannot be read: {error}. Name it again.") from error
            if method.identity() != values:
                raise InputError(f"the stored method {name!r} has changed since. Name it again to measure with it.")
            found.append(method)
    return tuple(found)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_task_file(name: str) -> bool:
    """Whether a task is named by its YAML file, which may name Python code."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def option_of(field: str) -> str:
    """The option that sets a field of a spec: "--unit" for ``prune_unit``."""
    return f"--{OPTION_OF_FIELD.get(field, field)}"


def _require(condition: bool, field: str, value: object, problem: str, advice: str) -> None:
    if not condition:
        raise InputError(f"{value!r} {problem}. {advice}", option=option_of(field))
