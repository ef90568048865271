"""From a run's journal to what people read: tidy tables, charts and the report. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pruning_comparison import charts, findings, report
from pruning_comparison.errors import StoreError
from pruning_comparison.measure.metrics import METRICS
from pruning_comparison.statistics import CONTRAST_COLUMNS, contrast, missing_figures, summarize
from pruning_comparison.store import RunStore, read_manifest, write_atomically, write_table

REPORT = "report.html"
CHARTS = "charts"


def write_results(folder: Path, *, save_outputs: bool, say: Callable[[str], None] = lambda message: None) -> Path:
    """Writes every table, chart and the report of a run folder anew from its journal; returns the report's path.

    ``summary.csv``, ``contrasts.csv``, ``results.json`` and the tidy tables; ``generated_texts.csv`` only where
    ``save_outputs``. StoreError where nothing has been measured yet.
    """
    manifest = read_manifest(folder)
    with RunStore(folder) as store:
        cells, measurements = store.table("cells"), store.table("measurements")
        heads, texts = store.table("heads"), store.table("texts")
    if cells.empty or not (cells["status"] == "done").any():
        raise StoreError(
            f"{folder} holds no finished cell yet, so there is nothing to report. Run the comparison first."
        )
    model = str(manifest["spec"]["model_name"])
    summary = summarize(model, cells, measurements)
    contrasts = _contrasts(model, manifest["spec"]["variants"], cells, measurements)
    missing = missing_figures(measurements)
    say("drawing the charts")
    plain = findings.plain_findings(summary, contrasts, cells, manifest)
    figures = charts.draw_all(summary, contrasts)

    for name, table in {
        "summary": summary,
        "contrasts": contrasts,
        "cells": cells,
        "measurements": _labelled(model, measurements),
        "heads": heads,
        "missing": missing,
    }.items():
        write_table(folder / f"{name}.csv", table)
    if save_outputs:
        write_table(folder / "generated_texts.csv", texts)
    write_atomically(
        folder / "results.json", _results_json(manifest, summary, contrasts, cells, missing, [vars(f) for f in plain])
    )
    pictures = charts.save_charts(figures, folder / CHARTS)
    say("writing the report")
    html = report.render_report(
        summary=summary,
        contrasts=contrasts,
        cells=cells,
        missing=missing,
        findings=plain,
        pictures=pictures,
        manifest=manifest,
        texts=texts if save_outputs else None,
    )
    write_atomically(folder / REPORT, html)
    return folder / REPORT


def _contrasts(model: str, variants: list[str], cells: pd.DataFrame, measurements: pd.DataFrame) -> pd.DataFrame:
    """Every variant against the baseline, where there is one."""
    others = [variant for variant in variants if variant != "baseline"] if "baseline" in variants else []
    tables = [contrast(model, cells, measurements, variant) for variant in others]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(CONTRAST_COLUMNS))


def _labelled(model: str, measurements: pd.DataFrame) -> pd.DataFrame:
    return measurements.assign(model=model)[["model", *measurements.columns]]


def _results_json(
    manifest: dict[str, Any],
    summary: pd.DataFrame,
    contrasts: pd.DataFrame,
    cells: pd.DataFrame,
    missing: pd.DataFrame,
    plain: list[dict[str, Any]],
) -> str:
    document = {
        "manifest": manifest,
        "metrics": {
            name: {"unit": metric.unit, "better": metric.better, "label": metric.label}
            for name, metric in METRICS.items()
        },
        "summary": _records(summary),
        "contrasts": _records(contrasts),
        "cells": [{**row, "details": json.loads(row["details"])} for row in _records(cells)],
        "missing": _records(missing),
        "findings": plain,
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False, default=str) + "\n"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries, with null where a value is missing."""
    plain = table.astype(object)
    return [{str(k): v for k, v in row.items()} for row in plain.where(plain.notna(), None).to_dict("records")]
