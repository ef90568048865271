"""Torch-Pruning on a model, heads and windows that ``peers.py`` has written down.

It runs in an environment of Torch-Pruning's own and imports nothing of this project: transformers is another version there.
One JSON line says what came of it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import transformers
from safetensors.torch import load_file
from torch import Tensor


def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean loss per token over windows [N, T], each token after the first."""
    nats = 0.0
    with torch.inference_mode():
        for ids in windows:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return math.exp(nats / (windows.shape[0] * (windows.shape[1] - 1)))


def attentions(model: Any) -> list[Any]:
    """The attention module of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def repeat_keys_and_values(model: Any) -> None:
    """Gives every query head keys and values of its own, equal to those that it shares: the same function, more weights."""
    for attention in attentions(model):
        groups = attention.num_key_value_groups
        for name in ("k_proj", "v_proj"):
            old = getattr(attention, name)
            weight = old.weight.data.view(-1, attention.head_dim, old.in_features).repeat_interleave(groups, 0)
            new = torch.nn.Linear(old.in_features, len(weight) * attention.head_dim, bias=False)
            new.weight.data = weight.reshape(-1, old.in_features)
            setattr(attention, name, new)
        attention.num_key_value_groups = 1
    model.config.num_key_value_heads = model.config.num_attention_heads


def graph_of(model: Any, ids: Tensor) -> Any:
    """Torch-Pruning's graph of which layers depend on which."""
    inputs = {"input_ids": ids[:1, :16], "use_cache": False}
    return tp.DependencyGraph().build_dependency(model, example_inputs=inputs, output_transform=lambda out: out.logits)


def group_of(graph: Any, attention: Any, heads: Sequence[int]) -> Any:
    """What leaves with these heads of a layer: rows of queries, keys and values, columns of the output projection."""
    size = attention.head_dim
    rows = [head * size + row for head in heads for row in range(size)]
    return graph.get_pruning_group(attention.q_proj, tp.prune_linear_out_channels, idxs=rows)


def taylor_scores(model: Any, calibration: Tensor) -> Tensor:
    """Torch-Pruning's GroupTaylorImportance of every head [L, H], summed over its channels, after one backward pass."""
    for ids in calibration:
        model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    graph, score = graph_of(model, calibration), tp.importance.GroupTaylorImportance(normalizer=None)
    rows = []
    for attention in attentions(model):
        heads = attention.q_proj.out_features // attention.head_dim
        rows.append(score(group_of(graph, attention, range(heads))).view(heads, -1).sum(1))
    model.zero_grad(set_to_none=True)
    return torch.stack(rows).detach()


def remove(model: Any, leave: Sequence[Sequence[int]], ids: Tensor) -> None:
    """Removes heads of every layer by Torch-Pruning."""
    for layer, heads in enumerate(leave):
        if heads:
            graph = graph_of(model, ids)
            group = group_of(graph, attentions(model)[layer], heads)
            if not graph.check_pruning_group(group):
                raise RuntimeError(f"layer {layer} would lose all its heads, which Torch-Pruning refuses")
            group.prune()


def how_it_reloads(model: Any, windows: Tensor) -> dict[str, str]:
    """Whether the pruned model loads again by ``from_pretrained``, and as a pickle of the whole module."""
    found = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        before = model(input_ids=windows[:1], use_cache=False).logits
        try:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder)
            same = torch.allclose(again(input_ids=windows[:1], use_cache=False).logits, before, atol=1e-3)
            found["from_pretrained"] = "yes" if same else "loads, with other logits"
        except Exception as error:
            found["from_pretrained"] = f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        torch.save(model, Path(folder) / "model.pt")
        again = torch.load(Path(folder) / "model.pt", weights_only=False)
        same = torch.allclose(again(input_ids=windows[:1], use_cache=False).logits, before)
        found["pickle of the module"] = "yes, with the same code installed" if same else "loads, with other logits"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path, help="the folder that peers.py has written")
    parser.add_argument("--heads", required=True, choices=("given", "taylor"), help="which heads leave")
    parser.add_argument("--grouped", action="store_true", help="leave shared keys and values as they are")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = json.loads((options.work / "task.json").read_text("utf-8"))
    texts = load_file(options.work / "windows.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(options.work / "dense", torch_dtype=torch.float32).eval()
    result: dict[str, Any] = {"torch_pruning": tp.__version__, "transformers": transformers.__version__}
    if options.heads == "given" and not options.grouped:
        result["dense_perplexity"] = perplexity(model, texts["evaluation"])
    try:
        if not options.grouped:
            repeat_keys_and_values(model)
        started = time.process_time()
        leave = task["leave"]
        if options.heads == "taylor":
            scores = taylor_scores(model, texts["calibration"])
            lowest = scores.flatten().argsort()[: sum(map(len, leave))].tolist()
            leave = [
                [one % scores.shape[1] for one in lowest if one // scores.shape[1] == n] for n in range(len(scores))
            ]
        remove(model, leave, texts["evaluation"])
        result["processor_s"] = time.process_time() - started
        result["leave"] = leave
        result["perplexity"] = perplexity(model, texts["evaluation"])
        result["parameters"] = sum(one.numel() for one in model.parameters())
        result["reloads"] = how_it_reloads(model, texts["evaluation"])
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
