"""From tidy tables to one number per pair of iteration and cluster: what every estimate is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable
from pruning_comparison.analysis.random_effects import Array
from pruning_comparison.variants import DENSE

_MOST_MISSING = 0.1


Key = tuple[float, float]
"""(temperature, level); temperature is -1 where it does not apply."""


def mean_weights(levels: Array) -> Array:
    return np.full(len(levels), 1 / len(levels))


def area_weights(levels: Array) -> Array:
    """Weights of ``curve_area``."""
    return curve_area(levels, np.eye(len(levels)))


def slope_weights(levels: Array) -> Array:
    """Weights of the least-squares slope per 10 % of the heads."""
    centred = levels - levels.mean()
    return np.asarray(10 * centred / float((centred**2).sum()))


def curve_area(levels: Array, values: Array) -> Array:
    """Area under curves ``values`` [..., L] over ``levels`` [L] by trapezoids, divided by the range of levels.

    That is the mean height of the curve, so that areas of runs with other levels compare.
    """
    return np.asarray(np.trapezoid(values, levels, axis=-1) / (levels[-1] - levels[0]))


@dataclass(frozen=True)
class Sample:
    """One number per iteration and cluster [a, b], or None; ``absent``: why there is none, or that too many are missing."""

    values: Array | None
    absent: str = ""


@dataclass(frozen=True)
class Source:
    """The tables of one contrast. With ``DENSE`` as the reference, every level of the variant against its own level 0."""

    model: str
    cells: pd.DataFrame
    data: Mapping[str, MetricTable]
    variant: str
    reference: str

    def methods(self) -> list[str]:
        """Methods of which both variants were asked for."""
        names = (self.variant,) if self.reference == DENSE else (self.variant, self.reference)
        by_variant = [set(self.cells.loc[self.cells["variant"] == name, "method"]) for name in names]
        return sorted(set.intersection(*by_variant))

    def asked(self, method: str) -> pd.DataFrame:
        """The cells of both variants, failed ones too."""
        of_both = self.cells["variant"].isin((self.variant, self.reference))
        return self.cells[of_both & (self.cells["method"] == method)]

    def levels(self, method: str, least: float) -> list[float]:
        levels = sorted({float(level) for level in self.asked(method)["level"]})
        return [level for level in levels if level >= least]

    def temperatures(self, metric: str, method: str) -> list[float]:
        pairs = self.pairs(metric, method)
        return sorted({float(value) for value in pairs["temperature"].dropna()})

    def pairs(self, metric: str, method: str) -> pd.DataFrame:
        if metric not in self.data:
            return pd.DataFrame(
                columns=["method", "level", "temperature", "iteration", "cluster", "difference", "pair"]
            )
        table = self.data[metric]
        against_dense = self.reference == DENSE
        pairs = table.pairs_with_dense(self.variant) if against_dense else table.pairs(self.variant, self.reference)
        return pairs[pairs["method"] == method]

    def sample(
        self,
        metric: str,
        method: str,
        levels: Sequence[float],
        weigh: Callable[[Array], Array] = mean_weights,
        *,
        temperatures: Sequence[float] = (math.nan,),
        temperature_weights: Sequence[float] = (1.0,),
        fewest: int = 1,
    ) -> Sample:
        """The pairs' differences weighed over levels, and over temperatures by ``temperature_weights``.

        Levels at which nothing was measured are left out of the weights. Iterations that are all the same by construction
        count once; clusters that are not complete are left out. With more than a tenth of the pairs missing the sample is
        marked: what is missing is seldom missing by chance.
        """
        pairs = self.pairs(metric, method)
        pairs = pairs.assign(temperature=pairs["temperature"].fillna(-1.0))
        places = [-1.0 if math.isnan(value) else value for value in temperatures]
        found = pairs[pairs["level"].isin(levels) & pairs["temperature"].isin(places)]
        if len(levels) < fewest:
            return Sample(None, "too little data")
        counts = found.groupby("level")["temperature"].nunique()
        known = [level for level in levels if counts.get(level, 0) == len(places)]
        if len(known) < fewest:
            return Sample(None, "missing")
        clusters = set(pairs["cluster"]) if metric not in self.data else self._clusters(metric, method)
        expected = self.asked(method)["iteration"].nunique() * len(clusters) * len(levels) * len(places)
        absent = "missing" if len(found) < (1 - _MOST_MISSING) * expected else ""
        keys = [(temperature, level) for temperature in places for level in known]
        cube, identities = difference_cube(found, keys)
        weights = np.outer(np.array(temperature_weights), weigh(np.array(known))).ravel()
        values = complete_matrix(np.tensordot(weights, cube, axes=1), identities)
        return Sample(None, "missing") if values is None else Sample(values, absent)

    def _clusters(self, metric: str, method: str) -> set[Any]:
        table = self.data[metric].table
        chosen = table["variant"].isin((self.variant, self.reference)) & (table["method"] == method)
        return set(table.loc[chosen, "cluster"])


def difference_cube(pairs: pd.DataFrame, keys: Sequence[Key]) -> tuple[Array, list[str]]:
    """Differences [K, a, b], NaN where missing, and what identifies each iteration [a]."""
    places = {key: index for index, key in enumerate(keys)}
    layer = np.array([places.get(key, -1) for key in zip(pairs["temperature"], pairs["level"], strict=True)])
    row, iterations = pd.factorize(pairs["iteration"], sort=True)
    column, clusters = pd.factorize(pairs["cluster"], sort=True)
    known = (layer >= 0) & pairs["difference"].notna().to_numpy()
    shape = (len(keys), len(iterations), len(clusters))
    cell = np.ravel_multi_index((layer[known], row[known], column[known]), shape)
    count = int(np.prod(shape))
    sums = np.bincount(cell, pairs["difference"].to_numpy(dtype=np.float64)[known], minlength=count)
    counts = np.bincount(cell, minlength=count)
    cube = np.divide(sums, counts, out=np.full(count, math.nan), where=counts > 0).reshape(shape)
    names = [[""] * len(iterations) for _ in keys]
    for index, iteration, name in zip(layer, row, pairs["pair"], strict=True):
        if index >= 0 and not names[index][iteration]:
            names[index][iteration] = str(name)
    return cube, ["|".join(parts) for parts in zip(*names, strict=True)]


def complete_matrix(values: Array, identities: Sequence[str]) -> Array | None:
    """The matrix without holes: incomplete clusters go, or incomplete iterations. Iterations that are all one count once."""
    if len(set(identities)) == 1:
        values = values[:1]
    values = values[~np.isnan(values).all(1)]
    whole = values[:, ~np.isnan(values).any(0)]
    if not whole.size:
        whole = values[~np.isnan(values).any(1)]
    return whole if whole.size else None
