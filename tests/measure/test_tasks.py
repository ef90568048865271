"""Zero-shot tasks by lm-evaluation-harness on models in memory. `make test-extras` installs what they need."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import cut_off_after, save_tiny_model, tiny_spec, unmeasured, write_short_texts
from scipy import stats

from pruning_comparison.checkpoint import save_pruned
from pruning_comparison.errors import InputError
from pruning_comparison.measure.tasks import load_tasks
from pruning_comparison.models.loading import load_model, preview_model
from pruning_comparison.pruning import remove_heads
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.launchers import RayLauncher
from pruning_comparison.spec import BUNDLED_TASKS
from pruning_comparison.store import RunStore, load_run

pytestmark = [
    pytest.mark.extras,
    # Other people's warnings; what is compared here are numbers.
    pytest.mark.filterwarnings("ignore"),
]

FOLDER = Path(str(files("pruning_comparison").joinpath("data", "tasks")))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing here may need a network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def bundled():
    return load_model(preview_model("bundled"))


def own_task(folder: Path, name: str = "colours") -> Path:
    """A task of a user's own: a YAML file, and questions in a JSON file beside it, some of which share their context."""
    questions = [
        {"text": "The sky of a clear day is", "choices": [" blue", " green as grass", " so red"], "right": 0},
        {"text": "The sky of a clear day is", "choices": [" blue", " an old apple"], "right": 1},
        {"text": "Fellow citizens of the Senate and of the", "choices": [" House", " Union of the people"], "right": 0},
    ]
    (folder / f"{name}.json").write_text(json.dumps(questions))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / name}.json\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{text}}'\ndoc_to_target: right\n"
        "doc_to_choice: choices\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return path


def by_hand(checkpoint: Path, tasks: list[str], limit: int, **settings):
    """The harness itself on a saved checkpoint: its samples, by task."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, trust_remote_code=True, **settings)
    found = simple_evaluate(
        model=model, tasks=tasks, limit=limit, log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    return found["samples"]


@pytest.mark.parametrize("mask", ["none", "random"])
def test_answers_are_those_of_the_harness_on_the_saved_checkpoint(bundled, tmp_path, mask):
    """Accuracies and log-likelihoods, question by question, of a pruned model and of one that has lost nothing."""
    keep = torch.ones(6, 8, dtype=torch.bool)
    if mask == "random":
        keep = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) > 0.5
        keep[2] = False  # a layer without heads
    model = remove_heads(bundled.model, keep)
    save_pruned(model, bundled.tokenizer, tmp_path / "saved")
    own = own_task(tmp_path)
    yamls = [*(FOLDER / f"{name}.yaml" for name in BUNDLED_TASKS), own]
    theirs = by_hand(tmp_path / "saved", list(map(str, yamls)), 25)
    tasks = load_tasks((*BUNDLED_TASKS, str(own)), 25)
    assert tasks.questions == {**dict.fromkeys(BUNDLED_TASKS, 25), "colours": 3}
    ours = tasks.answers(model, bundled.tokenizer, bos=None, batch_size=8)
    assert Counter(answer.task for answer in ours) == tasks.questions
    for answer in ours:
        (sample,) = [one for one in theirs[answer.task] if one["doc_id"] == answer.question]
        assert answer.scores["accuracy"] == sample["acc"]
        assert answer.scores.get("accuracy_normalised") == sample.get("acc_norm")
        expected = [float(one[0][0]) for one in sample["resps"]]
        assert list(answer.log_likelihoods) == pytest.approx(expected, abs=2e-3, rel=1e-5)
    again = tasks.answers(model, bundled.tokenizer, bos=None, batch_size=8)
    assert again == ours


def test_texts_begin_by_the_rule_of_the_run(bundled):
    """With a beginning token a model's answers are those of the harness with it, and others than without."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Beginning(HFLM):
        """The harness's model, whose texts are given a first token by hand."""

        def tok_encode(self, string, add_special_tokens=None, **settings):
            ids = super().tok_encode(string, add_special_tokens=False)
            return ids if add_special_tokens is False else [7, *ids]

    theirs = simple_evaluate(
        model=Beginning(pretrained=bundled.model, tokenizer=bundled.tokenizer, backend="causal", batch_size=4),
        tasks=[str(FOLDER / "sotu_continuation.yaml")], limit=6, log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )["samples"]["sotu_continuation"]  # fmt: skip
    tasks = load_tasks(("sotu_continuation",), 6)
    ours, without = (
        tasks.answers(bundled.model, bundled.tokenizer, bos=bos, batch_size=8) for bos in (7, None)
    )  # fmt: skip
    for answer, sample, other in zip(ours, theirs, without, strict=True):
        expected = [float(one[0][0]) for one in sample["resps"]]
        assert list(answer.log_likelihoods) == pytest.approx(expected, abs=2e-3)
        assert list(other.log_likelihoods) != pytest.approx(expected, abs=2e-3)


def test_asking_leaves_model_and_tokenizer_as_they_were(bundled):
    ids = torch.arange(40)[None] + 300
    before = bundled.model(input_ids=ids).logits
    pad = bundled.tokenizer.pad_token
    load_tasks(BUNDLED_TASKS, 3).answers(bundled.model, bundled.tokenizer, bos=None, batch_size=2)
    assert torch.equal(bundled.model(input_ids=ids).logits, before)
    assert bundled.tokenizer.pad_token == pad


def test_tokens_are_counted_as_they_are_read(bundled):
    """All of the contexts once, and of each of four ways to go on all but its last token."""
    tasks = load_tasks(("sotu_continuation",), 5)
    rows = [json.loads(line) for line in (FOLDER / "sotu_continuation.jsonl").read_text("utf-8").splitlines()[:5]]

    def count(text):
        return len(bundled.tokenizer(text)["input_ids"])

    by_row = [
        count(row["context"])
        + sum(count(f"{row['context']} {end}") - count(row["context"]) - 1 for end in row["choices"])
        for row in rows
    ]
    assert tasks.tokens(bundled.tokenizer, None) == sum(by_row)
    assert tasks.tokens(bundled.tokenizer, 0) == sum(by_row) + 5


def test_what_is_not_finite_has_no_score(bundled):
    model = copy.deepcopy(bundled.model)
    model.lm_head.weight.data[5] = math.nan
    found = load_tasks(("sotu_last_word",), 2).answers(model, bundled.tokenizer, bos=None, batch_size=2)
    assert [answer.scores for answer in found] == [{}, {}]
    assert "not a finite number" in str(found[0].reason)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(
        InputError, match=r"--tasks: 'helaswag' is no task of lm-evaluation-harness. Did you mean hellaswag"
    ):
        load_tasks(("helaswag",), 2)
    with pytest.raises(InputError, match=r"'no/such.yaml' is not a file"):
        load_tasks(("no/such.yaml",), 2)


def test_a_task_that_has_to_be_downloaded_says_so_without_a_network():
    with pytest.raises(
        InputError, match=r"lambada_openai cannot be loaded: .* without a network there are sotu_last_word"
    ):
        load_tasks(("lambada_openai",), 2)


def test_a_task_without_accuracy_is_refused(tmp_path):
    path = own_task(tmp_path)
    path.write_text(path.read_text().replace("metric: acc\n", "metric: brier_score\n").replace("acc_norm", "f1"))
    with pytest.raises(
        InputError, match=r"colours is scored by brier_score and f1, and not question by question by acc"
    ):
        load_tasks((str(path),), 2)


# The bundled tasks


def ask(model, tokenizer, limit):
    found = load_tasks(BUNDLED_TASKS, limit).answers(model, tokenizer, bos=None, batch_size=8)
    return {name: np.array([one.scores["accuracy"] for one in found if one.task == name]) for name in BUNDLED_TASKS}


def lower_end(values):
    return values.mean() - stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def always_one_word(limit):
    """The share of the questions that the commonest last word answers."""
    lines = (FOLDER / "sotu_last_word.jsonl").read_text("utf-8").splitlines()[:limit]
    return Counter(json.loads(line)["word"] for line in lines).most_common(1)[0][1] / len(lines)


@pytest.mark.parametrize(
    ("name", "limit", "told"), [("bundled", None, ("sotu_continuation",)), ("smollm2-135m", 50, BUNDLED_TASKS)]
)
def test_the_bundled_tasks_tell_a_model_from_chance_and_from_a_random_half(name, limit, told):
    """The dense model's lower end is at least 10 points above chance, or above always saying the commonest word, and a
    random half of the heads answers fewer, by pairs. The bundled model is sure of that on one task only."""
    loaded = load_model(preview_model(name))
    dense = ask(loaded.model, loaded.tokenizer, limit)
    grid = (loaded.preview.grid.n_layers, loaded.preview.grid.n_heads)
    order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    keep = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    keep[order[: len(keep) // 2]] = False
    half = ask(remove_heads(loaded.model, keep.view(grid)), loaded.tokenizer, limit)
    chance = {"sotu_last_word": always_one_word(limit), "sotu_continuation": 0.25}
    figures = {
        task: (dense[task].mean(), lower_end(dense[task]) - chance[task], half[task].mean()) for task in BUNDLED_TASKS
    }
    assert all(lower_end(dense[task]) >= chance[task] + 0.1 for task in told), figures
    assert all(lower_end(dense[task] - half[task]) > 0 for task in BUNDLED_TASKS), figures


# Whole runs


@pytest.fixture
def spec(tmp_path):
    model = save_tiny_model(tmp_path / "model")  # of 128 tokens: most passages lose their beginning
    texts = write_short_texts(tmp_path)
    path = own_task(tmp_path)
    return tiny_spec(model, iterations=2, tasks=("sotu_last_word", str(path)), task_limit=3, threads=1, **texts)


def test_a_run_asks_every_cell_and_one_that_is_continued_or_on_ray_the_same(spec, tmp_path):
    whole = run_comparison(spec, output_dir=tmp_path / "whole")
    table = load_run(whole).measurements
    rows = table[table["metric"] == "accuracy"]
    assert len(rows) == 6 * len(list(spec.cells()))
    assert set(rows["document"]) == {"sotu_last_word", "colours"}
    assert sorted(set(rows["prompt"])) == [0, 1, 2]
    assert len(table[table["metric"] == "accuracy_normalised"]) == 3 * len(list(spec.cells()))
    with cut_off_after(3):
        run_comparison(spec, output_dir=tmp_path / "cut")
    assert unmeasured(run_comparison(spec, output_dir=tmp_path / "cut")) == unmeasured(whole)
    on_ray = run_comparison(spec, output_dir=tmp_path / "ray", launcher=RayLauncher(None, 1))
    assert unmeasured(on_ray) == unmeasured(whole)


def test_a_run_with_other_tasks_takes_heads_and_perplexity_over(spec, tmp_path):
    run_comparison(replace(spec, tasks=()), output_dir=tmp_path / "runs")
    second = run_comparison(spec, output_dir=tmp_path / "runs")
    alone = run_comparison(spec, output_dir=tmp_path / "alone")
    (taken,) = load_run(second).manifest.reused
    assert taken.counts == {"cells without their texts": len(list(spec.cells()))}
    with RunStore(second) as one, RunStore(alone) as other:
        rows = [store.table("measurements").query("metric == 'accuracy'") for store in (one, other)]
    assert rows[0].reset_index(drop=True).equals(rows[1].reset_index(drop=True))
