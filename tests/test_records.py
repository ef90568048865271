"""Methods and variants are one record each: whatever is added to them is measured, charted, reported and planned."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from builders import tiny_spec

from pruning_comparison import cli
from pruning_comparison.errors import InputError
from pruning_comparison.methods import METHODS, Method, method_named
from pruning_comparison.plan.forecast import passes
from pruning_comparison.report.write import write_results
from pruning_comparison.run.cell import build
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.scoring import weights
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.tables import load_run
from pruning_comparison.variants import RETIRED, VARIANTS, Look, Variant, reported_variant, variant_named

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def examples(monkeypatch):
    """The worked examples of CONTRIBUTING.md, entered as they say."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    names = {"METHODS": {}, "Method": Method, "VARIANTS": {}, "Variant": Variant, "Look": Look}
    for title, count in (("Adding a pruning method", 3), ("Adding a variant", 2)):
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(blocks) == count
        for block in blocks:
            exec(textwrap.dedent(block), names)
    monkeypatch.setattr(weights, "score_value_norm", names["score_value_norm"], raising=False)
    for records, added in ((METHODS, names["METHODS"]), (VARIANTS, names["VARIANTS"])):
        for name, record in added.items():
            monkeypatch.setitem(records, name, record)
    return names


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_consistent(name):
    method = METHODS[name]
    assert method.name == name
    assert callable(method.function())
    assert not method.own
    assert method.revision >= 1
    assert method.source == ""
    assert min(method.passes, method.trial_passes, method.passes_per_head) >= 0
    assert bool(method.trial_passes) == method.tries_directions
    # What is read costs something, and what costs nothing reads nothing.
    assert (method.passes + method.passes_per_head >= 0.5) == method.reads_text
    assert "\n" not in method.summary
    assert not method.summary.endswith(".")


@pytest.mark.parametrize("name", [*VARIANTS, *RETIRED])
def test_a_variant_is_consistent(name):
    variant = reported_variant(name)
    assert variant.name == name
    assert variant.revision >= 1
    assert variant.negotiates == (variant.selection == "negotiated")
    assert bool(variant.lacks) == bool(variant.instead)
    assert variant.consent == "by cost" or variant.negotiates


def test_variants_look_different_in_colour_and_in_grey():
    looks = [variant.look for variant in VARIANTS.values()]
    for of_look in ("colour", "marker", "line"):
        seen = [str(getattr(look, of_look)) for look in looks]
        assert len(set(seen)) == len(seen), of_look


def test_unknown_and_retired_names_say_what_there_is():
    with pytest.raises(InputError, match=r"'fischer' is unknown\. Did you mean fisher"):
        method_named("fischer")
    with pytest.raises(InputError, match=r"'agencyy' is unknown\. Did you mean agency"):
        variant_named("agencyy")
    with pytest.raises(InputError, match=r"'agency-heeds-states' is no longer measured.*can still be reported"):
        variant_named("agency-heeds-states")
    assert reported_variant("agency-heeds-states").title == "agency-heeds-states"


def test_the_worked_examples_pass_their_own_tests(examples, folder, model):
    examples["test_value_norm_by_hand"](model)
    spec = tiny_spec(folder, variants=("baseline-progressive", "progressive-adaptation"))
    workspace = load_workspace(spec, prepare(spec, identify=False))
    examples["test_the_same_heads_leave_and_the_survivors_adapt"](
        lambda variant: build(workspace, Cell(variant, "magnitude", 0, 50.0))
    )
    test_a_method_is_consistent("value-norm")
    test_a_variant_is_consistent("progressive-adaptation")
    test_variants_look_different_in_colour_and_in_grey()


def test_what_is_added_is_measured_charted_reported_and_planned(examples, folder, tmp_path, capsys):
    variants = ("baseline", "agency", "progressive-adaptation")
    spec = tiny_spec(folder, pruning_methods=("value-norm",), variants=variants)
    run = run_comparison(spec, output_dir=tmp_path, raise_failures=True)
    stored = load_run(run)
    assert set(stored.cells["variant"]) == set(variants)
    adapted = stored.measurements[stored.measurements["metric"] == "adaptation_s"]
    assert set(adapted["variant"]) == {"agency", "progressive-adaptation"}
    html = write_results(run, save_outputs=False).read_text("utf-8")
    summary, answers = (pd.read_csv(run / f"{name}.csv") for name in ("summary", "answers"))
    assert set(summary["method"]) == {"value-norm"}
    assert set(variants) == set(summary["variant"])
    # What agency does better or worse than the variant that lacks a part of it: that part's doing.
    assert "agency vs progressive-adaptation" in set(answers["contrast"])
    assert "progressive-adaptation" in html
    colour = VARIANTS["progressive-adaptation"].look.colour.lower()
    assert colour in (run / "charts" / "quality_metrics.svg").read_text("utf-8")
    counts = passes(spec, prepare(spec, identify=False))
    assert counts["score_tokens"] > 0
    options = [f"--model_name={folder}", "--device=cpu", "--num_tokens=3", "--eval_tokens=150", "--threads=1"]
    options += [f"--eval_text={spec.eval_text}", f"--calibration_text={spec.calibration_text}", "--iterations=1"]
    options += ["--calibration_tokens=128", "--calibration_window=64", "--max_prompts=1", "--timing_limit_s=0"]
    assert cli.main(["plan", *options, "--pruning_method=value-norm", f"--variants={','.join(variants)}"]) == 0
    planned = capsys.readouterr().out
    assert "progressive-adaptation" in planned
    assert "value-norm" in planned
    run_help = " ".join(cli.make_parser().commands["run"].format_help().split())
    assert "fisher-greedy" in run_help


def test_options_name_every_method_and_variant():
    for command, options in (("run", ("pruning_method", "variants")), ("prune", ("method", "variant"))):
        known = cli.make_parser().commands[command].options()
        for option, records in zip(options, (METHODS, VARIANTS), strict=True):
            assert ", ".join(records) in str(known[option].help)


def test_a_spec_takes_whatever_the_records_name():
    spec = ComparisonSpec(pruning_methods=tuple(METHODS), variants=tuple(VARIANTS))
    assert [spec.method(name) for name in spec.pruning_methods] == list(METHODS.values())
