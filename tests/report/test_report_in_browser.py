"""The report in a real browser: nothing goes wrong, nothing is fetched, and sorting, hovering and the keyboard work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builders import GONE, NASTY, asked_tables, estimate_row, heads_table, render_page, text_row
from matplotlib.figure import Figure

from pruning_comparison.analysis.head_maps import agreement, map_heads

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")

WATCH = """
window.seen = [];
addEventListener("error", (event) => seen.push("error: " + event.message));
addEventListener("securitypolicyviolation", (event) => seen.push("blocked: " + event.blockedURI));
"""
ASK = """
const answer = {};
const level = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
const table = [...document.querySelectorAll("#tables ~ .scroll table")][0];
const heading = table.tHead.rows[0].cells[1];
heading.querySelector("button").click();
answer.ascending = [level(), heading.getAttribute("aria-sort")];
heading.querySelector("button").click();
answer.descending = [level(), heading.getAttribute("aria-sort")];
const box = document.querySelector(".headmap"), told = box.querySelector(".told"), cells = box.querySelectorAll("td");
answer.before = told.textContent;
cells[1].dispatchEvent(new MouseEvent("mouseenter"));
answer.hover = told.textContent;
cells[0].focus();
cells[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
answer.keyboard = told.textContent;
answer.focus = document.activeElement === cells[2];
const swallow = (event) => event.stopPropagation();
addEventListener("focus", swallow, true);
cells[2].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
removeEventListener("focus", swallow, true);
answer.unfocused = told.textContent;
const select = box.querySelector("select");
select.selectedIndex = 1;
select.dispatchEvent(new Event("change"));
answer.view = [...cells].map((cell) => cell.textContent);
select.selectedIndex = 0;
select.dispatchEvent(new Event("change"));
answer.back = [...cells].map((cell) => cell.textContent);
answer.scripted = getComputedStyle(document.querySelector("p.scripted")).display;
answer.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
answer.fetched = answer.fetched.filter((name) => !name.startsWith("data:"));
answer.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
answer.pictures = [...document.images].map((image) => [
  image.naturalWidth / image.naturalHeight > 1, image.complete && image.naturalWidth > 0,
  image.getBoundingClientRect().right <= document.documentElement.clientWidth,
]);
answer.scripts = document.scripts.length;
answer.seen = seen;
document.body.dataset.answer = JSON.stringify(answer);
"""


def allowed(html: str, *scripts: str) -> str:
    """The document with scripts of the test's own, first and last, which its content security policy lets run."""
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    html = html.replace("script-src ", f"script-src {' '.join(hashes)} ", 1)
    first, last = (f"<script>{text}</script>" for text in scripts)
    return html.replace("<title>", f"{first}<title>", 1).replace("</body>", f"{last}</body>")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def html() -> str:
    table = heads_table(GONE)
    document = render_page(
        summary=[estimate_row("perplexity", variant, level, 30.0 + level, 28.0 + level, 33.0 + level)
                 for level in (0, 50, 5, 100) for variant in ("baseline", "agency")],
        texts=[text_row(variant, level, NASTY, NASTY * 3 + "x" * 10_000)
               for variant in ("baseline", "agency") for level in (0, 50)],
        heads=map_heads(table, *asked_tables()),
        figures={"radar": Figure(figsize=(8.5, 4))},
        narrow={"radar": Figure(figsize=(4, 9))},
        agreed=agreement(table),
    )  # fmt: skip
    assert len(document.encode()) < 3_000_000
    return document


@pytest.mark.parametrize("width", [1280, 400])
def test_sorting_hover_and_keyboard_work_and_nothing_is_fetched(html: str, tmp_path: Path, width: int):
    page = tmp_path / "report.html"
    page.write_text(allowed(html, WATCH, ASK), encoding="utf-8")
    done = browse(page, "--dump-dom", f"--window-size={width},900")
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[:500] + done.stderr[-2000:]
    answer = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert answer["ascending"] == [["0 %", "5 %", "50 %", "100 %"], "ascending"]
    assert answer["descending"] == [["100 %", "50 %", "5 %", "0 %"], "descending"]
    assert answer["before"] == "Point at a head."
    assert answer["hover"].startswith(
        "Layer 0, head 1: goes at 50 %; refused in 1 and overridden in 1 of 1 iterations;"
    )
    assert "redundancy 2" in answer["hover"]
    assert answer["keyboard"].startswith("Layer 1, head 0: goes at 25 %;")
    assert answer["focus"] is True
    assert answer["unfocused"].startswith("Layer 1, head 1:"), "a window without the focus sends no focus events"
    assert answer["view"] == ["0", "1", "2", "3"]
    assert answer["back"] == ["–", "50×", "25", "–"]
    assert answer["scripted"] == "block"
    assert answer["fetched"] == []
    assert answer["pictures"] == [[width > 600, True, True]], "the narrow picture on a phone, else the wide one"
    assert answer["scripts"] == 4  # the test's two, the report's one, and its data
    assert answer["seen"] == []
    assert answer["wider"] <= 0, "the page scrolls sideways"


def test_it_can_be_printed(html: str, tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text(html, encoding="utf-8")
    browse(page, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
