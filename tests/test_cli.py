"""Command line: every flag is checked by name and type before a stage runs."""

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
    if lora_rank == 14:
        raise RuntimeError("a bug")


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


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(stage, ["--lora_rank=14"])


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_cli(stage, ["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr()
    assert "Rank of the matrices." in out.out + out.err
    assert CALLS == []


def test_nearest_lists_all_names_when_none_is_close():
    assert nearest("zzz", ["alpha", "beta"], "flags", "--") == "Known flags: --alpha, --beta"
