"""How often a level is timed: turns of all models, the dense one among them, until ratios are known or time is up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from builders import tiny_spec
from scipy import stats

from pruning_comparison.errors import InputError
from pruning_comparison.measure.generation import Timing
from pruning_comparison.run import measure_cell
from pruning_comparison.run.comparison import run_comparison
from pruning_comparison.run.measure_cell import time_level, widest_half_width
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.store import RunStore, load_run
from pruning_comparison.variants import DENSE


def timing(variant, repeat, end_to_end=1.0, first=0.1):
    return Timing(variant, repeat, 1 / end_to_end, first, None, end_to_end, 8, None, "not asked for")


def test_the_widest_interval_by_hand():
    """Log ratios of B over A of 0.1 and -0.1: mean 0, standard deviation 0.1 * sqrt 2, so a half width of 12.706 * 0.1."""
    timings = [timing("A", 0), timing("B", 0, math.exp(0.1)), timing("A", 1), timing("B", 1, math.exp(-0.1))]
    assert widest_half_width(timings, "end_to_end_s") == pytest.approx(math.expm1(stats.t.ppf(0.975, 1) * 0.1))
    assert widest_half_width(timings, "first_token_latency_s") == 0


def test_every_model_is_held_against_the_first_and_the_last():
    """A and C vary alike and B does not: only ratios with B are uncertain, and they must not be overlooked."""
    common = {"A": [1.0, 1.2], "B": [1.0, 1.0], "C": [2.0, 2.4]}
    timings = [timing(name, repeat, common[name][repeat]) for repeat in (0, 1) for name in common]
    half = stats.t.ppf(0.975, 1) * math.log(1.2) / 2
    assert widest_half_width(timings, "end_to_end_s") == pytest.approx(math.expm1(half))


def stage(monkeypatch, times, *, batches=2, **settings):
    """A workspace whose models are timed by ``times(variant, visit, first token alone)``: seconds, and the first token's.

    A clock moves by a second with every batch that is timed.
    """
    visits, clock = [], [0.0]

    def time_generation(models, batch, count, *, repeats, **more):
        alone = count == 1
        visits.append(([*models], batch[0][0], repeats[0], alone))
        clock[0] += 1.0
        return [timing(name, repeats[0], *times(name, len(visits) - 1, alone)) for name in models]

    monkeypatch.setattr(measure_cell, "time_generation", time_generation)
    monkeypatch.setattr(measure_cell, "decode_steps", lambda models: dict.fromkeys(models))
    monkeypatch.setattr(measure_cell.time, "perf_counter", lambda: clock[0])
    spec = ComparisonSpec(num_tokens=7, **settings)
    prompts = [[10 + number, 1] for number in range(batches)]
    return SimpleNamespace(spec=spec, inputs=SimpleNamespace(prompt_ids=prompts), dense=object()), visits


def rows_of(timings, metric):
    return [(variant, row.prompt, row.repeat, row.value) for variant, row in timings.rows if row.metric == metric]


def test_the_dense_model_takes_part_and_ten_pairs_are_the_least(monkeypatch):
    workspace, visits = stage(monkeypatch, lambda name, visit, alone: (2.0 if name == DENSE else 1.0, 0.5))
    timings = time_level(workspace, {"baseline": object(), "agency": object()}, 0)
    # 2 batches, 5 rounds.
    assert visits == [(["baseline", "agency", DENSE], 10 + visit % 2, visit, False) for visit in range(10)]
    assert timings.effort is not None
    assert vars(timings.effort) == {
        "pairs": 10, "first_token_pairs": 10, "seconds": 10.0, "speed_half_width": 0.0, "latency_half_width": 0.0,
        "ended": "precise",
    }  # fmt: skip
    assert rows_of(timings, "end_to_end_s")[:6] == [
        ("baseline", 0, 0, 1.0), ("agency", 0, 0, 1.0), (DENSE, 0, 0, 2.0),
        ("baseline", 1, 0, 1.0), ("agency", 1, 0, 1.0), (DENSE, 1, 0, 2.0),
    ]  # fmt: skip
    assert len(rows_of(timings, "end_to_end_s")) == 3 * 10


def test_a_model_that_is_the_dense_one_is_not_timed_twice(monkeypatch):
    workspace, visits = stage(monkeypatch, lambda name, visit, alone: (1.0 + visit, 0.5))
    timings = time_level(workspace, {"baseline": workspace.dense, "agency": workspace.dense}, 0)
    assert [names for names, *_ in visits] == [[DENSE]] * 10
    assert timings.effort is not None
    assert (timings.effort.ended, timings.effort.speed_half_width) == ("all alike", None)
    by_variant = {name: [value for one, *_, value in rows_of(timings, "end_to_end_s") if one == name] for name in
                  ("baseline", "agency", DENSE)}  # fmt: skip
    assert by_variant["baseline"] == by_variant["agency"] == [1.0 + visit for visit in range(10)]
    assert by_variant[DENSE] == []


def test_timing_goes_on_until_the_ratio_is_known(monkeypatch):
    """Ratios of exp(+-0.04) in turn: with n pairs the half width is t(n-1) * 0.04 * sqrt(n / (n-1)) / sqrt(n).

    It is 0.0302 at 10 pairs and, at 2 pairs a round, first below log 1.02 = 0.0198 at 20: 2.093 * 0.04 / sqrt 19 = 0.0192;
    at 18 it was 2.110 * 0.04 / sqrt 17 = 0.0205.
    """
    workspace, visits = stage(
        monkeypatch, lambda name, visit, alone: (math.exp(0.04 * (-1) ** visit) if name == "agency" else 1.0, 0.5)
    )
    timings = time_level(workspace, {"baseline": object(), "agency": object()}, 0)
    assert len(visits) == 20
    assert not any(alone for *_, alone in visits)
    assert timings.effort is not None
    assert (timings.effort.pairs, timings.effort.ended) == (20, "precise")
    assert timings.effort.speed_half_width == pytest.approx(math.expm1(stats.t.ppf(0.975, 19) * 0.04 / math.sqrt(19)))


def test_where_only_first_tokens_vary_only_they_are_timed_again(monkeypatch):
    """The same ratios of first tokens: 10 whole generations, and 10 pairs of first tokens alone."""
    workspace, visits = stage(
        monkeypatch, lambda name, visit, alone: (1.0, math.exp(0.04 * (-1) ** visit) if name == "agency" else 1.0)
    )
    timings = time_level(workspace, {"baseline": object(), "agency": object()}, 0)
    assert [alone for *_, alone in visits] == [False] * 10 + [True] * 10
    assert timings.effort is not None
    assert (timings.effort.pairs, timings.effort.first_token_pairs) == (10, 20)
    assert {repeat for *_, repeat, _ in rows_of(timings, "end_to_end_s")} == set(range(5))
    assert {repeat for *_, repeat, _ in rows_of(timings, "first_token_latency_s")} == set(range(10))


def test_time_is_up_before_a_round_that_would_pass_the_limit(monkeypatch):
    """Ratios that never settle: rounds of 2 s each, 5 of which are the least; the limit of 15 s leaves room for two more."""
    workspace, visits = stage(
        monkeypatch, lambda name, visit, alone: (2.0 ** ((-1) ** visit), 0.5) if name == "agency" else (1.0, 0.5),
        timing_limit_s=15.0,
    )  # fmt: skip
    timings = time_level(workspace, {"baseline": object(), "agency": object()}, 0)
    assert len(visits) == 14
    assert timings.effort is not None
    assert (timings.effort.ended, timings.effort.seconds) == ("time limit", 14.0)


def test_what_timings_took_is_kept_and_taken_over(folder, tmp_path):
    small = run_comparison(tiny_spec(folder, timing_pairs=3), output_dir=tmp_path)
    run = load_run(small)
    took = run.timings.set_index("level")
    # One prompt: 3 rounds.
    assert took["pairs"].tolist() == [3, 3]
    assert took["ended"].tolist()[0] == "all alike"
    assert took["speed_half_width"].isna().tolist() == [True, False]
    timed = run.measurements.query("metric == 'tokens_per_second'").groupby(["level", "variant"]).size()
    assert timed.to_dict() == {
        (0.0, "agency"): 3, (0.0, "baseline"): 3, (50.0, "agency"): 3, (50.0, "baseline"): 3, (50.0, DENSE): 3,
    }  # fmt: skip
    grown = load_run(run_comparison(tiny_spec(folder, timing_pairs=3, iterations=2), output_dir=tmp_path))
    assert grown.timings.query("iteration == 0").to_csv(index=False) == run.timings.to_csv(index=False)
    taken = grown.measurements.query("iteration == 0 and phase == 'timing'")
    assert taken.to_csv(index=False) == run.measurements.query("phase == 'timing'").to_csv(index=False)


def test_other_timings_leave_heads_and_perplexity_as_they_are(folder, tmp_path, caplog):
    first = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    run_comparison(tiny_spec(folder, timing_pairs=4), output_dir=tmp_path)
    assert f"taken over from {first}: 4 cells without their texts" in caplog.messages


@pytest.mark.parametrize(
    ("field", "value"),
    [("timing_pairs", 0), ("timing_precision_percent", 0.0), ("timing_limit_s", -1.0), ("timing_limit_s", math.inf)],
)
def test_settings_that_cannot_work(field, value):
    with pytest.raises(InputError, match=f"--{field}"):
        ComparisonSpec(**{field: value})


def test_a_journal_of_before_says_nothing_of_what_timings_took(folder, tmp_path):
    run = run_comparison(tiny_spec(folder), output_dir=tmp_path)
    with RunStore(run, lock=True) as store:
        store._journal.execute("DROP TABLE timings")
        store._journal.execute("CREATE TABLE timings (method TEXT, iteration INTEGER, level REAL)")
        store._journal.execute("INSERT INTO timings VALUES ('magnitude', 0, 50.0)")
        store._journal.execute("PRAGMA user_version = 1")
        store._journal.commit()
    with RunStore(run) as store:
        assert store.finished_timings() == {("magnitude", 0, 50.0)}
        assert store.table("timings").isna().sum(axis=1).tolist() == [6]
