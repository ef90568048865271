"""What is measured on a model. ``metrics.py`` names every figure, its unit and its direction."""

from pruning_comparison.measure.flops import prefill_flops
from pruning_comparison.measure.generation import (
    FIRST_TOKENS,
    Generation,
    Timing,
    common_uniforms,
    generate,
    time_generation,
    warm_up_tokens,
)
from pruning_comparison.measure.memory import PeakMemory, cache_bytes, decode_bytes, parameter_bytes
from pruning_comparison.measure.perplexity import (
    DensePredictions,
    EvaluationWindow,
    WindowLoss,
    evaluation_windows,
    kl_of,
    measure_perplexity,
    most_windows_at_once,
    perplexity_of,
    window_losses,
)
from pruning_comparison.measure.tasks import TaskAnswer, TaskSet, load_tasks
from pruning_comparison.measure.text_quality import (
    compression_ratio,
    cut_at_end_of_text,
    distinct_n,
    expectation_adjusted_distinct_n,
    generation_losses,
    seq_rep_n,
)

__all__ = [
    "FIRST_TOKENS",
    "DensePredictions",
    "EvaluationWindow",
    "Generation",
    "PeakMemory",
    "TaskAnswer",
    "TaskSet",
    "Timing",
    "WindowLoss",
    "cache_bytes",
    "common_uniforms",
    "compression_ratio",
    "cut_at_end_of_text",
    "decode_bytes",
    "distinct_n",
    "evaluation_windows",
    "expectation_adjusted_distinct_n",
    "generate",
    "generation_losses",
    "kl_of",
    "load_tasks",
    "measure_perplexity",
    "most_windows_at_once",
    "parameter_bytes",
    "perplexity_of",
    "prefill_flops",
    "seq_rep_n",
    "time_generation",
    "warm_up_tokens",
    "window_losses",
]
