"""What results depend on: versions, machine, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pruning_comparison import __version__
from pruning_comparison.spec import ComparisonSpec


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "matplotlib")
    return {
        "pruning-comparison": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def hardware(spec: ComparisonSpec) -> dict[str, Any]:
    """The machine a run was measured on."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": spec.threads,
        "device": spec.device,
    }
    if spec.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(spec.device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def commit_of(checkout: Path) -> str | None:
    """The git commit of the code, with "+changes" if the work tree differs; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout.resolve():
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
