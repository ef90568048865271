"""The whole path on a tiny model: what is measured, kept, continued and repeated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from builders import save_tiny_model, tiny_model, write_short_texts

from pruning_comparison.analysis.estimates import SUMMARY_COLUMNS
from pruning_comparison.errors import InputError, Interrupted
from pruning_comparison.methods import METHODS
from pruning_comparison.report.write import write_results
from pruning_comparison.run import attempts as measuring
from pruning_comparison.run import cell as cells
from pruning_comparison.run import measure_cell
from pruning_comparison.run import workspace as workspaces
from pruning_comparison.run.cell import build
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import Workspace, load_workspace
from pruning_comparison.scoring.entropy import mean_attention_entropy
from pruning_comparison.scoring.scores import HeadScores
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import latest_run, read_manifest
from pruning_comparison.variants import DENSE, VARIANTS

MEASURED = ("tokens_per_second", "_s", "peak_memory_bytes", "_in_proportion")


def small_spec(folder, **changes):
    settings = {
        "model_name": str(folder),
        "pruning_levels": (0, 50),
        "pruning_methods": ("magnitude", "random"),
        "temperatures": (0.0, 1.0),
        "num_tokens": 6,
        "iterations": 2,
        "max_prompts": 2,
        "timing_pairs": 2,
        "timing_limit_s": 0.0,
        "eval_tokens": 500,
        "calibration_tokens": 256,
        "calibration_window": 64,
        "eval_text": str(folder / "texts" / "held_out"),
        "calibration_text": str(folder / "texts" / "calibration"),
    }
    return ComparisonSpec(**{**settings, **changes})


def tables(folder):
    with RunStore(folder) as store:
        return {name: store.table(name) for name in ("cells", "measurements", "heads", "signals", "replies", "texts")}


def test_every_cell_metric_prompt_and_document_is_there(folder, tmp_path):
    spec = small_spec(folder)
    stored = tables(run_comparison(spec, output_dir=tmp_path))
    cells, rows = stored["cells"], stored["measurements"]
    assert len(cells) == len(list(spec.cells())) == 16
    assert (cells["status"] == "done").all()
    assert (cells.loc[cells["level"] == 50, "heads_pruned"] == 4).all()
    assert (cells["achieved_level"] == cells["level"]).all()
    per_cell = rows.groupby(["variant", "method", "iteration", "level"])
    for (variant, _, _, level), cell in per_cell:
        assert len(cell[cell["metric"] == "tokens_per_second"]) == 2 * 2
        if variant == DENSE:  # timed in the turns of level 50, and nothing else
            assert level == 50
            assert set(cell["phase"]) == {"timing"}
            continue
        assert set(
            cell.loc[cell["metric"] == "distinct_2", ["temperature", "prompt"]].itertuples(index=False, name=None)
        ) == {(temperature, prompt) for temperature in (0.0, 1.0) for prompt in (0, 1)}
        assert cell.loc[cell["metric"] == "window_nats", "document"].nunique() == 4
    assert sum(variant == DENSE for variant, *_ in per_cell.groups) == 2 * 2
    assert stored["heads"].groupby(["variant", "method", "iteration", "level"])["kept"].sum().isin([4, 8]).all()
    assert len(stored["texts"]) == 16 * 4


def test_scores_may_see_a_part_of_the_calibration_text_and_adaptation_sees_all_of_it(folder):
    spec = small_spec(folder, score_tokens=100)
    workspace = load_workspace(spec, prepare(spec))
    assert workspace.calibration(1).shape == (4, 64)
    assert torch.equal(workspace.score_windows(1), workspace.calibration(1)[:2])
    scored = mean_attention_entropy(workspace.reference, workspace.calibration(0)[:2], batch_size=8)
    ranking = workspace.ranking("entropy", 0)
    assert torch.equal(ranking.scores.abs(), scored)
    everything = small_spec(folder)
    assert torch.equal(*(load_workspace(s, prepare(s)).calibration(1) for s in (spec, everything)))


def test_a_method_reads_as_much_text_as_its_ranks_need_unless_more_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(METHODS, "entropy", replace(METHODS["entropy"], tokens=100))
    monkeypatch.setattr(workspaces, "IMPORTANCE_TOKENS", 60)
    read = []
    monkeypatch.setattr(
        workspaces,
        "score_heads",
        lambda method, model, windows, settings: (
            read.append((method.name, len(windows))) or HeadScores(torch.ones(2, 4))
        ),
    )
    for score_tokens, of_entropy, of_importance in ((None, 2, 1), (200, 4, 4)):
        spec = small_spec(folder, score_tokens=score_tokens, pruning_methods=("entropy", "magnitude"))
        workspace = load_workspace(spec, prepare(spec, identify=False))
        for _ in range(2):
            assert workspace.ranking("entropy", 0).scores.shape == workspace._importance(0).shape
        # Windows have 64 tokens: two hold 100, one 60, four 200. Nothing is scored twice.
        assert read == [("entropy", of_entropy), ("fisher", of_importance)]
        read.clear()
    spec = small_spec(folder, pruning_methods=("fisher",))
    workspace = load_workspace(spec, prepare(spec, identify=False))
    workspace.ranking("fisher", 0), workspace._importance(0)
    assert read == [("fisher", 4)]  # what ranks heads anyway is not measured on less text


@pytest.mark.usefixtures("no_charts")
def test_agency_adaptation_loses_the_baselines_heads_and_pays_for_adaptation(folder, tmp_path):
    spec = small_spec(folder, variants=("baseline", "agency-adaptation"))
    stored = tables(run_comparison(spec, output_dir=tmp_path))
    heads = stored["heads"].set_index(["method", "iteration", "level", "layer", "head"])
    kept = {variant: heads.loc[heads["variant"] == variant, "kept"] for variant in spec.variants}
    pd.testing.assert_series_equal(kept["baseline"].sort_index(), kept["agency-adaptation"].sort_index())
    cost = stored["measurements"].query("metric == 'adaptation_s'")
    assert set(cost["variant"]) == {"agency-adaptation"}
    assert set(cost["level"]) == {50}
    fingerprints = stored["cells"].set_index(["variant", "method", "iteration", "level"])["fingerprint"]
    assert (fingerprints.xs(0, level="level") == "dense").all()
    assert fingerprints["baseline", "magnitude", 0, 50] == fingerprints["baseline", "magnitude", 1, 50]
    assert fingerprints["baseline", "random", 0, 50] != fingerprints["baseline", "random", 1, 50]
    answered = pd.read_csv(write_results(latest_run(tmp_path), save_outputs=False).with_name("answers.csv"))
    against_dense = {f"{variant} vs dense" for variant in spec.variants}
    assert set(answered["contrast"]) == {"agency-adaptation vs baseline", *against_dense}
    of_pruning = answered["contrast"].isin(against_dense)
    assert set(answered.loc[of_pruning, "kind"]) == {"pruning"}
    assert set(answered.loc[~of_pruning, "kind"]) == {"exploratory"}
    adapted = [fingerprints["agency-adaptation", "magnitude", iteration, 50] for iteration in (0, 1)]
    assert adapted[0] != adapted[1]


def test_variants_that_lack_a_part_of_agency_lack_that_part(folder, monkeypatch):
    asked = {}

    class Recorded(workspaces.NegotiatedTrajectory):
        def __init__(self, *arguments, **settings):
            asked[variant] = settings["everyone_consents"]
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(workspaces, "NegotiatedTrajectory", Recorded)
    spec = small_spec(folder)
    workspace = load_workspace(spec, prepare(spec, identify=False))
    for variant in ("agency", "agency-always-yes", "agency-selection"):
        workspace.negotiated(VARIANTS[variant], "magnitude", 0)
    # Selection goes agency's own way, so nothing is asked anew for it.
    assert asked == {"agency": False, "agency-always-yes": True}


@pytest.mark.usefixtures("no_charts")
def test_what_heads_signalled_and_replied_is_stored(folder, tmp_path):
    """Levels 20 and 50 of 8 heads: 2 and 4 leave, in rounds of 10 % that take 1, 1, 0, 1 and 1."""
    spec = small_spec(
        folder,
        variants=("agency", "agency-always-yes", "agency-selection", "baseline-progressive"),
        pruning_levels=(0, 20, 50),
        pruning_methods=("magnitude",),
        iterations=1,
    )
    stored = tables(run_comparison(spec, output_dir=tmp_path, raise_failures=True))
    replies, signals, cells = stored["replies"], stored["signals"], stored["cells"]
    assert set(replies["variant"]) == {"agency", "agency-always-yes", "agency-selection"}
    at_50 = replies[(replies["variant"] == "agency") & (replies["level"] == 50)]
    gone = at_50[at_50["left_rank"].notna()]
    lost = stored["heads"].query("variant == 'agency' and level == 50 and kept == 0")
    assert sorted(zip(gone["layer"], gone["head"], strict=True)) == sorted(
        zip(lost["layer"], lost["head"], strict=True)
    )
    assert gone.groupby("round_level").size().to_dict() == {10: 1, 20: 1, 40: 1, 50: 1}
    assert set(gone["answer"]) <= {"consented", "overridden"}
    assert (at_50[at_50["left_rank"].isna()]["answer"] == "refused").all()
    assert set(replies.loc[replies["variant"] == "agency-always-yes", "answer"]) == {"consented"}
    states = signals.query("variant == 'agency' and level == 50 and round_level == 50")
    assert (states["state"] == "withdrawn").sum() == 3
    assert (
        states.loc[states["state"] != "withdrawn", ["contribution", "redundancy", "importance"]].notna().all(axis=None)
    )
    # Selection is agency's heads with the original weights; the progressive baseline does not adapt either.
    keys = ["layer", "head", "kept"]
    heads = {
        v: stored["heads"].query(f"variant == '{v}' and level == 50")[keys].to_numpy().tolist() for v in spec.variants
    }
    assert heads["agency"] == heads["agency-selection"]
    rows = stored["measurements"].query("level == 50")
    assert set(rows.loc[rows["metric"] == "adaptation_s", "variant"]) == {
        "agency",
        "agency-always-yes",
    }
    assert set(rows.loc[rows["metric"] == "negotiation_s", "variant"]) == set(replies["variant"])
    predicted = rows[rows["metric"] == "predicted_perplexity_ratio"].set_index("variant")["value"]
    assert set(predicted.index) == {"agency", "agency-always-yes"}
    # What was paid for the heads of all rounds is what their going is predicted to cost.
    paid = at_50.groupby("variant")["left_cost"].sum()
    assert predicted["agency"] == pytest.approx(math.exp(paid["agency"]), rel=1e-6)
    prints = cells.query("level == 50").set_index("variant")["fingerprint"]
    assert prints["agency"] != prints["agency-selection"]
    report = write_results(latest_run(tmp_path), save_outputs=False)
    for name, table in (("signals", signals), ("replies", replies)):
        assert len(pd.read_csv(report.with_name(f"{name}.csv"))) == len(table)


def test_what_prices_predict_is_told_of_models_that_adapt_and_have_prices(folder):
    """obs has prices in any variant; with another method only those whose heads are asked."""
    spec = small_spec(folder, pruning_methods=("obs", "magnitude"))
    workspace = load_workspace(spec, prepare(spec, identify=False))
    prices = workspace.priced(0).prices
    told = set()
    for variant in VARIANTS:
        for method in spec.pruning_methods:
            pruned = build(workspace, Cell(variant, method, 0, 50.0))
            if pruned.predicted_nats is not None:
                told.add((variant, method))
                assert pruned.predicted_nats == pytest.approx(prices.total(~pruned.keep))
            assert build(workspace, Cell(variant, method, 0, 0.0)).predicted_nats is None
    asked = ("agency", "agency-always-yes")
    assert told == {("agency-adaptation", "obs"), *((variant, m) for variant in asked for m in spec.pruning_methods)}
    heads = {name: build(workspace, Cell(name, "obs", 0, 50.0)).keep for name in VARIANTS}
    assert all(torch.equal(heads[name], heads["baseline"]) for name in VARIANTS if name != "baseline-progressive")


def test_every_window_says_how_far_the_model_is_from_the_dense_one(folder, tmp_path):
    spec = small_spec(folder, pruning_methods=("magnitude",), iterations=1)
    rows = tables(run_comparison(spec, output_dir=tmp_path, raise_failures=True))["measurements"]
    found = rows[rows["metric"] == "window_kl_nats"].set_index(["variant", "level", "document", "window"])["value"]
    assert (found.xs(0, level="level") == 0).all()
    workspace = load_workspace(spec, prepare(spec))
    for variant in spec.variants:
        model = build(workspace, Cell(variant, "magnitude", 0, 50.0)).model
        for window in workspace.inputs.windows:
            logits = [m(window.ids[None]).logits[0, -window.targets - 1 : -1] for m in (workspace.dense, model)]
            p, q = (one.double().softmax(-1) for one in logits)
            by_hand = float((p * (p / q).log()).sum())
            assert found[variant, 50, window.document, window.index] == pytest.approx(by_hand, rel=1e-3)
            assert by_hand > 0


def test_nothing_is_done_twice(folder, tmp_path, monkeypatch):
    """Two methods, two iterations, two levels, two temperatures, two variants of which one adapts."""
    counts = {"streams": 0, "perplexity": 0, "timing": 0, "rankings": []}
    stream, perplexity, timing, scores = (
        workspaces.DenseStream,
        measure_cell.measure_perplexity,
        measure_cell.time_generation,
        workspaces.score_heads,
    )

    def counted(what, function):
        def wrapper(*arguments, **more):
            counts[what] += 1
            return function(*arguments, **more)

        return wrapper

    def counted_scores(method, *arguments, **more):
        counts["rankings"].append(method.name)
        return scores(method, *arguments, **more)

    monkeypatch.setattr(workspaces, "DenseStream", counted("streams", stream))
    monkeypatch.setattr(measure_cell, "measure_perplexity", counted("perplexity", perplexity))
    monkeypatch.setattr(measure_cell, "time_generation", counted("timing", timing))
    monkeypatch.setattr(workspaces, "score_heads", counted_scores)
    spec = small_spec(folder, variants=("baseline", "agency-adaptation"))
    run_comparison(spec, output_dir=tmp_path, raise_failures=True)
    # One dense stream per iteration, whatever the method. Perplexity once for the dense model; at level 50 once for the
    # baseline by magnitude, which no iteration changes, twice by random, and for each of the four adapted models. Timings
    # twice per method, iteration, level and batch of one prompt, at one temperature. Scores once per method and iteration.
    assert counts["streams"] == 2
    assert counts["perplexity"] == 1 + 1 + 2 + 4
    assert counts["timing"] == 2 * (2 * 2 * 2 * 2)
    assert sorted(counts["rankings"]) == ["magnitude", "random", "random"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_variants_share_the_memory_of_what_pruning_leaves_alone(folder, precision):
    spec = small_spec(folder, variants=("baseline", "agency-adaptation"), precision=precision, adaptation="refit")
    workspace = load_workspace(spec, prepare(spec))
    plain, adapted = (build(workspace, Cell(variant, "magnitude", 0, 50)).model for variant in spec.variants)
    of_dense = {name: parameter.data_ptr() for name, parameter in workspace.dense.named_parameters()}
    untouched = [name for name in of_dense if ".attn." not in name and ".ln_1." not in name]
    assert len(untouched) > 10
    for model in (plain, adapted):
        pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        assert {name: pointers[name] for name in untouched} == {name: of_dense[name] for name in untouched}


def test_key_value_groups_are_pruned_as_a_whole_in_every_variant(tmp_path):
    """Two layers of 3 groups of 2 heads: 30 and 60 per cent are round(1.8) = 2 and round(3.6) = 4 of the 6 groups."""
    folder = save_tiny_model(
        tmp_path / "model", model=tiny_model("qwen2", layers=2, vocab_size=257, max_position_embeddings=128)
    )
    texts = write_short_texts(tmp_path / "texts")
    spec = small_spec(
        folder,
        prune_unit="kv_group",
        variants=tuple(VARIANTS),
        pruning_levels=(0, 30, 60),
        pruning_methods=("entropy",),
        iterations=1,
        calibration_window=32,
        eval_window=32,
        eval_stride=32,
        **texts,
    )
    stored = tables(run_comparison(spec, output_dir=tmp_path / "runs", raise_failures=True))
    cells = stored["cells"]
    assert cells.groupby("level")["heads_pruned"].unique().map(list).to_dict() == {0: [0], 30: [4], 60: [8]}
    assert cells.loc[cells["level"] == 60, "achieved_level"].tolist() == pytest.approx([100 * 8 / 12] * len(VARIANTS))
    heads = stored["heads"].assign(group=lambda table: table["head"] // 2)
    kept = heads.groupby(["variant", "level", "layer", "group"])["kept"].sum()
    assert set(kept) == {0, 2}
    # The keys and values of lost groups leave the cache: 2 of 6 groups are left at level 60.
    rows = stored["measurements"].query(
        "metric == 'cache_bytes' and variant == 'baseline' and repeat == 0 and prompt == 0"
    )
    sizes = rows.set_index("level")["value"]
    assert sizes[60] * 3 == sizes[0]
    # By hand: entropies of the dense model, the direction that was chosen, sums over groups of two.
    workspace = load_workspace(spec, prepare(spec))
    ranking = workspace.ranking("entropy", 0)
    order = ranking.scores.view(2, 3, 2).sum(2).flatten().argsort().tolist()
    gone = heads.query("variant == 'baseline' and level == 30 and kept == 0")
    assert set(gone["layer"] * 3 + gone["group"]) == set(order[:2])


def test_recovery_trains_every_variant_alike(folder, tmp_path):
    spec = small_spec(
        folder,
        pruning_methods=("magnitude",),
        variants=("baseline", "agency-adaptation"),
        recovery_steps=3,
        iterations=1,
    )
    rows = tables(run_comparison(spec, output_dir=tmp_path, raise_failures=True))["measurements"]
    tokens = rows[rows["metric"] == "recovery_tokens"].set_index(["variant", "level"])["value"].to_dict()
    # 3 steps of 8 windows of 64 tokens; nothing to recover at level 0.
    assert tokens == {("agency-adaptation", 50): 1536, ("baseline", 50): 1536}
    workspaces = [load_workspace(s, prepare(s)) for s in (spec, small_spec(folder))]
    cell = Cell("baseline", "magnitude", 0, 50.0)
    recovered, plain = (build(workspace, cell) for workspace in workspaces)
    assert torch.equal(recovered.keep, plain.keep)
    assert recovered.fingerprint != plain.fingerprint


def test_recovery_and_choices_read_what_nothing_else_has_read(folder):
    """Every window is in one of the three parts, as often as it is in the text, and none in the evaluation text."""
    spec = small_spec(folder, recovery_steps=3)
    workspace = load_workspace(spec, prepare(spec))
    evaluation = [window.ids.tolist() for window in workspace.inputs.windows]
    for iteration in range(2):
        parts = [
            part(iteration).tolist() for part in (workspace.calibration, workspace.recovery_windows, workspace.held_out)
        ]
        read = [window for part in parts for window in part]
        assert sorted(read) == sorted(workspace.inputs.calibration.tolist())
        assert [len(parts[0]), len(parts[2])] == [256 // 64, 2048 // 64]
        assert not [window for window in read if window in evaluation]


def test_recovery_without_text_of_its_own_is_refused(folder):
    spec = small_spec(folder)
    windows = len(prepare(spec).calibration)
    with pytest.raises(InputError, match=r"--recovery_steps: .* leave none of the calibration text"):
        prepare(small_spec(folder, recovery_steps=1, calibration_tokens=64 * (windows - 1)))


def test_a_recovery_that_was_interrupted_goes_on_in_the_same_run(folder, tmp_path, monkeypatch):
    """Six steps, stopped in the fourth of the first model that is trained; what is then measured is the same."""
    settings = {"pruning_methods": ("magnitude",), "variants": ("baseline",), "iterations": 1, "recovery_steps": 6}
    spec = small_spec(folder, **settings, recovery_rate="auto")
    whole = tables(run_comparison(spec, output_dir=tmp_path / "whole", raise_failures=True))
    steps = []
    recover = cells.recover

    def stopping(*arguments, **more):
        def count(step):
            steps.append(step)
            if len(steps) == 4:
                raise KeyboardInterrupt

        return recover(*arguments, **more, checkpoint_every_s=0.0, on_step=count)

    monkeypatch.setattr(cells, "recover", stopping)
    with pytest.raises(Interrupted) as stopped:
        run_comparison(spec, output_dir=tmp_path / "parts", raise_failures=True)
    assert (stopped.value.folder / "recovery" / "baseline_magnitude_0_50.safetensors").is_file()
    again = run_comparison(spec, output_dir=tmp_path / "parts", raise_failures=True)
    assert again == stopped.value.folder
    assert len(steps) == 18  # three rates, and no step twice
    assert not (again / "recovery").exists()
    parts = tables(again)
    (chosen,) = [json.loads(row)["recovery"] for row in whole["cells"].query("level == 50")["details"]]
    assert len(chosen["trials"]) == 3
    for name in ("window_nats", "window_kl_nats", "recovery_learning_rate", "held_out_perplexity"):
        rows = [stored["measurements"] for stored in (whole, parts)]
        one, other = (table.loc[table["metric"] == name, "value"].tolist() for table in rows)
        assert one == other
        assert one


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_level_zero_is_the_original_model(folder, execution):
    spec = small_spec(folder, execution=execution)
    workspace = load_workspace(spec, prepare(spec))
    ids = torch.tensor([[5, 6, 7, 8]])
    for variant in ("baseline", "agency"):
        model = build(workspace, Cell(variant, "magnitude", 0, 0.0)).model
        assert torch.equal(model(ids).logits, workspace.reference(ids).logits)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_executions_agree_for_both_variants(folder, scope):
    ids = torch.tensor([[5, 6, 7, 8]])
    logits: dict[str, list[torch.Tensor]] = {}
    for execution in ("compact", "masked"):
        spec = small_spec(folder, execution=execution, scope=scope)
        workspace = load_workspace(spec, prepare(spec))
        logits[execution] = [
            build(workspace, Cell(variant, "random", 0, 50.0)).model(ids).logits for variant in ("baseline", "agency")
        ]
    torch.testing.assert_close(logits["compact"], logits["masked"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["compact"][0], logits["compact"][1], atol=1e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_other_precisions_measure_a_converted_model(folder, precision):
    spec = small_spec(folder, precision=precision)
    workspace = load_workspace(spec, prepare(spec))
    pruned = build(workspace, Cell("agency", "random", 0, 50.0))
    assert pruned.model.dtype == getattr(torch, precision)
    assert workspace.reference.dtype == torch.float32
    exact = build(load_workspace(small_spec(folder), prepare(spec)), Cell("agency", "random", 0, 50.0)).model
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(pruned.model(ids).logits.float(), exact(ids).logits, rtol=0.1, atol=0.5)


def test_same_spec_same_results(folder, tmp_path):
    runs = [tables(run_comparison(small_spec(folder), output_dir=tmp_path / str(i))) for i in range(2)]
    for name, first in runs[0].items():
        second = runs[1][name]
        if name == "measurements":
            first, second = (
                t[~t["metric"].str.endswith(MEASURED) & (t["metric"] != "tokens_per_second")] for t in (first, second)
            )
        pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True))


def test_other_seed_other_texts(folder, tmp_path):
    texts = [
        tables(run_comparison(small_spec(folder, seed=seed), output_dir=tmp_path / str(seed)))["texts"]["text"].tolist()
        for seed in (0, 1)
    ]
    assert texts[0] != texts[1]


@pytest.mark.usefixtures("no_charts")
def test_an_interrupted_run_keeps_finished_cells_and_continues(folder, tmp_path, monkeypatch):
    spec, whole = small_spec(folder), tables(run_comparison(small_spec(folder), output_dir=tmp_path / "whole"))
    measured: list[Cell] = []
    original = measuring.run_cell

    def counting(workspace: Workspace, cell: Cell):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(cell)
        return original(workspace, cell)

    monkeypatch.setattr(measuring, "run_cell", counting)
    with pytest.raises(Interrupted, match="same command continues") as stopped:
        run_comparison(spec, output_dir=tmp_path / "cut")
    folder_cut = stopped.value.folder
    assert len(tables(folder_cut)["cells"]) == 5
    assert write_results(folder_cut, save_outputs=False).is_file()
    assert read_manifest(folder_cut).finished is None
    monkeypatch.setattr(measuring, "run_cell", original)
    repeated: list[Cell] = []
    monkeypatch.setattr(measuring, "run_cell", lambda w, cell: (repeated.append(cell), original(w, cell))[1])
    assert run_comparison(spec, output_dir=tmp_path / "cut") == folder_cut
    assert not set(repeated) & set(measured)
    assert len(repeated) + len(measured) == 16
    assert read_manifest(folder_cut).finished is not None
    pd.testing.assert_frame_equal(tables(folder_cut)["texts"], whole["texts"])
    pd.testing.assert_frame_equal(tables(folder_cut)["heads"], whole["heads"])
    assert latest_run(tmp_path / "cut") == folder_cut.resolve()
    assert run_comparison(spec, output_dir=tmp_path / "cut") != folder_cut


def test_a_changed_spec_starts_a_new_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "run_cell", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    runs = set()
    for changes in ({}, {"seed": 3}):
        with pytest.raises(Interrupted) as stopped:
            run_comparison(small_spec(folder, **changes), output_dir=tmp_path)
        runs.add(stopped.value.folder)
    assert len(runs) == 2


@pytest.mark.usefixtures("no_charts")
def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(folder, tmp_path, monkeypatch):
    original = measuring.run_cell

    def failing(workspace, cell):
        if cell == Cell("agency", "random", 1, 50.0):
            raise torch.OutOfMemoryError("no room")
        return original(workspace, cell)

    monkeypatch.setattr(measuring, "run_cell", failing)
    run = run_comparison(small_spec(folder), output_dir=tmp_path)
    cells = tables(run)["cells"]
    failed = cells[cells["status"] == "failed"]
    assert failed[["variant", "method", "iteration", "level"]].to_numpy().tolist() == [["agency", "random", 1, 50.0]]
    assert "no room" in failed["reason"].item()
    assert len(cells) == 16
    assert "no room" in write_results(run, save_outputs=False).read_text("utf-8")


def test_the_results_files_are_complete_and_agree(folder, tmp_path):
    run = run_comparison(small_spec(folder, memory_logging=True), output_dir=tmp_path)
    write_results(run, save_outputs=True)
    summary = pd.read_csv(run / "summary.csv")
    assert list(summary.columns) == list(SUMMARY_COLUMNS)
    assert (summary["n"] >= 1).all()
    document = json.loads((run / "results.json").read_text())
    assert len(document["summary"]) == len(summary)
    for metric in ("perplexity", "bits_per_byte", "tokens_per_second", "first_token_latency_s", "parameter_bytes"):
        levels = summary[summary["metric"] == metric].groupby(["variant", "method"])["level"].nunique()
        assert (levels == 2).all(), metric
        assert len(levels) == 4, metric
    bytes_left = summary[summary["metric"] == "parameter_bytes"].groupby("level")["estimate"].first()
    # 4 of 8 heads of size 8 at width 32: per head 3 * 32 * 8 + 3 * 8 + 8 * 32 parameters of 4 bytes.
    assert bytes_left[0] - bytes_left[50] == 4 * (3 * 32 * 8 + 3 * 8 + 8 * 32) * 4
    manifest = read_manifest(run)
    assert manifest.spec["num_tokens"] == 6
    assert manifest.versions["transformers"]
    charts = {path.name for path in (run / "charts").iterdir()} - {"drawn.json"}
    assert {Path(name).suffix for name in charts} == {".png", ".svg"}
    assert {Path(name).stem for name in charts if name.endswith(".png")} == {
        Path(name).stem for name in charts if name.endswith(".svg")
    }
    assert {"perplexity_over_levels.png", "radar.svg"} <= charts


def test_timing_rows_add_up(folder, tmp_path):
    rows = tables(run_comparison(small_spec(folder), output_dir=tmp_path))["measurements"]
    timing = rows[rows["phase"] == "timing"]
    keys = ["variant", "method", "iteration", "level", "prompt", "repeat"]
    wide = timing.pivot_table(index=keys, columns="metric", values="value")
    total = wide["first_token_latency_s"] + 5 * wide["time_per_output_token_s"]
    pd.testing.assert_series_equal(wide["end_to_end_s"], total, check_names=False)
    pd.testing.assert_series_equal(wide["tokens_per_second"], 6 / wide["end_to_end_s"], check_names=False)


def test_calibrating_on_what_is_evaluated_is_refused(folder):
    with pytest.raises(InputError, match="evaluated"):
        prepare(small_spec(folder, calibration_text=str(folder / "texts" / "held_out")))


def test_spec_round_trip_and_hash(folder):
    spec = small_spec(folder)
    assert ComparisonSpec.from_dict(spec.as_dict()) == spec
    inputs = {"prompts": "a"}
    assert spec.content_hash(inputs) == small_spec(folder).content_hash(inputs)
    assert spec.content_hash(inputs) != small_spec(folder, seed=1).content_hash(inputs)
    assert spec.content_hash(inputs) != spec.content_hash({"prompts": "b"})
    assert spec.content_hash(inputs) == small_spec(folder, eval_text="/elsewhere").content_hash(inputs)
    with pytest.raises(InputError, match="does not know"):
        ComparisonSpec.from_dict({"colour": "red"})
