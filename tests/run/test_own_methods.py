"""A user's own pruning method: named on the command line or passed from Python, checked early, never mixed with another."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from builders import tiny_gpt2, tiny_spec, unmeasured

from pruning_comparison import cli
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.errors import InputError, MethodError
from pruning_comparison.methods import METHODS, OFFERED, Method, checked_own_method
from pruning_comparison.plan.plan import plan_run
from pruning_comparison.report.write import write_results
from pruning_comparison.run import attempts
from pruning_comparison.run.comparison import run_comparison, would_resume
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.one_model import prune
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import latest_run, read_manifest

GOOD = """
import torch

def score(model, windows, generator):
    layers, heads = model.config.n_layer, model.config.n_head
    assert windows.shape[1] == 64
    assert isinstance(generator, torch.Generator)
    # Head (1, 3) is worth most, head (0, 0) least.
    return torch.arange(layers * heads, dtype=torch.float32).view(layers, heads)
"""


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes ``mine.py`` into the working directory, where only the command line looks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text, name="mine"):
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        (tmp_path / f"{name}.py").write_text(text, "utf-8")

    yield write
    sys.modules.pop("mine", None)


@pytest.fixture
def no_report(monkeypatch):
    """Charts take longer than all else here, and these tests are not about them."""
    monkeypatch.setattr(
        "pruning_comparison.report.write.write_results", lambda folder, **settings: folder / "report.html"
    )


def options_of(spec, output_dir, method="mine:score", command="run"):
    values = {
        name: getattr(spec, name)
        for name in (
            "num_tokens", "max_prompts", "eval_tokens", "calibration_tokens", "calibration_window", "eval_text",
            "calibration_text", "adaptation", "timing_pairs", "timing_limit_s",
        )
    }  # fmt: skip
    many = [] if command == "prune" else ["--pruning_levels=0,50", "--temperatures=1", "--iterations=1"]
    return [
        command, f"--model_name={spec.model_name}", "--device=cpu", "--threads=1", f"--pruning_method={method}",
        *(f"--{name}={value}" for name, value in values.items()), *many,
        *([] if command == "plan" else [f"--output_dir={output_dir}"]), "--quiet",
    ]  # fmt: skip


def heads_gone(run, method):
    with RunStore(run) as store:
        gone = store.table("heads").query(
            f"method == '{method}' and variant == 'baseline' and level == 50 and kept == 0"
        )
    return sorted(zip(gone["layer"], gone["head"], strict=True))


LOWEST_FOUR = [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_what_may_be_named_are_the_settings_of_scores():
    assert set(OFFERED) == {"model", "windows", *(field.name for field in fields(ScoreSettings))}


def test_from_the_command_line_beside_a_method_of_the_package(folder, tmp_path, write_module, capsys):
    write_module(GOOD)
    path = list(sys.path)
    assert cli.main(options_of(tiny_spec(folder), tmp_path / "out", "magnitude,mine:score")) == 0, (
        capsys.readouterr().err
    )
    assert sys.path == path
    run = latest_run(tmp_path / "out")
    assert heads_gone(run, "mine:score") == LOWEST_FOUR
    assert heads_gone(run, "magnitude") != []
    stored = read_manifest(run).spec
    assert stored["pruning_methods"] == ["magnitude", "mine:score"]
    assert set(stored["own_methods"]) == {"mine:score"}
    assert (run / "charts" / "comprehensive_summary_mine-score.png").is_file()
    assert all(":" not in file.name for file in run.rglob("*"))


@pytest.mark.slow
def test_from_python_with_agency_report_and_plan(folder, tmp_path, write_module, monkeypatch):
    write_module(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("mine").score
    spec = tiny_spec(folder, pruning_methods=(Method("mine", score=function, reads_text=False), "magnitude"))
    assert spec.pruning_methods == ("mine", "magnitude")
    run = run_comparison(spec, output_dir=tmp_path / "out", raise_failures=True)
    assert heads_gone(run, "mine") == LOWEST_FOUR
    with RunStore(run) as store:
        assert set(store.table("replies")["method"]) == {"mine", "magnitude"}  # agency asks in its order
    assert write_results(run, save_outputs=False).is_file()
    notes = plan_run(spec, Margins(), prepare(spec, identify=False))["notes"]
    assert "what mine costs is not known: 2 passes over the calibration text are assumed." in notes


def test_named_by_place_or_passed_as_a_function_it_is_the_same_source(folder, tmp_path, write_module, monkeypatch):
    write_module(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    named = checked_own_method(Method("mine:score", score="mine:score"))
    passed = checked_own_method(Method("mine:score", score=importlib.import_module("mine").score))
    assert named == passed
    assert len(named.source) == 16
    assert named.own
    assert not METHODS["entropy"].own


def test_a_changed_source_is_another_run_from_which_only_other_methods_are_taken(
    folder, tmp_path, write_module, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)

    def spec(*levels):
        method = Method("mine:score", score="mine:score")
        return tiny_spec(folder, pruning_methods=("magnitude", method), pruning_levels=levels, variants=("baseline",))

    write_module(GOOD)
    first = run_comparison(spec(0, 50), output_dir=tmp_path / "out", raise_failures=True)
    measured, original = [], attempts.run_cell
    monkeypatch.setattr(attempts, "run_cell", lambda w, cell: (measured.append(cell), original(w, cell))[1])
    # The same source: what is there is taken over.
    same = run_comparison(spec(0, 50, 75), output_dir=tmp_path / "out", raise_failures=True)
    assert {(cell.method, cell.level) for cell in measured} == {("magnitude", 75), ("mine:score", 75)}
    measured.clear()
    write_module(GOOD.replace("return torch.arange", "return -torch.arange"))
    assert not would_resume(spec(0, 50), tmp_path / "out")
    changed = run_comparison(spec(0, 50), output_dir=tmp_path / "out", raise_failures=True)
    assert {(cell.method, cell.level) for cell in measured} == {("mine:score", 0), ("mine:score", 50)}
    assert heads_gone(first, "mine:score") == heads_gone(same, "mine:score") == LOWEST_FOUR
    assert heads_gone(changed, "mine:score") == [(1, 0), (1, 1), (1, 2), (1, 3)]
    manifests = [read_manifest(run) for run in (first, changed)]
    assert manifests[0].spec_hash != manifests[1].spec_hash


def test_an_interrupted_run_is_continued_with_the_same_source_alone(folder, tmp_path, write_module, monkeypatch):
    write_module(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    original = attempts.run_cell
    with monkeypatch.context() as patch:
        patch.setattr(
            attempts,
            "run_cell",
            lambda w, cell: (_ for _ in ()).throw(KeyboardInterrupt) if cell.level else original(w, cell),
        )
        with pytest.raises(Exception, match="steps are kept"):
            run_comparison(
                tiny_spec(folder, pruning_methods=(Method("mine", "mine:score"),)), output_dir=tmp_path / "out"
            )
    assert would_resume(tiny_spec(folder, pruning_methods=(Method("mine", "mine:score"),)), tmp_path / "out")
    write_module(GOOD + "# changed\n")
    assert not would_resume(tiny_spec(folder, pruning_methods=(Method("mine", "mine:score"),)), tmp_path / "out")


EARLY = [
    ("nowhere:score", "", "there is no module 'nowhere'"),
    ("mine:scor", GOOD, "function: 'scor' is unknown. Did you mean score?"),
    ("mine:", GOOD, "names no function. Write package.module:function"),
    ("mine:x", "x = 3\n", "mine:x is a int. Name a function"),
    ("mine:y", "x = 3\n", "mine has no 'y', and no function at all"),
    ("mine:score", "import nothing_like_it\n", "its module needs 'nothing_like_it', which is not there"),
    ("mine:score", "def score(:\n", "its module cannot be imported: SyntaxError"),
    ("mine:score", "raise RuntimeError('not today')\n", "its module cannot be imported: RuntimeError: not today"),
    ("mine:score", "raise SystemExit(3)\n", "its module cannot be imported: SystemExit: 3"),
    (
        "mine:score",
        "def score(weights):\n    return weights\n",
        "has a parameter 'weights', which nothing can be given",
    ),
    ("mine:score", "def score(model, /):\n    return model\n", "has a parameter 'model', which nothing can be given"),
    ("mine:score", "import functools\nscore = functools.partial(print, 3)\n", "not all in its source"),
    (
        "mine:score",
        "def f(t):\n    def g(model):\n        return t\n    return g\nscore = f([3])\n",
        "takes 't', a list",
    ),
]


@pytest.mark.parametrize(("method", "text", "message"), EARLY, ids=[message for _, _, message in EARLY])
def test_what_cannot_be_used_is_refused_before_any_work(folder, tmp_path, write_module, capsys, method, text, message):
    write_module(text)
    for command in ("run", "plan", "prune"):
        sys.modules.pop("mine", None)
        extra = ["--level=50"] if command == "prune" else []
        code = cli.main([*options_of(tiny_spec(folder), tmp_path / "out", method, command), *extra])
        shown = capsys.readouterr().err
        assert code == 2, shown
        assert message in shown
        assert shown.startswith("error: --pruning_method: ")
        assert "Traceback" not in shown
        assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


LATE = [
    ("return torch.zeros(3, 3)", "returned shape (3, 3); return [2, 4], as the model has 2 layers of 4 heads"),
    ("return torch.full((2, 4), float('nan'))", "gave head (0, 0) the score nan"),
    ("return [[1.0] * 4] * 2", "returned list; return a floating-point tensor [2, 4]"),
    ("return torch.ones(2, 4, dtype=torch.long)", "returned a tensor of torch.int64"),
    ("raise KeyError('no key')", "raised KeyError: 'no key'"),
]


@pytest.mark.parametrize(("line", "message"), LATE, ids=[line for line, _ in LATE])
def test_what_is_no_score_is_refused(folder, write_module, monkeypatch, line, message):
    write_module(f"import torch\n\ndef score(model):\n    {line}\n")
    monkeypatch.syspath_prepend(Path.cwd())
    method = checked_own_method(Method("mine", "mine:score"))
    with pytest.raises(MethodError, match=f"^--pruning_method: mine {re.escape(message)}"):
        score_heads(method, tiny_gpt2(layers=2), torch.ones(1, 8, dtype=torch.long), ScoreSettings())


def test_a_method_that_raises_costs_nothing_that_others_measured(folder, tmp_path, write_module, capsys):
    write_module("def score(model):\n    raise KeyError('no key')\n")
    options = options_of(tiny_spec(folder), tmp_path / "out", "magnitude,mine:score")
    assert cli.main([*options, "--variants=baseline"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --pruning_method: mine:score raised KeyError: 'no key'")
    assert shown.count("\n") == 1
    run = latest_run(tmp_path / "out")
    with RunStore(run) as store:
        assert {(cell.method, cell.level) for cell in store.finished_cells()} == {("magnitude", 0), ("magnitude", 50)}
    assert "in score" in (run / "run.log").read_text("utf-8")  # where it arose is kept


def test_prune_by_ones_own_method_saves_into_a_folder_with_a_safe_name(folder, tmp_path, write_module, capsys):
    write_module(GOOD)
    options = [word for word in options_of(tiny_spec(folder), tmp_path, command="prune") if "output_dir" not in word]
    assert cli.main([*options, "--level=50", "--variant=baseline", "--no_measure"]) == 0, capsys.readouterr().err
    (saved,) = (tmp_path / "pruned_models").iterdir()
    assert saved.name.endswith("_baseline_mine-score_50")
    assert "ranked by `mine:score`" in (saved / "README.md").read_text("utf-8")


def test_prune_from_python(model, write_module, tmp_path, monkeypatch):
    write_module("import torch\n\ndef score(model):\n    return torch.arange(12.0).view(3, 4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from builders import Letters

    pruned = prune(
        model, Letters(), level=25, method=Method("mine", "mine:score"), variant="baseline",
        calibration=["some text that is long enough to fill a window of tokens " * 20], calibration_tokens=64,
        calibration_window=32, score_tokens=64,
    )  # fmt: skip
    assert pruned.config.kept_heads == [[3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert pruned.config.pruning["method"] == "mine"
    assert len(pruned.config.pruning["method_source"]) == 16


def test_names_that_cannot_be_or_are_taken():
    def score(model):
        return model

    for name in ("", "../up", "a b", "a,b", "<b>", "1st", "naïve"):
        with pytest.raises(MethodError, match="is not a valid name for a method"):
            ComparisonSpec(pruning_methods=(Method(name, score),))
    with pytest.raises(MethodError, match="'entropy' is a method of this package"):
        ComparisonSpec(pruning_methods=(Method("entropy", score),))
    with pytest.raises(MethodError, match="two methods are called 'mine'"):
        ComparisonSpec(pruning_methods=(Method("mine", score), Method("mine", score, reads_text=False)))
    with pytest.raises(InputError, match=r"'a:b' is unknown.*Method\('a:b', score='a:b'\)"):
        ComparisonSpec(pruning_methods=("a:b",))
    with pytest.raises(MethodError, match="not all in its source"):
        ComparisonSpec(pruning_methods=(Method("mine", functools.partial(score)),))
    assert ComparisonSpec(pruning_methods=(METHODS["fisher"],)).own_methods == ()


def test_a_function_whose_source_is_nowhere_is_refused():
    names = {"__name__": "nowhere_at_all"}
    exec("def score(model):\n    return model\n", names)
    with pytest.raises(MethodError, match="the source of mine cannot be read"):
        ComparisonSpec(pruning_methods=(Method("mine", names["score"]),))


def test_plain_values_of_the_function_around_count_as_source():
    def made(power):
        def score(model):
            return power

        return Method("mine", score)

    sources = [ComparisonSpec(pruning_methods=(made(power),)).own_methods[0].source for power in (1, 2, 1)]
    assert sources[0] == sources[2] != sources[1]


def test_stored_settings_are_imported_only_where_that_is_trusted(folder, tmp_path, write_module, monkeypatch):
    write_module(f"import pathlib\n\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n{GOOD}")
    monkeypatch.syspath_prepend(tmp_path)
    spec = tiny_spec(folder, pruning_methods=(Method("mine", "mine:score"), "random"))
    stored = spec.as_dict()
    sys.modules.pop("mine")
    (tmp_path / "imported").unlink()
    with pytest.raises(InputError, match="--trust_methods"):
        ComparisonSpec.from_dict(stored)
    assert not (tmp_path / "imported").exists()
    assert "mine" not in sys.modules
    again = ComparisonSpec.from_dict(stored, trust_methods=True)
    assert (tmp_path / "imported").exists()
    assert again.as_dict() == stored
    assert ComparisonSpec.from_dict(stored, known_methods=spec.own_methods).as_dict() == stored
    other = (replace(spec.own_methods[0], source="0" * 16),)
    with pytest.raises(InputError, match="--trust_methods"):
        ComparisonSpec.from_dict(stored, known_methods=other)
    write_module(GOOD + "# changed\n")
    with pytest.raises(InputError, match="'mine' has changed since"):
        ComparisonSpec.from_dict(stored, trust_methods=True)


# Options from a file


def spec_of(*argv):
    return cli._spec_of(cli.parse(["run", *argv]))


def test_what_the_command_line_says_wins_over_the_file(tmp_path):
    (tmp_path / "o.yaml").write_text(
        "seed: 7\nnum_tokens: 9\ntemperatures: [0.5, 1]\nno_new_bias: true\nunit: kv_group\n"
    )
    spec = spec_of(f"--config={tmp_path / 'o.yaml'}", "--num-tokens=11", "--device=cpu")
    assert (spec.seed, spec.num_tokens, spec.temperatures, spec.new_bias) == (7, 11, (0.5, 1.0), False)
    assert spec.prune_unit == "kv_group"
    assert spec_of("--seed", "3", "--config", str(tmp_path / "o.yaml"), "--device=cpu").seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3\n", "option: 'sed' is unknown. Did you mean seed?"),
        ("- seed\n", "holds no options by name"),
        ("seed: {a: 1}\n", "'seed' must be the name of an option, with one value or a list of values"),
        ("seed: [\n", "is not a YAML file"),
        ("seed: !!python/object/apply:os.getcwd []\n", "is not a YAML file"),
        ("new_bias: true\n", "option: 'new_bias' is unknown. Did you mean no_new_bias?"),
        ("save_models: 3\n", "save_models is 3. It is true or false"),
        ("trust_methods: true\n", "says 'trust_methods', which only the command line can"),
        ("config: other.yaml\n", "says 'config', which only the command line can"),
        ("seed: many\n", "'many' is not a whole number"),
        ("pruning_method: mine:score\n", "names mine:score, a method that is Python code"),
        ("pruning_method: [entropy, 'mine:score']\n", "names mine:score, a method that is Python code"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_are_refused(tmp_path, write_module, capsys, text, message):
    write_module(f"import pathlib\n\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n{GOOD}")
    if text is not None:
        (tmp_path / "o.yaml").write_text(text)
    for command in ("run", "plan"):
        assert cli.main([command, f"--config={tmp_path / 'o.yaml'}", "--model_name=bundled"]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert "Traceback" not in shown
    assert not (tmp_path / "imported").exists()


def test_a_method_in_a_file_is_imported_when_it_is_trusted_or_named_on_the_command_line(tmp_path, write_module):
    write_module(GOOD)
    (tmp_path / "o.yaml").write_text("pruning_method: mine:score\n")
    config = f"--config={tmp_path / 'o.yaml'}"
    assert spec_of(config, "--trust_methods", "--device=cpu").pruning_methods == ("mine:score",)
    assert spec_of(config, "--pruning_method=random", "--device=cpu").pruning_methods == ("random",)
    sys.path.remove(str(tmp_path))


def test_the_options_of_a_run_repeat_it(folder, tmp_path, write_module, capsys, no_report):
    write_module(GOOD)
    spec = tiny_spec(folder)
    assert (
        cli.main([*options_of(spec, tmp_path / "out"), "--no_new_bias", "--memory_logging", "--variants=baseline"]) == 0
    )
    run = latest_run(tmp_path / "out")
    options = yaml.safe_load((run / "run.yaml").read_text("utf-8"))
    assert options["pruning_method"] == ["mine:score"]
    assert options["no_new_bias"] is True
    assert "prompt_file" not in options
    repeat = ["run", f"--config={run / 'run.yaml'}", f"--output_dir={tmp_path / 'again'}", "--quiet"]
    assert cli.main(repeat) == 2
    assert "--trust_methods" in capsys.readouterr().err
    assert cli.main([*repeat, "--trust_methods"]) == 0
    again = latest_run(tmp_path / "again")
    assert read_manifest(again).spec_hash == read_manifest(run).spec_hash
    assert unmeasured(again).replace(b",memory", b"") == unmeasured(run).replace(b",memory", b"")


@pytest.mark.slow
def test_on_workers_that_cannot_import_it(folder, tmp_path, write_module, monkeypatch):
    pytest.importorskip("ray")
    from pruning_comparison.run.launchers import RayLauncher

    write_module(GOOD + "\n\ndef helper():\n    return 1\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        method = Method("mine", score=importlib.import_module("mine").score)
    assert str(tmp_path) not in sys.path
    monkeypatch.chdir(Path(folder))
    spec = tiny_spec(folder, pruning_methods=(method,), variants=("baseline",))
    run = run_comparison(spec, output_dir=tmp_path / "out", launcher=RayLauncher(workers=1))
    assert read_manifest(run).finished is not None
    assert heads_gone(run, "mine") == LOWEST_FOUR
