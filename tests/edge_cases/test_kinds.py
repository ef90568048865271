"""What is at the edge of what loads is measured as transformers itself computes it, or refused with the cause named."""

from __future__ import annotations

import pytest
import torch
from edge_cases.kinds import GENERATION, KINDS, base, with_json
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from pruning_comparison.checkpoint.forms import load_pruned, save_pruned
from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.measure.perplexity import evaluation_windows
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.models.heads import head_grid
from pruning_comparison.models.loading import check_tokenizer
from pruning_comparison.pruning import mask_heads, remove_heads
from pruning_comparison.texts import Document, load_documents, tokenize

LOADS = [name for name, kind in KINDS.items() if kind.refused is None]
REFUSED = [name for name, kind in KINDS.items() if kind.refused is not None]
IDS = torch.randint(1, 4096, (2, 19), generator=torch.Generator().manual_seed(7))


def refusal(load):
    """What a load is refused with, None where it is not."""
    try:
        load()
    except ModelLoadError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused_with_the_cause(name, tmp_path):
    KINDS[name].build(tmp_path)
    with pytest.raises(ModelLoadError, match=KINDS[name].refused):
        load_model(preview_model(str(tmp_path)))


@pytest.mark.parametrize("name", LOADS)
def test_what_loads_is_the_model_of_transformers_pruned_or_not(name, tmp_path):
    """Dense logits equal those of from_pretrained; with some heads gone, those of the same model with their inputs to the
    output projection set to zero by a hook that knows nothing of this package."""
    KINDS[name].build(tmp_path)
    loaded = load_model(preview_model(str(tmp_path))).model
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_attentions=False, output_hidden_states=False,
        return_dict=True, use_cache=False,
    ).eval()  # fmt: skip
    with torch.inference_mode():
        expected = stock(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        grid = head_grid(loaded.config)
        keep = torch.rand(grid.n_layers, grid.n_heads, generator=torch.Generator().manual_seed(3)) > 0.4
        size = 48 // 6  # every kind is 48 wide and has 6 heads of its own size
        assert (grid.n_heads, grid.head_size) == (6, size)
        names = ("o_proj", "out_proj", "attn.c_proj", "attention.dense")
        outputs = [module for path, module in stock.named_modules() if path.endswith(names)]
        for module, kept in zip(outputs, keep, strict=True):
            mask = kept.repeat_interleave(size).float()
            module.register_forward_pre_hook(lambda m, inputs, mask=mask: (inputs[0] * mask, *inputs[1:]))
        without = stock(input_ids=IDS).logits
        torch.testing.assert_close(remove_heads(loaded, keep)(input_ids=IDS).logits, without, rtol=1e-4, atol=1e-4)
        with mask_heads(loaded, keep):
            torch.testing.assert_close(loaded(input_ids=IDS).logits, without, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, expected, atol=1e-2)


@pytest.mark.parametrize("name", LOADS)
def test_what_loads_is_saved_with_its_whole_generation_config(name, tmp_path):
    KINDS[name].build(tmp_path / "dense")
    preview = preview_model(str(tmp_path / "dense"))
    loaded = load_model(preview).model
    keep = head_grid(loaded.config).all_heads()
    keep[0, :3] = keep[1, 1:4] = False
    saved = save_pruned(remove_heads(loaded, keep), preview.tokenizer, tmp_path / "pruned")
    stored = GenerationConfig.from_pretrained(tmp_path / "dense").to_diff_dict()
    again = GenerationConfig.from_pretrained(saved).to_diff_dict()
    for settings in (stored, again):
        settings.pop("transformers_version", None)
    assert again == stored
    model, _ = load_pruned(saved)
    found = model.generation_config.to_diff_dict()
    found.pop("transformers_version", None)
    assert found == stored


def test_a_text_ends_where_generate_would_end_it(tmp_path):
    KINDS["several end tokens in generation_config.json"].build(tmp_path)
    preview = preview_model(str(tmp_path))
    assert preview.end_of_text() == {0, *GENERATION["eos_token_id"]}
    measured = load_model(preview).model.generation_config
    assert (measured.repetition_penalty, measured.do_sample) == (
        GenerationConfig().repetition_penalty,
        GenerationConfig().do_sample,
    )
    assert set(measured.eos_token_id) == {0, 17}


def test_the_identity_of_a_model_knows_what_ends_a_text_and_how_it_is_cut(tmp_path):
    identities = set()
    for name in (
        "a plain model",
        "several end tokens in generation_config.json",
        "offsets without the space before a word",
    ):
        KINDS[name].build(tmp_path / name)
        identities.add(preview_model(str(tmp_path / name)).identity())
    assert len(identities) == 3


def test_an_added_word_is_refused_where_a_text_has_it(tmp_path):
    from pruning_comparison.run.inputs import prepare
    from pruning_comparison.spec import ComparisonSpec

    KINDS["an added word that no text contains"].build(tmp_path / "model")
    spec = {"model_name": str(tmp_path / "model"), "calibration_tokens": 512, "eval_tokens": 256, "num_tokens": 4}
    prepare(ComparisonSpec(**spec), identify=False)
    (tmp_path / "prompts.txt").write_text("the rare Zyzzyva\n")
    with pytest.raises(InputError, match=r"--prompt_file: .*'Zyzzyva' the id 4096, and the model has 4096 rows"):
        prepare(ComparisonSpec(**spec, prompt_file=str(tmp_path / "prompts.txt")), identify=False)
    (tmp_path / "text.txt").write_text("the rare Zyzzyva " * 400)
    with pytest.raises(InputError, match=r"--eval_text: .*'Zyzzyva'"):
        prepare(ComparisonSpec(**spec, eval_text=str(tmp_path / "text.txt")), identify=False)
    with pytest.raises(InputError, match=r"--calibration_text: .*'Zyzzyva'"):
        prepare(ComparisonSpec(**spec, calibration_text=str(tmp_path / "text.txt")), identify=False)


@pytest.mark.parametrize("name", ["a plain model", "offsets without the space before a word"])
@pytest.mark.parametrize("stride", [1, 16, 63])
def test_the_bytes_of_all_windows_are_those_of_the_text_without_its_first_token(name, stride, tmp_path):
    KINDS[name].build(tmp_path)
    tokenizer = preview_model(str(tmp_path)).tokenizer
    text = load_documents("bundled:held_out", option="--eval_text")[0].text[:4_000] + " caf\u00e9 \N{GRINNING FACE} end"
    first = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:1])
    windows = evaluation_windows([Document("d", text)], tokenizer, window=64, stride=stride, tokens=10**6)
    assert sum(w.targets for w in windows) == len(tokenize(tokenizer, text)[0]) - 1
    assert sum(w.targets_bytes for w in windows) == len(text.encode()) - len(first.encode())
    assert sum(w.targets_words for w in windows) == len(text.split()) - 1


def test_a_tokenizer_that_loses_what_its_file_keeps_is_refused(tmp_path):
    """Some releases of transformers rebuild a splitting rule of their own for Llama's class, others read the file."""
    with_json("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})(tmp_path)
    text = "two  spaces,\na line"
    original = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    outcome = refusal(lambda: preview_model(str(tmp_path)))
    if outcome is None:
        tokenizer = preview_model(str(tmp_path)).tokenizer
        assert tokenize(tokenizer, text)[0] == original.encode(text, add_special_tokens=False).ids
    else:
        assert "does not do what its tokenizer.json says" in outcome

    class Spaceless:
        is_fast = True

        def __call__(self, text, **settings):
            return {"input_ids": original.encode(text.replace(" ", ""), add_special_tokens=False).ids}

        def decode(self, ids, **settings):
            return original.decode(ids)

    with pytest.raises(
        ModelLoadError, match=r"comes back as .Aprobe:.*PreTrainedTokenizerFast there reads tokenizer\.json"
    ):
        check_tokenizer(Spaceless(), str(tmp_path), "x")


def test_wikitext_has_its_articles_with_either_end_of_line_and_titles_of_one_letter(tmp_path):
    lines = [
        " = Robert = ",
        "He acts .",
        " = = Career = = ",
        "More .",
        " = A = ",
        "A letter .",
        " = 7 = ",
        "A number .",
    ]
    found = {}
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(end.join(lines).encode())
        documents = load_documents(str(tmp_path / f"{name}.txt"), option="--eval_text")
        found[name] = [document.text.split() for document in documents]
    assert found["unix"] == found["windows"]
    assert [words[1] for words in found["unix"]] == ["Robert", "A", "7"]
    assert "Career" in found["unix"][0]


def test_every_kind_is_on_the_page_that_says_what_is_checked():
    from pathlib import Path

    page = (Path(__file__).resolve().parents[2] / "docs" / "what-is-checked.md").read_text("utf-8")
    for kind in KINDS.values():
        outcome = "refused" if kind.refused else "as transformers"
        assert any(line.startswith(f"| {kind.name} | {outcome}") for line in page.splitlines()), kind.name


def test_the_base_of_all_kinds_is_a_model_that_loads(tmp_path):
    assert base(tmp_path)
