"""Texts of the hub: how they are named, how rows become documents, and what is said where they cannot be read.

What reads them is the package datasets, for which most tests have a stand-in. Those named after it read real caches with it;
`make test-extras` has an environment for them.
"""

from __future__ import annotations

import gzip
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pruning_comparison.errors import InputError
from pruning_comparison.hub_texts import hub_text_of
from pruning_comparison.texts import load_documents, text_facts, text_name

RAW = (
    " \n = Valkyria = \n \n Senjō no Valkyria 3 is a game . \n It is played . \n \n = = Gameplay = = \n \n Text . \n \n"
    " = B = \n \n The B was built . \n \n = = = Details = = = \n More . \n \n"
)
"""Two articles as WikiText's raw files have them."""

ROWS = [line if line.strip() else "" for line in RAW.splitlines(keepends=True)]
"""The same as the hub's Salesforce/wikitext has it: a row per line, and blank lines empty."""


class Table:
    """What ``load_dataset`` gives, as far as it is used: columns by name."""

    def __init__(self, **columns):
        self.columns = columns
        self.column_names = list(columns)
        self.features = {
            name: SimpleNamespace(dtype="string" if all(isinstance(one, str) for one in values) else "int64")
            for name, values in columns.items()
        }

    def select_columns(self, names):
        return Table(**{name: self.columns[name] for name in names})

    def __iter__(self):
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in for datasets in place that gives a table, or raises an error, and keeps what it was asked for."""

    def put(result):
        asked = []

        def load_dataset(*names, **options):
            asked.append((*names, options))
            if isinstance(result, Exception):
                raise result
            return result

        module = ModuleType("datasets")
        module.load_dataset = load_dataset
        module.are_progress_bars_disabled = lambda: False
        module.disable_progress_bars = module.enable_progress_bars = lambda: None
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return put


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None)),
        ("hf:imdb:train", ("imdb", None, "train", None)),
        ("hf:a/b:train[:10%]", ("a/b", None, "train[:10%]", None)),
        ("hf:a/b:c:train[10:20]#abstract", ("a/b", "c", "train[10:20]", "abstract")),
    ],
)
def test_a_split_is_named_by_data_set_configuration_and_split(source, parts):
    found = hub_text_of(source, "--eval_text")
    assert (found.dataset, found.config, found.split, found.column) == parts


@pytest.mark.parametrize("source", ["hf:", "hf:a/b", "hf:a:b:c:d", "hf::test", "hf:a/b:"])
def test_what_names_no_split_is_refused_with_the_form(source):
    with pytest.raises(InputError, match=r"--eval_text: .* names no split .*hf:DATASET:CONFIG:SPLIT"):
        load_documents(source, option="--eval_text")


def test_lines_of_wikitext_are_joined_into_the_documents_of_its_raw_file(stand_in, tmp_path):
    asked = stand_in(Table(text=ROWS))
    found = load_documents("hf:Salesforce/wikitext:wikitext-2-raw-v1:test", option="--eval_text")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})]
    (tmp_path / "wiki.test.raw").write_text(RAW, "utf-8")
    raw = load_documents(str(tmp_path / "wiki.test.raw"), option="--eval_text")
    assert [document.text for document in found] == [document.text for document in raw]
    assert [document.text[:13] for document in found] == [" = Valkyria =", " = B = \n \n Th"]
    assert found[0].name == "Salesforce/wikitext:wikitext-2-raw-v1:test#0"


def pages_of_the_harness(text):
    """How EleutherAI/wikitext_document_level, which lm-evaluation-harness reads, makes pages of the raw file."""
    page, pages = [], []
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if "\n".join(page).strip():
                pages.append("\n".join(page))
            page = []
        page.append(line)
    return [*pages, "\n".join(page)]


def test_documents_are_the_pages_of_lm_evaluation_harness_but_for_a_line_feed_at_the_end(stand_in):
    stand_in(Table(text=ROWS))
    found = load_documents("hf:Salesforce/wikitext:wikitext-2-raw-v1:test", option="--eval_text")
    assert [document.text.rstrip("\n") for document in found] == [
        page.rstrip("\n") for page in pages_of_the_harness(RAW)
    ]


def test_rows_of_other_data_sets_are_one_document_each(stand_in):
    stand_in(Table(label=[1, 0, 1], text=["One text.", "  ", "= not a title = it goes on"]))
    found = load_documents("hf:a/b:train", option="--eval_text")
    assert [(one.name, one.text) for one in found] == [
        ("a/b:train#0", "One text."),
        ("a/b:train#2", "= not a title = it goes on"),
    ]


def test_pages_that_begin_with_a_title_stay_whole(stand_in):
    """EleutherAI/wikitext_document_level has a page in a row: nothing is to be joined."""
    pages = [" = A = \n \n First . \n", " = B = \n \n Second . \n"]
    stand_in(Table(page=pages))
    assert [one.text for one in load_documents("hf:a/b:test", option="--eval_text")] == pages


def test_the_column_is_the_one_named_the_usual_one_or_the_only_one(stand_in):
    stand_in(Table(title=["t"], text=["usual"], abstract=["named"]))
    assert load_documents("hf:a/b:train", option="--eval_text")[0].text == "usual"
    assert load_documents("hf:a/b:train#abstract", option="--eval_text")[0].text == "named"
    stand_in(Table(number=[3], passage=["only"]))
    assert load_documents("hf:a/b:train", option="--eval_text")[0].text == "only"
    stand_in(Table(question=["q"], answer=["a"]))
    with pytest.raises(InputError, match=r"has 2 columns of text\. Name one with #COLUMN, from question, answer"):
        load_documents("hf:a/b:train", option="--eval_text")
    with pytest.raises(InputError, match=r"column: 'anwser' is unknown\. Did you mean answer"):
        load_documents("hf:a/b:train#anwser", option="--eval_text")
    stand_in(Table(number=[3]))
    with pytest.raises(InputError, match="has no column of text"):
        load_documents("hf:a/b:train", option="--eval_text")
    with pytest.raises(InputError, match="the column 'number' of a/b:train holds a int and not text"):
        load_documents("hf:a/b:train#number", option="--eval_text")


def test_too_much_text_and_none_are_refused(stand_in, monkeypatch):
    monkeypatch.setattr("pruning_comparison.texts._MOST_TEXT_BYTES", 10)
    stand_in(Table(text=["0123456789", "x"]))
    with pytest.raises(
        InputError, match=re.escape("more than 10 bytes of text. Give a part of it, such as train[:1000]")
    ):
        load_documents("hf:a/b:train", option="--eval_text")
    stand_in(Table(text=["", " "]))
    with pytest.raises(InputError, match="holds no text"):
        load_documents("hf:a/b:train", option="--eval_text")


def test_without_the_package_the_error_names_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets, and it is not installed"):
        load_documents("hf:a/b:train", option="--eval_text")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"),
            "Without a network only what datasets has in its",
        ),
        (
            ValueError("Unknown split \"tset\". Should be one of ['test']."),
            "Check the names of data set, configuration",
        ),
    ],
)
def test_a_data_set_that_cannot_be_read_says_why_and_what_would_help(stand_in, error, advice):
    stand_in(error)
    with pytest.raises(InputError) as caught:
        load_documents("hf:a/b:train", option="--calibration_text")
    assert str(caught.value).startswith(
        f"--calibration_text: a/b:train cannot be read: {type(error).__name__}: {error}"
    )
    assert advice in str(caught.value)


def test_a_texts_name_and_facts_have_no_place_of_this_machine():
    assert text_name("/home/me/wiki.test.raw") == "wiki.test.raw"
    assert text_name("hf:/home/me/tales:train") == "tales:train"
    assert text_facts("hf:/home/me/tales:train") == {"text": "tales:train"}
    assert text_facts("hf:a/b:c:test") == {"text": "a/b:c:test", "dataset": "a/b", "config": "c", "split": "test"}
    assert text_facts("bundled:held_out") == {"text": "bundled:held_out"}


# With the package itself


@pytest.mark.own_venv
@pytest.mark.filterwarnings("ignore")
def test_datasets_reads_a_folder_and_a_cached_copy_without_a_network(tmp_path, monkeypatch):
    """The cache is built from a folder, and put where a data set of the hub has its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "source"
    source.mkdir()
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(str(source / "test.parquet"))
    (tmp_path / "wiki.raw.gz").write_bytes(gzip.compress(RAW.encode()))
    expected = [one.text for one in load_documents(str(tmp_path / "wiki.raw.gz"), option="--eval_text")]
    found = load_documents(f"hf:{source}:test", option="--eval_text")
    assert [one.text for one in found] == expected
    assert found[0].name == "source:test#0"

    built = datasets.load_dataset_builder(str(source))
    built.download_and_prepare()
    place = tmp_path / "cache" / "someone___tales" / "default" / "0.0.0" / ("0" * 40)
    place.parent.mkdir(parents=True)
    shutil.copytree(built.cache_dir, place)
    for file in place.glob("*.arrow"):
        file.rename(place / file.name.replace("parquet", "tales").replace("source", "tales"))
    assert [one.text for one in load_documents("hf:someone/tales:default:test", option="--eval_text")] == expected


@pytest.mark.own_venv
@pytest.mark.filterwarnings("ignore")
def test_datasets_errors_are_said_in_words(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError) as caught:
        load_documents("hf:someone/not-here:test", option="--eval_text")
    assert "someone/not-here:test cannot be read: " in str(caught.value)
    assert "Without a network only what datasets has in its cache" in str(caught.value)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(InputError, match=r"Unknown split.*Check the names"):
        load_documents(f"hf:{tmp_path / 'set'}:test", option="--eval_text")
