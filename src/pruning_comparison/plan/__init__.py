"""What a run would measure, what it could find out, and how long it would take, before anything is measured."""

from pruning_comparison.plan.plan import format_plan, plan_cost, plan_run

__all__ = [
    "format_plan",
    "plan_cost",
    "plan_run",
]
