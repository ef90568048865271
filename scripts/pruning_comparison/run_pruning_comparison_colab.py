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
# The same file runs as a plain script as well: every option of `pruning-comparison run` may follow and replaces the
# setting below. `--no_drive` leaves Google Drive alone.

# %% cellView="form"
# @title Settings
model_name = "gpt2"  # @param ["gpt2", "distilgpt2", "bundled"] {allow-input: true}
precision = "auto"  # @param ["auto", "float16", "bfloat16", "float32"]
pruning_levels = "0,20,40,60,80"  # @param {type: "string"}
pruning_method = "entropy,magnitude,random"  # @param {type: "string"}
temperatures = "0.7,1.0"  # @param {type: "string"}
num_tokens = 100  # @param {type: "integer"}
max_prompts = 5  # @param {type: "integer"}
iterations = 3  # @param {type: "integer"}
batch_size = 1  # @param {type: "integer"}
save_outputs = True  # @param {type: "boolean"}
memory_logging = True  # @param {type: "boolean"}
save_to_drive = True  # @param {type: "boolean"}

# %% [markdown]
# ## Installation
#
# The newest code of main goes into Colab's own Python. Colab's torch is made for Colab's GPUs, so pip is told to keep
# it, and that is checked afterwards.

# %%
# ruff: noqa: E402 (the settings come first: they are what people change)
import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/pruning-comparison/pruning-comparison"
OUTPUT_DIR = "validation_results/pruning_agency"
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


def install(source: str) -> None:
    """Let pip install the package from a folder or an address, next to a torch that stays as it is."""
    torch_before = version("torch")
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        keep.write_text(f"torch=={torch_before}\n" if torch_before else "", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(keep), source]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotRunError(
            f"pip could not install {source} next to torch {torch_before}:\n{done.stdout}{done.stderr}"
        )
    if version("torch") != torch_before:
        raise CannotRunError(
            f"pip replaced torch {torch_before} by {version('torch')}: restart the session and run again."
        )
    print(f"Installed {source}; torch is still {torch_before}.")


def make_importable() -> None:
    """See to it that `pruning_comparison` can be imported: from the checkout, or on Colab installed."""
    folder = checkout()
    if on_colab() and version("pruning-comparison") is None:
        install(str(folder) if folder else f"pruning-comparison @ git+{REPOSITORY}")
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
# The run itself writes to Colab's own disk, because its database is not safe on a mounted Drive. The finished run is
# copied to the folder `pruning_comparison` of the Drive.


# %%
def drive_root() -> Path:
    """Where Google Drive is, or will be, mounted."""
    return Path(os.environ.get("PRUNING_COMPARISON_DRIVE", "/content/drive"))


def mount_drive() -> Path | None:
    """The folder of Google Drive that results go to, or None (and a line that says why) where there is none."""
    mine = drive_root() / "MyDrive"
    reason = "it was not mounted"
    if not mine.is_dir():
        try:
            from google.colab import drive

            drive.mount(str(drive_root()))
        except Exception as error:  # declined, timed out, no notebook to ask in: Colab has no common class for these
            reason = str(error) or type(error).__name__
    if not mine.is_dir():
        print(f"Google Drive cannot be used ({reason}): the results stay on this machine.")
        return None
    return mine / "pruning_comparison"


def save_to(folder: Path, run: Path) -> Path:
    """Copy a finished run into a folder; under its own name only once all of it has arrived."""
    folder.mkdir(parents=True, exist_ok=True)
    part, target = folder / f".{run.name}.part", folder / run.name
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(run, part)
    if target.exists():
        shutil.rmtree(target)
    return part.rename(target)


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
        "temperatures": temperatures,
        "num_tokens": num_tokens,
        "max_prompts": max_prompts,
        "iterations": iterations,
        "batch_size": batch_size,
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

    for chart in sorted(run.rglob("*.png")):
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

    code = cli.main(["run", *options])
    run = newest_run(output_dir)
    if code or run is None:
        return code
    if drive:
        try:
            print(f"Saved to Google Drive: {save_to(drive, run)}")
        except OSError as error:
            print(f"Could not be saved to Google Drive ({error}): the results are in {run.resolve()}")
    show_charts(run)
    return code


def continues(argv: Sequence[str]) -> bool:
    """Whether this continues an unfinished run, which has to end on the code that it began with."""
    try:
        import torch

        from pruning_comparison.updating import resumes

        return resumes(run_options(argv, torch))
    except (ImportError, CannotRunError):
        return False


def main(argv: Sequence[str] = ()) -> int:
    """Bring the checkout up to date if this file lies in one, then compare. Returns the exit code."""
    folder = checkout()
    try:
        if folder:
            sys.path.insert(0, str(folder / "src"))
            from pruning_comparison.updating import update_and_restart

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
