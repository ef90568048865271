"""What ``pruning_comparison`` offers: small, there when it is asked for, and importing it changes nothing for anybody."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pruning_comparison
from pruning_comparison.checkpoint import forms

ROOT = Path(__file__).parents[1]


def modules():
    return [one.name for one in pkgutil.walk_packages(pruning_comparison.__path__, "pruning_comparison.")]


def answer_of(script):
    """What a new process prints as JSON."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_name_is_there_and_stays_what_it_is_when_every_module_is_imported():
    before = {name: getattr(pruning_comparison, name) for name in pruning_comparison.__all__}
    assert sorted(before) == sorted(pruning_comparison._PLACES)
    assert set(before) <= set(dir(pruning_comparison))
    for name in modules():
        importlib.import_module(name)
    for name, found in before.items():
        module_name, _, attribute = pruning_comparison._PLACES[name].partition(":")
        module = importlib.import_module(f"pruning_comparison.{module_name}")
        assert getattr(pruning_comparison, name) is found is (getattr(module, attribute) if attribute else module)
    assert not {name.split(".")[1] for name in modules()} & set(before)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = pruning_comparison.prunes


def test_a_star_import_gives_what_is_listed():
    names: dict[str, object] = {}
    exec("from pruning_comparison import *", names)
    assert set(names) - {"__builtins__"} == set(pruning_comparison.__all__)


def test_every_name_is_documented():
    """In its own docstring, and at work in the documentation."""
    pages = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("python.md", "checkpoints.md"))
    for name in pruning_comparison.__all__:
        assert name in pages, name
        if name != "METHODS":
            assert getattr(pruning_comparison, name).__doc__, name


def test_importing_the_package_or_the_command_line_is_quick_and_loads_no_torch():
    script = (
        "import time; began = time.process_time(); import pruning_comparison; took = time.process_time() - began\n"
        "import sys, json; heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'numpy', 'scipy', 'rich', 'yaml'}\n"
        "import pruning_comparison.cli\n"
        "pruning_comparison.cli.make_parser()\n"
        "dir(pruning_comparison)\n"
        "print(json.dumps([took, sorted(heavy & set(sys.modules))]))"
    )
    times, loaded = zip(*(answer_of(script) for _ in range(3)), strict=True)
    assert min(times) < 0.3
    assert loaded == ([], [], [])


def test_importing_every_module_changes_nothing_global():
    script = """
import json, logging, os, random, signal, warnings
import matplotlib, numpy, pandas, rich, torch, transformers
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging
import scipy.stats, tokenizers
try:
    import ray
except ImportError:
    pass

def state():
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS), "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS),
        "environment": dict(os.environ), "root": [str(logging.root.handlers), logging.root.level],
        "ours": [str(logging.getLogger("pruning_comparison").handlers), logging.getLogger("pruning_comparison").level],
        "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(), "torch seed": torch.initial_seed(),
        "random": str(random.getstate()), "numpy": str(numpy.random.get_state()), "filters": str(warnings.filters),
        "style": str(matplotlib.rcParams), "backend": matplotlib.rcParams._get("backend").__repr__(),
        "verbosity": transformers_logging.get_verbosity(), "sigterm": str(signal.getsignal(signal.SIGTERM)),
    }

before = state()
import importlib, pkgutil, pruning_comparison
names = [one.name for one in pkgutil.walk_packages(pruning_comparison.__path__, "pruning_comparison.")]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps([len(names), [key for key in before if before[key] != after[key]]]))
"""
    count, changed = answer_of(script)
    assert count > 60
    assert changed == []


def test_attention_is_registered_when_it_is_first_used(model):
    script = """
import json, torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from pruning_comparison import METHODS, score_heads
from pruning_comparison.scoring.entropy_attention import IMPLEMENTATION
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
known = [IMPLEMENTATION in ALL_ATTENTION_FUNCTIONS]
score_heads(METHODS["entropy"], model, torch.arange(8)[None])
print(json.dumps([*known, IMPLEMENTATION in ALL_ATTENTION_FUNCTIONS]))
"""
    assert answer_of(script) == [False, True]


def test_the_old_place_of_load_pruned_works_and_names_the_new_one():
    with pytest.warns(DeprecationWarning, match="from pruning_comparison import load_pruned"):
        from pruning_comparison.checkpoint import load_pruned
    assert load_pruned is forms.load_pruned is pruning_comparison.load_pruned
