"""One self-contained HTML document: verdicts, findings, charts, tables, settings and sample texts.

The document needs no network and no other file. Everything in it that came from a model, a prompt or an option is
escaped, and characters that HTML or UTF-8 cannot carry are replaced, so that no generated text can break the page.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pruning_comparison.analysis.head_maps import HeadMap
from pruning_comparison.formatting import plain_number
from pruning_comparison.metrics import METRICS
from pruning_comparison.report.between_runs import Difference, LeftOut
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.head_tables import head_tables
from pruning_comparison.report.pictures import report_charts
from pruning_comparison.report.sample_texts import clean, sample_groups
from pruning_comparison.report.tables import (
    agreement_table,
    equal_table,
    format_value,
    hypothesis_table,
    method_tables,
    optimum_table,
    pairs,
    plain_table,
    variants_in,
)
from pruning_comparison.report.verdicts import Verdict
from pruning_comparison.variants import PRIMARY

__all__ = ["render_comparison", "render_report"]


_COMPARED_ROWS = 2_000


def render_report(
    *,
    summary: pd.DataFrame,
    contrasts: pd.DataFrame,
    cells: pd.DataFrame,
    missing: pd.DataFrame,
    verdicts: Sequence[Verdict],
    answers: pd.DataFrame,
    optimal: pd.DataFrame,
    equal: pd.DataFrame,
    findings: Sequence[Finding],
    pictures: Mapping[str, bytes],
    manifest: Mapping[str, Any],
    narrow_pictures: Mapping[str, bytes] | None = None,
    texts: pd.DataFrame | None = None,
    heads: Sequence[HeadMap] = (),
    agreed: pd.DataFrame | None = None,
) -> str:
    """The whole report as one HTML document under 3 MB that opens offline.

    ``answers``, ``optimal`` and ``equal`` are the tables behind the verdicts (``HYPOTHESIS_COLUMNS``, ``OPTIMUM_COLUMNS``,
    ``EQUAL_COLUMNS``); rows of ``answers`` of kind "exploratory" are shown apart. ``pictures`` are the charts as PNG, 150
    dots per inch, by name; screens up to 600 pixels wide show those of ``narrow_pictures`` instead.

    ``texts`` holds the generated texts, where they were kept; of these the report shows, per
    method, the first prompts at the level nearest to 50 % and the temperature nearest to 1. ``heads`` are drawn as maps
    that tell about a head when it is pointed at, and ``agreed`` (``AGREEMENT_COLUMNS``) says how far they agree.
    """
    name = _model_name(summary, manifest)
    tables, rows_left_out = method_tables(summary, contrasts)
    samples, samples_left_out = sample_groups(texts)
    drawn, head_data, maps_left_out = head_tables(heads)
    charts = report_charts(pictures, narrow_pictures or {}, name)
    warnings = [str(warning) for warning in _sequence(manifest.get("warnings"))]
    exploratory = answers["kind"] == "exploratory"
    return _rendered(
        "report.html",
        name=name,
        started=str(manifest.get("started") or ""),
        opening=_opening(name, summary, cells, manifest),
        verdicts=[[v for v in verdicts if v.id == key] for key in dict.fromkeys(v.id for v in verdicts)],
        expert=hypothesis_table(answers[~exploratory], "Estimates, intervals and tests"),
        exploratory=hypothesis_table(answers[exploratory], "Exploratory contrasts"),
        optimum=optimum_table(optimal),
        equal=equal_table(equal),
        margin_words=_format_margins(manifest.get("margins")),
        findings=findings,
        charts=[chart for key, chart in charts.items() if not key.startswith("head_")],
        head_charts=[chart for key, chart in charts.items() if key.startswith("head_")],
        head_maps=drawn,
        head_data=head_data,
        asked=any(one.asked for one in heads),
        maps_left_out=maps_left_out,
        agreement=agreement_table(agreed),
        tables=tables,
        rows_left_out=rows_left_out,
        settings=pairs(manifest.get("spec")),
        model=pairs(manifest.get("model")),
        versions=[*pairs(manifest.get("versions")), ("commit", str(manifest.get("commit") or "not recorded"))],
        hardware=pairs(manifest.get("hardware")),
        missing=plain_table(missing, "Figures that could not be computed, and why"),
        failed=plain_table(
            cells.loc[cells["status"] == "failed", ["variant", "method", "iteration", "level", "reason"]],
            "Cells that failed",
        ),
        warnings=warnings,
        notices=_notices(warnings, missing, cells),
        samples=samples,
        samples_left_out=samples_left_out,
        with_texts=texts is not None,
        glossary=[
            (metric.label, metric.unit, metric.direction)
            for metric in METRICS.values()
            if (summary["metric"] == metric.name).any()
        ],
    )


def render_comparison(
    *,
    names: tuple[str, str],
    compared: pd.DataFrame,
    findings: Sequence[Finding],
    differences: Sequence[Difference],
    limits: Sequence[LeftOut],
) -> str:
    """The comparison of two runs as one HTML document under 3 MB that opens offline.

    ``names`` are the folders of the first and the second run. ``compared`` has the columns of ``answers`` and "level".
    """
    kept = compared.head(_COMPARED_ROWS)
    return _rendered(
        "between_runs.html",
        first=names[0],
        second=names[1],
        findings=findings,
        differences=differences,
        limits=limits,
        compared=hypothesis_table(kept, "The second run against the first"),
        rows_left_out=len(compared) - len(kept),
    )


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("pruning_comparison.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = _tied
    script = files("pruning_comparison.report").joinpath("templates/script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_hash=digest, **values)


def _tied(text: str) -> str:
    """Keep a number and its per cent sign on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _model_name(summary: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    model = manifest.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    known = summary["model"].dropna()
    return str(name) if name else str(known.iloc[0]) if len(known) else "unnamed model"


def _opening(name: str, summary: pd.DataFrame, cells: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """What was compared, in one paragraph, with the perplexities at the highest level and no claim beyond them."""
    methods = [str(method) for method in summary["method"].dropna().unique()]
    levels = sorted(float(level) for level in summary["level"].dropna().unique())
    model = manifest.get("model")
    size = ""
    if isinstance(model, Mapping):
        parts = [
            f"{format_value(model[key])} {key}"
            for key in ("layers", "heads", "parameters")
            if key in model and model[key] is not None
        ]
        size = f" ({', '.join(parts)})" if parts else ""
    if not methods:
        return f"{name}{size}: nothing was measured."
    iterations = cells["iteration"].nunique()
    text = (
        f"{name}{size} was measured with {_listed([f'{level:g}' for level in levels])} % of its attention heads "
        f"pruned, ranked by {_listed(methods)}, as {_listed([str(v) for v in variants_in(summary)])}, in {iterations} "
        f"iteration{'' if iterations == 1 else 's'}."
    )
    quality = summary[summary["metric"] == "perplexity"]
    for method in methods if len(methods) <= 2 else ():
        told = []
        for variant in PRIMARY[::-1]:
            rows = quality[(quality["method"] == method) & (quality["variant"] == variant)].dropna(subset=["estimate"])
            if not rows.empty:
                row = rows.sort_values("level").iloc[-1]
                told.append(f"{plain_number(float(row['estimate']))} for the {variant} model at {row['level']:g} %")
        dense = quality[(quality["method"] == method) & (quality["variant"] == "baseline") & (quality["level"] == 0)][
            "estimate"
        ].dropna()
        if told:
            before = f" (unpruned: {plain_number(float(dense.iloc[0]))})" if len(dense) else ""
            text += f" With {method}, perplexity is {_listed(told)}{before}."
    return text


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else "nothing"


def _notices(warnings: Sequence[str], missing: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    failed = int((cells["status"] == "failed").sum())
    found = [
        (len(warnings), "warning"),
        (len(missing), "kind of missing figure" if len(missing) == 1 else "kinds of missing figures"),
        (failed, "failed cell"),
    ]
    return [f"{count} {word}{'' if count == 1 or 'figures' in word else 's'}" for count, word in found if count]


def _format_margins(margins: Any) -> str:
    """The margins that the verdicts used, in the units of their options."""
    if not isinstance(margins, Mapping):
        return ""
    return (
        f"Differences of less than {100 * margins['speed']:g} % of speed, {100 * margins['quality']:g} % of perplexity, "
        f"{margins['diversity']:g} in distance of distinct-2 and {100 * margins['latency']:g} % of latency count as none; "
        f"the optimal level may lose {100 * margins['tolerance']:g} % of perplexity."
    )
