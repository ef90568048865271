"""What results came to at which revision: python tests/pin_results.py rewrites tests/recorded/pinned.json.

Every method's scores, every variant's heads and perplexity, every text metric's value and what the protocol draws and cuts,
on a tiny model and fixed texts. A result that has changed is pinned again only where its revision was raised.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from builders import save_tiny_model, tiny_gpt2, tiny_spec, token_ids, write_short_texts

from pruning_comparison.measure.generation import common_uniforms
from pruning_comparison.measure.text_quality import WrittenText, generation_losses, text_functions
from pruning_comparison.methods import METHODS
from pruning_comparison.metrics import METRICS
from pruning_comparison.run.cell import run_cell
from pruning_comparison.run.inputs import prepare
from pruning_comparison.run.workspace import load_workspace
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.spec import PROTOCOL_REVISION, Cell
from pruning_comparison.variants import VARIANTS

PINNED = Path(__file__).parent / "recorded" / "pinned.json"
COMMAND = "python tests/pin_results.py"
TOLERANCE = 1e-4
"""Relative: other processors round otherwise."""
SCORE_TOLERANCE = 3e-4
"""Of the largest score: those of ``ablation`` are small differences of large losses."""
TOKENS = [5, 6, 7, 5, 6, 7, 5, 6, 8, 9, 10, 5, 6, 7, 5]
"""A text with repetition: 15 tokens of the 97 of the tiny model."""


def measure():
    """Revision and results of everything that has a revision and can be told on its own, by its kind and name."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        # In four layers the variants that ask their heads come to other ones than those that do not, and than one another.
        folder = save_tiny_model(Path(place), layers=4)
        settings = write_short_texts(folder / "texts")
        spec = tiny_spec(folder, pruning_methods=("fisher",), variants=tuple(VARIANTS), **settings)
        workspace = load_workspace(spec, prepare(spec, identify=False))
        _, dense = run_cell(workspace, Cell("baseline", "fisher", 0, 0.0))
        found = {
            **{f"method {name}": _of_method(method) for name, method in METHODS.items()},
            **{f"variant {name}": _of_variant(workspace, variant) for name, variant in VARIANTS.items()},
            **{
                f"metric {name}": {"revision": METRICS[name].revision, "value": value}
                for name, value in text_metrics().items()
            },
            "the protocol": _of_protocol(workspace, dense),
        }
    return json.loads(json.dumps(found))


def _of_method(method):
    settings = ScoreSettings(batch_size=2, generator=torch.Generator().manual_seed(1), smallest_level=25.0)
    scores = score_heads(method, tiny_gpt2(), token_ids(4, 16), settings).scores
    return {"revision": method.revision, "scores": scores.tolist()}


def _of_variant(workspace, variant):
    pruned, result = run_cell(workspace, Cell(variant.name, "fisher", 0, 50.0))
    sums = {
        metric: sum(one.value for one in result.measurements if one.metric == metric)
        for metric in ("window_nats", "window_tokens")
    }
    return {
        "revision": variant.revision,
        "heads": ["".join("01"[kept] for kept in layer) for layer in pruned.keep.tolist()],
        "perplexity": math.exp(sums["window_nats"] / sums["window_tokens"]),
    }


def text_metrics():
    """Every text metric of one text, which the tiny model judges after two tokens."""
    ((nats, _),) = generation_losses(tiny_gpt2(), [torch.tensor([1, 2])], [torch.tensor(TOKENS)], batch_size=1)
    written = WrittenText(TOKENS, "over and over and over again", vocabulary=97, nats=nats)
    return {name: function(written) for name, function in text_functions().items()}


def _of_protocol(workspace, dense):
    """Windows of both texts, draws of sampling, and the text that the dense model writes with them."""
    return {
        "revision": PROTOCOL_REVISION,
        "evaluation windows": [(window.ids.tolist(), window.targets) for window in workspace.inputs.windows],
        "calibration windows": workspace.calibration(0).tolist(),
        "draws": common_uniforms(0, 1, 2, 5).tolist(),
        "texts": [text.text for text in dense.texts],
    }


def changes(pinned, measured):
    """What is wrong, in words, with the revisions of what has been measured; empty where each result is as it was pinned."""
    found = []
    for name in sorted(pinned.keys() | measured.keys()):
        if name not in measured:
            found.append(f"{name} is pinned and is gone: pin again with `{COMMAND}`")
        elif name not in pinned:
            found.append(f"{name} is not pinned: pin it with `{COMMAND}`")
        elif pinned[name]["revision"] != measured[name]["revision"]:
            found.append(
                f"{name} has revision {measured[name]['revision']} and is pinned at revision "
                f"{pinned[name]['revision']}: pin again with `{COMMAND}`"
            )
        elif not same(pinned[name], measured[name]):
            found.append(f"results of {name} changed: raise its revision and pin again with `{COMMAND}`")
    return found


def same(one, other):
    """Whether two results are equal: scores and other numbers but for rounding, whole numbers and texts exactly."""
    if one.keys() != other.keys():
        return False
    for name, value in one.items():
        if name == "scores":
            scores, now = (torch.tensor(result[name]) for result in (one, other))
            if scores.shape != now.shape or (scores - now).abs().max() > SCORE_TOLERANCE * scores.abs().max():
                return False
        elif isinstance(value, float):
            if not math.isclose(value, other[name], rel_tol=TOLERANCE):
                return False
        elif value != other[name]:
            return False
    return True


def main():
    measured = measure()
    pinned = json.loads(PINNED.read_text("utf-8")) if PINNED.exists() else {}
    refused = [line for line in changes(pinned, measured) if line.startswith("results of")]
    if refused:
        sys.exit("\n".join(refused))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured))
    PINNED.write_text(f"{{\n{lines}\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
