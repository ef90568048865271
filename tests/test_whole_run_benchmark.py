"""When ``benchmarks/whole_run.py`` says that two tools gave the same numbers."""

from copy import deepcopy
from pathlib import Path

import pytest
from builders import load_script, tiny_spec

whole_run = load_script(Path(__file__).parents[1] / "benchmarks" / "whole_run.py")

TEXT = {"text": "Peace", **dict.fromkeys(whole_run._COMPARED, 0.5)}


def results(*, keep=None, perplexity=30.0, texts=20):
    """One cell of a model of 10 x 10 heads of which the first layer's have left."""
    where = {"variant": "baseline", "iteration": 0, "level": 10.0, "temperature": 1.0}
    keep = [[layer > 0] * 10 for layer in range(10)] if keep is None else keep
    cell = {**where, "keep": keep, "perplexity": perplexity, "texts": [deepcopy(TEXT) for _ in range(texts)]}
    return {"cells": [cell], "timings": [{"end_to_end_s": 1.0}]}


def swapped(pairs):
    """Heads of the second layer have left in place of as many of the first."""
    first, second = [head < pairs for head in range(10)], [head >= pairs for head in range(10)]
    return [first, second, *([True] * 10 for _ in range(8))]


def test_the_same_numbers_agree():
    found = whole_run.check_agreement(results(), results(perplexity=30.02), rounded=False)
    assert found["agree"]
    assert (found["equal_texts"], found["texts"], found["cells"]) == (20, 20, 1)
    assert found["share_of_equal_heads_where_heads_differ"] == {}
    assert found["largest_log_perplexity_ratio"] == pytest.approx(0.000666, abs=1e-6)


def test_a_few_other_heads_agree_and_are_named():
    """By hand: two swaps are 4 of 100 heads. Their texts are not compared, since other models write other texts."""
    other = results(keep=swapped(2), perplexity=30.2)
    for text in other["cells"][0]["texts"]:
        text["text"] = "War"
    found = whole_run.check_agreement(results(), other, rounded=True)
    assert found["agree"]
    assert list(found["share_of_equal_heads_where_heads_differ"].values()) == [0.96]
    assert found["texts"] == 0
    assert found["largest_log_perplexity_ratio_where_heads_differ"] == pytest.approx(0.00664, abs=1e-5)
    assert not whole_run.check_agreement(results(), other, rounded=False)[
        "agree"
    ]  # without rounding none may be another


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (results(keep=swapped(3)), "only 94.0% of the heads"),
        (results(keep=swapped(1), perplexity=30.5), "perplexity at"),
        (results(perplexity=30.1), "perplexity at"),
        ({"cells": [], "timings": [{}]}, "a cell of one alone"),
        ({**results(), "timings": []}, "1 generations were timed, and 0 by us"),
    ],
)
def test_what_does_not_agree_is_named(other, fault):
    found = whole_run.check_agreement(results(), other, rounded=True)
    assert not found["agree"]
    assert fault in " ".join(found["faults"])


def test_one_text_in_twenty_may_differ():
    for unequal, agree in ((1, True), (2, False)):
        other = results()
        for text in other["cells"][0]["texts"][:unequal]:
            text["text"] = "War"
        assert whole_run.check_agreement(results(), other, rounded=False)["agree"] is agree


def test_a_profile_has_the_phases_of_the_run_and_adds_up(folder):
    seconds = whole_run.profile(tiny_spec(folder, timing_limit_s=0.0))
    assert {"timing", "perplexity", "texts", "loading", "all else"} <= set(seconds)
    parts = [took for phase, took in seconds.items() if phase != "all"]
    assert sum(parts) == pytest.approx(seconds["all"], abs=0.01 * len(parts))
    assert seconds["all"] > 0
