"""The command line: parsing and words only."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, NoReturn

from pruning_comparison import __version__
from pruning_comparison.engines import ENGINES, NATIVE
from pruning_comparison.environment import let_threads_sleep
from pruning_comparison.errors import InputError, Interrupted, PruningComparisonError
from pruning_comparison.formatting import file_name_of, unknown_name
from pruning_comparison.methods import METHODS, Method
from pruning_comparison.options import parts_of, with_presets_and_files, with_underscores
from pruning_comparison.presets import PRESETS
from pruning_comparison.progress import Live, steps_of
from pruning_comparison.spec import (
    ADAPTATIONS,
    AUTO,
    BOS_RULES,
    BUNDLED_TASKS,
    CONSENT_RULES,
    ENTROPY_DIRECTIONS,
    EXECUTIONS,
    LOOKS,
    PRECISIONS,
    PRUNE_UNITS,
    RECOVERY_GRID,
    RECOVERY_RATES,
    SCOPES,
    ComparisonSpec,
    available_cores,
)
from pruning_comparison.variants import VARIANTS

if TYPE_CHECKING:
    from pruning_comparison.run.inputs import Inputs
    from pruning_comparison.run.launchers import Launcher
    from pruning_comparison.run.pruned_model import PrunedModel
    from pruning_comparison.run.tracking import Tracking
    from pruning_comparison.run.workspace import Workspace

DEFAULT_OUTPUT_DIR = "validation_results/pruning_agency"
LAUNCHERS = ("serial", "ray")
TRACKER_NAMES = ("mlflow", "wandb", "tensorboard")
_ALSO = ("plain", "padded", "gguf")
_METHOD_NAMES = f"{', '.join(METHODS)}, or package.module:function for one of your own"
CHECKOUT = Path(__file__).resolve().parents[2]
MARGIN_OPTIONS: Mapping[str, tuple[str, int, str]] = {
    "margin_speed": ("speed", 100, "per cent of speed that matter (default: 2)"),
    "margin_quality": ("quality", 100, "per cent of perplexity that matter (default: 5)"),
    "margin_diversity": ("diversity", 1, "distance of distinct-2 that matters (default: 0.02)"),
    "margin_latency": ("latency", 100, "per cent of first-token latency that matter (default: 2)"),
    "margin_accuracy": ("accuracy", 100, "percentage points of accuracy on tasks that matter (default: 2)"),
    "tolerance": ("tolerance", 100, "per cent by which perplexity may rise at a safe level (default: 5)"),
}
"""Options that say what matters: the margin that each sets, how many of its units make a whole, and what it means.

They change verdicts and nothing that is measured, so they are no part of the spec.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C."""
    let_threads_sleep()
    arguments = list(sys.argv[1:] if argv is None else argv)
    search_path = list(sys.path)
    try:
        options = parse(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as finished:
        return int(finished.code or 0)
    previous = _terminate_like_ctrl_c()
    try:
        return int(options.command(options))
    except PruningComparisonError as error:
        if options.debug_traceback:
            traceback.print_exc()
        print(f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was measured that could be kept", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        if options.debug_traceback:
            traceback.print_exc()
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}.{_what_is_kept(options)}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug_traceback:
            traceback.print_exc()
        print(
            f"error: {type(error).__name__}: {error}\n"
            f"This is a bug in pruning-comparison; --debug_traceback shows where.{_what_is_kept(options)}",
            file=sys.stderr,
        )
        return 1
    finally:
        sys.path[:] = search_path
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _what_is_kept(options: argparse.Namespace) -> str:
    """What to say after a failure, where this command has an unfinished run with something measured in it; else nothing."""
    if options.command is not _run or options.visualize_only:
        return ""
    try:
        from pruning_comparison.store import RunStore, latest_run, read_manifest

        folder = latest_run(Path(options.output_dir))
        if folder is None or read_manifest(folder).finished is not None:
            return ""
        with RunStore(folder) as store:
            kept = len(store.finished_cells())
    except Exception:  # whatever keeps a run from being read, nothing can be promised of it
        return ""
    return f" What was measured before is kept in {folder}, and the same command continues." if kept else ""


def make_parser() -> _Parser:
    """The parser of all commands. Option names have underscores; dashes are accepted as well."""
    parser = _Parser(
        prog="pruning-comparison",
        description="Compares baseline and agency-enabled language models under progressive pruning of attention heads.",
        epilog="example:\n  pruning-comparison run --preset=quick --model_name=bundled",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    parser.commands = commands.choices

    def command(
        name: str, does: Callable[[argparse.Namespace], int], usage: str, *, in_short: str, says: str, shows: str
    ) -> _Parser:
        added: _Parser = commands.add_parser(
            name,
            usage=f"pruning-comparison {name} {usage}",
            help=in_short,
            description=says,
            epilog=f"examples:\n{shows}",
            formatter_class=_HelpFormatter,
        )
        added.set_defaults(command=does)
        return added

    run = command(
        "run",
        _run,
        "[OPTION ...]",
        in_short="measure, compare, and write the report",
        says="Prunes every variant at several levels, measures and compares them, and ends with the answer. The same "
        "command continues a run that was interrupted, and shows the answer of one that is finished. Options may be "
        "written with underscores or dashes.",
        shows="""\
  pruning-comparison run --preset=quick --model_name=bundled
  pruning-comparison run --model_name=gpt2 --pruning_method=entropy,random
  pruning-comparison run --config=results/latest/run.yaml --fresh
  pruning-comparison run --eval_text=test.txt --calibration_text=train.txt""",
    )
    _add_run_options(run)
    report = command(
        "report",
        _report,
        "[OPTION ...] [RUN ...]",
        in_short="draw the report of a run again, or compare two or more runs",
        says="Draws tables, charts and report of a finished or interrupted run again. With two or more runs, compares each "
        "of them with the first and writes one report about all.",
        shows="""\
  pruning-comparison report
  pruning-comparison report results/latest --margin_quality=10
  pruning-comparison report RUN_A RUN_B RUN_C""",
    )
    report.add_argument(
        "folders",
        nargs="*",
        metavar="RUN",
        default=DEFAULT_OUTPUT_DIR,
        help="run folder, or one that holds runs (then its latest); of several, each is compared with the first",
    )
    report.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR, help="where a comparison of runs is written")
    report.add_argument("--save_outputs", action="store_true", help="also write all generated texts as a table")
    _add_margin_options(report)
    _add_common_options(report)
    plan = command(
        "plan",
        _plan,
        "[OPTION ...]",
        in_short="say what a run would measure and what it could find out, without measuring",
        says="Says what a run with the same options would measure and what it could find out. Reads config, tokenizer and "
        "texts only.",
        shows="""\
  pruning-comparison plan --model_name=gpt2 --iterations=5
  pruning-comparison plan --preset=paper --model_name=gpt2 --json""",
    )
    _add_run_options(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    prune = command(
        "prune",
        _prune,
        "(--level=N | --max_loss=N | ...) [OPTION ...]",
        in_short="prune one model and save it, with a card that says what it costs",
        says="Prunes a model to one level, as far as a loss allows, or until it is fast enough, by one method, as a "
        "comparison would, or makes a model of a run again. Saves it with a model card: what was cut, perplexity, speed "
        "and bytes before and after, how it was made, and how it loads again.",
        shows="""\
  pruning-comparison prune --model_name=gpt2 --level=30
  pruning-comparison prune --model_name=gpt2 --max_loss=5
  pruning-comparison prune --model_name=gpt2 --level=50 --also=plain
  pruning-comparison prune --from=validation_results/pruning_agency --best""",
    )
    model = prune.add_argument_group("the pruned model")
    how_far = model.add_mutually_exclusive_group(required=True)
    how_far.add_argument(
        "--level", "--pruning_level", type=_number, help="per cent of the heads, above 0 and below 100"
    )
    how_far.add_argument(
        "--max_loss",
        type=_number,
        help="in place of a level: per cent by which perplexity may rise. As many heads go as prices predict to be "
        "possible, and fewer where that is measured to cost more, on calibration text that nothing else has read",
    )
    how_far.add_argument(
        "--target_speedup",
        type=_number,
        help="in place of a level: how many times as fast as the dense model it is to be, such as 1.2. The fewest heads go "
        "that measured times of layers predict to be enough, and more where a measurement finds less; with --from, the "
        "run's lowest level that was so fast",
    )
    how_far.add_argument(
        "--best",
        action="store_true",
        help="with --from: the highest safe level of the run, as its report has it",
    )
    model.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN",
        default=None,
        help="make the very model again that a run has measured, of the heads in its journal, by the run's own settings: a "
        "run folder, or one that holds runs (then its latest)",
    )
    model.add_argument(
        "--method",
        "--pruning_method",
        default=None,
        help=f"one of {_METHOD_NAMES} (default: fisher; with --from: any of the run's)",
    )
    model.add_argument(
        "--variant",
        default=None,
        help=f"one of {', '.join(VARIANTS)} (default: agency; with --from and --best or --target_speedup: any of the run's)",
    )
    model.add_argument(
        "--output_dir",
        default=None,
        help="the new folder of the model; by default pruned_models/<model>_<variant>_<method>_<level>, or "
        "_max_loss_<loss>, or _speedup_<times>",
    )
    model.add_argument(
        "--also",
        default="",
        help=f"comma-separated, from {', '.join(_ALSO)}: also save it in these forms, which need no custom code, in "
        "subfolders; gguf is a file for llama.cpp",
    )
    model.add_argument("--no_measure", action="store_true", help="do not measure perplexity and speed for the card")
    shared = prune.add_argument_group("the Hugging Face hub")
    shared.add_argument(
        "--push_to_hub",
        default=None,
        metavar="NAME",
        help="also send the saved model to the hub, into the repository NAME or OWNER/NAME",
    )
    _add_hub_options(shared)
    _add_run_options(prune, without=_NOT_FOR_ONE_MODEL)
    _add_common_options(prune)
    export = command(
        "export",
        _export,
        "FOLDER [OPTION ...]",
        in_short="write a pruned model as a file for llama.cpp",
        says="Writes a pruned model that prune has saved into a GGUF file, which llama.cpp runs as it is: one of the types "
        "llama, mistral (without a sliding window) and qwen2, with as many query heads for each of a layer's key-value "
        "heads.",
        shows="""\
  pruning-comparison export pruned_models/llama_agency_fisher_30
  pruning-comparison export FOLDER --to=gguf --dtype=q8_0 --output=small.gguf""",
    )
    export.add_argument("folder", metavar="FOLDER", help="what prune or run --save_models has saved: the compact form")
    file = export.add_argument_group("the file")
    file.add_argument("--to", default="gguf", help="the format; there is one")
    file.add_argument(
        "--dtype",
        default="f16",
        help="f32, f16 or q8_0: what matrices are stored as; only f32 keeps the model's own numbers",
    )
    file.add_argument("--output", default=None, help="the new file; by default FOLDER/model-<dtype>.gguf")
    _add_common_options(export)
    push = command(
        "push",
        _push,
        "FOLDER [OPTION ...]",
        in_short="send a saved model to the Hugging Face hub",
        says="Sends a pruned model that prune has saved to the Hugging Face hub, with its card: what was cut, evaluation "
        "results in the hub's metadata, base model and licence. The repository is private unless --public says otherwise.",
        shows="""\
  pruning-comparison push pruned_models/gpt2_agency_fisher_30 --dry_run
  pruning-comparison push FOLDER --name=me/gpt2-30 --public""",
    )
    push.add_argument("folder", metavar="FOLDER", help="what prune or run --save_models has saved")
    shared = push.add_argument_group("the Hugging Face hub")
    shared.add_argument(
        "--name", default=None, help="the repository, NAME or OWNER/NAME; by default the name of the folder"
    )
    _add_hub_options(shared)
    _add_common_options(push)
    return parser


def _add_hub_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--public", action="store_true", help="everyone may read the repository; by default it is private"
    )
    group.add_argument("--dry_run", action="store_true", help="send nothing: show what would go to the hub")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of one command, with those of its preset and of its file. InputError for what cannot work."""
    parser, words = make_parser(), with_underscores(argv)
    if words and words[0] in parser.commands:
        words = with_presets_and_files(words, parser.commands[words[0]].options())
    options = parser.parse_args(words)
    known = parser.commands[words[0]].options() if words and words[0] in parser.commands else {}
    names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    options.given = {known[name].dest: f"--{name}" for name in names if name in known}
    return options


def would_resume(argv: Sequence[str]) -> bool:
    """Whether ``run`` with these options would continue an unfinished run; False where the options cannot work."""
    search_path = list(sys.path)
    try:
        options = parse(["run", *argv])
        if not any(Path(options.output_dir).glob("run_*/manifest.json")):
            return False
        if options.fresh:
            return False
        from pruning_comparison.run.comparison import would_resume as comparison_would_resume
        from pruning_comparison.run.threads import stored_threads

        with Live(quiet=True):
            spec, output_dir = _spec_of(options), Path(options.output_dir)
            threads = options.threads or stored_threads(spec, output_dir)
            return threads is not None and comparison_would_resume(replace(spec, threads=threads), output_dir)
    except (PruningComparisonError, SystemExit):
        return False
    finally:
        sys.path[:] = search_path


class _Parser(argparse.ArgumentParser):
    """Errors become InputError, so that every bad option reads and exits alike; no abbreviations, which change meaning."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})
        self.commands: Mapping[str, _Parser] = {}

    def options(self) -> dict[str, argparse.Action]:
        """What sets each option, by its names without the dashes before them."""
        return {name.removeprefix("--"): action for action in self._actions for name in action.option_strings}

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}.{self._meant(message)} See {self.prog} --help.")

    def _meant(self, message: str) -> str:
        """The option that is nearest to an unknown one, among those of all commands."""
        unknown = re.search(r"unrecognized arguments: --([^\s=]+)", message)
        known = {name for parser in (self, *self.commands.values()) for name in parser.options() if len(name) > 2}
        near = get_close_matches(unknown[1], sorted(known), n=1) if unknown else []
        return f" Did you mean --{near[0]}?" if near else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where it says something: what happens without an option that has none is in its own words.

    Descriptions are filled as elsewhere; examples, which begin with spaces, keep their lines.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or isinstance(action.default, bool) or action.default == ""
        return action.help if says_nothing else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text if "\n" in text else argparse.HelpFormatter._fill_text.__get__(self)
        return str(fill(text, width, indent))


_NOT_FOR_ONE_MODEL = frozenset(
    {
        "preset", "pruning_levels", "pruning_method", "variants", "temperatures", "iterations", "output_dir", "execution",
        "until_decided", "budget", "save_outputs", "save_models", "memory_logging", "visualize_only", "fresh", "no_update",
        "margins", "launcher", "ray_address", "workers", "engine", "tasks", "limit", "track", "wikitext_words",
    }
)  # fmt: skip


def _add_run_options(parser: argparse.ArgumentParser, *, without: frozenset[str] = frozenset()) -> None:
    """The options of a comparison, in groups, but for those named in ``without``."""
    default = {field.name: field.default for field in fields(ComparisonSpec)}
    group: argparse._ArgumentGroup = parser.add_argument_group("sets of options")

    def add(name: str, **kwargs: Any) -> None:
        if name not in without:
            group.add_argument(f"--{name}", **{"default": default.get(name), **kwargs})

    def flag(name: str, meaning: str, **kwargs: Any) -> None:
        if name not in without:
            group.add_argument(f"--{name}", **{"action": "store_true", "help": meaning, **kwargs})

    add("preset", metavar="NAME", help="; ".join(f"{preset.name}: {preset.summary}" for preset in PRESETS.values()))
    add(
        "config",
        metavar="FILE.yaml",
        help="also take options from a file, such as the run.yaml of a run: a mapping of names to values. It replaces what "
        "a preset sets, and the command line replaces both",
    )
    flag(
        "trust_methods",
        "allow --config to name methods of your own, package.module:function, and files of tasks, whose code is then run",
    )

    group = parser.add_argument_group("what is pruned, and how")
    add(
        "model_name",
        help="hub id (gpt2, ...), local folder, bundled, smollm2-135m, gemma3-270m, or a .gguf file of those",
    )
    add("pruning_levels", default="0,20,40,60,80", help="per cent of the heads, comma-separated, each in [0, 100)")
    add("pruning_method", default="entropy", help=f"comma-separated, from {_METHOD_NAMES}")
    add("variants", default="baseline,agency", help=f"comma-separated, from {', '.join(VARIANTS)}")
    add("execution", help=f"{' or '.join(EXECUTIONS)}: heads are physically removed, or their gates are closed")
    add("scope", help=f"{' or '.join(SCOPES)}: heads are ranked over the whole model, or within each layer")
    add(
        "unit",
        default=default["prune_unit"],
        help=f"{', '.join(PRUNE_UNITS)}: heads are pruned one by one; with all others that read the same keys and values; "
        "or so that each layer keeps as many of each such group, and stays an ordinary grouped-query layer",
    )
    add("entropy_direction", help=f"{', '.join(ENTROPY_DIRECTIONS)}: which heads are pruned first under entropy")
    add(
        "consent",
        help=f"{', '.join(CONSENT_RULES)}: whether a head's answer depends on its price, or on its price per unit of "
        "decoding time or cache bytes that removing it saves",
    )
    add(
        "adaptation",
        help=f"{', '.join(ADAPTATIONS)}: how far the surviving heads adapt, each step including those before it",
    )
    add("ridge", type=float, help="ridge of the adaptation of attention, relative to the mean diagonal")
    add("mlp_ridge", type=float, help="ridge of the adaptation of the MLP, relative to the mean diagonal")
    flag(
        "no_new_bias",
        "adaptation adds no bias where the family has none, so that a plain checkpoint can hold the model",
        dest="new_bias",
        action="store_false",
    )
    add(
        "recovery_steps",
        type=_whole_number,
        help="steps of distillation from the dense model, the same for every variant",
    )
    if "recovery_learning_rate" not in without:
        group.add_argument(
            "--recovery_learning_rate",
            "--recovery_rate",
            dest="recovery_rate",
            type=_number_or_auto,
            default=default["recovery_rate"],
            help="learning rate of the recovery steps, or auto: chosen from "
            f"{', '.join(f'{rate:g}' for rate in RECOVERY_RATES)} on held-out calibration text, for each model",
        )
    add(
        "recovery_parameters",
        help=f"{', '.join(RECOVERY_GRID)} or auto: whether recovery trains all weights of the blocks, or output "
        "projections, norms and biases alone; auto: chosen as the rate is",
    )

    group = parser.add_argument_group("how much is measured")
    add(
        "iterations",
        default=None,
        type=_whole_number,
        help=f"replicates, each with its own seed (default: {default['iterations']})",
    )
    flag(
        "until_decided",
        "instead of --iterations: go on until the primary answers are decided, which is looked at after "
        f"{', '.join(map(str, LOOKS))} iterations",
    )
    add("budget", type=_duration_s, default=None, help="with --until_decided: maximum time, such as 90s, 30m or 2h")
    add("temperatures", default="0.7,1.0", help="comma-separated; 0 is greedy decoding")
    add("num_tokens", type=_whole_number, help="new tokens per prompt")
    add("max_prompts", type=_whole_number, help="maximum number of prompts")
    add("batch_size", type=_whole_number, help="prompts per timed batch")
    add("timing_pairs", type=_whole_number, help="minimum number of timed generations of each model at a level")
    add(
        "timing_precision_percent",
        type=_number,
        help="timing goes on until every ratio is known to within this percentage",
    )
    add(
        "engine",
        default=NATIVE,
        help="what the models are timed in, side by side, comma-separated: "
        + "; ".join(f"{engine.name}, {engine.summary}" for engine in ENGINES.values()),
    )
    add("timing_limit_s", type=_number, help="maximum time for timing one level, in seconds")
    flag("memory_logging", "measure and log peak memory")
    add(
        "tasks",
        default="",
        help="zero-shot tasks whose accuracy is measured, comma-separated: any of lm-evaluation-harness (extra tasks), the "
        f"YAML file of one, or {' and '.join(BUNDLED_TASKS)}, which need no network",
    )
    add(
        "limit",
        dest="task_limit",
        type=_whole_number,
        help="maximum number of questions of each task, from its first on",
    )
    add("seed", type=_whole_number, help="seed of everything random")

    group = parser.add_argument_group("texts")
    add("prompt_file", help="text file with one prompt per line; by default the bundled prompts")
    add(
        "eval_text",
        help="what perplexity is measured on: bundled:held_out, a text file, a folder of .txt files, or hf:DATASET:SPLIT of "
        "the hub",
    )
    add("eval_tokens", type=_whole_number, help="tokens of evaluation text, spread over its documents")
    add("eval_window", type=_whole_number, help="perplexity window in tokens (at most the model's context)")
    add("eval_stride", type=_whole_number, help="step between perplexity windows in tokens")
    add(
        "bos",
        help=f"{', '.join(BOS_RULES)}: whether texts begin with the begin-of-sequence token; auto: as the tokenizer does",
    )
    flag(
        "wikitext_words",
        "also measure WikiText's word perplexity as lm-evaluation-harness has it, on whole pages of the evaluation text",
    )
    add("calibration_text", help="what scores and adaptation may read; must share no document with the evaluation text")
    add("calibration_tokens", type=_whole_number, help="tokens of calibration text per iteration")
    add("calibration_window", type=_whole_number, help="tokens per calibration window")
    add(
        "score_tokens",
        type=_whole_number,
        help="number of these that heads are scored on; by default 4096 for entropy and all for other methods (slow ones "
        "such as ablation need few)",
    )

    group = parser.add_argument_group("where it is measured")
    add("device", default=None, help="cpu, cuda or cuda:N; by default the best available")
    add("precision", default=None, help=f"{', '.join(PRECISIONS)}; by default float16 on a GPU and float32 elsewhere")
    add(
        "prepare_precision",
        help=f"{', '.join(PRECISIONS)}: of matrix products while heads are scored and survivors adapt; weights stay float32",
    )
    add(
        "threads",
        type=_whole_number,
        default=None,
        help="CPU threads; by default those that a short measurement finds best",
    )
    add("quality_batch_size", type=_whole_number, help="sequences per batch where nothing is timed")
    add("launcher", default="serial", help=f"{' or '.join(LAUNCHERS)}: one process, or workers on a Ray cluster")
    add("ray_address", help="address of an existing cluster: auto, or host:port; by default a local one is started")
    add("workers", type=_whole_number, help="with ray: maximum number of workers; by default as many as fit")

    group = parser.add_argument_group("what is kept")
    add("output_dir", default=DEFAULT_OUTPUT_DIR, help="where run folders go")
    flag("save_outputs", "also write all generated texts as a table")
    add(
        "track",
        default="",
        help=f"trackers that are sent the run, comma-separated, from {', '.join(TRACKER_NAMES)}: settings, every estimate "
        "with its interval as it comes, charts and report. Each is an extra to install",
    )
    flag("save_models", "also save every pruned model, in the run folder under models")
    flag("fresh", "measure everything again in a new run folder, even if such a run is finished or was interrupted")
    flag("visualize_only", "measure nothing; draw the latest run again")
    flag("no_update", "for the scripts: do not fetch the latest code first")
    if "margins" not in without:
        _add_margin_options(parser)
        _add_common_options(parser)


def _add_margin_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what counts as a difference (changes verdicts, and nothing that is measured)")
    for name, (_, _, meaning) in MARGIN_OPTIONS.items():
        group.add_argument(f"--{name}", type=_number, default=None, help=meaning)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="print only errors and the path of the report")
    group.add_argument("--debug_traceback", action="store_true", help="show where in the code an error arose")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _duration_s(text: str) -> float:
    """A time such as 30m, in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 2h")
    return float(found[1]) * _SECONDS[found[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _number_or_auto(text: str) -> float | str:
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def _margins_of(options: argparse.Namespace) -> dict[str, float]:
    """The margins that were given, as fractions; InputError for what cannot be one."""
    given: dict[str, float] = {}
    for name, (margin, whole, _) in MARGIN_OPTIONS.items():
        value = getattr(options, name)
        if value is None:
            continue
        if not (math.isfinite(value) and 0 <= value < whole):
            raise InputError(
                f"--{name}: {value} must be at least 0 and below {whole}. Give what matters, such as {0.02 * whole:g}."
            )
        given[margin] = value / whole
    return given


def _numbers(text: str, option: str) -> tuple[float, ...]:
    numbers = []
    for part in text.split(","):
        if not part.strip():
            continue
        try:
            numbers.append(float(part))
        except ValueError:
            raise InputError(
                f"--{option}: {part.strip()!r} is not a number. Give numbers separated by commas."
            ) from None
    return tuple(numbers)


def _methods(text: str) -> tuple[str | Method, ...]:
    """Names of methods; one with a colon is a user's own, whose module may be in the working directory."""
    names = parts_of(text, METHODS)
    if any(":" in name for name in names) and (here := str(Path.cwd())) not in sys.path:
        # Behind all else: what lies here must not stand in for an installed package.
        sys.path.append(here)
    return tuple(Method(name, score=name) if ":" in name else name for name in names)


def _spec_of(options: argparse.Namespace, *, here: bool = True) -> ComparisonSpec:
    """The spec that the options ask for. The device is resolved last, since that needs torch.

    Where the run is not to be made ``here``, a GPU is taken to be there and to compute in the precision asked for.
    """
    values: dict[str, Any] = {
        field.name: getattr(options, field.name, field.default) for field in fields(ComparisonSpec)
    }
    values["prune_unit"] = getattr(options, "unit", values["prune_unit"])
    if values["iterations"] is None:
        usual = next(field.default for field in fields(ComparisonSpec) if field.name == "iterations")
        values["iterations"] = LOOKS[-1] if values["until_decided"] else usual
    values["pruning_levels"] = _numbers(options.pruning_levels, "pruning_levels")
    values["temperatures"] = _numbers(options.temperatures, "temperatures")
    values["pruning_methods"] = _methods(options.pruning_method)
    values["variants"] = parts_of(options.variants, VARIANTS)
    values["engines"] = parts_of(getattr(options, "engine", NATIVE), ENGINES)
    values["tasks"] = parts_of(getattr(options, "tasks", ""), BUNDLED_TASKS)
    values["threads"] = options.threads if options.threads is not None else available_cores()
    unresolved = ComparisonSpec(**{**values, "device": "cpu", "precision": options.precision or "float32"})
    from pruning_comparison.models.devices import planned_device, resolve_device, resolve_precision

    device = resolve_device(options.device) if here else planned_device(options.device)
    precision = resolve_precision(options.precision, device) if here or not options.precision else options.precision
    return ComparisonSpec(**{**unresolved.as_dict_of_tuples(), "device": device, "precision": precision})


def _with_threads(
    spec: ComparisonSpec, options: argparse.Namespace, output_dir: Path | None
) -> tuple[ComparisonSpec, Mapping[int, float] | None]:
    """The spec with the threads of the run that it goes on with, or those measured to be best; and what was measured."""
    if options.threads is not None:
        return spec, None
    from pruning_comparison.models import preview_model
    from pruning_comparison.run.threads import with_threads

    with Live(quiet=options.quiet):
        return with_threads(spec, output_dir, lambda: preview_model(spec.model_name).config)


def _launcher_of(options: argparse.Namespace) -> Launcher:
    """Who measures. InputError for options that cannot work, or where what they need is not installed."""
    if options.launcher not in LAUNCHERS:
        raise InputError(f"--launcher: {options.launcher!r} is unknown. Choose from {', '.join(LAUNCHERS)}.")
    if options.launcher == "serial":
        for name in ("ray_address", "workers"):
            if (value := getattr(options, name)) is not None:
                raise InputError(f"--{name}: {value!r} needs --launcher=ray. Leave it out, or give that as well.")
    if options.workers is not None and options.workers < 1:
        raise InputError(
            f"--workers: {options.workers} must be at least 1. Leave it out for as many as there is room for."
        )
    from pruning_comparison.run.launchers import RayLauncher, launch_serially

    return launch_serially if options.launcher == "serial" else RayLauncher(options.ray_address, options.workers)


def _run(options: argparse.Namespace) -> int:
    output_dir = Path(options.output_dir)
    if options.visualize_only:
        return _visualize(output_dir, options)
    spec = _spec_of(options)
    margins = _margins_of(options)
    launcher = _launcher_of(options)
    from pruning_comparison.run.tracking import start_tracking, track_again
    from pruning_comparison.store.run_folder import check_writable

    check_writable(output_dir)
    with Live(quiet=options.quiet):
        tracking = start_tracking(parts_of(options.track, TRACKER_NAMES))
    spec, thread_times_s = _with_threads(spec, options, None if options.fresh else output_dir)
    if not options.fresh and (folder := _finished_run(spec, options)) is not None:
        code = _show_again(folder, options, margins)
        with Live(quiet=options.quiet):
            track_again(tracking, folder, spec)
        return code
    failed = True
    try:
        code = _measure_and_show(spec, options, margins, launcher, thread_times_s, tracking)
        failed = code != 0
    finally:
        with Live(quiet=options.quiet):
            tracking.finish(failed=failed)
    return code


def _measure_and_show(
    spec: ComparisonSpec,
    options: argparse.Namespace,
    margins: Mapping[str, float],
    launcher: Launcher,
    thread_times_s: Mapping[int, float] | None,
    tracking: Tracking,
) -> int:
    """Measures what is missing of a run, draws it, and shows its answer; the exit code."""
    try:
        with Live(quiet=options.quiet, steps=steps_of(spec)) as live:
            live.say(f"comparing {', '.join(spec.variants)} on {spec.model_name} ({spec.device}, {spec.precision})")
            from pruning_comparison.run.comparison import run_comparison
            from pruning_comparison.run.provenance import commit_of

            folder = run_comparison(
                spec,
                output_dir=Path(options.output_dir),
                on_progress=live.progress,
                on_measured=live.measured,
                code_commit=commit_of(CHECKOUT),
                raise_failures=options.debug_traceback,
                save_models=options.save_models,
                launcher=launcher,
                fresh=options.fresh,
                more_options=_more_options(options),
                budget_s=options.budget,
                thread_times_s=thread_times_s,
                tracking=tracking,
            )
    except Interrupted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        if stopped.folder is not None:
            _report_what_there_is(stopped.folder, options, margins)
        return stopped.exit_code
    try:
        report = _drawn(folder, options, margins)
    except KeyboardInterrupt:
        raise Interrupted(
            f"everything is measured and kept in {folder}; pruning-comparison report {folder} draws it.", folder
        ) from None
    failed = _failed_cells(folder)
    _show(report, options)
    if failed:
        print(f"error: {failed} cells failed; the report names them. The same command tries again.", file=sys.stderr)
    return 1 if failed else 0


def _failed_cells(folder: Path) -> int:
    from pruning_comparison.store.journal import RunStore

    with RunStore(folder) as store:
        return int((store.table("cells")["status"] == "failed").sum())


def _finished_run(spec: ComparisonSpec, options: argparse.Namespace) -> Path | None:
    """A finished run that already has everything that this command asks to be measured."""
    output_dir = Path(options.output_dir)
    if not any(output_dir.glob("run_*/manifest.json")):
        return None
    from pruning_comparison.run.comparison import finished_run

    with Live(quiet=options.quiet):
        return finished_run(spec, output_dir, with_models=options.save_models)


def _show_again(folder: Path, options: argparse.Namespace, margins: Mapping[str, float]) -> int:
    """The answer of a finished run. It is drawn again only where the command asks for something that is not there."""
    from pruning_comparison.report.write import REPORT, margins_of
    from pruning_comparison.store.run_folder import read_manifest

    manifest = read_manifest(folder)
    print(
        f"Measured before, on {(manifest.finished or '')[:10]}: this is the answer of {folder}. --fresh measures again.",
        file=sys.stderr,
    )
    report = folder / REPORT
    texts_missing = options.save_outputs and not (folder / "generated_texts.csv").is_file()
    other_margins = asdict(margins_of(manifest, margins)) != dict(manifest.margins or {})
    if not report.is_file() or texts_missing or other_margins:
        report = _drawn(folder, options, margins)
    _show(report, options)
    return 0


def _show(report: Path, options: argparse.Namespace) -> None:
    """The answer of a run, as its report begins with it, and where that is."""
    if not options.quiet:
        from pruning_comparison.report.terminal import answer_text, stored_answer

        answer = stored_answer(report.parent)
        if answer is not None:
            width, coloured = get_terminal_size((80, 24)).columns, sys.stdout.isatty() and "NO_COLOR" not in os.environ
            _print_any(f"{answer_text(answer, width=width, coloured=coloured)}\n")
    print(f"report: {report}")


def _print_any(text: str) -> None:
    """Prints text that may hold signs, such as a minus, that the terminal's encoding lacks: question marks then."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def _more_options(options: argparse.Namespace) -> dict[str, Any]:
    """What repeats a command beside its spec, by the names of the options: what was asked of the report, and a budget."""
    given = {name: getattr(options, name) for name in MARGIN_OPTIONS if getattr(options, name) is not None}
    if options.save_outputs:
        given["save_outputs"] = True
    if options.budget is not None:
        given["budget"] = f"{options.budget:g}s"
    if options.track:
        given["track"] = options.track
    return given


def _report(options: argparse.Namespace) -> int:
    folders = [options.folders] if isinstance(options.folders, str) else options.folders
    if len(folders) == 1:
        return _visualize(Path(folders[0]), options)
    runs = [_run_in(Path(name)) for name in folders]
    for number, run in enumerate(runs):
        if run in runs[:number]:
            raise InputError(f"two names lead to the same run, {run}. Name every run once.")
    if _margins_of(options):
        raise InputError(
            "margins belong to the verdicts of one run, and a comparison of runs has none. Leave them out."
        )
    from pruning_comparison.report.write import write_between_runs
    from pruning_comparison.store.run_folder import check_writable

    output_dir = Path(options.output_dir)
    check_writable(output_dir)
    with Live(quiet=options.quiet):
        report = write_between_runs(runs, output_dir=output_dir)
    print(f"report: {report}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    spec = _spec_of(options, here=False)
    margins = _margins_of(options)
    from pruning_comparison.analysis.margins import Margins
    from pruning_comparison.plan.plan import format_plan, plan_cost, plan_run
    from pruning_comparison.run.inputs import prepare

    spec, _ = _with_threads(spec, options, Path(options.output_dir))
    inputs = prepare(spec, identify=False, weights=False)
    plan = {**plan_run(spec, Margins(**margins), inputs), "expected": plan_cost(spec, inputs)}
    print(json.dumps(plan, indent=1, allow_nan=False) if options.json else format_plan(plan))
    return 0


_NAMES_FOR_ONE_MODEL = {"--pruning_levels": "--level", "--variants": "--variant", "--pruning_method": "--method"}
"""What options of a comparison are called where there is one model."""


def _prune(options: argparse.Namespace) -> int:
    """Prunes one model, and names its own options in errors about the comparison that it stands for."""
    try:
        return _prune_to_one_level(options)
    except InputError as error:
        error.option = _NAMES_FOR_ONE_MODEL.get(error.option or "", error.option)
        raise


def _prune_to_one_level(options: argparse.Namespace) -> int:
    also = _check_prune_options(options)
    if options.from_run is not None:
        return _prune_from_run(options, also)
    from pruning_comparison.run.max_loss import UNKNOWN_LEVELS, build_within, check_max_loss
    from pruning_comparison.run.target_speedup import build_fast_enough, check_target_speedup

    levels = UNKNOWN_LEVELS if options.level is None else (options.level,)
    options.method, options.variant = options.method or "fisher", options.variant or "agency"
    options.pruning_levels, options.pruning_method = ",".join(map(str, levels)), options.method
    options.variants, options.temperatures, options.iterations = options.variant, "1", 1
    spec = _spec_of(options)
    how_far = "" if options.level is None else f"{options.level:g}"
    goal = f"to {how_far} %"
    if options.max_loss is not None:
        check_max_loss(spec, options.max_loss)
        goal, how_far = f"for a loss of {options.max_loss:g} %", f"max_loss_{options.max_loss:g}"
    if options.target_speedup is not None:
        check_target_speedup(options.target_speedup)
        goal, how_far = f"to {options.target_speedup:g} times the speed", f"speedup_{options.target_speedup:g}"
    folder = _folder_of_one(options, spec, how_far)
    from pruning_comparison.run.inputs import prepare, prepare_pruning
    from pruning_comparison.run.one_model import build_one, check_forms, steps_of_one
    from pruning_comparison.store.run_folder import check_writable

    spec, _ = _with_threads(spec, options, None)
    inputs = prepare_pruning(spec) if options.no_measure else prepare(spec, identify=False)
    check_forms(spec, also, inputs.preview, level_known=options.level is not None)
    check_writable(folder.absolute().parent)
    steps = steps_of_one(spec, measures=not options.no_measure, forms=1 + len(also), finds_level=options.level is None)

    def make(workspace: Workspace, step: Callable[[str], None]) -> tuple[PrunedModel, str]:
        if options.max_loss is not None:
            within = build_within(workspace, options.max_loss, on_step=step)
            return within.pruned, within.in_words(options.max_loss)
        if options.target_speedup is not None:
            fast = build_fast_enough(workspace, options.target_speedup, on_step=step)
            return fast.pruned, fast.in_words(options.target_speedup)
        return build_one(workspace, on_step=step), ""

    said = f"pruning {spec.model_name} {goal} by {options.method}, {options.variant}"
    return _make_and_save(options, also, spec, inputs, folder, steps, said, make)


def _check_prune_options(options: argparse.Namespace) -> tuple[str, ...]:
    """The forms that are asked for beside the compact one. InputError for options that cannot work."""
    if options.level is not None and not (math.isfinite(options.level) and 0 < options.level < 100):
        raise InputError(
            f"{options.level} must be above 0 and below 100 per cent. Give a level such as 30.", option="--level"
        )
    also = parts_of(options.also)
    for form in also:
        if form not in _ALSO:
            raise InputError(
                f"{form!r} is unknown. Choose from {', '.join(_ALSO)}; compact is always saved.", option="--also"
            )
    for name in ("method", "variant"):
        value = getattr(options, name)
        if value is not None and len(parts_of(value)) != 1:
            raise InputError(f"{value!r} must name exactly one. Run the command once for each.", option=f"--{name}")
    if options.best and options.from_run is None:
        raise InputError("the best of what? Give --from=RUN as well, or --level.", option="--best")
    if options.push_to_hub is not None:
        _check_hub(options.push_to_hub, "--push_to_hub", options)
    elif options.public or options.dry_run:
        raise InputError(
            "says how a model goes to the hub, and none is to go. Give --push_to_hub=NAME as well.",
            option="--public" if options.public else "--dry_run",
        )
    return also


def _check_hub(name: str, option: str, options: argparse.Namespace) -> None:
    """Errors for a name that the hub cannot have, and before long work where it cannot be written to."""
    from pruning_comparison.checkpoint.hub import check_hub_access, check_hub_name

    check_hub_name(name, option)
    if not options.dry_run:
        check_hub_access()


_GIVEN_WITH_A_RUN = frozenset(
    {
        "from_run", "variant", "method", "level", "best", "target_speedup", "output_dir", "also", "no_measure", "quiet",
        "debug_traceback", "trust_methods", "model_name", "calibration_text", "eval_text", "prompt_file", "max_loss",
        "push_to_hub", "public", "dry_run",
    }
)  # fmt: skip
"""Options that may stand beside ``--from``: the run's own settings hold for all else. Files may lie elsewhere now."""


def _prune_from_run(options: argparse.Namespace, also: tuple[str, ...]) -> int:
    """Makes a model of a run again and saves it."""
    if options.max_loss is not None:
        raise InputError(
            "a run has measured levels, and no loss is looked for in it. Give --level, --best or --target_speedup, or leave "
            "--from out.",
            option="--max_loss",
        )
    for name, word in options.given.items():
        if name not in _GIVEN_WITH_A_RUN:
            raise InputError(
                "with --from the run's own settings hold, or it would be another model. Leave it out.", option=word
            )
    run_folder = _run_in(Path(options.from_run))
    from pruning_comparison.report.write import margins_of
    from pruning_comparison.run.from_run import check_inputs, choose_cell, make_again, spec_of_cell
    from pruning_comparison.run.inputs import prepare
    from pruning_comparison.run.one_model import check_forms, steps_of_one
    from pruning_comparison.run.target_speedup import check_target_speedup
    from pruning_comparison.store.run_folder import check_writable
    from pruning_comparison.store.tables import load_run

    if options.target_speedup is not None:
        check_target_speedup(options.target_speedup)
    run = load_run(run_folder)
    chosen = choose_cell(
        run,
        variant=options.variant,
        method=options.method,
        level=options.level,
        target_speedup=options.target_speedup,
        margins=margins_of(run.manifest, None),
    )
    names = ("model_name", "calibration_text", "eval_text", "prompt_file")
    files = {name: getattr(options, name) for name in names if name in options.given}
    spec = spec_of_cell(run.manifest, chosen.cell, files, trust_methods=options.trust_methods)
    options.variant, options.method = chosen.cell.variant, chosen.cell.method
    folder = _folder_of_one(options, spec, f"{chosen.cell.level:g}")
    _check_device(spec)
    inputs = prepare(spec)
    check_inputs(run.manifest, inputs)
    check_forms(spec, also, inputs.preview)
    check_writable(folder.absolute().parent)
    steps = {**steps_of_one(spec, measures=not options.no_measure, forms=1 + len(also)), "pruning": 1}

    def make(workspace: Workspace, step: Callable[[str], None]) -> tuple[PrunedModel, str]:
        step(f"pruning to {chosen.cell.level:g} % again")
        return make_again(workspace, run_folder, chosen), chosen.why

    said = f"making {chosen.cell.describe()} of {run_folder} again"
    return _make_and_save(options, also, spec, inputs, folder, steps, said, make)


def _check_device(spec: ComparisonSpec) -> None:
    """InputError where the device of a run is not there: on another one the model would not be the very same."""
    from pruning_comparison.models.devices import resolve_device

    try:
        resolve_device(spec.device)
    except InputError as error:
        raise InputError(
            f"the run was measured on {spec.device}, which this machine has not. Give a run of its own, or the machine.",
            option="--from",
        ) from error


def _folder_of_one(options: argparse.Namespace, spec: ComparisonSpec, how_far: str) -> Path:
    """The new folder of one pruned model. InputError where there is something in it."""
    stem = "_".join([Path(spec.model_name).name or "model", options.variant, file_name_of(options.method), how_far])
    folder = Path(options.output_dir) if options.output_dir else Path("pruned_models") / stem
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder. Give another.", option="--output_dir")
    return folder


def _make_and_save(
    options: argparse.Namespace,
    also: Sequence[str],
    spec: ComparisonSpec,
    inputs: Inputs,
    folder: Path,
    steps: Mapping[str, int],
    said: str,
    make: Callable[[Workspace, Callable[[str], None]], tuple[PrunedModel, str]],
) -> int:
    """Makes one model, measures it, saves it in all forms, and says what came of it; the exit code.

    ``make`` is given the loaded model and what to tell of its steps, and gives back the pruned model and what to say of it.
    """
    total = sum(steps.values())
    with Live(quiet=options.quiet, steps=dict(steps)) as live:
        live.say(said)
        for warning in spec.idle_settings():
            live.say(f"warning: {warning}")
        from pruning_comparison.checkpoint.forms import save_pruned
        from pruning_comparison.report.terminal import before_and_after_text
        from pruning_comparison.run.one_model import measure_one
        from pruning_comparison.run.workspace import load_workspace

        begun = itertools.count()

        def step(what: str) -> None:
            live.progress(min(next(begun), total), total, what)

        step("loading the model")
        workspace = load_workspace(spec, inputs, describes=False)
        pruned, found = make(workspace, step)
        measured = () if options.no_measure else measure_one(workspace, pruned, on_step=step)
        tokenizer = workspace.inputs.preview.tokenizer
        saved: list[tuple[str, Path]] = []
        failed: dict[str, Exception] = {}
        for form in ("", *also):
            step(f"saving the {form or 'compact'} form")
            try:
                save_pruned(pruned.model, tokenizer, folder / form, form=form or "compact", measured=measured)
                saved.append((form or "model", folder / form))
            except Exception as failure:  # one form that fails takes none of the others along
                if not form:
                    raise
                if options.debug_traceback:
                    traceback.print_exc()
                failed[form] = failure
        live.progress(total, total, "done")
    if found and not options.quiet:
        print(found)
    if measured and not options.quiet:
        _print_any(before_and_after_text(measured))
    for name, place in saved:
        print(f"{name}: {place}")
    for form, error in failed.items():
        print(f"error: {form}: {error}", file=sys.stderr)
    if options.push_to_hub is not None:
        _send(folder, options.push_to_hub, options)
    return max((error.exit_code if isinstance(error, InputError) else 1 for error in failed.values()), default=0)


def _export(options: argparse.Namespace) -> int:
    if options.to != "gguf":
        raise InputError(unknown_name("", options.to, ("gguf",)), option="--to")
    with Live(quiet=options.quiet) as live:
        live.say(f"writing {options.folder} for llama.cpp, {options.dtype}")
        from pruning_comparison.checkpoint.forms import export_gguf

        path = export_gguf(options.folder, options.output, dtype=options.dtype)
    print(f"gguf: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _push(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    name = options.name or folder.resolve().name
    from pruning_comparison.checkpoint.hub import check_hub_name

    check_hub_name(name, "--name")
    _send(folder, name, options)
    return 0


def _send(folder: Path, name: str, options: argparse.Namespace) -> None:
    """Sends a saved model to the hub, or shows what would go."""
    from pruning_comparison.checkpoint.hub import push_to_hub, what_would_go

    upload = what_would_go(folder, name, public=options.public)
    if options.dry_run:
        _print_any(f"nothing is sent; this would go {upload.in_words()}")
        return
    with Live(quiet=options.quiet) as live:
        live.say(f"sending {folder} {upload.in_words().partition(chr(10))[0]}")
        address = push_to_hub(upload)
    print(f"on the hub: {address}")


def _visualize(output_dir: Path, options: argparse.Namespace) -> int:
    folder, margins = _run_in(output_dir), _margins_of(options)
    _show(_drawn(folder, options, margins), options)
    return 0


def _drawn(folder: Path, options: argparse.Namespace, margins: Mapping[str, float]) -> Path:
    """Tables, charts and report of a run, with progress meanwhile; the report's path."""
    from pruning_comparison.report.write import write_results

    with Live(quiet=options.quiet) as live:
        return write_results(folder, save_outputs=options.save_outputs, margins=margins, on_progress=live.progress)


def _run_in(folder: Path) -> Path:
    """The run that a folder is or holds; InputError where there is none."""
    from pruning_comparison.store.run_folder import latest_run

    try:
        run = latest_run(folder)
    except (OSError, ValueError):  # A name that no file can have: too long, or with a zero byte.
        run = None
    if run is None:
        raise InputError(
            f"{str(folder)!r} holds no run. Give a run folder or one with runs, or run a comparison first."
        )
    return run


def _report_what_there_is(folder: Path, options: argparse.Namespace, margins: Mapping[str, float]) -> None:
    """A partial report after Ctrl-C, if anything has been measured at all; another Ctrl-C leaves it out."""
    try:
        print("drawing a partial report; another Ctrl-C leaves it out", file=sys.stderr, flush=True)
        report = _drawn(folder, options, margins)
        print(f"partial report: {report}", file=sys.stderr)
    except (PruningComparisonError, OSError) as error:
        print(f"no partial report: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"no partial report; pruning-comparison report {folder} draws it", file=sys.stderr)


def _terminate_like_ctrl_c() -> Any:
    """SIGTERM stops a run as Ctrl-C does. Only the main thread may set signal handlers."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:
        return None
