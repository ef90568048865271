"""A model run by llama.cpp, from a GGUF file, through the package xllamacpp (extra ``llama-cpp``).

Dimension letters: B batch, N new tokens.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.errors import InputError
from pruning_comparison.measure.engines import EngineRun, Export, PromptBatch, Runner
from pruning_comparison.models.decoding import DecodeStep

_CELLS = 256
"""llama.cpp rounds the tokens that a sequence has room for up to a multiple of so many."""


def llama_cpp_runner(
    model: PreTrainedModel, *, capacity: int, step: DecodeStep | None, export: Export | None = None
) -> Runner:
    """llama.cpp on the CPU, with torch's number of threads and room for ``capacity`` tokens in each row.

    ``export`` writes the file that it reads. Weights, cache and attention are float32 for a float32 model; for another,
    weights and cache are float16, and llama.cpp decides whether attention is its flash attention, as it does by itself.
    InputError for a model on another device, which llama.cpp would be held against unequally.
    """
    if export is None:
        raise ValueError("llama.cpp reads a file: export has to write it")
    if model.device.type != "cpu":
        raise InputError(f"llama.cpp is run on the CPU, and the other engines on {model.device}")
    return _LlamaCpp(model, capacity, export)


class _LlamaCpp:
    """A server of llama.cpp's within this process, with as many slots as its largest batch has rows.

    It takes prompts as token ids and reads each anew every time. A batch's prompts are requests of their own that llama.cpp
    decodes together; it pads none.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, export: Export) -> None:
        self._model, self._capacity, self._export = model, capacity, export
        self._weights = "f32" if model.dtype == torch.float32 else "f16"
        self._slots, self._server = 0, None
        self._tokens: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def make_ready(self, batch: PromptBatch) -> EngineRun:
        """Writes and loads the file where that has not been done, and notes which tokens the batch is continued by."""
        if len(batch.prompts) > self._slots:
            self._load(len(batch.prompts))
        # Tokens come with probabilities alone, which take a pass over the vocabulary: no timed generation asks for them.
        answer, seconds = self._ask(batch, n_probs=1)
        steps = [
            choice["logprobs"]["content"] for choice in sorted(answer["choices"], key=lambda one: int(one["index"]))
        ]
        if {len(row) for row in steps} != {batch.num_tokens}:
            raise RuntimeError(
                f"llama.cpp tells {list(map(len, steps))} tokens, not {batch.num_tokens} for each prompt"
            )
        self._tokens[_key(batch)] = torch.tensor([[one["id"] for one in row] for row in steps])
        # It never writes a token that ends texts, which may be the likeliest all the same.
        likeliest = torch.tensor([[one["top_logprobs"][0]["id"] for one in row] for row in steps])
        differing = float((likeliest != self._own_likeliest(batch)).double().mean())
        return self._run_of(batch, answer, seconds, differing)

    @torch.inference_mode()
    def _own_likeliest(self, batch: PromptBatch) -> Tensor:
        """The likeliest tokens [B, N] by the model's own forward, each after the prompt and what llama.cpp wrote before."""
        model: Any = self._model
        found = []
        for prompt, written in zip(batch.prompts, self._tokens[_key(batch)], strict=True):
            ids = torch.tensor([[*prompt, *written[:-1].tolist()]])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=batch.num_tokens).logits
            found.append(logits[0].argmax(-1))
        return torch.stack(found)

    def generate(self, batch: PromptBatch) -> EngineRun:
        answer, seconds = self._ask(batch)
        return self._run_of(batch, answer, seconds)

    def _ask(self, batch: PromptBatch, **more: Any) -> tuple[Any, float]:
        """llama.cpp's answer to a batch, and the seconds that it took; RuntimeError for another number of tokens."""
        request = {
            "prompt": [list(prompt) for prompt in batch.prompts],
            "n_predict": batch.num_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            **more,
        }
        server: Any = self._server
        started = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - started
        if "error" in answer:
            raise RuntimeError(f"llama.cpp refuses the prompts: {answer['error'].get('message')}")
        ended = {str(choice["finish_reason"]) for choice in answer["choices"]}
        written, timed = len(answer["choices"]), answer["timings"]["predicted_n"]
        if ended != {"length"} or written != len(batch.prompts) or timed != batch.num_tokens:
            raise RuntimeError(
                f"llama.cpp wrote {timed} new tokens for the first of {written} prompts and ended by "
                f"{', '.join(sorted(ended))}, where {len(batch.prompts)} were to be continued by {batch.num_tokens} tokens"
            )
        return answer, seconds

    def _run_of(self, batch: PromptBatch, answer: Any, seconds: float, differing: float | None = None) -> EngineRun:
        # llama.cpp's own clock starts with the first new token, which leaves all before it, and what the request takes.
        decoding = answer["timings"]["predicted_ms"] / 1000 if batch.num_tokens > 1 else 0.0
        return EngineRun(self._tokens[_key(batch)], seconds - decoding, seconds, differing, self._weights)

    def _load(self, slots: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(self._export())
        settings.n_parallel = slots
        settings.n_ctx = slots * -(-(self._capacity + 1) // _CELLS) * _CELLS
        kind = xllamacpp.ggml_type.GGML_TYPE_F16
        if self._weights == "f32":
            kind = xllamacpp.ggml_type.GGML_TYPE_F32
            # Its flash attention rounds to float16 on the way: log-probabilities were off by 3e-3, and by 2e-6 without.
            settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = kind
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.n_gpu_layers = 0
        settings.cache_prompt, settings.cache_ram_mib = False, 0
        settings.fit_params, settings.warmup, settings.verbosity = False, False, 0
        self._server = None  # the earlier one, before there are two
        self._server, self._slots = xllamacpp.Server(settings), slots


def _key(batch: PromptBatch) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, batch.prompts))
