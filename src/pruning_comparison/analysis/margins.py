"""What matters: the margins of relevance and of equivalence."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Margins:
    """Margins of relevance and of equivalence.

    Relative ones are shares (0.02 is 2 %), read as ratios on the log scale; that of accuracy is a difference (0.02 is 2
    percentage points).
    """

    speed: float = 0.02
    quality: float = 0.05
    diversity: float = 0.02
    latency: float = 0.02
    accuracy: float = 0.02
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and 0 <= value < 1):
                raise ValueError(f"margin {name} is {value!r}: give a share of at least 0 and below 1, such as 0.05")
