"""What the report says of engines."""

from __future__ import annotations

import math

import pandas as pd

from pruning_comparison.analysis.engines import ENGINE_COLUMNS
from pruning_comparison.report.engines import engine_sentences, engines_table

NAN = math.nan


def row(variant, engine, level, dense, native, *, method="entropy", reason=None, differing=0.0):
    known = reason is None
    return {
        "model": "tiny", "method": method, "level": level, "variant": variant, "engine": engine,
        "tokens_per_second": 30.0 if known else NAN, "first_token_latency_s": 0.02, "speed_vs_dense": dense[0],
        "speed_vs_dense_low": dense[1], "speed_vs_dense_high": dense[2], "speed_vs_native": native[0],
        "speed_vs_native_low": native[1], "speed_vs_native_high": native[2], "n": 6, "warm_up_s": 4.0,
        "prompt_vs_dense": 1.5, "prompt_vs_dense_low": 1.4, "prompt_vs_dense_high": 1.6, "decode_vs_dense": dense[0],
        "decode_vs_dense_low": NAN, "decode_vs_dense_high": NAN, "weights": "f32" if engine == "compiled" else None,
        "differing_share": differing, "reason": reason,
    }  # fmt: skip


ITSELF, NOTHING = (1.0, NAN, NAN), (NAN, NAN, NAN)
ENGINES = pd.DataFrame(
    [
        row("dense", "native", 50, ITSELF, ITSELF),
        row("dense", "transformers", 50, ITSELF, (0.8, 0.78, 0.82)),
        row("dense", "compiled", 50, ITSELF, (1.3, 1.2, 1.4), differing=0.025),
        row("agency", "native", 50, (1.2, 1.15, 1.25), ITSELF),
        row("agency", "transformers", 50, (1.12, 1.08, 1.16), (0.7, 0.6, 0.8)),
        row("agency", "compiled", 50, NOTHING, NOTHING, reason="Unsupported: <i>no graph</i>."),
        row("agency", "native", 80, (1.9, 1.8, 2.0), ITSELF),
    ],
    columns=ENGINE_COLUMNS,
)


def test_sentences_tell_what_pruning_and_what_engines_bring():
    assert engine_sentences(ENGINES) == [
        "With 50 % of the heads gone, ranked by entropy, agency is 1.2 times [1.15 to 1.25] as fast in the native loop and "
        "1.12 times [1.08 to 1.16] as fast in transformers, each against the dense model in the same engine.",
        "Against the native loop, the dense model is 0.8 times [0.78 to 0.82] as fast in transformers and 1.3 times [1.2 to "
        "1.4] as fast in torch.compile.",
        "Agency could not be timed in torch.compile at 50 %: Unsupported: <i>no graph</i>.",
    ]


def test_one_pair_has_a_ratio_and_no_interval():
    rows = [row("dense", "native", 0, ITSELF, ITSELF), row("dense", "compiled", 0, ITSELF, (1.3, NAN, NAN))]
    assert engine_sentences(pd.DataFrame(rows, columns=ENGINE_COLUMNS)) == [
        "Against the native loop, the dense model is 1.3 times as fast in torch.compile."
    ]


def test_the_table_has_a_row_for_every_model_in_every_engine():
    table = engines_table(ENGINES)
    assert table is not None
    shown = [[row.heading.text, *(cell.text for cell in row.cells)] for row in table.rows]
    assert shown[2] == [
        "dense", "50 %", "compiled", "30 token/s", "×1", "×1.5", "×1", "×1.3", "20 ms", "4 s", "2.5 %", "6",
    ]  # fmt: skip
    assert shown[5] == ["agency", "50 %", "compiled", "missing", *[""] * 8]
    assert table.columns[5:8] == ("Prompt, times dense", "Decoding, times dense", "Speed, times native")
    assert [row.cells[1].small for row in table.rows[:3]] == ["", "", "weights as f32"]
    assert table.rows[2].cells[4].small == "1.4 to 1.6"
    assert table.rows[5].cells[2].small == "Unsupported: <i>no graph</i>."
    assert {len(row.cells) for row in table.rows} == {len(table.columns) - 1}


def test_one_engine_alone_has_no_table_and_no_sentence():
    assert engines_table(ENGINES.head(0)) is None
    assert engines_table(None) is None
    assert engine_sentences(ENGINES.head(0)) == []
