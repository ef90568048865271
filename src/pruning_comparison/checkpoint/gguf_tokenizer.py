"""A tokenizer as the fields of a GGUF file, and back: what llama.cpp splits text by, or why it cannot.

llama.cpp has no general tokenizer. It has two kinds that matter here, byte-level BPE ("gpt2") and SentencePiece's BPE
("llama"), and for the first kind a fixed list of splitting rules, each compiled in under a name. A tokenizer that splits by
another rule would give other tokens in silence, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pruning_comparison.errors import InputError, ModelLoadError

PREFIX = "tokenizer.ggml."
WHOLE = "tokenizer.huggingface.json"
"""The field for a whole ``tokenizer.json``, as the GGUF specification names it; llama.cpp does not read it."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, as GGUF numbers them."""

_SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Splitting:
    """How a byte-level tokenizer splits text, as the steps of a ``tokenizer.json``.

    ``whole_words`` says whether a word that is a token is taken without any merges, which llama.cpp ties to the rule.
    """

    steps: tuple[tuple[Any, ...], ...]
    whole_words: bool = False
    normalizers: tuple[str, ...] = ()


_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting((("ByteLevel", True),)),
    "smollm": _Splitting((("Digits", True), ("ByteLevel", True))),
    "llama-bpe": _Splitting((("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)), whole_words=True),
    "qwen2": _Splitting((("Split", _CONTRACTIONS + r"\p{N}" + _REST), ("ByteLevel", False)), normalizers=("NFC",)),
}
"""By llama.cpp's name. Its own converter writes Qwen2's as well, whose normalisation (NFC) llama.cpp leaves out."""


def tokenizer_fields(tokenizer: Any, vocabulary_size: int) -> dict[str, Any]:
    """The fields of a GGUF file that hold a tokenizer, by their full names: texts, numbers, booleans and lists of them.

    ``vocabulary_size`` is the number of the model's embeddings. Those without a token get one of the type "unused", as
    llama.cpp's converter gives them.

    InputError, with the reason, for a tokenizer that llama.cpp would not split text like.
    """
    if tokenizer is None:
        raise InputError(
            "the gguf form is not possible: the model has no tokenizer, and llama.cpp needs one in the file. Save it with "
            "the model."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"it ({type(tokenizer).__name__}) has no tokenizer.json, which is what is translated")
    whole = json.loads(backend.to_str())
    tokens, types = _tokens(tokenizer, whole, vocabulary_size)
    begin, end = _added_around(tokenizer)
    fields = _kind_fields(whole, tokens, types)
    fields |= {"tokens": tokens, "token_type": types, "add_bos_token": begin, "add_eos_token": end}
    if tokenizer.eos_token_id is None:
        raise _refused("it has no token that ends texts, and llama.cpp would take another one for it")
    named = {
        # Without a token that begins texts llama.cpp takes number 11 for it; where it is not added, any will do.
        "bos": tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    fields |= {f"{name}_token_id": int(number) for name, number in named.items() if number is not None}
    written = {PREFIX + name: value for name, value in fields.items()}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template:
        written["tokenizer.chat_template"] = template
    return {**written, WHOLE: backend.to_str()}


def tokenizer_from(fields: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    """The tokenizer that ``tokenizer_fields`` has written; ModelLoadError where it is not there or cannot be read."""
    try:
        backend = Tokenizer.from_str(fields[WHOLE])
        named = {
            f"{kind}_token": backend.id_to_token(fields[f"{PREFIX}{key}_token_id"])
            for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if f"{PREFIX}{key}_token_id" in fields
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=fields.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **named,
        )
    except Exception as error:
        raise ModelLoadError(f"the tokenizer in {name!r} cannot be read: {error}. Export the model again.") from error


def _refused(reason: str) -> InputError:
    return InputError(
        f"the gguf form is not possible: llama.cpp would not split text as the model's tokenizer does: {reason}. Use the "
        "compact form, or a model whose tokenizer llama.cpp has."
    )


def _tokens(tokenizer: Any, whole: Mapping[str, Any], vocabulary_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every embedding's token. InputError where there are more tokens than embeddings."""
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= vocabulary_size:
        raise _refused(f"it has a token {max(by_number)} and the model has {vocabulary_size} embeddings")
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(vocabulary_size)]
    types = [NORMAL if number in by_number else UNUSED for number in range(vocabulary_size)]
    if whole["model"].get("byte_fallback"):
        for number, token in by_number.items():
            types[number] = BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL
    for one in whole["added_tokens"]:
        types[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    unknown = whole["model"].get("unk_token")
    if whole["model"].get("byte_fallback") and unknown is not None:
        types[tokenizer.convert_tokens_to_ids(unknown)] = UNKNOWN
    return tokens, types


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer begins texts with its begin token, and ends them with its end token; no more can be said."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for before, begins in (([], False), (begin, True)):
        for after, ends in (([], False), (end, True)):
            if whole == [*before, *plain, *after] and (bool(before), bool(after)) == (begins, ends):
                return begins, ends
    raise _refused("it adds other tokens around a text than the one that begins and the one that ends texts")


def _kind_fields(whole: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """The fields that say how text is split, by their names without the prefix."""
    model = whole["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type')}, and BPE alone is translated")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused("its BPE drops merges at random, or marks where words begin or end")
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    if model.get("byte_fallback"):
        return {"model": "llama", **_sentencepiece_fields(whole, merges, tokens)}
    if not merges:
        raise _refused("it has no merges, without which llama.cpp opens no file")
    if any(len(pair) != 2 or " " in "".join(pair) for pair in merges):
        raise _refused("one of its merges holds a space, which stands between the two parts in the file")
    return {"model": "gpt2", "pre": _splitting_rule(whole), "merges": [" ".join(pair) for pair in merges]}


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a ``tokenizer.json``, whose sequences are lists under the name ``inside``."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for one in part[inside] for step in _steps(one, inside)]
    return [part]


def _splitting_rule(whole: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. InputError where it has none."""
    steps: list[tuple[Any, ...]] = []
    for step in _steps(whole["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps.append(("ByteLevel", step.get("use_regex", True)))
        elif step["type"] == "Digits":
            steps.append(("Digits", step["individual_digits"]))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(("Split", step["pattern"].get("Regex")))
        else:
            steps.append((step["type"], "in a way that llama.cpp has no name for"))
    normalizers = tuple(step["type"] for step in _steps(whole["normalizer"], "normalizers"))
    whole_words = bool(whole["model"].get("ignore_merges"))
    for name, rule in _SPLITTINGS.items():
        known = set(normalizers) <= set(rule.normalizers)
        if tuple(steps) == rule.steps and rule.whole_words == whole_words and known:
            return name
    shown = ", then ".join(" ".join(map(str, step)) for step in steps) or "nothing"
    raise _refused(
        f"it splits by {shown}{' after ' + ', '.join(normalizers) if normalizers else ''}, which is none of the rules "
        f"translated here: {', '.join(_SPLITTINGS)}"
    )


def _sentencepiece_fields(
    whole: Mapping[str, Any], merges: Sequence[tuple[str, ...]], tokens: Sequence[str]
) -> dict[str, Any]:
    """The fields of a SentencePiece tokenizer. InputError where its merges do not come from scores of its pieces.

    SentencePiece joins the two neighbours whose joint piece has the best score; a ``tokenizer.json`` lists merges in that
    order, all ways to make one piece together. So a piece's score is minus the place of its merges.
    """
    prefix = False
    for step in (
        *_steps(whole["normalizer"], "normalizers"),
        *_steps(whole["pre_tokenizer"], "pretokenizers"),
    ):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            prefix = prefix or step["prepend_scheme"] != "never"
        elif step["type"] != "Replace" or (step["pattern"].get("String"), step["content"]) != (" ", _SPACE):
            raise _refused(f"its step {step['type']} is none of SentencePiece's BPE")
    scores: dict[str, float] = {}
    previous = None
    for pair in merges:
        piece = "".join(pair)
        if piece != previous:
            if piece in scores:
                raise _refused(f"it makes {piece!r} by merges of different rank, which scores of pieces cannot say")
            scores[piece] = -float(len(scores))
        previous = piece
    lowest = -float(len(scores))
    # Pieces of one character are never made by joining two: their scores are not read.
    return {"scores": [scores.get(token, lowest) for token in tokens], "add_space_prefix": prefix}
