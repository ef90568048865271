"""From a run's journal to what people read: tables, charts, sentences and one HTML file."""

from pruning_comparison.report.write import margins_of, write_between_runs, write_results

__all__ = [
    "margins_of",
    "write_between_runs",
    "write_results",
]
