"""Who measures what a run still lacks: this process, or the workers of a cluster. How work is handed out, nothing else."""

from __future__ import annotations

from pruning_comparison.run.launchers.on_ray import RayLauncher
from pruning_comparison.run.launchers.serial import launch_serially
from pruning_comparison.run.launchers.work import (
    Begun,
    Event,
    Launcher,
    LayersTimed,
    Timed,
    Trouble,
    Work,
    format_timing,
)

__all__ = [
    "Begun",
    "Event",
    "Launcher",
    "LayersTimed",
    "RayLauncher",
    "Timed",
    "Trouble",
    "Work",
    "format_timing",
    "launch_serially",
]
