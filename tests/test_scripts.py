"""The scripts, run as people start them: from a checkout, here one with a stand-in for the command line.

The stand-in writes down what it was called with and leaves a run folder like a real one. One test at the end runs the
real thing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jupytext
import pytest

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

def mount(folder):
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
    for name in ("__init__.py", "errors.py", "updating.py"):
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
        "model_name": "bundled",
        "device": "cpu",
        "precision": "float32",
        "pruning_levels": "0,20,40,60,80",
        "pruning_method": "entropy",
        "temperatures": "0.7,1.0",
        "num_tokens": "32",
        "eval_tokens": "4096",
        "calibration_tokens": "4096",
        "score_tokens": "2048",
        "threads": "1",
        "max_prompts": "5",
        "iterations": "3",
        "save_outputs": "",
        "output_dir": "validation_results/pruning_cpu_test",
    }


def test_debug_makes_the_quick_test_smaller(checkout: Checkout) -> None:
    assert checkout.run(QUICK, "--debug").returncode == 0
    small = effective(checkout.calls[0])
    assert small["model_name"] == "bundled"
    assert small["pruning_levels"] == "0,50"
    assert small["pruning_method"] == "entropy"
    assert (small["num_tokens"], small["max_prompts"], small["iterations"]) == ("12", "2", "2")
    assert (small["eval_tokens"], small["calibration_tokens"], small["score_tokens"]) == ("2048", "1024", "512")
    assert "debug" not in small


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


def test_no_drive_and_a_run_that_failed_leave_google_drive_alone(colab: Checkout, drive: Path) -> None:
    assert colab.run(COLAB, "--no_drive").returncode == 0
    assert not drive.exists()
    assert "--no_drive" not in colab.calls[0]
    assert colab.run(COLAB, STAND_IN_CODE="1").returncode == 1
    assert not (drive / "pruning_comparison").exists()


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
    spec = importlib.util.spec_from_file_location("colab_script", SCRIPTS / COLAB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Pip:
    """Stands in for pip: keeps the command and its constraints, and may replace torch."""

    versions: dict[str, str]
    torch_after: str
    returncode: int = 0
    command: list[str] = field(default_factory=list)
    constraints: str = ""

    def run(self, command: list[str], **options: object) -> SimpleNamespace:
        self.command = command
        self.constraints = Path(command[command.index("--constraint") + 1]).read_text()
        self.versions["torch"] = self.torch_after
        return SimpleNamespace(returncode=self.returncode, stdout="", stderr="no matching distribution")


def use(module: ModuleType, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", pip.versions.get)
    monkeypatch.setattr(module.subprocess, "run", pip.run)


def test_the_installation_keeps_the_torch_of_colab(colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip({"torch": "2.12.0+cu130"}, torch_after="2.12.0+cu130")
    use(colab_module, pip, monkeypatch)
    colab_module.install("somewhere")
    assert pip.command[:4] == [sys.executable, "-m", "pip", "install"]
    assert pip.command[-1] == "somewhere"
    assert pip.constraints == "torch==2.12.0+cu130\n"
    assert "constraints.txt" not in " ".join(pip.command)


@pytest.mark.parametrize(
    ("torch_after", "returncode", "message"),
    [("2.13.0", 0, "replaced torch 2.12.0"), ("2.12.0", 1, "no matching distribution")],
)
def test_an_installation_that_went_wrong_stops_the_run(
    colab_module: ModuleType, monkeypatch: pytest.MonkeyPatch, torch_after: str, returncode: int, message: str
) -> None:
    use(colab_module, Pip({"torch": "2.12.0"}, torch_after, returncode), monkeypatch)
    with pytest.raises(colab_module.CannotRunError, match=message):
        colab_module.install("somewhere")


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
