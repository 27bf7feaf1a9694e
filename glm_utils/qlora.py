"""QLoRA's own settings: LoRA on a 4-bit base, and which number formats go together."""

import os
from pathlib import Path

import peft
import torch
from loguru import logger
from transformers import TrainingArguments, set_seed

from glm_utils.checkpoint import load_base_model
from glm_utils.cli import UserError
from glm_utils.lora_product import use_lean_products
from glm_utils.training_args import TrainArgsFile

DEFAULT_SEED = 42


def check_lora_settings(rank: int, alpha: int, dropout: float) -> None:
    """Check the numbers of `make_lora_config`.

    Raises:
        UserError: A value out of range.
    """
    if rank < 1:
        raise UserError(f"--lora_rank={rank}: expected 1 or more")
    if alpha < 1:
        raise UserError(f"--lora_alpha={alpha}: expected 1 or more")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout={dropout}: expected 0 to below 1")


def make_lora_config(rank: int, alpha: int, dropout: float, targets: list[str]) -> peft.LoraConfig:
    """Check the LoRA settings.

    Args:
        rank: Rank of the matrices.
        alpha: The product is multiplied by alpha / rank.
        dropout: Dropout before the matrices.
        targets: Module names.

    Raises:
        UserError: A value out of range.
    """
    check_lora_settings(rank, alpha, dropout)
    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )


def uses_gpu(args_file: TrainArgsFile) -> bool:
    """Return whether a run with this file uses a GPU."""
    return torch.cuda.is_available() and not args_file.values.get("use_cpu")


def resolve_compute_dtype(compute_dtype: str, args_file: TrainArgsFile) -> str:
    """Return what auto stands for: the file's fp16 or bf16, else bf16 on a GPU that has it, else fp32.

    Args:
        compute_dtype: auto, fp32, fp16 or bf16.
        args_file: The checked JSON file.
    """
    if compute_dtype != "auto":
        return compute_dtype
    has_bf16 = uses_gpu(args_file) and torch.cuda.is_bf16_supported(including_emulation=False)
    given = [dtype for dtype in ("fp16", "bf16") if args_file.values.get(dtype)]
    resolved = given[0] if given else "bf16" if has_bf16 else "fp32"
    logger.info(f"--compute_dtype auto: {resolved}")
    return resolved


def make_training_args(
    args_file: TrainArgsFile, seed: int | None, compute_dtype: str, has_eval: bool, packing: bool
) -> TrainingArguments:
    """Build the TrainingArguments of a run.

    On a GPU fp16 turns on mixed precision, for its loss scaling. With bf16 all frozen weights are bf16 already and the
    LoRA products cast by themselves, so autocast would only add casts and is left off. On a CPU either changes the
    4-bit products only.

    Args:
        args_file: The checked JSON file.
        seed: Wins over the file's seed; None: the file's, else 42.
        compute_dtype: fp32, fp16 or bf16.
        has_eval: Whether there is evaluation data.
        packing: Whether rows are laid end to end. Else batches are made of rows of like length.

    Raises:
        UserError: Settings that contradict each other or the hardware.
    """
    values, overrides = args_file.values, {}
    on_gpu = uses_gpu(args_file)
    for dtype, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if values.get(other) and compute_dtype == dtype:
            raise UserError(f"--compute_dtype {dtype} contradicts {other} in {args_file.path}. Give one of them")
    wants_bf16 = compute_dtype == "bf16" or values.get("bf16")
    if on_gpu and wants_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16. Use fp16 or fp32 instead")
    if not on_gpu and values.get("fp16"):
        raise UserError(f"{args_file.path}: fp16 needs a GPU for its loss scaling. Delete the line, or set bf16")
    if not on_gpu and compute_dtype == "fp16":
        logger.warning("--compute_dtype fp16 is several times slower than bf16 or fp32 on a CPU")
    if on_gpu and compute_dtype != "fp32":
        overrides |= {"bf16": False, "fp16": compute_dtype == "fp16"}
    if on_gpu:  # the next batch is copied while the GPU computes
        overrides["accelerator_config"] = values.get("accelerator_config") or {"non_blocking": True}
    else:
        overrides["use_cpu"] = True
    if not has_eval and (values.get("eval_strategy", "no") != "no" or values.get("eval_on_start")):
        raise UserError(f"{args_file.path}: eval_strategy asks for evaluation. Give --eval_data_path, or set it to no")
    if packing and values.get("neftune_noise_alpha"):
        raise UserError(
            f"{args_file.path}: neftune_noise_alpha scales its noise by the length of a row, and a packed batch is "
            "one long row. Give --packing=false, or delete the line"
        )
    if not packing and "train_sampling_strategy" not in values:
        overrides["train_sampling_strategy"] = "group_by_length"
    if "ddp_find_unused_parameters" not in values:  # every LoRA weight takes part in every batch
        overrides["ddp_find_unused_parameters"] = False
    overrides["seed"] = values.get("seed", DEFAULT_SEED) if seed is None else seed
    training_args = args_file.build(**overrides, label_names=["labels"])
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise UserError(f"{args_file.path}: {name} is {getattr(training_args, name)}, expected 1 or more")
    if not 0 <= training_args.seed < 2**32:
        raise UserError(f"seed {training_args.seed}: expected 0 to {2**32 - 1}")
    if training_args.n_gpu > 1:  # the Trainer would wrap the 4-bit model into DataParallel, which cannot copy it
        logger.warning(f"1 of {training_args.n_gpu} GPUs is used; for all of them: torchrun --nproc_per_node N ...")
        training_args._n_gpu = 1
    return training_args


def use_expandable_segments() -> None:
    """Let the allocator cut its memory anew: batches differ in tokens, and the blocks of one do not fit the next."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def make_lora_model(
    base_dir: Path, base_name: str, compute_dtype: str, lora_config: peft.LoraConfig, training_args: TrainingArguments
) -> peft.PeftModel:
    """Load the base in 4 bit and put fresh LoRA weights (fp32) on it.

    The weights that stay unquantised (embedding, norms, output layer) are frozen and have the compute dtype: peft's
    prepare_model_for_kbit_training would make them fp32 in any case, 1 GB more at 6B size. On a CPU they are fp32.

    Args:
        base_dir: The base model's directory.
        base_name: Directory or hub id that the adapter names as its base.
        compute_dtype: fp32, fp16 or bf16.
        lora_config: Settings of LoRA.
        training_args: Their seed fixes the LoRA weights.
    """
    on_gpu = training_args.device.type == "cuda"
    if on_gpu:
        use_expandable_segments()
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"}
    model = load_base_model(base_dir, True, compute_dtype, device, dtype=None if on_gpu else "fp32")
    model.name_or_path = base_name  # peft writes it into adapter_config.json
    set_seed(training_args.seed)
    peft_model = peft.get_peft_model(model, lora_config)
    use_lean_products(peft_model)
    return peft_model
