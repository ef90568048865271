"""The cells of a comparison, one at a time: load, score, choose, prune, adapt, measure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency import (
    AdaptationCost,
    DenseStream,
    Hearing,
    NegotiatedTrajectory,
    ProgressiveTrajectory,
    RecoveryCost,
    Round,
    adapt,
    recover,
)
from pruning_comparison.checkpoint import save_pruned
from pruning_comparison.errors import InputError
from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import common_uniforms, generate, time_generation
from pruning_comparison.measure.memory import decode_bytes, parameter_bytes
from pruning_comparison.measure.metrics import METRICS
from pruning_comparison.measure.perplexity import EvaluationWindow, WindowLoss, evaluation_windows, measure_perplexity
from pruning_comparison.measure.text_quality import (
    compression_ratio,
    cut_at_end_of_text,
    distinct_n,
    expectation_adjusted_distinct_n,
    generation_losses,
    seq_rep_n,
)
from pruning_comparison.models import HeadGrid, LoadedModel, ModelPreview, load_model, preview_model
from pruning_comparison.models.decoding import decode_step, decode_steps
from pruning_comparison.provenance import versions
from pruning_comparison.pruning import converted_copy, mask_heads, masked_copy, remove_heads
from pruning_comparison.scoring import SCORED_ON_PRUNED, HeadScores, score_heads
from pruning_comparison.selection import Scope, expected_heads_pruned, select_heads
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store import CellResult, GeneratedText, Measurement
from pruning_comparison.texts import (
    Document,
    check_enough,
    digest,
    load_documents,
    load_prompts,
    sample_windows,
    tokenize,
    whole_windows,
)

ADAPTING_VARIANTS = frozenset({"agency", "agency-adaptation", "agency-always-yes", "agency-heeds-states"})
"""Variants that are measured with adapted weights."""

NEGOTIATING_VARIANTS = frozenset({"agency", "agency-selection", "agency-always-yes", "agency-heeds-states"})
"""Variants whose heads are asked, in rounds between which the survivors adapt."""

TEXT_BATCHES = 4
"""Texts are written in batches of so many times ``quality_batch_size``: a step of decoding has one token per row, a
perplexity window has hundreds, so many more rows take hardly longer."""

Known = tuple[Tensor, str]
"""Heads [n_layers, n_heads] that a measured model has kept, and its fingerprint."""

TIMED_METRICS = (
    "tokens_per_second", "first_token_latency_s", "time_per_output_token_s", "end_to_end_s", "cache_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Everything a spec names, read and checked against the model's config, before any weight is loaded.

    ``calibration`` [M, T] are all windows of calibration text, from which each iteration draws.
    """

    preview: ModelPreview
    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    windows: Sequence[EvaluationWindow]
    calibration: Tensor
    digests: Mapping[str, str]


@dataclass(frozen=True)
class PrunedModel:
    """A model that is ready to be measured, with what was done to it. ``fingerprint`` names weights and heads.

    ``scores`` are those its heads were chosen by, None where it was made from heads that are known. ``hearings`` are the
    rounds in which its heads were asked, ``negotiation_s`` what they took; None where nobody was asked.
    """

    model: PreTrainedModel
    keep: Tensor
    fingerprint: str
    scores: HeadScores | None = None
    cost: AdaptationCost | None = None
    hearings: tuple[Hearing, ...] = ()
    negotiation_s: float | None = None
    recovery: RecoveryCost | None = None


@dataclass
class Workspace:
    """A loaded comparison: the dense model, its inputs, and what has been computed once and is needed again."""

    spec: ComparisonSpec
    inputs: Inputs
    reference: PreTrainedModel
    dense: PreTrainedModel
    _rankings: dict[tuple[str, int], HeadScores] = field(default_factory=dict)
    _calibration: dict[int, Tensor] = field(default_factory=dict)
    _progressive: dict[tuple[str, int], ProgressiveTrajectory] = field(default_factory=dict)
    _negotiated: dict[tuple[str, str, int], NegotiatedTrajectory] = field(default_factory=dict)
    _dense_streams: dict[int, DenseStream] = field(default_factory=dict)
    _losses: dict[str, list[WindowLoss]] = field(default_factory=dict)
    _texts: dict[tuple[str, int], tuple[list[Measurement], list[GeneratedText]]] = field(default_factory=dict)

    @property
    def grid(self) -> HeadGrid:
        return self.inputs.preview.grid

    @property
    def group_size(self) -> int:
        """How many heads leave together."""
        return heads_leaving_together(self.grid, self.spec.unit)

    def generator(self, purpose: str, iteration: int) -> torch.Generator:
        """An independent stream of random numbers for each purpose and iteration."""
        seed = hashlib.sha256(f"{self.spec.seed}/{purpose}/{iteration}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") % 2**63)

    def calibration(self, iteration: int) -> Tensor:
        """This iteration's calibration windows [N, T]."""
        if iteration not in self._calibration:
            self._calibration[iteration] = sample_windows(
                self.inputs.calibration, self.spec.calibration_tokens, self.generator("calibration", iteration)
            )
        return self._calibration[iteration]

    def score_windows(self, iteration: int) -> Tensor:
        """The part of this iteration's calibration windows that heads are scored on, [N, T]."""
        windows = self.calibration(iteration)
        tokens = self.spec.score_tokens
        return windows if tokens is None else windows[: -(-tokens // windows.shape[1])]

    def dense_stream(self, iteration: int) -> DenseStream:
        """What adaptation aims at, on this iteration's calibration text. Only the latest is kept: it may be large."""
        if iteration not in self._dense_streams:
            for stream in self._dense_streams.values():
                stream.close()
            self._dense_streams.clear()
            self._dense_streams[iteration] = DenseStream(
                self.reference, self.calibration(iteration), batch_size=self.spec.quality_batch_size
            )
        return self._dense_streams[iteration]

    def ranking(self, method: str, iteration: int) -> HeadScores:
        """The method's scores on the dense model, computed once per iteration."""
        key = (method, 0 if method == "magnitude" else iteration)
        if key not in self._rankings:
            self._rankings[key] = self._rank(self.reference, method, iteration, self.spec.entropy_direction)
        return self._rankings[key]

    def progressive(self, method: str, iteration: int) -> ProgressiveTrajectory:
        """The path of ``baseline-progressive``. Only the latest is kept: cells come trajectory by trajectory."""
        key = (method, iteration)
        if key not in self._progressive:
            self._progressive.clear()
            self._progressive[key] = ProgressiveTrajectory(
                self.reference,
                score=lambda model: self._rank_again(model, method, iteration),
                all_heads=self.grid.all_heads(),
                scope=cast(Scope, self.spec.scope),
                group_size=self.group_size,
                scores_pruned=method in SCORED_ON_PRUNED,
            )
        return self._progressive[key]

    def negotiated(self, variant: str, method: str, iteration: int) -> NegotiatedTrajectory:
        """The path of a variant whose heads are asked; variants that ask alike share one. Only the latest are kept."""
        rules = negotiation_rules(variant)
        key = (rules, method, iteration)
        if key not in self._negotiated:
            for other in [other for other in self._negotiated if other[1:] != key[1:]]:
                del self._negotiated[other]
            dense = self.dense_stream(iteration)
            windows = self.score_windows(iteration)
            # Rounds only have to find the heads; what is measured is adapted with all there is.
            steps = "refit" if self.spec.adaptation == "refit-mlp" else self.spec.adaptation

            def adapt_round(model: PreTrainedModel) -> None:
                adapt(
                    dense,
                    model,
                    steps=steps,
                    ridge=self.spec.ridge,
                    most_tokens=windows.numel(),
                    allow_new_bias=self.spec.new_bias,
                )

            def importance(model: PreTrainedModel) -> Tensor:
                return self._rank_again(model, "fisher", iteration).scores

            self._negotiated[key] = NegotiatedTrajectory(
                self.reference,
                score=lambda model: self._rank_again(model, method, iteration),
                importance=None if method == "fisher" else importance,
                adapt=adapt_round,
                windows=windows,
                batch_size=self.spec.quality_batch_size,
                all_heads=self.grid.all_heads(),
                scope=cast(Scope, self.spec.scope),
                ridge=self.spec.ridge,
                everyone_consents=rules == "agency-always-yes",
                heed_states=rules == "agency-heeds-states",
                group_size=self.group_size,
                scores_pruned=method in SCORED_ON_PRUNED,
            )
        return self._negotiated[key]

    def _rank_again(self, model: PreTrainedModel, method: str, iteration: int) -> HeadScores:
        """The method's scores on a model that has been pruned further.

        What "auto" chose for the dense model stays: the direction of entropy, and the precision of gradients.
        """
        dense = self.ranking(method, iteration)
        if model is self.reference:
            return dense
        direction = dense.details.get("entropy_direction", self.spec.entropy_direction)
        return self._rank(model, method, iteration, direction, dense.details.get("gradient_precision", "auto"))

    def _rank(
        self,
        model: PreTrainedModel,
        method: str,
        iteration: int,
        entropy_direction: str,
        gradient_precision: str = "auto",
    ) -> HeadScores:
        return score_heads(
            method,
            model,
            self.score_windows(iteration),
            batch_size=self.spec.quality_batch_size,
            generator=self.generator("random ranking", iteration),
            entropy_direction=entropy_direction,
            smallest_level=next((level for level in self.spec.pruning_levels if level > 0), 10.0),
            scope=cast(Scope, self.spec.scope),
            gradient_precision=gradient_precision,
            group_size=self.group_size,
        )


def heads_leaving_together(grid: HeadGrid, unit: str) -> int:
    """How many heads leave at once: one, or all that read the same keys and values where ``unit`` is "kv_group"."""
    return grid.group_size if unit == "kv_group" else 1


def negotiation_rules(variant: str) -> str:
    """The variant by whose rules the heads of a negotiating one are asked: those that ask alike share one path."""
    return variant if variant in ("agency-always-yes", "agency-heeds-states") else "agency"


def prepare(spec: ComparisonSpec, *, identify: bool = True) -> Inputs:
    """Reads config, tokenizer and texts, and checks that they fit the spec. InputError where they do not.

    ``identify`` also takes the content hashes, which reads the weights of a local model through once.
    """
    preview = preview_model(spec.model_name)
    prompts = load_prompts(spec.prompt_file, spec.max_prompts)
    prompt_ids = [tokenize(preview.tokenizer, prompt)[0] for prompt in prompts]
    for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True), start=1):
        if not ids:
            raise InputError(f"--prompt_file: prompt {number} ({prompt[:40]!r}) has no tokens. Write some text.")
        if len(ids) >= preview.context:
            raise InputError(
                f"--prompt_file: prompt {number} ({prompt[:40]!r}...) has {len(ids)} tokens, which fill the context of "
                f"{preview.context} tokens of {spec.model_name}. Shorten it."
            )
        if len(ids) + spec.num_tokens > preview.context:
            raise InputError(
                f"--num_tokens: prompt {number} has {len(ids)} tokens, and {spec.num_tokens} more exceed the context of "
                f"{preview.context} tokens of {spec.model_name}. Ask for at most {preview.context - len(ids)}."
            )
    evaluation = load_documents(spec.eval_text, option="--eval_text")
    calibration = load_documents(spec.calibration_text, option="--calibration_text")
    shared = {document.text for document in evaluation} & {document.text for document in calibration}
    if shared:
        raise InputError(
            f"--calibration_text: {len(shared)} of its documents are also in the evaluation text. Nothing that is "
            "evaluated may be calibrated on; give other documents."
        )
    windows = evaluation_windows(
        evaluation,
        preview.tokenizer,
        window=min(spec.eval_window, preview.context),
        stride=min(spec.eval_stride, preview.context),
        tokens=spec.eval_tokens,
    )
    calibration_windows = whole_windows(calibration, preview.tokenizer, min(spec.calibration_window, preview.context))
    check_enough(calibration_windows, spec.calibration_tokens)
    digests = content_hashes(preview, prompts, evaluation, calibration) if identify else {}
    return Inputs(preview, prompts, prompt_ids, windows, calibration_windows, digests)


def load_workspace(spec: ComparisonSpec, inputs: Inputs) -> Workspace:
    """Loads the weights. Scores and adaptation work in float32 whatever the precision that is measured."""
    torch.set_num_threads(spec.threads)
    loaded: LoadedModel = load_model(inputs.preview, device=spec.device, dtype=torch.float32)
    return Workspace(spec, inputs, loaded.model, at_precision(loaded.model, spec.precision))


def run_cell(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
    """Measures one cell's quality: perplexity, generated texts, memory, and what adaptation cost."""
    if pruned.scores is None:
        raise ValueError("a model that was made again from known heads has been measured before")
    perplexity = _perplexity_measurements(workspace, pruned)
    rest = run_rest(workspace, cell, pruned)
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
        hearings=pruned.hearings,
    )


def run_rest(workspace: Workspace, cell: Cell, pruned: PrunedModel) -> CellResult:
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


def build(workspace: Workspace, cell: Cell) -> PrunedModel:
    """Scores, chooses, prunes and, for variants that do, adapts: the model that a cell measures."""
    spec = workspace.spec
    reached: Round | None = None
    if cell.variant in NEGOTIATING_VARIANTS and cell.level > 0:
        reached = workspace.negotiated(cell.variant, cell.method, cell.iteration).at(cell.level)
    elif cell.variant == "baseline-progressive":
        reached = workspace.progressive(cell.method, cell.iteration).at(cell.level)
    if reached is not None:
        keep, scores = reached.keep, reached.scores
    else:
        scores = workspace.ranking(cell.method, cell.iteration)
        keep = select_heads(scores.scores, cell.level, cast(Scope, spec.scope), group_size=workspace.group_size)
    pruned = prune_and_adapt(workspace, cell, keep)
    if reached is None or not reached.hearings or bool(keep.all()):
        return replace(pruned, scores=scores)
    return replace(pruned, scores=scores, hearings=reached.hearings, negotiation_s=reached.seconds)


def rebuild(workspace: Workspace, cell: Cell, keep: Tensor, fingerprint: str) -> PrunedModel:
    """The model of a cell that has been measured, from the heads it has kept: nothing is scored or negotiated again.

    AssertionError if it does not come out as the one that was measured.
    """
    pruned = prune_and_adapt(workspace, cell, keep)
    if pruned.fingerprint != fingerprint:
        raise AssertionError(
            f"made again, the model is {pruned.fingerprint}; the one that was measured is {fingerprint}"
        )
    return pruned


def prune_and_adapt(workspace: Workspace, cell: Cell, keep: Tensor) -> PrunedModel:
    """The dense model with these heads [n_layers, n_heads] alone and, for variants that do, the survivors adapted."""
    spec = workspace.spec
    check_count(keep, cell.level, spec, workspace.group_size)
    if bool(keep.all()):
        return PrunedModel(workspace.dense, keep, "dense")
    compact = remove_heads(workspace.reference, keep)
    cost, identity = None, [keep.numpy().tobytes()]
    if cell.variant in ADAPTING_VARIANTS and spec.adaptation != "none":
        cost = adapt(
            workspace.dense_stream(cell.iteration),
            compact,
            steps=spec.adaptation,
            ridge=spec.ridge,
            mlp_ridge=spec.mlp_ridge,
            measure_peak=spec.memory_logging,
            allow_new_bias=spec.new_bias,
        )
        identity.append(workspace.calibration(cell.iteration).numpy().tobytes())
    recovery = None
    if spec.recovery_steps:
        compact, recovery = recover(
            workspace.reference,
            compact,
            workspace.calibration(cell.iteration),
            steps=spec.recovery_steps,
            batch_size=spec.quality_batch_size,
            learning_rate=spec.recovery_rate,
            generator=workspace.generator("recovery", cell.iteration),
        )
        identity.append(f"recovered {cell.iteration}".encode())
    fingerprint = hashlib.sha256(b"|".join(identity)).hexdigest()[:16]
    if spec.execution == "masked":
        model = at_precision(masked_copy(workspace.reference, compact, keep), spec.precision, workspace)
        mask_heads(model, keep)
    else:
        model = at_precision(compact, spec.precision, workspace)
    return PrunedModel(model, keep, fingerprint, cost=cost, recovery=recovery)


def note_pruning(workspace: Workspace, pruned: PrunedModel, cell: Cell) -> None:
    """Writes into a pruned model's config how it was made, for its card and for whoever finds the file."""
    spec, preview = workspace.spec, workspace.inputs.preview
    commit = getattr(preview.config, "_commit_hash", None)
    here = Path(spec.model_name).is_dir()
    adapts = cell.variant in ADAPTING_VARIANTS and spec.adaptation != "none"
    made: dict[str, Any] = {
        "base_model": preview.title or (Path(spec.model_name).name if here else spec.model_name),
        "hub_model": None if commit is None else spec.model_name,
        "hub_commit": commit,
        "licence": preview.licence(),
        "level": cell.level,
        "method": cell.method,
        "variant": cell.variant,
        "iteration": cell.iteration,
        "scope": spec.scope,
        "calibration_text": Path(spec.calibration_text).name,
        "calibration_tokens": spec.calibration_tokens,
        "score_tokens": spec.score_tokens,
        "adaptation": spec.adaptation if adapts else "none",
        "ridge": spec.ridge if adapts else None,
        "mlp_ridge": spec.mlp_ridge if adapts and spec.adaptation == "refit-mlp" else None,
        "new_bias": spec.new_bias if adapts else None,
        "recovery_steps": spec.recovery_steps or None,
        "precision": spec.precision,
        "seed": spec.seed,
        "versions": versions(),
    }
    pruned.model.config.pruning = {name: value for name, value in made.items() if value is not None}


def model_folder(run: Path, cell: Cell) -> Path:
    """Where a run with ``save_models`` keeps a cell's pruned model."""
    return run / "models" / f"{cell.variant}_{cell.method}_{cell.iteration}_{cell.level:g}"


def save_model(workspace: Workspace, pruned: PrunedModel, cell: Cell, run: Path) -> None:
    """Keeps a cell's pruned model in the run's folder, with how it was made; a model that lost nothing is not kept."""
    if not bool(pruned.keep.all()):
        note_pruning(workspace, pruned, cell)
        save_pruned(pruned.model, workspace.inputs.preview.tokenizer, model_folder(run, cell))


def check_count(keep: Tensor, level: float, spec: ComparisonSpec, group_size: int = 1) -> None:
    """AssertionError if the mask does not prune exactly as many heads as the rule asks for."""
    layers, heads = keep.shape
    expected = expected_heads_pruned(level, layers, heads, cast(Scope, spec.scope), group_size)
    if int((~keep).sum()) != expected:
        raise AssertionError(f"level {level} prunes {int((~keep).sum())} heads; the rule asks for {expected}")


def at_precision(model: PreTrainedModel, precision: str, workspace: Workspace | None = None) -> PreTrainedModel:
    """The model in the precision to measure in: itself where it already is, else a converted copy.

    What it has in common with the workspace's reference model, the copy has in common with the workspace's dense one.
    """
    dtype = getattr(torch, precision)
    like = None if workspace is None else (workspace.reference, workspace.dense)
    return model if model.dtype == dtype else converted_copy(model, dtype, like=like)


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


def content_hashes(
    preview: ModelPreview, prompts: list[str], evaluation: list[Document], calibration: list[Document]
) -> dict[str, str]:
    """Content hashes of everything that a run reads."""
    return {
        "prompts": digest(prompts),
        "eval_text": digest([document.text for document in evaluation]),
        "calibration_text": digest([document.text for document in calibration]),
        "model": preview.identity(),
    }


def attempt(
    workspace: Workspace, cell: Cell, part: Known | None = None, *, raise_failures: bool
) -> tuple[PrunedModel | None, CellResult]:
    """Builds a cell's model and measures it; where its heads and perplexity are known, ``part``, only the rest.

    A failure becomes a failed result, unless ``raise_failures``.
    """
    try:
        if part is not None:
            pruned = rebuild(workspace, cell, *part)
            return pruned, run_rest(workspace, cell, pruned)
        pruned = build(workspace, cell)
        return pruned, run_cell(workspace, cell, pruned)
    except Exception as error:
        if raise_failures:
            raise
        return None, CellResult(cell=cell, status="failed", reason=reason_of(error))


def attempt_rebuild(
    workspace: Workspace, cell: Cell, known: Known, *, raise_failures: bool
) -> tuple[PrunedModel | None, str | None]:
    """The model of a measured cell made again, and None; where that fails, None and the reason."""
    try:
        return rebuild(workspace, cell, *known), None
    except Exception as error:
        if raise_failures:
            raise
        return None, reason_of(error)


def attempt_timing(
    workspace: Workspace, models: Mapping[str, PreTrainedModel], iteration: int, *, raise_failures: bool
) -> tuple[list[tuple[str, Measurement]], str | None]:
    """Timings of one level and None; where they fail, missing values that say why, and the reason."""
    try:
        return time_level(workspace, models, iteration), None
    except Exception as error:
        if raise_failures:
            raise
        reason = reason_of(error)
        return untimed(models, reason), reason


def untimed(variants: Iterable[str], reason: str) -> list[tuple[str, Measurement]]:
    """Missing timings of one level, with the reason."""
    return [(variant, _measurement(name, None, reason)) for variant in variants for name in TIMED_METRICS]


def reason_of(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _perplexity_measurements(workspace: Workspace, pruned: PrunedModel) -> list[Measurement]:
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
    jobs = [(heat, prompt) for heat in spec.temperatures for prompt in range(len(inputs.prompts))]
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
            temperatures=[heat for heat, _ in batch],
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
    for (heat, prompt), row, fine, (nats, count) in zip(jobs, written, finite, losses, strict=True):
        text = tokenizer.decode(row)
        texts.append(GeneratedText(heat, prompt, inputs.prompts[prompt], text))
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
            _measurement(name, value, reason, temperature=heat, prompt=prompt) for name, value in values.items()
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
