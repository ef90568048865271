"""What a user reads is English as a native researcher writes it: phrases that nobody would write are found.

Read are documents as a whole, and of code the strings alone: comments and docstrings are for developers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PHRASES = {
    r"\b(do|does|did) not tell\b": "is unclear",
    r"\bnot told\b(?! apart)": "unclear",
    r"\bdata do not decide\b": "there is not enough data",
    r"\bstand(s|ing)? (it|pruning)\b|\bstood it\b": "is resilient to",
    r"\bstraw m[ae]n\b": "strong baselines",
    r"\b(it|they|that|heads?|texts?|output|which|who) strays?\b|\bstrays? (from|little|far)\b": "differs from",
    r"\bgoes at\b|\bat which (it|a head|each head) goes\b": "is pruned at",
    r"\bat (most|least) so many\b": "maximum number of",
    r"\bthe loss minds\b": "the loss is sensitive to",
    r"\breckon(s|ed)?\b": "estimated",
    r"\bis no (YAML )?(file|folder|number|name|mapping|method)\b": "is not a",
    r"\bcan(not)? be had\b": "is (not) possible",
    r"\bforesees?\b": "predicts",
    r"\b(gets?|getting) along with\b": "needs only",
    r"\bmend(s|ed)?\b": "fix",
    r"\btells? (all|about a head)\b": "shows",
    r"\bsay nothing but\b": "print only",
    r"\bin plain words\b": "in plain English",
    r"\d,\d{3} % (faster|slower|more|less|fewer|higher|lower)\b": "three digits at most, then a factor",
}
"""What is not written, and what is written instead."""

NOT_YET: set[str] = set()
"""Files that are being rewritten, in which phrases may still stand. Each must still have one: the list only gets shorter."""

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md", "Makefile", "pyproject.toml", "CITATION.cff", "mkdocs.yml", "docs/*.md", "docs/how-to/*.md",
        "docs/explanation/*.md", "docs/reference/*.md", "docs/example/**/*.md", "notebooks/*.ipynb", "notebooks/*.py",
        "scripts/**/*.py", "scripts/**/*.md", "src/**/*.py", "src/**/*.html", "src/**/templates/*.js",
        ".github/**/*.yml", ".github/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # what was said of an old release stays said
)  # fmt: skip


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line at which it begins, text) of all that a user may read of a file."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    tree = ast.parse(source)
    quiet = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # docstrings
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            yield node.lineno, node.value


def phrases_in(path: Path) -> list[str]:
    return [
        f"line {first + text.count(chr(10), 0, found.start())}: {found[0]!r}; write that something {instead!r}, or the like"
        for first, text in texts_of(path)
        for phrase, instead in PHRASES.items()
        for found in re.finditer(phrase, text.replace("\n", " "), re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", FILES)
def test_what_a_user_reads_is_plain_english(name):
    found = phrases_in(ROOT / name)
    if name in NOT_YET:
        assert found, f"{name} is plain by now: take it off NOT_YET"
    else:
        assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "Above it the data do not tell.", "not told", "does agency stand it better", "baselines that are no straw men",
        "a head that strays from its mean", "it goes at 40 %", "the level at which a head goes", "at most so many prompts",
        "156,666 % faster", "is no YAML file", "the form cannot be had", "every part of it is reckoned", "it tells all",
    ],
)  # fmt: skip
def test_the_phrases_are_found(tmp_path, text):
    for name, content in (
        ("page.md", f"# A title\n\n{text}\n"),
        ("module.py", f'"""{text}"""\nTEXT = f"{{1}} {text}"\n'),
    ):
        (tmp_path / name).write_text(content)
        assert len(phrases_in(tmp_path / name)) == 1, name
    (tmp_path / "split.md").write_text(text.replace(" ", "\n"))  # as at the end of a line
    assert phrases_in(tmp_path / "split.md")


def test_ordinary_english_is_not_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "entropy and fisher cannot be told apart; stray configuration values; 1,000 tokens more; models stand up to pruning"
    )
    assert phrases_in(tmp_path / "page.md") == []
