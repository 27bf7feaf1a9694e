"""Chat with a model in the terminal: a base or merged directory, or an adapter on its base.

    python chat_demo.py --lora_path saved_files/chatGLM2_6B_QLoRA_t32
    python chat_demo.py --model_path saved_files/merged_int4 --prompt "类型#裙*颜色#白色"

Ctrl-C stops an answer; help lists the commands. Answers go to stdout, everything else to stderr.
"""

import sys
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError, run_cli
from glm_utils.early_checks import check_device_name, check_model_choice, check_sampling, check_seed
from glm_utils.hub import Hub, check_hub

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizer

MIN_TOKENS = 256  # keys and values of so many tokens must fit beside the weights


def chat_demo(
    *,
    model_path: str | None = None,
    lora_path: str | None = None,
    hub: Hub = "huggingface",
    load_in_4bit: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    compare: bool = False,
    device: str = "auto",
) -> None:
    """Chat with a model, or answer one prompt.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path; it names its base.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        load_in_4bit: Quantize the layers to NF4 while loading.
        temperature: Divides the logits; 0: always the most probable token. Default: the model's own.
        top_p: Nucleus probability. Default: the model's own.
        max_length: Prompt and answer together, in tokens. Default: the model's own.
        seed: Seed for sampling. Default: a different one each time.
        prompt: Answer this and exit.
        compare: Answer twice, without and with the adapter of lora_path, side by side.
        device: Where to run: auto (a GPU when there is one), cpu or cuda:N.
    """
    if compare and not lora_path:
        raise UserError("--compare needs --lora_path: it answers without and with that adapter")
    check_sampling(temperature, top_p)
    check_seed(seed)
    check_device_name(device)
    check_hub(hub)
    check_model_choice(model_path, lora_path)

    import torch

    from glm_utils.inference.chat import ChatSession, chat_settings
    from glm_utils.inference.terminal import converse, print_answers, tolerate_any_text

    model, tokenizer = load_chat_model(model_path, lora_path, load_in_4bit, device, not compare, hub)
    settings = chat_settings(model, max_length, temperature, top_p)
    uses_adapter = {"without the adapter": False, "with the adapter": True} if compare else {"": True}
    sessions = {title: ChatSession(model, tokenizer, settings, use) for title, use in uses_adapter.items()}
    if seed is not None:
        torch.manual_seed(seed)
    tolerate_any_text(sys.stdout)  # a terminal may lack a character of the answer
    if prompt is not None:
        print_answers(prompt, sessions)
    else:
        converse(sessions)


def load_chat_model(
    model_path: str | None,
    lora_path: str | None,
    load_in_4bit: bool,
    device: str,
    merge_adapter: bool,
    hub: Hub = "huggingface",
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizer]":
    """Load a model, in fp16 on a GPU and in fp32 on the CPU, and its tokenizer.

    Args:
        model_path: Directory or hub id of a base or merged model; None with lora_path.
        lora_path: Directory of an adapter; None with model_path.
        load_in_4bit: Quantize the layers to NF4 while loading.
        device: auto, cpu or cuda:N.
        merge_adapter: False keeps the adapter separate, so that it can be disabled.
        hub: Where to download a model from that is no directory.

    Raises:
        UserError: Neither path is given or both are, or the model cannot be opened, is already quantized although
            load_in_4bit is set, or does not fit into free memory.
    """
    import torch

    from glm_utils.device import resolve_device
    from glm_utils.load_model import ModelSource, find_model

    place = resolve_device(device)
    checkpoint, adapter = find_model(model_path, lora_path, hub)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    source = ModelSource(str(checkpoint.directory), checkpoint, adapter, load_in_4bit, dtype, place)
    source.check_fits(1, MIN_TOKENS, "an int4 model or --load_in_4bit")
    logger.info(f"loading {checkpoint.directory}{f' with {adapter.directory}' if adapter else ''} on {place}")
    return source.load(merge_adapter), checkpoint.tokenizer


if __name__ == "__main__":
    run_cli(chat_demo)
