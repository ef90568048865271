"""The strongest baseline of a run at every level, and every other variant against it. Pure functions on tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable, fit_of
from pruning_comparison.analysis.random_effects import ratio_of
from pruning_comparison.variants import reported_variant, variant_order

__all__ = ["CHOSEN_ON_HELD_OUT", "NOT_CHOSEN", "ONLY_BASELINE", "STRONGEST_COLUMNS", "strongest_baselines"]

STRONGEST_COLUMNS = (
    "model", "level", "baseline_variant", "baseline_method", "candidates", "held_out_perplexity", "chosen",
    "variant", "method", "metric", "estimate", "ci_low", "ci_high", "n", "unit",
)  # fmt: skip

ONLY_BASELINE = "the only baseline of the run"
CHOSEN_ON_HELD_OUT = "lowest perplexity on held-out calibration text"
NOT_CHOSEN = "none: no calibration text was held out to choose by"
METRIC, HELD_OUT = "perplexity", "held_out_perplexity"

Place = tuple[str, str]
"""(variant, method)."""


def strongest_baselines(model: str, tables: Mapping[str, MetricTable]) -> pd.DataFrame:
    """The strongest of the run's baselines at each level above 0, and the other variants against it; ``STRONGEST_COLUMNS``.

    Baselines are the variants that are neither asked nor adapted, by every method. Of several, the one with the lowest
    perplexity on held-out calibration text is taken (geometric mean over iterations), which is not what anything is
    evaluated on: the best of several on the evaluation text would be good by chance as well. A single one is taken as it is.

    One row for each other variant and method: ``estimate`` is its perplexity over the strongest baseline's, by pairs of the
    same iteration and document, with the paired 95 % interval; nothing is corrected for the number of rows. Where there is
    nothing to hold against it, one row names the baseline alone.
    """
    if METRIC not in tables:
        return pd.DataFrame(columns=list(STRONGEST_COLUMNS))
    measured = tables[METRIC].table
    held_out = tables[HELD_OUT].table if HELD_OUT in tables else measured.head(0)
    rows: list[dict[str, Any]] = []
    for level, at_level in measured[measured["level"] > 0].groupby("level"):
        arms: dict[Place, pd.DataFrame] = {
            (str(variant), str(method)): arm for (variant, method), arm in at_level.groupby(["variant", "method"])
        }
        candidates = [place for place in arms if reported_variant(place[0]).is_baseline]
        others = [place for place in arms if place not in candidates]
        if not candidates:
            continue
        found, value, chosen = _strongest(candidates, held_out[held_out["level"] == level])
        place = {
            "model": model, "level": level, "baseline_variant": found[0], "baseline_method": found[1],
            "candidates": len(candidates), "held_out_perplexity": value, "chosen": chosen, "metric": METRIC, "unit": "1",
        }  # fmt: skip
        compared = [_against(arms, other, found) for other in sorted(others, key=_order)] if found[0] else []
        rows += [place | row for row in compared or [_nothing()]]
    return pd.DataFrame(rows, columns=list(STRONGEST_COLUMNS))


def _strongest(candidates: list[Place], held_out: pd.DataFrame) -> tuple[Place, float, str]:
    """The strongest baseline, its perplexity on held-out text, and why it is the one; an empty name where none is."""
    by_arm = held_out.groupby(["variant", "method"]).agg(mean=("x", "mean"), iterations=("iteration", "nunique"))
    arms = by_arm.reset_index().to_dict("records")
    means = {(str(row["variant"]), str(row["method"])): float(row["mean"]) for row in arms}
    # One that lacks an iteration may lack the hardest.
    most = max((row["iterations"] for row in arms), default=0)
    whole = {(str(row["variant"]), str(row["method"])) for row in arms if row["iterations"] == most}
    if len(candidates) == 1:
        (only,) = candidates
        return only, math.exp(means[only]) if only in means else math.nan, ONLY_BASELINE
    known = [place for place in candidates if place in whole]
    if not known:
        return ("", ""), math.nan, NOT_CHOSEN
    best = min(known, key=lambda place: (means[place], *_order(place)))
    return best, math.exp(means[best]), CHOSEN_ON_HELD_OUT


def _order(place: Place) -> tuple[int, str]:
    return variant_order(place[0]), place[1]


def _against(arms: Mapping[Place, pd.DataFrame], place: Place, baseline: Place) -> dict[str, Any]:
    keys = ["iteration", "cluster"]
    one, other = (arms[which][[*keys, "x", "model_id"]] for which in (place, baseline))
    both = one.merge(other, on=keys, suffixes=("", "_baseline"))
    both = both.assign(
        difference=both["x"] - both["x_baseline"], pair=both["model_id"] + "|" + both["model_id_baseline"]
    )
    fit = fit_of(both, "difference", "pair") if len(both) else None
    if fit is None:
        return _nothing() | {"variant": place[0], "method": place[1]}
    shown = fit.estimate().map(ratio_of)
    return {
        "variant": place[0], "method": place[1], "estimate": shown.estimate, "ci_low": shown.ci_low,
        "ci_high": shown.ci_high, "n": shown.n,
    }  # fmt: skip


def _nothing() -> dict[str, Any]:
    return {"variant": None, "method": None, "estimate": math.nan, "ci_low": math.nan, "ci_high": math.nan, "n": 0}
