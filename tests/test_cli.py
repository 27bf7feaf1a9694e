"""Command line: every flag is checked by name and type before a stage runs."""

import json
import pickle
import re
import tempfile
from pathlib import Path
from typing import Literal

import pytest

from glm_utils.cli import UserError, nearest, parse_args, run_cli

CALLS = []


def stage(
    *,
    model_path: str = "base",
    lora_rank: int = 4,
    dropout: float = 0.05,
    overwrite: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    targets: str | list[str] = "query_key_value",
    resume: str | bool | None = None,
):
    """Do nothing.

    Args:
        lora_rank: Rank of the matrices.
    """
    CALLS.append(lora_rank)
    if lora_rank == 13:
        raise UserError("data.jsonl:7: unlucky. Take another")


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--lora_rank=8"], {"lora_rank": 8}),
        (["--lora-rank", "8"], {"lora_rank": 8}),
        (["--model_path=123"], {"model_path": "123"}),  # fire alone makes it an int
        (["--model_path=a,b"], {"model_path": "a,b"}),  # fire alone makes it a tuple
        (["--dropout=1e-1"], {"dropout": 0.1}),
        (["--dropout=0"], {"dropout": 0.0}),
        (["--overwrite"], {"overwrite": True}),
        (["--overwrite=false"], {"overwrite": False}),  # fire alone makes it a string, which is true
        (["--nooverwrite"], {"overwrite": False}),
        (["--dtype=bf16"], {"dtype": "bf16"}),
        (["--model_path=True"], {"model_path": "True"}),
        (["--model_path", "True", "--overwrite"], {"model_path": "True", "overwrite": True}),
        (["--targets=dense,query_key_value"], {"targets": ["dense", "query_key_value"]}),
        (["--targets=['dense']"], {"targets": ["dense"]}),
        (["--targets=dense"], {"targets": "dense"}),
        (["--resume=None"], {"resume": None}),
        (["--resume"], {"resume": True}),
        (["--resume=out/checkpoint-3"], {"resume": "out/checkpoint-3"}),
    ],
)
def test_values(argv, expected):
    found = parse_args(stage, argv)
    assert found == expected
    assert all(type(found[name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rnak=8"], "unknown flag --lora_rnak. Did you mean --lora_rank?"),
        (["--qqq=8"], "unknown flag --qqq. Known flags: --model_path, --lora_rank"),
        (["--lora_rank=4.0"], "--lora_rank=4.0: expected int"),
        (["--lora_rank=abc"], "--lora_rank=abc: expected int"),
        (["--dropout=much"], "--dropout=much: expected float"),
        (["--overwrite=maybe"], "--overwrite=maybe: expected bool"),
        (["--dtype=fp8"], "--dtype=fp8: expected one of fp32, bf16"),
        (["--model_path"], "--model_path needs a value"),
        (["--model-path", "--lora_rank=4"], "--model_path needs a value"),
    ],
)
def test_bad_values_are_refused_before_the_stage(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage, argv)
    assert exit_info.value.code == 1
    assert message in capsys.readouterr().err
    assert CALLS == []


@pytest.mark.parametrize("argv", [["train.jsonl"], ["--lora_rank", "4", "train.jsonl"]])
def test_values_without_a_flag_are_refused_before_the_stage(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage, argv)
    assert exit_info.value.code == 1
    assert "train.jsonl: a value without a flag. Flags: --model_path, --lora_rank" in capsys.readouterr().err
    assert CALLS == []


def test_missing_flag_is_named(capsys):
    """One line that names the flag, without fire's own usage text."""

    def needs_path(*, lora_path: str, overwrite: bool = False):
        CALLS.append(lora_path)

    with pytest.raises(SystemExit) as exit_info:
        run_cli(needs_path, ["--overwrite"])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "--lora_path is required" in error
    assert len(error.splitlines()) == 1
    assert CALLS == []


def test_user_error_is_one_message_without_traceback(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage, ["--lora_rank=13"])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "data.jsonl:7: unlucky. Take another" in error
    assert "Traceback" not in error


def test_details_of_a_user_error_are_lines_of_the_log(capsys):
    """A newline in the message or in a detail does not make another line."""
    error = UserError("a.csv: 2\nfaults:", ["  a.csv:2: one\x1b[2J", "  a.csv:3: two\n12:00:00 SUCCESS"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "\n".join([error.message, *error.details])

    def faulty() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_cli(faulty, [])
    assert exit_info.value.code == 1
    lines = [line.split(" ERROR   ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [r"a.csv: 2\nfaults:", r"  a.csv:2: one\x1b[2J", r"  a.csv:3: two\n12:00:00 SUCCESS"]


def crash(error, capsys):
    """Let a stage end with an exception; return its exit code, its lines and the file with the traceback."""

    def broken() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_cli(broken, [])
    lines = capsys.readouterr().err.splitlines()
    match = re.search(r"the full traceback is in (\S+)$", lines[-1])
    return exit_info.value.code, lines, Path(match[1]) if match else None


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), RecursionError("too deep"), KeyError("key")])
def test_what_nothing_foresaw_is_one_line_and_a_file(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, (line,), path = crash(error, capsys)
    assert code == 1
    message = f": {error}" if str(error) else ""
    assert re.search(rf" ERROR   {type(error).__name__}{message} \(tests/test_cli.py:\d+\)\. ", line)
    assert path.parent == tmp_path
    assert re.fullmatch(r"broken_error_\w+\.txt", path.name)
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text("utf-8")
    assert "Traceback (most recent call last)" in text
    assert "in broken\n    raise error" in text


def test_the_line_shows_no_control_characters_and_one_line_of_the_message(capsys):
    code, (line,), path = crash(ValueError("\n\x1b[2Jred\u202e\rand more\nand a second line" + "x" * 9000), capsys)
    path.unlink()
    assert code == 1
    assert r"ValueError: \x1b[2Jred\u202e" in line
    assert "second" not in line
    code, (line,), path = crash(ValueError("x" * 9000), capsys)
    path.unlink()
    assert len(line) < 1000


def test_the_line_names_the_innermost_frame_of_this_project(capsys):
    """Frames of libraries, also of those in a virtual environment inside the project, are passed over."""

    def broken() -> None:
        json.loads("{")

    with pytest.raises(SystemExit):
        run_cli(broken, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "JSONDecodeError" in line
    assert "(tests/test_cli.py:" in line
    Path(line.rpartition(" ")[2]).unlink()


def test_a_traceback_that_cannot_be_written_is_said(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    code, (line,), path = crash(RuntimeError("a bug"), capsys)
    assert (code, path) == (1, None)
    assert "RuntimeError: a bug (tests/test_cli.py:" in line
    assert "the traceback could not be written (FileNotFoundError)" in line


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage, ["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr()
    assert "Rank of the matrices." in out.out + out.err
    assert CALLS == []


def test_nearest_lists_all_names_when_none_is_close():
    assert nearest("zzz", ["alpha", "beta"], "flags", "--") == "Known flags: --alpha, --beta"
