"""Saving pruned models so that they load again anywhere, and loading them.

safetensors only. Dimension letters: L layers, H heads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from pruning_comparison.checkpoint.gguf_file import (
    GGUF_DTYPES,
    check_gguf_package,
    read_gguf,
    read_gguf_weights,
    reason_against_free_choice,
    reason_against_gguf,
    write_gguf,
)
from pruning_comparison.checkpoint.gguf_tokenizer import tokenizer_fields
from pruning_comparison.checkpoint.model_card import BeforeAndAfter, model_card
from pruning_comparison.errors import InputError, ModelLoadError
from pruning_comparison.formatting import unknown_name
from pruning_comparison.models.gguf import SUFFIX
from pruning_comparison.models.heads import (
    LAYOUTS,
    PRUNED,
    EmptiedAttention,
    attention_implementation,
    attention_outputs,
    attentions,
    family_of,
    head_columns,
    head_grid,
    kept_columns,
    kept_heads,
    layout_of,
    live_groups,
    live_heads,
    mlp_output_projections,
    pruned_classes,
)
from pruning_comparison.models.loading import (
    TOKENIZER_FILES,
    generation_settings,
    quiet_transformers,
    ready_for_use,
    safetensors_header,
)
from pruning_comparison.pruning import expected_heads_pruned
from pruning_comparison.pruning.rectangles import rectangles_by_score
from pruning_comparison.spec import Scope

FORMS = ("compact", "plain", "padded", "gguf")
"""How a pruned model can be saved; see ``save_pruned``."""

_OUR_FIELDS = ("kept_heads", "attention_output_biases", "mlp_output_biases", "pruning")
# What transformers would act on and a loader that runs nothing must not read, and what it writes anew.
_NOT_FROM_A_FILE = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "architectures")
_BIAS_SWITCHES: tuple[dict[str, bool], ...] = (
    {},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True},
)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NO_NEW_BIAS = "Prune with --no_new_bias (new_bias=False), or --adaptation=none"


def save_pruned(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | Path,
    *,
    form: str = "compact",
    measured: Sequence[BeforeAndAfter] = (),
    max_shard_size: str = "5GB",
    gguf_dtype: str | None = None,
) -> Path:
    """Saves a physically pruned model, with its tokenizer and a model card, into a new folder, which is returned.

    ``form`` is

    * "compact": as it is, in any pruning. ``load_pruned`` loads it, and so does transformers without this package, by
      ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``: the code that builds it lies beside it;
    * "plain": a checkpoint of the family's own class, no smaller and no larger, that needs no code. It holds where every
      layer has lost as many heads as every other, leaving key-value groups of one size, and the config can say so;
    * "padded": the dense model's shapes with zeros where heads were. It needs no code and saves nothing: neither memory nor
      time. It is for runtimes that know the family and nothing else;
    * "gguf": one file for llama.cpp, ``model-f16.gguf``, with the tokenizer in it. It holds for Llama, Mistral without a
      sliding window and Qwen2, where a layer's key-value heads are read by as many query heads each. ``gguf_dtype``, one of
      ``GGUF_DTYPES``, says how matrices are stored: "f32" by default where the model is in float32, else "f16".

    ``measured`` is shown in the card, as is ``model.config.pruning`` where ``prune`` has written it. ``tokenizer`` may be
    None. Nothing is left behind where saving fails. InputError where the folder is not empty, the form is unknown, or the
    model cannot have it; the message says why, and what would help.
    """
    folder = Path(folder)
    if form not in FORMS:
        raise InputError(f"form: {form!r} is unknown. Choose from {', '.join(FORMS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder. Give another, or delete it first.")
    saved = None if form == "gguf" else pruned_form(model) if form == "compact" else stock_form(model, form)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if saved is None:
            temporary.mkdir()
            write_as_gguf(model, tokenizer, temporary / _gguf_name(model, gguf_dtype), gguf_dtype)
        else:
            _save_for_transformers(saved, model, tokenizer, temporary, max_shard_size)
        card = model_card(
            model,
            form=form,
            holds=forms_that_hold(model),
            dense_parameters=dense_parameters(model.config),
            weights=_gguf_name(model, gguf_dtype),
            with_tokenizer=tokenizer is not None,
            measured=measured,
        )
        (temporary / "README.md").write_text(card, "utf-8", newline="\n")
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    except OSError as error:
        raise InputError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}. Give another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save_for_transformers(
    saved: PreTrainedModel, model: PreTrainedModel, tokenizer: Any, folder: Path, max_shard_size: str
) -> None:
    with quiet_transformers():
        # What transformers would refuse to save is kept as well: it is written by ourselves, as it came.
        saved.generation_config = GenerationConfig()
        saved.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "generation_config.json").write_text(generation_settings(model), "utf-8", newline="\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    _add_older_names(folder / "config.json")


def _add_older_names(path: Path) -> None:
    """Writes the base of rotary positions by its older name too.

    transformers before version 5, and loaders made for it, know ``rope_theta`` and ``rope_scaling`` alone. Without them they
    would take a base of 10,000, in silence.
    """
    fields = json.loads(path.read_text("utf-8"))
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    fields.setdefault("rope_theta", rope["rope_theta"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        fields.setdefault("rope_scaling", scaling)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8", newline="\n")


def export_gguf(folder: str | Path, output: str | Path | None = None, *, dtype: str = "f16") -> Path:
    """Writes a pruned model saved in compact form into a GGUF file for llama.cpp, and returns its path.

    By default it lies in the folder, as ``model-<dtype>.gguf``. Whether the model can be written is found out before its
    weights are read. InputError says why it cannot, or where the file is there already; nothing is left behind then.
    """
    folder = Path(folder)
    if dtype not in GGUF_DTYPES:
        raise InputError(unknown_name("--dtype", dtype, GGUF_DTYPES))
    path = Path(output) if output is not None else folder / f"model-{dtype}{SUFFIX}"
    if path.exists():
        raise InputError(f"{str(path)!r} exists. Give another file, or delete it first.", option="--output")
    config = _read_config(folder)
    reason = reason_against_gguf(config)
    if reason is not None:
        raise InputError(reason)
    check_gguf_package()
    tokenizer = _read_tokenizer(folder, config)
    tokenizer_fields(tokenizer, config.vocab_size)
    model, _ = load_pruned(folder)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_as_gguf(model, tokenizer, temporary, dtype)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. Give another file.", option="--output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _gguf_dtype(model: PreTrainedModel, dtype: str | None) -> str:
    return dtype or ("f32" if model.dtype == torch.float32 else "f16")


def _gguf_name(model: PreTrainedModel, dtype: str | None) -> str:
    return f"model-{_gguf_dtype(model, dtype)}{SUFFIX}"


def write_as_gguf(model: PreTrainedModel, tokenizer: Any, path: Path, dtype: str | None = None) -> None:
    """Writes a model, dense or physically pruned, into a GGUF file; see ``write_gguf`` for ``dtype`` and errors.

    By default matrices are "f32" where the model is in float32, else "f16".
    """
    config = _checked_config(model)
    made: Mapping[str, Any] = config.pruning or {}
    keep = kept_heads(config)
    name = f"{made.get('base_model', 'a model')} without {int((~keep).sum())} of its {keep.numel()} attention heads"
    write_gguf(model, config, tokenizer, path, dtype=_gguf_dtype(model, dtype), name=name)


def load_pruned(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, Any]:
    """The pruned model in a folder that ``save_pruned`` wrote in compact form, and its tokenizer (None if there is none).

    In the precision it was saved in, unless ``dtype`` names another. Nothing in the folder is executed: the model is built
    by this package from what its config says, and only after the shapes in the weight files have proved to be those.
    In place of the folder it may be a GGUF file that this package has written; its model is in float32 unless ``dtype`` says
    otherwise. ModelLoadError names what does not fit.
    """
    folder = Path(folder)
    name = str(folder)
    if folder.suffix == SUFFIX and folder.is_file():
        return _load_gguf(folder, device, dtype or torch.float32)
    config = _read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{name!r} has no .safetensors weights. Nothing else is loaded; save the model again.")
    stored: dict[str, Any] = {}
    for file in files:
        header = safetensors_header(file, name)
        twice = sorted(stored.keys() & header.keys())
        if twice:
            raise ModelLoadError(
                f"{name!r} has {twice[0]} in two files. Leave only the files that were saved together."
            )
        stored |= header
    model_class = pruned_classes(str(family_of(config)))[1]
    _check_shapes(name, stored, model_class, config)
    try:
        weights = {key: value for file in files for key, value in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"the weights of {name!r} cannot be read: {error}. Save or copy the model again."
        ) from error
    first = next(iter(stored.values()))["dtype"]
    dtype = dtype or _DTYPES[first]
    model = ready_for_use(_filled(model_class, config, weights, dtype), name, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device), _read_tokenizer(folder, config)  # type: ignore[arg-type]


def _load_gguf(path: Path, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    fields, shapes, tokenizer = read_gguf(path)
    config = _config_of(fields, f"the config in {path.name!r}", str(path))
    model_class = pruned_classes(str(family_of(config)))[1]
    # Where the family itself has output biases an emptied layer has one, too; the file has it in the layer before.
    moved = [
        f"model.layers.{layer}.self_attn.bias"
        for layer, row in enumerate(kept_heads(config))
        if layer and not bool(row.any()) and getattr(config, "attention_bias", False)
    ]
    shapes |= {key: [config.hidden_size] for key in moved}
    _check_shapes(
        str(path), {key: {"shape": shape, "dtype": "F32"} for key, shape in shapes.items()}, model_class, config
    )
    try:
        weights = read_gguf_weights(path, config) | {key: torch.zeros(config.hidden_size) for key in moved}
    except ValueError as error:
        raise ModelLoadError(f"the weights in {path.name} cannot be read: {error}. Export the model again.") from error
    model = ready_for_use(_filled(model_class, config, weights, dtype), str(path), dtype)
    return model.to(device), tokenizer  # type: ignore[arg-type]


def forms_that_hold(model: PreTrainedModel) -> dict[str, str | None]:
    """For each of ``FORMS``: None where the pruned model can be saved so, else the reason why not and what would help."""
    reasons: dict[str, str | None] = {"compact": None}
    for form in ("plain", "padded"):
        try:
            _stock_parts(model, form)
            reasons[form] = None
        except InputError as error:
            reasons[form] = str(error)
    reasons["gguf"] = reason_against_gguf(_checked_config(model))
    return reasons


def forms_ruled_out(
    dense_config: Any,
    level: float,
    *,
    scope: Scope = "model",
    group_size: int = 1,
    rectangle: int | None = None,
    biases: Sequence[str] = (),
) -> dict[str, str | None]:
    """For each of ``FORMS``, before anything is pruned: the reason why no choice of heads allows it, or None.

    ``biases`` says which output projections adaptation gives a bias: "attention", "mlp". The real constructors are
    asked, on a model without memory that has lost as many heads from every layer, in whole key-value groups or from all
    in turn, or, with a ``rectangle`` of so many query heads per group, in every shape of that many heads. Where heads
    are chosen over the whole model (``scope`` "model") layers may still come out unlike.
    """
    grid = head_grid(dense_config)
    count = expected_heads_pruned(level, 1, grid.n_heads, "layer", group_size, rectangle)
    config = pruned_classes(str(family_of(dense_config)))[0].from_dict(_plain_fields(dense_config))
    every = list(range(grid.n_layers))
    config.attention_output_biases = every if "attention" in biases else []
    config.mlp_output_biases = every if "mlp" in biases else []
    in_turn = sorted(range(grid.n_heads), key=lambda head: (head % grid.group_size, head))
    sets = [list(range(count, grid.n_heads)), *([] if group_size > 1 else [sorted(in_turn[count:])])]
    if rectangle is not None:
        zeros = torch.zeros(1, grid.n_heads)
        sets = [
            list(one.kept) for one in rectangles_by_score(zeros, rectangle)[0] if len(one.kept) == grid.n_heads - count
        ]
    reasons: dict[str, str | None] = {}
    for kept in sets:
        config.kept_heads = [kept] * grid.n_layers
        found = forms_that_hold(_without_memory(pruned_classes(str(family_of(dense_config)))[1], config))
        reasons = {form: None if reasons.get(form, "") is None else reason for form, reason in found.items()}
    if scope == "model" and count in (0, grid.n_heads):
        reasons["plain"] = None
    reasons["gguf"] = gguf_ruled_out(dense_config, group_size=group_size, rectangle=rectangle)
    return reasons


def gguf_ruled_out(dense_config: Any, *, group_size: int, rectangle: int | None = None) -> str | None:
    """Why no model of this config that has lost heads can be a GGUF file, whatever its level, or None.

    ``group_size`` is the number of heads that leave together: with one, any choice of heads is possible, unless each layer
    keeps as many heads of each key-value group, of which ``rectangle`` is the size. Groups of one head, and one group alone,
    are always alike.
    """
    grid = head_grid(dense_config)
    free = group_size == 1 and rectangle is None and 1 < grid.group_size < grid.n_heads
    return reason_against_gguf(dense_config) or (reason_against_free_choice(dense_config) if free else None)


def pruned_form(model: PreTrainedModel) -> PreTrainedModel:
    """A physically pruned model as an instance of its family's pruned class, sharing its weights.

    InputError for a model whose config does not say which heads it has: one that ``remove_heads`` has not made.
    """
    config = _checked_config(model)
    _, model_class = pruned_classes(str(family_of(config)))
    return _filled(model_class, config, model.state_dict(), model.dtype)


def stock_form(model: PreTrainedModel, form: str) -> PreTrainedModel:
    """The pruned model as the family's own class, "plain" or "padded"; InputError where it cannot be.

    AssertionError if, in float32, it does not compute what the pruned model does.
    """
    config, weights = _stock_parts(model, form)
    stock: Any = _filled(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, weights, model.dtype)
    stock = stock.eval().requires_grad_(False).to(model.device)
    with torch.inference_mode():
        ids = torch.arange(16, device=model.device)[None] % model.config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected, actual = model(**inputs).logits, stock(**inputs).logits
    if model.dtype == torch.float32 and not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3):
        raise AssertionError(f"the {form} form is off by up to {float((actual - expected).abs().max())} in its logits")
    return stock  # type: ignore[no-any-return]


def _checked_config(model: PreTrainedModel) -> Any:
    """The pruned class's config for a pruned model. InputError where the model's own does not describe it."""
    keep = kept_heads(model.config)
    if list(live_heads(model)) != keep.sum(1).tolist():
        raise InputError(
            "the model's config does not say which heads it has lost. Save a model that prune or remove_heads has made."
        )
    config = pruned_classes(str(family_of(model.config)))[0].from_dict(_plain_fields(model.config))
    config.kept_heads = [row.nonzero().flatten().tolist() for row in keep]
    for field, found in (
        ("attention_output_biases", attention_outputs(model)),
        ("mlp_output_biases", mlp_output_projections(model)),
    ):
        setattr(config, field, [layer for layer, one in enumerate(found) if getattr(one, "bias", None) is not None])
    config.pruning = getattr(model.config, "pruning", None)
    return config


def dense_parameters(config: Any) -> int:
    """How many parameters the dense model has that a pruned model's config describes, tied ones counted once."""
    stock = _stock_config(config, {})
    dense = _without_memory(MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)], stock)
    dense.tie_weights()
    return int(dense.num_parameters())


def _without_memory(model_class: Any, config: Any) -> Any:
    """A model whose tensors have shapes and nothing in them."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _plain_fields(config: Any) -> dict[str, Any]:
    """The dense model's settings, without what pruning and saving add."""
    fields: dict[str, Any] = config.to_dict()
    for name in (*_OUR_FIELDS, *_NOT_FROM_A_FILE, "model_type"):
        fields.pop(name, None)
    return fields


def _stock_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config of the family's own class, with changes."""
    return CONFIG_MAPPING[str(family_of(config))].from_dict({**_plain_fields(config), **changes})


def _stock_parts(model: PreTrainedModel, form: str) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of the family's own class for a pruned model. InputError where it cannot have them."""
    config = _checked_config(model)
    if form == "plain" and layout_of(model).joint_norms is not None and not bool(kept_heads(config).all()):
        raise InputError(
            "the plain form is not possible: norms run over the queries and keys of all heads together, so the projections "
            f"of heads that are gone stay, which the config of {family_of(config)} cannot say. Use the compact or the "
            "padded form."
        )
    changes = _uniform_sizes(config) if form == "plain" else {}
    family = str(family_of(config))
    extra: list[str] = []
    for switches in _BIAS_SWITCHES:
        if any(getattr(config, name, None) is not False for name in switches):
            continue
        try:
            stock_config = _stock_config(config, {**changes, **switches})
            stock = _without_memory(MODEL_FOR_CAUSAL_LM_MAPPING[type(stock_config)], stock_config)
        except Exception as error:
            # A config may take sizes that its model's constructor refuses, so both are asked.
            raise InputError(
                f"the {form} form is not possible: the config of {family} does not allow these sizes "
                f"({_first_line(error)}). Choose another level, or the padded form."
            ) from error
        expected = stock.state_dict()
        weights = model.state_dict() if form == "plain" else _padded_weights(model, stock)
        extra = sorted(weights.keys() - expected.keys())
        if not extra:
            break
    else:
        raise InputError(
            f"the {form} form is not possible: adaptation has given the model biases that the config of {family} cannot "
            f"name, {len(extra)} in all, first {extra[0]}. {_NO_NEW_BIAS}."
        )
    for name, parameter in expected.items():
        if name not in weights and name.endswith(".bias"):
            weights[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
        if name not in weights or weights[name].shape != parameter.shape:
            found = tuple(weights[name].shape) if name in weights else None
            raise InputError(
                f"the {form} form is not possible: the config of {family} takes the size of a head from the number of "
                f"heads, so {name} would be {tuple(parameter.shape)} and not {found}. Use the compact or the padded form."
            )
    return stock_config, weights


def _uniform_sizes(config: Any) -> dict[str, int]:
    """What the family's config has to say for layers that are alike. InputError where they are not."""
    keep, grid = kept_heads(config), head_grid(config)
    counts = keep.sum(1).tolist()
    advice = "Prune with --scope=layer, which takes as many heads from every layer, or use the compact or padded form."
    if min(counts) == 0:
        raise InputError(f"the plain form is not possible: layer {counts.index(0)} has lost all its heads. {advice}")
    if len(set(counts)) > 1:
        raise InputError(
            f"the plain form is not possible: layers have from {min(counts)} to {max(counts)} heads left. {advice}"
        )
    groups = [live_groups(grid, row) for row in keep]
    if len({size for layer in groups for size in layer}) > 1 or len({len(layer) for layer in groups}) > 1:
        raise InputError(
            "the plain form is not possible: key-value heads are read by different numbers of query heads, or layers have "
            "different numbers of them. Use the compact or the padded form."
        )
    sizes = {"num_attention_heads": counts[0], "head_dim": grid.head_size}
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = len(groups[0])
    return sizes


def _padded_weights(model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Tensor]:
    """The pruned model's weights in the shapes of a dense one: zeros for the heads that are gone."""
    layout, grid, keep = layout_of(model), head_grid(model.config), kept_heads(model.config)
    weights = dict(model.state_dict())
    for layer, attention in enumerate(attentions(stock)):
        kept = keep[layer]
        if bool(kept.all()):
            continue
        prefix = f"{layout.layers}.{layer}.{layout.attention}."
        ours = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        if isinstance(attentions(model)[layer], EmptiedAttention) and "bias" in ours:
            ours[f"{layout.output}.bias"] = ours.pop("bias")
        columns = kept_columns(layout, grid, kept) if bool(kept.any()) else {}
        for name, parameter in attention.named_parameters():
            module, _, kind = name.rpartition(".")
            full = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
            outputs = 1 if isinstance(attention.get_submodule(module), Conv1D) and kind == "weight" else 0
            if name not in ours:
                if module and module not in {layout.query, layout.key, layout.value, layout.output}:
                    full.fill_(1.0)  # a norm over the features of each head, in a layer without heads
            elif name == layout.sinks:
                full[kept.to(full.device)] = ours[name]
            elif module in columns:
                full.index_copy_(outputs, columns[module].to(full.device), ours[name])
            elif module == layout.output and kind == "weight":
                full.index_copy_(1 - outputs, head_columns(kept, grid.head_size).to(full.device), ours[name])
            else:
                full = ours[name]
            ours.pop(name, None)
            weights[prefix + name] = full
        weights |= {prefix + name: value for name, value in ours.items()}
        if not bool(kept.any()) and layout.attention_norm is not None:
            # An emptied layer has no norm before its attention either; whatever it makes, heads of zeros read nothing.
            norm = f"{layout.layers}.{layer}.{layout.attention_norm}."
            for name, parameter in stock.get_submodule(norm.rstrip(".")).named_parameters():
                ones = torch.ones(parameter.shape, dtype=model.dtype, device=model.device)
                weights.setdefault(norm + name, ones if name == "weight" else ones * 0)
    return weights


def _filled(model_class: Any, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model of a class with given weights. ModelLoadError where they do not fit, which has been checked before."""
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
        )
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind])
    if wrong:
        raise ModelLoadError(f"the weights do not fit the config: first {wrong[0]}. Save the model again.")
    return model.eval()  # type: ignore[no-any-return]


def _read_config(folder: Path) -> Any:
    """The config of a saved pruned model, as this package understands it. ModelLoadError where it cannot be one."""
    name, path = str(folder), folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{name!r} has no config.json. Give a folder that save_pruned has written.")
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"the config.json of {name!r} is not readable JSON: {error}. Copy it again.") from error
    return _config_of(fields, f"the config.json of {name!r}", name)


def _config_of(fields: Any, what: str, name: str) -> Any:
    """The config that a saved pruned model's fields describe; ``what`` says where they are. ModelLoadError where none."""
    model_type = str(fields.get("model_type")) if isinstance(fields, dict) else "None"
    family = model_type.removeprefix(PRUNED)
    if family not in LAYOUTS or not model_type.startswith(PRUNED):
        raise ModelLoadError(
            f"{name!r} is no pruned model in compact form: its model_type is {model_type!r}. AutoModelForCausalLM loads "
            f"plain and padded ones; those here begin with {PRUNED}, for {', '.join(sorted(LAYOUTS))}."
        )
    rows, layers = fields.get("kept_heads"), fields.get("num_hidden_layers", fields.get("n_layer"))
    if not isinstance(rows, list) or len(rows) != layers:
        found = len(rows) if isinstance(rows, list) else repr(rows)
        raise ModelLoadError(f"{what} has {layers!r} layers, but kept_heads has {found}. Copy or save the model again.")
    plain = {key: value for key, value in fields.items() if key not in (*_NOT_FROM_A_FILE, "model_type")}
    try:
        config = pruned_classes(family)[0].from_dict(plain)
        kept_heads(config)
    except Exception as error:
        raise ModelLoadError(
            f"{what} describes no {family} model: {_first_line(error)}. Copy or save the model again."
        ) from error
    return config


def _check_shapes(name: str, stored: Mapping[str, Any], model_class: Any, config: Any) -> None:
    """ModelLoadError where the tensors in the files are not those that the config promises. Takes no memory."""
    try:
        model = _without_memory(model_class, config)
    except Exception as error:
        raise ModelLoadError(
            f"the config.json of {name!r} describes no model: {_first_line(error)}. Copy or save the model again."
        ) from error
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, entry in stored.items():
        shape, dtype = entry.get("shape"), entry.get("dtype")
        if key not in expected:
            raise ModelLoadError(f"{name!r} has a tensor {key} that its config has not. Copy or save the model again.")
        if shape != expected[key]:
            raise ModelLoadError(
                f"{name!r} does not fit its config: {key} has shape {shape}, and by the heads that are left it must be "
                f"{expected[key]}. Copy or save the model again."
            )
        if dtype not in _DTYPES:
            raise ModelLoadError(f"{name!r}: {key} is stored as {dtype}. Weights must be one of {', '.join(_DTYPES)}.")
    missing = sorted(expected.keys() - stored.keys() - set(model.all_tied_weights_keys))
    if missing:
        raise ModelLoadError(
            f"{name!r} lacks {len(missing)} tensors that its config promises, first {missing[0]}. Copy all its files."
        )


def _read_tokenizer(folder: Path, config: Any) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, config=_stock_config(config, {}), trust_remote_code=False)
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer of {str(folder)!r} cannot be loaded: {_first_line(error)}. Save the model again."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]).rstrip(". ") if lines else type(error).__name__
