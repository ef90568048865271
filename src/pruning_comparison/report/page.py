"""One self-contained HTML document: verdicts, findings, charts, tables, settings and sample texts.

The document needs no network and no other file. Everything in it that came from a model, a prompt or an option is
escaped, and characters that HTML or UTF-8 cannot carry are replaced, so that no generated text can break the page.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pruning_comparison.analysis import NO_DIFFERENCE, NOT_ENOUGH, HeadMap
from pruning_comparison.errors import InputError
from pruning_comparison.formatting import capitalised
from pruning_comparison.metrics import METRICS
from pruning_comparison.report.answer import Answer
from pruning_comparison.report.between_runs import DifferenceInWords, LimitInWords
from pruning_comparison.report.engines import engine_sentences, engines_table
from pruning_comparison.report.explorer import explorer_data
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.first_screen import (
    effective_settings,
    format_margins,
    model_name,
    notices,
    opening,
    tolerance_of,
)
from pruning_comparison.report.head_tables import head_tables
from pruning_comparison.report.pictures import Chart, inline_svg, report_charts
from pruning_comparison.report.sample_texts import clean, sample_groups
from pruning_comparison.report.tables import (
    agreement_table,
    answers_table,
    equal_table,
    fronts_table,
    method_tables,
    optimum_table,
    pairs,
    plain_table,
    ranking_table,
    strongest_table,
)
from pruning_comparison.report.tasks import task_lines, task_sentences, tasks_table
from pruning_comparison.report.verdicts import Verdict

__all__ = ["render_between_runs", "render_report"]


_COMPARED_ROWS = 2_000
_COMPARED_CHART_BYTES = 1_200_000
_MOST_LINES = 2
_PAGE_BYTES = 2_950_000
_CHART_BYTES = 1_600_000
"""Charts may have what the rest of the page leaves of its size; each other part has a limit of its own."""


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
    answer: Answer,
    relative: pd.DataFrame,
    ranked: pd.DataFrame,
    points: pd.DataFrame | None = None,
    layer_times: pd.DataFrame | None = None,
    engines: pd.DataFrame | None = None,
    tasks: pd.DataFrame | None = None,
    accuracy_lost: pd.DataFrame | None = None,
    hero: str | None,
    drawings: Mapping[str, str],
    manifest: Mapping[str, Any],
    strongest: pd.DataFrame | None = None,
    lines: Sequence[str] = (),
    texts: pd.DataFrame | None = None,
    heads: Sequence[HeadMap] = (),
    agreed: pd.DataFrame | None = None,
) -> str:
    """The whole report as one HTML document under 3 MB that opens offline.

    ``answers``, ``optimal`` and ``equal`` are the tables behind the verdicts (``HYPOTHESIS_COLUMNS``, ``OPTIMUM_COLUMNS``,
    ``EQUAL_COLUMNS``); rows of ``answers`` of kind "exploratory" are shown apart. ``answer`` makes the first screen, with
    ``hero``, its chart, and ``lines``, at most two, under the chips: the only place where anything may be added to it.
    ``relative`` (``RELATIVE_COLUMNS``) and ``ranked`` (``RANKING_COLUMNS``) are drawn and listed. ``hero`` and ``drawings``
    (by name) are SVG files as text.

    ``strongest`` (``STRONGEST_COLUMNS``) names the strongest baseline of each level and what is held against it.

    ``engines`` (``ENGINE_COLUMNS``) is listed where more than one was timed, ``tasks`` (``TASK_COLUMNS``) and what
    ``accuracy_lost`` (``ACCURACY_COLUMNS``) says of them where any was asked; these have a line of the first screen as well.

    ``texts`` holds the generated texts, where they were kept; of these the report shows, per
    method, the first prompts at the level nearest to 50 % and the temperature nearest to 1. ``heads`` are drawn as maps
    that tell about a head when it is pointed at, and ``agreed`` (``AGREEMENT_COLUMNS``) says how far they agree.
    """
    lines = [*lines, *(task_lines(tasks) if tasks is not None else [])]
    if len(lines) > _MOST_LINES:
        raise InputError(
            f"the first screen has room for {_MOST_LINES} lines under the chips, not {len(lines)}: {list(lines)}"
        )
    name = model_name(summary, manifest)
    tables, rows_left_out = method_tables(summary, contrasts)
    samples, samples_left_out = sample_groups(texts)
    drawn, head_data, maps_left_out = head_tables(heads)
    known = relative[(relative["metric"] == "perplexity") & (relative["level"] > 0)]["estimate"].notna().any()
    tolerance = tolerance_of(manifest)
    explorer, explorer_left_out = explorer_data(summary, relative, contrasts, tolerance=tolerance)
    hero_alt = f"Perplexity of {name} relative to the dense model at every level; the numbers are under Measurements."
    warnings = [str(warning) for warning in _sequence(manifest.get("warnings"))]
    exploratory = answers["kind"] == "exploratory"
    values: dict[str, Any] = {
        "scripts": ("vega/vega.js", "templates/script.js", "templates/charts.js"),
        "name": name,
        "answer": answer,
        "lines": lines,
        "hero": inline_svg(hero, "hero-", hero_alt) if hero is not None and known else None,
        "hero_alt": hero_alt,
        "tolerance": None if math.isnan(tolerance) else tolerance,
        "explorer_data": explorer,
        "explorer_left_out": explorer_left_out,
        "ranking": ranking_table(ranked, "method"),
        "strongest": strongest_table(strongest),
        "ranked_variants": ranking_table(ranked, "variant"),
        "started": str(manifest.get("started") or ""),
        "opening": opening(name, summary, cells, manifest),
        "verdicts": [[v for v in verdicts if v.id == key] for key in dict.fromkeys(v.id for v in verdicts)],
        "expert": answers_table(answers[~exploratory], "Estimates, intervals and tests"),
        "exploratory": answers_table(answers[exploratory], "Exploratory contrasts"),
        "optimum": optimum_table(optimal),
        "equal": equal_table(equal),
        "fronts": None if points is None else fronts_table(points),
        "layer_times": None if layer_times is None else plain_table(layer_times, "Layer times by heads of a layer"),
        "engines": engines_table(engines),
        "engine_sentences": [] if engines is None else engine_sentences(engines),
        "tasks": tasks_table(tasks),
        "task_sentences": [] if tasks is None else task_sentences(tasks),
        "accuracy_lost": None
        if accuracy_lost is None or accuracy_lost.empty
        else answers_table(accuracy_lost, "Accuracy lost: estimates, intervals and tests"),
        "margin_words": format_margins(manifest.get("margins")),
        "findings": findings,
        "head_maps": drawn,
        "head_data": head_data,
        "asked": any(one.asked for one in heads),
        "maps_left_out": maps_left_out,
        "agreement": agreement_table(agreed),
        "tables": tables,
        "rows_left_out": rows_left_out,
        "settings": pairs(effective_settings(manifest)),
        "model": pairs(manifest.get("model")),
        "versions": [*pairs(manifest.get("versions")), ("commit", str(manifest.get("commit") or "not recorded"))],
        "hardware": pairs(manifest.get("hardware")),
        "missing": plain_table(missing, "Figures that could not be computed, and why"),
        "failed": plain_table(
            cells.loc[cells["status"] == "failed", ["variant", "method", "iteration", "level", "reason"]],
            "Cells that failed",
        ),
        "warnings": warnings,
        "notices": notices(warnings, missing, cells),
        "samples": samples,
        "samples_left_out": samples_left_out,
        "with_texts": texts is not None,
        "glossary": [
            (metric.label, metric.unit, metric.direction)
            for metric in METRICS.values()
            if (summary["metric"] == metric.name).any()
        ],
    }
    rest = _rendered("report.html", **values, **_chart_values({}, []))
    charts = report_charts(drawings, name, most_bytes=min(_CHART_BYTES, _PAGE_BYTES - len(rest.encode())))
    return _rendered("report.html", **values, **_chart_values(*charts))


def _chart_values(charts: Mapping[str, Chart], left_out: Sequence[str]) -> dict[str, Any]:
    """The charts where the template wants them: the ranking beside its table, those of heads beside the maps."""
    return {
        "ranking_chart": charts.get("rankings"),
        "front_chart": charts.get("fronts"),
        "task_chart": charts.get("tasks"),
        "charts": [
            chart
            for key, chart in charts.items()
            if key not in ("rankings", "fronts", "tasks") and not key.startswith("head_")
        ],
        "head_charts": [chart for key, chart in charts.items() if key.startswith("head_")],
        "charts_left_out": left_out,
    }


def render_between_runs(
    *,
    names: Sequence[str],
    compared: pd.DataFrame,
    findings: Sequence[Finding],
    differences: Sequence[DifferenceInWords],
    limits: Sequence[LimitInWords],
    charts: Mapping[str, tuple[bytes, bytes]],
) -> str:
    """The comparison of several runs as one HTML document under 3 MB that opens offline.

    ``names`` are the folders of the runs. ``compared`` has the columns of ``answers``, "level" and "run". ``charts`` are SVG
    documents by method, for wide screens and for those up to 600 pixels; those that would make the page too large are left
    out, and named.
    """
    kept = compared.head(_COMPARED_ROWS)
    drawn: dict[str, tuple[str, str]] = {}
    used = 0
    for method, pair in charts.items():
        used += sum(map(len, pair)) * 4 // 3
        if used <= _COMPARED_CHART_BYTES:
            drawn[method] = (base64.b64encode(pair[0]).decode(), base64.b64encode(pair[1]).decode())
    tables = [
        answers_table(rows.drop(columns="run"), f"{capitalised(str(run))} against run 1")
        for run, rows in kept.groupby("run", sort=False)
    ]
    return _rendered(
        "between_runs.html",
        scripts=("templates/script.js",),
        names=list(names),
        findings=findings,
        differences=differences,
        limits=limits,
        charts=drawn,
        charts_left_out=[method for method in charts if method not in drawn],
        tables=tables,
        rows_left_out=len(compared) - len(kept),
    )


def _rendered(template: str, *, scripts: Sequence[str], **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("pruning_comparison.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(tied=_tied, css=_css_text, verdict_class=_verdict_class)
    sources = [files("pruning_comparison.report").joinpath(name).read_text("utf-8") for name in scripts]
    hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    page = environment.get_template(template)
    return page.render(scripts=[Markup(source) for source in sources], script_hashes=hashes, **values)


def _css_text(text: str) -> str:
    """A text as it may stand between quotation marks in a style sheet."""
    return "".join(character for character in text if character.isprintable() and character not in "\\'\"<>&;")


def _verdict_class(verdict: str) -> str:
    classes = {NO_DIFFERENCE: "no-difference", NOT_ENOUGH: "not-enough"}
    return classes.get(verdict, verdict)


def _tied(text: str) -> Markup:
    """Keeps a number and its per cent sign, and the name of an option, on one line; escapes everything else."""
    escaped = str(escape(clean(text).replace(" %", "\N{NO-BREAK SPACE}%")))
    return Markup(re.sub(r"--[a-z_]+", r"<code>\g<0></code>", escaped))


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]
