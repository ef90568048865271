"""Progress says how long each phase will take, and the running table what is known so far."""

from __future__ import annotations

import io
import itertools
import math
import re

import pytest

from pruning_comparison.formatting import format_duration
from pruning_comparison.progress import Live, Pace, RunningMeans, steps_of
from pruning_comparison.spec import Cell, ComparisonSpec
from pruning_comparison.store.records import Measurement

STEPS = {"baseline": 2, "agency": 2, "timing": 2}


def losses(nats, tokens):
    return [Measurement("window_nats", nats, "nat"), Measurement("window_tokens", tokens, "token")]


def speeds(*values):
    return [Measurement("tokens_per_second", value, "token/s") for value in values]


def test_steps_are_cells_of_each_variant_and_one_timing_per_level():
    spec = ComparisonSpec(
        model_name="bundled", device="cpu", precision="float32", pruning_levels=(0.0, 50.0), iterations=3
    )
    assert steps_of(spec) == {"baseline": 6, "agency": 6, "timing": 6}


def test_time_left_is_each_phases_own():
    pace = Pace(STEPS)
    assert pace.left(6) == {}
    pace.took("baseline", 1.0)
    pace.took("agency", 9.0)
    assert pace.left(3) == {"baseline": 1.0, "agency": 9.0, "timing": 5.0}  # timing: as long as the others' mean
    pace.took("timing", 2.0)
    assert pace.left(3) == {"baseline": 1.0, "agency": 9.0, "timing": 2.0}
    assert pace.left(0) == {}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 1 s"), (89, "about 89 s"), (100, "about 2 min"), (5340, "about 89 min"), (7800, "about 2 h 10 min")],
)
def test_durations_in_words(seconds, words):
    assert format_duration(seconds) == words


def test_known_figures_are_geometric_means_over_iterations():
    known = RunningMeans()
    for iteration, nats in enumerate((20.0, 40.0)):
        known.add(Cell("agency", "entropy", iteration, 50.0), losses(nats, 10))
    known.add(Cell("agency", "entropy", 0, 50.0), speeds(10.0, 40.0))
    ((method, level, variant, means),) = known.rows()
    assert (method, level, variant) == ("entropy", 50.0, "agency")
    assert means["perplexity"] == pytest.approx(math.exp(3.0))
    assert means["tokens_per_second"] == pytest.approx(20.0)


def test_variants_of_a_level_stand_together_whatever_became_known_between_them():
    known = RunningMeans()
    for variant, level in (("baseline", 20.0), ("baseline", 40.0), ("agency", 20.0)):
        known.add(Cell(variant, "entropy", 0, level), speeds(10.0))
    assert [row[1:3] for row in known.rows()] == [(20.0, "baseline"), (20.0, "agency"), (40.0, "baseline")]


def test_a_loss_that_is_missing_gives_no_perplexity():
    assert RunningMeans().add(Cell("agency", "entropy", 0, 50.0), [*losses(20.0, 10), *losses(None, 10)]) == {}
    assert RunningMeans().add(Cell("agency", "entropy", 0, 50.0), []) == {}


def test_elsewhere_than_on_a_terminal_it_prints_plain_lines(capsys):
    times = iter([0.0, 10.0, 40.0])
    with Live(quiet=False, steps=STEPS, clock=lambda: next(times)) as live:
        live.progress(0, 6, "baseline, entropy, iteration 1, level 0 %")
        live.measured(Cell("baseline", "entropy", 0, 0.0), losses(20.0, 10))
        live.progress(1, 6, "agency, entropy, iteration 1, level 0 %")
        live.measured(Cell("agency", "entropy", 0, 0.0), speeds(10.0))
        live.progress(2, 6, "timing, entropy, iteration 1, level 0 %")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "[0/6] baseline, entropy, iteration 1, level 0 %"
    assert told[1] == "  baseline, entropy, iteration 1, level 0 %: perplexity 7.389"
    assert told[2] == "[1/6] agency, entropy, iteration 1, level 0 %, about 50 s left"  # 5 steps of 10 s
    assert told[3] == "  agency, entropy, iteration 1, level 0 %: 10 tokens/s"
    # 4 steps: 4/3 of 10 s, 4/3 of 30 s, and 4/3 of their mean, 20 s
    assert told[4].endswith("about 80 s left")
    assert "\x1b" not in "".join(told)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch) -> Terminal:
    """Standard error as a terminal of 80 columns and 24 lines. Not a fixture: pytest captures anew when a test begins."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    return screen


def lines_of(screen: Terminal) -> list[str]:
    """What was ever on the screen, line by line, without the codes that move and colour."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))


def test_on_a_terminal_there_is_a_running_table(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with Live(quiet=False, steps=STEPS) as live:
        live.progress(0, 6, "baseline, entropy, iteration 1, level 20 %")
        live.measured(Cell("baseline", "entropy", 0, 20.0), losses(20.0, 10))
        live.say("a line of [news]")
        live.progress(1, 6, "agency, entropy, iteration 1, level 20 %")
    told = terminal.getvalue()
    assert "Known so far" in told
    assert "7.389" in told
    assert "20 %" in told
    assert "a line of [news]" in told


def test_bar_count_and_time_left_fit_80_columns_whatever_the_names(monkeypatch):
    """The longest names that there are, six-digit counts, hours left, and a table of two methods."""
    terminal = terminal_of(monkeypatch)
    times = itertools.count(step=7000.0)
    steps = {"agency-always-yes": 200_000, "baseline-progressive": 200_000, "timing": 200_000}
    with Live(quiet=False, steps=steps, clock=lambda: next(times)) as live:
        for done, (variant, method) in enumerate(
            [("baseline-progressive", "fisher-interactions"), ("agency-always-yes", "entropy")]
        ):
            live.progress(done, 600_000, f"{variant}, {method}, iteration 10000, level 77.5 %" + " and more" * 9)
            live.measured(Cell(variant, method, 0, 77.5), [*losses(20.0, 10), *speeds(123456.0)])
        live.progress(2, 600_000, "timing, entropy, iteration 10000, level 77.5 %")
    lines = lines_of(terminal)
    assert max(map(len, lines)) <= 80
    bar = next(line for line in reversed(lines) if "600000" in line)
    assert re.search(r"2/600000 +\S+ +about 1166\d{3} h \d+ min left", bar)
    assert any("fisher-interactions" in line and "baseline-progressive" in line and "7.389" in line for line in lines)


def test_the_table_leaves_room_for_the_bar(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with Live(quiet=False, steps=STEPS) as live:
        for level in range(90):
            live.measured(Cell("agency", "entropy", 0, float(level)), speeds(10.0))
        live.progress(90, 100, "agency, entropy, iteration 1, level 89 %")
    shown = lines_of(terminal)
    assert any("90/100" in line for line in shown)
    assert (
        len([line for line in shown if re.match(r"[ \u2502\u2503]*\d+ %", line)]) <= 2 * 16
    )  # 24 lines less 8; drawn at most twice


def test_quiet_says_nothing(capsys):
    with Live(quiet=True, steps=STEPS) as live:
        live.say("news")
        live.progress(0, 6, "baseline")
        live.measured(Cell("baseline", "entropy", 0, 0.0), losses(20.0, 10))
    assert capsys.readouterr() == ("", "")
