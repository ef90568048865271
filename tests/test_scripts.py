"""The scripts, run as people start them: from a checkout, here one with a stand-in for the command line.

The stand-in writes down what it was called with and leaves a run folder like a real one. One test at the end runs the
real thing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jupytext
import pytest
from builders import load_script

from pruning_comparison.cli import _spec_of, parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "pruning_comparison"
MAIN, QUICK, COLAB = "pruning_agency_comparison.py", "run_pruning_cpu_test.py", "run_pruning_comparison_colab.py"
NOTEBOOK = ROOT / "notebooks" / "pruning_comparison_colab.ipynb"

STAND_IN_CLI = """
import json, os
from pathlib import Path

def main(argv):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(argv) + chr(10))
    folders = [word.split("=", 1)[1] for word in argv if word.startswith("--output_dir=")]
    if folders:
        run = Path(folders[-1]) / "run_1"
        (run / "charts").mkdir(parents=True, exist_ok=True)
        (run / "report.html").write_text("report " + os.environ.get("STAND_IN_TEXT", ""))
        (run / "charts" / "speed.png").write_bytes(b"png")
    return int(os.environ.get("STAND_IN_CODE", "0"))

def would_resume(options):
    assert isinstance(options, list) and options[:1] != ["run"]
    return os.environ.get("STAND_IN_RESUMES") == "1"
"""
STAND_IN_TORCH = """
import os
from types import SimpleNamespace
cuda = SimpleNamespace(
    is_available=lambda: os.environ.get("STAND_IN_GPU", "") != "",
    get_device_name=lambda index: os.environ["STAND_IN_GPU"],
    is_bf16_supported=lambda including_emulation=True: including_emulation or os.environ["STAND_IN_GPU"] != "Tesla T4",
)
"""
STAND_IN_DRIVE = """
import os
from pathlib import Path

def mount(folder, force_remount=False):
    if os.environ.get("STAND_IN_DECLINED"):
        raise ValueError("mount failed")
    (Path(folder) / "MyDrive").mkdir(parents=True)
"""


@dataclass(frozen=True)
class Checkout:
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python(str(self.folder / "scripts" / "pruning_comparison" / script), *options, **environment)

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def write(self, path: str, text: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    @property
    def calls(self) -> list[list[str]]:
        """What the stand-in was called with, call by call."""
        calls = Path(self.environment["CALLS"])
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    environment = {
        "CALLS": str(tmp_path / "calls.jsonl"),
        "PRUNING_COMPARISON_DRIVE": str(tmp_path / "drive"),
        "CI": "",
        "PRUNING_COMPARISON_NO_UPDATE": "1",
        "PRUNING_COMPARISON_RESTARTED": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    made = Checkout(tmp_path / "checkout", environment)
    shutil.copytree(SCRIPTS, made.folder / "scripts" / "pruning_comparison")
    package = made.folder / "src" / "pruning_comparison"
    package.mkdir(parents=True)
    for name in ("__init__.py", "environment.py", "errors.py", "self_update.py"):
        shutil.copy(ROOT / "src" / "pruning_comparison" / name, package)
    made.write("src/pruning_comparison/cli.py", STAND_IN_CLI)
    made.write("src/torch.py", STAND_IN_TORCH)
    return made


@pytest.fixture
def colab(checkout: Checkout) -> Checkout:
    """The same with a stand-in for Google Colab's own package, where the package is installed already."""
    checkout.write("src/google/colab/__init__.py", "")
    checkout.write("src/google/colab/drive.py", STAND_IN_DRIVE)
    checkout.write("src/pruning_comparison-0.dist-info/METADATA", "Name: pruning-comparison\nVersion: 0\n")
    return checkout


@pytest.fixture
def drive(colab: Checkout) -> Path:
    return Path(colab.environment["PRUNING_COMPARISON_DRIVE"]) / "MyDrive"


def effective(call: Sequence[str]) -> dict[str, str]:
    """The options of a call by name; of two equal ones the last counts, as it does for argparse."""
    assert call[0] == "run"
    pairs = (word.removeprefix("--").partition("=") for word in call[1:])
    return {name.replace("-", "_"): value for name, _, value in pairs}


def test_the_main_script_hands_its_options_to_run(checkout: Checkout) -> None:
    options = ["--model_name=gpt2", "--pruning-levels", "0,50", "--save_outputs", "--no_update"]
    assert checkout.run(MAIN, *options).returncode == 0
    assert checkout.calls == [["run", *options]]


@pytest.mark.parametrize("script", [MAIN, QUICK, COLAB])
def test_the_exit_code_is_that_of_the_command_line(checkout: Checkout, script: str) -> None:
    assert checkout.run(script, STAND_IN_CODE="3").returncode == 3
    assert len(checkout.calls) == 1


def test_the_quick_test_runs_the_bundled_model_on_the_cpu(checkout: Checkout) -> None:
    assert checkout.run(QUICK).returncode == 0
    assert effective(checkout.calls[0]) == {
        "preset": "quick",
        "model_name": "bundled",
        "device": "cpu",
        "precision": "float32",
        "threads": "1",
        "save_outputs": "",
        "output_dir": "validation_results/pruning_cpu_test",
    }
    spec = _spec_of(parse(checkout.calls[0]))
    assert (spec.pruning_levels, spec.pruning_methods) == ((0, 20, 40, 60, 80), ("entropy",))
    assert (spec.temperatures, spec.max_prompts, spec.iterations) == ((0.7, 1.0), 5, 3)
    assert (spec.num_tokens, spec.eval_tokens, spec.calibration_tokens, spec.score_tokens) == (32, 4096, 4096, 2048)
    assert (spec.threads, spec.timing_limit_s) == (1, 10)


def test_debug_makes_the_quick_test_smaller(checkout: Checkout) -> None:
    assert checkout.run(QUICK, "--debug").returncode == 0
    small = effective(checkout.calls[0])
    assert small["model_name"] == "bundled"
    assert small["pruning_levels"] == "0,50"
    assert (small["num_tokens"], small["max_prompts"], small["iterations"]) == ("12", "2", "2")
    assert (small["eval_tokens"], small["calibration_tokens"], small["score_tokens"]) == ("2048", "1024", "512")
    assert "debug" not in small
    spec = _spec_of(parse(checkout.calls[0]))
    assert (spec.pruning_levels, spec.pruning_methods, spec.num_tokens) == ((0, 50), ("entropy",), 12)


def test_options_replace_the_defaults_of_the_quick_test(checkout: Checkout) -> None:
    assert checkout.run(QUICK, "--model-name=gpt2", "--debug", "--num_tokens=7", "--seed=3").returncode == 0
    options = effective(checkout.calls[0])
    assert (options["model_name"], options["num_tokens"], options["seed"]) == ("gpt2", "7", "3")
    assert options["pruning_levels"] == "0,50"


def test_the_quick_test_explains_itself(checkout: Checkout) -> None:
    done = checkout.run(QUICK, "--help")
    assert "--debug" in done.stdout
    assert "--help" in checkout.calls[0]


@pytest.mark.parametrize("script", [MAIN, QUICK, COLAB])
def test_a_missing_dependency_is_one_clear_line(checkout: Checkout, script: str) -> None:
    checkout.write("src/pruning_comparison/cli.py", "import a_package_that_is_missing")
    done = checkout.run(script)
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).splitlines()
    assert "Traceback" not in "".join(lines)
    assert [line for line in lines if "a_package_that_is_missing" in line and "make demo" in line]


@pytest.mark.parametrize("script", [MAIN, QUICK, COLAB])
def test_a_script_without_the_package_says_so(checkout: Checkout, script: str) -> None:
    shutil.rmtree(checkout.folder / "src")
    alone = checkout.folder / "scripts" / "pruning_comparison" / script
    done = checkout.python("-S", "-E", str(alone))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "installed" in done.stdout + done.stderr


@pytest.mark.parametrize("script", [MAIN, QUICK, COLAB])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_script_brings_its_checkout_up_to_date_unless_it_resumes(
    checkout: Checkout, tmp_path: Path, script: str, resumes: bool
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(checkout.folder), *words], check=True, capture_output=True)

    identity = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org")
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "origin.git")], check=True)
    git("init", "--quiet", "--initial-branch=main")
    git("remote", "add", "origin", str(tmp_path / "origin.git"))
    git("add", "--all")
    git(*identity, "commit", "--quiet", "--message", "old")
    checkout.write(
        "src/pruning_comparison/cli.py", STAND_IN_CLI.replace("json.dumps(argv)", "json.dumps(['new', *argv])")
    )
    git(*identity, "commit", "--quiet", "--all", "--message", "new")
    git("push", "--quiet", "origin", "main")
    git("reset", "--quiet", "--hard", "HEAD~1")

    done = checkout.run(
        script, "--num_tokens=4", PRUNING_COMPARISON_NO_UPDATE="", STAND_IN_RESUMES="1" if resumes else "0"
    )
    assert done.returncode == 0
    assert len(checkout.calls) == 1
    assert (checkout.calls[0][0] == "new") == (not resumes)
    assert "--num_tokens=4" in checkout.calls[0]
    assert ("unfinished run" if resumes else "Updated main") in done.stdout + done.stderr


def test_without_a_gpu_the_colab_script_goes_on_with_the_bundled_model(checkout: Checkout) -> None:
    done = checkout.run(COLAB)
    assert done.returncode == 0
    options = effective(checkout.calls[0])
    assert (options["model_name"], options["device"], options["precision"]) == ("bundled", "cpu", "float32")
    assert "Change runtime type" in done.stdout
    assert "not Google Colab" in done.stdout


def test_on_a_t4_the_colab_script_runs_gpt2_in_float16(checkout: Checkout) -> None:
    done = checkout.run(COLAB, STAND_IN_GPU="Tesla T4")
    assert done.returncode == 0
    options = effective(checkout.calls[0])
    assert (options["model_name"], options["device"], options["precision"]) == ("gpt2", "cuda", "float16")
    assert "Change runtime type" not in done.stdout


def test_bfloat16_is_refused_where_it_is_only_emulated(checkout: Checkout) -> None:
    done = checkout.run(COLAB, "--precision=bfloat16", STAND_IN_GPU="Tesla T4")
    assert done.returncode == 1
    assert "emulated" in done.stdout
    assert checkout.calls == []
    assert checkout.run(COLAB, "--precision", "bfloat16", STAND_IN_GPU="NVIDIA L4").returncode == 0
    assert effective(checkout.calls[0])["precision"] == "bfloat16"


@pytest.mark.parametrize("options", [["--model_name=x", "--device=cpu"], ["--model-name", "x", "--device", "cpu"]])
def test_options_replace_the_settings_of_the_colab_script(checkout: Checkout, options: list[str]) -> None:
    assert checkout.run(COLAB, *options, "--num_tokens=8", STAND_IN_GPU="Tesla T4").returncode == 0
    call = effective(checkout.calls[0])
    assert (call["model_name"], call["device"], call["precision"], call["num_tokens"]) == ("x", "cpu", "float32", "8")
    assert call["pruning_levels"] == "0,20,40,60,80"


def test_results_are_copied_to_google_drive(colab: Checkout, drive: Path) -> None:
    for text in ("first", "second"):
        done = colab.run(COLAB, STAND_IN_TEXT=text)
        assert done.returncode == 0
        saved = drive / "pruning_comparison" / "run_1"
        assert str(saved) in done.stdout
        assert (saved / "report.html").read_text() == f"report {text}"
        assert (saved / "charts" / "speed.png").is_file()
        assert [path.name for path in saved.parent.iterdir()] == ["run_1"]
        assert not list(saved.rglob(".*"))
    assert effective(colab.calls[0])["output_dir"] == "validation_results/pruning_agency"
    assert (colab.folder / "validation_results/pruning_agency/run_1/report.html").is_file()


def test_a_drive_that_is_mounted_already_is_not_mounted_again(colab: Checkout, drive: Path) -> None:
    drive.mkdir(parents=True)
    assert colab.run(COLAB, STAND_IN_DECLINED="1").returncode == 0
    assert (drive / "pruning_comparison" / "run_1" / "report.html").is_file()


def test_a_declined_drive_is_not_an_error(colab: Checkout, drive: Path) -> None:
    done = colab.run(COLAB, STAND_IN_DECLINED="1")
    assert done.returncode == 0
    assert "Google Drive cannot be used (mount failed)" in done.stdout
    assert not drive.exists()
    assert len(colab.calls) == 1


def test_a_copy_that_fails_says_where_the_results_are(colab: Checkout, drive: Path) -> None:
    drive.mkdir(parents=True)
    (drive / "pruning_comparison").write_text("in the way")
    done = colab.run(COLAB)
    assert done.returncode == 0
    assert str(colab.folder / "validation_results" / "pruning_agency" / "run_1") in done.stdout


def test_no_drive_leaves_google_drive_alone_and_a_run_that_failed_is_saved(colab: Checkout, drive: Path) -> None:
    assert colab.run(COLAB, "--no_drive").returncode == 0
    assert not drive.exists()
    assert "--no_drive" not in colab.calls[0]
    assert colab.run(COLAB, STAND_IN_CODE="1").returncode == 1
    assert (drive / "pruning_comparison" / "run_1").is_dir(), "what a failed run has measured can be continued"


def test_a_run_that_was_cut_off_is_fetched_before_the_comparison_starts(colab: Checkout, drive: Path) -> None:
    journal_of(drive / "pruning_comparison" / "run_0").close()
    done = colab.run(COLAB)
    assert "Fetched the unfinished run run_0" in done.stdout
    assert numbers(colab.folder / "validation_results" / "pruning_agency" / "run_0") == [1]


def test_a_run_on_the_drive_itself_is_refused(colab: Checkout, drive: Path) -> None:
    done = colab.run(COLAB, f"--output_dir={drive / 'results'}")
    assert done.returncode == 1
    assert "local folder" in done.stdout
    assert colab.calls == []


def test_the_notebook_runs_without_a_file_and_shows_the_charts(colab: Checkout, drive: Path) -> None:
    colab.write("src/ipykernel.py", "")
    colab.write("src/IPython/__init__.py", "")
    colab.write(
        "src/IPython/display.py", "def Image(filename): return filename\ndef display(image): print('shown', image)"
    )
    code = (
        "import json, sys, ipykernel\n"
        "sys.argv, names = ['kernel', '-f', 'connection.json'], {'__name__': '__main__'}\n"
        f"for cell in json.load(open({str(NOTEBOOK)!r}))['cells']:\n"
        "    if cell['cell_type'] == 'code': exec(''.join(cell['source']), names)\n"
        "print('went on', names['exit_code'])"
    )
    done = colab.python("-c", code, PYTHONPATH=str(colab.folder / "src"), STAND_IN_GPU="Tesla T4")
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "went on 0"
    shown = [line for line in done.stdout.splitlines() if line.startswith("shown")]
    assert len(shown) == 1
    assert shown[0].endswith("run_1/charts/speed.png")
    assert effective(colab.calls[0])["model_name"] == "gpt2"
    assert (drive / "pruning_comparison" / "run_1" / "report.html").is_file()


@pytest.fixture
def colab_module() -> ModuleType:
    return load_script(SCRIPTS / COLAB)


@dataclass
class Pip:
    """Stands in for pip: keeps its commands, says what it would install, and may replace torch all the same."""

    versions: dict[str, str]
    planned: dict[str, str] = field(default_factory=dict)
    torch_after: str | None = None
    returncode: int = 0
    commands: list[list[str]] = field(default_factory=list)

    def run(self, command: list[str], **options: object) -> SimpleNamespace:
        self.commands.append(command)
        if "--dry-run" in command:
            plan = {"install": [{"metadata": {"name": n, "version": v}} for n, v in self.planned.items()]}
            Path(command[command.index("--report") + 1]).write_text(json.dumps(plan))
        elif self.torch_after:
            self.versions["torch"] = self.torch_after
        return SimpleNamespace(returncode=self.returncode, stdout="", stderr="no matching distribution")


def use(module: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", pip.versions.get)
    monkeypatch.setattr(module.subprocess, "run", pip.run)


def test_the_installation_keeps_the_torch_of_colab_without_constraints(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip({"torch": "2.11.0+cu128"}, planned={"pruning-comparison": "0.1"})
    use(colab_module, pip, monkeypatch)
    colab_module.install("somewhere")
    asked, installed = pip.commands
    assert asked[:4] == installed[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--dry-run" in asked
    assert "--dry-run" not in installed
    assert asked[-1] == installed[-1] == "somewhere"
    assert not {"-c", "--constraint", "-U", "--upgrade", "--force-reinstall"} & {*asked, *installed}


def test_nothing_is_installed_where_torch_would_be_replaced(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip({"torch": "2.10.0"}, planned={"Torch": "2.12.0", "pruning-comparison": "0.1"})
    use(colab_module, pip, monkeypatch)
    with pytest.raises(colab_module.CannotRunError, match=r"would replace torch 2\.10\.0 by 2\.12\.0"):
        colab_module.install("somewhere")
    assert len(pip.commands) == 1


@pytest.mark.parametrize(
    ("torch_after", "returncode", "message"),
    [("2.13.0", 0, "replaced torch 2.12.0"), ("2.12.0", 1, "no matching distribution")],
)
def test_an_installation_that_went_wrong_stops_the_run(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch, torch_after: str, returncode: int, message: str
) -> None:
    use(colab_module, Pip({"torch": "2.12.0"}, {}, torch_after, returncode), monkeypatch)
    with pytest.raises(colab_module.CannotRunError, match=message):
        colab_module.install("somewhere")


def test_an_uploaded_wheel_is_installed_instead_of_the_repository(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources: list[str] = []
    monkeypatch.setattr(colab_module, "SCRIPT", None)
    monkeypatch.setattr(colab_module, "install", sources.append)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        ("pruning_comparison-0.1-py3-none-any.whl", "pruning_comparison-0.2-py3-none-any.whl")
    ):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "another-1-py3-none-any.whl").write_bytes(b"")
    colab_module.install_on_colab()
    assert sources == [str(tmp_path / "pruning_comparison-0.2-py3-none-any.whl")]


def test_where_the_repository_cannot_be_cloned_a_notebook_asks_for_a_wheel(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources: list[str] = []

    def install(source: str) -> None:
        sources.append(source)
        if "git+" in source:
            raise colab_module.CannotRunError("cannot clone")

    def upload() -> None:
        (tmp_path / "pruning_comparison-1-py3-none-any.whl").write_bytes(b"")

    monkeypatch.setattr(colab_module, "install", install)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=SimpleNamespace(upload=upload)))
    monkeypatch.setattr(colab_module, "checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(colab_module.CannotRunError, match="cannot clone"):
        colab_module.install_on_colab()  # a script cannot ask
    monkeypatch.setattr(colab_module, "SCRIPT", None)
    colab_module.install_on_colab()
    assert sources[-1] == str(tmp_path / "pruning_comparison-1-py3-none-any.whl")


def journal_of(run: Path) -> sqlite3.Connection:
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"finished": null}')
    journal = sqlite3.connect(run / "journal.sqlite")
    journal.executescript("CREATE TABLE cells (number INTEGER); INSERT INTO cells VALUES (1);")
    return journal


def numbers(run: Path) -> list[int]:
    with closing(sqlite3.connect(run / "journal.sqlite")) as journal:
        return [number for (number,) in journal.execute("SELECT number FROM cells")]


def test_a_run_is_saved_while_it_writes_and_only_finished_cells_arrive(
    colab_module: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "MyDrive").mkdir()
    drive, run = tmp_path / "MyDrive" / "pruning_comparison", tmp_path / "results" / "run_1"
    with closing(journal_of(run)) as journal:
        journal.execute("INSERT INTO cells VALUES (2)")
        saved = colab_module.save_to(drive, run)
        assert saved == drive / "run_1"
        assert numbers(saved) == [1]
        journal.commit()
        later = time.time() + 5
        os.utime(run / "journal.sqlite", (later, later))
        colab_module.save_to(drive, run)
        assert numbers(saved) == [1, 2]
    assert sorted(path.name for path in saved.iterdir()) == ["journal.sqlite", "manifest.json"]


def test_a_copy_that_breaks_off_leaves_the_file_saved_before(
    colab_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MyDrive").mkdir()
    drive, run = tmp_path / "MyDrive" / "pruning_comparison", tmp_path / "run_1"
    journal_of(run).close()
    colab_module.save_to(drive, run)
    (run / "manifest.json").write_text("new")
    os.utime(run / "manifest.json", (time.time() + 5,) * 2)
    copyfile = shutil.copyfile

    def breaks_off(source: Path, target: Path) -> None:
        if target.name.endswith(".part"):
            target.write_text("ha")
            raise OSError("Transport endpoint is not connected")
        copyfile(source, target)

    monkeypatch.setattr(colab_module.shutil, "copyfile", breaks_off)
    with pytest.raises(OSError, match="Transport endpoint"):
        colab_module.save_to(drive, run)
    assert (drive / "run_1" / "manifest.json").read_text() == '{"finished": null}'


def test_a_lost_drive_stops_nothing_and_is_written_again_when_it_is_back(
    colab_module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNING_COMPARISON_DRIVE", str(tmp_path / "drive"))
    mine = tmp_path / "drive" / "MyDrive"
    results = tmp_path / "results"
    with colab_module.Saver(results, mine / "pruning_comparison", every_s=0.01):
        journal_of(results / "run_1").close()
        wait_until(lambda: "cannot be written now" in capsys.readouterr().out)
        assert not mine.exists(), "a lost mount must not be replaced by a folder of its name"
        mine.mkdir(parents=True)
        wait_until((mine / "pruning_comparison" / "run_1" / "journal.sqlite").is_file)
    told = capsys.readouterr().out
    assert "can be written again" in told
    assert f"Saved to Google Drive: {mine / 'pruning_comparison' / 'run_1'}" in told


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_unfinished_run_is_fetched_and_a_finished_one_is_not(colab_module: ModuleType, tmp_path: Path) -> None:
    drive, results = tmp_path / "drive", tmp_path / "results"
    for name, finished in (("run_1", "null"), ("run_2", '"2026-01-01"')):
        journal_of(drive / name).close()
        (drive / name / "manifest.json").write_text(f'{{"finished": {finished}}}')
    journal_of(drive / "run_3").close()
    (drive / "run_3" / "manifest.json").write_text("not JSON")
    colab_module.fetch_unfinished(drive, results)
    assert [path.name for path in results.iterdir()] == ["run_1"]
    assert numbers(results / "run_1") == [1]
    (results / "run_1" / "kept").write_text("")
    colab_module.fetch_unfinished(drive, results)
    assert (results / "run_1" / "kept").is_file(), "what is on the local disk is newer"


def test_colab_installs_from_the_repository_of_the_project(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["project"]["urls"]["Repository"] == colab_module.REPOSITORY
    sources: list[str] = []
    monkeypatch.setattr(colab_module, "SCRIPT", None)
    monkeypatch.setattr(colab_module, "on_colab", lambda: True)
    monkeypatch.setattr(colab_module, "version", lambda package: None)
    monkeypatch.setattr(colab_module, "install", sources.append)
    monkeypatch.setattr(colab_module.importlib, "import_module", lambda name: None)
    colab_module.make_importable()
    assert sources == [f"{pyproject['project']['name']} @ git+{colab_module.REPOSITORY}"]


def test_the_notebook_has_the_cells_of_the_script() -> None:
    script = jupytext.reads((SCRIPTS / COLAB).read_text(encoding="utf-8"), fmt="py:percent")
    notebook = jupytext.reads(NOTEBOOK.read_text(encoding="utf-8"), fmt="ipynb")
    cells = [[(cell.cell_type, cell.source, cell.metadata) for cell in book.cells] for book in (script, notebook)]
    assert cells[0] == cells[1], "run `make notebook`"
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert notebook.metadata["accelerator"] == "GPU"
    assert notebook.metadata["colab"]["gpuType"] == "T4"
    assert notebook.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.skipif(
    importlib.util.find_spec("pruning_comparison.cli") is None, reason="pruning_comparison.cli is not there yet"
)
def test_the_colab_script_makes_a_report_with_the_bundled_model(tmp_path: Path) -> None:
    options = [
        "--model_name=bundled",
        "--device=cpu",
        "--pruning_levels=0,50",
        "--pruning_method=entropy",
        "--temperatures=1.0",
        "--num_tokens=8",
        "--timing_limit_s=1",
        "--max_prompts=2",
        "--iterations=2",
        "--eval_tokens=1024",
        "--calibration_tokens=1024",
        f"--output_dir={tmp_path / 'results'}",
        "--no_update",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / COLAB), *options],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "results").glob("run_*/report.html"))) == 1
