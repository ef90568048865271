"""Tables in, matplotlib figures out. Nothing is estimated here."""

from pruning_comparison.report.charts.between_runs import draw_between_runs
from pruning_comparison.report.charts.first import perplexity_over_levels, rankings
from pruning_comparison.report.charts.fronts import draw_fronts
from pruning_comparison.report.charts.heads import draw_head_charts, head_chart_jobs
from pruning_comparison.report.charts.overview import chart_jobs, draw_all
from pruning_comparison.report.charts.style import (
    NARROW,
    WIDE,
    FigureSize,
    save_charts,
    stems_of,
    to_png,
    to_svg,
)
from pruning_comparison.report.charts.tasks import draw_tasks

__all__ = [
    "NARROW",
    "WIDE",
    "FigureSize",
    "chart_jobs",
    "draw_all",
    "draw_between_runs",
    "draw_fronts",
    "draw_head_charts",
    "draw_tasks",
    "head_chart_jobs",
    "perplexity_over_levels",
    "rankings",
    "save_charts",
    "stems_of",
    "to_png",
    "to_svg",
]
