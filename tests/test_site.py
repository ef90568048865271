"""The documentation site: it builds without a warning, fetches nothing, and every snippet of its guides runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import jupytext
import pytest
import torch
import yaml
from builders import ascii_tokenizer, save_tiny_model, tiny_model, write_short_texts
from markdown_it import MarkdownIt

import pruning_comparison
from pruning_comparison import cli
from pruning_comparison.models.heads import kept_heads
from pruning_comparison.report import write
from pruning_comparison.store.records import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md")), DOCS / "reference" / "run-folder.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOTEBOOK, SCRIPT = (ROOT / "notebooks" / f"stored_run.{kind}" for kind in ("ipynb", "py"))


def script(name: str) -> ModuleType:
    """A script of ``scripts/documentation``, imported without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "documentation" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site_hooks, write_reference = script("site_hooks"), script("write_reference")


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


# Snippets

ELSEWHERE = {
    "pip": "installs",
    "python3": "makes an environment",
    ".": "enters it",
    "ray": "starts a cluster, as tests/run/test_ray.py does",
    "llama-cli": "is llama.cpp's",
    "make": "is tested in tests/test_project.py",
}
"""Commands that the guides show and that no test here runs, and why."""

SMALLER = {
    "run": (
        "--pruning_levels=0,5 --iterations=1 --temperatures=1 --num_tokens=3 --max_prompts=1 --eval_tokens=1024 "
        "--calibration_tokens=1024 --score_tokens=512 --timing_limit_s=0 --timing_pairs=2 --tolerance=90 --threads=1"
    ),
    "plan": "--iterations=1 --threads=1",
    "prune": "--no_measure",
    "report": "",
    "export": "",
}
"""What makes a command of the guides short: of two equal options the last one counts."""


def snippets(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, what follows it, text) of each block of code, in the page's order."""
    for found in re.finditer(r"^```(\w+)(.*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.MULTILINE):
        yield found[1], found[2].strip(), found[3]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def smaller(words: list[str]) -> list[str] | None:
    """A command of this package as it is run here; None where it needs what is not here."""
    if words[0] == "run" and ("--device=cuda" in words or "--launcher=ray" in words or "--model_name=gpt2" in words):
        cli.parse(words)
        return None
    more = SMALLER[words[0]].split()
    if words[0] == "prune" and "--from=results" not in words:
        more += ["--calibration_tokens=1024", "--score_tokens=512", "--threads=1"]
    return [*words, *more]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guides take for granted: a small Llama, texts, and the example run. Charts are not drawn."""
    sizes: dict[str, Any] = {"layers": 3, "width": 64, "vocab_size": 120, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    llama = tiny_model("llama", **sizes, **heads, bos_token_id=0, eos_token_id=0)
    save_tiny_model(tmp_path / "my-model", model=llama)
    ascii_tokenizer().save_pretrained(tmp_path / "my-model")
    texts = write_short_texts(tmp_path / "my-texts")
    for option, name in (("eval_text", "test"), ("calibration_text", "train")):
        Path(texts[option]).rename(tmp_path / "my-texts" / name)
    (tmp_path / "my-texts" / "prompts.txt").write_text("Peace\nThe people of\n", "utf-8")
    (tmp_path / "docs" / "example").mkdir(parents=True)
    for name in ("journal.sqlite", "manifest.json"):
        shutil.copy(DOCS / "example" / name, tmp_path / "docs" / "example")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    without_charts(monkeypatch)
    return tmp_path


def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        write, "draw_charts", lambda jobs, folder, **options: dict.fromkeys(jobs, '<svg viewBox="0 0 1 1"></svg>')
    )


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_snippets_of_a_guide_run_in_their_order(page: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands by the command line itself, made small; Python as it stands, in one set of names."""
    names: dict[str, Any] = {}
    for language, title, text in snippets(page):
        if language == "bash":
            for words in commands(text):
                if words[0] != "pruning-comparison":
                    assert words[0] in ELSEWHERE, words
                elif (small := smaller(words[1:])) is not None:
                    assert cli.main(small) == 0, (small, capsys.readouterr().err)
        elif file := re.fullmatch(r'title="(\w+\.py)"', title):
            (desk / file[1]).write_text(text, "utf-8")
        else:
            assert (language, title) == ("python", "")
            exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
    check = CHECKS.get(page.stem)
    if check is not None:
        check(desk, names)


def _check_tutorial(desk: Path, names: dict[str, Any]) -> None:
    assert (desk / "results" / "latest" / "report.html").is_file()
    assert 0 < 48 - int(kept_heads(names["model"].config).sum()) < 5  # the level of 5 % is 2 heads
    assert names["tokens"].shape[0] == 1
    assert len(names["tokens"][0]) == len(names["prompt"]["input_ids"][0]) + 20


def _check_own_method(desk: Path, names: dict[str, Any]) -> None:
    """Its scores by hand: the norm of each head's part of what the projection of one layer reads."""
    model, windows = names["model"], torch.arange(3, 38).reshape(5, 7)
    read: list[torch.Tensor] = []
    hook = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        model(windows)
    hook.remove()
    by_hand = [float(part.square().sum(-1).sqrt().mean()) for part in read[0].chunk(8, dim=-1)]
    scores = names["my_methods"].output_norm(model, windows, batch_size=2)
    assert scores.shape == (6, 8)
    assert scores[1].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert 48 - int(kept_heads(names["pruned"].config).sum()) == 12  # 25 % of 48


def _check_deploy(desk: Path, names: dict[str, Any]) -> None:
    assert names["text"].startswith("The people of")
    assert 48 - sum(map(len, names["model"].config.kept_heads)) == 14  # 30 % of 48 is 14.4
    assert (desk / "plain-50" / "plain" / "config.json").is_file()
    assert (desk / "small.gguf").stat().st_size > 10_000


CHECKS = {"tutorial": _check_tutorial, "own-method": _check_own_method, "deploy": _check_deploy}


# The notebook


def test_the_notebook_of_a_stored_run_has_the_cells_of_its_script() -> None:
    books = [
        jupytext.reads(path.read_text("utf-8"), fmt=kind)
        for path, kind in ((SCRIPT, "py:percent"), (NOTEBOOK, "ipynb"))
    ]
    cells = [[(cell.cell_type, cell.source, cell.metadata) for cell in book.cells] for book in books]
    assert cells[0] == cells[1], "run `make notebook`"
    assert not any(cell.get("outputs") for cell in books[1].cells)
    assert books[1].metadata["kernelspec"]["name"] == "python3"


def test_the_notebook_of_a_stored_run_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, in the notebooks' folder. It writes to a temporary folder alone."""
    without_charts(monkeypatch)
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (DOCS / "example").iterdir()}
    names: dict[str, Any] = {}
    for cell in jupytext.reads(NOTEBOOK.read_text("utf-8"), fmt="ipynb").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "a cell", "exec"), names)
    assert {path: path.stat().st_mtime_ns for path in (DOCS / "example").iterdir()} == before
    names["plt"].close("all")
    assert names["folder"].is_relative_to(tmp_path)
    assert (names["folder"] / "mine.png").stat().st_size > 5_000
    assert len(names["axes"].containers) == 2  # a line with intervals for each variant
    # By hand: at 40 %, 19 of 48 heads leave, so that 29 stay.
    assert names["left"].loc["baseline"].sum() == pytest.approx(29)
    assert names["best"]["variant"] == "agency"
    assert 48 - sum(map(len, names["loaded"].config.kept_heads)) == 10  # 20 % of 48 is 9.6
    printed = capsys.readouterr().out
    assert "agency, entropy: 20 %" in printed
    assert "The people of the United States" in printed
