"""Merge a LoRA adapter into its base model and quantize the result: adapter directory -> model directory.

    python merge_lora_and_quantize.py --lora_path saved_files/chatGLM2_6B_QLoRA --output_path saved_files/merged_int4

The adapter names its base. The output loads with AutoModel.from_pretrained(dir, trust_remote_code=True). Before it
appears under its name, it is reloaded in a fresh process and its logits are compared; a run that fails leaves nothing.
One weight is in memory at a time, whatever the size of the model.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: large tensors are allocated seven times faster

from loguru import logger

from glm_utils.cli import UserError, run_cli
from glm_utils.data import Example, read_examples
from glm_utils.early_checks import check_device_name, project_path
from glm_utils.files import check_apart, check_free_space
from glm_utils.hub import Hub, check_hub
from glm_utils.model_files.adapter_config import base_name, read_adapter_config
from glm_utils.output_dir import atomic_directory, check_replaceable

STAGE = "merge_lora_and_quantize"
QBITS = (0, 4, 8)


def merge_lora_and_quantize(
    *,
    lora_path: str,
    output_path: str,
    qbits: int = 4,
    device: str = "auto",
    hub: Hub = "huggingface",
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
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
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
    check_device_name(device)
    check_hub(hub)
    adapter_dir, output_dir = Path(lora_path).expanduser(), Path(output_path).expanduser()
    base_dir = project_path(base_name(read_adapter_config(adapter_dir)))
    check_replaceable(output_dir, overwrite, STAGE, [adapter_dir, base_dir])
    examples = read_comparison(evaluate_data_path, export_format) if evaluate_data_path else []

    from glm_utils.adapter import find_base, read_adapter
    from glm_utils.device import resolve_device
    from glm_utils.evaluation.at_end import check_evaluation, evaluate_output
    from glm_utils.export import EXPORTS
    from glm_utils.merging.job import limit_threads, make_job
    from glm_utils.merging.output import log_result, write_records

    adapter = read_adapter(adapter_dir)
    base = find_base(adapter, hub)
    check_apart(output_dir, [base.directory], "--output_path")
    job = make_job(adapter, base, qbits, resolve_device(device), remote_scripts_dir, merge_base)
    if evaluate_data_path:
        check_evaluation(output_dir)
    export = EXPORTS[export_format]
    check_free_space(output_dir, export.check(job))
    logger.info(f"{adapter.directory} ({len(adapter.pairs)} updates) + {base.directory} on {job.device}")
    limit_threads(job)
    with atomic_directory(output_dir, overwrite, STAGE) as directory:
        reference = timed("merged and written", export.write, job, directory)
        write_records(job, directory, STAGE, arguments, export.USAGE, export.LIBRARY_NAME)
        timed("reloaded and verified", export.verify, job, directory, reference)
    log_result(job, output_dir, time.monotonic() - start_seconds)
    if evaluate_data_path:
        evaluate_output(output_dir, adapter.directory, evaluate_data_path, examples, job.device, output_dir, hub=hub)


def read_comparison(data_path: str, export_format: str) -> Sequence[Example]:
    """Read before any work the examples of the comparison at the end, which loads the published layout."""
    if export_format != "chatglm":
        raise UserError(
            f"--evaluate_data_path with --export_format {export_format}: the evaluation loads the published layout "
            "only. Omit one of the two"
        )
    return read_examples(data_path, needs_answer=False)


def timed(done: str, function: Callable, *arguments: object) -> Any:
    """Call a function, log how long it took, and return its result; `done` begins the log line."""
    start_seconds = time.monotonic()
    result = function(*arguments)
    logger.info(f"{done} in {time.monotonic() - start_seconds:.1f} s")
    return result


if __name__ == "__main__":
    run_cli(merge_lora_and_quantize)
