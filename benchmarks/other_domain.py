"""Perplexity of a run's models on another text than it was evaluated on: python benchmarks/other_domain.py RUN --help

Models are made again from the heads in the run's journal, adapted on the run's own calibration text. An adaptation that only
fits its own domain shows here. One JSON line per level and variant.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.run.cell import rebuild
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.pruned_model import KeptHeads
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--eval_text", default="bundled:held_out")
    parser.add_argument("--eval_tokens", type=int, default=8192)
    parser.add_argument("--levels", default="50", help="comma-separated")
    parser.add_argument("--iteration", type=int, default=0)
    options = parser.parse_args()
    stored = ComparisonSpec.from_dict(dict(read_manifest(options.run).spec))
    spec = replace(stored, eval_text=options.eval_text, eval_tokens=options.eval_tokens)
    workspace = load_workspace(spec, prepare(spec, identify=False))

    def perplexity(model: object) -> float:
        return perplexity_of(measure_perplexity(model, workspace.inputs.windows, batch_size=spec.quality_batch_size))

    dense = perplexity(workspace.dense)
    with RunStore(options.run) as store:
        for level in map(float, options.levels.split(",")):
            for variant in spec.variants:
                cell = Cell(variant, spec.pruning_methods[0], options.iteration, level)
                known = store.known(cell)
                if known is None:
                    raise SystemExit(f"{options.run} has not measured {cell.describe()}")
                found = perplexity(rebuild(workspace, cell, KeptHeads(torch.tensor(known[0]), known[1])).model)
                figures = {
                    "benchmark": "other_domain",
                    "model": spec.model_name,
                    "method": cell.method,
                    "variant": variant,
                    "level": level,
                    "calibration_text": Path(spec.calibration_text).name,
                    "eval_text": Path(options.eval_text).name,
                    "windows": len(workspace.inputs.windows),
                    "dense_perplexity": round(dense, 3),
                    "perplexity": round(found, 3) if math.isfinite(found) else None,
                    "times_dense": round(found / dense, 4) if math.isfinite(found) else None,
                }
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
