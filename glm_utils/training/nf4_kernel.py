"""Decode bitsandbytes' NF4 weights in one pass over memory: a Triton kernel on CUDA, else bitsandbytes itself.

bitsandbytes decodes the block maxima in kernels of their own and reaches half of the memory's speed; a training step
decodes every weight twice.

Shapes: N out features, K in features.
"""

import bitsandbytes
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 64  # weights that share a maximum
MAXIMA = 256  # maxima that share one of their own
BLOCKS_PER_PROGRAM, NUM_WARPS = 32, 1

if triton is not None:

    @triton.jit
    def _decode_kernel(
        packed, code, maxima, maxima_code, maxima_scale, offset, out, num_blocks,
        NESTED: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Decode BLOCKS blocks of 2 HALF weights; a byte holds two, the first in its high half."""
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        if NESTED:
            entry = tl.load(maxima + block, mask=inside, other=0).to(tl.int32)
            scale = tl.load(maxima_scale + block // GROUP, mask=inside, other=0)
            largest = tl.load(maxima_code + entry) * scale + tl.load(offset)
        else:
            largest = tl.load(maxima + block, mask=inside, other=0)
        place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
        byte = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
        values = tl.join(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * largest[:, None, None]
        values = tl.reshape(values, (BLOCKS, 2 * HALF))
        target = block[:, None] * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + target, values, mask=inside[:, None])


def has_triton(packed: torch.Tensor) -> bool:
    """Return whether the kernel can take this tensor."""
    return triton is not None and packed.is_cuda


def dequantize_nf4(packed: torch.Tensor, state: bitsandbytes.functional.QuantState) -> torch.Tensor:
    """Return a weight (N, K) in the dtype that its state names.

    Args:
        packed: uint8, the weight's data.
        state: Its quantisation state.
    """
    second = state.state2 if state.nested else None
    is_usual = state.quant_type == "nf4" and state.blocksize == BLOCK and packed.numel() % (BLOCK // 2) == 0
    is_usual = is_usual and (second is None or second.blocksize == MAXIMA)
    is_usual = is_usual and packed.dtype == torch.uint8 and packed.is_contiguous()
    if not (has_triton(packed) and is_usual):
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    num_blocks = packed.numel() // (BLOCK // 2)
    nested = (second.code, second.absmax, state.offset) if second else (state.absmax,) * 3
    with torch.cuda.device_of(packed):
        _decode_kernel[(triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)](
            packed, state.code, state.absmax, *nested, out, num_blocks,
            NESTED=second is not None, BLOCKS=BLOCKS_PER_PROGRAM, HALF=BLOCK // 2, GROUP=MAXIMA,
            num_warps=NUM_WARPS, enable_fp_fusion=False,  # product and sum of a maximum are rounded as there
        )  # fmt: skip
    return out
