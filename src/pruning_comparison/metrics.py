"""Every figure this package reports: its name, unit, direction and label. Formulas stand where they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Metric:
    """One reported figure.

    ``better`` is "none" where neither direction is better in itself. ``log_scale`` metrics are positive and are averaged
    and compared as logarithms, so that a ratio is what is estimated.

    ``revision`` is raised whenever the same inputs give another value; results of different revisions are never mixed.
    """

    name: str
    unit: str
    better: Better
    label: str
    log_scale: bool = False
    revision: int = 1


_ALL = (
    Metric("perplexity", "1", "lower", "Perplexity", log_scale=True),
    Metric("perplexity_ratio", "1", "lower", "Perplexity, times the dense model's", log_scale=True),
    Metric("word_perplexity", "1", "lower", "Perplexity per word", log_scale=True),
    Metric("bits_per_byte", "bit/byte", "lower", "Bits per byte"),
    Metric("generation_perplexity", "1", "none", "Generation perplexity (under the dense model)", log_scale=True),
    Metric("distinct_1", "1", "none", "Distinct-1"),
    Metric("distinct_2", "1", "none", "Distinct-2"),
    Metric("distinct_3", "1", "none", "Distinct-3"),
    Metric("distinct_2_adjusted", "1", "none", "Distinct-2, expectation-adjusted"),
    Metric("seq_rep_4", "1", "none", "Repetition (seq-rep-4)"),
    Metric("compression_ratio", "1", "none", "Compression ratio"),
    Metric("distinct_2_distance", "1", "lower", "Distinct-2: distance from dense"),
    Metric("seq_rep_4_distance", "1", "lower", "Seq-rep-4: distance from dense"),
    Metric("generation_perplexity_distance", "1", "lower", "Log generation perplexity: distance from dense"),
    Metric("tokens_per_second", "token/s", "higher", "Tokens per second", log_scale=True),
    Metric("first_token_latency_s", "s", "lower", "First-token latency", log_scale=True),
    Metric("time_per_output_token_s", "s", "lower", "Time per output token", log_scale=True),
    Metric("end_to_end_s", "s", "lower", "End-to-end time", log_scale=True),
    Metric("tokens_per_second_ceiling", "token/s", "higher", "Tokens per second that the bytes left allow"),
    Metric("first_token_latency_floor_s", "s", "lower", "First-token latency that the FLOPs left allow"),
    Metric("prefill_flops", "FLOP", "lower", "FLOPs of reading a prompt"),
    Metric("decode_bytes", "byte", "lower", "Bytes read per decoding step"),
    Metric("parameter_bytes", "byte", "lower", "Parameters in bytes"),
    Metric("cache_bytes", "byte", "lower", "Key-value cache in bytes"),
    Metric("peak_memory_bytes", "byte", "lower", "Peak memory while generating"),
    Metric("adaptation_s", "s", "lower", "Adaptation time"),
    Metric("adaptation_tokens", "token", "lower", "Adaptation tokens"),
    Metric("adaptation_scratch_bytes", "byte", "lower", "Scratch file while adapting"),
    Metric("recovery_s", "s", "lower", "Recovery time"),
    Metric("recovery_tokens", "token", "lower", "Recovery tokens"),
    Metric("negotiation_s", "s", "lower", "Negotiation time"),
    Metric("adaptation_peak_memory_bytes", "byte", "lower", "Peak memory while adapting"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
