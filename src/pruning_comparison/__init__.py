"""Measures how causal language models stand up to progressive pruning of attention heads.

What is here is for use from Python; ``docs/python.md`` shows it at work. Everything is imported when it is first asked
for, so that importing the package costs nothing and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning_comparison.checkpoint.forms import forms_that_hold, load_pruned, save_pruned
    from pruning_comparison.methods import METHODS, Method
    from pruning_comparison.models import load_model, preview_model
    from pruning_comparison.pruning import remove_heads, select_heads
    from pruning_comparison.report.charts import overview as charts
    from pruning_comparison.report.write import write_results
    from pruning_comparison.run.comparison import run_comparison
    from pruning_comparison.run.one_model import prune
    from pruning_comparison.scoring import score_heads
    from pruning_comparison.spec import ComparisonSpec
    from pruning_comparison.store.tables import load_run

__version__ = "1.0.0rc1"

__all__ = [
    "METHODS",
    "ComparisonSpec",
    "Method",
    "charts",
    "forms_that_hold",
    "load_model",
    "load_pruned",
    "load_run",
    "preview_model",
    "prune",
    "remove_heads",
    "run_comparison",
    "save_pruned",
    "score_heads",
    "select_heads",
    "write_results",
]

_PLACES = {
    "METHODS": "methods:METHODS",
    "ComparisonSpec": "spec:ComparisonSpec",
    "Method": "methods:Method",
    "charts": "report.charts.overview",
    "forms_that_hold": "checkpoint.forms:forms_that_hold",
    "load_model": "models:load_model",
    "load_pruned": "checkpoint.forms:load_pruned",
    "load_run": "store.tables:load_run",
    "preview_model": "models:preview_model",
    "prune": "run.one_model:prune",
    "remove_heads": "pruning:remove_heads",
    "run_comparison": "run.comparison:run_comparison",
    "save_pruned": "checkpoint.forms:save_pruned",
    "score_heads": "scoring:score_heads",
    "select_heads": "pruning:select_heads",
    "write_results": "report.write:write_results",
}
"""Where each name of ``__all__`` is defined: a module of this package, and a name in it, or the module itself."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, _, attribute = _PLACES[name].partition(":")
    module = importlib.import_module(f"{__name__}.{module_name}")
    found = getattr(module, attribute) if attribute else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
