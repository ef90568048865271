"""What pruning brings in each engine, in sentences and as a table, from the rows of ``compare_engines``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pruning_comparison.engines import ENGINES, NATIVE
from pruning_comparison.formatting import capitalised, listed, per_cent, plain_number, with_unit
from pruning_comparison.report.rows import rows_of
from pruning_comparison.report.tables import Table, TableCell, TableRow, sort_key
from pruning_comparison.variants import DENSE, reported_variant

__all__ = ["engine_sentences", "engines_table"]

_SPOKEN_LEVEL = 50.0


def engine_sentences(engines: pd.DataFrame) -> list[str]:
    """What each variant gains in each engine at the level nearest to 50 %, what each engine brings to the dense model, and
    what could not be timed; ``engines`` has the columns ``ENGINE_COLUMNS``.
    """
    sentences = []
    for method, rows in engines.groupby("method", sort=False) if len(engines) else ():
        pruned = sorted(level for level in rows["level"].unique() if level > 0)
        level = min(pruned, key=lambda one: (abs(one - _SPOKEN_LEVEL), one), default=0.0)
        here = rows[rows["level"] == level]
        for variant, of_variant in here.groupby("variant", sort=False):
            if variant != DENSE and (gains := _in_each(of_variant, "speed_vs_dense")):
                sentences.append(
                    f"With {per_cent(level)} of the heads gone, ranked by {method}, {_title(str(variant))} is "
                    f"{listed(gains)}, each against the dense model in the same engine."
                )
        dense = here[(here["variant"] == DENSE) & (here["engine"] != NATIVE)]
        if gains := _in_each(dense, "speed_vs_native"):
            sentences.append(f"Against the native loop, the dense model is {listed(gains)}.")
    absent = engines[engines["reason"].notna()]
    for (engine, reason), rows in absent.groupby(["engine", "reason"], sort=False):
        who = listed([_title(str(name)) for name in dict.fromkeys(rows["variant"])])
        levels = listed([per_cent(level) for level in sorted(rows["level"].unique())])
        sentences.append(
            f"{capitalised(who)} could not be timed in {_engine(str(engine))} at {levels}: {str(reason).rstrip('.')}."
        )
    return sentences


def _in_each(rows: pd.DataFrame, ratio: str) -> list[str]:
    """The ratio in each engine in which it is known."""
    told = []
    for row in rows_of(rows):
        if not pd.isna(row[ratio]):
            low, high = row[f"{ratio}_low"], row[f"{ratio}_high"]
            interval = "" if pd.isna(low) else f" [{plain_number(low)} to {plain_number(high)}]"
            told.append(f"{plain_number(row[ratio])} times{interval} as fast in {_engine(row['engine'])}")
    return told


def _title(variant: str) -> str:
    return "the dense model" if variant == DENSE else reported_variant(variant).title


def _engine(name: str) -> str:
    return ENGINES[name].title if name in ENGINES else name


def engines_table(engines: pd.DataFrame | None) -> Table | None:
    """Every model in every engine; None in a run that was timed in one alone."""
    if engines is None or engines.empty:
        return None
    several = engines["method"].nunique() > 1
    rows = []
    for row in rows_of(engines):
        heading = TableCell("dense" if row["variant"] == DENSE else str(row["variant"]))
        place = (
            *([TableCell(str(row["method"]))] if several else []),
            TableCell(per_cent(row["level"]), sort=f"{row['level']:g}"),
            TableCell(str(row["engine"]), _weights(row["weights"])),
        )
        if pd.isna(row["tokens_per_second"]):
            rest = (TableCell("missing", str(row["reason"] or ""), tone="muted"), *[TableCell("")] * 8)
        else:
            rest = (
                _figure(row, "tokens_per_second", "token/s"),
                _ratio(row, "speed_vs_dense"),
                _ratio(row, "prompt_vs_dense"),
                _ratio(row, "decode_vs_dense"),
                _ratio(row, "speed_vs_native"),
                _figure(row, "first_token_latency_s", "s"),
                _figure(row, "warm_up_s", "s"),
                TableCell(_share(row["differing_share"]), sort=sort_key(row["differing_share"])),
                TableCell(f"{int(row['n'])}"),
            )
        rows.append(TableRow(heading, (*place, *rest)))
    columns = (
        "Variant", *(["Method"] if several else []), "Level", "Engine", "Tokens per second", "Speed, times dense",
        "Prompt, times dense", "Decoding, times dense", "Speed, times native", "First token after", "Ready after",
        "Tokens unlike native's", "n",
    )  # fmt: skip
    return Table("Speed in each engine", columns, tuple(rows))


def _figure(row: Mapping[str, Any], name: str, unit: str) -> TableCell:
    value = float(row[name])
    return TableCell("" if math.isnan(value) else with_unit(value, unit), sort=sort_key(value))


def _ratio(row: Mapping[str, Any], name: str) -> TableCell:
    value, low, high = (float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return TableCell("missing", tone="muted")
    interval = "" if math.isnan(low) or math.isnan(high) else f"{plain_number(low)} to {plain_number(high)}"
    return TableCell(f"×{plain_number(value)}", interval, sort_key(value))


def _weights(stored: Any) -> str:
    return "" if pd.isna(stored) else f"weights as {stored}"


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else "none" if value == 0 else f"{100 * value:.2g} %"
