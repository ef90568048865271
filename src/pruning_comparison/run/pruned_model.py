"""What passes from making a cell's model to measuring it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency import AdaptationCost, RecoveryCost, RoundRecord
from pruning_comparison.scoring import HeadScores


@dataclass(frozen=True)
class KeptHeads:
    """Heads, bool [L, H], that a measured model has kept, and its fingerprint."""

    keep: Tensor
    fingerprint: str


@dataclass(frozen=True)
class PrunedModel:
    """A model that is ready to be measured, with what was done to it. ``fingerprint`` names weights and heads.

    ``scores`` are those its heads were chosen by, None where it was made from heads that are known. ``round_records`` are
    the rounds in which its heads were asked, ``negotiation_s`` what they took; None where nobody was asked.
    ``predicted_nats`` is what the prices of the heads that have left add up to: how far from the dense model, in nats of
    Kullback-Leibler divergence per token, the survivors are expected to be once they are adapted; None without prices.
    """

    model: PreTrainedModel
    keep: Tensor
    fingerprint: str
    scores: HeadScores | None = None
    cost: AdaptationCost | None = None
    round_records: tuple[RoundRecord, ...] = ()
    negotiation_s: float | None = None
    recovery: RecoveryCost | None = None
    predicted_nats: float | None = None
