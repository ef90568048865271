"""Settings and fixtures that every test shares; what tests are made of is in ``builders.py``."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PRUNING_COMPARISON_NO_UPDATE", "1")

import pytest
import torch
from builders import save_tiny_model, tiny_gpt2, write_short_texts
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Timings and rounding do not depend on the machine's load."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_gpt2()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model saved with its tokenizer, and short texts beside it in ``texts``."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    write_short_texts(folder / "texts")
    return folder


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written without charts, which take most of the time, where a test is about tables or words."""

    def no_drawing(jobs: Mapping[str, object], folder: object, on_progress: object = None) -> dict[str, str]:
        return dict.fromkeys(jobs, '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>')

    monkeypatch.setattr("pruning_comparison.report.write.draw_charts", no_drawing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lone surrogates cannot be sent between workers: without this, one failure that shows one would end the suite."""
    report = yield
    if report.longrepr is not None and not isinstance(report.longrepr, tuple):
        shown = str(report.longrepr)
        if shown.encode("utf-8", "replace").decode() != shown:
            report.longrepr = shown.encode("utf-8", "backslashreplace").decode()
    return report
