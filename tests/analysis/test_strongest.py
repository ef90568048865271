"""The strongest baseline: chosen on held-out calibration text alone, and what is held against it, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from builders import observed, run_of

from pruning_comparison.analysis import (
    CHOSEN_ON_HELD_OUT,
    NOT_CHOSEN,
    ONLY_BASELINE,
    STRONGEST_COLUMNS,
    observations,
    strongest_baselines,
)

COLUMNS = (
    "variant", "method", "iteration", "level", "phase", "temperature", "prompt", "document", "window", "repeat", "metric",
    "value", "unit", "reason",
)  # fmt: skip


def tables_of(arms, *, iterations=1):
    """``arms``: {(variant, method): ({document: nats of 10 tokens}, held-out perplexity or None)} at 50 %."""
    cells, rows = [], []
    for (variant, method), (by_document, held_out) in arms.items():
        for iteration in range(iterations):
            cell = {"variant": variant, "method": method, "iteration": iteration, "level": 50.0}
            cells.append({**cell, "status": "done", "fingerprint": f"{variant} {method} {iteration}"})
            for document, nats in by_document.items():
                place = {"phase": "quality", "document": document, "window": 0}
                for metric, value in (("window_nats", nats), ("window_tokens", 10), ("window_bytes", 40)):
                    rows.append({**cell, **place, "metric": metric, "value": float(value), "unit": "1"})
            if held_out is not None:
                rows.append(
                    {**cell, "phase": "quality", "metric": "held_out_perplexity", "value": held_out, "unit": "1"}
                )
    return observations(pd.DataFrame(cells), pd.DataFrame(rows, columns=list(COLUMNS)))


def test_the_best_on_held_out_text_is_taken_whatever_it_is_on_the_evaluation_text():
    """By hand: fisher has the lowest held-out perplexity and not the lowest on a and b. Agency is at 2.0 and 3.0 nats per
    token, fisher at 2.5 and 3.1: the ratio is exp of the mean difference, -0.3."""
    table = strongest_baselines(
        "tiny",
        tables_of(
            {
                ("baseline", "fisher"): ({"a": 25, "b": 31}, 30.0),
                ("baseline", "magnitude"): ({"a": 20, "b": 20}, 31.0),
                ("baseline-progressive", "fisher"): ({"a": 21, "b": 22}, 40.0),
                ("agency", "obs"): ({"a": 20, "b": 30}, None),
                ("agency-adaptation", "fisher"): ({"a": 25, "b": 31}, None),
            }
        ),
    )
    assert list(table.columns) == list(STRONGEST_COLUMNS)
    assert table[["baseline_variant", "baseline_method", "candidates", "chosen"]].drop_duplicates().values.tolist() == [
        ["baseline", "fisher", 3, CHOSEN_ON_HELD_OUT]
    ]
    assert table["held_out_perplexity"].tolist() == pytest.approx([30.0, 30.0])
    agency, adaptation = table.to_dict("records")
    assert (agency["variant"], agency["method"], agency["n"]) == ("agency", "obs", 2)
    assert agency["estimate"] == pytest.approx(math.exp(-0.3))
    assert agency["ci_low"] < agency["estimate"] < agency["ci_high"]
    assert (adaptation["variant"], adaptation["estimate"]) == ("agency-adaptation", pytest.approx(1.0))


def test_a_single_baseline_needs_no_choice():
    table = strongest_baselines(
        "tiny", tables_of({("baseline", "obs"): ({"a": 30}, None), ("agency", "obs"): ({"a": 20}, None)})
    )
    (row,) = table.to_dict("records")
    assert (row["chosen"], row["candidates"]) == (ONLY_BASELINE, 1)
    assert row["estimate"] == pytest.approx(math.exp(-1))
    assert math.isnan(row["held_out_perplexity"])


def test_without_held_out_text_none_of_several_is_taken():
    arms = {("baseline", "obs"): ({"a": 30}, None), ("baseline", "fisher"): ({"a": 20}, None)}
    (row,) = strongest_baselines("tiny", tables_of({**arms, ("agency", "obs"): ({"a": 20}, None)})).to_dict("records")
    assert (row["chosen"], row["baseline_variant"], row["candidates"]) == (NOT_CHOSEN, "", 2)
    assert math.isnan(row["estimate"])


def test_a_run_of_baselines_names_the_strongest_and_one_without_any_has_no_row():
    arms = {("baseline", "obs"): ({"a": 30}, 20.0), ("baseline", "fisher"): ({"a": 20}, 10.0)}
    (row,) = strongest_baselines("tiny", tables_of(arms)).to_dict("records")
    assert (row["baseline_method"], row["variant"]) == ("fisher", None)
    assert strongest_baselines("tiny", tables_of({("agency", "obs"): ({"a": 30}, None)})).empty
    assert strongest_baselines("tiny", {}).empty


def test_iterations_are_averaged_on_the_log_scale_and_one_that_lacks_some_is_not_taken():
    """By hand: 10 and 40 have the geometric mean 20, 22 and 22 have 22; a third is at 1 and lacks an iteration."""
    tables = tables_of(
        {
            (variant, method): ({"a": 20}, 22.0)
            for variant in ("baseline",)
            for method in ("obs", "fisher", "magnitude")
        },
        iterations=2,
    )
    held_out = tables["held_out_perplexity"].table
    held_out = held_out[(held_out["method"] != "magnitude") | (held_out["iteration"] == 0)].copy()
    for place, value in ((("fisher", 0), 10.0), (("fisher", 1), 40.0), (("magnitude", 0), 1.0)):
        held_out.loc[(held_out["method"] == place[0]) & (held_out["iteration"] == place[1]), "x"] = math.log(value)
    tables["held_out_perplexity"] = replace(tables["held_out_perplexity"], table=held_out)
    (row,) = strongest_baselines("tiny", tables).to_dict("records")
    assert row["baseline_method"] == "fisher"
    assert row["held_out_perplexity"] == pytest.approx(20.0)


def test_of_what_earlier_versions_measured_a_single_baseline_is_still_compared():
    cells, measurements = run_of()
    _, tables = observed(cells, measurements)
    table = strongest_baselines("tiny", tables)
    assert set(table["chosen"]) == {ONLY_BASELINE}
    assert set(table["variant"]) == {"agency"}
