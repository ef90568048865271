"""Whole runs whose layers keep rectangles, on a tiny Llama of 4 key-value groups of 2 query heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import cut_off_after, save_tiny_model, tiny_model, tiny_spec, unmeasured, write_short_texts
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pruning_comparison import cli
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.checkpoint.forms import forms_ruled_out
from pruning_comparison.errors import InputError
from pruning_comparison.models.heads import HeadGrid, attentions
from pruning_comparison.plan.plan import plan_run
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.report.write import write_results
from pruning_comparison.run import cell as cells
from pruning_comparison.run import max_loss
from pruning_comparison.run.cell import build, check_count, choose
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import nothing_pruned, prepare, rectangle_of
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.tables import load_run

LAYERS, HEADS, SIZE = 2, 8, 2
ASKED = ("baseline", "baseline-progressive", "agency", "agency-always-yes")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    model: Any = tiny_model(
        "llama",
        layers=LAYERS,
        width=32,
        vocab_size=257,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // SIZE,
        max_position_embeddings=128,
    )
    folder = save_tiny_model(tmp_path_factory.mktemp("grouped"), model=model)
    write_short_texts(folder / "texts")
    return folder


def rectangular(folder, **changes):
    return tiny_spec(folder, **{"prune_unit": "rectangle", "variants": ASKED, "pruning_levels": (0, 30, 60), **changes})


@pytest.fixture(scope="module")
def run(grouped, tmp_path_factory):
    spec = rectangular(grouped, pruning_methods=("obs", "entropy"))
    return run_comparison(spec, output_dir=tmp_path_factory.mktemp("runs"), raise_failures=True)


def test_every_layer_of_every_variant_keeps_a_rectangle_of_the_levels_number(run):
    """30 and 60 per cent of 16 heads are round(4.8) = 5 and round(9.6) = 10. A layer of 4 groups of 2 loses 0, 2, 4, 5, 6, 7
    or 8, so two of them can lose 5 (5 + 0) and 10 (5 + 5)."""
    table = load_run(run).cells
    assert table.groupby("level")["heads_pruned"].unique().map(list).to_dict() == {0: [0], 30: [5], 60: [10]}
    assert set(table["variant"]) == set(ASKED)
    heads = load_run(run).heads
    live = (
        heads.assign(group=heads["head"] // SIZE)
        .groupby(["variant", "method", "level", "layer", "group"])["kept"]
        .sum()
    )
    for _, counts in live.groupby(["variant", "method", "level", "layer"]):
        assert len(set(counts) - {0}) <= 1


def test_the_cache_shrinks_with_every_key_value_group(run):
    """Bytes of a cell's cache over the dense model's are the key-value heads that are left over 8."""
    stored = load_run(run)
    heads = stored.heads.query("method == 'obs'")
    groups = heads.assign(group=heads["head"] // SIZE).query("kept == 1")
    left = groups.drop_duplicates(["variant", "level", "layer", "group"]).groupby(["variant", "level"]).size()
    rows = stored.measurements.query("metric == 'cache_bytes' and method == 'obs' and repeat == 0 and prompt == 0")
    sizes = rows.set_index(["variant", "level"])["value"]
    for variant in ASKED:
        for level in (30.0, 60.0):
            share = sizes[variant, level] / sizes[variant, 0.0]
            assert share == pytest.approx(left[variant, level] / (LAYERS * HEADS // SIZE))
    assert sizes["baseline", 60.0] < sizes["baseline", 0.0]


def test_what_was_answered_is_recorded_and_reported(run, no_charts):
    replies = load_run(run).replies
    assert set(replies["variant"]) == {"agency", "agency-always-yes"}
    assert (replies["round_level"] == replies["level"]).all()
    obs = replies.query("method == 'obs' or variant == 'agency-always-yes'")
    assert set(obs["answer"]) == {"consented"}
    left = replies[replies["left_cost"].notna()].groupby(["variant", "method", "level"]).size()
    assert left.xs(30.0, level="level").tolist() == [5] * 4
    assert left.xs(60.0, level="level").tolist() == [10] * 4
    write_results(run, save_outputs=False)
    assert (run / "report.html").is_file()


def test_with_the_order_of_prices_everyone_keeps_the_baselines_heads(run):
    heads = load_run(run).heads.query("method == 'obs'")
    kept = heads.sort_values(["layer", "head"]).groupby(["variant", "level"])["kept"].apply(list)
    for level in (30.0, 60.0):
        assert kept["agency", level] == kept["baseline", level] == kept["agency-always-yes", level]


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(grouped, tmp_path):
    spec = rectangular(grouped, pruning_methods=("entropy",))
    whole = run_comparison(spec, output_dir=tmp_path / "whole")
    with cut_off_after(5):
        run_comparison(spec, output_dir=tmp_path / "cut")
    run = run_comparison(spec, output_dir=tmp_path / "cut")
    assert unmeasured(run) == unmeasured(whole)


def test_layers_stay_ordinary_grouped_query_layers(grouped):
    """No index of keys, which uneven groups need, and the family's own numbers, smaller."""
    spec = rectangular(grouped, pruning_methods=("magnitude",))
    workspace = load_workspace(spec, prepare(spec))
    for level in (30.0, 60.0):
        made = build(workspace, Cell("baseline", "magnitude", 0, level))
        live = made.keep.view(LAYERS, -1, SIZE).sum(2)
        for row, attention in zip(live.tolist(), attentions(made.model), strict=True):
            assert not hasattr(attention, "kv_index")
            if any(row):
                assert attention.num_key_value_groups == max(row)
                assert attention.k_proj.out_features == sum(map(bool, row)) * attention.head_dim


def test_a_choice_that_misses_the_number_or_the_shape_raises(grouped, monkeypatch):
    spec = rectangular(grouped, pruning_methods=("magnitude",))
    workspace = load_workspace(spec, prepare(spec))
    keep = choose(workspace, Cell("baseline", "magnitude", 0, 60.0)).keep
    check_count(keep, 60.0, spec, rectangle=SIZE)
    one_more = keep.clone()
    one_more[tuple(one_more.nonzero()[0].tolist())] = False
    with pytest.raises(AssertionError, match=r"level 60.0 prunes 11 heads; the rule asks for 10"):
        check_count(one_more, 60.0, spec, rectangle=SIZE)
    ragged = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    ragged[:, [0, 2, 3, 4, 5]] = False
    with pytest.raises(AssertionError, match="unlike numbers of heads"):
        check_count(ragged, 60.0, spec, rectangle=SIZE)
    monkeypatch.setattr(cells, "heads_to_keep", lambda *given, **more: one_more)
    with pytest.raises(AssertionError, match="the rule asks for 10"):
        build(workspace, Cell("baseline", "magnitude", 0, 60.0))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 1)])
def test_where_every_number_is_a_rectangle_the_unit_is_a_head(heads, kv_heads):
    assert rectangle_of(HeadGrid(2, heads, 4, kv_heads), "rectangle") is None
    assert rectangle_of(HeadGrid(2, 6, 4, 3), "rectangle") == 2
    assert rectangle_of(HeadGrid(2, 6, 4, 3), "kv_group") is None


def test_what_a_head_saves_is_not_asked_where_heads_answer_together(capsys, tmp_path):
    with pytest.raises(InputError, match=r"--consent: 'time' needs heads that answer one by one"):
        ComparisonSpec(prune_unit="rectangle", consent="time")
    argv = ["run", "--model_name=bundled", "--unit=rectangle", "--consent=cache", f"--output_dir={tmp_path / 'runs'}"]
    assert cli.main(argv) == 2
    assert "--unit=rectangle those of a layer answer together" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_least_level_that_is_named_takes_heads_and_a_tenth_less_does_not(grouped):
    """Two layers lose 0, 2, 4, ... of 16: one head is as near to 0 as to 2, and 1.5, rounded, is 2: 9.4 per cent."""
    grid = HeadGrid(LAYERS, HEADS, 4, HEADS // SIZE)
    said = nothing_pruned(rectangular(grouped, pruning_levels=(5,)), grid)
    assert said == (
        "5 per cent of 16 heads, when each layer keeps as many heads of each key-value group of 2, is none. "
        "Give at least 9.4."
    )
    assert expected_heads_pruned(9.4, LAYERS, HEADS, "model", rectangle=SIZE) == 2
    with pytest.raises(InputError, match="is none"):
        prepare(rectangular(grouped, pruning_levels=(5,)), identify=False)


def test_the_plan_counts_what_will_leave(grouped):
    spec = rectangular(grouped)
    levels = plan_run(spec, Margins(), prepare(spec, identify=False))["levels"]
    assert [(level["level"], level["heads_pruned"]) for level in levels] == [(0, 0), (30, 5), (60, 10)]


def test_forms_are_ruled_out_only_where_no_shape_of_the_number_allows_them():
    """4 of 8 heads: 2 groups of 2, or one head of each group; either is an ordinary smaller layer."""
    dense: Any = tiny_model("llama", layers=2, width=32, num_attention_heads=8, num_key_value_heads=4)
    ruled = forms_ruled_out(dense.config, 50, scope="layer", rectangle=2)
    assert ruled == {"compact": None, "plain": None, "padded": None, "gguf": None}
    assert "--unit=rectangle" in forms_ruled_out(dense.config, 50, scope="layer")["gguf"]
    one_group: Any = tiny_model("llama", layers=2, width=32, num_attention_heads=8, num_key_value_heads=1)
    assert forms_ruled_out(one_group.config, 50, scope="layer")["gguf"] is None


def test_the_level_for_a_loss_is_looked_for_among_the_numbers_that_can_leave(grouped):
    spec = rectangular(grouped, variants=("agency",), pruning_methods=("obs",))
    known = max_loss._Predicted(load_workspace(spec, prepare(spec)))
    numbers = [known.heads(place) for place in range(len(known.levels))]
    assert numbers == [2, *range(4, 16)]  # sums of two of 0, 2, 4, 5, 6, 7, 8, without none and all
    nats = [known.nats(place) for place in range(len(numbers))]
    place = known.most_within(nats[5])
    assert nats[place] <= nats[5]


def test_one_model_to_keep_is_a_plain_smaller_one(tmp_path):
    """25 % of each layer's 8 heads: 6 stay, which only 3 groups of 2 can be; Llama's config takes them at a width of 48."""
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // SIZE, "max_position_embeddings": 128}
    folder = save_tiny_model(
        tmp_path / "dense", model=tiny_model("llama", layers=LAYERS, width=48, vocab_size=257, **shape)
    )
    texts = write_short_texts(tmp_path / "texts")
    argv = ["prune", f"--model_name={folder}", "--level=25", "--variant=agency", "--method=obs", "--scope=layer"]
    argv += ["--unit=rectangle", "--also=plain", "--no_new_bias", "--no_measure", "--quiet", "--device=cpu"]
    argv += ["--calibration_tokens=256", "--calibration_window=64", f"--output_dir={tmp_path / 'made'}"]
    assert cli.main([*argv, *(f"--{option}={path}" for option, path in texts.items())]) == 0
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "plain", dtype=torch.float32)
    assert type(plain) is LlamaForCausalLM
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads) == (6, 3)
    assert "| unit | rectangle |" in (tmp_path / "made" / "README.md").read_text()
