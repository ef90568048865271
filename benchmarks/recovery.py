"""What recovery brings to each variant, its rate and parameters chosen on one text and judged on another.

    python benchmarks/recovery.py --calibration_text=TRAIN --valid_text=VALID --eval_text=TEST [--device=cuda] [--steps=300]
        [--model_path=smollm2-135m] [--variants=agency:obs,...] [--levels=50,30,70] [--tokens=16384] [--samples=1]
        [--rates=1e-4,3e-4,1e-3] [--parameters=all,restricted] [--batch_size=8,1] [--minutes=N]

Each variant is made at each level as a comparison makes it, and measured on TEST beside the dense model. At the first of the
levels every rate and every set of parameters of recovery's grid, or of the part of it that ``--rates`` and ``--parameters``
name, is then trained, ``--grid_steps`` each, on calibration windows that nothing else has read; the one with the least
divergence from the dense model on VALID is the variant's, and trains ``--steps`` at every level. Windows and steps are the
same for all. Of a variant that does not adapt, the first level is trained once more, for as many more steps as the refit of
a variant that does would have had time for.

Prints JSON lines as soon as they are known, the most important first: perplexity relative to the dense model and divergence
(KL, nats per token), each with its 95 % interval over windows (and samples), and seconds. What fails is a line with its
error, and what does not fit into ``--minutes`` one that says so. Choices never see TEST.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pruning_comparison.agency.recovery import recover
from pruning_comparison.analysis.random_effects import fit_crossed, ratio_of
from pruning_comparison.measure import DensePredictions, EvaluationWindow, evaluation_windows, measure_perplexity
from pruning_comparison.models import resolve_device
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import Inputs, prepare
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.spec import RECOVERY_GRID, RECOVERY_RATES, Cell, ComparisonSpec
from pruning_comparison.texts import load_documents

VARIANTS = "agency:obs,baseline:obs,baseline:fisher,agency-adaptation:fisher"

BATCH = 8
"""Windows that are read at once wherever nothing is trained."""


class Text:
    """Evaluation windows of one text, and what the dense model makes of them."""

    def __init__(self, workspace: Workspace, windows: Sequence[EvaluationWindow], batch_size: int) -> None:
        self._windows, self._batch_size = windows, batch_size
        self._predictions = DensePredictions(workspace.reference)
        self._dense, _ = self.of(workspace.reference)

    def of(self, model: PreTrainedModel) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Loss and divergence in nats per token of every window."""
        losses = measure_perplexity(model, self._windows, batch_size=self._batch_size, dense=self._predictions)
        tokens = np.array([loss.tokens for loss in losses])
        return np.array([loss.nats for loss in losses]) / tokens, np.array([loss.kl_nats for loss in losses]) / tokens

    def figures(self, model: PreTrainedModel) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Log perplexity over the dense model's, and divergence, of every window."""
        nats, divergence = self.of(model)
        return nats - self._dense, divergence

    @property
    def dense_perplexity(self) -> float:
        return math.exp(float(self._dense.mean()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="smollm2-135m", help="a name, a folder, or a GGUF file")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default the best available")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--valid_text", default="bundled:validation")
    parser.add_argument("--eval_text", default="bundled:held_out")
    parser.add_argument(
        "--variants", default=VARIANTS, help="variant:method, comma-separated, the most important first"
    )
    parser.add_argument("--levels", default="50,30,70", help="per cent, the most important first")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--grid_steps", type=int, default=None, help="steps of each choice; by default as many")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RECOVERY_RATES), help="to choose from")
    parser.add_argument("--parameters", default=",".join(RECOVERY_GRID), help="to choose from")
    parser.add_argument("--batch_size", default="8", help="windows per step; of several each is tried at every level")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens, beside those of recovery")
    parser.add_argument("--samples", type=int, default=1, help="calibration samples")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--valid_tokens", type=int, default=8192)
    parser.add_argument("--eval_tokens", type=int, default=15360)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing is begun after so many")
    parser.add_argument("--output", default=None, help="a file to which the lines are added as well")
    options = parser.parse_args(argv)
    began = time.perf_counter()

    def say(**line: Any) -> None:
        text = json.dumps({"benchmark": "recovery", "at_s": round(time.perf_counter() - began, 1), **line})
        print(text, flush=True)
        if options.output:
            with Path(options.output).open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    levels = [float(level) for level in options.levels.split(",")]
    places = [tuple(place.split(":")) for place in options.variants.split(",")]
    spec = ComparisonSpec(
        model_name=options.model_path, device=resolve_device(options.device), precision="float32", threads=options.threads,
        pruning_levels=tuple(levels), pruning_methods=tuple(dict.fromkeys(method for _, method in places)),
        variants=tuple(dict.fromkeys(variant for variant, _ in places)), iterations=options.samples,
        calibration_text=options.calibration_text, calibration_tokens=options.tokens, calibration_window=options.window,
        eval_text=options.eval_text, eval_tokens=options.eval_tokens, eval_window=options.window, eval_stride=options.window,
        quality_batch_size=BATCH, max_prompts=1, num_tokens=2,
    )  # fmt: skip
    inputs = prepare(spec, identify=False)
    workspace = load_workspace(spec, inputs)
    test = Text(workspace, inputs.windows, BATCH)
    valid = Text(workspace, _windows(inputs, options.valid_text, options.valid_tokens, spec), BATCH)
    say(
        model=options.model_path, device=spec.device, gpu=_gpu(spec.device), torch=torch.__version__,
        dense_perplexity=test.dense_perplexity, valid_dense_perplexity=valid.dense_perplexity,
        evaluation_windows=len(inputs.windows), recovery_windows=len(workspace.recovery_windows(0)),
    )  # fmt: skip
    bench = Bench(workspace, test, valid, say, options)
    jobs = [(place, level) for place in places for level in levels]
    for sample in range(options.samples):
        for (variant, method), level in jobs:
            cell = Cell(variant, method, sample, level)
            told = {"variant": variant, "method": method, "level": level, "sample": sample}
            if time.perf_counter() - began > 60 * options.minutes:
                say(**told, left_out=f"{options.minutes:g} minutes are over")
                continue
            try:
                bench.run(cell, first=level == levels[0])
            except Exception as error:  # what follows does not depend on it
                say(**told, error=f"{type(error).__name__}: {error}")
    bench.summarise()


class Bench:
    """Makes, trains and measures one cell after the other."""

    def __init__(
        self, workspace: Workspace, test: Text, valid: Text, say: Callable[..., None], options: argparse.Namespace
    ) -> None:
        self._workspace, self._test, self._valid, self._say, self._options = workspace, test, valid, say, options
        self._grid = [
            (float(rate), which) for which in options.parameters.split(",") for rate in options.rates.split(",")
        ]
        self._batches = [int(batch) for batch in options.batch_size.split(",")]
        self._chosen: dict[tuple[str, str, int], tuple[float, str]] = {}
        self._refit_s: list[float] = []
        self._found: dict[tuple[Any, ...], list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}

    def run(self, cell: Cell, *, first: bool) -> None:
        """Measures a cell's model as it is, and recovered."""
        started = time.perf_counter()
        pruned = build(self._workspace, cell)
        make_s = time.perf_counter() - started
        refit_s = 0.0 if pruned.cost is None else pruned.cost.seconds
        if pruned.cost is not None:
            self._refit_s.append(refit_s)
        self._tell(cell, "pruned", pruned.model, 0, make_s=make_s, refit_s=refit_s, negotiation_s=pruned.negotiation_s)
        told = {"make_s": make_s, "refit_s": refit_s}
        for batch in self._batches:
            self._recover(cell, pruned, batch, equal_seconds=first and pruned.cost is None, **told)

    def _recover(self, cell: Cell, pruned: PrunedModel, batch: int, *, equal_seconds: bool, **told: Any) -> None:
        """Measures a cell's model after steps of ``batch`` windows and, if asked to, after as many more as a refit takes."""
        steps, place = self._options.steps, (cell.variant, cell.method, batch)
        trained = None if place in self._chosen else self._choose(cell, pruned, batch)
        if trained is None:
            trained = self._train(cell, pruned, steps, batch, *self._chosen[place])
        self._tell_recovered(cell, "recovered", trained, steps, batch, **told)
        seconds = trained[1]
        del trained
        if equal_seconds and self._refit_s:
            steps += int(sum(self._refit_s) / len(self._refit_s) / (seconds / steps))
            trained = self._train(cell, pruned, steps, batch, *self._chosen[place])
            self._tell_recovered(cell, "recovered, equal seconds", trained, steps, batch, **told)

    def summarise(self) -> None:
        """Every configuration over all samples."""
        for (variant, method, level, what, batch), samples in self._found.items():
            if len(samples) > 1:
                place = {"variant": variant, "method": method, "level": level, "what": what, "batch_size": batch}
                place["samples"] = len(samples)
                logs, divergences = (np.stack([sample[part] for sample in samples]) for part in (0, 1))
                self._say(**place, **_figures(logs, divergences))

    def _choose(self, cell: Cell, pruned: PrunedModel, batch: int) -> tuple[PreTrainedModel, float] | None:
        """Chooses rate and parameters by divergence on the validation text. The model so trained and what that took, in
        seconds; None where the choice was made by fewer steps."""
        steps = self._options.grid_steps or self._options.steps
        least, best = math.inf, None
        for rate, parameters in self._grid:
            trained = self._train(cell, pruned, steps, batch, rate, parameters)
            log, divergence = self._valid.figures(trained[0])
            found = float(divergence.mean())
            self._say(
                **_place(cell), what="trial", learning_rate=rate, parameters=parameters, steps=steps, batch_size=batch,
                seconds=round(trained[1], 2), valid_times_dense=math.exp(float(log.mean())), valid_kl_nats=found,
            )  # fmt: skip
            if best is None or found < least:
                least = found if math.isfinite(found) else math.inf
                self._chosen[cell.variant, cell.method, batch] = rate, parameters
                best = trained
            del trained
        return best if steps == self._options.steps else None

    def _tell_recovered(
        self, cell: Cell, what: str, trained: tuple[PreTrainedModel, float], steps: int, batch: int, **told: Any
    ) -> None:
        rate, parameters = self._chosen[cell.variant, cell.method, batch]
        told |= {"batch_size": batch, "learning_rate": rate, "parameters": parameters, "recovery_s": trained[1]}
        self._tell(cell, what, trained[0], steps, **told)

    def _train(
        self, cell: Cell, pruned: PrunedModel, steps: int, batch: int, rate: float, parameters: str
    ) -> tuple[PreTrainedModel, float]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        student, cost = recover(
            self._workspace.reference,
            pruned.model,
            self._workspace.recovery_windows(cell.iteration),
            steps=steps,
            batch_size=batch,
            learning_rate=rate,
            parameters=parameters,
            generator=self._workspace.generator("recovery", cell.iteration),
            what=f"{cell.describe()}, {rate:g}, {parameters}",
        )
        return student, cost.seconds

    def _tell(self, cell: Cell, what: str, model: PreTrainedModel, steps: int, **told: Any) -> None:
        log, divergence = self._test.figures(model)
        key = (cell.variant, cell.method, cell.level, what, told.get("batch_size"))
        self._found.setdefault(key, []).append((log, divergence))
        rounded = {name: round(value, 2) if name.endswith("_s") and value else value for name, value in told.items()}
        self._say(
            **_place(cell), what=what, steps=steps, **rounded, **_figures(log[None], divergence[None]),
            by_window=[round(math.exp(value), 4) for value in log],
        )  # fmt: skip


def _place(cell: Cell) -> dict[str, Any]:
    return {"variant": cell.variant, "method": cell.method, "level": cell.level, "sample": cell.iteration}


def _figures(logs: np.ndarray[Any, Any], divergences: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Ratio of perplexities and mean divergence with their intervals, from values by sample and window [a, b]."""
    ratio = fit_crossed(np.ascontiguousarray(logs)).estimate().map(ratio_of)
    apart = fit_crossed(np.ascontiguousarray(divergences)).estimate()
    return {
        "times_dense": round(ratio.estimate, 4), "times_dense_ci": [_number(ratio.ci_low), _number(ratio.ci_high)],
        "kl_nats": round(apart.estimate, 5), "kl_nats_ci": [_number(apart.ci_low), _number(apart.ci_high)], "n": ratio.n,
    }  # fmt: skip


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _windows(inputs: Inputs, text: str, tokens: int, spec: ComparisonSpec) -> list[EvaluationWindow]:
    window = min(spec.eval_window, inputs.preview.context)
    documents = load_documents(text, option="--valid_text")
    return evaluation_windows(
        documents, inputs.preview.tokenizer, window=window, stride=window, tokens=tokens, bos=inputs.bos
    )


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


if __name__ == "__main__":
    main()
