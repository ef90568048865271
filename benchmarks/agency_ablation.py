"""What each part of agency brings, configuration by configuration: python benchmarks/agency_ablation.py [OPTIONS]

A configuration is a comma-separated list of settings that differ from the reference's, for example
``weights=rounds,ridge=0.05``; ``reference`` is the one with none. Each is built on the same calibration windows and judged
on the same evaluation windows: one JSON line per sample, configuration and level as soon as it is known, and at the end
paired contrasts with the reference with 95 % intervals over samples and windows. A configuration that fails is reported, and
the others go on.

With ``--final_text`` one of them is then chosen, by a rule (``best_of``) that was written before its first use, and is
measured beside the reference on that text, which nothing before has read.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_comparison.agency.adaptation import adapt
from pruning_comparison.agency.consent import negotiate, quota_of_level
from pruning_comparison.agency.moments import HeadMoments
from pruning_comparison.agency.prices_across_layers import (
    layer_prices,
    layer_weights,
    observe_for_prices,
    split_windows,
)
from pruning_comparison.agency.streams import DenseStream, drawn_first_tokens
from pruning_comparison.agency.trajectory import ROUND_LEVEL
from pruning_comparison.analysis.random_effects import fit_crossed, ratio_of
from pruning_comparison.formatting import unknown_name
from pruning_comparison.measure.perplexity import EvaluationWindow, evaluation_windows
from pruning_comparison.methods import method_named
from pruning_comparison.models import gguf
from pruning_comparison.models.devices import fast_products
from pruning_comparison.models.heads import head_grid
from pruning_comparison.models.loading import ModelPreview, load_model, preview_model
from pruning_comparison.pruning import remove_heads, select_heads
from pruning_comparison.scoring.ablation import recorded_blocks
from pruning_comparison.scoring.prices import RIDGE, LayerPrices, Prices, elimination
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.spec import ADAPTATIONS
from pruning_comparison.texts import load_documents, sample_windows, whole_windows

BATCH = 8
ROUND_AT = 30.0


@dataclass(frozen=True)
class Configuration:
    """One way of making the model of a level. Every field is a setting that a configuration may name.

    ``method`` ranks heads. ``consent`` is "none" (they leave in its order, as where everyone consents) or a number, the
    factor of the limit. ``weights`` of layers: "half" (half of one layer is cut) or "rounds" (above 30 % measured again on
    the model that is adapted at 30 %). The windows that they are measured on are cut into shorter ones of ``fresh_window``
    tokens, if that is above 0: more first tokens in as much text. ``price_ridge`` is that of prices; ``ridge`` and
    ``mlp_ridge`` are those of ``adapt``, which runs ``passes`` times and takes its ``steps``. ``first_tokens`` of 0 does
    without windows of one token, as does a model whose texts begin with a token of their own. ``sampled`` adds so many times
    the calibration windows of text that the dense model continues them with.
    """

    method: str = "obs"
    consent: str = "none"
    weights: str = "half"
    price_ridge: float = RIDGE
    fresh_window: int = 0
    ridge: float = 0.1
    mlp_ridge: float = 0.3
    passes: int = 1
    steps: str = "refit-mlp"
    first_tokens: int = 1
    sampled: float = 0.0

    @classmethod
    def named(cls, name: str) -> Configuration:
        """From its name, settings separated by commas. ValueError for unknown settings and values."""
        known = {one.name: type(one.default) for one in fields(cls)}
        chosen: dict[str, Any] = {}
        for setting in [] if name == "reference" else name.split(","):
            key, _, value = setting.partition("=")
            if key not in known:
                raise ValueError(unknown_name("--configurations", key, known))
            chosen[key] = known[key](value)
        configuration = cls(**chosen)
        if configuration.weights not in WEIGHTS:
            raise ValueError(unknown_name("--configurations", configuration.weights, WEIGHTS))
        if configuration.steps not in ADAPTATIONS:
            raise ValueError(unknown_name("--configurations", configuration.steps, ADAPTATIONS))
        if configuration.consent != "none":
            float(configuration.consent)
        return configuration


WEIGHTS = ("half", "rounds")

DEFAULT = (
    "reference",
    "first_tokens=0",
    "weights=rounds",
    "fresh_window=128",
    "weights=rounds,fresh_window=128",
    "mlp_ridge=1",
    "mlp_ridge=0.1",
    "ridge=0.03",
    "ridge=0.3",
    "price_ridge=0.01",
    "price_ridge=0.1",
    "passes=2",
    "sampled=1",
)


@dataclass
class Bench:
    """The dense model, one sample of calibration windows, and what has been computed on it.

    ``begins`` says that every window begins with the token that the model's texts begin with: prices leave it out.
    """

    model: PreTrainedModel
    windows: Tensor
    generator: Callable[[str], torch.Generator]
    note: Callable[[str, float], None]
    score_tokens: int
    begins: bool = False
    _moments: HeadMoments | None = None
    _layers: dict[float, tuple[LayerPrices | None, ...]] = field(default_factory=dict)
    _prices: dict[tuple[float, int], Prices] = field(default_factory=dict)
    _scores: dict[tuple[str, float, int], Tensor] = field(default_factory=dict)
    _stream: tuple[Any, DenseStream] | None = None
    _rounds: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Reports the seconds of one part."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.note(what, time.perf_counter() - started)

    def moments(self) -> HeadMoments:
        if self._moments is None:
            with self.timed("moments"):
                self._moments = observe_for_prices(
                    self.model, self.windows, batch_size=BATCH, exclude_first=self.begins
                )
        return self._moments

    def fresh(self, window: int) -> Tensor:
        """The windows that layers are weighed on, in pieces of ``window`` tokens if that is not 0."""
        windows = split_windows(self.windows)[1]
        if window and self.begins:
            raise ValueError(
                "fresh_window needs windows that can be cut anywhere; those of this model have a beginning"
            )
        return windows.reshape(-1, window) if window else windows

    def prices(self, ridge: float, fresh_window: int) -> Prices:
        """Prices of the dense model's heads, layers weighed by half of each."""
        if ridge not in self._layers:
            moments = self.moments()
            with self.timed("withdrawal costs"):
                self._layers[ridge] = layer_prices(self.model, moments, ridge=ridge)
                for layer in self._layers[ridge]:
                    if layer is not None:
                        layer.cheapest_first()
        if (ridge, fresh_window) not in self._prices:
            layers = self._layers[ridge]
            with self.timed("weights of layers"):
                weights = layer_weights(
                    self.model, self.moments(), layers, self.fresh(fresh_window), exclude_first=self.begins
                )
            n_heads = head_grid(self.model.config).n_heads
            self._prices[ridge, fresh_window] = Prices.of(layers, weights.tolist(), n_heads)
        return self._prices[ridge, fresh_window]

    def scores(self, configuration: Configuration) -> Tensor:
        """The method's scores of the dense model's heads, [L, H]."""
        method = configuration.method
        if method == "obs":
            key = method, configuration.price_ridge, configuration.fresh_window
            if key not in self._scores:
                self._scores[key] = elimination(self.prices(*key[1:]))[0]
            return self._scores[key]
        if (method, 0.0, 0) not in self._scores:
            settings = ScoreSettings(batch_size=BATCH, generator=self.generator("random ranking"))
            with self.timed(f"scores by {method}"):
                windows = self.windows[: -(-self.score_tokens // self.windows.shape[1])]
                found = score_heads(method_named(method), self.model, windows, settings)
            self._scores[method, 0.0, 0] = found.scores
        return self._scores[method, 0.0, 0]

    def stream(self, configuration: Configuration) -> DenseStream:
        """What adaptation aims at; of the last text asked for, since it is large."""
        key = configuration.sampled, bool(configuration.first_tokens)
        if self._stream is None or self._stream[0] != key:
            self.close()
            windows, first_tokens = self.windows, None
            if configuration.sampled > 0:
                with self.timed("sampled text"):
                    given = windows[: round(configuration.sampled * len(windows))]
                    windows = torch.cat([windows, continued(self.model, given, self.generator("sampled"))])
            if configuration.first_tokens and not self.begins:
                first_tokens = drawn_first_tokens(self.windows, self.generator("first tokens"))
            with self.timed("dense stream"):
                self._stream = key, DenseStream(self.model, windows, batch_size=BATCH, first_tokens=first_tokens)
        return self._stream[1]

    def keep(self, configuration: Configuration, level: float) -> tuple[Tensor, dict[str, Any]]:
        """The heads that stay, bool [L, H], and what is worth saying of how they were chosen."""
        scores = self.scores(configuration)
        keep = select_heads(scores, level)
        prices = self.prices(configuration.price_ridge, configuration.fresh_window)
        if configuration.consent != "none":
            keep = asked(scores, prices, level, float(configuration.consent))
        if configuration.weights == "rounds" and level > ROUND_AT:
            with self.timed("weights=rounds"):
                keep = select_heads(self._order_after_a_round(configuration), level)
        return keep, {"predicted": round(math.exp(min(prices.total(~keep), 50.0)), 4)}

    def _order_after_a_round(self, configuration: Configuration) -> Tensor:
        """The order of heads by prices of the model adapted at the level of a round, without having read fresh windows."""
        window = configuration.fresh_window
        if window not in self._rounds:
            fitted, fresh = split_windows(self.windows)[0], self.fresh(window)
            first = Configuration(fresh_window=window)
            adapted = remove_heads(self.model, select_heads(self.scores(first), ROUND_AT))
            stream = DenseStream(
                self.model,
                fitted,
                batch_size=BATCH,
                first_tokens=None if self.begins else drawn_first_tokens(fitted, self.generator("first tokens")),
            )
            adapt(stream, adapted)
            stream.close()
            moments = observe_for_prices(adapted, self.windows, batch_size=BATCH, exclude_first=self.begins)
            layers = layer_prices(adapted, moments)
            weights = layer_weights(adapted, moments, layers, fresh, exclude_first=self.begins, reference=self.model)
            n_heads = head_grid(self.model.config).n_heads
            self._rounds[window] = elimination(Prices.of(layers, weights.tolist(), n_heads))[0]
        return self._rounds[window]

    def build(self, configuration: Configuration, keep: Tensor) -> PreTrainedModel:
        """The model that has lost its other heads, adapted."""
        stream = self.stream(configuration)
        pruned = remove_heads(self.model, keep)
        with self.timed("refit"):
            for _ in range(configuration.passes):
                adapt(
                    stream,
                    pruned,
                    steps=configuration.steps,
                    ridge=configuration.ridge,
                    mlp_ridge=configuration.mlp_ridge,
                )
        return pruned

    def close(self) -> None:
        """Lets go of the stream."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None


def asked(scores: Tensor, prices: Prices, level: float, factor: float) -> Tensor:
    """Who stays when heads are asked in the order of ``scores``, in rounds, with a limit of ``factor`` times the default."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    rounds = [ROUND_LEVEL * number for number in range(1, int(level / ROUND_LEVEL) + 1)]
    for target in rounds if rounds and rounds[-1] == level else [*rounds, level]:
        quota = quota_of_level(target, keep)
        assert isinstance(quota, int)
        live = prices.table()[keep].sort().values
        limit = factor * float(live[quota - 1]) if quota else 0.0
        result = negotiate(scores, prices, keep, quota, limit=limit)
        keep, prices = result.keep, result.prices
    return keep


@torch.no_grad()
def continued(model: PreTrainedModel, windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows [N, T] of which the dense model has written the last three quarters, sampled at temperature 1."""
    given = max(1, windows.shape[1] // 4)
    pieces = []
    for batch in windows.split(128):
        ids = batch[:, :given].to(model.device)
        written, cache, step = [ids], None, ids
        for _ in range(windows.shape[1] - given):
            with fast_products(model):
                output: Any = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cumsum(-1)
            draws = torch.rand(len(ids), 1, generator=generator).to(chances)
            step = torch.searchsorted(chances, draws).clamp(max=chances.shape[1] - 1)
            written.append(step)
        pieces.append(torch.cat(written, 1).cpu())
    return torch.cat(pieces)


@dataclass(frozen=True)
class Outcome:
    """What a model says of the evaluation text, window by window.

    ``losses`` and ``kl`` are nats of negative log-likelihood and of KL(dense || model), summed over scored tokens; the
    latter 0 where it is left out.
    ``first_token`` is how long the stream is at a window's first token, in the block where the dense model's is longest,
    relative to it: models park their attention there. ``strays`` are other positions whose stream is more than ten times as
    long as the dense model's in some block.
    """

    losses: Any
    kl: Any
    first_token: Any
    strays: Any


class Judge:
    """Compares models with the dense one on the same evaluation windows.

    What the dense model says there is kept on its device: 4 bytes per token and entry of the vocabulary. Without ``kl`` it
    is not, and windows are passed one by one, for vocabularies that would not fit into memory.
    """

    def __init__(self, dense: PreTrainedModel, windows: Sequence[EvaluationWindow], *, kl: bool = True) -> None:
        self._windows, self.kl = windows, kl
        self.tokens = np.array([window.targets for window in windows])
        self._parts: list[list[int]] = []
        lengths: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            lengths.setdefault(len(window.ids), []).append(number)
        for numbers in lengths.values():
            at_once = 4 if kl else 1
            self._parts += [numbers[first : first + at_once] for first in range(0, len(numbers), at_once)]
        self._said: list[tuple[Tensor | None, Tensor]] = []
        with torch.no_grad():
            for part in self._parts:
                logits, norms = said_of(dense, self._ids(part, dense))
                self._said.append((logits if kl else None, norms))
                del logits
        self.dense = self.outcome_of(dense).losses

    def _ids(self, part: Sequence[int], model: PreTrainedModel) -> Tensor:
        return torch.stack([self._windows[number].ids for number in part]).to(model.device)

    @torch.no_grad()
    def outcome_of(self, model: PreTrainedModel) -> Outcome:
        """What ``model`` says of the evaluation windows."""
        found = Outcome(*(np.zeros(len(self._windows)) for _ in range(4)))
        for part, (expected, dense_norms) in zip(self._parts, self._said, strict=True):
            ids = self._ids(part, model)
            now, norms = said_of(model, ids)
            loss = -now.gather(-1, ids[:, 1:, None])[..., 0]
            divergence = torch.zeros_like(loss) if expected is None else (expected.exp() * (expected - now)).sum(-1)
            relative = norms / dense_norms
            first = relative[int(dense_norms[:, 0, 0].argmax()), :, 0].tolist()
            strays = (relative[:, :, 1:] > 10).any(0).sum(-1).tolist()
            # One wait for the device in a part, not one in a window.
            losses, nats = loss.double().cpu(), divergence.double().cpu()
            for row, number in enumerate(part):
                scored = slice(-self._windows[number].targets, None)
                found.losses[number] = float(losses[row, scored].sum())
                found.kl[number] = float(nats[row, scored].sum())
                found.first_token[number], found.strays[number] = first[row], strays[row]
        return found


def said_of(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities [B, T - 1, V] of what follows, and the length of the stream after every block, [L, B, T]."""
    with recorded_blocks(model) as outputs:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    after = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return logits, torch.stack([hidden.float().norm(dim=-1) for hidden in after])


def contrasts(found: dict[tuple[str, float], dict[int, Any]], dense: Any, tokens: Any) -> Iterator[dict[str, Any]]:
    """For each configuration and level its perplexity relative to the dense model's and to the reference's.

    ``found`` has the summed losses of every window by configuration, level and sample. Windows count by their tokens.
    """
    share = tokens / tokens.mean()

    def ratio(losses: list[Any], others: list[Any]) -> list[float]:
        rows = [(own - other) / tokens * share for own, other in zip(losses, others, strict=True)]
        estimate = fit_crossed(np.stack(rows)).estimate()
        return [round(ratio_of(x), 4) for x in (estimate.estimate, estimate.ci_low, estimate.ci_high)]

    for (name, level), by_sample in found.items():
        samples = sorted(by_sample)
        own = [by_sample[one] for one in samples]
        line: dict[str, Any] = {"configuration": name, "level": level, "samples": samples}
        line["to_dense"] = ratio(own, [dense] * len(own))
        reference = found.get(("reference", level), {})
        paired = [one for one in samples if one in reference]
        if name != "reference" and paired:
            line["to_reference"] = ratio([by_sample[one] for one in paired], [reference[one] for one in paired])
        yield line


def best_of(found: dict[tuple[str, float], dict[int, Any]], lines: Sequence[dict[str, Any]], tokens: Any) -> str:
    """The configuration to go on with: the lowest perplexity, in the geometric mean over levels and samples.

    ``found`` and ``tokens`` as for ``contrasts``, whose ``lines`` say which are clearly worse than the reference at a level
    (the whole interval is above 1): they are out. So are those without a figure that the reference has.
    """
    cells = {
        (level, sample) for (name, level), by_sample in found.items() if name == "reference" for sample in by_sample
    }
    worse = {line["configuration"] for line in lines if line.get("to_reference", [1, 1, 1])[1] > 1}
    means: dict[str, float] = {}
    for name in {name for name, _ in found} - worse:
        nats = {
            (level, sample): losses.sum() / tokens.sum()
            for (one, level), by_sample in found.items()
            for sample, losses in by_sample.items()
            if one == name
        }
        if cells <= {*nats}:
            means[name] = sum(nats[cell] for cell in cells) / len(cells)
    return min(means, key=lambda name: (means[name], name != "reference"), default="reference")


def read_windows(options: argparse.Namespace, tokenizer: Any, bos: int | None = None) -> Tensor:
    """All windows of the calibration text, which begin with the token ``bos`` if there is one.

    ``--windows_file`` keeps them: tokenising takes longer than many a measurement.

    ValueError where the file is of another text or window.
    """
    documents = load_documents(options.calibration_text, option="--calibration_text")
    digest = hashlib.sha256("\0".join(one.text for one in documents).encode()).hexdigest()
    if options.windows_file is None:
        return whole_windows(documents, tokenizer, options.window, bos=bos)
    if not options.windows_file.exists():
        windows = whole_windows(documents, tokenizer, options.window, bos=bos)
        np.savez_compressed(options.windows_file, windows=windows.to(torch.int32).numpy(), text=digest)
    with np.load(options.windows_file) as kept:
        if str(kept["text"]) != digest or kept["windows"].shape[1] != options.window:
            raise ValueError(f"{options.windows_file} was made of another text or window; delete it")
        return torch.from_numpy(kept["windows"]).long()


@dataclass
class Measurement:
    """Measures cells, one after the other, and says what each came to."""

    judge: Judge
    benches: dict[int, Bench]
    parts: dict[str, float]
    ends: float
    phase: str
    to: Path | None
    found: dict[tuple[str, float], dict[int, Any]] = field(default_factory=dict)

    def run(self, cells: Sequence[tuple[int, str, float]]) -> list[dict[str, Any]]:
        """Measures ``cells`` of (sample, configuration, level) until the time is up; the contrasts between them.

        Where one fails, the other levels of its sample and configuration are left out.
        """
        failed: set[tuple[int, str]] = set()
        for sample, name, level in cells:
            if (sample, name) in failed:
                continue
            if time.perf_counter() > self.ends:
                say(phase=self.phase, sample=sample, configuration=name, level=level, skipped="time limit")
                continue
            try:
                self._measure(sample, name, level)
            except Exception:
                say(phase=self.phase, sample=sample, configuration=name, level=level, failed=traceback.format_exc())
                failed.add((sample, name))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        lines = list(contrasts(self.found, self.judge.dense, self.judge.tokens))
        for line in lines:
            say(phase=self.phase, **line)
        return lines

    def _measure(self, sample: int, name: str, level: float) -> None:
        begun = time.perf_counter()
        self.parts.clear()
        bench, configuration = self.benches[sample], Configuration.named(name)
        keep, said = bench.keep(configuration, level)
        with bench.timed("model"):
            pruned = bench.build(configuration, keep)
        with bench.timed("evaluation"):
            outcome = self.judge.outcome_of(pruned)
        tokens = self.judge.tokens
        self.found.setdefault((name, level), {})[sample] = outcome.losses
        excess = outcome.losses - self.judge.dense
        figures = {
            "ratio": ratio_of(excess.sum() / tokens.sum()),
            "worst_window": ratio_of((excess / tokens).max()),
        }
        if self.judge.kl:
            figures["kl"] = outcome.kl.sum() / tokens.sum()
        say(
            phase=self.phase, sample=sample, configuration=name, level=level,
            **{key: round(float(value), 4) for key, value in figures.items()},
            first_token=np.quantile(outcome.first_token, [0, 0.5, 1]).round(2).tolist(),
            strays=int(outcome.strays.sum()), **said, lost=(~keep).sum(1).tolist(),
            seconds=round(time.perf_counter() - begun, 1), parts=dict(self.parts),
        )  # fmt: skip
        if self.to:
            with self.to.open("a") as file:
                row = {"phase": self.phase, "sample": sample, "configuration": name, "level": level}
                row |= {"keep": keep.int().tolist()}
                row |= {one.name: getattr(outcome, one.name).tolist() for one in fields(outcome)}
                row |= {"dense": self.judge.dense.tolist(), "tokens": tokens.tolist()}
                file.write(json.dumps(row) + "\n")


def say(**figures: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps(figures), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument(
        "--model_path", type=Path, help="the GGUF file of smollm2-135m, where its package is not installed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration_text", default="bundled:calibration")
    parser.add_argument("--eval_text", default="bundled:validation")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--score_tokens", type=int, default=8192, help="that other methods than obs read")
    parser.add_argument("--eval_tokens", type=int, default=4096)
    parser.add_argument("--no_kl", action="store_true", help="leave KL to the dense model out, which takes memory")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", default="0", help="numbers of calibration samples, comma-separated")
    parser.add_argument("--levels", default="30,50,70")
    parser.add_argument("--configurations", default=";".join(DEFAULT), help="separated by semicolons")
    parser.add_argument(
        "--methods", default="", help="other methods, asked in their own order with and without consent"
    )
    parser.add_argument("--factors", default="1", help="of the limit of consent, for --methods")
    parser.add_argument(
        "--time_limit_s", type=float, default=math.inf, help="of the ablation: nothing is begun after that"
    )
    parser.add_argument("--final_text", help="that the chosen configuration and the reference are measured on")
    parser.add_argument("--final_tokens", type=int, default=15360)
    parser.add_argument("--final_levels", default="30,50,70")
    parser.add_argument("--final_samples", default="0")
    parser.add_argument("--final_time_limit_s", type=float, default=math.inf, help="as --time_limit_s")
    parser.add_argument("--windows_file", type=Path, help="where the calibration text's token ids are kept, .npz")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--to", type=Path, help="a file for what is known of every window, as JSON lines")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    names = [name for name in options.configurations.split(";") if name]
    for method in filter(None, options.methods.split(",")):
        names += [f"method={method}", *(f"method={method},consent={one}" for one in options.factors.split(","))]
    chosen = {name: Configuration.named(name) for name in names}
    levels = [float(level) for level in options.levels.split(",")]
    samples = [int(sample) for sample in options.samples.split(",")]

    if options.model_path is None:
        preview = preview_model(options.model_name)
    else:
        preview = ModelPreview(gguf.SMOLLM2, str(options.model_path), *gguf.read_header(options.model_path))
    model = load_model(preview, device=options.device).model
    torch.set_num_threads(1)
    bos = preview.bos("auto")
    calibration = read_windows(options, preview.tokenizer, bos)
    parts: dict[str, float] = {}

    def note(what: str, seconds: float) -> None:
        parts[what] = round(parts.get(what, 0.0) + seconds, 2)

    def judge_of(text: str, option: str, tokens: int) -> Judge:
        judge = Judge(
            model,
            evaluation_windows(
                load_documents(text, option=option),
                preview.tokenizer, window=options.window, stride=options.window, tokens=tokens, bos=bos,
            ),
            kl=not options.no_kl,
        )  # fmt: skip
        scored = judge.tokens.sum()
        say(
            model=preview.name, device=options.device, text=option, windows=len(judge.tokens), eval_tokens=int(scored),
            dense_perplexity=round(math.exp(judge.dense.sum() / scored), 4),
            seconds=round(time.perf_counter() - started, 1),
        )  # fmt: skip
        return judge

    def bench_of(sample: int) -> Bench:
        def generator(purpose: str) -> torch.Generator:
            digest = hashlib.sha256(f"{options.seed}/{purpose}/{sample}".encode()).digest()
            return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)

        windows = sample_windows(calibration, options.tokens, generator("calibration"))
        return Bench(model, windows, generator, note, options.score_tokens, begins=bos is not None)

    benches = {sample: bench_of(sample) for sample in samples}
    judge = judge_of(options.eval_text, "--eval_text", options.eval_tokens)
    ends = time.perf_counter() + options.time_limit_s
    ablation = Measurement(judge, benches, parts, ends, "ablation", options.to)
    # Sample by sample within a configuration: what has been measured when time is up can be compared.
    lines = ablation.run([(sample, name, level) for name in chosen for sample in samples for level in levels])
    for bench in benches.values():
        bench.close()
    if options.final_text:
        best = best_of(ablation.found, lines, judge.tokens)
        say(chosen=best, seconds=round(time.perf_counter() - started, 1))
        del judge, ablation
        final_samples = [int(sample) for sample in options.final_samples.split(",")]
        benches |= {sample: bench_of(sample) for sample in final_samples if sample not in benches}
        judge = judge_of(options.final_text, "--final_text", options.final_tokens)
        ends = time.perf_counter() + options.final_time_limit_s
        final = Measurement(judge, benches, parts, ends, "final", options.to)
        for sample in final_samples:
            final.run(
                [
                    (sample, name, float(level))
                    for name in dict.fromkeys(("reference", best))
                    for level in options.final_levels.split(",")
                ]
            )
            benches[sample].close()
    say(total_seconds=round(time.perf_counter() - started, 1))


if __name__ == "__main__":
    main()
