"""Draws perplexity, times the dense model's, against the share of heads pruned: python benchmarks/curves.py RUN... --to=PNG

One panel for each run, from its ``summary.csv``: estimates of ``perplexity_ratio`` with their 95 % intervals, by variant, on
a logarithmic axis.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from pruning_comparison.store.run_folder import read_manifest
from pruning_comparison.variants import VARIANTS as RECORDS

VARIANTS = (
    "baseline",
    "baseline-progressive",
    "agency-selection",
    "agency-adaptation",
    "agency-always-yes",
    "agency",
)
TICKS, COARSE_TICKS = (1, 1.2, 1.5, 2, 3, 5), (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    figure, panels = plt.subplots(
        1, len(options.runs), figsize=(4.4 * len(options.runs), 3.6), squeeze=False, size="constrained"
    )
    for axes, run in zip(panels[0], options.runs, strict=True):
        draw(axes, run)
    panels[0][0].set_ylabel("perplexity, times the dense model's")
    handles: dict[str, object] = {}
    for axes in panels[0]:
        drawn, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(options.to, dpi=130)


def draw(axes: Axes, run: Path) -> None:
    """One run's curves."""
    model = read_manifest(run).spec["model_name"]
    rows = pd.read_csv(run / "summary.csv")
    rows = rows[(rows["metric"] == "perplexity_ratio")]
    shown = [variant for variant in VARIANTS if variant in set(rows["variant"])]
    for number, variant in enumerate(shown):
        look = RECORDS[variant].look
        of_variant = rows[(rows["variant"] == variant) & (rows["level"] > 0)].sort_values("level")
        levels = [0.0, *(of_variant["level"] + 0.7 * (number - (len(shown) - 1) / 2))]
        values = [1.0, *of_variant["estimate"]]
        low = [0.0, *(of_variant["estimate"] - of_variant["ci_low"])]
        high = [0.0, *(of_variant["ci_high"] - of_variant["estimate"])]
        axes.errorbar(
            levels,
            values,
            [low, high],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            capsize=2.5,
            lw=1.5,
            ms=5,
            label=variant,
        )
    axes.set_yscale("log")
    top = max(axes.get_ylim()[1], 1.5)
    axes.set_ylim(0.97, top)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([tick for tick in (COARSE_TICKS if top > TICKS[-1] else TICKS) if tick <= top])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(sorted({0.0, *rows["level"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("heads pruned, %")
    axes.set_title(f"{model}, {', '.join(sorted(set(rows['method'])))}", fontsize=11)
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
