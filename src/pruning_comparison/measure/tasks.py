"""Zero-shot tasks of lm-evaluation-harness on models in memory: one set-up of a task, and many models that answer it.

The harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) gives questions, prompts and scores. Its own
wrapper of a model is used with two differences: texts begin by the run's own rule, and a context that several answers share
is read once.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import listed, reason_of
from pruning_comparison.measure.continuations import continuation_likelihoods, tokens_read
from pruning_comparison.metrics import of_kind
from pruning_comparison.spec import BUNDLED_TASKS, is_task_file
from pruning_comparison.texts import digest

INSTALL = "pip install 'pruning-comparison[tasks]'"

_FEWSHOT_SEED = 1234
"""The harness's own, so that tasks that show examples show the same ones."""


@dataclass(frozen=True)
class TaskAnswer:
    """What a model has made of one question: scores by the metrics of ``metrics.py``, from 0 to 1.

    ``reason`` says why there are none. ``log_likelihoods`` are those of the answers that were held against each other, in
    nats; empty for tasks whose answers are generated.
    """

    task: str
    question: int
    scores: Mapping[str, float]
    log_likelihoods: tuple[float, ...] = ()
    reason: str | None = None


class TaskSet:
    """Tasks with their questions, set up once. ``names`` are those of single tasks: groups are taken apart."""

    def __init__(self, tasks: Mapping[str, Any]) -> None:
        self._tasks = tasks
        self._scored = {name: _scored_metrics(name, task) for name, task in tasks.items()}

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    @property
    def metrics(self) -> dict[str, list[str]]:
        """The metrics by which each task is scored."""
        return {name: list(scored) for name, scored in self._scored.items()}

    @property
    def questions(self) -> dict[str, int]:
        """How many questions each task asks."""
        return {name: len({one.doc_id for one in task.instances}) for name, task in self._tasks.items()}

    def content(self) -> str:
        """Hash of everything that is asked, and of the harness's version: what the answers rest on beside the model."""
        parts = [_harness().__version__]
        for name, task in self._tasks.items():
            for one in task.instances:
                right = task.doc_to_target(one.doc)
                parts.append(json.dumps([name, one.doc_id, one.request_type, one.args, right], default=str))
        return digest(parts)

    def tokens(self, tokenizer: Any, bos: int | None) -> int:
        """How many tokens a model reads to answer everything that is no generation."""
        asked = [
            one.args for task in self._tasks.values() for one in task.instances if one.request_type == "loglikelihood"
        ]
        return tokens_read([_encoded(tokenizer, bos, *pair) for pair in asked])

    def answers(self, model: PreTrainedModel, tokenizer: Any, *, bos: int | None, batch_size: int) -> list[TaskAnswer]:
        """What a model answers, question by question. ``bos`` is the token that its texts begin with, if any."""
        with _quiet():
            speaker = _language_model()(model, copy.deepcopy(tokenizer), bos=bos, batch_size=batch_size)
            by_kind: defaultdict[str, list[Any]] = defaultdict(list)
            for task in self._tasks.values():
                for instance in task.instances:
                    instance.resps, instance.filtered_resps = [], {}
                    by_kind[instance.request_type] += [instance] * (instance.repeats or 1)
            for kind, instances in by_kind.items():
                for instance, response in zip(instances, getattr(speaker, kind)(instances), strict=True):
                    instance.resps.append(response)
            return [answer for name in self._tasks for answer in self._scores(name)]

    def _scores(self, name: str) -> Iterator[TaskAnswer]:
        """Scores of one task, from what its questions have been answered, by the first of its filters."""
        task = self._tasks[name]
        task.apply_filters()
        by_question: defaultdict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            by_question[instance.doc_id].append(instance)
        for question, instances in by_question.items():
            instances.sort(key=lambda one: one.idx)
            answered = [next(iter(one.filtered_resps.values())) for one in instances]
            kinds = {one.request_type for one in instances}
            likelihoods = tuple(float(one[0]) for one in answered) if kinds == {"loglikelihood"} else ()
            if not all(map(math.isfinite, likelihoods)):
                yield TaskAnswer(
                    name, question, {}, likelihoods, "a log-likelihood of the model is not a finite number"
                )
                continue
            found = task.process_results(instances[0].doc, answered)
            scores = {metric: float(found[theirs]) for metric, theirs in self._scored[name].items()}
            yield TaskAnswer(name, question, scores, likelihoods)


@cache
def load_tasks(names: tuple[str, ...], limit: int | None = None) -> TaskSet:
    """Sets tasks up: ``names`` are bundled ones, the harness's own tasks, groups and tags, or YAML files.

    ``limit`` is how many questions of each task are asked, from its first on. Cached, so that a process sets them up once.
    InputError where the harness is not installed, a task is unknown, cannot be loaded, or has no accuracy.
    """
    with _quiet():
        manager = _harness_part("lm_eval.tasks").TaskManager(include_defaults=not all(map(_has_own_file, names)))
        tasks: dict[str, Any] = {}
        for name in names:
            for found, task in _loaded(manager, name).items():
                tasks[found] = task
                _set_up(found, task, limit)
    return TaskSet(tasks)


def _has_own_file(name: str) -> bool:
    return name in BUNDLED_TASKS or is_task_file(name)


def _loaded(manager: Any, name: str) -> Mapping[str, Any]:
    """Single tasks by their names."""
    place = name
    if name in BUNDLED_TASKS:
        place = str(files("pruning_comparison").joinpath("data", "tasks", f"{name}.yaml"))
    elif is_task_file(name):
        if not Path(name).is_file():
            raise InputError(f"{name!r} is not a file. Give the YAML file of a task.", option="--tasks")
    elif name not in manager.task_index:
        near = get_close_matches(name, [*BUNDLED_TASKS, *manager.all_tasks], n=3)
        hint = f"Did you mean {listed(near)}? " if near else ""
        raise InputError(
            f"{name!r} is no task of lm-evaluation-harness. {hint}Bundled are {listed(BUNDLED_TASKS)}; `lm-eval ls tasks` "
            "lists the others, and a YAML file is one as well.",
            option="--tasks",
        )
    try:
        found: Mapping[str, Any] = manager.load([place])["tasks"]
    except Exception as error:  # whatever a data set, its loading script or a YAML file raises
        raise InputError(
            f"{name} cannot be loaded: {reason_of(error)}. Its questions may have to be downloaded from the Hugging Face "
            f"hub, once; without a network there are {listed(BUNDLED_TASKS)}.",
            option="--tasks",
        ) from error
    return found


def _set_up(name: str, task: Any, limit: int | None) -> None:
    """Makes a task's requests. InputError where it runs the code that models write."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{name} runs code that models write, which is not safe. Leave it out.", option="--tasks")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    try:
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    except Exception as error:
        raise InputError(f"{name} has questions that cannot be asked: {reason_of(error)}.", option="--tasks") from error


def _scored_metrics(name: str, task: Any) -> dict[str, str]:
    """Which of a task's own metrics is which of ours. InputError where it has none of them."""
    theirs = list(task.aggregation())
    found = {
        metric.name: next(one for one in metric.settings["harness"] if one in theirs)
        for metric in of_kind("task")
        if any(one in theirs for one in metric.settings["harness"])
    }
    if not found:
        known = [one for metric in of_kind("task") for one in metric.settings["harness"]]
        raise InputError(
            f"{name} is scored by {listed(theirs)}, and not question by question by {listed(known)}. Leave it out.",
            option="--tasks",
        )
    return found


def _harness() -> Any:
    return _harness_part("lm_eval")


def _harness_part(module: str) -> Any:
    """A module of the harness, imported when it is first needed: that takes seconds."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness, or a package that it needs, is not installed ({error}). Install it: {INSTALL}",
            option="--tasks",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's progress bars, and with none of its messages but errors: a run has its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _encoded(tokenizer: Any, bos: int | None, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what comes after it, split as the harness splits them.

    Spaces at a context's end belong to what follows, and both are tokenized together: they may share no token.
    """
    text = context.rstrip()
    before = _ids(tokenizer, bos, text) if text else [_first_of(tokenizer, bos)]
    whole = _ids(tokenizer, bos, context + continuation) if text else [*before, *_ids(tokenizer, None, continuation)]
    return before, whole[len(before) :]


def _ids(tokenizer: Any, bos: int | None, text: str) -> list[int]:
    """Token ids of a text that begins as the run's texts do."""
    found = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found if bos is None or found[:1] == [bos] else [bos, *found]


def _first_of(tokenizer: Any, bos: int | None) -> int:
    """What stands for an empty context."""
    named = bos if bos is not None else tokenizer.bos_token_id
    return int(named if named is not None else tokenizer.eos_token_id)


@cache
def _language_model() -> type:
    """The harness's wrapper of a model, with our own reading of texts and of contexts."""
    base: Any = _harness_part("lm_eval.models.huggingface").HFLM

    class LanguageModel(base):  # type: ignore[misc]
        def __init__(self, model: PreTrainedModel, tokenizer: Any, *, bos: int | None, batch_size: int) -> None:
            self._bos = bos
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                add_bos_token=bos is not None,
            )

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
        ) -> list[int]:
            found = _ids(self.tokenizer, None if add_special_tokens is False else self._bos, string)
            return found[-left_truncate_len:] if left_truncate_len else found

        def tok_batch_encode(
            self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[Tensor, Tensor]:
            rows = [self.tok_encode(one, left_truncate_len=left_truncate_len) for one in strings]
            padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            # What is too long for the model loses its beginning, as in the harness.
            room = self.max_length + 1
            pairs = [(context[-(room - len(after)) :], after) for _, context, after in requests]
            found = continuation_likelihoods(self.model, pairs, batch_size=self.batch_size)
            return [(one.log_likelihood, one.greedy) for one in found]

    return LanguageModel
