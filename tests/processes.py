"""What tests run in processes of their own: functions that can be imported there by name."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from pruning_comparison import cli
from pruning_comparison.run import attempts as measuring
from pruning_comparison.run.comparison import run_comparison


def run_and_log(spec, output_dir, log):
    """In a process of its own: the comparison, with a line in ``log`` for every cell that is begun."""
    torch.set_num_threads(1)
    original = measuring.run_cell

    def logged(workspace, cell):
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(cell) + "\n").encode())
        os.close(descriptor)
        return original(workspace, cell)

    measuring.run_cell = logged
    run_comparison(spec, output_dir=output_dir)


def slow_command(argv, begun):
    """In a process of its own: a run that says when its third cell has begun, and then takes long over it."""
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that starts the tests in the background ignores it
    original, cells = measuring.run_cell, []

    def slow(*arguments):
        cells.append(arguments)
        if len(cells) == 3:
            begun.write_text("")
            time.sleep(300)
        return original(*arguments)

    measuring.run_cell = slow
    raise SystemExit(cli.main(argv))


def watched_command(commands, log):
    """In a process of its own: the commands, with every unpickling and every path that is written to in ``log``.

    The interpreter itself reports both, whichever library does them. An audit hook cannot be taken off again.
    """
    torch.set_num_threads(1)
    events = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND

    def hook(event, arguments):
        if event == "pickle.find_class":
            events.append((event, str(arguments)))
        elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & writing:
            events.append(("write", os.path.abspath(os.fsdecode(arguments[0]))))  # noqa: PTH100
        elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "sqlite3.connect"):
            target = arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0]
            path = os.fsdecode(target)
            if event == "sqlite3.connect" and path == ":memory:":
                return
            path = unquote(urlsplit(path).path) if path.startswith("file:") else path
            events.append(("write", os.path.abspath(path)))  # noqa: PTH100

    sys.addaudithook(hook)
    codes = [cli.main(argv) for argv in commands]
    seen = list(events)
    pickle.loads(pickle.dumps(Path("x")))
    log.write_text(json.dumps({"codes": codes, "events": seen, "watch_works": events[len(seen) :]}))
