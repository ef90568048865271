"""One cell of a comparison, top to bottom: rank, select, remove, adapt, measure."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency import AdaptationCost, RecoveryCost, adapt, recover
from pruning_comparison.agency.trajectory import Round
from pruning_comparison.formatting import file_name_of
from pruning_comparison.pruning import (
    expected_heads_pruned,
    mask_heads,
    masked_copy,
    remove_heads,
)
from pruning_comparison.pruning.rectangles import is_rectangle
from pruning_comparison.run.measure_cell import measure_quality
from pruning_comparison.run.pruned_model import KeptHeads, PrunedModel
from pruning_comparison.run.workspace import Workspace, at_precision
from pruning_comparison.scoring.choice import heads_to_keep
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store import CellResult
from pruning_comparison.variants import variant_named

RECOVERY = "recovery"
"""The folder within a run's in which a recovery that is under way is kept."""


def run_cell(workspace: Workspace, cell: Cell) -> tuple[PrunedModel, CellResult]:
    """Makes a cell's model and measures its quality. Its speed is measured later, in turns with the other variants'."""
    pruned = build(workspace, cell)
    return pruned, measure_quality(workspace, cell, pruned)


def build(workspace: Workspace, cell: Cell) -> PrunedModel:
    """The model that a cell measures: ranks heads, selects those that stay, removes the others, adapts the survivors."""
    variant, chosen = variant_named(cell.variant), choose(workspace, cell)
    pruned = replace(remove_and_adapt(workspace, cell, chosen.keep), scores=chosen.scores)
    if bool(chosen.keep.all()):
        return pruned
    if chosen.round_records:
        pruned = replace(pruned, round_records=chosen.round_records, negotiation_s=chosen.seconds)
    elif variant.selection != "once" or "prices_nats" not in chosen.scores.details:
        return pruned
    return (
        replace(pruned, predicted_nats=workspace.predicted_nats(cell.iteration, chosen.keep))
        if variant.adapts
        else pruned
    )


def choose(workspace: Workspace, cell: Cell) -> Round:
    """The heads that a cell's model keeps, and how that came about; nothing is removed."""
    variant = variant_named(cell.variant)
    if variant.selection == "once" or (variant.negotiates and cell.level == 0):
        scores = workspace.ranking(cell.method, cell.iteration)
        keep = heads_to_keep(
            scores,
            cell.level,
            workspace.spec.scope,
            group_size=workspace.group_size,
            rectangle=workspace.rectangle,
        )
        return Round(cell.level, keep, scores)
    with workspace.clock.phase("choice of heads"):
        return workspace.trajectory(variant, cell.method, cell.iteration).at(cell.level)


def rebuild(workspace: Workspace, cell: Cell, kept: KeptHeads) -> PrunedModel:
    """The model of a cell that has been measured, from the heads it has kept: nothing is scored or negotiated again.

    AssertionError if it does not come out as the one that was measured.
    """
    pruned = remove_and_adapt(workspace, cell, kept.keep)
    if pruned.fingerprint != kept.fingerprint:
        raise AssertionError(
            f"made again, the model is {pruned.fingerprint}; the one that was measured is {kept.fingerprint}"
        )
    return pruned


def remove_and_adapt(workspace: Workspace, cell: Cell, keep: Tensor) -> PrunedModel:
    """The dense model with these heads, bool [L, H], alone and, for variants that do, the survivors adapted."""
    spec = workspace.spec
    check_count(keep, cell.level, spec, workspace.group_size, workspace.rectangle)
    if bool(keep.all()):
        return PrunedModel(workspace.dense, keep, "dense")
    with workspace.clock.phase("removing heads"):
        compact = remove_heads(workspace.reference, keep)
    identity = [keep.numpy().tobytes()]
    cost = _adapt_survivors(workspace, cell, compact, identity)
    compact, recovery = _recover(workspace, cell, compact, identity)
    fingerprint = hashlib.sha256(b"|".join(identity)).hexdigest()[:16]
    if spec.execution == "masked":
        model = at_precision(masked_copy(workspace.reference, compact, keep), spec.precision, workspace)
        mask_heads(model, keep)
    else:
        model = at_precision(compact, spec.precision, workspace)
    return PrunedModel(model, keep, fingerprint, cost=cost, recovery=recovery)


def _adapt_survivors(
    workspace: Workspace, cell: Cell, compact: PreTrainedModel, identity: list[bytes]
) -> AdaptationCost | None:
    """Adapts a pruned model in place, where its variant does, and adds to its ``identity`` the text it has read."""
    spec = workspace.spec
    if not variant_named(cell.variant).adapts or spec.adaptation == "none":
        return None
    dense = workspace.dense_stream(cell.iteration)
    identity.append(dense.windows.numpy().tobytes())
    if dense.first_tokens is not None:
        identity.append(dense.first_tokens.numpy().tobytes())
    with workspace.clock.phase("adaptation"):
        return adapt(
            dense,
            compact,
            steps=spec.adaptation,
            ridge=spec.ridge,
            mlp_ridge=spec.mlp_ridge,
            measure_peak=spec.memory_logging,
            allow_new_bias=spec.new_bias,
        )


def _recover(
    workspace: Workspace, cell: Cell, compact: PreTrainedModel, identity: list[bytes]
) -> tuple[PreTrainedModel, RecoveryCost | None]:
    """The model after the spec's steps of distillation, the same for every variant; as it is where there are none."""
    spec = workspace.spec
    if not spec.recovery_steps:
        return compact, None
    identity.append(f"recovered {cell.iteration}".encode())
    name = f"{cell.variant}_{file_name_of(cell.method)}_{cell.iteration}_{cell.level:g}.safetensors"
    with workspace.clock.phase("recovery"):
        return recover(
            workspace.reference,
            compact,
            workspace.recovery_windows(cell.iteration),
            steps=spec.recovery_steps,
            batch_size=spec.quality_batch_size,
            learning_rate=spec.recovery_rate,
            parameters=spec.recovery_parameters,
            held_out=workspace.held_out(cell.iteration),
            generator=workspace.generator("recovery", cell.iteration),
            checkpoint=None if workspace.folder is None else workspace.folder / RECOVERY / name,
            identity=hashlib.sha256(b"|".join(identity)).hexdigest(),
            what=f"recovery, {cell.describe()}",
        )


def check_count(
    keep: Tensor, level: float, spec: ComparisonSpec, group_size: int = 1, rectangle: int | None = None
) -> None:
    """AssertionError if the mask does not prune exactly as many heads as the rule asks for, or leaves other shapes."""
    layers, heads = keep.shape
    expected = expected_heads_pruned(level, layers, heads, spec.scope, group_size, rectangle)
    if int((~keep).sum()) != expected:
        raise AssertionError(f"level {level} prunes {int((~keep).sum())} heads; the rule asks for {expected}")
    if rectangle is not None and not is_rectangle(keep, rectangle):
        raise AssertionError(f"level {level} leaves a layer unlike numbers of heads in its key-value groups")
