"""Everything that a spec names, read and checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pruning_comparison.errors import InputError
from pruning_comparison.measure.perplexity import EvaluationWindow, evaluation_windows
from pruning_comparison.measure.tasks import load_tasks
from pruning_comparison.measure.wikitext import Page, pages_of
from pruning_comparison.models import HeadGrid, ModelPreview, has_experts, preview_model
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.spec import ComparisonSpec, PruneUnit
from pruning_comparison.texts import (
    Document,
    check_enough,
    digest,
    load_documents,
    load_prompts,
    tokenize,
    whole_windows,
)
from pruning_comparison.variants import variant_named


@dataclass(frozen=True)
class Inputs:
    """Everything a spec names, read and checked against the model's config, before any weight is loaded.

    ``calibration`` [M, T] are all windows of calibration text, from which each iteration draws. ``bos`` is the token that
    every text given to the model begins with, prompts and windows alike; None where none does. ``pages`` are whole pages of
    WikiText, where their word perplexity is asked for: those that have windows.
    """

    preview: ModelPreview
    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    windows: Sequence[EvaluationWindow]
    calibration: Tensor
    digests: Mapping[str, str]
    bos: int | None = None
    pages: Sequence[Page] = ()


def prepare(spec: ComparisonSpec, *, identify: bool = True, weights: bool = True) -> Inputs:
    """Reads config, tokenizer and texts, and checks that they fit the spec. InputError where they do not.

    ``identify`` also takes the content hashes, which reads the weights of a local model through once. Without ``weights`` a
    model may be a folder with a config alone, which is all that a plan needs.
    """
    preview = preview_model(spec.model_name, weights=weights)
    _check_levels(spec, preview.grid)
    _check_adaptation(spec, preview)
    bos = preview.bos(spec.bos)
    prompts = load_prompts(spec.prompt_file, spec.max_prompts)
    before = [] if bos is None else [bos]
    prompt_ids = [[*before, *tokenize(preview.tokenizer, prompt)[0]] for prompt in prompts]
    for ids in prompt_ids:
        _check_ids(ids, preview, "--prompt_file")
    for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True), start=1):
        if len(ids) == len(before):
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
        bos=bos,
    )
    calibration_windows = _calibration_windows(spec, preview, calibration, bos)
    _check_ids([int(window.ids.max()) for window in windows], preview, "--eval_text")
    if spec.tasks:
        load_tasks(spec.tasks, spec.task_limit)
    digests = content_hashes(spec, preview, prompts, evaluation, calibration) if identify else {}
    pages: list[Page] = []
    if spec.wikitext_words:
        named = {window.document for window in windows}
        pages = pages_of(evaluation, named, preview.tokenizer, window=min(spec.eval_window, preview.context))
    return Inputs(preview, prompts, prompt_ids, windows, calibration_windows, digests, bos, pages)


def prepare_pruning(spec: ComparisonSpec) -> Inputs:
    """The part of ``prepare`` that pruning itself needs. Prompts and evaluation text are neither read nor checked."""
    preview = preview_model(spec.model_name)
    _check_levels(spec, preview.grid)
    _check_adaptation(spec, preview)
    bos = preview.bos(spec.bos)
    calibration = load_documents(spec.calibration_text, option="--calibration_text")
    return Inputs(preview, (), (), (), _calibration_windows(spec, preview, calibration, bos), {}, bos)


def _calibration_windows(
    spec: ComparisonSpec, preview: ModelPreview, documents: list[Document], bos: int | None
) -> Tensor:
    """All windows of calibration text [M, T]; InputError where there are too few, or a token has no embedding."""
    windows = whole_windows(documents, preview.tokenizer, min(spec.calibration_window, preview.context), bos=bos)
    check_enough(windows, spec.calibration_tokens)
    if spec.recovery_steps and len(windows) - -(-spec.calibration_tokens // windows.shape[1]) < 2:
        raise InputError(
            f"--recovery_steps: {spec.calibration_tokens} calibration tokens leave none of the calibration text, and "
            "recovery trains on text that nothing else has read. Give a longer --calibration_text, or fewer "
            "--calibration_tokens."
        )
    _check_ids([int(windows.max())], preview, "--calibration_text")
    return windows


def heads_leaving_together(grid: HeadGrid, unit: PruneUnit) -> int:
    """How many heads leave at once: one, or all that read the same keys and values where ``unit`` is "kv_group"."""
    return grid.group_size if unit == "kv_group" else 1


def rectangle_of(grid: HeadGrid, unit: PruneUnit) -> int | None:
    """The query heads per key-value group where every layer keeps as many of each, which ``unit`` "rectangle" asks for.

    None for other units, and where any number of heads is such a rectangle: where every head has its own keys and values, or
    all of a layer share theirs. Heads are then chosen freely, as with the unit "head".
    """
    return grid.group_size if unit == "rectangle" and 1 < grid.group_size < grid.n_heads else None


def _check_levels(spec: ComparisonSpec, grid: HeadGrid) -> None:
    """InputError where levels above 0 were asked for and none of them takes a head."""
    group, rectangle = heads_leaving_together(grid, spec.prune_unit), rectangle_of(grid, spec.prune_unit)
    counts = [
        expected_heads_pruned(level, grid.n_layers, grid.n_heads, spec.scope, group, rectangle)
        for level in spec.pruning_levels
        if level > 0
    ]
    if counts and not any(counts):
        raise InputError(nothing_pruned(spec, grid), option="--pruning_levels")


def _check_adaptation(spec: ComparisonSpec, preview: ModelPreview) -> None:
    """InputError where MLPs are to be refitted that have no one projection to refit."""
    adapts = any(variant_named(name).adapts for name in spec.variants)
    if adapts and spec.adaptation == "refit-mlp" and has_experts(preview.config):
        raise InputError(
            f"refit-mlp cannot refit the MLPs of {preview.config.model_type}, which are mixtures of experts. "
            "Give --adaptation=refit, which refits attention alone.",
            option="--adaptation",
        )


def nothing_pruned(spec: ComparisonSpec, grid: HeadGrid) -> str:
    """What to say where no level takes a single head, with the least level that does."""
    group, rectangle = heads_leaving_together(grid, spec.prune_unit), rectangle_of(grid, spec.prune_unit)
    counted = (grid.n_heads if spec.scope == "layer" else grid.total) // group
    what = {("model", 1): "heads", ("layer", 1): "heads of a layer"}.get(
        (spec.scope, group), f"groups of {group} heads"
    )
    if rectangle is not None:
        what += f", when each layer keeps as many heads of each key-value group of {rectangle},"
    # Half a head is rounded to none, so that a little more is needed.
    least = next(
        level / 10
        for level in range(1, 1000)
        if expected_heads_pruned(level / 10, grid.n_layers, grid.n_heads, spec.scope, group, rectangle)
    )
    asked = [level for level in spec.pruning_levels if level > 0]
    shares = all(level < 1 for level in asked)
    meant = f" Levels are per cent: was {','.join(f'{100 * level:g}' for level in asked)} meant?" if shares else ""
    shown = ",".join(f"{level:g}" for level in asked)
    return f"{shown} per cent of {counted} {what} is none. Give at least {least:g}.{meant}"


def _check_ids(ids: Iterable[int], preview: ModelPreview, option: str) -> None:
    """InputError where a text has a token that the model's embedding has no row for, as an added word may be."""
    rows = int(preview.config.vocab_size)
    beyond = next((number for number in ids if number >= rows), None)
    if beyond is not None:
        raise InputError(
            f"{option}: the tokenizer of {preview.name} gives {preview.tokenizer.convert_ids_to_tokens(beyond)!r} the id "
            f"{beyond}, and the model has {rows} rows (vocab_size in config.json). Leave the word out of the text, or "
            "out of the tokenizer."
        )


def content_hashes(
    spec: ComparisonSpec,
    preview: ModelPreview,
    prompts: list[str],
    evaluation: list[Document],
    calibration: list[Document],
) -> dict[str, str]:
    """Content hashes of everything that a run reads."""
    tasks = {"tasks": load_tasks(spec.tasks, spec.task_limit).content()} if spec.tasks else {}
    return {
        **tasks,
        "prompts": digest(prompts),
        "eval_text": digest([document.text for document in evaluation]),
        "calibration_text": digest([document.text for document in calibration]),
        "model": preview.identity(),
    }
