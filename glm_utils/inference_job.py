"""Resolve the arguments of an inference test (models, prompt, dtype, device) and refuse what cannot run.

Nothing here reads a weight: a model that does not fit is refused from its config before it is loaded.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.checkpoint import DTYPES, load_adapter, load_base_model, load_classes, resolve_checkpoint_dir
from glm_utils.checkpoint_files import check_checkpoint, check_unquantised
from glm_utils.cli import UserError
from glm_utils.family import Family, detect_family
from glm_utils.lora import read_adapter
from glm_utils.merge_job import find_base

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight, its share of a block's uint8 scale, of 256 scales' fp32 scale


@dataclass(frozen=True)
class Target:
    """One model to test: a base or merged directory, perhaps with an adapter put on it unmerged.

    Attributes:
        label: Its name in the table.
        base_dir: The checked model directory.
        config: Its parsed config.json.
        adapter_dir: Directory of the adapter.
        load_in_4bit: Whether the layers are quantised to NF4 while loading.
        dtype: Of the weights that are not quantised, and of all activations.
        device: Where it runs.
    """

    label: str
    base_dir: Path
    config: dict
    adapter_dir: Path | None
    load_in_4bit: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def family(self) -> Family:
        """The model's family."""
        return detect_family(self.config, self.base_dir / "config.json")

    @property
    def weight_format(self) -> str:
        """The layers' weights: nf4, int4, int8, or the dtype's name."""
        bits = self.config.get("quantization_bit")
        return "nf4" if self.load_in_4bit else f"int{bits}" if bits else dtype_name(self.dtype)

    def load(self) -> PreTrainedModel:
        """Load the model; LoRA modules of an adapter lie inside it."""
        model = load_base_model(self.base_dir, self.load_in_4bit, self.dtype, {"": str(self.device)})
        if self.adapter_dir:
            model = load_adapter(model, self.adapter_dir).get_base_model()
        return model.eval()


def resolve_targets(
    model_paths: list[str], lora_paths: list[str], load_in_4bit: bool, dtype: str, device: torch.device
) -> list[Target]:
    """Find and check every model that is to be tested.

    Args:
        model_paths: Directories or hub ids of base or merged models.
        lora_paths: Adapter directories, each put on the base that it names.
        load_in_4bit: Quantise the layers to NF4.
        dtype: fp16, bf16, fp32, or auto: the checkpoint's on a GPU, fp32 on the CPU.
        device: Where they run.

    Raises:
        UserError: Nothing to test, a directory that is no model, or a quantised one with load_in_4bit.
    """
    if not model_paths and not lora_paths:
        raise UserError("nothing to test. Give --model_path DIR (or DIR1,DIR2,...) or --lora_path DIR, or both")
    found = [(path, resolve_checkpoint_dir(path), None) for path in model_paths]
    for path in lora_paths:
        adapter = read_adapter(Path(path).expanduser())
        found.append((path, find_base(adapter), adapter))
    names = Counter(short_name(path) for path, _, _ in found)
    targets = []
    for path, base_dir, adapter in found:
        config = check_checkpoint(base_dir)
        if load_in_4bit:
            check_unquantised(base_dir, config)
        name = short_name(path) if names[short_name(path)] == 1 else path
        label = f"{short_name(adapter.base_name)} + {name}" if adapter else name
        model_dtype = DTYPES.get(dtype) or auto_dtype(config, base_dir, device)
        adapter_dir = adapter.directory if adapter else None
        targets.append(Target(label, base_dir, config, adapter_dir, load_in_4bit, model_dtype, device))
    return targets


def short_name(path: str) -> str:
    """Return a directory's own name, or the last part of a hub id."""
    return os.path.basename(os.path.abspath(path))


def auto_dtype(config: dict, base_dir: Path, device: torch.device) -> torch.dtype:
    """Return the dtype of a checkpoint, or fp32 on the CPU, where half precision is slow.

    Args:
        config: The model's config.json.
        base_dir: Named in the error.
        device: Where it runs.

    Raises:
        UserError: The config names an unknown dtype.
    """
    if device.type == "cpu":
        return torch.float32
    found = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if found not in dtypes:
        raise UserError(f"{base_dir / 'config.json'}: dtype {found!r}. Give --dtype fp16, bf16 or fp32")
    return dtypes[found]


def dtype_name(dtype: torch.dtype) -> str:
    """Return fp16, bf16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def prompt_ids(tokenizer: PreTrainedTokenizer, text: str, num_tokens: int | None) -> list[int]:
    """Encode the prompt, its text repeated or cut until prompt and special tokens have the asked length.

    Args:
        tokenizer: The model's tokenizer.
        text: The question; control strings in it stay text.
        num_tokens: Length in tokens; None: as it is.

    Raises:
        UserError: A length with no room for text, or no text to repeat.
    """
    ids = tokenizer.encode_prompt(text)
    if num_tokens is None:
        return ids
    special = tokenizer.build_inputs_with_special_tokens([])
    body = [token for token in ids if token not in special]
    num_text = num_tokens - len(special)
    if num_text < 1 or not body:
        raise UserError(
            f"--prompt_tokens {num_tokens} with {len(body)} tokens of text: expected some text, and more than the "
            f"{len(special)} special tokens"
        )
    repeated = body * -(-num_text // len(body))
    return tokenizer.build_inputs_with_special_tokens(repeated[:num_text])


def check_context(target: Target, num_prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the new tokens.

    Args:
        target: The model.
        num_prompt_tokens: Length of the prompt, special tokens included.
        new_tokens: Tokens to generate.

    Raises:
        UserError: Prompt and new tokens exceed the model's context.
    """
    limit = target.config.get(target.family.max_length_key)
    if limit and num_prompt_tokens + new_tokens > limit:
        raise UserError(
            f"{target.label}: {num_prompt_tokens} prompt tokens and {new_tokens} new ones, its context holds {limit}. "
            "Shorten --instruction_text, or lower --prompt_tokens or --new_tokens"
        )


def check_fits(target: Target, batch_size: int, num_tokens: int, remedy: str) -> None:
    """Refuse a model that the free memory does not hold.

    Args:
        target: The model, not loaded.
        batch_size: Sequences at once.
        num_tokens: Prompt and new tokens of a sequence.
        remedy: What to give instead, for the error.

    Raises:
        UserError: The estimate exceeds what is free.
    """
    weights, cache = estimate_bytes(target, batch_size, num_tokens)
    free = free_bytes(target.device)
    if weights + cache > free:
        raise UserError(
            f"{target.label}: needs at least {(weights + cache) / 1e9:.2f} GB ({weights / 1e9:.2f} of weights as "
            f"{target.weight_format}, {cache / 1e9:.2f} of keys and values), {free / 1e9:.2f} GB are free on "
            f"{target.device}. Free some, or give {remedy}"
        )


def estimate_bytes(target: Target, batch_size: int, num_tokens: int) -> tuple[int, int]:
    """Return the bytes of weights and of keys and values, from the config alone.

    Args:
        target: The model, not loaded.
        batch_size: Sequences at once.
        num_tokens: Prompt and new tokens of a sequence.
    """
    classes = load_classes(target.family)
    with torch.device("meta"):
        model = classes.model(classes.config.from_dict(target.config))
    num_bytes = 0.0
    for name, tensor in model.state_dict().items():
        is_linear = tensor.dim() == 2 and name.split(".")[-2] in target.family.linear_names
        if target.load_in_4bit and is_linear:
            num_bytes += tensor.numel() * NF4_BYTES
        else:
            num_bytes += tensor.numel() * (target.dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
    if target.adapter_dir:
        pairs = read_adapter(target.adapter_dir).pairs.values()
        num_bytes += sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    config = model.config
    kv_channels = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(num_bytes), 2 * kv_channels * target.dtype.itemsize * batch_size * num_tokens


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; for the CPU, what the system can give without swapping."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
