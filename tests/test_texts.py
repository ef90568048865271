"""Texts: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import gzip

import pytest
import torch
from builders import Letters

from pruning_comparison.errors import InputError
from pruning_comparison.texts import Document, digest, load_documents, load_prompts, sample_windows, whole_windows


def test_a_file_is_one_document_and_a_folder_one_per_file(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    assert load_documents(str(tmp_path), option="--eval_text") == [
        Document("a.txt", "first"),
        Document("b.txt", "second"),
    ]
    assert load_documents(str(tmp_path / "a.txt"), option="--eval_text") == [Document("a.txt", "first")]


def test_wikitext_articles_are_documents(tmp_path):
    text = " \n = One = \n \n Text of one . \n = = Section = = \n more \n = Two = \n \n Text of two . \n"
    path = tmp_path / "wiki.raw.gz"
    path.write_bytes(gzip.compress(text.encode()))
    documents = load_documents(str(path), option="--eval_text")
    assert [document.name for document in documents] == ["wiki.raw.gz#0", "wiki.raw.gz#1"]
    assert "Section" in documents[0].text
    assert documents[1].text.startswith(" = Two =")


def test_bundled_texts_are_disjoint():
    texts = {name: load_documents(f"bundled:{name}", option="x") for name in ("held_out", "validation", "calibration")}
    names = [document.name for documents in texts.values() for document in documents]
    assert len(names) == len(set(names))
    assert len(texts["held_out"]) >= 20


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [("gone.txt", None, "does not exist"), ("void.txt", b"", "no text"), ("odd.txt", b"\xff\xfe\x00a", "UTF-8")],
)
def test_texts_that_cannot_be_used(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        load_documents(str(tmp_path / name), option="--eval_text")
    assert "--eval_text" in str(caught.value)
    with pytest.raises(InputError, match="--prompt_file"):
        load_prompts(str(tmp_path / name), 5)


def test_an_unknown_bundled_text_lists_the_known_ones():
    with pytest.raises(InputError, match="held_out, validation, calibration"):
        load_documents("bundled:nothing", option="--eval_text")


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone \r\n\r\n  two\r\nthree\n")
    assert load_prompts(str(path), 2) == ["one", "two"]
    assert len(load_prompts(None, 5)) == 5


def test_calibration_windows_are_whole_distinct_and_seeded():
    documents = [Document("a", "abcdefghij" * 3), Document("b", "ABCDEFGHIJ" * 2 + "xyz")]

    available = whole_windows(documents, Letters(), 10)

    def sample(seed, tokens=30):
        return sample_windows(available, tokens, torch.Generator().manual_seed(seed))

    assert sample(0).shape == (3, 10)
    assert torch.equal(sample(0), sample(0))
    whole = {tuple(row) for row in sample(0, 50).tolist()}
    assert whole == {tuple(Letters()(text)["input_ids"]) for text in ("abcdefghij", "ABCDEFGHIJ")}
    with pytest.raises(InputError, match="only 50 in whole windows of 10"):
        sample(0, 51)


def test_digests_follow_contents():
    assert digest(["a", "b"]) == digest(["a", "b"])
    assert len({digest(["a", "b"]), digest(["ab"]), digest(["b", "a"]), digest(["a", "\ud800"])}) == 4
