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
from pruning_comparison.measure.perplexity import measure_perplexity
from pruning_comparison.measure.text_quality import (
    compression_ratio,
    cut_at_end_of_text,
    distinct_n,
    expectation_adjusted_distinct_n,
    generation_losses,
    seq_rep_n,
)
from pruning_comparison.metrics import METRICS
from pruning_comparison.models.decoding import decode_step, decode_steps
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell
from pruning_comparison.store.records import CellResult, GeneratedText, Measurement

TEXT_BATCHES = 4
"""Texts are written in batches of so many times ``quality_batch_size``: a step of decoding has one token per row, a
perplexity window has hundreds, so many more rows take hardly longer."""


TIMED_METRICS = (
    "tokens_per_second", "first_token_latency_s", "time_per_output_token_s", "end_to_end_s", "cache_bytes",
)  # fmt: skip


def measure_quality(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """One cell's quality: perplexity, generated texts, memory, and what adaptation cost."""
    if pruned.scores is None:
        raise ValueError("a model that was made again from known heads has been measured before")
    perplexity = perplexity_measurements(workspace, pruned)
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
        Measurement("parameter_bytes", parameter_bytes(pruned.model), "byte"),
        Measurement("decode_bytes", decode_bytes(pruned.model), "byte"),
        Measurement("prefill_flops", mean(prefill_flops(pruned.model, len(p)) for p in prompts), "FLOP"),
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
            values: dict[str, float | None] = {
                "tokens_per_second": timing.tokens_per_second,
                "first_token_latency_s": timing.first_token_latency_s,
                "time_per_output_token_s": timing.time_per_output_token_s,
                "end_to_end_s": timing.end_to_end_s,
                "cache_bytes": timing.cache_bytes,
            }
            reasons = {"time_per_output_token_s": "one new token has no time between tokens"}
            if spec.memory_logging:
                values["peak_memory_bytes"] = timing.peak_memory_bytes
                reasons["peak_memory_bytes"] = timing.peak_memory_reason or ""
            rows.extend(
                (timing.variant, _measurement(name, value, reasons.get(name), prompt=first, repeat=timing.repeat))
                for name, value in values.items()
            )
    return rows


def untimed(variants: Iterable[str], reason: str) -> list[tuple[str, Measurement]]:
    """Missing timings of one level, with the reason."""
    return [(variant, _measurement(name, None, reason)) for variant in variants for name in TIMED_METRICS]


def perplexity_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
    if pruned.fingerprint not in workspace._losses:
        workspace._losses[pruned.fingerprint] = measure_perplexity(
            pruned.model, workspace.inputs.windows, batch_size=workspace.spec.quality_batch_size
        )
    rows = []
    for loss in workspace._losses[pruned.fingerprint]:
        place: dict[str, Any] = {"document": loss.document, "window": loss.index}
        rows.append(_measurement("window_nats", loss.nats, "the model's loss is not a finite number", **place))
        rows.append(Measurement("window_tokens", loss.tokens, "token", **place))
        rows.append(Measurement("window_bytes", loss.text_bytes, "byte", **place))
        rows.append(Measurement("window_words", loss.text_words, "word", **place))
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
    measurements: list[Measurement] = []
    texts: list[GeneratedText] = []
    for (temperature, prompt), row, fine, (nats, count) in zip(jobs, written, finite, losses, strict=True):
        text = tokenizer.decode(row)
        texts.append(GeneratedText(temperature, prompt, inputs.prompts[prompt], text))
        values = {
            "generation_perplexity": float(torch.tensor(nats / count, dtype=torch.float64).exp()) if count else None,
            "distinct_1": distinct_n(row, 1),
            "distinct_2": distinct_n(row, 2),
            "distinct_3": distinct_n(row, 3),
            "distinct_2_adjusted": expectation_adjusted_distinct_n(row, 2, inputs.preview.config.vocab_size),
            "seq_rep_4": seq_rep_n(row, 4),
            "compression_ratio": compression_ratio(text),
        }
        reason = f"the text has only {len(row)} tokens before its end" if fine else "the model's logits are not finite"
        if not math.isfinite(nats):
            reason = "the unpruned model's loss is not a finite number"
        measurements.extend(
            _measurement(name, value, reason, temperature=temperature, prompt=prompt) for name, value in values.items()
        )
    return measurements, texts


def _cost_measurements(pruned: PrunedModel) -> list[Measurement]:
    rows = []
    if pruned.negotiation_s is not None:
        rows.append(Measurement("negotiation_s", pruned.negotiation_s, "s"))
    if pruned.recovery is not None:
        rows.append(Measurement("recovery_s", pruned.recovery.seconds, "s"))
        rows.append(Measurement("recovery_tokens", pruned.recovery.tokens, "token"))
    cost = pruned.cost
    if cost is None:
        return rows
    rows.append(Measurement("adaptation_s", cost.seconds, "s"))
    rows.append(Measurement("adaptation_tokens", cost.tokens, "token"))
    if cost.scratch_bytes:
        rows.append(Measurement("adaptation_scratch_bytes", cost.scratch_bytes, "byte"))
    if cost.peak_memory_bytes is not None:
        rows.append(Measurement("adaptation_peak_memory_bytes", cost.peak_memory_bytes, "byte"))
    return rows


def _measurement(metric: str, value: float | None, reason: str | None, **place: Any) -> Measurement:
    """A measurement whose reason is given only where the value is missing or not finite."""
    unit = METRICS[metric].unit if metric in METRICS else "nat"
    if value is None or not torch.isfinite(torch.tensor(float(value), dtype=torch.float64)):
        return Measurement(metric, None, unit, reason, **place)
    return Measurement(metric, value, unit, None, **place)
