"""What a run would measure and what it could find out, said before anything is measured.

Reads config, tokenizer and texts, never weights. How long a run takes is reckoned in ``forecast``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from pruning_comparison.analysis import (
    PLANNING,
    QUALITY_LEVEL,
    QUESTIONS,
    Components,
    Margins,
    asked_of_a_method,
    detectable_by_rules,
    draw_fits,
    first_levels,
    level_of,
)
from pruning_comparison.formatting import counted, listed, per_cent, plain_number
from pruning_comparison.measure import load_tasks
from pruning_comparison.metrics import METRICS
from pruning_comparison.models import HeadGrid
from pruning_comparison.plan.forecast import available_bytes, expected, format_forecast, measure_speeds
from pruning_comparison.plan.memory import ModelSizes
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.run import Inputs, heads_leaving_together, known_to_be_missing, rectangle_of
from pruning_comparison.spec import ComparisonSpec

__all__ = ["ASSUMED", "format_plan", "plan_cost", "plan_run"]

POWER = 0.8

ASSUMED: Mapping[str, Components] = {
    "E1": Components(0.0, 0.0, 0.0015),
    "E2": Components(0.0001, 0.0045, 0.0003),
    "E3": Components(0.0, 0.0, 0.003),
    "E4": Components(0.0, 0.0, 0.004),
    "P2": Components(0.0001, 0.2, 0.08),
}
"""Variances of a pair's difference that a plan reckons with, on each expectation's scale (logarithms; for E3, distances; for
P2, scores from 0 to 1).

That of P2 has the sum that was measured on SmolLM2 at 70 % of the heads, 0.22 to 0.28 for agency and three baselines
(``benchmarks/tasks.py``, one sample, 300 questions); how it splits is a guess. The others are those of the bundled model on
2 cores, rounded up: method entropy, three iterations, 16 documents of 256 tokens, 5 prompts of 32 new tokens. Another
model, text, method or machine has others, which is why a plan says "about".
"""


def plan_run(spec: ComparisonSpec, margins: Margins, inputs: Inputs) -> dict[str, Any]:
    """What a run of ``spec``, whose ``inputs`` are prepared, would measure and find, as plain values."""
    grid = inputs.preview.grid
    documents = len({window.document for window in inputs.windows})
    prompts = len(inputs.prompts)
    timed = -(-prompts // spec.batch_size)
    window = inputs.calibration.shape[1]
    calibration = -(-spec.calibration_tokens // window)
    return {
        "model": inputs.preview.describe()["name"],
        "layers": grid.n_layers,
        "heads_per_layer": grid.n_heads,
        "heads": grid.total,
        "methods": list(spec.pruning_methods),
        "variants": list(spec.variants),
        "temperatures": list(spec.temperatures),
        "iterations": spec.iterations,
        "levels": [_level(spec, level, grid) for level in spec.pruning_levels],
        "trajectories": len(list(spec.trajectories())),
        "cells": len(list(spec.cells())),
        "evaluation": {
            "documents": documents,
            "windows": len(inputs.windows),
            "tokens": sum(window.targets for window in inputs.windows),
        },
        "calibration": {"windows_per_iteration": calibration, "tokens_per_iteration": calibration * window},
        "prompts": prompts,
        "timed_batches": timed,
        "pairs": {
            "iterations_x_documents": spec.iterations * documents,
            "iterations_x_prompts": spec.iterations * prompts,
            "iterations_x_timed_batches": spec.iterations * timed,
        },
        "power": POWER,
        "margins": asdict(margins),
        "expectations": _expectations(spec, margins, documents, prompts, timed),
        **({"tasks": _tasks(spec, margins)} if spec.tasks else {}),
        "notes": _notes(spec, inputs),
    }


def plan_cost(spec: ComparisonSpec, inputs: Inputs) -> dict[str, Any]:
    """Expected time by phase, memory and disk. Times a random model of the same shape, unless memory is short for it, or the
    GPU that is planned for is not here."""
    sizes = ModelSizes.of(inputs.preview)
    room = available_bytes()
    reason = None
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        reason = "this machine has no such GPU to time it on"
    elif room is not None and 8 * sizes.parameters >= room:
        reason = "a model of this size does not fit into this machine's free memory"
    cost = expected(spec, inputs, None if reason else measure_speeds(spec, inputs), sizes)
    return {**cost, "reason": reason} if reason else cost


def _level(spec: ComparisonSpec, level: float, grid: HeadGrid) -> dict[str, Any]:
    together, rectangle = heads_leaving_together(grid, spec.prune_unit), rectangle_of(grid, spec.prune_unit)
    gone = expected_heads_pruned(level, grid.n_layers, grid.n_heads, spec.scope, together, rectangle)
    return {"level": level, "heads_pruned": gone, "achieved_level": 100 * gone / grid.total}


def _expectations(
    spec: ComparisonSpec, margins: Margins, documents: int, prompts: int, timed: int
) -> list[dict[str, Any]]:
    """Per expectation: pairs, the level at which it is tested, and what is found with the power wanted by these rules.

    ``claim_level`` is the one before any other answer is decided, which is the hardest: all methods share the error rate,
    and within a method its answers do. ``detectable``: the true gain that is *supported* with the power wanted; None if
    none is. ``no_difference``: how often no true difference is found to be *no meaningful difference*.
    """
    if not {"agency", "baseline"} <= set(spec.variants):
        return []
    measured = [name for name, metric in METRICS.items() if not metric.on_request or getattr(spec, metric.on_request)]
    asked = asked_of_a_method(len(spec.temperatures), measured)
    whole = level_of("answers", tasks=bool(spec.tasks)) / len(spec.pruning_methods)
    levels_of = dict(zip(asked, first_levels(asked, whole), strict=True))
    high = [level for level in spec.pruning_levels if level >= QUALITY_LEVEL]
    pruned = [level for level in spec.pruning_levels if level > 0]
    batch = "timed batch of prompts" if spec.batch_size > 1 else "prompt"
    found = []
    for name, metric, cluster, clusters, levels, margin, sign in (
        ("E1", "tokens_per_second", batch, timed, pruned, margins.speed, 1),
        ("E2", "perplexity", "document", documents, high, margins.quality, -1),
        ("E3", "distinct_2_distance", "prompt", prompts, high, margins.diversity, -1),
        ("E4", "first_token_latency_s", batch, timed, pruned, margins.latency, -1),
    ):
        claim_level = levels_of[name, metric]
        ratio = name != "E3"
        # The ends of the margin on the fit's scale: that a gain has to be beyond, and the other.
        gain, loss = (
            (math.log1p(sign * margin), math.log1p(-sign * margin)) if ratio else (sign * margin, -sign * margin)
        )
        distance, no_difference = math.inf, 0.0
        if levels and spec.iterations * clusters > 1:
            draws = draw_fits(assumed_components(name, spec), spec.iterations, clusters)
            distance = detectable_by_rules(draws, claim_level, POWER)
            short = replace(draws, means=-draws.means).p_values(abs(gain)) <= claim_level
            no_difference = float((short & (draws.p_values(abs(loss)) <= claim_level)).mean())
        effect = gain + sign * distance
        found.append(
            {
                "id": name,
                "title": QUESTIONS[name].title,
                "levels": levels,
                "cluster": cluster,
                "iterations": spec.iterations,
                "clusters": clusters,
                "pairs": spec.iterations * clusters if levels else 0,
                "claim_level": claim_level,
                "detectable": None if math.isinf(effect) else math.expm1(effect) if ratio else effect,
                "no_difference": no_difference,
                "scale": "relative" if ratio else "absolute",
            }
        )
    return found


def _tasks(spec: ComparisonSpec, margins: Margins) -> dict[str, Any]:
    """Questions, and what can be found of the accuracy that the highest level loses (P2), before another one is decided.

    ``detectable``: the true loss, as a share of 1, that is found to be more than the margin with the power wanted; None if
    none is. ``no_difference``: how often no loss at all is found to be less than the margin.
    """
    questions = load_tasks(spec.tasks, spec.task_limit).questions
    count = sum(questions.values())
    claim_level = level_of("accuracy", tasks=True) / (len(spec.variants) * len(spec.pruning_methods))
    draws = draw_fits(ASSUMED["P2"], spec.iterations, count)
    distance = detectable_by_rules(draws, claim_level, POWER)
    within = [replace(draws, means=sign * draws.means).p_values(margins.accuracy) <= claim_level for sign in (1, -1)]
    return {
        "questions": questions,
        "pairs": spec.iterations * count,
        "claim_level": claim_level,
        "detectable": None if math.isinf(distance) else margins.accuracy + distance,
        "no_difference": float((within[0] & within[1]).mean()),
    }


def assumed_components(name: str, spec: ComparisonSpec) -> Components:
    """What pairs of an expectation are taken to vary by; quality varies far more between iterations where chance ranks."""
    usual = ASSUMED[name]
    if name != "E2" or "random" not in spec.pruning_methods:
        return usual
    return replace(usual, iterations=max(usual.iterations, PLANNING["random heads, small effect"].iterations))


def _notes(spec: ComparisonSpec, inputs: Inputs) -> list[str]:
    notes = []
    if not {"agency", "baseline"} <= set(spec.variants):
        notes.append("agency and baseline are not both in --variants, so no expectation can be answered.")
    if not any(level >= QUALITY_LEVEL for level in spec.pruning_levels):
        notes.append(
            f"no level is {QUALITY_LEVEL:g} % or more, so the expectations about quality and diversity cannot be answered."
        )
    if spec.until_decided:
        looks = [str(look) for look in spec.looks]
        notes.append(
            f"the run ends after {', '.join(looks[:-1])} or {looks[-1]} iterations, as soon as its primary answers are "
            f"decided; what stands here is for {looks[-1]}."
        )
    if spec.iterations == 1:
        notes.append("with one iteration nothing is known about how much a repetition would differ.")
    if len(spec.temperatures) == 1:
        notes.append("with one temperature the question about temperature cannot be answered.")
    if 0 in spec.temperatures:
        notes.append("at temperature 0 nothing is drawn: iterations whose models are the same count once.")
    for method in spec.own_methods:
        notes.append(
            f"what {method.name} costs is not known: {method.passes:g} passes over the calibration text are assumed."
        )
    if inputs.preview.stand_in:
        notes.append(
            f"there is no tokenizer in {inputs.preview.name}: windows and prompts are counted in tokens of the bundled "
            "model's, of which a text has more than of a large vocabulary's."
        )
    notes += [f"{sentence.rstrip('.')}." for sentence in known_to_be_missing(spec, inputs)]
    if len(inputs.prompts) < spec.max_prompts:
        notes.append(f"there are only {len(inputs.prompts)} prompts; --max_prompts asks for {spec.max_prompts}.")
    return notes


# In words


def format_plan(plan: Mapping[str, Any]) -> str:
    """The plan as text for a terminal."""
    evaluation, calibration = plan["evaluation"], plan["calibration"]
    iterations = plan["iterations"]
    lines = [
        f"{plan['model']}: {plan['layers']} layers of {plan['heads_per_layer']} heads, {plan['heads']} heads in all",
        "",
        *(f"{'' if number else 'levels':13}{_format_level(level)}" for number, level in enumerate(plan["levels"])),
        f"measures     {counted(plan['trajectories'], 'trajectory', 'trajectories')}, {counted(plan['cells'], 'cell')}: "
        f"{listed(plan['variants'])}; {listed(plan['methods'])}; {counted(iterations, 'iteration')}; "
        f"temperatures {listed([f'{temperature:g}' for temperature in plan['temperatures']])}",
        f"evaluation   {evaluation['tokens']:,} tokens in {counted(evaluation['windows'], 'window')} of "
        f"{counted(evaluation['documents'], 'document')}",
        f"calibration  {calibration['tokens_per_iteration']:,} tokens per iteration",
        f"pairs        {_times(iterations, evaluation['documents'], 'document')}",
        f"             {_times(iterations, plan['prompts'], 'prompt')}",
        f"             {_times(iterations, plan['timed_batches'], 'timed batch', 'timed batches')}",
        *(format_forecast(plan["expected"]) if "expected" in plan else []),
    ]
    if "tasks" in plan:
        lines += ["", *_format_tasks(plan)]
    if plan["expectations"]:
        lines += [
            "",
            f"What can be found with power {plan['power']:g}, if pairs vary about as much as on the bundled model:",
            "",
            *_aligned([_HEADING, *(_format_expectation(row) for row in plan["expectations"])]),
            "",
            "Before other answers of a method are decided; each of them leaves more of the error rate to the rest.",
        ]
    if plan["notes"]:
        lines += ["", *(f"note: {note}" for note in plan["notes"])]
    return "\n".join(lines)


def _format_tasks(plan: Mapping[str, Any]) -> list[str]:
    tasks, margin = plan["tasks"], 100 * plan["margins"]["accuracy"]
    asked = listed([f"{name} ({counted(number, 'question')})" for name, number in tasks["questions"].items()])
    found = "no loss is large enough to be found"
    if tasks["detectable"] is not None and tasks["detectable"] < 1:
        found = (
            f"a loss of accuracy of about {100 * tasks['detectable']:.2g} points is found to be more than {margin:g}, with "
            f"power {plan['power']:g}"
        )
    return [
        f"tasks        {asked}",
        f"             at the highest level {found},",
        f"             and none to be less than that in {100 * tasks['no_difference']:.0f} % of runs",
    ]


_HEADING = ("expectation", "at levels", "pairs", "supported if agency is really better by", "no difference is found in")


def _format_expectation(row: Mapping[str, Any]) -> tuple[str, ...]:
    levels = [f"{level:g}" for level in row["levels"]]
    if row["detectable"] is None:
        effect = "nothing: no effect is large enough" if levels else "nothing: not measured"
    else:
        relative = row["scale"] == "relative"
        size = abs(row["detectable"]) * (100 if relative else 1)
        effect = f"about {plain_number(float(f'{size:.2g}'))}{' %' if relative else ''}"
    none = f"{100 * row['no_difference']:.0f} % of runs" if levels else "none"
    return (f"{row['id']} {row['title'].lower()}", ", ".join(levels) or "none", str(row["pairs"]), effect, none)


def _format_level(level: Mapping[str, Any]) -> str:
    asked, reached = level["level"], level["achieved_level"]
    off = "" if abs(asked - reached) < 1e-9 else f", which is {reached:.4g} %"
    return f"{per_cent(asked)}: {counted(level['heads_pruned'], 'head')}{off}"


def _times(iterations: int, clusters: int, word: str, plural: str = "") -> str:
    return f"{counted(iterations, 'iteration')} x {counted(clusters, word, plural)} = {iterations * clusters}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
