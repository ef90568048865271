"""What a process of this package's own sets before torch is loaded. Only commands call it: importing changes nothing."""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"
"""How OpenMP's threads wait for one another: read once, when torch loads its OpenMP."""

PASSIVE = "PASSIVE"


def let_threads_sleep() -> None:
    """Threads with nothing to do sleep, in this process and those that it starts, unless the environment says otherwise.

    By default they spin, which takes the core from whatever else runs, the other threads among it: beside one busy process
    two threads then took ten times as long as one. It has no effect where torch has been loaded before.
    """
    os.environ.setdefault(WAIT_POLICY, PASSIVE)
