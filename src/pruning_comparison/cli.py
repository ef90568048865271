"""The command line: parsing and words only."""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pruning_comparison import __version__
from pruning_comparison.errors import InputError, Interrupted, PruningComparisonError
from pruning_comparison.formatting import file_name_of, unknown_name
from pruning_comparison.methods import METHODS, Method
from pruning_comparison.progress import Live, steps_of
from pruning_comparison.spec import (
    ADAPTATIONS,
    BOS_RULES,
    ENTROPY_DIRECTIONS,
    EXECUTIONS,
    LOOKS,
    PRECISIONS,
    PRUNE_UNITS,
    SCOPES,
    ComparisonSpec,
    available_cores,
)
from pruning_comparison.variants import VARIANTS

if TYPE_CHECKING:
    from pruning_comparison.run.launchers import Launcher

DEFAULT_OUTPUT_DIR = "validation_results/pruning_agency"
LAUNCHERS = ("serial", "ray")
_METHOD_NAMES = f"{', '.join(METHODS)}, or package.module:function for one of your own"
_MOST_CONFIG_BYTES = 2**20
CHECKOUT = Path(__file__).resolve().parents[2]
MARGIN_OPTIONS: Mapping[str, tuple[str, int, str]] = {
    "margin_speed": ("speed", 100, "per cent of speed that matter (2, if not given)"),
    "margin_quality": ("quality", 100, "per cent of perplexity that matter (5, if not given)"),
    "margin_diversity": ("diversity", 1, "distance of distinct-2 that matters (0.02, if not given)"),
    "margin_latency": ("latency", 100, "per cent of first-token latency that matter (2, if not given)"),
    "tolerance": ("tolerance", 100, "per cent of perplexity that may be lost at the optimal level (5, if not given)"),
}
"""Options that say what matters: the margin that each sets, how many of its units make a whole, and what it means.

They change verdicts and nothing that is measured, so they are no part of the spec.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    search_path = list(sys.path)
    try:
        options = make_parser().parse_args(_with_config(_with_underscores(arguments)))
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
        print("stopped", file=sys.stderr)
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
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    parser.commands = commands.choices
    run = commands.add_parser(
        "run",
        help="measure, compare, and write the report",
        description="Prunes both variants at several levels, measures and compares them. The same command continues a run "
        "that was interrupted. Options may be written with underscores or dashes.",
        formatter_class=_HelpFormatter,
    )
    _add_run_options(run)
    run.set_defaults(command=_run)
    report = commands.add_parser(
        "report",
        help="draw tables, charts and report of a run again, or compare two runs",
        description="Draws tables, charts and report of a finished or interrupted run again. With two runs, compares the "
        "second with the first and writes a report of that.",
        formatter_class=_HelpFormatter,
    )
    report.add_argument(
        "folders",
        nargs="*",
        metavar="RUN",
        default=DEFAULT_OUTPUT_DIR,
        help="run folder, or one that holds runs (then its latest); two of them are compared",
    )
    report.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR, help="where the comparison of two runs goes")
    report.add_argument("--save_outputs", action="store_true", help="also write all generated texts as a table")
    _add_margin_options(report)
    _add_common_options(report)
    report.set_defaults(command=_report)
    plan = commands.add_parser(
        "plan",
        help="say what a run would measure and what it could find out, without measuring",
        description="Says what a run with the same options would measure and what it could find out. Reads config, "
        "tokenizer and texts only.",
        formatter_class=_HelpFormatter,
    )
    _add_run_options(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(command=_plan)
    prune = commands.add_parser(
        "prune",
        help="prune one model and save it, with a card that says what that cost",
        description="Prunes a model to one level, by one method, as a comparison would, and saves it with a model card: "
        "what was cut, perplexity, speed and bytes before and after, how it was made, and how it loads again.",
        formatter_class=_HelpFormatter,
    )
    prune.add_argument(
        "--level", "--pruning_level", type=_number, required=True, help="per cent of the heads, above 0 and below 100"
    )
    prune.add_argument("--method", "--pruning_method", default="fisher", help=f"one of {_METHOD_NAMES}")
    prune.add_argument("--variant", default="agency", help=f"one of {', '.join(VARIANTS)}")
    prune.add_argument(
        "--output_dir",
        default=None,
        help="the new folder of the model; pruned_models/<model>_<variant>_<method>_<level>, if not given",
    )
    prune.add_argument(
        "--also",
        default="",
        help="comma-separated, plain or padded: also save it in these forms, which need no code, in folders inside",
    )
    prune.add_argument("--no_measure", action="store_true", help="leave perplexity and speed out of the card")
    _add_run_options(prune, without=_NOT_FOR_ONE_MODEL)
    _add_common_options(prune)
    prune.set_defaults(command=_prune)
    return parser


def would_resume(argv: Sequence[str]) -> bool:
    """Whether ``run`` with these options would continue an unfinished run; False where the options cannot work."""
    search_path = list(sys.path)
    try:
        options = make_parser().parse_args(_with_config(["run", *_with_underscores(argv)]))
        if not any(Path(options.output_dir).glob("run_*/manifest.json")):
            return False
        from pruning_comparison.run.comparison import would_resume as comparison_would_resume

        with Live(quiet=True):
            return comparison_would_resume(_spec_of(options), Path(options.output_dir))
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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something: what happens without an option that has none is in its own words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, True, False) else super()._get_help_string(action)


_NOT_FOR_ONE_MODEL = frozenset(
    {
        "pruning_levels", "pruning_method", "variants", "temperatures", "iterations", "output_dir", "execution",
        "until_decided", "budget", "save_outputs", "save_models", "memory_logging", "visualize_only", "no_update",
        "margins", "launcher", "ray_address", "workers",
    }
)  # fmt: skip


def _add_run_options(parser: argparse.ArgumentParser, *, without: frozenset[str] = frozenset()) -> None:
    default = {field.name: field.default for field in fields(ComparisonSpec)}

    def add(name: str, **kwargs: Any) -> None:
        if name not in without:
            parser.add_argument(f"--{name}", **{"default": default.get(name), **kwargs})

    def flag(name: str, meaning: str) -> None:
        if name not in without:
            parser.add_argument(f"--{name}", action="store_true", help=meaning)

    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="take options from a file too, such as the run.yaml of a run: a mapping of their names to values; what the "
        "command line says wins",
    )
    flag("trust_methods", "let --config name methods of your own, package.module:function, whose code runs then")
    add("model_name", help="hub id (gpt2, distilgpt2, ...), local folder, bundled, or smollm2-135m")
    add("device", default=None, help="cpu, cuda or cuda:N; the best one there is, if not given")
    add(
        "precision", default=None, help=f"{', '.join(PRECISIONS)}; float16 on a GPU and float32 elsewhere, if not given"
    )
    add("pruning_levels", default="0,20,40,60,80", help="per cent of the heads, comma-separated, each in [0, 100)")
    add("pruning_method", default="entropy", help=f"comma-separated, from {_METHOD_NAMES}")
    add("temperatures", default="0.7,1.0", help="comma-separated; 0 is greedy decoding")
    add("num_tokens", type=_whole_number, help="new tokens per prompt")
    add(
        "iterations",
        default=None,
        type=_whole_number,
        help=f"replicates with their own seed; {default['iterations']}, if not given",
    )
    flag(
        "until_decided",
        f"in place of --iterations: go on until the primary answers are decided, looking after "
        f"{', '.join(map(str, LOOKS))} iterations",
    )
    add("budget", type=_duration_s, default=None, help="with --until_decided: at most so long, such as 90s, 30m or 2h")
    add("max_prompts", type=_whole_number, help="at most so many prompts")
    add("batch_size", type=_whole_number, help="prompts per timed batch")
    add("timing_pairs", type=_whole_number, help="timed generations of each model at a level, at least")
    add(
        "timing_precision_percent",
        type=_number,
        help="timing goes on until every ratio is known to +- so many per cent",
    )
    add("timing_limit_s", type=_number, help="and at most for so many seconds at a level")
    add("output_dir", default=DEFAULT_OUTPUT_DIR, help="where run folders go")
    flag("save_outputs", "also write all generated texts as a table")
    flag("save_models", "also save every pruned model, in the run folder under models")
    flag("memory_logging", "measure and log peak memory")
    add("prompt_file", help="text file with one prompt per line; bundled prompts, if not given")
    add("eval_text", help="what perplexity is measured on: bundled:held_out, a text file, or a folder of .txt files")
    add("eval_tokens", type=_whole_number, help="tokens of evaluation text, spread over its documents")
    add("eval_window", type=_whole_number, help="perplexity window in tokens (at most the model's context)")
    add("eval_stride", type=_whole_number, help="step between perplexity windows in tokens")
    add(
        "bos",
        help=f"{', '.join(BOS_RULES)}: whether texts begin with the begin-of-sequence token; auto: as the tokenizer does",
    )
    add("calibration_text", help="what scores and adaptation may see; other documents than the evaluation text")
    add("calibration_tokens", type=_whole_number, help="tokens of calibration text per iteration")
    add("calibration_window", type=_whole_number, help="tokens per calibration window")
    add(
        "score_tokens",
        type=_whole_number,
        help="of these, how many heads are scored on; all, if not given (slow methods such as ablation need few)",
    )
    add("variants", default="baseline,agency", help=f"comma-separated, from {', '.join(VARIANTS)}")
    add("execution", help=f"{' or '.join(EXECUTIONS)}: heads physically removed, or their gates closed")
    add("scope", help=f"{' or '.join(SCOPES)}: heads ranked over the whole model or within each layer")
    add(
        "unit",
        default=default["prune_unit"],
        help=f"{' or '.join(PRUNE_UNITS)}: heads leave one by one, or with all others that read the same keys and values",
    )
    add("entropy_direction", help=f"{', '.join(ENTROPY_DIRECTIONS)}: which heads leave first under entropy")
    add("adaptation", help=f"{', '.join(ADAPTATIONS)}: how far survivors adapt, each step including those before it")
    add("ridge", type=float, help="ridge of the adaptation of attention, relative to the mean diagonal")
    add("mlp_ridge", type=float, help="ridge of the adaptation of the MLP, relative to the mean diagonal")
    parser.add_argument(
        "--no_new_bias",
        dest="new_bias",
        action="store_false",
        help="adaptation adds no bias where the family has none, so that a plain checkpoint can hold the model",
    )
    add(
        "recovery_steps",
        type=_whole_number,
        help="steps of distillation from the dense model, the same for every variant",
    )
    add("recovery_rate", type=float, help="learning rate of these steps")
    add("seed", type=_whole_number, help="seed of everything random")
    add("threads", type=_whole_number, default=None, help="CPU threads; all cores, if not given")
    add("quality_batch_size", type=_whole_number, help="sequences per batch where nothing is timed")
    add("launcher", default="serial", help=f"{' or '.join(LAUNCHERS)}: one process, or workers on a Ray cluster")
    add("ray_address", help="of an existing cluster: auto, or host:port; a local one is started, if not given")
    add("workers", type=_whole_number, help="with ray: at most so many; as many as there is room for, if not given")
    flag("visualize_only", "measure nothing; draw the latest run again")
    flag("no_update", "for the scripts: do not fetch the latest code first")
    if "margins" not in without:
        _add_margin_options(parser)
        _add_common_options(parser)


def _add_margin_options(parser: argparse.ArgumentParser) -> None:
    for name, (_, _, meaning) in MARGIN_OPTIONS.items():
        parser.add_argument(f"--{name}", type=_number, default=None, help=meaning)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors and where the report is")
    parser.add_argument("--debug_traceback", action="store_true", help="show where in the code an error arose")


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """``--model-name=x`` as ``--model_name=x``: values are left alone."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        result.append(name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument)
    return result


def _with_config(argv: Sequence[str]) -> list[str]:
    """The options of the file that ``--config`` names, before those of the command line, which therefore win.

    InputError for a file that is no flat mapping, for an option that the command does not have, and for a user's own method
    in it without ``--trust_methods``: that would run code that whoever wrote the file has chosen.
    """
    command, given = argv[:1], list(argv[1:])
    place = _config_in(given)
    if place is None or not command:
        return list(argv)
    parsers = make_parser().commands
    if command[0] not in parsers or "config" not in (known := parsers[command[0]].options()):
        return list(argv)  # The parser refuses what it does not know.
    said = {known[name] for word in given if (name := word.partition("=")[0].removeprefix("--")) in known}
    added = []
    for name, value in _read_config(place).items():
        if name in ("config", "trust_methods", "help") or name not in known:
            if name in ("config", "trust_methods"):
                raise InputError(
                    f"--config: {place!r} says {name!r}, which only the command line can. Leave it out there."
                )
            raise InputError(unknown_name(f"--config: {place!r}: option", name, known.keys() - {"help", "h", "-h"}))
        action = known[name]
        if action in said or value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f"--config: {place!r}: {name} is {value!r}. It is true or false.")
            added += [f"--{name}"] if value else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        own = [one for one in _names(text) if ":" in one] if action is known[_method_option(known)] else []
        if own and "--trust_methods" not in given:
            raise InputError(
                f"--config: {place!r} names {own[0]}, a method that is Python code, and importing it runs that code. Give "
                "--trust_methods if you trust it, or name it on the command line."
            )
        added.append(f"--{name}={text}")
    return [*command, *added, *given]


def _method_option(known: Mapping[str, argparse.Action]) -> str:
    return "method" if "method" in known else "pruning_method"


def _config_in(words: Sequence[str]) -> str | None:
    """The file that ``--config`` names last, if any."""
    found = None
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config":
            following = words[number + 1] if number + 1 < len(words) else None
            found = value if equals else following
    return found


def _read_config(place: str) -> dict[str, Any]:
    """A file of options: names, and values that are text, numbers, true or false, or lists of these."""
    import yaml

    try:
        with Path(place).open("rb") as file:
            content = file.read(_MOST_CONFIG_BYTES + 1)
        too_long = len(content) > _MOST_CONFIG_BYTES
        values = None if too_long else yaml.safe_load(content.decode("utf-8"))
    except OSError as error:
        raise InputError(f"--config: {place!r} cannot be read: {error.strerror}. Give a YAML file.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"--config: {place!r} is no YAML file: {' '.join(str(error).split())}. Write lines such as seed: 1."
        ) from error
    if too_long:
        raise InputError(f"--config: {place!r} has more than {_MOST_CONFIG_BYTES} bytes. Give a file of options.")
    if not isinstance(values, dict):
        raise InputError(f"--config: {place!r} holds no options by name. Write lines such as seed: 1.")
    plain = (str, int, float, bool, type(None))
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(part, plain) for part in parts):
            raise InputError(
                f"--config: {place!r}: {name!r} must be the name of an option, with one value or a list of values."
            )
    return values


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
    names = _names(text, METHODS)
    if any(":" in name for name in names) and (here := str(Path.cwd())) not in sys.path:
        # Behind all else: what lies here must not stand in for an installed package.
        sys.path.append(here)
    return tuple(Method(name, score=name) if ":" in name else name for name in names)


def _names(text: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """The parts of a list; one that differs from a ``known`` name in capitals alone is that name."""
    spelled = {name.lower(): name for name in known}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(part if part in known else spelled.get(part.lower(), part) for part in parts)


def _spec_of(options: argparse.Namespace) -> ComparisonSpec:
    """The spec that the options ask for. The device is resolved last, since that needs torch."""
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
    values["variants"] = _names(options.variants, VARIANTS)
    values["threads"] = options.threads if options.threads is not None else available_cores()
    unresolved = ComparisonSpec(**{**values, "device": "cpu", "precision": options.precision or "float32"})
    from pruning_comparison.models.devices import resolve_device, resolve_precision

    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    return ComparisonSpec(**{**unresolved.as_dict_of_tuples(), "device": device, "precision": precision})


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
    from pruning_comparison.store.journal import RunStore
    from pruning_comparison.store.run_folder import check_writable

    check_writable(output_dir)
    live = Live(quiet=options.quiet, steps=steps_of(spec))
    with live:
        live.say(f"comparing {', '.join(spec.variants)} on {spec.model_name} ({spec.device}, {spec.precision})")
        from pruning_comparison.report.write import write_results
        from pruning_comparison.run.comparison import run_comparison
        from pruning_comparison.run.provenance import commit_of

        try:
            folder = run_comparison(
                spec,
                output_dir=output_dir,
                on_progress=live.progress,
                on_measured=live.measured,
                code_commit=commit_of(CHECKOUT),
                raise_failures=options.debug_traceback,
                save_models=options.save_models,
                launcher=launcher,
                budget_s=options.budget,
            )
        except Interrupted as stopped:
            if stopped.folder is not None:
                _report_what_there_is(stopped.folder, options.save_outputs, margins)
            raise
        try:
            report = write_results(folder, save_outputs=options.save_outputs, margins=margins)
        except KeyboardInterrupt:
            raise Interrupted(
                f"everything is measured and kept in {folder}; pruning-comparison report {folder} draws it.", folder
            ) from None
    with RunStore(folder) as store:
        failed = int((store.table("cells")["status"] == "failed").sum())
    print(f"report: {report}")
    if failed:
        print(f"error: {failed} cells failed; the report names them. The same command tries again.", file=sys.stderr)
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    folders = [options.folders] if isinstance(options.folders, str) else options.folders
    if len(folders) == 1:
        return _visualize(Path(folders[0]), options)
    if len(folders) > 2:
        raise InputError(f"report takes one run, or two to compare; {len(folders)} were given.")
    first, second = (_run_in(Path(name)) for name in folders)
    if first == second:
        raise InputError(f"both names lead to the same run, {first}. Give two different runs to compare.")
    if _margins_of(options):
        raise InputError("margins are about the verdicts of one run, and comparing two gives none. Leave them out.")
    from pruning_comparison.report.write import write_between_runs
    from pruning_comparison.store.run_folder import check_writable

    output_dir = Path(options.output_dir)
    check_writable(output_dir)
    with Live(quiet=options.quiet):
        report = write_between_runs(first, second, output_dir=output_dir)
    print(f"report: {report}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    spec = _spec_of(options)
    margins = _margins_of(options)
    from pruning_comparison.analysis.margins import Margins
    from pruning_comparison.plan.plan import format_plan, plan_cost, plan_run
    from pruning_comparison.run.inputs import prepare

    inputs = prepare(spec, identify=False)
    plan = {**plan_run(spec, Margins(**margins), inputs), "expected": plan_cost(spec, inputs)}
    print(json.dumps(plan, indent=1, allow_nan=False) if options.json else format_plan(plan))
    return 0


def _prune(options: argparse.Namespace) -> int:
    """Prunes one model. What a comparison calls ``--pruning_levels`` and ``--variants`` has other names here."""
    try:
        return _prune_to_one_level(options)
    except InputError as error:
        text = str(error)
        for name, ours in (("--pruning_levels:", "--level:"), ("--variants:", "--variant:")):
            if text.startswith(name):
                raise type(error)(text.replace(name, ours, 1)) from error
        raise


def _prune_to_one_level(options: argparse.Namespace) -> int:
    if not (math.isfinite(options.level) and 0 < options.level < 100):
        raise InputError(f"--level: {options.level} must be above 0 and below 100 per cent. Give a level such as 30.")
    also = _names(options.also)
    for form in also:
        if form not in ("plain", "padded"):
            raise InputError(f"--also: {form!r} is unknown. Choose from plain, padded; compact is always saved.")
    for name, values in (("method", _names(options.method)), ("variant", _names(options.variant))):
        if len(values) != 1:
            raise InputError(
                f"--{name}: {getattr(options, name)!r} must name exactly one. Run the command once for each."
            )
    options.pruning_levels, options.pruning_method = str(options.level), options.method
    options.variants, options.temperatures, options.iterations = options.variant, "1", 1
    spec = _spec_of(options)
    method = file_name_of(options.method)
    stem = "_".join([Path(spec.model_name).name or "model", options.variant, method, f"{options.level:g}"])
    folder = Path(options.output_dir) if options.output_dir else Path("pruned_models") / stem
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output_dir: {str(folder)!r} exists and is not an empty folder. Give another.")
    from pruning_comparison.run.one_model import check_forms
    from pruning_comparison.store.run_folder import check_writable

    check_forms(spec, also)
    check_writable(folder.absolute().parent)
    with Live(quiet=options.quiet) as live:
        live.say(f"pruning {spec.model_name} to {options.level:g} % by {options.method}, {options.variant}")
        from pruning_comparison.checkpoint.forms import save_pruned
        from pruning_comparison.run.inputs import prepare
        from pruning_comparison.run.one_model import build_one, measure_one
        from pruning_comparison.run.workspace import load_workspace

        workspace = load_workspace(spec, prepare(spec, identify=False))
        pruned = build_one(workspace)
        if not options.no_measure:
            live.say("measuring perplexity and speed, before and after")
        measured = () if options.no_measure else measure_one(workspace, pruned)
        tokenizer = workspace.inputs.preview.tokenizer
        save_pruned(pruned.model, tokenizer, folder, measured=measured)
        print(f"model: {folder}")
        code = 0
        for form in also:
            try:
                save_pruned(pruned.model, tokenizer, folder / form, form=form, measured=measured)
                print(f"{form}: {folder / form}")
            except Exception as error:  # one form that fails takes none of the others along
                if options.debug_traceback:
                    traceback.print_exc()
                code = error.exit_code if isinstance(error, InputError) else 1
                print(f"error: {form}: {error}", file=sys.stderr)
    return code


def _visualize(output_dir: Path, options: argparse.Namespace) -> int:
    from pruning_comparison.report.write import write_results

    folder, margins = _run_in(output_dir), _margins_of(options)
    with Live(quiet=options.quiet):
        report = write_results(folder, save_outputs=options.save_outputs, margins=margins)
    print(f"report: {report}")
    return 0


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


def _report_what_there_is(folder: Path, save_outputs: bool, margins: Mapping[str, float]) -> None:
    """A partial report after Ctrl-C, if anything has been measured at all."""
    from pruning_comparison.report.write import write_results

    try:
        report = write_results(folder, save_outputs=save_outputs, margins=margins)
        print(f"partial report: {report}", file=sys.stderr)
    except (PruningComparisonError, OSError) as error:
        print(f"no partial report: {error}", file=sys.stderr)


def _terminate_like_ctrl_c() -> Any:
    """SIGTERM stops a run as Ctrl-C does. Only the main thread may set signal handlers."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:
        return None
