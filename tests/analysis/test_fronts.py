"""What speed and memory cost: points and fronts by hand, and against the definition spelled out."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
from builders import SUMMARY_COLUMNS, estimate_row, relative_row
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.analysis import FRONT_COLUMNS, find_fronts
from pruning_comparison.analysis.relative import RELATIVE_COLUMNS


def tables(points, method="obs"):
    """Summary and relative of points {(variant, level): (perplexity ratio, speed ratio, cache bytes)}."""
    summary = [estimate_row("thousand_token_cache_bytes", "baseline", 0, 1000.0, method=method)]
    summary.append(estimate_row("tokens_per_second", "baseline", 0, 20.0, 19.0, 21.0, t=0.7, method=method))
    relative = []
    for (variant, level), (perplexity, speed, cache) in points.items():
        summary.append(estimate_row("thousand_token_cache_bytes", variant, level, cache, method=method))
        summary.append(
            estimate_row("tokens_per_second", variant, level, 20 * speed, 19 * speed, 21 * speed, method=method)
        )
        relative.append(
            relative_row("perplexity", variant, level, perplexity, 0.9 * perplexity, 1.1 * perplexity, method=method)
        )
        if not math.isnan(speed):
            relative.append(
                relative_row("tokens_per_second", variant, level, speed, speed - 0.1, speed + 0.1, method=method)
            )
    return pd.DataFrame(summary, columns=list(SUMMARY_COLUMNS)), pd.DataFrame(relative, columns=list(RELATIVE_COLUMNS))


def test_points_have_ratios_and_figures_with_their_intervals():
    table = find_fronts("tiny", *tables({("agency", 40.0): (1.2, 1.3, 600.0)}))
    assert list(table.columns) == list(FRONT_COLUMNS)
    dense, point = table.to_dict("records")
    assert (dense["variant"], dense["level"], dense["perplexity_ratio"], dense["speed_ratio"]) == (
        "dense",
        0.0,
        1.0,
        1.0,
    )
    assert (dense["tokens_per_second"], dense["tokens_per_second_low"], dense["cache_bytes"]) == (20.0, 19.0, 1000.0)
    assert (point["variant"], point["level"], point["method"], point["model"]) == ("agency", 40.0, "obs", "tiny")
    assert (point["perplexity_ratio"], point["perplexity_low"], point["perplexity_high"]) == pytest.approx(
        (1.2, 1.08, 1.32)
    )
    assert (point["speed_ratio"], point["speed_low"], point["speed_high"]) == pytest.approx((1.3, 1.2, 1.4))
    assert (point["tokens_per_second"], point["cache_bytes"]) == pytest.approx((26.0, 600.0))


def test_who_is_beaten_in_both_figures_is_not_on_the_front():
    points = {
        ("agency", 20.0): (1.1, 1.1, 900.0),
        ("agency", 40.0): (1.3, 1.2, 700.0),  # beaten in speed by the baseline at 20, not in cache
        ("baseline", 20.0): (1.2, 1.4, 800.0),
        ("baseline", 40.0): (1.5, 1.6, 700.0),  # as small as agency at 40, and worse
    }
    table = find_fronts("tiny", *tables(points)).set_index(["variant", "level"])
    assert table["on_speed_front"].to_dict() == {
        ("dense", 0.0): True,
        ("agency", 20.0): True,
        ("agency", 40.0): False,
        ("baseline", 20.0): True,
        ("baseline", 40.0): True,
    }
    assert table["on_cache_front"].to_dict() == {
        ("dense", 0.0): True,
        ("agency", 20.0): True,
        ("agency", 40.0): True,
        ("baseline", 20.0): True,
        ("baseline", 40.0): False,
    }


def test_methods_have_fronts_of_their_own_and_what_was_not_timed_has_none():
    one = tables({("agency", 40.0): (1.2, 1.3, 600.0)})
    other = tables({("agency", 40.0): (1.4, math.nan, 700.0)}, method="random")
    table = find_fronts("tiny", *(pd.concat(pair, ignore_index=True) for pair in zip(one, other, strict=True)))
    chosen = table[table["variant"] == "agency"].set_index("method")
    assert chosen["on_cache_front"].to_dict() == {"obs": True, "random": True}
    assert chosen["on_speed_front"].to_dict() == {"obs": True, "random": False}
    assert math.isnan(chosen["speed_ratio"]["random"])


def test_without_a_level_above_zero_there_is_nothing():
    summary, relative = tables({})
    assert find_fronts("tiny", summary, relative).empty


values = st.integers(1, 4).map(float)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=6))
def test_fronts_are_those_of_the_definition(points):
    named = {
        ("agency" if number % 2 else "baseline", 10.0 * (number + 1)): point for number, point in enumerate(points)
    }
    table = find_fronts("tiny", *tables(named)).to_dict("records")
    everyone = [(1.0, 1.0, 1000.0), *points]
    order = [(1.0, 1.0, 1000.0), *(named[row["variant"], row["level"]] for row in table[1:])]
    for row, mine in zip(table, order, strict=True):
        beaten_in_speed = any(p <= mine[0] and s >= mine[1] and (p, s) != mine[:2] for p, s, _ in everyone)
        beaten_in_cache = any(p <= mine[0] and c <= mine[2] and (p, c) != mine[::2] for p, _, c in everyone)
        assert (row["on_speed_front"], row["on_cache_front"]) == (not beaten_in_speed, not beaten_in_cache)
    assert any(row["on_speed_front"] for row in table)
    assert len(list(itertools.groupby(table, lambda row: row["method"]))) == 1
