"""What is measured of a pruned model: perplexity, texts, sizes, costs, and, in turns with others, time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import common_uniforms, generate, time_generation
from pruning_comparison.measure.memory import decode_bytes, parameter_bytes
from pruning_comparison.measure.perplexity import WindowLoss, measure_perplexity
from pruning_comparison.measure.text_quality import (
    WrittenText,
    cut_at_end_of_text,
    generation_losses,
    text_functions,
)
from pruning_comparison.metrics import METRICS, of_kind, unit_of
from pruning_comparison.models.decoding import decode_step, decode_steps
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell
from pruning_comparison.store.records import CellResult, GeneratedText, Measurement

TEXT_BATCHES = 4
"""Texts are written in batches of so many times ``quality_batch_size``: a step of decoding has one token per row, a
perplexity window has hundreds, so many more rows take hardly longer."""


def measure_quality(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """One cell's quality: perplexity, generated texts, memory, and what adaptation cost."""
    if pruned.scores is None:
        raise ValueError("a model that was made again from known heads has been measured before")
    perplexity = perplexity_measurements(workspace, pruned)
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
        details=pruned.scores.details,
        measurements=[*perplexity, *rest.measurements],
        heads=[
            (layer, head, float(scores[layer, head]), bool(pruned.keep[layer, head]))
            for layer in range(workspace.grid.n_layers)
            for head in range(workspace.grid.n_heads)
        ],
        round_records=pruned.round_records,
    )


def measure_texts_and_size(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """What depends on prompts, temperatures and lengths of texts, beside what each making of a model tells anew."""
    text_measurements, texts = _text_measurements(workspace, pruned, cell.iteration)
    prompts = workspace.inputs.prompt_ids
    size = [
        _measurement("parameter_bytes", parameter_bytes(pruned.model)),
        _measurement("decode_bytes", decode_bytes(pruned.model)),
        _measurement("prefill_flops", mean(prefill_flops(pruned.model, len(p)) for p in prompts)),
    ]
    rows = [*text_measurements, *size, *_cost_measurements(pruned)]
    return CellResult(cell=cell, status="done", rest=True, measurements=rows, texts=texts)


def time_level(
    workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int
) -> list[tuple[str, Measurement]]:
    """Times all variants of one level on every batch of prompts, in turns: (variant, measurement) pairs."""
    spec, prompts = workspace.spec, workspace.inputs.prompt_ids
    rows: list[tuple[str, Measurement]] = []
    steps = decode_steps(models)
    for first in range(0, len(prompts), spec.batch_size):
        batch = prompts[first : first + spec.batch_size]
        uniforms = torch.stack(
            [common_uniforms(spec.seed, iteration, first + row, spec.num_tokens) for row in range(len(batch))]
        )
        for timing in time_generation(
            models,
            batch,
            spec.num_tokens,
            temperature=spec.temperatures[0],
            uniforms=uniforms,
            measure_peak=spec.memory_logging,
            steps=steps,
        ):
            reasons = {
                "time_per_output_token_s": "one new token has no time between tokens",
                "peak_memory_bytes": timing.peak_memory_reason or "",
            }
            place = {"prompt": first, "repeat": timing.repeat}
            rows.extend(
                (timing.variant, _measurement(name, getattr(timing, name), reasons.get(name), **place))
                for name in _timed_metrics(on_request=spec.memory_logging)
            )
    return rows


def untimed(variants: Iterable[str], reason: str) -> list[tuple[str, Measurement]]:
    """Missing timings of one level, with the reason."""
    return [(variant, _measurement(name, None, reason)) for variant in variants for name in _timed_metrics()]


def _timed_metrics(*, on_request: bool = False) -> list[str]:
    """What every timed generation tells, and with ``on_request`` what an option asked for as well."""
    return [metric.name for metric in of_kind("timing", "memory") if on_request or not metric.on_request]


def perplexity_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
    if pruned.fingerprint not in workspace._losses:
        workspace._losses[pruned.fingerprint] = measure_perplexity(
            pruned.model, workspace.inputs.windows, batch_size=workspace.spec.quality_batch_size
        )
    return window_measurements(workspace._losses[pruned.fingerprint])


def window_measurements(losses: Iterable[WindowLoss]) -> list[Measurement]:
    """The sums of every window, from which the report makes perplexity, bits per byte and word perplexity."""
    rows = []
    for loss in losses:
        place: dict[str, Any] = {"document": loss.document, "window": loss.index}
        rows.append(_measurement("window_nats", loss.nats, "the model's loss is not a finite number", **place))
        rows.append(_measurement("window_tokens", loss.tokens, **place))
        rows.append(_measurement("window_bytes", loss.text_bytes, **place))
        rows.append(_measurement("window_words", loss.text_words, **place))
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


def _cost_measurements(pruned: PrunedModel) -> list[Measurement]:
    """What making the model has cost; a cost that it did not have is left out."""
    costs: dict[str, float | None] = {"negotiation_s": pruned.negotiation_s}
    if pruned.recovery is not None:
        costs |= {"recovery_s": pruned.recovery.seconds, "recovery_tokens": pruned.recovery.tokens}
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
