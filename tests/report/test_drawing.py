"""Charts are drawn once, and again only where what they show has changed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from builders import SUMMARY_COLUMNS, estimate_row
from matplotlib.figure import Figure

from pruning_comparison.report.drawing import digest_of, draw_charts

DRAWN: list[str] = []


def line(name: str, table: pd.DataFrame, *, colour: str = "black") -> Figure:
    DRAWN.append(name)
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(table["level"], table["estimate"], color=colour)
    return figure


def table(value: float = 2.0) -> pd.DataFrame:
    rows = [estimate_row("perplexity", "agency", level, value + level) for level in (0, 50)]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


@pytest.fixture
def drawn() -> list[str]:
    DRAWN.clear()
    return DRAWN


def test_nothing_is_drawn_twice(tmp_path, drawn):
    jobs = {"a": partial(line, "a", table()), "b": partial(line, "b", table())}
    first = draw_charts(jobs, tmp_path)
    assert drawn == ["a", "b"]
    again = draw_charts({name: partial(line, name, table()) for name in "ab"}, tmp_path)
    assert drawn == ["a", "b"]
    assert again == first == {name: (tmp_path / f"{name}.svg").read_text("utf-8") for name in "ab"}


@pytest.mark.parametrize(
    "changed",
    [partial(line, "a", table(2.5)), partial(line, "a", table(), colour="red"), partial(line, "a", table().head(1))],
    ids=["a value", "an option", "a row less"],
)
def test_a_chart_that_shows_something_else_is_drawn_again_and_no_other(tmp_path, drawn, changed):
    other = partial(line, "b", table())
    draw_charts({"a": partial(line, "a", table()), "b": other}, tmp_path)
    draw_charts({"a": changed, "b": other}, tmp_path)
    assert drawn == ["a", "b", "a"]


@pytest.mark.parametrize("damage", ["a.png", "a.svg", "drawn.json"])
def test_a_file_that_was_changed_is_drawn_anew(tmp_path, drawn, damage):
    jobs = {"a": partial(line, "a", table())}
    draw_charts(jobs, tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / damage).write_text("something else")
    draw_charts(jobs, tmp_path)
    assert drawn == ["a", "a"]
    assert (tmp_path / "a.png").read_bytes() == whole


def test_charts_that_are_no_longer_drawn_are_removed(tmp_path, drawn):
    (tmp_path / "notes.png").write_text("a file of the user's own")
    draw_charts({"a": partial(line, "a", table()), "b": partial(line, "b", table())}, tmp_path)
    draw_charts({"b": partial(line, "b", table())}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "b.svg", "drawn.json", "notes.png"]


def test_progress_is_told_chart_by_chart(tmp_path, drawn):
    told = []
    jobs = {name: partial(line, name, table()) for name in "ab"}
    draw_charts(jobs, tmp_path, on_progress=lambda *step: told.append(step))
    assert told == [(0, 2, "drawing a"), (1, 2, "drawing b")]


def test_digests_differ_wherever_a_chart_could():
    arrays = [np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([[1.0, 2.0]])]
    parts = [*arrays, "1", 1, 1.5, True, None, (1, 2), (12,), {"a": 1}, {"b": 1}, table(), table(3.0)]
    assert len({digest_of(partial(line, "a", part)) for part in parts}) == len(parts)


def test_what_no_digest_can_be_made_of_is_an_error():
    with pytest.raises(TypeError, match="drawn from a object"):
        digest_of(partial(line, "a", object()))
    with pytest.raises(TypeError, match=r"functools\.partial"):
        digest_of(lambda: Figure())
