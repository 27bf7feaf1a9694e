"""Measure generation at 6B size with random weights, each model in a process of its own.

    python benchmarks/bench_inference.py --work_dir /data/bench
    python benchmarks/bench_inference.py --work_dir /data/bench --part baselines

Part `models`: the eight models of the original project's table, each family in fp16 and int4, base and QLoRA-merged.
Part `baselines`: ChatGLM2 in fp16, int8 and int4 with and without the fast path, in batches, at 2048 tokens, in NF4
with and without an adapter, and transformers' own model of the same mathematics. Writes
benchmarks/results/inference_<part>_<device>.json after each model; prints a table and, last, the JSON object.
"""

import functools
import itertools
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from loguru import logger
from random_checkpoint import find_family, random_adapter

from glm_utils.checkpoint import load_base_model, load_tokenizer
from glm_utils.cli import UserError, nearest, run_cli
from glm_utils.family import PROJECT_DIR, Family
from glm_utils.inference_report import write_report
from glm_utils.run_record import versions

RESULTS_DIR = PROJECT_DIR / "benchmarks" / "results"
PROMPT_TOKENS = 64
LONG_CONTEXT = 2048  # prompt and new tokens together
TARGETS = ["query_key_value"]
FAILED = "failed"  # error of a row whose script failed
EAGER = ("--use_cuda_graph=False",)


class Case(NamedTuple):
    """One column of the table.

    Attributes:
        name: Its name after the family's.
        weights: Directory that is measured, see `WEIGHTS`.
        flags: More flags of the script.
        batch_size: Sequences at once.
        script: What measures it.
        is_long: Whether the prompt fills the long context.
    """

    name: str
    weights: str
    flags: tuple[str, ...] = ()
    batch_size: int = 1
    script: str = "inference_test.py"
    is_long: bool = False


PARTS = {  # cases of the same weights stand together: a directory is made before its first case and deleted afterwards
    "models": (
        Case("fp16", "base"),
        Case("int4", "int4"),
        Case("QLoRA fp16", "merged"),
        Case("QLoRA int4", "merged_int4"),
    ),
    "baselines": (
        Case("fp16", "base"),
        Case("fp16 eager", "base", EAGER),
        Case("native", "base", script="benchmarks/native_glm.py"),
        Case("native batch 8", "base", batch_size=8, script="benchmarks/native_glm.py"),
        Case("nf4", "base", ("--load_in_4bit",)),
        Case("nf4 + adapter", "adapter", ("--load_in_4bit",)),
        Case("int8", "int8"),
        Case("int8 eager", "int8", EAGER),
        Case("int4", "int4"),
        Case("int4 eager", "int4", EAGER),
        Case("int4 batch 8", "int4", batch_size=8),
        Case("int4 batch 8 eager", "int4", EAGER, batch_size=8),
        Case("int4 at 2048 tokens", "int4", is_long=True),
    ),
}
PART_FAMILIES = {"models": "chatglm-6b,chatglm2-6b", "baselines": "chatglm2-6b"}


def bench_inference(
    *,
    work_dir: str,
    part: Literal["models", "baselines"] = "models",
    families: str | None = None,
    cases: str | None = None,
    scale: Literal["6b", "tiny"] = "6b",
    new_tokens: int = 128,
    loop_number: int = 5,
    output_json: str | None = None,
) -> None:
    """Make the models one after the other, and measure them.

    Args:
        work_dir: Directory to make for the models, 30 GB; deleted afterwards.
        part: models or baselines.
        families: Names joined by commas. Default: both for models, chatglm2-6b for baselines.
        cases: Names of cases joined by commas. Default: all of the part.
        scale: 6b, or tiny: the small models of models/.
        new_tokens: Tokens to generate.
        loop_number: Measured repeats.
        output_json: Result file. Default: benchmarks/results/inference_<part>_<device>.json.
    """
    root = Path(work_dir).resolve()
    if root.exists():
        raise UserError(f"--work_dir {root}: exists. Give a new directory")
    chosen = choose_cases(part, cases)
    records = [find_family(name) for name in (families or PART_FAMILIES[part]).split(",")]
    path = output_json or RESULTS_DIR / f"inference_{part}_{device_name()}.json"
    result: dict = {"benchmark": f"inference_{part}", "scale": scale, "models": []}
    try:
        for family in records:
            make_base(root, family, scale)
            for weights, group in itertools.groupby(chosen, key=lambda case: case.weights):
                if weights in WEIGHTS:
                    WEIGHTS[weights](root, root / weights)
                for case in group:
                    label = f"{family.title if scale == '6b' else tiny_name(family)} {case.name}"
                    row = measure(case, root / weights, new_tokens, loop_number)
                    result["models"].append({**row, "label": label})
                    text = write_report(result, path)
                if weights in WEIGHTS:
                    shutil.rmtree(root / weights)
            shutil.rmtree(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(text)
    if failed := [row["label"] for row in result["models"] if row.get("error") == FAILED]:
        raise UserError(f"failed: {', '.join(failed)}; the log above says why")


def choose_cases(part: str, names: str | None) -> list[Case]:
    """Return the cases of a part that are named, in the part's order."""
    known = {case.name: case for case in PARTS[part]}
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    for name in wanted:
        if name not in known:
            raise UserError(f"--cases: no case {name!r}. {nearest(name, known, 'cases')}")
    return [case for name, case in known.items() if name in wanted]


def device_name() -> str:
    """Return the GPU's name for a file name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", versions()["device"].lower().removeprefix("nvidia ")).strip("_")


def run(*command: object) -> str:
    """Run a Python script of this project; return its stdout, while stderr passes through.

    Raises:
        UserError: It failed.
    """
    words = [sys.executable, *map(str, command)]
    process = subprocess.run(words, cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(words[1:])}: exit code {process.returncode}")
    return process.stdout


# ---- models


def make_base(root: Path, family: Family, scale: str) -> None:
    """Make the base and an adapter for it.

    Args:
        root: Directory to make.
        family: The base's family.
        scale: 6b or tiny.
    """
    if scale == "6b":
        run("benchmarks/random_checkpoint.py", "--output_path", root / "base", "--family", family.name)
    else:
        shutil.copytree(PROJECT_DIR / "models" / tiny_name(family), root / "base")
    random_adapter(root / "base", root / "adapter", TARGETS)


def tiny_name(family: Family) -> str:
    """Return the name of a family's small model in models/."""
    return f"{family.name.removesuffix('-6b')}-tiny"


def merge(root: Path, output_dir: Path, bits: int) -> None:
    """Merge the adapter with the project's command."""
    flags = ("--lora_path", root / "adapter", "--output_path", output_dir, "--qbits", bits)
    run("merge_lora_and_quantize.py", *flags)


def quantize_base(root: Path, output_dir: Path, bits: int) -> None:
    """Quantise the base in a process of its own, which gives its memory back."""
    process = multiprocessing.get_context("spawn").Process(target=write_quantized, args=(root, output_dir, bits))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"quantising to {bits} bits failed; the log above says why")


def write_quantized(root: Path, output_dir: Path, bits: int) -> None:
    """Load the base, quantise it in place and save it."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_base_model(root / "base", dtype="fp16", device_map={"": device})
    model.quantize(bits).save_pretrained(output_dir)
    load_tokenizer(root / "base").save_pretrained(output_dir)


WEIGHTS = {
    "int8": functools.partial(quantize_base, bits=8),
    "int4": functools.partial(quantize_base, bits=4),
    "merged": functools.partial(merge, bits=0),
    "merged_int4": functools.partial(merge, bits=4),
}


# ---- one case


def measure(case: Case, directory: Path, new_tokens: int, loop_number: int) -> dict:
    """Run the case's script; return its row."""
    prompt_tokens = LONG_CONTEXT - new_tokens if case.is_long else PROMPT_TOKENS
    path_flag = "--lora_path" if case.weights == "adapter" else "--model_path"
    flags = [path_flag, directory, "--prompt_tokens", prompt_tokens, "--new_tokens", new_tokens]
    flags += ["--loop_number", loop_number, "--batch_size", case.batch_size, *case.flags]
    try:
        result = json.loads(run(case.script, *flags).splitlines()[-1])
    except UserError as error:
        logger.error(str(error))
        return {"error": FAILED}
    return {**result["models"][0], "copy_bytes_per_second": result["copy_bytes_per_second"]}


if __name__ == "__main__":
    run_cli(bench_inference)
