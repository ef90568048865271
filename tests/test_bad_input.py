"""Input that nobody would give on purpose: an error in words, and never a traceback, a hang or a file in the wrong place.

A few cases of every kind are tried by default, always the same ones; ``pytest -m slow`` tries thousands of new ones.
"""

from __future__ import annotations

import gzip
import json
import re
import resource
import shutil
import signal
import sqlite3
import struct
import tracemalloc
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from builders import save_tiny_model, stand_in, tiny_spec
from edge_cases.kinds import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruning_comparison import cli, texts
from pruning_comparison.checkpoint.forms import load_pruned
from pruning_comparison.errors import InputError, ModelLoadError, StoreError
from pruning_comparison.models import load_model, preview_model
from pruning_comparison.report.write import margins_of
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store.journal import RunStore
from pruning_comparison.store.run_folder import journal_damage, latest_run, read_manifest, unfinished_run
from pruning_comparison.store.tables import load_run


def cases(few, many):
    """How many cases a test tries: few by default, many in the slow suite."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def tried(count, check, *strategies):
    """Runs a property on so many cases: the same ones every time where they are few.

    A case that takes two minutes, or 4 GB more than is in use, fails instead of taking the machine down.
    """
    quiet = list(HealthCheck)
    chosen = settings(
        max_examples=count, deadline=None, database=None, derandomize=count < 100, suppress_health_check=quiet
    )

    def timely(values):
        signal.alarm(120)
        try:
            check(*values)
        finally:
            signal.alarm(0)

    def too_long(number, frame):
        raise AssertionError("a case has taken two minutes")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    try:
        chosen(given(st.tuples(*strategies))(timely))()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    for name in ("held_out", "calibration"):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{name}.txt").write_text(f"A short text to be {name}. " * 60)
    return folder


def short_spec(folder, **changes):
    own = {"eval_text": str(folder / "texts" / "held_out.txt")}
    return tiny_spec(folder, **{**own, "calibration_text": str(folder / "texts" / "calibration.txt"), **changes})


ODD_NUMBERS = st.sampled_from(
    ["0", "-1", "1e999", "nan", "inf", "-inf", "9" * 400, "1_0", "٣", "0x10", "", " ", "1e-320"]
)
VALUES = st.one_of(
    st.text(max_size=12), ODD_NUMBERS, st.integers(-3, 400).map(str), st.floats(0, 120).map(str),
    st.sampled_from(["entropy", "random,random", "agency", "baseline,,", "cpu", "float32", "head", "layer"]),
    st.sampled_from(["/", "..", "a\x00b", "~"]),
)  # fmt: skip
OPTIONS = (
    "model_name", "device", "precision", "pruning_levels", "pruning_method", "temperatures", "num_tokens", "iterations",
    "max_prompts", "batch_size", "prompt_file", "eval_text", "eval_tokens", "eval_window", "eval_stride",
    "calibration_text", "calibration_tokens", "calibration_window", "score_tokens", "variants", "execution", "scope",
    "unit", "bos", "entropy_direction", "adaptation", "ridge", "mlp_ridge", "recovery_steps", "recovery_learning_rate",
    "recovery_parameters", "seed",
    "threads", "quality_batch_size", "margin_speed", "tolerance", "no_such_option",
)  # fmt: skip


@pytest.mark.parametrize("option", ["iterations", "threads", "eval_tokens", "seed"])
def test_numbers_beyond_all_sense_are_refused(option):
    """A list of as many iterations as this once filled the memory before anything was loaded."""
    with pytest.raises(InputError, match=f"--{option}: .* must be at most"):
        ComparisonSpec(**{option: 10**400})


PRUNING = {
    "level": st.sampled_from(["5", "20", "50", "80", "99"]),
    "method": st.sampled_from(["random", "magnitude", "entropy"]),
    "variant": st.sampled_from(["baseline", "agency"]),
    "scope": st.sampled_from(["model", "layer"]),
    "unit": st.sampled_from(["head", "kv_group", "rectangle"]),
    "bos": st.sampled_from(["auto", "always", "never"]),
    "adaptation": st.sampled_from(["none", "bias", "refit-mlp"]),
    "also": st.sampled_from(["plain", "padded", "plain,padded", "gguf"]),
    "no_new_bias": st.just(None),
}
"""Options of ``prune`` and sensible values of them: what may then go wrong is the model's doing."""


@cases(5, 120)
def test_every_kind_of_model_is_pruned_and_saved_or_refused_in_words(tmp_path, capsys, count):
    """Each kind of ``edge_cases`` under random options: the checkpoint loads and computes, or the cause is named."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("held_out", "calibration"):
        (texts / f"{name}.txt").write_text(f"A short text to be {name}, once more and again. " * 200)
    given_options = [
        "--quiet",
        "--device=cpu",
        "--no_measure",
        "--num_tokens=20",
        "--calibration_tokens=256",
        "--calibration_window=64",
    ]
    given_options += [f"--{name}={texts / file}.txt" for name, file in
                      (("eval_text", "held_out"), ("calibration_text", "calibration"))]  # fmt: skip

    def check(kind, chosen):
        folder, made = tmp_path / kind.replace(" ", "_").replace("/", "_"), tmp_path / "made"
        if not folder.exists():
            KINDS[kind].build(folder)
        shutil.rmtree(made, ignore_errors=True)
        argv = ["prune", *given_options, f"--model_name={folder}", f"--output_dir={made}"]
        argv += [f"--{name}" if value is None else f"--{name}={value}" for name, value in chosen.items()]
        code = cli.main(argv)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        if code == 0:
            assert KINDS[kind].refused is None, (argv, shown)
            loaded, _ = load_pruned(made)
            assert loaded(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all(), argv
            return
        assert code == 2, (argv, shown)
        if made.exists():  # what could be saved before a form failed loads
            load_pruned(made)
        allowed = [
            "the (plain|padded) form is not possible",
            r"is none\. Give at least",
            "kv_group",
            "no beginning token",
        ]
        allowed += [KINDS[kind].refused] if KINDS[kind].refused else []
        assert any(re.search(reason, shown.err, re.DOTALL) for reason in allowed), (argv, shown)

    every = st.fixed_dictionaries(
        {"level": PRUNING["level"]}, optional={k: v for k, v in PRUNING.items() if k != "level"}
    )
    tried(count, check, st.sampled_from(sorted(KINDS)), every)


@cases(12, 1000)
def test_options(model_folder, tmp_path, capsys, monkeypatch, count):
    """Whatever the options say, they are refused in words or lead to a run. None leaves anything but the output folder."""
    stand_in(monkeypatch)
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    base = short_spec(model_folder)
    fixed = ["num_tokens", "timing_limit_s", "max_prompts", "eval_tokens", "calibration_tokens", "calibration_window"]

    def check(chosen):
        argv = ["run", "--quiet", "--device=cpu", f"--model_name={model_folder}", f"--output_dir={place / 'out'}"]
        argv += [f"--eval_text={base.eval_text}", f"--calibration_text={base.calibration_text}"]
        argv += [f"--{name}={getattr(base, name)}" for name in fixed]
        argv += [f"--{name}={value}" for name, value in chosen.items()]
        with monkeypatch.context() as patch:
            patch.setattr("pruning_comparison.run.launchers.serial.load_workspace", ended)
            code = cli.main(argv)
        shown = capsys.readouterr()
        assert code in (2, 130), (argv, shown)
        assert "Traceback" not in shown.err + shown.out
        assert {path.name for path in place.iterdir()} <= {"out"}
        shutil.rmtree(place / "out", ignore_errors=True)

    tried(count, check, st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=3))


def ended(*arguments):
    raise KeyboardInterrupt


TEXT_BYTES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
    st.text(max_size=50).map(lambda text: text.encode("utf-16")),
    st.lists(st.text(max_size=20), max_size=6).map(lambda lines: "\r\n".join(lines).encode("utf-8", "replace")),
    st.sampled_from(
        [b"", b"\n\r\n \x0c\n", b"\xef\xbb\xbf", b"\xef\xbb\xbfpeace", b"\x00" * 50, b" = Title = \n" * 20]
    ),
)


def names_the_option(error, option):
    assert str(error).startswith(f"{option}: ")


@cases(40, 600)
def test_text_and_prompt_files(tmp_path, count):
    def check(raw, suffix, number):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(raw)
        try:
            prompts = texts.load_prompts(str(path), number)
            assert 1 <= len(prompts) <= number
            assert all(prompt and prompt == prompt.strip() for prompt in prompts)
        except InputError as error:
            names_the_option(error, "--prompt_file")
        try:
            assert all(document.text.strip() for document in texts.load_documents(str(path), option="--eval_text"))
        except InputError as error:
            names_the_option(error, "--eval_text")

    tried(count, check, TEXT_BYTES, st.sampled_from([".txt", ".gz", ""]), st.integers(1, 9))


@pytest.mark.parametrize("option", ["prompt_file", "eval_text", "calibration_text"])
@pytest.mark.parametrize(
    "raw",
    [b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"caf\xe9", b"\r\n \r\n"],
    ids=["empty", "binary", "latin-1", "blank lines"],
)
def test_files_that_are_no_text_end_in_one_line(model_folder, tmp_path, capsys, option, raw):
    (tmp_path / "file.txt").write_bytes(raw)
    argv = ["run", "--quiet", "--device=cpu", f"--model_name={model_folder}", f"--output_dir={tmp_path / 'out'}"]
    assert cli.main([*argv, f"--{option}={tmp_path / 'file.txt'}", "--num_tokens=3", "--max_prompts=1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --{option}: ")
    assert shown.count("\n") == 1


def test_lines_of_windows_and_one_line_of_a_megabyte(model_folder, tmp_path, capsys):
    (tmp_path / "windows.txt").write_bytes(b"one\r\n\r\ntwo  \r\n")
    assert texts.load_prompts(str(tmp_path / "windows.txt"), 9) == ["one", "two"]
    (tmp_path / "long.txt").write_bytes(b"x" * 1_000_000)
    argv = ["run", "--quiet", "--device=cpu", f"--model_name={model_folder}", f"--output_dir={tmp_path / 'out'}"]
    assert cli.main([*argv, f"--prompt_file={tmp_path / 'long.txt'}"]) == 2
    assert "has 1000000 tokens, which fill the context of 128" in capsys.readouterr().err


def test_a_small_file_that_unpacks_to_more_than_is_read(tmp_path, monkeypatch):
    """20 MB of zeros in 20 kB. With a limit of 1 MB no more than some MB are ever held."""
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\x00" * 20_000_000))
    monkeypatch.setattr(texts, "_MOST_TEXT_BYTES", 1_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 1,000,000 bytes"):
        texts.load_documents(str(tmp_path / "bomb.gz"), option="--eval_text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def refused_or_read(folder):
    """Loads a folder as a dense and as a pruned model; nothing but ModelLoadError may come of it."""
    with suppress(ModelLoadError):
        load_model(preview_model(str(folder)))
    with suppress(ModelLoadError):
        load_pruned(folder)


@cases(8, 300)
def test_weight_files_that_are_cut_or_lie(model_folder, tmp_path, count):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    whole = (model_folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    lies = st.one_of(
        st.just([]), st.just({}), st.none(), st.integers(-5, 2**70), st.text(max_size=5),
        st.lists(st.integers(-2, 2**40), max_size=3),
    )  # fmt: skip

    def cut(at):
        (folder / "model.safetensors").write_bytes(whole[:at])
        refused_or_read(folder)

    def flipped(at, value):
        raw = bytearray(whole)
        raw[at] = value
        (folder / "model.safetensors").write_bytes(bytes(raw))
        refused_or_read(folder)

    def lying(name, key, lie):
        told = json.loads(json.dumps(header))
        told[name] = lie if key is None else {**told[name], key: lie}
        raw = json.dumps(told).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
        refused_or_read(folder)

    tried(count, cut, st.integers(0, len(whole) - 1))
    tried(count, flipped, st.integers(0, length + 8), st.integers(0, 255))
    tried(
        count, lying, st.sampled_from(sorted(header)), st.sampled_from([None, "dtype", "shape", "data_offsets"]), lies
    )


@cases(12, 300)
def test_configs_that_disagree_with_the_weights(model_folder, tmp_path, count):
    """A billion layers or a vocabulary of a trillion must not be tried: each case is over at once."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    keys = [
        "n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "model_type", "activation_function", "n_inner",
        "architectures", "layer_norm_epsilon", "tie_word_embeddings", "quantization_config", "auto_map", "eos_token_id",
    ]  # fmt: skip
    lies = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 300), st.sampled_from([10**9, 10**12, 2**63, -1]), st.text(max_size=6),
        st.just([]), st.just({}), st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["llama", "gpt_neox", "pruned_gpt2", "bert", "../.."]),
    )  # fmt: skip

    def check(changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        refused_or_read(folder)

    tried(count, check, st.dictionaries(st.sampled_from(keys), lies, min_size=1, max_size=2))


@pytest.mark.parametrize("name", ["n_layer", "vocab_size", "n_embd", "n_head"])
def test_a_config_that_promises_a_billion_is_refused_before_anything_is_built(model_folder, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: 10**9}))
    with pytest.raises(ModelLoadError, match="disagrees with its weights: it has 1000000000 for"):
        preview_model(str(folder))


def test_files_nested_deeper_than_can_be_read(model_folder, tmp_path):
    deep = b"[" * 200_000
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    refused_or_read(folder)
    shutil.copy(model_folder / "model.safetensors", folder)
    (folder / "config.json").write_bytes(deep)
    refused_or_read(folder)
    (tmp_path / "manifest.json").write_bytes(deep)
    with pytest.raises(StoreError, match="not a run folder"):
        read_manifest(tmp_path)


@pytest.fixture(scope="module")
def stored(model_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return run_comparison(short_spec(model_folder), output_dir=place)


def every_reader(run):
    """All that reads a run folder before anything is drawn; nothing but StoreError may come of it."""
    latest_run(run.parent)
    unfinished_run(run.parent, "x")
    journal_damage(run)
    for read in (load_run, lambda folder: margins_of(read_manifest(folder), None)):
        with suppress(StoreError):
            read(run)


@cases(15, 300)
def test_journals_that_are_no_journals(stored, tmp_path, count):
    run = shutil.copytree(stored, tmp_path / "run_20260101_000000")
    whole = (stored / "journal.sqlite").read_bytes()

    def changed(at, raw):
        (run / "journal.sqlite").write_bytes(whole[:at] + raw + whole[at + len(raw) :])
        every_reader(run)

    def cut(at):
        (run / "journal.sqlite").write_bytes(whole[:at])
        every_reader(run)

    tried(count, changed, st.integers(0, len(whole) - 1), st.binary(max_size=200))
    tried(count, cut, st.integers(0, len(whole) - 1))


@cases(15, 300)
def test_manifests_that_are_no_manifests(stored, tmp_path, capsys, count):
    run = shutil.copytree(stored, tmp_path / "run_20260101_000000")
    whole = json.loads((stored / "manifest.json").read_text())
    anything = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
        max_leaves=6,
    )

    def check(key, value, raw):
        told = {**whole, key: value} if key else value
        (run / "manifest.json").write_bytes(json.dumps(told).encode() if raw is None else raw)
        every_reader(run)

    tried(
        count,
        check,
        st.sampled_from([None, *whole, "margins"]),
        anything,
        st.one_of(st.none(), st.binary(max_size=40)),
    )


def test_a_journal_with_other_tables_is_told_in_words(stored, tmp_path, capsys):
    run = shutil.copytree(stored, tmp_path / "run_20260101_000000")
    with closing(sqlite3.connect(run / "journal.sqlite")) as journal:
        journal.execute("DROP TABLE measurements")
        journal.execute("CREATE TABLE measurements (something TEXT)")
    assert cli.main(["report", "--quiet", str(run)]) == 1
    shown = capsys.readouterr().err
    assert "cannot be" in shown
    assert "bug" not in shown
    with pytest.raises(StoreError):
        RunStore(run).table("measurements")


def test_result_folders_of_every_odd_kind(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for place in ("file", "empty", "missing", "file/below", "a\x00b", "x" * 5000):
        assert cli.main(["report", "--quiet", str(Path(tmp_path) / place)]) == 2, place
        shown = capsys.readouterr().err
        assert "holds no run" in shown
