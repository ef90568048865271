"""What is said to a user is true: names that are nearly right, levels that take no head, what is kept after a failure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny_spec

from pruning_comparison import cli
from pruning_comparison.errors import InputError, Interrupted
from pruning_comparison.models import preview_model
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.report.first_screen import effective_settings
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import nothing_pruned, prepare
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import read_manifest


@pytest.mark.parametrize("command", ["run", "plan", "prune", "report"])
def test_help_shows_no_default_that_says_nothing(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"default: (None|True|False)", shown)
    if command != "report":
        assert "(default: 8192)" in shown


def test_the_nearest_option_is_named(capsys):
    assert cli.main(["run", "--modelname=gpt2"]) == 2
    assert "Did you mean --model_name?" in capsys.readouterr().err
    assert cli.main(["prune", "--level=30", "--varient=agency"]) == 2
    assert "Did you mean --variant?" in capsys.readouterr().err


def test_a_name_may_be_written_in_capitals():
    options = cli.make_parser().parse_args(["run", "--pruning_method=Entropy,FISHER", "--variants=Agency,Baseline"])
    spec = cli._spec_of(options)
    assert spec.pruning_methods == ("entropy", "fisher")
    assert spec.variants == ("agency", "baseline")


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("family", ["two layers of four"])
def test_the_least_level_that_is_named_takes_a_head_and_a_tenth_less_does_not(folder, family, scope):
    grid = preview_model(str(folder)).grid
    spec = tiny_spec(folder, pruning_levels=(0.3,), scope=scope)
    least = float(re.search(r"Give at least ([\d.]+)\.", nothing_pruned(spec, grid))[1])
    assert expected_heads_pruned(least, grid.n_layers, grid.n_heads, scope) > 0
    assert expected_heads_pruned(least - 0.1, grid.n_layers, grid.n_heads, scope) == 0


def test_levels_that_look_like_shares_are_asked_about(folder):
    with pytest.raises(InputError, match=r"--pruning_levels: 0\.2,0\.4 per cent of 8 heads is none.*was 20,40 meant\?"):
        prepare(tiny_spec(folder, pruning_levels=(0.2, 0.4)), identify=False)
    with pytest.raises(InputError, match=r"3 per cent of 8 heads is none\. Give at least 6\.3\.$"):
        prepare(tiny_spec(folder, pruning_levels=(3,)), identify=False)
    prepare(tiny_spec(folder, pruning_levels=(0.2, 50)), identify=False)
    prepare(tiny_spec(folder, pruning_levels=(0,)), identify=False)


def test_settings_that_change_nothing_are_named():
    idle = tiny_spec(
        Path("model"), variants=("baseline", "baseline-progressive"), adaptation="bias", ridge=0.2, consent="time"
    )
    assert idle.idle_settings() == [
        "--adaptation=bias changes nothing, because no variant adapts: baseline, baseline-progressive. Agency does",
        "--ridge=0.2 changes nothing, because no variant adapts: baseline, baseline-progressive. Agency does",
        "--consent=time changes nothing, because no variant asks heads: baseline, baseline-progressive. Agency does",
    ]
    assert len(tiny_spec(Path("model"), variants=("agency-adaptation",), consent="time").idle_settings()) == 1
    assert tiny_spec(Path("model"), variants=("agency",), adaptation="bias", consent="time").idle_settings() == []
    assert tiny_spec(Path("model"), variants=("baseline",), adaptation="refit-mlp").idle_settings() == []


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"recovery_rate": 1e-3}, "--recovery_learning_rate=0.001 changes nothing, because nothing is trained"),
        ({"recovery_parameters": "auto"}, "--recovery_parameters=auto changes nothing, because nothing is trained"),
        ({"recovery_rate": 1e-3, "recovery_steps": 2}, None),
        ({"entropy_direction": "low"}, "--entropy_direction=low changes nothing, because no method has a direction"),
        ({"entropy_direction": "low", "pruning_methods": ("magnitude", "entropy")}, None),
        ({"score_tokens": 64}, "--score_tokens=64 changes nothing, because no method reads text: magnitude"),
        ({"score_tokens": 64, "variants": ("agency",)}, None),
        ({"score_tokens": 64, "pruning_methods": ("fisher",)}, None),
    ],
)
def test_siblings_of_an_idle_setting_are_named_too(changes, warned):
    others = {"pruning_methods": ("magnitude",), "variants": ("baseline",), "adaptation": "refit-mlp"}
    found = tiny_spec(Path("model"), **{**others, **changes}).idle_settings()
    assert len(found) == (warned is not None)
    assert warned is None or found[0].startswith(warned)


def test_a_baseline_that_is_told_to_adapt_says_that_it_does_not(folder, tmp_path, caplog):
    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_comparison(
            tiny_spec(folder, variants=("baseline",), adaptation="bias"), output_dir=tmp_path, on_progress=stop
        )
    assert any(message.startswith("--adaptation=bias changes nothing") for message in caplog.messages)


def test_a_variant_alone_is_warned_of_before_anything_is_measured(folder, tmp_path, caplog):
    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_comparison(tiny_spec(folder, variants=("agency",)), output_dir=tmp_path, on_progress=stop)
    said = "agency alone is measured, so nothing is compared with it; --variants=baseline,agency does"
    assert said in caplog.messages
    assert list(read_manifest(next(tmp_path.glob("run_*"))).warnings) == [said]


def test_settings_show_the_windows_that_were_used():
    spec = ComparisonSpec(model_name="bundled").as_dict()
    shown = effective_settings({"spec": spec, "model": {"context_tokens": 256}})
    assert shown["eval_window"] == "256 (of 512 asked for: the model's context)"
    assert shown["calibration_window"] == 256
    assert effective_settings({"spec": spec, "model": {"context_tokens": 1024}}) == spec


FAILING = """
import sys
from pruning_comparison import cli
from pruning_comparison.run import attempts, comparison
number = int(sys.argv[1])
original, calls = comparison.RunStore.write_cell, []
def failing(self, *arguments):
    calls.append(1)
    if len(calls) > number:
        raise OSError(5, "Input/output error", "disk")
    return original(self, *arguments)
comparison.RunStore.write_cell = failing
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("cells", [0, 1])
def test_what_was_measured_is_said_to_be_kept_only_where_something_was(folder, tmp_path, cells):
    texts = [f"--{name}={folder / 'texts' / part}" for name, part in
             (("eval_text", "held_out"), ("calibration_text", "calibration"))]  # fmt: skip
    options = ["run", f"--model_name={folder}", "--device=cpu", "--threads=1", f"--output_dir={tmp_path}", "--quiet",
               "--pruning_levels=0,50", "--pruning_method=magnitude", "--num_tokens=3", "--max_prompts=1", "--iterations=1",
               "--timing_limit_s=0",
               "--eval_tokens=100", "--calibration_tokens=128", "--calibration_window=64", *texts]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", FAILING, str(cells), *options], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "error: disk: Input/output error." in done.stderr
    assert ("What was measured before is kept" in done.stderr) == (cells > 0)
