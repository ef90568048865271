"""What pruning brings in each engine, and what each engine brings. Pure functions on tidy tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, fit_of
from pruning_comparison.analysis.random_effects import Estimate, ratio_of
from pruning_comparison.engines import ENGINES, NATIVE
from pruning_comparison.variants import DENSE, variant_order

__all__ = ["ENGINE_COLUMNS", "compare_engines"]

ENGINE_COLUMNS = (
    "model", "method", "level", "variant", "engine", "tokens_per_second", "first_token_latency_s", "speed_vs_dense",
    "speed_vs_dense_low", "speed_vs_dense_high", "speed_vs_native", "speed_vs_native_low", "speed_vs_native_high", "n",
    "prompt_vs_dense", "prompt_vs_dense_low", "prompt_vs_dense_high", "decode_vs_dense", "decode_vs_dense_low",
    "decode_vs_dense_high", "warm_up_s", "differing_share", "weights", "reason",
)  # fmt: skip

_METRIC = "tokens_per_second"
_NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def compare_engines(model: str, timings: pd.DataFrame) -> pd.DataFrame:
    """Every model in every engine of a run, columns ``ENGINE_COLUMNS``; empty where there was one engine.

    ``timings`` is the journal's ``engine_timings``. Tokens per second are over whole generations. ``speed_vs_dense`` is the
    ratio to the dense model's in the same engine, ``speed_vs_native`` that to the same model's in the native engine, both by
    pairs of the same iteration and prompts, repeats averaged, on the log scale, with the paired 95 % interval over
    iterations and prompts (NaN where there is one pair); nothing is corrected for the number of rows. ``prompt_vs_dense``
    and ``decode_vs_dense`` are the same ratios of its two parts: how much faster the first token comes, and all that follow.
    The dense model has no row against itself, nor the native engine; there the ratio is 1 without an interval. Tokens per
    second are the geometric mean of the same data, latencies the mean, ``warm_up_s`` the mean over iterations of what all
    batches of prompts took together, and ``differing_share`` the mean share of tokens that are others than the native
    engine's. ``weights`` is what they were stored as, where the engine reads a file.

    At level 0 there is the dense model alone. Where an engine could not run a model in some iteration, ``reason`` says why;
    figures are of the others.
    """
    if timings["engine"].nunique() < 2:
        return pd.DataFrame(columns=list(ENGINE_COLUMNS))
    timed = _timed(timings)
    rows = []
    places = timings[["method", "level", "variant", "engine"]].drop_duplicates().to_dict("records")
    for place in sorted(places, key=_order):
        if place["level"] == 0 and place["variant"] != DENSE:
            continue
        mine = _rows_at(timed, place)
        dense = _rows_at(timed, place | {"variant": DENSE})
        native = _rows_at(timed, place | {"engine": NATIVE})
        itself = place["variant"] == DENSE
        against_dense = _ratio(mine, dense, itself=itself)
        prompts = _ratio(_prompts(mine), _prompts(dense), itself=itself)
        decoding = _ratio(_decoding(mine), _decoding(dense), itself=itself)
        against_native = _ratio(mine, native, itself=place["engine"] == NATIVE)
        reasons = _rows_at(timings, place)["reason"]
        rows.append(
            {"model": model, **place}
            | _figures(mine)
            | {
                "speed_vs_dense": against_dense.estimate,
                "speed_vs_dense_low": against_dense.ci_low,
                "speed_vs_dense_high": against_dense.ci_high,
                "speed_vs_native": against_native.estimate,
                "speed_vs_native_low": against_native.ci_low,
                "speed_vs_native_high": against_native.ci_high,
                "prompt_vs_dense": prompts.estimate,
                "prompt_vs_dense_low": prompts.ci_low,
                "prompt_vs_dense_high": prompts.ci_high,
                "decode_vs_dense": decoding.estimate,
                "decode_vs_dense_low": decoding.ci_low,
                "decode_vs_dense_high": decoding.ci_high,
                "weights": _first(mine["weights"]),
                "reason": _first(reasons),
            }
        )
    return pd.DataFrame(rows, columns=list(ENGINE_COLUMNS))


def _timed(timings: pd.DataFrame) -> pd.DataFrame:
    """Rows that have times, as ``MetricTable`` wants them: ``x`` is the logarithm of tokens per second."""
    rows = timings[timings["end_to_end_s"].notna()]
    speed = rows["tokens"].astype(float) / rows["end_to_end_s"].astype(float)
    return rows.assign(
        x=np.log(speed), temperature=math.nan, cluster=rows["prompt"], model_id="@" + rows["iteration"].astype(str)
    )


def _prompts(timed: pd.DataFrame) -> pd.DataFrame:
    """``timed`` with first tokens per second in place of all tokens."""
    return timed.assign(x=-np.log(timed["first_token_latency_s"].astype(float)))


def _decoding(timed: pd.DataFrame) -> pd.DataFrame:
    """``timed`` with speed after the first token, without generations that end with it."""
    seconds = timed["end_to_end_s"].astype(float) - timed["first_token_latency_s"].astype(float)
    longer = seconds > 0
    return timed[longer].assign(x=-np.log(seconds[longer]))


def _first(values: pd.Series[Any]) -> str | None:
    """The first value that is there."""
    known = values.dropna()
    return None if known.empty else str(known.iloc[0])


def _order(place: dict[Any, Any]) -> tuple[Any, ...]:
    engines = list(ENGINES)
    engine = str(place["engine"])
    variant = str(place["variant"])
    return (
        place["method"],
        place["level"],
        (-1 if variant == DENSE else variant_order(variant)),
        engines.index(engine) if engine in engines else len(engines),
        engine,
    )


def _rows_at(table: pd.DataFrame, place: dict[Any, Any]) -> pd.DataFrame:
    chosen = np.ones(len(table), dtype=bool)
    for name, value in place.items():
        chosen &= (table[name] == value).to_numpy()
    return table[chosen]


def _ratio(mine: pd.DataFrame, reference: pd.DataFrame, *, itself: bool) -> Estimate:
    """The ratio of tokens per second of two sets of rows, by pairs."""
    if itself:
        return Estimate(1.0, math.nan, math.nan, 0) if len(mine) else _NOTHING
    if mine.empty or reference.empty:
        return _NOTHING
    rows = pd.concat([mine.assign(variant="mine"), reference.assign(variant="reference")])
    pairs = MetricTable(_METRIC, rows, log_scale=True).pairs("mine", "reference")
    fit = fit_of(pairs, "difference", "pair") if len(pairs) else None
    return _NOTHING if fit is None else fit.estimate().map(ratio_of)


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    """What is shown of one model in one engine as it was measured."""
    if rows.empty:
        names = ("tokens_per_second", "first_token_latency_s", "warm_up_s", "differing_share")
        return {**dict.fromkeys(names, math.nan), "n": 0}
    by_pair = rows.groupby(["iteration", "cluster"])
    warm_up = by_pair["warm_up_s"].first().groupby("iteration").sum()
    differing = by_pair["differing_share"].first()
    return {
        "tokens_per_second": math.exp(float(by_pair["x"].mean().mean())),
        "first_token_latency_s": float(rows["first_token_latency_s"].astype(float).mean()),
        "warm_up_s": float(warm_up.mean()),
        "differing_share": math.nan if differing.isna().all() else float(differing.astype(float).mean()),
        "n": len(by_pair),
    }
