"""Ratios of engines and of models in them, by pairs that are worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy import stats

from pruning_comparison.analysis.engines import ENGINE_COLUMNS, compare_engines
from pruning_comparison.store.journal import columns_of

COLUMNS = columns_of("engine_timings")


def timing(variant, engine, seconds, *, level=50.0, iteration=0, prompt=0, repeat=0, **more):
    row = {
        "variant": variant, "method": "random", "iteration": iteration, "level": level, "engine": engine, "prompt": prompt,
        "repeat": repeat, "first_token_latency_s": seconds / 10, "end_to_end_s": seconds, "tokens": 8, "warm_up_s": 2.0,
        "differing_share": 0.0, "reason": None,
    }  # fmt: skip
    return {**dict.fromkeys(COLUMNS), **row, **more}


def table(rows):
    return pd.DataFrame(rows, columns=COLUMNS)


def only(found, variant, engine, level=50.0):
    chosen = (found["variant"] == variant) & (found["engine"] == engine) & (found["level"] == level)
    (row,) = found[chosen].to_dict("records")
    return row


def test_ratios_are_of_pairs_in_the_same_engine_and_of_the_same_model():
    """One iteration, two prompts. In transformers agency takes half of the dense model's time on one prompt and as long on
    the other: log ratios log 2 and 0, of mean log 2 / 2. Against native it takes twice as long on both."""
    rows = []
    for prompt, (native, dense) in enumerate([(1.0, 4.0), (3.0, 6.0)]):
        rows += [
            timing("agency", "native", native, prompt=prompt),
            timing("agency", "transformers", 2 * native, prompt=prompt, differing_share=0.5 * prompt),
            timing("dense", "native", 2 * native, prompt=prompt),
            timing("dense", "transformers", dense, prompt=prompt),
        ]
    found = compare_engines("tiny", table(rows))
    assert tuple(found.columns) == ENGINE_COLUMNS
    row = only(found, "agency", "transformers")
    assert row["speed_vs_dense"] == pytest.approx(math.sqrt(2))
    half = stats.t.ppf(0.975, 1) * math.log(2) / 2  # standard deviation log 2 / sqrt 2, over sqrt 2
    assert row["speed_vs_dense_low"] == pytest.approx(math.exp(math.log(2) / 2 - half))
    assert row["speed_vs_dense_high"] == pytest.approx(math.exp(math.log(2) / 2 + half))
    assert row["speed_vs_native"] == pytest.approx(0.5)
    assert row["tokens_per_second"] == pytest.approx(math.sqrt(8 / 2 * 8 / 6))
    assert row["first_token_latency_s"] == pytest.approx(0.4)
    assert row["warm_up_s"] == 4.0  # of both prompts
    assert row["differing_share"] == 0.25
    assert row["n"] == 2
    assert only(found, "agency", "native")["speed_vs_dense"] == pytest.approx(2.0)
    dense = only(found, "dense", "transformers")
    assert dense["speed_vs_dense"] == 1
    assert math.isnan(dense["speed_vs_dense_low"])
    assert dense["speed_vs_native"] == pytest.approx(math.exp((math.log(2 / 4) + math.log(6 / 6)) / 2))


def test_prompt_and_decoding_are_held_against_the_dense_models_apart():
    """Of 4 s the dense model spends 1 on the prompt and 3 on what follows, agency 0.5 of 2 s: twice as fast in both; on the
    other prompt the first token takes as long, and what follows 3 s in place of 6."""
    rows = [
        timing("dense", "llama.cpp", 4.0, first_token_latency_s=1.0, weights="f32"),
        timing("agency", "llama.cpp", 2.0, first_token_latency_s=0.5, weights="f32"),
        timing("dense", "llama.cpp", 8.0, prompt=1, first_token_latency_s=2.0, weights="f32"),
        timing("agency", "llama.cpp", 5.0, prompt=1, first_token_latency_s=2.0, weights="f32"),
        timing("dense", "native", 1.0),
    ]
    found = compare_engines("tiny", table(rows))
    row = only(found, "agency", "llama.cpp")
    assert row["prompt_vs_dense"] == pytest.approx(math.sqrt(2))
    half = stats.t.ppf(0.975, 1) * math.log(2) / 2
    assert row["prompt_vs_dense_low"] == pytest.approx(math.exp(math.log(2) / 2 - half))
    assert row["prompt_vs_dense_high"] == pytest.approx(math.exp(math.log(2) / 2 + half))
    assert row["decode_vs_dense"] == pytest.approx(2.0)  # 3 s over 1.5 s, and 6 s over 3 s
    assert row["decode_vs_dense_low"] == row["decode_vs_dense_high"] == pytest.approx(2.0)
    assert row["weights"] == "f32"
    assert only(found, "dense", "llama.cpp")["decode_vs_dense"] == 1
    assert pd.isna(only(found, "dense", "native")["weights"])


def test_one_new_token_has_no_decoding():
    rows = [
        timing(variant, engine, 1.0, first_token_latency_s=1.0)
        for variant in ("agency", "dense")
        for engine in ("native", "llama.cpp")
    ]
    row = only(compare_engines("tiny", table(rows)), "agency", "llama.cpp")
    assert row["prompt_vs_dense"] == 1
    assert math.isnan(row["decode_vs_dense"])


def test_repeats_are_averaged_on_the_log_scale_and_make_no_pairs():
    rows = [
        timing(variant, engine, seconds * (1 + repeat * factor), repeat=repeat)
        for variant, engine, seconds, factor in (
            ("agency", "native", 1.0, 0), ("agency", "compiled", 1.0, 3), ("dense", "native", 1.0, 0),
            ("dense", "compiled", 1.0, 0),
        )
        for repeat in range(2)
    ]  # fmt: skip
    row = only(compare_engines("tiny", table(rows)), "agency", "compiled")
    assert row["speed_vs_dense"] == pytest.approx(0.5)  # 1 s and 4 s: 2 s by their logarithms
    assert math.isnan(row["speed_vs_dense_low"])
    assert row["n"] == 1


def test_what_was_not_timed_has_its_reason_and_no_figures():
    rows = [timing(variant, "native", 1.0) for variant in ("agency", "dense")]
    missing = {"end_to_end_s": None, "first_token_latency_s": None, "tokens": None, "prompt": None, "repeat": None}
    rows += [timing("agency", "compiled", 1.0, **missing, warm_up_s=None, differing_share=None, reason="no compiler")]
    rows += [timing("dense", "compiled", 1.0)]
    row = only(compare_engines("tiny", table(rows)), "agency", "compiled")
    assert row["reason"] == "no compiler"
    assert row["n"] == 0
    assert all(
        math.isnan(row[name]) for name in ("tokens_per_second", "speed_vs_dense", "speed_vs_native", "warm_up_s")
    )


def test_at_level_0_there_is_the_dense_model_alone_and_of_one_engine_nothing():
    rows = [timing(name, engine, 1.0, level=0.0) for name in ("agency", "dense") for engine in ("native", "compiled")]
    found = compare_engines("tiny", table(rows))
    assert found[["variant", "engine"]].to_numpy().tolist() == [["dense", "native"], ["dense", "compiled"]]
    assert compare_engines("tiny", table(rows[:1])).empty
    assert tuple(compare_engines("tiny", table([])).columns) == ENGINE_COLUMNS
