"""Nothing mixes devices: whole preparations on a stand-in for a GPU, whose tensors refuse to meet those of the host.

No test machine has a GPU. The stand-in computes on the CPU, but its tensors say that they are elsewhere, and an operation
that is handed some from here and some from there fails as CUDA's do.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from builders import FAMILIES, tiny_gpt2, tiny_model, tiny_spec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pruning_comparison.measure.generation import GenerationUnderWay, common_uniforms, generate
from pruning_comparison.measure.perplexity import window_losses
from pruning_comparison.models import load_model
from pruning_comparison.models.loading import LoadedModel
from pruning_comparison.pruning.surgery import converted_copy, mask_heads, masked_copy, remove_heads
from pruning_comparison.run import workspace as workspaces
from pruning_comparison.run.cell import build
from pruning_comparison.run.inputs import prepare
from pruning_comparison.spec import Cell

THERE = torch.device("meta")
"""The stand-in's name: one that every build of torch knows. Nothing is a real meta tensor while it is used."""

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor that says it is elsewhere; ``held`` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=THERE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatched(function, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *arguments, **more):
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")

    def __repr__(self):
        return f"Elsewhere({tuple(self.shape)}, {self.dtype})"


def dispatched(function, args, kwargs):
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(leaf, Elsewhere) for leaf in leaves)
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked)
    moving = function in (aten._to_copy.default, aten.copy_.default)
    if there and not moving:
        # Numbers without dimensions may come from the host, and so may indices.
        checked = args if function not in INDEXED else (args[0], *args[2:])
        if function in INDEXED and not isinstance(args[0], Elsewhere):
            raise RuntimeError(f"{function}: indices of another device than the tensor they index")
        strangers = [
            leaf for leaf in tree_leaves((checked, kwargs))
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Elsewhere) and leaf.ndim > 0
        ]  # fmt: skip
        if strangers:
            raise RuntimeError(
                f"{function}: expected all tensors to be on the same device; {strangers[0].shape} is not"
            )
    plain = {**kwargs}
    if target is not None:
        plain["device"] = torch.device("cpu")
    bare_args, bare = tree_map(lambda leaf: leaf.held if isinstance(leaf, Elsewhere) else leaf, (args, plain))
    with torch.inference_mode(False):  # what wraps a tensor cannot be of that kind
        result = function(*bare_args, **bare)
    if function is aten.copy_.default or function._schema.name.endswith("_") or "out" in kwargs:
        return kwargs.get("out", args[0])
    stays = target == THERE if target is not None else there
    if not stays or function is aten._local_scalar_dense.default:
        return result
    with torch.inference_mode(False):
        return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


class Guard(TorchDispatchMode):
    """Also sees what is made without a tensor among its arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatched(function, args, kwargs or {})


@contextmanager
def another_device():
    """Within it there is a device beside the host, called ``THERE``."""
    tensor, autocast, casts = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def made(*arguments, device=None, **more):
        found = tensor(*arguments, **more)
        return found if device is None else found.to(device)

    def cast(device_type, *arguments, **more):
        return nullcontext() if device_type == THERE.type else autocast(device_type, *arguments, **more)

    def is_cast(device_type):
        return device_type != THERE.type and casts(device_type)

    with Guard(), mock.patch.multiple(torch, tensor=made, autocast=cast, is_autocast_enabled=is_cast):
        yield


def moved(model):
    """The model with all its tensors elsewhere; what is shared stays shared."""
    known = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = parameter, nn.Parameter(Elsewhere(parameter.data), requires_grad=False)
                module._parameters[name] = known[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with another_device():
        there, here = torch.ones(2, 2, device=THERE), torch.ones(2, 2)
        assert isinstance(there, Elsewhere)
        assert (there * 2).sum().item() == 8
        assert torch.equal((there @ there).cpu(), 2 * here)
        for mixed in (lambda: there @ here, lambda: there + here, lambda: torch.cat([there, here]),
                      lambda: here[torch.ones(1, dtype=torch.long, device=THERE)], there.numpy):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert isinstance(there[torch.tensor([0])], Elsewhere)
        assert isinstance(there + torch.tensor(1.0), Elsewhere)
        assert isinstance(here.to(there), Elsewhere)


METHODS = ("entropy", "random", "magnitude", "taylor", "fisher", "wanda", "flap", "llm-pruner", "ablation", "obs")


@pytest.fixture
def elsewhere(monkeypatch, folder):
    """A workspace whose model is elsewhere."""

    def made(**settings):
        spec = tiny_spec(folder, pruning_methods=METHODS, adaptation="refit-mlp", **settings)
        inputs = prepare(spec)

        def load(preview, device, dtype):
            return LoadedModel(moved(load_model(preview, dtype=dtype).model), preview)

        monkeypatch.setattr(workspaces, "load_model", load)
        return workspaces.load_workspace(spec, inputs)

    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_preparation_stays_on_its_device(elsewhere, method):
    with another_device():
        workspace = elsewhere()
        for variant in ("baseline", "baseline-progressive", "agency"):
            pruned = build(workspace, Cell(variant, method, 0, 50.0))
            assert all(isinstance(parameter, Elsewhere) for parameter in pruned.model.parameters())
            assert not isinstance(pruned.keep, Elsewhere)
            ids = [window.ids for window in workspace.inputs.windows]
            assert bool(window_losses(pruned.model, ids, batch_size=4)[0].isfinite().all())


def test_masked_models_and_recovery_too(elsewhere):
    with another_device():
        workspace = elsewhere(recovery_steps=2)
        build(workspace, Cell("agency", "magnitude", 0, 50.0))
        build(elsewhere(execution="masked"), Cell("agency", "magnitude", 0, 50.0))


# Experts choose their kernels by the kind of the device, and those of a GPU do not run on the host behind the stand-in.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt_oss", "qwen3_moe"}))
def test_models_of_every_family_are_cut_and_decode_there(family, monkeypatch):
    # The stand-in loses tensors that torch makes in inference mode.
    monkeypatch.setattr(GenerationUnderWay, "advance", GenerationUnderWay.advance.__wrapped__)
    keep = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    dense = tiny_model(family)
    with another_device():
        moved(dense)
        compact = remove_heads(dense, keep)
        masked = masked_copy(dense, compact, keep)
        for model in (compact, masked, converted_copy(compact, torch.bfloat16)):
            draws = torch.stack([common_uniforms(0, 0, row, 4) for row in range(2)])
            gates = mask_heads(model, keep) if model is masked else None
            found = generate(model, [[1, 2, 3], [4]], 4, temperatures=[0.0, 0.7], uniforms=draws, check_finite=True)
            assert found.tokens.shape == (2, 4)
            if gates is not None:
                gates.remove()


def test_the_stand_in_changes_no_number():
    model = tiny_gpt2()
    expected = generate(model, [[1, 2, 3]], 5, temperatures=[0.0]).tokens
    with another_device():
        assert torch.equal(generate(moved(model), [[1, 2, 3]], 5, temperatures=[0.0]).tokens, expected)
