"""What a run takes over from earlier ones beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pruning_comparison.run.inputs import Inputs
from pruning_comparison.run.provenance import hardware, versions
from pruning_comparison.spec import REUSE_AXES, TEXT_AXES, Cell, ComparisonSpec, identity
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import (
    journal_damage,
    read_manifest,
    stored_runs,
    write_manifest,
)

LOGGER = logging.getLogger(__name__)


def reuse(spec: ComparisonSpec, inputs: Inputs, store: RunStore) -> None:
    """Takes over what earlier runs beside this one have measured and this one needs.

    Whole cells come from runs whose spec differs in nothing but which cells there are (``REUSE_AXES``); heads and
    perplexity alone from those that differ in prompts and texts as well (``TEXT_AXES``). All must have been made on the same
    machine with the same versions. A finished run of the very same spec means that it is to be measured anew, so nothing
    is taken.
    """
    settings, here = spec.as_dict(), dict(inputs.digests)
    whole = spec.content_hash(here)
    made_with = (versions(), hardware(spec))
    runs = list(stored_runs(store.folder.parent))
    if any(m.get("spec_hash") == whole and m.get("finished") is not None for _, m in runs):
        return
    for texts_alike in (True, False):
        for folder, manifest in runs:
            read = manifest.get("inputs")
            if manifest.get("spec_hash") == whole or not isinstance(read, dict):
                continue
            if _measured_alike(manifest["spec"], read, texts_alike) != _measured_alike(settings, here, texts_alike):
                continue
            if (manifest.get("versions"), manifest.get("hardware")) != made_with or journal_damage(folder) is not None:
                continue
            try:
                earlier = ComparisonSpec.from_dict(manifest["spec"])
            except (TypeError, ValueError):
                continue
            with RunStore(folder) as other:
                take = _take_cells if texts_alike else _take_parts
                what = take(spec, store, earlier, other)
            if what:
                words = " and ".join(f"{count} {name}" for name, count in what.items())
                LOGGER.info("taken over from %s: %s", folder, words)
                mine = read_manifest(store.folder)
                taken = {"run": folder.name, "commit": manifest.get("commit"), **what}
                write_manifest(store.folder, {**mine, "reused": [*mine.get("reused", []), taken]})


def _measured_alike(settings: Mapping[str, Any], inputs: Mapping[str, str], texts_alike: bool) -> str:
    """Equal for runs from which whole cells can be taken over or, if not ``texts_alike``, heads and perplexity."""
    if texts_alike:
        return identity(settings, inputs, without=REUSE_AXES)
    others = {name: value for name, value in inputs.items() if name != "prompts"}
    return identity(settings, others, without=REUSE_AXES | TEXT_AXES)


def _take_cells(spec: ComparisonSpec, store: RunStore, earlier: ComparisonSpec, other: RunStore) -> dict[str, int]:
    """Copies cells and timings that both runs need, and says how many."""
    wanted = {cell for cell in spec.cells() if _same_cell(cell, spec, earlier)}
    cells = (wanted & other.finished_cells()) - store.finished_cells()
    timings = set()
    # Variants are timed in turns, so timings of other variants cannot be completed.
    if set(earlier.variants) == set(spec.variants):
        for method, iteration, level in other.finished_timings() - store.finished_timings():
            if {Cell(variant, method, iteration, level) for variant in spec.variants} <= cells:
                timings.add((method, iteration, level))
    if not cells:
        return {}
    store.copy_from(other, sorted(cells), sorted(timings))
    return {"cells": len(cells), "timings": len(timings)}


def _take_parts(spec: ComparisonSpec, store: RunStore, earlier: ComparisonSpec, other: RunStore) -> dict[str, int]:
    """Copies heads and perplexity of cells whose texts are other ones, and says of how many."""
    wanted = {cell for cell in spec.cells() if _same_cell(cell, spec, earlier)}
    cells = (wanted & other.finished_cells()) - store.finished_cells() - store.parts()
    if not cells:
        return {}
    store.copy_parts_from(other, sorted(cells))
    return {"cells without their texts": len(cells)}


def _same_cell(cell: Cell, *specs: ComparisonSpec) -> bool:
    """Whether a cell is the same in all specs: the direction of entropy is tried at the smallest level there is."""
    if not specs[0].method(cell.method).tries_directions or specs[0].entropy_direction != "auto":
        return True
    return len({next((level for level in spec.pruning_levels if level > 0), None) for spec in specs}) == 1
