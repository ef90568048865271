# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     main_language: python
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Pruning comparison on Google Colab
#
# Measures how a baseline and an agency-enabled language model stand up to the pruning of their attention heads.
#
# 1. Choose a GPU: *Runtime > Change runtime type > T4 GPU*.
# 2. Change the settings below if you like.
# 3. *Runtime > Run all*. Colab asks once whether the results may be saved to your Google Drive; without it they stay
#    on Colab's machine, from where they can be downloaded.
#
# With Google Drive, results are saved while the run goes on. If Colab disconnects, run all cells again with the same
# settings: the run is fetched from the Drive and continues where it was saved.
#
# Where Colab cannot clone the repository, build a wheel (`pip wheel --no-deps .` in a checkout), upload it with the
# folder symbol on the left, and run all cells: a wheel that lies there is installed instead.
#
# The same file runs as a plain script as well: every option of `pruning-comparison run` may follow and replaces the
# setting below. `--no_drive` leaves Google Drive alone.

# %% cellView="form"
# @title Settings
model_name = "gpt2"  # @param ["gpt2", "distilgpt2", "bundled"] {allow-input: true}
precision = "auto"  # @param ["auto", "float16", "bfloat16", "float32"]
pruning_levels = "0,20,40,60,80"  # @param {type: "string"}
pruning_method = "entropy,magnitude,random"  # @param {type: "string"}
variants = "baseline,agency"  # @param {type: "string"}
temperatures = "0.7,1.0"  # @param {type: "string"}
num_tokens = 100  # @param {type: "integer"}
max_prompts = 5  # @param {type: "integer"}
iterations = 3  # @param {type: "integer"}
batch_size = 1  # @param {type: "integer"}
seed = 0  # @param {type: "integer"}
save_outputs = True  # @param {type: "boolean"}
memory_logging = True  # @param {type: "boolean"}
save_to_drive = True  # @param {type: "boolean"}

# %% [markdown]
# ## Installation
#
# The newest code of main goes into Colab's own Python. Colab's torch is made for Colab's GPUs: pip is asked first what it
# would install, and nothing is installed if it would replace torch.

# %%
# ruff: noqa: E402 (the settings come first: they are what people change)
import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/pruning-comparison/pruning-comparison"
OUTPUT_DIR = "validation_results/pruning_agency"
SAVE_EVERY_S = 60.0
SCRIPT = globals().get("__file__")  # a notebook has none


class CannotRunError(Exception):
    """What stands in the way of a run, and what to do about it."""


def on_colab() -> bool:
    """Whether this is Google Colab: its own package can be imported."""
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        return False


def checkout() -> Path | None:
    """The checkout that this file lies in; None for a notebook, or where the file was uploaded alone."""
    if SCRIPT is None:
        return None
    folder = Path(SCRIPT).resolve().parent.parent.parent
    return folder if (folder / "src" / "pruning_comparison").is_dir() else None


def version(package: str) -> str | None:
    """The installed version, read from the disk anew; None where the package is missing."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run pip of this Python."""
    command = [sys.executable, "-m", "pip", *words]
    return subprocess.run(command, capture_output=True, text=True)


def install(source: str) -> None:
    """Let pip install the package from a folder, a wheel or an address, next to a torch that stays as it is."""
    torch_before = version("torch")
    with tempfile.TemporaryDirectory() as folder:
        planned = Path(folder) / "planned.json"
        done = pip("install", "--quiet", "--dry-run", "--report", str(planned), source)
        if done.returncode:
            raise CannotRunError(
                f"pip cannot install {source} next to torch {torch_before}:\n{done.stdout}{done.stderr}"
            )
        wanted = json.loads(planned.read_text(encoding="utf-8"))["install"]
    torch_after = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in wanted}.get("torch")
    if torch_before and torch_after:
        raise CannotRunError(
            f"{source} would replace torch {torch_before} by {torch_after}, so nothing was installed: "
            "choose a newer runtime version (Runtime > Change runtime type)."
        )
    done = pip("install", "--quiet", source)
    if done.returncode:
        raise CannotRunError(f"pip could not install {source}:\n{done.stdout}{done.stderr}")
    if torch_before and version("torch") != torch_before:
        raise CannotRunError(
            f"pip replaced torch {torch_before} by {version('torch')}: restart the session and run again."
        )
    print(f"Installed {source}; torch is {version('torch')}.")


def uploaded_wheel() -> Path | None:
    """The newest wheel of the package in the folder that Colab uploads files to, if there is one."""
    wheels = sorted(Path.cwd().glob("pruning_comparison-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    return wheels[-1] if wheels else None


def install_on_colab() -> None:
    """Install from the checkout, an uploaded wheel or the repository; where none works, a notebook asks for a wheel."""
    source = checkout() or uploaded_wheel()
    if source:
        return install(str(source))
    try:
        return install(f"pruning-comparison @ git+{REPOSITORY}")
    except CannotRunError as error:
        if SCRIPT is not None or "would replace torch" in str(error):
            raise
        print(f"{error}\nIf the repository cannot be reached, upload a wheel of the package here (Cancel gives up):")
        reason = error
    from google.colab import files

    files.upload()
    wheel = uploaded_wheel()
    if wheel is None:
        raise reason
    return install(str(wheel))


def make_importable() -> None:
    """See to it that `pruning_comparison` can be imported: from the checkout, or on Colab installed."""
    folder = checkout()
    if on_colab() and version("pruning-comparison") is None:
        install_on_colab()
    for name in ("torch", "pruning_comparison.cli"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            where = f"in {folder}" if folder else f"in a checkout of {REPOSITORY}"
            raise CannotRunError(
                f"{error.name} is not installed: run `make demo`, or `pip install -e .`, {where}."
            ) from error


# %% [markdown]
# ## GPU
#
# A T4 computes in float16. It accepts bfloat16 as well, but only emulates it, which would make every timing worthless.


# %%
def choose_precision(torch: Any, device: str, asked: str) -> str:
    """The precision to compute in on a device; "auto" is float16 on a GPU and float32 on a CPU."""
    if not device.startswith("cuda"):
        return "float32" if asked == "auto" else asked
    if asked == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(0)
        raise CannotRunError(f"bfloat16 is only emulated on this GPU ({name}): choose float16 or float32 as precision.")
    return "float16" if asked == "auto" else asked


# %% [markdown]
# ## Google Drive
#
# The run itself writes to Colab's own disk, because its database is not safe on a mounted Drive. Once a minute, and at
# the end, what is new is copied to the folder `pruning_comparison` of the Drive, each file whole or not at all. If the
# Drive goes away the run goes on, and saving is tried again.


# %%
def drive_root() -> Path:
    """Where Google Drive is, or will be, mounted."""
    return Path(os.environ.get("PRUNING_COMPARISON_DRIVE", "/content/drive"))


def mount_drive(*, anew: bool = False) -> Path | None:
    """The folder of Google Drive that results go to, or None (and a line that says why) where there is none."""
    mine = drive_root() / "MyDrive"
    reason = "it was not mounted"
    if not mine.is_dir():
        try:
            from google.colab import drive

            drive.mount(str(drive_root()), **({"force_remount": True} if anew else {}))
        except Exception as error:  # declined, timed out, no notebook to ask in: Colab has no common class for these
            reason = str(error) or type(error).__name__
    if not mine.is_dir():
        print(f"Google Drive cannot be used ({reason}): the results stay on this machine.")
        return None
    return mine / "pruning_comparison"


def save_to(folder: Path, run: Path) -> Path:
    """Copy what is new in a run folder into one of the Drive, file by file; each appears whole or not at all.

    The journal is copied as SQLite copies a database that is in use: as of its last finished cell. OSError where the
    Drive is not there, or full.
    """
    if not folder.parent.is_dir():
        raise OSError(f"{folder.parent} is not there")
    target = folder / run.name
    for source in sorted(path for path in run.rglob("*") if path.is_file()):
        name = source.relative_to(run)
        if source.name.startswith(".") or source.name.endswith(("-journal", "-wal", "-shm")):
            continue
        there = target / name
        stamp = source.stat().st_mtime
        if there.is_file() and there.stat().st_mtime >= stamp:
            continue
        folder.mkdir(exist_ok=True)
        there.parent.mkdir(parents=True, exist_ok=True)
        part = there.with_name(f".{there.name}.part")
        with tempfile.TemporaryDirectory() as local:
            whole = Path(local) / "copy"
            if source.suffix == ".sqlite":
                snapshot(source, whole)
            else:
                shutil.copyfile(source, whole)
            shutil.copyfile(whole, part)
        os.utime(part, (stamp, stamp))
        part.replace(there)
    return target


def snapshot(journal: Path, target: Path) -> None:
    """A consistent copy of a SQLite file, on the local disk. OSError where it cannot be read now."""
    try:
        with contextlib.closing(sqlite3.connect(journal)) as old, contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
    except sqlite3.Error as error:
        raise OSError(f"{journal.name} cannot be read now ({error})") from error


def fetch_unfinished(folder: Path, output_dir: Path) -> None:
    """Bring runs that were cut off from the Drive to the local disk, where the same settings continue them."""
    for manifest in sorted(folder.glob("run_*/manifest.json")):
        run = manifest.parent
        try:
            known = json.loads(manifest.read_text(encoding="utf-8"))
            if known.get("finished") is not None or (output_dir / run.name).exists():
                continue
            output_dir.mkdir(parents=True, exist_ok=True)
            part = output_dir / f".{run.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(run, part, ignore=shutil.ignore_patterns(".*"))
            part.rename(output_dir / run.name)
            print(f"Fetched the unfinished run {run.name} from Google Drive: with the same settings it continues.")
        except (OSError, ValueError, AttributeError) as error:
            print(f"{run.name} on Google Drive cannot be read ({error}): it stays there.")


class Saver:
    """Saves the runs that change in `output_dir` to a folder of the Drive, now and then, beside the run itself."""

    def __init__(self, output_dir: Path, folder: Path, every_s: float = SAVE_EVERY_S) -> None:
        self.output_dir, self.folder, self.every_s = output_dir, folder, every_s
        self._started = time.time() - 1
        self._told = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> "Saver":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        saved = self.save()
        if not saved and self._told and mount_drive(anew=True):
            saved = self.save()
        for path in saved:
            print(f"Saved to Google Drive: {path}")
        if not saved and self._told:
            print(f"Could not be saved to Google Drive: the results are in {self.output_dir.resolve()}")
            for run in self.changed():
                print(f"  {run.resolve()}")

    def changed(self) -> list[Path]:
        """The run folders in which something was written since the start."""
        runs = [path for path in self.output_dir.glob("run_*") if path.is_dir() and not path.is_symlink()]
        return [run for run in runs if max((p.stat().st_mtime for p in run.iterdir()), default=0.0) >= self._started]

    def save(self) -> list[Path]:
        """Save once; an error is told when it is new, and never stops the run."""
        try:
            saved = [save_to(self.folder, run) for run in self.changed()]
        except OSError as error:
            if str(error) != self._told:
                print(f"Google Drive cannot be written now ({error}): the run goes on, saving is tried again.")
            self._told = str(error)
            return []
        if self._told and saved:
            print("Google Drive can be written again.")
            self._told = ""
        return saved

    def _go_on(self) -> None:
        while not self._stop.wait(self.every_s):
            self.save()


# %% [markdown]
# ## The comparison


# %%
def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that this file has to know, and all others as they are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model_name", "device", "precision", "output_dir"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    parser.add_argument("--no_drive", "--no-drive", action="store_true")
    return parser.parse_known_args(argv)


def run_options(argv: Sequence[str], torch: Any) -> list[str]:
    """The options of `pruning-comparison run`: the settings above, and after them what the command line says."""
    given, rest = parse(argv)
    no_gpu = given.device is None and not torch.cuda.is_available()
    device = given.device or ("cpu" if no_gpu else "cuda")
    values = {
        "model_name": given.model_name or ("bundled" if no_gpu else model_name),
        "device": device,
        "precision": choose_precision(torch, device, given.precision or ("auto" if no_gpu else precision)),
        "pruning_levels": pruning_levels,
        "pruning_method": pruning_method,
        "variants": variants,
        "temperatures": temperatures,
        "num_tokens": num_tokens,
        "max_prompts": max_prompts,
        "iterations": iterations,
        "batch_size": batch_size,
        "seed": seed,
        "output_dir": given.output_dir or OUTPUT_DIR,
    }
    switches = {"save_outputs": save_outputs, "memory_logging": memory_logging}
    options = [f"--{name}={value}" for name, value in values.items()]
    return options + [f"--{name}" for name, on in switches.items() if on] + rest


def newest_run(output_dir: Path) -> Path | None:
    """The run folder whose report was written last."""
    reports = sorted(output_dir.glob("run_*/report.html"), key=lambda report: report.stat().st_mtime)
    return reports[-1].parent if reports else None


def show_charts(run: Path) -> None:
    """Show every chart of a run below the cell; does nothing outside a notebook."""
    if "ipykernel" not in sys.modules:
        return
    from IPython.display import Image, display

    for chart in sorted((run / "charts").glob("*.png")):
        display(Image(filename=str(chart)))


def compare(argv: Sequence[str]) -> int:
    """Run the comparison with the settings and the options given, save it, show it. Returns the exit code."""
    make_importable()
    import torch

    from pruning_comparison import cli

    given, rest = parse(argv)
    if {"-h", "--help"} & set(rest):
        return cli.main(["run", *rest])
    output_dir = Path(given.output_dir or OUTPUT_DIR)
    if output_dir.resolve().is_relative_to(drive_root().resolve()):
        raise CannotRunError(
            f"{output_dir} is on Google Drive, where the database of a run is not safe: name a local folder."
        )
    options = run_options(argv, torch)

    if not on_colab():
        print(f"This is not Google Colab: a plain run, with results in {output_dir}.")
    if given.device is None and not torch.cuda.is_available():
        print(f"No GPU: going on with the CPU and the model {given.model_name or 'bundled'}.")
        print("On Colab, Runtime > Change runtime type > T4 GPU gives one; then run all cells again.")
    drive = mount_drive() if on_colab() and save_to_drive and not given.no_drive else None

    if drive:
        fetch_unfinished(drive, output_dir)
    with Saver(output_dir, drive) if drive else contextlib.nullcontext():
        code = cli.main(["run", *options])
    run = newest_run(output_dir)
    if not code and run is not None:
        show_charts(run)
    return code


def continues(argv: Sequence[str]) -> bool:
    """Whether this continues an unfinished run, which has to end on the code that it began with."""
    try:
        import torch

        from pruning_comparison.self_update import resumes

        return resumes(run_options(argv, torch))
    except (ImportError, CannotRunError):
        return False


def main(argv: Sequence[str] = ()) -> int:
    """Bring the checkout up to date if this file lies in one, then compare. Returns the exit code."""
    # Threads with nothing to do sleep, rather than take a core from the others; torch asks once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = checkout()
    try:
        if folder:
            sys.path.insert(0, str(folder / "src"))
            from pruning_comparison.self_update import update_and_restart

            update_and_restart(folder, [str(SCRIPT), *argv], say=print, resuming=lambda: continues(argv))
        return compare(argv)
    except CannotRunError as error:
        print(error)
        return 1


# %%
if __name__ == "__main__":
    exit_code = main(sys.argv[1:] if SCRIPT else [])
    if SCRIPT:
        sys.exit(exit_code)
