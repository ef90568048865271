"""The charts draw the tables' numbers as they are, keep fixed looks, and survive odd names, gaps and empty tables."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from builders import CONTRAST_COLUMNS, NAN, SUMMARY_COLUMNS, contrast_row, estimate_row
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from pruning_comparison.errors import InputError
from pruning_comparison.metrics import METRICS
from pruning_comparison.report.charts import overview as charts
from pruning_comparison.report.charts import radar as radar_charts
from pruning_comparison.variants import VARIANTS

MAIN = [
    "perplexity", "tokens_per_second", "tokens_per_second_in_proportion", "first_token_latency_s", "peak_memory_bytes",
    "generation_perplexity", "distinct_2", "seq_rep_4", "distinct_2_distance", "seq_rep_4_distance",
]  # fmt: skip


def summary_of(*rows):
    return pd.DataFrame(list(rows), columns=list(SUMMARY_COLUMNS))


def contrasts_of(*rows):
    return pd.DataFrame(list(rows), columns=list(CONTRAST_COLUMNS))


def whole(
    *,
    model="tiny",
    methods=("entropy",),
    variants=("baseline", "agency"),
    levels=(0, 50),
    temperatures=(0.7, 1.0),
    n=15,
    metrics=MAIN,
):
    """Both tables, with arbitrary numbers."""
    rows, pairs = [], []
    for method in methods:
        for metric in (METRICS[name] for name in metrics):
            sampled = metric.name.startswith(("distinct", "seq", "generation", "compression"))
            for level in levels:
                for t in temperatures if sampled else (NAN,):
                    for variant in variants:
                        value = 1.0 + level / 10 + len(variant) / 100
                        ends = (value * 0.9, value * 1.1) if n > 1 else (NAN, NAN)
                        rows.append(
                            estimate_row(
                                metric.name, variant, level, value, *ends, t=t, n=n, method=method, model=model
                            )
                        )
                    ends = (-12.0, -4.0) if n > 1 else (NAN, NAN)
                    unit = "1" if metric.name.endswith("_distance") else "%"
                    value = -0.08 if unit == "1" else -8.0
                    ends = tuple(end / 100 for end in ends) if unit == "1" else ends
                    pairs.append(
                        contrast_row(metric.name, level, value, *ends, t=t, n=n, method=method, model=model, unit=unit)
                    )
    return summary_of(*rows), contrasts_of(*pairs)


def panel(figure: Figure, title: str) -> Axes:
    found = [axes for axes in figure.axes if axes.get_title(loc="left").replace("\xa0", " ") == title]
    assert len(found) == 1, [axes.get_title(loc="left") for axes in figure.axes]
    return found[0]


def line(axes: Axes, label: str):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def bars(axes: Axes) -> list[tuple[float, float]]:
    """The two ends of every error bar, in drawing order."""
    return [
        (float(segment[0][1]), float(segment[1][1]))
        for collection in axes.collections
        if hasattr(collection, "get_segments")
        for segment in collection.get_segments()
    ]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def render(figure: Figure) -> bytes:
    return charts.to_png(figure, dpi=40)


# What is drawn is what the tables say


def test_points_and_bars_are_the_tables_numbers():
    figure = charts.quality_metrics(
        summary_of(
            estimate_row("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
            estimate_row("perplexity", "baseline", 50, 90.0, 80.0, 101.0),
            estimate_row("perplexity", "agency", 0, 30.0, 28.0, 32.0),
            estimate_row("perplexity", "agency", 50, 42.0, 40.0, 44.5),
        )
    )
    axes = panel(figure, "Perplexity")
    assert list(line(axes, "baseline").get_ydata()) == [30.0, 90.0]
    assert list(line(axes, "agency").get_ydata()) == [30.0, 42.0]
    assert bars(axes) == [(28.0, 32.0), (80.0, 101.0), (28.0, 32.0), (40.0, 44.5)]
    assert np.allclose(line(axes, "agency").get_xdata(), [0, 50], atol=1.0)


def test_rows_in_any_order_are_drawn_by_level():
    rows = [estimate_row("perplexity", "baseline", level, 30.0 + level) for level in (40, 0, 20)]
    axes = panel(charts.quality_metrics(summary_of(*rows)), "Perplexity")
    assert list(line(axes, "baseline").get_ydata()) == [30.0, 50.0, 70.0]


@pytest.mark.parametrize("how", ["row left out", "not a number", "infinite"])
def test_a_missing_number_leaves_a_gap(how):
    rows = [
        estimate_row("perplexity", variant, level, 30.0 + level)
        for variant in ("baseline", "agency")
        for level in (0, 20, 40)
    ]
    rows = [row for row in rows if not (row[1] == "agency" and row[3] == 20)]
    if how != "row left out":
        rows.append(estimate_row("perplexity", "agency", 20, NAN if how == "not a number" else math.inf))
    axes = panel(charts.quality_metrics(summary_of(*rows)), "Perplexity")
    drawn = line(axes, "agency").get_ydata()
    assert [math.isnan(value) for value in drawn] == [False, True, False]
    assert list(line(axes, "baseline").get_ydata()) == [30.0, 50.0, 70.0]


@pytest.mark.parametrize(("highest", "scale"), [(290.0, "linear"), (310.0, "log")])
def test_perplexity_is_logarithmic_beyond_one_decade(highest, scale):
    rows = [estimate_row("perplexity", "baseline", 0, 30.0), estimate_row("perplexity", "baseline", 50, highest)]
    assert panel(charts.quality_metrics(summary_of(*rows)), "Perplexity").get_yscale() == scale


def test_bytes_and_seconds_are_drawn_in_the_unit_on_the_axis():
    rows = [estimate_row("first_token_latency_s", "baseline", 0, 0.045, 0.040, 0.050)]
    axes = panel(charts.speed_comparison(summary_of(*rows)), "First-token latency")
    assert np.allclose(line(axes, "baseline").get_ydata(), [45.0])
    assert np.allclose(bars(axes), [(40.0, 50.0)])
    assert axes.get_ylabel() == "ms (lower is better)"
    page = charts.comprehensive_summary(summary_of(estimate_row("parameter_bytes", "baseline", 0, 498_000_000.0)))
    assert list(line(panel(page, "Parameters"), "baseline").get_ydata()) == [498.0]
    assert panel(page, "Parameters").get_ylabel() == "MB (lower is better)"


def test_the_dense_value_is_a_reference_line_per_temperature():
    rows = [
        estimate_row("distinct_2", "baseline", level, value, t=t)
        for t, level, value in ((0.7, 0, 0.61), (0.7, 50, 0.3), (1.0, 0, 0.82), (1.0, 50, 0.4))
    ]
    figure = charts.temperature(summary_of(*rows))
    for t, dense in ((0.7, 0.61), (1.0, 0.82)):
        axes = panel(figure, f"Diversity (distinct-2), T = {t:g}")
        assert list(line(axes, "_dense model").get_ydata()) == [dense, dense]


def test_quality_shows_the_temperature_nearest_to_one():
    rows = [estimate_row("distinct_2", "baseline", 0, value, t=t) for t, value in ((0.5, 0.1), (0.9, 0.2), (1.3, 0.3))]
    axes = panel(charts.quality_metrics(summary_of(*rows)), "Diversity (distinct-2), T = 0.9")
    assert list(line(axes, "baseline").get_ydata()) == [0.2]


def test_speed_by_bytes_and_speed_at_a_perplexity():
    figure = charts.speed_comparison(
        summary_of(
            estimate_row("tokens_per_second", "baseline", 0, 28.0),
            estimate_row("tokens_per_second", "baseline", 50, 30.0),
            estimate_row("tokens_per_second_in_proportion", "baseline", 0, 28.0),
            estimate_row("tokens_per_second_in_proportion", "baseline", 50, 36.0),
            estimate_row("perplexity", "baseline", 0, 30.0),
            estimate_row("perplexity", "baseline", 50, 60.0),
        )
    )
    drawn = [list(line.get_ydata()) for line in panel(figure, "Tokens per second").get_lines()]
    assert [28.0, 36.0] in drawn
    (curve,) = panel(figure, "Speed against perplexity").get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([30.0, 60.0], [28.0, 30.0])


# Relative improvement and radar: the sign, the scale


def test_positive_means_agency_better_whichever_way_the_metric_points():
    figure = charts.relative_improvement(
        contrasts_of(
            contrast_row("perplexity", 50, -35.2, -40.0, -30.0),
            contrast_row("tokens_per_second", 50, -5.0, -7.0, -3.0),
            contrast_row("distinct_2_distance", 50, 0.1, 0.05, 0.15, t=1.0, unit="1"),
        )
    )
    perplexity = panel(figure, "Perplexity")
    assert list(line(perplexity, "entropy").get_ydata()) == [35.2]
    assert bars(perplexity)[0] == (30.0, 40.0)
    assert "positive = agency better" in perplexity.get_ylabel()
    assert "%" in perplexity.get_ylabel()
    assert list(line(panel(figure, "Tokens per second"), "entropy").get_ydata()) == [-5.0]
    distance = panel(figure, "Distinct-2 distance, T = 1")
    assert list(line(distance, "entropy").get_ydata()) == [-0.1]
    assert "%" not in distance.get_ylabel()


def test_other_contrasts_and_metrics_without_a_direction_are_not_improvements():
    table = contrasts_of(contrast_row("perplexity", 50, -35.2), contrast_row("distinct_2", 50, 3.0, t=1.0))
    other = contrasts_of(contrast_row("perplexity", 80, 99.0)).assign(contrast="agency-adaptation vs baseline")
    figure = charts.relative_improvement(pd.concat([table, other]))
    assert list(line(panel(figure, "Perplexity"), "entropy").get_ydata()) == [35.2 * 1.0]
    assert len([axes for axes in figure.axes if axes.axison]) == 1


def radar_tables(*, low=-60.0, high=-20.0):
    """At 80 %: perplexity halved (200 %), speed doubled (200 %), the distance halved (0.2 to 0.1: 200 %)."""
    summary = summary_of(
        estimate_row("perplexity", "baseline", 80, 400.0),
        estimate_row("perplexity", "agency", 80, 200.0),
        estimate_row("tokens_per_second", "baseline", 80, 10.0),
        estimate_row("tokens_per_second", "agency", 80, 20.0),
        estimate_row("distinct_2_distance", "baseline", 80, 0.2, t=1.0),
        estimate_row("distinct_2_distance", "agency", 80, 0.1, t=1.0),
    )
    contrasts = contrasts_of(
        contrast_row("perplexity", 40, -1.0),
        contrast_row("perplexity", 80, -50.0, low, high),
        contrast_row("tokens_per_second", 80, 100.0, 50.0, 300.0),
        contrast_row("distinct_2_distance", 80, -0.1, -0.15, 0.0, t=1.0, unit="1"),
    )
    return summary, contrasts


def test_radar_scores_are_relative_to_the_baseline_and_more_is_better():
    level, scores = radar_charts._scores(*radar_tables(), "entropy")
    assert level == 80
    by_metric = {score.metric: (score.value, score.low, score.high) for score in scores}
    assert by_metric["perplexity"] == pytest.approx((2.0, 1 / 0.8, 1 / 0.4))
    assert by_metric["tokens_per_second"] == pytest.approx((2.0, 1.5, 4.0))
    assert by_metric["distinct_2_distance"] == pytest.approx((2.0, 1.0, 4.0))
    assert (scores[0].metric, scores[0].baseline, scores[0].agency) == ("perplexity", 400.0, 200.0)


def test_radar_says_raw_values_and_draws_the_same_numbers_twice():
    figure = charts.radar(*radar_tables())
    assert "400 → 200" in words(figure)
    polar, dots = figure.axes
    polygon = next(line for line in polar.get_lines() if len(line.get_xdata()) == 4)
    assert list(polygon.get_ydata()) == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert "100 %" in [label.get_text() for label in polar.get_yticklabels()]
    points = [line for line in dots.get_lines() if line.get_marker() == "s"]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([1.0, 1.0, 1.0])
    assert words(figure).count("200 %") >= 3


def test_radar_points_beyond_its_scale_and_stays_finite():
    summary, contrasts = radar_tables()
    contrasts.loc[contrasts["metric"] == "distinct_2_distance", ["estimate", "ci_low", "ci_high"]] = [-0.2, -0.25, -0.1]
    contrasts.loc[contrasts["metric"] == "perplexity", ["estimate", "ci_low", "ci_high"]] = [9_900.0, 9_000.0, 11_000.0]
    figure = charts.radar(summary, contrasts)
    assert "triangle" in words(figure)
    assert "∞ %" in words(figure)
    for axes in figure.axes:
        for drawn in axes.get_lines():
            assert np.isfinite(np.asarray(drawn.get_ydata(), dtype=float)).all()
    render(figure)


def test_radar_needs_three_quantities():
    summary, contrasts = radar_tables()
    figure = charts.radar(summary, contrasts[contrasts["metric"] == "perplexity"])
    assert "three quantities" in words(figure)
    render(figure)


# Fixed looks


def test_baseline_and_agency_look_the_same_everywhere_and_differ_without_colour():
    summary, _ = whole()
    looks = set()
    for figure in (charts.quality_metrics(summary), charts.speed_comparison(summary), charts.temperature(summary)):
        for axes in figure.axes:
            for variant in ("baseline", "agency"):
                for drawn in axes.get_lines():
                    if drawn.get_label() == variant:
                        looks.add((variant, to_hex(drawn.get_color()), drawn.get_marker()))
    assert looks == {("baseline", "#d55e00", "o"), ("agency", "#0072b2", "s")}
    styles = [(look.marker, str(look.line)) for look in [one.look for one in VARIANTS.values()]]
    assert len({marker for marker, _ in styles}) == len(styles) == len({line for _, line in styles})


def test_the_callers_style_is_neither_used_nor_changed():
    summary, _ = whole(temperatures=(1.0,))
    plain = render(charts.quality_metrics(summary))
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": False}):
        before = dict(matplotlib.rcParams)
        assert render(charts.quality_metrics(summary)) == plain
        assert dict(matplotlib.rcParams) == before


# n and intervals in words


def test_the_caption_states_n():
    rows = [
        estimate_row("perplexity", "baseline", 0, 30.0, 29.0, 31.0, n=12),
        estimate_row("perplexity", "baseline", 50, 60.0, 59.0, 61.0, n=10),
        estimate_row("distinct_2", "baseline", 0, 0.5, 0.4, 0.6, t=1.0, n=40),
    ]
    text = words(charts.quality_metrics(summary_of(*rows))).replace("\n", " ")
    assert "Perplexity 10 to 12; Diversity (distinct-2) 40" in text


def test_one_observation_has_no_interval_and_says_so():
    figure = charts.quality_metrics(summary_of(estimate_row("perplexity", "baseline", 0, 30.0, n=1)))
    assert "n = 1: one observation per point, so there is no interval." in words(figure)
    assert bars(panel(figure, "Perplexity")) == []


# Odd names, empty tables, many methods


@pytest.mark.parametrize(
    "name",
    [
        "a" * 60,
        r"$\broken{$",
        "模型 модель مدل 🙂",
        "two\nlines\tand a tab",
        "lone \ud800 surrogate \x00",
        r"\frac{1}{0}",
        "_hidden",
    ],
)
def test_names_are_drawn_without_warnings(name):
    summary, contrasts = whole(model=name, methods=(name,), temperatures=(1.0,))
    for figure in (
        charts.speed_comparison(summary),
        charts.relative_improvement(contrasts),
        charts.radar(summary, contrasts),
    ):
        render(figure)
    if name.isascii() and "\n" not in name and "\x00" not in name:
        assert name in words(charts.quality_metrics(summary)).replace("\n", "")


def test_all_text_lies_inside_the_figure():
    summary, contrasts = whole(model="m" * 60, methods=("entropy", "magnitude"), metrics=tuple(METRICS))
    for name, figure in charts.draw_all(summary, contrasts).items():
        figure.draw_without_rendering()
        page = figure.bbox
        for text in figure.findobj(Text):
            if text.get_text().strip() and text.get_visible():
                box = text.get_window_extent()
                if box.width == 0 or (text.axes is not None and not text.axes.axison):
                    continue
                at = (name, text.get_text(), box)
                assert min(box.x0, box.y0) >= -1, at
                assert max(box.x1 - page.x1, box.y1 - page.y1) <= 1, at


def test_empty_tables_give_pages_that_say_so():
    summary, contrasts = summary_of(), contrasts_of()
    figures = charts.draw_all(summary, contrasts)
    assert set(figures) == {
        "speed_comparison", "quality_metrics", "relative_improvement", "radar", "temperature", "comprehensive_summary",
    }  # fmt: skip
    for figure in figures.values():
        render(figure)
    assert "measured" in words(figures["quality_metrics"])


def test_tables_of_missing_numbers_give_pages_that_say_so():
    summary, contrasts = whole(temperatures=(1.0,))
    for table in (summary, contrasts):
        table[["estimate", "ci_low", "ci_high"]] = NAN
    for figure in charts.draw_all(summary, contrasts).values():
        render(figure)


def test_the_baseline_alone_is_drawn():
    summary, contrasts = whole(variants=("baseline",), temperatures=(1.0,))
    figures = charts.draw_all(summary, contrasts.iloc[:0])
    assert list(line(panel(figures["quality_metrics"], "Perplexity"), "baseline").get_ydata()) == pytest.approx(
        [1.08, 6.08]
    )
    assert "no comparison" in words(figures["radar"])


def test_one_level_and_one_observation_are_drawn():
    summary, contrasts = whole(levels=(40,), n=1, temperatures=(1.0,))
    for figure in charts.draw_all(summary, contrasts).values():
        render(figure)


def test_six_methods_and_six_variants_have_panels_of_their_own():
    methods = ("entropy", "random", "magnitude", "taylor", "fisher", "ablation")
    summary, contrasts = whole(methods=methods, variants=tuple(VARIANTS), temperatures=(1.0,))
    keep = ["perplexity", "distinct_2", "tokens_per_second", "distinct_2_distance"]
    summary, contrasts = (table[table["metric"].isin(keep)] for table in (summary, contrasts))
    figures = charts.draw_all(summary, contrasts)
    assert [name for name in figures if name.startswith("comprehensive")] == [
        f"comprehensive_summary_{method}" for method in methods
    ]
    for method in methods:
        assert len(panel(figures["quality_metrics"], f"{method}: Perplexity").get_lines()) >= 6
    assert {line.get_label() for line in panel(figures["relative_improvement"], "Perplexity").get_lines()} >= set(
        methods
    )
    render(figures["quality_metrics"])


def test_a_metric_this_version_does_not_know_is_refused_by_name():
    table = summary_of(estimate_row("perplexity", "baseline", 0, 2.0)).assign(metric="something_new", unit="1")
    with pytest.raises(InputError, match="metric: 'something_new' is unknown"):
        charts.comprehensive_summary(table)


def test_two_models_in_one_table_are_refused():
    rows = [estimate_row("perplexity", "baseline", 0, 2.0, model=name) for name in ("one", "two")]
    with pytest.raises(InputError, match="2: \\['one', 'two'\\]"):
        charts.quality_metrics(summary_of(*rows))


def test_the_summary_page_wants_one_known_method():
    summary, _ = whole(methods=("entropy", "random"), temperatures=(1.0,))
    with pytest.raises(InputError, match="method="):
        charts.comprehensive_summary(summary)
    with pytest.raises(InputError, match="'nonsense'"):
        charts.comprehensive_summary(summary, method="nonsense")


@pytest.mark.parametrize("reach", [1e20, 1e200])
def test_intervals_beyond_all_measure_are_drawn_without_warnings(reach: float):
    rows = [
        estimate_row(metric, variant, level, 40.0, 40.0 / reach, 40.0 * reach)
        for metric in ("perplexity", "tokens_per_second", "first_token_latency_s")
        for variant in ("baseline", "agency")
        for level in (0, 50)
    ]
    for figure in charts.draw_all(summary_of(*rows), contrasts_of()).values():
        assert charts.to_png(figure, dpi=40)


# Files


def test_saved_charts_are_the_same_bytes_each_time(tmp_path: Path):
    table = summary_of(
        estimate_row("perplexity", "baseline", 0, 30.0, 28.0, 32.0),
        estimate_row("perplexity", "agency", 50, 40.0, 38.0, 42.0),
    )
    for folder in ("one", "two"):
        charts.save_charts({"quality_metrics": charts.quality_metrics(table)}, tmp_path / folder)
    for name in ("quality_metrics.png", "quality_metrics.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    svg = (tmp_path / "one" / "quality_metrics.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in svg
    png = (tmp_path / "one" / "quality_metrics.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == round(8.5 * 150)


def test_chart_names_become_safe_file_names(tmp_path: Path):
    figure = Figure()
    pictures = charts.save_charts({"summary_a/../b": figure}, tmp_path)
    written = list(tmp_path.iterdir())
    assert sorted(path.suffix for path in written) == [".png", ".svg"]
    assert pictures == {"summary_a/../b": next(tmp_path.glob("*.png")).read_bytes()}
    with pytest.raises(InputError, match="same file name"):
        charts.save_charts({"a/b": figure, "a b": figure}, tmp_path)


# A bar that reaches far does not squeeze the lines


def test_one_wide_interval_does_not_flatten_the_lines():
    rows = [
        estimate_row("distinct_2", variant, level, 0.5 + level / 100, -40.0, 40.0, t=1.0)
        for level in (0, 20) for variant in ("baseline", "agency")
    ]  # fmt: skip
    axes = panel(charts.quality_metrics(summary_of(*rows)), "Diversity (distinct-2), T = 1")
    low, high = axes.get_ylim()
    assert 0.2 / (high - low) > 0.2, "the estimates span a fifth of the panel at least"
    assert low < 0.5 < 0.7 < high
    pairs = [contrast_row("tokens_per_second", level, float(level), -900.0, 900.0) for level in (0, 20)]
    low, high = panel(charts.relative_improvement(contrasts_of(*pairs)), "Tokens per second").get_ylim()
    assert 20 / (high - low) > 0.1


def test_speed_has_both_bounds():
    rows = [
        estimate_row(metric, variant, level, value)
        for variant in ("baseline", "agency")
        for level in (0, 50)
        for metric, value in (
            ("tokens_per_second", 20.0), ("tokens_per_second_in_proportion", 20.0 + level / 10),
            ("first_token_latency_s", 0.04), ("first_token_latency_in_proportion_s", 0.04 - level / 5000),
        )
    ]  # fmt: skip
    figure = charts.speed_comparison(summary_of(*rows))
    drawn = [list(line.get_ydata()) for line in panel(figure, "First-token latency").get_lines()
             if line.get_label() == "_reference"]  # fmt: skip
    assert np.allclose(drawn, [[40.0, 30.0]] * 2)
    assert "in proportion to the bytes or FLOPs left" in words(figure)


def test_four_panels_of_a_method_stand_two_by_two_where_only_three_fit():
    rows = [
        estimate_row(metric, variant, level, 1.0 + level, method=method)
        for metric in ("perplexity", "kl_to_dense", "distinct_2", "seq_rep_4")
        for variant in ("baseline", "agency")
        for level in (0, 50)
        for method in ("entropy", "random")
    ]
    figure = charts.quality_metrics(summary_of(*rows))
    figure.canvas.draw()
    places = [axes.get_position() for axes in figure.axes]
    assert len({round(place.x0, 2) for place in places}) == 2
    assert len({round(place.y0, 2) for place in places}) == 4
    assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False] * 6 + [True] * 2
