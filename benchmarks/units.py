"""What it costs that heads leave as rectangles or whole key-value groups: python benchmarks/units.py [OPTIONS]

Prices every head of a grouped-query model once. For each method, level and unit, baseline and agency, prints which heads
leave, the ratio to the dense perplexity that prices predict for survivors that adapt, and, unless ``--predict``, the ratio
and the cache that came out, and at last what each unit's perplexity is over that of single heads, paired by window, with a
95 % interval. Lines that ``--to`` has already are not made again.

Everything is made as a run makes it, but for one thing: layers are weighed by the cheaper half of their heads for all units,
where a run with ``--unit=kv_group`` cuts half of the groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from pruning_comparison.analysis.random_effects import fit_crossed, ratio_of
from pruning_comparison.measure.memory import cache_bytes_after
from pruning_comparison.measure.perplexity import measure_perplexity
from pruning_comparison.run.cell import build, choose
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec, PruneUnit

Array = np.ndarray[Any, np.dtype[np.float64]]

VARIANTS = ("baseline", "agency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--eval_text", default="bundled:validation")
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--eval_tokens", type=int, default=8192)
    parser.add_argument("--levels", default="50,30,70")
    parser.add_argument("--methods", default="obs,fisher")
    parser.add_argument("--units", default=",".join(get_args(PruneUnit)))
    parser.add_argument("--predict", action="store_true", help="measure no perplexity")
    parser.add_argument("--to", type=Path, help="also write lines to this file, and leave out those it has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = ComparisonSpec(
        model_name=options.model_name, device="cpu", threads=1, pruning_methods=tuple(options.methods.split(",")),
        pruning_levels=tuple(map(float, options.levels.split(","))), calibration_text=options.calibration_text,
        eval_text=options.eval_text, calibration_tokens=options.calibration_tokens, eval_tokens=options.eval_tokens,
        max_prompts=1, num_tokens=2, iterations=1,
    )  # fmt: skip
    there = read(options.to)
    first = load_workspace(spec, prepare(spec, identify=False), describes=False)

    def note(place: dict[str, Any], **found: Any) -> None:
        there.append({**place, **found})
        line = json.dumps({**there[-1], "processor_s": round(time.process_time())})
        print(line, flush=True)
        if options.to is not None:
            with options.to.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    first.priced(0)
    dense = np.empty(0)
    if not options.predict:
        dense = nats_per_token(first, first.dense)
        told = {"dense": round(math.exp(dense.mean()), 4), "windows": len(dense)}
        print(json.dumps({**told, "cache_bytes": cache_bytes_after(first.dense)}), flush=True)
    levels, units = list(map(float, options.levels.split(","))), options.units.split(",")
    for method in spec.pruning_methods:
        # What is predicted takes seconds, so that all of it stands there before anything is measured.
        for measured in (False, True)[: 1 if options.predict else 2]:
            for level, unit, variant in itertools.product(levels, units, VARIANTS):
                place = {"unit": unit, "method": method, "level": level, "variant": variant, "measured": measured}
                if not any(place.items() <= line.items() for line in there):
                    workspace, cell = of_unit(first, unit), Cell(variant, method, 0, level)
                    note(place, **(came_out(workspace, cell, dense) if measured else predicted(workspace, cell)))
    for contrast in beside_heads(there):
        print(json.dumps(contrast), flush=True)


def predicted(workspace: Workspace, cell: Cell) -> dict[str, Any]:
    keep = choose(workspace, cell).keep
    return {
        "heads_gone": int((~keep).sum()),
        "kv_heads_left": int(keep.unflatten(1, (workspace.grid.n_kv_heads, -1)).any(2).sum()),
        "ratio": round(math.exp(workspace.predicted_nats(0, keep)), 4),
        "gone_per_layer": " ".join(map(str, (~keep).sum(1).tolist())),
    }


def came_out(workspace: Workspace, cell: Cell, dense: Array) -> dict[str, Any]:
    model = build(workspace, cell).model
    logs = nats_per_token(workspace, model) - dense
    ratio = fit_crossed(logs[None]).estimate().map(ratio_of)
    return {
        "ratio": round(ratio.estimate, 4), "ratio_ci": [round(ratio.ci_low, 4), round(ratio.ci_high, 4)],
        "cache_bytes": cache_bytes_after(model), "log_by_window": [round(log, 6) for log in logs.tolist()],
    }  # fmt: skip


def beside_heads(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Perplexity of each unit over that of single heads of the same method, level and variant, paired by window."""
    measured = {
        (line["method"], line["level"], line["variant"], line["unit"]): np.array(line["log_by_window"])
        for line in lines
        if line["measured"]
    }
    for (*place, unit), logs in measured.items():
        heads = measured.get((*place, "head"))
        if unit != "head" and heads is not None:
            ratio = fit_crossed((logs - heads)[None]).estimate().map(ratio_of)
            told = dict(zip(("method", "level", "variant"), place, strict=True))
            interval = [round(ratio.ci_low, 4), round(ratio.ci_high, 4)]
            yield {**told, "unit": unit, "over_heads": round(ratio.estimate, 4), "over_heads_ci": interval}


def of_unit(first: Workspace, unit: str) -> Workspace:
    """The same models, texts, prices and what adaptation aims at, for another unit; scores that do not know the unit too."""
    workspace = replace(first, spec=replace(first.spec, prune_unit=unit))
    workspace._rankings = {
        key: found for key, found in first._rankings.items() if first.spec.method(key[0]).name not in ("obs", "entropy")
    }
    workspace._progressive, workspace._negotiated = {}, {}
    return workspace


def nats_per_token(workspace: Workspace, model: Any) -> Array:
    """Of each window of the evaluation text, float64."""
    losses = measure_perplexity(model, workspace.inputs.windows, batch_size=workspace.spec.quality_batch_size)
    return np.array([loss.nats / loss.tokens for loss in losses])


def read(file: Path | None) -> list[dict[str, Any]]:
    """The lines of a file, none where there is no file."""
    if file is None or not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
