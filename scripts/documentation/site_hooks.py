"""What MkDocs calls while it builds the documentation site: links that leave ``docs/``, and the list of decisions.

The pages are read on GitHub as well, where ``../README.md`` is a link that works. On the site it leads to the repository.
"""

from __future__ import annotations

import logging
import posixpath
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGGER = logging.getLogger("mkdocs.hooks.site")  # under mkdocs, so that a warning ends a strict build
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
LISTED = re.compile(r"^\d+\. \[(?P<title>[^\]]+)\]\((?P<file>\d{4}-[\w-]+\.md)\)", re.MULTILINE)


def repository() -> str:
    """The address that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return str(project["urls"]["Repository"])


def leave_docs(markdown: str, page: str, address: str) -> str:
    """``markdown`` with links to files outside of ``docs/`` turned into links to the repository at ``address``.

    ``page`` is the page's path within ``docs/``. Such a link to what is not in the checkout is logged as a warning.
    """

    def to_repository(link: re.Match[str]) -> str:
        target = link["target"]
        if ":" in target or target.startswith("/"):
            return link[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith("docs/"):
            return link[0]
        if path.startswith("..") or not (ROOT / path).exists():
            LOGGER.warning("%s has a link to %s, which is not in the repository", page, target)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{link['before']}{address}/{kind}/main/{path}{link['anchor'] or ''}"

    return LINK.sub(to_repository, markdown)


def list_of_decisions(index: str) -> list[Any]:
    """What the navigation has under "Decisions", from the text of ``docs/decisions/README.md``: the index, then each."""
    pages = [
        {f"{int(found['file'][:4])}. {found['title']}": f"decisions/{found['file']}"}
        for found in LISTED.finditer(index)
    ]
    return ["decisions/README.md", *pages]


def on_config(config: Any) -> Any:
    """Puts the decisions into the navigation, where their index stands."""
    index = (Path(config.docs_dir) / "decisions" / "README.md").read_text("utf-8")
    config.nav = [
        {"Decisions": list_of_decisions(index)} if isinstance(entry, Mapping) and "Decisions" in entry else entry
        for entry in config.nav
    ]
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Every page, before it becomes HTML."""
    return leave_docs(markdown, page.file.src_uri, repository())
