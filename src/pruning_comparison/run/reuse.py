"""What a run takes over from earlier ones beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from pruning_comparison.run.inputs import Inputs
from pruning_comparison.run.layer_times import held_by_layer_times
from pruning_comparison.run.provenance import hardware, versions
from pruning_comparison.spec import (
    REUSE_AXES,
    TEXT_AXES,
    Cell,
    ComparisonSpec,
    Revisions,
    identity,
    revisions_of,
    without_strange_methods,
)
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import Reused
from pruning_comparison.store.run_folder import (
    journal_damage,
    read_manifest,
    stored_runs,
    write_manifest,
)

LOGGER = logging.getLogger(__name__)


def reuse(spec: ComparisonSpec, inputs: Inputs, store: RunStore, *, iterations: int) -> None:
    """Takes over what earlier runs beside this one have measured and this one needs for so many ``iterations``.

    Whole cells come from runs whose spec differs in nothing but which cells there are (``REUSE_AXES``); heads and
    perplexity alone from those that differ in prompts, texts and tasks as well (``TEXT_AXES``). All must have been made on
    the same machine with the same versions, and at the same revisions: of the protocol and the metrics, and of the method
    and the variant of a cell that is taken. A run that stored no revisions gives nothing. Layer times come along with the
    cells whose heads were chosen by them, and cells of other layer times stay where they are. A finished run of the very
    same spec means that it is to be measured anew, so nothing is taken.
    """
    here, revisions = dict(inputs.digests), revisions_of(spec)
    whole = spec.content_hash(here)
    made_with = (versions(), hardware(spec))
    runs = list(stored_runs(store.folder.parent))
    if any(manifest.spec_hash == whole and manifest.finished is not None for _, manifest in runs):
        return
    for texts_alike in (True, False):
        for folder, manifest in runs:
            if manifest.revisions is None or manifest.spec_hash == whole:
                continue
            stored = _measured_alike(manifest.spec, manifest.inputs, manifest.revisions, texts_alike)
            if stored != _measured_alike(spec.as_dict(), here, revisions, texts_alike):
                continue
            if (manifest.versions, manifest.hardware) != made_with or journal_damage(folder) is not None:
                continue
            try:
                known = without_strange_methods(manifest.spec, spec.own_methods)
                earlier = ComparisonSpec.from_dict(known, known_methods=spec.own_methods)
            except (TypeError, ValueError, KeyError, AttributeError):
                continue
            wanted = [cell for cell in spec.cells() if cell.iteration < iterations]
            alike = {cell for cell in wanted if _same_cell(cell, spec, earlier)}
            alike = {cell for cell in alike if revisions.same_for(cell, manifest.revisions)}
            with RunStore(folder) as other:
                times, theirs = store.layer_times_s(), other.layer_times_s()
                if times is not None and theirs is not None and times != theirs:
                    alike = {cell for cell in alike if not held_by_layer_times(spec, cell.variant)}
                what = (_take_cells if texts_alike else _take_parts)(spec, store, earlier, other, alike)
                if what and times is None and theirs is not None:
                    store.write_layer_times(theirs)
            if what:
                words = " and ".join(f"{count} {name}" for name, count in what.items())
                LOGGER.info("taken over from %s: %s", folder, words)
                mine = read_manifest(store.folder)
                taken = Reused(folder.name, manifest.commit, what)
                write_manifest(store.folder, replace(mine, reused=(*mine.reused, taken)))


def _measured_alike(
    settings: Mapping[str, Any], inputs: Mapping[str, str], revisions: Revisions, texts_alike: bool
) -> str:
    """Equal for runs from which whole cells can be taken over or, if not ``texts_alike``, heads and perplexity."""
    if texts_alike:
        return identity(settings, inputs, revisions.of_every_cell(), without=REUSE_AXES)
    others = {name: value for name, value in inputs.items() if name not in ("prompts", "tasks")}
    return identity(settings, others, revisions.of_every_cell(tasks=False), without=REUSE_AXES | TEXT_AXES)


def _take_cells(
    spec: ComparisonSpec, store: RunStore, earlier: ComparisonSpec, other: RunStore, alike: Set[Cell]
) -> dict[str, int]:
    """Copies cells and timings that both runs need, and says how many."""
    cells = (alike & other.finished_cells()) - store.finished_cells()
    timings = set()
    # Variants are timed in turns, so timings of other variants, or in other engines, cannot be completed.
    if set(earlier.variants) == set(spec.variants) and earlier.engines == spec.engines:
        for method, iteration, level in other.finished_timings() - store.finished_timings():
            if {Cell(variant, method, iteration, level) for variant in spec.variants} <= cells:
                timings.add((method, iteration, level))
    if not cells:
        return {}
    store.copy_from(other, sorted(cells), sorted(timings))
    return {"cells": len(cells), "timings": len(timings)}


def _take_parts(
    spec: ComparisonSpec, store: RunStore, earlier: ComparisonSpec, other: RunStore, alike: Set[Cell]
) -> dict[str, int]:
    """Copies heads and perplexity of cells whose texts are other ones, and says of how many."""
    cells = (alike & other.finished_cells()) - store.finished_cells() - store.parts()
    if not cells:
        return {}
    store.copy_parts_from(other, sorted(cells))
    return {"cells without their texts": len(cells)}


def _same_cell(cell: Cell, *specs: ComparisonSpec) -> bool:
    """Whether a cell is the same in all specs: the direction of entropy is tried at the smallest level there is.

    A user's own method that was another one then is in no earlier spec.
    """
    if any(cell.method not in spec.pruning_methods for spec in specs):
        return False
    if not specs[0].method(cell.method).tries_directions or specs[0].entropy_direction != "auto":
        return True
    return len({next((level for level in spec.pruning_levels if level > 0), None) for spec in specs}) == 1
