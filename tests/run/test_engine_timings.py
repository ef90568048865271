"""Which models are timed in which engines, how often, in which turns, and what is kept of it."""

from __future__ import annotations

import pickle
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from builders import ascii_tokenizer, cut_off_after, save_tiny_model, tiny_model, tiny_spec, write_short_texts

from pruning_comparison.engines import ENGINES
from pruning_comparison.errors import InputError
from pruning_comparison.measure.engines import EngineRun
from pruning_comparison.measure.generation import turn_order
from pruning_comparison.models import ModelPreview
from pruning_comparison.report.write import write_results
from pruning_comparison.run import engine_timings, measure_cell
from pruning_comparison.run.attempts import Failure
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.engine_timings import known_to_be_missing, remove_left_files, time_engines
from pruning_comparison.run.inputs import Inputs, prepare
from pruning_comparison.run.launchers.on_ray import Worker
from pruning_comparison.run.launchers.work import timed_event
from pruning_comparison.run.measure_cell import LevelTimings
from pruning_comparison.run.pruned_model import KeptHeads
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.spec import Cell, ComparisonSpec, identity
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.records import EngineTiming
from pruning_comparison.store.tables import load_run

BROKEN = "there is no <b>compiler</b> here"
TWO = ("native", "transformers")


class Fake:
    """A runner that writes given tokens, in given seconds of a clock, and may break at its nth timed generation."""

    def __init__(self, name, log, clock, tokens, seconds=1.0, breaks_at=None):
        self.name, self.log, self.clock, self.tokens = name, log, clock, tokens
        self.seconds, self.breaks_at, self.timed = seconds, breaks_at, 0

    def make_ready(self, batch):
        self.clock[0] += 5
        return EngineRun(torch.tensor([self.tokens] * len(batch.prompts)), 0.0, 0.0)

    def generate(self, batch):
        if self.timed == self.breaks_at:
            raise RuntimeError("it broke\nin the middle")
        self.timed += 1
        self.clock[0] += self.seconds
        self.log.append((self.name, batch.prompts[0][0]))
        return EngineRun(torch.tensor([self.tokens] * len(batch.prompts)), 0.25, self.seconds)


def stage(monkeypatch, *, breaks_at=None, **settings):
    """Two models in two engines, on two batches; transformers writes another token of four."""
    log, clock = [], [0.0]

    def build(engine):
        tokens = [1, 2, 3, 4] if engine == "native" else [1, 2, 3, 5]
        broken = breaks_at if engine == "transformers" else None
        return lambda model, *, capacity, step, export: Fake(f"{model}, {engine}", log, clock, tokens, breaks_at=broken)

    monkeypatch.setattr(engine_timings, "engine_named", lambda name: SimpleNamespace(builder=lambda: build(name)))
    monkeypatch.setattr(engine_timings.time, "perf_counter", lambda: clock[0])
    spec = ComparisonSpec(num_tokens=4, batch_size=2, **{"engines": TWO, **settings})
    workspace = SimpleNamespace(spec=spec, inputs=SimpleNamespace(prompt_ids=[[10, 1], [11], [12]]))
    models = {"baseline": "baseline", "dense": "dense"}
    return log, lambda: time_engines(workspace, models, dict.fromkeys(models), 0)


def test_each_batch_is_generated_three_times_in_turns(monkeypatch):
    log, timings = stage(monkeypatch, timing_limit_s=0.0)
    found = timings()
    names = ["baseline, native", "dense, native", "baseline, transformers", "dense, transformers"]
    expected = []
    for repeat in range(3):
        for number, first in enumerate((10, 12)):
            expected += [(name, first) for name in turn_order(names, 2 * repeat + number)]
    assert log == expected
    assert len(found) == 2 * 2 * 2 * 3  # models, engines, batches, repeats
    whole = EngineTiming("transformers", 0, 2, 0.25, 1.0, 8, 5.0, 0.25)  # 2 rows of 4 tokens, one of four differs
    assert found.count(("dense", whole)) == 1
    alone = EngineTiming("native", 2, 0, 0.25, 1.0, 4, 5.0, 0.0)
    assert found.count(("baseline", alone)) == 1


@pytest.mark.parametrize(("limit_s", "repeats"), [(31.9, 3), (32.0, 4), (1e6, 10)])
def test_more_repeats_fit_a_limit_and_are_at_most_ten(monkeypatch, limit_s, repeats):
    """A repeat is 2 models x 2 engines x 2 batches of 1 s each: four of them are 32 s."""
    log, timings = stage(monkeypatch, timing_limit_s=limit_s)
    timings()
    assert len(log) == 8 * repeats


def test_what_breaks_while_it_is_timed_has_a_reason_alone_and_the_others_go_on(monkeypatch):
    _, timings = stage(monkeypatch, timing_limit_s=0.0, breaks_at=1)
    found = timings()
    reason = EngineTiming("transformers", reason="RuntimeError: it broke")
    assert [timing for name, timing in found if timing.engine == "transformers"] == [reason, reason]
    assert sum(timing.engine == "native" for _, timing in found) == 12


def test_an_engine_that_cannot_draw_says_itself_how_many_tokens_differ(monkeypatch):
    _, timings = stage(monkeypatch, timing_limit_s=0.0)
    monkeypatch.setattr(
        Fake,
        "make_ready",
        lambda self, batch: EngineRun(
            torch.tensor([self.tokens] * len(batch.prompts)), 0.0, 0.0, None if "native" in self.name else 0.75, "f16"
        ),
    )
    found = [timing for _, timing in timings()]
    assert {(one.engine, one.differing_share, one.weights) for one in found} == {
        ("native", 0.0, "f16"),
        ("transformers", 0.75, "f16"),
    }


LLAMA = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


class Reader:
    """A runner that only looks whether its file is there, with a model in it."""

    def __init__(self, export, seen):
        self.path, self.seen = export(), seen

    def make_ready(self, batch):
        self.seen.append((self.path.parent.parent, self.path.read_bytes()[:4]))
        return EngineRun(torch.zeros(1, 4), 0.0, 0.0)

    def generate(self, batch):
        assert self.path.is_file()
        return EngineRun(torch.zeros(1, 4), 0.25, 1.0)


def of_files(monkeypatch, folder, seen, **settings):
    """A level of one tiny Llama, timed by an engine that reads files."""
    monkeypatch.setattr(
        engine_timings,
        "engine_named",
        lambda name: SimpleNamespace(builder=lambda: lambda model, *, capacity, step, export: Reader(export, seen)),
    )
    spec = ComparisonSpec(num_tokens=4, timing_limit_s=0.0, **{"engines": TWO, **settings})
    inputs = SimpleNamespace(prompt_ids=[[10, 1]], preview=SimpleNamespace(tokenizer=ascii_tokenizer()))
    model = tiny_model("llama", vocab_size=128, **LLAMA)
    models = {"agency": model, "dense": model}
    workspace = SimpleNamespace(spec=spec, inputs=inputs, folder=folder)
    return time_engines(workspace, models, dict.fromkeys(models), 0)


def test_files_of_models_lie_in_the_run_and_are_gone_when_all_is_timed(monkeypatch, tmp_path):
    seen = []
    found = of_files(monkeypatch, tmp_path, seen)
    assert seen == [(tmp_path, b"GGUF")] * 4
    assert all(timing.reason is None for _, timing in found)
    assert list(tmp_path.iterdir()) == []


def test_masked_models_have_no_file_and_the_dense_one_has(monkeypatch, tmp_path):
    found = of_files(monkeypatch, tmp_path, [], execution="masked")
    reasons = {variant: timing.reason for variant, timing in found}
    assert reasons == {"agency": engine_timings._MASKED, "dense": None}
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_killed_run_has_left_are_removed(tmp_path):
    left = tmp_path / f"{engine_timings._FOLDER}x" / "model.gguf"
    left.parent.mkdir()
    left.touch()
    (tmp_path / "journal.sqlite").touch()
    remove_left_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.sqlite"]


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"prune_unit": "rectangle"}, None),
        ("llama", {"pruning_levels": (0,)}, None),
        ("llama", {"engines": TWO, "execution": "masked"}, None),
        (
            "llama",
            {},
            "no pruned model with ragged groups can be timed in llama.cpp: the gguf form is not possible: heads",
        ),
        (
            "llama",
            {"execution": "masked"},
            "no pruned model can be timed in llama.cpp: with --execution=masked no head",
        ),
        (
            "llama",
            {"device": "cuda"},
            "no model can be timed in llama.cpp: it is run on the CPU, and the other engines on cuda",
        ),
        (
            "qwen3",
            {"prune_unit": "rectangle"},
            "no model can be timed in llama.cpp: the gguf form is not possible: llama.cpp b",
        ),
    ],
)
def test_what_llama_cpp_cannot_run_is_known_before(family, settings, said):
    model, tokenizer = tiny_model(family, vocab_size=128, **LLAMA), ascii_tokenizer()
    preview = ModelPreview("tiny", "tiny", model.config, tokenizer)
    spec = ComparisonSpec(**{"engines": ("llama.cpp",), "pruning_levels": (0, 50), **settings})
    found = known_to_be_missing(spec, Inputs(preview, (), (), (), torch.zeros(1, 1), {}))
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


def test_a_tokenizer_that_llama_cpp_has_not_is_known_before():
    preview = ModelPreview("tiny", "tiny", tiny_model("llama").config, None)
    spec = ComparisonSpec(engines=("llama.cpp",), prune_unit="rectangle")
    (found,) = known_to_be_missing(spec, Inputs(preview, (), (), (), torch.zeros(1, 1), {}))
    assert "the model has no tokenizer" in found


def test_the_native_engine_alone_times_nothing_more(monkeypatch):
    log, timings = stage(monkeypatch, engines=("native",))
    assert timings() == []
    assert log == []


def test_timings_in_engines_travel_with_the_others():
    timings = LevelTimings([], None, [("dense", EngineTiming("native"))])
    event = timed_event(("random", 0, 50.0), timings, None, all_there=True)
    assert event.engines == timings.engines
    assert not timed_event(("random", 0, 50.0), timings, Failure("x"), all_there=True).complete


def test_an_engine_is_asked_for_by_name():
    assert ComparisonSpec(engines=("transformers",)).engines == TWO
    with pytest.raises(InputError, match=r"--engine: 'transformer' is unknown\. Did you mean transformers"):
        ComparisonSpec(engines=("transformer",))
    with pytest.raises(InputError, match=r"--engine: .* must name at least one"):
        ComparisonSpec(engines=())


def test_a_run_that_names_no_engine_is_still_the_same_run():
    spec, inputs = ComparisonSpec(), {"model": "x"}
    before = {name: value for name, value in spec.as_dict().items() if name != "engines"}
    assert ComparisonSpec.from_dict(before) == spec
    assert spec.content_hash(inputs) != ComparisonSpec(engines=TWO).content_hash(inputs)
    assert identity(before, inputs, {}) == identity(spec.as_dict(), inputs, {})
    assert ComparisonSpec.from_dict(ComparisonSpec(engines=TWO).as_dict()).engines == TWO


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = save_tiny_model(tmp_path_factory.mktemp("model"))
    write_short_texts(place / "texts")
    (place / "prompts.txt").write_text("It is\nThere they were\n", "utf-8")
    return place


def engine_spec(folder, **changes):
    settings = {
        "prompt_file": str(folder / "prompts.txt"),
        "max_prompts": 2,
        "batch_size": 2,
        "variants": ("baseline",),
    }
    return tiny_spec(folder, **{**settings, "engines": ("native", "transformers", "compiled"), **changes})


def no_compiler(model, *, capacity, step, export):
    raise RuntimeError(BROKEN)


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    monkeypatch.setitem(ENGINES, "compiled", replace(ENGINES["compiled"], build=f"{__name__}:no_compiler"))


def test_a_run_times_its_engines_and_the_report_shows_them(folder, tmp_path, no_charts):
    run = run_comparison(engine_spec(folder), output_dir=tmp_path)
    timings = load_run(run).engine_timings
    missing = timings[timings["engine"] == "compiled"]
    timed = timings[timings["engine"] != "compiled"]
    assert set(missing["reason"]) == {f"RuntimeError: {BROKEN}"}
    assert missing["end_to_end_s"].isna().all()
    # At level 0 the baseline is the dense model and has its rows; both levels: 2 models x 2 engines x 1 batch x 3 repeats.
    assert timed.groupby(["level", "variant", "engine"]).size().to_dict() == {
        (level, variant, engine): 3 for level in (0, 50) for variant in ("baseline", "dense") for engine in TWO
    }
    assert set(timed["tokens"]) == {6}
    assert (timed["end_to_end_s"] >= timed["first_token_latency_s"]).all()
    assert set(timed["differing_share"]) == {0.0}
    assert timed["reason"].isna().all()

    html = write_results(run, save_outputs=False).read_text("utf-8")
    assert "Speed in each engine" in html
    assert "&lt;b&gt;compiler&lt;/b&gt;" in html
    assert BROKEN not in html
    engines = pd.read_csv(run / "engines.csv")
    assert engines[["level", "variant", "engine"]].to_numpy().tolist() == [
        [level, variant, engine]
        for level, variants in ((0.0, ("dense",)), (50.0, ("dense", "baseline")))
        for variant in variants
        for engine in ("native", "transformers", "compiled")
    ]
    assert (run / "engine_timings.csv").is_file()


def test_a_missing_package_ends_a_run_before_it_begins(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning_comparison.engines.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"llama\.cpp needs the package gguf.*pip install 'pruning-comparison\[llama-cpp\]'"
    ):
        run_comparison(engine_spec(folder, engines=("llama.cpp",)), output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extras
def test_a_run_of_a_model_that_llama_cpp_has_not_says_so_before_and_in_place_of_figures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning_comparison.engines.find_spec", lambda name: name)
    run = run_comparison(engine_spec(folder, engines=("llama.cpp",)), output_dir=tmp_path)
    reason = "the gguf form is not possible: llama.cpp builds layers of different sizes for one architecture only"
    log = (run / "run.log").read_text("utf-8")
    assert log.index(f"no model can be timed in llama.cpp: {reason}") < log.index(
        "baseline cannot be timed in llama.cpp"
    )
    timings = load_run(run).engine_timings
    missing = timings[timings["engine"] == "llama.cpp"]
    assert set(missing["variant"]) == {"dense", "baseline"}
    assert all(one.startswith(reason) for one in missing["reason"])
    assert timings.loc[timings["engine"] == "native", "reason"].isna().all()


@pytest.mark.extras
def test_a_run_times_dense_and_pruned_models_in_llama_cpp(tmp_path, no_charts):
    """Level 30 takes heads, and leaves rectangles: 8 heads read 4 key-value heads."""
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=257, max_position_embeddings=256, **LLAMA)
    place = save_tiny_model(tmp_path / "model", model=model)
    ascii_tokenizer().save_pretrained(place)
    write_short_texts(place / "texts")
    (place / "prompts.txt").write_text("It is\nThere they were\n", "utf-8")
    spec = engine_spec(place, engines=("llama.cpp",), pruning_levels=(0, 30), prune_unit="rectangle", num_tokens=5)
    run = run_comparison(spec, output_dir=tmp_path / "runs")
    timings = load_run(run).engine_timings
    assert timings["reason"].isna().all()
    timed = timings[timings["engine"] == "llama.cpp"]
    assert timed.groupby(["level", "variant"]).size().to_dict() == {
        (level, variant): 3 for level in (0, 30) for variant in ("baseline", "dense")
    }
    assert set(timed["weights"]) == {"f32"}
    assert set(timed["tokens"]) == {10}
    assert set(timed["differing_share"]) == {0.0}
    assert (timed["end_to_end_s"] > timed["first_token_latency_s"]).all()
    assert timings.loc[timings["engine"] == "native", "weights"].isna().all()
    assert not list(run.glob("engine_files_*"))
    assert "weights as f32" in write_results(run, save_outputs=False).read_text("utf-8")


def test_a_level_is_timed_once_however_often_the_run_is_continued(folder, tmp_path, monkeypatch):
    spec, times = engine_spec(folder, engines=TWO), []
    original = measure_cell.time_engines

    def counted(*arguments):
        times.append(1)
        return original(*arguments)

    monkeypatch.setattr(measure_cell, "time_engines", counted)
    with cut_off_after(1):
        run_comparison(spec, output_dir=tmp_path)
    assert len(times) == 1  # level 0
    run = run_comparison(spec, output_dir=tmp_path)
    assert len(times) == 2
    assert len(load_run(run).engine_timings) == 2 * 2 * 2 * 3  # levels, models, engines, repeats


def test_another_run_takes_timings_over_only_from_the_same_engines(folder, tmp_path, monkeypatch):
    first = run_comparison(engine_spec(folder, engines=TWO), output_dir=tmp_path)
    expected = load_run(first).engine_timings
    with monkeypatch.context() as patch:
        patch.setattr(measure_cell, "time_engines", lambda *arguments: [])
        more = engine_spec(folder, engines=TWO, pruning_levels=(0, 25, 50))
        found = load_run(run_comparison(more, output_dir=tmp_path)).engine_timings
    pd.testing.assert_frame_equal(found[found["level"] != 25].reset_index(drop=True), expected)
    native = run_comparison(engine_spec(folder, engines=("native",)), output_dir=tmp_path)
    with RunStore(native) as store:
        assert store.table("engine_timings").empty
        assert len(store.finished_cells()) == 2


def test_a_worker_of_a_cluster_times_engines_too(folder, tmp_path):
    spec = engine_spec(folder, engines=TWO)
    run = run_comparison(spec, output_dir=tmp_path)
    with RunStore(run) as store:
        keep, fingerprint = store.known(Cell("baseline", "magnitude", 0, 50.0))
    worker = Worker(spec, {"raise_failures": True})
    worker._workspace = load_workspace(spec, prepare(spec))
    timed, trouble = worker.time(("magnitude", 0, 50.0), {"baseline": KeptHeads(torch.tensor(keep), fingerprint)})
    assert not trouble
    assert timed.complete
    travelled = pickle.loads(pickle.dumps(timed))
    assert [(name, one.engine) for name, one in travelled.engines if one.repeat == 0] == [
        (name, engine) for engine in TWO for name in ("baseline", "dense")
    ]


def test_a_journal_from_before_weights_were_noted_is_read(folder, tmp_path):
    run = run_comparison(engine_spec(folder, engines=TWO), output_dir=tmp_path)
    expected = load_run(run).engine_timings
    with sqlite3.connect(run / "journal.sqlite") as journal:
        journal.execute("ALTER TABLE engine_timings DROP COLUMN weights")
        journal.execute("PRAGMA user_version = 4")
    journal.close()
    pd.testing.assert_frame_equal(load_run(run).engine_timings, expected)


def test_a_journal_from_before_there_were_engines_is_read(folder, tmp_path, no_charts):
    run = run_comparison(engine_spec(folder, engines=("native",)), output_dir=tmp_path)
    with sqlite3.connect(run / "journal.sqlite") as journal:
        journal.execute("DROP TABLE engine_timings")
        journal.execute("PRAGMA user_version = 3")
    journal.close()
    assert load_run(run).engine_timings.empty
    html = write_results(run, save_outputs=False).read_text("utf-8")
    assert "Speed in each engine" not in html
    assert not (run / "engines.csv").exists()
