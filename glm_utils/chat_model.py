"""Load a model to talk to: a base or merged directory, or the base that an adapter names with that adapter on it."""

from pathlib import Path

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.checkpoint import load_adapter, load_base_model, load_tokenizer, project_path, resolve_checkpoint_dir
from glm_utils.checkpoint_files import check_checkpoint, check_unquantised
from glm_utils.cli import UserError
from glm_utils.inference_job import Target, check_fits
from glm_utils.lora import read_adapter
from glm_utils.merge_job import find_base, resolve_device

LEAST_TOKENS = 256  # whose keys and values must fit beside the weights


def load_chat_model(
    model_path: str | None, lora_path: str | None, load_in_4bit: bool, device: str, switchable: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizer]:
    """Load a model, in fp16 on a GPU and in fp32 on the CPU, and its tokenizer.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path.
        load_in_4bit: Quantise the layers to NF4 while loading.
        device: auto, cpu or cuda:N.
        switchable: Keep the adapter apart, so that it can be disabled. Otherwise it is merged into floating-point
            weights, which makes generation faster.

    Raises:
        UserError: No model, two models, a broken one, one that is quantised already, or one that does not fit.
    """
    place = resolve_device(device)
    base_dir, adapter_dir = resolve_paths(model_path, lora_path)
    config = check_checkpoint(base_dir)
    if load_in_4bit:
        check_unquantised(base_dir, config)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    target = Target(str(base_dir), base_dir, config, adapter_dir, load_in_4bit, dtype, place)
    check_fits(target, 1, LEAST_TOKENS, "an int4 model or --load_in_4bit")
    logger.info(f"loading {base_dir}{f' with {adapter_dir}' if adapter_dir else ''} on {place}")
    tokenizer = load_tokenizer(base_dir)
    model = load_base_model(base_dir, load_in_4bit, dtype, device_map={"": str(place)})
    if adapter_dir:
        model = load_adapter(model, adapter_dir)
        if not (switchable or load_in_4bit):
            model = model.merge_and_unload()
    return model.eval(), tokenizer


def resolve_paths(model_path: str | None, lora_path: str | None) -> tuple[Path, Path | None]:
    """Return the directories of the base or merged model and of the adapter.

    Args:
        model_path: Directory or hub id.
        lora_path: Directory of an adapter.

    Raises:
        UserError: Neither, both, or one that is not found.
    """
    if bool(model_path) == bool(lora_path):
        found = "both are given" if model_path else "neither is given"
        raise UserError(f"{found}: give --model_path DIR, or --lora_path DIR, which names its base itself")
    if lora_path:
        adapter = read_adapter(Path(lora_path).expanduser())
        return find_base(adapter), adapter.directory
    path = project_path(model_path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"--model_path {model_path}: a LoRA adapter. Give it as --lora_path {model_path}")
    return resolve_checkpoint_dir(model_path), None
