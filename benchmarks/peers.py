"""Head pruning here and by Torch-Pruning: the same model, heads and windows; perplexity, seconds, memory, and what reloads.

    python benchmarks/peers.py --model=smollm2-135m --level=30 --peer_python=.venv-peer/bin/python \
        --eval_text=wiki.valid.raw --calibration_text=wiki.train.raw

Torch-Pruning runs in an environment of its own, with transformers 4.48 (docs/peers.md says how to make it), through
``peers_torch_pruning.py``; without ``--peer_python`` its rows are left out. FLAP, Wanda-sp and LLM-Pruner's Taylor are this
package's methods of these names. Every row is a process of its own, so that its peak of memory is its own. Processor time is
of pruning alone, on one thread, without loading and measuring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

ROWS: dict[str, dict[str, Any]] = {
    "magnitude, heads alone": {"method": "magnitude", "variant": "baseline"},
    "LLM-Pruner's Taylor": {"method": "llm-pruner", "variant": "baseline"},
    "Wanda-sp": {"method": "wanda", "variant": "baseline"},
    "Wanda-sp, within layers": {"method": "wanda", "variant": "baseline", "scope": "layer"},
    "FLAP": {"method": "flap", "variant": "agency-adaptation", "adaptation": "bias"},
    "agency": {"method": "obs", "variant": "agency"},
}
"""What is pruned here, by settings of ``prune``. Torch-Pruning is given the heads of the first row as well."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--level", type=float, default=30.0, help="per cent of the heads")
    found.add_argument("--eval_text", default="bundled:held_out")
    found.add_argument("--calibration_text", default="bundled:calibration")
    found.add_argument("--calibration_tokens", type=int, default=8192)
    found.add_argument(
        "--taylor_windows", type=int, default=16, help="calibration windows that Torch-Pruning's Taylor reads"
    )
    found.add_argument("--window", type=int, default=512, help="tokens per evaluation window")
    found.add_argument("--windows", type=int, default=20, help="evaluation windows, from the beginning of the text")
    found.add_argument("--peer_python", default=None, help="the Python of Torch-Pruning's environment")
    found.add_argument("--row", default=None, help="measure this row alone, in this process")
    found.add_argument("--work", type=Path, default=None, help="folder for the dense model and the windows")
    found.add_argument("--leave", default=None, help="with --row: a file of heads that leave, in place of a method")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.row is not None:
        print(json.dumps(measure_row(options)))
        return 0
    given = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--work")]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results: dict[str, dict[str, Any]] = {}
        own = [sys.executable, str(Path(__file__).resolve()), *given, f"--work={work}"]
        first, *others = ROWS
        results[first] = run([*own, f"--row={first}"], first)
        if "failed" in results[first]:
            raise SystemExit(results[first]["failed"])
        (work / "task.json").write_text(json.dumps({"leave": results[first]["leave"]}), "utf-8")
        if options.peer_python:
            peer = [options.peer_python, str(HERE / "peers_torch_pruning.py"), f"--work={work}"]
            for name, how in (
                ("Torch-Pruning, the same heads", ["--heads=given"]),
                ("Torch-Pruning, the same heads, keys and values shared", ["--heads=given", "--grouped"]),
                ("Torch-Pruning's Taylor", ["--heads=taylor"]),
            ):
                results[name] = run([*peer, *how], name)
            if "leave" in results[name]:
                (work / "taylor.json").write_text(json.dumps({"leave": results[name]["leave"]}), "utf-8")
                name = "the same heads, removed here"
                results[name] = run([*own, f"--row={first}", f"--leave={work / 'taylor.json'}"], name)
        for name in others:
            results[name] = run([*own, f"--row={name}"], name)
        dense = results[first]["dense_perplexity"]
    print(table(results, dense))
    return 0


def run(command: Sequence[str], name: str) -> dict[str, Any]:
    """One row in a process of its own: its JSON line, printed as it comes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if "peers_torch_pruning" in command[1]:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        result = {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    else:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps({"row": name, **{key: value for key, value in result.items() if key != "leave"}}), flush=True)
    return result


def measure_row(options: argparse.Namespace) -> dict[str, Any]:
    """Prunes here by one row's settings, or removes given heads, and measures what came of it."""
    import torch
    from safetensors.torch import save_file

    from pruning_comparison import load_model, load_pruned, preview_model, prune, remove_heads, save_pruned
    from pruning_comparison.models.heads import kept_heads
    from pruning_comparison.texts import load_documents, whole_windows

    torch.set_num_threads(1)
    loaded = load_model(preview_model(options.model))
    model, tokenizer = loaded.model, loaded.tokenizer
    evaluation = whole_windows(load_documents(options.eval_text, option="--eval_text"), tokenizer, options.window)
    evaluation = evaluation[: options.windows]
    result: dict[str, Any] = {}
    if not (options.work / "dense").exists():
        save_pruned(model, tokenizer, options.work / "dense", form="padded")
        calibration = load_documents(options.calibration_text, option="--calibration_text")
        windows = whole_windows(calibration, tokenizer, 256)
        chosen = windows[torch.linspace(0, len(windows) - 1, options.taylor_windows).long()]
        tensors = {"evaluation": evaluation.contiguous(), "calibration": chosen.contiguous()}
        save_file(tensors, options.work / "windows.safetensors")
        result["dense_perplexity"] = perplexity_of(model, evaluation)
    started = time.process_time()
    if options.leave is not None:
        keep = torch.ones_like(kept_heads(model.config))
        for layer, heads in enumerate(json.loads(Path(options.leave).read_text("utf-8"))["leave"]):
            keep[layer, heads] = False
        pruned = remove_heads(model, keep)
    else:
        pruned = prune(
            model, tokenizer, level=options.level, calibration=options.calibration_text,
            calibration_tokens=options.calibration_tokens, **ROWS[options.row],
        )  # fmt: skip
    result["processor_s"] = time.process_time() - started
    keep = kept_heads(pruned.config)
    result["leave"] = [(~row).nonzero().flatten().tolist() for row in keep]
    result["perplexity"] = perplexity_of(pruned, evaluation)
    result["parameters"] = sum(one.numel() for one in pruned.parameters())
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        save_pruned(pruned, tokenizer, Path(folder) / "model")
        again, _ = load_pruned(Path(folder) / "model")
        same = torch.equal(again(evaluation[:1]).logits, pruned(evaluation[:1]).logits)
    result["reloads"] = {"load_pruned": "yes" if same else "loads, with other logits"}
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def perplexity_of(model: Any, windows: Any) -> float:
    """exp of the mean loss per token over windows [N, T]."""
    from pruning_comparison.measure.perplexity import window_losses

    nats, tokens = window_losses(model, list(windows), batch_size=1)
    return math.exp(float(nats.sum() / tokens.sum()))


def table(results: dict[str, dict[str, Any]], dense: float) -> str:
    """The rows as Markdown."""
    lines = [
        "| | heads gone | perplexity, times dense | processor s | peak GB | parameters | reloads |",
        "|---|" + "---|" * 6,
    ]
    for name, row in results.items():
        if "failed" in row:
            lines.append(f"| {name} | fails: {row['failed']} | | | | | |")
            continue
        ratio = row["perplexity"] / dense
        reloads = "; ".join(f"{how}: {what}" for how, what in row["reloads"].items())
        lines.append(
            f"| {name} | {sum(map(len, row['leave']))} | {row['perplexity']:.3f}, {ratio:.3f} | {row['processor_s']:.1f} | "
            f"{row['peak_memory_bytes'] / 1e9:.2f} | {row['parameters'] / 1e6:.1f} M | {reloads} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
