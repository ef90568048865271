"""Paths that a user names: every one is looked at here first, so that none ends in an operating system's error."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from pruning_comparison.errors import InputError

Kind = Literal["file", "folder", "nothing"]
"""What a name leads to: a regular file, a folder, or nothing at all."""

_SHOWN = 255


def kind_of(name: str | Path, option: str) -> Kind:
    """What a name leads to, links followed.

    InputError, naming ``option``, for a name that no file can have (too long, with a zero byte or half of a surrogate pair),
    for links in a loop, where a folder on the way may not be entered, and for what is neither file nor folder: reading a
    pipe or a device may never end.
    """
    try:
        mode = os.stat(name).st_mode  # noqa: PTH116 - a Path hides some of these errors
    except FileNotFoundError:
        return "nothing"
    except NotADirectoryError:
        return "nothing"
    except ValueError as error:  # a zero byte, or a lone surrogate
        reason = "has characters that no file name can have" if isinstance(error, UnicodeError) else str(error)
        raise InputError(f"{option}: {shown(name)} names no file: {reason}. Give another name.") from error
    except OSError as error:
        raise InputError(
            f"{option}: {shown(name)} cannot be looked at: {error.strerror}. Give another name."
        ) from error
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    raise InputError(f"{option}: {shown(name)} is neither a file nor a folder. Give a regular file, or a folder.")


def names_in(folder: str | Path, option: str) -> list[str]:
    """Names of what a folder holds, sorted. InputError, naming ``option``, where it may not be read."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names are all that is wanted
    except OSError as error:
        raise InputError(f"{option}: {shown(folder)} cannot be read: {error.strerror}. Give another folder.") from error


def shown(name: str | Path) -> str:
    """A name as a message quotes it: cut where it is very long."""
    text = str(name)
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text)} characters)"
