"""What the default comparison costs on a real model, beside another commit of this package.

    python benchmarks/real_model.py [--model_name=smollm2-135m] [--pruning_levels=0,40,80] [--num_tokens=20] [--iterations=1]
    python benchmarks/real_model.py --against=../other --keep=kept          (both, one after the other, ``--repeats`` times)
    python benchmarks/real_model.py --against=../other --only=other --keep=kept     (the other alone, to be recorded)
    python benchmarks/real_model.py --recorded=kept/other-1                  (this one, beside what was recorded)

``pruning-comparison run`` is started as a process of its own, with one thread, and with the package that lies in ``src`` of
its checkout: this one, or the one at ``--against``. Options that this script does not know are handed to both, as
``--calibration_text=FILE`` is.

Prints a JSON line for each run: processor seconds (user and system) of the process and its children, seconds on the wall,
its peak of resident memory, and the processor seconds of its phases where the run has recorded them; what they leave is
importing, reading, statistics and charts. Of this checkout also what ``plan`` forecasts, and the limit that the peak is to
stay below: three times the float32 weights and 1 GiB. Beside another commit a last line has the ratio of processor times,
ours over the other's (geometric mean over repeats), and of every level the ratio of agency's perplexity, ours over the
other's on the same iterations and documents, with its 95 % interval (``analysis.between_runs``).

Targets, beside ae1bb29: a quarter of the processor time, and no upper end of an interval above 1.01.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import emit, emit_machine
from transformers import AutoModelForCausalLM

from pruning_comparison.analysis.between_runs import RunTables, compare_runs
from pruning_comparison.analysis.random_effects import ratio_of
from pruning_comparison.environment import PASSIVE, WAIT_POLICY
from pruning_comparison.measure.memory import parameter_bytes
from pruning_comparison.models import preview_model
from pruning_comparison.run.phases import phases_in
from pruning_comparison.run.provenance import commit_of
from pruning_comparison.run.run_log import RUN_LOG
from pruning_comparison.store import load_run

HERE = Path(__file__).resolve().parents[1]
MEASURED = "measured.json"
THIS, OTHER = "this", "other"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--pruning_levels", default="0,40,80")
    parser.add_argument("--num_tokens", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, help="a checkout of another commit of this package")
    parser.add_argument("--only", choices=(THIS, OTHER), help="run one of the two alone")
    parser.add_argument("--recorded", type=Path, help="what --keep has kept of another commit, in place of running it")
    parser.add_argument("--repeats", type=int, default=1, help="how often both run, in turns")
    parser.add_argument("--keep", type=Path, help="where run folders stay; they are thrown away without it")
    options, more = parser.parse_known_args(argv)
    if options.only == OTHER and options.against is None:
        parser.error("--only=other: there is no other commit. Give its checkout by --against.")
    if options.recorded and options.against:
        parser.error("--recorded: the other commit is either recorded or run. Leave --against out.")
    settings = [
        f"--model_name={options.model_name}", f"--pruning_levels={options.pruning_levels}",
        f"--num_tokens={options.num_tokens}", f"--iterations={options.iterations}", f"--threads={options.threads}",
        "--device=cpu", *more,
    ]  # fmt: skip
    checkouts = {THIS: HERE, OTHER: options.against}
    names = [name for name in (THIS, OTHER) if checkouts[name] is not None and options.only in (None, name)]
    emit_machine("real_model", options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        kept = (options.keep or Path(scratch)).resolve()
        measured: dict[str, list[dict[str, Any]]] = {THIS: [], OTHER: []}
        if options.recorded:
            measured[OTHER].append(recorded(options.recorded))
            emit("real_model", **measured[OTHER][0])
        for number in range(1, options.repeats + 1):
            for name in names if number % 2 else reversed(names):
                found = measure(checkouts[name], settings, kept / f"{name}-{number}", which=name)
                measured[name].append(found)
                emit("real_model", **found)
        if THIS in names:
            emit("real_model", **memory_forecast(options.model_name, settings))
        if measured[THIS] and measured[OTHER]:
            emit("real_model", **beside(measured[THIS], measured[OTHER]))


def measure(checkout: Path, settings: Sequence[str], folder: Path, *, which: str) -> dict[str, Any]:
    """Runs the comparison with the package of ``checkout`` and returns what it took; ``folder`` keeps the run and that."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pruning_comparison", "run", *settings, f"--output_dir={folder / 'runs'}"]
    started = time.perf_counter()
    with (folder / "messages.txt").open("w") as messages:
        process = subprocess.Popen(command, env=_environment(checkout), stdout=messages, stderr=messages, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'messages.txt').read_text()}"
        )
    (run,) = (folder / "runs").glob("run_*")
    log = run / RUN_LOG
    found = {
        "checkout": which,
        "commit": commit_of(checkout),
        "command": " ".join(["pruning-comparison", "run", *settings]),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "phases_processor_seconds": phases_in(log.read_text("utf-8")) if log.is_file() else {},
        "run": str(run),
    }
    (folder / MEASURED).write_text(json.dumps(found, indent=1), "utf-8")
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """What ``measure`` has kept in a folder, wherever that has been moved since."""
    found: dict[str, Any] = json.loads((folder / MEASURED).read_text("utf-8"))
    return {**found, "run": str(folder.resolve() / "runs" / Path(found["run"]).name)}


def memory_forecast(model_name: str, settings: Sequence[str]) -> dict[str, Any]:
    """The bytes that ``plan`` expects a run to take, and those that it is to stay below."""
    command = [sys.executable, "-m", "pruning_comparison", "plan", *settings, "--json"]
    answer = subprocess.run(command, env=_environment(HERE), capture_output=True, text=True, check=True).stdout
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preview_model(model_name).config, dtype=torch.float32)
    return {
        "planned_memory_bytes": json.loads(answer)["expected"]["memory_bytes"],
        "memory_limit_bytes": 3 * parameter_bytes(model) + 2**30,
    }


def beside(ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of ours to the other's. Results are those of the first run of each: repeats have the same."""
    runs = [load_run(Path(found[0]["run"])) for found in (others, ours)]
    other, our = (RunTables(run.folder.name, run.model, run.cells, run.measurements) for run in runs)
    rows = compare_runs(other, our)
    rows = rows[(rows["metric"] == "perplexity") & (rows["variant"] == "agency") & (rows["level"] > 0)]
    times = [[found["processor_seconds"] for found in some] for some in (ours, others)]
    means = [sum(map(math.log, some)) / len(some) for some in times]
    return {
        "processor_time_ratio": round(math.exp(means[0] - means[1]), 4),
        "times_less": round(math.exp(means[1] - means[0]), 2),
        "agency_perplexity_ratios": [
            {
                "level": row.level,
                "ratio": round(ratio_of(row.estimate), 4),
                "interval": [round(ratio_of(edge), 4) for edge in (row.ci_low, row.ci_high)],
                "documents": int(row.n_clusters),
            }
            for row in rows.itertuples()
        ],
    }


def _environment(checkout: Path) -> dict[str, str]:
    paths = [str(checkout.resolve() / "src"), os.environ.get("PYTHONPATH", "")]
    return {WAIT_POLICY: PASSIVE, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    main()
