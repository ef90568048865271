"""Checks that a release is named alike everywhere: python scripts/check_release.py v1.2.3

The tag, ``pruning_comparison.__version__``, the newest section of CHANGELOG.md and CITATION.cff have to name one version.
``--notes=FILE`` writes that section of the changelog to a file. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'^__version__ = "(?P<version>[^"]+)"$', re.MULTILINE)
CITED = re.compile(r"^version: *(?P<version>\S+)$", re.MULTILINE)
SECTION = re.compile(r"^## +(?P<name>\S+).*\n", re.MULTILINE)


def disagreements(tag: str, *, package: str, changelog: str, citation: str) -> list[str]:
    """What keeps ``tag`` from being released, a sentence each; none when all agree.

    ``package``, ``changelog`` and ``citation`` are the texts of ``__init__.py``, CHANGELOG.md and CITATION.cff.
    """
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        return [f"the tag {tag!r} is no version: write v1.2.3"]
    version = tag.removeprefix("v")
    newest = SECTION.search(changelog)
    said = {
        "__version__ in src/pruning_comparison/__init__.py": _found(VERSION, package),
        "the newest section of CHANGELOG.md": newest["name"] if newest else "nothing",
        "version in CITATION.cff": _found(CITED, citation),
    }
    wrong = [f"{where} says {value}, the tag says {version}" for where, value in said.items() if value != version]
    if not wrong and not section_of(changelog, version).strip():
        wrong.append(f"the section {version} of CHANGELOG.md is empty")
    return wrong


def section_of(changelog: str, version: str) -> str:
    """What CHANGELOG.md says of a version, without its heading; ValueError where it says nothing."""
    headings = list(SECTION.finditer(changelog))
    ends = [heading.start() for heading in headings[1:]] + [len(changelog)]
    for heading, end in zip(headings, ends, strict=True):
        if heading["name"] == version:
            return changelog[heading.end() : end].strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section {version}")


def _found(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found["version"] if found else "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks that tag, package, CHANGELOG and CITATION name one version.")
    parser.add_argument("tag", help="as git has it: v1.2.3")
    parser.add_argument("--notes", type=Path, help="write the changelog's section here")
    options = parser.parse_args(argv)
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    wrong = disagreements(
        options.tag,
        package=(ROOT / "src" / "pruning_comparison" / "__init__.py").read_text("utf-8"),
        changelog=changelog,
        citation=(ROOT / "CITATION.cff").read_text("utf-8"),
    )
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong:
        return 1
    if options.notes:
        options.notes.write_text(section_of(changelog, options.tag.removeprefix("v")), encoding="utf-8")
    print(f"{options.tag}: tag, package, CHANGELOG and CITATION agree")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
