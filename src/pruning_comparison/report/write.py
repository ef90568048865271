"""From a run's journal to what people read: tidy tables, charts and the report. Nothing is measured here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning_comparison.analysis import (
    CONTRAST_COLUMNS,
    HYPOTHESIS_COLUMNS,
    RANKING_COLUMNS,
    Margins,
    MetricTable,
    agreement,
    answer_accuracy,
    answer_hypotheses,
    answer_pruning,
    compare_engines,
    compare_tasks,
    contrast,
    find_fronts,
    map_heads,
    map_rounds,
    missing_figures,
    observations,
    optimal_levels,
    rank_methods,
    rank_variants,
    relative_to_dense,
    speed_at_equal_perplexity,
    strongest_baselines,
    summarize,
)
from pruning_comparison.errors import InputError, StoreError
from pruning_comparison.metrics import METRICS
from pruning_comparison.report import between_runs, findings, verdicts
from pruning_comparison.report.answer import answer_of
from pruning_comparison.report.charts import (
    NARROW,
    WIDE,
    chart_jobs,
    draw_between_runs,
    draw_fronts,
    draw_tasks,
    head_chart_jobs,
    perplexity_over_levels,
    rankings,
    save_charts,
    to_svg,
)
from pruning_comparison.report.drawing import draw_charts
from pruning_comparison.report.first_screen import model_name
from pruning_comparison.report.layers import layer_findings
from pruning_comparison.report.page import render_between_runs, render_report
from pruning_comparison.report.rows import rows_with_null
from pruning_comparison.report.tasks import accuracy_verdicts
from pruning_comparison.report.terminal import stored_form
from pruning_comparison.store import Manifest, Run, load_run, write_atomically, write_manifest, write_table
from pruning_comparison.variants import PRIMARY

REPORT = "report.html"
CHARTS = "charts"
HERO = "perplexity_over_levels"
BETWEEN_RUNS = "between_runs.csv"

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tables:
    """Everything that is estimated from a run, as tidy tables by the names of their files."""

    summary: pd.DataFrame
    relative: pd.DataFrame
    rankings: pd.DataFrame
    contrasts: pd.DataFrame
    answers: pd.DataFrame
    optimal_levels: pd.DataFrame
    equal_perplexity: pd.DataFrame
    strongest_baselines: pd.DataFrame
    fronts: pd.DataFrame
    missing: pd.DataFrame


def write_results(
    folder: Path,
    *,
    save_outputs: bool,
    margins: Mapping[str, float] | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Writes every table, chart and the report of a run folder anew from its journal; returns the report's path.

    ``results.json`` and every table of ``_Tables`` and of the journal as CSV; ``generated_texts.csv`` only where
    ``save_outputs``. ``margins`` (fields of ``Margins``) replace those that the manifest keeps from the last time, and are
    kept there. Charts that show what they showed the last time are not drawn again; ``on_progress`` is told how many of how
    many are done, and which comes next. StoreError where nothing has been measured yet.
    """
    run = load_run(folder)
    used = margins_of(run.manifest, margins)
    # A manifest from before one of them was there stays as it is while they are the same.
    same = run.manifest.margins is not None and used == margins_of(run.manifest, None)
    kept = run.manifest if same else replace(run.manifest, margins=asdict(used))
    if kept != run.manifest:
        write_manifest(folder, kept)
    manifest = kept.as_dict()
    heads, texts, asked = run.heads, run.texts, {"signals": run.signals, "replies": run.replies}
    LOGGER.info("estimating")
    observed = observations(run.cells, run.measurements)
    tables = _estimate(run, observed, used)
    tasks = compare_tasks(run.model, observed)
    lost = answer_accuracy(run.model, run.cells, observed, margins=used, looks=run.looks)
    told = [*verdicts.verdicts(tables.answers, tables.optimal_levels), *accuracy_verdicts(lost)]
    plain = [
        *findings.plain_findings(tables.summary, tables.relative, tables.contrasts, run.cells, manifest),
        *findings.strongest_findings(tables.strongest_baselines),
        *findings.recovery_findings(run.cells),
        *layer_findings(tables.contrasts, heads),
        *verdicts.part_findings(tables.answers),
        *verdicts.exploratory_findings(tables.answers),
    ]
    answer = answer_of(
        model_name(tables.summary, manifest),
        relative=tables.relative,
        optimal=tables.optimal_levels,
        ranked=tables.rankings,
        answers=tables.answers,
    )
    maps = map_heads(heads, asked["signals"], asked["replies"])
    rounds = map_rounds(asked["signals"], asked["replies"])
    agreed = agreement(heads)
    engines = compare_engines(run.model, run.engine_timings)
    optional = {
        **asked,
        "head_agreement": agreed,
        "layer_times": run.layer_times,
        "engine_timings": run.engine_timings,
        "engines": engines,
        "tasks": tasks,
        "accuracy_lost": lost,
    }
    for name, table in {
        **vars(tables),
        "cells": run.cells,
        "measurements": _with_model(run.model, run.measurements),
        "heads": heads,
        **{name: table for name, table in optional.items() if len(table)},
    }.items():
        write_table(folder / f"{name}.csv", table)
    if save_outputs:
        write_table(folder / "generated_texts.csv", texts)
    words = {
        "answer": stored_form(answer),
        "verdicts": [vars(verdict) for verdict in told],
        "findings": [vars(finding) for finding in plain],
        **({"engines": rows_with_null(engines)} if len(engines) else {}),
        **({"tasks": rows_with_null(tasks), "accuracy_lost": rows_with_null(lost)} if len(tasks) else {}),
    }
    write_atomically(folder / "results.json", _results_json(manifest, tables, run.cells, words))
    jobs: dict[str, Callable[[], Figure]] = {
        HERO: partial(perplexity_over_levels, tables.relative, tolerance=used.tolerance),
        "rankings": partial(rankings, tables.rankings),
        "fronts": partial(draw_fronts, tables.fronts),
        **({"tasks": partial(draw_tasks, tasks)} if len(tasks) else {}),
        **chart_jobs(tables.summary, tables.contrasts),
        **head_chart_jobs(run.model, maps, rounds, agreed),
    }
    drawings = draw_charts(jobs, folder / CHARTS, on_progress=on_progress)
    _remove_narrow_charts(folder / CHARTS / "narrow")
    LOGGER.info("writing the report")
    html = render_report(
        answer=answer,
        relative=tables.relative,
        ranked=tables.rankings,
        points=tables.fronts,
        layer_times=run.layer_times,
        engines=engines,
        tasks=tasks,
        accuracy_lost=lost,
        summary=tables.summary,
        contrasts=tables.contrasts,
        cells=run.cells,
        missing=tables.missing,
        verdicts=told,
        answers=tables.answers,
        optimal=tables.optimal_levels,
        equal=tables.equal_perplexity,
        strongest=tables.strongest_baselines,
        findings=plain,
        hero=drawings.pop(HERO),
        drawings=drawings,
        heads=maps,
        agreed=agreed,
        manifest=manifest,
        texts=texts,
    )
    write_atomically(folder / REPORT, html)
    return folder / REPORT


def write_between_runs(folders: Sequence[Path], *, output_dir: Path) -> Path:
    """Compares every run with the first of them and writes ``between_runs_<timestamp>/``: report, table and charts.

    Returns the report's path. InputError for fewer than two runs.
    """
    if len(folders) < 2:
        raise InputError(f"{len(folders)} run cannot be compared with another. Name at least two.")
    runs = [load_run(folder) for folder in folders]
    LOGGER.info("estimating")
    compared = between_runs.compare_all(runs)
    table = between_runs.joined(compared)
    LOGGER.info("drawing the charts")
    wide, narrow = (draw_between_runs(table, size=size) for size in (WIDE, NARROW))
    folder = _new_folder(output_dir)
    write_table(folder / BETWEEN_RUNS, table)
    save_charts(wide, folder / CHARTS)
    LOGGER.info("writing the report")
    html = render_between_runs(
        names=[str(name) for name in folders],
        compared=table,
        findings=[finding for one in compared for finding in between_runs.between_runs_findings(one.table, one.name)],
        differences=between_runs.differences_in_words(compared),
        limits=between_runs.limits_in_words(compared),
        charts={name: (to_svg(wide[name]), to_svg(narrow[name])) for name in wide},
    )
    write_atomically(folder / REPORT, html)
    return folder / REPORT


def _remove_narrow_charts(folder: Path) -> None:
    """What releases up to 0.1.0 drew for phones would go on showing an old state beside the new charts."""
    for picture in folder.glob("*.png"):
        picture.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def margins_of(manifest: Manifest, given: Mapping[str, float] | None) -> Margins:
    """The margins given, else those that a manifest keeps, else the defaults. StoreError where those make no sense."""
    known = {field.name for field in fields(Margins)}
    try:
        kept = {name: value for name, value in (manifest.margins or {}).items() if name in known}
        Margins(**kept)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"the margins in the run's manifest make no sense ({error}). Remove them from it.") from error
    return Margins(**{**kept, **(given or {})})


def _estimate(run: Run, tables: Mapping[str, MetricTable], margins: Margins) -> _Tables:
    """Every estimate is made from one set of observations and pairs."""
    summary, relative = summarize(run.model, tables), relative_to_dense(run.model, tables, looks=run.looks)
    return _Tables(
        summary,
        relative,
        _joined(
            [rank(run.model, tables, margins=margins, looks=run.looks) for rank in (rank_methods, rank_variants)],
            RANKING_COLUMNS,
        ),
        _contrasts(run.model, run.variants, tables),
        _answers(run, tables, run.variants, margins),
        optimal_levels(run.model, run.cells, tables, margins=margins, seed=run.seed),
        speed_at_equal_perplexity(run.model, run.cells, tables),
        strongest_baselines(run.model, tables),
        find_fronts(run.model, summary, relative),
        missing_figures(run.measurements),
    )


def _answers(run: Run, tables: Mapping[str, MetricTable], variants: list[str], margins: Margins) -> pd.DataFrame:
    """Agency against the baseline, then against every other variant, as exploratory, and every variant against dense.

    In a run without agency it is every other variant against the baseline.
    """
    agency, baseline = PRIMARY
    others = [name for name in variants if name not in PRIMARY]
    if agency in variants:
        contrasts = [(agency, reference) for reference in (baseline, *others) if reference in variants]
    else:
        contrasts = [(variant, baseline) for variant in others if baseline in variants]
    answers = [
        answer_hypotheses(
            run.model, run.cells, tables,
            margins=margins, variant=variant, reference=reference, looks=run.looks,
        )
        for variant, reference in contrasts
    ]  # fmt: skip
    answers.append(answer_pruning(run.model, run.cells, tables, margins=margins, looks=run.looks))
    return _joined(answers, HYPOTHESIS_COLUMNS)


def _contrasts(model: str, variants: list[str], tables: Mapping[str, MetricTable]) -> pd.DataFrame:
    """Every variant against the baseline, where there is one."""
    others = [variant for variant in variants if variant != "baseline"] if "baseline" in variants else []
    return _joined([contrast(model, tables, variant) for variant in others], CONTRAST_COLUMNS)


def _joined(tables: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The tables below one another; an empty one with these columns where none has a row."""
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _with_model(model: str, measurements: pd.DataFrame) -> pd.DataFrame:
    return measurements.assign(model=model)[["model", *measurements.columns]]


def _new_folder(output_dir: Path) -> Path:
    stamp = time.strftime("between_runs_%Y%m%d_%H%M%S")
    for attempt in range(1000):
        folder = output_dir / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(f"the folder {folder} cannot be made: {error.strerror}. Choose --output_dir.") from error
        return folder
    raise StoreError(f"{output_dir} already holds 1000 comparisons of this second; wait a moment.")


def _results_json(manifest: Mapping[str, Any], tables: _Tables, cells: pd.DataFrame, words: Mapping[str, Any]) -> str:
    document = {
        "manifest": manifest,
        "metrics": {
            name: {"unit": metric.unit, "better": metric.direction, "label": metric.label}
            for name, metric in METRICS.items()
        },
        **{name: rows_with_null(table) for name, table in vars(tables).items()},
        "cells": [{**row, "details": json.loads(row["details"])} for row in rows_with_null(cells)],
        **words,
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False, default=str) + "\n"
