"""The arithmetic of a merge on one weight: the update in fp32, one rounding to fp16, the round trip through NF4.

Weights are processed in slices of rows, so that fp32 copies stay small.
"""

import math

import bitsandbytes.functional
import torch

from glm_utils.adapter import LoraPair
from glm_utils.cli import UserError

SLICE_ROWS = 1024  # rows in fp32 at a time: 17 to 56 MB at 6B size
NF4_BLOCK = 64


def to_fp16(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Round a floating-point tensor to fp16; `name` is for errors.

    Raises:
        UserError: A value is NaN, infinite or beyond the range of fp16.
    """
    rounded = tensor if tensor.dtype == torch.float16 else tensor.half()
    check_finite(rounded, name)
    return rounded


def add_update(weight: torch.Tensor, pair: LoraPair, name: str) -> torch.Tensor:
    """Return fp16(weight + scale * B @ A), the sum in fp32, of a weight [out, in] of any dtype; `name` is for errors.

    Raises:
        UserError: A sum is NaN, infinite or beyond the range of fp16.
    """
    a, b = pair.a.to(weight.device), pair.b.to(weight.device)
    merged = torch.empty(weight.shape, dtype=torch.float16, device=weight.device)
    # One fp32 buffer for all slices: a full fp32 copy would take twice the memory of the fp16 weight
    buffer = torch.empty(SLICE_ROWS, weight.shape[1], device=weight.device)
    for start in range(0, weight.shape[0], SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        part = buffer[: weight[rows].shape[0]].copy_(weight[rows])
        merged[rows] = part.addmm_(b[rows], a, alpha=pair.scale)
    check_finite(merged, name)
    return merged


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Check that a floating-point tensor holds neither NaN nor infinity, from an fp16 overflow or a broken base.

    Raises:
        UserError: It holds one.
    """
    if not tensor.numel():
        return
    # aminmax propagates NaN, and is 50 times faster than isfinite in fp16 on a CPU
    lowest, highest = torch.stack(torch.aminmax(tensor)).tolist()
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise UserError(f"{name}: values from {lowest} to {highest}, expected finite numbers that fp16 holds")


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a weight to NF4 with double quantization and dequantize it, as `Linear4bit` does.

    Args:
        weight: fp32, fp16 or bf16 [out, in]; the result has the same dtype.
    """
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return bitsandbytes.functional.dequantize_4bit(packed, state)
