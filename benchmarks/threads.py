"""What does a busy neighbour cost? At most its share of the machine, if idle threads sleep and their number is measured.

    python benchmarks/threads.py [--models=bundled,smollm2-135m] [--repeats=5] [--load=1]

In processes of their own, passes and decoding steps of the model's shape are timed with each number of threads, as they
are for a new run (``run/threads.py``): with threads that spin for a while when they wait, as they do by themselves, and with
``OMP_WAIT_POLICY=PASSIVE``, which commands set; alone, and beside ``--load`` processes that compute without a pause. The
four cases take turns.

Prints two lines for each model. ``seconds`` by number of threads are medians; ``chosen`` are the threads that a new run
would use then. ``cost`` is the time with the threads chosen beside the load, over the least time alone, ``all_cores_cost``
that with a thread for every core; ``share`` is what it would be if the neighbours took their cores and nothing else: cores /
(cores - load). Nothing else may run meanwhile: what is called alone is not alone then.

Target: with threads that sleep, ``cost`` at most 1.1 times ``share``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from timing import emit, emit_machine, parser

from pruning_comparison.environment import PASSIVE, WAIT_POLICY
from pruning_comparison.models import preview_model
from pruning_comparison.run.threads import choose_threads, measure_threads
from pruning_comparison.spec import ComparisonSpec, available_cores

_BUSY = "while True: pass"


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="bundled,smollm2-135m", repeats=5)
    made.add_argument("--load", type=int, default=1, help="processes that compute beside, without a pause")
    made.add_argument(
        "--alone", action="store_true", help="print the times of the first model as JSON, and nothing else"
    )
    options = made.parse_args(argv)
    names = options.models.split(",")
    if options.alone:
        print(json.dumps(measure_threads(preview_model(names[0]).config, ComparisonSpec(model_name=names[0]))))
        return
    cores = available_cores()
    if not 0 < options.load < cores:
        made.error(f"--load: {options.load} must be above 0 and below the {cores} cores there are.")
    emit_machine("threads", cores)
    for name in names:
        cases = {(policy, load): [] for policy in ("spinning", "sleeping") for load in (0, options.load)}
        for _ in range(options.repeats):
            for (policy, load), found in cases.items():
                found.append(times_beside(name, policy, load))
        seconds = {
            case: {count: median(one[count] for one in found) for count in found[0]} for case, found in cases.items()
        }
        for policy in ("spinning", "sleeping"):
            alone, beside = seconds[policy, 0], seconds[policy, options.load]
            chosen = choose_threads(beside)
            emit(
                "threads",
                model=name,
                waiting=policy,
                load_processes=options.load,
                seconds_alone=alone,
                seconds_beside=beside,
                chosen_alone=choose_threads(alone),
                chosen_beside=chosen,
                all_cores_cost=beside[cores] / min(alone.values()),
                cost=beside[chosen] / min(alone.values()),
                share=cores / (cores - options.load),
            )


def times_beside(name: str, policy: str, load: int) -> dict[int, float]:
    """Seconds by number of threads, measured by a process of its own while ``load`` others compute."""
    environment = {key: value for key, value in os.environ.items() if key not in (WAIT_POLICY, "OMP_NUM_THREADS")}
    if policy == "sleeping":
        environment[WAIT_POLICY] = PASSIVE
    neighbours = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(load)]
    try:
        run = subprocess.run(
            [sys.executable, __file__, "--alone", f"--models={name}"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        for process in neighbours:
            process.terminate()
            process.wait()
    return {int(count): seconds for count, seconds in json.loads(run.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
