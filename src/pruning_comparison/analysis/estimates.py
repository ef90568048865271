"""From measurements to estimates with intervals. Pure functions on tidy tables.

Iterations and documents (or prompts) are crossed, not nested: the same documents come back in every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from pruning_comparison.analysis.random_effects import (
    Array,
    CrossedFit,
    Estimate,
    fit_crossed,
    ratio_of,
    relative_change,
)
from pruning_comparison.metrics import METRICS, RAW, Metric, metric_named, of_kind
from pruning_comparison.variants import DENSE

SUMMARY_COLUMNS = (
    "model", "variant", "method", "level", "temperature", "metric", "estimate", "ci_low", "ci_high", "n", "unit",
)  # fmt: skip
CONTRAST_COLUMNS = (
    "model", "method", "level", "temperature", "metric", "contrast", "estimate", "ci_low", "ci_high", "n", "unit", "better",
)  # fmt: skip
MISSING_COLUMNS = ("variant", "method", "level", "metric", "reason", "count")
_CELL = ["variant", "method", "level"]


def summarize(model: str, tables: Mapping[str, MetricTable]) -> pd.DataFrame:
    """One row per estimate, columns ``SUMMARY_COLUMNS``; intervals over iterations and documents, or prompts."""
    rows = []
    for data in tables.values():
        metric = METRICS[data.metric]
        for key, estimate in data.estimates():
            variant, method, level, temperature = key
            place = [model, variant, method, level, temperature, metric.name]
            rows.append([*place, estimate.estimate, estimate.ci_low, estimate.ci_high, estimate.n, metric.unit])
    rows.extend(_in_proportion(model, rows))
    table = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    return table.sort_values(["method", "metric", "temperature", "level", "variant"], ignore_index=True)


def contrast(
    model: str, tables: Mapping[str, MetricTable], variant: str = "agency", reference: str = "baseline"
) -> pd.DataFrame:
    """Paired differences of two variants, columns ``CONTRAST_COLUMNS``.

    Pairs are of the same iteration, document or prompt, level and temperature. Positive metrics are compared by the mean log
    ratio, given as per cent change; the others by the mean difference in their own unit.
    """
    rows = []
    for data in tables.values():
        metric = METRICS[data.metric]
        if not metric.compared:
            continue
        for (method, level, temperature), estimate in data.differences(variant, reference):
            relative = data.log_scale
            low, high = metric.bounds
            shown = (
                estimate.map(lambda value: 100 * relative_change(value))
                if relative
                else estimate.within(low - high, high - low)
            )
            rows.append(
                [
                    model, method, level, temperature, metric.name, f"{variant} vs {reference}", shown.estimate,
                    shown.ci_low, shown.ci_high, shown.n, "%" if relative else metric.unit, metric.direction,
                ]
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(CONTRAST_COLUMNS))
    return table.sort_values(["method", "metric", "temperature", "level"], ignore_index=True)


def missing_figures(measurements: pd.DataFrame) -> pd.DataFrame:
    """What could not be measured of a variant, columns ``MISSING_COLUMNS``."""
    absent = measurements[measurements["value"].isna() & (measurements["variant"] != DENSE)]
    groups = absent.groupby(list(MISSING_COLUMNS[:-1]), dropna=False, as_index=False).size()
    return groups.rename(columns={"size": "count"})


@dataclass(frozen=True)
class MetricTable:
    """One metric in tidy form: ``variant, method, level, temperature, iteration, cluster, x, model_id`` and a scale.

    ``x`` is the logarithm where ``log_scale``. ``model_id`` is equal for observations that are the same by construction
    (same weights, no new randomness); where those of all iterations are, they count once. ``dense`` has the same columns,
    for the unpruned model as it was measured beside the variants at each level; None where it was not.
    """

    metric: str
    table: pd.DataFrame
    log_scale: bool
    weights: str | None = None
    dense: pd.DataFrame | None = None
    _pairs: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    def estimates(self) -> list[tuple[tuple[str, str, float, float], Estimate]]:
        result: list[tuple[Any, Estimate]] = []
        for key, group in self.table.groupby([*_CELL, "temperature"], dropna=False, sort=True):
            estimate = _of_matrix(group, "x", "model_id")
            if estimate is None:
                continue
            if self.weights is not None:
                centre = float(np.average(group["x"], weights=group[self.weights]))
                shift = centre - estimate.estimate
                estimate = estimate.map(lambda value, shift=shift: value + shift)  # type: ignore[misc]
            shown = estimate.map(ratio_of) if self.log_scale else estimate
            result.append((key, shown.within(*METRICS[self.metric].bounds)))
        return result

    def pairs(self, variant: str, reference: str) -> pd.DataFrame:
        """Both variants on the same ``method, level, temperature, iteration, cluster``: ``difference`` and ``pair``.

        Repeats within an iteration are averaged. ``pair`` is equal for pairs that are the same by construction.
        What is left of equal numbers by rounding is no difference. Made once for each two variants, since contrasts and
        answers ask for the same ones.
        """
        if (variant, reference) not in self._pairs:
            keys = ["method", "level", "temperature", "iteration", "cluster"]
            means = self._means()
            arms = [means[means["variant"] == name] for name in (variant, reference)]
            self._pairs[variant, reference] = _paired(arms[0], arms[1], keys)
        return self._pairs[variant, reference]

    def pairs_with_dense(self, variant: str) -> pd.DataFrame:
        """Every level above 0 of a variant and the unpruned model, on the same method, temperature, iteration and cluster.

        The unpruned model is that which took part in the same level's turns, or the variant's own level 0 where none did.
        """
        if (variant, DENSE) not in self._pairs:
            means = self._means()
            means = means[means["variant"] == variant]
            keys = ["method", "temperature", "iteration", "cluster"]
            if self.dense is None:
                dense = means.loc[means["level"] == 0, [*keys, "model_id", "x"]]
            else:
                keys = ["level", *keys]
                dense = self._means(self.dense)[[*keys, "model_id", "x"]]
            self._pairs[variant, DENSE] = _paired(means[means["level"] > 0], dense, keys)
        return self._pairs[variant, DENSE]

    def _means(self, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """Repeats within an iteration averaged, of the variants or of another table."""
        keys = ["variant", "method", "level", "temperature", "iteration", "cluster", "model_id"]
        return (self.table if table is None else table).groupby(keys, dropna=False)["x"].mean().reset_index()

    def differences(self, variant: str, reference: str) -> list[tuple[tuple[str, float, float], Estimate]]:
        result: list[tuple[Any, Estimate]] = []
        pairs = self.pairs(variant, reference)
        for key, group in pairs.groupby(["method", "level", "temperature"], dropna=False, sort=True):
            estimate = _of_matrix(group, "difference", "pair")
            if estimate is not None:
                result.append((key, estimate))
        return result


def _paired(of_variant: pd.DataFrame, of_reference: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    both = of_variant.merge(of_reference, on=keys, suffixes=("", "_reference"))
    difference = both["x"] - both["x_reference"]
    rounding = 1e-12 * (both["x"].abs() + both["x_reference"].abs())
    result: pd.DataFrame = both.assign(
        difference=difference.where(difference.abs() > rounding, 0.0),
        pair=both["model_id"] + "|" + both["model_id_reference"],
    )
    return result


def _of_matrix(group: pd.DataFrame, column: str, identity: str) -> Estimate | None:
    """Interval of one group, see ``fit_of``."""
    fit = fit_of(group, column, identity)
    return None if fit is None else fit.estimate()


def fit_of(group: pd.DataFrame, column: str, identity: str) -> CrossedFit | None:
    """Fit of one group; iterations that are all the same count once, incomplete clusters are left out.

    Where some of them differ, all are draws of the same chance, and equal ones are as informative as others.
    """
    if group[identity].nunique() == 1:
        group = group[group["iteration"] == group["iteration"].min()]
    values = _crossed(group, column)
    complete = values[:, ~np.isnan(values).any(0)]
    if not complete.size:
        complete = values[~np.isnan(values).any(1)]
    # One row after the other in memory: another order of summing changes last digits, and so the results on record.
    return fit_crossed(np.ascontiguousarray(complete)) if complete.size else None


def _crossed(rows: pd.DataFrame, column: str) -> Array:
    """Means of a column by iteration and cluster [a, b], NaN where there is no row.

    What ``pivot_table`` gives; a report asks for hundreds of them, and pandas takes ten times as long.
    """
    rows = rows[rows["cluster"].notna() & rows[column].notna()]
    row, iterations = pd.factorize(rows["iteration"], sort=True)
    place, clusters = pd.factorize(rows["cluster"], sort=True)
    shape = (len(iterations), len(clusters))
    cell = row * shape[1] + place
    sums = np.bincount(cell, rows[column].to_numpy(dtype=np.float64), minlength=shape[0] * shape[1])
    counts = np.bincount(cell, minlength=shape[0] * shape[1])
    means: Array = np.divide(sums, counts, out=np.full(len(sums), math.nan), where=counts > 0)
    return means.reshape(shape)


def observations(cells: pd.DataFrame, measurements: pd.DataFrame) -> dict[str, MetricTable]:
    """Every metric that the measurements hold, by its name. A report makes them once and hands them on."""
    known = _known(cells, measurements)
    losses = _document_losses(known)
    result = [_loss_per(metric, losses) for metric in of_kind("loss", "divergence") if metric.compared]
    for metric in of_kind("text"):
        rows = known[known["metric"] == metric.name].assign(cluster=lambda t: t["prompt"])
        # New draws make new texts from the same model; only greedy decoding repeats itself.
        drawn = np.where(rows["temperature"] > 0, "@" + rows["iteration"].astype(str), "")
        rows = rows.assign(model_id=rows["fingerprint"] + drawn)
        result.append(_scaled(metric, rows))
        result.extend(_distances(other, rows) for other in of_kind("distance") if other.distance_of == metric.name)
    result += [_answered(metric, known) for metric in of_kind("task")]
    beside = measurements[(measurements["variant"] == DENSE) & measurements["value"].notna()]
    for metric in of_kind("timing", "memory", "size", "cost"):
        of_variants, of_dense = (
            table[table["metric"] == metric.name].assign(
                cluster=lambda t: t["prompt"].fillna(0), model_id=lambda t: "@" + t["iteration"].astype(str)
            )
            for table in (known, beside)
        )
        data = _scaled(metric, of_variants)
        result.append(replace(data, dense=_scaled(metric, of_dense).table if len(of_dense) else None))
    return {data.metric: data for data in [*result, *_shown_alone(losses)] if len(data.table)}


def _known(cells: pd.DataFrame, measurements: pd.DataFrame) -> pd.DataFrame:
    """Measurements that have a value, of cells that are done, with the cell's fingerprint."""
    done = cells.loc[cells["status"] == "done", ["variant", "method", "iteration", "level", "fingerprint"]]
    return measurements.dropna(subset=["value"]).merge(done, on=["variant", "method", "iteration", "level"])


def _scaled(metric: Metric, rows: pd.DataFrame) -> MetricTable:
    return MetricTable(metric.name, rows.assign(x=_on_scale(metric, rows["value"])), metric.scale == "log")


def _answered(metric: Metric, known: pd.DataFrame) -> MetricTable:
    """Scores of questions, each its own cluster: ``task`` and its number there. Equal weights give equal answers."""
    rows = known[known["metric"] == metric.name]
    number = rows["prompt"].fillna(-1).astype(int).astype(str)
    return _scaled(
        metric,
        rows.assign(
            task=rows["document"], cluster=rows["document"].astype(str) + " " + number, model_id=rows["fingerprint"]
        ),
    )


def _on_scale(metric: Metric, values: pd.Series[Any]) -> pd.Series[Any]:
    return pd.Series(np.log(values)) if metric.scale == "log" else values


def _loss_per(metric: Metric, losses: pd.DataFrame) -> MetricTable:
    """Loss or divergence per token, byte or word of every document, weighted by how many it has.

    Older runs count no words, and none of their divergence is known.
    """
    table = losses[(losses[metric.over] > 0) & losses[metric.summed].notna()]
    per = metric.function()(table[metric.summed], table[metric.over])
    return MetricTable(metric.name, table.assign(x=per), metric.scale == "log", metric.over)


def _shown_alone(losses: pd.DataFrame) -> list[MetricTable]:
    """What is for the summary alone, as no contrast is made of it."""
    return [
        *(_ratio_to_dense(metric, losses) for metric in of_kind("ratio")),
        *(_loss_per(metric, losses) for metric in of_kind("loss") if not metric.compared),
    ]


def _ratio_to_dense(metric: Metric, losses: pd.DataFrame) -> MetricTable:
    """A metric of losses over the same variant's at level 0, paired by document."""
    base = metric_named(metric.ratio_of)
    keys = ["variant", "method", "iteration", "cluster"]
    table = _loss_per(base, losses).table
    dense = table.loc[table["level"] == 0, [*keys, "x"]]
    both = table[table["level"] > 0].merge(dense, on=keys, suffixes=("", "_dense"))
    return MetricTable(metric.name, both.assign(x=both["x"] - both["x_dense"]), metric.scale == "log", base.over)


def _document_losses(known: pd.DataFrame) -> pd.DataFrame:
    """Loss, tokens, bytes, words and divergence of every document that a cell was evaluated on."""
    windows = {
        name: known[known["metric"] == name].groupby([*_CELL, "iteration", "document", "fingerprint"])["value"]
        for name in RAW
    }
    table = pd.concat([group.sum().rename(name) for name, group in windows.items()], axis=1)
    # A document of which a window has no finite loss is left out whole: the sum of the others would flatter the model.
    counts = {name: group.size().reindex(table.index) for name, group in windows.items()}
    whole = counts["window_nats"] == counts["window_tokens"]
    table["window_kl_nats"] = table["window_kl_nats"].where(counts["window_kl_nats"] == counts["window_tokens"])
    table = table[whole].reset_index().rename(columns={"document": "cluster"})
    return table.assign(temperature=np.nan, model_id=table["fingerprint"])


def _distances(metric: Metric, rows: pd.DataFrame) -> MetricTable:
    """Distance from the dense model's value on the same prompt and draws; of logarithms where the metric is positive."""
    keys = ["variant", "method", "iteration", "temperature", "cluster"]
    scaled = rows.assign(y=_on_scale(metric_named(metric.distance_of), rows["value"]))
    dense = scaled[scaled["level"] == 0].drop_duplicates(keys)[[*keys, "y"]]
    both = scaled.merge(dense, on=keys, suffixes=("", "_dense"))
    return MetricTable(metric.name, both.assign(x=(both["y"] - both["y_dense"]).abs()), False)


def _in_proportion(model: str, rows: list[list[object]]) -> list[list[object]]:
    """What pruning would bring if time went by what is left: the dense speed by bytes, the dense latency by FLOPs.

    Bytes are those read per decoding step (parameters and cache), FLOPs those of reading the prompts. Neither is a bound:
    a layer that has lost all its heads also saves what its operations cost to start, which on a small model is more.
    """
    table = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    names = ["decode_bytes", "cache_bytes", "prefill_flops", "tokens_per_second", "first_token_latency_s"]
    wide = table[table["metric"].isin(names)].pivot_table(index=_CELL, columns="metric", values="estimate")
    wide = wide.reindex(columns=names)
    wide = wide.assign(read=wide["decode_bytes"] + wide["cache_bytes"]).reset_index()
    dense = wide[wide["level"] == 0].set_index(["variant", "method"])
    result: list[list[object]] = []
    for row in wide.to_dict("records"):
        key = (row["variant"], row["method"])
        if key not in dense.index:
            continue
        at_zero = dense.loc[key]
        for name, value in (
            ("tokens_per_second_in_proportion", at_zero["tokens_per_second"] * at_zero["read"] / row["read"]),
            (
                "first_token_latency_in_proportion_s",
                at_zero["first_token_latency_s"] * row["prefill_flops"] / at_zero["prefill_flops"],
            ),
        ):
            if math.isfinite(value):
                place = [model, *key, row["level"], math.nan, name]
                result.append([*place, float(value), math.nan, math.nan, 1, METRICS[name].unit])
    return result
