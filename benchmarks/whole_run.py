"""How long a whole comparison takes, beside two plain scripts on transformers alone that yield the same numbers.

    python benchmarks/whole_run.py --model_name=bundled --small          (a minute or two)
    python benchmarks/whole_run.py --model_name=bundled                  (the default comparison's shape)
    python benchmarks/whole_run.py --model_name=smollm2-135m --medium    (otherwise hours)
    python benchmarks/whole_run.py --rounds=0 --profile                  (where our own time goes)

A is ``plain_straightforward.py``, B is ``plain_competent.py``, C is this package. They run in one process in the order
A B C A B C, with as many timed tokens per level. What can be had without this package is compared: the variants ``baseline``
and ``baseline-progressive``, ranked by entropy, at the default levels, temperatures, iterations and prompts. Before any
ratio is printed, heads, perplexities and texts are checked to agree: heads and perplexities exactly, but for rounding. On
processors with matrix units for bfloat16 our entropies come from rounded products and may rank close heads the other way
round: then at least 95 % of a model's heads must be the same and perplexity within 1 %, and the lines name the cells that
differ. Each comparison that does not agree is printed as such, and ends the script with exit code 1.

With ``--profile`` our comparison runs once more, and seconds of processor time are printed by phase, as its ``run.log`` has
them; "all else" is reading, tokenising and writing.

Prints one JSON line per run, and one with the ratios. ``ratio`` is the time of the plain script over ours, a geometric mean
over the rounds, with the 95 % interval of their logarithms (t distribution). No tool may buy its time with wider intervals:
``width_to_dense_per_cent`` is the half width of the 95 % interval of the time of a pruned level relative to the dense one,
the median over levels and variants; ``width_between_variants_per_cent`` is that of one variant relative to the other at the
same level, the median over pruned levels. Neither tables nor charts are written, by anyone.

Target: on bundled at least 2.8 x faster than straightforward and 2.2 x than competent, on smollm2-135m 2.2 x and 1.4 x.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plain_competent
import plain_straightforward
import torch
from scipy import stats

from pruning_comparison.measure.generation import common_uniforms
from pruning_comparison.methods import METHODS
from pruning_comparison.models import load_model
from pruning_comparison.models.devices import chooses_bfloat16
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.phases import phases_in
from pruning_comparison.run.run_log import RUN_LOG
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import load_run
from pruning_comparison.variants import DENSE

SMALL = {
    "pruning_levels": (0, 50),
    "iterations": 1,
    "max_prompts": 2,
    "num_tokens": 40,
    "eval_tokens": 2048,
    "calibration_tokens": 2048,
}
"""A run of a minute, to see that everything works: its ratios say little."""

MEDIUM = {
    "pruning_levels": (0, 40, 80),
    "iterations": 1,
    "max_prompts": 2,
    "num_tokens": 32,
    "eval_tokens": 2048,
    "calibration_tokens": 4096,
}
"""A quarter of the default comparison's prompts, tokens and texts, in about the default's proportions."""

MOST_UNEQUAL_TEXTS = 0.05
"""As a share of all texts; one is always allowed. Rounding differs between full-size and smaller matrices, and may move a
draw from one token to the next."""


EQUAL_HEADS = 0.95
"""Share of a model's heads that both keep or both remove, at least."""

EQUAL_PERPLEXITY, CLOSE_PERPLEXITY = 1e-3, 1e-2
"""Largest difference of log perplexities, of the same heads and of others."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="bundled")
    parser.add_argument("--rounds", type=int, default=2, help="how often A B C is repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a run of a minute or two that shows that it works")
    parser.add_argument("--medium", action="store_true", help="smaller in all that is measured, for larger models")
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--profile", action="store_true", help="afterwards say what our comparison spends its time on")
    parser.add_argument("--write_case", type=Path, help="write the case as JSON for the plain scripts, and stop")
    options = parser.parse_args(argv)
    settings: dict[str, Any] = {**(SMALL if options.small else MEDIUM if options.medium else {})}
    if options.iterations is not None:
        settings["iterations"] = options.iterations
    spec = ComparisonSpec(
        model_name=options.model_name,
        variants=("baseline", "baseline-progressive"),
        pruning_methods=("entropy",),
        threads=options.threads,
        timing_pairs=1,  # as often as the plain scripts time: twice per prompt
        timing_limit_s=0.0,
        **settings,
    )
    case, preview = case_of(spec)
    if options.write_case:
        options.write_case.write_text(json.dumps(case), "utf-8")
        return 0
    torch.set_num_threads(spec.threads)

    def load() -> Any:
        return load_model(preview).model

    plain = {"straightforward": plain_straightforward.compare, "competent": plain_competent.compare}
    seconds: dict[str, list[float]] = defaultdict(list)
    all_agree, rounded = True, chooses_bfloat16(load())
    for number in range(options.rounds):
        results = {}
        for name in (*plain, "ours"):
            started = time.perf_counter()
            found = ours(spec) if name == "ours" else plain[name](case, load, preview.tokenizer)
            seconds[name].append(time.perf_counter() - started)
            results[name] = found
            timed = defaultdict(int)
            for timing in found["timings"]:
                timed[timing["variant"], timing["iteration"], timing["level"]] += spec.num_tokens
            line = {
                "benchmark": "whole_run",
                "model": spec.model_name,
                "round": number,
                "tool": name,
                "seconds": round(seconds[name][-1], 2),
                "timed_tokens_per_level": sorted(set(timed.values())),
                **timing_widths(found["timings"]),
            }
            print(json.dumps(line), flush=True)
        for name in plain:
            agreement = check_agreement(results[name], results["ours"], rounded=rounded)
            all_agree = all_agree and agreement["agree"]
            print(json.dumps({"benchmark": "whole_run", "round": number, "agrees_with": name, **agreement}), flush=True)
    if options.rounds:
        for name in plain:
            print(
                json.dumps({"benchmark": "whole_run", "model": spec.model_name, "tool": name, **ratio(seconds, name)})
            )
    if options.profile:
        print(json.dumps({"benchmark": "whole_run", "model": spec.model_name, "processor_seconds": profile(spec)}))
    return 0 if all_agree else 1


def case_of(spec: ComparisonSpec) -> tuple[dict[str, Any], Any]:
    """The comparison as plain data, as the plain scripts read it, and the preview to load the model with."""
    inputs = prepare(spec)
    workspace = Workspace(spec, inputs, None, None)  # type: ignore[arg-type]
    iterations = range(spec.iterations)
    case = {
        "model": inputs.preview.source,
        "threads": spec.threads,
        "variants": list(spec.variants),
        "levels": list(spec.pruning_levels),
        "temperatures": list(spec.temperatures),
        "iterations": spec.iterations,
        "num_tokens": spec.num_tokens,
        "quality_batch_size": spec.quality_batch_size,
        "prompts": [list(ids) for ids in inputs.prompt_ids],
        "end_of_text": sorted(inputs.preview.end_of_text()),
        "windows": [(window.ids.tolist(), window.targets) for window in inputs.windows],
        "calibration": [
            workspace.score_windows(iteration, METHODS["entropy"].tokens).tolist() for iteration in iterations
        ],
        "draws": [
            [
                common_uniforms(spec.seed, iteration, prompt, spec.num_tokens).tolist()
                for prompt in range(len(inputs.prompts))
            ]
            for iteration in iterations
        ],
    }
    return case, inputs.preview


def ours(spec: ComparisonSpec) -> dict[str, Any]:
    """The same comparison by this package, its journal read back into the shape of the plain scripts' results."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_comparison(spec, output_dir=Path(folder), raise_failures=True)
        stored = load_run(run)
    done, rows, heads, texts = stored.cells, stored.measurements, stored.heads, stored.texts
    key = ["variant", "iteration", "level"]
    found = []
    for place, of_cell in rows.groupby(key):
        where = dict(zip(key, place, strict=True))
        here = heads[(heads[key] == list(place)).all(axis=1)]
        keep = here.pivot(index="layer", columns="head", values="kept").to_numpy().tolist()
        windows = {metric: float(of_cell.loc[of_cell["metric"] == metric, "value"].sum()) for metric in _SUMS}
        written = texts[(texts[key] == list(place)).all(axis=1)]
        judged = of_cell[of_cell["prompt"].notna() & of_cell["temperature"].notna()]
        wide = judged.pivot(index=["temperature", "prompt"], columns="metric", values="value")
        for temperature, of_heat in written.sort_values("prompt").groupby("temperature"):
            rows_of_heat = [
                {"text": text, **wide.loc[(temperature, prompt)].to_dict()}
                for prompt, text in zip(of_heat["prompt"], of_heat["text"], strict=True)
            ]
            perplexity = math.exp(windows["window_nats"] / windows["window_tokens"])
            found.append(
                {
                    **where,
                    "temperature": temperature,
                    "keep": keep,
                    "perplexity": perplexity,
                    "texts": rows_of_heat,
                }
            )
    assert len(done) * len(spec.temperatures) == len(found)
    timed = rows[rows["metric"].isin(["first_token_latency_s", "end_to_end_s"]) & (rows["variant"] != DENSE)]
    wide = timed.pivot(index=[*key, "prompt", "repeat"], columns="metric", values="value").reset_index()
    return {"cells": found, "timings": wide.to_dict("records")}


def profile(spec: ComparisonSpec) -> dict[str, float]:
    """Seconds of processor time that a comparison takes in all, and by phase."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = run_comparison(spec, output_dir=Path(folder), raise_failures=True)
        phases = phases_in((run / RUN_LOG).read_text("utf-8"))
    everything = time.process_time() - started
    seconds = {**phases, "all else": everything - sum(phases.values()), "all": everything}
    return {phase: round(took, 2) for phase, took in sorted(seconds.items(), key=lambda item: -item[1])}


_SUMS = ("window_nats", "window_tokens")
_COMPARED = ("distinct_1", "distinct_2", "distinct_3", "seq_rep_4", "compression_ratio", "generation_perplexity")


def check_agreement(plain: dict[str, Any], our: dict[str, Any], *, rounded: bool) -> dict[str, Any]:
    """Whether two results agree, as the top of this file has it, and by how much they differ.

    Heads may differ only if our entropies may have been ``rounded``.

    Texts are compared where heads are the same: nearly all must be equal, with all their metrics.
    """

    def by_key(results: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {(c["variant"], c["iteration"], c["level"], c["temperature"]): c for c in results["cells"]}

    one, other = by_key(plain), by_key(our)
    faults = [f"a cell of one alone: {key}" for key in sorted(set(one) ^ set(other), key=str)]
    equal = total = 0
    worst = {True: 0.0, False: 0.0}
    shares: dict[tuple[Any, ...], float] = {}
    for key in sorted(set(one) & set(other), key=str):
        cell, twin = one[key], other[key]
        shares[key] = float((np.asarray(cell["keep"], bool) == np.asarray(twin["keep"], bool)).mean())
        same_heads = shares[key] == 1
        if shares[key] < (EQUAL_HEADS if rounded else 1):
            faults.append(f"only {shares[key]:.1%} of the heads are the same at {key}")
        apart = abs(math.log(cell["perplexity"] / twin["perplexity"]))
        worst[same_heads] = max(worst[same_heads], apart)
        if apart > (EQUAL_PERPLEXITY if same_heads else CLOSE_PERPLEXITY):
            faults.append(f"perplexity at {key}: {cell['perplexity']} and {twin['perplexity']}")
        if not same_heads:
            continue
        for text, same in zip(cell["texts"], twin["texts"], strict=True):
            total += 1
            if text["text"] != same["text"]:
                continue
            equal += 1
            for metric in _COMPARED:
                a, b = text[metric], same[metric]
                missing = a is None and (b is None or math.isnan(b))
                if not (missing or math.isclose(a, b, rel_tol=1e-2)):
                    faults.append(f"{metric} of a text at {key}: {a} and {b}")
    if total - equal > max(1, MOST_UNEQUAL_TEXTS * total):
        faults.append(f"only {equal} of {total} texts are equal")
    timed = [len(results["timings"]) for results in (plain, our)]
    if timed[0] != timed[1]:
        faults.append(f"{timed[0]} generations were timed, and {timed[1]} by us")
    rounded = {str(key): round(share, 4) for key, share in shares.items() if share < 1}
    return {
        "agree": not faults,
        "faults": faults,
        "equal_texts": equal,
        "texts": total,
        "largest_log_perplexity_ratio": worst[True],
        "cells": len(shares),
        "share_of_equal_heads_where_heads_differ": rounded,
        "largest_log_perplexity_ratio_where_heads_differ": worst[False],
    }


def timing_widths(timings: list[dict[str, Any]]) -> dict[str, float]:
    """Half widths, in per cent, of 95 % intervals of mean logarithms of end-to-end times over others; see the top."""
    by_place: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for timing in timings:
        key = (timing["variant"], timing["level"], timing["iteration"], timing["prompt"])
        by_place[key].append(math.log(timing["end_to_end_s"]))
    to_dense: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    to_variant: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    reference = timings[0]["variant"]
    for (variant, level, iteration, prompt), logs in by_place.items():
        if level:
            dense = by_place[variant, 0.0, iteration, prompt]
            to_dense[variant, level] += [log - base for log, base in zip(logs, dense, strict=True)]
            other = by_place[reference, level, iteration, prompt]
            to_variant[variant, level] += [log - base for log, base in zip(logs, other, strict=True)]

    def width(values: list[float]) -> float:
        return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))

    between = [width(values) for (variant, _), values in to_variant.items() if variant != reference]
    return {
        "width_to_dense_per_cent": round(100 * float(np.median([width(values) for values in to_dense.values()])), 2),
        "width_between_variants_per_cent": round(100 * float(np.median(between)), 2),
    }


def ratio(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Time of a plain script over ours: geometric mean and 95 % interval over the rounds."""
    logs = np.log(seconds[name]) - np.log(seconds["ours"])
    mean, low, high = float(logs.mean()), math.nan, math.nan
    if len(logs) > 1:
        half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
        low, high = mean - half, mean + half
    interval = [None if math.isnan(edge) else round(math.exp(edge), 3) for edge in (low, high)]
    return {"ratio": round(math.exp(mean), 3), "interval": interval, "rounds": len(logs)}


if __name__ == "__main__":
    raise SystemExit(main())
