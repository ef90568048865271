"""benchmarks/results.py: what it reads off a run, when a figure has moved, and that documents print what is on record."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from builders import load_script, tiny_spec

from pruning_comparison import load_run, run_comparison, write_results
from pruning_comparison.cli import _spec_of, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

results = load_script(ROOT / "benchmarks" / "results.py")
recorded_figures = load_script(ROOT / "benchmarks" / "recorded_figures.py")
Figure, Entry = results.Figure, results.Entry


def figure(estimate, low=None, high=None, **other):
    place = {"table": "summary", "metric": "perplexity_ratio", "method": "obs", "variant": "agency", "level": 50.0}
    return Figure(**{**place, "n": 90, "unit": "1", **other}, estimate=estimate, ci_low=low, ci_high=high)


SPEED = {"metric": "tokens_per_second", "unit": "token/s"}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of a tiny model that was timed."""
    spec = tiny_spec(folder, timing_limit_s=0.5, iterations=2, max_prompts=2)
    return run_comparison(spec, output_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def of_run(run):
    """Its figures."""
    return tuple(results.figures_of(load_run(run)))


@pytest.fixture
def read_once(of_run, monkeypatch):
    """The figures of the run are not estimated again each time, which takes most of the time."""
    monkeypatch.setattr(results, "figures_of", lambda run: of_run)


@pytest.fixture
def stored(run, tmp_path, read_once):
    """A file in which the run's own figures are on record, as taking 10 minutes."""
    entry = results.entry_of(("--model_name=tiny",), load_run(run))
    path = tmp_path / "results.json"
    results.write_recorded({"tiny": replace(entry, minutes=10.0), "never-run": Entry(("--seed=1",))}, path)
    return path


@pytest.fixture
def started(run, monkeypatch):
    """In place of starting a process the run is there; the names of those that would have been started."""
    names = []
    monkeypatch.setattr(results, "run_entry", lambda name, entry, runs_in: names.append(name) or run)
    return names


def change(path, name, **new):
    """Puts other values into the recorded figures of agency's perplexity ratio."""
    entries = results.read_recorded(path)
    figures = [
        replace(one, **new) if (one.metric, one.variant) == ("perplexity_ratio", "agency") else one
        for one in entries[name].figures
    ]
    results.write_recorded({**entries, name: replace(entries[name], figures=tuple(figures))}, path)


# What is read off a run


def test_figures_are_those_of_the_tables_of_the_run(run, of_run, no_charts):
    write_results(run, save_outputs=False)
    found = pd.DataFrame([vars(one) for one in of_run])
    for table, metrics in results.PUBLISHED.items():
        written = pd.read_csv(run / f"{table}.csv").rename(columns={"contrast": "variant"})
        written = written[written["metric"].isin(metrics)]
        keys = ["metric", "method", "variant", "level"]
        both = found[found["table"] == table].merge(written, on=keys, suffixes=("", "_written"), validate="1:1")
        assert len(both) == len(written) > 0
        assert list(both["unit"]) == list(both["unit_written"])
        for column in ("estimate", "ci_low", "ci_high", "n"):
            numbers = both[[column, f"{column}_written"]].astype(float)
            assert numbers[column].to_numpy() == pytest.approx(numbers[f"{column}_written"], rel=1e-7, nan_ok=True)
    assert {"tokens_per_second", "perplexity", "parameter_bytes"} <= set(found["metric"])


def test_speed_is_left_out_where_timing_was_cut_short(run):
    loaded = load_run(run)
    manifest = replace(loaded.manifest, spec={**loaded.manifest.spec, "timing_limit_s": 0.0})
    metrics = {one.metric for one in results.figures_of(replace(loaded, manifest=manifest))}
    sizes = {"parameter_bytes", "thousand_token_cache_bytes"}
    assert metrics == {"perplexity", "perplexity_ratio", "kl_to_dense", *sizes}


def test_a_stored_run_of_an_earlier_version_has_figures():
    (old,) = (ROOT / "tests" / "recorded" / "run_of_0.1.0").glob("run_*")
    metrics = {one.metric for one in results.figures_of(load_run(old))}
    assert {"perplexity", "perplexity_ratio"} <= metrics
    assert "kl_to_dense" not in metrics  # which it did not measure


def test_the_command_asks_for_the_settings_of_the_run(run):
    spec = load_run(run).manifest.spec
    command = results.command_of(results.ComparisonSpec.from_dict(spec))
    asked = _spec_of(parse(["run", *command])).as_dict()
    assert json.loads(json.dumps(asked)) == spec
    assert {"--device=cpu", "--threads=1", "--pruning_levels=0,50", "--pruning_method=magnitude"} < set(command)
    assert not [word for word in command if word.startswith(("--seed", "--variants"))]  # as they are by default
    flags = results.command_of(results.ComparisonSpec(memory_logging=True, new_bias=False, recovery_rate=1e-5))
    assert {"--memory_logging", "--no_new_bias", "--recovery_learning_rate=1e-05"} < set(flags)


def test_what_is_written_is_read_again_with_a_line_for_each_figure(tmp_path):
    path = tmp_path / "results.json"
    one, other = figure(1.25, 1.2, 1.3), figure(40.0, None, None, table="relative")
    entries = {
        "b": Entry(("--seed=1",), (one, other), 1.5, {"commit": "abc", "threads": 2}),
        "a": Entry(("--model_name=bundled", "--device=cpu")),
    }
    results.write_recorded(entries, path)
    read = results.read_recorded(path)
    assert list(read) == ["a", "b"]
    assert read["a"] == entries["a"]
    assert set(read["b"].figures) == {one, other}
    assert replace(read["b"], figures=()) == replace(entries["b"], figures=())
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line.strip(" ,"))["estimate"] for line in lines if "estimate" in line] == [40.0, 1.25]
    results.write_recorded(read, path)
    assert path.read_text("utf-8").splitlines() == lines


def test_the_file_of_the_project_is_as_it_would_be_written(tmp_path):
    entries = results.read_recorded()
    results.write_recorded(entries, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text("utf-8") == results.RECORDED.read_text("utf-8")
    for entry in entries.values():
        _spec_of(parse(["run", *entry.command]))
        assert bool(entry.figures) == (entry.minutes is not None) == (entry.recorded is not None)


# Verdicts


@pytest.mark.parametrize(
    ("recorded", "new", "verdict"),
    [
        (figure(1.25, 1.2, 1.3), figure(1.2501, 1.2, 1.3), "same"),
        (figure(1.25, 1.2, 1.3), figure(1.2562, 1.2, 1.3), "same"),  # 0.496 %
        (figure(1.25, 1.2, 1.3), figure(1.2563, 1.2, 1.3), "changed"),  # 0.504 %
        (figure(1.25, 1.2, 1.3), figure(1.31, 1.0, 1.6), "moved"),
        (figure(1.25, 1.2, 1.3), figure(1.19, 1.0, 1.6), "moved"),
        (figure(1.25, 1.2, 1.3), figure(1.25, 1.2, 1.3, n=60), "changed"),
        (figure(1.25, 1.249, 1.251), figure(1.253, 1.2, 1.3), "moved"),
        (figure(1.25, 1.2, None), figure(1.3, 1.2, None), "changed"),  # no upper end: nothing lies above it
        # At level 0 nothing varies, and divergence is what rounding has left of zero.
        (figure(0.0, 0.0, 0.0, unit="nat/token"), figure(3e-12, 0.0, 1e-11, unit="nat/token"), "same"),
        (figure(0.0, 0.0, 0.0, unit="nat/token"), figure(3e-6, 0.0, 1e-5, unit="nat/token"), "moved"),
        (figure(1.25), figure(1.251), "same"),
        (figure(1.25), figure(1.26), "moved"),  # no interval: 0.8 % off
        (figure(1.25, 1.2, 1.3), None, "missing"),
        # Per cent: 0.5 of the baseline's perplexity and 0.505 of it differ by 1 %, -1 and -1.1 % by 0.1 %.
        (figure(-50.0, -60.0, -40.0, unit="%"), figure(-49.5, -60.0, -40.0, unit="%"), "changed"),
        (figure(-1.0, -2.0, 0.0, unit="%"), figure(-1.1, -2.0, 0.0, unit="%"), "same"),
        # Exact sizes.
        (figure(0.5, metric="parameter_bytes"), figure(0.5, metric="parameter_bytes"), "same"),
        (figure(0.5, metric="parameter_bytes"), figure(0.501, metric="parameter_bytes"), "moved"),
        # Speed: the new estimate lies outside, and the intervals overlap or do not.
        (figure(30.0, 28.0, 32.0, **SPEED), figure(35.0, 31.5, 38.0, **SPEED), "same"),
        (figure(30.0, 28.0, 32.0, **SPEED), figure(35.0, 32.5, 38.0, **SPEED), "moved"),
        (figure(30.0, 28.0, 32.0, **SPEED), figure(25.0, 22.0, 27.5, **SPEED), "moved"),
        (figure(30.0, 28.0, 32.0, **SPEED), figure(35.0, **SPEED), "no interval"),
    ],
)
def test_verdicts(recorded, new, verdict):
    assert results.verdict_of(recorded, new, same_machine=True) == verdict


def test_absolute_speed_of_another_machine_is_not_compared():
    slow, fast = (figure(speed, speed - 1, speed + 1, **SPEED) for speed in (30.0, 60.0))
    assert results.verdict_of(slow, fast, same_machine=False) == "another machine"
    slow, fast = (replace(one, table="relative", unit="1") for one in (slow, fast))
    assert results.verdict_of(slow, fast, same_machine=False) == "moved"
    assert results.verdict_of(figure(1.25, 1.2, 1.3), figure(1.4, 1.3, 1.5), same_machine=False) == "moved"


def test_the_machine_is_the_recorded_one_if_processor_and_threads_are(run, read_once):
    loaded = load_run(run)
    entry = results.entry_of((), loaded)
    assert {verdict for _, _, verdict in results.compare(entry, loaded)} <= {"same", "no interval"}
    other = replace(entry, recorded={**entry.recorded, "threads": 7})
    speeds = {verdict for one, _, verdict in results.compare(other, loaded) if one.unit == "token/s"}
    assert speeds == {"another machine"}


# The script


def test_nothing_has_moved(stored, started, capsys):
    assert results.main([f"--recorded={stored}", "--output_dir=out"]) == 0
    *rows, sentence = capsys.readouterr().out.splitlines()
    count = len(results.read_recorded(stored)["tiny"].figures)
    assert len(rows) == 1 + count
    assert sentence.startswith(f"Compared {count} figures of 1 entry: 0 moved, 0 changed within the interval; ")
    assert "without recorded figures: never-run; runs are in " in sentence
    assert str(results.folder_of_this_code(Path("out"))) in sentence
    assert started == ["tiny"]


def test_a_figure_that_has_moved_is_named_and_exits_with_1(stored, started, capsys):
    change(stored, "tiny", estimate=500.0, ci_low=400.0, ci_high=600.0)
    assert results.main([f"--recorded={stored}", "--output_dir=out"]) == 1
    *rows, sentence = capsys.readouterr().out.splitlines()
    (row,) = [row for row in rows if row.endswith("moved")]
    assert " ".join(row.split()).startswith("tiny summary perplexity_ratio, magnitude, agency, 50 % 500 [400 to 600] ")
    assert ": 1 moved, 0 changed within" in sentence


def test_json_lines_say_the_same(stored, started, capsys):
    change(stored, "tiny", estimate=500.0, ci_low=0.0, ci_high=600.0)
    assert results.main([f"--recorded={stored}", "--output-dir=out", "--json"]) == 0
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    (found,) = [line for line in lines if line["verdict"] == "changed"]
    assert (found["entry"], found["metric"], found["recorded"]) == ("tiny", "perplexity_ratio", [500.0, 0.0, 600.0])
    assert (last["figures"], last["moved"], last["changed"], last["unrecorded"]) == (len(lines), 0, 1, ["never-run"])


def test_what_has_no_room_in_the_budget_is_left_out(stored, started, capsys):
    entries = results.read_recorded(stored)
    short = replace(entries["tiny"], minutes=2.0)
    results.write_recorded({"long": replace(short, minutes=75.0), "short": short}, stored)
    assert results.main([f"--recorded={stored}", "--minutes=60"]) == 0
    assert "left out for lack of time: long (75 min); runs" in capsys.readouterr().out
    assert started == ["short"]
    assert results.main([f"--recorded={stored}", "--minutes=1"]) == 0
    assert "Compared 0 figures of 0 entries: 0 moved" in capsys.readouterr().out
    assert results.main([f"--recorded={stored}", "--minutes=80"]) == 0
    assert started == ["short", "short", "long"]  # the shortest first


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only=tinny"], "--only: 'tinny' is unknown. Did you mean tiny?"),
        (
            ["--only=never-run"],
            "--only: never-run has no figures to compare with. Record them first: --record=never-run",
        ),
        (["--record=tinny"], "--record: 'tinny' is unknown. Did you mean tiny?"),
        (["--record_from=Tiny"], "--record_from: 'Tiny' is not NAME=RUN_FOLDER"),
        (["--record_from=tiny=nowhere"], "nowhere is not a run folder"),
    ],
)
def test_bad_input_exits_with_2(stored, started, capsys, argv, said):
    before = stored.read_text("utf-8")
    assert results.main([f"--recorded={stored}", *argv]) == 2
    assert said in capsys.readouterr().err
    assert started == []
    assert stored.read_text("utf-8") == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("[]", "does not hold recorded figures"),
        ('{"a": {"command": []}}', "does not hold recorded figures: KeyError('figures')"),
        ('{"a": {"command": [], "figures": [], "minutes": null, "recorded": null}}', "no entry has figures"),
    ],
)
def test_a_file_without_figures_exits_with_2(tmp_path, capsys, content, said):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, "utf-8")
    assert results.main([f"--recorded={path}"]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_fails_exits_with_1_and_the_others_go_on(stored, run, monkeypatch, capsys):
    entries = results.read_recorded(stored)
    results.write_recorded({"broken": replace(entries["tiny"], minutes=1.0), "tiny": entries["tiny"]}, stored)

    def run_entry(name, entry, runs_in):
        if name == "broken":
            raise results.RunFailedError("broken: ended with 2")
        return run

    monkeypatch.setattr(results, "run_entry", run_entry)
    assert results.main([f"--recorded={stored}"]) == 1
    printed = capsys.readouterr()
    assert "error: broken: ended with 2" in printed.err
    assert "of 1 entry: 0 moved, 0 changed within the interval; failed: broken; runs" in printed.out


def test_record_puts_a_run_in_place_of_what_was_there(stored, started, capsys):
    right = results.read_recorded(stored)["tiny"].figures
    change(stored, "tiny", estimate=500.0, ci_low=400.0, ci_high=600.0)
    assert results.main([f"--recorded={stored}", "--record=tiny"]) == 0
    printed = capsys.readouterr().out
    assert "500 [400 to 600]" in printed
    assert f"tiny: recorded {len(right)} figures of " in printed
    entries = results.read_recorded(stored)
    assert entries["tiny"].figures == right
    assert entries["tiny"].command == ("--model_name=tiny",)
    assert entries["never-run"].figures == ()


def test_record_from_takes_figures_and_command_of_a_stored_run(stored, started, run, capsys):
    assert results.main([f"--recorded={stored}", f"--record_from=tiny-again={run}"]) == 0
    entry = results.read_recorded(stored)["tiny-again"]
    assert entry.figures == results.read_recorded(stored)["tiny"].figures
    manifest = load_run(run).manifest
    assert entry.command == results.command_of(results.ComparisonSpec.from_dict(manifest.spec))
    assert entry.recorded == {
        "commit": manifest.commit,
        "date": manifest.finished[:10],
        "processor": manifest.hardware["processor"],
        "threads": 1,
        "torch": manifest.versions["torch"],
        "transformers": manifest.versions["transformers"],
    }
    assert started == []
    assert results.main([f"--recorded={stored}", f"--record_from=tiny={run}"]) == 0
    assert "tiny: the command was --model_name=tiny\n" in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_not_recorded(run, read_once):
    loaded = load_run(run)
    unfinished = replace(loaded, manifest=replace(loaded.manifest, finished=None))
    with pytest.raises(ValueError, match=r"is not finished.*Continue the run first"):
        results.entry_of((), unfinished)


def test_minutes_are_processor_time_over_threads_and_else_from_start_to_end(run, read_once, tmp_path):
    """By hand: (60 + 12.3 + 7.7 + 40) s over 2 threads are 1 minute; interrupted in between, it took days on the wall."""
    loaded = load_run(run)
    manifest = replace(loaded.manifest, started="2026-11-27T08:00:00Z", finished="2026-11-29T09:15:30Z")
    manifest = replace(manifest, hardware={**manifest.hardware, "threads": 2})
    line = "2026-11-27 08:01:00,000 INFO processor time by phase: "
    (tmp_path / "run.log").write_text(f"{line}timing 60.0 s, scores by obs 12.3 s\n{line}timing 7.7 s, texts 40.0 s\n")
    assert results._seconds(replace(loaded, manifest=manifest, folder=tmp_path)) == 60.0
    (tmp_path / "run.log").unlink()
    assert results._seconds(replace(loaded, manifest=manifest, folder=tmp_path)) == 49.25 * 3600 + 30


def test_an_entry_is_a_process_of_its_own_in_a_folder_of_its_name(tmp_path, monkeypatch):
    calls = []

    def start(command, **settings):
        calls.append((command, settings))
        made = tmp_path / "runs" / "tiny" / "run_1"
        made.mkdir(parents=True, exist_ok=True)
        (made / "manifest.json").write_text('{"spec": {"model_name": "tiny", "variants": [], "seed": 0}}', "utf-8")
        return SimpleNamespace(returncode=len(calls) - 1)

    monkeypatch.setattr(subprocess, "run", start)
    entry = Entry(("--model_name=tiny",))
    assert results.run_entry("tiny", entry, tmp_path / "runs").name == "run_1"
    ((command, settings),) = calls
    assert command[1:] == [
        "-m", "pruning_comparison", "run", "--model_name=tiny", f"--output_dir={tmp_path / 'runs' / 'tiny'}",
    ]  # fmt: skip
    assert settings["env"]["PYTHONPATH"].startswith(str(ROOT / "src"))
    with pytest.raises(results.RunFailedError, match=r"tiny: pruning-comparison run --model_name=tiny .* ended with 1"):
        results.run_entry("tiny", entry, tmp_path / "runs")


@pytest.mark.slow
def test_a_command_is_run_and_run_again_from_what_is_there(folder, tmp_path, capsys):
    spec = tiny_spec(folder, timing_limit_s=0.0)
    path = tmp_path / "results.json"
    results.write_recorded({"tiny": Entry(results.command_of(spec))}, path)
    where = [f"--recorded={path}", f"--output_dir={tmp_path / 'runs'}"]
    assert results.main([*where, "--record=tiny"]) == 0
    assert results.main(where) == 0
    assert ": 0 moved, 0 changed" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("*/tiny/run_*"))) == 1


def test_other_code_or_packages_have_another_folder(tmp_path, monkeypatch):
    package = tmp_path / "src" / "pruning_comparison"
    package.mkdir(parents=True)
    (package / "spec.py").write_text("one = 1\n", "utf-8")
    monkeypatch.setattr(results, "HERE", tmp_path)
    first = results.folder_of_this_code(tmp_path)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "spec.pyc").write_text("", "utf-8")
    assert results.folder_of_this_code(tmp_path) == first
    monkeypatch.setattr(results, "versions", lambda: {"torch": "1.0"})
    other_torch = results.folder_of_this_code(tmp_path)
    (package / "spec.py").write_text("one = 2\n", "utf-8")
    assert len({first, other_torch, results.folder_of_this_code(tmp_path)}) == 3


# Marked figures of documents

RATIOS = [
    figure(estimate, low, high, variant=variant, method=method, level=level)
    for variant, method, level, estimate, low, high in (
        ("baseline", "obs", 30.0, 2.5931, 1.7642, 3.8119),
        ("baseline", "obs", 50.0, 24.83, 1.24, 515.46),
        ("agency", "obs", 30.0, 1.0981, 1.0822, 1.1139),
        ("agency", "obs", 50.0, 1.2604, 1.2213, 1.2996),
        ("agency", "fisher", 50.0, 1.3689, 1.3231, 1.4168),
    )
]
OTHERS = [
    figure(-94.92, -99.1, -70.25, table="contrasts", metric="perplexity", variant="agency vs baseline", unit="%"),
    figure(1.0752, 1.041, 1.112, table="relative", metric="tokens_per_second"),
    figure(30.44, 29.06, 31.88, metric="tokens_per_second", unit="token/s"),
    figure(0.03349, 0.0321, 0.0349, metric="first_token_latency_s", unit="s"),
]
ENTRIES = {"small": Entry((), (*RATIOS, *OTHERS)), "empty": Entry(("--seed=1",))}


def wrong(text):
    return recorded_figures.check_page(text, ENTRIES)


TABLE = """
Some words.

<!-- results: small metric=perplexity_ratio -->

| heads pruned | variant | method | times dense | text |
|---|---|---|---|---|
| 50 % | `baseline` | obs | 24.8 [1.2 to 515.5] | 65,536 |
| 50 % | agency | by `obs` | **1.260** [1.221 to 1.300] | 65,536 |
| 50 % | agency | fisher | 1.37 [1.32 to 1.42] | |
| what we aim at | | | 1.23 | |
"""


def test_a_table_that_prints_what_is_on_record_is_right():
    assert wrong(TABLE) == []


@pytest.mark.parametrize("printed", ["1.361 [1.221 to 1.300]", "1.260 [1.222 to 1.300]", "1.260 [1.221 to 1.301]"])
def test_a_wrong_figure_is_named_with_its_line(printed):
    (found,) = wrong(TABLE.replace("**1.260** [1.221 to 1.300]", printed))
    assert found.startswith(
        f"line 9: '{printed}' is recorded as 1.26 [1.221 to 1.3] (summary perplexity_ratio, obs, agency"
    )


def test_levels_or_variants_may_head_the_columns():
    by_level = """<!-- results: small metric=perplexity_ratio method=obs -->
| | 30 % | 50 % |
|---|---|---|
| `baseline` | 2.59 [1.76 to 3.81] | 24.8 [1.2 to 515.5] |
| `agency` | 1.098 [1.082 to 1.114] | 1.260 [1.221 to 1.300] |
"""
    assert wrong(by_level) == []
    assert len(wrong(by_level.replace("| | 30 % | 50 %", "| | 50 % | 30 %"))) == 4
    by_variant = """<!-- results: small method=obs level=50 -->
| | agency tokens/s | first-token latency of agency | perplexity, agency against the baseline |
|---|---|---|---|
| some model | 30.4 [29.1 to 31.9] | 33.5 ms [32.1 to 34.9] | −94.9 % [−99.1 to −70.2] |
"""
    assert wrong(by_variant) == []  # -70.25 may be rounded to -70.2 or -70.3
    assert len(wrong(by_variant.replace("33.5 ms", "33.5"))) == 1
    assert len(wrong(by_variant.replace("−94.9", "94.9"))) == 1


def test_a_ratio_may_be_printed_as_per_cent_of_change():
    page = "<!-- results: small table=relative metric=tokens_per_second -->\n| | 50 % |\n|---|---|\n| agency | {} |\n"
    assert wrong(page.format("+7.5 % [4.1 to 11.2]")) == []
    assert wrong(page.format("1.075 [1.041 to 1.112]")) == []
    assert wrong(page.format("+8.5 % [4.1 to 11.2]"))[0].startswith(
        "line 4: '+8.5 % [4.1 to 11.2]' is recorded as 1.075"
    )


def test_a_figure_on_a_line_is_checked_by_the_comment_behind_it():
    line = (
        "\n* With half of the heads it has 1.26 [1.22 to 1.30] times the perplexity, "
        "<!-- results: small metric=perplexity_ratio method=obs variant=agency level=50 --> and by Fisher "
        "1.37 [1.32 to 1.42]. <!-- results: small metric=perplexity_ratio method=fisher -->\n"
    )
    assert wrong(line) == []
    (found,) = wrong(line.replace("1.37 [", "1.27 ["))
    assert found.startswith("line 2: '1.27 [1.32 to 1.42]' is recorded as 1.369")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("| agency | fisher |", "| agency | taylor |", "line 10: the entry has no figure with table=summary"),
        ("| 50 % | agency | fisher |", "| 70 % | agency | fisher |", "line 10: the entry has no figure with"),
        ("| agency | fisher |", "| agency | |", "line 10: 2 figures of the entry have"),
        (
            "| agency | fisher |",
            "| agency and baseline | fisher |",
            "line 10: 'agency and baseline' names more than one",
        ),
        ("1.37 [1.32 to 1.42]", "1.37 [1.32–1.42]", "line 10: '1.37 [1.32–1.42]' cannot be read"),
        ("results: small metric", "results: smal metric", "line 4: results: 'smal' is unknown. Did you mean small?"),
        ("small metric=", "small metrics=", "line 4: results: 'metrics' is unknown. Did you mean metric?"),
        (
            "perplexity_ratio -->",
            "perplexity_ratios -->",
            "line 4: results: metric: 'perplexity_ratios' is unknown. Did",
        ),
        ("results: small metric", "results: empty metric", "line 4: empty has no figures yet. Record them"),
        ("perplexity_ratio -->", "perplexity_ratio method=fisher -->", "line 8: method is both fisher and obs"),
        ("\n\n| heads", "\n\nWords.\n\n| heads", "line 4: no table follows the comment"),
    ],
)
def test_what_cannot_be_checked_is_an_error(old, new, said):
    assert old in TABLE
    found = wrong(TABLE.replace(old, new))
    assert found[0].startswith(said), found


def test_a_mark_without_figures_is_an_error():
    empty = "<!-- results: small -->\n| a | b |\n|---|---|\n| agency | 1.26 |\n"
    assert wrong(empty) == ["line 2: the table has no figure with an interval, so there is nothing to check."]
    (found,) = wrong("Words. <!-- results: small level=50 -->")
    assert found == "line 1: no figure with an interval stands before the comment."


def test_what_is_not_marked_or_is_code_is_not_checked():
    table = TABLE.replace("1.260", "9.99")
    assert wrong(table.replace("<!-- results: small metric=perplexity_ratio -->", "")) == []
    assert wrong(f"```markdown\n{table}```\n") == []
    assert len(wrong(f"```\n```\n{table}")) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_marked_figures_of_a_document_are_those_on_record(page):
    assert recorded_figures.check_page(page.read_text("utf-8"), results.read_recorded()) == []
