"""Every figure this package reports: one record per metric, from which everything else derives. Without torch.

A metric of generated text is added by a record here, a function, and a test; CONTRIBUTING.md has a worked example.
Functions are named and looked up when they are first needed, so that reading the records costs nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pruning_comparison.errors import InputError
from pruning_comparison.formatting import unknown_name

Kind = Literal[
    "loss", "divergence", "ratio", "text", "distance", "task", "timing", "memory", "size", "cost", "reference",
]  # fmt: skip
Direction = Literal["higher", "lower", "none"]
Scale = Literal["log", "linear"]
Alike = Literal["tokenizer", "length", "dense model"]
Role = Literal[
    "main table", "quality chart", "temperature chart", "improvement chart", "radar", "tight resources", "which metrics",
    "two runs",
]  # fmt: skip

MetricFunction = Callable[..., Any]


@dataclass(frozen=True)
class Metric:
    """One reported figure.

    ``kind`` says where it comes from:

    * "loss": from the summed losses of evaluation windows, per document. ``compute`` takes the sum ``summed`` and the
      quantity ``over`` (both of ``RAW``), as numbers or as columns, and returns the value, or its logarithm where the scale
      is "log".
    * "divergence": the same of another sum, ``summed``: how far predictions are from the dense model's, which is at 0.
    * "ratio": another metric ``ratio_of`` over its value in the dense model.
    * "text": of one generated text. ``compute`` takes any fields of ``measure.text_quality.WrittenText``, by name, and
      ``settings``, and returns a float, or None where the text is too short for it.
    * "distance": how far the text metric ``distance_of`` is from its value in the dense model, on the same prompt and draws.
    * "task": of one question of a zero-shot task. ``settings["harness"]`` are the names that lm-evaluation-harness gives it,
      of which the first that a task has is taken.
    * "timing", "memory": of one timed generation: fields of ``measure.generation.Timing``.
    * "size": of a model; "cost": of making a variant; "reference": what time in proportion to bytes or FLOPs would make.

    ``direction`` is what is better, "none" where neither direction is better in itself. Metrics on the "log" scale are
    positive and are averaged and compared as logarithms, so that a ratio is what is estimated. ``bounds`` are the lowest and
    highest possible value: what is measured outside them is missing, with that as the reason.

    ``label`` is the name in tables, ``short_label`` that above a panel, ``spoke`` that around the radar, ``phrase`` the
    words inside a sentence; those not given follow from the label. ``roles`` are the charts, tables and questions that
    choose this metric, with its place in each. ``compared``: variants are compared by it, and two runs as well where a
    direction is better; ``alike`` is what two runs must share, beside texts and prompts, for it to mean the same in both.
    ``on_request``: the setting without which it is not measured; empty for what always is.

    ``revision`` is raised whenever the same inputs give another value; results of different revisions are never mixed.
    """

    name: str
    kind: Kind
    unit: str
    label: str
    direction: Direction = "none"
    scale: Scale = "linear"
    bounds: tuple[float, float] = (0.0, math.inf)
    short_label: str = ""
    spoke: str = ""
    phrase: str = ""
    compute: str | MetricFunction = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    summed: str = "window_nats"
    over: str = ""
    ratio_of: str = ""
    distance_of: str = ""
    roles: Mapping[Role, int] = field(default_factory=dict)
    compared: bool = True
    alike: tuple[Alike, ...] = ()
    on_request: str = ""
    revision: int = 1

    def __post_init__(self) -> None:
        short = self.short_label or self.label
        for name, value in (
            ("short_label", short),
            ("spoke", self.spoke or short),
            ("phrase", self.phrase or f"{self.label[:1].lower()}{self.label[1:]}"),
        ):
            object.__setattr__(self, name, value)

    @property
    def cluster(self) -> Literal["document", "question", "prompt"]:
        """What is drawn anew, beside iterations, when its interval is estimated."""
        if self.kind == "task":
            return "question"
        return "document" if self.kind in ("loss", "divergence", "ratio") else "prompt"

    def possible(self, value: float) -> bool:
        """Whether a finite value lies within the bounds, and has a logarithm where one is taken."""
        low, high = self.bounds
        return low <= value <= high and (self.scale == "linear" or value > 0)

    def function(self) -> MetricFunction:
        """The function ``compute``, imported where it is only named."""
        if not isinstance(self.compute, str):
            return self.compute
        module_name, _, name = self.compute.partition(":")
        found: MetricFunction = getattr(importlib.import_module(module_name), name)
        return found


METRICS: dict[str, Metric] = {
    "perplexity": Metric(
        "perplexity",
        kind="loss",
        unit="1",
        label="Perplexity",
        direction="lower",
        scale="log",
        bounds=(1.0, math.inf),
        compute="pruning_comparison.losses:mean_loss",
        over="window_tokens",
        alike=("tokenizer",),
        roles={
            "main table": 1,
            "quality chart": 1,
            "improvement chart": 1,
            "radar": 1,
            "tight resources": 1,
            "which metrics": 1,
            "two runs": 1,
        },
    ),
    "perplexity_ratio": Metric(
        "perplexity_ratio",
        kind="ratio",
        unit="1",
        label="Perplexity, times the dense model's",
        direction="lower",
        scale="log",
        ratio_of="perplexity",
        compared=False,  # between variants it would say what perplexity says
        roles={"main table": 2},
    ),
    "kl_to_dense": Metric(
        "kl_to_dense",
        kind="divergence",
        unit="nat/token",
        label="Divergence from the dense model (KL)",
        short_label="KL to the dense model",
        phrase="divergence from the dense model",
        direction="lower",
        compute="pruning_comparison.losses:mean_loss",
        summed="window_kl_nats",
        over="window_tokens",
        alike=("tokenizer", "dense model"),
        roles={"main table": 4, "quality chart": 2},
    ),
    "word_perplexity": Metric(
        "word_perplexity",
        kind="loss",
        unit="1",
        label="Perplexity per word",
        direction="lower",
        scale="log",
        bounds=(1.0, math.inf),
        compute="pruning_comparison.losses:mean_loss",
        over="window_words",
        compared=False,  # between variants it would say what perplexity says
    ),
    "wikitext_word_perplexity": Metric(
        "wikitext_word_perplexity",
        kind="loss",
        unit="1",
        label="Word perplexity of WikiText, as lm-evaluation-harness has it",
        short_label="WikiText word perplexity",
        direction="lower",
        scale="log",
        bounds=(1.0, math.inf),
        compute="pruning_comparison.losses:mean_loss",
        summed="page_nats",
        over="page_words",
        compared=False,  # between variants it would say what perplexity says
        on_request="wikitext_words",
    ),
    "bits_per_byte": Metric(
        "bits_per_byte",
        kind="loss",
        unit="bit/byte",
        label="Bits per byte",
        direction="lower",
        compute="pruning_comparison.losses:bits_per_byte",
        over="window_bytes",
        roles={"two runs": 2},
    ),
    "generation_perplexity": Metric(
        "generation_perplexity",
        kind="text",
        unit="1",
        label="Generation perplexity (under the dense model)",
        short_label="Generation perplexity",
        scale="log",
        bounds=(1.0, math.inf),
        compute="pruning_comparison.measure.text_quality:generation_perplexity",
        roles={"main table": 7, "temperature chart": 1},
    ),
    "distinct_1": Metric(
        "distinct_1",
        kind="text",
        unit="1",
        label="Distinct-1",
        bounds=(0.0, 1.0),
        compute="pruning_comparison.measure.text_quality:distinct_n",
        settings={"n": 1},
    ),
    "distinct_2": Metric(
        "distinct_2",
        kind="text",
        unit="1",
        label="Distinct-2",
        short_label="Diversity (distinct-2)",
        bounds=(0.0, 1.0),
        compute="pruning_comparison.measure.text_quality:distinct_n",
        settings={"n": 2},
        roles={"main table": 8, "quality chart": 3, "temperature chart": 2},
    ),
    "distinct_3": Metric(
        "distinct_3",
        kind="text",
        unit="1",
        label="Distinct-3",
        bounds=(0.0, 1.0),
        compute="pruning_comparison.measure.text_quality:distinct_n",
        settings={"n": 3},
    ),
    "distinct_2_adjusted": Metric(
        "distinct_2_adjusted",
        kind="text",
        unit="1",
        label="Distinct-2, expectation-adjusted",
        short_label="Distinct-2, adjusted",
        compute="pruning_comparison.measure.text_quality:expectation_adjusted_distinct_n",
        settings={"n": 2},
    ),
    "seq_rep_4": Metric(
        "seq_rep_4",
        kind="text",
        unit="1",
        label="Repetition (seq-rep-4)",
        bounds=(0.0, 1.0),
        compute="pruning_comparison.measure.text_quality:seq_rep_n",
        settings={"n": 4},
        roles={"main table": 9, "quality chart": 4, "temperature chart": 3},
    ),
    "compression_ratio": Metric(
        "compression_ratio",
        kind="text",
        unit="1",
        label="Compression ratio",
        compute="pruning_comparison.measure.text_quality:compression_ratio",
    ),
    "distinct_2_distance": Metric(
        "distinct_2_distance",
        kind="distance",
        unit="1",
        label="Distinct-2: distance from dense",
        short_label="Distinct-2 distance",
        spoke="Distinct-2\ndistance",
        phrase="diversity",
        direction="lower",
        bounds=(0.0, 1.0),
        distance_of="distinct_2",
        alike=("length", "tokenizer"),
        roles={
            "main table": 10,
            "improvement chart": 5,
            "radar": 5,
            "tight resources": 4,
            "which metrics": 2,
            "two runs": 3,
        },
    ),
    "seq_rep_4_distance": Metric(
        "seq_rep_4_distance",
        kind="distance",
        unit="1",
        label="Seq-rep-4: distance from dense",
        short_label="Seq-rep-4 distance",
        spoke="Seq-rep-4\ndistance",
        phrase="repetition",
        direction="lower",
        bounds=(0.0, 1.0),
        distance_of="seq_rep_4",
        alike=("length", "tokenizer"),
        roles={"main table": 11, "improvement chart": 6, "radar": 6, "which metrics": 3, "two runs": 4},
    ),
    "generation_perplexity_distance": Metric(
        "generation_perplexity_distance",
        kind="distance",
        unit="1",
        label="Log generation perplexity: distance from dense",
        short_label="Log gen. perpl. distance",
        spoke="Log gen. perpl.\ndistance",
        phrase="plausibility of the generated text",
        direction="lower",
        distance_of="generation_perplexity",
        alike=("length", "dense model"),
        roles={"radar": 7, "tight resources": 5, "which metrics": 4, "two runs": 5},
    ),
    "accuracy": Metric(
        "accuracy",
        kind="task",
        unit="1",
        label="Accuracy on tasks",
        short_label="Accuracy",
        phrase="accuracy on tasks",
        direction="higher",
        bounds=(0.0, 1.0),
        settings={"harness": ("acc", "exact_match")},
        on_request=True,
        roles={"main table": 14, "two runs": 8},
    ),
    "accuracy_normalised": Metric(
        "accuracy_normalised",
        kind="task",
        unit="1",
        label="Accuracy on tasks, by likelihood per character",
        short_label="Accuracy, per character",
        direction="higher",
        bounds=(0.0, 1.0),
        settings={"harness": ("acc_norm",)},
        on_request=True,
    ),
    "tokens_per_second": Metric(
        "tokens_per_second",
        kind="timing",
        unit="token/s",
        label="Tokens per second",
        spoke="Tokens per\nsecond",
        phrase="speed",
        direction="higher",
        scale="log",
        alike=("length", "tokenizer"),
        roles={
            "main table": 5,
            "improvement chart": 2,
            "radar": 2,
            "tight resources": 2,
            "which metrics": 5,
            "two runs": 6,
        },
    ),
    "first_token_latency_s": Metric(
        "first_token_latency_s",
        kind="timing",
        unit="s",
        label="First-token latency",
        spoke="First-token\nlatency",
        direction="lower",
        scale="log",
        roles={
            "main table": 6,
            "improvement chart": 3,
            "radar": 3,
            "tight resources": 3,
            "which metrics": 6,
            "two runs": 7,
        },
    ),
    "time_per_output_token_s": Metric(
        "time_per_output_token_s",
        kind="timing",
        unit="s",
        label="Time per output token",
        phrase="time per token",
        direction="lower",
        scale="log",
        alike=("tokenizer",),
        roles={"which metrics": 7},
    ),
    "end_to_end_s": Metric(
        "end_to_end_s",
        kind="timing",
        unit="s",
        label="End-to-end time",
        direction="lower",
        scale="log",
        alike=("length",),
    ),
    "tokens_per_second_in_proportion": Metric(
        "tokens_per_second_in_proportion",
        kind="reference",
        unit="token/s",
        label="Tokens per second, in proportion to the bytes left",
        short_label="Tokens/s by bytes left",
        direction="higher",
        compared=False,
    ),
    "first_token_latency_in_proportion_s": Metric(
        "first_token_latency_in_proportion_s",
        kind="reference",
        unit="s",
        label="First-token latency, in proportion to the FLOPs left",
        short_label="First token, by FLOPs left",
        direction="lower",
        compared=False,
    ),
    "prefill_flops": Metric(
        "prefill_flops",
        kind="size",
        unit="FLOP",
        label="FLOPs of reading a prompt",
        direction="lower",
        alike=("tokenizer",),
    ),
    "decode_bytes": Metric(
        "decode_bytes", kind="size", unit="byte", label="Bytes read per decoding step", direction="lower"
    ),
    "parameter_bytes": Metric(
        "parameter_bytes",
        kind="size",
        unit="byte",
        label="Parameters in bytes",
        short_label="Parameters",
        direction="lower",
    ),
    "cache_bytes": Metric(
        "cache_bytes",
        kind="memory",
        unit="byte",
        label="Key-value cache in bytes",
        short_label="Key-value cache",
        direction="lower",
        alike=("length", "tokenizer"),
    ),
    "thousand_token_cache_bytes": Metric(
        "thousand_token_cache_bytes",
        kind="size",
        unit="byte",
        label="Key-value cache in bytes, at 1,000 tokens",
        short_label="Key-value cache, 1,000 tokens",
        direction="lower",
    ),
    "peak_memory_bytes": Metric(
        "peak_memory_bytes",
        kind="memory",
        unit="byte",
        label="Peak memory while generating",
        short_label="Peak memory, generating",
        spoke="Peak\nmemory",
        phrase="peak memory",
        direction="lower",
        alike=("length", "tokenizer"),
        on_request="memory_logging",
        roles={"main table": 12, "improvement chart": 4, "radar": 4, "which metrics": 8},
    ),
    "adaptation_s": Metric(
        "adaptation_s",
        kind="cost",
        unit="s",
        label="Adaptation time",
        direction="lower",
        compared=False,
        roles={"main table": 13},
    ),
    "adaptation_tokens": Metric(
        "adaptation_tokens", kind="cost", unit="token", label="Adaptation tokens", direction="lower", compared=False
    ),
    "adaptation_scratch_bytes": Metric(
        "adaptation_scratch_bytes",
        kind="cost",
        unit="byte",
        label="Scratch file while adapting",
        direction="lower",
        compared=False,
    ),
    "recovery_s": Metric("recovery_s", kind="cost", unit="s", label="Recovery time", direction="lower", compared=False),
    "recovery_tokens": Metric(
        "recovery_tokens", kind="cost", unit="token", label="Recovery tokens", direction="lower", compared=False
    ),
    "recovery_learning_rate": Metric(
        "recovery_learning_rate",
        kind="cost",
        unit="1",
        label="Learning rate of recovery",
        scale="log",
        compared=False,
    ),
    "negotiation_s": Metric(
        "negotiation_s", kind="cost", unit="s", label="Negotiation time", direction="lower", compared=False
    ),
    "predicted_perplexity_ratio": Metric(
        "predicted_perplexity_ratio",
        kind="cost",
        unit="1",
        label="Perplexity, times dense, as prices predict",
        short_label="Times dense, predicted",
        scale="log",
        direction="lower",
        compared=False,
        roles={"main table": 3},  # beside what came out
    ),
    "held_out_perplexity": Metric(
        "held_out_perplexity",
        kind="cost",
        unit="1",
        label="Perplexity on held-out calibration text",
        direction="lower",
        scale="log",
        bounds=(1.0, math.inf),
        compared=False,
    ),
    "adaptation_peak_memory_bytes": Metric(
        "adaptation_peak_memory_bytes",
        kind="cost",
        unit="byte",
        label="Peak memory while adapting",
        short_label="Peak memory, adapting",
        direction="lower",
        compared=False,
    ),
}
"""Every metric by its name, in the order in which tables and charts list them."""

RAW: dict[str, str] = {
    "window_nats": "nat",
    "window_tokens": "token",
    "window_bytes": "byte",
    "window_words": "word",
    "window_kl_nats": "nat",
    "page_nats": "nat",
    "page_words": "word",
}
"""What a journal holds of every evaluation window, or of whole pages, with its unit: metrics of the kind "loss" are made of
these sums."""


def metric_named(name: str) -> Metric:
    """The metric of that name. InputError, with the nearest, for any other."""
    if name not in METRICS:
        raise InputError(unknown_name("metric", name, METRICS))
    return METRICS[name]


def unit_of(quantity: str) -> str:
    """The unit of a metric, or of one of the ``RAW`` quantities."""
    return RAW[quantity] if quantity in RAW else metric_named(quantity).unit


def of_kind(*kinds: Kind) -> list[Metric]:
    """The metrics of these kinds, in the order of the records."""
    return [metric for metric in METRICS.values() if metric.kind in kinds]


def in_role(role: Role) -> list[str]:
    """Names of the metrics that a chart, table or question chooses, in its order."""
    chosen = [metric for metric in METRICS.values() if role in metric.roles]
    return [metric.name for metric in sorted(chosen, key=lambda metric: metric.roles[role])]
