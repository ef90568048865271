"""Prints the lowest versions that pyproject.toml allows as pins, for pip: python scripts/lowest_versions.py > pins.txt

A range is a promise about both of its ends. The upper one is what pip installs; the lower one is what `make test-lowest`
installs, by these pins. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*(?P<range>[^;]*)")
LOWER_END = re.compile(r">=\s*(?P<version>[0-9][0-9A-Za-z.]*)")


def lowest_pins(
    project: Mapping[str, Any], *, extras: Sequence[str] = (), instead: Mapping[str, str] | None = None
) -> list[str]:
    """``name==version`` for every dependency of a project table and of its ``extras``, in their order.

    ``instead`` names versions to take in place of the lowest ones. ValueError for a requirement without a lower end, for an
    extra that is not there, and for a package in ``instead`` that is none of the dependencies.
    """
    requirements = list(project["dependencies"])
    for extra in extras:
        known = project.get("optional-dependencies", {})
        if extra not in known:
            raise ValueError(f"there is no extra {extra!r}: choose from {', '.join(known)}")
        requirements += known[extra]
    replaced = {_canonical(name): version for name, version in (instead or {}).items()}
    pins: dict[str, str] = {}
    for requirement in requirements:
        name, version = _name_and_lowest(requirement)
        pins.setdefault(name, replaced.get(_canonical(name), version))
    _check_known(replaced, {_canonical(name) for name in pins})
    return [f"{name}=={version}" for name, version in pins.items()]


def _name_and_lowest(requirement: str) -> tuple[str, str]:
    found = REQUIREMENT.match(requirement)
    lowest = LOWER_END.search(found["range"]) if found else None
    if found is None or lowest is None:
        raise ValueError(f"{requirement!r} has no lower end: write it as name>=version")
    return found["name"], lowest["version"]


def _check_known(replaced: Mapping[str, str], names: Collection[str]) -> None:
    for name in replaced:
        if name not in names:
            raise ValueError(f"--instead: {name!r} is none of the dependencies: {', '.join(sorted(names))}")


def _canonical(name: str) -> str:
    """One spelling for Name, na_me and na.me, as PyPI has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Prints the lowest versions that pyproject.toml allows, one pin a line."
    )
    parser.add_argument("--extra", action="append", default=[], help="an extra to include as well; may be repeated")
    parser.add_argument(
        "--instead", action="append", default=[], metavar="NAME==VERSION", help="take this version; may be repeated"
    )
    options = parser.parse_args(argv)
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    instead = dict(pin.split("==", 1) for pin in options.instead)
    try:
        pins = lowest_pins(project, extras=options.extra, instead=instead)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(pins))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
