"""The report in a real browser: nothing goes wrong, nothing is fetched, and sorting, hovering and the keyboard work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from builders import (
    GONE,
    NASTY,
    SAID,
    asked_tables,
    estimate_row,
    heads_table,
    ranking_row,
    relative_row,
    render_page,
    text_row,
)
from matplotlib.figure import Figure

from pruning_comparison.analysis import Margins
from pruning_comparison.analysis.head_maps import agreement, map_heads
from pruning_comparison.analysis.relative import RELATIVE_COLUMNS
from pruning_comparison.report.charts import perplexity_over_levels

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")

WATCH = """
window.seen = [];
addEventListener("error", (event) => seen.push("error: " + event.message));
addEventListener("securitypolicyviolation", (event) => seen.push("blocked: " + event.blockedURI));
"""
ASK = f"""
const wait = setInterval(async () => {{
  if (document.documentElement.dataset.charts !== "drawn") return;
  clearInterval(wait);
  try {{ {(Path(__file__).parent / "ask_the_page.js").read_text("utf-8")} }}
  catch (error) {{ parent.postMessage(JSON.stringify({{seen: ["error: " + error.stack]}}), "*"); }}
}}, 50);
"""


def hash_of(script: str) -> str:
    """What a content security policy calls a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def allowed(html: str, *scripts: str) -> str:
    """The document with scripts of the test's own, first and last, which its content security policy lets run."""
    html = html.replace("script-src ", f"script-src {' '.join(map(hash_of, scripts))} ", 1)
    first, last = (f"<script>{text}</script>" for text in scripts)
    before, body, after = html.replace("<title>", f"{first}<title>", 1).rpartition("</body>")
    return f"{before}{last}{body}{after}"


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


METHODS = ("entropy", "random", "magnitude", "fisher")


def page_of(methods: int) -> str:
    """A report with everything on it, of so many methods."""
    table = heads_table(GONE)
    names = METHODS[:methods]
    relative = [
        relative_row("perplexity", variant, level, *(1 + level / reach * part for part in (1, 0.5, 2)), method=name)
        for name in names for variant, reach in (("baseline", 30), ("agency", 90)) for level in (5, 50, 100)
    ]  # fmt: skip
    ranked = [
        ranking_row(at + 1, name, 1.2 + at / 5, names[at + 1], 1.2, 1.1, 1.3, decided=True, random="better")
        for at, name in enumerate(names[:-1])
    ]
    document = render_page(
        summary=[
            estimate_row("perplexity", variant, level, 30.0 + level, 28.0 + level, 33.0 + level, method=name)
            for name in names for level in (0, 50, 5, 100) for variant in ("baseline", "agency")
        ],
        texts=[text_row(variant, level, NASTY, NASTY * 3 + "x" * 10_000)
               for variant in ("baseline", "agency") for level in (0, 50)],
        heads=map_heads(table, *asked_tables()),
        figures={"radar": Figure(figsize=(8.5, 4)), "rankings": Figure(figsize=(6.6, 3))},
        relative=relative,
        ranked=ranked,
        hero=perplexity_over_levels(pd.DataFrame(relative, columns=list(RELATIVE_COLUMNS)), tolerance=0.05),
        said=SAID,
        lines=("A first line of another part.", "A second one."),
        agreed=agreement(table),
        manifest={"margins": asdict(Margins())},
    )  # fmt: skip
    assert len(document.encode()) < 3_000_000
    return document


FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe src="report.html" width="{width}" height="900" style="border:0"></iframe>
<script>addEventListener("message", (event) => {{ document.body.dataset.answer = event.data; }});</script>"""
"""No window is as narrow as a phone, but a frame is."""


def asked(html: str, folder: Path, width: int, *options: str) -> dict[str, Any]:
    """What the page answers to ``ASK``; nothing may be written to the console meanwhile."""
    page = folder / "report.html"
    page.write_text(allowed(html, WATCH, ASK), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    done = browse(frame, "--dump-dom", "--window-size=1300,1000", "--virtual-time-budget=20000", *options)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[:500] + done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(unescape(found[1]))
    assert answer["seen"] == []
    return answer


@pytest.mark.parametrize(("width", "methods", "options"), [
    (1280, 1, ()),
    (1280, 4, ("--blink-settings=preferredColorScheme=0",)),
    (400, 2, ()),
])  # fmt: skip
def test_it_is_drawn_and_answers_to_mouse_and_keyboard(
    tmp_path: Path, width: int, methods: int, options: tuple[str, ...]
):
    answer = asked(page_of(methods), tmp_path, width, *options)
    # Every dot of the hero: two variants at three levels for each method.
    assert answer["marks"] == 2 * 3 * methods
    assert answer["still"] == "none", "the drawing is there for those without JavaScript"
    for name, (left, top, right, bottom) in answer["before"].items():
        assert left >= 0, name
        assert right <= width, name
        assert bottom > top, name
        if width == 1280:
            assert bottom <= 900, f"{name} is not on the first screen"
    assert answer["height"] <= (6_000 if methods <= 2 else 8_000)
    assert answer["wider"] <= 0, "the page scrolls sideways"
    assert answer["opened"] <= 0, "with everything opened, the page scrolls sideways"
    assert width > 400 or answer["hidden"] == 0, "a cell of a table lies beyond the edge of a phone"
    assert answer["chipfocus"] is True
    assert answer["chip"] is True, "a chip shows its details when it is clicked"
    assert answer["faint"] == [], "text with a contrast below 4.5 to 1"
    assert answer["drawn"] == 0, "words of the hero with a contrast below 4.5 to 1"
    assert answer["lines"] == 0, "lines of the hero with a contrast below 3 to 1"
    levels = ["0 %", "5 %", "50 %", "100 %"]
    assert answer["ascending"] == [levels, "ascending"]
    assert answer["descending"] == [levels[::-1], "descending"]
    assert answer["untold"] == "Point at a head."
    assert answer["hover"].startswith(
        "Layer 0, head 1: pruned at 50 %; refused in 1 and overridden in 1 of 1 iterations;"
    )
    assert "redundancy 2" in answer["hover"]
    assert answer["keyboard"].startswith("Layer 1, head 0: pruned at 25 %;")
    assert answer["focus"] is True
    assert answer["unfocused"].startswith("Layer 1, head 1:"), "a window without the focus sends no focus events"
    assert answer["view"] == ["0", "1", "2", "3"]
    assert answer["back"] == ["–", "50×", "25", "–"]
    assert answer["scripted"] == "block"
    assert answer["fetched"] == []
    assert answer["views"] == ["value", "dense"]
    assert "Heads pruned (%)" in answer["explored"]
    assert any(text.startswith("times the dense model's") for text in answer["explored"])
    assert answer["scripts"] == 7  # the test's two, the report's three, and the numbers of charts and of heads


def test_without_javascript_the_hero_is_a_drawing(tmp_path: Path):
    """The document without its scripts, as a browser shows it that runs none."""
    html = re.sub(r"<script(?! type=.application/json).*?</script>", "", page_of(1), flags=re.DOTALL)
    look = """
    const drawing = document.querySelector(".hero .drawing svg"), at = drawing.getBoundingClientRect();
    document.body.dataset.answer = JSON.stringify([at.width, at.height, drawing.querySelectorAll("path").length]);
    """
    page = tmp_path / "report.html"
    html = html.replace("script-src ", f"script-src {hash_of(look)} ", 1)
    html = html.replace("</body>", f"<script>{look}</script></body>")
    page.write_text(html, encoding="utf-8")
    found = re.search(r'data-answer="([^"]*)"', browse(page, "--dump-dom", "--window-size=1280,900").stdout)
    assert found is not None
    width, height, paths = json.loads(found[1])
    assert width > 500
    assert height > 200
    assert paths > 20


@pytest.mark.parametrize("methods", [2, 4])
def test_it_is_printed_on_at_most_eight_pages(tmp_path: Path, methods: int):
    page = tmp_path / "report.html"
    page.write_text(page_of(methods), encoding="utf-8")
    browse(page, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer", "--virtual-time-budget=5000")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8
