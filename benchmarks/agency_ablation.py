"""What each part of agency brings, configuration by configuration: python benchmarks/agency_ablation.py [OPTIONS]

A configuration is a comma-separated list of settings that differ from the reference's, for example
``weights=context,ridge=0.05``; ``reference`` is the one with none. Each is built on the same calibration windows and judged
on the same evaluation windows: one JSON line per sample, configuration and level as soon as it is known, and at the end
paired contrasts with the reference with 95 % intervals over samples and windows. A configuration that fails is reported, and
the others go on.
"""

from __future__ import annotations

import argparse
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
from pruning_comparison.agency.regrowth import regrow
from pruning_comparison.agency.streams import DenseStream
from pruning_comparison.agency.trajectory import ROUND_LEVEL
from pruning_comparison.agency.weights_in_context import measured_curves, weights_in_context
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
from pruning_comparison.scoring.prices import RIDGE, Prices, elimination, merged
from pruning_comparison.scoring.scores import ScoreSettings, score_heads
from pruning_comparison.texts import load_documents, sample_windows, whole_windows

BATCH = 8
ROUND_AT = 30.0


@dataclass(frozen=True)
class Configuration:
    """One way of making the model of a level. Every field is a setting that a configuration may name.

    ``method`` ranks heads. ``consent`` is "none" (they leave in its order, as where everyone consents) or a number, the
    factor of the limit. ``weights`` of layers: "half" (half of one layer is cut), "curve" (at three sizes), "context" and
    "context2" (with the other layers cut as at the level, once or twice), "rounds" (measured again on the model that is
    adapted at 30 %). ``swaps`` is how many rounds of regrowth there are. ``ridge``, ``mlp_ridge``, ``parts``,
    ``part_layers``, ``lost_ratio``, ``error_share``, ``longest`` and ``sinks_apart`` are those of ``adapt``; ``passes`` is
    how often it runs. ``price_ridge`` is that of prices. ``openings`` adds so many short windows of ``opening_tokens``, from
    places of the calibration windows drawn at random; in regressions each position counts ``opening_weight``. ``sampled``
    adds so many times the calibration windows of text that the dense model continues them with.
    """

    method: str = "obs"
    consent: str = "none"
    weights: str = "half"
    price_ridge: float = RIDGE
    swaps: int = 0
    ridge: float = 0.1
    mlp_ridge: float = 0.3
    passes: int = 1
    parts: int = 1
    part_layers: int = 1
    lost_ratio: float = 0.0
    error_share: float = 1.0
    longest: float = 0.0
    sinks_apart: int = 0
    openings: int = 0
    opening_tokens: int = 8
    opening_weight: float = 1.0
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
        if configuration.consent != "none":
            float(configuration.consent)
        return configuration


WEIGHTS = ("half", "curve", "context", "context2", "rounds")

DEFAULT = (
    "reference",
    "openings=1024,opening_weight=0.06",
    "openings=1024,opening_tokens=2,opening_weight=0.06",
    "swaps=3",
    "weights=context",
    "weights=rounds",
    "weights=curve",
    "mlp_ridge=0.1",
    "mlp_ridge=1",
    "ridge=0.03",
    "ridge=0.3",
    "lost_ratio=8",
    "price_ridge=0.01",
    "price_ridge=0.1",
    "openings=256,opening_weight=0.25,sinks_apart=1",
    "sinks_apart=1",
    "longest=30",
    "weights=context2",
    "error_share=0.9",
    "parts=2",
    "passes=2",
    "sampled=1",
)


@dataclass
class Bench:
    """The dense model, one sample of calibration windows, and what has been computed on it."""

    model: PreTrainedModel
    windows: Tensor
    generator: Callable[[str], torch.Generator]
    note: Callable[[str, float], None]
    score_tokens: int
    _moments: HeadMoments | None = None
    _prices: dict[float, Prices] = field(default_factory=dict)
    _scores: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    _stream: tuple[Any, DenseStream] | None = None
    _round: tuple[Any, HeadMoments] | None = None

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
                self._moments = observe_for_prices(self.model, self.windows, batch_size=BATCH)
        return self._moments

    def prices(self, ridge: float) -> Prices:
        """Prices of the dense model's heads, layers weighed by half of each."""
        if ridge not in self._prices:
            moments = self.moments()
            with self.timed("withdrawal costs"):
                layers = layer_prices(self.model, moments, ridge=ridge)
            with self.timed("weights of layers"):
                weights = layer_weights(self.model, moments, layers, split_windows(self.windows)[1])
            self._prices[ridge] = Prices.of(layers, weights.tolist(), head_grid(self.model.config).n_heads)
        return self._prices[ridge]

    def scores(self, method: str, ridge: float) -> Tensor:
        """The method's scores of the dense model's heads, [L, H]."""
        if method == "obs":
            if (method, ridge) not in self._scores:
                prices = self.prices(ridge)
                with self.timed("order of all heads"):
                    self._scores[method, ridge] = elimination(prices)[0]
            return self._scores[method, ridge]
        if (method, 0.0) not in self._scores:
            settings = ScoreSettings(batch_size=BATCH, generator=self.generator("random ranking"))
            with self.timed(f"scores by {method}"):
                windows = self.windows[: -(-self.score_tokens // self.windows.shape[1])]
                found = score_heads(method_named(method), self.model, windows, settings)
            self._scores[method, 0.0] = found.scores
        return self._scores[method, 0.0]

    def stream(self, configuration: Configuration) -> DenseStream:
        """What adaptation aims at; of the last text asked for, since it is large."""
        key = (
            configuration.sampled, configuration.openings, configuration.opening_tokens, configuration.opening_weight
        )  # fmt: skip
        if self._stream is None or self._stream[0] != key:
            self.close()
            windows, openings = self.windows, None
            if configuration.sampled > 0:
                with self.timed("sampled text"):
                    given = windows[: round(configuration.sampled * len(windows))]
                    windows = torch.cat([windows, continued(self.model, given, self.generator("sampled"))])
            if configuration.openings:
                openings = openings_of(
                    self.windows, configuration.openings, configuration.opening_tokens, self.generator("openings")
                )
            with self.timed("dense stream"):
                self._stream = (
                    key,
                    DenseStream(
                        self.model,
                        windows,
                        batch_size=BATCH,
                        openings=openings,
                        opening_weight=configuration.opening_weight,
                    ),
                )
        return self._stream[1]

    def keep(self, configuration: Configuration, level: float) -> tuple[Tensor, dict[str, Any]]:
        """The heads that stay, bool [L, H], and what is worth saying of how they were chosen."""
        scores = self.scores(configuration.method, configuration.price_ridge)
        keep = select_heads(scores, level)
        prices = self.prices(configuration.price_ridge)
        if configuration.consent != "none":
            keep = asked(scores, prices, level, float(configuration.consent))
        fresh = split_windows(self.windows)[1]
        if configuration.weights != "half":
            with self.timed(f"weights={configuration.weights}"):
                keep = self._weighed(configuration.weights, prices, keep, level, fresh)
        said: dict[str, Any] = {"predicted": round(math.exp(min(prices.total(~keep), 50.0)), 4)}
        if configuration.swaps:
            with self.timed("regrowth"):
                grown = regrow(self.model, self.moments(), prices.layers, keep, fresh, most_rounds=configuration.swaps)
            keep = grown.keep
            said |= {"exchanges": len(grown.exchanges), "trials": grown.evaluations}
            said |= {"nats_before": round(grown.nats_before, 4), "nats_after": round(grown.nats_after, 4)}
        return keep, said

    def _weighed(self, weights: str, prices: Prices, keep: Tensor, level: float, fresh: Tensor) -> Tensor:
        """The heads of a level when layers are weighed in another way."""
        moments, layers, n_heads = self.moments(), prices.layers, keep.shape[1]
        if weights == "curve":
            order, _ = merged(measured_curves(self.model, moments, layers, fresh), n_heads)
            return select_heads(order, level)
        if weights == "rounds":
            if level <= ROUND_AT:
                return keep
            adapted, after = self._adapted(select_heads(self.scores("obs", RIDGE), ROUND_AT))
            of_adapted = layer_prices(adapted, after)
            again = layer_weights(adapted, after, of_adapted, fresh, reference=self.model)
            return select_heads(elimination(Prices.of(of_adapted, again.tolist(), n_heads))[0], level)
        current = prices.weights
        for _ in range(2 if weights == "context2" else 1):
            found = weights_in_context(self.model, moments, layers, ~keep, prices.weights, fresh)
            # Half way on a logarithmic scale: all layers move at once, and each move changes the context of the others.
            current = tuple(math.sqrt(max(old * new, 0.0)) for old, new in zip(current, found.tolist(), strict=True))
            keep = select_heads(elimination(Prices.of(layers, current, n_heads))[0], level)
        return keep

    def _adapted(self, keep: Tensor) -> tuple[PreTrainedModel, HeadMoments]:
        """The model that is adapted at the level of a round, without having read the fresh windows, and its moments."""
        if self._round is None:
            fitted, _ = split_windows(self.windows)
            adapted = remove_heads(self.model, keep)
            whole = max(1, len(fitted) // BATCH) * BATCH * fitted.shape[1]
            adapt(self.stream(Configuration()), adapted, most_tokens=whole)
            self._round = adapted, observe_for_prices(adapted, self.windows, batch_size=BATCH)
        return self._round

    def build(self, configuration: Configuration, keep: Tensor) -> PreTrainedModel:
        """The model that has lost its other heads, adapted."""
        stream = self.stream(configuration)
        pruned = remove_heads(self.model, keep)
        with self.timed("refit"):
            for _ in range(configuration.passes):
                adapt(
                    stream,
                    pruned,
                    ridge=configuration.ridge,
                    mlp_ridge=configuration.mlp_ridge,
                    parts=configuration.parts,
                    part_layers=configuration.part_layers,
                    lost_ratio=configuration.lost_ratio or None,
                    error_share=configuration.error_share,
                    longest=configuration.longest or None,
                    sinks_apart=bool(configuration.sinks_apart),
                )
        return pruned

    def close(self) -> None:
        """Lets go of the stream."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None


def openings_of(windows: Tensor, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Short windows [count, tokens] from places of ``windows`` [N, T] drawn at random."""
    places = torch.randint(len(windows) * (windows.shape[1] - tokens + 1), (count,), generator=generator)
    every = windows.unfold(1, tokens, 1).flatten(0, 1)
    return every[places]


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

    ``losses`` and ``kl`` are nats of negative log-likelihood and of KL(dense || model), summed over scored tokens.
    ``first_token`` is how long the stream is at a window's first token, in the block where the dense model's is longest,
    relative to it: models park their attention there. ``strays`` are other positions whose stream is more than ten times as
    long as the dense model's in some block.
    """

    losses: Any
    kl: Any
    first_token: Any
    strays: Any


@torch.no_grad()
def outcome_of(model: PreTrainedModel, dense: PreTrainedModel, windows: Sequence[EvaluationWindow]) -> Outcome:
    """What ``model`` says of the evaluation windows, compared with the ``dense`` one."""
    found = Outcome(*(np.zeros(len(windows)) for _ in range(4)))
    lengths: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        lengths.setdefault(len(window.ids), []).append(number)
    for numbers in lengths.values():
        for first in range(0, len(numbers), 4):
            part = numbers[first : first + 4]
            ids = torch.stack([windows[number].ids for number in part]).to(model.device)
            now, norms = said_of(model, ids)
            loss = -now.gather(-1, ids[:, 1:, None])[..., 0]
            if model is dense:
                divergence, relative, longest = torch.zeros_like(loss), torch.ones_like(norms), 0
            else:
                expected, dense_norms = said_of(dense, ids)
                divergence = (expected.exp() * (expected - now)).sum(-1)
                relative, longest = norms / dense_norms, int(dense_norms[:, 0, 0].argmax())
            for row, number in enumerate(part):
                scored = slice(-windows[number].targets, None)
                found.losses[number] = float(loss[row, scored].double().sum())
                found.kl[number] = float(divergence[row, scored].double().sum())
                found.first_token[number] = float(relative[longest, row, 0])
                found.strays[number] = int((relative[:, row, 1:] > 10).any(0).sum())
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
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", default="0", help="numbers of calibration samples, comma-separated")
    parser.add_argument("--levels", default="30,50,70")
    parser.add_argument("--configurations", default=";".join(DEFAULT), help="separated by semicolons")
    parser.add_argument(
        "--methods", default="", help="other methods, asked in their own order with and without consent"
    )
    parser.add_argument("--factors", default="1", help="of the limit of consent, for --methods")
    parser.add_argument("--time_limit_s", type=float, default=math.inf, help="no configuration is begun after that")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--to", type=Path, help="a file for what is known of every window, as JSON lines")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    names = [name for name in options.configurations.split(";") if name]
    for method in filter(None, options.methods.split(",")):
        names += [f"method={method}", *(f"method={method},consent={one}" for one in options.factors.split(","))]
    chosen = {name: Configuration.named(name) for name in names}
    levels = [float(level) for level in options.levels.split(",")]

    def say(**figures: Any) -> None:
        print(json.dumps(figures), flush=True)

    if options.model_path is None:
        preview = preview_model(options.model_name)
    else:
        preview = ModelPreview(gguf.SMOLLM2, str(options.model_path), *gguf.read_header(options.model_path))
    model = load_model(preview, device=options.device).model
    torch.set_num_threads(1)
    calibration = whole_windows(
        load_documents(options.calibration_text, option="--calibration_text"), preview.tokenizer, options.window
    )
    evaluation = evaluation_windows(
        load_documents(options.eval_text, option="--eval_text"),
        preview.tokenizer, window=options.window, stride=options.window, tokens=options.eval_tokens,
    )  # fmt: skip
    tokens = np.array([window.targets for window in evaluation])
    dense = outcome_of(model, model, evaluation).losses
    say(
        model=preview.name, device=options.device, windows=len(evaluation), eval_tokens=int(tokens.sum()),
        dense_perplexity=round(math.exp(dense.sum() / tokens.sum()), 4), seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    found: dict[tuple[str, float], dict[int, Any]] = {}
    for sample in map(int, options.samples.split(",")):

        def generator(purpose: str, sample: int = sample) -> torch.Generator:
            digest = hashlib.sha256(f"{options.seed}/{purpose}/{sample}".encode()).digest()
            return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)

        windows = sample_windows(calibration, options.tokens, generator("calibration"))
        parts: dict[str, float] = {}

        def note(what: str, seconds: float, parts: dict[str, float] = parts) -> None:
            parts[what] = round(parts.get(what, 0.0) + seconds, 2)

        bench = Bench(model, windows, generator, note, options.score_tokens)
        for name, configuration in chosen.items():
            if time.perf_counter() - started > options.time_limit_s:
                say(sample=sample, configuration=name, skipped="time limit")
                continue
            for level in levels:
                parts.clear()
                begun = time.perf_counter()
                try:
                    keep, said = bench.keep(configuration, level)
                    with bench.timed("model"):
                        pruned = bench.build(configuration, keep)
                    with bench.timed("evaluation"):
                        outcome = outcome_of(pruned, model, evaluation)
                    del pruned
                except Exception:
                    say(sample=sample, configuration=name, level=level, failed=traceback.format_exc())
                    break
                found.setdefault((name, level), {})[sample] = outcome.losses
                excess = outcome.losses - dense
                figures = {
                    "ratio": ratio_of(excess.sum() / tokens.sum()),
                    "worst_window": ratio_of((excess / tokens).max()),
                    "kl": outcome.kl.sum() / tokens.sum(),
                }
                say(
                    sample=sample, configuration=name, level=level,
                    **{key: round(float(value), 4) for key, value in figures.items()},
                    first_token=np.quantile(outcome.first_token, [0, 0.5, 1]).round(2).tolist(),
                    strays=int(outcome.strays.sum()), **said, lost=(~keep).sum(1).tolist(),
                    seconds=round(time.perf_counter() - begun, 1), parts=dict(parts),
                )  # fmt: skip
                if options.to:
                    with options.to.open("a") as file:
                        row = {"sample": sample, "configuration": name, "level": level, "keep": keep.int().tolist()}
                        row |= {one.name: getattr(outcome, one.name).tolist() for one in fields(outcome)}
                        row |= {"dense": dense.tolist(), "tokens": tokens.tolist()}
                        file.write(json.dumps(row) + "\n")
        bench.close()
    for line in contrasts(found, dense, tokens):
        say(**line)
    say(total_seconds=round(time.perf_counter() - started, 1))


if __name__ == "__main__":
    main()
