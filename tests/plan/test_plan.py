"""The plan counts what a run would measure, by hand-made numbers, and reads no weights for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import noise, run_of, save_tiny_model, write_short_texts

from pruning_comparison import cli
from pruning_comparison.analysis.estimates import observations
from pruning_comparison.analysis.hypotheses import answer_hypotheses
from pruning_comparison.analysis.margins import Margins
from pruning_comparison.analysis.random_effects import fit_crossed
from pruning_comparison.analysis.verdict_rules import decide
from pruning_comparison.errors import ModelLoadError
from pruning_comparison.models import loading, preview_model
from pruning_comparison.plan import memory as memory_plan
from pruning_comparison.plan import plan as planning
from pruning_comparison.plan.forecast import Speeds, expected, passes
from pruning_comparison.plan.memory import ModelSizes, forecast_memory
from pruning_comparison.plan.plan import ASSUMED, assumed_components, plan_run
from pruning_comparison.run.inputs import prepare
from pruning_comparison.spec import ComparisonSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    for name, text in (("eval", "abcdefgh" * 20), ("calibration", "ijklmnop" * 80)):
        (root / name).mkdir()
        for number in range(4):
            (root / name / f"{number}.txt").write_text(f"{number}{text}")
    (root / "prompts.txt").write_text("one\ntwo\nthree\n")
    save_tiny_model(root / "model")
    return root


def options(folder, *more):
    return [
        f"--model_name={folder / 'model'}", "--device=cpu", f"--eval_text={folder / 'eval'}",
        f"--calibration_text={folder / 'calibration'}", f"--prompt_file={folder / 'prompts.txt'}", "--eval_tokens=10000",
        "--eval_window=50", "--eval_stride=50", "--calibration_tokens=100", "--calibration_window=64", "--num_tokens=5",
        "--threads=1", "--iterations=5", "--pruning_levels=0,25,60", "--batch_size=2", *more,
    ]  # fmt: skip


def plan(folder, capsys, *more):
    assert cli.main(["plan", *options(folder, *more), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


HUB = Path(__file__).parents[1] / "recorded" / "hub_configs"
PUBLISHED = {
    # Layers, query heads and key-value heads per layer, head size; parameters as the hub's pages count them.
    "meta-llama/Llama-3.2-1B": ((16, 32, 8, 64), 1_235_814_400),
    "Qwen/Qwen3-0.6B": ((28, 16, 8, 128), 596_049_920),
    "google/gemma-3-270m": ((18, 4, 1, 256), 268_098_176),
    "HuggingFaceTB/SmolLM2-135M": ((30, 9, 3, 64), 134_515_008),
    "openai/gpt-oss-20b": ((24, 64, 8, 64), 20_914_757_184),
}


def saved_config(folder, model_name, **changes):
    """A folder with nothing in it but the config of a model of the hub; None as a change leaves a setting out."""
    config = {**json.loads((HUB / f"{model_name.replace('/', '+')}.json").read_text("utf-8")), **changes}
    kept = {name: value for name, value in config.items() if name not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(kept), "utf-8")
    return folder


@pytest.mark.parametrize("model_name", PUBLISHED)
def test_models_of_the_hub_are_known_by_their_configs(model_name, tmp_path):
    sizes, parameters = PUBLISHED[model_name]
    preview = preview_model(str(saved_config(tmp_path, model_name, quantization_config=None)), weights=False)
    grid = preview.grid
    assert (grid.n_layers, grid.n_heads, grid.n_kv_heads, grid.head_size) == sizes
    assert ModelSizes.of(preview).parameters == parameters
    with pytest.raises(ModelLoadError, match=r"no \.safetensors weights"):
        preview_model(str(tmp_path))


def test_the_packed_weights_of_gpt_oss_are_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="quantised"):
        preview_model(str(saved_config(tmp_path, "openai/gpt-oss-20b")), weights=False)


def test_a_plan_needs_a_config_alone(folder, tmp_path, capsys):
    saved_config(tmp_path, "HuggingFaceTB/SmolLM2-135M", num_hidden_layers=2, vocab_size=9000)
    found = plan(folder, capsys, f"--model_name={tmp_path}")
    assert (found["layers"], found["heads_per_layer"]) == (2, 9)
    assert found["expected"]["seconds"]["perplexity"] > 0
    assert any("no tokenizer" in note for note in found["notes"])


def test_every_count_by_hand(folder, capsys):
    found = plan(folder, capsys, "--pruning_method=entropy,random")
    assert (found["layers"], found["heads_per_layer"], found["heads"]) == (2, 4, 8)
    # round(0.25 * 8) and round(0.6 * 8) heads
    assert [(row["heads_pruned"], row["achieved_level"]) for row in found["levels"]] == [(0, 0), (2, 25.0), (5, 62.5)]
    assert found["trajectories"] == 2 * 2 * 5
    assert found["cells"] == 2 * 2 * 5 * 3
    # Four documents of 161 bytes, a token each, in windows of 50, 50, 50 and 11, of which the first has no context.
    assert found["evaluation"] == {"documents": 4, "windows": 16, "tokens": 4 * (49 + 49 + 49 + 10)}
    # Two windows of 64 tokens are the least that hold 100.
    assert found["calibration"] == {"windows_per_iteration": 2, "tokens_per_iteration": 128}
    assert (found["prompts"], found["timed_batches"]) == (3, 2)
    assert found["pairs"] == {
        "iterations_x_documents": 20, "iterations_x_prompts": 15, "iterations_x_timed_batches": 10,
    }  # fmt: skip


def test_pairs_and_levels_of_each_expectation(folder, capsys):
    found = {row["id"]: row for row in plan(folder, capsys)["expectations"]}
    assert list(found) == ["E1", "E2", "E3", "E4"]
    assert [found[name]["pairs"] for name in found] == [10, 20, 15, 10]
    assert [found[name]["levels"] for name in found] == [[25, 60], [60], [60], [25, 60]]


def test_the_error_rate_is_shared_among_methods_and_quality_comes_first(folder, capsys):
    one = {row["id"]: row["claim_level"] for row in plan(folder, capsys)["expectations"]}
    # 2.25 % for a run, 85 % of it for answers, of which quality has 0.4, speed and latency 0.175 each.
    assert one["E2"] == pytest.approx(0.0225 * 0.85 * 0.4)
    assert one["E1"] == one["E4"] == pytest.approx(0.0225 * 0.85 * 0.175)
    # A twentieth is left for diversity at two temperatures, Q3, Q4 of diversity, and Q5 of two distances and time per token.
    assert one["E3"] == pytest.approx(0.0225 * 0.85 * 0.05 / 7)
    four = {row["id"]: row["claim_level"] for row in plan(folder, capsys, "--pruning_method=entropy,fisher,taylor,random")
            ["expectations"]}  # fmt: skip
    assert four == pytest.approx({name: level / 4 for name, level in one.items()})


def test_plan_and_report_agree_on_every_number_that_both_show(folder):
    """A run of the shape that is planned, in which nothing is decided: pairs, levels, and the level that each starts at."""
    spec = ComparisonSpec(
        model_name=str(folder / "model"), eval_text=str(folder / "eval"), calibration_text=str(folder / "calibration"),
        prompt_file=str(folder / "prompts.txt"), eval_window=50, eval_stride=50, calibration_tokens=100,
        calibration_window=64, num_tokens=5, iterations=3, pruning_levels=(0.0, 25.0, 60.0), temperatures=(0.7, 1.0),
    )  # fmt: skip
    planned = {row["id"]: row for row in plan_run(spec, Margins(), prepare(spec, identify=False))["expectations"]}

    def loss(variant, level, i, d):
        return level / 100 + noise(variant == "agency", level, i, d, 3)

    def timed(variant, level, i, p):
        return noise(variant == "agency", level, i, p, 3)

    cells, measurements = run_of(
        loss, timed, timed, levels=spec.pruning_levels, iterations=3, documents=4, prompts=3,
        distinct=lambda variant, level, i, p, t: 0.5 + 0.1 * noise(variant == "agency", level, i, p, 3),
    )  # fmt: skip
    measurements = pd.concat(
        [measurements, measurements[measurements["metric"] == "tokens_per_second"].assign(metric="time_per_output_token_s"),
         measurements[measurements["metric"] == "distinct_2"].assign(metric="seq_rep_4")], ignore_index=True,
    )  # fmt: skip
    reported = answer_hypotheses("tiny", cells, observations(cells, measurements)).set_index("id")
    for name in ("E1", "E2", "E4"):
        row = planned[name]
        assert (row["iterations"], row["clusters"], row["pairs"]) == tuple(
            int(reported.loc[name, column]) for column in ("n_iterations", "n_clusters", "n")
        )
        assert reported.loc[name, "claim_level"] == pytest.approx(row["claim_level"])
    assert reported.loc["E3", "claim_level"].tolist() == pytest.approx(2 * [planned["E3"]["claim_level"]])


@pytest.mark.parametrize("name", ["E1", "E2"])
def test_the_detectable_effect_is_supported_four_times_in_five_by_the_rules_themselves(folder, capsys, name):
    """Data sets with that effect, drawn observation by observation, decided one by one."""
    row = next(row for row in plan(folder, capsys)["expectations"] if row["id"] == name)
    parts, sign = ASSUMED[name], -1 if name == "E2" else 1
    truth, margin = math.log1p(row["detectable"]), 0.05 if name == "E2" else 0.02
    generator = np.random.default_rng(5)
    shape = (row["iterations"], row["clusters"])
    supported = 0
    for _ in range(400):
        values = truth + math.sqrt(parts.iterations) * generator.standard_normal((shape[0], 1))
        values = values + math.sqrt(parts.clusters) * generator.standard_normal((1, shape[1]))
        values = values + math.sqrt(parts.residual) * generator.standard_normal(shape)
        bounds = (math.log1p(-margin), math.log1p(margin))
        supported += decide(fit_crossed(values), bounds, sign, row["claim_level"]).verdict == "supported"
    assert supported / 400 == pytest.approx(0.8, abs=0.07)


def test_more_data_and_smaller_margins_find_smaller_effects(folder):
    def detectable(margins=None, **changes):
        settings = {
            "model_name": str(folder / "model"), "eval_text": str(folder / "eval"), "eval_window": 50, "eval_stride": 50,
            "calibration_text": str(folder / "calibration"), "calibration_tokens": 100, "calibration_window": 64,
            "num_tokens": 5, "prompt_file": str(folder / "prompts.txt"), **changes,
        }  # fmt: skip
        spec = ComparisonSpec(**settings)
        rows = plan_run(spec, margins or Margins(), prepare(spec, identify=False))["expectations"]
        return {row["id"]: abs(row["detectable"]) for row in rows}

    few, many, small = (
        detectable(iterations=3),
        detectable(iterations=20),
        detectable(Margins(0, 0, 0, 0), iterations=3),
    )
    assert all(small[name] < few[name] for name in few)
    # Perplexity varies from document to document, so that more iterations of the same four documents tell little.
    assert all(many[name] < few[name] for name in ("E1", "E3", "E4"))


def test_neither_weights_nor_their_digests_are_read(folder, capsys, monkeypatch):

    monkeypatch.setattr(
        "pruning_comparison.run.workspace.load_model", lambda *a, **k: pytest.fail("weights were loaded")
    )
    monkeypatch.setattr(loading, "_file_digest", lambda path: pytest.fail("weights were read through"))
    plan(folder, capsys)


def test_the_words_carry_the_same_numbers_and_say_what_cannot_be_answered(folder, capsys):
    assert cli.main(["plan", *options(folder, "--temperatures=0", "--pruning_levels=0,25", "--iterations=1")]) == 0
    shown = capsys.readouterr().out
    assert "2 layers of 4 heads, 8 heads in all" in shown
    assert "25 %: 2 heads" in shown
    assert "2 trajectories, 4 cells" in shown
    assert "628 tokens in 16 windows of 4 documents" in shown
    assert "1 iteration x 4 documents = 4" in shown
    assert "1 iteration x 2 timed batches = 2" in shown
    assert "no level is 40 % or more" in shown
    assert "with one iteration nothing is known" in shown
    assert "with one temperature" in shown
    assert "at temperature 0 nothing is drawn" in shown
    assert "E2 quality" in shown
    assert "no difference is found in" in shown
    assert "nothing: not measured" in shown


def test_without_both_variants_there_is_nothing_to_find(folder, capsys):
    found = plan(folder, capsys, "--variants=baseline")
    assert found["expectations"] == []
    assert any("not both in --variants" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--margin_speed=-1"], "--margin_speed: -1.0 must be at least 0 and below 100"),
        (["--margin_quality=100"], "--margin_quality: 100.0 must be at least 0 and below 100"),
        (["--margin_diversity=1"], "--margin_diversity: 1.0 must be at least 0 and below 1"),
        (["--tolerance=nan"], "--tolerance: nan must be at least 0"),
        (["--margin_latency=wide"], "'wide' is not a number"),
        (["--pruning_levels=0,100"], "100.0 must be at least 0 and below 100"),
        (["--calibration_tokens=1000000"], "--calibration_tokens"),
    ],
)
def test_bad_options_exit_2(folder, capsys, argv, message):
    assert cli.main(["plan", *options(folder, *argv)]) == 2
    assert message in capsys.readouterr().err


def test_margins_are_shares_of_what_the_options_say_in_per_cent():
    parser = cli.make_parser()
    given = parser.parse_args(["run", "--margin_speed=3", "--margin_diversity=0.03", "--tolerance=7"])
    assert cli._margins_of(given) == {"speed": 0.03, "diversity": 0.03, "tolerance": 0.07}
    assert cli._margins_of(parser.parse_args(["report"])) == {}


def test_the_help_states_the_margins_that_hold():
    for margin, whole, meaning in cli.MARGIN_OPTIONS.values():
        assert f"(default: {getattr(Margins(), margin) * whole:g})" in meaning


def test_margins_do_not_change_what_a_run_is():
    assert not set(vars(Margins())) & set(ComparisonSpec().as_dict())


def test_the_plan_reads_the_same_inputs_as_a_run(folder, tmp_path):
    spec = ComparisonSpec(model_name="bundled", num_tokens=3, **write_short_texts(tmp_path))
    quick, full = prepare(spec, identify=False), prepare(spec)
    assert quick.digests == {}
    assert full.digests
    assert [window.index for window in quick.windows] == [window.index for window in full.windows]


def test_quality_is_planned_with_more_spread_between_iterations_where_chance_ranks():
    by_score, by_chance = (
        assumed_components("E2", ComparisonSpec(pruning_methods=methods))
        for methods in (("entropy",), ("entropy", "random"))
    )
    assert by_chance.iterations > by_score.iterations
    assert (by_chance.clusters, by_chance.residual) == (by_score.clusters, by_score.residual)
    assert assumed_components("E1", ComparisonSpec(pruning_methods=("random",))) == ASSUMED["E1"]


def test_passes_and_steps_are_counted_by_hand(folder):
    spec = ComparisonSpec(
        model_name=str(folder / "model"), device="cpu", precision="float32", pruning_levels=(0.0, 25.0, 60.0), iterations=5,
        pruning_methods=("random",), temperatures=(0.7, 1.0), num_tokens=5, batch_size=2, quality_batch_size=1, threads=1,
        eval_text=str(folder / "eval"), calibration_text=str(folder / "calibration"), eval_tokens=10_000, eval_window=50,
        eval_stride=50, calibration_tokens=100, calibration_window=64, prompt_file=str(folder / "prompts.txt"),
    )  # fmt: skip
    counted = passes(spec, prepare(spec, identify=False))
    models = 2 * 5 * 2  # variants, iterations, levels above 0
    assert counted["evaluation_tokens"] == (models + 1) * 4 * 161  # the dense model once
    # 3 prompts at 2 temperatures make 2 batches, since 4 quality batches are written at a time, 5 steps each; the dense
    # model's texts are new in every iteration.
    assert counted["text_steps"] == (models + 5) * 2 * 5
    assert counted["text_tokens"] == (models + 5) * 2 * (3 + 3 + 5 + 3 * 5)
    # Two variants and the dense model at 2 levels, it alone at level 0; 5 iterations, 2 batches, timed 5 times to make 10
    # pairs: a warm-up of 4 tokens, 4 first tokens, and 5 tokens. A peak is measured once, in a warm-up of all 5 tokens.
    assert counted["timed_steps"] == (3 * 2 + 1) * 5 * 2 * 5 * (4 + 4 + 5)
    with_peaks = replace(spec, memory_logging=True)
    more = passes(with_peaks, prepare(with_peaks, identify=False))["timed_steps"] - counted["timed_steps"]
    assert more == (3 * 2 + 1) * 5 * 2 * 1
    # One more engine: both generate all 5 tokens once to be ready, and 3 times while they are timed.
    in_two = replace(spec, engines=("native", "transformers"))
    more = passes(in_two, prepare(in_two, identify=False))["timed_steps"] - counted["timed_steps"]
    assert more == (3 * 2 + 1) * 5 * 2 * 2 * 4 * 5
    # Nothing to score under random, but prices, and Fisher's importance, once an iteration.
    assert counted["score_tokens"] == pytest.approx(5 * 100 * (3.0 + 2.0))
    assert counted["adaptation_tokens"] == pytest.approx(5 * 2 * 100 * 0.9)


def test_the_plan_says_time_memory_and_disk(folder, capsys, monkeypatch):
    cost = plan(folder, capsys)["expected"]
    assert 0 < sum(cost["seconds"].values()) < 600
    assert 0.5e9 < cost["memory_bytes"] < 1e9
    assert 4e6 < cost["disk_bytes"] < 20e6
    assert cli.main(["plan", *options(folder)]) == 0
    told = capsys.readouterr().out
    assert "time         about" in told
    assert "memory       about 0.6 GB" in told
    monkeypatch.setattr(planning, "available_bytes", lambda: 1000)
    assert cli.main(["plan", *options(folder)]) == 0
    assert "time         unknown: a model of this size does not fit" in capsys.readouterr().out


def test_seconds_follow_the_speeds(folder):
    spec = ComparisonSpec(
        model_name=str(folder / "model"), device="cpu", precision="float32", pruning_levels=(0.0,), iterations=1,
        variants=("baseline",), num_tokens=5, threads=1, eval_text=str(folder / "eval"), eval_tokens=10_000,
        calibration_text=str(folder / "calibration"), eval_window=50, eval_stride=50, calibration_tokens=100,
        calibration_window=64, prompt_file=str(folder / "prompts.txt"), pruning_methods=("random",), temperatures=(1.0,),
    )  # fmt: skip
    inputs = prepare(spec, identify=False)
    found = expected(spec, inputs, Speeds(1.0, 100.0, 10_000.0), ModelSizes.of(inputs.preview))["seconds"]
    assert found["perplexity"] == 4 * 161
    assert found["texts"] == 5 * 10_000 + (3 + 3 + 5 + 3 * 5)
    assert found["timing"] == 3 * 4 * (4 + 4 + 5) * 100  # 3 prompts, 4 times to make 10 pairs
    assert found["scores and negotiation"] == found["adaptation"] == 0


def memory_of(folder, **settings):
    """The forecast for a model of 2 layers of 4 heads of size 8, embedding 32, MLPs of 128, 257 tokens and 128 positions."""
    spec = ComparisonSpec(
        **{
            "model_name": str(folder / "model"),
            "device": "cpu",
            "precision": "float32",
            "iterations": 1,
            "threads": 1,
            "num_tokens": 5,
            "eval_text": str(folder / "eval"),
            "eval_tokens": 1000,
            "eval_window": 64,
            "eval_stride": 64,
            "calibration_text": str(folder / "calibration"),
            "calibration_tokens": 100,
            "calibration_window": 64,
            "prompt_file": str(folder / "prompts.txt"),
            "pruning_levels": (0, 25, 50),
            **settings,
        }
    )
    inputs = prepare(spec, identify=False)
    return forecast_memory(spec, inputs, ModelSizes.of(inputs.preview))


ATTENTION = 2 * (32 * 96 + 96 + 32 * 32 + 32)
MLP_OUTPUTS = 2 * (128 * 32 + 32)
PARAMETERS = (257 + 128) * 32 + ATTENTION + MLP_OUTPUTS + 2 * (32 * 128 + 128 + 4 * 32) + 64


def test_sizes_of_a_model_are_counted_from_its_config(folder):
    sizes = ModelSizes.of(preview_model(str(folder / "model")))
    assert (sizes.parameters, sizes.attention, sizes.mlp_outputs) == (PARAMETERS, ATTENTION, MLP_OUTPUTS)
    assert (sizes.width, sizes.vocabulary, sizes.mlp_features) == (32, 257, 128)
    # GPT-2 fuses queries, keys and values, and keeps matrices as [inputs, outputs]: of those, the MLP's output projection
    # has its longer side apart, and so has the head, which is kept as [257, 32].
    assert (sizes.mixed, sizes.reordered_outputs) == (0, MLP_OUTPUTS)
    assert sizes.reordered == MLP_OUTPUTS + 257 * 32


def test_queries_keys_and_values_that_stand_apart_are_copied_to_decode(tmp_path):
    saved_config(tmp_path, "HuggingFaceTB/SmolLM2-135M")
    sizes = ModelSizes.of(preview_model(str(tmp_path), weights=False))
    # 30 layers of 9 query and 3 key-value heads of size 64, width 576; gate and up projections to 1,536, and a tied head.
    assert sizes.mixed == 30 * 576 * (9 + 2 * 3) * 64
    assert (sizes.reordered, sizes.reordered_outputs) == (30 * 2 * 576 * 1536 + 49152 * 576, 0)


def test_memory_that_is_held_throughout(folder, monkeypatch):
    held = memory_of(folder).held
    assert held["libraries"] == memory_plan.LIBRARIES_BYTES
    assert held["weights"] == 4 * PARAMETERS
    # At 25 per cent three quarters of attention are left, in both variants; agency's MLPs have weights of their own too.
    assert held["pruned models"] == 4 * (2 * 0.75 * ATTENTION + MLP_OUTPUTS)
    # Two places in each of two layers, of 100 tokens; a GPU's streams take what is left over, and large ones are in a file.
    assert held["dense stream"] == 2 * 2 * 100 * 32 * 4
    assert memory_of(folder, device="cuda").held["dense stream"] == 0
    assert memory_of(folder, adaptation="none").held["dense stream"] == 0
    monkeypatch.setattr(memory_plan, "MOST_STREAM_BYTES", 2 * 2 * 100 * 32 * 4 - 1)
    assert memory_of(folder).held["dense stream"] == 0
    assert memory_of(folder, adaptation="refit").held["pruned models"] == 4 * 2 * 0.75 * ATTENTION
    half = memory_of(folder, precision="bfloat16").held
    assert half["weights"] == (4 + 2) * PARAMETERS
    assert half["pruned models"] == held["pruned models"] / 2
    assert memory_of(folder, device="cuda").held["libraries"] == memory_plan.CUDA_CONTEXT_BYTES


def test_files_for_llama_cpp_are_counted_in_memory_and_on_the_disk(folder):
    """The dense model, and two variants that have three quarters of attention left at 25 per cent; float16 is half of it."""
    written = PARAMETERS + 2 * (PARAMETERS - 0.25 * ATTENTION)
    without = memory_of(folder).passing["decoding"]
    assert memory_of(folder, engines=("compiled",)).passing["decoding"] == without
    assert memory_of(folder, engines=("llama.cpp",)).passing["decoding"] - without == 4 * written
    sizes, spec = ModelSizes.of(preview_model(str(folder / "model"))), ComparisonSpec(engines=("llama.cpp",))
    levels = {"pruning_levels": (0, 25, 50), "variants": ("baseline", "agency")}
    assert memory_plan.files_bytes(replace(spec, **levels, precision="float16"), sizes) == 2 * written
    assert memory_plan.files_bytes(replace(spec, pruning_levels=(0,)), sizes) == 4 * PARAMETERS


def test_a_plan_says_what_llama_cpp_cannot_run(folder, capsys):
    """The model is a GPT-2."""
    assert cli.main(["plan", *options(folder), "--engine=llama.cpp"]) == 0
    assert "note: no model can be timed in llama.cpp: the gguf form is not possible" in capsys.readouterr().out


def test_memory_counts_prices_and_moments(folder):
    """In float64: of a layer two halves of 32 x 32 for moments, and 32 x 32 with 32 x 32 for prices."""

    def prices(*methods, variant):
        return memory_of(folder, pruning_methods=methods, variants=("baseline", variant)).held["prices"]

    moments, of_prices = 2 * 2 * 32 * 32 * 8, 2 * (32 * 32 + 32 * 32) * 8
    assert prices("random", variant="agency-adaptation") == 0
    assert prices("random", variant="agency") == moments + 2 * of_prices
    assert prices("obs", variant="agency-adaptation") == moments + of_prices


def test_memory_of_what_passes(folder):
    passing = memory_of(folder).passing
    logits = 4 * 64 * 257
    assert passing["evaluation"] == logits * (8 + 2) + 12 * 8 * 64 * 128
    assert passing["decoding"] == 4 * (MLP_OUTPUTS + 257 * 32 + MLP_OUTPUTS)  # agency's own MLPs are reordered as well
    sums, batch, streams = 8 * (2 * 128**2 + 4 * 128 * 32), 4 * 8 * 64 * (3 * 128 + 4 * 32), 4 * 100 * (128 + 4 * 32)
    assert passing["adaptation"] == sums + batch + streams
    assert passing["prices"] == 4 * 2 * 32 * 32 + 5 * logits
    assert passing["signals"] == 2 * 2 * 32 * 32 * 8
    assert passing["importance"] == 4 * 64 * (4 * 257 + 2 * (6 * 32 + 4 * 32 + 4 * 128))
    alone = memory_of(folder, variants=("baseline",))
    assert set(alone.passing) == {"evaluation", "decoding"}
    assert alone.peak_bytes == int(sum(alone.held.values()) + max(alone.passing.values()))


def test_logits_of_a_large_vocabulary_take_no_more_than_the_batches_of_an_evaluation(folder, monkeypatch):
    monkeypatch.setattr("pruning_comparison.measure.perplexity._MOST_LOGIT_BYTES", 3 * 4 * 64 * 257)
    assert memory_of(folder).passing["evaluation"] == 4 * 64 * 257 * (3 + 2) + 12 * 3 * 64 * 128


def test_a_run_is_planned_for_a_gpu_that_is_elsewhere(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [option for option in options(folder) if not option.startswith("--device")]
    assert cli.main(["plan", *argv, "--device=cuda:1", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["expected"]
    assert cost["seconds"] is None
    assert cost["reason"] == "this machine has no such GPU to time it on"
    assert 0.5e9 < cost["memory_bytes"] < 1e9
    assert cli.main(["plan", *argv, "--device=cuda:x"]) == 2
    assert "--device: 'cuda:x' is not a device" in capsys.readouterr().err
