"""A model of a run made again: which one is chosen, that it is the very model, and what is refused."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from builders import noise, run_of, save_tiny_model, tiny_spec, write_short_texts

from pruning_comparison import cli
from pruning_comparison.analysis import Margins
from pruning_comparison.checkpoint.forms import load_pruned
from pruning_comparison.errors import InputError
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.from_run import choose_cell
from pruning_comparison.spec import Cell
from pruning_comparison.store.tables import Run

LOSSES = {("agency", "fisher"): 0.001, ("agency", "entropy"): 0.0015, ("baseline", "fisher"): 0.004}
"""Log perplexity over the dense model's, per per cent of the heads: at 40 % these are 4.1, 6.2 and 17.4 per cent."""

SPEEDS = {("agency", "fisher"): 0.002, ("agency", "entropy"): 0.002, ("baseline", "fisher"): 0.003}
"""Log tokens per second over the dense model's: at 20, 40, 60 and 80 % of agency 1.04, 1.08, 1.13 and 1.17."""


def measured_run() -> Run:
    """Levels 0, 20, 40, 60 and 80 of three pairs of variant and method; neighbouring documents differ by a thousandth."""
    cells, measurements = [], []
    for (variant, method), loss in LOSSES.items():
        speed = SPEEDS[variant, method]
        found = run_of(
            lambda v, level, i, d, loss=loss: loss * level + 0.001 * noise(level, i, d) * (level > 0),
            lambda v, level, i, p, speed=speed: speed * level + 0.001 * noise(level, i, p) * (level > 0),
            variants=[variant],
            method=method,
        )
        cells.append(found[0])
        measurements.append(found[1])
    spec = {"model_name": "m", "variants": ["baseline", "agency"], "seed": 0}
    manifest: object = SimpleNamespace(spec=spec)
    return Run(Path("runs/run_1"), manifest, cells=pd.concat(cells), measurements=pd.concat(measurements))  # type: ignore[arg-type]


ANY = {"variant": None, "method": None}


def test_the_best_is_the_highest_safe_level_of_the_run():
    """Within 5 %: agency by fisher to 40 (4.1 %), by entropy to 20 (3.0 %), baseline none (8.3 % at 20)."""
    chosen = choose_cell(measured_run(), **ANY, margins=Margins())
    assert chosen.cell == Cell("agency", "fisher", 0, 40.0)
    assert "40 % is the highest safe level of the run, by fisher, agency" in chosen.why
    entropy = choose_cell(measured_run(), variant=None, method="entropy", margins=Margins())
    assert entropy.cell == Cell("agency", "entropy", 0, 20.0)
    with pytest.raises(InputError, match=r"--best: no level of the run is safe.*at most 5 %"):
        choose_cell(measured_run(), variant="baseline", method=None, margins=Margins())


def test_of_equally_safe_levels_the_one_with_the_least_loss_is_the_best():
    """Within 9 %: agency by fisher to 80 (8.3 %); within 13 % entropy too (12.7 %), which loses more."""
    for tolerance in (0.09, 0.13):
        chosen = choose_cell(measured_run(), **ANY, margins=Margins(tolerance=tolerance))
        assert chosen.cell == Cell("agency", "fisher", 0, 80.0)


def test_a_speed_is_found_at_the_lowest_level_that_had_it():
    """1.1 times: agency at 60 % (1.127), baseline at 40 % (1.127), which is lower."""
    assert choose_cell(measured_run(), **ANY, target_speedup=1.1).cell == Cell("baseline", "fisher", 0, 40.0)
    # Both of agency's reach it at 60 %; fisher has lost less.
    chosen = choose_cell(measured_run(), variant="agency", method=None, target_speedup=1.1)
    assert chosen.cell == Cell("agency", "fisher", 0, 60.0)
    assert "the run measured 1.13 times the dense model's tokens per second" in chosen.why
    with pytest.raises(InputError, match=r"1\.5 times .* the most are 1\.27 times, at 80 % by fisher, baseline"):
        choose_cell(measured_run(), **ANY, target_speedup=1.5)


def test_a_level_is_agencys_unless_another_variant_is_named():
    run = measured_run()
    assert choose_cell(run, variant=None, method="fisher", level=20).cell == Cell("agency", "fisher", 0, 20.0)
    assert choose_cell(run, variant="baseline", method=None, level=20).cell == Cell("baseline", "fisher", 0, 20.0)
    with pytest.raises(InputError, match=r"--method: the run has entropy and fisher. Name one of them"):
        choose_cell(run, variant=None, method=None, level=20)
    with pytest.raises(InputError, match=r"--level: the run has not measured 30 %. It has 20, 40, 60 and 80"):
        choose_cell(run, variant=None, method="fisher", level=30)
    with pytest.raises(InputError, match=r"--variant: 'agencie' is unknown. Did you mean agency"):
        choose_cell(run, variant="agencie", method=None, level=20)
    nothing = replace(run, cells=run.cells[run.cells["level"] == 0])
    with pytest.raises(InputError, match=r"--from: .*has measured no pruned model yet"):
        choose_cell(nothing, variant=None, method=None, level=20)


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    """A small run, which has also kept its models, and where its texts are."""
    root = tmp_path_factory.mktemp("run")
    folder = save_tiny_model(root / "dense")
    write_short_texts(folder / "texts")
    spec = tiny_spec(folder, variants=("baseline", "agency"), pruning_levels=(0, 25, 50))
    return run_comparison(spec, output_dir=root / "runs", save_models=True), folder


def weights_of(folder):
    return load_pruned(folder)[0].state_dict()


@pytest.mark.parametrize(("variant", "level"), [("agency", 50), ("baseline", 25)])
def test_the_model_is_the_very_one_that_the_run_measured(variant, level, kept_run, tmp_path, capsys):
    run, _ = kept_run
    target = tmp_path / "again"
    argv = ["prune", f"--from={run.parent}", f"--level={level}", f"--variant={variant}", "--no_measure"]
    assert cli.main([*argv, f"--output_dir={target}"]) == 0
    assert f"{level} % of {run}, by magnitude, {variant}." in capsys.readouterr().out
    again, before = weights_of(target), weights_of(run / "models" / f"{variant}_magnitude_0_{level}")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in again)
    made = json.loads((target / "config.json").read_text())["pruning"]
    assert (made["from_run"], made["level"], made["method"]) == (run.name, level, "magnitude")
    with sqlite3.connect(run / "journal.sqlite") as journal:
        stored = journal.execute("SELECT fingerprint FROM cells WHERE variant = ? AND level = ?", (variant, level))
        assert made["fingerprint"] == stored.fetchone()[0]


def test_its_card_has_figures_and_a_folder_of_its_own(kept_run, tmp_path, monkeypatch, capsys):
    run, _ = kept_run
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", f"--from={run}", "--level=50", "--quiet"]) == 0
    assert capsys.readouterr().out == "model: pruned_models/dense_agency_magnitude_50\n"
    assert "| speed (tokens per second) |" in Path("pruned_models/dense_agency_magnitude_50/README.md").read_text(
        "utf-8"
    )


def test_another_text_or_another_journal_makes_no_model(kept_run, tmp_path, capsys):
    run, folder = kept_run
    argv = ["prune", "--level=50", "--no_measure", f"--output_dir={tmp_path / 'new'}", "--quiet"]
    other = tmp_path / "other"
    other.mkdir()
    for path in (folder / "texts" / "calibration").iterdir():
        (other / path.name).write_text(path.read_text("utf-8")[::-1], "utf-8")
    assert cli.main([*argv, f"--from={run}", f"--calibration_text={other}"]) == 2
    assert "--calibration_text: what it names is not what the run has read" in capsys.readouterr().err
    copied = tmp_path / "run_copied"
    copied.mkdir()
    for name in ("manifest.json", "journal.sqlite"):
        (copied / name).write_bytes((run / name).read_bytes())
    with sqlite3.connect(copied / "journal.sqlite") as journal:
        journal.execute("UPDATE cells SET fingerprint = 'another' WHERE level = 50")
    assert cli.main([*argv, f"--from={copied}"]) == 1
    assert "cannot be made again: made again, the model is" in capsys.readouterr().err
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["revisions"]["variants"]["agency"] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main([*argv, f"--from={copied}"]) == 2
    assert "--from: the run was made by" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best"], "--best: the best of what? Give --from=RUN as well"),
        (["--from=RUN"], "one of the arguments --level/--pruning_level --max_loss --target_speedup --best is required"),
        (["--from=RUN", "--best", "--level=50"], "not allowed with argument"),
        (["--from=RUN", "--max_loss=5"], "--max_loss: a run has measured levels"),
        (["--from=RUN", "--level=50", "--seed=0"], "--seed: with --from the run's own settings hold"),
        (["--from=RUN", "--level=50", "--ridge=0.1"], "--ridge: with --from"),
        (["--from=RUN", "--level=50", "--also=gguf"], "--also: the gguf form is not possible"),
        (["--from=RUN", "--target_speedup=1"], "--target_speedup: 1.0 must be above 1 and at most 100"),
        (["--from=nowhere", "--best"], "'nowhere' holds no run"),
        (["--target_speedup=nan"], "--target_speedup: nan must be above 1"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(options, message, kept_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "pruning_comparison.run.workspace.load_model", lambda *a, **k: pytest.fail("a model was loaded")
    )
    words = [word.replace("RUN", str(kept_run[0])) for word in options]
    assert cli.main(["prune", f"--output_dir={tmp_path / 'new'}", *words]) == 2
    assert message in capsys.readouterr().err
