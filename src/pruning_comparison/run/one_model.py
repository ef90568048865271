"""One pruned model to keep, made as a comparison makes its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from pruning_comparison.agency.trajectory import ROUND_LEVEL
from pruning_comparison.checkpoint.forms import forms_ruled_out, gguf_ruled_out
from pruning_comparison.checkpoint.gguf_file import check_gguf_package
from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields
from pruning_comparison.checkpoint.model_card import BeforeAndAfter
from pruning_comparison.errors import InputError
from pruning_comparison.measure.memory import decode_bytes, parameter_bytes
from pruning_comparison.measure.perplexity import kl_of, measure_perplexity, perplexity_of
from pruning_comparison.models import ModelPreview
from pruning_comparison.models.devices import prepare_in
from pruning_comparison.models.heads import UnsupportedModelError, kept_heads, mlp_output_is_normed
from pruning_comparison.pruning.surgery import converted_copy, sharing_copy
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import Inputs, heads_leaving_together, nothing_pruned, rectangle_of
from pruning_comparison.run.max_loss import UNKNOWN_LEVELS, build_within, check_max_loss
from pruning_comparison.run.measure_cell import time_level
from pruning_comparison.run.provenance import hardware
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.saved_models import note_pruning
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.texts import Document, check_enough, load_documents, text_facts, text_name, whole_windows
from pruning_comparison.variants import DENSE, variant_named


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    level: float | None = None,
    max_loss: float | None = None,
    method: str = "fisher",
    variant: str = "agency",
    calibration: str | Sequence[str] = "bundled:calibration",
    **settings: Any,
) -> PreTrainedModel:
    """A copy of a dense model without ``level`` per cent of its heads, physically pruned, in the model's precision.

    In place of the level, ``max_loss`` gives the per cent by which perplexity may rise: as many heads go as prices predict
    to be possible, fewer where a measurement on calibration text that nothing has read finds more.

    ``method`` ranks the heads and ``variant`` says how they leave and whether the survivors adapt, as in a comparison.
    ``calibration`` is text that scores and adaptation may see: the name of a bundled text, a file or a folder, or texts
    themselves. ``settings`` are those of ``ComparisonSpec``, such as ``calibration_tokens``, ``seed`` or ``new_bias``. What
    was done stands in the copy's ``config.pruning``; the model itself stays as it is and shares no memory with the
    copy. It may be in training mode: it is pruned in evaluation mode, and both end in the mode it was in. Each parameter of
    the copy is as trainable as the one it came from. The copy is for ``save_pruned``.

    InputError for settings that cannot work, a model that has been pruned before, or a family that is not supported.
    """
    if (level is None) == (max_loss is None):
        raise InputError("prune needs one of level and max_loss. Give level=30, or max_loss=5.")
    given = isinstance(calibration, str)
    spec = spec_of_one(
        level,
        method,
        variant,
        model_name=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        device=str(model.device),
        precision=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        calibration_text=calibration if given else "texts that were given",
        **settings,
    )
    if max_loss is not None:
        check_max_loss(spec, max_loss)
    try:
        dense = bool(kept_heads(model.config).all())
    except UnsupportedModelError as error:
        raise InputError(str(error)) from error
    if not dense:
        raise InputError("the model has been pruned before. Prune its dense original to the higher level instead.")
    documents = (
        load_documents(calibration, option="calibration")
        if isinstance(calibration, str)
        else [Document(str(number), text) for number, text in enumerate(calibration)]
    )
    preview = ModelPreview(spec.model_name, spec.model_name, model.config, tokenizer)
    bos = preview.bos(spec.bos)
    windows = whole_windows(documents, tokenizer, min(spec.calibration_window, preview.context), bos=bos)
    check_enough(windows, spec.calibration_tokens)
    with _in_evaluation_mode(model):
        reference = model if model.dtype == torch.float32 else converted_copy(model, torch.float32)
        if spec.prepare_precision != "float32":
            reference = sharing_copy(reference)  # how it is prepared is noted on it, and the caller's stays as it is
            prepare_in(reference, spec.prepare_precision)
        workspace = Workspace(spec, Inputs(preview, (), (), (), windows, {}, bos), reference, model, describes=False)
        # What pruning leaves alone is shared until here.
        made = build_one(workspace) if max_loss is None else build_within(workspace, max_loss).pruned
        pruned = copy.deepcopy(made.model)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(_trainable(name, trainable))
    pruned.train(model.training)
    return pruned


@contextmanager
def _in_evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within it nothing is dropped at random; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _trainable(name: str, of_dense: Mapping[str, bool]) -> bool:
    """Whether a pruned model's parameter is to be trained: as the one it came from, or as the weights beside it."""
    if name in of_dense:
        return of_dense[name]
    module = name.rpartition(".")[0]
    return any(trained for other, trained in of_dense.items() if other.startswith(f"{module}."))


def spec_of_one(level: float | None, method: str, variant: str, **settings: Any) -> ComparisonSpec:
    """The spec of a comparison that consists of one pruned model, whose level may be still to be found (None).

    InputError for settings that cannot work.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(ComparisonSpec)})
    if unknown:
        raise InputError(f"prune knows no setting {unknown[0]!r}. Those of ComparisonSpec are meant.")
    if level is not None and not level > 0:
        raise InputError(f"--level: {level} must be above 0 and below 100 per cent. Give a level such as 30.")
    levels = UNKNOWN_LEVELS if level is None else (level,)
    asked = {"pruning_levels": levels, "pruning_methods": (method,), "variants": (variant,), "iterations": 1}
    spec = ComparisonSpec(**{**settings, **asked})
    if spec.execution != "compact":
        raise InputError(f"--execution: {spec.execution!r} removes nothing. Leave it out: a model to keep is compact.")
    return spec


def check_forms(spec: ComparisonSpec, forms: Sequence[str], preview: ModelPreview, *, level_known: bool = True) -> None:
    """InputError, before any weight is read, where no pruned model of this spec can be saved in one of ``forms``.

    Without ``level_known`` only what holds at every level is looked at.
    """
    if "gguf" in forms:
        reason = gguf_ruled_out(
            preview.config,
            group_size=heads_leaving_together(preview.grid, spec.prune_unit),
            rectangle=rectangle_of(preview.grid, spec.prune_unit),
        )
        if reason is not None:
            raise InputError(f"--also: {reason} Nothing has been pruned yet.")
        try:
            check_gguf_package()
            tokenizer_fields(preview.tokenizer, preview.config.vocab_size)
        except InputError as error:
            raise InputError(f"--also: {error} Nothing has been pruned yet.") from error
    if not forms or not level_known:
        return
    adapts = variant_named(spec.variants[0]).adapts and spec.adaptation != "none" and spec.new_bias
    # An MLP whose output passes through a norm is not refitted, only the norm's gains are.
    refits_mlp = spec.adaptation == "refit-mlp" and not mlp_output_is_normed(preview.config)
    biases = () if not adapts else ("attention", "mlp") if refits_mlp else ("attention",)
    reasons = forms_ruled_out(
        preview.config,
        spec.pruning_levels[-1],
        scope=spec.scope,
        group_size=heads_leaving_together(preview.grid, spec.prune_unit),
        rectangle=rectangle_of(preview.grid, spec.prune_unit),
        biases=biases,
    )
    for form in forms:
        if reasons[form] is not None:
            raise InputError(f"--also: {reasons[form]} Nothing has been pruned yet.")


def steps_of_one(spec: ComparisonSpec, *, measures: bool, forms: int, finds_level: bool = False) -> dict[str, int]:
    """How many steps one pruned model takes, by the first word of what ``on_step`` is told.

    Where the level is to be found, the first model tried is taken to do.
    """
    if finds_level:
        return {"loading": 1, "predicting": 1, "pruning": 1, "measuring": 1 + 3 * measures, "saving": forms}
    return {"loading": 1, "pruning": len(_rounds(spec)) + 1, "measuring": 3 if measures else 0, "saving": forms}


def _rounds(spec: ComparisonSpec) -> list[float]:
    """Levels of the rounds in which the heads leave, below the level that is asked for; none where they leave at once."""
    variant = variant_named(spec.variants[0])
    if variant.selection == "once" or (variant.negotiates and spec.prune_unit == "rectangle"):
        return []
    return [ROUND_LEVEL * number for number in range(1, math.ceil(spec.pruning_levels[-1] / ROUND_LEVEL))]


def build_one(workspace: Workspace, on_step: Callable[[str], None] = lambda what: None) -> PrunedModel:
    """The pruned model of a spec of one, with what was done noted in its config. ``on_step`` is told what begins."""
    spec = workspace.spec
    cell = Cell(spec.variants[0], spec.pruning_methods[0], 0, spec.pruning_levels[-1])
    for level in _rounds(spec):
        on_step(f"pruning to {level:g} %")
        # The path stays where it is, so that the next round goes on from here: the same rounds as without this loop.
        workspace.trajectory(variant_named(cell.variant), cell.method, cell.iteration).at(level)
    on_step(f"pruning to {cell.level:g} %")
    pruned = build(workspace, cell)
    if bool(pruned.keep.all()):
        raise InputError(nothing_pruned(spec, workspace.grid), option="--level")
    note_pruning(workspace, pruned, cell)
    return pruned


def measure_one(
    workspace: Workspace, pruned: PrunedModel, on_step: Callable[[str], None] = lambda what: None
) -> list[BeforeAndAfter]:
    """Perplexity, divergence, speed and bytes of the dense and the pruned model, measured as a comparison measures them.

    ``on_step`` is told what begins.
    """
    spec = workspace.spec
    models = {DENSE: workspace.dense, "pruned": pruned.model}
    perplexities: list[float | None] = []
    divergences: list[float | None] = []
    for name, model in models.items():
        on_step(f"measuring the perplexity of the {name} model")
        losses = measure_perplexity(
            model,
            workspace.inputs.windows,
            batch_size=spec.quality_batch_size,
            dense=workspace.dense_predictions,
        )
        for found, value in ((perplexities, perplexity_of(losses)), (divergences, kl_of(losses))):
            found.append(value if math.isfinite(value) else None)
    on_step("measuring speed, both models in turns")
    timings = time_level(workspace, models, 0).rows

    def mean(variant: str, metric: str) -> float | None:
        rows = [row for name, row in timings if name == variant and row.metric == metric]
        values = [row.value for row in rows if row.value is not None]
        return sum(values) / len(values) if values and len(values) == len(rows) else None

    figures = [
        BeforeAndAfter("perplexity", "on the evaluation text", perplexities[0], perplexities[1], "perplexity"),
        BeforeAndAfter("KL to the dense model", "nats per token", divergences[0], divergences[1], "kl_to_dense"),
    ]
    for label, unit, metric in (
        ("speed", "tokens per second", "tokens_per_second"),
        ("first-token latency", "s", "first_token_latency_s"),
        ("key-value cache", "bytes, after a timed prompt", "cache_bytes"),
    ):
        figures.append(BeforeAndAfter(label, unit, mean(DENSE, metric), mean("pruned", metric)))
    for label, count in (("parameters", parameter_bytes), ("parameters read per decoding step", decode_bytes)):
        figures.append(BeforeAndAfter(label, "bytes", count(workspace.dense), count(pruned.model)))
    machine = hardware(spec)
    inputs, plural = workspace.inputs, "" if spec.threads == 1 else "s"
    where = machine.get("gpu") or f"{machine['processor']}, {spec.threads} thread{plural}"
    window = min(spec.eval_window, inputs.preview.context)
    pruned.model.config.pruning["measured_on"] = (
        f"{where}, {spec.precision}; perplexity over {len(inputs.windows)} windows of at most {window} tokens of "
        f"{text_name(spec.eval_text)}; speed over {len(inputs.prompts)} prompts of {spec.num_tokens} new tokens, batch "
        f"{spec.batch_size}"
    )
    pruned.model.config.pruning["evaluation"] = {
        **text_facts(spec.eval_text),
        "windows": len(inputs.windows),
        "window_tokens": window,
        "scored_tokens": sum(one.targets for one in inputs.windows),
    }
    return figures
