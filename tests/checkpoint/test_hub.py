"""Pruned models on their way to the hub: the card's metadata, what goes and what stays, and how it is sent.

The hub itself is a stand-in for ``huggingface_hub.HfApi``, which keeps what it is asked to do.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from builders import save_tiny_model, tiny_model, write_short_texts
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from pruning_comparison import cli
from pruning_comparison.checkpoint import hub
from pruning_comparison.checkpoint.forms import load_pruned, save_pruned
from pruning_comparison.checkpoint.model_card import BeforeAndAfter
from pruning_comparison.errors import HubError, InputError

MEASURED = (
    BeforeAndAfter("perplexity", "on the evaluation text", 20.0, 25.0, "perplexity"),
    BeforeAndAfter("KL to the dense model", "nats per token", 0.0, 0.125, "kl_to_dense"),
    BeforeAndAfter("speed", "tokens per second", 30.0, 33.0),
)
MADE = {
    "base_model": "Some: model", "hub_model": "someone/some-model", "licence": "apache-2.0", "method": "fisher",
    "variant": "agency",
    "evaluation": {
        "text": "Salesforce/wikitext:wikitext-2-raw-v1:test", "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1", "split": "test", "windows": 16, "window_tokens": 512, "scored_tokens": 8176,
    },
}  # fmt: skip


class StandIn:
    """What ``HfApi`` is asked for here, without a network. ``repositories`` says which there are, and whether private."""

    def __init__(self, repositories=(), failure=None):
        self.repositories, self.failure, self.sent = dict(repositories), failure, []

    def __call__(self):
        return self

    def _or_fail(self):
        if self.failure is not None:
            raise self.failure

    def whoami(self):
        self._or_fail()
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok):
        self._or_fail()
        assert exist_ok
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repositories.setdefault(full, private)
        return SimpleAddress(full)

    def model_info(self, repo_id):
        return SimpleNamespace(private=self.repositories[repo_id])

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        chosen = [name for name in files if any(fnmatch.fnmatchcase(name, one) for one in allow_patterns)]
        self.sent.append((repo_id, sorted(chosen), commit_message))


class SimpleAddress(str):
    def __new__(cls, repo_id):
        address = super().__new__(cls, f"https://huggingface.co/{repo_id}")
        address.repo_id = repo_id
        return address


@pytest.fixture
def saved(tmp_path):
    """A pruned model in two forms, with figures in its card."""
    model = tiny_model("llama")
    model.config.pruning = dict(MADE)
    save_pruned(model, None, tmp_path / "model", measured=MEASURED)
    save_pruned(model, None, tmp_path / "model" / "padded", form="padded", measured=MEASURED)
    return tmp_path / "model"


def stand_in(monkeypatch, **settings):
    api = StandIn(**settings)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    return api


def test_the_cards_metadata_has_evaluation_results_base_model_licence_and_tags(saved):
    data = ModelCard.load(saved / "README.md").data
    assert (data.base_model, data.license, data.library_name) == ("someone/some-model", "apache-2.0", "transformers")
    assert data.tags == ["pruned", "attention-heads", "pruning-comparison"]
    assert data.model_name == "Some: model without 0 of its 18 attention heads"
    # 25 / 20 = 1.25; speed is no evaluation result, since it depends on the machine
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {
        "perplexity": 25.0,
        "perplexity_ratio": 1.25,
        "kl_to_dense": 0.125,
    }
    for one in data.eval_results:
        assert (one.task_type, one.dataset_type, one.dataset_name) == (
            "text-generation",
            "Salesforce/wikitext",
            "Salesforce/wikitext:wikitext-2-raw-v1:test",
        )
        assert (one.dataset_config, one.dataset_split) == ("wikitext-2-raw-v1", "test")
        assert one.metric_args == {"windows": 16, "window_tokens": 512, "scored_tokens": 8176}
    assert json.loads((saved / "config.json").read_text())["pruning"]["evaluation"]["windows"] == 16
    load_pruned(saved)


def test_without_figures_the_card_has_no_results_and_is_a_card_all_the_same(tmp_path):
    model = tiny_model("llama")
    save_pruned(model, None, tmp_path / "model")
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert not data.eval_results
    assert data.license is None
    shown = hub.what_would_go(tmp_path / "model", "name").in_words()
    assert "no evaluation results: the card has no figures of evaluation text" in shown
    assert "licence: not stated" in shown


def test_what_is_part_of_the_model_goes_and_nothing_else(saved):
    for name in ("notes.txt", ".env", "secrets.json", "model.bin", "padded/old.pt"):
        (saved / name).write_text("x")
    (saved / "runs").mkdir()
    (saved / "linked.safetensors").symlink_to(saved / "model.safetensors")
    upload = hub.what_would_go(saved, "me/model")
    assert list(upload.sizes_bytes) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_pruned_heads.py",
        "padded/README.md", "padded/config.json", "padded/generation_config.json", "padded/model.safetensors",
    ]  # fmt: skip
    assert set(upload.left_out) == {
        ".env", "linked.safetensors", "model.bin", "notes.txt", "runs", "secrets.json", "padded/old.pt",
    }  # fmt: skip
    assert upload.sizes_bytes["model.safetensors"] == (saved / "model.safetensors").stat().st_size
    words = upload.in_words()
    assert words.startswith("to me/model, private: ")
    assert "left out, no part of the model: secrets.json" in words
    assert "evaluation result: Perplexity 25 on Salesforce/wikitext:wikitext-2-raw-v1:test" in words
    assert "evaluation result: Perplexity, times the dense model's 1.25 on" in words


def test_it_is_private_unless_public_is_said(saved, monkeypatch):
    api = stand_in(monkeypatch)
    assert hub.push_to_hub(hub.what_would_go(saved, "quiet")) == "https://huggingface.co/me/quiet"
    hub.push_to_hub(hub.what_would_go(saved, "us/loud", public=True))
    assert api.repositories == {"me/quiet": True, "us/loud": False}
    assert [name for name, _, _ in api.sent] == ["me/quiet", "us/loud"]
    assert api.sent[0][1] == sorted(hub.what_would_go(saved, "quiet").sizes_bytes)


def test_nothing_private_goes_into_a_repository_that_is_public(saved, monkeypatch, caplog):
    api = stand_in(monkeypatch, repositories={"me/there": False, "me/hidden": True})
    with pytest.raises(InputError, match="me/there is on the hub already and public"):
        hub.push_to_hub(hub.what_would_go(saved, "there"))
    assert api.sent == []
    hub.push_to_hub(hub.what_would_go(saved, "hidden", public=True))  # what is there keeps its visibility
    assert api.repositories["me/hidden"] is True
    assert "me/hidden was there before and stays private" in caplog.text


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (LocalTokenNotFoundError("no token"), "nobody is logged in. Log in with `hf auth login`"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("no route"), "ConnectionError: no route. Try again with a network."),
    ],
)
def test_a_hub_that_does_not_answer_says_why_and_what_is_kept(saved, monkeypatch, failure, said):
    stand_in(monkeypatch, failure=failure)
    with pytest.raises(HubError) as caught:
        hub.push_to_hub(hub.what_would_go(saved, "name"))
    assert said in str(caught.value)
    assert f"pruning-comparison push {saved} --name=name tries again" in str(caught.value)
    with pytest.raises(HubError, match="the hub cannot be written to"):
        hub.check_hub_access()


@pytest.mark.parametrize("name", ["", "a/b/c", "two words", "-x", "a" * 97, "x..y"])
def test_a_name_that_the_hub_cannot_have_is_refused(name, tmp_path, capsys):
    assert cli.main(["push", str(tmp_path), f"--name={name}"]) == 2 or not name
    if name:
        assert "cannot be a name on the hub" in capsys.readouterr().err


def test_a_folder_that_is_no_pruned_model_is_refused(tmp_path, saved):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="is not a model that prune has saved"):
            hub.what_would_go(folder, "name")
    (saved / "README.md").write_text("---\ntags: [other]\n---\n")
    with pytest.raises(InputError, match="not the card of a pruned model"):
        hub.what_would_go(saved, "name")
    (saved / "README.md").write_text("---\nmodel-index:\n- results: 3\n---\n")
    with pytest.raises(InputError, match="is not what the hub reads"):
        hub.what_would_go(saved, "name")
    (saved / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(InputError, match="is not what the hub reads"):
        hub.what_would_go(saved, "name")


def test_cards_of_the_first_release_can_be_sent(tmp_path):
    recorded = Path(__file__).parents[1] / "recorded" / "checkpoints_of_0.1.0" / "compact_qwen3"
    shutil.copytree(recorded, tmp_path / "old")
    upload = hub.what_would_go(tmp_path / "old", "name")
    assert "README.md" in upload.sizes_bytes
    assert not upload.metadata.eval_results


def test_push_shows_what_would_go_and_then_sends_it(saved, monkeypatch, capsys):
    api = stand_in(monkeypatch)
    assert cli.main(["push", str(saved), "--dry-run", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is sent; this would go to model, private" in shown
    assert "  padded/model.safetensors (" in shown
    assert api.sent == []
    assert cli.main(["push", str(saved), "--name=us/small", "--public", "--quiet"]) == 0
    assert "on the hub: https://huggingface.co/us/small" in capsys.readouterr().out
    assert api.repositories == {"us/small": False}
    (command,) = api.sent
    assert "model.safetensors" in command[1]


def prune_options(tmp_path):
    folder = save_tiny_model(tmp_path / "dense")
    texts = write_short_texts(tmp_path / "texts")
    return [
        f"--model_name={folder}", "--device=cpu", "--num_tokens=4", "--max_prompts=1", "--timing_limit_s=0",
        "--eval_tokens=100", "--calibration_tokens=128", "--calibration_window=32", "--threads=1", "--timing_pairs=2",
        "--level=50", "--method=magnitude", "--variant=baseline", "--quiet",
        *(f"--{name}={value}" for name, value in texts.items()),
    ]  # fmt: skip


def test_prune_sends_the_model_that_it_has_made_and_measured(tmp_path, monkeypatch, capsys):
    api = stand_in(monkeypatch)
    options = [*prune_options(tmp_path), f"--output_dir={tmp_path / 'kept'}", "--push_to_hub=mine"]
    assert cli.main(["prune", *options]) == 0
    assert "on the hub: https://huggingface.co/me/mine" in capsys.readouterr().out
    ((name, files, _),) = api.sent
    assert (name, api.repositories) == ("me/mine", {"me/mine": True})
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    data = ModelCard.load(tmp_path / "kept" / "README.md").data
    results = {one.metric_type: one for one in data.eval_results}
    table = (tmp_path / "kept" / "README.md").read_text()
    assert (
        f"| {results['perplexity'].metric_value:.4g} |" in table
        or f"{results['perplexity'].metric_value:,.0f}" in table
    )
    assert results["perplexity"].dataset_name == "held_out"
    assert results["perplexity"].metric_args["scored_tokens"] >= 100
    assert str(tmp_path) not in table  # no path of this machine


def test_prune_asks_the_hub_before_it_works_and_does_not_when_nothing_is_to_go(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, failure=LocalTokenNotFoundError("no token"))
    options = [*prune_options(tmp_path), f"--output_dir={tmp_path / 'kept'}", "--no_measure"]
    assert cli.main(["prune", *options, "--push_to_hub=mine"]) == 1
    assert "nobody is logged in" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    assert cli.main(["prune", *options, "--push_to_hub=mine", "--dry_run"]) == 0
    assert "nothing is sent; this would go to mine, private" in capsys.readouterr().out
    assert cli.main(["prune", *options, "--public"]) == 2
    assert "--public: says how a model goes to the hub, and none is to go" in capsys.readouterr().err
