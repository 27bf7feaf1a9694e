"""Measure generation: model directories -> a table of tokens/s, latency and memory, and one JSON object.

    python inference_test.py --model_path saved_files/merged_fp16,saved_files/merged_int4

Generation is greedy, with a fixed number of new tokens (an end token does not stop it). The first run after loading is
reported separately; one warm-up run and the measured runs follow. The table and, as the last line, the JSON object go
to stdout, the log to stderr.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loguru import logger

from glm_utils.cli import UserError, as_list, check_minimums, run_cli
from glm_utils.early_checks import check_model_path
from glm_utils.hub import Hub, check_hub
from glm_utils.inference.report import write_report
from glm_utils.model_files.adapter_config import read_adapter_config
from glm_utils.report_file import check_report_path

if TYPE_CHECKING:
    from glm_utils.load_model import ModelSource

INSTRUCTION = "类型#裙*颜色#白色*风格#简约*图案#刺绣"
REMEDY = "an int4 model, --load_in_4bit, or a smaller --dtype or --batch_size"
MIN_VALUES = {"loop_number": 1, "max_time": 0, "new_tokens": 2, "batch_size": 1}


def inference_test(
    *,
    model_path: str | list[str] | None = None,
    lora_path: str | list[str] | None = None,
    loop_number: int = 5,
    max_time: float | None = None,
    instruction_text: str = INSTRUCTION,
    new_tokens: int = 128,
    prompt_tokens: int | None = None,
    batch_size: int = 1,
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto",
    hub: Hub = "huggingface",
    load_in_4bit: bool = False,
    use_cuda_graph: bool = True,
    output_json: str | None = None,
) -> None:
    """Measure models one after the other, on the first GPU or, without one, on the CPU.

    Args:
        model_path: Base or merged model: a directory or hub id, or several joined by commas.
        lora_path: Adapter to apply, unmerged, to the base it names: a directory, or several joined by commas.
        loop_number: Measured runs per model.
        max_time: Seconds of measured runs after which no further one starts. Default: no limit.
        instruction_text: The prompt.
        new_tokens: Tokens to generate, 2 or more.
        prompt_tokens: Length to which the prompt is repeated or truncated. Default: the prompt as given.
        batch_size: Sequences generated at once, all from the same prompt.
        dtype: fp16, bf16, fp32, or auto: the checkpoint's dtype on a GPU, fp32 on the CPU.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        load_in_4bit: Quantize the layers to NF4 (bitsandbytes) while loading.
        use_cuda_graph: Use the fast decoding path.
        output_json: File to which the JSON object is written too.
    """
    arguments = dict(locals())
    check_minimums(arguments, MIN_VALUES)
    check_hub(hub)
    check_report_path(output_json)
    if not model_path and not lora_path:
        raise UserError("nothing to test. Give --model_path DIR (or DIR1,DIR2,...) or --lora_path DIR, or both")
    for path in as_list(model_path):
        check_model_path(path)
    for path in as_list(lora_path):
        read_adapter_config(Path(path).expanduser())

    import torch

    from glm_utils.device import free_bytes, resolve_device
    from glm_utils.inference.measure import Workload, check_finite, measure_model, stream_generate
    from glm_utils.inference.memory import copy_bandwidth
    from glm_utils.inference.request import check_context, prompt_ids, resolve_sources

    device = resolve_device("auto")
    sources = resolve_sources(as_list(model_path), as_list(lora_path), load_in_4bit, dtype, device, hub)
    prompts = [prompt_ids(source.checkpoint.tokenizer, instruction_text, prompt_tokens) for source in sources]
    for source, prompt in zip(sources, prompts, strict=True):
        check_context(source, len(prompt), new_tokens)
        source.check_fits(batch_size, len(prompt) + new_tokens, REMEDY)
    bandwidth = copy_bandwidth(device, free_bytes(device))
    logger.info(f"{device}: copies {bandwidth / 1e9:,.1f} GB/s, read plus written")
    make_generate = functools.partial(stream_generate, fast_path=use_cuda_graph)
    models = []
    for source, prompt in zip(sources, prompts, strict=True):
        logger.info(f"{source.label}: {source.weight_format}, batch {batch_size}, {len(prompt)} + {new_tokens} tokens")
        workload = Workload(torch.tensor([prompt] * batch_size, device=device), new_tokens, loop_number, max_time)
        models.append(identify(source) | measure_model(source.load, make_generate, workload, bandwidth, check_finite))
    result = {"arguments": arguments, "copy_bytes_per_second": bandwidth, "models": models}
    try:
        print(write_report(result, output_json))
    except UserError:  # the file cannot be written, but measuring took its time
        print(write_report(result, None))
        raise


def identify(source: "ModelSource") -> dict:
    """Return the entries that identify a model in the table and the JSON object."""
    family = source.checkpoint.family.name
    return {"label": source.label, "family": family, "weight_format": source.weight_format}


if __name__ == "__main__":
    run_cli(inference_test)
