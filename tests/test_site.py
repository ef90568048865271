"""The documentation site: it builds without a warning, fetches nothing, and says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from builders import load_script
from markdown_it import MarkdownIt

import pruning_comparison
from pruning_comparison import cli
from pruning_comparison.store.records import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md")), DOCS / "reference" / "run-folder.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOTEBOOK, SCRIPT = (ROOT / "notebooks" / f"stored_run.{kind}" for kind in ("ipynb", "py"))


site_hooks, write_reference = (
    load_script(ROOT / "scripts" / "documentation" / "site_hooks.py"),
    load_script(ROOT / "scripts" / "documentation" / "write_reference.py"),
)


# The site as it is built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Read(HTMLParser):
    """What a page links to, what it fetches, and the places in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()
        self.counts = dict.fromkeys(("ul", "ol", "li", "table", "tr", "pre"), 0)
        self.depth = 0
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(found["href"])
        if "src" in found:
            self.fetched.append(found["src"])
        self.depth += tag == "article"
        if self.depth and tag in self.counts:
            self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "article"


def built(site: Path, page: Path) -> Path:
    """The page that is made of a page of ``docs/``."""
    place = site / page.relative_to(DOCS)
    return place.with_name("index.html") if page.name == "README.md" else place.with_suffix(".html")


def test_every_link_of_the_site_leads_to_a_place_that_is_there(site: Path) -> None:
    """Followed in what was built, as a browser would: to a file, and to a place in it."""
    pages = {page: Read(page) for page in site.rglob("*.html") if page.name not in ("404.html", "report.html")}
    assert len(pages) == len(PAGES)
    followed = 0
    for page, read in pages.items():
        for link in [*read.links, *read.fetched]:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].places, f"{page.name}: {link}"
            followed += 1
    assert followed > 1000


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name != "report.html":  # which has a test of its own
            assert not [place for place in Read(page).fetched if urlsplit(place).scheme or place.startswith("//")], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text("utf-8")), style
    # What the theme's script would ask a server for: the stars of a repository that its header names.
    assert "repo_url" not in (ROOT / "mkdocs.yml").read_text("utf-8")


def test_search_knows_the_pages_and_works_without_a_server(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text("utf-8")
    assert index.startswith("var __index = ")
    assert all(word in index for word in ("key-value cache", "run-folder.html", "save_pruned"))
    assert "assets/iframe-worker.js" in Read(site / "index.html").fetched


def test_pages_have_the_same_lists_and_tables_as_on_github(site: Path) -> None:
    """GitHub reads CommonMark, MkDocs does not: lists need four spaces within lists there, and a line before them."""
    commonmark = MarkdownIt("commonmark").enable("table")
    for page in PAGES:
        if page.name == "python-api.md":
            continue
        text = page.read_text("utf-8")
        wanted = commonmark.render(text)
        found = Read(built(site, page)).counts
        expected = {tag: len(re.findall(rf"<{tag}[ >]", wanted)) for tag in found}
        assert found == expected, page.relative_to(ROOT)


def test_every_name_of_the_package_is_on_the_page_of_the_api(site: Path) -> None:
    page = DOCS / "reference" / "python-api.md"
    text, places = page.read_text("utf-8"), Read(built(site, page)).places
    for name, place in pruning_comparison._PLACES.items():
        full = f"pruning_comparison.{place.replace(':', '.')}"
        if name == "METHODS":
            assert "`METHODS`" in text
        elif name == "charts":
            assert f"{full}.quality_metrics" in places
        else:
            assert full in places, name


def test_addresses_are_those_of_the_project() -> None:
    settings = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text("utf-8"))
    known = yaml.safe_load(settings)
    assert known["site_url"] == PROJECT["urls"]["Documentation"]
    assert [one["link"] for one in known["extra"]["social"]] == [PROJECT["urls"]["Repository"]]


# The hooks


def test_links_out_of_the_documents_lead_to_the_repository() -> None:
    text = "[a](../../CONTRIBUTING.md#commits) [b](../methods.md#x) [c](https://x.org/y) [d](#e) ![f](../images/g.png)"
    text += " [h](../../scripts)"
    assert site_hooks.leave_docs(text, "how-to/page.md", "https://r") == text.replace(
        "../../CONTRIBUTING.md", "https://r/blob/main/CONTRIBUTING.md"
    ).replace("../../scripts", "https://r/tree/main/scripts")
    assert site_hooks.repository() == PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("target", ["../nowhere.md", "../../outside.md"])
def test_a_link_to_what_is_not_in_the_repository_is_warned_of(target: str, caplog: pytest.LogCaptureFixture) -> None:
    site_hooks.leave_docs(f"[a]({target})", "page.md", "https://r")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert target in caplog.text


def test_every_decision_is_listed_and_in_the_navigation() -> None:
    pages = site_hooks.list_of_decisions((DOCS / "decisions" / "README.md").read_text("utf-8"))
    assert pages[0] == "decisions/README.md"
    listed = {place for entry in pages[1:] for place in entry.values()}
    assert listed == {f"decisions/{path.name}" for path in (DOCS / "decisions").glob("0*.md")}
    assert {"1. Removing heads ourselves": "decisions/0001-removing-heads.md"} in pages


# What is generated


def test_the_reference_says_what_the_code_says() -> None:
    assert [str(path) for path, _ in write_reference.outdated()] == [], "run `make reference`"


def test_the_reference_has_every_option_and_column() -> None:
    """By the parsers and records themselves, not by what writes it."""
    options = (DOCS / "reference" / "options.md").read_text("utf-8")
    for command, parser in cli.make_parser().commands.items():
        section = options.split(f"\n## {command}\n", 1)[1].split("\n## ", 1)[0]
        for name in parser.options():
            if command != "plan" and name not in ("help", "-h") and not name.startswith("recovery_rate"):
                assert f"`--{name}`" in section, (command, name)
    folder = (DOCS / "reference" / "run-folder.md").read_text("utf-8")
    for table, record in TABLES.items():
        section = folder.split(f"\n### Table {table}\n", 1)[1].split("\n### ", 1)[0]
        assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == [
            name for base in reversed(record.__mro__) for name in getattr(base, "__annotations__", {})
        ] or table == "engine_timings"  # whose bases stand the other way round


def test_a_default_that_only_the_help_names_is_in_its_column() -> None:
    page = (DOCS / "reference" / "options.md").read_text("utf-8")
    assert "| `--iterations` | `3` | replicates, each with its own seed |" in page
    assert "| `--eval_tokens` | `8192` | tokens of evaluation text, spread over its documents |" in page
    assert "| `--save_models` | off | also save every pruned model" in page


def test_a_column_that_nothing_explains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: text for name, text in write_reference.COLUMNS.items() if name != "prompt_text"}
    monkeypatch.setattr(write_reference, "COLUMNS", known)
    with pytest.raises(KeyError, match="table texts has prompt_text, which nothing explains: add it to COLUMNS"):
        write_reference.journal()


def test_the_check_fails_where_a_page_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "options.md"
    page.write_text("# A title\n\n<!-- generated: presets -->\nold\n<!-- end of generated -->\n", "utf-8")
    monkeypatch.setattr(write_reference, "PAGES", (page,))
    monkeypatch.setattr(write_reference, "ROOT", tmp_path)
    assert write_reference.main(["--check"]) == 1
    assert "run make reference" in capsys.readouterr().out
    assert write_reference.main([]) == 0
    assert page.read_text("utf-8").startswith("# A title\n\n<!-- generated: presets -->\n\n| preset |")
    assert write_reference.main(["--check"]) == 0
