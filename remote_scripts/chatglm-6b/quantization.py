"""Row-wise int8 and int4 weights for ChatGLM-6B and ChatGLM2-6B (this file is byte-identical in both directories).

The arithmetic
    Weight-only, symmetric, one scale per output row, no zero point, no groups, activations untouched:
        W[n, k] ~ codes[n, k] * scale[n]        y = x @ (codes * scale[:, None]).T + bias
    int8 codes lie in -127..127 as published, int4 codes in -7..7. -128 and -8 are read as well.

The memory layout (state-dict keys `<linear>.weight`, `<linear>.weight_scale`, `<linear>.bias`)
    int8   weight int8 [N, K], scale fp16 [N].
    int4   weight int8 [N, K/2]; byte j of a row holds column 2j in its high nibble and column 2j+1 in its low nibble,
           both two's complement:  byte = (q[2j] & 15) << 4 | (q[2j+1] & 15).
    An fp16 or bf16 model keeps its scales in fp16, an fp32 model in fp32; a scale is never rounded to bf16, whose 8
    bits would shift a whole row by up to 0.4 %. Scale 0 marks a row of zeros.

How a scale is chosen
    absmax   max|row| / (2^(bits-1) - 1), as published: the largest weight sets the step of the whole row.
    search   the scale, of either sign, of least squared error sum((w - scale * q)^2) with q clipped to -8..7 (int8:
             -128..127). With q fixed the error is a parabola in the scale with its minimum at <w,q> / <q,q>. So: a
             geometric grid of scales of both signs, a finer grid around the best, then minimum and rounding in turn.
             A candidate is rounded to the stored dtype before it is judged, absmax is among the candidates, so the
             result is never worse. Squared relative error on Gaussian rows of 4096: absmax int4 0.0246, search 0.0116.
             The search takes 46 passes over the weights: seconds for 6 billion weights on a GPU, minutes on a CPU.

The trade
    bitsandbytes NF4 (blocks of 64) loses less (0.0085) but takes 4.13 bits per weight with double quantization against
    4.004 here, and no published ChatGLM code reads it. This layout needs one multiplication per row, which can be
    applied after the reduction over K, and plain torch suffices: no compiler, no prebuilt binary, any device.

How a matmul is computed
    Where kernels_chatglm.py lets Triton take the activations, a matmul with few rows of them reads the packed weight
    once and never writes it dequantized: up to MATVEC_ROWS rows on the plain arithmetic units, up to MATMUL_ROWS on
    the matrix units. More rows (a prompt, a training step) are multiplied by cuBLAS with a copy that a kernel
    dequantizes, DEQUANTIZED_BYTES at a time. All kernels sum in fp32 and apply the row's scale once, after the sum.
    Anything else (a CPU, fp32, no Triton) takes the reference. The tiles are fixed, so nothing is tuned at start;
    Triton keeps compiled kernels on disk.

Order of this file: inverse pairs in plain torch (the reference), the choice of scales, the Triton kernels, the
dispatcher, the autograd function, the modules, and the two functions that put the modules into a model.

Shapes: N out features, K in features, M rows of activations, W words of a stored row, V vocabulary, C hidden size,
* any leading dimensions.
Source: the layout of THUDM/chatglm-6b-int4, THUDM/chatglm-6b-int8 and THUDM/chatglm2-6b-int4.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import nn

from .kernels_chatglm import jit, tl, triton, triton_takes_quantized

QUANTIZED_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the Linear modules of a layer
CPU_CHUNK = 2**18  # weights searched at once, per thread: 1 MB of fp32 stays in a core's L2
GPU_CHUNK = 2**26  # 256 MB keep a GPU busy
GRID_POINTS = 14  # scales tried per sign, geometrically from the absmax scale down to the lowest
FINE_POINTS = 6  # scales tried on either side of the best one, between its neighbors on the grid
REFINE_STEPS = 3  # rounds of (round to codes, exact minimum)
LOWEST_RMS_INT4 = 0.2  # the lowest int4 scale in units of rms(row); the best is 0.335 on Gaussian rows, more on others
LOWEST_ABSMAX_INT8 = 0.7  # the lowest int8 scale in units of the absmax scale; clipping hardly pays at 255 levels
MATVEC_ROWS = 2  # rows up to which plain arithmetic units do it: 57 us per layer for 2 rows; matrix units 62 for 4
MATMUL_ROWS = 32  # rows up to which dequantizing in registers wins: 130 us per layer, to memory 256; 64: 276, 264
DEQUANTIZED_BYTES = 64 * 2**20  # of a weight that is dequantized for many rows: more is dequantized in parts


def check_bits(bits: int) -> int:
    """Return bits when the layout knows it.

    Args:
        bits: The width of a weight, 4 or 8.

    Raises:
        ValueError: For any other width.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantization bits are 4 or 8, not {bits!r}")
    return bits


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes -8..7 (int8, [*, K]) two to a byte, the even column in the high nibble: int8 [*, K/2].

    Raises:
        ValueError: When K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"int4 packs two columns to a byte, so the in features must be even, not {codes.shape[-1]}")
    return (codes[..., 0::2] << 4) | (codes[..., 1::2] & 15)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Undo pack_int4: int8 bytes [*, K/2] -> int8 codes -8..7 [*, K]."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)  # int8 >> keeps the sign


def unpack(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return one int8 code per weight, [*, K], of a stored int8 or int4 weight."""
    return unpack_int4(weight) if check_bits(bits) == 4 else weight


def dequantize_rows(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a stored weight.

    Code times scale is rounded once, whatever the dtype: both together have 8 + 11 bits, fewer than fp32 holds.

    Args:
        weight: int8 [*, K] or packed int4 [*, K/2].
        scale: One scale per row, [*].
        bits: 4 or 8.
        dtype: The floating dtype of the result.

    Returns:
        The weight in dtype, [*, K].
    """
    multiply_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    codes = unpack(weight, bits).to(multiply_dtype)
    return codes.mul_(scale.to(multiply_dtype).unsqueeze(-1)).to(dtype)


def quantize_rows(
    weight: torch.Tensor, bits: int, method: str = "search", scale_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight row by row on the device it is on.

    Args:
        weight: Floating [N, K], any strides.
        bits: 4 or 8.
        method: "search" (least squared error) or "absmax" (as published).
        scale_dtype: The dtype of the scales; by default fp32 for an fp32 weight, else fp16.

    Returns:
        The stored weight, int8 [N, K] or packed int4 [N, K/2], and the scales [N].

    Raises:
        ValueError: For an unknown width or method, a weight that is not a floating matrix, odd K at 4 bits, NaN or
            infinite weights, and weights that fp16 does not hold (over 65504).
    """
    check_bits(bits)
    if method not in ("search", "absmax"):
        raise ValueError(f"method is 'search' or 'absmax', not {method!r}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a floating matrix [out, in], found {weight.dtype} {list(weight.shape)}")
    if bits == 4 and weight.shape[1] % 2:
        raise ValueError(f"int4 packs two columns to a byte, so the in features must be even, not {weight.shape[1]}")
    scale_dtype = scale_dtype or (torch.float32 if weight.dtype == torch.float32 else torch.float16)
    choose = _search_rows if method == "search" else _absmax_rows
    chunk = CPU_CHUNK * torch.get_num_threads() if weight.device.type == "cpu" else GPU_CHUNK
    stored, scales = [], []
    for rows in weight.detach().split(max(1, chunk // max(1, weight.shape[1]))):
        codes, scale = choose(rows, bits, scale_dtype)
        stored.append(pack_int4(codes) if bits == 4 else codes)
        scales.append(scale)
    return torch.cat(stored), torch.cat(scales)


def _absmax_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return max|row| / (2^(bits-1) - 1) in fp32, [N, 1], after the checks that both methods share."""
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.numel() else rows.new_zeros(rows.shape[0], 1)
    bad = largest[~(largest <= torch.finfo(torch.float16).max)]  # NaN compares false
    if bad.numel():
        raise ValueError(f"cannot quantize a weight of {bad[0].item()}: expected finite numbers that float16 holds")
    return largest.float() / (2 ** (bits - 1) - 1)


def _storable(scale: torch.Tensor, scale_dtype: torch.dtype, bits: int) -> torch.Tensor:
    """Round fp32 scales to the stored dtype; none becomes 0 there, or overflows when dequantized; 0 stays 0."""
    info = torch.finfo(scale_dtype)
    least_subnormal = info.smallest_normal * info.eps
    magnitude = scale.abs().clamp(min=least_subnormal, max=info.max / 2 ** (bits - 1))
    return torch.where(scale == 0, 0.0, magnitude.copysign(scale)).to(scale_dtype)


def _absmax_rows(rows: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows as published, in the weight's own dtype (bf16: in fp32): codes int8 [N, K], scale [N]."""
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    limit = 2 ** (bits - 1)
    scale = _storable(_absmax_scale(rows, bits), scale_dtype, bits)
    divisor = torch.where(scale == 0, 1.0, scale).to(rows.dtype)
    codes = torch.round(rows / divisor).clamp_(-limit, limit - 1)
    return codes.to(torch.int8), scale.flatten()


def _search_rows(rows: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows with the scales of least squared error: codes int8 [N, K], scale [N]."""
    rows = rows.float().contiguous()
    highest = _absmax_scale(rows, bits)
    best = _ScaleSearch(rows, bits, scale_dtype)
    if bits == 4:
        lowest = torch.minimum(LOWEST_RMS_INT4 * rows.square().mean(dim=1, keepdim=True).sqrt(), highest)
    else:
        lowest = LOWEST_ABSMAX_INT8 * highest
    ratio = torch.where(lowest == 0, 1.0, highest / lowest) ** (1 / (GRID_POINTS - 1))
    for point in range(GRID_POINTS):
        best.offer(highest / ratio**point)
        best.offer(-highest / ratio**point)
    center = best.scale
    for point in range(1, FINE_POINTS + 1):
        factor = ratio ** (point / (FINE_POINTS + 1))
        best.offer(center * factor)
        best.offer(center / factor)
    for _ in range(REFINE_STEPS):
        best.offer(best.minimum())
    return best.codes(best.scale).to(torch.int8), best.scale.flatten().to(scale_dtype)


class _ScaleSearch:
    """The best scale met so far of each row of a chunk, starting from 0.

    Attributes:
        rows: The weights, fp32 [N, K].
        scale: fp32 [N, 1], values that the stored dtype holds exactly.
        error: The squared error of each row with that scale, fp32 [N, 1].
    """

    def __init__(self, rows: torch.Tensor, bits: int, scale_dtype: torch.dtype):
        self.rows, self.bits, self.scale_dtype = rows, bits, scale_dtype
        self.scale = torch.zeros(rows.shape[0], 1, device=rows.device)
        self.error = torch.linalg.vecdot(rows, rows).unsqueeze(1)

    def codes(self, scale: torch.Tensor) -> torch.Tensor:
        """Return round(rows / scale) clipped to the width, in fp32 [N, K]; a scale of 0 gives codes 0."""
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        limit = 2 ** (self.bits - 1)
        return (self.rows * inverse).round_().clamp_(-limit, limit - 1)

    def offer(self, scale: torch.Tensor) -> None:
        """Keep a scale [N, 1] in the rows where it lowers the squared error."""
        scale = _storable(scale, self.scale_dtype, self.bits).float()
        residual = torch.addcmul(self.rows, self.codes(scale), scale, value=-1)
        error = torch.linalg.vecdot(residual, residual).unsqueeze(1)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.error = torch.where(better, error, self.error)

    def minimum(self) -> torch.Tensor:
        """Return the scale of least error for the codes of the best scale, <w,q> / <q,q>, [N, 1]."""
        codes = self.codes(self.scale)
        numerator = torch.linalg.vecdot(self.rows, codes).unsqueeze(1)
        denominator = torch.linalg.vecdot(codes, codes).unsqueeze(1)
        return torch.where(denominator == 0, 0.0, numerator / denominator)


# Whether kernels may hold PTX, the assembly language of NVIDIA's GPUs: AMD's and Triton's interpreter know none.
_PTX = triton and tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")


@jit
def _column(word, COLUMN: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of one column of int32 words, in fp32.

    Keep the code's bits where they are in the word, flip its sign bit and set an exponent: in fp32 that is
    code + 2^(BITS - 1) + 2^(23 - at), so one subtraction leaves the code and no integer has to be converted. Both
    bitwise steps are one instruction, which the assembler does not find by itself: with it the four matmuls of a
    ChatGLM2-6B layer take 45.3 us on an H200, with two instructions 51.7.
    """
    shift: tl.constexpr = COLUMN * 8 if BITS == 8 else COLUMN // 2 * 8 + 4 - COLUMN % 2 * 4
    down: tl.constexpr = 0 if shift + BITS <= 23 else 16  # into the 23 bits of a fraction
    at: tl.constexpr = shift - down
    mask: tl.constexpr = ((1 << BITS) - 1) << at
    flip: tl.constexpr = (127 + 23 - at) << 23 | 1 << (at + BITS - 1)
    word = word >> down
    if _PTX:
        args = [word, tl.full((), mask, tl.int32), tl.full((), flip, tl.int32)]
        asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0x6a;"
        word = tl.inline_asm_elementwise(asm, "=r,r,r,r", args, dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = (word & mask) ^ flip
    return word.to(tl.float32, bitcast=True) - (2.0 ** (23 - at) + 2 ** (BITS - 1))


@jit
def _columns(word, COLUMN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr):
    """Unpack words [*, W] of C columns in order, fp32 [*, W * C / STEP]: COLUMN, COLUMN + STEP, ... of each word."""
    if STEP == C:
        return _column(word, COLUMN, BITS)
    else:
        even = _columns(word, COLUMN, STEP * 2, BITS, C)
        return tl.interleave(even, _columns(word, COLUMN + STEP, STEP * 2, BITS, C))


@jit
def _add_columns(acc, x, word, COLUMN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr):
    """Add x [M, W * C / STEP] times those columns of word [N, W] to acc [M, N, W]: each word has a sum of its own."""
    if STEP == C:
        return acc + _column(word, COLUMN, BITS)[None, :, :] * x.to(tl.float32)[:, None, :]
    else:
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        acc = _add_columns(acc, even, word, COLUMN, STEP * 2, BITS, C)
        return _add_columns(acc, odd, word, COLUMN + STEP, STEP * 2, BITS, C)


@jit
def _store_scaled(y, acc, scale, bias, m, n, M, N):
    """Scale a sum [M, N] by row, add the bias and store it."""
    acc *= tl.load(scale + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@jit
def _quantized_matvec_kernel(
    x, weight, scale, bias, y, M, N, W,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply a few rows without matrix units: a program owns BLOCK_N rows of the weight and the whole of K."""
    C: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // BITS
    BLOCK_W: tl.constexpr = BLOCK_K // C
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w, k = tl.arange(0, BLOCK_W)[None, :], tl.arange(0, BLOCK_K)[None, :]
    # Rows past the end read the last one again: they are not stored, and no load needs a mask for them.
    weight += tl.minimum(n, N - 1)[:, None].to(tl.int64) * W
    x += tl.minimum(m, M - 1)[:, None] * (W * C)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W), tl.float32)
    for start in tl.range(0, W, BLOCK_W, num_stages=STAGES):
        word = tl.load(weight + (start + w), mask=start + w < W, other=0).to(tl.int32)
        tile = tl.load(x + (start * C + k), mask=start * C + k < W * C, other=0)
        acc = _add_columns(acc, tile, word, 0, 1, BITS, C)
    _store_scaled(y, tl.sum(acc, axis=2), scale, bias, m, n, M, N)


@jit
def _quantized_matmul_kernel(
    x, weight, scale, bias, y, M, N, W,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """Multiply up to BLOCK_M rows on matrix units: each warp sums its own slices of K, so that small N fills a GPU."""
    C: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // BITS
    GROUP: tl.constexpr = min(C, 4)
    BLOCK_W: tl.constexpr = BLOCK_K // C
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slices = tl.arange(0, SLICES)[:, None, None]
    w = slices * BLOCK_W + tl.arange(0, BLOCK_W)[None, None, :]
    k = tl.arange(0, BLOCK_W * GROUP)[None, None, :]
    k = slices * BLOCK_K + k // GROUP * C + k % GROUP  # the first GROUP columns of each word
    weight += tl.minimum(n, N - 1)[None, :, None].to(tl.int64) * W
    x += tl.minimum(m, M - 1)[None, :, None] * (W * C)
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, W, SLICES * BLOCK_W, num_stages=STAGES):
        word = tl.load(weight + (start + w), mask=start + w < W, other=0).to(tl.int32)
        # GROUP neighboring columns of every word make one tile of codes; k picks the same columns of x.
        for first in tl.static_range(0, C, GROUP):
            column = start * C + first + k
            tile = tl.load(x + column, mask=column < W * C, other=0)
            codes = _columns(word, first, 1, BITS, GROUP).to(tile.dtype)
            acc = tl.dot(codes, tl.trans(tile, (0, 2, 1)), acc)
    _store_scaled(y, tl.trans(tl.sum(acc, axis=0)), scale, bias, m, n, M, N)


@jit
def _dequantize_rows_kernel(
    weight, scale, out, N, W, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Dequantize a tile of a stored weight."""
    C: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // BITS
    BLOCK_W: tl.constexpr = BLOCK_K // C
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    word = tl.load(weight + n * W + w, mask=(n < N) & (w < W), other=0).to(tl.int32)
    row_scale = tl.load(scale + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + n * (W * C) + k, _columns(word, 0, 1, BITS, C) * row_scale, mask=(n < N) & (k < W * C))


# (bits, BLOCK_M): rows and columns of a tile of the weight, warps. The best of a sweep over ChatGLM2-6B's four shapes
# on an H200, among those whose shared memory fits every GPU from compute capability 7.5 (64 KB).
_TILES = {
    (4, 1): (8, 1024, 2),
    (4, 2): (8, 1024, 2),
    (4, 8): (16, 256, 2),
    (4, 16): (32, 128, 4),
    (4, 32): (32, 64, 4),
    (8, 1): (8, 1024, 4),
    (8, 2): (8, 512, 2),
    (8, 8): (16, 256, 2),
    (8, 16): (16, 128, 4),
    (8, 32): (32, 128, 2),
}


def _words(weight: torch.Tensor) -> torch.Tensor:
    """View a stored weight [N, bytes] as int32 words, [N, bytes / 4], or as bytes where rows are ragged."""
    weight = weight.contiguous()
    return weight.view(torch.int32) if weight.shape[1] % 4 == 0 and weight.data_ptr() % 4 == 0 else weight


def quantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply at most MATMUL_ROWS rows by a stored weight in Triton, without gradients.

    Args:
        x: fp16 or bf16 activations [*, K] on a GPU.
        weight: int8 [N, K] or packed int4 [N, K/2].
        scale: [N].
        bits: 4 or 8.
        bias: [N] or None.

    Returns:
        [*, N] in the dtype of x, rounded once.

    Raises:
        ValueError: When x has another number of columns than the weight.
    """
    if x.shape[-1] * bits != weight.shape[1] * 8:
        raise ValueError(f"expected {weight.shape[1] * 8 // bits} columns of activations, found {x.shape[-1]}")
    x, words = x.contiguous(), _words(weight)
    num_rows, num_outputs = x.shape[:-1].numel(), len(weight)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    on_matrix_units = num_rows > MATVEC_ROWS
    block_m = max(8 if on_matrix_units else 1, triton.next_power_of_2(num_rows))
    block_n, block_k, num_warps = _TILES[bits, block_m]
    kernel = _quantized_matmul_kernel if on_matrix_units else _quantized_matvec_kernel
    slices = {"SLICES": num_warps} if on_matrix_units else {}
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_outputs, block_n),)](
            x, words, scale, bias, y, num_rows, num_outputs, words.shape[1],
            BITS=bits, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3, num_warps=num_warps, **slices,
        )  # fmt: skip
    return y


def triton_dequantize_rows(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Do in one Triton kernel what dequantize_rows does for a weight [N, K] or [N, K/2]."""
    words = _words(weight)
    out = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype, device=weight.device)
    tile = {"BLOCK_N": 4, "BLOCK_K": 1024}
    grid = triton.cdiv(out.shape[0], tile["BLOCK_N"]), triton.cdiv(out.shape[1], tile["BLOCK_K"])
    with torch.cuda.device_of(weight):
        _dequantize_rows_kernel[grid](words, scale, out, *words.shape, BITS=bits, **tile)
    return out


def _dequantized(weight: torch.Tensor, scale: torch.Tensor, bits: int, x: torch.Tensor) -> torch.Tensor:
    """Dequantize a stored weight to the dtype of x, [N, K], with the kernel where it takes x."""
    dequantize = triton_dequantize_rows if triton_takes_quantized(x) else dequantize_rows
    return dequantize(weight, scale, bits, x.dtype)


def linear_in_parts(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by a weight that is dequantized some rows at a time, so that a wide one is never there at once.

    Arguments and result are those of `quantized_linear`, [*, K] -> [*, N], but the bias has the dtype of x and nothing
    gets a gradient.
    """
    num_parts = -(-len(weight) * x.shape[-1] * x.element_size() // DEQUANTIZED_BYTES)
    if num_parts <= 1:
        return F.linear(x, _dequantized(weight, scale, bits, x), bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    flat, columns = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
    rows, multiply = -(-len(weight) // num_parts), torch.mm if bias is None else torch.addmm
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        bias_part = () if bias is None else (bias[part],)
        # Written where it belongs, and no name holds a dequantized part while the next is made.
        multiply(*bias_part, flat, _dequantized(weight[part], scale[part], bits, x).T, out=columns[:, part])
    return out


def quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a stored weight, by whichever implementation takes x.

    Args:
        x: Floating activations [*, K].
        weight: int8 [N, K] or packed int4 [N, K/2].
        scale: [N].
        bits: 4 or 8.
        bias: [N] or None.

    Returns:
        [*, N] in the dtype of x. Gradients flow to x and bias; the weight is frozen.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return QuantizedMatMul.apply(x, weight, scale, bits, None if bias is None else bias.to(x.dtype))


class QuantizedMatMul(torch.autograd.Function):
    """y = x @ dequantized(weight).T + bias; backward dequantizes again instead of keeping the dequantized weight."""

    @staticmethod
    def forward(ctx, x, weight, scale, bits, bias):
        """Compute [*, K] -> [*, N] on the packed weight when x has few rows, else on a dequantized copy."""
        ctx.bits = bits
        ctx.save_for_backward(weight, scale)
        if triton_takes_quantized(x) and 0 < x.shape[:-1].numel() <= MATMUL_ROWS:
            return quantized_matmul(x, weight, scale, bits, bias)
        return linear_in_parts(x, weight, scale, bits, bias)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of x, [*, K], and bias, [N]."""
        weight, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dequantized(weight, scale, ctx.bits, grad)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return grad_x, None, None, None, grad_bias


class _QuantizedWeight(nn.Module):
    """A stored weight [rows, columns] and its scales: buffers, so no optimizer sees them and int8 survives casts."""

    def __init__(self, rows: int, columns: int, bits: int, device, dtype):
        super().__init__()
        check_bits(bits)
        if bits == 4 and columns % 2:
            raise ValueError(f"int4 packs two columns to a byte, so the in features must be even, not {columns}")
        dtype = dtype or torch.get_default_dtype()
        self.bits = bits
        stored_columns = columns // 2 if bits == 4 else columns
        self.register_buffer("weight", torch.zeros(rows, stored_columns, dtype=torch.int8, device=device))
        scale_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=scale_dtype, device=device))

    def _apply(self, fn, recurse=True):
        before = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype == torch.bfloat16:  # see the header: never round a scale to bf16
            self.weight_scale = before.to(device=self.weight_scale.device, dtype=torch.float16)
        return self

    def store(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take over a stored weight and its scales; shapes must agree."""
        if weight.shape != self.weight.shape or scale.shape != self.weight_scale.shape:
            raise ValueError(
                f"expected weight {list(self.weight.shape)} and scale {list(self.weight_scale.shape)}, "
                f"found {list(weight.shape)} and {list(scale.shape)}"
            )
        self.weight, self.weight_scale = weight, scale


class QuantizedLinear(_QuantizedWeight):
    """A Linear with a frozen int8 or int4 weight, created empty; [*, K] -> [*, N] in the dtype of the input.

    Args:
        in_features: K, even at 4 bits.
        out_features: N.
        bits: 4 or 8.
        bias: Whether there is a bias [N].
        device: Where the tensors are made.
        dtype: The model's dtype (bias; scales stay fp16 under bf16).
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True, device=None, dtype=None):
        """Make the module empty, in its stored shape."""
        super().__init__(out_features, in_features, bits, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, method: str = "search", device=None) -> QuantizedLinear:
        """Quantize a Linear on device (default: its own); the result lies where the Linear was and shares its bias."""
        weight = linear.weight.detach()
        module = cls(linear.in_features, linear.out_features, bits, False, "meta", weight.dtype)
        stored, scale = quantize_rows(weight.to(device or weight.device), bits, method)
        module.store(stored.to(weight.device), scale.to(weight.device))
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias, [*, K] -> [*, N]."""
        return quantized_linear(x, self.weight, self.weight_scale, self.bits, self.bias)

    def extra_repr(self) -> str:
        """Name the sizes in the module's printed form."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class QuantizedEmbedding(_QuantizedWeight):
    """An Embedding with a frozen int8 or int4 weight (chatglm-6b-int4-qe), created empty; ids [*] -> [*, C].

    Args:
        num_embeddings: V.
        embedding_dim: C, even at 4 bits.
        bits: 4 or 8.
        device: Where the tensors are made.
        dtype: The model's dtype, that of the result.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, device=None, dtype=None):
        """Make the module empty, in its stored shape."""
        super().__init__(num_embeddings, embedding_dim, bits, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        follows_casts = torch.zeros(0, dtype=dtype, device=device)
        self.register_buffer("_dtype_of", follows_casts, persistent=False)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, bits: int, method: str = "search", device=None
    ) -> QuantizedEmbedding:
        """Quantize an Embedding on device (default: its own); the result lies where the Embedding was."""
        weight = embedding.weight.detach()
        module = cls(embedding.num_embeddings, embedding.embedding_dim, bits, weight.device, weight.dtype)
        stored, scale = quantize_rows(weight.to(device or weight.device), bits, method)
        module.store(stored.to(weight.device), scale.to(weight.device))
        return module.train(embedding.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Dequantize only the rows asked for, [*] -> [*, C]."""
        return dequantize_rows(self.weight[ids], self.weight_scale[ids], self.bits, self._dtype_of.dtype)


def insert_quantized_linears(layers: nn.Module, bits: int) -> int:
    """Put empty QuantizedLinear modules in place of the Linear modules of every layer, before weights are loaded.

    Args:
        layers: Any module that holds the layers.
        bits: 4 or 8.

    Returns:
        How many were replaced.
    """
    targets = _find_linears(layers)
    for parent, name, linear in targets.values():
        has_bias, weight = linear.bias is not None, linear.weight
        empty = QuantizedLinear(linear.in_features, linear.out_features, bits, has_bias, weight.device, weight.dtype)
        setattr(parent, name, empty)
    return len(targets)


def quantize(model: nn.Module, bits: int, method: str = "search", device=None, quantize_embeddings: bool = False):
    """Quantize the four Linear modules of every layer in place and note it in the config.

    Args:
        model: A ChatGLM model in fp16, bf16 or fp32.
        bits: 4 or 8.
        method: "search" (least squared error) or "absmax" (as published).
        device: Where the scales are searched; by default the weight's own GPU, else the first GPU, else the CPU.
        quantize_embeddings: Also quantize the input embeddings and give the output layer their stored weight (its own
            is dropped, as published for ChatGLM-6B; ChatGLM2-6B was never published so).

    Returns:
        The model; unchanged when it holds weights of this width already.

    Raises:
        ValueError: When the model is quantized to another width or by bitsandbytes, carries adapters, holds no Linear
            to quantize, or has a weight that quantize_rows refuses (the message names it).
    """
    check_bits(bits)
    if present := {module.bits for module in model.modules() if isinstance(module, QuantizedLinear)}:
        if present == {bits}:
            return model
        raise ValueError(f"the model holds {sorted(present)}-bit weights: load its fp16 checkpoint to get {bits} bits")
    targets = _find_linears(model)
    if not targets:
        raise ValueError(f"found none of the Linear modules {', '.join(QUANTIZED_LINEARS)} in {type(model).__name__}")
    for path, (_, _, linear) in targets.items():
        if type(linear) is not nn.Linear:
            kind = f"{type(linear).__module__}.{type(linear).__name__}"
            raise ValueError(f"cannot quantize {path}, a {kind}: load the model in fp16 or fp32, its adapters merged")
    for path, (parent, name, linear) in targets.items():
        where = _search_device(linear.weight, device)
        try:
            setattr(parent, name, QuantizedLinear.from_linear(linear, bits, method, where))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if quantize_embeddings:
        source = model.get_input_embeddings()
        embedding = QuantizedEmbedding.from_embedding(source, bits, method, _search_device(source.weight, device))
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(output_layer_of(embedding))
    if hasattr(model, "config"):
        model.config.quantization_bit = bits
        if quantize_embeddings:
            model.config.quantization_embeddings = True
    return model


def output_layer_of(embedding: QuantizedEmbedding) -> QuantizedLinear:
    """Return an output layer, [*, C] -> [*, V], with the stored weight of embedding.

    It is a copy (267 MB at ChatGLM-6B's size in int4): checkpoints hold both keys, and transformers neither ties two
    buffers that a checkpoint holds nor saves two names of one tensor.
    """
    layer = QuantizedLinear(embedding.embedding_dim, embedding.num_embeddings, embedding.bits, False, "meta")
    layer.store(embedding.weight.clone(), embedding.weight_scale.clone())
    return layer


def _find_linears(root: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Module]]:
    """Return path -> (parent, name, module) of all modules below root named in QUANTIZED_LINEARS."""
    return {
        f"{path}.{name}".lstrip("."): (parent, name, child)
        for path, parent in root.named_modules()
        for name, child in parent.named_children()
        if name in QUANTIZED_LINEARS
    }


def _search_device(weight: torch.Tensor, device) -> torch.device:
    """Return the device to search on: the one asked for, else the weight's own, else the first GPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda") if weight.device.type == "cpu" and torch.cuda.is_available() else weight.device
