"""The report is one offline, escaped, accessible HTML document under 3 MB, whatever the texts in it say."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from builders import (
    CELL_COLUMNS,
    MISSING_COLUMNS,
    NASTY,
    SAID,
    TEXT_COLUMNS,
    estimate_row,
    failed_cell,
    ranking_row,
    relative_row,
    render_page,
    text_row,
)
from matplotlib.figure import Figure

from pruning_comparison.analysis.hypotheses import HYPOTHESIS_COLUMNS
from pruning_comparison.analysis.rankings import RANKING_COLUMNS
from pruning_comparison.analysis.relative import RELATIVE_COLUMNS
from pruning_comparison.analysis.tradeoffs import EQUAL_COLUMNS, OPTIMUM_COLUMNS
from pruning_comparison.errors import InputError
from pruning_comparison.metrics import METRICS
from pruning_comparison.report.answer import Answer
from pruning_comparison.report.between_runs import DifferenceInWords, LimitInWords
from pruning_comparison.report.findings import Finding
from pruning_comparison.report.page import render_between_runs, render_report
from pruning_comparison.report.verdicts import Verdict
from pruning_comparison.store import ModelFacts

NAN = math.nan
SUMMARY = ["model", "variant", "method", "level", "temperature", "metric", "estimate", "ci_low", "ci_high", "n", "unit"]
CONTRASTS = [
    "model", "method", "level", "temperature", "metric", "contrast",
    "estimate", "ci_low", "ci_high", "n", "unit", "better",
]  # fmt: skip


class Document(HTMLParser):
    """Collects what the tests ask about."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input", "source"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((tag, ""))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text.append(data)
        if self.headings and self.open and set(self.open) & {"h1", "h2", "h3", "h4"}:
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)
        if set(self.open) & {"td", "th"}:
            self.cells[-1][-1] += data if self.open[-1] != "small" else f" [{data}]"

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return "".join(self.text)


def contrast(metric, level, value, low, high, *, t=NAN, method="entropy", unit="%"):
    better = METRICS[metric].direction
    return ("tiny", method, float(level), t, metric, "agency vs baseline", value, low, high, 15, unit, better)


def answer(name, verdict, estimate, low, high, **other):
    row = {
        "model": "tiny", "method": "entropy", "temperature": NAN, "id": name, "kind": "expectation",
        "family": "expectations", "contrast": "agency vs baseline", "metric": "perplexity",
        "estimand": "mean over levels >= 40", "scale": "log_ratio", "estimate": estimate, "ci_low": low, "ci_high": high,
        "unit": "log ratio", "n": 15, "n_iterations": 3, "n_clusters": 5, "cluster": "document", "p": 0.0002,
        "p_holm": 0.012, "smallest_p": 0.0625, "test": "crossed random effects", "p_claim_holm": 0.02,
        "effect_size": -2.5, "effect_size_low": -3.0, "effect_size_high": -2.0, "effect_size_name": "standardised",
        "margin": 0.05, "better": "lower", "verdict": verdict, "reason": "better", "more_iterations": NAN,
        "more_clusters": NAN,
    }  # fmt: skip
    return {**row, **other}


def small_figure() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [1, 2])
    return figure


# One file, offline


def test_nothing_is_fetched_from_anywhere():
    html = render_page(
        figures={"speed_comparison": small_figure()},
        manifest={"model": {"name": "https://example.org/model"}, "spec": {"model_name": "http://example.org"}},
    )
    document = Document(html)
    for tag, attributes in document.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    (policy,) = [meta["content"] for meta in document.having("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_inner_links_lead_somewhere():
    missing = [("agency", "entropy", 80.0, "perplexity", "why", 3)]
    document = Document(render_page(texts=[], missing=missing))
    targets = {attributes["id"] for _, attributes in document.tags if "id" in attributes}
    links = [attributes["href"] for attributes in document.having("a")]
    assert links
    assert all(link is not None and link[1:] in targets for link in links)


def test_charts_are_drawings_inside_the_page_with_words_for_those_who_cannot_see_them():
    figures = {"radar": small_figure(), "temperature": small_figure(), "comprehensive_summary_fisher": small_figure()}
    html = render_page(figures=figures)
    document = Document(html)
    drawings = document.having("svg")
    assert len(drawings) == 2, "the page with every measurement stays a file: the interactive chart shows it"
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert "tiny" in str(drawing["aria-label"])
    ids = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "two drawings share an id"
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert used <= set(ids)


def test_drawings_take_the_colours_of_the_page():
    html = render_page(figures={"radar": small_figure()})
    drawing = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--ink)" in drawing or "var(--card)" in drawing
    assert "#ffffff" not in drawing
    assert "<style" not in drawing, "its rules would hold for the whole page"


def test_many_large_charts_and_long_tables_stay_under_three_megabytes():
    def noise(width: float) -> Figure:
        figure = Figure(figsize=(width, 11))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.pcolormesh(np.random.default_rng(0).random((100, 120)))
        return figure

    rows = [
        estimate_row(metric, variant, level, 0.001234, 0.001111, 0.001345, method=f"method{number}")
        for metric in METRICS
        for variant in ("baseline", "agency", "agency-adaptation")
        for level in range(0, 100, 5)
        for number in range(4)
    ]
    texts = [
        text_row(variant, level, f"{prompt}: {'p' * 4_000}", "<&>" * 4_000, method=f"method{number}")
        for variant in ("baseline", "agency")
        for level in (0, 50)
        for prompt in range(9)
        for number in range(4)
    ]
    html = render_page(summary=rows, figures={f"radar_{index}": noise(8.5) for index in range(2)}, texts=texts)
    assert len(html.encode("utf-8")) < 3_000_000
    words = Document(html).words
    assert "Left out to keep this file small, and in charts/:" in words
    assert "measurements are left out to keep this file small" in words
    assert "rows are left out to keep this file small" in words
    assert "prompts are left out to keep this file small" in words


# Text that would break a page


def test_markup_in_any_text_is_escaped_and_survives():
    html = render_page(
        summary=[
            estimate_row("perplexity", "baseline", 0, 30.0, model=NASTY, method=NASTY),
            estimate_row("perplexity", "agency", 50, 30.0, model=NASTY, method=NASTY),
        ],
        cells=[failed_cell(NASTY, NASTY, 0, 50.0, NASTY)],
        missing=[(NASTY, NASTY, 50.0, "perplexity", NASTY, 1)],
        findings=[Finding(NASTY, NASTY, NASTY)],
        verdicts=[Verdict("E1", NASTY, NASTY, NASTY, "supported", NASTY)],
        answers=[
            answer("E2", "supported", -0.1, -0.2, -0.05, estimand=NASTY, method=NASTY, test=NASTY, reason=NASTY),
            answer("X:area", "refuted", 0.1, 0.05, 0.2, kind="exploratory", contrast=NASTY, reason=NASTY),
        ],
        optimal=[("tiny", NASTY, NASTY, NAN, 0.05, NAN, NAN, "", 0, 0, 0, NASTY)],
        equal=[("tiny", NASTY, NAN, NAN, NAN, NAN, NAN, NAN, 0, NASTY)],
        figures={NASTY: small_figure()},
        manifest={
            "model": {"name": NASTY, NASTY: NASTY},
            "spec": {"a": [NASTY], "b": {"c": NASTY}, NASTY: NASTY},
            "versions": {NASTY: NASTY},
            "hardware": {NASTY: NASTY},
            "warnings": [NASTY],
            "commit": NASTY,
            "started": NASTY,
        },
        texts=[text_row(variant, level, NASTY, NASTY) for variant in ("baseline", "agency") for level in (0, 50)],
    )
    html.encode("utf-8")
    document = Document(html)
    assert len(document.having("script")) == 4, "three scripts and the numbers of the charts"
    assert not re.search("[\x00\x1b\ud800-\udfff]", html)
    survived = "<script>alert('x')</script> & \"$quoted$\" \ufffd \ufffd \u202eabc שלום \ufffd[31m"
    assert document.words.count(survived) >= 15
    assert not [name for _, attributes in document.tags for name in attributes if name.startswith("on")]


def test_generated_text_keeps_its_direction_to_itself():
    document = Document(render_page(texts=[text_row("baseline", level, "prompt", "\u202eevil") for level in (0, 50)]))
    holders = [attributes for _, attributes in document.tags if attributes.get("class") in ("generated", "prompt")]
    assert len(holders) == 4
    assert all(holder["dir"] == "auto" for holder in holders)


def test_sample_texts_stand_under_their_prompt_and_not_under_its_number():
    rows = [text_row("agency", level, "Fellow citizens", "of the Senate") for level in (0, 50)]
    words = Document(render_page(texts=rows)).words
    assert "Fellow citizens" in words
    assert str(rows[0][TEXT_COLUMNS.index("prompt")]) not in words


def test_a_line_of_ten_thousand_characters_survives():
    line = "x" * 10_000
    assert line in Document(render_page(texts=[text_row("agency", 50, "prompt", line)])).words


# What is in it


def test_sections_come_in_reading_order():
    document = Document(render_page(texts=[], findings=[Finding("a", "b.", "c")]))
    assert [words for level, words in document.headings if level == "h1"] == ["Pruning the attention heads of tiny"]
    assert [words for level, words in document.headings if level == "h2"] == [
        "Perplexity relative to the dense model",
        "Expected and asked",
        "Every measurement in one chart",
        "Verdicts",
        "Findings",
        "Charts as pictures",
        "Measurements",
        "Settings",
        "Versions and hardware",
        "Missing figures and warnings",
        "Sample texts",
        "How to read this",
    ]


def test_the_opening_tells_what_was_measured():
    words = Document(render_page(manifest={"model": ModelFacts("tiny", "gpt2", 6, 8, 32, 256, 4096).as_dict()})).words
    assert "tiny, 6 layers of 8 heads; baseline and agency; heads ranked by entropy; 0 iterations." in words


def test_the_first_screen_holds_sentences_hero_and_chips_before_anything_is_folded_away():
    html = render_page(
        said=SAID,
        hero=small_figure(),
        lines=("a line", "another"),
        relative=[relative_row("perplexity", "agency", 50, 1.2)],
    )
    document = Document(html)
    assert "First <b>sentence</b>." in document.words
    first = html[: html.index('class="folds"')]
    assert first.count("<svg") == 1
    chips = [
        str(attributes["class"]) for attributes in document.having("details") if "chip" in str(attributes["class"])
    ]
    assert chips == [
        "chip no-difference", "chip refuted", "chip not-enough", "chip supported", "chip supported",
        "chip answered", "chip not-enough", "chip supported", "chip answered",
    ]  # fmt: skip
    for words in ("supported: 1 of 2 methods", "Details of quality.", "up to 40\xa0%", "a line", "another"):
        assert words in first


def test_everything_else_is_folded_and_closed():
    html = render_page(texts=[], findings=[Finding("a", "b.", "c")])
    document = Document(html)
    assert not [attributes for attributes in document.having("details") if "open" in attributes]
    folds = [attributes for attributes in document.having("details") if attributes.get("class") == "fold"]
    assert len(folds) == len([level for level, _ in document.headings if level == "h2"]) - 2


def test_there_is_room_for_two_lines_under_the_chips_and_no_more():
    with pytest.raises(InputError, match=r"room for 2 lines under the chips, not 3: \['a', 'b', 'c'\]"):
        render_page(lines=("a", "b", "c"))


def test_a_run_without_pruned_levels_has_no_hero():
    assert "No pruned level was compared with the dense model." in Document(render_page()).words


def test_methods_are_listed_in_order_with_what_is_decided():
    rows = [
        ranking_row(1, "fisher", 1.2, "entropy", 1.3, 1.1, 1.5, decided=True, random="better"),
        ranking_row(2, "entropy", 1.56, "random", 1.01, 0.9, 1.2, random="not enough data"),
        ranking_row(3, "random", 1.58, random=""),
    ]
    cells = Document(render_page(ranked=rows)).cells
    assert [
        "agency",
        "1",
        "fisher",
        "×1.2 [1.08 to 1.32]",
        "entropy: ×1.3, beats it [1.1 to 1.5]",
        "better",
        "15",
    ] in cells
    assert [
        "agency", "2", "entropy", "×1.56 [1.4 to 1.72]", "random: ×1.01, cannot be told apart [0.9 to 1.2]",
        "not enough data", "15",
    ] in cells  # fmt: skip
    assert ["agency", "3", "random", "×1.58 [1.42 to 1.74]", "last", "is the control", "15"] in cells


def test_one_method_is_not_ranked():
    assert "Method against method" not in Document(render_page(ranked=[ranking_row(1, "entropy", 1.2)])).words


def verdict(name, word, sentence="A sentence.", about=""):
    return Verdict(name, f"title {name}", f"asked {name}", about, word, sentence)


def test_verdicts_come_first_with_colour_and_word():
    html = render_page(
        verdicts=[
            verdict("E1", "supported", "It is 5 % faster.", "temperature 0.7"),
            verdict("E1", "refuted", about="temperature 1"),
            verdict("E2", "not enough data"),
            verdict("Q2", "answered"),
        ],
        answers=[answer("E2", "not enough data", -0.1, -0.2, 0.1)],
    )
    document = Document(html)
    badges = [str(a["class"]) for a in document.having("span") if str(a.get("class")).startswith("badge")]
    assert badges == ["badge supported", "badge refuted", "badge not-enough", "badge answered"]
    rows = [cells for cells in document.cells if any("title" in cell for cell in cells)]
    assert rows[0] == ["title E1 [asked E1]", "supported [temperature 0.7]", "It is 5\xa0% faster."]
    assert ["refuted [temperature 1]", "A sentence."] in document.cells
    groups = [heading for heading in document.having("th") if heading["scope"] == "rowgroup"]
    assert [heading.get("rowspan") for heading in groups] == ["2", None, None]
    assert html.index("title E1") < html.index('id="findings"') < html.index('id="charts"')


def test_tables_keep_their_meaning_when_narrow_screens_stack_them():
    (table,) = [
        a for a in Document(render_page(verdicts=[verdict("E1", "supported")])).having("table") if a.get("role")
    ]
    assert table == {"class": "verdicts", "role": "table"}


def test_the_expert_table_has_every_figure():
    html = render_page(
        verdicts=[verdict("E2", "supported")],
        answers=[answer("E2", "supported", math.log(0.65), math.log(0.6), math.log(0.7))],
    )
    row = [
        "Quality: Perplexity", "−35 % [−40 % to −30 %]", "mean over levels >= 40", "±5 %", "15 [3 × 5 documents]",
        "0.012 [of no difference, uncorrected: < 0.001]", "−2.5 [−3 to −2]", "supported [better]",
    ]  # fmt: skip
    assert row in Document(html).cells


def test_method_temperature_and_contrast_get_columns_only_where_they_differ():
    rows = [answer("E2", "supported", -0.1, -0.2, -0.06, method=method) for method in ("entropy", "random")]
    document = Document(render_page(verdicts=[verdict("E2", "supported")], answers=rows))
    heads = next(cells for cells in document.cells if cells and cells[0] == "Asked")
    assert heads[:3] == ["Asked", "Method", "Estimate"]


def test_exploratory_contrasts_are_kept_apart_and_get_no_verdict_word():
    other = {"kind": "exploratory", "contrast": "agency vs agency-adaptation"}
    html = render_page(
        verdicts=[verdict("E2", "not enough data")],
        answers=[
            answer("E2", "not enough data", -0.1, -0.2, 0.1),
            answer("E2", "supported", -0.1, -0.2, -0.06, **other),
            answer("E1", "refuted", -0.1, -0.2, -0.06, **{**other, "reason": "worse"}),
            answer("E4", "not enough data", -0.1, -0.2, 0.1, **other),
        ],
    )
    document = Document(html)
    words = [
        cells[-1] for cells in document.cells if cells and cells[-1].split(" [")[0] in ("better", "worse", "unclear")
    ]
    assert words == ["better", "worse", "unclear"]
    assert "supported" not in " ".join(cell for cells in document.cells for cell in cells)


def test_optimal_levels_and_equal_perplexity_are_shown_with_their_reasons():
    html = render_page(
        verdicts=[verdict("Q2", "answered")],
        answers=[answer("E2", "supported", -0.1, -0.2, -0.06)],
        optimal=[
            ("tiny", "entropy", "agency", 20.0, 0.05, 0.75, 60.0, "0,20", 15, 3, 5, ""),
            ("tiny", "entropy", "baseline", NAN, 0.05, NAN, NAN, "", 0, 0, 0, "missing"),
        ],
        equal=[
            ("tiny", "entropy", 40.0, 20.0, 45.0, 1.2, 1.1, 1.3, 15, ""),
            ("tiny", "entropy", NAN, NAN, NAN, NAN, NAN, NAN, 0, "no perplexity that both reach"),
        ],
    )
    cells = Document(html).cells
    assert ["agency", "20 %", "75 %", "60 %", "15"] in cells
    assert ["baseline", "unknown [missing]", "", "none", "0"] in cells
    assert ["40", "20 %", "45 %", "1.2 [1.1 to 1.3]", "15"] in cells
    assert ["missing", "", "", "no perplexity that both reach", "0"] in cells


def test_without_a_comparison_that_is_said_in_place_of_verdicts():
    assert "Agency and baseline were not compared in this run" in Document(render_page()).words


def test_margins_are_stated():
    margins = {"speed": 0.02, "quality": 0.1, "diversity": 0.03, "latency": 0.02, "tolerance": 0.05}
    html = render_page(verdicts=[verdict("E2", "supported")], manifest={"margins": margins})
    words = Document(html).words.replace("\xa0", " ")
    assert "less than 2 % of speed, 10 % of perplexity, 0.03 in distance of distinct-2 and 2 % of latency" in words


# Two runs


def between_runs(**changes):
    compared = pd.DataFrame(
        [
            {**answer("X:perplexity", "supported", -0.1, -0.2, -0.06, kind="exploratory", contrast=NASTY),
             "run": "run 2", "variant": NASTY, "level": level, "note": NASTY}
            for level in (20.0, 40.0)
        ]
    )  # fmt: skip
    values = {
        "names": (NASTY, NASTY), "compared": compared, "findings": [Finding(NASTY, NASTY, NASTY)],
        "differences": [DifferenceInWords(NASTY, (NASTY, NASTY))], "limits": [LimitInWords(NASTY, NASTY)], "charts": {},
        **changes,
    }  # fmt: skip
    return render_between_runs(**values)


def test_a_comparison_of_two_runs_is_one_offline_escaped_document():
    html = between_runs()
    html.encode("utf-8")
    document = Document(html)
    assert len(document.having("script")) == 1
    survived = "<script>alert('x')</script> & \"$quoted$\""
    assert document.words.count(survived) >= 10
    targets = {attributes["id"] for _, attributes in document.tags if "id" in attributes}
    assert all(str(link["href"])[1:] in targets for link in document.having("a"))
    assert [words for level, words in document.headings if level == "h2"] == [
        "What was found", "What differs between the runs", "What is not compared", "All figures",
    ]  # fmt: skip
    assert "no difference can be put down to one cause" in document.words


def test_a_comparison_in_which_nothing_can_be_compared_says_so():
    empty = pd.DataFrame(columns=["run", *HYPOTHESIS_COLUMNS, "variant", "level", "note"])
    words = Document(between_runs(compared=empty, findings=[], differences=[], limits=[])).words
    assert "Nothing in these runs can be compared." in words
    assert "Nothing that is recorded." in words


def rows_of(html: str, first: str) -> list[list[str]]:
    return [cells for cells in Document(html).cells if cells and cells[0] == first]


def test_the_main_table_sets_the_variants_side_by_side_with_intervals():
    html = render_page(contrasts=[contrast("perplexity", 50, -53.3, -60.0, -45.0)])
    assert rows_of(html, "Perplexity")[:2] == [
        ["Perplexity", "0 %", "", "30 [28 to 32]", "not measured", "", "15"],
        ["Perplexity", "50 %", "", "90 [80 to 101]", "42 [40 to 44.5]", "−53.3 %, better [−60 to −45 %]", "15"],
    ]


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        ("perplexity", -6.0, -2.0, "better"),
        ("perplexity", 2.0, 6.0, "worse"),
        ("tokens_per_second", 2.0, 6.0, "better"),
        ("tokens_per_second", -6.0, -2.0, "worse"),
        ("tokens_per_second", -6.0, 0.0, "unclear"),
        ("distinct_2", 2.0, 6.0, "higher"),
    ],
)
def test_the_word_beside_a_difference_follows_its_interval(metric, low, high, verdict):
    html = render_page(
        summary=[estimate_row(metric, variant, 50, 10.0) for variant in ("baseline", "agency")],
        contrasts=[contrast(metric, 50, (low + high) / 2, low, high)],
    )
    (row,) = rows_of(html, METRICS[metric].label)[:1]
    assert row[5].split("[")[0].strip().endswith(f"%, {verdict}")


def test_missing_figures_are_never_shown_as_numbers():
    html = render_page(
        summary=[estimate_row("perplexity", "baseline", 50, NAN), estimate_row("perplexity", "agency", 50, 42.0, n=1)]
    )
    assert rows_of(html, "Perplexity")[0] == ["Perplexity", "50 %", "", "missing", "42 [no interval]", "", "1 / 15"]
    assert "nan" not in Document(html).words.lower().split()


def test_missing_figures_failures_and_warnings_are_listed_and_announced_on_top():
    html = render_page(
        missing=[("agency", "entropy", 80.0, "peak_memory_bytes", "no counter on this device", 3)],
        cells=[failed_cell("agency", "entropy", 1, 80.0, "out of memory")],
        manifest={"warnings": ["first", "second"]},
    )
    document = Document(html)
    assert "2 warnings, 3 missing figures, 1 failed cell" in document.words
    assert ["agency", "entropy", "80", "peak_memory_bytes", "no counter on this device", "3"] in document.cells
    assert ["agency", "entropy", "1", "80", "out of memory"] in document.cells
    assert "Before you rely on this" not in Document(render_page()).words


def test_settings_versions_and_hardware_are_listed():
    html = render_page(
        manifest={
            "spec": {"levels": [0, 50], "device": None, "save": True, "tokens": 100_000},
            "versions": {"torch": "2.11.0"},
            "hardware": {"cores": 2},
            "commit": "abc",
        }
    )
    cells = Document(html).cells
    for row in (["levels", "0, 50"], ["device", "none"], ["save", "yes"], ["tokens", "100,000"], ["torch", "2.11.0"]):
        assert row in cells
    assert ["cores", "2"] in cells
    assert ["commit", "abc"] in cells


def test_tables_can_be_read_aloud_and_sorted_by_keyboard():
    document = Document(render_page(missing=[("agency", "entropy", 80.0, "perplexity", "why", 3)]))
    assert len(document.having("table")) == len(document.having("caption"))
    for heading in document.having("th"):
        assert heading["scope"] in ("col", "row", "rowgroup")
    buttons = document.having("button")
    assert len(buttons) >= 13
    assert all(button["type"] == "button" for button in buttons)
    level_50 = [cell for cell in document.having("td") if cell.get("data-v") == "50"]
    assert level_50


def test_sample_texts_are_the_same_prompt_side_by_side_at_the_level_nearest_fifty():
    texts = [
        text_row(variant, level, prompt, f"{variant} {level} {prompt} {i} {t}", iteration=i, temperature=t)
        for i in (1, 0)
        for t in (0.7, 1.0)
        for prompt in ("first", "second")
        for variant in ("baseline", "agency")
        for level in (0, 20, 60, 80)
    ]
    document = Document(render_page(texts=texts))
    words = document.words
    for prompt in ("first", "second"):
        for text in (f"baseline 0 {prompt} 0 1.0", f"baseline 60 {prompt} 0 1.0", f"agency 60 {prompt} 0 1.0"):
            assert words.count(text) == 1
    assert "0.7" not in words
    assert " 1 1.0" not in words
    assert [text for level, text in document.headings if level == "h4"][:3] == [
        "unpruned (level 0)",
        "baseline at 60 %",
        "agency at 60 %",
    ]


def test_without_texts_there_is_no_section_for_them():
    assert "Sample texts" not in render_page()


def test_empty_tables_and_an_empty_manifest_still_make_a_report():
    html = render_report(
        summary=pd.DataFrame(columns=SUMMARY),
        contrasts=pd.DataFrame(columns=CONTRASTS),
        cells=pd.DataFrame(columns=CELL_COLUMNS),
        missing=pd.DataFrame(columns=list(MISSING_COLUMNS)),
        verdicts=[],
        answers=pd.DataFrame(columns=list(HYPOTHESIS_COLUMNS)),
        optimal=pd.DataFrame(columns=list(OPTIMUM_COLUMNS)),
        equal=pd.DataFrame(columns=list(EQUAL_COLUMNS)),
        findings=[],
        answer=Answer("Pruning the attention heads of nothing", (), (), ()),
        relative=pd.DataFrame(columns=list(RELATIVE_COLUMNS)),
        ranked=pd.DataFrame(columns=list(RANKING_COLUMNS)),
        hero=None,
        drawings={},
        manifest={},
        texts=pd.DataFrame(columns=TEXT_COLUMNS),
    )
    assert "Nothing was measured." in Document(html).words


def test_the_same_tables_give_the_same_document():
    assert render_page(figures={"radar": small_figure()}) == render_page(figures={"radar": small_figure()})
