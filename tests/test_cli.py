"""The command line: what is accepted, and what bad input looks like."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from builders import no_model, save_tiny_model, stand_in, stopped, write_short_texts

from pruning_comparison import cli
from pruning_comparison import spec as spec_module
from pruning_comparison.errors import InputError
from pruning_comparison.presets import PRESETS
from pruning_comparison.report import margins_of
from pruning_comparison.report.answer import Answer, Chip
from pruning_comparison.report.terminal import stored_form
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import CellResult, read_manifest, write_manifest


def spec_of(*argv):
    return cli._spec_of(cli.parse(["run", *argv]))


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
    assert spec.engines == ("native",)


def test_several_engines_with_native_among_them():
    spec = spec_of("--device=cpu", "--engine=Compiled,transformers")
    assert spec.engines == ("native", "transformers", "compiled")
    assert spec.as_options()["engine"] == ["native", "transformers", "compiled"]


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
    (["--engine=native,compile"], "--engine: 'compile' is unknown. Did you mean compiled?"),
    (["--iterations=0"], "must be at least 1"),
    (["--num_tokens=0"], "must be at least 1"),
    (["--num_tokens=ten"], "'ten' is not a whole number"),
    (["--batch_size=0"], "must be at least 1"),
    (["--adaptation=all"], "'all' is unknown. Choose from none, bias, gate, refit, refit-mlp"),
    (["--mlp_ridge=0"], "--mlp_ridge: 0.0 must be above 0"),
    (["--recovery_steps=-1"], "must be at least 0"),
    (["--recovery_steps=5", "--execution=masked"], "needs --execution=compact"),
    (["--recovery_learning_rate=-1"], "is neither a number above 0 nor auto"),
    (["--recovery_learning_rate=fast"], "neither a number nor auto"),
    (["--recovery_parameters=some"], "Choose from all, restricted, auto"),
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


def test_a_preset_is_a_set_of_defaults_that_file_and_command_line_replace(tmp_path):
    quick = spec_of("--device=cpu", "--preset=quick")
    assert (quick.num_tokens, quick.eval_tokens, quick.calibration_tokens, quick.score_tokens) == (32, 4096, 4096, 2048)
    assert quick.iterations == 3
    assert spec_of("--device=cpu", "--preset=standard") == spec_of("--device=cpu")
    paper = spec_of("--device=cpu", "--preset", "paper")
    assert paper.pruning_levels == (0, 10, 20, 30, 40, 50, 60, 70, 80)
    assert "random" in paper.pruning_methods
    assert (paper.iterations, paper.max_prompts) == (10, 20)
    for words in (["--num_tokens=7", "--preset=quick"], ["--preset=quick", "--num-tokens", "7"]):
        assert (spec := spec_of("--device=cpu", *words)).num_tokens == 7
        assert spec.eval_tokens == 4096
    (tmp_path / "o.yaml").write_text("num_tokens: 9\npreset: quick\n")
    from_file = spec_of("--device=cpu", f"--config={tmp_path / 'o.yaml'}")
    assert (from_file.num_tokens, from_file.eval_tokens) == (9, 4096)
    assert spec_of("--device=cpu", f"--config={tmp_path / 'o.yaml'}", "--preset=standard").eval_tokens == 8192


def test_until_decided_replaces_the_iterations_of_a_preset_and_of_a_file(tmp_path):
    paper = spec_of("--device=cpu", "--preset=paper", "--until_decided")
    assert (paper.until_decided, paper.looks, paper.max_prompts) == (True, (3, 6, 12), 20)
    (tmp_path / "o.yaml").write_text("iterations: 5\nnum_tokens: 9\n")
    both = spec_of("--device=cpu", f"--config={tmp_path / 'o.yaml'}", "--until-decided")
    assert (both.until_decided, both.num_tokens) == (True, 9)
    (tmp_path / "o.yaml").write_text("until_decided: true\n")
    assert spec_of("--device=cpu", f"--config={tmp_path / 'o.yaml'}", "--preset=paper").looks == (3, 6, 12)


def test_an_unknown_preset_names_the_nearest(capsys):
    assert cli.main(["run", "--preset=papers"]) == 2
    assert (
        "--preset: 'papers' is unknown. Did you mean paper? Choose from quick, standard, paper."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_no_model_no_machine_and_no_folder(preset):
    known = cli.make_parser().commands["run"].options()
    assert PRESETS[preset].options.keys() <= known.keys()
    assert not PRESETS[preset].options.keys() & {"model_name", "device", "precision", "threads", "output_dir", "seed"}


def test_what_is_trusted_or_measured_again_is_not_for_a_file_to_say(tmp_path, capsys):
    for name in ("fresh", "trust_methods", "config"):
        (tmp_path / "o.yaml").write_text(f"{name}: true\n")
        assert cli.main(["run", f"--config={tmp_path / 'o.yaml'}"]) == 2
        assert f"says '{name}', which only the command line can" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "plan", "prune", "export", "report"])
def test_help_groups_every_option_shows_examples_and_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.findall(rf"^  (pruning-comparison {command}\b.*)$", shown.partition("examples:")[2], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        cli.make_parser().parse_args(example.split()[1:])
    parser = cli.make_parser().commands[command]
    grouped = [action for group in parser._action_groups[2:] for action in group._group_actions]
    alone = {name for action in parser._actions if action not in grouped for name in action.option_strings}
    assert alone <= {"-h", "--help", "--json", "--output_dir", "--save_outputs"}


def test_help_shows_a_default_of_0_and_1(capsys):
    cli.main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "seed of everything random (default: 0)" in shown
    assert "prompts per timed batch (default: 1)" in shown
    cli.main(["prune", "--help"])
    assert "(default: )" not in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Words of a command that a stand-in measures in no time, and without charts; the output folder is ``out``."""
    stand_in(monkeypatch)
    drawn = []

    def draw(folder, *, save_outputs, margins=None, on_progress=None):
        drawn.append(dict(margins or {}))
        manifest = read_manifest(folder)
        write_manifest(folder, replace(manifest, margins=asdict(margins_of(manifest, margins))))
        (folder / "report.html").write_text("")
        if save_outputs:
            (folder / "generated_texts.csv").write_text("")
        return folder / "report.html"

    monkeypatch.setattr("pruning_comparison.report.write.write_results", draw)
    folder = save_tiny_model(tmp_path / "model")
    texts = write_short_texts(tmp_path / "texts")
    words = [
        "run", f"--model_name={folder}", "--device=cpu", "--pruning_levels=0,50", "--num_tokens=3", "--max_prompts=1",
        "--iterations=1", "--eval_tokens=150", "--calibration_tokens=128", "--calibration_window=64",
        "--pruning_method=magnitude", *(f"--{name}={value}" for name, value in texts.items()),
        f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    return SimpleNamespace(words=words, out=tmp_path / "out", drawn=drawn)


def runs_in(folder):
    return sorted(path for path in folder.glob("run_*") if path.is_dir())


def test_repeating_a_finished_command_says_so_and_measures_nothing(tiny, capsys, monkeypatch):
    assert cli.main(tiny.words) == 0
    (run,) = runs_in(tiny.out)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("pruning_comparison.run.attempts.run_cell", lambda *a: pytest.fail("a cell was measured"))
        assert cli.main(tiny.words) == 0
        shown = capsys.readouterr()
        assert f"this is the answer of {run.resolve()}. --fresh measures again." in shown.err.replace(
            str(run), str(run.resolve())
        )
        assert f"report: {run / 'report.html'}" in shown.out
        assert tiny.drawn == [{}]  # once, when it was measured
        assert cli.main([*tiny.words, f"--config={run / 'run.yaml'}"]) == 0
        assert cli.main([*tiny.words, "--margin_quality=30"]) == 0
        assert tiny.drawn == [{}, {"quality": 0.3}]
        assert cli.main([*tiny.words, "--margin_quality=30", "--save_outputs"]) == 0
        assert (run / "generated_texts.csv").is_file()
        assert len(tiny.drawn) == 3
    assert runs_in(tiny.out) == [run]


def test_fresh_measures_everything_again(tiny):
    words = [*tiny.words, "--threads=1"]  # how many are faster is measured again as well, and may come out otherwise
    assert cli.main(words) == 0
    assert cli.main([*words, "--fresh"]) == 0
    first, second = runs_in(tiny.out)
    assert read_manifest(first).spec_hash == read_manifest(second).spec_hash
    assert read_manifest(second).reused == ()
    assert read_manifest(second).finished is not None


def test_a_fresh_run_that_was_stopped_is_continued_without_fresh(tiny, capsys, monkeypatch):
    assert cli.main(tiny.words) == 0
    with monkeypatch.context() as patch:
        patch.setattr("pruning_comparison.run.attempts.run_cell", stopped)
        assert cli.main([*tiny.words, "--fresh"]) == 130
    assert "The same command, without --fresh, continues." in capsys.readouterr().err
    assert cli.would_resume(tiny.words[1:])
    assert not cli.would_resume([*tiny.words[1:], "--fresh"])
    assert cli.main(tiny.words) == 0
    assert [read_manifest(run).finished is not None for run in runs_in(tiny.out)] == [True, True]


def test_a_finished_run_of_another_spec_or_with_changed_texts_is_not_shown(tiny, tmp_path):
    assert cli.main(tiny.words) == 0
    assert cli.main([*tiny.words, "--seed=1"]) == 0
    assert len(runs_in(tiny.out)) == 2
    for text in (tmp_path / "texts" / "held_out").glob("*.txt"):
        text.write_text(text.read_text() + " And more of it.")
    assert cli.main(tiny.words) == 0
    assert len(runs_in(tiny.out)) == 3


def test_a_finished_run_that_kept_no_models_is_measured_again_where_they_are_asked_for(tiny, monkeypatch):
    assert cli.main(tiny.words) == 0
    monkeypatch.setattr("pruning_comparison.run.launchers.serial.attempt_saving", lambda *a: None)
    assert cli.main([*tiny.words, "--save_models"]) == 0
    assert len(runs_in(tiny.out)) == 2


def test_options_that_only_the_report_depends_on_are_in_the_file_that_repeats_a_run(tiny):
    assert cli.main([*tiny.words, "--margin_quality=30", "--save_outputs"]) == 0
    (run,) = runs_in(tiny.out)
    options = cli.parse(["run", f"--config={run / 'run.yaml'}"])
    assert (options.margin_quality, options.save_outputs) == (30, True)
    assert cli._spec_of(options).as_dict() == dict(read_manifest(run).spec)


def test_ctrl_c_says_at_once_what_is_kept(tiny, capsys, monkeypatch):
    """Before the partial report is drawn, which can take long."""
    cells = []

    def second_stops(workspace, cell):
        cells.append(cell)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return no_model(), CellResult(cell, "done", fingerprint="x")

    said = []
    monkeypatch.setattr("pruning_comparison.run.attempts.run_cell", second_stops)
    monkeypatch.setattr(
        "pruning_comparison.report.write.write_results",
        lambda folder, **settings: said.append(capsys.readouterr().err) or folder / "report.html",
    )
    assert cli.main(tiny.words) == 130
    (run,) = runs_in(tiny.out)
    # Two variants at two levels and their two timings: six steps, of which one cell is done.
    assert f"stopped: 1 of 6 steps are kept in {run}. The same command continues." in said[0]
    assert f"partial report: {run / 'report.html'}" in capsys.readouterr().err


def test_another_ctrl_c_leaves_the_partial_report_out(tiny, capsys, monkeypatch):
    monkeypatch.setattr("pruning_comparison.run.attempts.run_cell", stopped)
    monkeypatch.setattr("pruning_comparison.report.write.write_results", lambda folder, **settings: stopped())
    assert cli.main(tiny.words) == 130
    (run,) = runs_in(tiny.out)
    assert f"no partial report; pruning-comparison report {run} draws it" in capsys.readouterr().err


def test_the_answer_is_shown_at_the_end_and_by_report_and_not_when_quiet(tiny, capsys):
    chip = Chip("E2", "Quality", "supported", "supported", "−45 %", "")
    answer = Answer("Pruning the heads of tiny", ("A sentence.",), (), (chip,))
    assert cli.main(tiny.words) == 0
    (run,) = runs_in(tiny.out)
    (run / "results.json").write_text(json.dumps({"answer": stored_form(answer)}))
    capsys.readouterr()
    for words in (tiny.words, ["report", str(run)], [*tiny.words, "--visualize_only"]):
        assert cli.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Pruning the heads of tiny"
        assert "A sentence." in lines
        assert re.fullmatch(r"E2 +Quality +supported +−45 %", lines[-3])
        assert lines[-1] == f"report: {run / 'report.html'}"
        assert cli.main([*words, "--quiet"]) == 0
        assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"


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
        "--timing_pairs=2", "--timing_limit_s=0",
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
