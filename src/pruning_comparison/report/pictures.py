"""The charts as the report carries them: vector pictures inside the page, which take its colours, light or dark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup, escape

from pruning_comparison.report.sample_texts import clean

__all__ = ["Chart", "inline_svg", "report_charts"]

# What a picture is drawn with on paper, and the page's colour that takes its place.
_PAGE_COLOURS = {
    "#222222": "--ink",
    "#666666": "--muted",
    "#444444": "--muted",
    "#888888": "--edge",
    "#e4e4e4": "--rule",
    "#ffffff": "--card",
    "#f2f2f2": "--soft",
    "#0072b2": "--blue",
    "#d55e00": "--orange",
}
_COLOUR = re.compile("|".join(_PAGE_COLOURS))
_IDS = re.compile(r'(\bid="|href="#|url\(#)')
# Beyond two decimals of a point nobody sees a difference. Factors below 1 keep theirs: they scale letters.
_LONG_NUMBERS = re.compile(r"(?<![\d.])([1-9]\d*\.\d\d)\d+")


@dataclass(frozen=True)
class Chart:
    """A chart with its words; ``picture`` is an SVG element that is safe in HTML."""

    heading: str
    reading: str
    picture: Markup


_CHART_WORDS = {
    "rankings": (
        "Method against method",
        "The methods in order. A filled dot has been decided after correction, a hollow one has not.",
    ),
    "fronts": (
        "What speed and memory cost in perplexity",
        "A point is a variant at a level. Further right in the first panel is faster, further left in the second is "
        "smaller, lower is better in both. No other point of the method beats those with a ring in both figures.",
    ),
    "tasks": (
        "Accuracy on tasks",
        "The share of questions that each variant answers rightly at each level, with 95 % intervals; higher is better.",
    ),
    "speed_comparison": (
        "Speed",
        "Tokens per second and the wait for the first token, the dotted line being the speed if time went by the bytes or "
        "FLOPs left; and who is faster at the same perplexity.",
    ),
    "quality_metrics": (
        "Quality",
        "Perplexity is better the lower it is. Diversity and repetition are best near the unpruned model's value.",
    ),
    "relative_improvement": (
        "Relative improvement",
        "Above the zero line agency is better than the baseline, below it worse. Where a bar crosses the line, the "
        "difference is unclear.",
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
        "Each square is a head; its colour is the level at which it is pruned. Grey heads stay. A dot: it refused at least "
        "once. A cross: it was overridden.",
    ),
    "head_values": ("Scores and signals", "What was measured of every head of the unpruned model."),
    "head_negotiation": (
        "The negotiation, round by round",
        "Which heads were asked in each round, who consented, refused or was overridden, in the first iteration.",
    ),
    "head_agreement": (
        "How far choices agree",
        "How many of the heads gone in one choice are gone in the other too, and the rank correlation of the scores.",
    ),
}


def report_charts(drawings: Mapping[str, str], name: str, *, most_bytes: int) -> tuple[dict[str, Chart], list[str]]:
    """The charts that fit, by their names, and the headings of those that do not. ``drawings`` are SVG files as text.

    The page that shows every measurement stays a file: the interactive chart shows the same.
    """
    charts, left_out = {}, []
    left = most_bytes
    for number, (key, drawing) in enumerate(drawings.items()):
        stem = next((known for known in _CHART_WORDS if key.startswith(known)), None)
        if stem == "comprehensive_summary":
            continue
        heading, reading = _CHART_WORDS[stem] if stem else (key.replace("_", " "), "")
        alt = f"Chart for {name}: {heading}. {reading} The numbers are in the tables of this report."
        picture = inline_svg(drawing, f"c{number}-", alt)
        if len(picture.encode()) > left:
            left_out.append(heading)
            continue
        left -= len(picture.encode())
        charts[key] = Chart(heading, reading, picture)
    return charts, left_out


def inline_svg(drawing: str, prefix: str, alt: str) -> Markup:
    """An SVG file of matplotlib's as an element of a page.

    It has the page's colours in place of the paper's, ids that begin with ``prefix``, as those of no other picture, and no
    size of its own, so that it is as wide as its place, up to 96 pixels to the inch.
    """
    start = drawing.index("<svg")
    root, body = drawing[start:].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    # A rule for everything would hold for the whole page: the root passes it down instead.
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', root)
    if found is None:
        raise ValueError(f"the drawing {prefix!r} has no viewBox: {root[:200]!r}")
    width, height = (float(part) for part in found.groups())
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = _IDS.sub(rf"\g<1>{prefix}", body.replace("xlink:href", "href").replace("DejaVuSans-", "D"))
    body = _COLOUR.sub(lambda match: f"var({_PAGE_COLOURS[match[0]]})", body)
    body = re.sub(r"\s*\n\s*", "\n", _LONG_NUMBERS.sub(r"\1", body))
    head = (
        f'<svg role="img" aria-label="{escape(clean(alt))}" viewBox="0 0 {width:g} {height:g}" '
        f'xmlns="http://www.w3.org/2000/svg" '
        f'style="max-width:{width * 96 / 72:.0f}px;stroke-linejoin:round;stroke-linecap:butt">'
    )
    return Markup(head) + Markup(body)
