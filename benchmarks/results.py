"""Runs the commands behind published figures again and says which figures have moved.

    python benchmarks/results.py [--only=NAME,...] [--minutes=60] [--output_dir=FOLDER] [--json]
    python benchmarks/results.py --record=NAME                  (runs one, and records its figures in docs/results.json)
    python benchmarks/results.py --record_from=NAME=RUN_FOLDER  (records those of a stored run, and its settings as command)

Every entry of ``docs/results.json`` that has room in ``--minutes``, the shortest first, is a ``pruning-comparison run`` of
its own. Runs lie under ``--output_dir`` in a folder for this very code and these versions of packages: the same command
again continues them, and after any change everything is measured anew.

Verdicts:
  same               as recorded
  changed            another estimate (by more than 0.5 %) or n, within the recorded 95 % interval. On one machine the same
                     texts and seeds repeat to rounding, so this is a change of the code, its packages or the machine
  moved              outside of the recorded interval. Sizes, which are exact: not equal. Speed depends on the machine and on
                     what else it does: moved only where the two intervals do not overlap
  missing            the run no longer has it; counts as moved
  another machine    absolute speed, recorded on another processor or with other threads: not compared
  no interval        speed without an interval in one of the two runs: not compared

Exit code: 0 if nothing has moved, 1 if something has or if a run has failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from recorded_figures import RECORDED, Entry, Figure, read_recorded, rounded, write_recorded
from timing import emit

from pruning_comparison import ComparisonSpec, load_run
from pruning_comparison.analysis import contrast, observations, relative_to_dense, summarize
from pruning_comparison.environment import PASSIVE, WAIT_POLICY
from pruning_comparison.errors import InputError, PruningComparisonError
from pruning_comparison.formatting import counted, unknown_name
from pruning_comparison.metrics import METRICS
from pruning_comparison.options import with_underscores
from pruning_comparison.run.phases import phases_in
from pruning_comparison.run.provenance import versions
from pruning_comparison.run.run_log import RUN_LOG
from pruning_comparison.store import Manifest, Run, latest_run

HERE = Path(__file__).resolve().parents[1]

PUBLISHED = {
    "summary": ("perplexity", "perplexity_ratio", "kl_to_dense", "tokens_per_second", "first_token_latency_s"),
    "relative": (
        "perplexity", "tokens_per_second", "first_token_latency_s", "parameter_bytes", "thousand_token_cache_bytes",
    ),
    "contrasts": ("perplexity", "tokens_per_second", "first_token_latency_s"),
}  # fmt: skip
"""What is recorded of each table of a run."""

TIMED = ("timing", "memory")
"""Kinds of metrics that depend on the machine."""

TOLERANCE = 0.005
"""Relative difference above which an estimate has changed."""


class RunFailedError(PruningComparisonError):
    """A command ended with an error, which it has printed."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", help="comma list of entries; all without it")
    what.add_argument("--record", metavar="NAME", help="run this entry and record what it gives")
    what.add_argument("--record_from", metavar="NAME=RUN_FOLDER", help="record what a stored run gave")
    parser.add_argument("--minutes", type=float, default=60, help="entries that take longer than is left are left out")
    parser.add_argument("--output_dir", type=Path, default=HERE / "validation_results" / "results")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="the file of recorded figures")
    parser.add_argument("--json", action="store_true", help="print JSON lines in place of a table")
    options = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv))
    try:
        entries = read_recorded(options.recorded)
        if options.record or options.record_from:
            return record(entries, options)
        return compare_all(entries, options)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except RunFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PruningComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare_all(entries: Mapping[str, Entry], options: argparse.Namespace) -> int:
    """Runs what fits, compares it, and prints what came out; the exit code."""
    chosen, unrecorded = choose(entries, options.only)
    runs_in = folder_of_this_code(options.output_dir)
    started = time.monotonic()
    verdicts: Counter[str] = Counter()
    compared, left_out, failed = [], [], []
    for name in sorted(chosen, key=lambda one: (entries[one].minutes or 0, one)):
        entry = entries[name]
        took = (time.monotonic() - started) / 60
        if (entry.minutes or 0) > options.minutes - took:
            left_out.append(name)
            continue
        try:
            run = load_run(run_entry(name, entry, runs_in))
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(name)
            continue
        compared.append(name)
        rows = list(compare(entry, run))
        verdicts.update(verdict for _, _, verdict in rows)
        print_rows(name, rows, as_json=options.json)
    facts = {
        "figures": verdicts.total(),
        "moved": verdicts["moved"] + verdicts["missing"],
        "changed": verdicts["changed"],
        "entries": compared,
        "left_out": {name: entries[name].minutes for name in left_out},
        "failed": failed,
        "unrecorded": unrecorded,
        "runs": str(runs_in),
    }
    if options.json:
        emit("results", **facts)
    else:
        print(in_one_sentence(facts))
    return 1 if facts["moved"] or failed else 0


def choose(entries: Mapping[str, Entry], only: str | None) -> tuple[list[str], list[str]]:
    """The entries to compare, and those that are passed by because they have no figures.

    InputError for a name that is unknown, for one without figures, and where no entry has any.
    """
    names = list(entries) if only is None else [part.strip() for part in only.split(",") if part.strip()]
    for name in names:
        if name not in entries:
            raise InputError(unknown_name("--only", name, entries))
        if only is not None and not entries[name].figures:
            raise InputError(f"--only: {name} has no figures to compare with. Record them first: --record={name}.")
    chosen = [name for name in dict.fromkeys(names) if entries[name].figures]
    if not chosen:
        raise InputError("no entry has figures to compare with. Record them first: --record=NAME.")
    return chosen, [name for name in names if name not in chosen]


def record(entries: dict[str, Entry], options: argparse.Namespace) -> int:
    """Puts an entry's figures in place of those on record; says which of those differ."""
    if options.record:
        name = options.record
        if name not in entries:
            raise InputError(unknown_name("--record", name, entries))
        run = load_run(run_entry(name, entries[name], folder_of_this_code(options.output_dir)))
        command = entries[name].command
    else:
        name, _, folder = options.record_from.partition("=")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9.]+)*", name) or not folder:
            raise InputError(
                f"--record_from: {options.record_from!r} is not NAME=RUN_FOLDER. A name has small letters, digits and "
                "dashes, such as bundled-obs."
            )
        run = load_run(Path(folder))
        command = command_of(ComparisonSpec.from_dict(run.manifest.spec))
    if name in entries:
        if entries[name].command != command:
            print(f"{name}: the command was {' '.join(entries[name].command)}")
        print_rows(name, [row for row in compare(entries[name], run) if row[2] != "same"], as_json=options.json)
    entries[name] = entry_of(command, run)
    write_recorded(entries, options.recorded)
    print(f"{name}: recorded {counted(len(entries[name].figures), 'figure')} of {run.folder} in {options.recorded}")
    return 0


def run_entry(name: str, entry: Entry, runs_in: Path) -> Path:
    """Runs an entry's command in a process of its own, with the code of this checkout, and returns the folder of its run.

    A run that was cut off is continued, and one that is finished is taken as it is. RunFailedError if it does not finish.
    """
    words = [*entry.command, f"--output_dir={runs_in / name}"]
    took = "" if entry.minutes is None else f", about {entry.minutes:g} min"
    print(f"{name}{took}: pruning-comparison run {' '.join(words)}", file=sys.stderr, flush=True)
    paths = [str(HERE / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {WAIT_POLICY: PASSIVE, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-m", "pruning_comparison", "run", *words],
        env=environment, cwd=HERE, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    folder = latest_run(runs_in / name)
    if done.returncode or folder is None:
        raise RunFailedError(
            f"{name}: pruning-comparison run {' '.join(words)} ended with {done.returncode}. Its messages are above."
        )
    return folder


def folder_of_this_code(output_dir: Path) -> Path:
    """Where runs of exactly this code lie: what other code or packages have measured is neither continued nor reused."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    package = HERE / "src" / "pruning_comparison"
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return output_dir.resolve() / digest.hexdigest()[:12]


def figures_of(run: Run) -> Iterator[Figure]:
    """What is published of a run, from the tables that its report is made of; speed only where timing was not cut short."""
    tables = observations(run.cells, run.measurements)
    others = [variant for variant in run.variants if variant != "baseline"] if "baseline" in run.variants else []
    found = {
        "summary": [summarize(run.model, tables)],
        "relative": [relative_to_dense(run.model, tables, looks=run.looks)],
        "contrasts": [contrast(run.model, tables, variant) for variant in others],
    }
    timed = run.manifest.spec.get("timing_limit_s") != 0
    for table, parts in found.items():
        for part in parts:
            for row in part.to_dict("records"):
                metric = row["metric"]
                wanted = metric in PUBLISHED[table] and (timed or METRICS[metric].kind not in TIMED)
                if wanted and math.isfinite(row["estimate"]):
                    numbers = {name: rounded(row[name]) for name in ("estimate", "ci_low", "ci_high")}
                    variant = row.get("variant", row.get("contrast"))
                    yield Figure(
                        table=table, metric=metric, method=row["method"], variant=variant, level=float(row["level"]),
                        n=int(row["n"]), unit=row["unit"], **numbers,
                    )  # fmt: skip


def entry_of(command: Sequence[str], run: Run) -> Entry:
    """A run as it is recorded. InputError for one that is not finished."""
    manifest = run.manifest
    if manifest.started is None or manifest.finished is None:
        raise InputError(f"{run.folder} is not finished, so its figures may still change. Continue the run first.")
    recorded = {
        "commit": manifest.commit,
        "date": manifest.finished[:10],
        **machine_of(manifest),
        **{name: manifest.versions.get(name) for name in ("torch", "transformers")},
    }
    figures = tuple(sorted(figures_of(run), key=lambda figure: figure.key))
    return Entry(tuple(command), figures, round(_seconds(run) / 60, 1), recorded)


def _seconds(run: Run) -> float:
    """What measuring took: processor time over threads where the log has it, so that interruptions do not count."""
    manifest, log = run.manifest, run.folder / RUN_LOG
    phases = phases_in(log.read_text("utf-8")) if log.is_file() else {}
    if phases:
        return sum(phases.values()) / int(manifest.hardware.get("threads") or 1)
    return (
        datetime.fromisoformat(str(manifest.finished)) - datetime.fromisoformat(str(manifest.started))
    ).total_seconds()


def machine_of(manifest: Manifest) -> dict[str, Any]:
    """What absolute speeds depend on."""
    return {name: manifest.hardware.get(name) for name in ("processor", "threads")}


def command_of(spec: ComparisonSpec) -> tuple[str, ...]:
    """The options of ``pruning-comparison run`` for a spec: model, device and threads, and what is not the default."""
    usual, words = ComparisonSpec().as_options(), []
    for name, value in spec.as_options().items():
        looks = name == "iterations" and spec.until_decided  # which says itself how many there are at most
        if name in ("model_name", "device", "threads") or (value != usual.get(name) and not looks):
            words.append(f"--{name}" if value is True else f"--{name}={_as_word(value)}")
    return tuple(words)


def _as_word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_as_word, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def compare(entry: Entry, run: Run) -> Iterator[tuple[Figure, Figure | None, str]]:
    """Every recorded figure, the new one, and the verdict."""
    new = {figure.key: figure for figure in figures_of(run)}
    here = machine_of(run.manifest)
    same_machine = all((entry.recorded or {}).get(name) == value for name, value in here.items())
    for figure in entry.figures:
        other = new.get(figure.key)
        yield figure, other, verdict_of(figure, other, same_machine=same_machine)


def verdict_of(recorded: Figure, new: Figure | None, *, same_machine: bool) -> str:
    """The verdict on one figure, as the head of this file explains it."""
    if new is None:
        return "missing"
    kind = METRICS[recorded.metric].kind
    if kind in TIMED:
        if recorded.table == "summary" and not same_machine:
            return "another machine"
        if recorded.interval is None or new.interval is None:
            return "no interval"
        (low, high), (new_low, new_high) = recorded.interval, new.interval
        return "moved" if new_low > high or new_high < low else "same"
    change = relative_change(recorded, new)
    if kind == "size":
        return "same" if change < 1e-7 else "moved"
    interval = recorded.interval
    if interval is not None and math.isclose(recorded.estimate, new.estimate, rel_tol=1e-6, abs_tol=1e-9):
        interval = (-math.inf, math.inf)  # where nothing varies the interval is a point, which rounding would leave
        change = 0.0
    if change > TOLERANCE if interval is None else not interval[0] <= new.estimate <= interval[1]:
        return "moved"
    return "changed" if change > TOLERANCE or recorded.n != new.n else "same"


def relative_change(recorded: Figure, new: Figure) -> float:
    """How far an estimate is from the recorded one, relative to that; of changes in per cent, how far their ratios are."""
    before, after = recorded.estimate, new.estimate
    if recorded.unit == "%":
        before, after = 1 + before / 100, 1 + after / 100
    if before == 0:
        return 0.0 if after == 0 else math.inf
    return abs(after - before) / abs(before)


def print_rows(name: str, rows: Sequence[tuple[Figure, Figure | None, str]], *, as_json: bool) -> None:
    """The figures of one entry, as a table or as JSON lines."""
    if as_json:
        for recorded, new, verdict in rows:
            numbers = {
                label: None if figure is None else [figure.estimate, figure.ci_low, figure.ci_high]
                for label, figure in (("recorded", recorded), ("new", new))
            }
            place = dict(zip(("table", "metric", "method", "level", "variant"), recorded.key, strict=True))
            emit("results", entry=name, **place, unit=recorded.unit, **numbers, verdict=verdict)
        return
    table = [
        (name, recorded.describe(), recorded.shown(), "none" if new is None else new.shown(), verdict)
        for recorded, new, verdict in rows
    ]
    if table:
        table.insert(0, ("entry", "figure", "recorded", "new", "verdict"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def in_one_sentence(facts: Mapping[str, Any]) -> str:
    """How many figures were compared, how many moved, what was left out, and where the runs are."""
    parts = [
        f"Compared {counted(facts['figures'], 'figure')} of {counted(len(facts['entries']), 'entry', 'entries')}: "
        f"{facts['moved']} moved, {facts['changed']} changed within the interval"
    ]
    if facts["left_out"]:
        times = [f"{name} ({minutes:g} min)" for name, minutes in facts["left_out"].items()]
        parts.append(f"left out for lack of time: {', '.join(times)}")
    for what, names in (("failed", facts["failed"]), ("without recorded figures", facts["unrecorded"])):
        if names:
            parts.append(f"{what}: {', '.join(names)}")
    return "; ".join([*parts, f"runs are in {facts['runs']}."])


if __name__ == "__main__":
    sys.exit(main())
