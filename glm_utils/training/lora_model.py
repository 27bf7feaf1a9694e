"""The model that QLoRA trains: LoRA weights, new or those of an adapter, on a 4-bit base."""

import copy
import os

import peft
import torch
from transformers import TrainingArguments, set_seed

from glm_utils.adapter import Adapter
from glm_utils.adapter_layers import copy_weights, lora_scales
from glm_utils.checkpoint import Checkpoint
from glm_utils.load_model import load_base_model
from glm_utils.training.lora_flags import check_lora_settings
from glm_utils.training.lora_matmul import use_lean_matmuls


def make_lora_config(rank: int, alpha: int, dropout: float, targets: list[str]) -> peft.LoraConfig:
    """Check the LoRA settings and put them into peft's form.

    Args:
        rank: Rank of A and B, 1 or more.
        alpha: 1 or more; the update B @ A is scaled by alpha / rank.
        dropout: Dropout before A, from 0 to below 1.
        targets: Names of the modules to adapt.

    Raises:
        UserError: A value out of range.
    """
    check_lora_settings(rank, alpha, dropout)
    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )


def continued_lora_config(adapter: Adapter, dropout: float, targets: list[str]) -> peft.LoraConfig:
    """Return the LoRA settings of an adapter for a run that trains it further.

    Args:
        adapter: The adapter.
        dropout: Dropout before A.
        targets: The modules that it adapts, by name or path.
    """
    return peft.LoraConfig(
        **lora_scales(adapter), lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )


def use_expandable_segments() -> None:
    """Let the allocator resize its segments: batches differ in tokens, so blocks of one do not fit the next."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def make_lora_model(
    base: Checkpoint,
    compute_dtype: str,
    lora_config: peft.LoraConfig,
    training_args: TrainingArguments,
    init_adapter: Adapter | None = None,
) -> peft.PeftModel:
    """Load the base in 4 bit and add LoRA weights in fp32.

    The weights that are not quantized (embedding, norms, output layer) are frozen and have the compute dtype: peft's
    prepare_model_for_kbit_training would always make them fp32, 1 GB more at 6B size. On a CPU they are fp32.

    Args:
        base: The base model.
        compute_dtype: fp32, fp16 or bf16.
        lora_config: Settings of LoRA.
        training_args: Their seed determines the initial LoRA weights.
        init_adapter: Whose weights they begin with instead; None: new ones.
    """
    on_gpu = training_args.device.type == "cuda"
    if on_gpu:
        use_expandable_segments()
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"}
    model = load_base_model(base, True, compute_dtype, device, dtype=None if on_gpu else "fp32")
    model.name_or_path = base.name  # peft writes it into adapter_config.json
    set_seed(training_args.seed)
    peft_model = peft.get_peft_model(model, copy.deepcopy(lora_config))  # peft shortens long lists of targets in place
    if init_adapter:
        copy_weights(init_adapter, peft_model)
    use_lean_matmuls(peft_model)
    return peft_model
