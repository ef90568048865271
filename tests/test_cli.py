"""The command line: what is accepted, and what bad input looks like."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from builders import save_tiny_model

from pruning_comparison import cli
from pruning_comparison import spec as spec_module
from pruning_comparison.errors import InputError
from pruning_comparison.spec import ComparisonSpec


def spec_of(*argv):
    return cli._spec_of(cli.make_parser().parse_args(["run", *cli._with_underscores(argv)]))


def test_defaults_are_the_documented_ones():
    spec = spec_of("--device=cpu")
    assert spec == ComparisonSpec(threads=spec.threads)
    assert spec.model_name == "gpt2"
    assert spec.pruning_methods == ("entropy",)
    assert spec.pruning_levels == (0, 20, 40, 60, 80)
    assert spec.temperatures == (0.7, 1.0)
    assert (spec.num_tokens, spec.max_prompts, spec.iterations, spec.batch_size) == (100, 5, 3, 1)
    assert spec.precision == "float32"
    options = cli.make_parser().parse_args(["run"])
    assert options.output_dir == "validation_results/pruning_agency"


def test_underscores_dashes_equals_and_spaces_mean_the_same():
    expected = spec_of("--device=cpu", "--model_name=my-model_x", "--pruning_levels=0,30", "--num_tokens=7")
    for argv in (
        ["--device=cpu", "--model-name=my-model_x", "--pruning-levels=0,30", "--num-tokens=7"],
        ["--device", "cpu", "--model-name", "my-model_x", "--pruning_levels", "0,30", "--num-tokens", "7"],
    ):
        assert spec_of(*argv) == expected


def test_several_methods_and_variants():
    spec = spec_of("--device=cpu", "--pruning_method=entropy,random", "--variants=baseline,agency-adaptation")
    assert spec.pruning_methods == ("entropy", "random")
    assert spec.variants == ("baseline", "agency-adaptation")


def test_choices_are_the_types_of_their_fields():
    """What an option accepts and what the type checker accepts cannot differ."""
    hints = get_type_hints(ComparisonSpec)
    for field, choices in {
        "precision": spec_module.PRECISIONS,
        "execution": spec_module.EXECUTIONS,
        "scope": spec_module.SCOPES,
        "prune_unit": spec_module.PRUNE_UNITS,
        "entropy_direction": spec_module.ENTROPY_DIRECTIONS,
        "adaptation": spec_module.ADAPTATIONS,
    }.items():
        assert get_args(hints[field]) == choices
        for choice in choices:
            assert getattr(ComparisonSpec(**{field: choice}), field) == choice


def test_the_unit_of_pruning_is_named_unit_on_the_command_line_and_in_old_runs():
    spec = spec_of("--device=cpu", "--unit=kv_group")
    assert spec.prune_unit == "kv_group"
    stored = spec.as_dict()
    assert stored["prune_unit"] == "kv_group"
    old = {"unit" if name == "prune_unit" else name: value for name, value in stored.items()}
    assert ComparisonSpec.from_dict(old) == ComparisonSpec.from_dict(stored) == spec
    with pytest.raises(InputError, match="--unit: 'group' is unknown"):
        ComparisonSpec(prune_unit="group")


def test_level_zero_is_always_measured():
    assert spec_of("--device=cpu", "--pruning_levels=50,10").pruning_levels == (0, 10, 50)


BAD = [
    (["--pruning_levels=0,100"], "100.0 must be at least 0 and below 100"),
    (["--pruning_levels=-5"], "-5.0 must be at least 0"),
    (["--pruning_levels=0,many"], "'many' is not a number"),
    (["--pruning_levels=nan"], "nan"),
    (["--pruning_levels="], "at least one"),
    (
        ["--pruning_method=guess"],
        "'guess' is unknown. Choose from entropy, random, magnitude, taylor, fisher, ablation",
    ),
    (["--variants=nobody"], "'nobody' is unknown"),
    (["--iterations=0"], "must be at least 1"),
    (["--num_tokens=0"], "must be at least 1"),
    (["--num_tokens=ten"], "'ten' is not a whole number"),
    (["--batch_size=0"], "must be at least 1"),
    (["--adaptation=all"], "'all' is unknown. Choose from none, bias, gate, refit, refit-mlp"),
    (["--mlp_ridge=0"], "--mlp_ridge: 0.0 must be above 0"),
    (["--recovery_steps=-1"], "must be at least 0"),
    (["--recovery_steps=5", "--execution=masked"], "needs --execution=compact"),
    (["--score_tokens=1"], "must be at least 2 and at most the 16384 calibration tokens"),
    (["--score_tokens=20000"], "--score_tokens: 20000 must be at least 2 and at most the 16384"),
    (["--temperatures=-0.1"], "-0.1 must be a number of at least 0"),
    (["--temperatures=warm"], "'warm' is not a number"),
    (["--precision=float8"], "'float8' is unknown. Choose from float32"),
    (["--execution=dreamt"], "Choose from compact, masked"),
    (["--scope=galaxy"], "Choose from model, layer"),
    (["--device=quantum"], "is not a device"),
    (["--prompt_file=/no/such/file"], "'/no/such/file' does not exist"),
    (["--eval_text=/no/such/file"], "--eval_text: '/no/such/file' does not exist"),
    (["--num_tokens=1000"], "exceed the context of 256 tokens"),
    (["--eval_stride=600"], "must not exceed the window"),
    (["--no_such_option=1"], "unrecognized arguments"),
    (["--model_name=./no/such/folder"], "does not exist"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_exits_2_with_a_clear_message(argv, message, tmp_path, capsys, monkeypatch):
    import pruning_comparison.run.workspace as workspaces

    monkeypatch.setattr(workspaces, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code = cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path}", *argv])
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not list(tmp_path.glob("run_*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_says_so(tmp_path, capsys):
    assert cli.main(["run", "--model_name=bundled", "--device=cuda", f"--output_dir={tmp_path}"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_an_empty_prompt_file(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    code = cli.main(
        ["run", "--model_name=bundled", f"--prompt_file={tmp_path / 'prompts.txt'}", f"--output_dir={tmp_path}"]
    )
    assert code == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_a_prompt_that_fills_the_context(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("peace " * 300)
    options = [f"--prompt_file={tmp_path / 'prompts.txt'}", f"--output_dir={tmp_path}", "--num_tokens=1"]
    assert cli.main(["run", "--model_name=bundled", *options]) == 2
    assert "fill the context of 256 tokens of bundled. Shorten it" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "--model_name=bundled", f"--output_dir={tmp_path / 'file' / 'x'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_while_the_report_is_drawn_says_that_all_is_measured(tmp_path, capsys, monkeypatch):
    import pruning_comparison.report.write as results

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_results", stopped)
    folder = save_tiny_model(tmp_path / "model")
    options = [
        f"--model_name={folder}",
        "--device=cpu",
        "--pruning_levels=0",
        "--num_tokens=3",
        "--max_prompts=1",
        "--timing_limit_s=0",
    ]
    sizes = ["--iterations=1", "--eval_tokens=100", "--calibration_tokens=100", "--variants=baseline", "--quiet"]
    assert cli.main(["run", *options, *sizes, f"--output_dir={tmp_path / 'out'}"]) == 130
    run = next((tmp_path / "out").glob("run_*"))
    assert f"pruning-comparison report {run}" in capsys.readouterr().err


def test_no_command_and_help(capsys):
    assert cli.main([]) == 2
    assert "--help" in capsys.readouterr().err
    assert cli.main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("model_name", "memory_logging", "calibration_text", "visualize_only", "quiet", "seed"):
        assert f"--{option}" in shown


def test_visualize_only_without_a_run(tmp_path, capsys):
    assert cli.main(["run", "--visualize_only", f"--output_dir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_whole_run_from_a_shell(tmp_path):
    """The installed entry point, end to end on a tiny local model, then the report again from the stored tables alone."""
    folder = save_tiny_model(tmp_path / "model")
    argv = [
        sys.executable, "-m", "pruning_comparison", "run", f"--model-name={folder}", "--device=cpu",
        "--pruning_levels", "0,50", "--timing_limit_s=0",
        "--num_tokens=6", "--max_prompts=2", "--iterations=2", "--eval_tokens=600", "--calibration_tokens=512",
        "--calibration_window=64", "--save_outputs", "--memory_logging", f"--output_dir={tmp_path / 'out'}", "--threads=1",
    ]  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon\nA <script>alert('$x$')</script> prompt\n")
    run = subprocess.run([*argv, f"--prompt_file={prompts}"], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    latest = tmp_path / "out" / "latest"
    assert f"report: {latest.resolve()}" in run.stdout.replace(str(latest), str(latest.resolve()))
    assert "left" in run.stderr
    names = {path.name for path in latest.iterdir()}
    assert {"report.html", "results.json", "summary.csv", "manifest.json", "generated_texts.csv", "charts"} <= names
    html = (latest / "report.html").read_text("utf-8")
    assert "<script>alert(" not in html
    (latest / "report.html").unlink()
    again = subprocess.run(
        [sys.executable, "-m", "pruning_comparison", "report", "--quiet", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert (latest / "report.html").is_file()
