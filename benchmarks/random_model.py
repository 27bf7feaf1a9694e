"""Models with random weights, made in memory: the speed of a model depends on its shapes alone."""

import bitsandbytes
import peft
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from glm_utils.checkpoint import keep_4bit_layout


def random_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Make a frozen model in evaluation mode: weights and buffers are those of its class' own initialisation.

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


def replace_linears(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Quantise all Linear modules but the output layer to NF4 with double quantisation, as bitsandbytes loads them.

    Args:
        model: Any causal language model; changed in place, one Linear at a time.
        compute_dtype: Of the products.
    """
    output_layer = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and linear is not output_layer:
                setattr(parent, name, nf4_linear(linear, compute_dtype))
    keep_4bit_layout(model)
    model.is_loaded_in_4bit = True  # peft chooses its LoRA layers by this


def nf4_linear(linear: nn.Linear, compute_dtype: torch.dtype) -> bitsandbytes.nn.Linear4bit:
    """Return a Linear4bit with the quantised weight and the bias of a Linear, on its device."""
    weight = linear.weight
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype, True, "nf4", device="meta"
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    ).to(weight.device)  # quantises
    packed.bias = linear.bias
    return packed.train(linear.training)


def add_random_lora(model: PreTrainedModel, targets: list[str], rank: int = 8) -> PreTrainedModel:
    """Put LoRA layers with random weights into a model, unmerged, in the dtype that peft loads an adapter in.

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
    """Move a model away and back.

    The allocator cannot return a block in which a quantised weight took the place of a larger one: without this, the
    memory reserved while running would be that of the unquantised weights.

    Args:
        model: The model, on the device.
        device: The device.
    """
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model.to(device)
