"""Dequantize bitsandbytes' NF4 weights in one pass over memory: a Triton kernel on CUDA, otherwise bitsandbytes.

bitsandbytes dequantizes the absmax of the blocks in separate kernels and reaches half of the memory bandwidth; a
training step dequantizes every weight twice.

Shapes: N out features, K in features.
"""

import functools
import sys
import types

import bitsandbytes
import torch

from glm_utils.family import FAMILIES
from glm_utils.remote_code import remote_code

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCKSIZE = 64  # weights that share an absmax
ABSMAX_BLOCKSIZE = 256  # absmax values that share an absmax of their own, with double quantization
BLOCKS_PER_PROGRAM, NUM_WARPS = 32, 1

if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        packed, code, absmax, absmax_code, absmax2, offset, out, num_blocks,
        NESTED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_BYTES: tl.constexpr, ABSMAX_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Dequantize BLOCKS blocks of BLOCK_BYTES bytes; a byte holds two weights, the first in its high half."""
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        if NESTED:  # the absmax is quantized too: a code per block, a scale per ABSMAX_BLOCK blocks, one offset
            index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
            absmax_scale = tl.load(absmax2 + block // ABSMAX_BLOCK, mask=inside, other=0)
            scale = tl.load(absmax_code + index) * absmax_scale + tl.load(offset)
        else:
            scale = tl.load(absmax + block, mask=inside, other=0)
        byte_offsets = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
        byte = tl.load(packed + byte_offsets, mask=inside[:, None], other=0).to(tl.int32)
        values = tl.join(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * scale[:, None, None]
        values = tl.reshape(values, (BLOCKS, 2 * BLOCK_BYTES))
        out_offsets = block[:, None] * 2 * BLOCK_BYTES + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
        tl.store(out + out_offsets, values, mask=inside[:, None])


@functools.cache
def kernels_door() -> types.ModuleType:
    """Load kernels_chatglm.py, which decides where kernels run; the file is byte-identical for both families.

    So CHATGLM_DISABLE_KERNELS=triton holds here too, and so does an entry of its OVERRIDES.
    """
    triton_takes = remote_code("kernels_chatglm.triton_takes", FAMILIES[0].remote_dir)
    return sys.modules[triton_takes.__module__]


def dequantize_nf4(packed: torch.Tensor, state: bitsandbytes.functional.QuantState) -> torch.Tensor:
    """Return a weight (N, K) in the dtype that its state names.

    Args:
        packed: The weight's data, uint8.
        state: Its quantization state.
    """
    absmax_state = state.state2 if state.nested else None
    is_supported = (
        state.quant_type == "nf4"
        and state.blocksize == BLOCKSIZE
        and (absmax_state is None or absmax_state.blocksize == ABSMAX_BLOCKSIZE)
        and packed.numel() % (BLOCKSIZE // 2) == 0
        and packed.dtype == torch.uint8
        and packed.is_contiguous()
    )
    if not (is_supported and kernels_door().triton_takes(packed)):
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    num_blocks = packed.numel() // (BLOCKSIZE // 2)
    nested = (absmax_state.code, absmax_state.absmax, state.offset) if absmax_state else (state.absmax,) * 3
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)](
            packed, state.code, state.absmax, *nested, out, num_blocks,
            NESTED=absmax_state is not None, BLOCKS=BLOCKS_PER_PROGRAM, BLOCK_BYTES=BLOCKSIZE // 2,
            ABSMAX_BLOCK=ABSMAX_BLOCKSIZE, num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # as in bitsandbytes, an absmax is rounded after its multiplication and its sum
        )  # fmt: skip
    return out
