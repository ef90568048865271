"""Updating against real git remotes (folders): what is behind moves forward, everything else stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import pruning_comparison
from pruning_comparison.self_update import RESTARTED, SWITCH, bring_up_to_date, update_and_restart

SOURCES = Path(pruning_comparison.__file__).parents[1]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


@dataclass(frozen=True)
class Remote:
    origin: Path  # a bare repository
    author: Path  # where somebody else works and pushes from
    checkout: Path  # what is brought up to date

    def publish(self, **files: str) -> str:
        """Push a commit to origin's main, after which the checkout is behind; returns the commit."""
        write(self.author, **files)
        git(self.author, "add", "--all", "--force")
        git(self.author, "commit", "--quiet", "--message", "next")
        git(self.author, "push", "--quiet", "origin", "HEAD:main")
        return self.head(self.author)

    def head(self, folder: Path | None = None) -> str:
        return git(folder or self.checkout, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", SWITCH, RESTARTED, "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_SSH_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    origin, author, checkout = tmp_path / "origin.git", tmp_path / "author", tmp_path / "checkout"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", str(origin))
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(author))
    git(author, "remote", "add", "origin", str(origin))
    found = Remote(origin, author, checkout)
    found.publish(**{"code.py": "one\n", "other.py": "one\n", ".gitignore": "*.log\n"})
    git(tmp_path, "clone", "--quiet", str(origin), str(checkout))
    return found


def test_a_checkout_that_is_behind_moves_forward(remote: Remote) -> None:
    old, new = remote.head(), remote.publish(**{"code.py": "two\n"})
    result = bring_up_to_date(remote.checkout)
    assert (result.status, result.updated) == ("updated", True)
    assert old[:9] in result.message
    assert new[:9] in result.message
    assert remote.head() == new
    assert (remote.checkout / "code.py").read_text() == "two\n"
    assert git(remote.checkout, "status", "--porcelain") == ""
    assert git(remote.checkout, "symbolic-ref", "--short", "HEAD") == "main"


def test_a_shallow_checkout_moves_forward_too(remote: Remote, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth=1", remote.origin.as_uri(), str(shallow))
    new = remote.publish(**{"code.py": "two\n"})
    assert bring_up_to_date(shallow).status == "updated"
    assert remote.head(shallow) == new


def test_nothing_new_is_not_worth_a_line(remote: Remote) -> None:
    result = bring_up_to_date(remote.checkout)
    assert (result.status, result.message, result.updated) == ("up_to_date", "", False)


def test_local_commits_that_were_not_pushed_stay(remote: Remote) -> None:
    write(remote.checkout, **{"code.py": "mine\n"})
    git(remote.checkout, "commit", "--quiet", "--all", "--message", "mine")
    mine = remote.head()
    assert bring_up_to_date(remote.checkout).status == "up_to_date"
    assert remote.head() == mine


@pytest.mark.parametrize("staged", [False, True])
def test_local_changes_are_left_alone(remote: Remote, staged: bool) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    write(remote.checkout, **{"other.py": "mine\n"})
    if staged:
        git(remote.checkout, "add", "other.py")
    before = git(remote.checkout, "status", "--porcelain")
    result = bring_up_to_date(remote.checkout)
    assert result.status == "local_changes"
    assert "local changes" in result.message
    assert remote.head() == old
    assert git(remote.checkout, "status", "--porcelain") == before
    assert (remote.checkout / "other.py").read_text() == "mine\n"


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_local_changes_that_git_was_told_not_to_see_stay(remote: Remote, flag: str) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    git(remote.checkout, "update-index", flag, "code.py")
    write(remote.checkout, **{"code.py": "mine\n"})
    result = bring_up_to_date(remote.checkout)
    assert result.status == "refused"
    assert "code.py" in result.message
    assert remote.head() == old
    assert (remote.checkout / "code.py").read_text() == "mine\n"


def test_an_unrelated_untracked_file_does_not_stand_in_the_way(remote: Remote) -> None:
    new = remote.publish(**{"code.py": "two\n"})
    write(remote.checkout, **{"notes.txt": "mine\n"})
    assert bring_up_to_date(remote.checkout).updated
    assert remote.head() == new
    assert (remote.checkout / "notes.txt").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["notes.txt", "ignored.log"])
def test_a_file_that_the_update_would_overwrite_stays(remote: Remote, name: str) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n", name: "theirs\n"})
    write(remote.checkout, **{name: "mine\n"})
    result = bring_up_to_date(remote.checkout)
    assert result.status == "refused"
    assert "overwritten" in result.message
    assert name in result.message
    assert "\n" not in result.message
    assert remote.head() == old
    assert (remote.checkout / name).read_text() == "mine\n"
    assert (remote.checkout / "code.py").read_text() == "one\n"


def test_diverged_histories_are_left_alone(remote: Remote) -> None:
    remote.publish(**{"code.py": "two\n"})
    write(remote.checkout, **{"other.py": "mine\n"})
    git(remote.checkout, "commit", "--quiet", "--all", "--message", "mine")
    mine = remote.head()
    result = bring_up_to_date(remote.checkout)
    assert result.status == "diverged"
    assert "diverged" in result.message
    assert remote.head() == mine


def test_another_branch_is_left_alone(remote: Remote) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    git(remote.checkout, "checkout", "--quiet", "-b", "feature")
    result = bring_up_to_date(remote.checkout)
    assert result.status == "not_on_main"
    assert "feature" in result.message
    assert remote.head() == old


def test_a_detached_commit_is_left_alone(remote: Remote) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    git(remote.checkout, "checkout", "--quiet", "--detach")
    result = bring_up_to_date(remote.checkout)
    assert result.status == "not_on_main"
    assert "detached" in result.message
    assert remote.head() == old


def test_no_origin(remote: Remote) -> None:
    git(remote.checkout, "remote", "remove", "origin")
    assert bring_up_to_date(remote.checkout).status == "no_origin"


def test_an_origin_that_is_gone(remote: Remote) -> None:
    remote.origin.rename(remote.origin.with_name("moved.git"))
    result = bring_up_to_date(remote.checkout)
    assert result.status == "unreachable"
    assert "\n" not in result.message


def test_an_origin_without_main(remote: Remote) -> None:
    git(remote.origin, "branch", "--move", "main", "trunk")
    assert bring_up_to_date(remote.checkout).status == "unreachable"


def test_a_password_in_the_address_is_not_shown(remote: Remote) -> None:
    git(remote.checkout, "remote", "set-url", "origin", "http://somebody:secret@127.0.0.1:9/x.git")
    result = bring_up_to_date(remote.checkout)
    assert result.status == "unreachable"
    assert "secret" not in result.message


def test_an_origin_that_does_not_answer_is_given_up_with_its_helpers(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper, pid_file = tmp_path / "ssh.py", tmp_path / "pid"
    helper.write_text(
        "import os, sys, time\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()) + ' ' + ' '.join(sys.argv[1:]))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("GIT_SSH_COMMAND", f"{sys.executable} {helper}")
    monkeypatch.setenv("GIT_SSH_VARIANT", "ssh")
    git(remote.checkout, "remote", "set-url", "origin", "ssh://nobody.invalid/x.git")
    began = time.monotonic()
    result = bring_up_to_date(remote.checkout, fetch_timeout_s=2)
    assert result.status == "unreachable"
    assert "took longer than 2 s" in result.message
    assert time.monotonic() - began < 15
    pid, *options = pid_file.read_text().split()
    assert options[:2] == ["-oBatchMode=yes", "-oConnectTimeout=5"]
    for _ in range(50):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the helper of git is still running")


def test_a_folder_without_git_history(tmp_path: Path) -> None:
    assert bring_up_to_date(tmp_path).status == "not_a_checkout"


def test_a_copy_inside_another_repository_does_not_pull_that_one(remote: Remote) -> None:
    vendored = remote.checkout / "vendor"
    vendored.mkdir()
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    result = bring_up_to_date(vendored)
    assert result.status == "not_a_checkout"
    assert "another git repository" in result.message
    assert remote.head() == old


def test_git_variables_of_a_hook_do_not_point_elsewhere(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = remote.publish(**{"code.py": "two\n"})
    author_before = remote.head(remote.author)
    monkeypatch.setenv("GIT_DIR", str(remote.author / ".git"))
    assert bring_up_to_date(remote.checkout).updated
    monkeypatch.delenv("GIT_DIR")
    assert remote.head() == new
    assert remote.head(remote.author) == author_before


def test_git_is_missing(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(remote.checkout))
    assert bring_up_to_date(remote.checkout).status == "no_git"


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "1"), ("CI", "true"), (RESTARTED, "1")])
def test_the_environment_switches_it_off(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    monkeypatch.setenv(name, value)
    result = bring_up_to_date(remote.checkout)
    assert result.status == "switched_off"
    assert (name in result.message) == (name != RESTARTED)
    assert remote.head() == old


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_an_environment_that_says_no_does_not_switch_it_off(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    remote.publish(**{"code.py": "two\n"})
    monkeypatch.setenv("CI", value)
    assert bring_up_to_date(remote.checkout).updated


def test_a_resumed_run_keeps_its_code(remote: Remote) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    assert bring_up_to_date(remote.checkout, resuming=lambda: True).status == "resuming"
    assert remote.head() == old
    assert bring_up_to_date(remote.checkout, resuming=lambda: False).updated


def test_resuming_is_not_asked_when_there_is_nothing_to_bring(remote: Remote) -> None:
    def slow() -> bool:
        raise AssertionError("asked")

    assert bring_up_to_date(remote.checkout, resuming=slow).status == "up_to_date"


@pytest.mark.parametrize("option", ["--no_update", "--no-update"])
def test_the_option_switches_it_off(remote: Remote, option: str) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    lines: list[str] = []
    result = update_and_restart(remote.checkout, ["script.py", option], say=lines.append)
    assert result.status == "switched_off"
    assert "--no_update" in lines[0]
    assert remote.head() == old


def test_help_does_not_update(remote: Remote) -> None:
    old = remote.head()
    remote.publish(**{"code.py": "two\n"})
    lines: list[str] = []
    update_and_restart(remote.checkout, ["script.py", "--help"], say=lines.append)
    assert (remote.head(), lines) == (old, [])


def test_a_restart_only_when_the_code_changed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv(RESTARTED, "")
    for _ in range(2):
        update_and_restart(
            remote.checkout,
            ["script.py", "--debug"],
            say=lambda line: None,
            execute=lambda program, words: started.append([program, *words]),
        )
        if not started:
            remote.publish(**{"code.py": "two\n"})
    assert started == [[sys.executable, sys.executable, "script.py", "--debug"]]
    assert os.environ[RESTARTED] == "1"


SCRIPT = """
import sys
from pathlib import Path
from pruning_comparison.self_update import update_and_restart
print("started VERSION", flush=True)
update_and_restart(Path(__file__).parent, [__file__, *sys.argv[1:]], say=print)
print("working VERSION", sys.argv[1:], flush=True)
"""


def test_the_script_restarts_once_and_then_is_the_new_code(remote: Remote) -> None:
    remote.publish(**{"script.py": SCRIPT.replace("VERSION", "one")})
    git(remote.checkout, "pull", "--quiet", "--ff-only", "origin", "main")
    remote.publish(**{"script.py": SCRIPT.replace("VERSION", "two")})
    command = [sys.executable, str(remote.checkout / "script.py"), "--num_tokens=4", "a word"]
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    first = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert first[0] == "started one"
    assert first[1].startswith("Updated main")
    assert first[2:] == ["started two", "working two ['--num_tokens=4', 'a word']"]
    second = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert second == ["started two", "working two ['--num_tokens=4', 'a word']"]


def test_updating_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, pruning_comparison.self_update; print('torch' in sys.modules, 'numpy' in sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    out = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(SOURCES)}, check=True, capture_output=True, text=True
    )
    assert out.stdout.split() == ["False", "False"]
