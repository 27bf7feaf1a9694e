"""Resolve the arguments of an inference test (models, prompt, dtype) and refuse those that cannot run.

No weights of a base model are read here.
"""

import os
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.device import DTYPES
from glm_utils.hub import Hub
from glm_utils.load_model import ModelSource, find_model


def resolve_sources(
    model_paths: list[str],
    lora_paths: list[str],
    load_in_4bit: bool,
    dtype: str,
    device: torch.device,
    hub: Hub = "huggingface",
) -> list[ModelSource]:
    """Find and check every model that is to be tested.

    Args:
        model_paths: Directories or hub ids of base or merged models.
        lora_paths: Adapter directories; each adapter is applied, unmerged, to the base that it names.
        load_in_4bit: Quantize the layers to NF4.
        dtype: fp16, bf16, fp32, or auto: the checkpoint's dtype on a GPU, fp32 on the CPU.
        device: Where they run.
        hub: Where to download a model from that is no directory.

    Raises:
        UserError: A directory is not a model or an adapter, or load_in_4bit is given with a
            model that is already quantized.
    """
    found = [(path, *find_model(path, None, hub)) for path in model_paths]
    found += [(path, *find_model(None, path, hub)) for path in lora_paths]
    names = Counter(short_name(path) for path, _, _ in found)
    sources = []
    for path, checkpoint, adapter in found:
        name = short_name(path) if names[short_name(path)] == 1 else path
        label = f"{short_name(adapter.base_name)} + {name}" if adapter else name
        model_dtype = DTYPES.get(dtype) or auto_dtype(checkpoint.config, checkpoint.config_path, device)
        sources.append(ModelSource(label, checkpoint, adapter, load_in_4bit, model_dtype, device))
    return sources


def short_name(path: str) -> str:
    """Return the last part of a path or hub id."""
    return os.path.basename(os.path.abspath(path))


def auto_dtype(config: dict, config_path: Path, device: torch.device) -> torch.dtype:
    """Return the dtype of a checkpoint, or fp32 on the CPU, where half precision is slow.

    Args:
        config: Parsed config.json.
        config_path: Named in the error.
        device: Where the model runs.

    Raises:
        UserError: config.json names an unknown dtype.
    """
    if device.type == "cpu":
        return torch.float32
    found = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if found not in dtypes:
        raise UserError(f"{config_path}: unknown dtype {found!r}. Give --dtype fp16, bf16 or fp32")
    return dtypes[found]


def prompt_ids(tokenizer: PreTrainedTokenizer, text: str, num_tokens: int | None) -> list[int]:
    """Encode a prompt, its text repeated or truncated to a given length.

    Args:
        tokenizer: The model's tokenizer.
        text: The question; control strings in it are encoded as plain text.
        num_tokens: Length in tokens, special tokens included; None: the text as given.

    Raises:
        UserError: The length leaves no room for text, or there is no text to repeat.
    """
    ids = tokenizer.encode_prompt(text)
    if num_tokens is None:
        return ids
    special = tokenizer.build_inputs_with_special_tokens([])
    body = [token for token in ids if token not in special]
    num_text = num_tokens - len(special)
    if num_text < 1 or not body:
        raise UserError(
            f"--prompt_tokens {num_tokens} with {len(body)} tokens of text: expected at least one token of text, and "
            f"a length above that of the {len(special)} special tokens"
        )
    repeated = body * -(-num_text // len(body))
    return tokenizer.build_inputs_with_special_tokens(repeated[:num_text])


def check_context(source: ModelSource, num_prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the new tokens.

    Raises:
        UserError: Prompt and new tokens together exceed the model's context.
    """
    limit = source.checkpoint.context_length
    if limit and num_prompt_tokens + new_tokens > limit:
        raise UserError(
            f"{source.label}: {num_prompt_tokens} prompt tokens and {new_tokens} new tokens exceed its context of "
            f"{limit}. Shorten --instruction_text, or lower --prompt_tokens or --new_tokens"
        )
