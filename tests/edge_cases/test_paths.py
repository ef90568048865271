"""Whatever name a user gives for a file or folder, the answer is one line that names the option, and exit code 2."""

from __future__ import annotations

import os

import pytest

from pruning_comparison import cli, paths
from pruning_comparison.errors import InputError
from pruning_comparison.models import preview_model
from pruning_comparison.texts import load_documents, load_prompts


def loop(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return str(folder / "a")


def pipe(folder):
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


NAMES = {
    "300 characters": lambda folder: str(folder / ("x" * 300)),
    "5,000 characters in many folders": lambda folder: str(folder / "/".join(["y" * 50] * 100)),
    "a zero byte": lambda folder: str(folder / "a\0b"),
    "half of a surrogate pair": lambda folder: str(folder / "a\ud800b"),
    "links in a circle": loop,
    "a pipe": pipe,
}
READERS = {
    "--model_name": preview_model,
    "--prompt_file": lambda name: load_prompts(name, 3),
    "--eval_text": lambda name: load_documents(name, option="--eval_text"),
    "--calibration_text": lambda name: load_documents(name, option="--calibration_text"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("option", READERS)
def test_a_name_that_no_file_can_have_is_bad_input(option, kind, tmp_path):
    name = NAMES[kind](tmp_path)
    with pytest.raises(InputError) as refused:
        READERS[option](name)
    message = str(refused.value)
    assert message.startswith(f"{option}: ")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("kind", [kind for kind in NAMES if kind != "a zero byte"])  # no argument can have one
@pytest.mark.parametrize("option", READERS)
def test_the_command_ends_with_exit_code_2_and_speaks_of_no_measurement(option, kind, tmp_path, capsys):
    name = NAMES[kind](tmp_path)
    model = [] if option == "--model_name" else ["--model_name=bundled"]
    code = cli.main(["run", *model, f"{option}={name}", f"--output_dir={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert code == 2
    assert f"error: {option}: " in said
    assert "kept" not in said


def test_a_pipe_among_the_texts_of_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "endless.txt")
    with pytest.raises(InputError, match=r"endless\.txt' is neither a file nor a folder"):
        load_documents(str(tmp_path), option="--eval_text")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(paths.os, "listdir", refused)
    with pytest.raises(InputError, match=r"--eval_text: .*cannot be read: Permission denied"):
        load_documents(str(tmp_path), option="--eval_text")
    with pytest.raises(InputError, match=r"--model_name: .*cannot be read: Permission denied"):
        preview_model(str(tmp_path))


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    def refused(name):
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr(paths.os, "stat", refused)
    with pytest.raises(InputError, match=r"--prompt_file: .*cannot be looked at: Permission denied"):
        load_prompts(str(tmp_path / "x" / "prompts.txt"), 3)


def test_what_is_there_is_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert paths.kind_of(tmp_path, "--x") == "folder"
    assert paths.kind_of(tmp_path / "file", "--x") == paths.kind_of(tmp_path / "link", "--x") == "file"
    assert paths.kind_of(tmp_path / "none", "--x") == paths.kind_of(tmp_path / "file" / "below", "--x") == "nothing"
    with pytest.raises(InputError, match="--x: '/dev/null' is neither a file nor a folder"):
        paths.kind_of("/dev/null", "--x")
