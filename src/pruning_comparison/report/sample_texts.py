"""Generated texts beside one another, as the report shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from pruning_comparison.variants import PRIMARY

_TEXT_BYTES = 350_000


_PROMPTS_PER_METHOD = 5
_SHOWN = PRIMARY[::-1]


# Control characters, lone surrogates and noncharacters: HTML forbids them, and surrogates cannot be encoded at all.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class TextSample:
    prompt: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TextSampleGroup:
    method: str
    level: float
    temperature: float | None
    samples: tuple[TextSample, ...]


def clean(value: Any) -> Any:
    """Replace what HTML or UTF-8 cannot carry; what is already markup was built here and stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value.replace("\r\n", "\n").replace("\r", "\n"))


def sample_groups(texts: pd.DataFrame | None) -> tuple[list[TextSampleGroup], int]:
    """Per method the same prompts continued by the dense, baseline and agency model, and how many did not fit."""
    if texts is None or texts.empty:
        return [], 0
    groups = []
    left = _TEXT_BYTES
    left_out = 0
    for method in texts["method"].dropna().unique():
        ours = texts[(texts["method"] == method) & texts["variant"].isin(_SHOWN)]
        levels = [float(level) for level in ours["level"].dropna().unique() if level > 0]
        if not levels:
            continue
        complete = [level for level in levels if ours.loc[ours["level"] == level, "variant"].nunique() == 2]
        level = min(complete or levels, key=lambda value: (abs(value - 50), value))
        temperatures = [float(value) for value in ours["temperature"].dropna().unique()]
        temperature = min(temperatures, key=lambda value: (abs(value - 1), value)) if temperatures else None
        chosen = ours if temperature is None else ours[ours["temperature"] == temperature]
        chosen = chosen[chosen["iteration"] == chosen["iteration"].min()]
        samples = []
        for prompt in chosen["prompt"].unique()[:_PROMPTS_PER_METHOD]:
            of_prompt = chosen[chosen["prompt"] == prompt]
            sample = _sample(of_prompt, str(of_prompt["prompt_text"].iloc[0]), level)
            left -= sum(
                len(escape(clean(text)).encode()) + 200 for text in (sample.prompt, *dict(sample.versions).values())
            )
            if left > 0:
                samples.append(sample)
            else:
                left_out += 1
        if samples:
            groups.append(TextSampleGroup(str(method), level, temperature, tuple(samples)))
    return groups, left_out


def _sample(rows: pd.DataFrame, prompt: str, level: float) -> TextSample:
    wanted = (
        ("unpruned (level 0)", rows["level"] == 0),
        *((f"{variant} at {level:g} %", (rows["level"] == level) & (rows["variant"] == variant)) for variant in _SHOWN),
    )
    versions = []
    for label, where in wanted:
        found = rows.loc[where, "text"].dropna()
        versions.append((label, str(found.iloc[0]) if len(found) else "(no text was kept)"))
    return TextSample(prompt, tuple(versions))
