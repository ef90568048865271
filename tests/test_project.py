"""What the project says about itself holds: dependencies, versions, workflows, make targets and the release check."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import load_script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pruning_comparison

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "pruning_comparison"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


lowest_versions, check_release = (
    load_script(ROOT / "scripts" / "lowest_versions.py"),
    load_script(ROOT / "scripts" / "check_release.py"),
)


def required(*extras: str) -> dict[str, Requirement]:
    """Declared requirements by canonical name: the package's own, and those of ``extras``."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


# Imports and dependencies

OPTIONAL = ("gguf", "llama-cpp", "ray", "tasks", "datasets", "mlflow", "tensorboard", "wandb")
"""Extras that the package itself imports, inside functions."""


def imported(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether it is imported inside a function) for every import that is executed at all."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module).split(".")[0], inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            yield from imported(node, inside=inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def undeclared(files: Iterator[Path], always: Mapping[str, Any], sometimes: Mapping[str, Any]) -> set[str]:
    """Imports of other people's packages that no requirement covers, as "file: package".

    ``always`` covers every import, ``sometimes`` (extras) only those inside functions, which run where they are needed.
    """
    distributions = metadata.packages_distributions()
    found = set()
    for file in files:
        for package, inside in imported(ast.parse(file.read_text("utf-8"))):
            beside = ROOT / "tests" / package
            ours = beside.is_dir() or beside.with_suffix(".py").exists() or package == "pruning_comparison"
            if ours or package in sys.stdlib_module_names:
                continue
            names = {canonicalize_name(name) for name in distributions.get(package, [package])}
            if not names & set({**always, **sometimes} if inside else always):
                found.add(f"{file.relative_to(ROOT)}: {package}")
    return found


def test_imports_are_told_apart() -> None:
    tree = ast.parse(
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import c\n"
        "def f():\n    from d import e\ntry:\n    import g\nexcept ImportError:\n    pass\n"
    )
    assert list(imported(tree)) == [("a", False), ("typing", False), ("d", True), ("g", False)]


def test_every_package_that_is_imported_is_declared() -> None:
    everything = (SRC).rglob("*.py")
    assert not undeclared(everything, required(), required(*OPTIONAL))
    assert undeclared(iter([SRC / "models" / "gguf.py"]), {}, {}) >= {"src/pruning_comparison/models/gguf.py: gguf"}


def test_every_package_that_tests_import_is_declared() -> None:
    assert not undeclared((ROOT / "tests").rglob("*.py"), required("test"), required(*OPTIONAL, "test", "parity"))


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_every_requirement_is_tested_at_a_version_inside_its_range() -> None:
    pinned = constraints()
    for name, requirement in required(*PROJECT["optional-dependencies"]).items():
        assert name in pinned, f"{name}: constraints.txt does not name it"
        assert requirement.specifier.contains(pinned[name]), requirement


def test_the_hooks_before_a_commit_use_the_ruff_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook.get("additional_dependencies", []) if pin.startswith("ruff==")}
    assert pins == {f"ruff=={constraints()['ruff']}"}


# The lowest versions


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges() -> None:
    project = {
        "dependencies": ["torch>=2.11,<3", "Jinja2 >= 3.1", "huggingface_hub[cli]<2,>=1.5; python_version >= '3.11'"],
        "optional-dependencies": {"gguf": ["gguf>=0.10"], "more": ["gguf>=0.12", "ray>=2.60,<3"]},
    }
    pins = ["torch==2.11", "Jinja2==3.1", "huggingface_hub==1.5"]
    assert lowest_versions.lowest_pins(project) == pins
    assert lowest_versions.lowest_pins(project, extras=["gguf"]) == [*pins, "gguf==0.10"]
    instead = lowest_versions.lowest_pins(project, instead={"Torch": "2.13.0", "huggingface-hub": "1.9"})
    assert instead == ["torch==2.13.0", "Jinja2==3.1", "huggingface_hub==1.9"]


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy==2.0", "numpy>2"])
def test_a_requirement_without_a_lower_end_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="has no lower end"):
        lowest_versions.lowest_pins({"dependencies": [requirement]})


def test_unknown_extras_and_packages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no extra 'gpu'.*: choose from gguf, "):
        lowest_versions.lowest_pins(PROJECT, extras=["gpu"])
    with pytest.raises(ValueError, match="'troch' is none of the dependencies"):
        lowest_versions.lowest_pins(PROJECT, instead={"troch": "2.13.0"})


def test_the_script_prints_a_pin_for_every_dependency(capsys: pytest.CaptureFixture[str]) -> None:
    assert lowest_versions.main(["--instead=torch==2.13.0"]) == 0
    pins = capsys.readouterr().out.split()
    assert len(pins) == len(PROJECT["dependencies"])
    for pin in pins:
        name, version = pin.split("==")
        assert required()[canonicalize_name(name)].specifier.contains(version), pin
    assert "torch==2.13.0" in pins
    assert lowest_versions.main(["--extra=gpu"]) == 2


# Releases

PACKAGE = '"""What it is."""\n\n__version__ = "1.2.3"\n'
CHANGES = "# Changelog\n\nNewest first.\n\n## 1.2.3 (2027-01-31)\n\n* New.\n\n## 1.2.2 (2027-01-02)\n\n* Old.\n"
CITATION = "cff-version: 1.2.0\ntitle: x\nversion: 1.2.3\n"


def test_a_release_that_is_named_alike_everywhere_has_no_disagreements() -> None:
    assert check_release.disagreements("v1.2.3", package=PACKAGE, changelog=CHANGES, citation=CITATION) == []
    assert check_release.section_of(CHANGES, "1.2.3") == "* New.\n"
    assert check_release.section_of(CHANGES, "1.2.2") == "* Old.\n"
    with pytest.raises(ValueError, match=r"no section 1\.2\.1"):
        check_release.section_of(CHANGES, "1.2.1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"package": PACKAGE.replace("1.2.3", "1.2.4")}, "__init__.py says 1.2.4, the tag says 1.2.3"),
        ({"package": ""}, "__init__.py says nothing"),
        ({"changelog": "# Changelog\n\n## Unreleased\n\n" + CHANGES}, "CHANGELOG.md says Unreleased"),
        ({"changelog": CHANGES.replace("* New.\n", "")}, "the section 1.2.3 of CHANGELOG.md is empty"),
        ({"citation": CITATION.replace("version: 1.2.3", "version: 1.2.2")}, "CITATION.cff says 1.2.2"),
    ],
)
def test_a_release_with_two_versions_is_refused(change: dict[str, str], said: str) -> None:
    texts = {"package": PACKAGE, "changelog": CHANGES, "citation": CITATION, **change}
    wrong = check_release.disagreements("v1.2.3", **texts)
    assert len(wrong) == 1
    assert said in wrong[0]


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2", "latest"])
def test_a_tag_that_is_no_version_is_refused(tag: str) -> None:
    wrong = check_release.disagreements(tag, package=PACKAGE, changelog=CHANGES, citation=CITATION)
    assert wrong == [f"the tag {tag!r} is no version: write v1.2.3"]


def test_the_script_refuses_a_tag_that_is_not_this_version(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    assert check_release.main(["v999.0.0", f"--notes={notes}"]) == 1
    assert f"says {pruning_comparison.__version__}, the tag says 999.0.0" in capsys.readouterr().err
    assert not notes.exists()


def test_the_citation_names_this_version_and_this_repository() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == pruning_comparison.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


# Files that documents name

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_file_that_a_document_names_is_there(page: Path) -> None:
    """Paths in backticks that have a folder, from the checkout, from `src`, or from the package."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|html|json|ipynb))`", text):
        assert any((place / name).exists() for place in (ROOT, SRC, SRC.parent)), name


# make and the workflows


def targets() -> set[str]:
    found = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return set(found[1].split())


def test_every_make_target_is_there_and_explained() -> None:
    for target in targets():
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        assert target == "help" or re.search(rf'@echo "make {target}\b', MAKEFILE), (
            f"make help says nothing of {target}"
        )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_whole_and_calls_what_exists(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["name"]
    assert workflow[True], "what starts it: YAML reads the key `on` as true"
    assert workflow["permissions"]
    commands = []
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert job["timeout-minutes"] <= 90
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses), uses
        here = [shlex.split(step["run"]) for step in job["steps"] if "run" in step]
        assert uses[0].startswith("actions/checkout@") or not here, "commands need a checkout"
        commands += here
    assert commands
    for words in commands:
        if words[0] == "make":
            assert words[1] in targets(), words
            for name in (word.split("=")[0] for word in words[2:]):
                assert re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE), f"{name} is no variable of the Makefile"
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] == "gh", words


def test_the_workflows_test_every_python_that_the_package_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    named = [word.removeprefix(prefix) for word in PROJECT["classifiers"] if word.startswith(prefix)]
    assert pythons == [f"3.{minor}" for minor in named] == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_merging_needs_what_make_test_runs() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    recipe = re.search(r"^test: lint\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    assert "$(BIN)/mypy" in recipe[1]
    assert "$(PYTEST)" in recipe[1]


def test_make_test_fails_where_tests_or_types_do(tmp_path) -> None:
    """With stand-ins for all it calls: it ends with an error whichever of the two fails, and shows what mypy said."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (tmp_path / "Makefile").write_text(MAKEFILE, "utf-8")
    for name in ("ruff", "lint-imports"):
        (bin_folder / name).write_text("#!/bin/sh\nexit 0\n", "utf-8")
    for name in ("installed-test", "installed"):
        (tmp_path / name).touch()
    for tests, types in ((0, 0), (1, 0), (0, 1)):
        (bin_folder / "pytest").write_text(f"#!/bin/sh\nexit {tests}\n", "utf-8")
        (bin_folder / "mypy").write_text(f"#!/bin/sh\necho types were checked\nexit {types}\n", "utf-8")
        for tool in bin_folder.iterdir():
            tool.chmod(0o755)
        command = ["make", "-o", f"{tmp_path}/installed-test", "-C", str(tmp_path), "test", f"VENV={tmp_path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert "types were checked" in done.stdout, done.stderr
        assert (done.returncode == 0) == (tests == types == 0)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks_what_it_says(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] is True
        return
    assert form["name"]
    assert form["description"]
    questions = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in questions}) == len(questions)
    assert all(part["attributes"]["label"] for part in questions)


def test_dependabot_watches_packages_and_actions() -> None:
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text("utf-8"))["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


def test_the_site_is_published_from_main_alone_once_it_was_built() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text("utf-8"))["jobs"]
    assert "make docs" in [step.get("run") for step in jobs["build"]["steps"]]
    assert jobs["publish"]["needs"] == "build"
    assert "github.event_name != 'pull_request' && github.ref == 'refs/heads/main'" in jobs["publish"]["if"]
    assert jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}
    (uploaded,) = [step["with"]["path"] for step in jobs["build"]["steps"] if "upload-pages" in step.get("uses", "")]
    assert uploaded == "site/"
    assert "mkdocs build --strict\n" in MAKEFILE
