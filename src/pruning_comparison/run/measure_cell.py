"""What is measured of a pruned model: perplexity, texts, sizes, costs, and, in turns with others, time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import FIRST_TOKENS, Timing, common_uniforms, generate, time_generation
from pruning_comparison.measure.memory import cache_bytes_after, decode_bytes, parameter_bytes
from pruning_comparison.measure.perplexity import WindowLoss, measure_perplexity, window_losses
from pruning_comparison.measure.tasks import load_tasks
from pruning_comparison.measure.text_quality import (
    WrittenText,
    cut_at_end_of_text,
    generation_losses,
    text_functions,
)
from pruning_comparison.measure.wikitext import page_nats
from pruning_comparison.metrics import METRICS, of_kind, unit_of
from pruning_comparison.models.decoding import decode_step, decode_steps
from pruning_comparison.run.engine_timings import time_engines
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.records import CellResult, EngineTiming, GeneratedText, Measurement, TimingEffort
from pruning_comparison.variants import DENSE, variant_named

TEXT_BATCHES = 4
"""Texts are written in batches of so many times ``quality_batch_size``: a step of decoding has one token per row, a
perplexity window has hundreds, so many more rows take hardly longer."""

FIRST_TOKENS_ALONE = 20
"""So many first tokens of every model are timed in a round that times nothing else."""


def measure_quality(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """One cell's quality: perplexity, generated texts, memory, and what adaptation cost."""
    if pruned.scores is None:
        raise ValueError("a model that was made again from known heads has been measured before")
    with workspace.clock.phase("perplexity"):
        perplexity = perplexity_measurements(workspace, pruned)
        perplexity += _held_out_measurements(workspace, cell, pruned)
    if pruned.predicted_nats is not None:
        perplexity.append(_measurement("predicted_perplexity_ratio", math.exp(pruned.predicted_nats)))
    rest = measure_texts_and_size(workspace, cell, pruned)
    gone, total = int((~pruned.keep).sum()), workspace.grid.total
    scores = pruned.scores.scores
    return replace(
        rest,
        rest=False,
        achieved_level=100 * gone / total,
        heads_pruned=gone,
        heads_total=total,
        fingerprint=pruned.fingerprint,
        details={**pruned.scores.details, **_details_of_recovery(pruned)},
        measurements=[*perplexity, *rest.measurements],
        heads=[
            (layer, head, float(scores[layer, head]), bool(pruned.keep[layer, head]))
            for layer in range(workspace.grid.n_layers)
            for head in range(workspace.grid.n_heads)
        ],
        round_records=pruned.round_records,
    )


def _held_out_measurements(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> list[Measurement]:
    """A baseline's perplexity on held-out calibration text, by which the strongest of several is chosen."""
    if not variant_named(cell.variant).is_baseline or bool(pruned.keep.all()):
        return []
    windows = workspace.held_out(cell.iteration)
    value, reason = None, "all calibration text has been read: none is held out"
    if len(windows):
        nats, tokens = window_losses(pruned.model, list(windows), batch_size=workspace.spec.quality_batch_size)
        loss = float(nats.sum() / tokens.sum())
        value = math.exp(loss) if loss < 700 else None  # not so where it is no number
        reason = "the model's loss is not a finite number"
    return [_measurement("held_out_perplexity", value, reason)]


def _details_of_recovery(pruned: PrunedModel) -> dict[str, Any]:
    return {} if pruned.recovery is None else {"recovery": pruned.recovery.as_dict()}


def measure_texts_and_size(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """What depends on prompts, temperatures, lengths of texts and tasks, beside what each making of a model tells anew."""
    with workspace.clock.phase("texts"):
        text_measurements, texts = _text_measurements(workspace, pruned, cell.iteration)
    tasks = task_measurements(workspace, pruned)
    prompts = workspace.inputs.prompt_ids
    size = [
        _measurement("parameter_bytes", parameter_bytes(pruned.model)),
        _measurement("decode_bytes", decode_bytes(pruned.model)),
        _measurement("thousand_token_cache_bytes", cache_bytes_after(pruned.model)),
        _measurement("prefill_flops", mean(prefill_flops(pruned.model, len(p)) for p in prompts)),
    ]
    rows = [*text_measurements, *tasks, *size, *_cost_measurements(pruned)]
    return CellResult(cell=cell, status="done", rest=True, measurements=rows, texts=texts)


@dataclass(frozen=True)
class LevelTimings:
    """Timings of one level: (variant, measurement) pairs, and what taking them took; see ``time_level``.

    ``engines`` are (variant, timing) pairs of ``time_engines``.
    """

    rows: Sequence[tuple[str, Measurement]]
    effort: TimingEffort | None = None
    engines: Sequence[tuple[str, EngineTiming]] = ()


def time_level(workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int) -> LevelTimings:
    """Times all variants of one level, and with them the dense model, on every batch of prompts, in turns.

    The dense model's rows have the variant ``DENSE``, so that what pruning brings is paired as closely as one variant with
    another. Variants whose model is the dense one, as all are at level 0, are not timed twice: they get its rows.

    Every batch is timed equally often: until there are ``timing_pairs`` of each two models, at least twice, and on until the
    95 % interval of every ratio, of speed and of first-token latency, is narrower than +- ``timing_precision_percent``, or
    another round would pass ``timing_limit_s``. Where only first tokens are too uncertain, only they are timed again.

    Then come the spec's other engines, if it has any (``time_engines``).
    """
    spec = workspace.spec
    distinct = {name: model for name, model in models.items() if model is not workspace.dense}
    timed = {**distinct, DENSE: workspace.dense}
    turns = _Turns(workspace, timed, iteration)
    for _ in range(timing_rounds(spec, turns.batches)):
        turns.take()
    precision = spec.timing_precision_percent / 100
    ended = "precise" if distinct else "all alike"
    while distinct and (uncertain := turns.uncertain(precision)):
        only_first = uncertain == {"first_token_latency_s"}
        if turns.seconds + turns.cost_s(only_first) > spec.timing_limit_s:
            ended = "time limit"
            break
        turns.take(only_first=only_first)
    names = {name: [name] for name in distinct}
    names[DENSE] = [name for name, model in models.items() if model is workspace.dense]
    if distinct:
        names[DENSE] = list(dict.fromkeys([*names[DENSE], DENSE]))
    rows = [
        (name, measurement)
        for first, timing, only_first in turns.taken
        for name in names[timing.variant]
        for measurement in _timing_measurements(timing, first, spec.memory_logging, only_first)
    ]
    names[DENSE] = list(dict.fromkeys([*names[DENSE], DENSE]))
    engines = [
        (name, timing)
        for variant, timing in time_engines(workspace, timed, turns.steps, iteration)
        for name in names[variant]
    ]
    return LevelTimings(rows, turns.effort(ended), engines)


def timing_rounds(spec: ComparisonSpec, batches: int) -> int:
    """How often so many batches of prompts are timed at least."""
    return max(2, -(-spec.timing_pairs // batches))


class _Turns:
    """Rounds in which ``models``, the dense one last, are timed on all batches of prompts. ``seconds`` they took so far."""

    def __init__(self, workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int) -> None:
        self._workspace, self._models, self._iteration = workspace, models, iteration
        self.steps = decode_steps(models)
        self._peaks: dict[tuple[str, int], Timing] = {}
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self.batches = -(-len(workspace.inputs.prompt_ids) // workspace.spec.batch_size)
        self.taken: list[tuple[int, Timing, bool]] = []

    @property
    def seconds(self) -> float:
        return sum(map(sum, self._seconds.values()))

    def cost_s(self, only_first: bool) -> float:
        """Seconds that another round of this kind is expected to take."""
        known = self._seconds[only_first] or self._seconds[False]
        return sum(known) / len(known)

    def take(self, *, only_first: bool = False) -> None:
        """One more round: a whole generation of every model on every batch, or first tokens alone."""
        started = time.perf_counter()
        spec, prompts = self._workspace.spec, self._workspace.inputs.prompt_ids
        repeat = sum(map(len, self._seconds.values()))
        for number, first in enumerate(range(0, len(prompts), spec.batch_size)):
            batch = prompts[first : first + spec.batch_size]
            count = 1 if only_first else spec.num_tokens
            draws = [common_uniforms(spec.seed, self._iteration, first + row, count) for row in range(len(batch))]
            for timing in time_generation(
                self._models,
                batch,
                count,
                temperature=spec.temperatures[0],
                uniforms=torch.stack(draws),
                measure_peak=spec.memory_logging and repeat == 0,
                steps=self.steps,
                repeats=(repeat * self.batches + number,),  # who begins changes from batch to batch
                first_tokens=FIRST_TOKENS_ALONE if only_first else FIRST_TOKENS,
            ):
                peak = self._peaks.setdefault((timing.variant, first), timing)
                measured = {name: getattr(peak, name) for name in ("peak_memory_bytes", "peak_memory_reason")}
                self.taken.append((first, replace(timing, repeat=repeat, **measured), only_first))
        self._seconds[only_first].append(time.perf_counter() - started)

    def half_widths(self) -> dict[str, float]:
        """The widest 95 % interval of a ratio of two models, half of it, by metric."""
        whole = [timing for _, timing, only_first in self.taken if not only_first]
        return {
            "end_to_end_s": widest_half_width(whole, "end_to_end_s"),
            "first_token_latency_s": widest_half_width(
                [timing for _, timing, _ in self.taken], "first_token_latency_s"
            ),
        }

    def uncertain(self, precision: float) -> set[str]:
        """Metrics of which a ratio is not known as precisely."""
        return {metric for metric, half in self.half_widths().items() if half > precision}

    def effort(self, ended: str) -> TimingEffort:
        """What it took."""
        halves: Mapping[str, float | None] = self.half_widths() if len(self._models) > 1 else {}
        rounds = {kind: len(seconds) for kind, seconds in self._seconds.items()}
        return TimingEffort(
            pairs=rounds[False] * self.batches,
            first_token_pairs=sum(rounds.values()) * self.batches,
            seconds=self.seconds,
            speed_half_width=halves.get("end_to_end_s"),
            latency_half_width=halves.get("first_token_latency_s"),
            ended=ended,
        )


def widest_half_width(timings: Sequence[Timing], metric: str) -> float:
    """The widest 95 % interval of a ratio of two timed models, half of it, as a share: 0.01 is +-1 %.

    Every model is held against the first and the last on the same prompts and repeat; an interval is that of the mean
    logarithm over such pairs (t distribution).
    """
    logs: dict[str, list[float]] = {}
    for timing in timings:
        logs.setdefault(timing.variant, []).append(math.log(getattr(timing, metric)))
    names = list(logs)
    widest = 0.0
    for reference in dict.fromkeys((names[0], names[-1])):
        for name in names:
            if name != reference:
                differences = np.subtract(logs[name], logs[reference])
                n = len(differences)
                half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
                widest = max(widest, math.expm1(half))
    return widest


def _timing_measurements(timing: Timing, first: int, memory: bool, only_first: bool) -> list[Measurement]:
    """What one timed generation tells, at the first prompt of its batch; first tokens alone tell their latency."""
    reasons = {
        "time_per_output_token_s": "one new token has no time between tokens",
        "peak_memory_bytes": timing.peak_memory_reason or "",
    }
    place = {"prompt": first, "repeat": timing.repeat}
    return [
        _measurement(name, getattr(timing, name), reasons.get(name), **place)
        for name in (["first_token_latency_s"] if only_first else _timed_metrics(on_request=memory))
    ]


def untimed(variants: Iterable[str], reason: str) -> list[tuple[str, Measurement]]:
    """Missing timings of one level, with the reason."""
    return [(variant, _measurement(name, None, reason)) for variant in variants for name in _timed_metrics()]


def _timed_metrics(*, on_request: bool = False) -> list[str]:
    """What every timed generation tells, and with ``on_request`` what an option asked for as well."""
    return [metric.name for metric in of_kind("timing", "memory") if on_request or not metric.on_request]


def perplexity_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
    """Losses of every evaluation window, and its divergence from the dense model, in one pass; once for each model.

    And of whole pages, where they are asked for.
    """
    if pruned.fingerprint not in workspace._losses:
        workspace._losses[pruned.fingerprint] = measure_perplexity(
            pruned.model,
            workspace.inputs.windows,
            batch_size=workspace.spec.quality_batch_size,
            dense=workspace.dense_predictions,
        )
    return [*window_measurements(workspace._losses[pruned.fingerprint]), *_page_measurements(workspace, pruned)]


def _page_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
    """Loss and words of every page; once for each model."""
    pages = workspace.inputs.pages
    if pages and pruned.fingerprint not in workspace._page_nats:
        workspace._page_nats[pruned.fingerprint] = page_nats(
            pruned.model, pages, batch_size=workspace.spec.quality_batch_size
        )
    rows = []
    for page, nats in zip(pages, workspace._page_nats.get(pruned.fingerprint, ()), strict=True):
        rows.append(_measurement("page_nats", nats, "the model's loss is not a finite number", document=page.document))
        rows.append(_measurement("page_words", page.words, document=page.document))
    return rows


def window_measurements(losses: Iterable[WindowLoss]) -> list[Measurement]:
    """The sums of every window, from which the report makes perplexity, bits per byte, word perplexity and divergence."""
    rows = []
    for loss in losses:
        place: dict[str, Any] = {"document": loss.document, "window": loss.index}
        rows.append(_measurement("window_nats", loss.nats, "the model's loss is not a finite number", **place))
        rows.append(_measurement("window_tokens", loss.tokens, **place))
        rows.append(_measurement("window_bytes", loss.text_bytes, **place))
        rows.append(_measurement("window_words", loss.text_words, **place))
        if loss.kl_nats is not None:
            reason = "a prediction of the model, or of the dense one, is not a finite number"
            rows.append(_measurement("window_kl_nats", loss.kl_nats, reason, **place))
    return rows


def _text_measurements(
    workspace: Workspace, pruned: PrunedModel, iteration: int
) -> tuple[list[Measurement], list[GeneratedText]]:
    """Generates at every temperature and prompt, in large batches, and measures what was written."""
    key = (pruned.fingerprint, iteration)
    if key not in workspace._texts:
        workspace._texts[key] = _write_and_measure(workspace, pruned.model, iteration)
    return workspace._texts[key]


def _write_and_measure(
    workspace: Workspace, model: PreTrainedModel, iteration: int
) -> tuple[list[Measurement], list[GeneratedText]]:
    spec, inputs = workspace.spec, workspace.inputs
    tokenizer = inputs.preview.tokenizer
    jobs = [(temperature, prompt) for temperature in spec.temperatures for prompt in range(len(inputs.prompts))]
    tokens: list[list[int]] = []
    finite: list[bool] = []
    rows = TEXT_BATCHES * spec.quality_batch_size
    step = decode_step(model)
    for first in range(0, len(jobs), rows):
        batch = jobs[first : first + rows]
        draws = [common_uniforms(spec.seed, iteration, prompt, spec.num_tokens) for _, prompt in batch]
        run = generate(
            model,
            [inputs.prompt_ids[prompt] for _, prompt in batch],
            spec.num_tokens,
            temperatures=[temperature for temperature, _ in batch],
            uniforms=torch.stack(draws),
            check_finite=True,
            step=step,
        )
        tokens.extend(run.tokens.tolist())
        finite.extend(cast(Tensor, run.finite).tolist())
    end_of_text = inputs.preview.end_of_text()
    # What is drawn from logits that are no numbers is no text, and any figure of it would be one of nothing.
    written = [cut_at_end_of_text(row, end_of_text) if fine else [] for row, fine in zip(tokens, finite, strict=True)]
    losses = generation_losses(
        workspace.dense,
        [torch.tensor(inputs.prompt_ids[prompt]) for _, prompt in jobs],
        [torch.tensor(row, dtype=torch.long) for row in written],
        batch_size=spec.quality_batch_size,
    )
    functions = text_functions()
    measurements: list[Measurement] = []
    texts: list[GeneratedText] = []
    for (temperature, prompt), row, fine, (nats, _) in zip(jobs, written, finite, losses, strict=True):
        text = tokenizer.decode(row)
        texts.append(GeneratedText(temperature, prompt, inputs.prompts[prompt], text))
        whole = WrittenText(row, text, inputs.preview.config.vocab_size, nats)
        reason = f"the text has only {len(row)} tokens before its end" if fine else "the model's logits are not finite"
        if not math.isfinite(nats):
            reason = "the unpruned model's loss is not a finite number"
        measurements.extend(
            _measurement(name, function(whole), reason, temperature=temperature, prompt=prompt)
            for name, function in functions.items()
        )
    return measurements, texts


def task_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
    """How well each question of the spec's tasks was answered; once for each model.

    The ``document`` of a question is its task, and its ``prompt`` the number of the question there.
    """
    spec, inputs = workspace.spec, workspace.inputs
    if not spec.tasks:
        return []
    if pruned.fingerprint not in workspace._answers:
        tasks = load_tasks(spec.tasks, spec.task_limit)
        with workspace.clock.phase("tasks"):
            answers = tasks.answers(
                pruned.model, inputs.preview.tokenizer, bos=inputs.bos, batch_size=spec.quality_batch_size
            )
        workspace._answers[pruned.fingerprint] = [
            _measurement(metric, answer.scores.get(metric), answer.reason, document=answer.task, prompt=answer.question)
            for answer in answers
            for metric in tasks.metrics[answer.task]
        ]
    return workspace._answers[pruned.fingerprint]


def _cost_measurements(pruned: PrunedModel) -> list[Measurement]:
    """What making the model has cost; a cost that it did not have is left out."""
    costs: dict[str, float | None] = {"negotiation_s": pruned.negotiation_s}
    if pruned.recovery is not None:
        costs |= {
            "recovery_s": pruned.recovery.seconds,
            "recovery_tokens": pruned.recovery.tokens,
            "recovery_learning_rate": pruned.recovery.learning_rate,
        }
    if pruned.cost is not None:
        costs |= {
            "adaptation_s": pruned.cost.seconds,
            "adaptation_tokens": pruned.cost.tokens,
            "adaptation_scratch_bytes": pruned.cost.scratch_bytes or None,
            "adaptation_peak_memory_bytes": pruned.cost.peak_memory_bytes,
        }
    return [_measurement(name, value) for name, value in costs.items() if value is not None]


def _measurement(quantity: str, value: float | None, reason: str | None = None, **place: Any) -> Measurement:
    """A measurement; ``reason`` is given only where the value is missing or not finite.

    A value that is not possible is missing too, with its bounds as the reason.
    """
    unit = unit_of(quantity)
    if value is None or not math.isfinite(value):
        return Measurement(quantity, None, unit, reason, **place)
    if quantity in METRICS and not METRICS[quantity].possible(value):
        low, high = METRICS[quantity].bounds
        return Measurement(quantity, None, unit, f"{value:g} is not a possible value: {low:g} to {high:g} is", **place)
    return Measurement(quantity, value, unit, None, **place)
