"""The number format that a run computes in, and what the Trainer is told of it."""

import torch
from loguru import logger

from glm_utils.cli import UserError
from glm_utils.training.training_args import TrainArgsFile


def uses_gpu(args_file: TrainArgsFile) -> bool:
    """Return whether a run with this file uses a GPU."""
    return torch.cuda.is_available() and not args_file.values.get("use_cpu")


def resolve_compute_dtype(compute_dtype: str, args_file: TrainArgsFile) -> str:
    """Resolve auto: the file's fp16 or bf16, else bf16 on a GPU that supports it, else fp32.

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


def precision_settings(args_file: TrainArgsFile, compute_dtype: str) -> dict[str, object]:
    """Return the TrainingArguments that follow from the number format and the hardware.

    On a GPU fp16 turns on mixed precision, for its loss scaling. With bf16 all frozen weights are bf16 already and the
    LoRA matmuls cast by themselves, so autocast would only add casts and stays off. On a CPU either affects only the
    4-bit matmuls.

    Args:
        args_file: The checked JSON file.
        compute_dtype: fp32, fp16 or bf16.

    Raises:
        UserError: The number format contradicts the file or the hardware.
    """
    values, on_gpu = args_file.values, uses_gpu(args_file)
    overrides: dict[str, object] = {}
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
    return overrides
