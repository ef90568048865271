"""Tries the whole comparison on a CPU with the bundled model, in minutes and without a download.

--debug takes seconds and only shows that everything works. Every option of `pruning-comparison run` may follow and
replaces the one that this script sets: --model_name=gpt2 downloads and tests that model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS: Mapping[str, str | int | bool] = {
    "preset": "quick",
    "model_name": "bundled",
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "save_outputs": True,
    "output_dir": "validation_results/pruning_cpu_test",
}
DEBUG_SETTINGS: Mapping[str, str | int | bool] = {
    **SETTINGS,
    "pruning_levels": "0,50",
    "temperatures": "1.0",
    "num_tokens": 12,
    "max_prompts": 2,
    "iterations": 2,
    "eval_tokens": 2048,
    "calibration_tokens": 1024,
    "score_tokens": 512,
    "timing_limit_s": 1,
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true")
    given, rest = parser.parse_known_args(words)
    settings = DEBUG_SETTINGS if given.debug else SETTINGS
    # Last, because the last of two equal options counts.
    options = [*(f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()), *rest]
    if {"-h", "--help"} & set(rest):
        print(__doc__)

    # The code beside this script, not a copy installed earlier: it is the one that is brought up to date.
    sys.path.insert(0, str(CHECKOUT / "src"))
    try:
        from pruning_comparison.self_update import run_latest
    except ModuleNotFoundError:
        print("The package is not installed: start this script from a checkout, or install it.", file=sys.stderr)
        return 1
    return run_latest(CHECKOUT, [__file__, *words], options)


if __name__ == "__main__":
    sys.exit(main())
