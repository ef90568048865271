"""Accuracy on tasks beside perplexity, of agency and of baselines: python benchmarks/tasks.py --help

    python benchmarks/tasks.py --model_path=smollm2-135m --calibration_text=wiki.train.raw.gz --eval_text=wiki.test.raw.gz \\
        [--variants=agency:obs,baseline:obs,...] [--levels=50,30,70] [--tokens=16384] [--samples=1] [--recovery_steps=60] \\
        [--tasks=sotu_last_word,sotu_continuation] [--limit=150] [--output=tasks.jsonl]

Every model is made as a comparison makes it, and asked. One JSON line each: perplexity and its ratio to the dense model's,
accuracy on each task and on all, and the mean difference from the dense model and from the first of the variants at the same
level, by pairs of the same question, with 95 % intervals (Student's t over questions, of accuracies averaged over samples).
What has been measured is kept in ``--output`` and not measured again by the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.measure.tasks import load_tasks
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.spec import BUNDLED_TASKS, Cell, ComparisonSpec

VARIANTS = "agency:obs,baseline:obs,baseline:entropy,baseline:fisher"
DENSE = "dense"


def mean_with_interval(values: Sequence[float]) -> list[float | None]:
    """Mean and the ends of its 95 % interval (Student's t); None for the ends where there is one value."""
    array = np.asarray(values, dtype=float)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return [mean, None, None]
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return [round(mean, 5), round(mean - half, 5), round(mean + half, 5)]


def ask(workspace: Workspace, model: Any) -> dict[str, Any]:
    """Perplexity of a model, and its score on each question by "task number"."""
    spec, inputs = workspace.spec, workspace.inputs
    started = time.process_time()
    answers = load_tasks(spec.tasks, spec.task_limit).answers(
        model, inputs.preview.tokenizer, bos=inputs.bos, batch_size=spec.quality_batch_size
    )
    seconds = time.process_time() - started
    perplexity = perplexity_of(measure_perplexity(model, inputs.windows, batch_size=spec.quality_batch_size))
    scores = {f"{one.task} {one.question}": one.scores.get("accuracy", math.nan) for one in answers}
    return {"perplexity": perplexity, "scores": scores, "task_processor_s": round(seconds, 1)}


def averaged(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean score of each question over samples."""
    return {key: float(np.mean([one["scores"][key] for one in samples])) for key in samples[0]["scores"]}


def differences(one: dict[str, float], other: dict[str, float], task: str) -> list[float]:
    """Of every question of a task, or of all where it is empty."""
    return [one[key] - other[key] for key in one if key.startswith(f"{task} " if task else "")]


def figures(
    samples: Sequence[dict[str, Any]], dense: dict[str, Any], first: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """What a line says of one variant at one level."""
    mine, of_dense = averaged(samples), dense["scores"]
    tasks = list(dict.fromkeys(key.rpartition(" ")[0] for key in mine))
    perplexity = math.exp(float(np.mean([math.log(one["perplexity"]) for one in samples])))
    found: dict[str, Any] = {
        "perplexity": round(perplexity, 3),
        "times_dense": round(perplexity / dense["perplexity"], 4),
        "questions": len(mine),
    }
    for task in ["", *tasks]:
        found[task or "all tasks"] = {
            "accuracy": mean_with_interval(
                [score for key, score in mine.items() if key.startswith(f"{task} " if task else "")]
            ),
            "vs_dense": mean_with_interval(differences(mine, of_dense, task)),
        }
        if first is not None:
            found[task or "all tasks"]["vs_first"] = mean_with_interval(differences(mine, averaged(first), task))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="bundled")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--eval_text", default="bundled:held_out")
    parser.add_argument("--eval_tokens", type=int, default=8192)
    parser.add_argument("--eval_window", type=int, default=512)
    parser.add_argument(
        "--variants", default=VARIANTS, help="variant:method, comma-separated; the others are held against the first"
    )
    parser.add_argument("--levels", default="50,30,70")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--calibration_window", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1, help="of calibration text")
    parser.add_argument("--recovery_steps", type=int, default=0)
    parser.add_argument("--tasks", default=",".join(BUNDLED_TASKS))
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="keeps scores of every question, to go on with")
    options = parser.parse_args(argv)
    places = [tuple(place.split(":")) for place in options.variants.split(",")]
    levels = [float(level) for level in options.levels.split(",")]
    spec = ComparisonSpec(
        model_name=options.model_path, device=options.device, pruning_levels=tuple(levels),
        pruning_methods=tuple(dict.fromkeys(method for _, method in places)),
        variants=tuple(dict.fromkeys(variant for variant, _ in places)),
        iterations=options.samples, seed=options.seed, threads=options.threads, quality_batch_size=options.batch_size,
        eval_text=options.eval_text, eval_tokens=options.eval_tokens, eval_window=options.eval_window,
        calibration_text=options.calibration_text, calibration_tokens=options.tokens,
        calibration_window=options.calibration_window, recovery_steps=options.recovery_steps,
        tasks=tuple(options.tasks.split(",")), task_limit=options.limit, num_tokens=1, max_prompts=1,
    )  # fmt: skip
    inputs = prepare(spec)
    settings = replace(spec, variants=("baseline",), pruning_methods=("random",), pruning_levels=(50.0,), iterations=1)
    identity = settings.content_hash(dict(inputs.digests))
    known = read_known(options.output, identity)
    workspace: list[Workspace] = []

    def measured(variant: str, method: str, sample: int, level: float) -> dict[str, Any]:
        """From the file, or measured now and kept there."""
        place = f"{variant}:{method}:{sample}:{level:g}"
        if place not in known:
            if not workspace:
                workspace.append(load_workspace(spec, inputs, describes=False))
            model = (
                workspace[0].dense
                if variant == DENSE
                else build(workspace[0], Cell(variant, method, sample, level)).model
            )
            known[place] = ask(workspace[0], model)
            keep(options.output, identity, place, known[place])
        return known[place]

    dense = measured(DENSE, "", 0, 0.0)
    common = {
        "benchmark": "tasks",
        "model": options.model_path,
        "tokens": options.tokens,
        "recovery_steps": options.recovery_steps,
    }
    tell(common | {"variant": DENSE, "level": 0.0} | figures([dense], dense, None))
    for level in levels:
        first: list[dict[str, Any]] | None = None
        for variant, method in places:
            samples = [measured(variant, method, sample, level) for sample in range(options.samples)]
            place = {"variant": variant, "method": method, "level": level, "samples": options.samples}
            tell(common | place | figures(samples, dense, first))
            first = first or samples


def tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def read_known(path: Path | None, identity: str) -> dict[str, dict[str, Any]]:
    """What an earlier command with the same settings has measured, by place."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["place"]: row["measured"] for row in rows if row["identity"] == identity}


def keep(path: Path | None, identity: str, place: str, measured: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"identity": identity, "place": place, "measured": measured}) + "\n")


if __name__ == "__main__":
    main()
