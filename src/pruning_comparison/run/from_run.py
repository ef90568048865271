"""A pruned model of a run, made again from the heads in its journal: which one, and that it is the very model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from pruning_comparison.analysis import Margins, observations, optimal_levels, relative_to_dense
from pruning_comparison.errors import InputError, StoreError
from pruning_comparison.formatting import listed, unknown_name
from pruning_comparison.run.cell import rebuild
from pruning_comparison.run.inputs import Inputs
from pruning_comparison.run.pruned_model import KeptHeads, PrunedModel
from pruning_comparison.run.saved_models import note_pruning
from pruning_comparison.run.workspace import Workspace
from pruning_comparison.spec import PROTOCOL_REVISION, Cell, ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import Manifest
from pruning_comparison.store.tables import Run
from pruning_comparison.variants import variant_named


@dataclass(frozen=True)
class ChosenCell:
    """A measured cell of a run whose model is to be made again, and in words why that one."""

    cell: Cell
    why: str


def choose_cell(
    run: Run,
    *,
    variant: str | None,
    method: str | None,
    level: float | None = None,
    target_speedup: float | None = None,
    margins: Margins | None = None,
) -> ChosenCell:
    """The cell of a run that is asked for: at a ``level``, the first that is fast enough, or else the highest safe level.

    The safe level is the report's: the last up to which the upper end of the interval of perplexity stays within the
    tolerance of ``margins``. ``target_speedup`` asks for the lowest level with at least so many times the tokens per second
    of the dense model, timed in the same turns. Where variant or method are left open the last two choose
    among all of the run's; equals are told apart by perplexity. A level is always that of the run's first iteration.

    InputError, with what the run has, where it has no such cell.
    """
    found = _measured(run)
    for option, column, name in (("--variant", "variant", variant), ("--method", "method", method)):
        if name is not None and name not in set(found[column]):
            raise InputError(unknown_name("", name, sorted(set(found[column]))), option=option)
        if name is not None:
            found = found[found[column] == name]
    if level is not None:
        return _at_level(found, level, run)
    tables = observations(run.cells, run.measurements)
    relative = relative_to_dense(run.model, tables, looks=run.looks)
    if target_speedup is not None:
        return _fast_enough(found, relative, target_speedup)
    margins = margins or Margins()
    safe = optimal_levels(run.model, run.cells, tables, margins=margins, seed=run.seed)
    safe = safe.rename(columns={"highest_level": "level"})[["variant", "method", "level"]]
    known = found.merge(safe[safe["level"] > 0], on=["variant", "method", "level"])
    tolerance = f"{100 * margins.tolerance:g} %"
    if known.empty:
        raise InputError(
            f"no level of the run is safe: of none is it known that perplexity rises by at most {tolerance}. Give --level, "
            "or run it with more iterations.",
            option="--best",
        )
    cell = _least_loss(known[known["level"] == known["level"].max()], relative)
    return ChosenCell(
        cell,
        f"--best: {cell.level:g} % is the highest safe level of the run, by {cell.method}, {cell.variant}: up to there "
        f"perplexity rises by at most {tolerance}.",
    )


def spec_of_cell(
    manifest: Manifest, cell: Cell, files: dict[str, str], *, trust_methods: bool = False
) -> ComparisonSpec:
    """The spec of a run's one model: what it was made by, and nothing else of the run. ``files`` are where texts lie now.

    InputError where this version would make another model of the same heads.
    """
    stored = ComparisonSpec.from_dict(dict(manifest.spec), trust_methods=trust_methods)
    _check_revisions(manifest, cell)
    return replace(
        stored,
        **files,  # type: ignore[arg-type]
        variants=(cell.variant,),
        pruning_methods=(cell.method,),
        pruning_levels=(cell.level,),
        iterations=1,
        until_decided=False,
        engines=("native",),
        tasks=(),
        execution="compact",
    )


def check_inputs(manifest: Manifest, inputs: Inputs) -> None:
    """InputError where the model or the calibration text are not those that the run has read."""
    for name, option in (("model", "--model_name"), ("calibration_text", "--calibration_text")):
        stored, now = manifest.inputs.get(name), inputs.digests.get(name)
        if stored is not None and stored != now:
            raise InputError(
                f"what it names is not what the run has read (its content is {now}, and was {stored}), so the model would "
                "be another. Give the same one.",
                option=option,
            )


def make_again(workspace: Workspace, folder: Path, chosen: ChosenCell) -> PrunedModel:
    """The very model that a run has measured, with what was done noted in its config.

    StoreError where the journal has no heads of it, or where it does not come out as the one that was measured.
    """
    with RunStore(folder) as store:
        known = store.known(chosen.cell)
    if known is None or not known[0]:
        raise StoreError(
            f"the journal of {folder} has no heads of {chosen.cell.describe()}. Run it again with --fresh."
        )
    try:
        pruned = rebuild(workspace, chosen.cell, KeptHeads(torch.tensor(known[0]), known[1]))
    except AssertionError as error:
        raise StoreError(
            f"{chosen.cell.describe()} of {folder} cannot be made again: {error}. Run it again with --fresh."
        ) from error
    note_pruning(workspace, pruned, chosen.cell)
    pruned.model.config.pruning |= {"from_run": folder.resolve().name, "fingerprint": pruned.fingerprint}
    return pruned


def _measured(run: Run) -> pd.DataFrame:
    """Variant, method and level of every cell above level 0 of the first iteration that has been measured."""
    cells = run.cells
    cells = cells[(cells["status"] == "done") & (cells["iteration"] == 0) & (cells["level"] > 0)]
    if cells.empty:
        raise InputError(f"{run.folder} has measured no pruned model yet. Finish the run first.", option="--from")
    return cells[["variant", "method", "level"]].drop_duplicates()


def _at_level(found: pd.DataFrame, level: float, run: Run) -> ChosenCell:
    levels = sorted(set(found["level"]))
    if level not in levels:
        raise InputError(
            f"the run has not measured {level:g} %. It has {listed([f'{one:g}' for one in levels])}.", option="--level"
        )
    found = found[found["level"] == level]
    variants = set(found["variant"])
    if len(variants) > 1:
        found = found[found["variant"] == _one_of(sorted(variants), "variant", "agency")]
    methods = [str(name) for name in found["method"]]
    method = _one_of(sorted(methods), "method", None)
    variant = str(found["variant"].iloc[0])
    return ChosenCell(Cell(variant, method, 0, float(level)), f"{level:g} % of {run.folder}, by {method}, {variant}.")


def _one_of(names: Sequence[str], what: str, usual: str | None) -> str:
    """The only name, or the usual one. InputError where the option has to say which."""
    if len(names) == 1:
        return names[0]
    if usual in names:
        return str(usual)
    raise InputError(f"the run has {listed(names)}. Name one of them.", option=f"--{what}")


def _fast_enough(found: pd.DataFrame, relative: pd.DataFrame, target: float) -> ChosenCell:
    speeds = relative[relative["metric"] == "tokens_per_second"]
    known = found.merge(speeds[["variant", "method", "level", "estimate"]], on=["variant", "method", "level"])
    if known.empty:
        raise InputError("the run has no timings. Give --level.", option="--target_speedup")
    enough = known[known["estimate"] >= target]
    if enough.empty:
        fastest = known.sort_values("estimate", kind="stable").iloc[-1]
        raise InputError(
            f"no model of the run has {target:g} times the dense model's tokens per second: the most are "
            f"{fastest['estimate']:.3g} times, at {fastest['level']:g} % by {fastest['method']}, {fastest['variant']}. Give "
            "less.",
            option="--target_speedup",
        )
    cell = _least_loss(enough[enough["level"] == enough["level"].min()], relative)
    at = (enough["variant"] == cell.variant) & (enough["method"] == cell.method) & (enough["level"] == cell.level)
    speed = float(enough[at]["estimate"].iloc[0])
    return ChosenCell(
        cell,
        f"--target_speedup={target:g}: at {cell.level:g} % by {cell.method}, {cell.variant}, the run measured {speed:.3g} "
        "times the dense model's tokens per second.",
    )


def _least_loss(found: pd.DataFrame, relative: pd.DataFrame) -> Cell:
    """Of cells, the one whose perplexity rises least; the first where that is not known."""
    losses = relative[relative["metric"] == "perplexity"][["variant", "method", "level", "estimate"]]
    losses = losses.rename(columns={"estimate": "loss"})
    row = found.merge(losses, on=["variant", "method", "level"], how="left").sort_values("loss", kind="stable").iloc[0]
    return Cell(str(row["variant"]), str(row["method"]), 0, float(row["level"]))


def _check_revisions(manifest: Manifest, cell: Cell) -> None:
    """InputError where the heads would be adapted by other code than the run's: the model would be another."""
    stored = manifest.revisions
    before = None if stored is None else (stored.protocol, stored.variants.get(cell.variant))
    now = (PROTOCOL_REVISION, variant_named(cell.variant).revision)
    if before != now:
        raise InputError(
            f"the run was made by {manifest.made_by}, and this version makes another model of the same heads. Run it again "
            "with --fresh, or prune with that version.",
            option="--from",
        )
