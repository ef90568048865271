"""The same log-likelihoods as lm-evaluation-harness on the same (context, target) spans. `make test-extras` installs it."""

from __future__ import annotations

import re
import warnings

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
