"""From a run's journal to what people read: tidy tables, charts and the report. Nothing is measured here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from pruning_comparison.analysis import head_maps
from pruning_comparison.analysis.estimates import CONTRAST_COLUMNS, contrast, missing_figures, summarize
from pruning_comparison.analysis.hypotheses import HYPOTHESIS_COLUMNS, PRIMARY, answers
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.tradeoffs import optimal_levels, speed_at_equal_perplexity
from pruning_comparison.errors import StoreError
from pruning_comparison.metrics import METRICS
from pruning_comparison.report import between_runs as two_runs
from pruning_comparison.report import findings, verdicts
from pruning_comparison.report import page as report
from pruning_comparison.report.charts import heads as head_charts
from pruning_comparison.report.charts import overview as charts
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import write_atomically, write_manifest, write_table

REPORT = "report.html"
CHARTS = "charts"
NARROW = "narrow"
COMPARISON = "comparison.csv"

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tables:
    """Everything that is estimated from a run, as tidy tables by the names of their files."""

    summary: pd.DataFrame
    contrasts: pd.DataFrame
    answers: pd.DataFrame
    optimal_levels: pd.DataFrame
    equal_perplexity: pd.DataFrame
    missing: pd.DataFrame


def write_results(
    folder: Path,
    *,
    save_outputs: bool,
    margins: Mapping[str, float] | None = None,
) -> Path:
    """Writes every table, chart and the report of a run folder anew from its journal; returns the report's path.

    ``results.json`` and every table of ``_Tables`` and of the journal as CSV; ``generated_texts.csv`` only where
    ``save_outputs``. ``margins`` (fields of ``Margins``) replace those that the manifest keeps from the last time, and are
    kept there. StoreError where nothing has been measured yet.
    """
    run = two_runs.read_run(folder)
    used = margins_of(run.manifest, margins)
    manifest = {**run.manifest, "margins": asdict(used)}
    write_manifest(folder, manifest)
    with RunStore(folder) as store:
        heads, texts = store.table("heads"), store.table("texts")
        asked = {name: store.table(name) for name in ("signals", "replies")}
    LOGGER.info("estimating")
    tables = _estimate(run, used)
    told = verdicts.verdicts(tables.answers, tables.optimal_levels)
    plain = [
        *findings.plain_findings(tables.summary, tables.contrasts, run.cells, manifest),
        *verdicts.part_findings(tables.answers),
        *verdicts.exploratory_findings(tables.answers),
    ]
    LOGGER.info("drawing the charts")
    maps = head_maps.head_maps(heads, asked["signals"], asked["replies"])
    rounds = head_maps.round_maps(asked["signals"], asked["replies"])
    agreed = head_maps.agreement(heads)
    figures, narrow = (
        {
            **charts.draw_all(tables.summary, tables.contrasts, size=size),
            **head_charts.draw_head_charts(run.model, maps, rounds, agreed, size=size),
        }
        for size in (charts.WIDE, charts.NARROW)
    )

    for name, table in {
        **vars(tables),
        "cells": run.cells,
        "measurements": _labelled(run.model, run.measurements),
        "heads": heads,
        **{name: table for name, table in {**asked, "head_agreement": agreed}.items() if len(table)},
    }.items():
        write_table(folder / f"{name}.csv", table)
    if save_outputs:
        write_table(folder / "generated_texts.csv", texts)
    words = {"verdicts": [vars(verdict) for verdict in told], "findings": [vars(finding) for finding in plain]}
    write_atomically(folder / "results.json", _results_json(manifest, tables, run.cells, words))
    pictures = charts.save_charts(figures, folder / CHARTS)
    narrow_pictures = charts.save_charts(narrow, folder / CHARTS / NARROW, svg=False)
    LOGGER.info("writing the report")
    html = report.render_report(
        summary=tables.summary,
        contrasts=tables.contrasts,
        cells=run.cells,
        missing=tables.missing,
        verdicts=told,
        answers=tables.answers,
        optimal=tables.optimal_levels,
        equal=tables.equal_perplexity,
        findings=plain,
        pictures=pictures,
        narrow_pictures=narrow_pictures,
        heads=maps,
        agreed=agreed,
        manifest=manifest,
        texts=texts,
    )
    write_atomically(folder / REPORT, html)
    return folder / REPORT


def write_comparison(
    first: Path,
    second: Path,
    *,
    output_dir: Path,
) -> Path:
    """Compares the second run with the first and writes ``comparison_<timestamp>/`` with report and ``comparison.csv``.

    Returns the report's path.
    """
    runs = two_runs.read_run(first), two_runs.read_run(second)
    LOGGER.info("estimating")
    limits = two_runs.limits(*runs)
    compared = two_runs.compare(*runs)
    folder = _new_folder(output_dir)
    write_table(folder / COMPARISON, compared)
    LOGGER.info("writing the report")
    html = report.render_comparison(
        names=(str(first), str(second)),
        compared=compared,
        findings=two_runs.comparison_findings(compared),
        differences=two_runs.differences(runs[0].manifest, runs[1].manifest),
        limits=limits,
    )
    write_atomically(folder / REPORT, html)
    return folder / REPORT


def margins_of(manifest: Mapping[str, Any], given: Mapping[str, float] | None) -> Margins:
    """The margins given, else those that a manifest keeps, else the defaults. StoreError where those make no sense."""
    known = {field.name for field in fields(Margins)}
    try:
        kept = {name: value for name, value in manifest.get("margins", {}).items() if name in known}
        Margins(**kept)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"the margins in the run's manifest make no sense ({error}). Remove them from it.") from error
    return Margins(**{**kept, **(given or {})})


def _estimate(run: two_runs.StoredRun, margins: Margins) -> _Tables:
    variants, tables = run.manifest["spec"]["variants"], (run.model, run.cells, run.measurements)
    return _Tables(
        summarize(*tables),
        _contrasts(run.model, variants, run.cells, run.measurements),
        _answers(run, variants, margins),
        optimal_levels(*tables, margins=margins, seed=run.manifest["spec"]["seed"]),
        speed_at_equal_perplexity(*tables),
        missing_figures(run.measurements),
    )


def _answers(run: two_runs.StoredRun, variants: list[str], margins: Margins) -> pd.DataFrame:
    """Agency against the baseline, and then against every other variant, as exploratory.

    In a run without agency it is every other variant against the baseline.
    """
    agency, baseline = PRIMARY
    others = [name for name in variants if name not in PRIMARY]
    if agency in variants:
        pairs = [(agency, reference) for reference in (baseline, *others) if reference in variants]
    else:
        pairs = [(variant, baseline) for variant in others if baseline in variants]
    tables = [
        answers(
            run.model, run.cells, run.measurements,
            margins=margins, variant=variant, reference=reference, seed=run.manifest["spec"]["seed"],
        )
        for variant, reference in pairs
    ]  # fmt: skip
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(HYPOTHESIS_COLUMNS))


def _contrasts(model: str, variants: list[str], cells: pd.DataFrame, measurements: pd.DataFrame) -> pd.DataFrame:
    """Every variant against the baseline, where there is one."""
    others = [variant for variant in variants if variant != "baseline"] if "baseline" in variants else []
    tables = [contrast(model, cells, measurements, variant) for variant in others]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(CONTRAST_COLUMNS))


def _labelled(model: str, measurements: pd.DataFrame) -> pd.DataFrame:
    return measurements.assign(model=model)[["model", *measurements.columns]]


def _new_folder(output_dir: Path) -> Path:
    stamp = time.strftime("comparison_%Y%m%d_%H%M%S")
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


def _results_json(
    manifest: Mapping[str, Any], tables: _Tables, cells: pd.DataFrame, words: Mapping[str, list[dict[str, Any]]]
) -> str:
    document = {
        "manifest": manifest,
        "metrics": {
            name: {"unit": metric.unit, "better": metric.better, "label": metric.label}
            for name, metric in METRICS.items()
        },
        **{name: _records(table) for name, table in vars(tables).items()},
        "cells": [{**row, "details": json.loads(row["details"])} for row in _records(cells)],
        **words,
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False, default=str) + "\n"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries, with null where a value is missing."""
    plain = table.astype(object)
    return [{str(k): v for k, v in row.items()} for row in plain.where(plain.notna(), None).to_dict("records")]
