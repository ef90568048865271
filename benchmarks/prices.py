"""What prices predict and what comes out: python benchmarks/prices.py --calibration_text=... --eval_text=... [OPTIONS]

Prices every head, cuts the cheapest (``obs``) at each level, refits the survivors and measures perplexity. Prints one line
a level: heads left per layer, the ratio to the dense perplexity that prices predict, and what came out.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from pruning_comparison.agency.moments import observe
from pruning_comparison.agency.prices_across_layers import layer_prices, layer_weights, split_windows
from pruning_comparison.measure.perplexity import measure_perplexity, perplexity_of
from pruning_comparison.models.devices import fast_products
from pruning_comparison.pruning import select_heads
from pruning_comparison.run.cell import remove_and_adapt
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.scoring.prices import Prices, elimination
from pruning_comparison.spec import Cell, ComparisonSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--eval_text", default="bundled:validation")
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--eval_tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--levels", default="30,50,70")
    options = parser.parse_args()
    spec = ComparisonSpec(
        model_name=options.model_name, device="cpu", threads=1, pruning_methods=("fisher",),
        variants=("agency-adaptation",), calibration_text=options.calibration_text, eval_text=options.eval_text,
        calibration_tokens=options.calibration_tokens, eval_tokens=options.eval_tokens, max_prompts=1, num_tokens=2,
        calibration_window=options.window, eval_window=512,
    )  # fmt: skip
    workspace = load_workspace(spec, prepare(spec, identify=False))
    model, windows = workspace.reference, workspace.calibration(0)
    fitted, fresh = split_windows(windows)
    started = time.perf_counter()

    def note(what: str) -> None:
        nonlocal started
        print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()

    with torch.no_grad(), fast_products(model):
        moments = observe(model, fitted, keep=workspace.grid.all_heads(), batch_size=8, utilisation=False)
    note(f"moments over {fitted.numel()} tokens")
    layers = layer_prices(model, moments)
    weights = layer_weights(model, moments, layers, fresh)
    note(f"weights of layers over {fresh.numel()} tokens")
    prices = Prices.of(layers, weights.tolist(), workspace.grid.n_heads)
    order, _ = elimination(prices)
    note("order")

    def perplexity(pruned: torch.nn.Module) -> float:
        return perplexity_of(measure_perplexity(pruned, workspace.inputs.windows, batch_size=8))

    dense = perplexity(workspace.dense)
    note(f"dense perplexity {dense:.2f}")
    for level in map(float, options.levels.split(",")):
        keep = select_heads(order, level)
        predicted = math.exp(prices.total(~keep))
        pruned = remove_and_adapt(workspace, Cell("agency-adaptation", "fisher", 0, level), keep)
        came_out = perplexity(pruned.model) / dense
        lost = " ".join(map(str, (~keep).sum(1).tolist()))
        note(f"{level:g} %: predicted {predicted:.3f}, came out {came_out:.3f}; lost per layer {lost}")


if __name__ == "__main__":
    main()
