"""The peak of a run's memory, estimated from the model's config alone: what is held throughout, and the largest of the rest.

On a CPU that is the process's resident memory. On a GPU it is the device's, without the dense streams, which take of what is
left over (``room_for_streams_bytes``) and go to a file where that is too little.

Dimension letters: L layers, E embedding, F features (heads of one layer x head size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pruning_comparison.agency.cuts import WINDOWS_AT_ONCE_ON_GPU
from pruning_comparison.engines import LLAMA_CPP
from pruning_comparison.measure import most_windows_at_once, parameter_bytes
from pruning_comparison.methods import IMPORTANCE_TOKENS, PRICED
from pruning_comparison.models import HeadGrid, ModelPreview
from pruning_comparison.models.decoding import MOST_REORDERED_BYTES, STEP_LAYOUTS
from pruning_comparison.models.devices import (
    LEAST_PARAMETERS_FOR_BFLOAT16,
    MOST_STREAM_BYTES,
    has_bfloat16_matrix_units,
)
from pruning_comparison.models.heads import (
    LAYOUTS,
    attentions,
    family_of,
    input_major_weight,
    mlp_output_projections,
)
from pruning_comparison.run import Inputs
from pruning_comparison.spec import ComparisonSpec
from pruning_comparison.variants import variant_named

LIBRARIES_BYTES = 560_000_000
"""Of the process with torch, transformers and what draws reports, before any model is loaded."""

CUDA_CONTEXT_BYTES = 500_000_000
"""Of a device before any model is loaded: kernels and the workspaces of their libraries."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers that a model has, counted without making any.

    ``attention`` are all of attention's, ``mlp_outputs`` those of the MLPs' output projections, which adaptation refits;
    ``mlp_features`` is the widest of these. ``mixed`` are weights of queries, keys and values that decoding puts side by
    side in a copy, ``reordered`` others that it may copy into another order, and ``reordered_outputs`` those of the latter
    that are MLPs' output projections.
    """

    parameters: int
    grid: HeadGrid
    width: int
    vocabulary: int
    attention: int
    mlp_outputs: int
    mlp_features: int
    mixed: int = 0
    reordered: int = 0
    reordered_outputs: int = 0

    @classmethod
    def of(cls, preview: ModelPreview) -> ModelSizes:
        """Those of a previewed model."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preview.config, dtype=torch.float32)
        config, family = preview.config.get_text_config(), str(family_of(preview.config))
        outputs = [module for module in mlp_output_projections(model) if module is not None]
        layout = LAYOUTS[family]
        names = (layout.query, layout.key, layout.value) if layout.fused is None else ()
        side_by_side = [attention.get_submodule(name) for attention in attentions(model) for name in names]
        known = {id(module) for module in side_by_side}
        others = [module for module in model.modules() if id(module) not in known and _is_reordered(module)]
        steps = family in STEP_LAYOUTS
        return cls(
            parameters=parameter_bytes(model) // 4,
            grid=preview.grid,
            width=int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            attention=_count(attentions(model)),
            mlp_outputs=_count(outputs),
            mlp_features=max((len(input_major_weight(module)) for module in outputs), default=0),
            mixed=_count(side_by_side) if steps else 0,
            reordered=_count(others) if steps else 0,
            reordered_outputs=_count([module for module in outputs if _is_reordered(module)]) if steps else 0,
        )


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that are ``held`` all along, and those of phases that come and go, ``passing``: one of them at a time."""

    held: dict[str, float]
    passing: dict[str, float]

    @property
    def peak_bytes(self) -> int:
        """All that is held, and the largest of what passes."""
        return int(sum(self.held.values()) + max(self.passing.values()))


def forecast_memory(spec: ComparisonSpec, inputs: Inputs, sizes: ModelSizes) -> MemoryForecast:
    """The memory of a run of ``spec`` with a model of these sizes."""
    on_gpu, number = spec.device.startswith("cuda"), 4 if spec.precision == "float32" else 2
    variants = [variant_named(name) for name in spec.variants]
    adapting = [variant.adapts and spec.adaptation != "none" for variant in variants]
    level = min((level for level in spec.pruning_levels if level > 0), default=100.0)
    kept = 1 - level / 100  # of attention, where least of it has left
    refitted = sizes.mlp_outputs if spec.adaptation == "refit-mlp" else 0
    own = [kept * sizes.attention + adapts * refitted for adapts in adapting]
    if spec.recovery_steps:
        own = [float(sizes.parameters - sizes.vocabulary * sizes.width)] * len(variants)
    asked = any(variant.negotiates for variant in variants)
    held = {
        "libraries": CUDA_CONTEXT_BYTES if on_gpu else LIBRARIES_BYTES,
        "weights": sizes.parameters * (4 if number == 4 else 4 + number),
        "pruned models": number * sum(own),
        "prices": _prices_bytes(spec, sizes, asked),
        "dense stream": _dense_stream_bytes(spec, sizes) if any(adapting) else 0,
    }
    window = min(spec.eval_window, inputs.preview.context)
    at_once = most_windows_at_once(window, sizes.vocabulary, spec.quality_batch_size, on_gpu=on_gpu)
    logits, read = 4 * window * sizes.vocabulary, inputs.calibration.shape[1]
    reorders = not on_gpu and number == 4 and 4 * sizes.parameters <= MOST_REORDERED_BYTES
    passing = {
        "evaluation": logits * (at_once + 2) + 12 * at_once * window * sizes.mlp_features,
        "decoding": number * sizes.mixed * (1 + kept * len(variants))
        + reorders * 4 * (sizes.reordered + sum(adapting) * (sizes.reordered_outputs if refitted else 0)),
    }
    passing["decoding"] += files_bytes(spec, sizes)  # which llama.cpp keeps in memory
    if any(adapting):
        passing["adaptation"] = _adaptation_bytes(spec, sizes, read, max(own) if number == 2 else 0, bool(refitted))
    if asked or PRICED in spec.pruning_methods:
        passing["prices"] = _pricing_bytes(spec, sizes, read)
    if asked:
        passing["importance"] = _gradient_bytes(sizes, read)
        # Before each round the moments of the heads that are left, taken out of those of all.
        passing["signals"] = 16 * sizes.grid.n_layers * (sizes.grid.n_heads * sizes.grid.head_size) ** 2
    return MemoryForecast(held, passing)


def files_bytes(spec: ComparisonSpec, sizes: ModelSizes) -> int:
    """Of the files that llama.cpp reads the models of a level from, the dense one's among them, while they are timed."""
    if LLAMA_CPP not in spec.engines:
        return 0
    level = min((level for level in spec.pruning_levels if level > 0), default=0.0)
    pruned = len(spec.variants) if level else 0
    number = 4 if spec.precision == "float32" else 2
    return int(number * (sizes.parameters * (1 + pruned) - pruned * level / 100 * sizes.attention))


def _prices_bytes(spec: ComparisonSpec, sizes: ModelSizes, asked: bool) -> int:
    """Of moments and prices, where any heads are priced: in float64, per layer with F features and embedding size E.

    Moments are products of two halves of the text, F x F each. Prices are an inverse, F x F, and a weight, F x E; a path on
    which heads are asked has its own beside those of the dense model.
    """
    if not asked and PRICED not in spec.pruning_methods:
        return 0
    features = sizes.grid.n_heads * sizes.grid.head_size
    prices = features * (features + sizes.width)
    return 8 * sizes.grid.n_layers * (2 * features**2 + prices * (2 if asked else 1))


def _dense_stream_bytes(spec: ComparisonSpec, sizes: ModelSizes) -> int:
    """Of what adaptation aims at, after attention and after the MLP of every block, where a host keeps it in memory."""
    size = 2 * 4 * sizes.grid.n_layers * spec.calibration_tokens * sizes.width
    return size if spec.device == "cpu" and size <= MOST_STREAM_BYTES else 0


def _pricing_bytes(spec: ComparisonSpec, sizes: ModelSizes, window: int) -> float:
    """Of weighing layers: weights rounded to bfloat16 where that is faster, a cut for each layer, and predictions over a
    window: logits, log probabilities and probabilities of the dense model, and what a cut makes of them, twice."""
    features = sizes.grid.n_heads * sizes.grid.head_size
    on_cpu = spec.device == "cpu"
    rounds = on_cpu and sizes.parameters >= LEAST_PARAMETERS_FOR_BFLOAT16 and has_bfloat16_matrix_units("cpu")
    predictions = 5 * 4 * (1 if on_cpu else WINDOWS_AT_ONCE_ON_GPU) * window * sizes.vocabulary
    return 2 * sizes.parameters * rounds + 4 * sizes.grid.n_layers * features * sizes.width + predictions


def _gradient_bytes(sizes: ModelSizes, window: int) -> float:
    """Of differentiating the loss of one window by its gates: logits and their gradients, and in every layer what its norms,
    projections and attention have read."""
    features = sizes.grid.n_heads * sizes.grid.head_size
    of_layer = 6 * sizes.width + 4 * features + 4 * sizes.mlp_features
    return 4.0 * min(window, IMPORTANCE_TOKENS) * (4 * sizes.vocabulary + sizes.grid.n_layers * of_layer)


def _adaptation_bytes(spec: ComparisonSpec, sizes: ModelSizes, window: int, own: float, refits_mlp: bool) -> float:
    """Of a refit: the sums of the widest projection in float64 and what solving makes of them, a batch of what it reads and
    aims at, what it reads and the stream, what attention adds and its targets of all calibration text, and, where another
    precision is measured, the model's ``own`` weights."""
    features = max(sizes.mlp_features if refits_mlp else 0, sizes.grid.n_heads * sizes.grid.head_size)
    sums = 8 * (2 * features**2 + 4 * features * sizes.width)
    batch = 4 * spec.quality_batch_size * window * (3 * features + 4 * sizes.width)
    return sums + batch + 4 * spec.calibration_tokens * (features + 4 * sizes.width) + 4 * own


def _count(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _is_reordered(module: nn.Module) -> bool:
    """Whether decoding reads a projection in another order than it is stored in: its longer side lies together then."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return False
    matrix = input_major_weight(module)
    inputs, outputs = matrix.shape
    return inputs != outputs and not (matrix if outputs > inputs else matrix.T).is_contiguous()
