"""The engines that a pruned model is timed in: one record per engine, from which everything else derives.

An engine is a way of running a model that people use. Adding one is a record here, a function and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name

if TYPE_CHECKING:
    from pruning_comparison.measure.engines import Runner


@dataclass(frozen=True)
class Engine:
    """One way of running a model.

    ``build`` names the function ("module:function") that makes a ``measure.engines.Runner`` of a model. ``summary`` says in
    a few words how it decodes; ``title`` is what a sentence calls it. ``packages`` are those that it needs beside this
    package's own requirements, by the names they are imported by, and ``install`` the command that installs them.
    """

    name: str
    build: str
    summary: str
    title: str
    packages: tuple[str, ...] = ()
    install: str = ""

    def builder(self) -> Callable[..., Runner]:
        """The function that ``build`` names."""
        module, _, name = self.build.partition(":")
        return cast("Callable[..., Runner]", getattr(import_module(module), name))

    def check_installed(self) -> None:
        """InputError, with the command that installs it, where a package is missing that the engine needs."""
        for package in self.packages:
            if find_spec(package) is None:
                raise InputError(
                    f"{self.name} needs the package {package}, which is not installed: {self.install}.",
                    option="--engine",
                )


NATIVE = "native"
"""The engine that all other figures of speed are measured in, and that others are held against."""

LLAMA_CPP = "llama.cpp"
"""The engine that reads models from GGUF files."""

ENGINES: dict[str, Engine] = {
    NATIVE: Engine(
        NATIVE,
        build="pruning_comparison.measure.engines:native_runner",
        summary="the decoding loop of this package, in which all other speeds are measured",
        title="the native loop",
    ),
    "transformers": Engine(
        "transformers",
        build="pruning_comparison.measure.engines:transformers_runner",
        summary="model.generate of transformers, as it is called",
        title="transformers",
    ),
    "compiled": Engine(
        "compiled",
        build="pruning_comparison.measure.engines:compiled_runner",
        summary="torch.compile of the model's forward, with a static cache, one token at a time",
        title="torch.compile",
    ),
    LLAMA_CPP: Engine(
        LLAMA_CPP,
        build="pruning_comparison.measure.llama_cpp:llama_cpp_runner",
        summary="llama.cpp on the CPU, from a GGUF file of the model, greedy",
        title="llama.cpp",
        packages=("gguf", "xllamacpp"),
        install="pip install 'pruning-comparison[llama-cpp]'",
    ),
}
"""By the names that ``--engine`` takes."""


def engine_named(name: str) -> Engine:
    """The record of an engine; InputError, with the valid names and the nearest, for a name that is none."""
    if name not in ENGINES:
        raise InputError(unknown_name("", name, ENGINES), option="--engine")
    return ENGINES[name]


def engines_of(names: Any) -> tuple[str, ...]:
    """Names of engines in the order of ``ENGINES``, each once, "native" always among them; InputError for an unknown one."""
    asked = {engine_named(name).name for name in names} | {NATIVE}
    return tuple(name for name in ENGINES if name in asked)
