"""One name, one thing: nothing hides an import, a function or a builtin, and wings export what they say."""

from __future__ import annotations

import ast
import builtins
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pruning_comparison

PACKAGE = Path(pruning_comparison.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
WINGS = sorted(
    folder.parent.relative_to(PACKAGE).as_posix().replace("/", ".") for folder in PACKAGE.rglob("__init__.py")
)

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
NOT_IMPORTED = {"pruning_comparison.__main__"}
"""Modules that do something when they are imported."""
WITHOUT_EXPORTS = {"checkpoint"}
"""Wings whose modules are imported one by one."""


def module_names(tree: ast.Module) -> dict[str, str]:
    """What a module imports and defines at its top level, type-checking imports included: name to kind."""
    found: dict[str, str] = {}
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found[(alias.asname or alias.name).partition(".")[0]] = "an import"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = "a function"
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "a class"
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            pending += [inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)]
            pending += [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
    return found


def local_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Parameters and local variables of every function and comprehension, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            yield from ((argument.arg, node.lineno) for argument in every if argument is not None)
            body = [node.body] if isinstance(node, ast.Lambda) else node.body
            yield from bound_in(body, {name for inner in ast.walk(node) if isinstance(inner, ast.Global)
                                       for name in inner.names})  # fmt: skip
        elif isinstance(node, ast.comprehension):
            yield from ((name.id, name.lineno) for name in ast.walk(node.target) if isinstance(name, ast.Name))


def bound_in(body: list[ast.stmt] | list[ast.expr], outside: set[str]) -> Iterator[tuple[str, int]]:
    """Names that a function's body binds, nested functions by name, their insides and classes' left out."""
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in outside:
            yield node.id, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno
        if not isinstance(node, (*Function.__args__, ast.ClassDef)):
            pending += ast.iter_child_nodes(node)


def shadows(source: str) -> list[str]:
    """Every local name of a module that hides something of another meaning, as "line: name (what it hides)"."""
    tree = ast.parse(source)
    hidden = {name: "a builtin" for name in dir(builtins) if not name.startswith("_")} | module_names(tree)
    return sorted({f"{line}: {name} ({hidden[name]})" for name, line in local_names(tree) if name in hidden})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import math\ndef f(math): pass", ["2: math (an import)"]),
        ("from a import b as c\ndef f():\n    c = 1", ["3: c (an import)"]),
        ("def g(): pass\ndef f():\n    for g in (): pass", ["3: g (a function)"]),
        ("class K: pass\nx = [K for K in ()]", ["2: K (a class)"]),
        ("def f(*, list): pass", ["1: list (a builtin)"]),
        ("def g(): pass\ndef f():\n    def g(): pass", ["3: g (a function)"]),
        ("if True:\n    import a.b\ndef f():\n    with x as a: pass", ["4: a (an import)"]),
        ("import a\ndef f():\n    try: pass\n    except E as a: pass", ["4: a (an import)"]),
        ("def g(): pass\nh = lambda g: g", ["2: g (a function)"]),
        ("x = 1\ndef f():\n    global x\n    x = 2\nclass K:\n    list: int = 0\n    def id(self): pass", []),
    ],
)
def test_the_finder_finds_what_it_should(source, found):
    assert shadows(source) == found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_local_name_hides_an_import_a_function_or_a_builtin(module):
    assert shadows(module.read_text("utf-8")) == []


def test_no_module_is_named_like_one_of_the_standard_library():
    names = {path.stem for path in MODULES} | {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert not (names - {"__init__", "__main__"}) & set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def everything_imported():
    found = [found.name for found in pkgutil.walk_packages(pruning_comparison.__path__, "pruning_comparison.")]
    for name in found:
        if name not in NOT_IMPORTED:
            importlib.import_module(name)
    return found


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing != "." and wing not in WITHOUT_EXPORTS])
def test_every_name_that_a_wing_exports_is_what_it_says_after_importing_every_module(wing, everything_imported):
    """A submodule sets an attribute of its package when it is imported, over a function of the same name."""
    package = importlib.import_module(f"pruning_comparison.{wing}")
    assert package.__all__, f"{wing} exports nothing"
    assert len(set(package.__all__)) == len(package.__all__)
    submodules = {
        name.rpartition(".")[2] for name in everything_imported if name.rpartition(".")[0] == package.__name__
    }
    assert not submodules & set(package.__all__), "a name is both a submodule and an export"
    for name in package.__all__:
        assert getattr(package, name).__class__ is not type(ast), f"{wing}.{name} is a module"
