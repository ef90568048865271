"""Results are pinned to revisions: whoever changes one raises its revision, so that old and new are never mixed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from pin_results import PINNED, changes, measure

from pruning_comparison.methods import METHODS
from pruning_comparison.metrics import of_kind
from pruning_comparison.variants import VARIANTS


@pytest.fixture(scope="module")
def pinned():
    return json.loads(PINNED.read_text("utf-8"))


@pytest.fixture(scope="module")
def measured():
    return measure()


def test_every_result_is_what_was_pinned_at_its_revision(pinned, measured):
    assert changes(pinned, measured) == []


def test_everything_that_has_results_of_its_own_is_pinned(pinned):
    kinds = {kind: {name for name in pinned if name.startswith(kind)} for kind in ("method ", "variant ", "metric ")}
    assert kinds["method "] == {f"method {name}" for name in METHODS}
    assert kinds["variant "] == {f"variant {name}" for name in VARIANTS}
    assert kinds["metric "] == {f"metric {metric.name}" for metric in of_kind("text")}
    assert set(pinned) == {"the protocol"}.union(*kinds.values())


@pytest.mark.parametrize("name", ["method entropy", "variant agency", "metric seq_rep_4", "the protocol"])
def test_a_changed_result_at_the_same_revision_is_found(pinned, name):
    changed = copy.deepcopy(pinned)
    result = changed[name]
    if name == "method entropy":
        result["scores"][1][2] *= 1.001
    elif name == "variant agency":
        result["heads"][0] = "0000"
    elif name == "metric seq_rep_4":
        result["value"] += 0.001
    else:
        result["evaluation windows"][0][0].pop()
    assert changes(pinned, changed) == [
        f"results of {name} changed: raise its revision and pin again with `python tests/pin_results.py`"
    ]


def test_rounding_is_no_change(pinned):
    rounded = copy.deepcopy(pinned)
    rounded["variant agency"]["perplexity"] *= 1 + 1e-6
    assert changes(pinned, rounded) == []


def test_a_raised_revision_that_was_not_pinned_again_is_found(pinned):
    raised = copy.deepcopy(pinned)
    raised["method entropy"]["revision"] += 1
    assert changes(pinned, raised) == [
        "method entropy has revision 5 and is pinned at revision 4: pin again with `python tests/pin_results.py`"
    ]


def test_what_is_new_and_what_is_gone_is_found(pinned):
    other = copy.deepcopy(pinned)
    other["method newest"] = other.pop("method entropy")
    assert changes(pinned, other) == [
        "method entropy is pinned and is gone: pin again with `python tests/pin_results.py`",
        "method newest is not pinned: pin it with `python tests/pin_results.py`",
    ]


def test_a_method_that_scores_otherwise_is_found(pinned, monkeypatch):
    """From the function to the message: half of what magnitude gives is another result, and revision 2 asks for a pin."""
    from pin_results import _of_method

    magnitude = METHODS["magnitude"]

    def halved(model):
        return magnitude.function()(model=model) / 2

    for record, said in (
        (replace(magnitude, score=halved), "results of method magnitude changed"),
        (replace(magnitude, revision=2), "method magnitude has revision 2"),
    ):
        monkeypatch.setitem(METHODS, "magnitude", record)
        (found,) = changes(pinned, {**pinned, "method magnitude": _of_method(record)})
        assert found.startswith(said)
