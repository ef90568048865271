"""Tables of the report: rows and cells of text, from tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.analysis import NOT_ENOUGH, QUESTIONS
from pruning_comparison.formatting import counted, format_value, interval_with_unit, per_cent, plain_number, with_unit
from pruning_comparison.metrics import METRICS, in_role, metric_named
from pruning_comparison.report.answer import format_times
from pruning_comparison.report.rows import rows_of
from pruning_comparison.report.verdicts import interval_shown, shown
from pruning_comparison.variants import AGENCY_VS_BASELINE, variant_order

_TABLE_BYTES = 450_000


@dataclass(frozen=True)
class TableCell:
    """One table cell: what is shown, a second line in small print, what it sorts by, and a word for its style."""

    text: str
    small: str = ""
    sort: str = ""
    tone: str = ""


@dataclass(frozen=True)
class TableRow:
    heading: TableCell
    cells: tuple[TableCell, ...]


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class MethodTables:
    method: str
    main: Table
    other: Table | None


def agreement_table(agreed: pd.DataFrame | None) -> Table | None:
    if agreed is None or agreed.empty:
        return None
    rows = []
    for row in rows_of(agreed):
        one, two = f"{row['variant']}, {row['method']}", f"{row['other_variant']}, {row['other_method']}"
        pair = f"{one}: iterations" if row["kind"] == "iterations" else f"{one} and {two}"
        correlation = float(row["score_correlation"])
        rows.append(
            TableRow(
                TableCell(pair),
                (
                    TableCell(per_cent(row["level"]), sort=f"{row['level']:g}"),
                    TableCell(f"{100 * row['common']:.0f} %", sort=sort_key(row["common"])),
                    TableCell(f"{100 * row['chance']:.0f} %", sort=sort_key(row["chance"])),
                    TableCell("" if math.isnan(correlation) else f"{correlation:.2f}", sort=sort_key(correlation)),
                    TableCell(str(int(row["n"]))),
                ),
            )
        )
    columns = ("Compared", "Level", "Gone in common", "By chance", "Rank correlation of scores", "Pairs")
    return Table("How far choices of heads agree", columns, tuple(rows[:400]))


def answers_table(answers: pd.DataFrame, caption: str) -> Table | None:
    """Every row of answers with all its figures; columns that would be empty or all alike are left out."""
    rows = rows_of(answers)
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
        "p, corrected", "Effect size", "Verdict",
    )  # fmt: skip
    return Table(caption, columns, tuple(_answer_row(row, varying) for row in rows))


def _answer_row(row: Mapping[str, Any], varying: Sequence[str]) -> TableRow:
    metric = metric_named(str(row["metric"])).label
    title = QUESTIONS[row["id"]].title if row["id"] in QUESTIONS else ""
    effect, low, high = (float(row[name]) for name in ("effect_size", "effect_size_low", "effect_size_high"))
    n = "" if pd.isna(row["n"]) else f"{int(row['n'])}"
    crossed = (
        f"{int(row['n_iterations'])} × {int(row['n_clusters'])} {row['cluster']}s"
        if not (pd.isna(row["n_iterations"]) or pd.isna(row["n_clusters"]))
        else ""
    )
    return TableRow(
        TableCell(f"{title}: {metric}" if title else metric),
        (
            *(_place_cell(row, column) for column in varying),
            TableCell(shown(row, "estimate"), interval_shown(row), sort_key(row["estimate"]))
            if not pd.isna(row["estimate"])
            else TableCell("missing", tone="muted"),
            TableCell(str(row["estimand"]), tone="wide"),
            TableCell("" if pd.isna(row["margin"]) else shown(row, "margin"), sort=sort_key(row["margin"])),
            TableCell(n, crossed, n),
            TableCell(
                _format_p(row["p_holm"]),
                f"of no difference, uncorrected: {_format_p(row['p'])}",
                sort_key(row["p_holm"]),
            ),
            TableCell(
                "" if math.isnan(effect) else plain_number(effect),
                "" if math.isnan(low) or math.isnan(high) else interval_with_unit(low, high, "1"),
                sort_key(effect),
            ),
            _verdict_cell(row),
        ),
    )


def _verdict_cell(row: Mapping[str, Any]) -> TableCell:
    """The verdict and why; for an exploratory contrast, which is no verdict, only which way it goes."""
    verdict, reason = str(row["verdict"]), str(row["reason"] or "")
    if row["kind"] == "exploratory":
        word = "unclear" if verdict == NOT_ENOUGH else reason
        return TableCell(word, str(row.get("note") or ""), tone=word if word in ("better", "worse") else "muted")
    return TableCell(verdict, reason, tone=verdict.replace(" ", "-"))


def _place_cell(row: Mapping[str, Any], column: str) -> TableCell:
    value = row[column]
    if pd.isna(value):
        return TableCell("")
    if column == "level":
        return TableCell(per_cent(value), sort=f"{value:g}")
    return TableCell(f"{value:g}" if isinstance(value, float) else str(value))


def _format_p(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return "< 0.001" if value < 0.001 else plain_number(float(value))


def optimum_table(optimal: pd.DataFrame) -> Table | None:
    if optimal.empty:
        return None
    several = optimal["method"].nunique() > 1
    rows = []
    for row in rows_of(optimal):
        level, share, knee = (float(row[name]) for name in ("highest_level", "share", "knee_level"))
        n = "" if pd.isna(row["n"]) else str(int(row["n"]))
        rows.append(
            TableRow(
                TableCell(str(row["variant"])),
                (
                    *([TableCell(str(row["method"]))] if several else []),
                    TableCell("unknown", str(row["reason"] or ""), tone="muted")
                    if math.isnan(level)
                    else TableCell(per_cent(level), sort=f"{level:g}"),
                    TableCell("" if math.isnan(share) else f"{100 * share:.0f} %", sort=sort_key(share)),
                    TableCell("none" if math.isnan(knee) else per_cent(knee), sort=sort_key(knee)),
                    TableCell(n),
                ),
            )
        )  # fmt: skip
    tolerance = 100 * float(optimal["tolerance"].iloc[0])
    return Table(
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


def ranking_table(ranked: pd.DataFrame, compared: str) -> Table | None:
    """Methods (or variants) in order, each against the next and against random; None where there are not two of them."""
    rows = rows_of(ranked[ranked["compared"] == compared])
    if len({(row["within"], row["name"]) for row in rows}) < 2 or not any(_has_text(row["next_name"]) for row in rows):
        return None
    control = compared == "method"
    table = []
    for row in rows:
        decided, following = bool(row["decided"]), row["next_name"]
        if not _has_text(following):
            against = TableCell("last", tone="muted")
        else:
            word = "beats it" if decided else "cannot be told apart"
            against = TableCell(
                f"{following}: {_times(row['next_estimate'])}, {word}",
                _ratio_interval(row, "next"),
                sort_key(row["next_estimate"]),
                "better" if decided else "",
            )
        cells = [
            TableCell(f"{int(row['rank'])}"),
            TableCell(str(row["name"])),
            TableCell(_times(row["estimate"]), _ratio_interval(row, ""), sort_key(row["estimate"])),
            against,
        ]
        if control:
            verdict = str(row["versus_random_verdict"] or "")
            cells.append(
                TableCell(verdict or "is the control", _ratio_interval(row, "versus_random"), tone=verdict)
                if verdict != "no random control"
                else TableCell(verdict, tone="muted")
            )
        table.append(
            TableRow(TableCell(str(row["within"])), (*cells, TableCell("" if pd.isna(row["n"]) else f"{row['n']:g}")))
        )
    what, within = ("Method", "Variant") if control else ("Variant", "Method")
    columns = (
        within,
        "Rank",
        what,
        "Perplexity, times dense",
        "Next rank over this one",
        *(["Against random"] if control else []),
        "n",
    )
    return Table(f"{what}s in order within each {within.lower()}", columns, tuple(table))


def strongest_table(strongest: pd.DataFrame | None) -> Table | None:
    """The strongest baseline of each level, and every other variant's perplexity over its own; None in a run without one."""
    if strongest is None or strongest.empty:
        return None
    rows = []
    for row in rows_of(strongest):
        baseline = f"{row['baseline_variant']}, {row['baseline_method']}" if row["baseline_variant"] else "unknown"
        held_out = float(row["held_out_perplexity"])
        of_several = f"of {counted(row['candidates'], 'baseline')}: {row['chosen']}"
        compared = f"{row['variant']}, {row['method']}" if _has_text(row["variant"]) else ""
        rows.append(
            TableRow(
                TableCell(per_cent(row["level"]), sort=f"{row['level']:g}"),
                (
                    TableCell(baseline, of_several if row["candidates"] > 1 else str(row["chosen"])),
                    TableCell("" if math.isnan(held_out) else plain_number(held_out), sort=sort_key(held_out)),
                    TableCell(compared or "nothing", tone="" if compared else "muted"),
                    TableCell(_times(row["estimate"]), _ratio_interval(row, ""), sort_key(row["estimate"]))
                    if compared
                    else TableCell(""),
                    TableCell(f"{int(row['n'])}" if row["n"] else ""),
                ),
            )
        )
    columns = (
        "Level", "Strongest baseline", "Its perplexity on held-out calibration text", "Compared with it",
        "Perplexity, times its", "n",
    )  # fmt: skip
    return Table("The strongest baseline of each level", columns, tuple(rows))


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _times(value: Any) -> str:
    return "missing" if pd.isna(value) else f"×{format_times(float(value))}"


def _ratio_interval(row: Mapping[str, Any], stem: str) -> str:
    low, high = (row[f"{stem}_{end}" if stem else end] for end in ("ci_low", "ci_high"))
    return "" if pd.isna(low) or pd.isna(high) else f"{format_times(float(low))} to {format_times(float(high))}"


def equal_table(equal: pd.DataFrame) -> Table | None:
    if equal.empty:
        return None
    several = equal["method"].nunique() > 1
    rows = []
    for row in rows_of(equal):
        ratio, low, high = (float(row[name]) for name in ("speed_ratio", "ci_low", "ci_high"))
        n = "" if pd.isna(row["n"]) else str(int(row["n"]))
        rows.append(
            TableRow(
                TableCell(plain_number(float(row["perplexity"])), sort=sort_key(row["perplexity"])),
                (
                    *([TableCell(str(row["method"]))] if several else []),
                    *(
                        TableCell("" if pd.isna(row[name]) else f"{row[name]:.3g} %", sort=sort_key(row[name]))
                        for name in ("baseline_level", "agency_level")
                    ),
                    TableCell(
                        plain_number(ratio) if math.isfinite(ratio) else str(row["reason"] or "missing"),
                        "" if math.isnan(low) or math.isnan(high) else interval_with_unit(low, high, "1"),
                        sort_key(ratio),
                    ),
                    TableCell(n),
                ),
            )
        )
    return Table(
        "Speed at equal perplexity, interpolated between the levels measured",
        (
            "Perplexity", *(["Method"] if several else []), "Baseline reaches it at", "Agency reaches it at",
            "Agency's speed over the baseline's", "n",
        ),
        tuple(rows),
    )  # fmt: skip


def fronts_table(points: pd.DataFrame) -> Table | None:
    """Every variant and level with what it costs in perplexity and what it brings in speed and cache."""
    if points.empty:
        return None
    several = points["method"].nunique() > 1

    def ratio(row: Mapping[str, Any], value: str, stem: str) -> TableCell:
        ends = {"estimate": row[value], "ci_low": row[f"{stem}_low"], "ci_high": row[f"{stem}_high"]}
        return TableCell(_times(row[value]), _ratio_interval(ends, ""), sort_key(row[value]))

    def figure(row: Mapping[str, Any], value: str, stem: str, unit: str) -> TableCell:
        if pd.isna(row[value]):
            return TableCell("missing", tone="muted")
        ends = {"ci_low": row[f"{stem}_low"], "ci_high": row[f"{stem}_high"]}
        exact = ends["ci_low"] == ends["ci_high"]
        return TableCell(
            with_unit(float(row[value]), unit), "" if exact else _format_interval(ends, unit), sort_key(row[value])
        )

    rows = []
    for row in rows_of(points):
        on = [what for what, front in (("speed", "on_speed_front"), ("cache", "on_cache_front")) if row[front]]
        rows.append(
            TableRow(
                TableCell(str(row["variant"])),
                (
                    *([TableCell(str(row["method"]))] if several else []),
                    TableCell(per_cent(row["level"]), sort=f"{row['level']:g}"),
                    ratio(row, "perplexity_ratio", "perplexity"),
                    ratio(row, "speed_ratio", "speed"),
                    figure(row, "tokens_per_second", "tokens_per_second", "token/s"),
                    figure(row, "cache_bytes", "cache", "byte"),
                    TableCell(" and ".join(on) or "no", tone="" if on else "muted"),
                ),
            )
        )
    columns = (
        "Variant", *(["Method"] if several else []), "Level", "Perplexity, times dense", "Speed, times dense",
        "Tokens per second", "Key-value cache at 1,000 tokens", "On the front",
    )  # fmt: skip
    return Table("Perplexity, speed and cache of every variant and level", columns, tuple(rows))


def variants_in(table: pd.DataFrame) -> list[str]:
    return sorted((str(variant) for variant in table["variant"].dropna().unique()), key=variant_order)


def method_tables(summary: pd.DataFrame, contrasts: pd.DataFrame) -> tuple[list[MethodTables], int]:
    """The tables of each method, and how many rows did not fit. Main measurements of all methods come first."""
    methods = [str(method) for method in summary["method"].dropna().unique()]
    chosen = in_role("main table")
    present = {metric_named(str(name)).name for name in summary["metric"].dropna().unique()}
    order = [name for name in METRICS if name in present and name not in chosen]
    main = {method: _rows(summary, contrasts, method, chosen) for method in methods}
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
    variants = variants_in(summary)
    columns = ("Measurement", "Level", "Temperature", *variants, "difference", "n")
    note = "estimate, with its 95 % interval below"
    return [
        MethodTables(
            method,
            Table(f"{method}: main measurements ({note})", columns, tuple(main[method])),
            Table(f"{method}: all other measurements ({note})", columns, tuple(other[method]))
            if other[method]
            else None,
        )
        for method in methods
    ], left_out


def _row_size(row: TableRow) -> int:
    return 40 + sum(60 + len(cell.text) + len(cell.small) + len(cell.sort) for cell in (row.heading, *row.cells))


def _rows(summary: pd.DataFrame, contrasts: pd.DataFrame, method: str, metrics: Sequence[str]) -> list[TableRow]:
    variants = variants_in(summary)
    keys = ["metric", "level", "temperature"]
    ours = summary[summary["method"] == method]
    estimates = {(*_key(row, keys), row["variant"]): row for row in rows_of(ours)}
    compared = contrasts[(contrasts["method"] == method) & (contrasts["contrast"] == AGENCY_VS_BASELINE)]
    differences = {_key(row, keys): row for row in rows_of(compared)}
    wanted = {name: index for index, name in enumerate(metrics)}
    places = {key[:3] for key in estimates if key[0] in wanted}
    rows = []
    for place in sorted(places, key=lambda key: (wanted[key[0]], key[2] is not None, key[2] or 0.0, key[1])):
        metric, level, temperature = place
        found = [estimates.get((*place, variant)) for variant in variants]
        counts = sorted({int(row["n"]) for row in found if row is not None and not pd.isna(row["n"])})
        rows.append(
            TableRow(
                TableCell(metric_named(metric).label),
                (
                    TableCell(per_cent(level), sort=f"{level:g}"),
                    TableCell("" if temperature is None else f"{temperature:g}"),
                    *(_estimate_cell(row) for row in found),
                    _difference_cell(differences.get(place)),
                    TableCell(" / ".join(str(count) for count in counts), sort=str(counts[0]) if counts else ""),
                ),
            )
        )
    return rows


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(row[key]) else row[key] for key in keys)


def _estimate_cell(row: Mapping[str, Any] | None) -> TableCell:
    if row is None:
        return TableCell("not measured", tone="muted")
    estimate, unit = float(row["estimate"]), str(row["unit"])
    if math.isnan(estimate):
        return TableCell("missing", tone="muted")
    return TableCell(with_unit(estimate, unit), _format_interval(row, unit), f"{estimate:.10g}")


def _format_interval(row: Mapping[str, Any], unit: str) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return interval_with_unit(low, high, unit)


def _difference_cell(row: Mapping[str, Any] | None) -> TableCell:
    """The difference, its interval, and in a word whether it is better, worse, or unclear."""
    if row is None or math.isnan(float(row["estimate"])):
        return TableCell("")
    estimate, unit = float(row["estimate"]), str(row["unit"])
    low, high = float(row["ci_low"]), float(row["ci_high"])
    sign = "+" if estimate > 0 else ""
    small = _format_interval(row, unit)
    tone, verdict = "", ""
    if low > 0 or high < 0:
        direction = "higher" if low > 0 else "lower"
        if row["better"] in ("higher", "lower"):
            tone = "better" if row["better"] == direction else "worse"
        verdict = tone or direction
    elif not (math.isnan(low) or math.isnan(high)):
        verdict = "unclear"
    text = f"{sign}{with_unit(estimate, unit)}"
    return TableCell(f"{text}, {verdict}" if verdict else text, small, f"{estimate:.10g}", tone)


def plain_table(table: pd.DataFrame, caption: str) -> Table | None:
    if table.empty:
        return None
    columns = [str(column) for column in table.columns]
    rows = []
    for record in rows_of(table.head(500)):
        first, *rest = (TableCell(format_value(record[column]), sort=sort_key(record[column])) for column in columns)
        rows.append(TableRow(first, tuple(rest)))
    note = f" (the first 500 of {len(table)})" if len(table) > 500 else ""
    return Table(caption + note, tuple(column.replace("_", " ") for column in columns), tuple(rows))


def sort_key(value: Any) -> str:
    """What a cell with a figure is sorted by; nothing where there is none."""
    return f"{value:.10g}" if isinstance(value, (int, float)) and math.isfinite(value) else ""


def pairs(values: Any) -> list[tuple[str, str]]:
    return [(str(key), format_value(value)) for key, value in values.items()] if isinstance(values, Mapping) else []
