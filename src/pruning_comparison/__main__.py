"""``python -m pruning_comparison``: the command line."""

import sys

from pruning_comparison.cli import main

if __name__ == "__main__":
    sys.exit(main())
