"""What the tutorial, the guides and the notebook of a stored run show works: every snippet of theirs runs, made small."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest
import torch
from builders import ascii_tokenizer, save_tiny_model, tiny_model, write_short_texts

import pruning_comparison
from pruning_comparison import cli
from pruning_comparison.models.heads import kept_heads
from pruning_comparison.report import write
from pruning_comparison.report.terminal import answer_text, stored_answer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = [
    ROOT / "README.md",
    DOCS / "tutorial.md",
    *sorted((DOCS / "how-to").glob("*.md")),
    DOCS / "reference" / "run-folder.md",
]
NOTEBOOK, SCRIPT = (ROOT / "notebooks" / f"stored_run.{kind}" for kind in ("ipynb", "py"))

ELSEWHERE = {
    "pip": "installs",
    "python3": "makes an environment",
    ".": "enters it",
    "ray": "starts a cluster, as tests/run/test_ray.py does",
    "llama-cli": "is llama.cpp's",
    "make": "is tested in tests/test_project.py",
    "python": "starts a script, as tests/test_scripts.py does",
}
"""Commands that the guides show and that no test here runs, and why."""

SMALLER = {
    "run": (
        "--pruning_levels=0,5 --iterations=1 --temperatures=1 --num_tokens=3 --max_prompts=1 --eval_tokens=1024 "
        "--calibration_tokens=1024 --score_tokens=512 --timing_limit_s=0 --timing_pairs=2 --tolerance=90 --threads=1"
    ),
    "plan": "--iterations=1 --threads=1",
    "prune": "--no_measure",
    "report": "",
    "export": "",
}
"""What makes a command of the guides short: of two equal options the last one counts."""

BASELINE_ALONE = ("own-model", "own-method", "README")
"""Guides that say nothing of agency, whose runs leave it out here."""


def snippets(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, what follows it, text) of each block of code, in the page's order."""
    for found in re.finditer(r"^```(\w+)(.*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.MULTILINE):
        yield found[1], found[2].strip(), found[3]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def smaller(words: list[str], page: str) -> list[str] | None:
    """A command of this package as it is run here for a page; None where it needs what is not here."""
    elsewhere = {"--device=cuda", "--launcher=ray", "--model_name=gpt2", "--model_name=smollm2-135m"}
    if words[0] in ("run", "plan") and elsewhere & set(words):
        cli.parse(words)
        return None
    more = SMALLER[words[0]].split()
    if words[0] == "run" and page in BASELINE_ALONE:
        more.append("--variants=baseline")
    if words[0] == "prune" and "--from=results" not in words:
        more += ["--calibration_tokens=1024", "--score_tokens=512", "--threads=1"]
    return [*words, *more]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the guides take for granted: a small Llama, texts, and the example run. Charts are not drawn."""
    sizes: dict[str, Any] = {"layers": 3, "width": 64, "vocab_size": 120, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    llama = tiny_model("llama", **sizes, **heads, bos_token_id=0, eos_token_id=0)
    save_tiny_model(tmp_path / "my-model", model=llama)
    ascii_tokenizer().save_pretrained(tmp_path / "my-model")
    texts = write_short_texts(tmp_path / "my-texts")
    for option, name in (("eval_text", "test"), ("calibration_text", "train")):
        Path(texts[option]).rename(tmp_path / "my-texts" / name)
    (tmp_path / "my-texts" / "prompts.txt").write_text("Peace\nThe people of\n", "utf-8")
    (tmp_path / "docs" / "example").mkdir(parents=True)
    for name in ("journal.sqlite", "manifest.json"):
        shutil.copy(DOCS / "example" / name, tmp_path / "docs" / "example")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    without_charts(monkeypatch)
    sys.modules.pop("my_methods", None)  # of other documentation, which has a file of that name too
    yield tmp_path
    sys.modules.pop("my_methods", None)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_python_in_the_guides_imports_from_the_package_alone(page: Path) -> None:
    for language, _, text in snippets(page):
        if language == "python":
            assert not re.findall(r"(?:from|import) pruning_comparison\.\S+", text)
            for names in re.findall(r"from pruning_comparison import (.+)", text):
                assert {name.strip() for name in names.split(",")} <= set(pruning_comparison.__all__)


def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        write, "draw_charts", lambda jobs, folder, **options: dict.fromkeys(jobs, '<svg viewBox="0 0 1 1"></svg>')
    )


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_snippets_of_a_guide_run_in_their_order(page: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands by the command line itself, made small; Python as it stands, in one set of names."""
    names: dict[str, Any] = {}
    for language, title, text in snippets(page):
        if language == "bash":
            for words in commands(text):
                if words[0] != "pruning-comparison":
                    assert words[0] in ELSEWHERE, words
                elif (small := smaller(words[1:], page.stem)) is not None:
                    assert cli.main(small) == 0, (small, capsys.readouterr().err)
        elif file := re.fullmatch(r'title="(\w+\.py)"', title):
            (desk / file[1]).write_text(text, "utf-8")
        elif language != "text":
            assert (language, title) == ("python", "")
            exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
    check = CHECKS.get(page.stem)
    if check is not None:
        check(desk, names)


def _check_tutorial(desk: Path, names: dict[str, Any]) -> None:
    assert (desk / "results" / "latest" / "report.html").is_file()
    assert 0 < 48 - int(kept_heads(names["model"].config).sum()) < 5  # the level of 5 % is 2 heads
    assert names["tokens"].shape[0] == 1
    assert len(names["tokens"][0]) == len(names["prompt"]["input_ids"][0]) + 20


def _check_own_method(desk: Path, names: dict[str, Any]) -> None:
    """Its scores by hand: the norm of each head's part of what the projection of one layer reads."""
    model, windows = names["model"], torch.arange(3, 38).reshape(5, 7)
    read: list[torch.Tensor] = []
    hook = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        model(windows)
    hook.remove()
    by_hand = [float(part.square().sum(-1).sqrt().mean()) for part in read[0].chunk(8, dim=-1)]
    scores = names["my_methods"].output_norm(model, windows, batch_size=2)
    assert scores.shape == (6, 8)
    assert scores[1].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert 48 - int(kept_heads(names["pruned"].config).sum()) == 12  # 25 % of 48


def _check_deploy(desk: Path, names: dict[str, Any]) -> None:
    assert names["text"].startswith("The people of")
    assert 48 - sum(map(len, names["model"].config.kept_heads)) == 14  # 30 % of 48 is 14.4
    assert (desk / "plain-50" / "plain" / "config.json").is_file()
    assert (desk / "small.gguf").stat().st_size > 10_000


def _check_run_folder(desk: Path, names: dict[str, Any]) -> None:
    """What the tutorial shows of the example run's answer are lines of it, in their order."""
    answer = stored_answer(desk / "docs" / "example")
    assert answer is not None
    (shown,) = [text for language, _, text in snippets(DOCS / "tutorial.md") if language == "text"]
    lines = iter(answer_text(answer).splitlines())
    missing = [line for line in shown.splitlines() if line and line not in lines]
    assert missing == [], "the example run's answer has changed: show it in docs/tutorial.md as it is now"


def _check_readme(desk: Path, names: dict[str, Any]) -> None:
    """Scores by hand: GPT-2 keeps queries, keys and values side by side in c_attn, heads side by side in each of them."""
    assert 48 - sum(map(len, names["model"].config.kept_heads)) == 14  # 30 % of 48 is 14.4
    dense = pruning_comparison.load_model(pruning_comparison.preview_model("bundled")).model
    scores = importlib.import_module("my_methods").value_norm(dense)
    width = dense.config.n_embd
    values = dense.transformer.h[4].attn.c_attn.weight[:, 2 * width :]
    assert scores.shape == (6, 8)
    assert float(scores[4, 3]) == pytest.approx(
        float(values[:, 3 * width // 8 : 4 * width // 8].square().sum().sqrt()), rel=1e-4
    )


CHECKS = {
    "README": _check_readme,
    "run-folder": _check_run_folder,
    "tutorial": _check_tutorial,
    "own-method": _check_own_method,
    "deploy": _check_deploy,
}


# The notebook


def test_the_notebook_of_a_stored_run_has_the_cells_of_its_script() -> None:
    books = [
        jupytext.reads(path.read_text("utf-8"), fmt=kind)
        for path, kind in ((SCRIPT, "py:percent"), (NOTEBOOK, "ipynb"))
    ]
    cells = [[(cell.cell_type, cell.source, cell.metadata) for cell in book.cells] for book in books]
    assert cells[0] == cells[1], "run `make notebook`"
    assert not any(cell.get("outputs") for cell in books[1].cells)
    assert books[1].metadata["kernelspec"]["name"] == "python3"


def test_the_notebook_of_a_stored_run_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, in the notebooks' folder. It writes to a temporary folder alone."""
    without_charts(monkeypatch)
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (DOCS / "example").iterdir()}
    names: dict[str, Any] = {}
    for cell in jupytext.reads(NOTEBOOK.read_text("utf-8"), fmt="ipynb").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "a cell", "exec"), names)
    assert {path: path.stat().st_mtime_ns for path in (DOCS / "example").iterdir()} == before
    names["plt"].close("all")
    assert names["folder"].is_relative_to(tmp_path)
    assert (names["folder"] / "mine.png").stat().st_size > 5_000
    assert len(names["axes"].containers) == 2  # a line with intervals for each variant
    # By hand: at 40 %, 19 of 48 heads leave, so that 29 stay.
    assert names["left"].loc["baseline"].sum() == pytest.approx(29)
    assert names["best"]["variant"] == "agency"
    assert 48 - sum(map(len, names["loaded"].config.kept_heads)) == 10  # 20 % of 48 is 9.6
    printed = capsys.readouterr().out
    assert "agency, entropy: 20 %" in printed
    assert "The people of the United States" in printed
