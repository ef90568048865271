"""Tables in, matplotlib figures out. Nothing is estimated here."""

from pruning_comparison.report.charts.between_runs import draw_between_runs
from pruning_comparison.report.charts.heads import draw_head_charts
from pruning_comparison.report.charts.overview import draw_all
from pruning_comparison.report.charts.style import NARROW, WIDE, FigureSize, save_charts, to_png, to_svg

__all__ = [
    "NARROW",
    "WIDE",
    "FigureSize",
    "draw_all",
    "draw_between_runs",
    "draw_head_charts",
    "save_charts",
    "to_png",
    "to_svg",
]
