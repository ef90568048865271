"""Two runs: what differs, what cannot be compared, and with what reservation the rest is."""

from __future__ import annotations

import pandas as pd
import pytest

from pruning_comparison.analysis.between_runs import (
    Difference,
    OnlyIn,
    RunTables,
    compared_metrics,
    differences,
    limits,
    same_tokens,
)
from pruning_comparison.spec import ComparisonSpec


def revisions(**changes):
    base = {"protocol": 1, "methods": {"entropy": 1}, "variants": {"agency": 1}, "metrics": {"perplexity": 1}}
    return {**base, **changes}


def manifest(**changes):
    spec = ComparisonSpec(model_name="one", pruning_levels=(0, 50), temperatures=(1.0,)).as_dict()
    base = {
        "spec": {**spec, **changes.pop("spec", {})},
        "inputs": {"prompts": "p", "eval_text": "e", "calibration_text": "c", "model": "m"},
        "model": {"name": "one"},
        "revisions": revisions(),
        "versions": {"torch": "2.11.0"},
        "hardware": {"processor": "slow", "threads": 1},
        "commit": "abc",
    }
    return {key: {**value, **changes[key]} if isinstance(value, dict) and key in changes else changes.get(key, value)
            for key, value in base.items()}  # fmt: skip


def stored(tokens=(10.0, 12.0), **changes):
    windows = [
        {"document": f"d{number}", "window": 0, "metric": metric, "value": value}
        for number, count in enumerate(tokens)
        for metric, value in (("window_tokens", count), ("window_bytes", 50.0))
    ]
    return RunTables("run", "one", pd.DataFrame(), pd.DataFrame(windows), manifest(**changes))


def left_out(first, second):
    return {metric for limit in limits(first, second) for metric in limit.left_out}


# What differs


def test_everything_that_differs_is_named_and_nothing_else():
    found = differences(
        manifest(),
        manifest(
            spec={"model_name": "two", "pruning_levels": [0.0, 30.0]}, inputs={"model": "n"}, versions={"torch": "2.12.0"},
            hardware={"processor": "fast"}, commit=None, revisions=revisions(metrics={"perplexity": 2, "distinct_2": 1}),
        ),
    )  # fmt: skip
    assert found == [
        Difference("spec", "model_name", "one", "two"),
        Difference("spec", "pruning_levels", [0.0, 50.0], [0.0, 30.0]),
        Difference("inputs", "model", "m", "n"),
        Difference("revisions", "metric perplexity", 1, 2),
        Difference("versions", "torch", "2.11.0", "2.12.0"),
        Difference("hardware", "processor", "slow", "fast"),
        Difference("commit", "commit", "abc", None),
    ]
    assert differences(manifest(), manifest()) == []


def test_revisions_of_what_one_run_alone_has_are_no_difference_and_a_run_without_any_differs_once():
    more = manifest(revisions=revisions(methods={"entropy": 1, "random": 3}))
    assert differences(manifest(), more) == []
    old = {name: value for name, value in manifest().items() if name != "revisions"}
    assert differences(old, manifest()) == [Difference("revisions", "everything", None, "recorded")]
    assert differences(old, old) == []


# What cannot be compared


def test_like_runs_are_compared_in_everything():
    (found,) = limits(stored(), stored())
    assert (found.left_out, found.reason, found.reserved) == ((), "timed at another time", compared_metrics("timing"))


def test_another_evaluation_text_leaves_no_pairs_of_documents():
    found = limits(stored(), stored(inputs={"eval_text": "other"}))
    assert [limit.reason for limit in found] == ["other evaluation text", "timed at another time"]
    assert found[0].left_out == ("perplexity", "kl_to_dense", "bits_per_byte")


def test_another_tokenizer_leaves_bits_per_byte():
    assert same_tokens(stored(), stored())
    assert not same_tokens(stored(), stored(tokens=(10.0, 11.0)))
    assert left_out(stored(), stored(tokens=(10.0, 11.0))) == {"perplexity", "kl_to_dense"}
    assert limits(stored(), stored(tokens=(9.0, 11.0)))[0].reason == "other tokens"


def test_other_prompts_leave_neither_texts_nor_speed():
    found = left_out(stored(), stored(inputs={"prompts": "q"}))
    assert {"distinct_2_distance", "generation_perplexity_distance", "tokens_per_second", "end_to_end_s"} <= found
    assert {"cache_bytes", "peak_memory_bytes", "prefill_flops"} <= found  # as long as the prompts are
    assert not {"perplexity", "bits_per_byte", "parameter_bytes", "decode_bytes"} & found


def test_texts_of_other_lengths_keep_the_times_that_do_not_depend_on_it():
    found = left_out(stored(), stored(spec={"num_tokens": 7}))
    assert "tokens_per_second" in found
    assert "first_token_latency_s" not in found


def test_another_model_judges_its_own_texts():
    found = limits(stored(), stored(inputs={"model": "n"}))
    assert {metric for limit in found for metric in limit.left_out} == {"generation_perplexity_distance", "kl_to_dense"}
    assert [limit.reason for limit in found if limit.reserved] == ["other tokenizer", "timed at another time"]


@pytest.mark.parametrize(
    "change", [{"hardware": {"processor": "fast"}}, {"versions": {"torch": "2.12.0"}}, {"hardware": {"threads": 2}}]
)
def test_speed_of_other_machines_is_labelled_and_not_left_out(change):
    (found,) = limits(stored(), stored(**change))
    assert found.left_out == ()
    assert "tokens_per_second" in found.reserved
    assert found.reason == "another machine"


def test_other_batches_leave_no_speed():
    assert {"tokens_per_second", "cache_bytes"} <= left_out(stored(), stored(spec={"batch_size": 4}))


def test_a_metric_whose_formula_has_changed_is_left_out_and_another_protocol_is_said():
    found = limits(stored(), stored(revisions=revisions(metrics={"perplexity": 2})))
    assert [(limit.reason, limit.left_out) for limit in found[1:]] == [("other formula", ("perplexity",))]
    (_, protocol) = limits(stored(), stored(revisions=revisions(protocol=2)))
    assert (protocol.reason, protocol.left_out) == ("other protocol", ())
    assert {"perplexity", "tokens_per_second", "distinct_2_distance"} <= set(protocol.reserved)
    assert "parameter_bytes" not in protocol.reserved


def test_what_only_one_run_has_is_listed():
    found = limits(
        stored(spec={"pruning_methods": ["entropy", "random"]}),
        stored(spec={"pruning_methods": ["entropy"], "pruning_levels": [0.0, 30.0, 50.0], "temperatures": [0.7, 1.0]}),
    )
    assert [limit.only_in for limit in found if limit.reason == "only in one run"] == [
        OnlyIn("method", "random", "first"),
        OnlyIn("level", 30.0, "second"),
        OnlyIn("temperature", 0.7, "second"),
    ]
    assert [limit.reason for limit in found[3:]] == ["timed at another time"]
    apart = limits(stored(spec={"pruning_methods": ["entropy"]}), stored(spec={"pruning_methods": ["random"]}))
    assert [limit.reason for limit in apart] == ["no method in common", "timed at another time"]
