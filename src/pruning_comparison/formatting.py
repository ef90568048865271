"""Numbers, units, lists and durations as people read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

_NOTHING = 1e-15
"""Below it a figure is what rounding has left of zero."""


def plain_number(value: float) -> str:
    """A number with three significant digits and thousands separated; "missing" where there is none."""
    if not math.isfinite(value):
        return "missing" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")
    if abs(value) < _NOTHING:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e15:
        return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")
    return _three_digits(value).replace("-", "\N{MINUS SIGN}")


def label_number(value: float) -> str:
    """The same for a label in a chart, where there is room for signs and none for words."""
    if not math.isfinite(value):
        return "missing" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if abs(value) < _NOTHING:
        return "0"
    return f"{value:.2e}" if abs(value) < 1e-4 else _three_digits(value)


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def measured_number(value: float | None) -> str:
    """A number with four significant digits, whole from 10,000 on; "not measured" for None."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def rounded_up(count: float) -> int:
    """A count to two significant digits, upwards: for one that is only estimated."""
    step = 10 ** max(0, len(str(int(count))) - 2)
    return int(math.ceil(count / step) * step)


def counted(number: int, word: str, plural: str = "") -> str:
    """So many of something: "1 cell", "1,200 cells"; ``plural`` where an s does not make it."""
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def with_unit(value: float, unit: str) -> str:
    """A number and its unit, bytes and seconds scaled so that they read well."""
    if not math.isfinite(value):
        return plain_number(value)
    if unit == "byte":
        for power, word in ((9, "GB"), (6, "MB"), (3, "kB")):
            if abs(value) >= 10**power:
                return f"{plain_number(value / 10**power)} {word}"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{plain_number(value * 1000)} ms"
    return plain_number(value) if unit in ("1", "") else f"{plain_number(value)} {unit}"


def interval_with_unit(low: float, high: float, unit: str) -> str:
    """Both ends of an interval, the unit written once where both have the same."""
    first, second = with_unit(low, unit), with_unit(high, unit)
    number, _, word = first.partition(" ")
    return f"{number if word and second.endswith(f' {word}') else first} to {second}"


def per_cent(level: float) -> str:
    """A level as words: "40 %"."""
    return f"{level:g} %"


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence with commas and an "and"; "nothing" where there are none."""
    if not parts:
        return "nothing"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def capitalised(text: str) -> str:
    """A text with its first letter as a capital, the others as they are."""
    return text[:1].upper() + text[1:]


def format_duration(seconds: float) -> str:
    """A time as people say it: "about 40 s", "about 3 min", "about 2 h 10 min"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes // 60} h {minutes % 60} min"


def file_name_of(name: str) -> str:
    """A name as part of the name of a file: letters, digits, ``_``, ``-`` and inner dots alone, whatever is in it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".") or "-"


def unknown_name(option: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among the ``known`` ones: the nearest of them, and all.

    ``option`` is what the name was given for; empty where the error carries that itself.
    """
    names = list(known)
    lowered = {one.lower(): one for one in names}
    near = get_close_matches(name.lower(), lowered, n=1)
    hint = f"Did you mean {lowered[near[0]]}? " if near else ""
    where = f"{option}: " if option else ""
    return f"{where}{name!r} is unknown. {hint}Choose from {', '.join(names)}."


def format_value(value: Any) -> str:
    """A setting or figure as a reader would write it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, (list, tuple)) and all(not isinstance(part, (list, tuple, Mapping)) for part in value):
        return ", ".join(format_value(part) for part in value) or "none"
    if isinstance(value, (list, tuple, Mapping)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def printable(text: str) -> str:
    """Text that any terminal takes: what UTF-8 cannot carry, such as half of a surrogate pair, is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def reason_of(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
