"""Merge a LoRA adapter into its base model and quantize the result: adapter directory -> model directory.

    python merge_lora_and_quantize.py --lora_path saved_files/chatGLM2_6B_QLoRA --output_path saved_files/merged_int4

The adapter names its base. The output loads with AutoModel.from_pretrained(dir, trust_remote_code=True). Before it
appears under its name, it is reloaded in a fresh process and its logits are compared; a run that fails leaves nothing.
One weight is in memory at a time, whatever the size of the model.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: large tensors are allocated seven times faster

import torch
from loguru import logger

from glm_utils.adapter import find_base, read_adapter
from glm_utils.cli import UserError, run_cli
from glm_utils.data import read_examples
from glm_utils.device import resolve_device
from glm_utils.evaluation.at_end import check_evaluation, evaluate_output
from glm_utils.export import EXPORTS, ExportFormat
from glm_utils.files import check_free_space, write_json
from glm_utils.merging.job import make_job
from glm_utils.merging.merge import MergeJob
from glm_utils.model_card import merged_card
from glm_utils.output_dir import atomic_directory, check_replaceable
from glm_utils.run_record import RUN_CONFIG_NAME, git_commit, versions

STAGE = "merge_lora_and_quantize"
QBITS = (0, 4, 8)
MAX_COPY_THREADS = 4  # a 6B merge on 16 cores: 6.0 s with 16 threads, 4.4 s with 4; copying the files takes 4.1 s


def merge_lora_and_quantize(
    *,
    lora_path: str,
    output_path: str,
    qbits: int = 4,
    device: str = "auto",
    remote_scripts_dir: str | None = None,
    merge_base: Literal["original", "nf4"] = "original",
    export_format: Literal["chatglm", "glm", "gguf"] = "chatglm",
    overwrite: bool = False,
    evaluate_data_path: str | None = None,
) -> None:
    """Merge a LoRA adapter into its base model and write it as fp16, int8 or int4.

    Args:
        lora_path: Directory of the adapter; it names its base model.
        output_path: Directory to write: new, empty, or with --overwrite an earlier output of this command.
        qbits: Bits of the layers' weights: 0 (fp16), 8 or 4.
        device: auto (a GPU if there is one), cpu or cuda:N.
        remote_scripts_dir: Remote scripts to ship with the model. Default: this project's for the model's family.
        merge_base: Weights that the update is added to: original (fp16), or nf4 (the 4-bit weights that training saw).
        export_format: chatglm (loads with remote code), glm (plain transformers) or gguf (llama.cpp).
        overwrite: Replace an earlier output of this command.
        evaluate_data_path: Compare the merged model with the adapter on its base on this data, as evaluate_adapter.py
            does; the report goes to a directory beside output_path, named output_path + "_evaluation".
    """
    arguments = dict(locals())
    start_seconds = time.monotonic()
    if qbits not in QBITS:
        raise UserError(f"--qbits {qbits}: expected 0 (fp16), 8 or 4")
    output_dir = Path(output_path).expanduser()
    adapter = read_adapter(Path(lora_path).expanduser())
    base = find_base(adapter)
    check_replaceable(output_dir, overwrite, STAGE, [adapter.directory, base.directory])
    job = make_job(adapter, base, qbits, resolve_device(device), remote_scripts_dir, merge_base)
    if evaluate_data_path:
        check_comparison(output_dir, evaluate_data_path, export_format)
    export = EXPORTS[export_format]
    check_free_space(output_dir, export.check(job))
    logger.info(f"{adapter.directory} ({len(adapter.pairs)} updates) + {base.directory} on {job.device}")
    limit_threads(job)
    with atomic_directory(output_dir, overwrite, STAGE) as directory:
        reference = timed("merged and written", export.write, job, directory)
        write_records(job, export, directory, arguments)
        timed("reloaded and verified", export.verify, job, directory, reference)
    log_result(job, output_dir, time.monotonic() - start_seconds)
    if evaluate_data_path:
        evaluate_output(output_dir, adapter.directory, Path(evaluate_data_path).expanduser(), job.device, output_dir)


def check_comparison(output_dir: Path, data_path: str, export_format: str) -> None:
    """Check before any work what the comparison at the end needs: published layout, data, packages, a directory."""
    if export_format != "chatglm":
        raise UserError(
            f"--evaluate_data_path with --export_format {export_format}: the evaluation loads the published layout "
            "only. Omit one of the two"
        )
    read_examples(Path(data_path).expanduser(), needs_answer=False)
    check_evaluation(output_dir)


def limit_threads(job: MergeJob) -> None:
    """Merge to fp16 on a few CPU threads: the disk is the limit, and more threads wait for pages."""
    if job.device.type == "cpu" and not job.bits:
        torch.set_num_threads(min(torch.get_num_threads(), MAX_COPY_THREADS))


def timed(done: str, function: Callable, *arguments: object) -> Any:
    """Call a function, log how long it took, and return its result; `done` begins the log line."""
    start_seconds = time.monotonic()
    result = function(*arguments)
    logger.info(f"{done} in {time.monotonic() - start_seconds:.1f} s")
    return result


def write_records(job: MergeJob, export: ExportFormat, directory: Path, arguments: dict) -> None:
    """Log the report of the merge, and write run_config.json and the model card."""
    for line in job.report.lines(job.merge_base):
        logger.info(line)
    record = {
        "stage": STAGE,
        "arguments": arguments,
        "base": {"name": job.adapter.base_name, "family": job.base.family.name},
        "adapter": {"num_updates": len(job.adapter.pairs), "run_config": job.adapter.run_config},
        "report": job.report.record(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(directory / RUN_CONFIG_NAME, record)
    card = merged_card(
        job.adapter.base_name, job.weight_format, card_properties(job), export.USAGE, export.LIBRARY_NAME
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def card_properties(job: MergeJob) -> dict[str, str]:
    """Return the table of the model card, values by label."""
    error = job.report.relative_weight_error()
    found = versions()
    return {
        "family": job.base.family.title,
        "weights of the layers": job.weight_format,
        "merged into": f"{job.merge_base} base weights",
        "LoRA updates": str(len(job.adapter.pairs)),
        **({} if error is None else {"squared relative weight error": f"{error:.3g}"}),
        "written with": ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft")),
    }


def log_result(job: MergeJob, output_dir: Path, seconds: float) -> None:
    """Log the closing line: format, size, time and place."""
    num_bytes = sum(path.stat().st_size for path in output_dir.iterdir())
    logger.success(f"{job.weight_format} model of {num_bytes:,} bytes in {seconds:.1f} s: {output_dir}")


if __name__ == "__main__":
    run_cli(merge_lora_and_quantize)
