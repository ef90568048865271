"""Recovery: some steps of training towards the dense model's predictions, by the same rules for every variant.

Dimension letters: N windows, B batch, T time, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pruning_comparison.models.devices import gains_from_bfloat16
from pruning_comparison.models.heads import blocks, mlp_output_projections, output_projections
from pruning_comparison.pruning.surgery import sharing_copy
from pruning_comparison.spec import AUTO, RECOVERY_GRID, RECOVERY_RATES

LOGGER = logging.getLogger(__name__)

NEWS_S = 30.0
"""How often training says how far it is."""

_ROWS = {"cpu": 64}
"""Tokens whose distributions are held in float32 at once: on a processor, as many as stay in its cache."""
_MOST_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Logits of so many numbers are made at once; a batch with more is trained on in parts, whose gradients add up."""


@dataclass(frozen=True)
class RecoveryTrial:
    """One training of a grid, judged on held-out windows: mean KL to the dense model and loss, in nats per token."""

    learning_rate: float
    parameters: str
    held_out_kl_nats: float
    held_out_loss_nats: float
    seconds: float


@dataclass(frozen=True)
class RecoveryCost:
    """What recovery cost: seconds, and the tokens it has trained on, repeats included, in all trials together.

    ``learning_rate`` and ``parameters`` are those of the model that was taken; ``trials`` all that were tried, empty where
    there was nothing to choose.
    """

    seconds: float
    tokens: int
    learning_rate: float
    parameters: str
    trials: tuple[RecoveryTrial, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What was chosen and tried, as plain values."""
        return {
            "learning_rate": self.learning_rate,
            "parameters": self.parameters,
            "trials": [asdict(trial) for trial in self.trials],
        }


@dataclass
class _Progress:
    """How far a recovery is, as its checkpoint keeps it: finished trials, and a step within the next one."""

    trials: list[RecoveryTrial] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    seconds_of_trial: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    current: dict[str, Tensor] = field(default_factory=dict)


def recover(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float | str,
    generator: torch.Generator,
    parameters: str = "all",
    held_out: Tensor | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 60.0,
    identity: str = "",
    what: str = "recovery",
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[PreTrainedModel, RecoveryCost]:
    """A copy of a pruned model after ``steps`` of distillation from its dense original.

    The loss is the Kullback-Leibler divergence of the pruned model's next-token distribution from the dense model's at every
    position of ``windows`` [N, T] (Hinton et al. 2015, "Distilling the knowledge in a neural network", at temperature 1).
    AdamW without weight decay trains what the blocks consist of (``parameters`` "all"), or the output projections of
    attention and MLP, norms and biases alone ("restricted"); embeddings and output head stay shared with ``pruned``. The
    learning rate rises over the first tenth of the steps and falls to zero along a cosine; gradients are clipped at norm 1.
    Products are taken in bfloat16 where that is a gain; weights and moments stay as they are. ``generator`` draws the
    windows, so that every variant of an iteration trains on the same ones in the same order.

    With "auto" for ``learning_rate``, ``parameters`` or both, every combination of ``RECOVERY_RATES`` and
    ``RECOVERY_GRID`` is trained alike, and the one with the least divergence on ``held_out`` windows [N', T] is taken.

    ``checkpoint`` is a file in which the training is kept every ``checkpoint_every_s`` seconds. A training of the same
    ``identity`` goes on from there after it was interrupted, and ends with the same weights; the file is then removed.
    ``what`` names the training in its news; ``on_step`` is called after every step, with its number within the trial.
    ValueError where there are no windows, or none to choose by.
    """
    grid = recovery_grid(learning_rate, parameters)
    if not len(windows) or (len(grid) > 1 and (held_out is None or not len(held_out))):
        raise ValueError("recovery needs windows to train on and, where rate or parameters are chosen, held-out ones")
    order = _drawn(len(windows), steps * batch_size, generator)
    kept = None if checkpoint is None else _Checkpoint(checkpoint, identity, checkpoint_every_s)
    progress = _Progress() if kept is None else kept.load(pruned.device)
    news = _News(what, steps, len(grid), progress.seconds)
    while len(progress.trials) < len(grid):
        rate, which = grid[len(progress.trials)]
        began = time.perf_counter() - progress.seconds_of_trial
        student, trained = student_of(pruned, which)
        training = _Training(dense, student, trained, steps, rate)
        training.restore(progress.current)
        for step in range(progress.step, steps):
            ids = windows[order[step * batch_size : (step + 1) * batch_size]]
            loss = training.step(ids, step)
            progress.step = step + 1
            news.tell(len(progress.trials), step + 1, loss)
            if kept is not None:
                kept.keep(progress, training, time.perf_counter() - began)
            on_step(step + 1)
        divergence = math.nan
        if len(grid) > 1:
            assert held_out is not None
            divergence, loss_nats = held_out_figures(dense, student, held_out)
        else:
            loss_nats = math.nan
        seconds = time.perf_counter() - began
        before = [trial.held_out_kl_nats for trial in progress.trials]
        trial = RecoveryTrial(rate, which, divergence, loss_nats, seconds)
        if not before or divergence < _least(before):
            progress.best = training.weights()
        progress = _Progress([*progress.trials, trial], 0, progress.seconds + seconds, 0.0, progress.best)
        if kept is not None and len(progress.trials) < len(grid):
            kept.keep(progress, None, 0.0, now=True)
    trials = progress.trials
    chosen = trials[0] if len(trials) == 1 else min(trials, key=lambda one: _or_infinite(one.held_out_kl_nats))
    student, trained = student_of(pruned, chosen.parameters)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(progress.best[name])
    student.requires_grad_(False)
    if kept is not None:
        kept.remove()
    tokens = len(trials) * steps * batch_size * windows.shape[1]
    tried = tuple(trials) if len(grid) > 1 else ()
    return student, RecoveryCost(progress.seconds, tokens, chosen.learning_rate, chosen.parameters, tried)


def recovery_grid(learning_rate: float | str, parameters: str) -> list[tuple[float, str]]:
    """The combinations of rate and parameters that are tried: one, unless a choice is left open ("auto")."""
    rates = RECOVERY_RATES if learning_rate == AUTO else (float(learning_rate),)
    return [(rate, which) for which in (RECOVERY_GRID if parameters == AUTO else (parameters,)) for rate in rates]


def student_of(pruned: PreTrainedModel, parameters: str) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """A copy of a pruned model to train, and its trained parameters by name; everything else it shares with ``pruned``.

    Parameters of one dimension are norms and biases. ValueError for a name that is neither "all" nor "restricted".
    """
    if parameters not in RECOVERY_GRID:
        raise ValueError(f"unknown parameters {parameters!r}; choose one of {', '.join(RECOVERY_GRID)}")
    projections = [one for one in (*output_projections(pruned), *mlp_output_projections(pruned)) if one is not None]
    written = {id(parameter) for module in projections for parameter in module.parameters()}
    shared: dict[int, Any] = {id(one): one for one in (*pruned.parameters(), *pruned.buffers())}
    for block in blocks(pruned):
        for parameter in block.parameters():
            if parameters == "all" or parameter.ndim == 1 or id(parameter) in written:
                shared[id(parameter)] = nn.Parameter(parameter.detach().clone())
    student = copy.deepcopy(pruned, shared)
    own = {id(one) for one in shared.values()} - {id(one) for one in (*pruned.parameters(), *pruned.buffers())}
    return student, {name: one for name, one in student.named_parameters() if id(one) in own}


@torch.inference_mode()
def held_out_figures(dense: PreTrainedModel, other: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    """Mean KL(dense || other) and mean loss of ``other`` over ``windows`` [N, T], in nats per token."""
    divergence = loss = 0.0
    for window in windows.to(dense.device):
        p, q = (model(input_ids=window[None], use_cache=False).logits[0, :-1] for model in (dense, other))
        divergence += float(_divergence(q, p))
        loss += float(nn.functional.cross_entropy(q.float(), window[1:], reduction="sum"))
    tokens = len(windows) * (windows.shape[1] - 1)
    return divergence / tokens, loss / tokens


class _Training:
    """AdamW on the divergence of a student from the dense model."""

    def __init__(
        self,
        dense: PreTrainedModel,
        student: PreTrainedModel,
        trained: dict[str, nn.Parameter],
        steps: int,
        learning_rate: float,
    ) -> None:
        self._in_bfloat16 = gains_from_bfloat16(dense)
        self._dense = _rounded(dense) if self._in_bfloat16 else dense
        self._student, self._trained = student, trained
        self._steps, self._rate, self._warmup = steps, learning_rate, max(1, steps // 10)
        self._optimizer = torch.optim.AdamW(
            trained.values(), lr=learning_rate, weight_decay=0.0, fused=dense.device.type in ("cpu", "cuda")
        )

    def step(self, ids: Tensor, number: int) -> Tensor:
        """Trains on windows [B, T]; the mean divergence before the step, in nats per token."""
        ids = ids.to(self._dense.device)
        rise = min(1.0, (number + 1) / self._warmup)
        fall = (1 + math.cos(math.pi * number / self._steps)) / 2
        self._optimizer.param_groups[0]["lr"] = self._rate * rise * fall
        self._optimizer.zero_grad()
        total = torch.zeros((), device=ids.device)
        rows = max(1, _MOST_LOGITS.get(ids.device.type, 2**26) // (ids.shape[1] * self._dense.config.vocab_size))
        for part in ids.split(rows):
            with torch.enable_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=self._in_bfloat16):
                with torch.no_grad():
                    targets = self._dense(input_ids=part, use_cache=False).logits.flatten(0, 1)
                predictions = self._student(input_ids=part, use_cache=False).logits.flatten(0, 1)
                loss = _divergence(predictions, targets) / ids.numel()
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()
        return total

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained parameters, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, by names under which ``restore`` finds them."""
        found = {f"weight/{name}": parameter.detach() for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            found |= {f"{what}/{name}": value for what, value in self._optimizer.state[parameter].items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from what ``state`` has kept; an empty one is a new beginning."""
        with torch.no_grad():
            for key, value in state.items():
                what, _, name = key.partition("/")
                if what == "weight":
                    self._trained[name].copy_(value)
                else:
                    self._optimizer.state[self._trained[name]][what] = value


def _rounded(dense: PreTrainedModel) -> PreTrainedModel:
    """The same model with the weights of its products in bfloat16, which autocast would round them to at every step.

    All else, embeddings among it, is shared with ``dense`` and stays as it is, and so do predictions under autocast.
    """
    copied = sharing_copy(dense)
    for module in copied.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
    return copied


class _Divergence(torch.autograd.Function):
    """KL(dense || student), summed over tokens, in float32 from logits [S, V] of any precision.

    Its gradient, softmax(student) - softmax(dense), is computed along with it, a few rows at a time, so that no more than
    one tensor of the logits' size is kept.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, dense: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        rows = _ROWS.get(student.device.type, max(1, 2**28 // student.shape[-1]))
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            p, q = dense[part].float().log_softmax(-1), student[part].float().log_softmax(-1)
            probabilities = p.exp()
            total += p.sub_(q).mul_(probabilities).sum(-1).double().sum()
            gradient[part] = q.exp_().sub_(probabilities)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None


def _divergence(student: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || student) of logits [S, V], summed over tokens, float32."""
    total: Tensor = _Divergence.apply(student, dense)  # type: ignore[no-untyped-call]
    return total


class _Checkpoint:
    """A training in one safetensors file, replaced whole, so that whoever goes on finds all of it or what was before."""

    def __init__(self, path: Path, identity: str, every_s: float) -> None:
        self._path, self._identity, self._every_s = path, identity, every_s
        self._last = time.perf_counter()

    def load(self, device: torch.device) -> _Progress:
        """What is kept of a training of the same identity; a beginning where there is none."""
        try:
            with safe_open(self._path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["progress"])
                if told["identity"] != self._identity:
                    return _Progress()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return _Progress()
        LOGGER.info("recovery goes on from %s", self._path)
        # Adam's count of steps stays where Adam keeps it, which is not on the device.
        placed = {name: one if "/step/" in name else one.to(device) for name, one in tensors.items()}
        best, current = (
            {name.removeprefix(f"{part}/"): one for name, one in placed.items() if name.startswith(f"{part}/")}
            for part in ("best", "current")
        )
        return _Progress(
            [RecoveryTrial(**trial) for trial in told["trials"]],
            told["step"],
            told["seconds"],
            told["seconds_of_trial"],
            best,
            current,
        )

    def keep(
        self, progress: _Progress, training: _Training | None, seconds_of_trial: float, *, now: bool = False
    ) -> None:
        """Writes the file, if it is time to; ``training`` is the one under way."""
        if not now and time.perf_counter() - self._last < self._every_s:
            return
        self._last = time.perf_counter()
        told = {
            "identity": self._identity,
            "trials": [asdict(trial) for trial in progress.trials],
            "step": progress.step,
            "seconds": progress.seconds,
            "seconds_of_trial": seconds_of_trial,
        }
        tensors = {f"best/{name}": one for name, one in progress.best.items()}
        if training is not None:
            tensors |= {f"current/{name}": one for name, one in training.state().items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        save_file({name: one.contiguous() for name, one in tensors.items()}, fresh, {"progress": json.dumps(told)})
        fresh.replace(self._path)

    def remove(self) -> None:
        """Removes the file, and its folder where nothing else is in it."""
        self._path.unlink(missing_ok=True)
        folder = self._path.parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _News:
    """Says now and then how far training is, and how long it is likely to take."""

    def __init__(self, what: str, steps: int, trials: int, seconds: float) -> None:
        self._what, self._steps, self._trials = what, steps, trials
        self._last = self._began = time.perf_counter()
        self._done_before: int | None = None

    def tell(self, trials_done: int, step: int, loss: Tensor) -> None:
        done = trials_done * self._steps + step
        if self._done_before is None:
            self._done_before = done - 1
        now = time.perf_counter()
        if now - self._last < NEWS_S:
            return
        self._last = now
        total = self._trials * self._steps
        left = (now - self._began) / (done - self._done_before) * (total - done)
        trial = f", training {trials_done + 1} of {self._trials}" if self._trials > 1 else ""
        LOGGER.info(
            "%s%s: step %d of %d, KL %.4f nats per token, about %.0f min left",
            self._what, trial, step, self._steps, float(loss), left / 60,
        )  # fmt: skip


def _least(values: Sequence[float]) -> float:
    return min(map(_or_infinite, values))


def _or_infinite(value: float) -> float:
    """A divergence that is no number is larger than any."""
    return value if math.isfinite(value) else math.inf


def _drawn(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices of ``wanted`` windows: all of them in random order, then all again in another, and so on."""
    rounds = -(-wanted // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:wanted]
