"""Measure the eight models of chatGLM-6B-QLoRA's table, at 6B size with random weights, each in a process.

    python -m benchmarks.bench_inference --work_dir /data/bench

Each family in fp16 and int4, base and QLoRA-merged, with the project's own commands on real directories. Writes
benchmarks/results/inference_models_<device>.json after each model; prints a table and, last, the JSON object.
"""

import functools
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from loguru import logger

from benchmarks.harness.cases import choose_cases, model_name, run_python
from benchmarks.harness.checkpoints import LORA_TARGETS, write_random_adapter
from benchmarks.harness.published import find_family
from benchmarks.harness.results import FAILED, RESULTS_DIR, check_none_failed, device_name
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.family import PROJECT_DIR, Family
from glm_utils.inference.report import write_report
from glm_utils.load_model import load_base_model
from glm_utils.report_file import check_report_path

PROMPT_TOKENS = 64


class Case(NamedTuple):
    """One column of the table.

    Attributes:
        name: Its name after the family's.
        weights: Directory that is measured, see `WEIGHTS`.
    """

    name: str
    weights: str


CASES = (
    Case("fp16", "base"),
    Case("int4", "int4"),
    Case("QLoRA fp16", "merged"),
    Case("QLoRA int4", "merged_int4"),
)


def bench_inference(
    *,
    work_dir: str,
    families: str = "chatglm-6b,chatglm2-6b",
    cases: str | None = None,
    scale: Literal["6b", "tiny"] = "6b",
    new_tokens: int = 128,
    loop_number: int = 5,
    output_json: str | None = None,
) -> None:
    """Create the models one after the other, and measure them.

    Args:
        work_dir: Directory to create for the models, 30 GB; deleted afterwards.
        families: Names joined by commas.
        cases: Names of cases joined by commas. Default: all.
        scale: 6b, or tiny: the small models in models/.
        new_tokens: Tokens to generate.
        loop_number: Measured runs.
        output_json: Result file. Default: benchmarks/results/inference_models_<device>.json.
    """
    root = Path(work_dir).resolve()
    if root.exists():
        raise UserError(f"--work_dir {root}: exists. Give a new directory")
    chosen = choose_cases(CASES, cases)
    records = [find_family(name) for name in families.split(",")]
    path = output_json or RESULTS_DIR / f"inference_models_{device_name()}.json"
    check_report_path(path)
    result: dict = {"benchmark": "inference_models", "scale": scale, "models": []}
    try:
        for family in records:
            make_base(root, family, scale)
            for case in chosen:
                if make := WEIGHTS.get(case.weights):
                    make(root, root / case.weights)
                found = measure(root / case.weights, new_tokens, loop_number)
                result["models"].append({**found, "label": f"{model_name(family, scale)} {case.name}"})
                text = write_report(result, path)
                if make:
                    shutil.rmtree(root / case.weights)
            shutil.rmtree(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(text)
    check_none_failed(result["models"])


# ---- models


def make_base(root: Path, family: Family, scale: str) -> None:
    """Create the base and an adapter for it.

    Args:
        root: Directory to create.
        family: The base's family.
        scale: 6b or tiny.
    """
    if scale == "6b":
        run_python("-m", "benchmarks.random_checkpoint", "--output_path", root / "base", "--family", family.name)
    else:
        shutil.copytree(PROJECT_DIR / "models" / model_name(family, scale), root / "base")
    write_random_adapter(root / "base", root / "adapter", LORA_TARGETS)


def merge(root: Path, output_dir: Path, bits: int) -> None:
    """Merge the adapter with the project's command."""
    flags = ("--lora_path", root / "adapter", "--output_path", output_dir, "--qbits", bits)
    run_python("merge_lora_and_quantize.py", *flags)


def quantize_base(root: Path, output_dir: Path, bits: int) -> None:
    """Quantize the base in its own process, so that its memory is freed."""
    process = multiprocessing.get_context("spawn").Process(target=write_quantized, args=(root, output_dir, bits))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"quantizing to {bits} bits failed; the log above says why")


def write_quantized(root: Path, output_dir: Path, bits: int) -> None:
    """Load the base, quantize it in place and save it."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_base_model(open_checkpoint(root / "base"), dtype="fp16", device_map={"": device})
    model.quantize(bits).save_pretrained(output_dir)
    open_checkpoint(root / "base").tokenizer.save_pretrained(output_dir)


WEIGHTS = {
    "int4": functools.partial(quantize_base, bits=4),
    "merged": functools.partial(merge, bits=0),
    "merged_int4": functools.partial(merge, bits=4),
}


# ---- one case


def measure(directory: Path, new_tokens: int, loop_number: int) -> dict:
    """Measure a directory with the project's command; return its column of the table."""
    flags = ["--model_path", directory, "--prompt_tokens", PROMPT_TOKENS, "--new_tokens", new_tokens]
    try:
        result = json.loads(run_python("inference_test.py", *flags, "--loop_number", loop_number).splitlines()[-1])
    except UserError as error:
        logger.error(str(error))
        return {"error": FAILED}
    return {**result["models"][0], "copy_bytes_per_second": result["copy_bytes_per_second"]}


if __name__ == "__main__":
    run_cli(bench_inference)
