"""The charts as pictures: pinned to stored ones, and told apart in grey and with colour-vision deficiencies.

`PYTHONPATH=tests python tests/report/test_chart_pictures.py` draws the stored pictures anew; look at them before they are
committed. The font comes with matplotlib, so pictures differ between machines by little more than the smoothing of edges.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import CONTRAST_COLUMNS, SUMMARY_COLUMNS, contrast_row, estimate_row, ranking_row, relative_row
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageFilter

from pruning_comparison.analysis import find_fronts
from pruning_comparison.analysis.head_maps import SIGNALS, agreement, map_heads, map_rounds
from pruning_comparison.analysis.rankings import RANKING_COLUMNS
from pruning_comparison.analysis.relative import RELATIVE_COLUMNS
from pruning_comparison.report.charts import draw_fronts, perplexity_over_levels, rankings
from pruning_comparison.report.charts import overview as charts
from pruning_comparison.report.charts.heads import draw_head_charts
from pruning_comparison.variants import VARIANTS

STORED = Path(__file__).parent / "chart_pictures"
STORED_NARROW = STORED / "narrow"
PINNED_NARROW = ("speed_comparison", "radar", "head_negotiation")
DPI = 55
TOLERANCE = 0.0015
"""Mean difference, of 1, after blurring.

Pictures differ by up to 0.0004 from those stored with fewer colours, and by 0.0028 where one of twelve lines has moved."""

LEVELS = (0.0, 20.0, 40.0, 60.0, 80.0)
NAN = math.nan


def tables(worse: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Smooth made-up curves with every sort of figure that a run has; ``worse`` raises agency's perplexity."""
    rows, pairs = [], []
    for level in LEVELS:
        x = level / 100
        for variant, slope in (("baseline", 1.9), ("agency", 0.6)):
            factor = worse if variant == "agency" and level else 1.0
            values = {
                "perplexity": (48 * math.exp(slope * x) * factor, 0.06, NAN),
                "tokens_per_second": (120 * (1 + x), 0.2, NAN),
                "tokens_per_second_in_proportion": (120 * (1 + 1.2 * x), NAN, NAN),
                "first_token_latency_s": (0.015 * (1 - 0.6 * x), 0.15, NAN),
                "first_token_latency_in_proportion_s": (0.015 * (1 - 0.75 * x), NAN, NAN),
                "peak_memory_bytes": (4e8 * (1 - 0.3 * x), 0.01, NAN),
                "generation_perplexity": (30 * math.exp(2 * slope * x), 0.3, 1.0),
                "distinct_2": (0.95 - 0.05 * x * slope, 0.02, 1.0),
                "seq_rep_4": (0.01 + 0.02 * x * slope, 0.5, 1.0),
            }
            for metric, (value, width, t) in values.items():
                ends = (NAN, NAN) if math.isnan(width) else (value * (1 - width), value * (1 + width))
                rows.append(estimate_row(metric, variant, level, value, *ends, t=t))
        for metric, change, t, unit in (
            ("perplexity", 100 * (math.exp(-1.3 * x) - 1), NAN, "%"),
            ("tokens_per_second", -8 * x, NAN, "%"),
            ("first_token_latency_s", 3 * x, NAN, "%"),
            ("distinct_2_distance", 0.01 * x, 1.0, "1"),
            ("generation_perplexity_distance", -1.5 * x, 1.0, "1"),
        ):
            width = 4.0 if unit == "%" else 0.02
            pairs.append(contrast_row(metric, level, change, change - width, change + width, t=t, unit=unit))
            if unit == "1":
                for variant, value in (("baseline", 0.02 + 2 * x), ("agency", 0.02 + 2 * x + change)):
                    rows.append(estimate_row(metric, variant, level, value, t=t))
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS)), pd.DataFrame(pairs, columns=list(CONTRAST_COLUMNS))


def head_tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Twelve heads in three layers, which go in an order that differs by variant and a little by iteration."""
    heads, signals, replies = [], [], []
    for variant, step in (("baseline", 5), ("agency", 7)):
        for iteration in range(2):
            order = [(number * step + iteration * (number % 2)) % 12 for number in range(12)]
            order = list(dict.fromkeys([*order, *range(12)]))
            for level in LEVELS:
                gone = set(order[: round(12 * level / 100)])
                heads += [
                    (variant, "entropy", iteration, level, at // 4, at % 4, float(at), int(at not in gone))
                    for at in range(12)
                ]
            for level in LEVELS[1:] if variant == "agency" else ():
                before, now = (set(order[: round(12 * part / 100)]) for part in (level - 20, level))
                for at in range(12):
                    state = "withdrawn" if at in before else ("active", "overloaded", "misaligned")[at % 5 % 3]
                    value = NAN if at in before else (at - 4) / 8
                    signals.append((variant, "entropy", iteration, 80.0, level, at // 4, at % 4, state, *[value] * 6))
                    if at in now - before or (at not in before and at % 3 == 0):
                        answer = ("overridden" if at % 2 else "consented") if at in now else "refused"
                        replies.append((variant, "entropy", iteration, 80.0, level, at // 4, at % 4, answer, state, at))
    key = ["variant", "method", "iteration", "level"]
    return (
        pd.DataFrame(heads, columns=[*key, "layer", "head", "score", "kept"]),
        pd.DataFrame(signals, columns=[*key, "round_level", "layer", "head", "state", *SIGNALS]),
        pd.DataFrame(replies, columns=[*key, "round_level", "layer", "head", "answer", "state", "asked_rank"]),
    )


def answer_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Levels against the dense model, and three methods in order, of which the first is decided."""
    relative = [
        relative_row("perplexity", variant, level, value, value / 1.08, value * 1.08, method=method)
        for method, factor in (("entropy", 1.0), ("magnitude", 1.6))
        for variant, slope in (("baseline", 1.9), ("agency", 0.6))
        for level in LEVELS[1:]
        for value in (math.exp(slope * factor * level / 100),)
    ]
    ranked = [
        ranking_row(1, "fisher", 1.3, "entropy", 1.2, 1.1, 1.31, decided=True, random="better"),
        ranking_row(2, "entropy", 1.56, "random", 1.05, 0.98, 1.12, random="not enough data"),
        ranking_row(3, "random", 1.64, random=""),
    ]
    return pd.DataFrame(relative, columns=list(RELATIVE_COLUMNS)), pd.DataFrame(ranked, columns=list(RANKING_COLUMNS))


def front_table() -> pd.DataFrame:
    """Agency cheaper and slower than the baseline at equal level, except at the last one; the cache the same."""
    summary, relative = [estimate_row("thousand_token_cache_bytes", "baseline", 0, 9.2e6)], []
    for level in LEVELS[1:]:
        for variant, slope, gain in (("baseline", 1.9, 0.6), ("agency", 0.6, 0.4)):
            perplexity, speed = math.exp(slope * level / 100), 1 + gain * level / 100
            relative.append(
                relative_row("perplexity", variant, level, perplexity, perplexity / 1.08, perplexity * 1.08)
            )
            relative.append(relative_row("tokens_per_second", variant, level, speed, speed - 0.02, speed + 0.02))
            summary.append(estimate_row("thousand_token_cache_bytes", variant, level, 9.2e6 * (1 - level / 100)))
    return find_fronts(
        "tiny",
        pd.DataFrame(summary, columns=list(SUMMARY_COLUMNS)),
        pd.DataFrame(relative, columns=list(RELATIVE_COLUMNS)),
    )


def first_figures() -> dict[str, Figure]:
    """The charts that answer, and what speed and memory cost. They have one size: the page draws its own for phones."""
    relative, ranked = answer_tables()
    return {
        "perplexity_over_levels": perplexity_over_levels(relative, tolerance=0.05),
        "rankings": rankings(ranked),
        "fronts": draw_fronts(front_table()),
    }


def figures_of(worse: float = 1.0, size: charts.FigureSize = charts.WIDE) -> dict[str, Figure]:
    heads, signals, replies = head_tables()
    maps, rounds = map_heads(heads, signals, replies), map_rounds(signals, replies)
    return charts.draw_all(*tables(worse), size=size) | draw_head_charts(
        "tiny", maps, rounds, agreement(heads), size=size
    )


def drawn() -> dict[str, Image.Image]:
    figures = figures_of() | first_figures()
    return {name: Image.open(io.BytesIO(charts.to_png(figure, dpi=DPI))) for name, figure in figures.items()}


def drawn_narrow(figures: dict[str, Figure]) -> dict[str, Image.Image]:
    return {name: Image.open(io.BytesIO(charts.to_png(figures[name], dpi=100))) for name in PINNED_NARROW}


def difference(one: Image.Image, two: Image.Image) -> float:
    """Mean difference of red, green and blue, of 1, after both are blurred by a pixel and a half and equally large."""
    blurred = [
        np.asarray(picture.convert("RGB").resize(one.size).filter(ImageFilter.GaussianBlur(1.5)), dtype=float) / 255
        for picture in (one, two)
    ]
    return float(np.abs(blurred[0] - blurred[1]).mean())


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    return drawn()


def test_every_chart_has_a_stored_picture(pictures):
    assert {path.stem for path in STORED.glob("*.png")} == set(pictures)


@pytest.mark.parametrize("path", sorted(STORED.glob("*.png")), ids=lambda path: path.stem)
def test_a_chart_looks_like_its_stored_picture(pictures, path: Path):
    stored = Image.open(path)
    picture = pictures[path.stem]
    assert max(abs(a - b) for a, b in zip(stored.size, picture.size, strict=True)) <= 2
    assert difference(stored, picture) < TOLERANCE


def test_a_changed_line_does_not_look_like_the_stored_picture(pictures):
    changed = charts.quality_metrics(tables(worse=1.6)[0])
    picture = Image.open(io.BytesIO(charts.to_png(changed, dpi=DPI)))
    assert difference(Image.open(STORED / "quality_metrics.png"), picture) > TOLERANCE


def test_every_chart_is_drawn_again_from_the_tables_as_written(tmp_path):
    """From CSV files alone, bytes and all: nothing that a chart needs is lost on the way to the disk."""
    written = []
    for number, table in enumerate((*tables(), *head_tables())):
        table.to_csv(tmp_path / f"{number}.csv", index=False)
        written.append(pd.read_csv(tmp_path / f"{number}.csv"))
    summary, contrasts, heads, signals, replies = written
    again = charts.draw_all(summary, contrasts) | draw_head_charts(
        "tiny", map_heads(heads, signals, replies), map_rounds(signals, replies), agreement(heads)
    )
    first = charts.draw_all(*tables())
    for name in first:
        assert charts.to_png(again[name], dpi=30) == charts.to_png(first[name], dpi=30), name
    assert set(again) | set(first_figures()) == {path.stem for path in STORED.glob("*.png")}


# Colours

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour as somebody with the deficiency sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(matrix @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_of_variants_stay_apart(deficiency):
    colours = {
        name: lab(look.colour, DEFICIENCIES[deficiency])
        for name, look in ((name, one.look) for name, one in VARIANTS.items())
    }
    distance = {(a, b): float(np.linalg.norm(colours[a] - colours[b])) for a in colours for b in colours if a < b}
    assert distance["agency", "baseline"] > 40
    close = [pair for pair, apart in distance.items() if apart < 10]
    assert not close


def test_variants_differ_without_any_colour():
    looks = [one.look for one in VARIANTS.values()]
    assert len({look.marker for look in looks}) == len({str(look.line) for look in looks}) == len(looks)
    # Ink on white, in grey prints as well: a contrast of 2 to 1 at least, and 3 to 1 for the two that matter most.
    for name, look in ((name, one.look) for name, one in VARIANTS.items()):
        lightness = lab(look.colour, np.eye(3))[0]
        luminance = ((lightness + 16) / 116) ** 3
        assert 1.05 / (luminance + 0.05) > (3.0 if name in ("baseline", "agency") else 2.0), name


def test_text_is_large_enough_in_print():
    """No text below 7 points on a page 8.5 inches wide."""
    for name, figure in charts.draw_all(*tables()).items():
        assert figure.get_size_inches()[0] == 8.5
        sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()}
        assert min(sizes) >= 7, name


# The narrow size


@pytest.fixture(scope="module")
def narrow() -> dict[str, Figure]:
    return figures_of(size=charts.NARROW)


@pytest.mark.parametrize("name", PINNED_NARROW)
def test_a_narrow_chart_looks_like_its_stored_picture(narrow, name: str):
    picture = Image.open(io.BytesIO(charts.to_png(narrow[name], dpi=100)))
    with Image.open(STORED_NARROW / f"{name}.png") as stored:
        assert picture.width == stored.width == 400
        assert abs(picture.height - stored.height) <= 2
        assert difference(stored, picture) < TOLERANCE


def beyond(axes: Axes) -> list[Text]:
    """Labels of ticks beyond an axis's ends, which matplotlib keeps and does not draw."""
    ends = [(axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))]
    return [tick.label1 for axis, (low, high) in ends
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            if axes.name != "polar" and not low <= tick.get_loc() <= high]  # fmt: skip


def told(figure: Figure) -> list[Text]:
    """Every text that can be seen."""
    hidden = {id(text) for axes in figure.axes for text in beyond(axes)}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
        and (text.axes is None or text.axes.axison)
    ]  # fmt: skip


def test_narrow_text_is_large_enough_and_lies_inside_the_picture(narrow, pictures):
    assert set(narrow) | set(first_figures()) == set(pictures)
    for name, figure in narrow.items():
        assert figure.get_size_inches()[0] == 4.0
        figure.draw_without_rendering()
        for text in told(figure):
            box = text.get_window_extent()
            if not box.width > 0:  # without a place on the axis, so not drawn
                continue
            at = (name, text.get_text(), box)
            assert text.get_fontsize() >= 7, at
            assert min(box.x0, box.y0) >= -1, at
            assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1, at


def test_narrow_labels_do_not_overlap(narrow):
    """Titles, ticks' and axes' labels of one panel, a pixel allowed; not the labels of points, which lie where they lie."""
    for name, figure in narrow.items():
        figure.draw_without_rendering()
        for axes in figure.axes:
            if not axes.axison or axes.name == "polar":
                continue
            hidden = {id(text) for text in beyond(axes)}
            ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
                     if id(tick.label1) not in hidden]  # fmt: skip
            texts = [axes.xaxis.label, axes.yaxis.label, axes._left_title, *ticks]
            boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
            for at, (one, first) in enumerate(boxes):
                for two, second in boxes[at + 1 :]:
                    across = min(first.x1, second.x1) - max(first.x0, second.x0)
                    along = min(first.y1, second.y1) - max(first.y0, second.y0)
                    assert min(across, along) <= 1, (name, one, two)


if __name__ == "__main__":
    STORED.mkdir(exist_ok=True)
    for name, picture in drawn().items():
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(STORED / f"{name}.png", optimize=True)
    STORED_NARROW.mkdir(exist_ok=True)
    for name, picture in drawn_narrow(figures_of(size=charts.NARROW)).items():
        colours = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        colours.save(STORED_NARROW / f"{name}.png", optimize=True)
