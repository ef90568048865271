"""Agency: what makes the heads of a pruned model more than leftovers. In this version: adaptation of the survivors."""

from pruning_comparison.agency.adaptation import AdaptationCost, refit_output_projections
from pruning_comparison.agency.trajectory import ProgressiveTrajectory

__all__ = ["AdaptationCost", "ProgressiveTrajectory", "refit_output_projections"]
