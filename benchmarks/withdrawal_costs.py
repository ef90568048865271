"""Do prices say what a withdrawal costs? Estimates beside the loss that every head of the bundled model costs.

    python benchmarks/withdrawal_costs.py [calibration tokens] [validation tokens]

Every head is removed alone, once as it is and once with its layer's survivors adapted in closed form, and the loss on
validation addresses is taken, which neither calibration nor evaluation text contains. Takes a few minutes.
"""

from __future__ import annotations

import sys

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.moments import LayerMoments
from pruning_comparison.agency.prices_across_layers import measure_prices, observe_for_prices
from pruning_comparison.agency.signals import measure_signals, written_products
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models.heads import head_grid, output_projections, set_projection
from pruning_comparison.models.loading import load_model, preview_model
from pruning_comparison.pruning.surgery import remove_heads
from pruning_comparison.scoring.gradients import score_fisher
from pruning_comparison.scoring.prices import RIDGE, LayerPrices
from pruning_comparison.texts import load_documents, sample_windows, whole_windows

WINDOW, BATCH = 256, 8


def main(calibration_tokens: int, validation_tokens: int) -> None:
    preview = preview_model("bundled")
    model = load_model(preview).model
    keep = head_grid(model.config).all_heads()

    def windows(name: str, tokens: int, seed: int) -> Tensor:
        available = whole_windows(load_documents(f"bundled:{name}", option="--text"), preview.tokenizer, WINDOW)
        return sample_windows(available, tokens, torch.Generator().manual_seed(seed))

    calibration = windows("calibration", calibration_tokens, 0)
    validation = list(windows("validation", validation_tokens, 1))
    observations = observe_for_prices(model, calibration, batch_size=BATCH, utilisation=True)
    prices = measure_prices(model, calibration, batch_size=BATCH, moments=observations)
    weights = torch.tensor(prices.weights)
    fisher = score_fisher(model, calibration, batch_size=BATCH, gradient_precision="float32").scores
    signals = measure_signals(observations, prices, ridge=RIDGE)
    energy = torch.stack([written_products(one, centred=False).diagonal() for one in observations.moments if one])

    def loss(other: PreTrainedModel) -> float:
        nats, tokens = window_losses(other, validation, batch_size=BATCH)
        return float(nats.sum() / tokens.sum())

    dense, plain, adapted = loss(model), torch.zeros(keep.shape), torch.zeros(keep.shape)
    for layer, head in keep.nonzero().tolist():
        without = keep.clone()
        without[layer, head] = False
        pruned = remove_heads(model, without)
        plain[layer, head] = loss(pruned) - dense
        moments = observations.moments[layer]
        assert moments is not None
        adapt(pruned, layer, head, moments)
        adapted[layer, head] = loss(pruned) - dense

    estimates = {
        "price": signals.withdrawal_cost,
        "... without weights": signals.withdrawal_cost / weights[:, None],
        "Fisher / 2": fisher / calibration.numel() / 2,
        "energy, weighted": energy * weights[:, None],
        "1 - redundancy": 1 - signals.redundancy,
    }
    print(
        f"dense loss {dense:.4f} nats; added by one head: {plain.median():.4f} as it is, {adapted.median():.4f} adapted"
    )
    print(f"{'estimate':22s} rank correlation with the loss added:  as it is   adapted   median of adapted / estimate")
    for name, estimate in estimates.items():
        ranks = [float(spearmanr(estimate.flatten(), truth.flatten()).statistic) for truth in (plain, adapted)]
        print(f"{name:62s} {ranks[0]:8.2f} {ranks[1]:9.2f} {float((adapted / estimate).median()):18.3g}")
    for name in ("utilisation", "contribution", "alignment", "redundancy"):
        values = getattr(signals, name)
        low, middle, high = (float(values.quantile(q)) for q in (0, 0.5, 1))
        print(f"{name:22s} lowest {low:.2f}, median {middle:.2f}, highest {high:.2f}")


def adapt(pruned: PreTrainedModel, layer: int, head: int, moments: LayerMoments) -> None:
    """Gives a layer that has just lost ``head`` the weights and the bias that its withdrawal cost takes for granted."""
    left = LayerPrices.of(moments.covariance(), moments.weight, moments.heads, ridge=RIDGE).withdraw(head)
    stays = torch.ones(len(moments.heads), moments.head_size, dtype=torch.bool)
    stays[moments.heads.index(head)] = False
    projection = output_projections(pruned)[layer]
    assert projection is not None
    mean = moments.mean()
    bias = projection.get_parameter("bias") + mean @ moments.weight.double() - mean[stays.flatten()] @ left.weight
    set_projection(projection, left.weight.float(), bias.float())


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*(numbers + [16_384, 8_192][len(numbers) :]))
