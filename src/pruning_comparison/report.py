"""One self-contained HTML document: verdicts, findings, charts, tables, settings and sample texts.

The document needs no network and no other file. Everything in it that came from a model, a prompt or an option is
escaped, and characters that HTML or UTF-8 cannot carry are replaced, so that no generated text can break the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from pruning_comparison.crossed import Array
from pruning_comparison.findings import Finding, interval_with_unit, plain_number, with_unit
from pruning_comparison.head_maps import HeadMap
from pruning_comparison.measure.metrics import METRICS
from pruning_comparison.two_runs import Difference, LeftOut
from pruning_comparison.verdicts import TITLES, Verdict, interval_shown, shown

__all__ = ["render_comparison", "render_report"]

AGENCY_VS_BASELINE = "agency vs baseline"
_VARIANT_ORDER = ("baseline", "agency")
_MAIN_METRICS = (
    "perplexity",
    "perplexity_ratio",
    "tokens_per_second",
    "first_token_latency_s",
    "generation_perplexity",
    "distinct_2",
    "seq_rep_4",
    "distinct_2_distance",
    "seq_rep_4_distance",
    "peak_memory_bytes",
    "adaptation_s",
)

# The document stays under 3 MB: these parts share it, and each says so when it has to leave something out.
_CHART_BYTES = 800_000
_NARROW_CHART_BYTES = 400_000
_TABLE_BYTES = 600_000
_HEAD_BYTES = 450_000
_COMPARED_ROWS = 2_000
_TEXT_BYTES = 350_000
_PNG_COLOURS = 128
_PROMPTS_PER_METHOD = 5

# Control characters, lone surrogates and noncharacters: HTML forbids them, and surrogates cannot be encoded at all.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class _Picture:
    """A PNG in base 64, and its width and height in pixels of 100 to the inch, which is how wide it is to be shown."""

    data: str
    width: int
    height: int


@dataclass(frozen=True)
class _Chart:
    heading: str
    reading: str
    alt: str
    wide: _Picture
    narrow: _Picture | None


@dataclass(frozen=True)
class _Cell:
    """One table cell: what is shown, a second line in small print, what it sorts by, and a word for its style."""

    text: str
    small: str = ""
    sort: str = ""
    tone: str = ""


@dataclass(frozen=True)
class _Row:
    heading: _Cell
    cells: tuple[_Cell, ...]


@dataclass(frozen=True)
class _Table:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[_Row, ...]


@dataclass(frozen=True)
class _MethodTables:
    method: str
    main: _Table
    other: _Table | None


@dataclass(frozen=True)
class _HeadCell:
    """A head on a map: what is written on it, the level at which it goes, and which of ten shades it has."""

    text: str
    gone: str
    shade: int | None


@dataclass(frozen=True)
class _HeadTable:
    caption: str
    heads: int
    rows: tuple[tuple[_HeadCell, ...], ...]
    views: tuple[str, ...]


@dataclass(frozen=True)
class _Sample:
    prompt: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _SampleGroup:
    method: str
    level: float
    temperature: float | None
    samples: tuple[_Sample, ...]


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

    ``answers``, ``optimal`` and ``equal`` are the tables behind the verdicts (``ANSWER_COLUMNS``, ``OPTIMUM_COLUMNS``,
    ``EQUAL_COLUMNS``); rows of ``answers`` of kind "exploratory" are shown apart. ``pictures`` are the charts as PNG, 150
    dots per inch, by name; screens up to 600 pixels wide show those of ``narrow_pictures`` instead.

    ``texts`` holds the generated texts, where they were kept; of these the report shows, per
    method, the first prompts at the level nearest to 50 % and the temperature nearest to 1. ``heads`` are drawn as maps
    that tell about a head when it is pointed at, and ``agreed`` (``AGREEMENT_COLUMNS``) says how far they agree.
    """
    name = _model_name(summary, manifest)
    tables, rows_left_out = _method_tables(summary, contrasts)
    samples, samples_left_out = _sample_groups(texts)
    drawn, head_data, maps_left_out = _head_tables(heads)
    charts = _charts(pictures, narrow_pictures or {}, name)
    warnings = [str(warning) for warning in _sequence(manifest.get("warnings"))]
    exploratory = answers["kind"] == "exploratory"
    return _rendered(
        "report_template.html",
        name=name,
        started=str(manifest.get("started") or ""),
        opening=_opening(name, summary, cells, manifest),
        verdicts=[[v for v in verdicts if v.id == key] for key in dict.fromkeys(v.id for v in verdicts)],
        expert=_answer_table(answers[~exploratory], "Estimates, intervals and tests"),
        exploratory=_answer_table(answers[exploratory], "Exploratory contrasts"),
        optimum=_optimum_table(optimal),
        equal=_equal_table(equal),
        margin_words=_margin_words(manifest.get("margins")),
        findings=findings,
        charts=[chart for key, chart in charts.items() if not key.startswith("head_")],
        head_charts=[chart for key, chart in charts.items() if key.startswith("head_")],
        head_maps=drawn,
        head_data=head_data,
        asked=any(one.asked for one in heads),
        maps_left_out=maps_left_out,
        agreement=_agreement_table(agreed),
        tables=tables,
        rows_left_out=rows_left_out,
        settings=_pairs(manifest.get("spec")),
        model=_pairs(manifest.get("model")),
        versions=[*_pairs(manifest.get("versions")), ("commit", str(manifest.get("commit") or "not recorded"))],
        hardware=_pairs(manifest.get("hardware")),
        missing=_plain_table(missing, "Figures that could not be computed, and why"),
        failed=_plain_table(
            cells.loc[cells["status"] == "failed", ["variant", "method", "iteration", "level", "reason"]],
            "Cells that failed",
        ),
        warnings=warnings,
        notices=_notices(warnings, missing, cells),
        samples=samples,
        samples_left_out=samples_left_out,
        with_texts=texts is not None,
        glossary=[
            (metric.label, metric.unit, metric.better)
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
        "comparison_template.html",
        first=names[0],
        second=names[1],
        findings=findings,
        differences=differences,
        limits=limits,
        compared=_answer_table(kept, "The second run against the first"),
        rows_left_out=len(compared) - len(kept),
    )


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("pruning_comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = _tied
    script = files("pruning_comparison").joinpath("report_script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_hash=digest, **values)


def _clean(value: Any) -> Any:
    """Replace what HTML or UTF-8 cannot carry; what is already markup was built here and stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value.replace("\r\n", "\n").replace("\r", "\n"))


def _tied(text: str) -> str:
    """Keep a number and its per cent sign on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


# Opening


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
            f"{_value_words(model[key])} {key}"
            for key in ("layers", "heads", "parameters")
            if key in model and model[key] is not None
        ]
        size = f" ({', '.join(parts)})" if parts else ""
    if not methods:
        return f"{name}{size}: nothing was measured."
    iterations = cells["iteration"].nunique()
    text = (
        f"{name}{size} was measured with {_listed([f'{level:g}' for level in levels])} % of its attention heads "
        f"pruned, ranked by {_listed(methods)}, as {_listed([str(v) for v in _variants(summary)])}, in {iterations} "
        f"iteration{'' if iterations == 1 else 's'}."
    )
    quality = summary[summary["metric"] == "perplexity"]
    for method in methods if len(methods) <= 2 else ():
        told = []
        for variant in _VARIANT_ORDER:
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


# Charts

_CHART_WORDS = {
    "speed_comparison": (
        "Speed",
        "Left: tokens per second; the dotted line is what the bytes left would allow. Middle: the wait for the first "
        "token. Right: who is faster at the same perplexity: further up and further left is better.",
    ),
    "quality_metrics": (
        "Quality",
        "Perplexity is better the lower it is. Diversity and repetition are best near the unpruned model's value.",
    ),
    "relative_improvement": (
        "Relative improvement",
        "Above the zero line agency is better than the baseline, below it worse. Where a bar crosses the line, the "
        "data do not tell.",
    ),
    "radar": (
        "All sides at the highest level",
        "The ring at 100 % is the baseline. Outward is better for agency. The dots repeat the numbers, sorted.",
    ),
    "temperature": (
        "Sampling temperature",
        "One row of panels per temperature. The dotted line is the unpruned model at that temperature.",
    ),
    "comprehensive_summary": ("Everything on one page", "Every measurement, a panel each."),
    "head_departures": (
        "Who leaves when",
        "Each square is a head; its colour is the level at which it goes. Grey heads stay. A dot: it refused at least "
        "once. A cross: it was overridden.",
    ),
    "head_values": ("Scores and signals", "What was measured of every head of the unpruned model."),
    "head_negotiation": (
        "The negotiation, round by round",
        "Which heads were asked in each round, who consented, refused or was overridden, in the first iteration.",
    ),
    "head_agreement": (
        "How far choices agree",
        "Left: how many of the heads gone in one choice are gone in the other too. Right: rank correlation of the scores.",
    ),
}


def _charts(pictures: Mapping[str, bytes], narrow: Mapping[str, bytes], name: str) -> dict[str, _Chart]:
    wide = _fitting(pictures, _CHART_BYTES, least=0.2)
    small = _fitting(narrow, _NARROW_CHART_BYTES, least=2 / 3)
    charts = {}
    for key, picture in wide.items():
        stem = next((known for known in _CHART_WORDS if key.startswith(known)), None)
        heading, reading = _CHART_WORDS[stem] if stem else (key.replace("_", " "), "")
        method = key[len(stem) :].strip("_") if stem else ""
        heading = f"{heading}: {method}" if method else heading
        charts[key] = _Chart(
            heading,
            reading,
            f"Chart for {name}: {heading}. {reading} The numbers are in the tables of this report.",
            picture,
            small.get(key),
        )
    return charts


def _fitting(pictures: Mapping[str, bytes], most_bytes: int, *, least: float) -> dict[str, _Picture]:
    """The pictures at the largest scale at which they fit together.

    At the scale ``least`` the smallest ones are kept, as many as fit, but none is left out where ``least`` is below 100
    dots per inch, since there is nothing else to show.
    """
    scale = 1.0
    smaller = {key: _small_png(png, scale) for key, png in pictures.items()}
    while sum(len(png) for png, _ in smaller.values()) > most_bytes and scale > least:
        scale = max(least, 0.8 * scale)
        smaller = {key: _small_png(png, scale) for key, png in pictures.items()}
    kept, used = {}, 0
    for key, (png, size) in sorted(smaller.items(), key=lambda item: len(item[1][0])):
        used += len(png)
        if used <= most_bytes or least < 2 / 3:
            kept[key] = _Picture(base64.b64encode(png).decode(), *size)
    return {key: kept[key] for key in pictures if key in kept}


def _small_png(png: bytes, scale: float) -> tuple[bytes, tuple[int, int]]:
    """The chart with a palette instead of full colour: a third of the size, and no difference to the eye.

    Also its width and height in pixels of 100 to the inch, which is how wide it is to be shown.
    """
    with Image.open(io.BytesIO(png)) as picture:
        shown = (round(picture.width / 1.5), round(picture.height / 1.5))
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        colours = picture.convert("RGB")
        small = colours if scale == 1 else colours.resize(size, Image.Resampling.LANCZOS)
        reduced = small.quantize(_PNG_COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    reduced.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), shown


# Head maps


def _head_tables(maps: Sequence[HeadMap]) -> tuple[list[_HeadTable], Markup, int]:
    """The maps that fit, the data behind them as JSON that is safe inside a script element, and how many did not fit."""
    tables, data = [], []
    left = _HEAD_BYTES
    for one in maps:
        levels = [level for level in one.levels if level > 0]
        views = [(name.replace("_", " "), _plain_values(values)) for name, values in one.values.items()]
        told: dict[str, Any] = {
            "heads": one.gone_at.shape[1],
            "iterations": [_plain_values(values) for values in one.by_iteration],
            "views": [{"name": name, "values": values} for name, values in views],
        }
        if one.asked:
            told["refused"], told["overridden"] = (_plain_values(grid) for grid in (one.refused, one.overridden))
        text = json.dumps(told, separators=(",", ":"), allow_nan=False)
        left -= len(text) + 55 * one.gone_at.size
        if left < 0:
            continue
        rows = tuple(
            tuple(
                _head_cell(float(level), levels, bool(refused), bool(overridden))
                for level, refused, overridden in zip(*parts, strict=True)
            )
            for parts in zip(one.gone_at, one.refused, one.overridden, strict=True)
        )
        caption = f"{one.variant}, {one.method}: goes at, %"
        tables.append(_HeadTable(caption, one.gone_at.shape[1], rows, tuple(name for name, _ in views)))
        data.append(text)
    safe = f"[{','.join(data)}]".replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return tables, Markup(safe), len(maps) - len(tables)


def _head_cell(level: float, levels: Sequence[float], refused: bool, overridden: bool) -> _HeadCell:
    mark = "×" if overridden else "·" if refused else ""
    if math.isinf(level):
        return _HeadCell(f"–{mark}", "", None)
    return _HeadCell(f"{level:g}{mark}", f"{level:g}", round(9 * levels.index(level) / max(1, len(levels) - 1)))


def _plain_values(values: Array) -> list[float | None]:
    """Numbers of three digits, row by row; None for what is not finite."""
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values.ravel()]


def _agreement_table(agreed: pd.DataFrame | None) -> _Table | None:
    if agreed is None or agreed.empty:
        return None
    rows = []
    for row in _records(agreed):
        one, two = f"{row['variant']}, {row['method']}", f"{row['other_variant']}, {row['other_method']}"
        pair = f"{one}: iterations" if row["kind"] == "iterations" else f"{one} and {two}"
        correlation = float(row["score_correlation"])
        rows.append(
            _Row(
                _Cell(pair),
                (
                    _Cell(f"{row['level']:g} %", sort=f"{row['level']:g}"),
                    _Cell(f"{100 * row['common']:.0f} %", sort=_sort_words(row["common"])),
                    _Cell(f"{100 * row['chance']:.0f} %", sort=_sort_words(row["chance"])),
                    _Cell("" if math.isnan(correlation) else f"{correlation:.2f}", sort=_sort_words(correlation)),
                    _Cell(str(int(row["n"]))),
                ),
            )
        )
    columns = ("Compared", "Level", "Gone in common", "By chance", "Rank correlation of scores", "Pairs")
    return _Table("How far choices of heads agree", columns, tuple(rows[:400]))


# Verdicts


def _answer_table(answers: pd.DataFrame, caption: str) -> _Table | None:
    """Every row of answers with all its figures; columns that would be empty or all alike are left out."""
    rows = _records(answers)
    if not rows:
        return None
    several = {
        column: answers[column].nunique(dropna=False) > 1
        for column in ("model", "method", "variant", "level", "temperature", "contrast")
        if column in answers
    }
    varying = [column for column, differs in several.items() if differs]
    columns = (
        "Asked", *(column.capitalize() for column in varying), "Estimate", "What is estimated", "Margin", "n",
        "p, corrected", "Smallest p", "Effect size", "Verdict",
    )  # fmt: skip
    return _Table(caption, columns, tuple(_answer_row(row, varying) for row in rows))


def _answer_row(row: Mapping[str, Any], varying: Sequence[str]) -> _Row:
    metric = METRICS[row["metric"]].label if row["metric"] in METRICS else str(row["metric"])
    title = TITLES.get(str(row["id"]))
    effect, low, high = (float(row[name]) for name in ("effect_size", "effect_size_low", "effect_size_high"))
    n = "" if pd.isna(row["n"]) else f"{int(row['n'])}"
    crossed = (
        f"{int(row['n_iterations'])} × {int(row['n_units'])} {row['unit_name']}s"
        if not (pd.isna(row["n_iterations"]) or pd.isna(row["n_units"]))
        else ""
    )
    return _Row(
        _Cell(f"{title}: {metric}" if title else metric),
        (
            *(_place_cell(row, column) for column in varying),
            _Cell(shown(row, "estimate"), interval_shown(row), _sort_words(row["estimate"]))
            if not pd.isna(row["estimate"])
            else _Cell("missing", tone="muted"),
            _Cell(str(row["estimand"]), tone="wide"),
            _Cell("" if pd.isna(row["margin"]) else shown(row, "margin"), sort=_sort_words(row["margin"])),
            _Cell(n, crossed, n),
            _Cell(_p_words(row["p_holm"]), f"uncorrected {_p_words(row['p'])}", _sort_words(row["p_holm"])),
            _Cell(
                "no limit" if row["smallest_p"] == 0 else _p_words(row["smallest_p"]),
                str(row["test"] or ""),
                _sort_words(row["smallest_p"]),
            ),
            _Cell(
                "" if math.isnan(effect) else plain_number(effect),
                "" if math.isnan(low) or math.isnan(high) else interval_with_unit(low, high, "1"),
                _sort_words(effect),
            ),
            _verdict_cell(row),
        ),
    )


def _verdict_cell(row: Mapping[str, Any]) -> _Cell:
    """The verdict and why; for an exploratory contrast, which is no verdict, only which way it goes."""
    verdict, reason = str(row["verdict"]), str(row["reason"] or "")
    if row["kind"] == "exploratory":
        word = "open" if verdict == "inconclusive" else reason
        return _Cell(word, str(row.get("note") or ""), tone=word if word in ("better", "worse") else "muted")
    return _Cell(verdict, reason, tone=verdict)


def _place_cell(row: Mapping[str, Any], column: str) -> _Cell:
    value = row[column]
    if pd.isna(value):
        return _Cell("")
    if column == "level":
        return _Cell(f"{value:g} %", sort=f"{value:g}")
    return _Cell(f"{value:g}" if isinstance(value, float) else str(value))


def _p_words(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return "< 0.001" if value < 0.001 else plain_number(float(value))


def _optimum_table(optimal: pd.DataFrame) -> _Table | None:
    if optimal.empty:
        return None
    several = optimal["method"].nunique() > 1
    rows = []
    for row in _records(optimal):
        level, share, knee = (float(row[name]) for name in ("highest_level", "share", "knee_level"))
        n = "" if pd.isna(row["n"]) else str(int(row["n"]))
        rows.append(
            _Row(
                _Cell(str(row["variant"])),
                (
                    *([_Cell(str(row["method"]))] if several else []),
                    _Cell("unknown", str(row["reason"] or ""), tone="muted")
                    if math.isnan(level)
                    else _Cell(f"{level:g} %", sort=f"{level:g}"),
                    _Cell("" if math.isnan(share) else f"{100 * share:.0f} %", sort=_sort_words(share)),
                    _Cell("none" if math.isnan(knee) else f"{knee:g} %", sort=_sort_words(knee)),
                    _Cell(n),
                ),
            )
        )  # fmt: skip
    tolerance = 100 * float(optimal["tolerance"].iloc[0])
    return _Table(
        f"Optimal level: the highest at which perplexity rises by less than {tolerance:g} %, with 95 % confidence",
        (
            "Variant",
            *(["Method"] if several else []),
            "Highest level",
            "Share of resamples that choose it",
            "Knee",
            "n",
        ),
        tuple(rows),
    )


def _equal_table(equal: pd.DataFrame) -> _Table | None:
    if equal.empty:
        return None
    several = equal["method"].nunique() > 1
    rows = []
    for row in _records(equal):
        ratio, low, high = (float(row[name]) for name in ("speed_ratio", "ci_low", "ci_high"))
        n = "" if pd.isna(row["n"]) else str(int(row["n"]))
        rows.append(
            _Row(
                _Cell(plain_number(float(row["perplexity"])), sort=_sort_words(row["perplexity"])),
                (
                    *([_Cell(str(row["method"]))] if several else []),
                    *(
                        _Cell("" if pd.isna(row[name]) else f"{row[name]:.3g} %", sort=_sort_words(row[name]))
                        for name in ("baseline_level", "agency_level")
                    ),
                    _Cell(
                        plain_number(ratio) if math.isfinite(ratio) else str(row["reason"] or "missing"),
                        "" if math.isnan(low) or math.isnan(high) else interval_with_unit(low, high, "1"),
                        _sort_words(ratio),
                    ),
                    _Cell(n),
                ),
            )
        )
    return _Table(
        "Speed at equal perplexity, interpolated between the levels measured",
        (
            "Perplexity", *(["Method"] if several else []), "Baseline reaches it at", "Agency reaches it at",
            "Agency's speed over the baseline's", "n",
        ),
        tuple(rows),
    )  # fmt: skip


def _margin_words(margins: Any) -> str:
    """The margins that the verdicts used, in the units of their options."""
    if not isinstance(margins, Mapping):
        return ""
    return (
        f"Differences of less than {100 * margins['speed']:g} % of speed, {100 * margins['quality']:g} % of perplexity, "
        f"{margins['diversity']:g} in distance of distinct-2 and {100 * margins['latency']:g} % of latency count as none; "
        f"the optimal level may lose {100 * margins['tolerance']:g} % of perplexity."
    )


# Tables


def _variants(table: pd.DataFrame) -> list[str]:
    present = [str(variant) for variant in table["variant"].dropna().unique()]
    return [name for name in _VARIANT_ORDER if name in present] + sorted(set(present) - set(_VARIANT_ORDER))


def _method_tables(summary: pd.DataFrame, contrasts: pd.DataFrame) -> tuple[list[_MethodTables], int]:
    """The tables of each method, and how many rows did not fit. Main measurements of all methods come first."""
    methods = [str(method) for method in summary["method"].dropna().unique()]
    others = [name for name in summary["metric"].dropna().unique() if name not in _MAIN_METRICS]
    order = [name for name in METRICS if name in others] + sorted(str(name) for name in others if name not in METRICS)
    main = {method: _rows(summary, contrasts, method, _MAIN_METRICS) for method in methods}
    other = {method: _rows(summary, contrasts, method, order) for method in methods}
    left = _TABLE_BYTES
    left_out = 0
    for group in (main, other):
        for method, rows in group.items():
            kept = []
            for row in rows:
                left -= _row_size(row)
                if left > 0:
                    kept.append(row)
            left_out += len(rows) - len(kept)
            group[method] = kept
    variants = _variants(summary)
    columns = ("Measurement", "Level", "Temperature", *variants, "difference", "n")
    note = "estimate, with its 95 % interval below"
    return [
        _MethodTables(
            method,
            _Table(f"{method}: main measurements ({note})", columns, tuple(main[method])),
            _Table(f"{method}: all other measurements ({note})", columns, tuple(other[method]))
            if other[method]
            else None,
        )
        for method in methods
    ], left_out


def _row_size(row: _Row) -> int:
    return 40 + sum(60 + len(cell.text) + len(cell.small) + len(cell.sort) for cell in (row.heading, *row.cells))


def _rows(summary: pd.DataFrame, contrasts: pd.DataFrame, method: str, metrics: Sequence[str]) -> list[_Row]:
    variants = _variants(summary)
    keys = ["metric", "level", "temperature"]
    ours = summary[summary["method"] == method]
    estimates = {(*_key(row, keys), row["variant"]): row for row in _records(ours)}
    compared = contrasts[(contrasts["method"] == method) & (contrasts["contrast"] == AGENCY_VS_BASELINE)]
    differences = {_key(row, keys): row for row in _records(compared)}
    wanted = {name: index for index, name in enumerate(metrics)}
    places = {key[:3] for key in estimates if key[0] in wanted}
    rows = []
    for place in sorted(places, key=lambda key: (wanted[key[0]], key[2] is not None, key[2] or 0.0, key[1])):
        metric, level, temperature = place
        found = [estimates.get((*place, variant)) for variant in variants]
        counts = sorted({int(row["n"]) for row in found if row is not None and not pd.isna(row["n"])})
        rows.append(
            _Row(
                _Cell(METRICS[metric].label if metric in METRICS else str(metric)),
                (
                    _Cell(f"{level:g} %", sort=f"{level:g}"),
                    _Cell("" if temperature is None else f"{temperature:g}"),
                    *(_estimate_cell(row) for row in found),
                    _difference_cell(differences.get(place)),
                    _Cell(" / ".join(str(count) for count in counts), sort=str(counts[0]) if counts else ""),
                ),
            )
        )
    return rows


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(row[key]) else row[key] for key in keys)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _estimate_cell(row: Mapping[str, Any] | None) -> _Cell:
    if row is None:
        return _Cell("not measured", tone="muted")
    estimate, unit = float(row["estimate"]), str(row["unit"])
    if math.isnan(estimate):
        return _Cell("missing", tone="muted")
    return _Cell(with_unit(estimate, unit), _interval_words(row, unit), f"{estimate:.10g}")


def _interval_words(row: Mapping[str, Any], unit: str) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return interval_with_unit(low, high, unit)


def _difference_cell(row: Mapping[str, Any] | None) -> _Cell:
    """The difference, its interval, and in a word whether it is better, worse, or not told by the data."""
    if row is None or math.isnan(float(row["estimate"])):
        return _Cell("")
    estimate, unit = float(row["estimate"]), str(row["unit"])
    low, high = float(row["ci_low"]), float(row["ci_high"])
    sign = "+" if estimate > 0 else ""
    small = _interval_words(row, unit)
    tone, verdict = "", ""
    if low > 0 or high < 0:
        direction = "higher" if low > 0 else "lower"
        if row["better"] in ("higher", "lower"):
            tone = "better" if row["better"] == direction else "worse"
        verdict = tone or direction
    elif not (math.isnan(low) or math.isnan(high)):
        verdict = "not told"
    shown = f"{sign}{with_unit(estimate, unit)}"
    return _Cell(f"{shown}, {verdict}" if verdict else shown, small, f"{estimate:.10g}", tone)


def _plain_table(table: pd.DataFrame, caption: str) -> _Table | None:
    if table.empty:
        return None
    columns = [str(column) for column in table.columns]
    rows = []
    for record in _records(table.head(500)):
        first, *rest = (_Cell(_value_words(record[column]), sort=_sort_words(record[column])) for column in columns)
        rows.append(_Row(first, tuple(rest)))
    shown = f" (the first 500 of {len(table)})" if len(table) > 500 else ""
    return _Table(caption + shown, tuple(column.replace("_", " ") for column in columns), tuple(rows))


def _sort_words(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, (int, float)) and math.isfinite(value) else ""


def _value_words(value: Any) -> str:
    """A setting or figure as a reader would write it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, (list, tuple)) and all(not isinstance(part, (list, tuple, Mapping)) for part in value):
        return ", ".join(_value_words(part) for part in value) or "none"
    if isinstance(value, (list, tuple, Mapping)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _pairs(values: Any) -> list[tuple[str, str]]:
    return [(str(key), _value_words(value)) for key, value in values.items()] if isinstance(values, Mapping) else []


# Sample texts


def _sample_groups(texts: pd.DataFrame | None) -> tuple[list[_SampleGroup], int]:
    """Per method the same prompts continued by the dense, baseline and agency model, and how many did not fit."""
    if texts is None or texts.empty:
        return [], 0
    groups = []
    left = _TEXT_BYTES
    left_out = 0
    for method in texts["method"].dropna().unique():
        ours = texts[(texts["method"] == method) & texts["variant"].isin(_VARIANT_ORDER)]
        levels = [float(level) for level in ours["level"].dropna().unique() if level > 0]
        if not levels:
            continue
        complete = [level for level in levels if ours.loc[ours["level"] == level, "variant"].nunique() == 2]
        level = min(complete or levels, key=lambda value: (abs(value - 50), value))
        temperatures = [float(value) for value in ours["temperature"].dropna().unique()]
        temperature = min(temperatures, key=lambda value: (abs(value - 1), value)) if temperatures else None
        chosen = ours if temperature is None else ours[ours["temperature"] == temperature]
        chosen = chosen[chosen["iteration"] == chosen["iteration"].min()]
        samples = []
        for prompt in chosen["prompt"].unique()[:_PROMPTS_PER_METHOD]:
            of_prompt = chosen[chosen["prompt"] == prompt]
            sample = _sample(of_prompt, str(of_prompt["prompt_text"].iloc[0]), level)
            left -= sum(
                len(escape(_clean(text)).encode()) + 200 for text in (sample.prompt, *dict(sample.versions).values())
            )
            if left > 0:
                samples.append(sample)
            else:
                left_out += 1
        if samples:
            groups.append(_SampleGroup(str(method), level, temperature, tuple(samples)))
    return groups, left_out


def _sample(rows: pd.DataFrame, prompt: str, level: float) -> _Sample:
    wanted = (
        ("unpruned (level 0)", rows["level"] == 0),
        *(
            (f"{variant} at {level:g} %", (rows["level"] == level) & (rows["variant"] == variant))
            for variant in _VARIANT_ORDER
        ),
    )
    versions = []
    for label, where in wanted:
        found = rows.loc[where, "text"].dropna()
        versions.append((label, str(found.iloc[0]) if len(found) else "(no text was kept)"))
    return _Sample(prompt, tuple(versions))
