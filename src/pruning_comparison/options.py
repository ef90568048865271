"""The words of a command line before they are parsed: their dashes, and what ``--preset`` and ``--config`` stand for."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name
from pruning_comparison.presets import preset_named
from pruning_comparison.spec import is_task_file

_MOST_CONFIG_BYTES = 2**20
_ONLY_ON_THE_COMMAND_LINE = ("config", "trust_methods", "fresh")
"""Options that a file cannot set: whoever wrote it is not to say what is trusted, or thrown away."""

_HOW_FAR = frozenset({"level", "pruning_level", "max_loss", "target_speedup", "best"})
"""Options of ``prune`` that exclude one another: one on the command line takes the place of another in a file."""


def with_underscores(argv: Sequence[str]) -> list[str]:
    """``--model-name=x`` as ``--model_name=x``: values are left alone."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        result.append(name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument)
    return result


def with_presets_and_files(argv: Sequence[str], known: Mapping[str, argparse.Action]) -> list[str]:
    """The words of one command, with the options of its preset and of its file put before those of the command line.

    The last of two equal options counts, so a file wins over a preset, and the command line over both. ``known`` are the
    command's options by their names. InputError for a preset that does not exist, a file that is no flat mapping, an option
    that the command does not have, and for a user's own method in a file without ``--trust_methods``: that would run code
    that whoever wrote the file has chosen.
    """
    command, given = list(argv[:1]), list(argv[1:])
    from_file: list[str] = []
    if "config" in known and (place := _last_value(given, "config")) is not None:
        from_file = _words_of_file(place, given, known)
    preset = None
    if "preset" in known:
        preset = _last_value(given, "preset") or _last_value(from_file, "preset")
    from_preset = [f"--{name}={value}" for name, value in preset_named(preset).options.items()] if preset else []
    if "--until_decided" in given:  # which is in place of a number of iterations
        from_file = [word for word in from_file if not word.startswith("--iterations=")]
    if "--until_decided" in (*from_file, *given):
        from_preset = [word for word in from_preset if not word.startswith("--iterations=")]
    if any(_name_in(word) in _HOW_FAR for word in given):
        from_file = [word for word in from_file if _name_in(word) not in _HOW_FAR]
    return [*command, *from_preset, *from_file, *given]


def _name_in(word: str) -> str:
    """The name of the option that a word of a command line is."""
    return word.partition("=")[0].removeprefix("--")


def parts_of(text: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """The parts of a list; one that differs from a ``known`` name in capitals alone is that name."""
    spelled = {name.lower(): name for name in known}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(part if part in known else spelled.get(part.lower(), part) for part in parts)


def _words_of_file(place: str, given: Sequence[str], known: Mapping[str, argparse.Action]) -> list[str]:
    """The options of a file as words, without those that the command line names itself."""
    said = {known[name] for word in given if (name := word.partition("=")[0].removeprefix("--")) in known}
    words = []
    for name, value in _read_file(place).items():
        if name in _ONLY_ON_THE_COMMAND_LINE:
            raise InputError(f"--config: {place!r} says {name!r}, which only the command line can. Leave it out there.")
        if name == "help" or name not in known:
            raise InputError(unknown_name(f"--config: {place!r}: option", name, known.keys() - {"help", "h", "-h"}))
        action = known[name]
        if action in said or value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f"--config: {place!r}: {name} is {value!r}. It is true or false.")
            words += [f"--{name}"] if value else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        methods = known["method" if "method" in known else "pruning_method"]
        own = [one for one in parts_of(text) if ":" in one] if action is methods else []
        if own and "--trust_methods" not in given:
            raise InputError(
                f"--config: {place!r} names {own[0]}, a method that is Python code, and importing it runs that code. Give "
                "--trust_methods if you trust it, or name it on the command line."
            )
        tasks = [one for one in parts_of(text) if is_task_file(one)] if action is known.get("tasks") else []
        if tasks and "--trust_methods" not in given:
            raise InputError(
                f"--config: {place!r} names {tasks[0]}, a task's file, and reading it runs the code that it names. Give "
                "--trust_methods if you trust it, or name it on the command line."
            )
        words.append(f"--{name}={text}")
    return words


def _last_value(words: Sequence[str], option: str) -> str | None:
    """The value that an option is given last, if any."""
    found = None
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == f"--{option}":
            following = words[number + 1] if number + 1 < len(words) else None
            found = value if equals else following
    return found


def _read_file(place: str) -> dict[str, Any]:
    """A file of options: names, and values that are text, numbers, true or false, or lists of these."""
    import yaml

    try:
        with Path(place).open("rb") as file:
            content = file.read(_MOST_CONFIG_BYTES + 1)
        too_long = len(content) > _MOST_CONFIG_BYTES
        values = None if too_long else yaml.safe_load(content.decode("utf-8"))
    except OSError as error:
        raise InputError(f"--config: {place!r} cannot be read: {error.strerror}. Give a YAML file.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"--config: {place!r} is not a YAML file: {' '.join(str(error).split())}. Write lines such as seed: 1."
        ) from error
    if too_long:
        raise InputError(f"--config: {place!r} has more than {_MOST_CONFIG_BYTES} bytes. Give a file of options.")
    if not isinstance(values, dict):
        raise InputError(f"--config: {place!r} holds no options by name. Write lines such as seed: 1.")
    plain = (str, int, float, bool, type(None))
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(part, plain) for part in parts):
            raise InputError(
                f"--config: {place!r}: {name!r} must be the name of an option, with one value or a list of values."
            )
    return values
