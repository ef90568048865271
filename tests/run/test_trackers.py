"""The trackers that there are, on local back ends that are read back. `make test-extras` has an environment for each.

One run of a tiny model by the command, with all that it sends: MLflow's file store, and its database, W&B without a network,
TensorBoard's event files.
"""

from __future__ import annotations

import csv
import json
import math

import pytest
from builders import save_tiny_model, write_short_texts

from pruning_comparison import cli

pytestmark = [
    pytest.mark.own_venv,
    # Other people's warnings; what is read back is what counts.
    pytest.mark.filterwarnings("ignore"),
]


def run_with(tracker, place, output):
    """The folder of a run of two iterations that the command has made and sent to a tracker."""
    folder = save_tiny_model(place / "model")
    write_short_texts(folder / "texts")
    options = [
        f"--model_name={folder}", "--device=cpu", "--threads=1", f"--output_dir={output}", "--quiet", "--num_tokens=3",
        "--max_prompts=1", "--timing_limit_s=0", "--timing_pairs=2", "--eval_tokens=300", "--calibration_tokens=128",
        "--calibration_window=64", f"--eval_text={folder / 'texts' / 'held_out'}", "--variants=baseline", "--temperatures=1",
        f"--calibration_text={folder / 'texts' / 'calibration'}", "--pruning_levels=0,50", "--pruning_method=random",
        "--iterations=2",
    ]  # fmt: skip
    assert cli.main(["run", *options, f"--track={tracker}"]) == 0
    (run,) = output.glob("run_*")
    return run


def expected_of(run):
    """The perplexities of the run's table, by the names that trackers have."""
    found = {}
    with (run / "summary.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "perplexity":
                place = f"perplexity/random/baseline/level_{float(row['level']):g}"
                for column in ("estimate", "ci_low", "ci_high", "n"):
                    if row[column] and math.isfinite(float(row[column])):
                        found[f"{place}/{column}"] = float(row[column])
    assert len(found) == 8
    return found


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_has_settings_estimates_and_artefacts(store, tmp_path, monkeypatch):
    address = (tmp_path / "mlruns").as_uri() if store == "file" else f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # where a database keeps its artefacts
    run = run_with("mlflow", tmp_path, tmp_path / "out")
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (stored,) = client.search_runs([client.get_experiment_by_name("pruning-comparison").experiment_id])
    assert stored.info.run_name == run.name
    assert stored.info.run_id == json.loads((run / "tracking.json").read_text())["mlflow"]
    assert stored.info.status == "FINISHED"
    assert stored.data.params["pruning_levels"] == "0, 50"
    assert stored.data.params["machine device"] == "cpu"
    expected = expected_of(run)
    assert {name: stored.data.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    history = client.get_metric_history(stored.info.run_id, "perplexity/random/baseline/level_50/estimate")
    assert [one.step for one in history] == [1, 2]  # after each iteration
    kept = {one.path for one in client.list_artifacts(stored.info.run_id)}
    assert kept == {"report.html", "results.json", "summary.csv", "run.yaml", "charts"}
    charts = {one.path for one in client.list_artifacts(stored.info.run_id, "charts")}
    assert "charts/perplexity_over_levels.png" in charts


def leveldb_records(data):
    """The records of a W&B file: seven bytes of head, then the blocks of LevelDB's log format.

    A block has 32 KiB; a record in it begins with 4 bytes of checksum, 2 of length and 1 of kind, which is 1 for a whole
    record, and 2, 3 and 4 for its first, middle and last part.
    """
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place < len(data):
        left = 32_768 - place % 32_768
        if left < 7:  # too small for a head: filled with zeros
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_has_settings_estimates_and_artefacts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_with("wandb", tmp_path, tmp_path / "out")
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(file.read_bytes())]
    (begun,) = [one.run for one in records if one.WhichOneof("record_type") == "run"][:1]
    assert begun.run_id == json.loads((run / "tracking.json").read_text())["wandb"]
    assert (begun.project, begun.display_name) == ("pruning-comparison", run.name)
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["pruning_levels"] == [0.0, 50.0]
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in one.history.item}
        for one in records
        if one.WhichOneof("record_type") == "history"
    ]
    expected, sent, steps = expected_of(run), {}, []
    for row in rows:
        sent |= row
        if "perplexity/random/baseline/level_50/estimate" in row:
            steps.append(row["iterations"])
    assert {name: sent[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert steps == [1, 2]
    assert sent["charts/perplexity_over_levels/_type"] == "image-file"
    (artefact,) = [one.artifact for one in records if one.WhichOneof("record_type") == "artifact"]
    assert artefact.type == "report"
    kept = {entry.path for entry in artefact.manifest.contents}
    assert {"report.html", "results.json", "summary.csv", "run.yaml", "charts/perplexity_over_levels.png"} <= kept
    assert [one.exit.exit_code for one in records if one.WhichOneof("record_type") == "exit"] == [0]


def test_tensorboard_has_settings_estimates_and_artefacts(tmp_path):
    run = run_with("tensorboard", tmp_path, tmp_path / "out")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    expected = expected_of(run)
    last = {name: events.Scalars(name)[-1].value for name in expected}
    assert last == pytest.approx(expected, rel=1e-6)  # event files hold single precision
    assert [one.step for one in events.Scalars("perplexity/random/baseline/level_50/estimate")] == [1, 2]
    assert "charts/perplexity_over_levels" in events.Tags()["images"]
    (settings,) = events.Tensors("settings/text_summary")
    assert "| pruning_levels | 0, 50 |" in settings.tensor_proto.string_val[0].decode()
    from tensorboard.plugins.custom_scalar import layout_pb2

    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    (category,) = [one for one in layout.category if one.title == "perplexity"]
    (chart,) = [one for one in category.chart if one.title == "random/baseline/level_50"]
    (margin,) = chart.margin.series
    place = "perplexity/random/baseline/level_50"
    assert (margin.value, margin.lower, margin.upper) == (f"{place}/estimate", f"{place}/ci_low", f"{place}/ci_high")
    assert (folder / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert (folder / "summary.csv").is_file()
