"""Tests, corrections, effect sizes and power on matrices, against hand computation and known tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pruning_comparison.analysis.random_effects import (
    Components,
    Estimate,
    crossed_p_values,
    detectable_by_rules,
    difference_test,
    draw_fits,
    fit_crossed,
    needed,
    power,
    smallest_permutation_p,
    standardised,
)


def test_smallest_p_of_sign_flips():
    assert [smallest_permutation_p(pairs) for pairs in (1, 3, 5)] == [1.0, 0.25, 0.0625]
    assert math.isnan(smallest_permutation_p(0))


def crossed(spread, a, b, mean=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return (
        mean
        + spread[0] * generator.standard_normal((a, 1))
        + spread[1] * generator.standard_normal((1, b))
        + spread[2] * generator.standard_normal((a, b))
    )


def test_the_test_of_no_difference_is_that_of_the_fit():
    values = crossed((1, 1, 0.3), 4, 6, mean=0.3)
    test = difference_test(fit_crossed(values))
    assert (test.p, test.name) == (fit_crossed(values).p_value(), "crossed random effects")
    assert difference_test(fit_crossed(values[:1])).p == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)
    assert difference_test(fit_crossed(np.ones((2, 2)))).name == "every pair is the same"
    assert math.isnan(difference_test(fit_crossed(np.ones((1, 1)))).p)


@pytest.mark.parametrize("shape", [(3, 5), (3, 30), (5, 5), (1, 8)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99, 0.9999])
def test_interval_and_p_agree_at_any_level(shape, confidence):
    """The p at the interval's end is what the interval leaves out; below 0.95 more than that, where the tail is heavier."""
    fit = fit_crossed(crossed((1, 1, 1), *shape, mean=0.2))
    left_out = fit.p_value(fit.mean + fit.margin(confidence))
    if confidence > 0.95:
        assert left_out == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert left_out >= (1 - confidence) * (1 - 1e-6) or left_out == 0.05


def test_what_is_not_possible_is_cut_off_and_nothing_else():
    estimate = Estimate(0.02, -0.03, 0.07, 10)
    assert estimate.within(0.0, 1.0) == Estimate(0.02, 0.0, 0.07, 10)
    assert estimate.within(-1.0, 1.0) == estimate


def test_where_nothing_varies_there_is_no_infinite_certainty():
    same = fit_crossed(np.full((2, 3), 0.1))
    assert (same.p_value(), same.p_value(0.1), same.margin()) == (2**-5, 1.0, 0.0)
    assert math.isnan(standardised(same).estimate)
    assert standardised(fit_crossed(np.zeros((2, 3)))).estimate == 0


def test_effect_size_is_the_mean_over_the_deviation_with_a_noncentral_interval():
    line = np.array([[1.0, 2.0, 4.0, 9.0]])
    size = standardised(fit_crossed(line))
    assert size.estimate == pytest.approx(4.0 / line.std(ddof=1))
    statistic = stats.ttest_1samp(line[0], 0).statistic
    for end, level in ((size.low, 0.975), (size.high, 0.025)):
        assert stats.nct.cdf(statistic, 3, end * 2) == pytest.approx(level, abs=1e-6)


def test_a_negative_effect_has_the_mirrored_interval():
    line = np.array([[1.0, 2.0, 4.0, 9.0]])
    size, mirrored = standardised(fit_crossed(line)), standardised(fit_crossed(-line))
    assert (mirrored.low, mirrored.high) == pytest.approx((-size.high, -size.low))


def test_effect_size_divides_by_all_components():
    values = crossed((1, 1, 1), 6, 20, mean=0.7)
    fit = fit_crossed(values)
    parts = fit.components
    deviation = math.sqrt(parts.iterations + parts.clusters + parts.residual)
    assert standardised(fit).estimate == pytest.approx(values.mean() / deviation)


ONE_SAMPLE = Components(iterations=0.0, clusters=1.0, residual=0.0)


def test_power_of_the_textbook():
    """A standardised effect of 0.5 needs 34 pairs for a power of 0.8 (Cohen 1988); 33 do not suffice."""
    assert power(0.5, ONE_SAMPLE, 1, 34) >= 0.8 > power(0.5, ONE_SAMPLE, 1, 33)
    assert needed(0.5, ONE_SAMPLE, 1, 10)[1] == 24
    draws = draw_fits(ONE_SAMPLE, 1, 34, count=20_000)
    assert detectable_by_rules(draws, 0.05) == pytest.approx(0.495, abs=0.01)


def test_power_agrees_with_simulation_of_crossed_data():
    parts = Components(iterations=0.2, clusters=0.5, residual=0.6)
    generator = np.random.default_rng(4)
    values = (
        0.8
        + math.sqrt(0.2) * generator.standard_normal((2000, 6, 1))
        + math.sqrt(0.5) * generator.standard_normal((2000, 1, 25))
        + math.sqrt(0.6) * generator.standard_normal((2000, 6, 25))
    )
    found = (crossed_p_values(values) <= 0.05).mean()
    assert found == pytest.approx(power(0.8, parts, 6, 25), abs=0.05)


def test_no_number_of_clusters_mends_the_spread_of_iterations():
    parts = Components(iterations=1.0, clusters=0.1, residual=0.1)
    more_iterations, more_clusters = needed(0.5, parts, 3, 30)
    assert math.isnan(more_clusters)
    total = 3 + int(more_iterations)
    assert power(0.5, parts, total, 30) >= 0.8 > power(0.5, parts, total - 1, 30)


def test_nothing_to_find_needs_no_number():
    assert all(math.isnan(count) for count in needed(0.0, ONE_SAMPLE, 1, 10))
    assert detectable_by_rules(draw_fits(ONE_SAMPLE, 1, 1), 0.05) == math.inf


def test_a_factor_that_does_not_vary_lends_its_freedom_to_the_residual():
    """With the residual alone all 5 x 2 pairs are one sample: variance 1 / 10 at 9 degrees of freedom."""
    assert Components(0.0, 0.0, 1.0).of_mean(5, 2) == pytest.approx((0.1, 9.0))
    # Where only clusters vary: their mean square at its own 3 degrees of freedom, pooled residual with 6 + 2 taken off.
    variance, df = Components(0.0, 2.0, 1.0).of_mean(3, 4)
    assert variance == pytest.approx((3 * 2 + 1) / 12)
    assert df == pytest.approx(3.0)


def test_power_far_out_at_few_degrees_of_freedom():
    """Simulated: with two degrees of freedom even an effect of 113 standard errors is not found at a strict level."""
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(200_000, 3)) + 65.0
    statistic = sample.mean(1) / (sample.std(1, ddof=1) / np.sqrt(3))
    alpha = 2 * stats.t.sf(100.0, 2)
    found = power(65.0, Components(0.0, 0.0, 1.0), 1, 3, alpha)
    assert found == pytest.approx((statistic > 100.0).mean(), abs=0.01)
    assert found < 0.9
