"""One pruned model to keep: from Python, from the command line, and from a comparison."""

from __future__ import annotations

import contextlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from builders import save_tiny_model, tiny_model, tiny_spec, write_short_texts

from pruning_comparison import cli
from pruning_comparison.agency.adaptation import adapt
from pruning_comparison.agency.streams import DenseStream
from pruning_comparison.checkpoint.forms import forms_that_hold, load_pruned, stock_form
from pruning_comparison.errors import InputError
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.heads import head_grid, kept_heads, live_heads
from pruning_comparison.pruning.selection import select_heads
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.run.cell import build
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.one_model import build_one, check_forms, prune
from pruning_comparison.run.saved_models import model_folder
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.scoring.weights import score_magnitude
from pruning_comparison.spec import Cell, ComparisonSpec

IDS = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(3))
TEXTS = [" ".join(f"{word} {number}" for number in range(40)) for word in ("peace", "war", "law", "trade")]
SMALL = {"calibration": TEXTS, "calibration_tokens": 64, "calibration_window": 16, "quality_batch_size": 4}


@pytest.fixture
def loaded(tmp_path):
    return load_model(preview_model(str(save_tiny_model(tmp_path / "dense"))))


def test_prune_makes_what_a_comparison_measures(loaded):
    before = loaded.model(IDS).logits
    pruned = prune(loaded.model, loaded.tokenizer, level=50, method="magnitude", variant="baseline", **SMALL)
    keep = select_heads(score_magnitude(loaded.model), 50)
    assert torch.equal(kept_heads(pruned.config), keep)
    assert torch.equal(pruned(IDS).logits, remove_heads(loaded.model, keep)(IDS).logits)
    assert torch.equal(loaded.model(IDS).logits, before)
    made = pruned.config.pruning
    assert (made["level"], made["method"], made["variant"]) == (50, "magnitude", "baseline")
    assert made["adaptation"] == "none"
    with pytest.raises(InputError, match="has been pruned before"):
        prune(pruned, loaded.tokenizer, level=60, **SMALL)


def test_one_model_has_no_signals_measured_and_is_the_one_that_a_comparison_makes(tmp_path, monkeypatch):
    """Signals are recorded by comparisons and change no model."""
    folder = save_tiny_model(tmp_path / "dense")
    write_short_texts(folder / "texts")
    spec = tiny_spec(folder, pruning_levels=(50.0,), variants=("agency",), pruning_methods=("obs",))
    cell = Cell("agency", "obs", 0, 50.0)
    asked = []
    real = Workspace._importance
    monkeypatch.setattr(Workspace, "_importance", lambda self, *key: asked.append(key) or real(self, *key))
    models, records = [], []
    for describes in (True, False):
        asked.clear()
        pruned = build(load_workspace(spec, prepare(spec, identify=False), describes=describes), cell)
        assert bool(asked) == describes
        models.append(pruned.model.state_dict())
        records.append(pruned.round_records)
    assert records[0]
    assert not records[1]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("method", ["wanda", "flap", "fisher-interactions", "fisher-greedy"])
def test_every_new_method_works_in_every_variant(method, loaded):
    for variant in ("baseline", "baseline-progressive", "agency", "agency-selection"):
        pruned = prune(loaded.model, loaded.tokenizer, level=50, method=method, variant=variant, **SMALL)
        assert sum(live_heads(pruned)) == 4
        assert pruned(IDS).logits.isfinite().all()


def test_without_new_biases_a_plain_checkpoint_can_hold_what_adapted(tmp_path):
    """Mistral has no output biases; every layer loses half of its ungrouped heads."""
    dense = tiny_model("mistral", num_key_value_heads=6, vocab_size=257)
    loaded = load_model(preview_model(str(save_tiny_model(tmp_path / "dense", model=dense))))
    options = {"level": 50, "method": "magnitude", "variant": "agency-adaptation", "scope": "layer", **SMALL}
    with_bias = prune(loaded.model, loaded.tokenizer, **options)
    assert "--no_new_bias" in forms_that_hold(with_bias)["plain"]
    assert "--no_new_bias" in forms_that_hold(with_bias)["padded"]
    without = prune(loaded.model, loaded.tokenizer, new_bias=False, **options)
    assert forms_that_hold(without) == {"compact": None, "plain": None, "padded": None, "gguf": None}
    assert not any(name.endswith("bias") for name, _ in without.named_parameters())
    untouched = remove_heads(loaded.model, kept_heads(without.config))
    assert (without(IDS).logits - untouched(IDS).logits).abs().max() > 1e-3


def test_a_half_precision_model_stays_one(loaded):
    model = loaded.model.to(torch.bfloat16)
    pruned = prune(model, loaded.tokenizer, level=25, variant="agency-adaptation", **SMALL)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


def test_settings_that_cannot_work(loaded):
    for settings, message in (
        ({"level": 0}, "--level: 0 must be above 0"),
        ({"level": 1}, "is none. Give at least 6.3"),
        ({"level": 50, "method": "guess"}, "'guess' is unknown"),
        ({"level": 50, "colour": "red"}, "knows no setting 'colour'"),
        ({"level": 50, "execution": "masked"}, "removes nothing"),
        ({"level": 50, "calibration_tokens": 10**6}, "only"),
    ):
        with pytest.raises(InputError, match=message):
            prune(loaded.model, loaded.tokenizer, **{**SMALL, **settings})


def small_options(folder, texts):
    return [
        f"--model-name={folder}",
        "--device=cpu",
        "--num_tokens",
        "4",
        "--max-prompts=1",
        "--timing_limit_s=0",
        "--eval-tokens=100",
        "--calibration_tokens=128",
        "--calibration_window=32",
        "--threads=1",
        "--timing_pairs=2",
        "--timing_limit_s=0",
        *(f"--{name}={value}" for name, value in texts.items()),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--level=1"], "error: --level: 1 per cent of 8 heads is none"),
        (["--level=1", "--scope=layer"], "error: --level: 1 per cent of 4 heads of a layer is none"),
        (["--level=50", "--variant=agencie"], "error: --variant: 'agencie' is unknown. Did you mean agency"),
    ],
)
def test_the_command_names_its_own_options(given, said, tmp_path, capsys):
    options = small_options(save_tiny_model(tmp_path / "dense"), write_short_texts(tmp_path / "texts"))
    capsys.readouterr()
    assert cli.main(["prune", *options, *given, f"--output_dir={tmp_path / 'kept'}", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_the_command_writes_models_and_a_card_with_figures(tmp_path, capsys):
    options = small_options(save_tiny_model(tmp_path / "dense"), write_short_texts(tmp_path / "texts"))
    target = tmp_path / "kept"
    capsys.readouterr()  # what transformers says when the dense model is saved
    argv = ["prune", *options, "--level", "50", "--method=magnitude", "--variant=agency-adaptation", "--quiet"]
    assert cli.main([*argv, f"--output-dir={target}", "--also=padded,plain"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --also: the plain form is not possible: ")
    assert shown.out == ""  # which is known before anything is pruned
    assert not target.exists()
    assert cli.main([*argv, f"--output-dir={target}", "--also=padded"]) == 0
    assert capsys.readouterr().out == f"model: {target}\npadded: {target / 'padded'}\n"
    model, tokenizer = load_pruned(target)
    assert sum(live_heads(model)) == 4
    assert tokenizer("peace").input_ids
    card = (target / "README.md").read_text("utf-8")
    assert "4 of 8 heads (50.0 %)" in card
    row = next(line for line in card.splitlines() if line.startswith("| perplexity"))
    assert all(float(cell.replace(",", "")) > 1 for cell in row.split("|")[2:4])
    assert "| speed (tokens per second) |" in card
    dense = load_model(preview_model(str(tmp_path / "dense"))).model
    sizes = [sum(p.numel() * 4 for p in one.parameters()) for one in (dense, model)]
    assert f"| parameters (bytes) | {sizes[0]:,} | {sizes[1]:,} |" in card
    assert "| seed | 0 |" in card
    assert json.loads((target / "config.json").read_text())["pruning"]["method"] == "magnitude"
    padded = load_model(preview_model(str(target / "padded"))).model
    torch.testing.assert_close(padded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_command_shows_its_progress_and_figures_before_and_after(tmp_path, capsys):
    """Heads leave in rounds of 10 %, so 30 % are three of them. Elsewhere than on a terminal each step has a line."""
    options = small_options(save_tiny_model(tmp_path / "dense"), write_short_texts(tmp_path / "texts"))
    capsys.readouterr()
    target = tmp_path / "kept"
    assert cli.main(["prune", *options, "--level=30", f"--output_dir={target}"]) == 0
    shown = capsys.readouterr()
    steps = re.findall(r"^\[(\d+)/8\] (.*?)(?:, about .* left)?$", shown.err, re.MULTILINE)
    assert steps == [
        ("0", "loading the model"),
        ("1", "pruning to 10 %"),
        ("2", "pruning to 20 %"),
        ("3", "pruning to 30 %"),
        ("4", "measuring the perplexity of the dense model"),
        ("5", "measuring the perplexity of the pruned model"),
        ("6", "measuring speed, both models in turns"),
        ("7", "saving the compact form"),
        ("8", "done"),
    ]
    assert re.search(r"^perplexity, on the evaluation text +[\d.,]+ +[\d.,]+ +[+−][\d.]+ %$", shown.out, re.MULTILINE)
    assert re.search(r"^speed, tokens per second +[\d.,]+ +[\d.,]+ +", shown.out, re.MULTILINE)
    assert re.search(r"^parameters +[\d.]+ kB +[\d.]+ kB +−[\d.]+ %$", shown.out, re.MULTILINE)
    assert shown.out.splitlines()[-1] == f"model: {target}"


def test_without_measuring_neither_prompts_nor_evaluation_text_are_read(tmp_path, capsys):
    options = small_options(save_tiny_model(tmp_path / "dense"), write_short_texts(tmp_path / "texts"))
    capsys.readouterr()
    words = [
        "prune",
        *options,
        "--level=50",
        "--method=magnitude",
        "--variant=baseline",
        "--num_tokens=100000",
        "--quiet",
    ]
    assert cli.main([*words, f"--output_dir={tmp_path / 'measured'}"]) == 2
    assert "--num_tokens" in capsys.readouterr().err
    more = ["--no_measure", "--eval_text=/no/such/text", "--prompt_file=/no/such/file"]
    assert cli.main([*words, *more, f"--output_dir={tmp_path / 'kept'}"]) == 0
    assert sum(live_heads(load_pruned(tmp_path / "kept")[0])) == 4


def test_rounds_that_are_shown_leave_the_model_as_it_is(tmp_path):
    """The same heads and weights as where the trajectory goes to the level at once."""
    folder = save_tiny_model(tmp_path / "dense")
    write_short_texts(folder / "texts")
    spec = tiny_spec(folder, pruning_levels=(35.0,), variants=("agency",), pruning_methods=("fisher",))
    steps = []
    shown = build_one(load_workspace(spec, prepare(spec)), on_step=steps.append)
    at_once = build(load_workspace(spec, prepare(spec)), Cell("agency", "fisher", 0, 35.0))
    assert steps == ["pruning to 10 %", "pruning to 20 %", "pruning to 30 %", "pruning to 35 %"]
    assert shown.fingerprint == at_once.fingerprint
    for name, weights in shown.model.state_dict().items():
        assert torch.equal(weights, at_once.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level=0"], "--level: 0.0 must be above 0 and below 100"),
        (["--level", "100"], "--level: 100.0 must be above 0"),
        (["--level=nan"], "--level: nan"),
        (["--level=much"], "'much' is not a number"),
        ([], "--level"),
        (["--level=50", "--method=guess"], "'guess' is unknown. Choose from entropy"),
        (["--level=50", "--method=fisher,random"], "--method: 'fisher,random' must name exactly one"),
        (["--level=50", "--variant="], "--variant: '' must name exactly one"),
        (["--level=50", "--also=zip"], "--also: 'zip' is unknown. Choose from plain, padded"),
        (["--level=50", "--output-dir=FULL"], "is not an empty folder"),
        (["--level=50", "--iterations=3"], "unrecognized arguments"),
    ],
)
def test_bad_options_exit_2_and_load_nothing(options, message, tmp_path, capsys, monkeypatch):

    monkeypatch.setattr(
        "pruning_comparison.run.workspace.load_model", lambda *a, **k: pytest.fail("a model was loaded")
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    given = [option.replace("FULL", str(tmp_path / "full")) for option in options]
    assert cli.main(["prune", "--model_name=bundled", f"--output_dir={tmp_path / 'new'}", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_comparison_can_keep_its_models(tmp_path):
    texts = write_short_texts(tmp_path / "texts")
    spec = ComparisonSpec(
        model_name=str(save_tiny_model(tmp_path / "dense")),
        pruning_levels=(0, 50),
        pruning_methods=("magnitude",),
        variants=("baseline", "agency-adaptation"),
        iterations=1,
        max_prompts=1,
        num_tokens=4,
        temperatures=(1.0,),
        eval_tokens=100,
        calibration_tokens=128,
        calibration_window=32,
        timing_limit_s=0.0,
        **texts,
    )
    run = run_comparison(spec, output_dir=tmp_path / "out", save_models=True, raise_failures=True)
    names = {path.name for path in (run / "models").iterdir()}
    assert names == {"baseline_magnitude_0_50", "agency-adaptation_magnitude_0_50"}
    cell = Cell("baseline", "magnitude", 0, 50.0)
    dense = load_model(preview_model(spec.model_name)).model
    expected = remove_heads(dense, select_heads(score_magnitude(dense), 50))(IDS).logits
    assert torch.equal(load_pruned(model_folder(run, cell))[0](IDS).logits, expected)
    assert math.isfinite(float(load_pruned(run / "models" / "agency-adaptation_magnitude_0_50")[0](IDS).logits.sum()))
    masked = ComparisonSpec(**{**spec.as_dict_of_tuples(), "execution": "masked"})
    with pytest.raises(InputError, match="--save_models"):
        run_comparison(masked, output_dir=tmp_path / "out", save_models=True)


@pytest.mark.parametrize(("family", "possible"), [("gemma3", True), ("olmo2", True), ("qwen3", False)])
def test_the_default_adaptation_rules_out_the_padded_form_only_where_mlps_get_a_bias(family, possible):
    """An MLP whose output passes through a norm gets none. What is said before any weight is read holds afterwards."""
    model = tiny_model(family)
    preview = SimpleNamespace(config=model.config, grid=head_grid(model.config))
    spec = ComparisonSpec(variants=("agency-adaptation",), pruning_levels=(50.0,))
    assert spec.adaptation == "refit-mlp"
    with contextlib.nullcontext() if possible else pytest.raises(InputError, match="padded form is not possible"):
        check_forms(spec, ["padded"], preview)
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[1, :3] = keep[2, :] = False
    pruned = remove_heads(model, keep)
    adapt(DenseStream(model, torch.randint(1, 97, (6, 20)), batch_size=3), pruned)
    assert (forms_that_hold(pruned)["padded"] is None) == possible
    if possible:
        torch.testing.assert_close(stock_form(pruned, "padded")(IDS).logits, pruned(IDS).logits, rtol=1e-4, atol=1e-4)
