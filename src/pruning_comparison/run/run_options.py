"""The options that repeat a run, kept in its folder as ``run.yaml``: ``pruning-comparison run --config=run.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.run_folder import write_atomically

RUN_OPTIONS = "run.yaml"


def keep_options(folder: Path, spec: ComparisonSpec, more_options: Mapping[str, Any] = {}) -> Path:
    """Writes the options that measure ``spec`` again into a run's folder, which is returned.

    ``more_options`` are those that are not part of the spec, such as margins and a budget.
    """
    lines = ["# What this run measures, as options: pruning-comparison run --config=run.yaml"]
    for method in spec.own_methods:
        if method.name != method.place:
            lines.append(f"# {method.place} was called {method.name}, which only Python can say.")
    if spec.own_methods:
        lines.append("# Methods that are Python code need --trust_methods as well.")
    options = yaml.safe_dump(
        {**spec.as_options(), **more_options},
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=10_000,
    )
    write_atomically(folder / RUN_OPTIONS, "\n".join([*lines, options]))
    return folder
