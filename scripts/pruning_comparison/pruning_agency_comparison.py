"""Compares the baseline and the agency-enabled model while more and more attention heads are pruned (options: --help).

Brings the latest main first where that is safe (off: --no_update), then runs `pruning-comparison run` with the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    options = list(sys.argv[1:] if argv is None else argv)
    # The code beside this script, not a copy installed earlier: it is the one that is brought up to date.
    sys.path.insert(0, str(CHECKOUT / "src"))
    try:
        from pruning_comparison.self_update import run_latest
    except ModuleNotFoundError:
        print("The package is not installed: start this script from a checkout, or install it.", file=sys.stderr)
        return 1
    return run_latest(CHECKOUT, [__file__, *options], options)


if __name__ == "__main__":
    sys.exit(main())
