"""Which forms a pruned model can have is known before any work, and one that fails takes no other along."""

from __future__ import annotations

import itertools

import pytest
import torch
from builders import save_tiny_model, tiny_gpt2, tiny_model, tiny_spec, write_short_texts

from pruning_comparison import cli
from pruning_comparison.checkpoint import forms
from pruning_comparison.checkpoint.forms import forms_ruled_out, forms_that_hold
from pruning_comparison.pruning import expected_heads_pruned, remove_heads
from pruning_comparison.pruning.rectangles import is_rectangle
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.store.journal import RunStore


def test_the_documented_command_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    """GPT-2's constructor refuses a width that is no multiple of the heads; that used to be found at the very end."""
    monkeypatch.setattr("pruning_comparison.run.workspace.load_model", lambda *a, **k: pytest.fail("weights were read"))
    options = [
        "--level=25",
        "--scope=layer",
        "--no_new_bias",
        "--also=plain,padded",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert cli.main(["prune", "--model_name=bundled", *options]) == 2
    said = capsys.readouterr().err
    assert "--also: the plain form is not possible" in said
    assert "Nothing has been pruned yet" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("level", [17, 34, 50])
@pytest.mark.parametrize(
    ("family", "group_size", "rectangle"),
    [
        *(("gpt2", 1, None), ("llama", 1, None), ("llama with biases, not grouped", 1, None), ("qwen2", 1, None)),
        *(("opt", 1, None), ("gpt_neox", 1, None), ("llama", 3, None), ("qwen2", 2, None)),
        *(("llama", 1, 3), ("qwen2", 1, 2)),
    ],
)
def test_what_is_ruled_out_before_is_what_fails_after(family, group_size, rectangle, level):
    """By brute force: a form that is ruled out holds for no choice of heads in a layer; another holds for one at least.

    Layers that lose other heads than one another hold no form that layers alike do not.
    """
    dense = tiny_model(family, layers=2)
    heads = 6
    if group_size > 1:
        assert heads // dense.config.num_key_value_heads == group_size
    if rectangle is not None:
        assert heads // dense.config.num_key_value_heads == rectangle
    ruled = forms_ruled_out(dense.config, level, scope="layer", group_size=group_size, rectangle=rectangle)
    holds = {"plain": False, "padded": False}
    gone = expected_heads_pruned(level, 1, heads, "layer", group_size, rectangle)
    for leaving in itertools.combinations(range(heads // group_size), gone // group_size):
        keep = torch.ones(2, heads // group_size, dtype=torch.bool)
        keep[:, list(leaving)] = False
        keep = keep.repeat_interleave(group_size, 1)
        if rectangle is not None and not is_rectangle(keep, rectangle):
            continue
        found = forms_that_hold(remove_heads(dense, keep))
        holds = {form: holds[form] or found[form] is None for form in holds}
    assert {form: reason is None for form, reason in ruled.items() if form in holds} == holds


def test_biases_of_adaptation_rule_a_form_out_where_the_family_has_no_name_for_them():
    dense = tiny_model("qwen2", layers=2)
    assert forms_ruled_out(dense.config, 50, scope="layer")["padded"] is None
    reason = forms_ruled_out(dense.config, 50, scope="layer", biases=("attention", "mlp"))["padded"]
    assert "biases that the config of qwen2 cannot name" in reason
    assert forms_ruled_out(tiny_gpt2().config, 50, biases=("attention", "mlp"))["padded"] is None


def test_a_form_that_fails_takes_no_other_along(tmp_path, capsys, monkeypatch):
    folder = save_tiny_model(tmp_path / "dense", model=tiny_model("llama", layers=2, vocab_size=257))
    texts = write_short_texts(tmp_path / "texts")
    stock_form = forms.stock_form

    def failing(model, form):
        if form == "plain":
            raise RuntimeError("no room for it")
        return stock_form(model, form)

    monkeypatch.setattr(forms, "stock_form", failing)
    (tmp_path / "prompts.txt").write_text("Hello\n")
    options = [
        f"--prompt_file={tmp_path / 'prompts.txt'}",
        *("--level=50", "--scope=layer", "--unit=kv_group", "--no_new_bias", "--also=plain,padded", "--no_measure"),
        *(
            "--calibration_tokens=256",
            "--calibration_window=64",
            "--eval_tokens=100",
            "--num_tokens=4",
            "--timing_limit_s=0",
            "--max_prompts=1",
        ),
        *(f"--model_name={folder}", f"--output_dir={tmp_path / 'out'}", "--quiet"),
        *(f"--{name}={text}" for name, text in texts.items()),
    ]
    assert cli.main(["prune", *options]) == 1
    shown = capsys.readouterr()
    assert "error: plain: no room for it" in shown.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "padded" / "model.safetensors").is_file()


def test_a_comparison_goes_on_where_a_model_cannot_be_saved(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model")
    write_short_texts(folder / "texts")

    def refused(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pruning_comparison.run.attempts.save_model", refused)
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path / "out", save_models=True)
    with RunStore(run) as store:
        assert (store.table("cells")["status"] == "done").all()
        assert len(store.finished_timings()) == 2
