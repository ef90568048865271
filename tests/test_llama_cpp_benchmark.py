"""``benchmarks/llama_cpp.py`` runs, and prints every ratio that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ascii_tokenizer, save_tiny_model, tiny_model

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "llama_cpp.py"


@pytest.mark.extras
def test_each_engine_and_phase_has_a_ratio_and_so_has_the_anchor(tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    model = tiny_model("llama", vocab_size=257, max_position_embeddings=256, **sizes)
    place = save_tiny_model(tmp_path, model=model)
    ascii_tokenizer().save_pretrained(place)
    options = [f"--models={place}", "--contexts=4,30", "--tokens=4", "--repeats=2", "--profile"]
    run = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")][1:]
    pruned = [line for line in lines if line["part"] == "pruned"]
    assert [(line["context"], line["engine"], line["phase"]) for line in pruned] == [
        (context, engine, phase)
        for context in (4, 30)
        for engine in ("llama.cpp", "native")
        for phase in ("prompt", "decode")
    ]
    assert all(line["allowed"] > 1 and line["ratio"] > 0 for line in pruned)
    assert {line["differing_share"] for line in pruned if line["engine"] == "llama.cpp"} == {0.0}
    anchors = [line for line in lines if line["part"] == "anchor"]
    assert [line["context"] for line in anchors] == [4, 30]
    assert all(set(line["tokens_per_second"]) == {"native", "llama.cpp"} for line in anchors)
    assert sum(line["part"] == "profile" for line in lines) == 2
