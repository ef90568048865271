"""Nothing that is given is executed, nothing is written outside, and nothing that is shown is markup."""

from __future__ import annotations

import ast
import json
import multiprocessing
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import save_tiny_model, tiny_spec, write_short_texts
from processes import watched_command

import pruning_comparison
from pruning_comparison import cli

SOURCE = Path(pruning_comparison.__file__).parent
HOSTILE = "<img src=x onerror=alert(1)>"


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def options_of(spec, output_dir):
    argv = [f"--model_name={spec.model_name}", "--device=cpu", "--threads=1", f"--output_dir={output_dir}"]
    for name in (
        "num_tokens",
        "timing_limit_s",
        "max_prompts",
        "eval_tokens",
        "calibration_tokens",
        "calibration_window",
    ):
        argv.append(f"--{name}={getattr(spec, name)}")
    return [*argv, f"--eval_text={spec.eval_text}", f"--calibration_text={spec.calibration_text}", "--quiet"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A whole comparison, its report drawn again, and one model pruned, all from a folder that means harm."""
    place = tmp_path_factory.mktemp("security")
    folder = save_tiny_model(place / HOSTILE / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "tokenizer.pkl", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(place / "exploded")))
    (folder / "modeling_gpt2.py").write_text(f"open({str(place / 'exploded')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_gpt2.C", "AutoModelForCausalLM": "modeling_gpt2.M"}
    (folder / "config.json").write_text(json.dumps(config))
    write_short_texts(folder / "texts")
    document = next((folder / "texts" / "held_out").iterdir())
    document.rename(document.with_name("<script>alert(2)<.txt"))
    (place / "prompts.txt").write_text("<script>alert(3)</script> $x$ {{ 7 * 7 }} ../../up\n")
    spec = tiny_spec(folder, model_name=f"{folder}/../model")
    run = [
        "run",
        *options_of(spec, place / "out"),
        "--pruning_levels=0,50",
        "--pruning_method=random",
        "--iterations=1",
    ]
    run += ["--temperatures=1", "--save_outputs", "--save_models", f"--prompt_file={place / 'prompts.txt'}"]
    prune = ["prune", *options_of(spec, place / "out" / "pruned"), "--level=50", "--method=random", "--no_measure"]
    commands = [run, ["report", str(place / "out"), "--quiet", "--save_outputs"], prune]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["pruning_comparison.run.comparison", "pruning_comparison.report.write", "processes"]
    )
    process = processes.Process(target=watched_command, args=(commands, place / "log"))
    process.start()
    process.join()
    return place, json.loads((place / "log").read_text())


def test_no_pickle_is_read_and_no_code_of_a_model_is_run(watched):
    place, log = watched
    assert log["codes"] == [0, 0, 0]
    assert [event for event in log["events"] if event[0] == "pickle.find_class"] == []
    assert not (place / "exploded").exists()
    assert {what for what, _ in log["watch_works"]} == {"pickle.find_class"}


def test_nothing_is_written_outside_the_output_folder(watched):
    place, log = watched
    written = {path for what, path in log["events"] if what == "write"}
    assert any(path.endswith("report.html") or ".report.html" in path for path in written)
    assert any(path.endswith("journal.sqlite") for path in written)
    outside = {path for path in written if not path.startswith(f"{place / 'out'}")}
    allowed = re.compile(r"/dev/null|.*__pycache__.*|.*/matplotlib(/.*)?|.*\.cache/.*")
    assert {path for path in outside if not allowed.fullmatch(path)} == set()


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_what_a_report_shows_is_no_markup(watched):
    place, _ = watched
    html = (place / "out" / "latest" / "report.html").read_text("utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    tags = Tags()
    tags.feed(html)
    assert not [tag for tag, attributes in tags.found if any(name.startswith("on") for name in attributes)]
    for script in re.findall(r"<script\b[^>]*>(.*?)</script>", html, re.DOTALL):
        assert "alert(" not in script
    sources = [attributes.get("src", "data:") or "" for _, attributes in tags.found]
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in html
    for svg in (place / "out" / "latest" / "charts").glob("*.svg"):
        assert "<script" not in svg.read_text("utf-8")
        assert "<img" not in svg.read_text("utf-8")


def test_a_saved_model_and_its_card_are_of_the_programs_own_names(watched):
    place, _ = watched
    assert (place / "out" / "pruned" / "config.json").is_file()
    card = (place / "out" / "pruned" / "README.md").read_text("utf-8")
    assert "<img" not in card
    models = sorted(path.name for path in (place / "out" / "latest" / "models").iterdir())
    assert models == ["agency_random_0_50", "baseline_random_0_50"]


@pytest.mark.parametrize(
    "name", ["..", "../..", "a/..", "model/../../x", ".", "~", "/", "x\x00y", "../../etc/passwd", " "]
)
def test_a_model_name_that_leads_elsewhere_writes_nothing_there(name, tmp_path, capsys, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for argv in (["run"], ["prune", "--level=50"]):
        code = cli.main([*argv, f"--model_name={name}", "--device=cpu", "--quiet"])
        shown = capsys.readouterr().err
        assert code == 2, shown
        assert "Traceback" not in shown
        assert "bug" not in shown
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left <= {"a", "a/b", "a/b/validation_results", "a/b/validation_results/pruning_agency", "a/b/pruned_models"}


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle",
                   "os.system", "os.popen", "yaml.load"}  # fmt: skip


def test_the_source_has_no_way_to_read_a_pickle_or_run_what_it_reads():
    """Module ``self_update`` restarts its own script: it calls a parameter named execute, which is os.execv."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module).partition(".")[0]]
            if FORBIDDEN_MODULES & set(names):
                found.append((path.name, node.lineno, names))
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in FORBIDDEN_CALLS and (path.name, called) != ("self_update.py", "execute"):
                    found.append((path.name, node.lineno, called))
                for keyword in node.keywords:
                    risky = keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                    if risky and ast.unparse(keyword.value) != "False":
                        found.append((path.name, node.lineno, keyword.arg))
    assert found == []
