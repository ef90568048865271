"""Sending a saved model to the Hugging Face hub: what would go, what its card says, and the upload itself."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pruning_comparison.errors import HubError, InputError
from pruning_comparison.formatting import measured_number, reason_of, with_unit
from pruning_comparison.models.heads import MODELING_FILE
from pruning_comparison.models.loading import TOKENIZER_FILES
from pruning_comparison.paths import kind_of

LOGGER = logging.getLogger(__name__)

CARD = "README.md"
_SUFFIXES = (".safetensors", ".safetensors.index.json", ".gguf")
_NAMES = (
    CARD, MODELING_FILE, "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "merges.txt", *TOKENIZER_FILES,
)  # fmt: skip
_FORM_FOLDERS = ("", "plain", "padded", "gguf")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: a folder, the paths in it, the card's metadata, and what is left behind because it is no part.

    ``sizes_bytes`` are by path inside the folder, with forward slashes.
    """

    folder: Path
    name: str
    public: bool
    sizes_bytes: dict[str, int]
    left_out: tuple[str, ...]
    metadata: ModelCardData

    def in_words(self) -> str:
        """What would go, for people: where to, each file with its size, and the card's metadata."""
        total = sum(self.sizes_bytes.values())
        lines = [f"to {self.name}, {'public' if self.public else 'private'}: {with_unit(total, 'byte')}"]
        lines += [f"  {path} ({with_unit(size, 'byte')})" for path, size in self.sizes_bytes.items()]
        lines += [f"  left out, no part of the model: {path}" for path in self.left_out]
        results = self.metadata.eval_results or []
        lines += [
            f"evaluation result: {one.metric_name} {measured_number(one.metric_value)} on {one.dataset_name}"
            for one in results
        ]
        if not results:
            lines.append("no evaluation results: the card has no figures of evaluation text")
        for label, value in (
            ("base model", self.metadata.base_model),
            ("licence", self.metadata.license),
            ("tags", ", ".join(self.metadata.tags or [])),
        ):
            lines.append(f"{label}: {value or 'not stated'}")
        return "\n".join(lines)


def check_hub_name(name: str, option: str) -> None:
    """InputError, naming ``option``, for what cannot be the name of a repository of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} cannot be a name on the hub: {error} Write NAME or OWNER/NAME.", option=option
        ) from None


def check_hub_access() -> str:
    """The name under which this machine is logged in to the hub. HubError where the hub cannot be reached or knows nobody.

    For work that takes long before anything is sent.
    """
    try:
        return str(huggingface_hub.HfApi().whoami()["name"])
    except Exception as error:
        raise HubError(f"the hub cannot be written to: {_reason(error)}") from error


def what_would_go(folder: str | Path, name: str, *, public: bool = False) -> Upload:
    """Looks at a saved model and its card, and at nothing outside the folder. No network is used.

    What a model consists of goes: weights, config, tokenizer, card, the code that builds it, in the folder and in those of
    the other forms inside it. Links, hidden files and everything else stay behind and are named. InputError where the
    folder is no model that ``prune`` has saved, or the card cannot be what the hub reads.
    """
    folder = Path(folder)
    if kind_of(folder, "FOLDER") != "folder" or not (folder / CARD).is_file() or not _holds_weights(folder):
        raise InputError(
            f"{str(folder)!r} is not a model that prune has saved: that has weights and a {CARD}. Give its folder."
        )
    found, left_out = _files_of(folder)
    metadata = read_card(folder / CARD)
    if not metadata.tags or "pruned" not in metadata.tags:
        raise InputError(f"the {CARD} in {str(folder)!r} is not the card of a pruned model. Save the model again.")
    return Upload(folder, name, public, {path: (folder / path).stat().st_size for path in found}, left_out, metadata)


def read_card(path: Path) -> ModelCardData:
    """The metadata of a card, read and checked by huggingface_hub's own classes. InputError where they do not accept it."""
    try:
        data = ModelCard(path.read_text("utf-8")).data
    except Exception as error:  # YAML, types and values: each has errors of its own
        raise InputError(
            f"the metadata of {str(path)!r} is not what the hub reads: {reason_of(error)}. Fix it."
        ) from error
    if not isinstance(data, ModelCardData):
        raise InputError(f"{str(path)!r} has no metadata. Save the model again.")
    return data


def push_to_hub(upload: Upload) -> str:
    """Sends a model to the hub, into a repository that is made where there is none, and returns its address.

    A repository that is there keeps its visibility. It is refused where it is public and the upload is to be private. What
    lies in it and is not sent again stays. HubError where the hub cannot be reached or refuses.
    """
    command = f"pruning-comparison push {upload.folder} --name={upload.name}"
    again = f"The model is kept in {upload.folder}; {command} tries again."
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(upload.name, private=not upload.public, exist_ok=True)
        name = str(address.repo_id)
        private = bool(api.model_info(name).private)
        if not private and not upload.public:
            raise InputError(
                f"{name} is on the hub already and public, and the model was to be private. Give --public, or another name."
            )
        if private and upload.public:
            LOGGER.warning("%s was there before and stays private. Its settings on the hub make it public", name)
        api.upload_folder(
            repo_id=name,
            folder_path=upload.folder,
            allow_patterns=[glob.escape(path) for path in upload.sizes_bytes],
            commit_message="Add the pruned model",
        )
    except InputError:
        raise
    except Exception as error:
        raise HubError(f"{upload.name} cannot be sent to the hub: {_reason(error)} {again}") from error
    return str(address)


def _reason(error: Exception) -> str:
    """Why the hub does not answer or accept, and what would help."""
    kinds = {one.__name__ for one in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"nobody is logged in. {_LOGIN}"
    if status == 403:
        return f"the token may not write there. {_LOGIN}"
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set. Unset it, and try again with a network."
    if kinds & {"ConnectError", "ConnectionError", "ConnectTimeout", "TimeoutException"}:
        return f"{reason_of(error)}. Try again with a network."
    return f"{reason_of(error)}."


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".gguf") for path in folder.iterdir() if path.is_file())


def _files_of(folder: Path) -> tuple[Sequence[str], tuple[str, ...]]:
    """Paths that belong to the model, and those that do not; a folder that is none of a form's is one path."""
    belong, others = [], []
    for form in _FORM_FOLDERS:
        place = folder / form
        if form and not (place / CARD).is_file():
            continue
        for entry in sorted(os.scandir(place), key=lambda one: one.name):
            path = f"{form}/{entry.name}" if form else entry.name
            if entry.is_file(follow_symlinks=False) and _is_part(entry.name):
                belong.append(path)
            elif form or entry.name not in _FORM_FOLDERS or entry.is_symlink() or not (folder / path / CARD).is_file():
                others.append(path)
    return belong, tuple(others)


def _is_part(name: str) -> bool:
    return not name.startswith(".") and (name in _NAMES or name.endswith(_SUFFIXES))
