"""The shortest way to a model that answers, for programs too: a base or merged model, or an adapter on its base."""

from __future__ import annotations  # peft is imported for its types only

from typing import TYPE_CHECKING

import torch
from loguru import logger

from glm_utils.device import resolve_device
from glm_utils.hub import Hub
from glm_utils.load_model import ModelSource, find_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizer

MIN_TOKENS = 256  # keys and values of so many tokens must fit beside the weights


def load_chat_model(
    model_path: str | None = None,
    lora_path: str | None = None,
    load_in_4bit: bool = False,
    device: str = "auto",
    merge_adapter: bool = True,
    hub: Hub = "huggingface",
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizer]:
    """Load a model, in fp16 on a GPU and in fp32 on the CPU, and its tokenizer.

    Args:
        model_path: Directory or hub id of a base or merged model; None with lora_path.
        lora_path: Directory of an adapter, which names its base; None with model_path.
        load_in_4bit: Quantize the layers to NF4 while loading.
        device: auto, cpu or cuda:N.
        merge_adapter: Merge the adapter into floating-point weights, which is faster; False keeps it separate, so that
            peft can disable it. It stays separate from NF4 weights in any case.
        hub: Where to download a model from that is no directory.

    Returns:
        The model, a PeftModel if the adapter is separate, and the tokenizer.

    Raises:
        UserError: Neither path is given or both are, or the model cannot be opened, is already quantized although
            load_in_4bit is set, or does not fit into free memory.
    """
    place = resolve_device(device)
    checkpoint, adapter = find_model(model_path, lora_path, hub)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    source = ModelSource(str(checkpoint.directory), checkpoint, adapter, load_in_4bit, dtype, place)
    source.check_fits(1, MIN_TOKENS, "an int4 model or --load_in_4bit")
    logger.info(f"loading {checkpoint.directory}{f' with {adapter.directory}' if adapter else ''} on {place}")
    return source.load(merge_adapter), checkpoint.tokenizer
