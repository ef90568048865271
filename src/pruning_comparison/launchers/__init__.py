"""Who measures what a run still lacks: this process, or the workers of a cluster. How work is handed out, nothing else."""

from __future__ import annotations

from pruning_comparison.launchers.ray import RayLauncher
from pruning_comparison.launchers.serial import launch_serially
from pruning_comparison.launchers.work import Begun, Event, Launcher, Timed, Trouble, Work, timing_words

__all__ = ["Begun", "Event", "Launcher", "RayLauncher", "Timed", "Trouble", "Work", "launch_serially", "timing_words"]
