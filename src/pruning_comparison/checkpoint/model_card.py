"""The model card of a pruned model: what was cut, what it costs, how it was made, and how it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor

from pruning_comparison.formatting import measured_number
from pruning_comparison.metrics import METRICS
from pruning_comparison.models.heads import (
    MODELING_FILE,
    attention_implementation,
    head_grid,
    kept_heads,
    live_groups,
)

_ROUTES = (
    (
        "compact",
        "with pruning-comparison",
        "`load_pruned(folder)` from `pruning_comparison`; runs no code of it",
    ),
    (
        "compact",
        "with transformers alone",
        f"`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, which runs `{MODELING_FILE}`",
    ),
    ("plain", "as a plain checkpoint, without custom code", "form `plain`"),
    ("padded", "padded with zeros to the dense model's shapes, without custom code", "form `padded`; saves nothing"),
    ("gguf", "in llama.cpp", "`pruning-comparison export folder --to=gguf`, or form `gguf`"),
)


_PROMPT = "The people of the United States"
_GENERATE = f"""prompt = tokenizer("{_PROMPT}", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
"""
_IN_LLAMA_CPP = f"""import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = "{{weights}}"
answer = xllamacpp.Server(settings).handle_completions({{{{"prompt": "{_PROMPT}", "max_tokens": 20}}}})
print(answer["choices"][0]["text"])
"""
# What is measured is the compact form: speed and memory of these are others.
_UNLIKE_COMPACT = ("padded", "gguf")

_TAGS = ("pruned", "attention-heads", "pruning-comparison")
_TASK = "text-generation"
_NOT_HOW_IT_WAS_MADE = ("measured_on", "evaluation")


@dataclass(frozen=True)
class BeforeAndAfter:
    """A figure of the dense model and of the pruned one; None where it could not be measured.

    ``metric`` is the name of its record in ``METRICS`` where it was measured on the evaluation text: such figures are the
    evaluation results in the card's metadata. Speed and bytes are not, since they depend on the machine or follow from the
    config.
    """

    label: str
    unit: str
    before: float | None
    after: float | None
    metric: str = ""

    @property
    def ratio(self) -> float | None:
        """The pruned model's figure over the dense one's; None where either is missing, or the dense one's is 0."""
        return self.after / self.before if self.before and self.after is not None else None


def model_card(
    model: Any,
    *,
    form: str,
    holds: Mapping[str, str | None],
    dense_parameters: int,
    weights: str = "",
    with_tokenizer: bool = True,
    measured: Sequence[BeforeAndAfter] = (),
) -> str:
    """The README.md of a pruned model saved in ``form``: Markdown with the header that the hub reads.

    ``holds`` gives, for each form, None or the reason why the model cannot have it. ``dense_parameters`` is how many
    parameters the dense model has, tied ones counted once. ``weights`` is the name of the GGUF file where ``form`` is
    "gguf". Without a tokenizer the code in the card loads the model and generates nothing. What ``prune`` has noted in the
    model's config is shown; what was not measured is said to be missing.
    """
    made: Mapping[str, Any] = getattr(model.config, "pruning", None) or {}
    keep, grid = kept_heads(model.config), head_grid(model.config)
    gone, total = int((~keep).sum()), grid.total
    base = str(made.get("base_model", "the dense model"))
    licence = made.get("licence")
    name = f"{base} without {gone} of its {total} attention heads"
    parts = [
        f"---\n{card_data(made, name, () if form == 'gguf' else measured).to_yaml()}\n---\n",
        f"# {_plain(name)}\n",
        f"{gone} of {total} heads ({100 * gone / total:.1f} %) have been removed, in {grid.n_layers} layers of "
        f"{grid.n_heads}{_format_method(made)}. {_format_parameters(model, dense_parameters)}\n",
        f"{_lost_and_gained(measured, form)}\n",
        "## How it loads\n",
        _snippets(form, weights, attention_implementation(model.config), with_tokenizer=with_tokenizer),
        _table(("", "", "holds for this model"), [_route_row(route, form, holds) for route in _ROUTES]),
        f"This folder is in {form} form. Weights are {'in the .gguf file' if form == 'gguf' else 'safetensors only'}.\n",
        "## What was cut\n",
        _table(("layer", "heads left", "which, counted from 0", "key-value heads left"), _layer_rows(keep, grid)),
        "## Before and after\n",
        _format_measured(measured, form, made),
        "## How it was made\n",
        _table(
            ("", ""),
            [
                (_plain(key), _plain(_format_value(value)))
                for key, value in made.items()
                if key not in _NOT_HOW_IT_WAS_MADE
            ],
        )
        if made
        else "Not recorded: the model was not made by `prune`.\n",
        "## Licence\n",
        _format_licence(licence),
    ]
    return "\n".join(parts)


def card_data(made: Mapping[str, Any], name: str, measured: Sequence[BeforeAndAfter] = ()) -> ModelCardData:
    """The metadata that the hub reads, by huggingface_hub's own classes, which check them.

    ``made`` is what ``prune`` has noted in the model's config, ``name`` what the model is called. Figures of ``measured``
    that have a metric are the evaluation results, and with perplexity how many times the dense model's it is.
    """
    results = evaluation_results(made, measured)
    return ModelCardData(
        license=str(made["licence"]) if made.get("licence") else None,
        base_model=str(made["hub_model"]) if made.get("hub_model") else None,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=list(_TAGS),
        model_name=name if results else None,
        eval_results=results or None,
    )


def evaluation_results(made: Mapping[str, Any], measured: Sequence[BeforeAndAfter]) -> list[EvalResult]:
    """The figures of the pruned model that were measured on evaluation text, as the hub's metadata has them.

    Empty where it is not known what they were measured on.
    """
    evaluation: Mapping[str, Any] = made.get("evaluation") or {}
    if not evaluation:
        return []
    values: dict[str, float] = {}
    for figure in measured:
        if figure.metric and figure.after is not None:
            values[figure.metric] = figure.after
            if figure.metric == "perplexity" and figure.ratio is not None:
                values["perplexity_ratio"] = figure.ratio
    dataset, config, split = (evaluation.get(key) for key in ("dataset", "config", "split"))
    text = str(evaluation["text"])
    return [
        EvalResult(
            task_type=_TASK,
            task_name="Text generation",
            dataset_type=str(dataset or "custom"),
            dataset_name=text,
            dataset_config=config,
            dataset_split=split,
            metric_type=metric,
            metric_name=METRICS[metric].label,
            metric_value=value,
            metric_args={key: evaluation[key] for key in ("windows", "window_tokens", "scored_tokens")},
        )
        for metric, value in values.items()
    ]


def _format_method(made: Mapping[str, Any]) -> str:
    if "method" not in made:
        return ""
    return f", ranked by `{_plain(str(made['method']))}`, variant `{_plain(str(made['variant']))}`"


def _format_parameters(model: Any, dense_parameters: int) -> str:
    left = model.num_parameters()
    change = 100 * (left / dense_parameters - 1)
    return f"That leaves {left:,} of {dense_parameters:,} parameters ({_signed(change)})."


def _lost_and_gained(measured: Sequence[BeforeAndAfter], form: str) -> str:
    """One line: what the model lost in quality, and what it gained in speed and memory."""
    ratios = {one.label: one.ratio for one in measured if one.ratio is not None}
    if form in _UNLIKE_COMPACT:
        ratios = {label: ratio for label, ratio in ratios.items() if label == "perplexity"}
    lost = f"perplexity is {ratios['perplexity']:.3f} times the dense model's" if "perplexity" in ratios else ""
    gained = [
        f"{label} {_signed(100 * (ratios[label] - 1))}"
        for label in ("speed", "first-token latency", "key-value cache")
        if label in ratios
    ]
    if form == "padded":
        gained = ["nothing: its shapes are the dense model's"]
    if not lost and not gained:
        return "**Lost and gained**: not measured."
    return f"**Lost**: {lost or 'not measured'}. **Gained**: {', '.join(gained) or 'not measured'}."


def _snippets(form: str, weights: str, attention: str, *, with_tokenizer: bool) -> str:
    """Code that runs as pasted, in a shell or Python that was started in the folder."""
    parts = [
        "In this folder. Elsewhere, put its path in place of `.`; of a model on the hub, that is what "
        "`huggingface_hub.snapshot_download` returns.\n"
    ]
    if form == "gguf":
        parts.append(f'```bash\nllama-cli -m {weights} -p "{_PROMPT}" -n 20\n```\n')
        parts += ["Or from Python, with `pip install xllamacpp`:\n", _python(_IN_LLAMA_CPP.format(weights=weights))]
        return "\n".join(parts)
    generate = _GENERATE if with_tokenizer else ""
    if form == "compact":
        loaded = "model, tokenizer" if with_tokenizer else "model, _"
        parts.append("With pruning-comparison, which runs no code from the folder:\n")
        parts.append(_python(f'from pruning_comparison import load_pruned\n\n{loaded} = load_pruned(".")\n{generate}'))
        parts.append("With transformers alone, which runs code from the folder. Do that only if you trust it:\n")
    trust = ", trust_remote_code=True" if form == "compact" else ""
    classes = ["AutoModelForCausalLM", *(["AutoTokenizer"] if with_tokenizer else [])]
    # Where that alone computes what the family means: transformers 5.15 takes another, and leaves out Gemma 2's cap.
    eager = ', attn_implementation="eager"' if attention == "eager" and not trust else ""
    lines = [f"from transformers import {', '.join(classes)}", ""]
    lines.append(f'model = {classes[0]}.from_pretrained("."{trust}{eager})')
    lines += [f'tokenizer = {name}.from_pretrained("."{trust})' for name in classes[1:]]
    parts.append(_python("\n".join(lines) + f"\n{generate}"))
    return "\n".join(parts)


def _python(code: str) -> str:
    return f"```python\n{code}```\n"


def _signed(per_cent: float) -> str:
    return f"{per_cent:+.1f} %".replace("-", "−")


def _route_row(route: tuple[str, str, str], form: str, holds: Mapping[str, str | None]) -> tuple[str, str, str]:
    needed, title, how = route
    reason = holds[needed]
    if reason is not None:
        return title, how, f"no: {_plain(reason)}"
    return title, how, "yes, this folder" if needed == form else f"yes, saved in form {needed}"


def _layer_rows(keep: Tensor, grid: Any) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer, row in enumerate(keep):
        heads = row.nonzero().flatten().tolist()
        groups = live_groups(grid, row)
        rows.append((str(layer), str(len(heads)), ", ".join(map(str, heads)) or "none", str(len(groups))))
    return rows


def _format_measured(measured: Sequence[BeforeAndAfter], form: str, made: Mapping[str, Any]) -> str:
    if not measured:
        return "Not measured.\n"
    rows = []
    for figure in measured:
        change = "" if figure.ratio is None else _signed(100 * (figure.ratio - 1))
        rows.append(
            (f"{figure.label} ({figure.unit})", measured_number(figure.before), measured_number(figure.after), change)
        )
    note = f"Measured on {_plain(str(made['measured_on']))}.\n" if "measured_on" in made else ""
    if form == "gguf":
        note += "These figures are those of the compact form in transformers, not llama.cpp's.\n"
    if form == "padded":
        note += "These figures are those of the compact form; padded, speed and bytes are the dense model's.\n"
    return _table(("", "dense", "pruned", "change"), rows) + "\n" + note


def _format_licence(licence: Any) -> str:
    if licence:
        return f"The base model's licence, {_plain(str(licence))}, holds for what is left of it.\n"
    return (
        "The base model's licence holds for what is left of it; which one that is was not stated where it was read.\n"
    )


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    """Text that stays one cell of a table and one paragraph, and is no markup."""
    one_line = " ".join(text.split())
    return one_line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
