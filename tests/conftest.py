"""Settings and fixtures that every test shares; what tests are made of is in ``builders.py``."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PRUNING_COMPARISON_NO_UPDATE", "1")

import pytest
import torch
from builders import tiny_gpt2
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Timings and rounding do not depend on the machine's load."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_gpt2()


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written without charts, which take most of the time, where a test is about tables or words."""
    for draw in ("draw_all", "draw_head_charts"):
        monkeypatch.setattr(f"pruning_comparison.report.write.{draw}", lambda *tables, size: {})
