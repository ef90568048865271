"""The same log-likelihoods as lm-evaluation-harness on the same (context, target) spans. `make test-extras` installs it."""

from __future__ import annotations

import math
import re
import runpy
import warnings
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from pruning_comparison.analysis.estimates import observations, summarize
from pruning_comparison.measure.perplexity import (
    evaluation_windows,
    measure_perplexity,
    window_losses,
)
from pruning_comparison.measure.text_quality import generation_losses
from pruning_comparison.measure.wikitext import page_nats, pages_of
from pruning_comparison.models.loading import load_model, preview_model
from pruning_comparison.run.measure_cell import window_measurements
from pruning_comparison.texts import Document, load_documents, tokenize

pytestmark = [
    pytest.mark.extras,
    # Other people's warnings; what is compared here are numbers.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def bundled():
    return load_model(preview_model("bundled"))


@pytest.fixture(scope="module")
def harness(bundled):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=bundled.model, tokenizer=bundled.tokenizer, backend="causal", batch_size=4, device="cpu")


def spans(bundled, lengths):
    """(context, target) token ids from the beginnings of validation addresses."""
    documents = load_documents("bundled:validation", option="--text")
    for document, (context, target) in zip(documents, lengths, strict=False):
        ids, _ = tokenize(bundled.tokenizer, document.text[:8000])
        yield ids[:context], ids[context : context + target]


def test_token_spans_have_the_harness_log_likelihood(bundled, harness):
    pairs = list(spans(bundled, [(1, 1), (1, 200), (200, 1), (64, 64), (7, 90), (128, 127)]))
    requests = [(("", ""), context, target) for context, target in pairs]
    theirs = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    windows = [torch.tensor(context + target) for context, target in pairs]
    nats, counts = window_losses(bundled.model, windows, batch_size=4, targets=[len(target) for _, target in pairs])
    assert counts.tolist() == [1, 200, 1, 64, 90, 127]
    assert nats.tolist() == pytest.approx([-likelihood for likelihood, _ in theirs], rel=1e-5, abs=1e-4)


def test_texts_have_the_harness_log_likelihood(bundled, harness):
    """Through the harness's public requests, which tokenize context and continuation themselves."""
    from lm_eval.api.instance import Instance

    texts = [
        ("Fellow citizens of the Senate", " and of the House of Representatives"),
        ("The state of the Union", " is strong, and our people are free."),
        ("We have", " peace"),
    ]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(texts)
    ]
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    ids = [[torch.tensor(tokenize(bundled.tokenizer, part)[0]) for part in pair] for pair in texts]
    ours = generation_losses(
        bundled.model, [context for context, _ in ids], [target for _, target in ids], batch_size=2
    )
    assert [nats for nats, _ in ours] == pytest.approx([-likelihood for likelihood, _ in theirs], rel=1e-5)


def test_a_document_has_the_harness_bits_per_byte_and_word_perplexity(bundled, harness):
    """What the report says of one document: windows of our making, scored by the harness and added up as its metrics do.

    Only the first token is apart: the harness predicts it from the end-of-text token, we have no context for it and leave it
    out.
    """
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    document = Document("a", load_documents("bundled:validation", option="--text")[0].text[:3000])
    windows = evaluation_windows([document], bundled.tokenizer, window=128, stride=64, tokens=10_000)
    requests = []
    for window in windows:
        ids = window.ids.tolist()
        requests.append((("", ""), ids[: -window.targets], ids[-window.targets :]))
    likelihoods = [value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
    place = {"variant": "baseline", "method": "fisher", "iteration": 0, "level": 0.0}
    rows = window_measurements(measure_perplexity(bundled.model, windows, batch_size=4))
    cells = pd.DataFrame([{**place, "status": "done", "fingerprint": "dense"}])
    summary = summarize("bundled", observations(cells, pd.DataFrame([{**vars(row), **place} for row in rows])))
    reported = summary.set_index("metric")["estimate"]
    ids, offsets = tokenize(bundled.tokenizer, document.text)
    scored = document.text[offsets[1][0] :]
    words = len(re.split(r"\s+", document.text.strip())) - 1  # the first word begins in the first token
    total = sum(likelihoods)
    assert sum(window.targets for window in windows) == len(ids) - 1
    assert reported["bits_per_byte"] == pytest.approx(bits_per_byte([(total, len(scored.encode()))]), rel=1e-5)
    assert reported["word_perplexity"] == pytest.approx(weighted_perplexity([(total, words)]), rel=1e-4)


def rolling(harness, text):
    """The harness's log-likelihood of a whole text, through its public requests."""
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    return harness.loglikelihood_rolling([request], disable_tqdm=True)[0]


@pytest.mark.parametrize("window", [64, 128])
def test_wikitext_has_the_harness_word_perplexity(bundled, window):
    """Two pages, through the functions of the harness's own task and its rolling windows."""
    from lm_eval.models.huggingface import HFLM

    # By its path: to import the harness's tasks as a package needs datasets.
    place = Path(str(find_spec("lm_eval").origin)).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    task = runpy.run_path(str(place))
    harness = HFLM(
        pretrained=bundled.model,
        tokenizer=bundled.tokenizer,
        backend="causal",
        batch_size=2,
        device="cpu",
        max_length=window,
    )
    address = load_documents("bundled:validation", option="--text")[0].text
    spaced = 'he said " so " in 1 @,@ 234 days ( or more ) . \n \n = = Part = = \n \n It \'s 5 ° N . \n '
    pages = [
        f" = First page = \n \n {address[:700]} , {spaced}",
        f" = Second = \n \n {address[900:1200]} ; well @-@ known : yes ! \n ",
    ]
    documents = [Document(str(number), f"{page}\n") for number, page in enumerate(pages)]
    documents.append(Document("not wanted", " = Third = \n"))
    ours = pages_of(documents, {"0", "1"}, bundled.tokenizer, window=window)
    nats = page_nats(bundled.model, ours, batch_size=2)
    items = []
    for page, loss, text in zip(ours, nats, pages, strict=True):
        likelihood = rolling(harness, task["wikitext_detokenizer"]({"page": text}))
        theirs = task["process_results"]({"page": text}, (likelihood,))["word_perplexity"]
        assert page.words == theirs[1]
        assert loss == pytest.approx(-likelihood, rel=1e-5)
        items.append(theirs)
    from lm_eval.api.metrics import weighted_perplexity

    total = sum(nats) / sum(page.words for page in ours)
    assert math.exp(total) == pytest.approx(weighted_perplexity(items), rel=1e-5)


def with_beginning_token(bundled, harness, text):
    """Windows as wide as the model's context, each with the harness's beginning token, and their summed losses in nats."""
    windows = evaluation_windows(
        [Document("a", text)], bundled.tokenizer, window=harness.max_length, stride=harness.max_length, tokens=10**6,
        bos=harness.prefix_token_id,
    )  # fmt: skip
    nats, _ = window_losses(
        bundled.model, [window.ids for window in windows], batch_size=2, targets=[window.targets for window in windows]
    )
    return windows, float(nats.sum())


@pytest.mark.parametrize("length", [40, 400, 900])
def test_with_a_beginning_token_a_document_of_one_window_has_the_harness_log_likelihood(bundled, harness, length):
    """Every token counts, the first one too, which is predicted from the beginning token."""
    text = load_documents("bundled:validation", option="--text")[1].text[:length]
    ids, _ = tokenize(bundled.tokenizer, text)
    windows, nats = with_beginning_token(bundled, harness, text)
    assert [window.targets for window in windows] == [len(ids)]
    assert nats == pytest.approx(-rolling(harness, text), rel=1e-5)


def test_with_a_beginning_token_longer_documents_differ_from_the_harness_by_their_windows(bundled):
    """The harness begins its later windows with the token before and fills the last one up with context. Ours begin with the
    beginning token, as the model's texts do, and do not score the text's token that follows it, which has no other context.
    """
    from lm_eval.models.huggingface import HFLM

    context = 128  # the harness predicts so many tokens at once, from one more than our windows hold
    harness = HFLM(
        pretrained=bundled.model, tokenizer=bundled.tokenizer, backend="causal", batch_size=4, device="cpu",
        max_length=context,
    )  # fmt: skip
    begin = harness.prefix_token_id
    text = load_documents("bundled:validation", option="--text")[1].text
    ids, offsets = tokenize(bundled.tokenizer, text)
    tokens = 2 * context + context // 2
    text = text[: offsets[tokens][0]]
    ids, _ = tokenize(bundled.tokenizer, text)
    windows, nats = with_beginning_token(bundled, harness, text)
    # What the harness scores, made by hand: all tokens, in windows of the context.
    theirs = [([begin], ids[:context]), (ids[context - 1 : context], ids[context : 2 * context])]
    rest = len(ids) - 2 * context
    theirs += [(ids[context + rest - 1 : 2 * context], ids[2 * context :])]
    by_hand, counts = window_losses(
        bundled.model, [torch.tensor(before + after) for before, after in theirs], batch_size=1,
        targets=[len(after) for _, after in theirs],
    )  # fmt: skip
    assert int(counts.sum()) == len(ids)
    assert float(by_hand.sum()) == pytest.approx(-rolling(harness, text), rel=1e-5)
    # Ours: a token less of the text in each window, and none scored from the beginning token but the document's first.
    assert [window.ids[0].item() for window in windows] == [begin] * len(windows)
    assert sum(window.targets for window in windows) == len(ids) - (len(windows) - 1)
    assert len(windows) == -(-len(ids) // (context - 1))
    # The same windows give the same figures there.
    requests = [
        (("", ""), window.ids[: -window.targets].tolist(), window.ids[-window.targets :].tolist()) for window in windows
    ]
    same = sum(value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True))
    assert nats == pytest.approx(-same, rel=1e-5)
    ours_per_token, theirs_per_token = nats / sum(window.targets for window in windows), float(by_hand.sum()) / len(ids)
    assert abs(ours_per_token - theirs_per_token) > 1e-3
