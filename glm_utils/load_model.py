"""Load a base or merged checkpoint, optionally with a LoRA adapter, optionally quantized to NF4 while loading.

A model that does not fit into the free memory is refused from its config.json, before any weight is read.
"""

from __future__ import annotations  # peft is imported where it is used

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from glm_utils.adapter import Adapter, find_base, read_adapter, read_updates
from glm_utils.checkpoint import Checkpoint, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.device import as_dtype, dtype_name, free_bytes
from glm_utils.early_checks import check_model_choice
from glm_utils.hub import Hub
from glm_utils.loading_bar import bar_of_long_loads
from glm_utils.model_files.generation_checks import make_generation_config
from glm_utils.model_files.weight_checks import check_weights
from glm_utils.nf4_layers import keep_4bit_layout, layers_in_4bit
from glm_utils.prompt_text import log_prompt_text, recorded_prompt_text

if TYPE_CHECKING:
    import peft

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, uint8 absmax per 64 weights, fp32 per 256 absmax


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        label: Its name in tables and messages.
        checkpoint: The base or merged model.
        adapter: The adapter to put on it, or None.
        load_in_4bit: Whether the layers are quantized to NF4 while loading.
        dtype: Dtype of the weights that are not quantized, and of all activations.
        device: Device that it runs on.
    """

    label: str
    checkpoint: Checkpoint
    adapter: Adapter | None
    load_in_4bit: bool
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.checkpoint.require_streamable()
        if self.load_in_4bit:
            self.checkpoint.require_unquantized("--load_in_4bit quantizes fp16 weights: leave it out to use these")

    @property
    def weight_format(self) -> str:
        """Format of the layers' weights: nf4, int4, int8, or the dtype's name."""
        bits = self.checkpoint.quantization_bits
        return "nf4" if self.load_in_4bit else f"int{bits}" if bits else dtype_name(self.dtype)

    def load(self, merge_adapter: bool = False) -> PreTrainedModel | peft.PeftModel:
        """Load the model for evaluation.

        Args:
            merge_adapter: Merge the adapter into floating-point weights, which makes generation faster. It stays
                separate from NF4 weights, as merging would round it with them.

        Returns:
            A PeftModel if there is an adapter that was not merged.
        """
        model = load_base_model(self.checkpoint, self.load_in_4bit, self.dtype, {"": str(self.device)})
        if self.adapter:
            from glm_utils.adapter_layers import put_on  # here, as a merged model is loaded without peft

            model = put_on(model, self.adapter)
            if merge_adapter and not self.load_in_4bit:
                model = model.merge_and_unload()
        return model.eval()

    def estimate_bytes(self, batch_size: int, num_tokens: int) -> tuple[int, int]:
        """Return the bytes of the weights and of the KV cache, from the configuration alone.

        Args:
            batch_size: Number of sequences.
            num_tokens: Prompt and new tokens per sequence.
        """
        with torch.device("meta"):
            model = self.checkpoint.classes.model(self.checkpoint.model_config)
        num_bytes = 0.0
        for name, tensor in model.state_dict().items():
            is_linear = tensor.dim() == 2 and name.split(".")[-2] in self.checkpoint.family.linear_names
            if self.load_in_4bit and is_linear:
                num_bytes += tensor.numel() * NF4_BYTES
            else:
                num_bytes += tensor.numel() * (self.dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        if self.adapter:
            num_bytes += sum(pair.a.nbytes + pair.b.nbytes for pair in self.adapter.pairs.values())
        config = model.config
        kv_channels = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return int(num_bytes), 2 * kv_channels * self.dtype.itemsize * batch_size * num_tokens

    def check_fits(self, batch_size: int, num_tokens: int, remedy: str) -> None:
        """Refuse a model that does not fit into the free memory.

        Args:
            batch_size: Number of sequences.
            num_tokens: Prompt and new tokens per sequence.
            remedy: What to give instead, for the message.

        Raises:
            UserError: The estimate exceeds the free memory.
        """
        weights, cache = self.estimate_bytes(batch_size, num_tokens)
        free = free_bytes(self.device)
        if weights + cache > free:
            raise UserError(
                f"{self.label}: needs at least {(weights + cache) / 1e9:.2f} GB ({weights / 1e9:.2f} of weights as "
                f"{self.weight_format}, {cache / 1e9:.2f} of keys and values), {free / 1e9:.2f} GB are free on "
                f"{self.device}. Free some, or give {remedy}"
            )


def find_model(
    model_path: str | None, lora_path: str | None, hub: Hub = "huggingface"
) -> tuple[Checkpoint, Adapter | None]:
    """Open a base or merged model, or an adapter with the base that it names.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead.
        hub: Where to download a model from that is no directory.

    Raises:
        UserError: Neither is given, both are, or the model or adapter cannot be opened.
    """
    check_model_choice(model_path, lora_path)
    if model_path:
        checkpoint = open_checkpoint(model_path, hub)
        log_prompt_text(recorded_prompt_text(checkpoint.directory))
        return checkpoint, None
    adapter = read_adapter(Path(str(lora_path)).expanduser())
    return find_base(adapter, hub), adapter


def load_base_model(
    checkpoint: Checkpoint,
    load_in_4bit: bool = False,
    compute_dtype: str | torch.dtype = "fp32",
    device_map: str | dict | None = None,
    dtype: str | torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a base or merged model with this project's classes.

    Args:
        checkpoint: The model.
        load_in_4bit: Quantize the layers to NF4 with double quantization (bitsandbytes) while loading.
        compute_dtype: fp32, fp16, bf16 or a torch dtype; 4-bit weights are dequantized to it for each matmul.
        device_map: As in transformers.
        dtype: Dtype of the weights that are not quantized; None: compute_dtype.

    Raises:
        UserError: The weights do not match config.json.
    """
    quantization_config = None
    if load_in_4bit:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=as_dtype(compute_dtype),
        )
    with bar_of_long_loads(checkpoint):
        model, loading_info = checkpoint.classes.model.from_pretrained(
            checkpoint.directory,
            config=copy.deepcopy(checkpoint.model_config),  # from_pretrained writes into it
            dtype=as_dtype(dtype or compute_dtype),
            device_map=device_map,
            quantization_config=quantization_config,
            generation_config=make_generation_config(checkpoint.generation_settings, checkpoint.config_path),
            ignore_mismatched_sizes=True,  # reported below, with a remedy
            output_loading_info=True,
        )
    check_loaded_weights(checkpoint.directory, model, loading_info)
    keep_4bit_layout(model)
    return model


def check_loaded_weights(checkpoint_dir: Path, model: PreTrainedModel, loading_info: dict) -> None:
    """Refuse a model whose weights do not match its config.json: transformers only warns.

    Args:
        checkpoint_dir: The model's directory, for messages.
        model: The loaded model.
        loading_info: What `from_pretrained(output_loading_info=True)` returns.

    Raises:
        UserError: Weights that are missing, unexpected or of another shape.
    """
    kinds = ("missing", "mismatched", "unexpected")
    found = {kind: [str(key) for key in loading_info[f"{kind}_keys"]] for kind in kinds}
    # transformers silently accepts 4-bit weights of any shape, so they are compared here
    found["mismatched"] += [
        f"{name}.weight"
        for name, module in layers_in_4bit(model)
        if (state := getattr(module.weight, "quant_state", None)) is not None
        and tuple(state.shape) != (module.out_features, module.in_features)
    ]
    check_weights(checkpoint_dir, **found)


def load_adapter(model: PreTrainedModel, adapter_dir: Path) -> peft.PeftModel:
    """Read a LoRA adapter, including one of peft 0.4 (adapter_model.bin), and put it on a base model.

    Raises:
        UserError: Not an adapter of plain LoRA, or weights that do not fit the model.
    """
    from glm_utils.adapter_layers import put_on

    return put_on(model, read_updates(adapter_dir))
