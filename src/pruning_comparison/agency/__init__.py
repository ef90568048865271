"""Agency: what makes the heads of a pruned model more than leftovers. Signals, states, consent, adaptation."""

from pruning_comparison.agency.adaptation import AdaptationCost, adapt
from pruning_comparison.agency.recovery import RecoveryCost, recover
from pruning_comparison.agency.streams import DenseStream
from pruning_comparison.agency.trajectory import NegotiatedTrajectory, ProgressiveTrajectory, Round, RoundRecord

__all__ = [
    "AdaptationCost",
    "DenseStream",
    "NegotiatedTrajectory",
    "ProgressiveTrajectory",
    "RecoveryCost",
    "Round",
    "RoundRecord",
    "adapt",
    "recover",
]
