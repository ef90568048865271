"""A comparison from its spec to its journal: what is there, what is missing, who measures it, what is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pruning_comparison.errors import InputError, Interrupted
from pruning_comparison.models import preview_model
from pruning_comparison.run.engine_timings import check_engines, known_to_be_missing, remove_left_files
from pruning_comparison.run.inputs import Inputs, content_hashes, prepare
from pruning_comparison.run.launchers import (
    Begun,
    Launcher,
    LayersTimed,
    Timed,
    Trouble,
    Work,
    format_timing,
    launch_serially,
)
from pruning_comparison.run.looks import Stopwatch, check_budget, end, look
from pruning_comparison.run.provenance import hardware, versions
from pruning_comparison.run.pruned_model import KeptHeads
from pruning_comparison.run.reuse import reuse
from pruning_comparison.run.run_log import RunLog, log_failure
from pruning_comparison.run.run_options import keep_options
from pruning_comparison.run.saved_models import model_folder
from pruning_comparison.run.tracking import Tracking
from pruning_comparison.spec import LATER_SETTINGS, NAMES_OF_FILES, Cell, ComparisonSpec, revisions_of
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import CellResult, Manifest, Measurement, ModelFacts
from pruning_comparison.store.run_folder import (
    create_run,
    journal_damage,
    read_manifest,
    stored_runs,
    unfinished_run,
    write_manifest,
)
from pruning_comparison.texts import load_documents, load_prompts

LOGGER = logging.getLogger(__name__)


def run_comparison(
    spec: ComparisonSpec,
    *,
    output_dir: Path,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_measured: Callable[[Cell, Sequence[Measurement]], None] = lambda cell, measurements: None,
    code_commit: str | None = None,
    raise_failures: bool = False,
    save_models: bool = False,
    launcher: Launcher = launch_serially,
    fresh: bool = False,
    more_options: Mapping[str, Any] = {},
    budget_s: float | None = None,
    thread_times_s: Mapping[int, float] | None = None,
    tracking: Tracking | None = None,
) -> Path:
    """Measures every cell that is not stored yet and returns the run folder. Continues an unfinished run of the same spec.

    With ``fresh`` everything is measured again in a new folder: nothing is continued, and nothing is reused from earlier
    runs. ``more_options`` are not part of the spec; they are only kept with the options that repeat the run.

    A spec that goes on ``until_decided`` ends at the first look that finds all primary answers decided, or at the last one.
    ``budget_s`` ends it earlier: when so much time has been used, in all sessions together, or at a look from which the next
    one does not seem within reach. It then stays unfinished, so that the same command with a larger budget goes on.

    ``save_models`` also keeps every pruned model, in ``model_folder``. ``launcher`` says who measures: results are the
    same, so a run may be continued with another one.

    ``thread_times_s`` are the times by which the spec's threads were chosen, for a new run's manifest.

    ``tracking`` is told of settings and estimates as they come; whoever has started it finishes it.

    A cell that fails is recorded with its reason and the rest goes on (``raise_failures`` raises instead); the run then
    stays unfinished, so that the same command tries it again. Interrupted is raised on Ctrl-C, after what was measured has
    been kept. News, warnings and failures are logged, and kept with times and tracebacks in ``run.log`` of the folder.
    """
    if save_models and spec.execution != "compact":
        raise InputError(
            f"--save_models: nothing is removed with --execution={spec.execution}. Leave one of the two out."
        )
    check_budget(spec, budget_s)
    check_engines(spec)
    inputs = prepare(spec)
    opened = partial(
        open_run, spec, inputs, output_dir, code_commit,
        fresh=fresh, more_options=more_options, thread_times_s=thread_times_s,
    )  # fmt: skip
    with RunLog() as log, RunStore(log.kept_in(opened()), lock=True) as store:
        folder = store.folder
        remove_left_files(folder)
        for sentence in known_to_be_missing(spec, inputs):
            LOGGER.warning(sentence)
        tracking = tracking or Tracking()
        tracking.begin(store, spec)
        stopwatch = Stopwatch(store, budget_s)
        ended, failed = "", 0
        for iterations in spec.looks:
            if not fresh:
                reuse(spec, inputs, store, iterations=iterations)
            work = missing_work(
                spec, inputs, store, iterations=iterations, save_models=save_models, raise_failures=raise_failures
            )
            steps = _Steps(spec, work, iterations)
            if iterations > spec.looks[0] and not stopwatch.has_room(steps.done, steps.total - steps.done):
                ended = "budget"
                break
            try:
                for event in launcher(work):
                    if isinstance(event, Begun):
                        on_progress(steps.done, steps.total, event.what)
                    else:
                        failed += _keep(event, spec, store, code_commit, on_measured)
                        steps.done += not isinstance(event, (LayersTimed, Trouble))
                        tracking.measured(store, spec)
                        if spec.until_decided:
                            stopwatch.keep()
                    if stopwatch.used():
                        ended = "budget"
                        break
            except KeyboardInterrupt:
                if spec.until_decided:
                    stopwatch.keep(now=True)
                raise Interrupted(
                    f"{steps.done} of {steps.total} steps are kept in {folder}. The same command"
                    f"{', without --fresh,' if fresh else ''} continues.",
                    folder,
                ) from None
            if steps.done == steps.total:
                ended = ""  # the budget is used, and so is all that there was to do before this look
            if failed or ended:
                break
            if spec.until_decided and look(store, spec, iterations, stopwatch.seconds).decided:
                ended = "decided"
                break
        if spec.until_decided and not failed:
            end(store, ended or "looks", stopwatch)
        on_progress(steps.done, steps.total, "done")
        if not failed and ended != "budget":
            write_manifest(folder, replace(read_manifest(folder), finished=_now()))
    return folder


class _Steps:
    """How many cells and timings the first ``iterations`` of a run have, and how many of them are done."""

    def __init__(self, spec: ComparisonSpec, work: Work, iterations: int) -> None:
        self.total = sum(cell.iteration < iterations for cell in spec.cells())
        self.total += sum(level[1] < iterations for level in spec.levels())
        self.done = self.total - len(work.cells) - len(work.timings)


def _keep(
    event: CellResult | LayersTimed | Timed | Trouble,
    spec: ComparisonSpec,
    store: RunStore,
    code_commit: str | None,
    on_measured: Callable[[Cell, Sequence[Measurement]], None],
) -> int:
    """Keeps what has come back, and says how many failures that was: 0 or 1."""
    if isinstance(event, CellResult):
        store.write_cell(event, code_commit)
        on_measured(event.cell, event.measurements)
        if event.status == "failed":
            log_failure(event.cell.describe(), event.reason, event.traceback)
            return 1
    elif isinstance(event, LayersTimed):
        store.write_layer_times(event.layer_times_s)
    elif isinstance(event, Timed):
        method, iteration, level = event.level
        store.write_timings(
            method, iteration, level, event.rows,
            complete=event.complete, effort=event.effort, engines=event.engines,
        )  # fmt: skip
        for variant, timing in event.engines:
            if timing.reason is not None:
                LOGGER.warning(
                    "%s: %s cannot be timed in %s: %s",
                    format_timing(event.level),
                    variant,
                    timing.engine,
                    timing.reason,
                )
        for variant in spec.variants:
            rows = [row for name, row in event.rows if name == variant]
            on_measured(Cell(variant, method, iteration, level), rows)
        if event.reason is not None:
            log_failure(format_timing(event.level), event.reason, event.traceback)
            return 1
    else:
        log_failure(event.what, event.reason, event.traceback)
        return 1
    return 0


def missing_work(
    spec: ComparisonSpec,
    inputs: Inputs,
    store: RunStore,
    *,
    iterations: int,
    save_models: bool,
    raise_failures: bool,
) -> Work:
    """What the first ``iterations`` of a run still lack. Levels are timed anew where a cell failed before."""
    wanted = [cell for cell in spec.cells() if cell.iteration < iterations]
    cells = frozenset(wanted) - store.finished_cells()
    models = frozenset(
        cell for cell in wanted if save_models and cell.level > 0 and not model_folder(store.folder, cell).is_dir()
    )
    timings = frozenset(level for level in spec.levels() if level[1] < iterations) - store.finished_timings()

    def known(cell: Cell) -> KeptHeads | None:
        found = store.known(cell)
        return None if found is None else KeptHeads(torch.tensor(found[0]), found[1])

    parts = frozenset(store.parts())
    times = store.layer_times_s()
    return Work(spec, inputs, store.folder, cells, parts, timings, models, known, raise_failures, times)


def open_run(
    spec: ComparisonSpec,
    inputs: Inputs,
    output_dir: Path,
    code_commit: str | None,
    *,
    fresh: bool = False,
    more_options: Mapping[str, Any] = {},
    thread_times_s: Mapping[int, float] | None = None,
) -> Path:
    """The run folder to write to: an unfinished one of the same spec, unless ``fresh``, else a new one."""
    spec_hash = spec.content_hash(dict(inputs.digests))
    folder = None if fresh else unfinished_run(output_dir, spec_hash)
    if folder is not None:
        manifest = read_manifest(folder)
        LOGGER.info("continuing %s", folder)
        warnings = []
        if manifest.commit != code_commit:
            warnings.append(f"continued at commit {code_commit} after starting at {manifest.commit}")
        for part, stored, now in (
            ("versions", manifest.versions, versions()),
            ("hardware", manifest.hardware, hardware(spec)),
        ):
            if stored != now:
                warnings.append(f"continued with other {part}, so that cells of one run may differ in rounding")
        for warning in warnings:
            LOGGER.warning(warning)
        known = manifest.warnings
        if set(warnings) - set(known):
            write_manifest(folder, replace(manifest, warnings=(*known, *(w for w in warnings if w not in known))))
        return folder
    for other, manifest in stored_runs(output_dir) if not fresh else ():
        if manifest.finished is None and (manifest.spec_hash != spec_hash or manifest.revisions is None):
            LOGGER.info(
                "%s is unfinished and %s. This starts a new run", other, _why_not_continued(manifest, spec, inputs)
            )
            break
    manifest = Manifest(
        spec=spec.as_dict(),
        spec_hash=spec_hash,
        revisions=revisions_of(spec),
        inputs=dict(inputs.digests),
        model=ModelFacts.from_dict(inputs.preview.describe()),
        versions=versions(),
        hardware=hardware(spec),
        commit=code_commit,
        started=_now(),
        warnings=_warnings(spec),
        thread_times_s={str(count): seconds for count, seconds in (thread_times_s or {}).items()} or None,
    )
    folder = keep_options(create_run(output_dir, manifest), spec, more_options)
    for warning in manifest.warnings:
        LOGGER.warning(warning)
    return folder


def _why_not_continued(manifest: Manifest, spec: ComparisonSpec, inputs: Inputs) -> str:
    """What differs: settings or contents, of those that the stored run knows; else the version, or revisions."""
    changed = []
    for stored, now in ((manifest.spec, spec.as_dict()), (manifest.inputs, dict(inputs.digests))):
        changed += [name for name in now if name in stored and stored[name] != now[name]]
    if changed:
        return f"stays as it is: {', '.join(changed)} differ"
    if manifest.revisions is None:
        return f"was made by {manifest.made_by}, whose results may differ; it stays as it is and can be reported"
    before, now = manifest.revisions.named(), revisions_of(spec).named()
    raised = [
        f"{name} has revision {now[name]}, and had {before[name]}"
        for name in now
        if name in before and now[name] != before[name]
    ]
    why = ": " + "; ".join(raised) if raised else ""
    return f"was made by {manifest.made_by}, whose results differ{why}. It stays as it is and can be reported"


def would_resume(spec: ComparisonSpec, output_dir: Path) -> bool:
    """Whether ``run_comparison`` would continue an unfinished run."""
    return unfinished_run(output_dir, spec.content_hash(_digests(spec))) is not None


def finished_run(spec: ComparisonSpec, output_dir: Path, *, with_models: bool = False) -> Path | None:
    """The newest run of the same spec, if it is finished and its journal sound; None where it is to be continued, or none.

    ``with_models``: only one that has kept its pruned models. What has changed since it was measured, of versions and
    machine, is logged as a warning.
    """
    here = _settings_without_files(spec.as_dict())
    if not any(
        manifest.finished is not None and _settings_without_files(manifest.spec) == here
        for _, manifest in stored_runs(output_dir)
    ):
        return None  # Contents are hashed only where it can matter: that reads all weights of a local model.
    spec_hash = spec.content_hash(_digests(spec))
    for folder, manifest in stored_runs(output_dir):
        if manifest.spec_hash != spec_hash or manifest.revisions is None or journal_damage(folder) is not None:
            continue
        if manifest.finished is None:
            return None  # begun after any that is finished, and to be continued
        pruned = [cell for cell in spec.cells() if cell.level > 0]
        if with_models and not all(model_folder(folder, cell).is_dir() for cell in pruned):
            continue
        for part, stored, now in (
            ("versions", manifest.versions, versions()),
            ("hardware", manifest.hardware, hardware(spec)),
        ):
            if stored != now:
                changed = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
                LOGGER.warning("it was measured with other %s: %s", part, ", ".join(changed))
        return folder
    return None


def _settings_without_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the identity of a run counts them: what files are called is not part of it."""
    return {name: value for name, value in {**LATER_SETTINGS, **settings}.items() if name not in NAMES_OF_FILES}


def _digests(spec: ComparisonSpec) -> dict[str, str]:
    return content_hashes(
        spec,
        preview_model(spec.model_name),
        load_prompts(spec.prompt_file, spec.max_prompts),
        load_documents(spec.eval_text, option="--eval_text"),
        load_documents(spec.calibration_text, option="--calibration_text"),
    )


def _warnings(spec: ComparisonSpec) -> tuple[str, ...]:
    found = spec.idle_settings()
    if spec.device == "cpu" and spec.precision == "float16":
        found.append("float16 on a CPU is slow and its speed says nothing about a GPU")
    if len(spec.variants) == 1:
        found.append(
            f"{spec.variants[0]} alone is measured, so nothing is compared with it; --variants=baseline,agency does"
        )
    return tuple(found)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
