"""Word perplexity of WikiText: pages, words and windows worked out by hand. The harness: ``test_lm_eval_parity.py``."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from builders import save_tiny_model, tiny_gpt2, tiny_spec

from pruning_comparison.analysis import observations, summarize
from pruning_comparison.errors import InputError
from pruning_comparison.measure.wikitext import Page, detokenised, page_nats, pages_of, words_of
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.measure_cell import perplexity_measurements
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.texts import Document


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (" = A title = \n \n A game . \n ", " = A title =\n\nA game.\n"),
        (
            "the 1 @,@ 234 well @-@ known 3 @.@ 5 ; so , yes ! no ? it : that",
            "the 1,234 well-known 3.5; so, yes! no? it: that",
        ),
        ('he said " so it is " ( or [ not ] )', 'he said "so it is" (or [not])'),
        ("the dogs ' tail", "the dogs' tail"),
        ("it 's 5 ° C", "it's 5°C"),
        ("= = = = Small = = = = and = = Large = =", "==== Small ==== and == Large =="),
        ("of N men", "of 1 men"),
    ],
)
def test_spaces_of_wikitext_are_undone(page, expected):
    assert detokenised(page) == expected


def test_words_are_counted_before_and_white_space_at_both_ends_adds_one_each():
    assert words_of(" = A = \n \n Two words . \n ") == 8  # "", =, A, =, Two, words, ., ""
    assert words_of("1 @,@ 234") == 3  # one word, 1,234, afterwards


class Letters:
    """A tokenizer with an id for each letter, and 1 for what begins a text."""

    bos_token_id, eos_token_id = 1, None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text], "offset_mapping": [(n, n + 1) for n in range(len(text))]}


def test_windows_follow_one_another_and_the_last_is_filled_up_with_context():
    """ "\\n = A =\\nbcd\\n" has 10 letters after spaces are undone; windows of 4 predict 4, 4 and 2 of them."""
    documents = [Document("a", " = A = \nbcd\n\n"), Document("b", " = B = \n")]
    (page,) = pages_of(documents, {"a"}, Letters(), window=4)
    text = [ord(letter) for letter in " = A =\nbcd\n"]
    assert len(text) == 11
    assert [(ids.tolist(), scored) for ids, scored in page.windows] == [
        ([1, *text[:4]], 4),
        (text[3:8], 4),
        (text[6:11], 3),
    ]
    assert page.words == 6  # "", =, A, =, bcd, ""
    (short,) = pages_of(documents, {"b"}, Letters(), window=50)
    assert [(len(ids), scored) for ids, scored in short.windows] == [(1 + len(" = B =\n"), len(" = B =\n"))]


def test_the_loss_of_a_page_is_that_of_each_token_after_its_context():
    model = tiny_gpt2(context=8)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (19,), generator=draw)
    begun = torch.cat([torch.tensor([1]), ids])
    windows = ((begun[:9], 8), (ids[7:16], 8), (ids[10:19], 3))
    (nats,) = page_nats(model, [Page("a", windows, 5)], batch_size=2)
    expected = 0.0
    for window, scored in windows:
        with torch.no_grad():
            logits = model(window[:-1][None]).logits[0].double().log_softmax(-1)
        expected -= sum(float(logits[-place, window[-place]]) for place in range(1, scored + 1))
    assert nats == pytest.approx(expected, rel=1e-5)


def test_word_perplexity_is_that_of_all_pages_together():
    """40 words of two pages with 30 and 50 nats: exp(80 / 40), whatever the windows' own losses are."""
    cell = {"variant": "baseline", "method": "fisher", "iteration": 0, "level": 0.0}
    nowhere = {
        "temperature": math.nan,
        "prompt": math.nan,
        "repeat": math.nan,
        "reason": None,
        "phase": "quality",
        "unit": "",
    }
    rows = []
    for document, nats, words in (("a", 30.0, 10.0), ("b", 50.0, 30.0)):
        for metric, value in (
            ("window_nats", 7.0),
            ("window_tokens", 3.0),
            ("window_bytes", 9.0),
            ("window_words", 2.0),
        ):
            rows.append({**cell, **nowhere, "metric": metric, "value": value, "document": document, "window": 0})
        for metric, value in (("page_nats", nats), ("page_words", words)):
            rows.append({**cell, **nowhere, "metric": metric, "value": value, "document": document, "window": math.nan})
    tables = observations(pd.DataFrame([{**cell, "status": "done", "fingerprint": "f"}]), pd.DataFrame(rows))
    found = summarize("m", tables).set_index("metric")["estimate"]
    assert found["wikitext_word_perplexity"] == pytest.approx(math.exp(2.0))
    assert found["perplexity"] == pytest.approx(math.exp(7 / 3))
    without = pd.DataFrame([row for row in rows if not row["metric"].startswith("page_")])
    again = observations(pd.DataFrame([{**cell, "status": "done", "fingerprint": "f"}]), without)
    assert "wikitext_word_perplexity" not in again


def test_a_run_measures_it_where_it_is_asked_for_and_only_on_wikitext(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    wiki = tmp_path / "wiki.txt"
    wiki.write_text("".join(f" = Page {n} = \n \n Some words , of page {n} . \n \n" for n in range(3)))
    (tmp_path / "calibration.txt").write_text("other words " * 100)
    settings = {
        "eval_text": str(wiki), "calibration_text": str(tmp_path / "calibration.txt"), "variants": ("baseline",),
        "eval_window": 32, "eval_stride": 32,
    }  # fmt: skip
    spec = tiny_spec(folder, **settings, wikitext_words=True)
    workspace = load_workspace(spec, prepare(spec))
    rows = perplexity_measurements(workspace, build(workspace, Cell("baseline", "magnitude", 0, 50.0)))
    words = {row.document: row.value for row in rows if row.metric == "page_words"}
    # "", =, Page, n, =, Some, words, ,, of, page, n, ., ""
    assert words == {"wiki.txt#0": 13, "wiki.txt#1": 13, "wiki.txt#2": 13}
    assert len([row for row in rows if row.metric == "page_nats"]) == 3
    assert not prepare(tiny_spec(folder, **settings)).pages
    (tmp_path / "plain.txt").write_text("no title here " * 20)
    other = tiny_spec(folder, **{**settings, "eval_text": str(tmp_path / "plain.txt")}, wikitext_words=True)
    with pytest.raises(InputError, match=r"--wikitext_words: plain\.txt does not begin with a title"):
        prepare(other)


def test_the_setting_changes_which_run_it_is_and_its_default_does_not():
    """Runs that were stored before the setting came are still the same runs."""
    inputs = {"model": "m"}
    plain = ComparisonSpec()
    stored = plain.as_dict()
    del stored["wikitext_words"]
    assert ComparisonSpec.from_dict(stored).content_hash(inputs) == plain.content_hash(inputs)
    assert ComparisonSpec(wikitext_words=True).content_hash(inputs) != plain.content_hash(inputs)
