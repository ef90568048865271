"""Estimates from crossed observations: a matrix [iterations, clusters], both factors random. Pure functions on arrays.

Clusters are documents or prompts: the same ones come back in every iteration. Dimension letters: a iterations, b clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

_POINTS = 256
_MOST = 10_000


_LARGEST_EXPONENT = 700.0


def ratio_of(log_ratio: float) -> float:
    """The ratio whose logarithm is given, at most e^700: intervals from few observations can reach beyond any float."""
    return math.exp(min(log_ratio, _LARGEST_EXPONENT))


def relative_change(log_ratio: float) -> float:
    """The ratio less one, as exact near 0 as it can be, and cut like ``ratio_of``."""
    return math.expm1(min(log_ratio, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (NaN where there is one observation) and the number of observations."""

    estimate: float
    ci_low: float
    ci_high: float
    n: int

    def within(self, low: float, high: float) -> Estimate:
        """The interval without what is not possible, which covers the truth exactly as often: the truth is possible."""
        return Estimate(self.estimate, max(self.ci_low, low), min(self.ci_high, high), self.n)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate on another, increasing scale."""
        return Estimate(function(self.estimate), function(self.ci_low), function(self.ci_high), self.n)


@dataclass(frozen=True)
class Components:
    """Variances of one observation: between iterations, between clusters, and what is left."""

    iterations: float
    clusters: float
    residual: float

    @property
    def total(self) -> float:
        return self.iterations + self.clusters + self.residual

    def of_mean(self, iterations: int, clusters: int) -> tuple[float, float]:
        """Variance of the mean of so many iterations and clusters, and its degrees of freedom after Satterthwaite.

        With one iteration (or one cluster) nothing is known about the spread between iterations (clusters): the variance is
        then that of the mean over the clusters (iterations) of this one.
        """
        a, b = iterations, clusters
        if min(a, b) == 1:
            own = self.iterations if b == 1 else self.clusters
            return (own + self.residual) / (a * b), float(max(a * b - 1, 0))
        expected = np.array([b * self.iterations + self.residual, a * self.clusters + self.residual, self.residual])
        variance, df = _satterthwaite(expected[:, None], a, b)
        return float(variance[0]), float(df[0])


@dataclass(frozen=True)
class Fit:
    """A mean over iterations and clusters, the variance of that mean, and its degrees of freedom; Student's t behind it."""

    mean: float
    variance: float
    df: float
    components: Components
    iterations: int
    clusters: int

    @property
    def n(self) -> int:
        return self.iterations * self.clusters

    def p_value(self, boundary: float = 0.0) -> float:
        """Two-sided p of "the mean is ``boundary``"; NaN for one observation.

        Where nothing varies it is 1 at the boundary, and elsewhere the smallest p that sign flips could attain.
        """
        if self.n == 1:
            return math.nan
        distance = abs(self.mean - boundary)
        if self.variance == 0:
            return 1.0 if distance == 0 else smallest_permutation_p(self.n)
        return self._p_at(distance)

    def _p_at(self, distance: float) -> float:
        return float(2 * stats.t.sf(distance / math.sqrt(self.variance), self.df))

    def margin(self, confidence: float = 0.95) -> float:
        """Half the width of the interval; NaN for one observation."""
        if self.n == 1:
            return math.nan
        return float(stats.t.ppf(0.5 + confidence / 2, self.df)) * math.sqrt(self.variance)

    def estimate(self, confidence: float = 0.95) -> Estimate:
        """The mean with its interval."""
        margin = self.margin(confidence)
        return Estimate(self.mean, self.mean - margin, self.mean + margin, self.n)


@dataclass(frozen=True)
class CrossedFit(Fit):
    """The random-effects model of a matrix [a, b].

    ``mean_squares`` are the mean squares of iterations, clusters and residual (NaN where a factor has one level).
    """

    mean_squares: tuple[float, float, float]

    def _p_at(self, distance: float) -> float:
        mean_squares = np.array(self.mean_squares)[:, None]
        return float(p_values_of(np.array([distance]), mean_squares, self.iterations, self.clusters)[0])

    def margin(self, confidence: float = 0.95) -> float:
        student = super().margin(confidence)
        if self.variance == 0 or min(self.iterations, self.clusters) == 1:
            return student
        if confidence <= 0.95 and not fiducial_share(self.iterations, self.clusters):
            return student
        mean_squares, shape = np.array(self.mean_squares)[:, None], (self.iterations, self.clusters)
        p_values = p_values_of if confidence > 0.95 else _mixture_p

        def excess(distance: float) -> float:
            return float(p_values(np.array([distance]), mean_squares, *shape)[0]) - (1 - confidence)

        low, high = student, student
        while excess(low) < 0:
            low /= 2
        while excess(high) > 0:
            high *= 2
        return low if low == high else float(optimize.brentq(excess, low, high, xtol=1e-9 * student))


@dataclass(frozen=True)
class PValue:
    """A p-value and the test's name."""

    p: float
    name: str


@dataclass(frozen=True)
class EffectSize:
    """A standardised mean with its 95 % interval."""

    estimate: float
    low: float
    high: float


PLANNING = {
    "heads by a score": Components(iterations=0.0002, clusters=0.01, residual=0.001),
    "random heads, small effect": Components(iterations=0.0011, clusters=0.0008, residual=0.0002),
    "random heads, large effect": Components(iterations=0.0150, clusters=0.0124, residual=0.0031),
}
"""Components of agency against baseline in log perplexity on the bundled model, to plan with.

The last one was measured (3 iterations x 30 documents, mean over 40 and 60 %, where random pruning's effect is a half); the
others are read off the intervals of the default comparison in docs/results.md (entropy at 40 %; random at 20 %, where the
effect is 15 %). The spread between iterations of random pruning grows with the effect itself.
"""


# The model


def fit_crossed(values: Array) -> CrossedFit:
    """Two-way random-effects analysis of variance of a matrix [a, b] with one observation per cell.

    With mean squares A (iterations), B (clusters) and E (residual), Var(mean) = (A + B - E) / (a b); degrees of freedom
    after Satterthwaite (1946). A factor whose mean square is below E is pooled with E. With one iteration or one cluster
    this is Student's estimate over the other factor. ValueError if a value is not finite.
    """
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values must be a finite, non-empty [iterations, clusters] matrix, got shape {values.shape}")
    a, b = values.shape
    mean = float(values.mean())
    constant = float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())
    if values.size == 1 or constant:
        return CrossedFit(
            float(values.flat[0]), 0.0, float(max(a * b - 1, 1)), Components(0.0, 0.0, 0.0), a, b, (0.0, 0.0, 0.0)
        )
    mean_squares = mean_squares_of(values[None])[:, 0]
    variance, df = (float(part[0]) for part in _satterthwaite(mean_squares[:, None], a, b))
    row, column, residual = (float(square) for square in mean_squares)
    if b == 1:
        parts = Components(row, 0.0, 0.0)
    elif a == 1:
        parts = Components(0.0, column, 0.0)
    else:
        parts = Components(max(row - residual, 0.0) / b, max(column - residual, 0.0) / a, residual)
    return CrossedFit(mean, variance, df, parts, a, b, (row, column, residual))


def mean_squares_of(values: Array) -> Array:
    """Mean squares [3, N] of iterations, clusters and residual of N matrices [N, a, b]; NaN for a factor with one level."""
    _, a, b = values.shape
    mean, by_row, by_column = values.mean((1, 2)), values.mean(2), values.mean(1)
    residual = values - by_row[:, :, None] - by_column[:, None, :] + mean[:, None, None]
    nan = np.full(len(values), math.nan)
    return np.stack(
        [
            b * ((by_row - mean[:, None]) ** 2).sum(1) / (a - 1) if a > 1 else nan,
            a * ((by_column - mean[:, None]) ** 2).sum(1) / (b - 1) if b > 1 else nan,
            (residual**2).sum((1, 2)) / ((a - 1) * (b - 1)) if min(a, b) > 1 else nan,
        ]
    )


def crossed_p_values(values: Array, boundary: float | Array = 0.0) -> Array:
    """Two-sided p [N] of "the mean is ``boundary``" for N matrices [N, a, b], without sign flips."""
    distance = np.abs(values.mean((1, 2)) - boundary)
    return p_values_of(distance, mean_squares_of(values), *values.shape[1:])


def p_values_of(distance: Array, mean_squares: Array, a: int, b: int) -> Array:
    """Two-sided p [N] at a distance [N] from the mean: a mixture of Satterthwaite's t and the fiducial distribution.

    Below 0.05 it is the fiducial p where that is larger, up to 0.05: the 95 % interval is the mixture's.
    """
    mixed = _mixture_p(distance, mean_squares, a, b)
    if min(a, b) == 1:
        return mixed
    with np.errstate(divide="ignore", invalid="ignore"):
        fiducial = np.where(np.nanmax(mean_squares, 0) > 0, _fiducial_p(distance, mean_squares, a, b), 0.0)
    # Corrected levels are far below 0.05, where Satterthwaite's t is too sure of itself and the fiducial one is not.
    return np.maximum(mixed, np.minimum(fiducial, 0.05))


def _mixture_p(distance: Array, mean_squares: Array, a: int, b: int) -> Array:
    """Two-sided p [N] of the mixture alone, whose 95 % interval is shown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance, df = _satterthwaite(mean_squares, a, b)
        mixed = 2 * stats.t.sf(distance / np.sqrt(variance), df)
        share = 0.0 if min(a, b) == 1 else fiducial_share(a, b)
        if share:
            mixed = (1 - share) * mixed + share * _fiducial_p(distance, mean_squares, a, b)
    return np.where(variance > 0, mixed, np.where(distance > 0, 0.0, 1.0))


def _fiducial_p(distance: Array, mean_squares: Array, a: int, b: int) -> Array:
    """Two-sided p [N] of the mean's fiducial distribution (Fisher 1935), its variance spread as the mean squares are."""
    pivots = zip(mean_squares, _pivots(a, b), strict=True)
    by_row, by_column, residual = (square[:, None] * weight for square, weight in pivots)
    spread = np.maximum(by_row + by_column - residual, 1e-3 * mean_squares[2][:, None]) / (a * b)
    return np.asarray((2 * special.ndtr(-distance[:, None] / np.sqrt(spread))).mean(1))


def _satterthwaite(mean_squares: Array, a: int, b: int) -> tuple[Array, Array]:
    """Variance of the mean [N] and its degrees of freedom [N] from mean squares [3, N]."""
    row, column, residual = mean_squares
    if min(a, b) == 1:
        own = row if b == 1 else column
        return own / (a * b), np.full_like(own, a * b - 1.0)
    of_row, of_column, of_residual = a - 1.0, b - 1.0, (a - 1.0) * (b - 1.0)
    keep_row, keep_column = row > residual, column > residual
    pooled_freedom = of_residual + np.where(keep_row, 0, of_row) + np.where(keep_column, 0, of_column)
    pooled = (
        residual * of_residual + np.where(keep_row, 0, row * of_row) + np.where(keep_column, 0, column * of_column)
    ) / pooled_freedom
    # A kept factor is above the residual, and pooling only lowers that: no component is negative.
    total = np.where(keep_row, row - pooled, 0) + np.where(keep_column, column - pooled, 0) + pooled
    spread = (
        np.where(keep_row, row, 0) ** 2 / of_row
        + np.where(keep_column, column, 0) ** 2 / of_column
        + np.where(keep_row ^ keep_column, 0, pooled) ** 2 / pooled_freedom
    )
    return total / (a * b), np.divide(total**2, spread, out=np.ones_like(total), where=spread > 0)


def fiducial_share(a: int, b: int) -> float:
    """Weight of the fiducial distribution in the confidence distribution: 0 where both factors have like df, up to 0.7.

    Satterthwaite's interval is too short where a factor with few levels meets one with many, and the fiducial one too
    long where both have few. The form was chosen by simulation; docs/decisions/0007-intervals.md has the figures.
    """
    few, many = sorted((a - 1, b - 1))
    return 0.7 * max(0.0, 1 - 2 * few / many) if many else 0.0


@lru_cache(maxsize=256)
def _pivots(a: int, b: int) -> tuple[Array, Array, Array]:
    """Freedom over chi-squared of the three mean squares, each [_POINTS], on a fixed low-discrepancy set of points.

    The points are Roberts' R3 sequence, each coordinate replaced by its rank, so that every margin is exact.
    """
    ratio = 1.2207440846057596  # the root of x^4 = x + 1
    order = np.arange(1, _POINTS + 1)
    parts = []
    for exponent, df in zip((1, 2, 3), (a - 1, b - 1, (a - 1) * (b - 1)), strict=True):
        ranks = np.argsort(np.argsort((order / ratio**exponent) % 1))
        parts.append(df / stats.chi2.ppf((ranks + 0.5) / _POINTS, df))
    return parts[0], parts[1], parts[2]


# Tests


def smallest_permutation_p(pairs: int) -> float:
    """The smallest two-sided p that sign flips of so many independent pairs can attain: 2^(1 - pairs)."""
    return 2.0 ** (1 - pairs) if pairs >= 1 else math.nan


def difference_test(fit: Fit) -> PValue:
    """The test of "no difference" that goes with a fit, and its name."""
    if fit.n < 2:
        return PValue(math.nan, "none: one observation")
    if fit.variance == 0:
        return PValue(fit.p_value(), "every pair is the same")
    single = min(fit.iterations, fit.clusters) == 1
    return PValue(fit.p_value(), "Student's t" if single else "crossed random effects")


def standardised(fit: Fit, confidence: float = 0.95) -> EffectSize:
    """The mean over the standard deviation of one pair (all components), with an interval from the noncentral t.

    Westfall, Kenny and Judd (2014) standardise by all components, so that the size does not depend on the design. The
    interval is that of the noncentrality at Satterthwaite's degrees of freedom. Where nothing varies it is 0 if the mean
    is 0, else NaN.
    """
    if fit.n == 1 or fit.variance == 0:
        nothing = 0.0 if fit.n > 1 and fit.mean == 0 else math.nan
        return EffectSize(nothing, nothing, nothing)
    error, deviation = math.sqrt(fit.variance), math.sqrt(fit.components.total)
    statistic = fit.mean / error
    tail = (1 - confidence) / 2
    low = _noncentrality(statistic, fit.df, 1 - tail)
    high = _noncentrality(statistic, fit.df, tail)
    scale = error / deviation
    return EffectSize(fit.mean / deviation, low * scale, high * scale)


def _noncentrality(statistic: float, df: float, level: float) -> float:
    """The noncentrality at which P(T <= statistic) = level."""
    if statistic < 0:
        return -_noncentrality(-statistic, df, 1 - level)
    # Johnson and Welch's (1940) approximation, good enough to start from, and to stay with for very large statistics.
    normal = float(stats.norm.ppf(level))
    start = statistic - normal * math.sqrt(1 + statistic**2 / (2 * df))
    if statistic > 30:
        return start

    def excess(noncentrality: float) -> float:
        return float(special.nctdtr(df, noncentrality, statistic)) - level

    low, high = min(start, 0.0) - 1.0, start + 1.0
    for _ in range(60):
        if excess(low) >= 0:
            break
        low -= 1.0
    for _ in range(200):
        if excess(high) <= 0:
            break
        high += 1.0
    if not excess(low) >= 0 >= excess(high):
        return start
    return float(optimize.brentq(excess, low, high, xtol=1e-8))


# Power


def power(effect: float, components: Components, iterations: int, clusters: int, alpha: float = 0.05) -> float:
    """Probability that the two-sided test at ``alpha`` rejects on the right side when the mean is ``effect`` away."""
    if iterations * clusters < 2:
        return 0.0
    variance, df = components.of_mean(iterations, clusters)
    if variance == 0:
        return float(effect != 0)
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    shifted = abs(effect) / math.sqrt(variance)
    if shifted > 30 + critical:
        # So far out only the estimated spread matters, and the noncentral t is not reliable.
        return float(stats.chi2.cdf(df * (shifted / critical) ** 2, df))
    return 1.0 - float(special.nctdtr(min(df, 1e6), shifted, critical))


@dataclass(frozen=True)
class Draws:
    """Means [N] about a truth of 0, and mean squares [3, N], of N data sets of the same shape."""

    means: Array
    mean_squares: Array
    iterations: int
    clusters: int

    def p_values(self, distance: float) -> Array:
        """Two-sided p [N] of a boundary that lies ``distance`` below the truth; 1 where the mean is on its other side."""
        beyond = self.means + distance
        p = p_values_of(np.abs(beyond), self.mean_squares, self.iterations, self.clusters)
        return np.where(beyond > 0, p, 1.0)


def draw_fits(components: Components, iterations: int, clusters: int, count: int = 1_000, seed: int = 0) -> Draws:
    """What is estimated from ``count`` Gaussian data sets: means and mean squares, which are independent."""
    a, b = iterations, clusters
    generator = np.random.default_rng(seed)
    expected = (
        b * components.iterations + components.residual,
        a * components.clusters + components.residual,
        components.residual,
    )
    freedom = (a - 1, b - 1, (a - 1) * (b - 1))
    squares = [
        value * generator.chisquare(df, count) / df if df else np.full(count, math.nan)
        for value, df in zip(expected, freedom, strict=True)
    ]
    error = math.sqrt(components.of_mean(a, b)[0])
    return Draws(error * generator.standard_normal(count), np.stack(squares), a, b)


def detectable_by_rules(draws: Draws, level: float, wanted: float = 0.8) -> float:
    """The smallest distance from a boundary that is found with power ``wanted`` by the interval at 1 - ``level``.

    The intervals are those of the report, fiducial tails included; inf where no distance is enough.
    """

    def found(distance: float) -> float:
        return float((draws.p_values(distance) <= level).mean()) - wanted

    if draws.iterations * draws.clusters < 2:
        return math.inf
    scale = float(np.sqrt(np.mean(draws.means**2)))
    if scale == 0:
        return 0.0
    high = scale
    while found(high) < 0:
        high *= 2
        if high > 1e6 * scale:
            return math.inf
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= 0 else (middle, high)
    return high


def needed(
    effect: float, components: Components, iterations: int, clusters: int, *, alpha: float = 0.05, wanted: float = 0.8
) -> tuple[float, float]:
    """How many more iterations (clusters as they are), and how many more clusters, give power ``wanted``.

    NaN where none up to 10,000 would do: the other factor's variance stays.
    """
    if not math.isfinite(effect) or effect == 0:
        return math.nan, math.nan
    more = _first(lambda count: power(effect, components, count, clusters, alpha) >= wanted, iterations + 1)
    other = _first(lambda count: power(effect, components, iterations, count, alpha) >= wanted, clusters + 1)
    return more - iterations, other - clusters


def _first(holds: Callable[[int], bool], start: int) -> float:
    """The smallest count from ``start`` to 10,000 for which a rising condition holds; NaN if none."""
    if holds(start):
        return float(start)
    low, high = start, start
    while not holds(high):
        if high >= _MOST:
            return math.nan
        low, high = high, min(2 * high, _MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return float(high)
