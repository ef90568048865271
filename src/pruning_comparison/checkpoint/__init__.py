"""Pruned models on the disk: saved in three forms, with a model card, and loaded again."""

from __future__ import annotations

import warnings
from typing import Any

from pruning_comparison.checkpoint.forms import FORMS, forms_that_hold, pruned_form, save_pruned, stock_form
from pruning_comparison.checkpoint.model_card import BeforeAndAfter, model_card

__all__ = [
    "FORMS",
    "BeforeAndAfter",
    "forms_that_hold",
    "model_card",
    "pruned_form",
    "save_pruned",
    "stock_form",
]


def __getattr__(name: str) -> Any:
    """``load_pruned`` was here in 0.1.0, and the cards of models saved then name this place. It goes with 2.0."""
    if name != "load_pruned":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "pruning_comparison.checkpoint.load_pruned has moved: from pruning_comparison import load_pruned",
        DeprecationWarning,
        stacklevel=2,
    )
    from pruning_comparison.checkpoint.forms import load_pruned

    return load_pruned
