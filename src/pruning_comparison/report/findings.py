"""What was measured, in plain sentences for readers who know no statistics: what pruning did, what it cost, what failed.

Which of the two variants is better is not said here: that is for the verdicts (``verdicts.py``), whose statistics are
made for it. A change rests on the paired contrast with the unpruned model, never on two intervals that overlap or do not;
one that is clear by its own interval, but not once all that is said is corrected for, is called likely. Nothing is estimated
here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning_comparison.formatting import interval_with_unit, listed, per_cent, plain_number, with_unit
from pruning_comparison.report.rows import rows_of
from pruning_comparison.variants import AGENCY_VS_BASELINE

__all__ = ["Finding", "plain_findings", "recovery_findings", "strongest_findings"]


_ONE_OBSERVATION = "one observation, no interval"


_LIKELY = "the change is likely, not certain: among so many figures some seem clear by chance"


_AGAINST_EXPECTATION: Mapping[tuple[str, str], str] = {
    ("baseline", "higher"): "It was expected to slow down; it does not.",
    ("agency", "lower"): "It was expected to keep its speed or gain; it does not.",
}


@dataclass(frozen=True)
class Finding:
    """One thing the tables say: what it is about, the sentence, and the numbers that stand behind it."""

    heading: str
    sentence: str
    evidence: str


def _interval(row: Mapping[str, Any], unit: str) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    n = "n unknown" if pd.isna(row["n"]) else f"n = {int(row['n'])}"
    if math.isnan(low) or math.isnan(high):
        return f"{with_unit(float(row['estimate']), unit)} (no interval, {n})"
    return f"{with_unit(float(row['estimate']), unit)} [{interval_with_unit(low, high, unit)}], {n}"


def _measured(summary: pd.DataFrame, metric: str, method: str, variant: str) -> list[dict[str, Any]]:
    """The rows with a finite estimate, by level and temperature."""
    chosen = (summary["metric"] == metric) & (summary["method"] == method) & (summary["variant"] == variant)
    rows = summary[chosen].sort_values(["level", "temperature"])
    return [row for row in rows_of(rows) if math.isfinite(row["estimate"])]


def _against_dense(relative: pd.DataFrame, metric: str, method: str, variant: str) -> dict[float, dict[str, Any]]:
    """The paired contrasts with level 0, by level."""
    chosen = (relative["metric"] == metric) & (relative["method"] == method) & (relative["variant"] == variant)
    return {float(row["level"]): row for row in rows_of(relative[chosen])}


def _times(row: Mapping[str, Any]) -> str:
    """A ratio to the unpruned model with its interval."""
    told = f"{plain_number(row['estimate'])} times the unpruned model's"
    if pd.isna(row["ci_low"]):
        return told
    return f"{told} [{plain_number(row['ci_low'])} to {plain_number(row['ci_high'])}], n = {int(row['n'])}"


def _where(row: Mapping[str, Any], several_temperatures: bool) -> str:
    place = per_cent(float(row["level"]))
    return f"{place} (temperature {float(row['temperature']):g})" if several_temperatures else place


def plain_findings(
    summary: pd.DataFrame,
    relative: pd.DataFrame,
    contrasts: pd.DataFrame,
    cells: pd.DataFrame,
    manifest: Mapping[str, Any],
) -> list[Finding]:
    """Say what was found, method by method, then what holds for the run as a whole.

    ``summary`` has one row per estimate, ``relative`` one per level against the unpruned model (columns
    ``RELATIVE_COLUMNS``), ``contrasts`` one per comparison with the baseline, ``cells`` one per
    (variant, method, iteration, level). ``manifest`` supplies the number of heads where ``cells`` has none.
    """
    found: list[Finding] = []
    for method in [str(name) for name in summary["method"].dropna().unique()]:
        candidates = [
            _quality_by_level(summary, relative, method),
            _change_of_speed(summary, relative, method),
            _by_temperature(summary, method),
            _cost_of_adaptation(summary, method),
        ]
        found += [finding for finding in candidates if finding is not None]
    closing = [_same_at_level_0(contrasts), _levels_reached(cells), _failures(cells)]
    found += [finding for finding in closing if finding is not None]
    return found


def _quality_by_level(summary: pd.DataFrame, relative: pd.DataFrame, method: str) -> Finding | None:
    """What pruning does to perplexity and predictions: each variant at each level beside the unpruned model, without setting
    them against each other.
    """
    sentences, evidence = [], []
    for variant in ("baseline", "agency"):
        rows = _measured(summary, "perplexity", method, variant)
        if rows:
            ratios = _against_dense(relative, "perplexity", method, variant)
            sentences.append(_perplexity_told(summary, ratios, method, variant, rows))
            evidence.append(f"{variant}: {_evidence(rows, False, '1')}")
            apart = [row for row in _measured(summary, "kl_to_dense", method, variant) if row["level"] > 0]
            if apart:
                distances = [
                    f"{plain_number(row['estimate'])} nats per token at {per_cent(row['level'])}" for row in apart
                ]
                sentences.append(f"Its predictions differ from the unpruned model's by {listed(distances)} (KL).")
                evidence.append(
                    f"{variant}, divergence from the unpruned model: {_evidence(apart, False, 'nat/token')}"
                )
            if ratios:
                told = "; ".join(f"at {per_cent(level)} {_times(row)}" for level, row in sorted(ratios.items()))
                evidence.append(f"{variant}, by pairs: {told}")
    if not sentences:
        return None
    explained = "Perplexity is how surprised a model is by text; lower is better."
    return Finding(
        f"{method}: what pruning does to quality", " ".join([explained, *sentences]), ". ".join(evidence) + "."
    )


def _perplexity_told(
    summary: pd.DataFrame,
    ratios: Mapping[float, Mapping[str, Any]],
    method: str,
    variant: str,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """One variant's perplexity at each level, beside its own value at level 0 where there is one."""
    dense = next((row for row in rows if row["level"] == 0), None)
    of_variant = (summary["variant"] == variant) & (summary["metric"] == "perplexity") & (summary["method"] == method)
    absent = sorted(set(summary.loc[of_variant, "level"].dropna()) - {row["level"] for row in rows})
    parts = []
    unclear: list[str] = []
    likely: list[str] = []
    single = False
    for row in rows:
        if row["level"] == 0:
            continue
        told = f"{plain_number(row['estimate'])} at {per_cent(row['level'])}"
        ratio = ratios.get(float(row["level"]))
        if ratio is not None:
            told += f" ({plain_number(ratio['estimate'])} times)"
            single = single or pd.isna(ratio["ci_low"])
            if not pd.isna(ratio["ci_low"]) and not ratio["certain"]:
                (unclear if ratio["change"] == "unclear" else likely).append(per_cent(row["level"]))
        parts.append(told)
    if dense is None:
        sentence = (
            f"With heads pruned by {method}, the {variant} model's is {listed(parts)}. Level 0 was not measured, so what "
            "pruning changed is not known."
        )
    elif parts:
        sentence = f"The {variant} model's is {plain_number(dense['estimate'])} unpruned and {listed(parts)}."
    else:
        sentence = f"The {variant} model's is {plain_number(dense['estimate'])} unpruned."
    if absent:
        sentence += f" It is missing at {listed([per_cent(level) for level in absent])}."
    if unclear:
        sentence += f" At {listed(unclear)} it is unclear whether pruning changed it."
    if likely:
        sentence += f" At {listed(likely)} {_LIKELY}."
    if single:
        sentence += f" This is {_ONE_OBSERVATION}: how much of it is chance cannot be said."
    return sentence


def _evidence(rows: Sequence[Mapping[str, Any]], several_temperatures: bool, unit: str) -> str:
    return "; ".join(f"at {_where(row, several_temperatures)}: {_interval(row, unit)}" for row in rows)


def _change_of_speed(summary: pd.DataFrame, relative: pd.DataFrame, method: str) -> Finding | None:
    """Whether speed at the highest level differs from the unpruned model's, for each of the two, and what was possible."""
    sentences, evidence = [], []
    for variant in ("baseline", "agency"):
        rows = _measured(summary, "tokens_per_second", method, variant)
        dense = next((row for row in rows if row["level"] == 0), None)
        ratios = _against_dense(relative, "tokens_per_second", method, variant)
        if not rows or dense is None or rows[-1]["level"] == 0 or float(rows[-1]["level"]) not in ratios:
            continue
        top = rows[-1]
        ratio = ratios[float(top["level"])]
        figures = (
            f"{plain_number(top['estimate'])} tokens per second with {per_cent(top['level'])} of the heads pruned, "
            f"{plain_number(ratio['estimate'])} times the unpruned model's speed"
        )
        sentences.append(_speed_told(variant, ratio, figures))
        if ratio["certain"] and (variant, ratio["change"]) in _AGAINST_EXPECTATION:
            sentences.append(_AGAINST_EXPECTATION[variant, ratio["change"]])
        evidence.append(f"{variant}: {_evidence([dense, top], False, 'token/s')}; by pairs {_times(ratio)}")
        by_bytes = [
            row
            for row in _measured(summary, "tokens_per_second_in_proportion", method, variant)
            if row["level"] == top["level"]
        ]
        if by_bytes:
            evidence.append(f"in proportion to the bytes left: {plain_number(by_bytes[0]['estimate'])} token/s")
    if not sentences:
        return None
    return Finding(f"{method}: what pruning does to speed", " ".join(sentences), "; ".join(evidence))


def _speed_told(variant: str, ratio: Mapping[str, Any], figures: str) -> str:
    if pd.isna(ratio["ci_low"]):
        return f"The {variant} model generates {figures}: {_ONE_OBSERVATION}."
    if ratio["change"] == "unclear":
        return f"It is unclear whether pruning changes the {variant} model's speed: {figures}."
    way = "faster" if ratio["change"] == "higher" else "slower"
    if ratio["certain"]:
        return f"Pruning makes the {variant} model {way}: {figures}."
    return f"Pruning probably makes the {variant} model {way}: {figures}."


def _by_temperature(summary: pd.DataFrame, method: str) -> Finding | None:
    """Generation perplexity at the highest level beside the unpruned model's, temperature by temperature."""
    measured = {
        variant: _measured(summary, "generation_perplexity", method, variant) for variant in ("baseline", "agency")
    }
    rows = [row for of_variant in measured.values() for row in of_variant]
    temperatures = sorted({float(row["temperature"]) for row in rows if not pd.isna(row["temperature"])})
    top = max((float(row["level"]) for row in rows), default=0.0)
    if len(temperatures) < 2 or top == 0:
        return None
    told, evidence = [], []
    for temperature in temperatures:
        parts: list[str] = []
        for variant, of_variant in measured.items():
            here = [row for row in of_variant if row["temperature"] == temperature]
            dense = next((row for row in here if row["level"] == 0), None)
            pruned = next((row for row in here if row["level"] == top), None)
            if dense is not None and not any(part.startswith("unpruned") for part in parts):
                parts.insert(0, f"unpruned {plain_number(dense['estimate'])}")
                evidence.append(f"unpruned, temperature {temperature:g}: {_interval(dense, '1')}")
            if pruned is not None:
                parts.append(f"{variant} {plain_number(pruned['estimate'])}")
                evidence.append(f"{variant}, temperature {temperature:g}: {_interval(pruned, '1')}")
        told.append(f"at temperature {temperature:g} {listed(parts)}")
    sentence = (
        f"How implausible the unpruned model finds the generated text (generation perplexity), with {per_cent(top)} of "
        f"the heads pruned by {method}: {'; '.join(told)}."
    )
    return Finding(f"{method}: temperature", sentence, "; ".join(evidence))


def _cost_of_adaptation(summary: pd.DataFrame, method: str) -> Finding | None:
    seconds = _measured(summary, "adaptation_s", method, "agency")
    tokens = {row["level"]: row for row in _measured(summary, "adaptation_tokens", method, "agency")}
    seconds = [row for row in seconds if row["level"] > 0] or seconds
    if not seconds and not tokens:
        return None
    parts = []
    for level in sorted({row["level"] for row in seconds} | {level for level in tokens if level > 0}):
        time = next((with_unit(row["estimate"], "s") for row in seconds if row["level"] == level), "time not measured")
        text = f" and {plain_number(tokens[level]['estimate'])} tokens of text" if level in tokens else ""
        parts.append(f"{time}{text} at {per_cent(level)}")
    if not parts:
        return None
    asked = [row for row in _measured(summary, "negotiation_s", method, "agency") if row["level"] > 0]
    evidence = [f"adaptation: {_evidence(seconds, False, 's') or 'missing'}"]
    sentence = f"Agency's adaptation took {listed(parts)}."
    if asked:
        times = listed([f"{with_unit(row['estimate'], 's')} at {per_cent(row['level'])}" for row in asked])
        sentence += f" Asking the heads, in all rounds up to a level, took {times}."
        evidence.append(f"negotiation: {_evidence(asked, False, 's')}")
    sentence += " The baseline has no such cost."
    return Finding(f"{method}: what agency cost", sentence, "; ".join(evidence))


def strongest_findings(strongest: pd.DataFrame) -> list[Finding]:
    """Agency against the strongest baseline of each level, one finding for each of agency's methods.

    ``strongest`` has the columns ``STRONGEST_COLUMNS``. A run whose only baseline it is, says so.
    """
    found = []
    of_agency = strongest[strongest["variant"] == "agency"] if len(strongest) else strongest
    for method, rows in of_agency.groupby("method", sort=False) if len(of_agency) else ():
        told, evidence = [], []
        for row in rows_of(rows.sort_values("level")):
            if pd.isna(row["estimate"]):
                continue
            baseline = f"{row['baseline_variant']} by {row['baseline_method']}"
            unclear = pd.isna(row["ci_low"]) or row["ci_low"] <= 1 <= row["ci_high"]
            clear = " (unclear whether that is a difference)" if unclear else ""
            told.append(f"at {per_cent(row['level'])} {plain_number(row['estimate'])} times that of {baseline}{clear}")
            evidence.append(f"at {per_cent(row['level'])}: {_interval(row, '1')}, {row['chosen']}")
        if not told:
            continue
        only = int(rows["candidates"].max()) == 1
        which = (
            "This run has one baseline, so nothing says how strong it is among others"
            if only
            else f"The best of {int(rows['candidates'].max())} baselines at each level, chosen on held-out calibration text"
        )
        sentence = f"{which}. Agency's perplexity with heads ranked by {method} is {listed(told)}."
        found.append(Finding(f"{method}: agency and the strongest baseline", sentence, "; ".join(evidence)))
    return found


def recovery_findings(cells: pd.DataFrame) -> list[Finding]:
    """What recovery chose for each model, where it had a choice, from the ``details`` of ``cells``."""
    told: dict[tuple[str, str, float], list[str]] = {}
    evidence = []
    for row in rows_of(cells[cells["status"] == "done"]):
        recovery = json.loads(row["details"] or "{}").get("recovery")
        if not isinstance(recovery, Mapping) or not recovery["trials"]:
            continue
        place = (str(row["variant"]), str(row["method"]), float(row["level"]))
        told.setdefault(place, []).append(f"{recovery['learning_rate']:g} for {_trained(recovery['parameters'])}")
        evidence.append(
            f"{row['variant']}, {row['method']}, iteration {int(row['iteration']) + 1}, {per_cent(row['level'])}: "
            + ", ".join(
                f"{trial['learning_rate']:g} {trial['parameters']} {plain_number(trial['held_out_kl_nats'])}"
                for trial in recovery["trials"]
            )
        )
    if not told:
        return []
    parts = [
        f"{variant} by {method} at {per_cent(level)}: {listed(list(dict.fromkeys(choices)))}"
        for (variant, method, level), choices in told.items()
    ]
    sentence = (
        "Every model chose its learning rate, and what is trained, from the same grid on held-out calibration text. "
        f"{'; '.join(parts)}."
    )
    numbers = f"divergence from the dense model on held-out text, nats per token: {'; '.join(evidence)}"
    return [Finding("What recovery chose", sentence, numbers)]


def _trained(parameters: str) -> str:
    return "all weights" if parameters == "all" else "output projections, norms and biases"


def _same_at_level_0(contrasts: pd.DataFrame) -> Finding | None:
    """Before anything is pruned both must be the same model; a perplexity that differs is a fault to look into."""
    chosen = contrasts[
        (contrasts["metric"] == "perplexity")
        & (contrasts["level"] == 0)
        & (contrasts["contrast"] == AGENCY_VS_BASELINE)
        & (contrasts["estimate"].abs() > 0.01)
    ]
    if chosen.empty:
        return None
    rows = rows_of(chosen)
    sentence = (
        "At level 0 nothing is pruned and both should be the same model, but their perplexities differ. "
        "Look into this before trusting the rest."
    )
    return Finding(
        "Not the same at level 0", sentence, "; ".join(f"{row['method']}: {_interval(row, '%')}" for row in rows)
    )


def _levels_reached(cells: pd.DataFrame) -> Finding | None:
    """Where the achieved level is not the requested one: rounding to whole heads, or more than that."""
    done = cells[cells["status"] == "done"].dropna(subset=["level", "achieved_level"])
    off = done[(done["level"] - done["achieved_level"]).abs() > 1e-6]
    if off.empty:
        return None
    rows = rows_of(off.drop_duplicates(["level", "achieved_level"]).sort_values(["level", "achieved_level"]))
    pairs = [f"{per_cent(row['level'])} became {row['achieved_level']:.4g} %" for row in rows]
    rounding = True
    for row in rows:
        step = 50.0 / float(row["heads_total"])
        rounding = rounding and abs(row["level"] - row["achieved_level"]) <= step + 1e-6
    reason = (
        "because only whole heads can be pruned"
        if rounding
        else "by more than rounding to whole heads explains, unless the heads were counted within each layer"
    )
    sentence = f"The level reached differs from the level asked for, {reason}: {listed(pairs)}."
    evidence = "; ".join(
        f"{per_cent(row['level'])}: {plain_number(row['heads_pruned'])} of {plain_number(row['heads_total'])} heads"
        for row in rows
    )
    return Finding("Levels asked for and reached", sentence, evidence)


def _failures(cells: pd.DataFrame) -> Finding | None:
    failed = cells[cells["status"] == "failed"]
    if failed.empty:
        return None
    counts = failed["reason"].fillna("no reason recorded").astype(str).value_counts()
    sentence = (
        f"{len(failed)} of {len(cells)} cells failed, so their figures are missing from everything above and below."
        if len(failed) > 1
        else f"One of {len(cells)} cells failed, so its figures are missing from everything above and below."
    )
    return Finding(
        "Cells that failed", sentence, "; ".join(f"{count} times: {reason}" for reason, count in counts.items())
    )
