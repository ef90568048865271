"""Checkpoints that 0.1.0 saved load as they did: with this package, through their own code, and by transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

OLD = Path(__file__).parents[1] / "recorded" / "checkpoints_of_0.1.0"
COMPACT = ("compact_gpt2", "compact_qwen3")
STOCK = ("plain_llama", "padded_gpt2")

LOADING = """
import json, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from pruning_comparison import load_pruned

def logits(model):
    ids = torch.arange(24)[None] % 97
    with torch.inference_mode():
        return model(ids).logits[0, -4:].tolist()

with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    from pruning_comparison.checkpoint import load_pruned as load_from_the_old_place

old, found = Path(sys.argv[1]), {}
for name in sys.argv[2].split(","):
    model, tokenizer = load_pruned(old / name)
    assert tokenizer is None
    found[f"{name}, this package"] = logits(model)
    found[f"{name}, the old place"] = logits(load_from_the_old_place(old / name)[0])
    model = AutoModelForCausalLM.from_pretrained(old / name, trust_remote_code=True, dtype=torch.float32)
    # The file beside the weights, and not this package's own.
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found[f"{name}, its own code"] = logits(model)
for name in sys.argv[3].split(","):
    model = AutoModelForCausalLM.from_pretrained(old / name, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models."), type(model).__module__
    found[f"{name}, transformers"] = logits(model)
found["warned"] = [str(one.message) for one in warned if one.category is DeprecationWarning]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All of them in one process, so that old and new code meet."""
    cache = tmp_path_factory.mktemp("modules")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(OLD), ",".join(COMPACT), ",".join(STOCK)],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, way) for name in COMPACT for way in ("this package", "the old place", "its own code")),
        *((name, "transformers") for name in STOCK),
    ],
)
def test_an_old_checkpoint_computes_what_it_did(found, name, way):
    (expected,) = load_file(OLD / name / "expected.logits").values()
    assert expected.shape[0] == 4
    assert found[f"{name}, {way}"] == [pytest.approx(row, abs=1e-5, rel=0) for row in expected.tolist()]


def test_the_old_place_is_warned_of(found):
    (warning,) = set(found["warned"])  # "from" looks a name up twice
    assert "from pruning_comparison import load_pruned" in warning
