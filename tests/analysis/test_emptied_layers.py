"""Heads per layer, and the levels at which the other variant's empty layers make it faster."""

from __future__ import annotations

import pandas as pd
from builders import HEAD_COLUMNS, contrast_row

from pruning_comparison.analysis.emptied_layers import heads_per_layer, slower_where_layers_are_empty
from pruning_comparison.analysis.estimates import CONTRAST_COLUMNS
from pruning_comparison.report.layers import layer_findings


def heads_of(variant, level, *iterations):
    """Rows of heads; each iteration lists the layers' masks, such as ("11", "00")."""
    rows = []
    for iteration, layers in enumerate(iterations):
        for layer, mask in enumerate(layers):
            for head, kept in enumerate(mask):
                row = {
                    "variant": variant, "method": "entropy", "iteration": iteration, "level": float(level), "layer": layer,
                    "head": head, "score": 0.0, "kept": int(kept),
                }  # fmt: skip
                rows.append([row[name] for name in HEAD_COLUMNS])
    return rows


HEADS = pd.DataFrame(
    [
        *heads_of("baseline", 50, ("11", "00", "10"), ("11", "01", "00")),
        *heads_of("agency", 50, ("10", "10", "10"), ("10", "01", "10")),
        *heads_of("baseline", 25, ("11", "11", "01"), ("11", "11", "01")),
        *heads_of("agency", 25, ("11", "11", "01"), ("11", "11", "01")),
    ],
    columns=HEAD_COLUMNS,
)


def contrasts(*rows):
    return pd.DataFrame(
        [contrast_row("tokens_per_second", level, value, low, high) for level, value, low, high in rows],
        columns=list(CONTRAST_COLUMNS),
    )


def test_heads_per_layer_by_hand():
    table = heads_per_layer(HEADS).set_index(["variant", "level", "iteration"])
    assert table.loc[("baseline", 50.0, 0), "kept"] == (2, 0, 1)
    assert table.loc[("baseline", 50.0, 1), "kept"] == (2, 1, 0)
    assert table.loc[("agency", 50.0, 1), "kept"] == (1, 1, 1)
    assert table["emptied"].to_dict() == {
        ("baseline", 50.0, 0): 1, ("baseline", 50.0, 1): 1, ("agency", 50.0, 0): 0, ("agency", 50.0, 1): 0,
        ("baseline", 25.0, 0): 0, ("baseline", 25.0, 1): 0, ("agency", 25.0, 0): 0, ("agency", 25.0, 1): 0,
    }  # fmt: skip
    assert heads_per_layer(HEADS.iloc[:0]).empty


def test_only_where_it_is_slower_and_the_baseline_emptied_more():
    """Slower at 25 % with no layer empty has another reason; an interval that reaches 0 is no slower."""
    found = slower_where_layers_are_empty(contrasts((25, -3.0, -4.0, -2.0), (50, -10.0, -12.0, -8.0)), HEADS)
    assert [(one.level, one.emptied) for one in found] == [(50.0, (0.0, 1.0))]
    assert found[0].kept == (((1, 1, 1), (1, 1, 1)), ((2, 0, 1), (2, 1, 0)))
    assert slower_where_layers_are_empty(contrasts((50, -10.0, -21.0, 1.0)), HEADS) == []
    assert slower_where_layers_are_empty(contrasts((50, 10.0, 8.0, 12.0)), HEADS) == []


def test_the_finding_gives_the_interval_and_heads_per_layer():
    (found,) = layer_findings(contrasts((50, -10.0, -12.0, -8.0)), HEADS)
    assert "10 % fewer tokens per second than the baseline [8 to 12 %]" in found.sentence
    assert "the baseline has none left in 1 of 3 layers, agency in 0 (mean over iterations)" in found.sentence
    assert found.evidence == (
        "agency, heads kept per layer, by iteration: 1 1 1, 1 1 1; "
        "baseline, heads kept per layer, by iteration: 2 0 1, 2 1 0"
    )
    assert layer_findings(contrasts(), HEADS) == []
