"""Agency: what makes the heads of a pruned model more than leftovers. In this version: adaptation of the survivors."""

from pruning_comparison.agency.adaptation import AdaptationCost, adapt
from pruning_comparison.agency.streams import DenseStream
from pruning_comparison.agency.trajectory import ProgressiveTrajectory

__all__ = ["AdaptationCost", "DenseStream", "ProgressiveTrajectory", "adapt"]
