"""Metrics are one record each: the records agree with each other, and everything else follows from them."""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from typing import get_args

import pandas as pd
import pytest
from builders import estimate_row, save_tiny_model, tiny_spec, write_short_texts

from pruning_comparison.analysis.estimates import SUMMARY_COLUMNS
from pruning_comparison.errors import InputError
from pruning_comparison.measure import text_quality
from pruning_comparison.measure.generation import Timing
from pruning_comparison.measure.text_quality import WrittenText, text_functions
from pruning_comparison.metrics import METRICS, RAW, Metric, Role, in_role, metric_named, of_kind, unit_of
from pruning_comparison.report.tables import method_tables
from pruning_comparison.report.write import write_results
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.measure_cell import untimed
from pruning_comparison.store.journal import RunStore

ROOT = Path(__file__).resolve().parents[1]

# The records


@pytest.mark.parametrize("name", METRICS)
def test_a_record_is_consistent(name):
    metric = METRICS[name]
    low, high = metric.bounds
    assert metric.name == name
    assert 0 <= low < high
    assert metric.revision >= 1
    assert bool(metric.compute) == (metric.kind in ("loss", "divergence", "text"))
    assert bool(metric.over) == (metric.kind in ("loss", "divergence"))
    assert bool(metric.distance_of) == (metric.kind == "distance")
    assert bool(metric.ratio_of) == (metric.kind == "ratio")
    if metric.compute:
        assert callable(metric.function())
    if metric.over:
        assert {metric.over, metric.summed} <= RAW.keys()
    if metric.distance_of:
        assert METRICS[metric.distance_of].kind == "text"
        assert (metric.direction, metric.scale) == ("lower", "linear")
    if metric.ratio_of:
        assert (METRICS[metric.ratio_of].kind, METRICS[metric.ratio_of].scale) == ("loss", "log")
    if metric.kind in ("cost", "reference"):
        assert not metric.compared
    if metric.kind in ("timing", "memory"):
        assert name in {field.name for field in fields(Timing)}
    # Units are named where there are any; a metric without one is a plain number.
    for unit, ending in (("s", "_s"), ("byte", "_bytes"), ("token", "_tokens"), ("FLOP", "_flops")):
        assert (metric.unit == unit) == name.endswith(ending)


def test_labels_tell_metrics_apart():
    for of_metric in ("label", "short_label", "spoke", "phrase"):
        words = [getattr(metric, of_metric) for metric in METRICS.values()]
        assert len(set(words)) == len(words), of_metric
        assert all(words)


def test_words_that_a_record_does_not_give_follow_from_its_label():
    plain = Metric("own", kind="text", unit="1", label="Own figure")
    assert (plain.short_label, plain.spoke, plain.phrase) == ("Own figure", "Own figure", "own figure")
    assert Metric("own", kind="text", unit="1", label="Own figure", short_label="Own").spoke == "Own"
    assert Metric("own", kind="text", unit="1", label="Own figure", phrase="that").phrase == "that"


CHOSEN: dict[str, list[str]] = {
    "main table": [
        "perplexity", "perplexity_ratio", "kl_to_dense", "tokens_per_second", "first_token_latency_s",
        "generation_perplexity", "distinct_2", "seq_rep_4", "distinct_2_distance", "seq_rep_4_distance",
        "peak_memory_bytes", "adaptation_s",
    ],
    "quality chart": ["perplexity", "kl_to_dense", "distinct_2", "seq_rep_4"],
    "temperature chart": ["generation_perplexity", "distinct_2", "seq_rep_4"],
    "improvement chart": [
        "perplexity", "tokens_per_second", "first_token_latency_s", "peak_memory_bytes", "distinct_2_distance",
        "seq_rep_4_distance",
    ],
    "radar": [
        "perplexity", "tokens_per_second", "first_token_latency_s", "peak_memory_bytes", "distinct_2_distance",
        "seq_rep_4_distance", "generation_perplexity_distance",
    ],
    "tight resources": [
        "perplexity", "tokens_per_second", "first_token_latency_s", "distinct_2_distance", "generation_perplexity_distance",
    ],
    "which metrics": [
        "perplexity", "distinct_2_distance", "seq_rep_4_distance", "generation_perplexity_distance", "tokens_per_second",
        "first_token_latency_s", "time_per_output_token_s", "peak_memory_bytes",
    ],
    "two runs": [
        "perplexity", "bits_per_byte", "distinct_2_distance", "seq_rep_4_distance", "generation_perplexity_distance",
        "tokens_per_second", "first_token_latency_s",
    ],
}  # fmt: skip


@pytest.mark.parametrize("role", get_args(Role))
def test_a_role_keeps_its_metrics_in_their_order_whatever_else_joins_them(role):
    chosen = in_role(role)
    assert [name for name in chosen if name in CHOSEN[role]] == CHOSEN[role]
    places = [METRICS[name].roles[role] for name in chosen]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("role", ["improvement chart", "radar", "tight resources", "which metrics", "two runs"])
def test_what_judges_is_compared_and_has_a_better_direction(role):
    for name in in_role(role):
        assert METRICS[name].compared
        assert METRICS[name].direction != "none"


def test_computed_examples_lie_within_the_bounds():
    """Texts of every length and of few or many different tokens, loops and word salad included."""
    draw = random.Random(0)
    functions = text_functions()
    assert list(functions) == [metric.name for metric in of_kind("text")]
    for length in range(40):
        for vocabulary in (2, 10, 10_000):
            tokens = [draw.randrange(vocabulary) for _ in range(length)]
            letters = "".join(chr(97 + token % 26) for token in tokens)
            written = WrittenText(tokens, letters, vocabulary, nats=length * draw.random() * 9)
            for name, function in functions.items():
                value = function(written)
                assert value is None or METRICS[name].possible(value), (name, value, tokens)
                assert value is not None or length < 4


def test_bounds_leave_out_what_cannot_be():
    assert METRICS["distinct_2"].possible(0.0)
    assert METRICS["distinct_2"].possible(1.0)
    assert not METRICS["distinct_2"].possible(1.1)
    assert not METRICS["perplexity"].possible(0.9)
    assert not METRICS["end_to_end_s"].possible(0.0)  # it has no logarithm
    assert METRICS["adaptation_s"].possible(0.0)


def test_an_unknown_name_raises_with_the_nearest():
    with pytest.raises(InputError, match=r"metric: 'perplexty' is unknown\. Did you mean perplexity\?"):
        metric_named("perplexty")
    with pytest.raises(InputError, match="metric: 'window_rhymes' is unknown"):
        unit_of("window_rhymes")
    table = pd.DataFrame([estimate_row("perplexity", "baseline", 0, 9.0)], columns=list(SUMMARY_COLUMNS))
    unknown = table.assign(metric="rhymes")
    with pytest.raises(InputError, match="metric: 'rhymes' is unknown"):
        method_tables(unknown, pd.DataFrame(columns=["method", "contrast", "metric", "level", "temperature"]))


def test_units_of_what_a_stored_run_of_0_1_0_holds():
    (journal,) = (ROOT / "tests" / "recorded" / "run_of_0.1.0").glob("*/journal.sqlite")
    held = sqlite3.connect(f"file:{journal}?mode=ro&immutable=1", uri=True)
    units = dict(held.execute("SELECT DISTINCT metric, unit FROM measurements").fetchall())
    held.close()
    assert len(units) > 20
    assert {name: unit_of(name) for name in units} == units


def test_timings_that_were_not_asked_for_are_not_missing():
    missing = [row.metric for variant, row in untimed(["agency"], "why")]
    assert missing == [
        "tokens_per_second", "first_token_latency_s", "time_per_output_token_s", "end_to_end_s", "cache_bytes",
    ]  # fmt: skip


def test_records_analysis_and_report_need_no_torch():
    """A report is drawn in seconds; loading torch and transformers would take as long again."""
    code = """
        import sys
        import pruning_comparison.analysis.between_runs, pruning_comparison.analysis.hypotheses
        import pruning_comparison.progress, pruning_comparison.report.write
        from pruning_comparison.metrics import of_kind
        for metric in of_kind("loss"):
            metric.function()
        sys.exit("torch" in sys.modules or "transformers" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# A new metric


def mean_letter(text: str) -> float | None:
    """Mean Unicode number of the characters; unit 1. None for empty text."""
    return sum(map(ord, text)) / len(text) if text else None


def tokens_and_vocabulary(tokens: list[int], vocabulary: int, factor: float) -> float:
    """Never possible where ``factor`` is above 1: bounds say at most 1."""
    return factor * sum(0 <= token < vocabulary for token in tokens) / len(tokens)


class Cells(HTMLParser):
    """Rows of all tables as lists of what their cells say."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.mark.usefixtures("no_charts")
def test_a_new_metric_of_text_is_measured_estimated_and_shown(tmp_path, monkeypatch):
    for metric in (
        Metric(
            "mean_letter",
            kind="text",
            unit="1",
            label="Mean letter",
            compute=f"{__name__}:mean_letter",
            roles={"main table": 12},
        ),
        Metric(
            "mean_letter_distance",
            kind="distance",
            unit="1",
            label="Mean letter: distance from dense",
            direction="lower",
            distance_of="mean_letter",
        ),
        Metric(
            "too_much",
            kind="text",
            unit="1",
            label="More than all",
            bounds=(0.0, 1.0),
            compute=tokens_and_vocabulary,
            settings={"factor": 3.0},
        ),
    ):
        monkeypatch.setitem(METRICS, metric.name, metric)
    model = save_tiny_model(tmp_path / "model")
    write_short_texts(model / "texts")
    spec = tiny_spec(model, num_tokens=12, max_prompts=2, variants=("baseline",))
    run = run_comparison(spec, output_dir=tmp_path / "runs", raise_failures=True)
    with RunStore(run) as store:
        texts, measurements = store.table("texts"), store.table("measurements")
    written = {(row["level"], row["prompt"]): row["text"] for row in texts.to_dict("records")}
    assert len(written) == 4

    rows = measurements[measurements["metric"] == "mean_letter"]
    measured = {(row["level"], row["prompt"]): row["value"] for row in rows.to_dict("records")}
    assert measured == pytest.approx({key: mean(map(ord, text)) for key, text in written.items()})
    assert set(rows["unit"]) == {"1"}
    impossible = measurements[measurements["metric"] == "too_much"]
    assert impossible["value"].isna().all()
    assert set(impossible["reason"]) == {"3 is not a possible value: 0 to 1 is"}

    report = write_results(run, save_outputs=False)
    summary = pd.read_csv(run / "summary.csv").set_index(["metric", "level"])["estimate"]
    prompts = sorted({prompt for _, prompt in written})
    for level in (0.0, 50.0):
        assert summary["mean_letter", level] == pytest.approx(mean(measured[level, p] for p in prompts))
        apart = mean(abs(measured[level, p] - measured[0.0, p]) for p in prompts)
        assert summary["mean_letter_distance", level] == pytest.approx(apart)
    assert summary["mean_letter_distance", 50.0] > 0
    assert "too_much" not in summary.index.get_level_values("metric")
    missing = pd.read_csv(run / "missing.csv")
    assert set(missing["metric"]) == {"too_much"}

    shown = Cells(report.read_text("utf-8")).rows
    assert [row[:3] for row in shown if row[0] == "Mean letter" and len(row) > 3] == [
        ["Mean letter", "0 %", "1"],
        ["Mean letter", "50 %", "1"],
    ]
    assert any(row[0] == "Mean letter: distance from dense" and row[1] == "50 %" for row in shown if len(row) > 3)


def test_a_function_that_asks_for_what_there_is_not_is_refused(monkeypatch):
    metric = Metric("own", kind="text", unit="1", label="Own", compute=lambda tokens, rhymes: 0.0)
    monkeypatch.setitem(METRICS, "own", metric)
    with pytest.raises(InputError, match=r"metric own: 'rhymes' is unknown.*tokens, text, vocabulary, nats"):
        text_functions()
    given = Metric("own", kind="text", unit="1", label="Own", compute=lambda tokens, rhymes=2.0: rhymes * len(tokens))
    monkeypatch.setitem(METRICS, "own", given)
    assert text_functions()["own"](WrittenText([1, 2, 3], "abc", 9, 1.0)) == 6.0


def test_the_worked_example_of_contributing_works(monkeypatch):
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    section = page.split("## Adding a metric")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3  # function, record, test
    names: dict[str, object] = {"METRICS": dict(METRICS), "Metric": Metric}
    for block in blocks:
        exec(textwrap.dedent(block), names)
    names["test_longest_run_by_hand"]()  # type: ignore[operator]
    monkeypatch.setattr(text_quality, "longest_run", names["longest_run"], raising=False)
    for name, metric in names["METRICS"].items():  # type: ignore[attr-defined]
        monkeypatch.setitem(METRICS, name, metric)
    assert text_functions()["longest_run"](WrittenText([4, 4, 1], "", 9, 1.0)) == 2 / 3
    test_a_record_is_consistent("longest_run")
    test_a_record_is_consistent("longest_run_distance")
    test_labels_tell_metrics_apart()
