"""Help, flags, paths and the JSON file are answered before torch, transformers, datasets and peft are imported."""

import json
import resource
import subprocess
import sys

import pytest

from tests.conftest import FIXTURES_DIR, PROJECT_DIR

SCRIPTS = [path.stem for path in sorted(PROJECT_DIR.glob("*.py"))] + ["tools.to_glm"]
HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "accelerate", "huggingface_hub")
REQUIRED = {
    "generate": ["--data_path=none.csv", "--output_path=out.csv", "--model_path=models/chatglm2-tiny"],
    "merge_lora_and_quantize": ["--lora_path=no_adapter", "--output_path=out"],
    "tools.to_glm": ["--output_path=out", "--lora_path=no_adapter"],
}
# runs the stage once per command line; prints the exit code, the messages and the heavy modules that are imported
PROBE = f"""
import contextlib, importlib, io, json, sys
stage = importlib.import_module(sys.argv[1])
elsewhere = getattr(stage, "JSON_ONLY", None)
from glm_utils.cli import run_cli
found = []
for argv in json.loads(sys.argv[2]):
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            run_cli(getattr(stage, sys.argv[1].rpartition(".")[2]), argv, elsewhere)
            code = None
        except SystemExit as error:
            code = error.code
    found.append([code, text.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]])
print(json.dumps(found))
"""


def answers(script, *command_lines):
    """Give command lines to a stage in one fresh process; return exit code, text and heavy modules after each."""
    command = [sys.executable, "-c", PROBE, script, json.dumps(command_lines)]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_flags_are_answered_without_heavy_imports(script):
    given = REQUIRED.get(script, [])
    found = answers(script, ["--help"], [*given, "--no_such_flag=1"], [*given, "stray"])
    assert [code for code, _, _ in found] == [0, 1, 1]
    assert "SYNOPSIS" in found[0][1]
    assert "unknown flag --no_such_flag" in found[1][1]
    assert "stray: a value without a flag" in found[2][1]
    assert [heavy for _, _, heavy in found] == [[], [], []]


BASE, TINY = "--model_name_or_path=models/chatglm2-tiny", "--model_path=models/chatglm2-tiny"
NO_ADAPTER = "no_adapter: no such directory. Give the output_dir of a training run"


@pytest.mark.parametrize(
    ("script", "cases"),
    [
        (
            "train_qlora",
            [
                (["--model_name_or_path=models/none"], "models/none: no such directory"),
                (["--model_name_or_path=data"], "data/config.json is missing: not a model directory"),
                ([BASE, "--train_args_json=none.json"], "none.json: no such file"),
                ([BASE, "--train_data_path=none.jsonl"], "none.jsonl: no such file"),
                ([BASE, "--eval_data_path=none.jsonl", "--train_data_path=data/dev.jsonl"], "none.jsonl: no such"),
                ([BASE, "--train_data_path=data/dev.jsonl:0.8,data/train.jsonl:0.8"], "the shares add up to 1.6"),
                ([BASE, "--train_data_path=data/dev.jsonl", "--eval_ratio=1.5"], "--eval_ratio 1.5: expected"),
                (["--lora_rank=0"], "--lora_rank=0: expected 1 or more"),
                (["--compute_dtype=fp8"], "--compute_dtype=fp8: expected one of auto"),
                (["--seed=-1"], "--seed -1: expected 0 to 4,294,967,295"),
                (["--max_input_length=1"], "--max_input_length=1: at least 2 tokens"),
                (
                    [BASE, "--train_args_json=chatGLM_6B_QLoRA.json"],
                    "ships for ChatGLM-6B, but the base models/chatglm2",
                ),
                (["--train_args_json=chatGLM_6B_QLoRA.json"], "but the base THUDM/chatglm2-6b is ChatGLM2-6B. Give"),
                (
                    ["--model_name_or_path=models/chatglm-tiny", "--train_args_json=chatGLM2_6B_QLoRA.json"],
                    "is ChatGLM-6B. Give --train_args_json chatGLM_6B_QLoRA.json, or a copy",
                ),
                (["--learning_rate=1e-4"], "--learning_rate. It is a key of the JSON file that --train_args_json"),
            ],
        ),
        (
            "merge_lora_and_quantize",
            [
                (["--lora_path=no_adapter", "--output_path=out"], NO_ADAPTER),
                (["--lora_path=no_adapter", "--output_path=out", "--qbits=5"], "--qbits 5: expected 0 (fp16), 8 or 4"),
                (
                    ["--lora_path=no_adapter", "--output_path=out", "--device=gpu"],
                    "--device gpu: expected auto, cpu or",
                ),
                (["--lora_path=no_adapter", "--output_path=out", "--export_format=onnx"], "expected one of chatglm"),
            ],
        ),
        (
            "chat_demo",
            [
                ([], "neither is given: give --model_path DIR"),
                ([TINY, "--lora_path=x"], "both are given"),
                (["--lora_path=no_adapter"], NO_ADAPTER),
                (["--model_path=models/none"], "models/none: no such directory"),
                ([TINY, "--compare"], "--compare needs --lora_path"),
                ([TINY, "--temperature=-1"], "--temperature -1.0: expected 0"),
                ([TINY, "--device=tpu"], "--device tpu: expected auto, cpu or cuda:N"),
                ([TINY, "--seed=-1"], "--seed -1: expected 0 to"),
            ],
        ),
        (
            "generate",
            [
                ([TINY, "--data_path=none.csv", "--output_path=saved_files/o.csv"], "none.csv: no such file"),
                ([TINY, "--data_path=none.csv", "--output_path=o.xls"], "unknown ending '.xls'"),
                (["--data_path=none.csv", "--output_path=o.csv"], "neither is given"),
                ([TINY, "--data_path=a", "--output_path=o.csv", "--batch_size=0"], "--batch_size 0: expected 1 or"),
            ],
        ),
        (
            "inference_test",
            [
                (["--model_path=models/none"], "models/none: no such directory"),
                (["--lora_path=no_adapter"], NO_ADAPTER),
                ([TINY, "--new_tokens=1"], "--new_tokens 1: expected 2 or more"),
                ([], "nothing to test. Give --model_path"),
            ],
        ),
        (
            "evaluate_adapter",
            [
                (["--lora_path=no_adapter"], NO_ADAPTER),
                (["--model_path=models/none,models/chatglm2-tiny"], "models/none: no such directory"),
                (["--model_path=models/chatglm-tiny,models/chatglm2-tiny", "--data_path=none.jsonl"], "no such file"),
                (["--num_samples=0"], "--num_samples 0: expected 1 or more"),
                ([TINY], "expected an adapter"),
            ],
        ),
        ("tools.to_glm", [(["--output_path=out", "--lora_path=no_adapter"], NO_ADAPTER)]),
    ],
)
def test_wrong_values_and_paths_are_answered_without_heavy_imports(script, cases):
    for (_, expected), (code, text, heavy) in zip(cases, answers(script, *(argv for argv, _ in cases)), strict=True):
        assert code == 1
        assert expected in text
        assert len(text.strip().splitlines()) == 1, text
        assert heavy == [], expected


def test_the_json_file_and_the_data_are_checked_without_heavy_imports(write):
    texts = [
        ('{"output_dir": "x",\n"seed": }', ":2: broken JSON"),
        ('{"output_dir": "x",\n"learnig_rate": 1}', ":2: learnig_rate is not a TrainingArguments key. Did you mean"),
        ('{"output_dir": "x",\n"learning_rate": "fast"}', ':2: learning_rate is "fast", expected float'),
        ('{"output_dir": "x",\n"learning_rate": -1}', ":2: learning_rate is -1, expected 0 or more"),
        ('{"output_dir": "x",\n"deepspeed": "ds.json"}', ":2: deepspeed is not supported"),
    ]
    paths = [write(f"{index}.json", text) for index, (text, _) in enumerate(texts)]
    lines = [[BASE, f"--train_args_json={path}"] for path in paths]
    data = write("train.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    texts.append(("", f"{data}:2: the example has no 'output'"))
    for (_, expected), (code, text, heavy) in zip(
        texts, answers("train_qlora", *lines, [BASE, f"--train_data_path={data}"]), strict=True
    ):
        assert (code, heavy) == (1, [])
        assert expected in text


@pytest.mark.parametrize("flags", [["--help"], ["--lora_rnak=8"]])
def test_an_answer_takes_less_than_a_second(flags):
    """Seen: 0.4 s on two idle cores, all of it the processor's; importing torch and transformers alone takes 6.

    The processor's time is measured, as other tests may run at the same time.
    """
    command = [sys.executable, "train_qlora.py", *flags]
    seconds = []
    for _ in range(3):
        before = children_seconds()
        subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, check=False)
        seconds.append(children_seconds() - before)
    assert min(seconds) < 1


def children_seconds():
    """Return the processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_chat_with_a_merged_model_imports_neither_peft_nor_bitsandbytes():
    """They take two seconds, and only adapters and 4-bit weights need them."""
    model_dir = FIXTURES_DIR / "chatglm2-6b" / "model"
    ((code, text, heavy),) = answers("chat_demo", [f"--model_path={model_dir}", "--prompt=a", "--temperature=0"])
    assert code is None, text
    assert not {"peft", "bitsandbytes", "datasets"} & set(heavy)
