"""Pruned models saved and loaded: in a clean process, without the package, in every family, and lies refused."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from builders import FAMILIES, save_tiny_model, tiny_gpt2, tiny_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pruning_comparison.checkpoint.forms import dense_parameters, forms_that_hold, load_pruned, save_pruned, stock_form
from pruning_comparison.checkpoint.model_card import BeforeAndAfter
from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.models import heads, load_model, preview_model
from pruning_comparison.models.heads import mlp_output_projections, output_projections
from pruning_comparison.pruning.surgery import converted_copy, remove_heads

# The first layer emptied, groups of 1 and 2 in groups of three (of 1 and 1 in groups of two), and even ones.
HARD = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
ALIKE = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]], dtype=torch.bool)
LAST_EMPTIED = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
IDS = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(3))
GENERATION = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

CLEAN_PROCESS = """
import json, sys, torch
sys.modules["pruning_comparison"] = None  # importing it raises, as where it is not installed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
torch.set_num_threads(1)
cases, found = json.loads(sys.stdin.read()), {}
def difference(model, case):
    expected, ids = load_file(case["expected"]), torch.tensor(case["ids"])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **case["generation"])
    same = torch.equal(tokens, expected["tokens"]) and str(model.dtype) == "torch." + case["dtype"]
    return [float((logits.float() - expected["logits"].float()).abs().max()), same]
for case in cases:
    trusted = case["form"] == "compact"
    model = AutoModelForCausalLM.from_pretrained(
        case["folder"], trust_remote_code=trusted, dtype=case["dtype"], use_safetensors=True,
        **({} if trusted else case["as_in_the_card"]))
    assert type(model).__module__.startswith("transformers_modules." if trusted else "transformers.models."), type(model)
    found["without", case["name"]] = difference(model.eval(), case)
    if case["name"] == "gpt2":
        model.save_pretrained(case["folder"] + " again")
        again = AutoModelForCausalLM.from_pretrained(case["folder"] + " again", trust_remote_code=True)
        found["saved again", case["name"]] = difference(again.eval(), case)
del sys.modules["pruning_comparison"]
from pruning_comparison.checkpoint.forms import load_pruned
for case in cases:
    if case["form"] == "compact":
        found["with", case["name"]] = difference(load_pruned(case["folder"])[0], case)
print(json.dumps([[*key, *value] for key, value in found.items()]))
"""


def with_new_biases(model, *, mlp=True):
    """The model after something like an adaptation: output projections with biases that the family may not have."""
    generator = torch.Generator().manual_seed(5)
    for module in [*heads.attention_outputs(model), *(mlp_output_projections(model) if mlp else [])]:
        bias = torch.randn(model.config.hidden_size, generator=generator)
        module.bias = torch.nn.Parameter(bias.to(model.dtype), requires_grad=False)
    return model


def pruned_models():
    """Pruned models by name, each with the form to save it in and how to shard it."""
    for family in FAMILIES:
        model = remove_heads(tiny_model(family), HARD)
        yield family, model, "compact", "5GB"
        yield f"{family}, padded", model, "padded", "5GB"
    for family in ("gpt2", "llama"):
        yield f"{family}, last layer emptied", remove_heads(tiny_model(family), LAST_EMPTIED), "compact", "5GB"
        yield f"{family}, sharded", remove_heads(tiny_model(family), ALIKE), "compact", "20KB"
        for dtype in (torch.float16, torch.bfloat16):
            yield f"{family}, {dtype}", converted_copy(remove_heads(tiny_model(family), HARD), dtype), "compact", "5GB"
    yield "llama, plain", remove_heads(tiny_model("llama"), ALIKE[:1].expand(3, 6)), "plain", "5GB"
    yield "llama, ungrouped, plain", remove_heads(tiny_model("llama with biases, not grouped"), ALIKE), "plain", "20KB"
    for family in ("llama", "mistral"):
        yield f"{family}, adapted", with_new_biases(remove_heads(tiny_model(family), HARD)), "compact", "5GB"
    yield "llama, adapted, padded", with_new_biases(remove_heads(tiny_model("llama"), HARD)), "padded", "5GB"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By way of loading and case: the largest logit difference in a clean process, and whether all else is the same."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("saved")
    cases = []
    for name, model, form, shards in pruned_models():
        folder, expected = root / name.replace(",", ""), root / f"{name}.safetensors"
        save_pruned(model, None, folder, form=form, max_shard_size=shards)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards != "5GB")
        with torch.inference_mode():
            tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), **GENERATION)
            logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        save_file({"logits": logits, "tokens": tokens}, expected)
        dtype = str(model.dtype).removeprefix("torch.")
        case = {"name": name, "folder": str(folder), "form": form, "dtype": dtype, "expected": str(expected)}
        # By itself transformers 5.15 leaves out the cap on the attention logits of Gemma 2's own class.
        settings = {"attn_implementation": "eager"} if model.config.model_type == "gemma2" else {}
        cases.append({**case, "ids": IDS.tolist(), "generation": GENERATION, "as_in_the_card": settings})
    run = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS],
        input=json.dumps(cases),
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {(way, name): (difference, same) for way, name, difference, same in json.loads(run.stdout)}


def test_a_clean_process_loads_every_model_with_and_without_the_package(outcomes):
    names = [(name, form) for name, _, form, _ in pruned_models()]
    ways = {("without", name) for name, _ in names} | {("with", name) for name, form in names if form == "compact"}
    assert set(outcomes) == {*ways, ("saved again", "gpt2")}
    # A half-precision model comes back bit for bit; float32 may be added up in another order where zeros stand in.
    off = {key: value for key, value in outcomes.items() if value[0] > 1e-5 or not value[1]}
    assert off == {}


def test_the_code_in_the_folder_is_ours_and_needs_torch_and_transformers_alone(tmp_path):
    save_pruned(remove_heads(tiny_model("gpt2"), HARD), None, tmp_path / "model")
    source = Path(heads.__file__).read_bytes()
    assert (tmp_path / "model" / "modeling_pruned_heads.py").read_bytes() == source
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


OLD_TRANSFORMERS = """
import sys, types
old = types.ModuleType("transformers")
old.__version__ = "4.57.1"
sys.modules["transformers"] = old
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), {"__name__": "modeling_pruned_heads"})
"""


def test_with_a_transformers_that_is_too_old_the_code_says_which_version_it_needs(tmp_path):
    """In a process in which transformers 4.57.1 stands in, with nothing else of it."""
    folder = save_pruned(remove_heads(tiny_model("gpt2"), HARD), None, tmp_path / "model")
    code = str(folder / "modeling_pruned_heads.py")
    run = subprocess.run(
        [sys.executable, "-c", OLD_TRANSFORMERS, code], capture_output=True, text=True, timeout=600, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this pruned model needs transformers 5.15 or later, and 4.57.1 is installed.")


def test_the_version_that_saved_code_needs_is_the_lowest_that_the_project_allows():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"][
        "dependencies"
    ]
    lowest = next(one for one in declared if one.startswith("transformers")).partition(">=")[2].partition(",")[0]
    source = Path(heads.__file__).read_text("utf-8")
    assert f"transformers {lowest} or later" in source
    assert f"< ({lowest.replace('.', ', ')}):" in source


@pytest.mark.parametrize("form", ["compact", "padded"])
def test_older_loaders_find_the_base_of_rotary_positions_by_its_older_name(form, tmp_path):
    scaled = {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.0}
    for rope, scaling in (
        ({"rope_type": "default", "rope_theta": 7000.0}, None),
        (scaled, {"rope_type": "linear", "factor": 2.0}),
    ):
        folder = tmp_path / str(rope["rope_type"])
        save_pruned(remove_heads(tiny_model("llama", rope_parameters=rope), HARD), None, folder, form=form)
        fields = json.loads((folder / "config.json").read_text())
        assert (fields["rope_theta"], fields.get("rope_scaling")) == (7000.0, scaling)
        again = (
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
            if form == "padded"
            else load_pruned(folder)[0].config
        )
        assert again.rope_parameters == rope


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a pickle was read or written")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "dump"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    model = remove_heads(tiny_model("gpt2"), HARD)
    for form in ("compact", "padded"):
        save_pruned(model, None, tmp_path / form, form=form)
    load_pruned(tmp_path / "compact")
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md", ".py"}
    assert not list((tmp_path / "padded").glob("*.py"))


@pytest.fixture
def saved(tmp_path):
    """A saved llama: five heads of six, two of them, and four, in groups of three."""
    keep = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    return save_pruned(remove_heads(tiny_model("llama"), keep), None, tmp_path / "saved")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


QUERY = "model.layers.1.self_attn.q_proj.weight"
LIES = {
    "another number of heads": (
        lambda folder: edit_config(folder, kept_heads=[[0, 1, 2, 4, 5], [0, 1, 4], [0, 1, 4, 5]]),
        r"layers.1.self_attn.o_proj.weight has shape \[48, 16\], and by the heads that are left it must be \[48, 24\]",
    ),
    "a head that is not there": (
        lambda folder: edit_config(folder, kept_heads=[[0, 1, 2, 4, 6], [0, 4], [0, 1, 4, 5]]),
        r"kept_heads of layer 0 must be different heads from 0 to 5, not \[0, 1, 2, 4, 6\]",
    ),
    "a head twice": (
        lambda folder: edit_config(folder, kept_heads=[[0, 1, 2, 4, 4], [0, 4], [0, 1, 4, 5]]),
        "must be different heads",
    ),
    "heads that are no list": (lambda folder: edit_config(folder, kept_heads="all"), "kept_heads has 'all'"),
    "a billion layers": (lambda folder: edit_config(folder, num_hidden_layers=10**9), "1000000000 layers"),
    "a huge vocabulary": (
        lambda folder: edit_config(folder, vocab_size=10**12),
        r"has shape \[97, 48\].*1000000000000",
    ),
    "sizes that are no numbers": (lambda folder: edit_config(folder, hidden_size="wide"), "describes no llama model"),
    "biases in layers that are not there": (
        lambda folder: edit_config(folder, mlp_output_biases=[7]),
        r"mlp_output_biases must be different layers from 0 to 2, not \[7\]",
    ),
    "biases that are not stored": (
        lambda folder: edit_config(folder, mlp_output_biases=[1]),
        "lacks 1 tensors.*model.layers.1.mlp.down_proj.bias",
    ),
    "a family that is unknown": (lambda folder: edit_config(folder, model_type="pruned_martian"), "'pruned_martian'"),
    "no pruned model": (lambda folder: edit_config(folder, model_type="llama"), "AutoModelForCausalLM loads"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a tensor of another shape": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({QUERY: torch.zeros(48, 48)})),
        rf"{QUERY} has shape \[48, 48\]",
    ),
    "a tensor transposed": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({QUERY: torch.zeros(48, 16)})),
        rf"{QUERY} has shape \[48, 16\]",
    ),
    "a tensor that is missing": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop(QUERY)),
        f"lacks 1 tensors that its config promises, first {QUERY}",
    ),
    "a tensor too many": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"extra": torch.zeros(1)})),
        "a tensor extra that its config has not",
    ),
    "a tensor in two files": (
        lambda folder: save_file({QUERY: torch.zeros(16, 48)}, folder / "other.safetensors"),
        f"has {QUERY} in two files",
    ),
    "whole numbers as weights": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({QUERY: torch.zeros(16, 48).long()})),
        f"{QUERY} is stored as I64",
    ),
    "weights that are not finite": (
        lambda folder: edit_weights(folder, lambda weights: weights[QUERY].fill_(float("nan"))),
        "NaN or infinity",
    ),
    "a file that is cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "its header promises",
    ),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "no .safetensors weights",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_is_refused(saved, lie):
    tell, message = LIES[lie]
    tell(saved)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_pruned(saved)
    assert str(caught.value).endswith(".")


def test_load_pruned_runs_nothing_that_lies_in_the_folder(tmp_path):
    dense = load_model(preview_model(str(save_tiny_model(tmp_path / "dense"))))
    keep = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    folder = save_pruned(remove_heads(dense.model, keep), dense.tokenizer, tmp_path / "saved")
    expected, ran = load_pruned(folder)[0](IDS).logits, tmp_path / "ran"
    for name in ("modeling_pruned_heads.py", "evil.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_config(folder, auto_map=dict.fromkeys(names, "evil.Evil"), attn_implementation="evil/kernels")
    model, tokenizer = load_pruned(folder)
    assert torch.equal(model(IDS).logits, expected)
    assert tokenizer("peace").input_ids
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    with contextlib.suppress(ModelLoadError):
        load_pruned(folder)
    assert not ran.exists()


def test_the_licence_is_read_from_the_base_models_card(tmp_path):
    assert preview_model("bundled").licence() == "apache-2.0"
    source = save_tiny_model(tmp_path)
    assert preview_model(str(source)).licence() is None
    (source / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\nlicense: other\n")
    assert preview_model(str(source)).licence() == "mit"


def test_the_tokenizer_comes_along_and_the_dtype_can_be_chosen(tmp_path):
    source = save_tiny_model(tmp_path / "dense", model=tiny_model("llama", vocab_size=257))
    dense = load_model(preview_model(str(source)))
    save_pruned(remove_heads(dense.model, HARD), dense.tokenizer, tmp_path / "pruned")
    model, tokenizer = load_pruned(tmp_path / "pruned", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer("peace").input_ids == dense.tokenizer("peace").input_ids
    with pytest.raises(ModelLoadError, match=r"is a pruned model.*start from the dense model"):
        preview_model(str(tmp_path / "pruned"))


def test_where_the_plain_form_cannot_be_had_the_reason_and_the_way_out_are_named():
    def reason(family, keep, change=lambda model: model):
        return forms_that_hold(change(remove_heads(tiny_model(family), keep)))["plain"]

    assert "layer 0 has lost all its heads. Prune with --scope=layer" in reason("llama", HARD)
    assert "from 0 to 6 heads" not in reason("llama", LAST_EMPTIED)
    uneven = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    assert "from 2 to 4 heads" in reason("llama", uneven)
    groups = torch.tensor([[1, 1, 1, 1, 0, 0]] * 3, dtype=torch.bool)
    assert "different numbers of query heads" in reason("llama", groups)
    assert "takes the size of a head from the number of heads" in reason("gpt2", ALIKE)
    even = torch.tensor([[1, 1, 0, 0, 1, 1]] * 3, dtype=torch.bool)
    assert "biases that the config of mistral cannot name, 6 in all" in reason("mistral", even, with_new_biases)
    assert "--no_new_bias" in reason("mistral", even, with_new_biases)
    assert reason("mistral", even) is None
    five = torch.tensor([[1, 1, 1, 1, 1, 0]] * 3, dtype=torch.bool)
    ungrouped = "llama with biases, not grouped"
    assert "config of llama does not allow these sizes" in reason(ungrouped, five)
    assert reason("llama", ALIKE[:1].expand(3, 6), with_new_biases) is None
    with pytest.raises(InputError, match="layer 0 has lost all its heads"):
        stock_form(remove_heads(tiny_model("llama"), HARD), "plain")


def test_what_cannot_be_saved_is_refused_and_leaves_nothing_behind(tmp_path):
    pruned = remove_heads(tiny_gpt2(), torch.tensor([[1, 1, 0, 0]] * 3, dtype=torch.bool))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(InputError, match="is not an empty folder"):
        save_pruned(pruned, None, tmp_path / "full")
    with pytest.raises(InputError, match=r"'zip' is unknown\. Choose from compact, plain, padded"):
        save_pruned(pruned, None, tmp_path / "new", form="zip")
    with pytest.raises(InputError, match="takes the size of a head"):
        save_pruned(pruned, None, tmp_path / "new", form="plain")
    with pytest.raises(InputError, match="cannot be written"):
        save_pruned(pruned, None, tmp_path / "full" / "mine" / "new")
    del pruned.config.kept_heads
    with pytest.raises(InputError, match="does not say which heads it has lost"):
        save_pruned(pruned, None, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_dense_model_and_one_loaded_before_can_be_saved_too(tmp_path):
    dense = tiny_model("qwen3")
    save_pruned(dense, None, tmp_path / "dense")
    assert torch.equal(load_pruned(tmp_path / "dense")[0](IDS).logits, dense(IDS).logits)
    save_pruned(remove_heads(dense, HARD), None, tmp_path / "pruned")
    loaded, _ = load_pruned(tmp_path / "pruned")
    save_pruned(loaded, None, tmp_path / "again")
    assert torch.equal(load_pruned(tmp_path / "again")[0](IDS).logits, loaded(IDS).logits)
    shutil.rmtree(tmp_path / "dense")


def code_in(card, language):
    return [part.split("```")[0] for part in card.split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("form", ["compact", "plain", "padded"])
def test_code_in_the_card_runs_as_pasted(form, tmp_path, monkeypatch, capsys):
    """Every block by itself, in the folder; all of them write the same text, one token per byte of a random model."""
    dense = save_tiny_model(tmp_path / "dense", model=tiny_model("llama", vocab_size=257))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[:, 2:4] = False  # a group of each layer, which any form can hold
    model = remove_heads(AutoModelForCausalLM.from_pretrained(dense), keep)
    save_pruned(model, tokenizer, tmp_path / "model", form=form)
    monkeypatch.chdir(tmp_path / "model")
    blocks = code_in(Path("README.md").read_text("utf-8"), "python")
    assert len(blocks) == (2 if form == "compact" else 1)
    capsys.readouterr()
    for block in blocks:
        exec(block, {})
    prompt = tokenizer("The people of the United States", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0])
    assert capsys.readouterr().out == (expected + "\n") * len(blocks)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_card_names_the_attention_that_the_familys_own_class_needs(family, tmp_path):
    model = remove_heads(tiny_model(family), LAST_EMPTIED)
    for form in ("compact", "padded"):
        save_pruned(model, None, tmp_path / form, form=form)
        needed = 'attn_implementation="eager"' in (tmp_path / form / "README.md").read_text("utf-8")
        assert needed == (family == "gemma2" and form == "padded")


def test_code_in_the_card_of_a_model_without_tokenizer_loads_it(tmp_path, monkeypatch):
    save_pruned(remove_heads(tiny_model("llama"), HARD), None, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for block in code_in(Path("README.md").read_text("utf-8"), "python"):
        names = {}
        exec(block, names)
        assert names["model"].config.num_hidden_layers == 3


def test_the_card_says_in_one_line_what_was_lost_and_gained(tmp_path):
    """By hand: 26 / 20 = 1.3 times; 33 / 30 is 10 % more, 0.09 s against 0.1 s and 15 MB against 30 less."""
    measured = (
        BeforeAndAfter("perplexity", "on the evaluation text", 20.0, 26.0, "perplexity"),
        BeforeAndAfter("speed", "tokens per second", 30.0, 33.0),
        BeforeAndAfter("first-token latency", "s", 0.1, 0.09),
        BeforeAndAfter("key-value cache", "bytes, after a timed prompt", 30e6, 15e6),
    )
    model = remove_heads(tiny_model("llama"), HARD)
    for form in ("compact", "padded"):
        save_pruned(model, None, tmp_path / form, form=form, measured=measured)
    card = (tmp_path / "compact" / "README.md").read_text("utf-8")
    assert (
        "**Lost**: perplexity is 1.300 times the dense model's. **Gained**: speed +10.0 %, first-token latency −10.0 %, "
        "key-value cache −50.0 %.\n" in card
    )
    dense, left = (sum(p.numel() for p in one.parameters()) for one in (tiny_model("llama"), model))
    assert f"That leaves {left:,} of {dense:,} parameters (−{100 * (1 - left / dense):.1f} %)." in card
    padded = (tmp_path / "padded" / "README.md").read_text("utf-8")
    assert "**Gained**: nothing: its shapes are the dense model's." in padded


def test_half_of_the_heads_of_smollm2_are_a_small_part_of_its_parameters():
    """By hand: a head has 64 rows of query weights and as many output columns, 576 wide; 135 of 270 are 7.4 %."""
    recorded = Path(__file__).parents[1] / "recorded" / "hub_configs" / "HuggingFaceTB+SmolLM2-135M.json"
    fields = json.loads(recorded.read_text("utf-8"))
    config = AutoConfig.for_model(**fields)
    assert dense_parameters(config) == 134_515_008
    config.kept_heads = [[0, 1, 3, 4, 6]] * 15 + [[0, 3, 6, 7]] * 15  # some of each group: no key or value goes
    with torch.device("meta"):
        pruned = heads.pruned_classes("llama")[1](config)
    left = sum(parameter.numel() for parameter in pruned.parameters())
    assert 134_515_008 - left == 135 * 2 * 64 * 576
    assert round(100 * (1 - left / 134_515_008), 1) == 7.4


def test_tied_parameters_are_counted_once_in_the_card(tmp_path):
    model = tiny_model("gpt2")
    save_pruned(model, None, tmp_path / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"That leaves {count:,} of {count:,} parameters (" in (tmp_path / "model" / "README.md").read_text("utf-8")


def test_the_card_says_what_was_cut_and_which_ways_hold(tmp_path):
    model = remove_heads(tiny_model("llama"), HARD)
    model.config.pruning = {"base_model": "a|b <script>", "licence": "mit", "method": "fisher", "variant": "baseline"}
    save_pruned(model, None, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert ModelCard(card).data.license == "mit"
    assert "11 of 18 heads (61.1 %)" in card
    assert "| 0 | 0 | none | 0 |" in card
    assert "| 1 | 3 | 0, 3, 4 | 2 |" in card
    assert "a\\|b &lt;script>" in card
    assert "no: the plain form is not possible: layer 0 has lost all its heads" in card
    assert "**Lost and gained**: not measured." in card
    assert "Not measured." in card
    assert len(output_projections(load_pruned(tmp_path / "model")[0])) == 3
