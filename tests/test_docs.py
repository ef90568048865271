"""What the documentation shows works: its Python runs, its options exist, its links and pictures are there."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

import pruning_comparison
from pruning_comparison.cli import make_parser
from pruning_comparison.report import write

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = [ROOT / "docs" / "example", ROOT / "docs" / "example" / "smollm2"]


def test_the_python_examples_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 7
    for name, text in re.findall(
        r"```python title=\"(\w+\.py)\"\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL
    ):
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, example {number + 1}", "exec"), names)
    assert Path(str(names["report"])).is_file()
    assert (tmp_path / "quality.pdf").is_file()
    assert names["gone"].loc["baseline"].sum() == 2 * 24  # two iterations, half of 48 heads
    assert len(names["run"].measurements) > 100
    assert list(names["quality"].index) == [("agency", 0.0), ("baseline", 0.0), ("agency", 50.0), ("baseline", 50.0)]
    same = names["agreed"].query("kind == 'iterations' and variant == 'baseline'")
    assert list(same["common"]) == [1.0]  # magnitude depends on weights alone
    assert names["keep"].sum() == 24
    assert names["smaller"].num_parameters() < names["model"].num_parameters()
    assert names["spec"].pruning_methods == ("value-norm", "entropy")
    # By hand: the norm of the columns of c_attn that make a head's values.
    columns = names["model"].transformer.h[2].attn.c_attn.weight[:, 2 * names["model"].config.n_embd :].chunk(8, 1)
    scores = names["my_methods"].value_norm(names["model"], None, None)
    assert scores.shape == (6, 8)
    assert scores[2].tolist() == pytest.approx([float(one.norm()) for one in columns], rel=1e-5)
    assert 48 - sum(map(len, names["pruned"].config.kept_heads)) == 12  # 25 % of 48


def test_python_in_the_documentation_imports_from_the_package_alone():
    """Of all that is meant for users: what lies deeper may move."""
    for page in (ROOT / "README.md", ROOT / "docs" / "python.md", ROOT / "docs" / "checkpoints.md"):
        for block in re.findall(r"```python[^\n]*\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            assert not re.findall(r"(?:from|import) pruning_comparison\.\S+", block), page
            for names in re.findall(r"from pruning_comparison import (.+)", block):
                assert {name.strip() for name in names.split(",")} <= set(pruning_comparison.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_options_that_exist(page: Path):
    """Of every `pruning-comparison run` or `plan` line in a block of shell; a line that goes on is one with the next."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["pruning-comparison"] and words[1] in ("run", "plan"):
            make_parser().parse_args(words[1:])


def test_the_readme_is_short_and_names_every_page_that_a_user_begins_with():
    page = (ROOT / "README.md").read_text("utf-8")
    assert len(page.splitlines()) <= 150
    for name in ("tutorial", "how-to/index", "reference/options", "results", "reading-the-report", "faq"):
        assert f"(docs/{name}.md)" in page, name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_report_is_whole_small_and_offline(example: Path):
    html = (example / "report.html").read_text("utf-8")
    assert len(html.encode()) < 3_000_000
    assert 'id="heads"' in html
    assert 'id="texts"' in html
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html)


@pytest.mark.parametrize(
    ("example", "sentences"),
    [
        pytest.param(EXAMPLES[0], 5, id="bundled"),
        pytest.param(EXAMPLES[1], 4, id="smollm2", marks=pytest.mark.slow),  # many times as large
    ],
)
def test_an_example_report_says_what_its_journal_says(example: Path, sentences: int, tmp_path, monkeypatch):
    """It was drawn from the journal beside it, by code that said the same. Charts are drawn elsewhere."""
    for name in ("journal.sqlite", "manifest.json"):
        shutil.copy(example / name, tmp_path)
    monkeypatch.setattr(
        write, "draw_charts", lambda jobs, folder, **options: dict.fromkeys(jobs, '<svg viewBox="0 0 1 1"></svg>')
    )
    write.write_results(tmp_path, save_outputs=False)
    answer = json.loads((tmp_path / "results.json").read_text("utf-8"))["answer"]
    shown = unescape((example / "report.html").read_text("utf-8"))
    shown = re.sub(r"</?code>", "", shown).replace("\N{NO-BREAK SPACE}%", " %")
    assert len(answer["sentences"]) == sentences
    for sentence in answer["sentences"]:
        assert sentence in shown
    for chip in answer["chips"]:
        assert chip["number"] in shown


def test_every_figure_of_the_readme_is_in_the_results():
    """An estimate with its interval, as results.md has it, which has the command."""
    figures = re.findall(r"[−\d][\d.,]* \[[^\]]+ to [^\]]+\]", (ROOT / "README.md").read_text("utf-8"))
    known = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert len(figures) >= 3
    assert [figure for figure in figures if figure not in known] == []
