"""As many heads as a loss allows: against every number of heads tried one by one, and what is said of it."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from builders import save_tiny_model, tiny_spec, write_short_texts

from pruning_comparison import cli
from pruning_comparison.checkpoint.forms import load_pruned
from pruning_comparison.errors import InputError
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.heads import live_heads
from pruning_comparison.run import max_loss
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.max_loss import UNKNOWN_LEVELS, build_within
from pruning_comparison.run.one_model import prune
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell
from pruning_comparison.texts import sample_windows, unread_windows


@pytest.fixture(scope="module")
def spec(folder):
    return tiny_spec(folder, pruning_levels=UNKNOWN_LEVELS, variants=("agency",), pruning_methods=("fisher",))


@pytest.fixture(scope="module")
def every_count(spec):
    """Predicted and measured rise of perplexity in per cent with 1 to 7 of the 8 heads gone, each model made by itself."""
    workspace = load_workspace(spec, prepare(spec))
    unread = unread_windows(workspace.inputs.calibration, 128, workspace.generator("calibration", 0))
    windows = unread[-8192 // unread.shape[1] :]

    def loss(model):
        with torch.no_grad():
            logits = model(windows).logits.double().log_softmax(-1)[:, :-1]
        return float(-logits.gather(2, windows[:, 1:, None]).mean())

    dense, found = loss(workspace.dense), {}
    for heads in range(1, 8):
        pruned = build(workspace, Cell("agency", "fisher", 0, 12.5 * heads))
        assert int((~pruned.keep).sum()) == heads
        rise = loss(pruned.model) - dense
        found[heads] = (100 * math.expm1(pruned.predicted_nats), 100 * math.expm1(rise))
    return found


def within(spec, allowed):
    steps = []
    found = build_within(load_workspace(spec, prepare(spec)), allowed, on_step=steps.append)
    return found, steps


def test_the_first_model_tried_is_the_last_that_is_predicted_to_keep_within_the_loss(spec, every_count):
    predicted = [every_count[heads][0] for heads in range(1, 8)]
    assert predicted == sorted(predicted)
    known = max_loss._Predicted(load_workspace(spec, prepare(spec)))
    assert known.levels == [12.5 * heads for heads in range(1, 8)]
    assert [100 * math.expm1(known.nats(place)) for place in range(7)] == pytest.approx(predicted)
    edges = [0.0, *predicted, 2 * predicted[-1]]
    for heads, (low, high) in enumerate(itertools.pairwise(edges)):
        limit = math.log1p((low + high) / 200)
        assert known.most_within(limit) == heads - 1
        # Asked first, without what has been found out before.
        assert max_loss._Predicted(known._workspace).most_within(limit) == heads - 1


def test_the_model_keeps_within_the_loss_and_those_tried_before_do_not(spec, every_count):
    """Whatever the prediction is worth: what is allowed lies between the measured losses of all numbers of heads."""
    measured = sorted(rise for _, rise in every_count.values() if rise > 0)
    tried = 0
    for allowed in [(low + high) / 2 for low, high in itertools.pairwise(measured)]:
        try:
            found, _ = within(spec, allowed)
        except InputError:
            continue
        *before, last = found.trials
        assert last.measured_percent <= allowed
        assert all(one.measured_percent > allowed for one in before)
        assert [one.heads for one in found.trials] == sorted({one.heads for one in found.trials}, reverse=True)
        assert last.measured_percent == pytest.approx(every_count[last.heads][1], rel=1e-3, abs=1e-4)
        assert int((~found.pruned.keep).sum()) == last.heads
        tried += 1
    assert tried


def test_where_more_is_measured_than_predicted_fewer_heads_go(spec, monkeypatch):
    """Planted: heads are predicted at 1 % each and measured at 2 %: of 4 allowed, 4 are tried, then 4 / 2, which holds."""
    monkeypatch.setattr(max_loss, "_mean_nats", lambda workspace, model, windows: planted(model))

    def planted(model):
        gone = 8 - sum(live_heads(model)) if hasattr(model.config, "kept_heads") else 0
        return math.log1p(0.02 * gone)

    monkeypatch.setattr(
        "pruning_comparison.run.workspace.Workspace.predicted_nats",
        lambda self, iteration, keep: math.log1p(0.01 * int((~keep).sum())),
    )
    found, _ = within(spec, 4.0)
    assert found.trials[0].heads == 4
    assert found.trials[-1].heads == 2
    assert [round(one.measured_percent, 6) for one in found.trials] == [2.0 * one.heads for one in found.trials]
    said = found.in_words(4.0)
    assert said.startswith(
        "--max_loss=4: 2 of 8 heads (25 %) are gone. Perplexity was predicted to rise by 2 % and rose by 4 %, on "
    )
    assert "too many were tried: 4 heads, predicted at 4 %, rose by 8 %" in said
    with pytest.raises(
        InputError, match=r"no head can go for 0\.5 % of perplexity: 1 head alone is predicted to cost 1 %"
    ):
        within(spec, 0.5)
    with pytest.raises(
        InputError, match=r"no head can go for 1\.5 % of perplexity: the fewest tried are 1 head without"
    ):
        within(spec, 1.5)


def test_only_windows_outside_the_sample_are_measured_on():
    available = torch.arange(40).view(10, 4)
    for seed in range(5):
        sample = sample_windows(available, 12, torch.Generator().manual_seed(seed))
        everything = unread_windows(available, 12, torch.Generator().manual_seed(seed))
        assert sorted(row[0] for row in [*sample.tolist(), *everything.tolist()]) == list(range(0, 40, 4))
        assert len(unread_windows(available, 40, torch.Generator().manual_seed(seed))) == 0


def test_without_text_that_nothing_has_read_it_is_refused(folder):
    spec = tiny_spec(folder, pruning_levels=UNKNOWN_LEVELS, variants=("agency",))
    every = prepare(spec).calibration
    spec = tiny_spec(folder, pruning_levels=UNKNOWN_LEVELS, variants=("agency",), calibration_tokens=int(every.numel()))
    with pytest.raises(InputError, match=r"0 windows are left that nothing has read.*Give a longer --calibration_text"):
        build_within(load_workspace(spec, prepare(spec)), 5.0)


def options_of(tmp_path):
    folder = save_tiny_model(tmp_path / "dense")
    texts = write_short_texts(tmp_path / "texts")
    return [
        f"--model_name={folder}", "--device=cpu", "--num_tokens=4", "--max_prompts=1", "--timing_limit_s=0",
        "--eval_tokens=100", "--calibration_tokens=128", "--calibration_window=32", "--threads=1", "--timing_pairs=2",
        *(f"--{name}={value}" for name, value in texts.items()),
    ]  # fmt: skip


def test_the_command_says_what_was_predicted_and_what_was_measured(tmp_path, capsys, monkeypatch):
    options, target = options_of(tmp_path), tmp_path / "kept"
    capsys.readouterr()
    assert cli.main(["prune", *options, "--max-loss=900", f"--output_dir={target}", "--no_measure"]) == 0
    shown = capsys.readouterr()
    said = re.search(
        r"^--max_loss=900: (\d) of 8 heads \([\d.]+ %\) are gone. Perplexity was predicted to rise by (-?[\d.,]+) % and "
        r"rose by (-?[\d.,]+) %, on (\d+) tokens of calibration text that nothing has read",
        shown.out,
        re.MULTILINE,
    )
    assert said is not None, shown.out
    assert shown.out.splitlines()[-1] == f"model: {target}"
    model, _ = load_pruned(target)
    assert sum(live_heads(model)) == 8 - int(said[1])
    made = json.loads((target / "config.json").read_text())["pruning"]
    assert made["max_loss_percent"] == 900.0
    assert float(said[2].replace(",", "")) == pytest.approx(made["predicted_loss_percent"], rel=0.01)
    assert float(said[3].replace(",", "")) == pytest.approx(made["measured_loss_percent"], rel=0.01, abs=1e-3)
    assert made["measured_loss_percent"] <= 900
    assert made["level"] == 12.5 * int(said[1])
    assert "| max_loss_percent | 900.0 |" in (target / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", *options, "--max_loss=900", "--no_measure", "--quiet"]) == 0
    assert capsys.readouterr().out == "model: pruned_models/dense_agency_fisher_max_loss_900\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_loss=0"], "--max_loss: 0.0 must be above 0 and at most 1000 per cent of perplexity. Give a loss such as 5"),
        (["--max_loss=nan"], "--max_loss: nan must be above 0"),
        (["--max_loss=much"], "'much' is not a number"),
        (["--max_loss=5", "--level=30"], "not allowed with argument"),
        ([], "one of the arguments --level/--pruning_level --max_loss --target_speedup --best is required"),
        (["--max_loss=5", "--variant=baseline"], "--max_loss: prices predict what heads cost once the others have adapted, "
         "and baseline does not adapt. Choose --variant from agency, agency-adaptation, agency-always-yes, or give --level"),
        (["--max_loss=5", "--adaptation=bias"], "which --adaptation=bias does not do"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_loaded(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "pruning_comparison.run.workspace.load_model", lambda *a, **k: pytest.fail("a model was loaded")
    )
    assert cli.main(["prune", "--model_name=bundled", f"--output_dir={tmp_path / 'new'}", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_replaces_what_a_file_says_of_either(tmp_path):
    file = tmp_path / "prune.yaml"
    file.write_text("level: 30\n")
    options = cli.parse(["prune", f"--config={file}", "--max_loss=5"])
    assert (options.level, options.max_loss) == (None, 5.0)
    file.write_text("max_loss: 5\n")
    options = cli.parse(["prune", f"--config={file}", "--pruning-level=30"])
    assert (options.level, options.max_loss) == (30.0, None)
    assert cli.parse(["prune", f"--config={file}"]).max_loss == 5.0


def test_from_python_one_of_the_two_is_given(tmp_path):
    loaded = load_model(preview_model(str(save_tiny_model(tmp_path / "dense"))))
    texts = [" ".join(f"{word} {number}" for number in range(60)) for word in ("peace", "war", "law", "trade")]
    given = {"calibration": texts, "calibration_tokens": 64, "calibration_window": 16, "quality_batch_size": 4}
    pruned = prune(loaded.model, loaded.tokenizer, max_loss=900.0, variant="agency", **given)
    made = pruned.config.pruning
    assert made["measured_loss_percent"] <= made["max_loss_percent"] == 900.0
    again = prune(loaded.model, loaded.tokenizer, level=made["level"], variant="agency", **given)
    ids = torch.arange(1, 12).view(1, 11)
    assert torch.equal(pruned(ids).logits, again(ids).logits)
    for both in ({}, {"level": 30, "max_loss": 5}):
        with pytest.raises(InputError, match="prune needs one of level and max_loss"):
            prune(loaded.model, loaded.tokenizer, **both, **given)
