"""The four verdicts, and the correction by chains, against the rule as it is written and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pruning_comparison.analysis.random_effects import fit_crossed
from pruning_comparison.analysis.verdict_rules import (
    ERROR_RATE,
    SHARES,
    SPENT,
    decide,
    in_chains,
    level_of,
    p_of_decision,
    verdict_of,
)

MARGIN = (-0.05, 0.05)


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.06, 0.2, 1, "supported"),
        (0.05, 0.2, 1, "not enough data"),
        (0.04, 0.2, 1, "not enough data"),
        (-0.2, 0.2, 1, "not enough data"),
        (-0.04, 0.04, 1, "no meaningful difference"),
        (0.01, 0.04, 1, "no meaningful difference"),
        (-0.2, 0.04, 1, "refuted"),
        (-0.2, -0.1, 1, "refuted"),
        (-0.04, 0.05, 1, "not enough data"),
        # Less is better: the same intervals, mirrored.
        (-0.2, -0.06, -1, "supported"),
        (-0.2, -0.04, -1, "not enough data"),
        (-0.04, 0.04, -1, "no meaningful difference"),
        (-0.04, 0.2, -1, "refuted"),
        (0.065, 0.098, -1, "refuted"),
    ],
)
def test_verdicts_as_they_are_defined(low, high, sign, verdict):
    assert verdict_of(low, high, MARGIN, sign) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "supported"),
        (-0.01, 0.2, "not enough data"),
        (-0.2, -0.01, "refuted"),
        (0.0, 0.0, "not enough data"),
    ],
)
def test_without_a_margin_it_is_the_sign(low, high, verdict):
    assert verdict_of(low, high, (0.0, 0.0), 1) == verdict


def test_the_examples_that_had_been_left_open_are_decided():
    """45.3 % lower [37.9 to 51.8] of perplexity and 8.2 % later [6.5 to 9.8], by their own intervals."""
    assert verdict_of(math.log(1 - 0.518), math.log(1 - 0.379), (math.log(0.95), math.log(1.05)), -1) == "supported"
    assert verdict_of(math.log(1.065), math.log(1.098), (math.log(0.98), math.log(1.02)), -1) == "refuted"


def test_the_parts_of_a_report_share_the_whole_error_rate():
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert sum(level_of(part) for part in SHARES) == pytest.approx(SPENT)
    assert SPENT < ERROR_RATE == 0.05
    assert level_of("rankings", 3) == level_of("rankings") / 3


def test_what_decides_is_the_p_of_the_margins_favourable_end():
    fit = fit_crossed(np.array([[0.1, 0.12, 0.15, 0.11]]))
    assert p_of_decision(fit, MARGIN, 1) == fit.p_value(0.05)
    assert p_of_decision(fit, MARGIN, -1) == fit.p_value(-0.05)
    assert p_of_decision(fit, (0.0, 0.0), 1) == fit.p_value()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bounds", [MARGIN, (0.0, 0.0)])
@pytest.mark.parametrize("mean", [-0.2, -0.05, -0.03, 0.0, 0.03, 0.07, 0.3])
def test_the_verdict_is_that_of_the_interval_and_of_its_p(mean, bounds, sign):
    values = mean + 0.02 * np.random.default_rng(1).standard_normal((3, 6))
    fit = fit_crossed(values)
    for level in (0.2, 0.01, 0.001):
        found = decide(fit, bounds, sign, level)
        assert found.verdict == verdict_of(found.low, found.high, bounds, sign)
        assert (found.verdict != "not enough data") == (p_of_decision(fit, bounds, sign) <= level)


def test_nothing_is_decided_without_a_level_or_from_one_observation():
    assert decide(fit_crossed(np.array([[1.0, 1.1]])), MARGIN, 1, 0.0).verdict == "not enough data"
    assert decide(fit_crossed(np.array([[1.0]])), MARGIN, 1, 0.05).verdict == "not enough data"


def test_pairs_that_are_all_equal_decide_where_signs_could():
    """Three equal pairs: 2^-2; eight: 2^-7."""
    three, eight = np.zeros((1, 3)), np.zeros((1, 8))
    assert decide(fit_crossed(three), MARGIN, 1, 0.1).verdict == "not enough data"
    assert decide(fit_crossed(eight), MARGIN, 1, 0.008).verdict == "no meaningful difference"
    assert decide(fit_crossed(eight), MARGIN, 1, 0.007).verdict == "not enough data"


def test_a_question_of_either_side_is_supported_by_a_loss_too():
    fit = fit_crossed(np.array([[-0.1, -0.12, -0.15, -0.11]]))
    assert decide(fit, (0.0, 0.0), 1, 0.05).verdict == "refuted"
    assert decide(fit, (0.0, 0.0), 1, 0.05, either=True).verdict == "supported"


# The correction


def test_chains_of_one_are_holms_procedure():
    adjusted, _ = in_chains(np.array([[0.01, 0.04, 0.03]]), [[0], [1], [2]], [1, 1, 1], 0.05)
    assert adjusted[0] == pytest.approx([0.03, 0.06, 0.06])
    adjusted, _ = in_chains(np.array([[0.9, 0.6]]), [[0], [1]], [1, 1], 0.05)
    assert adjusted[0] == pytest.approx([1.0, 1.0])


def test_one_chain_is_a_fixed_sequence():
    adjusted, levels = in_chains(np.array([[0.04, 0.01, 0.2, 0.001]]), [[0, 1, 2, 3]], [1], 0.05)
    assert adjusted[0] == pytest.approx([0.04, 0.04, 0.2, 0.2])
    assert levels[0] == pytest.approx([0.05, 0.05, 0.05, 0.0])


def test_a_chain_that_is_through_hands_its_share_on():
    """Two chains of 0.03 and 0.02. The second claim of the first is decided, so the other chain then has 0.05."""
    adjusted, levels = in_chains(np.array([[0.001, 0.002, 0.04]]), [[0, 1], [2]], [0.6, 0.4], 0.05)
    assert adjusted[0] == pytest.approx([0.001 / 0.6, 0.002 / 0.6, 0.04])
    assert levels[0] == pytest.approx([0.03, 0.03, 0.05])
    # Open, it keeps it, and the other chain is tested at 0.02 alone.
    adjusted, levels = in_chains(np.array([[0.001, 0.2, 0.04]]), [[0, 1], [2]], [0.6, 0.4], 0.05)
    assert levels[0] == pytest.approx([0.03, 0.03, 0.02])
    assert (adjusted[0] <= 0.05).tolist() == [True, False, False]


def closed_test(p, chains, weights, level):
    """By brute force: a claim is decided if every set of claims that holds it is rejected by the first of a chain in it."""
    decided = []
    for claim in range(len(p)):
        rejected = True
        for size in range(1, len(p) + 1):
            for chosen in itertools.combinations(range(len(p)), size):
                if claim in chosen:
                    heads = [(w, next(c for c in chain if c in chosen)) for chain, w in zip(chains, weights, strict=True)
                             if set(chain) & set(chosen)]  # fmt: skip
                    total = sum(w for w, _ in heads)
                    rejected &= any(p[head] <= level * w / total for w, head in heads)
        decided.append(rejected)
    return decided


@pytest.mark.parametrize("seed", range(30))
def test_the_correction_is_the_closed_test(seed):
    generator = np.random.default_rng(seed)
    p = generator.random((1, 6)) ** 4
    chains, weights = [[3, 0], [1], [5, 2, 4]], [0.5, 0.2, 0.3]
    adjusted, levels = in_chains(p, chains, weights, 0.05)
    assert (adjusted[0] <= 0.05).tolist() == closed_test(p[0], chains, weights, 0.05)
    assert ((p[0] <= levels[0]) & (levels[0] > 0)).tolist() == (adjusted[0] <= 0.05).tolist()


def test_many_runs_at_once_are_each_as_if_alone():
    p = np.random.default_rng(0).random((50, 5)) ** 3
    chains, weights = [[0, 1], [2, 3], [4]], [0.5, 0.3, 0.2]
    together = in_chains(p, chains, weights, 0.05)
    for run in range(50):
        alone = in_chains(p[run : run + 1], chains, weights, 0.05)
        for whole, one in zip(together, alone, strict=True):
            assert whole[run] == pytest.approx(one[0])
