"""Is our decode loop slower than transformers' ``generate``? On dense models, at batch 1 and 8.

    python benchmarks/decode_loop.py [--models=bundled,smollm2-135m] [--tokens=64] [--profile]

Both decode the same prompts greedily (``sampled``: at temperature 0.7) by the same number of tokens; the prompts of a batch
differ in length, so that both pad on the left. Greedy tokens have to agree. ``ratio`` is the time of ``generate`` over ours,
a geometric mean over rounds A B B A with its 95 % interval: above 1, ours is faster. ``step`` says who computes our steps:
"own" is what a comparison times (``models/decoding.py``), "forward" our loop around the model's own forward. ``--profile``
lists what our loop spends its time on.

Target: no interval below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timing import (
    benchmark_model,
    emit,
    emit_machine,
    operations,
    paired_ratio,
    parser,
    random_ids,
    seconds,
    take_turns,
)

from pruning_comparison.measure.generation import common_uniforms, generate
from pruning_comparison.models.decoding import decode_step


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, models="bundled,smollm2-135m", repeats=8)
    made.add_argument("--tokens", type=int, default=64, help="new tokens")
    made.add_argument("--batches", default="1,8")
    made.add_argument("--profile", action="store_true", help="list what the loop spends its time on")
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    emit_machine("decode_loop", options.threads)
    for name in options.models.split(","):
        model = benchmark_model(name)
        for batch in (int(size) for size in options.batches.split(",")):
            prompts = [random_ids(model, 16 + 4 * row, seed=row).tolist() for row in range(batch)]
            for temperature in (0.0, 0.7):
                compare(name, model, prompts, options.tokens, temperature, options.repeats)
            if options.profile:
                profile(name, model, prompts, options.tokens)


def compare(name: str, model: Any, prompts: list[list[int]], tokens: int, temperature: float, repeats: int) -> None:
    """Times both, and prints the ratio."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    visible = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    uniforms = torch.stack([common_uniforms(0, 0, row, tokens) for row in range(len(prompts))])
    step = decode_step(model)

    def ours(step: Any = step) -> list[list[int]]:
        heat = [temperature] * len(prompts)
        return generate(model, prompts, tokens, temperatures=heat, uniforms=uniforms, step=step).tokens.tolist()

    def theirs() -> list[list[int]]:
        settings = {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, **sampling}
        return model.generate(ids, attention_mask=visible, **settings)[:, longest:].tolist()

    if not temperature and ours() != theirs():
        raise AssertionError(f"{name}: our tokens are not those of generate")
    work = {"own": seconds(ours), "forward": seconds(lambda: ours(None)), "generate": seconds(theirs)}
    times = take_turns(work, repeats)
    for kind in ("own", "forward"):
        emit(
            "decode_loop",
            model=name,
            batch=len(prompts),
            mode="sampled" if temperature else "greedy",
            step=kind if kind == "forward" or step is not None else "forward, there is no own",
            tokens_per_second=round(len(prompts) * tokens / (sum(times[kind]) / repeats), 1),
            **paired_ratio(times["generate"], times[kind]),
        )


def profile(name: str, model: Any, prompts: list[list[int]], tokens: int) -> None:
    """The operations that take most of our loop's time."""
    step = decode_step(model)
    taken = operations(lambda: generate(model, prompts, tokens, temperatures=[0.0] * len(prompts), step=step))
    total = sum(taken.values())
    shares = {op: round(taken[op] / total, 3) for op in sorted(taken, key=lambda op: -taken[op])[:8]}
    emit("decode_loop", model=name, batch=len(prompts), profile=shares, seconds_in_operations=round(total, 3))


if __name__ == "__main__":
    main()
