"""The variants that a comparison sets side by side: one record per variant, from which everything else derives.

A variant is a way of choosing heads and of going on without them. Adding one is a record here and a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name

Selection = Literal["once", "progressive", "negotiated"]
"""How heads are chosen: ranked once on the dense model; ranked anew in rounds; asked in rounds."""

Consent = Literal["by cost", "always"]
"""Who may refuse: a head whose withdrawal costs more than the limit, or nobody."""


@dataclass(frozen=True)
class Look:
    """How a line looks. Marker and dashes differ as well as colour, so that greyscale prints stay readable."""

    colour: str
    marker: str
    line: Any  # a matplotlib line style: a name, or (offset, (on, off, ...)) in points
    hollow: bool = False


@dataclass(frozen=True)
class Variant:
    """One way of pruning a model.

    ``selection`` and, where heads are asked, ``consent`` say which heads leave; ``adapts`` whether the survivors are
    adapted before they are measured. ``lacks`` is the part of agency that this variant does without, and ``instead`` what it
    does: agency against it tells what that part brings; None where it isolates no part. ``plural`` of the part's name.

    ``revision`` is raised whenever the same inputs give another model; results of different revisions are never mixed.
    """

    name: str
    selection: Selection
    adapts: bool
    summary: str
    look: Look
    consent: Consent = "by cost"
    lacks: str | None = None
    instead: str = ""
    plural: bool = False
    revision: int = 1

    @property
    def negotiates(self) -> bool:
        """Whether heads are asked."""
        return self.selection == "negotiated"

    @property
    def is_baseline(self) -> bool:
        """Whether it does without agency altogether: heads are ranked and cut, unasked, and nothing adapts."""
        return not (self.negotiates or self.adapts)

    @property
    def title(self) -> str:
        """As a sentence names it."""
        return "the baseline" if self.name == "baseline" else self.name


# Okabe-Ito colours: they stay apart for every common kind of colour blindness.
VARIANTS: dict[str, Variant] = {
    "baseline": Variant(
        "baseline",
        selection="once",
        adapts=False,
        summary="ranked once on the dense model, then cut",
        look=Look("#D55E00", "o", (0, (4, 1.6)), hollow=True),
    ),
    "agency": Variant(
        "agency",
        selection="negotiated",
        adapts=True,
        summary="heads are asked at their prices, those that consent leave, and the survivors adapt",
        look=Look("#0072B2", "s", "-"),
        revision=5,
    ),
    "baseline-progressive": Variant(
        "baseline-progressive",
        selection="progressive",
        adapts=False,
        summary="pruned in rounds of 10 % of the heads, ranked again on what is left after each: the stronger baseline",
        look=Look("#E69F00", "^", "-.", hollow=True),
        lacks="Consent and adaptation together",
        instead="heads leave in the same rounds and nothing adapts",
    ),
    "agency-adaptation": Variant(
        "agency-adaptation",
        selection="once",
        adapts=True,
        summary="the baseline's heads, and the survivors adapt: what adaptation brings alone",
        look=Look("#56B4E9", "D", (0, (1, 1.2))),
        lacks="Asking heads",
        instead="the baseline's heads leave and the survivors adapt all the same",
        revision=3,
    ),
    "agency-selection": Variant(
        "agency-selection",
        selection="negotiated",
        adapts=False,
        summary="agency's heads, measured with the original weights: what the choice of heads brings alone",
        look=Look("#009E73", "v", (0, (6, 1.5, 1, 1.5))),
        lacks="Adapted weights",
        instead="the same heads leave and the weights stay as they were",
        plural=True,
        revision=4,
    ),
    "agency-always-yes": Variant(
        "agency-always-yes",
        selection="negotiated",
        adapts=True,
        consent="always",
        summary="agency in which every head consents: what consent brings is the difference",
        look=Look("#CC79A7", "P", (0, (2, 1))),
        lacks="Consent",
        instead="nobody may refuse",
        revision=5,
    ),
}
"""Every variant by its name, in the order in which help, tables and charts list them."""

RETIRED: dict[str, Variant] = {
    "agency-heeds-states": Variant(
        "agency-heeds-states",
        selection="negotiated",
        adapts=True,
        summary="agency in which a head's state changed its answer; an ablation showed that this brought nothing",
        look=Look("#000000", "*", (0, (3, 1, 1, 1, 1, 1))),
        lacks="Leaving the heads' states out of their answers",
        instead="misaligned heads are asked first and overloaded ones refuse sooner",
    ),
}
"""Variants of earlier releases: their runs can still be reported, and are neither continued nor measured."""

PRIMARY = ("agency", "baseline")
"""The two that the expectations and questions are about: variant and reference."""

DENSE = "dense"
"""What tables call the unpruned model where a variant is set against it."""

AGENCY_VS_BASELINE = "agency vs baseline"
"""Their contrast, as tables name it."""


def variant_named(name: str) -> Variant:
    """The variant of that name. InputError, with the nearest, for any other; one that is gone is said to be."""
    if name in RETIRED:
        raise InputError(
            f"{name!r} is no longer measured: {RETIRED[name].summary}. Leave it out; its old runs can still be reported.",
            option="--variants",
        )
    if name not in VARIANTS:
        raise InputError(unknown_name("", name, VARIANTS), option="--variants")
    return VARIANTS[name]


def reported_variant(name: str) -> Variant:
    """The variant of that name in a stored run, where it may be one of an earlier release. InputError for any other."""
    return RETIRED[name] if name in RETIRED else variant_named(name)


def variant_order(name: str) -> int:
    """What variants are sorted by."""
    return [*VARIANTS, *RETIRED].index(reported_variant(name).name)
