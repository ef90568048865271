"""From tidy tables to one number per pair of iteration and unit: what every estimate is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pruning_comparison.analysis.estimates import MetricTable
from pruning_comparison.analysis.random_effects import Array

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


def curve_slope(levels: Array, values: Array) -> Array:
    """Least-squares slope of curves ``values`` [..., L] on ``levels`` [L], per 10 % of the heads."""
    return np.asarray(values @ slope_weights(levels))


@dataclass(frozen=True)
class Sample:
    """One number per iteration and unit [a, b], or None; ``absent`` says why there is none, or that too many are missing."""

    values: Array | None
    absent: str = ""


@dataclass(frozen=True)
class Source:
    """The tables of one contrast."""

    model: str
    cells: pd.DataFrame
    data: Mapping[str, MetricTable]
    variant: str
    reference: str
    seed: int
    _pairs: dict[str, pd.DataFrame] = field(default_factory=dict)

    def methods(self) -> list[str]:
        """Methods of which both variants were asked for."""
        by_variant = [
            set(self.cells.loc[self.cells["variant"] == name, "method"]) for name in (self.variant, self.reference)
        ]
        return sorted(by_variant[0] & by_variant[1])

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
        if metric not in self._pairs:
            if metric not in self.data:
                columns = ["method", "level", "temperature", "iteration", "unit", "difference", "pair"]
                self._pairs[metric] = pd.DataFrame(columns=columns)
            else:
                self._pairs[metric] = self.data[metric].pairs(self.variant, self.reference)
        pairs = self._pairs[metric]
        return pairs[pairs["method"] == method]

    def sample(
        self,
        metric: str,
        method: str,
        levels: Sequence[float],
        weigh: Callable[[Array], Array] = mean_weights,
        *,
        temperatures: Sequence[float] = (math.nan,),
        heat: Sequence[float] = (1.0,),
        fewest: int = 1,
    ) -> Sample:
        """The pairs' differences weighed over levels, and over temperatures by ``heat``.

        Levels at which nothing was measured are left out of the weights. Iterations that are the same by construction
        count once; units that are not complete are left out. With more than a tenth of the pairs missing the sample is
        marked: what is missing is seldom missing by chance.
        """
        pairs = self.pairs(metric, method)
        pairs = pairs.assign(temperature=pairs["temperature"].fillna(-1.0))
        heats = [-1.0 if math.isnan(value) else value for value in temperatures]
        found = pairs[pairs["level"].isin(levels) & pairs["temperature"].isin(heats)]
        if len(levels) < fewest:
            return Sample(None, "too little data")
        counts = found.groupby("level")["temperature"].nunique()
        known = [level for level in levels if counts.get(level, 0) == len(heats)]
        if len(known) < fewest:
            return Sample(None, "missing")
        units = set(pairs["unit"]) if metric not in self.data else self._units(metric, method)
        expected = self.asked(method)["iteration"].nunique() * len(units) * len(levels) * len(heats)
        absent = "missing" if len(found) < (1 - _MOST_MISSING) * expected else ""
        keys = [(temperature, level) for temperature in heats for level in known]
        cube, identities = difference_cube(found, keys)
        weights = np.outer(np.array(heat), weigh(np.array(known))).ravel()
        values = complete_matrix(np.tensordot(weights, cube, axes=1), identities)
        return Sample(None, "missing") if values is None else Sample(values, absent)

    def _units(self, metric: str, method: str) -> set[Any]:
        table = self.data[metric].table
        chosen = table["variant"].isin((self.variant, self.reference)) & (table["method"] == method)
        return set(table.loc[chosen, "unit"])


def difference_cube(pairs: pd.DataFrame, keys: Sequence[Key]) -> tuple[Array, list[str]]:
    """Differences [K, a, b], NaN where missing, and what identifies each iteration [a]."""
    iterations, units = sorted(set(pairs["iteration"])), sorted(set(pairs["unit"]))
    layers, names = [], []
    for temperature, level in keys:
        layer = pairs[(pairs["temperature"] == temperature) & (pairs["level"] == level)]
        layers.append(
            layer.pivot_table(index="iteration", columns="unit", values="difference", aggfunc="mean")
            .reindex(index=iterations, columns=units)
            .to_numpy(dtype=np.float64)
        )
        names.append(layer.groupby("iteration")["pair"].first().reindex(iterations).fillna("").tolist())
    return np.stack(layers), ["|".join(parts) for parts in zip(*names, strict=True)]


def complete_matrix(values: Array, identities: Sequence[str]) -> Array | None:
    """The matrix without repeated iterations and without holes: incomplete units go, or incomplete iterations."""
    first = [identities.index(name) == row for row, name in enumerate(identities)]
    values = values[first]
    values = values[~np.isnan(values).all(1)]
    whole = values[:, ~np.isnan(values).any(0)]
    if not whole.size:
        whole = values[~np.isnan(values).any(1)]
    return whole if whole.size else None
