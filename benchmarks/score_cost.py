"""What scores and signals cost, in dense forward passes over the calibration text, and whether their memory grows with it.

    python benchmarks/score_cost.py [--models=bundled,smollm2-135m] [--tokens=8192]

A forward pass is the dense model over the same windows in the same batches, without gradients. A backward pass is what
differentiating the loss by the embeddings adds to it. ``passes`` is the time of the score over that of the forward pass,
with its 95 % interval over rounds; ``allowed`` is 3, and for gradient methods 3 forward and 2 backward passes.
``peak_growth`` is the process's peak memory on four times the text minus that on the text, in bytes, where the system tells.

Target: no ``passes`` above ``allowed``, and ``peak_growth`` below what one batch takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import benchmark_model, emit, emit_machine, paired_ratio, parser, random_ids, seconds, take_turns
from torch import Tensor

from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices
from pruning_comparison.agency.signals import measure_signals
from pruning_comparison.measure.memory import PeakMemory
from pruning_comparison.methods import METHODS
from pruning_comparison.models import preview_model
from pruning_comparison.models.heads import head_grid
from pruning_comparison.scoring.prices import RIDGE, Prices
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.texts import load_documents, sample_windows, whole_windows

BATCH = 8
GRADIENT_METHODS = ("taylor", "fisher")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="bundled,smollm2-135m", repeats=4)
    made.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    made.add_argument("--window", type=int, default=256)
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    emit_machine("score_cost", options.threads)
    if options.tokens < BATCH * options.window:
        made.error(f"--tokens: {options.tokens} do not fill a batch of {BATCH} windows of {options.window}")
    for name in options.models.split(","):
        model = benchmark_model(name)
        windows = calibration(name, model, 4 * options.tokens, options.window)
        few = windows[: len(windows) // 4]
        work: dict[str, Callable[[Tensor], Any]] = {
            "forward": lambda text, model=model: forward(model, text),
            "forward and backward": lambda text, model=model: forward_and_backward(model, text),
            **{
                method: lambda text, model=model, method=method: score(model, method, text)
                for method in ("magnitude", "entropy", *GRADIENT_METHODS)
            },
            "entropy, one direction": lambda text, model=model: score(model, "entropy", text, direction="low"),
            "signals": lambda text, model=model: signals(model, text),
        }
        timed = {key: seconds(lambda function=function, few=few: function(few)) for key, function in work.items()}
        times = take_turns(timed, options.repeats)
        backward = sum(times["forward and backward"]) / sum(times["forward"]) - 1
        for key, function in list(work.items())[2:]:
            emit(
                "score_cost",
                model=name,
                what=key,
                tokens=few.numel(),
                allowed=round(3 + 2 * backward if key in GRADIENT_METHODS else 3.0, 2),
                seconds=round(sum(times[key]) / options.repeats, 3),
                passes=paired_ratio(times[key], times["forward"]),
                peak_growth=peak_growth(function, few, windows),
            )


def calibration(name: str, model: Any, tokens: int, window: int) -> Tensor:
    """Windows [N, T] of calibration text, or of random tokens for a random model."""
    try:
        tokenizer = preview_model(name).tokenizer
    except Exception:
        return random_ids(model, -(-tokens // window), window)
    available = whole_windows(load_documents("bundled:calibration", option="--text"), tokenizer, window)
    return sample_windows(available, tokens, torch.Generator().manual_seed(0))


@torch.inference_mode()
def forward(model: Any, windows: Tensor) -> None:
    for batch in windows.split(BATCH):
        model(input_ids=batch, use_cache=False)


def forward_and_backward(model: Any, windows: Tensor) -> None:
    """The gradient of the loss by the embeddings: back through every layer, and no gradient of any weight."""
    for batch in windows.split(BATCH):
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=batch, use_cache=False).loss
        torch.autograd.grad(loss, embedded)


def score(model: Any, method: str, windows: Tensor, direction: str = "auto") -> None:
    score_heads(
        METHODS[method],
        model,
        windows,
        ScoreSettings(batch_size=BATCH, entropy_direction=direction, smallest_level=20.0),
    )


def signals(model: Any, windows: Tensor) -> None:
    keep = head_grid(model.config).all_heads()
    seen = observe(model, windows, keep=keep, batch_size=BATCH)
    measure_signals(seen, Prices.of(layer_prices(model, seen), None, keep.shape[1]), ridge=RIDGE)


def peak_growth(function: Callable[[Tensor], Any], few: Tensor, many: Tensor) -> int | None:
    peaks = []
    for text in (few, many):
        with PeakMemory(torch.device("cpu")) as peak:
            function(text)
        peaks.append(peak.bytes)
    return None if None in peaks else peaks[1] - peaks[0]


if __name__ == "__main__":
    main()
