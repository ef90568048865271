"""A token that begins texts: whose tokenizer gives one by default, where it stands, and that nothing counts it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from edge_cases.kinds import base

from pruning_comparison.errors import ModelLoadError
from pruning_comparison.measure.perplexity import evaluation_windows, measure_perplexity, perplexity_of
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.texts import Document, tokenize, whole_windows

TEXT = "We the People of the United States, in Order to form a more perfect Union, establish Justice. " * 6


def with_bos(folder):
    """The bundled tokenizer with a rule that puts its token 0 before every text, as Gemma's and Llama's do."""
    base(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text("utf-8"))
    name = next(token["content"] for token in stored["added_tokens"] if token["id"] == 0)
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    path.write_text(json.dumps(stored), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": name}), "utf-8")
    return preview_model(str(folder))


def test_the_tokenizers_own_default_decides_unless_told_otherwise(tmp_path):
    begins = with_bos(tmp_path / "begins")
    assert begins.tokenizer("a")["input_ids"][0] == 0
    assert [begins.bos(rule) for rule in ("auto", "always", "never")] == [0, 0, None]
    bundled = preview_model("bundled")
    assert bundled.bos("auto") is None
    assert bundled.bos("always") == bundled.tokenizer.bos_token_id
    bundled.tokenizer.bos_token = None
    with pytest.raises(ModelLoadError, match="--bos: the tokenizer of bundled has no token that begins texts"):
        bundled.bos("always")
    with pytest.raises(ValueError, match="choose one of auto, always, never"):
        bundled.bos("perhaps")


def test_every_window_begins_with_it_and_never_scores_it(tmp_path):
    tokenizer = with_bos(tmp_path).tokenizer
    ids, _ = tokenize(tokenizer, TEXT)
    assert 0 not in ids
    windows = evaluation_windows([Document("d", TEXT)], tokenizer, window=16, stride=16, tokens=10**6, bos=0)
    assert all(window.ids[0] == 0 and 0 not in window.ids[1:] for window in windows)
    assert max(len(window.ids) for window in windows) == 16
    assert [int(token) for window in windows for token in window.ids[1:]] == ids
    # The first token of the document is scored, since it has a context; in later windows the first of the text is not.
    assert [window.targets for window in windows][:2] == [15, 14]
    assert windows[0].targets_bytes == len(tokenizer.decode(ids[:15]).encode())
    calibration = whole_windows([Document("d", TEXT)], tokenizer, 16, bos=0)
    assert calibration[:, 0].tolist() == [0] * len(calibration)
    assert calibration[:, 1:].flatten().tolist() == ids[: 15 * (len(ids) // 15)]


def test_perplexity_of_a_document_of_one_window_is_that_of_its_tokens_after_the_first_one(tmp_path):
    """Worked out from transformers' own loss over the ids that the tokenizer gives by default."""
    preview = with_bos(tmp_path)
    model = load_model(preview).model
    text = TEXT[:200]
    ids = torch.tensor([preview.tokenizer(text)["input_ids"]])
    assert ids[0, 0] == 0
    with torch.inference_mode():
        expected = math.exp(float(model(input_ids=ids, labels=ids).loss))
    windows = evaluation_windows(
        [Document("d", text)], preview.tokenizer, window=128, stride=128, tokens=10**6, bos=preview.bos("auto")
    )
    assert len(windows) == 1
    assert perplexity_of(measure_perplexity(model, windows, batch_size=1)) == pytest.approx(expected, rel=1e-5)
