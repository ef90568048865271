"""Writes the generated parts of the reference: `make reference`, or with `--check` only says whether they are up to date.

The options come from the parsers of the command line, the files of a run from the records that they are made of. What is
generated stands between two comments of a page in ``docs/reference``; what stands around it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from inspect import cleandoc
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pruning_comparison.analysis import (
    between_runs,
    engines,
    estimates,
    fronts,
    head_maps,
    hypotheses,
    rankings,
    relative,
    strongest,
    tasks,
    tradeoffs,
)
from pruning_comparison.cli import make_parser
from pruning_comparison.methods import METHODS
from pruning_comparison.presets import PRESETS
from pruning_comparison.spec import Revisions
from pruning_comparison.store.journal import JOURNAL_SCHEMA
from pruning_comparison.store.records import MANIFEST_SCHEMA, TABLES, LookRecord, Manifest, ModelFacts, Reused
from pruning_comparison.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(ROOT / "docs" / "reference" / name for name in ("options.md", "run-folder.md"))
BLOCK = re.compile(
    r"(?P<first><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<last>\n<!-- end of generated -->)", re.DOTALL
)
SAID_DEFAULT = re.compile(r" \(default: (\d[\d.]*)\)")
"""A default that an option's help says in words: the parser holds none, because it has to tell whether one was given."""

SEE: Mapping[str, str] = {
    "prepare_precision": "../decisions/0002-prepared-in-float32.md",
    "pruning_method": "../methods.md#scores-which-heads-are-pruned-first",
    "entropy_direction": "../decisions/0004-direction-of-entropy.md",
    "timing_pairs": "../explanation/timing.md",
    "unit": "../decisions/0037-rectangles.md",
    "consent": "../decisions/0030-consent-by-savings.md",
    "no_new_bias": "../checkpoints.md#when-the-plain-form-is-possible",
    "recovery_steps": "../decisions/0029-recovery.md",
    "until_decided": "../decisions/0026-until-decided.md",
    "engine": "../performance.md#engines",
    "bos": "../decisions/0022-begin-of-sequence.md",
    "launcher": "../how-to/cluster.md",
    "model_name": "../models.md",
    "max_loss": "../checkpoints.md#making-one",
    "also": "../checkpoints.md",
    "dtype": "../checkpoints.md#files-for-llamacpp",
    "margin_speed": "../reading-the-report.md#the-verdicts",
}
"""Options that a page says more about: the page, from ``docs/reference``."""

COLUMNS: Mapping[str, str] = {
    "variant": "which variant; timings of the dense model have `dense`",
    "method": "which method ranked the heads",
    "iteration": "which replicate, from 0",
    "level": "per cent of the heads that were asked to be pruned",
    "status": "`done`, `failed`, or `part`: heads and perplexity are there, texts are missing",
    "reason": "why there is no result or no value, in words",
    "achieved_level": "per cent of the heads that are pruned: only whole heads can be",
    "heads_pruned": "number of heads that are pruned",
    "heads_total": "number of heads of the dense model",
    "fingerprint": "names weights and heads: equal where two models are the same",
    "details": "what else is known of the model, as JSON",
    "code_commit": "commit of the code that measured it",
    "phase": "`quality` or `timing`",
    "temperature": "sampling temperature; 0 is greedy decoding",
    "prompt": "which prompt, from 0",
    "document": "document of the evaluation text",
    "window": "window of that document, from 0",
    "repeat": "which repetition of a timing, from 0",
    "metric": "what was measured",
    "value": "the value; empty where it could not be measured",
    "unit": "unit of the value",
    "layer": "layer, from 0",
    "head": "head of the layer, from 0, counted as in the dense model",
    "score": "what the head was ranked by, higher = keep",
    "kept": "whether the head stays",
    "round_level": "the level that the round of negotiation led to",
    "state": "the head's state: `active`, `overloaded`, `misaligned`, `withdrawn` or `returned`",
    "utilisation": "share of its attention that is at work",
    "contribution": "share of the energy that its layer writes",
    "alignment": "correlation with what the rest of its layer writes",
    "redundancy": "share of what it writes that the others can reconstruct",
    "importance": "sum over sequences of the squared gradient of the loss with respect to its gate",
    "withdrawal_cost": "its price: nats of divergence after the others have adapted",
    "answer": "whether it consented, refused or was overridden",
    "asked_rank": "when it was asked, from 0",
    "cost": "its price when it was asked",
    "cost_limit": "the limit that the price was held against",
    "left_rank": "when it left, from 0; empty where it stayed",
    "left_cost": "its price when it left",
    "prompt_text": "the prompt",
    "text": "what the model wrote",
    "pairs": "timed generations of each model",
    "first_token_pairs": "timed first tokens of each model",
    "seconds": "seconds that it took",
    "speed_half_width": "half the width of the widest 95 % interval among the ratios of end-to-end time",
    "latency_half_width": "the same of first-token latency",
    "ended": "why timing ended: `precise`, `time limit` or `all alike`",
    "heads": "number of heads that the layer has",
    "engine": "which engine",
    "first_token_latency_s": "seconds to the first new token",
    "end_to_end_s": "seconds of the whole generation",
    "tokens": "new tokens of all rows together",
    "warm_up_s": "seconds before anything was timed: compiling, and one generation",
    "differing_share": "share of the tokens that differ from the native engine's on the same draws; of llama.cpp, of places "
    "with another likeliest token",
    "weights": "what the weights were stored as where the engine read a file of its own, such as `f32`; null elsewhere",
}  # fmt: skip
"""What the columns of the journal mean. A column means the same in every table."""

MANIFEST: Mapping[str, str] = {
    "spec": "every setting that can change a result, as `ComparisonSpec` has it",
    "spec_hash": "hash of the settings: the identity of the run",
    "revisions": "revisions of what computed the results; null in runs of 0.1.0",
    "inputs": "hashes of the model, texts and prompts that were read",
    "model": "the model that was pruned",
    "versions": "versions of Python and packages",
    "hardware": "the machine",
    "commit": "commit of the code that began the run",
    "started": "time in UTC",
    "finished": "time in UTC; null until every cell is measured",
    "warnings": "what the run warned of",
    "margins": "margins of the last report, as fractions",
    "reused": "what was taken over from earlier runs",
    "looks": "with `--until_decided`: the looks that were taken",
    "measured_s": "with `--until_decided`: seconds of measuring, in all sessions together",
    "ended": "with `--until_decided`: `decided`, `looks` or `budget`; null while the run goes on",
    "thread_times_s": "seconds by number of threads, where the number was measured",
    "schema_version": "version of the schema; absent in runs of 0.1.0",
    "name": "the model as it was asked for",
    "model_type": "its family",
    "layers": "number of layers",
    "heads_per_layer": "number of query heads of a layer",
    "head_size": "features of a head",
    "context_tokens": "longest context",
    "vocabulary": "number of tokens that there are",
    "hub_commit": "commit of the model on the hub",
    "run": "name of the earlier run's folder",
    "counts": "how much of what, each under its own name",
    "iterations": "iterations that were measured by then",
    "decided": "whether every primary answer was decided",
    "verdicts": "verdict of each method's primary answer",
    "protocol": "revision of how everything is measured",
    "methods": "revision of each method",
    "variants": "revision of each variant",
    "metrics": "revision of each metric",
}
"""What the fields of the manifest, and of the records in it, mean."""

ESTIMATES: Mapping[str, tuple[str, Sequence[str]]] = {
    "summary.csv": ("a row for each estimate", estimates.SUMMARY_COLUMNS),
    "relative.csv": ("every variant relative to the dense model, paired", relative.RELATIVE_COLUMNS),
    "contrasts.csv": ("every variant against the baseline, paired, level by level", estimates.CONTRAST_COLUMNS),
    "answers.csv": ("expectations and questions, and exploratory contrasts", hypotheses.HYPOTHESIS_COLUMNS),
    "rankings.csv": ("methods, and variants, in the order of their perplexity", rankings.RANKING_COLUMNS),
    "optimal_levels.csv": ("the highest level within the tolerance, per variant", tradeoffs.OPTIMUM_COLUMNS),
    "equal_perplexity.csv": ("speed where both variants are equally good", tradeoffs.EQUAL_COLUMNS),
    "strongest_baselines.csv": ("the best baseline of every level, and agency against it", strongest.STRONGEST_COLUMNS),
    "fronts.csv": ("perplexity, speed and cache, and what no other model beats", fronts.FRONT_COLUMNS),
    "head_agreement.csv": ("pruned heads that two choices have in common", head_maps.AGREEMENT_COLUMNS),
    "engines.csv": ("speed in every engine, with more than one", engines.ENGINE_COLUMNS),
    "tasks.csv": ("accuracy on every task, with `--tasks`", tasks.TASK_COLUMNS),
    "accuracy_lost.csv": ("with `--tasks`: does a level lose more accuracy than the margin", tasks.ACCURACY_COLUMNS),
    "missing.csv": ("how many values are missing, and why", estimates.MISSING_COLUMNS),
    "between_runs.csv": ("of `report RUN_A RUN_B`: each run against the first", between_runs.RUN_COLUMNS),
}
"""Files that are estimated: what a row is, and the columns."""

PLAIN = {
    str: ("text", "TEXT"), int: ("whole number", "INTEGER"), float: ("number", "REAL"), bool: ("true or false", "INTEGER"),
    type(None): ("null", ""), Any: ("any value", ""),
}  # fmt: skip
"""Types as words, and as SQLite stores them."""


def options() -> str:
    """Every command with its options, in their groups. An option that `run` has as well is only named."""
    commands = make_parser().commands
    known = {_signature(action) for action in commands["run"]._actions}
    parts = []
    for name, parser in commands.items():
        usage = " ".join((parser.usage or "").split())
        parts += [f"## {name}", str(parser.description), f"```text\n{usage}\n```"]
        shared: list[str] = []
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if "--help" not in action.option_strings]
            if name != "run":
                shared += [f"`{_names(action)[0]}`" for action in actions if _signature(action) in known]
                actions = [action for action in actions if _signature(action) not in known]
            if actions:
                title = {"positional arguments": "arguments", "options": "its own"}.get(
                    str(group.title), str(group.title)
                )
                parts += [f"### {name}: {title}", *([_positional(actions)] if not actions[0].option_strings else [])]
                if actions[0].option_strings:
                    rows = [(_shown(action), _default(action), _meaning(action)) for action in actions]
                    parts.append(_table(("option", "default", "meaning"), rows))
        if len(shared) == len(known) - 1:  # all but --help
            parts.append("It also takes every option of [run](#run).")
        elif shared:
            parts.append(
                f"It also takes these options, which mean what they mean for [run](#run): {', '.join(shared)}."
            )
    return "\n\n".join(parts)


def _names(action: argparse.Action) -> list[str]:
    return list(action.option_strings)


def _signature(action: argparse.Action) -> tuple[Any, ...]:
    return (*_names(action), action.help, action.default)


def _shown(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in _names(action))


def _default(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "off"
    if action.default in (None, ""):
        said = SAID_DEFAULT.search(action.help or "")
        return f"`{said[1]}`" if said else "none"
    return f"`{action.default}`"


def _meaning(action: argparse.Action) -> str:
    text = escape(SAID_DEFAULT.sub("", action.help or ""), quote=False).replace("|", r"\|")
    page = next((SEE[name[2:]] for name in _names(action) if name[2:] in SEE), None)
    return f"{text} ([more]({page}))" if page else text


def _positional(actions: Sequence[argparse.Action]) -> str:
    return _table(("argument", "meaning"), [(f"`{action.metavar}`", _meaning(action)) for action in actions])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def journal() -> str:
    """Every table of the journal, from the record of its rows."""
    parts = [f"`PRAGMA user_version` is {JOURNAL_SCHEMA}."]
    for name, record in TABLES.items():
        kinds = get_type_hints(record)
        rows = []
        for field in fields(record):
            plain, *rest = [
                part for part in get_args(kinds[field.name]) or (kinds[field.name],) if part is not type(None)
            ]
            assert not rest, f"{name}.{field.name} has more than one type"
            empty = type(None) in get_args(kinds[field.name])
            stored = f"{PLAIN[plain][1]}{', may be empty' if empty else ''}"
            rows.append((f"`{field.name}`", stored, _explained(field.name, COLUMNS, f"table {name}", "COLUMNS")))
        parts += [f"### Table {name}", _prose(record), _table(("column", "type", "meaning"), rows)]
    return "\n\n".join(parts)


def manifest() -> str:
    """The manifest and the records in it, from their fields."""
    parts = [f"`schema_version` is {MANIFEST_SCHEMA}."]
    for title, record in (
        ("The manifest", Manifest), ("Its model", ModelFacts), ("Its revisions", Revisions), ("An entry of reused", Reused),
        ("An entry of looks", LookRecord),
    ):  # fmt: skip
        kinds = get_type_hints(record)
        rows = [
            (
                f"`{field.name}`",
                _words(kinds[field.name]),
                _explained(field.name, MANIFEST, record.__name__, "MANIFEST"),
            )
            for field in fields(record)
            if field.name != "others"
        ]
        parts += [f"### {title}", _table(("field", "type", "meaning"), rows)]
    return "\n\n".join(parts)


def estimated() -> str:
    """The columns of every file that is estimated."""
    rows = [
        (f"`{name}`", meaning, ", ".join(f"`{column}`" for column in columns))
        for name, (meaning, columns) in ESTIMATES.items()
    ]
    return _table(("file", "rows", "columns"), rows)


def _explained(name: str, meanings: Mapping[str, str], place: str, mapping: str) -> str:
    if name not in meanings:
        raise KeyError(f"{place} has {name}, which nothing explains: add it to {mapping} in {Path(__file__).name}")
    return meanings[name]


def _prose(record: type) -> str:
    """The first paragraph of a record's docstring."""
    return " ".join(cleandoc(record.__doc__ or "").split("\n\n")[0].split())


def _words(kind: Any) -> str:
    """A type of Python as what JSON holds."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind][0]
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        return f"list of {_words(parts[0])}"
    if parts:
        return f"mapping to {_words(parts[-1])}"
    return {"ModelFacts": "its model", "Revisions": "its revisions", "Reused": "entries", "LookRecord": "entries"}[
        kind.__name__
    ]


def presets() -> str:
    """The presets and what each of them sets."""
    rows = [
        (f"`{preset.name}`", preset.summary, ", ".join(f"`--{name}={value}`" for name, value in preset.options.items()))
        for preset in PRESETS.values()
    ]
    return _table(("preset", "what it is for", "sets"), rows)


def methods() -> str:
    """The methods in the order of their records."""
    return _table(
        ("method", "a head is pruned early if it …"), [(f"`{name}`", one.summary) for name, one in METHODS.items()]
    )


def variants() -> str:
    """The variants in the order of their records."""
    return _table(("variant", "what it is"), [(f"`{name}`", one.summary) for name, one in VARIANTS.items()])


WRITERS: Mapping[str, Callable[[], str]] = {
    "options": options, "journal": journal, "manifest": manifest, "estimates": estimated,
    "presets": presets, "methods": methods, "variants": variants,
}  # fmt: skip
"""What is generated, by the names that stand in the pages."""


def written(page: str) -> str:
    """A page with what is generated in it made anew. KeyError for a block that nothing writes."""
    return BLOCK.sub(lambda block: f"{block['first']}\n{WRITERS[block['name']]()}\n{block['last']}", page)


def outdated() -> Iterator[tuple[Path, str]]:
    """Pages that do not say what the code says, and what they would have to say."""
    for path in PAGES:
        before = path.read_text("utf-8")
        after = written(before)
        if after != before:
            yield path, after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the generated parts of docs/reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    arguments = parser.parse_args(argv)
    found = list(outdated())
    for path, text in found:
        if not arguments.check:
            path.write_text(text, "utf-8")
        print(f"{path.relative_to(ROOT)} {'is out of date: run make reference' if arguments.check else 'written'}")
    return int(arguments.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
