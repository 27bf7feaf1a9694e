"""Models with random weights, made in memory: the speed of a model depends on its shapes alone."""

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from glm_utils.nf4_layers import keep_4bit_layout


def random_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Make a frozen model in evaluation mode, with the weights and buffers of its class' own initialization.

    Args:
        model_class: The class.
        config: Its configuration.
        dtype: Of all parameters.
        device: Where they are made; on a GPU 6B size takes seconds.
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return model_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default_dtype)


def quantize_to_nf4(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Quantize all Linear modules but lm_head to NF4 with double quantization, as bitsandbytes loads them.

    Args:
        model: Any causal language model; changed in place, one Linear at a time.
        compute_dtype: Of the matmuls.
    """
    lm_head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and linear is not lm_head:
                setattr(parent, name, nf4_linear(linear, compute_dtype))
    keep_4bit_layout(model)
    model.is_loaded_in_4bit = True  # peft chooses its LoRA layers by this


def nf4_linear(linear: nn.Linear, compute_dtype: torch.dtype) -> bitsandbytes.nn.Linear4bit:
    """Return a Linear4bit with the quantized weight and the bias of a Linear, on its device."""
    weight = linear.weight
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype, True, "nf4", device="meta"
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    ).to(weight.device)  # quantizes
    packed.bias = linear.bias
    return packed.train(linear.training)


def add_random_lora(model: PreTrainedModel, targets: list[str], rank: int = 8) -> PreTrainedModel:
    """Add LoRA layers with random weights to a model, unmerged, in the dtype that peft loads an adapter in.

    Args:
        model: The base; changed in place.
        targets: Names of the adapted Linear modules.
        rank: Rank of the matrices.
    """
    config = peft.LoraConfig(
        r=rank, lora_alpha=32, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).get_base_model().eval().requires_grad_(False)


def compacted(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to the CPU and back to its device, so that the freed memory goes back to the driver.

    The allocator cannot return a block in which a quantized weight took the place of a larger one: without this, the
    memory reserved while running would be that of the unquantized weights.
    """
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model.to(device)
