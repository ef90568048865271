"""Where agency is slower at equal level because the baseline emptied layers: the finding that says so."""

from __future__ import annotations

import pandas as pd

from pruning_comparison.analysis.emptied_layers import SlowerAtEqualLevel, slower_where_layers_are_empty
from pruning_comparison.formatting import per_cent, plain_number
from pruning_comparison.report.findings import Finding
from pruning_comparison.variants import PRIMARY

__all__ = ["layer_findings"]

_MOST_ITERATIONS = 3
"""So many iterations' heads per layer are listed; heads.csv has all."""


def layer_findings(contrasts: pd.DataFrame, heads: pd.DataFrame) -> list[Finding]:
    """One finding per method and level at which agency is slower than a baseline that has emptied more layers."""
    variant, reference = PRIMARY
    found = slower_where_layers_are_empty(contrasts, heads, variant=variant, reference=reference)
    return [
        Finding(
            f"{one.method}: speed at {per_cent(one.level)}, and layers without heads",
            f"At {per_cent(one.level)} the {variant} model generates {_per_cent(-one.change_percent)} % fewer tokens per "
            f"second than the {reference} [{_per_cent(-one.ci_high_percent)} to {_per_cent(-one.ci_low_percent)} %]. Both "
            f"have equally many heads, but the {reference} has none left in {plain_number(one.emptied[1])} of "
            f"{len(one.kept[1][0])} layers, {variant} in {plain_number(one.emptied[0])} (mean over iterations). A layer "
            "without heads runs no attention at all, which saves more time than as many heads spread over several layers.",
            "; ".join(_listed(name, one, place) for place, name in enumerate((variant, reference))),
        )
        for one in found
    ]


def _per_cent(value: float) -> str:
    return plain_number(float(f"{value:.2g}"))


def _listed(name: str, one: SlowerAtEqualLevel, place: int) -> str:
    """Heads kept per layer, from the first layer on, iteration by iteration."""
    cells = one.kept[place]
    shown = ", ".join(" ".join(map(str, layers)) for layers in cells[:_MOST_ITERATIONS])
    more = f", and {len(cells) - _MOST_ITERATIONS} more iterations" if len(cells) > _MOST_ITERATIONS else ""
    return f"{name}, heads kept per layer, by iteration: {shown}{more}"
