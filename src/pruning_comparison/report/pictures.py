"""The charts as the report carries them: small PNGs in base 64, with their words."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

# The document stays under 3 MB: these parts share it, and each says so when it has to leave something out.
_CHART_BYTES = 800_000


_NARROW_CHART_BYTES = 400_000


_PNG_COLOURS = 128


@dataclass(frozen=True)
class Picture:
    """A PNG in base 64, and its width and height in pixels of 100 to the inch, which is how wide it is to be shown."""

    data: str
    width: int
    height: int


@dataclass(frozen=True)
class Chart:
    heading: str
    reading: str
    alt: str
    wide: Picture
    narrow: Picture | None


_CHART_WORDS = {
    "speed_comparison": (
        "Speed",
        "Left: tokens per second; the dotted line is the speed if time went by the bytes left. Middle: the wait for the "
        "first token. Right: who is faster at the same perplexity: further up and further left is better.",
    ),
    "quality_metrics": (
        "Quality",
        "Perplexity is better the lower it is. Diversity and repetition are best near the unpruned model's value.",
    ),
    "relative_improvement": (
        "Relative improvement",
        "Above the zero line agency is better than the baseline, below it worse. Where a bar crosses the line, the "
        "data do not tell.",
    ),
    "radar": (
        "All sides at the highest level",
        "The ring at 100 % is the baseline. Outward is better for agency. The dots repeat the numbers, sorted.",
    ),
    "temperature": (
        "Sampling temperature",
        "One row of panels per temperature. The dotted line is the unpruned model at that temperature.",
    ),
    "comprehensive_summary": ("Everything on one page", "Every measurement, a panel each."),
    "head_departures": (
        "Who leaves when",
        "Each square is a head; its colour is the level at which it goes. Grey heads stay. A dot: it refused at least "
        "once. A cross: it was overridden.",
    ),
    "head_values": ("Scores and signals", "What was measured of every head of the unpruned model."),
    "head_negotiation": (
        "The negotiation, round by round",
        "Which heads were asked in each round, who consented, refused or was overridden, in the first iteration.",
    ),
    "head_agreement": (
        "How far choices agree",
        "Left: how many of the heads gone in one choice are gone in the other too. Right: rank correlation of the scores.",
    ),
}


def report_charts(pictures: Mapping[str, bytes], narrow: Mapping[str, bytes], name: str) -> dict[str, Chart]:
    wide = _fitting(pictures, _CHART_BYTES, least=0.2)
    small = _fitting(narrow, _NARROW_CHART_BYTES, least=2 / 3)
    charts = {}
    for key, picture in wide.items():
        stem = next((known for known in _CHART_WORDS if key.startswith(known)), None)
        heading, reading = _CHART_WORDS[stem] if stem else (key.replace("_", " "), "")
        method = key[len(stem) :].strip("_") if stem else ""
        heading = f"{heading}: {method}" if method else heading
        charts[key] = Chart(
            heading,
            reading,
            f"Chart for {name}: {heading}. {reading} The numbers are in the tables of this report.",
            picture,
            small.get(key),
        )
    return charts


def _fitting(pictures: Mapping[str, bytes], most_bytes: int, *, least: float) -> dict[str, Picture]:
    """The pictures at the largest scale at which they fit together.

    At the scale ``least`` the smallest ones are kept, as many as fit, but none is left out where ``least`` is below 100
    dots per inch, since there is nothing else to show.
    """
    scale = 1.0
    smaller = {key: _small_png(png, scale) for key, png in pictures.items()}
    while sum(len(png) for png, _ in smaller.values()) > most_bytes and scale > least:
        scale = max(least, 0.8 * scale)
        smaller = {key: _small_png(png, scale) for key, png in pictures.items()}
    kept, used = {}, 0
    for key, (png, size) in sorted(smaller.items(), key=lambda item: len(item[1][0])):
        used += len(png)
        if used <= most_bytes or least < 2 / 3:
            kept[key] = Picture(base64.b64encode(png).decode(), *size)
    return {key: kept[key] for key in pictures if key in kept}


def _small_png(png: bytes, scale: float) -> tuple[bytes, tuple[int, int]]:
    """The chart with a palette instead of full colour: a third of the size, and no difference to the eye.

    Also its width and height in pixels of 100 to the inch, which is how wide it is to be shown.
    """
    with Image.open(io.BytesIO(png)) as picture:
        shown = (round(picture.width / 1.5), round(picture.height / 1.5))
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        colours = picture.convert("RGB")
        small = colours if scale == 1 else colours.resize(size, Image.Resampling.LANCZOS)
        reduced = small.quantize(_PNG_COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    reduced.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), shown
