"""Brings the latest code of main into the checkout that a script was started from, or says in one line why it did not.

A fast-forward is the only thing done to the checkout: local changes, other branches, local commits and files that git
does not know are never touched. Importing this needs the standard library only: it runs, and replaces itself, before
anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pruning_comparison.environment import let_threads_sleep
from pruning_comparison.errors import PruningComparisonError

SWITCH = "PRUNING_COMPARISON_NO_UPDATE"
RESTARTED = "PRUNING_COMPARISON_RESTARTED"
BRANCH = "main"

LOCAL_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 10.0
MERGE_TIMEOUT_S = 60.0
"""Local work of well under a second. Generous, because a fast-forward cut short leaves half of the new files."""

Status = Literal[
    "updated",
    "up_to_date",
    "switched_off",
    "resuming",
    "no_git",
    "not_a_checkout",
    "not_on_main",
    "local_changes",
    "no_origin",
    "unreachable",
    "diverged",
    "refused",
]


@dataclass(frozen=True)
class UpdateResult:
    """What became of the update: a status for code, one line for people (empty where there is nothing to say)."""

    status: Status
    message: str

    @property
    def updated(self) -> bool:
        """Whether the files of the checkout changed."""
        return self.status == "updated"


class _GitError(Exception):
    """A git command that failed or took too long; the text is git's own reason in one line."""


class _NoGitError(_GitError):
    """Git itself cannot be started."""


def bring_up_to_date(
    checkout: Path,
    *,
    enabled: bool = True,
    resuming: Callable[[], bool] | bool = False,
    fetch_timeout_s: float = FETCH_TIMEOUT_S,
) -> UpdateResult:
    """Fast-forward a clean checkout of main to origin's main.

    checkout: the folder that must itself be the top of the git working tree. A copy inside somebody else's repository
        is left alone, since pulling there would pull their repository.
    enabled: False for a run started with --no_update.
    resuming: whether this run continues an unfinished one, which has to end on the code that it began with. A callable
        is asked only when there is something to bring, because finding out can be slow.
    fetch_timeout_s: how long origin may take to answer.

    Never raises for anything that git or the network does: an update that cannot be had is not an error.
    """
    off = _switched_off(enabled)
    if off is not None:
        return UpdateResult("switched_off", off)
    try:
        return _fast_forward(checkout, resuming, fetch_timeout_s)
    except _NoGitError as error:
        return UpdateResult("no_git", f"Not updated: {error}")
    except _GitError as error:
        return UpdateResult("refused", f"Not updated: {error}")


def update_and_restart(
    checkout: Path,
    argv: Sequence[str],
    *,
    say: Callable[[str], None],
    resuming: Callable[[], bool] | bool = False,
    execute: Callable[[str, list[str]], object] = os.execv,
) -> UpdateResult:
    """Update, and when the code changed start the script again, once, so that all of it is the new code.

    argv: the script's path and its arguments. `--no_update` among them (or `--no-update`) switches the update off; a
        call for help is answered without one.
    say: receives the one line for people.
    execute: replaces this process (`os.execv`), so that this returns only when there was no restart.
    """
    enabled = not any(word.replace("_", "-") == "--no-update" for word in argv[1:])
    if any(word in ("-h", "--help") for word in argv[1:]):
        return UpdateResult("switched_off", "")
    if "ipykernel" in sys.modules:
        # A restart would take the notebook's kernel, and every variable in it, down.
        return UpdateResult("switched_off", "Not updated: running inside a notebook.")
    result = bring_up_to_date(checkout, enabled=enabled, resuming=resuming)
    if result.message:
        say(result.message)
    if result.updated:
        os.environ[RESTARTED] = "1"
        sys.stdout.flush()
        sys.stderr.flush()
        execute(sys.executable, [sys.executable, *argv])
    return result


def run_latest(checkout: Path, argv: Sequence[str], options: Sequence[str]) -> int:
    """Update the checkout, then run the comparison: all that the scripts do. Returns the exit code.

    argv: the script's path and arguments, with which it is started again after an update.
    options: those of `pruning-comparison run`.
    """
    let_threads_sleep()
    update_and_restart(checkout, argv, say=_say, resuming=lambda: resumes(options))
    try:
        cli = importlib.import_module("pruning_comparison.cli")
        return int(cli.main(["run", *options]))
    except ModuleNotFoundError as error:
        if str(error.name).startswith("pruning_comparison."):
            raise
        _say(f"{error.name} is not installed: run `make demo`, or `pip install -e .`, in {checkout}")
        return 1


def resumes(options: Sequence[str]) -> bool:
    """Whether the options continue an unfinished run. Where that cannot be told, newer code may be what is needed."""
    try:
        cli = importlib.import_module("pruning_comparison.cli")
        return bool(cli.would_resume(list(options)))
    except (ImportError, PruningComparisonError, SystemExit):
        return False


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _switched_off(enabled: bool) -> str | None:
    """The line that says what switches updating off; empty after a restart (all was said before it); None if on."""
    if os.environ.get(RESTARTED):
        return ""
    if not enabled:
        return "Not updated: switched off with --no_update."
    for name in (SWITCH, "CI"):
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "false"):
            return f"Not updated: switched off by the environment ({name}={value})."
    return None


def _fast_forward(checkout: Path, resuming: Callable[[], bool] | bool, fetch_timeout_s: float) -> UpdateResult:
    """The checks in order of cost, then the fast-forward. Raises _GitError where git itself refuses."""
    if not checkout.is_dir():
        return UpdateResult("not_a_checkout", f"Not updated: {checkout} is not a folder.")
    git = _Git(checkout)
    try:
        below = git("rev-parse", "--show-prefix")
    except _GitError as error:
        if "not a git repository" in str(error):
            return UpdateResult("not_a_checkout", f"Not updated: {checkout} is not a git checkout.")
        raise
    if below:
        message = f"Not updated: {checkout} is only a part ({below}) of another git repository, which is left alone."
        return UpdateResult("not_a_checkout", message)

    branch = git.ask("symbolic-ref", "--quiet", "--short", "HEAD")
    if branch != BRANCH:
        found = f"on branch {branch}" if branch else "at a detached commit"
        return UpdateResult("not_on_main", f"Not updated: the checkout is {found}, not on {BRANCH}.")
    if git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no"):
        return UpdateResult("local_changes", "Not updated: the checkout has local changes; they are left as they are.")
    if not git.ask("config", "--get", "remote.origin.url"):
        return UpdateResult("no_origin", "Not updated: the checkout has no remote named origin.")

    tracking = f"refs/remotes/origin/{BRANCH}"
    try:
        git(
            *("fetch", "--quiet", "--no-tags", "--no-recurse-submodules"),
            *("origin", f"+refs/heads/{BRANCH}:{tracking}"),
            timeout_s=fetch_timeout_s,
        )
    except _GitError as error:
        return UpdateResult("unreachable", f"Not updated: {BRANCH} could not be fetched from origin ({error}).")

    here, there = git("rev-parse", "HEAD"), git("rev-parse", tracking)
    base = git.ask("merge-base", here, there)
    if base == there:
        return UpdateResult("up_to_date", "")
    if base != here:
        message = (
            f"Not updated: the checkout and origin's {BRANCH} have diverged; `git pull --rebase` brings them together."
        )
        return UpdateResult("diverged", message)
    if resuming() if callable(resuming) else resuming:
        message = "Not updated: this continues an unfinished run, which ends on the code that it began with."
        return UpdateResult("resuming", message)

    # Files that git ignores are somebody's as well: without --no-overwrite-ignore a merge replaces them silently.
    git("merge", "--quiet", "--ff-only", "--no-overwrite-ignore", there, timeout_s=MERGE_TIMEOUT_S, finish=True)
    return UpdateResult(
        "updated", f"Updated {BRANCH} from {here[:9]} to {there[:9]}; starting again with the new code."
    )


class _Git:
    """Runs git in one folder: never asking anything, never longer than allowed, with messages in English."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = _environment(os.environ)
        # The user's own ssh command (another key, another program) stays, told not to ask and not to wait.
        ssh = os.environ.get("GIT_SSH_COMMAND") or self.ask("config", "--get", "core.sshCommand") or "ssh"
        self.environment["GIT_SSH_COMMAND"] = f"{ssh} -oBatchMode=yes -oConnectTimeout=5"

    def ask(self, *arguments: str) -> str:
        """The output, or an empty text where git answers by failing (an unset option, no common commit)."""
        try:
            return self(*arguments)
        except _GitError:
            return ""

    def __call__(self, *arguments: str, timeout_s: float = LOCAL_TIMEOUT_S, finish: bool = False) -> str:
        """The output of one command. finish: let git end by itself when the user interrupts (Ctrl-C)."""
        settings = ("-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "merge.autoStash=false")
        try:
            process = subprocess.Popen(
                ["git", *settings, *arguments],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                # Its own session: no terminal to ask for a password on, and git's helpers can be ended along with it.
                start_new_session=True,
            )
        except OSError as error:
            raise _NoGitError(f"git could not be started ({error.strerror}).") from None
        with process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                _end(process)
                raise _GitError(f"git {_verb(arguments)} took longer than {timeout_s:g} s") from None
            except BaseException:
                if not finish:
                    _end(process)
                raise
        if process.returncode:
            raise _GitError(_reason(err) or f"git {_verb(arguments)} ended with code {process.returncode}")
        return out.strip()


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what points git at another repository, and without ways to ask questions."""
    elsewhere = {
        *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"),
        *("GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX"),
    }
    kept = {name: value for name, value in inherited.items() if name not in elsewhere}
    silent = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS_REQUIRE": "never", "GCM_INTERACTIVE": "never"}
    return kept | silent | {"LC_ALL": "C", "LANGUAGE": "C"}


def _end(process: subprocess.Popen[str]) -> None:
    """End git and its helpers: politely first, so that it removes its lock files."""
    for signal_name in ("SIGTERM", "SIGKILL"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, signal_name))
            else:
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
            return


def _verb(arguments: Sequence[str]) -> str:
    return next(word for word in arguments if not word.startswith("-"))


def _reason(text: str) -> str:
    """What git says went wrong, in one line, without any password that an address in it may carry."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((n for n, line in enumerate(lines) if line.startswith(("fatal:", "error:"))), 0)
    reason = (
        " ".join(lines[start : start + 2])
        if lines and lines[start].endswith(":")
        else "".join(lines[start : start + 1])
    )
    return re.sub(r"//[^/@\s]*@", "//", reason.removeprefix("fatal:").removeprefix("error:").strip())
