"""The bundled tasks are what their script makes, of held-out text alone, by its rules."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from builders import load_script

from pruning_comparison.spec import BUNDLED_TASKS
from pruning_comparison.texts import load_documents

SCRIPT = Path(__file__).parents[1] / "scripts" / "bundled_tasks" / "make.py"
FOLDER = Path(str(files("pruning_comparison").joinpath("data", "tasks")))


@pytest.fixture(scope="module")
def make():
    return load_script(SCRIPT)


def questions(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def words_of(text):
    """Words with plain quotation marks, between single spaces, as the script has them."""
    plain = text.translate({ord("’"): "'", ord("‘"): "'", ord("“"): '"', ord("”"): '"'})
    return f" {' '.join(plain.split())} "


@pytest.fixture(scope="module")
def texts():
    return {
        name: load_documents(f"bundled:{name}", option="--text") for name in ("held_out", "validation", "calibration")
    }


def test_they_are_what_the_script_makes(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    for name in BUNDLED_TASKS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


def test_all_of_it_is_held_out_text(texts):
    """Whole passages stand in the address that they name, and in no text that is calibrated on or chosen by."""
    held_out = {document.name: words_of(document.text) for document in texts["held_out"]}
    others = " ".join(words_of(document.text) for name in ("validation", "calibration") for document in texts[name])
    for row in questions("sotu_last_word"):
        assert f" {row['context']} {row['word']}." in held_out[row["address"]]
        assert row["context"] not in others
    for row in questions("sotu_continuation"):
        assert f" {row['context']} {row['choices'][row['answer']]}" in held_out[row["address"]]
        assert all(f" {choice} " in held_out[row["address"]] for choice in row["choices"])
        assert row["context"] not in others


def test_a_last_word_has_occurred_before_and_none_is_asked_for_often():
    rows = questions("sotu_last_word")
    assert len(rows) == 276
    for row in rows:
        assert row["word"] in {re.sub(r"[^a-z]", "", word.lower()) for word in row["context"].split()}
        assert 50 <= len(row["context"].split()) <= 100
    assert max(Counter(row["word"] for row in rows).values()) == 5


def test_ways_to_go_on_are_four_alike_and_the_true_one_is_anywhere():
    rows = questions("sotu_continuation")
    assert len(rows) == 300
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert {len(choice.split()) for choice in row["choices"]} == {10}
    # A fair draw puts 75 of 300 in each place, give or take 7.5.
    assert all(50 < count < 100 for count in Counter(row["answer"] for row in rows).values())


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_the_first_questions_are_of_different_addresses(name):
    assert len({row["address"] for row in questions(name)[:25]}) == 25
