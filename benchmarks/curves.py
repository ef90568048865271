"""Draws perplexity, times the dense model's, against the share of heads pruned: python benchmarks/curves.py RUN... --to=PNG

One panel for each method of each run, from its ``summary.csv``: estimates of ``perplexity_ratio`` with their 95 % intervals,
by variant, on one logarithmic axis for all panels. A file of what ``agency_ablation.py`` printed has panels as well: of
``agency``, and, where nothing adapts (``steps=none``), of ``baseline``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from pruning_comparison.store import read_manifest
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
HUGE_TICKS = tuple(10**power for power in range(12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    found = [panel for run in options.runs for panel in (of_run(run) if run.is_dir() else of_ablation(run))]
    width = 4.4 if len(found) < 4 else 2.9
    figure, panels = plt.subplots(
        1, len(found), figsize=(width * len(found), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (title, rows) in zip(panels[0], found, strict=True):
        draw(axes, title, rows)
    scale(panels[0][0])
    panels[0][0].set_ylabel("perplexity, times the dense model's")
    handles: dict[str, object] = {}
    for axes in panels[0]:
        drawn, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(options.to, dpi=130)


def of_run(run: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """The titles of a run's panels, and their estimates, methods in the run's order."""
    spec = read_manifest(run).spec
    rows = pd.read_csv(run / "summary.csv")
    rows = rows[rows["metric"] == "perplexity_ratio"]
    for method in spec["pruning_methods"]:
        yield f"{spec['model_name']}, {method}", rows[rows["method"] == method]


def of_ablation(file: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """A panel for each method of the configurations in a file."""
    model = ""
    panels: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text("utf-8").splitlines():
        told = json.loads(line) if line.startswith("{") else {}
        model = told.get("model", model)
        if "to_dense" not in told:
            continue
        settings = dict(part.partition("=")[::2] for part in told["configuration"].split(","))
        variant = "baseline" if settings.get("steps") == "none" else "agency"
        row = dict(zip(("estimate", "ci_low", "ci_high"), told["to_dense"], strict=True))
        panels.setdefault(settings.get("method", "obs"), []).append({"variant": variant, "level": told["level"], **row})
    for method, rows in panels.items():
        yield f"{model}, {method}", pd.DataFrame(rows)


def draw(axes: Axes, title: str, rows: pd.DataFrame) -> None:
    """The curves of one panel."""
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
    axes.set_xticks(sorted({0.0, *rows["level"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("heads pruned, %")
    axes.set_title(title, fontsize=11)
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def scale(axes: Axes) -> None:
    """A logarithmic axis from 1 upwards, with round numbers, for these axes and those that share theirs."""
    axes.set_yscale("log")
    top = max(axes.get_ylim()[1], 1.5)
    axes.set_ylim(0.97, top)
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = HUGE_TICKS if top > COARSE_TICKS[-1] else COARSE_TICKS if top > TICKS[-1] else TICKS
    axes.set_yticks([tick for tick in ticks if tick <= top])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


if __name__ == "__main__":
    main()
