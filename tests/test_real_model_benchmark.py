"""benchmarks/real_model.py on a tiny model: what it prints, and that a run beside itself differs in nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import load_script, save_tiny_model, write_short_texts

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_model.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def printed(benchmark, tmp_path_factory):
    """The lines of a run of this checkout, recorded as if it were another commit's, and of reading that again."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    texts = write_short_texts(folder / "texts")
    kept = tmp_path_factory.mktemp("kept")
    small = [
        f"--model_name={folder}", "--pruning_levels=0,50", "--num_tokens=3", "--max_prompts=1", "--temperatures=1",
        "--eval_tokens=150", "--calibration_tokens=256", "--calibration_window=64", "--timing_pairs=2",
        "--timing_limit_s=0", *(f"--{name}={value}" for name, value in texts.items()),
    ]  # fmt: skip
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "emit", lambda name, **facts: lines.append(facts))
        patch.setattr(benchmark, "emit_machine", lambda *facts: None)
        benchmark.main([*small, f"--keep={kept}"])
        lines.append(benchmark.recorded(kept / "this-1"))
    return lines


def test_each_run_is_told_with_its_time_memory_and_phases(printed):
    run, memory, again = printed
    assert again == run
    phases = run["phases_processor_seconds"]
    assert {"loading", "scores by entropy", "moments", "prices", "adaptation", "perplexity", "timing"} <= set(phases)
    assert 0 < sum(phases.values()) < run["processor_seconds"]
    assert run["peak_memory_bytes"] > 100e6
    # 2 layers of width 32, 257 tokens and 128 positions: per layer two norms, attention's two projections and the MLP's two,
    # all with biases; one norm more. In float32.
    layer = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert memory["memory_limit_bytes"] == 3 * 4 * ((257 + 128) * 32 + 2 * layer + 64) + 2**30
    assert memory["planned_memory_bytes"] > 100e6


def test_beside_itself_nothing_differs(benchmark, printed):
    run = printed[0]
    slow, slower = ({**run, "processor_seconds": seconds} for seconds in (20.0, 80.0))
    ratios = benchmark.beside([run | {"processor_seconds": 10.0}] * 2, [slow, slower])
    # The geometric mean of 20 and 80 is 40.
    assert (ratios["processor_time_ratio"], ratios["times_less"]) == (0.25, 4.0)
    (row,) = ratios["agency_perplexity_ratios"]
    assert (row["level"], row["ratio"], row["interval"]) == (50, 1.0, [1.0, 1.0])
    assert row["documents"] > 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only=other"], "--only=other: there is no other commit"),
        (["--recorded=there", "--against=elsewhere"], "--recorded: the other commit is either recorded or run"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(benchmark, capsys, argv, message):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert message in capsys.readouterr().err


def test_a_run_that_fails_says_why(benchmark, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)pruning_comparison run .* ended with 2:.*no.such.option"):
        benchmark.measure(SCRIPT.parents[1], ["--no-such-option"], tmp_path, which="this")
