"""Measuring: inputs, the pipeline of one cell, whole runs, and one model to keep."""

from pruning_comparison.run.comparison import run_comparison, would_resume
from pruning_comparison.run.engine_timings import LEAST_REPEATS, known_to_be_missing
from pruning_comparison.run.inputs import Inputs, heads_leaving_together, prepare, rectangle_of
from pruning_comparison.run.launchers import Launcher, RayLauncher, launch_serially
from pruning_comparison.run.measure_cell import TEXT_BATCHES, timing_rounds
from pruning_comparison.run.one_model import build_one, measure_one, prune
from pruning_comparison.run.provenance import commit_of
from pruning_comparison.run.workspace import Workspace, load_workspace, negotiation_rules

__all__ = [
    "LEAST_REPEATS",
    "TEXT_BATCHES",
    "Inputs",
    "Launcher",
    "RayLauncher",
    "Workspace",
    "build_one",
    "commit_of",
    "heads_leaving_together",
    "known_to_be_missing",
    "launch_serially",
    "load_workspace",
    "measure_one",
    "negotiation_rules",
    "prepare",
    "prune",
    "rectangle_of",
    "run_comparison",
    "timing_rounds",
    "would_resume",
]
