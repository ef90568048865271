"""One decoding step of a model, with its own weights and without what transformers does around them.

At batch 1 a step of a small model is mostly Python: module calls, masks made anew, wrappers. That time is the same whatever
has been pruned, so it hides what pruning saves. ``decode_step`` computes what the model's own forward computes for one new
token per row, from the same weights and the same cache, by as few operations as possible.

Dimension letters: B batch, E embedding, H query heads, K key-value heads, D head size, G query heads per key-value head,
R rotary features, T time, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pruning_comparison.models.heads import (
    LAYOUTS,
    EmptiedAttention,
    EmptiedCacheLayer,
    FamilyLayout,
    attend_packed,
    blocks,
    family_of,
    head_grid,
    input_major_weight,
    query_slots,
)

MOST_REORDERED_BYTES = 2**30
"""Models up to this size get a second copy of those weights that are read faster in another order, while they decode."""

LOGGER = logging.getLogger(__name__)

CLOSE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
)
"""How far a step's logits may be from the model's own, as a share of the largest of these: rounding of whole models, ten to
twenty times the spacing of numbers in half precision. A wrong layout is off by the logits themselves."""

_FINER: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
)
_OF_THE_FORWARDS_ERROR = 3
"""A step's rounding error may be so many times that of the model's forward; 0.5 to 2 times was measured
(``docs/decisions/0031-on-a-gpu.md``)."""

_ROTARY_POSITIONS = 256
_CAPACITY_STEP = 128
_CHECKED_TOKENS = 4


@dataclass(frozen=True)
class StepLayout:
    """What a family computes around its attention, for ``decode_step``. Paths lead from the model or, below, from a block.

    ``positions`` is a learned table, in which position 0 has row ``first_position``; ``rotary`` a module that makes cosines
    and sines; None where the family has none. ``mlp`` names the projections that read the MLP's input, the second of which
    is gated by the first where there are two. ``final_norm`` may be None in the model. ``key_norms`` names the norms of
    queries and keys by head.
    """

    embedding: str
    final_norm: str
    norms: tuple[str, str]
    mlp: tuple[str, ...]
    activation: str
    positions: str | None = None
    first_position: int = 0
    rotary: str | None = None
    key_norms: tuple[str, str] | None = None


_LLAMA = StepLayout(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    norms=("input_layernorm", "post_attention_layernorm"),
    mlp=("mlp.gate_proj", "mlp.up_proj"),
    activation="mlp.act_fn",
    rotary="model.rotary_emb",
)

STEP_LAYOUTS: Mapping[str, StepLayout] = MappingProxyType(
    {
        "gpt2": StepLayout(
            embedding="transformer.wte",
            positions="transformer.wpe",
            final_norm="transformer.ln_f",
            norms=("ln_1", "ln_2"),
            mlp=("mlp.c_fc",),
            activation="mlp.act",
        ),
        "gpt_neox": StepLayout(
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            norms=("input_layernorm", "post_attention_layernorm"),
            mlp=("mlp.dense_h_to_4h",),
            activation="mlp.act",
            rotary="gpt_neox.rotary_emb",
        ),
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "opt": StepLayout(
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            first_position=2,
            final_norm="model.decoder.final_layer_norm",
            norms=("self_attn_layer_norm", "final_layer_norm"),
            mlp=("fc1",),
            activation="activation_fn",
        ),
        "qwen2": _LLAMA,
        "qwen3": StepLayout(**{**vars(_LLAMA), "key_norms": ("q_norm", "k_norm")}),
    }
)
"""By ``model_type``, as ``LAYOUTS``. A family that is missing here decodes by its own forward."""


class ReservedCacheLayer(DynamicLayer):
    """The cache of one layer with room for ``capacity`` tokens, reserved when its first keys show how many heads it has.

    transformers' own layer grows by copying all it holds at every step. ``room`` [B, 2, K, capacity, D] holds keys, then
    values; ``keys`` and ``values`` are views of what is filled, [B, K, T, D], so that layers of one cache may differ in K.
    """

    room: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new keys and values [B, K, T, D] and returns all so far. ValueError where they exceed the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, size = key_states.shape
            self.room = key_states.new_empty(batch, 2, heads, self.capacity, size)
        start, self.seen = self.seen, self.seen + key_states.shape[-2]
        if self.seen > self.capacity:
            raise ValueError(f"{self.seen} tokens do not fit a cache that was reserved for {self.capacity}")
        self.room[:, 0, :, start : self.seen] = key_states
        self.room[:, 1, :, start : self.seen] = value_states
        self.keys, self.values = self.room[:, 0, :, : self.seen], self.room[:, 1, :, : self.seen]
        return self.keys, self.values

    def append(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """``update`` for one token: keys and values together, [B, 2, K, D]."""
        self.room[:, :, :, self.seen] = pair
        self.seen += 1
        self.keys, self.values = self.room[:, 0, :, : self.seen], self.room[:, 1, :, : self.seen]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen


def reserved_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """The cache that the model would make itself, with room for ``capacity`` tokens in every layer that keeps them all."""
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedCacheLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def decode_step(
    model: PreTrainedModel, reordered: dict[int, Tensor] | None = None, *, static: bool | None = None
) -> DecodeStep | None:
    """What makes the next token's logits of this model, or None where only its own forward can be trusted to.

    That is on a CPU in float32, or on a CUDA GPU in any precision, for a family in ``STEP_LAYOUTS``, without hooks, in
    layers whose cache keeps all tokens. Its logits are compared with the model's own on a few tokens before it is handed
    out. Where they differ by more than ``CLOSE``, the model may amplify rounding: then a copy of it in a finer precision
    has to agree with its own step, and the step has to be about as exact as the model's forward, measured by that copy.
    ``reordered`` holds weights that were put in another order, by the identity of the parameter: models that share
    parameters share those as well.

    ``static`` says whether its cache stays in its place, so that the step can be replayed as a CUDA graph; by default on a
    GPU. Where such a step cannot be recorded, or gives other logits than the model, a warning says so and the model's own
    forward is left.

    It works on the weights as they are now: make a new one after changing them.
    """
    layout = STEP_LAYOUTS.get(str(family_of(model.config)))
    if layout is None or not _can_be_taken_apart(model, layout):
        return None
    on_gpu = model.device.type == "cuda"
    try:
        step = DecodeStep(
            model, layout, {} if reordered is None else reordered, static=on_gpu if static is None else static
        )
    except (AttributeError, TypeError):
        return None  # a part that this version of the family has not
    expected = _logits_at_once(model)
    found = _logits_by_steps(step, model)
    step.release()
    difference = math.inf if found is None else _difference(found, expected)
    if difference <= CLOSE[model.dtype]:
        return step
    if found is not None and math.isfinite(difference) and _is_as_exact(found, expected, model, layout, step.static):
        return step
    if on_gpu and math.isfinite(difference):
        _warn_once(
            "models decode by their own forward: the logits of a recorded step differ from it by more than rounding"
        )
    return None


@lru_cache
def _warn_once(message: str) -> None:
    LOGGER.warning(message)


def decode_steps(models: Mapping[str, PreTrainedModel]) -> dict[str, DecodeStep | None]:
    """``decode_step`` for models that are compared: of all, or of none."""
    reordered: dict[int, Tensor] = {}
    steps: dict[str, DecodeStep | None] = {}
    for name, model in models.items():
        steps[name] = decode_step(model, reordered)
        if steps[name] is None:
            return dict.fromkeys(models)
    return steps


class DecodeStep:
    """Logits of the next token of every row, from the model's weights; see ``decode_step``.

    With ``static``, generations decode by a ``StaticStep``, which ``reserved`` hands out.
    """

    def __init__(
        self, model: PreTrainedModel, layout: StepLayout, reordered: dict[int, Tensor], *, static: bool = False
    ) -> None:
        self.static = static
        self._static_steps: list[tuple[StaticStep, weakref.ref[Any]]] = []
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = _Weights(reordered, model.device.type == "cpu" and size <= MOST_REORDERED_BYTES)
        self.embedding = model.get_parameter(f"{layout.embedding}.weight")
        table = None if layout.positions is None else model.get_parameter(f"{layout.positions}.weight")
        self.positions = None if table is None else table[layout.first_position :]
        self.rotary: Any = None if layout.rotary is None else model.get_submodule(layout.rotary)
        self.rotations: tuple[Tensor, Tensor] | None = None
        self.partner: Tensor | None = None
        self.layers = [_Layer(model, number, layout, weights) for number in range(len(blocks(model)))]
        final: Any = model
        for name in layout.final_norm.split("."):
            final = getattr(final, name)
        self.final_norm = _norm(final)
        self.head = _project(weights, model.get_output_embeddings())

    def reserve(self, capacity: int) -> None:
        """Makes ready for ``capacity`` positions, so that no step has to."""
        if self.rotary is None or (self.rotations is not None and len(self.rotations[0]) >= capacity):
            return
        count = -(-capacity // _ROTARY_POSITIONS) * _ROTARY_POSITIONS
        cosines, sines = self.rotary(self.embedding, torch.arange(count, device=self.embedding.device)[None])
        size, turned = self.layers[0].head_size, cosines.shape[-1]
        # Features that are not turned have cosine 1 and sine 0; the first half of the others takes the second's negative.
        whole = cosines.new_ones(count, size), cosines.new_zeros(count, size)
        whole[0][:, :turned], whole[1][:, :turned] = cosines[0], sines[0]
        whole[1][:, : turned // 2] *= -1
        self.rotations = whole
        half = torch.arange(turned, device=cosines.device).roll(turned // 2)
        self.partner = torch.cat([half, torch.arange(turned, size, device=cosines.device)])

    def reserved(self, owner: Any, rows: int, capacity: int) -> StaticStep:
        """A static step for ``rows`` and at least ``capacity`` tokens, with an empty cache: the ``owner``'s until that ends
        it, or is gone. Steps that nobody owns are taken over, because recording one takes as long as many tokens.
        """
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        for number, (known, user) in enumerate(self._static_steps):
            free = known.ended or user() is None
            if free and known.rows == rows and known.capacity == capacity:
                self._static_steps[number] = known, weakref.ref(owner)
                known.clear()
                return known
        made = StaticStep(self, rows, capacity)
        self._static_steps.append((made, weakref.ref(owner)))
        return made

    def release(self) -> None:
        """Lets go of all static steps that nobody uses, and their memory."""
        self._static_steps = [
            (known, user) for known, user in self._static_steps if not known.ended and user() is not None
        ]

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """Logits [B, V] after ``tokens`` [B] at ``positions`` [B], which are added to the cache.

        ``mask`` [B, 1, 1, T] is added to the scores of attention, T counting the new token; None where all is visible.
        """
        hidden = nn.functional.embedding(tokens, self.embedding)
        if self.positions is not None:
            hidden = hidden + nn.functional.embedding(positions, self.positions)
        turn: tuple[Tensor, Tensor, Tensor | None] | None = None
        if self.rotations is not None:
            cosines, sines = (table[positions].unsqueeze(1) for table in self.rotations)
            turn = cosines, sines, self.partner
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, turn, kept, mask)
        return self.head(self.final_norm(hidden))


class _StaticRoom(DynamicLayer):
    """The cache of one layer in a place that never changes: ``room`` [2, B, K, capacity, D], keys and then values.

    A step reads all of it, whatever is filled, and a mask hides the rest.
    """

    def __init__(self, room: Tensor, place: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.place = room, place
        self.seen = 0
        self.is_initialized = True
        self.keys, self.values = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the prompt's keys and values [B, K, T, D] and returns all so far."""
        start, self.seen = self.seen, self.seen + key_states.shape[-2]
        self.room[0, :, :, start : self.seen] = key_states
        self.room[1, :, :, start : self.seen] = value_states
        return self.room[0, :, :, : self.seen], self.room[1, :, :, : self.seen]

    def append(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token, keys and values together [B, 2, K, D], where ``place`` says, and returns the whole room."""
        self.room.index_copy_(3, self.place, pair.transpose(0, 1).unsqueeze(3))
        keys, values = self.room
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen


class StaticStep:
    """A decoding step all of whose tensors stay where they are: on a GPU it is recorded once, and replayed for each token.

    A pruned model's shapes are fixed layer by layer, so this holds for any heads. ``cache`` is what the model's forward
    reads the prompt into; ``begin`` then says what of it is visible, and each call decodes one token of every row. What is
    visible and where a token is written are tensors, advanced within the step. Elsewhere than on a GPU the same step is
    called as it is.
    """

    @torch.inference_mode()
    def __init__(self, step: DecodeStep, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.ended = False
        step.reserve(capacity)
        # What is recorded reads weights and rotations where they are now. A copy keeps them, but not what keeps this step.
        self._step = copy.copy(step)
        self._step._static_steps = []
        like = step.embedding
        device = like.device
        sizes = [
            0 if layer.emptied else 2 * rows * layer.kv_heads * capacity * layer.head_size for layer in step.layers
        ]
        # In one piece, so that one operation empties it: what is left there may be infinite, and no mask can hide that.
        self._all_rooms = like.new_zeros(sum(sizes))
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        rooms = self._all_rooms.split(sizes)
        self.cache: Any = DynamicCache()
        self.cache.layers = [
            EmptiedCacheLayer()
            if layer.emptied
            else _StaticRoom(room.view(2, rows, layer.kv_heads, capacity, layer.head_size), self._place)
            for layer, room in zip(step.layers, rooms, strict=True)
        ]
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._hidden_before = like.new_zeros(rows, 1, 1, capacity)
        self._hidden = like.new_full((), -torch.inf)
        self._slots = torch.arange(capacity, device=device)
        self._graph: Any = None
        if device.type == "cuda":
            self._try_to_record(device)

    @property
    def recorded(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self._graph is not None

    @torch.inference_mode()
    def clear(self) -> None:
        """Empties the cache."""
        self.ended = False
        self._all_rooms.zero_()
        for layer in self.cache.layers:
            layer.seen = 0

    @torch.inference_mode()
    def begin(self, prompt: int, positions: Tensor, visible: Tensor | None) -> None:
        """After the model has read ``prompt`` tokens into the cache: the next token's ``positions`` [B], and which of the
        prompt's tokens are ``visible`` [B, prompt]; all where None.
        """
        self._place.fill_(prompt)
        self._positions.copy_(positions)
        self._hidden_before.zero_()
        if visible is not None:
            self._hidden_before[..., :prompt].masked_fill_(visible[:, None, None] == 0, -torch.inf)
        for layer in self.cache.layers:
            layer.seen = prompt

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after ``tokens`` [B], to be read before the next call. ValueError where the cache is full."""
        seen = self.cache.layers[0].seen
        if seen >= self.capacity:
            raise ValueError(f"{seen + 1} tokens do not fit a cache that was reserved for {self.capacity}")
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._logits = self._next()
        else:
            self._graph.replay()
        for layer in self.cache.layers:
            layer.seen = seen + 1
        return self._logits

    def end(self) -> None:
        """Leaves the cache's keys and values as what has been filled, and the step to whoever needs one."""
        self.ended = True
        for layer in self.cache.layers:
            if isinstance(layer, _StaticRoom):
                layer.keys, layer.values = (part[:, :, : layer.seen] for part in layer.room)

    def _next(self) -> Tensor:
        """The step itself: what is recorded."""
        mask = torch.where(self._slots <= self._place, self._hidden_before, self._hidden)
        logits = self._step(self._tokens, self._positions, self.cache, mask)
        self._place += 1
        self._positions += 1
        return logits

    def _try_to_record(self, device: torch.device) -> None:
        """Records the step as a CUDA graph. Where that fails, a warning says so and calls are plain ones."""
        collects = gc.isenabled()
        gc.disable()  # what is collected meanwhile might free memory of the GPU, which ends a recording
        try:
            with torch.cuda.device(device):
                self._record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graph = None
            _warn_once(f"decoding steps are not recorded as CUDA graphs on this GPU: {str(error).splitlines()[0]}")
        finally:
            if collects:
                gc.enable()
        self.clear()

    def _record(self) -> None:
        """Records the step, if a replay then gives the logits of a plain call; RuntimeError if not."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries make themselves ready at their first calls, which a graph cannot hold
                self._to_start()
                plain = self._next()
            self._to_start()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._logits = self._next()
            finally:
                graph.capture_end()
            self._to_start()
            self._logits.fill_(torch.nan)
            graph.replay()
            size, difference = float(plain.abs().max()), float((self._logits - plain).abs().max())
        torch.cuda.current_stream().wait_stream(aside)
        # Logits that are no numbers either way are found out where they are compared with the model's.
        if math.isfinite(size) and not difference <= CLOSE[plain.dtype] * size:
            raise RuntimeError(f"a replay differs by {difference:.3g} from a plain call, whose largest is {size:.3g}")
        self._graph = graph

    def _to_start(self) -> None:
        self._place.zero_()
        self._positions.zero_()


Function = Callable[[Tensor], Tensor]


class _Weights:
    """Weights as [inputs, outputs], in the order in which a product with one row reads them fastest.

    The longer side lies together: on CPUs the other order took up to twice as long in products with a single row
    (``docs/decisions/0038-speed-measured-and-tried.md``).
    """

    def __init__(self, reordered: dict[int, Tensor], allowed: bool) -> None:
        self.reordered, self.allowed = reordered, allowed

    def of(self, weight: Tensor, parameter: Tensor | None) -> Tensor:
        """``weight`` [inputs, outputs]; ``parameter`` is what it is a view of, None for a copy."""
        inputs, outputs = weight.shape
        target = weight if outputs > inputs else weight.T
        if inputs == outputs or target.is_contiguous() or not self.allowed:
            return weight
        key = None if parameter is None else id(parameter)
        if key is None or key not in self.reordered:
            made = target.contiguous() if outputs > inputs else target.contiguous().T
            if key is None:
                return made
            self.reordered[key] = made
        return self.reordered[key]


def _project(weights: _Weights, module: Any) -> Function:
    """What a projection module computes, for [B, inputs]."""
    matrix = weights.of(input_major_weight(module), module.weight)
    return _product(matrix, getattr(module, "bias", None))


def _product(matrix: Tensor, bias: Tensor | None) -> Function:
    if bias is None:
        return lambda rows: torch.mm(rows, matrix)
    return lambda rows: torch.addmm(bias, rows, matrix)


def _norm(module: Any) -> Function:
    """What a norm module computes; TypeError for one of an unknown kind."""
    if module is None or isinstance(module, nn.Identity):
        return lambda rows: rows
    if isinstance(module, nn.LayerNorm):
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda rows: nn.functional.layer_norm(rows, shape, weight, bias, eps)
    if type(module).__name__.endswith("RMSNorm"):
        size, scale, floor = module.weight.shape, module.weight, module.variance_epsilon
        return lambda rows: nn.functional.rms_norm(rows, size, scale, floor)
    raise TypeError(f"a norm of the class {type(module).__name__} is not known")


_ACTIVATIONS: Mapping[str, Function] = MappingProxyType(
    {
        "NewGELUActivation": partial(nn.functional.gelu, approximate="tanh"),
        "SiLUActivation": nn.functional.silu,
        "SiLU": nn.functional.silu,
    }
)
"""By the name of the class, where one operation does what the module needs several for."""


class _Layer:
    """One block."""

    def __init__(self, model: PreTrainedModel, number: int, step: StepLayout, weights: _Weights) -> None:
        layout, grid = LAYOUTS[str(family_of(model.config))], head_grid(model.config)
        block = blocks(model)[number]
        attention: Any = block.get_submodule(layout.attention)
        self.head_size = grid.head_size
        self.first_norm, self.second_norm = (_norm(block.get_submodule(name)) for name in step.norms)
        self.parallel = layout.parallel is not None and bool(getattr(model.config, layout.parallel))
        self.norm_after = layout.norm_after is not None and not getattr(model.config, layout.norm_after)
        self.inner = [_project(weights, block.get_submodule(name)) for name in step.mlp]
        act = block.get_submodule(step.activation)
        self.activation: Function = _ACTIVATIONS.get(type(act).__name__, act)
        self.outer = _project(weights, block.get_submodule(layout.mlp_output))
        self.emptied = isinstance(attention, EmptiedAttention)
        if self.emptied:
            self.left: Tensor | None = attention.bias
            return
        self.scaling = attention.scaling
        matrix, bias, parameter = _mixed(attention, layout)
        self.mixed = _product(weights.of(matrix, parameter), bias)
        self.output = _project(weights, attention.get_submodule(layout.output))
        self.heads = input_major_weight(attention.get_submodule(layout.output)).shape[0] // grid.head_size
        self.kv_heads = (matrix.shape[1] // grid.head_size - self.heads) // 2
        self.slots: tuple[Tensor, int] | None = query_slots(attention) if hasattr(attention, "kv_index") else None
        self.key_scale: Tensor | None = None
        if step.key_norms is not None:
            query, key = (attention.get_submodule(name) for name in step.key_norms)
            self.key_eps = query.variance_epsilon
            self.key_scale = torch.cat(
                [query.weight.expand(self.heads, -1), key.weight.expand(self.kv_heads, -1)]
            )  # [H + K, D]

    def __call__(self, hidden: Tensor, turn: Any, kept: Any, mask: Tensor | None) -> Tensor:
        """The residual stream [B, E] after the block; the token is added to ``kept``, the layer's cache."""
        if self.norm_after:
            after = self.first_norm(hidden + self.attend(hidden, turn, kept, mask))
            return self.second_norm(after + self.mlp(after))
        written = self.attend(self.first_norm(hidden), turn, kept, mask)
        if self.parallel:
            return self.mlp(self.second_norm(hidden)) + written + hidden
        hidden = hidden + written
        return hidden + self.mlp(self.second_norm(hidden))

    def mlp(self, rows: Tensor) -> Tensor:
        inner = self.activation(self.inner[0](rows))
        if len(self.inner) == 2:
            inner = inner * self.inner[1](rows)
        return self.outer(inner)

    def attend(self, rows: Tensor, turn: Any, kept: Any, mask: Tensor | None) -> Tensor:
        """What attention writes, [B, E], or what can be added to that."""
        if self.emptied:
            kept.seen += 1
            return rows.new_zeros(()) if self.left is None else self.left
        batch, heads, kv_heads, size = len(rows), self.heads, self.kv_heads, self.head_size
        mixed = self.mixed(rows).view(batch, heads + 2 * kv_heads, size)
        if turn is None:
            queries, pair = mixed[:, :heads], mixed[:, heads:]
        else:
            turned = mixed[:, : heads + kv_heads]
            if self.key_scale is not None:
                turned = nn.functional.rms_norm(turned, (size,), None, self.key_eps) * self.key_scale
            cosines, sines, partner = turn
            turned = torch.addcmul(turned * cosines, turned.index_select(-1, partner), sines)
            queries = turned[:, :heads]
            pair = torch.cat([turned[:, heads:], mixed[:, heads + kv_heads :]], 1)
        keys, values = kept.append(pair.view(batch, 2, kv_heads, size))
        if self.slots is not None:
            seen = attend_packed(queries, keys, values, mask, self.scaling, self.slots)
        else:
            stacked = queries.view(batch, kv_heads, heads // kv_heads, size)
            seen = nn.functional.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=self.scaling)
        return self.output(seen.reshape(batch, -1))


def _mixed(attention: Any, layout: FamilyLayout) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries, keys and values as one projection, all queries first: matrix [E, (H + 2 K) D] and bias.

    Last the parameter that the matrix is a view of, None where it is a copy.
    """
    if layout.fused is None:
        parts = [attention.get_submodule(name) for name in (layout.query, layout.key, layout.value)]
        matrix = torch.cat([input_major_weight(part) for part in parts], 1)
        return matrix, None if parts[0].bias is None else torch.cat([part.bias for part in parts]), None
    fused = attention.get_submodule(layout.query)
    matrix, bias = input_major_weight(fused), fused.bias
    if layout.fused == "parts":
        return matrix, bias, fused.weight
    size = attention.head_size
    order = torch.arange(matrix.shape[1], device=matrix.device).view(-1, 3, size).transpose(0, 1).flatten()
    return matrix[:, order], None if bias is None else bias[order], None


def _can_be_taken_apart(model: PreTrainedModel, layout: StepLayout) -> bool:
    """Whether nothing but weights decides what the model computes, where and how ``DecodeStep`` can compute it."""
    dtypes, where = {p.dtype for p in model.parameters()}, {p.device for p in model.parameters()}
    if model.training or len(dtypes) != 1 or len(where) != 1:
        return False
    if model.device.type != "cuda" and (model.device.type != "cpu" or dtypes != {torch.float32}):
        return False
    if model.get_parameter(f"{layout.embedding}.weight").shape[1] != model.config.hidden_size:
        return False  # tokens are embedded narrowly, and projected
    rotary = getattr(model.config, "rope_parameters", None)
    if layout.rotary is not None and (rotary or {}).get("rope_type", "default") not in ("default", "linear", "llama3"):
        return False  # others change with the length of the text
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _checked_tokens(model: PreTrainedModel) -> Tensor:
    """A few tokens of two rows, [2, T]: the same for every model of one vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


@torch.inference_mode()
def _logits_at_once(model: PreTrainedModel) -> Tensor:
    """Logits [2, T, V] of the checked tokens by the model's own forward."""
    logits: Tensor = model(input_ids=_checked_tokens(model), use_cache=False).logits
    return logits


@torch.inference_mode()
def _logits_by_steps(step: DecodeStep, model: PreTrainedModel) -> Tensor | None:
    """The same logits [2, T, V], all after the first token by ``step``; None where it cannot be recorded on a GPU, or the
    cache has counted wrong.
    """
    ids = _checked_tokens(model)
    static = step.reserved(ids, 2, _CHECKED_TOKENS) if step.static else None
    cache: Any = reserved_cache(model, _CHECKED_TOKENS) if static is None else static.cache
    found = [model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]]
    if static is None:
        step.reserve(_CHECKED_TOKENS)
        for at in range(1, _CHECKED_TOKENS):
            found.append(step(ids[:, at], torch.full_like(ids[:, 0], at), cache, None))
    else:
        static.begin(1, torch.ones_like(ids[:, 0]), None)
        if model.device.type == "cuda" and not static.recorded:
            return None
        found += [static(ids[:, at]).clone() for at in range(1, _CHECKED_TOKENS)]
    if any(layer.get_seq_length() != _CHECKED_TOKENS for layer in cache.layers):
        return None
    return torch.stack(found, 1)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected logit; infinite where there are other than finite ones."""
    found, expected = found.to(torch.float64), expected.to(torch.float64)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return difference if math.isfinite(difference) else math.inf


def _is_as_exact(found: Tensor, expected: Tensor, model: PreTrainedModel, layout: StepLayout, static: bool) -> bool:
    """Whether it is rounding alone that sets the logits of a step, ``found``, apart from those of the forward, ``expected``.

    A copy of the model in a finer precision tells: there the step has to be within ``CLOSE``, which no wrong layout is, and
    the copy's logits are exact enough to measure the errors of both by.
    """
    finer = _FINER.get(model.dtype)
    if finer is None:
        return False
    try:
        converted: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach().to(finer), requires_grad=False)
            for parameter in model.parameters()
        }
        fine = copy.deepcopy(model, converted)
        exact = _logits_at_once(fine)
        by_steps = _logits_by_steps(DecodeStep(fine, layout, {}, static=static), fine)
    except torch.OutOfMemoryError:
        return False
    if by_steps is None or not _difference(by_steps, exact) <= CLOSE[finer]:
        return False
    return _difference(found, exact) <= _OF_THE_FORWARDS_ERROR * _difference(expected, exact) < math.inf
