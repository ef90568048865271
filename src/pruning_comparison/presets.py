"""Named sets of options, for ``--preset``: how much is measured, and so how long it takes. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name


@dataclass(frozen=True)
class Preset:
    """A set of options by name. ``summary`` says what it is for, after "NAME: ".

    It never names a model, a device or a folder: those are the user's. Whatever the command line or a file of options says
    wins over it.
    """

    name: str
    summary: str
    options: Mapping[str, str | int] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "quick",
            "a first look, in minutes on a CPU for a small model",
            {
                "num_tokens": 32,
                "eval_tokens": 4096,
                "calibration_tokens": 4096,
                "score_tokens": 2048,
                "timing_limit_s": 10,
            },
        ),
        Preset("standard", "the defaults"),
        Preset(
            "paper",
            "four methods, four variants, nine levels, ten iterations and eight times the evaluation text: hours to days",
            {
                "pruning_levels": "0,10,20,30,40,50,60,70,80",
                "pruning_method": "random,magnitude,entropy,fisher",
                "variants": "baseline,baseline-progressive,agency-adaptation,agency",
                "iterations": 10,
                "max_prompts": 20,
                "eval_tokens": 65_536,
                "calibration_tokens": 32_768,
            },
        ),
    )
}
"""Every preset by its name, from the smallest to the largest."""


def preset_named(name: str) -> Preset:
    """The preset of that name. InputError, with the nearest, for any other."""
    if name not in PRESETS:
        raise InputError(unknown_name("", name, PRESETS), option="--preset")
    return PRESETS[name]
