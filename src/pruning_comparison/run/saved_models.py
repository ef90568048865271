"""Pruned models that a run keeps, and what their configs say of how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning_comparison.checkpoint.forms import save_pruned
from pruning_comparison.formatting import file_name_of
from pruning_comparison.run.provenance import versions
from pruning_comparison.run.pruned_model import PrunedModel
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import Cell
from pruning_comparison.texts import text_name
from pruning_comparison.variants import variant_named


def note_pruning(workspace: Workspace, pruned: PrunedModel, cell: Cell) -> None:
    """Writes into a pruned model's config how it was made, for its card and for whoever finds the file."""
    spec, preview = workspace.spec, workspace.inputs.preview
    commit = getattr(preview.config, "_commit_hash", None)
    here = Path(spec.model_name).is_dir()
    adapts = variant_named(cell.variant).adapts and spec.adaptation != "none"
    made: dict[str, Any] = {
        "base_model": preview.title or (Path(spec.model_name).name if here else spec.model_name),
        "hub_model": preview.hub_id() if commit is None else spec.model_name,
        "hub_commit": commit,
        "licence": preview.licence(),
        "level": cell.level,
        "method": cell.method,
        "method_source": spec.method(cell.method).source or None,
        "variant": cell.variant,
        "iteration": cell.iteration,
        "scope": spec.scope,
        "unit": spec.prune_unit if spec.prune_unit != "head" else None,
        "calibration_text": text_name(spec.calibration_text),
        "calibration_tokens": spec.calibration_tokens,
        "score_tokens": spec.score_tokens,
        "adaptation": spec.adaptation if adapts else "none",
        "ridge": spec.ridge if adapts else None,
        "mlp_ridge": spec.mlp_ridge if adapts and spec.adaptation == "refit-mlp" else None,
        "consent": spec.consent if variant_named(cell.variant).negotiates and spec.consent != "quality" else None,
        "new_bias": spec.new_bias if adapts else None,
        "recovery_steps": spec.recovery_steps or None,
        "recovery_learning_rate": None if pruned.recovery is None else pruned.recovery.learning_rate,
        "recovery_parameters": None if pruned.recovery is None else pruned.recovery.parameters,
        "precision": spec.precision,
        "seed": spec.seed,
        "versions": versions(),
    }
    pruned.model.config.pruning = {name: value for name, value in made.items() if value is not None}


def model_folder(run: Path, cell: Cell) -> Path:
    """Where a run with ``save_models`` keeps a cell's pruned model."""
    return run / "models" / f"{cell.variant}_{file_name_of(cell.method)}_{cell.iteration}_{cell.level:g}"


def save_model(workspace: Workspace, pruned: PrunedModel, cell: Cell, run: Path) -> None:
    """Keeps a cell's pruned model in the run's folder, with how it was made; a model that lost nothing is not kept."""
    if not bool(pruned.keep.all()):
        note_pruning(workspace, pruned, cell)
        save_pruned(pruned.model, workspace.inputs.preview.tokenizer, model_folder(run, cell))
