"""Agency: what makes the heads of a pruned model more than leftovers. In this version: adaptation of the survivors."""

from pruning_comparison.agency.adaptation import AdaptationCost, refit_output_projections

__all__ = ["AdaptationCost", "refit_output_projections"]
