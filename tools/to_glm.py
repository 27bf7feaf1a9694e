"""Write a ChatGLM2-6B base model, or a LoRA adapter of one, for transformers' own GlmForCausalLM.

python -m tools.to_glm --model_name_or_path THUDM/chatglm2-6b --output_path saved_files/glm_base
python -m tools.to_glm --lora_path saved_files/chatGLM2_6B_QLoRA_t32 --output_path saved_files/glm_adapter

Engines such as vLLM can then serve several adapters on one base. For a merged model see merge_lora_and_quantize.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError, run_cli
from glm_utils.early_checks import check_model_dir
from glm_utils.files import check_free_space, write_json
from glm_utils.hub import Hub, check_hub
from glm_utils.model_files.adapter_config import read_adapter_config
from glm_utils.output_dir import atomic_directory, check_replaceable
from glm_utils.run_record import RUN_CONFIG_NAME, git_commit, versions

if TYPE_CHECKING:
    from glm_utils.merging.merge import MergeJob

STAGE = "to_glm"


def to_glm(
    *,
    output_path: str,
    model_name_or_path: str | None = None,
    lora_path: str | None = None,
    overwrite: bool = False,
    hub: Hub = "huggingface",
) -> None:
    """Write a base model or an adapter for GlmForCausalLM.

    Give either --model_name_or_path or --lora_path.

    Args:
        output_path: Directory to write: new, empty, or with --overwrite an earlier output of this command.
        model_name_or_path: Directory or hub id of an fp16 ChatGLM2-6B. The result is reloaded and its logits compared.
        lora_path: Directory of an adapter; it names its base model.
        overwrite: Replace an earlier output of this command.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
    """
    arguments = dict(locals())
    if (model_name_or_path is None) == (lora_path is None):
        raise UserError("give either --model_name_or_path, to convert a base, or --lora_path, to convert an adapter")
    check_hub(hub)
    if lora_path:
        read_adapter_config(Path(lora_path).expanduser())
    else:
        check_model_dir(str(model_name_or_path))

    from glm_utils.export import glm
    from glm_utils.export.glm_names import (
        check_native,
        native_adapter_bytes,
        native_class,
        native_pairs,
        write_native_adapter,
    )
    from glm_utils.merging.write import empty_merged

    job = adapter_job(Path(lora_path).expanduser(), hub) if lora_path else base_job(model_name_or_path, hub)
    output_dir = Path(output_path).expanduser()
    check_replaceable(output_dir, overwrite, STAGE, [job.adapter.directory, job.base.directory])
    check_native(job)
    config = empty_merged(job, bits=0).config
    native = native_pairs(job.adapter.pairs, config)
    check_free_space(output_dir, native_adapter_bytes(native) if lora_path else glm.check(job))
    with atomic_directory(output_dir, overwrite, STAGE) as directory:
        if lora_path:
            write_native_adapter(native, config.num_layers, directory)
            if job.base.tokenizer.prompt_text:
                glm.write_chat_template(job, directory)
                logger.info("give the engine the adapter's chat_template.jinja: the base's has no prompt_text")
        else:
            glm.verify(job, directory, glm.write(job, directory))
        record = {"stage": STAGE, "arguments": arguments, "versions": versions(), "commit": git_commit()}
        write_json(directory / RUN_CONFIG_NAME, record)
    logger.success(f"written for {native_class(job)}: {output_dir}")


def base_job(model_name_or_path: str, hub: Hub) -> "MergeJob":
    """Return a merge without updates, which writes the base unchanged."""
    from glm_utils.adapter import Adapter
    from glm_utils.checkpoint import open_checkpoint
    from glm_utils.device import resolve_device
    from glm_utils.merging.job import make_job

    base = open_checkpoint(model_name_or_path, hub)
    return make_job(Adapter(base.directory, model_name_or_path, {}), base, 0, resolve_device("auto"), None, "original")


def adapter_job(lora_dir: Path, hub: Hub) -> "MergeJob":
    """Read an adapter and its base; the merge is not run, but checks that they fit."""
    from glm_utils.adapter import find_base, read_adapter
    from glm_utils.device import resolve_device
    from glm_utils.merging.job import make_job

    adapter = read_adapter(lora_dir)
    return make_job(adapter, find_base(adapter, hub), 0, resolve_device("cpu"), None, "original")


if __name__ == "__main__":
    run_cli(to_glm)
