"""Heads per layer, and where a variant is slower because the other one emptied layers.

A layer without heads runs no attention at all: no projections, no products, no cache. That saves more time than as many
heads spread over several layers, of which each still starts every operation. So of two models with equally many heads, the
one that has lost whole layers can be the faster one, whatever its quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

__all__ = ["LAYER_COLUMNS", "SlowerAtEqualLevel", "heads_per_layer", "slower_where_layers_are_empty"]

LAYER_COLUMNS = ("method", "variant", "level", "iteration", "kept", "emptied")


@dataclass(frozen=True)
class SlowerAtEqualLevel:
    """A level at which a variant is slower than a reference that emptied more layers.

    ``change_percent`` is that of tokens per second, by pairs, with its 95 % interval. ``emptied`` are layers without heads,
    the mean over iterations, of the variant and of the reference; ``kept`` are heads per layer of both, by iteration.
    """

    method: str
    level: float
    change_percent: float
    ci_low_percent: float
    ci_high_percent: float
    emptied: tuple[float, float]
    kept: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


def heads_per_layer(heads: pd.DataFrame) -> pd.DataFrame:
    """Heads kept in each layer (``kept``, a tuple) and layers without any (``emptied``) of every cell, ``LAYER_COLUMNS``."""
    if heads.empty:
        return pd.DataFrame(columns=list(LAYER_COLUMNS))
    keys = ["method", "variant", "level", "iteration"]
    layers = heads.assign(kept=heads["kept"].astype(int)).groupby([*keys, "layer"], sort=True)["kept"].sum()
    kept = layers.groupby(keys, sort=True).agg(tuple)
    table = kept.reset_index()
    return table.assign(emptied=[sum(count == 0 for count in counts) for counts in table["kept"]])


def slower_where_layers_are_empty(
    contrasts: pd.DataFrame, heads: pd.DataFrame, *, variant: str = "agency", reference: str = "baseline"
) -> list[SlowerAtEqualLevel]:
    """The levels at which ``variant`` is slower by its paired interval, and ``reference`` has emptied more layers.

    ``contrasts`` has columns ``CONTRAST_COLUMNS``; ``heads`` is the journal's table.
    """
    named = contrasts["contrast"] == f"{variant} vs {reference}"
    slower = contrasts[named & (contrasts["metric"] == "tokens_per_second") & (contrasts["ci_high"] < 0)]
    layers = heads_per_layer(heads)
    found = []
    for row in slower.sort_values(["method", "level"]).to_dict("records"):
        here = layers[(layers["method"] == row["method"]) & (layers["level"] == row["level"])].sort_values("iteration")
        of_both = [here[here["variant"] == name] for name in (variant, reference)]
        if any(table.empty for table in of_both):
            continue
        emptied = [float(table["emptied"].mean()) for table in of_both]
        if emptied[1] > emptied[0]:
            found.append(
                SlowerAtEqualLevel(
                    str(row["method"]),
                    float(row["level"]),
                    float(row["estimate"]),
                    float(row["ci_low"]),
                    float(row["ci_high"]),
                    (emptied[0], emptied[1]),
                    (tuple(of_both[0]["kept"]), tuple(of_both[1]["kept"])),
                )
            )
    return found
