"""Layer times: how they are measured, and that a run measures them once, whoever goes on with it."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch
from builders import cut_off_after, save_tiny_model, tiny_gpt2, tiny_model, tiny_spec, unmeasured, write_short_texts

from pruning_comparison.errors import InputError
from pruning_comparison.measure.generation import Timing
from pruning_comparison.models.heads import HeadGrid, head_grid, kept_heads
from pruning_comparison.pruning import remove_heads
from pruning_comparison.report.write import write_results
from pruning_comparison.run import layer_times, workspace
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.layer_times import even_mask, measure_layer_times, needs_layer_times
from pruning_comparison.run.one_model import build_one
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.store.journal import RunStore

EMPTYING = {0: 1.0, 1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0}
EVENLY = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}


def timed(spec, **changes):
    return tiny_spec(spec, consent="time", pruning_levels=(0, 25, 50), **changes)


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the measurement: it gives one table after the other, and says how many it has given."""
    tables, given = [EMPTYING, EVENLY, EMPTYING], []

    def measure(*arguments, **settings):
        given.append(tables[len(given)])
        return given[-1]

    monkeypatch.setattr(workspace, "measure_layer_times", measure)
    return given


def heads_of(run, method="magnitude"):
    """Heads that agency has kept per layer at every level."""
    with RunStore(run) as store:
        table = store.table("heads")
    table = table[(table["variant"] == "agency") & (table["method"] == method)]
    return table.groupby(["level", "layer"])["kept"].sum().unstack("layer").to_dict("index")


def test_heads_are_spread_over_key_value_heads_and_groups_stay_whole():
    grid = HeadGrid(n_layers=2, n_heads=6, head_size=8, n_kv_heads=3)
    kept = {count: even_mask(grid, count)[0].nonzero().squeeze(1).tolist() for count in range(7)}
    assert kept == {0: [], 1: [0], 2: [0, 2], 3: [0, 2, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 3, 4], 6: [*range(6)]}
    assert even_mask(grid, 4, 2).tolist() == [[True, True, True, True, False, False]] * 2
    wide = HeadGrid(2, 9, 8, 3)
    kept = {count: even_mask(wide, count, rectangle=3)[0].nonzero().squeeze(1).tolist() for count in (0, 2, 3, 4, 6)}
    # One head of each group while that is enough; 4 as 2 groups of 2, 6 as 3 groups of 2.
    assert kept == {0: [], 2: [0, 3], 3: [0, 3, 6], 4: [0, 1, 3, 4], 6: [0, 1, 3, 4, 6, 7]}


def test_times_are_the_dense_models_times_the_median_ratio_of_turns(monkeypatch):
    """Two layers of two heads. The dense steps take 8, 4 and 6 s; with a head each 4, 4 and 3 s: ratios 1/2, 1 and 1/2."""
    asked = []

    def steps(models, prompts, num_tokens, **settings):
        name = int(models["pruned"].sum(1)[0])
        asked.append((name, [list(prompt) for prompt in prompts]))
        taken = {"dense": (8.0, 4.0, 6.0), "pruned": {1: (4.0, 4.0, 3.0), 0: (2.0, 1.0, 0.6)}[name]}
        return [
            Timing(variant, repeat, 1.0, 1.0, seconds, 1.0, 0, None, None)
            for variant, times in taken.items()
            for repeat, seconds in enumerate(times)
        ]

    monkeypatch.setattr(layer_times, "time_generation", steps)
    grid = HeadGrid(n_layers=2, n_heads=2, head_size=4, n_kv_heads=2)
    found = measure_layer_times(None, lambda keep: keep, grid, [5, 6], batch_size=3)
    # The dense model's median is 6 s, 3 s a layer; with none 0.25 of it (of 0.25, 0.25 and 0.1).
    assert found == {0: 0.75, 1: 1.5, 2: 3.0}
    assert asked == [(0, [[5, 6]] * 3), (1, [[5, 6]] * 3)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_count_of_heads_is_timed_on_a_real_model(family):
    dense = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    grid, made = head_grid(dense.config), []

    def pruned(keep):
        made.append(remove_heads(dense, keep))
        return made[-1]

    found = measure_layer_times(dense, pruned, grid, [1, 2, 3])
    assert list(found) == list(range(grid.n_heads + 1))
    assert all(seconds > 0 for seconds in found.values())
    counts = [{int(row.sum()) for row in kept_heads(one.config)} for one in made]
    assert counts == [{count} for count in range(grid.n_heads)]
    if grid.group_size > 1:
        groups = measure_layer_times(dense, pruned, grid, [1, 2, 3], group_size=grid.group_size)
        assert list(groups) == list(range(0, grid.n_heads + 1, grid.group_size))


def test_they_are_needed_only_where_heads_are_held_by_them(folder):
    assert needs_layer_times(timed(folder))
    assert not needs_layer_times(tiny_spec(folder))
    assert not needs_layer_times(tiny_spec(folder, consent="cache"))
    assert not needs_layer_times(timed(folder, variants=("baseline", "agency-adaptation", "agency-always-yes")))


def test_an_unknown_rule_of_consent_is_refused(folder):
    with pytest.raises(InputError, match=r"--consent: 'speed' is unknown. Choose from quality, time, cache"):
        tiny_spec(folder, consent="speed")


def test_a_run_measures_them_once_and_continues_with_them(folder, tmp_path, clock):
    """Times by which only an empty layer is faster: at 50 % of two layers one is empty. Others would choose other heads."""
    whole = run_comparison(timed(folder), output_dir=tmp_path / "whole")
    assert heads_of(whole)[50.0] in ({0: 0, 1: 4}, {0: 4, 1: 0})
    assert len(clock) == 1
    with RunStore(whole) as store:
        assert store.layer_times_s() == EMPTYING
    clock.clear()
    with cut_off_after(3):
        run_comparison(timed(folder), output_dir=tmp_path / "cut")
    assert len(clock) == 1
    run = run_comparison(timed(folder), output_dir=tmp_path / "cut")
    assert len(clock) == 1
    assert unmeasured(run) == unmeasured(whole)


def test_cells_are_taken_over_with_their_layer_times_and_never_from_others(folder, tmp_path, clock):
    small = run_comparison(timed(folder), output_dir=tmp_path)
    grown = run_comparison(timed(folder, pruning_methods=("magnitude", "random")), output_dir=tmp_path)
    assert len(clock) == 1
    with RunStore(grown) as store:
        assert store.layer_times_s() == EMPTYING
    # A new run of its own has other times; what a third needs of both, it takes from one of them alone.
    other = run_comparison(timed(folder, pruning_methods=("fisher",)), output_dir=tmp_path / "other", fresh=True)
    assert len(clock) == 2
    other.rename(small.parent / "run_99999999_000000")
    third = run_comparison(timed(folder, pruning_methods=("magnitude", "fisher")), output_dir=tmp_path)
    assert len(clock) == 2
    with RunStore(third) as store:
        assert store.layer_times_s() == EVENLY  # those of the newest run it took from
    whole = load_workspace(timed(folder, pruning_methods=("magnitude",)), prepare(timed(folder)), layer_times_s=EVENLY)
    keep = whole.trajectory(workspace.VARIANTS["agency"], "magnitude", 0).at(50.0).keep
    assert list(heads_of(third)[50.0].values()) == keep.sum(1).tolist()


def test_a_run_never_gets_other_layer_times(folder, tmp_path, clock):
    run = run_comparison(timed(folder), output_dir=tmp_path)
    with RunStore(run, lock=True) as store:
        store.write_layer_times(EMPTYING)
        with pytest.raises(ValueError, match="has layer times already"):
            store.write_layer_times(EVENLY)


def test_one_model_to_keep_is_pruned_by_them_as_well(folder, clock):
    spec = tiny_spec(folder, consent="time", variants=("agency",), pruning_levels=(50,))
    pruned = build_one(load_workspace(spec, prepare(spec)))
    assert sorted(pruned.keep.sum(1).tolist()) == [0, 4]
    assert pruned.model.config.pruning["consent"] == "time"
    plain = build_one(load_workspace(tiny_spec(folder, variants=("agency",)), prepare(spec)))
    assert "consent" not in plain.model.config.pruning


def test_a_key_value_head_leaves_the_cache_as_a_whole(tmp_path):
    """Two query heads per key-value head: at every level as many key-value heads have gone as the heads allow."""
    folder = save_tiny_model(tmp_path, model=tiny_model("llama", vocab_size=257, max_position_embeddings=128))
    write_short_texts(folder / "texts")
    grid = head_grid(tiny_model("llama").config)
    spec = tiny_spec(folder, consent="cache", variants=("agency",), pruning_levels=(50,))
    keep = build_one(load_workspace(spec, prepare(spec))).keep
    live = keep.view(grid.n_layers, grid.n_kv_heads, grid.group_size).any(2)
    assert int((~live).sum()) == int((~keep).sum()) // grid.group_size


def test_everyone_who_consents_anyway_is_not_held_by_anything(folder, clock):
    def keep(rule):
        spec = tiny_spec(folder, consent=rule, variants=("agency-always-yes",))
        return build_one(load_workspace(spec, prepare(spec))).keep

    assert torch.equal(keep("time"), keep("quality"))
    assert not clock


def test_the_report_shows_fronts_layer_times_and_what_heads_were_held_by(folder, tmp_path, clock, no_charts):
    run = run_comparison(timed(folder), output_dir=tmp_path)
    page = write_results(run, save_outputs=False).read_text("utf-8")
    assert "What speed and memory cost" in page
    assert "Layer times by heads of a layer" in page
    assert re.search(r'<th scope="row">consent</th><td><bdi>time</bdi></td>', page)
    assert pd.read_csv(run / "layer_times.csv").to_dict("list") == {
        "heads": [*EMPTYING],
        "seconds": [*EMPTYING.values()],
    }
    points = pd.read_csv(run / "fronts.csv")
    assert points["variant"].tolist() == ["dense", "agency", "agency", "baseline", "baseline"]
    assert points["level"].tolist() == [0, 25, 50, 25, 50]
    # 8 heads of 8 numbers of 4 bytes, keys and values of 1,000 tokens, of which a quarter and a half go.
    assert points["cache_bytes"].tolist() == [512_000, 384_000, 256_000, 384_000, 256_000]
    assert points["on_cache_front"].iloc[0]
