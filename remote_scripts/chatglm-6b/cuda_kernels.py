"""Compile and launch the CUDA C++ kernels of cuda_source.py (this file is byte-identical in both directories).

Shapes: M rows of x (one per sequence), N out, K in, R LoRA rank, B batch, H query heads, G key/value heads,
D head_dim, S cache slots, C hidden.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch

from .cuda_source import SOURCE
from .kernels_chatglm import cuda_libraries

FORMATS = {"float": 0, "int8": 1, "int4": 2, "nf4": 3}
EPILOGUES = {"store": 0, "residual": 1, "swiglu": 2, "gelu": 3}
MAX_BATCH = 16
MIN_KEYS_PER_BLOCK = 256
MAX_CLUSTER = 8  # blocks; what CUDA grants on every GPU that has clusters
OVERLAP_CAPABILITY = (9, 0)  # programmatic dependent launch, clusters


@dataclass(frozen=True)
class Tuning:
    """How matvec is compiled and launched for a format.

    Attributes:
        warps: Warps of a block; they share K.
        depth: 16-byte loads in flight per row and lane.
        min_blocks: Blocks per multiprocessor that the registers must allow.
        blocks_per_sm: The most blocks launched per multiprocessor, each taking several tiles.
        row_tiles: Tiles of 16 rows of W that a warp works on at once, sharing the reads of x.
    """

    warps: int
    depth: int
    min_blocks: int
    blocks_per_sm: int
    row_tiles: int = 1

    def defines(self) -> tuple[str, ...]:
        """Return the macros of the compilation."""
        names = {"WARPS": self.warps, "DEPTH": self.depth, "MIN_BLOCKS": self.min_blocks, "ROW_TILES": self.row_tiles}
        return (*(f"{name}={value}" for name, value in names.items()), *COMMON_DEFINES)


COMMON_DEFINES = (f"MIN_KEYS={MIN_KEYS_PER_BLOCK}",)


def tuning(kind: str, row_tiles: int, num_tiles: int, num_sms: int) -> Tuning:
    """Choose the tuning of a matmul, as measured on an H200 (benchmarks/notes_inference.md).

    Args:
        kind: The weight's format.
        row_tiles: 1 for up to 8 rows of x, 2 for up to 16.
        num_tiles: Tiles of 16 rows of the weight.
        num_sms: Multiprocessors of the GPU.
    """
    few = num_tiles <= (3 if row_tiles == 1 else 2) * num_sms
    if kind == "float" or few:
        return Tuning(16, 1, 2, 2)
    if kind == "nf4" and row_tiles == 2:
        return Tuning(8, 1, 2, 2, row_tiles=2)
    if kind == "int8" and row_tiles == 1:
        return Tuning(8, 1, 4, 4, row_tiles=2)
    return Tuning(8, 1, 3, 3, row_tiles=2)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the CUDA driver API, with an integer value."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of the CUDA driver API."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
NF4_TABLE_BYTES = 256 * 32 * 4


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with status {status}; use_cuda_graph=False avoids these kernels")


def compile_cubin(nvrtc: ctypes.CDLL, name: str, arch: str, defines: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
    """Compile one instance of a kernel.

    Args:
        nvrtc: The library.
        name: A template instance, e.g. matvec<2, 0, 1, 0>.
        arch: sm_90 and the like.
        defines: Macros, NAME=VALUE.

    Returns:
        The cubin and the kernel's mangled name.

    Raises:
        RuntimeError: With the compiler's log.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"chatglm.cu", 0, None, None), "nvrtcCreate"
    )
    _check(nvrtc.nvrtcAddNameExpression(program, name.encode()), "nvrtcAddNameExpression")
    options = [f"-arch={arch}", "-std=c++17", *(f"-D{define}" for define in defines)]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile for {arch}:\n{log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    cubin, mangled = ctypes.create_string_buffer(size.value), ctypes.c_char_p()
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    _check(nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)), "nvrtcGetLoweredName")
    result = cubin.raw, bytes(mangled.value)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result


class _Kernel:
    """A compiled kernel on one device.

    Args:
        name: A template instance, e.g. matvec<2, 0, 1, 0>.
        device: Where it runs.
        defines: Macros of the compilation.
    """

    def __init__(self, name: str, device: torch.device, defines: tuple[str, ...]):
        self.driver, nvrtc = cuda_libraries()
        self.device = device
        major, minor = torch.cuda.get_device_capability(device)
        self.overlaps = (major, minor) >= OVERLAP_CAPABILITY
        cubin, mangled = compile_cubin(nvrtc, name, f"sm_{major}{minor}", defines)
        self.function, module = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the context current
            _check(self.driver.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
            status = self.driver.cuModuleGetFunction(ctypes.byref(self.function), module, mangled)
            _check(status, "cuModuleGetFunction")
            status = self.driver.cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED_BYTES, NF4_TABLE_BYTES)
            _check(status, "cuFuncSetAttribute")

    def launch(self, grid: tuple[int, int, int], num_threads: int, *arguments, shared_bytes: int = 0) -> None:
        """Launch on the device's current stream; arguments are ctypes values."""
        attribute = _Attribute(id=PROGRAMMATIC_LAUNCH, value=1)
        config = _LaunchConfig(
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(num_threads, 1, 1),
            shared_bytes=shared_bytes,
            stream=torch.cuda.current_stream(self.device).cuda_stream,
            attributes=ctypes.pointer(attribute),
            num_attributes=int(self.overlaps),
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        with torch.cuda.device(self.device):
            status = self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None)
        _check(status, "cuLaunchKernelEx")


@functools.cache
def _kernel(name: str, device: torch.device, defines: tuple[str, ...]) -> _Kernel:
    return _Kernel(name, device, defines)


class _MatvecArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "residual", "lora_b", "lora_t", "out")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "lora_rank", "float_out")),
        ("alpha", ctypes.c_float),
    ]


class _DecodeAttentionArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv",
                "keys",
                "values",
                "cos",
                "sin",
                "positions",
                "starts",
                "length",
                "partial",
                "counters",
                "out",
            )
        ),
        *((name, ctypes.c_int) for name in ("num_heads", "num_kv_heads", "slots")),
        ("scaling", ctypes.c_float),
    ]


@dataclass
class Weight:
    """A Linear in the form in which matvec reads it.

    Attributes:
        kind: A key of FORMATS.
        data: The stored weight: [N, K] in the activations' dtype, int8 [N, K], int4 [N, K/2] or NF4, two to a byte.
        shape: (N, K).
        scale: int8 and int4: fp16 [N]. NF4: fp16, the 16 code values, then the N * K / 64 block maxima.
        bias: [N] in the activations' dtype, or None.
        lora_a: [R, K] in the activations' dtype, or None.
        lora_b: [N, R], times the LoRA scale.
    """

    kind: str
    data: torch.Tensor
    shape: tuple[int, int]
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None


def fits(kind: str, shape: tuple[int, int]) -> bool:
    """Say whether matvec can read a weight of this format and shape: rows of whole 16-byte words."""
    return shape[1] % {"float": 8, "int8": 16, "int4": 32, "nf4": 64}[kind] == 0


def matvec(
    x: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    epilogue: str = "store",
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    lora_t: torch.Tensor | None = None,
) -> None:
    """Multiply by a weight.

    Args:
        x: [M, K], fp16 or bf16, contiguous, M up to MAX_BATCH.
        weight: The weight; `fits` says which.
        out: [M, N], or [M, N/2] after swiglu; the dtype of x, or fp32. Overwritten.
        epilogue: store; residual: alpha * residual + y; swiglu: silu(first half) * second half; gelu (tanh).
        residual: [M, N].
        alpha: Factor on the residual.
        lora_t: fp32 [M, R], room for x @ A.T; needed by a weight with LoRA.
    """
    (rows, columns), bf16 = weight.shape, int(x.dtype == torch.bfloat16)
    if weight.lora_a is not None:
        matvec(x, Weight("float", weight.lora_a, tuple(weight.lora_a.shape)), lora_t)
    arguments = _MatvecArgs(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        scale=_pointer(weight.scale),
        bias=_pointer(weight.bias),
        residual=_pointer(residual),
        lora_b=_pointer(weight.lora_b),
        lora_t=_pointer(lora_t),
        out=out.data_ptr(),
        m=x.shape[0],
        n=rows,
        k=columns,
        lora_rank=0 if weight.lora_b is None else weight.lora_b.shape[1],
        float_out=int(out.dtype == torch.float32),
        alpha=alpha,
    )
    row_tiles = 1 if x.shape[0] <= 8 else 2
    name = f"matvec<{FORMATS[weight.kind]}, {bf16}, {row_tiles}, {EPILOGUES[epilogue]}>"
    num_tiles, num_sms = -(-rows // 16), _num_sms(x.device)
    chosen = tuning(weight.kind, row_tiles, num_tiles, num_sms)
    num_blocks = min(-(-num_tiles // chosen.row_tiles), chosen.blocks_per_sm * num_sms)
    shared_bytes = NF4_TABLE_BYTES if weight.kind == "nf4" else 0
    kernel = _kernel(name, x.device, chosen.defines())
    kernel.launch((num_blocks, 1, 1), chosen.warps * 32, arguments, shared_bytes=shared_bytes)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
    """Normalize rows [M, C], C a multiple of 8 up to 16384: RMSNorm, or LayerNorm with a bias; out is overwritten."""
    kernel = _kernel(f"norm<{int(x.dtype == torch.bfloat16)}, {int(bias is not None)}>", x.device, COMMON_DEFINES)
    pointers = (ctypes.c_void_p(_pointer(tensor)) for tensor in (x, weight, bias, out))
    kernel.launch((x.shape[0], 1, 1), 512, *pointers, ctypes.c_int(x.shape[1]), ctypes.c_float(eps))


def decode_attention(
    qkv: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    starts: torch.Tensor,
    length: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    two_d: bool,
) -> None:
    """Attend with one new token per sequence, and store its key and value in slot `length` of the cache.

    Args:
        qkv: The fused projection: (B, (H + 2 G) D) blocked, or with two_d (B, H 3 D) head by head.
        cache: Keys and values, each (B, G, S, D); slots behind the new one are not read.
        rotary: cos and sin of every position, each (positions, D / 4), in the dtype of qkv.
        positions: int32 (B, 2), the token's two positions; the second is used with two_d.
        starts: int32 (B,), the first slot that is not padding.
        length: int32 (1,), the number of filled slots.
        scratch: What `attention_scratch` returned: fp32 room, and zeroed counters, which are left zero.
        out: (B, H D); overwritten.
        two_d: ChatGLM-6B's rotary embedding and layout.
    """
    keys, values = cache
    batch, num_kv_heads, slots, head_dim = keys.shape
    arguments = _DecodeAttentionArgs(
        qkv=qkv.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        cos=rotary[0].data_ptr(),
        sin=rotary[1].data_ptr(),
        positions=positions.data_ptr(),
        starts=starts.data_ptr(),
        length=length.data_ptr(),
        partial=scratch[0].data_ptr(),
        counters=scratch[1].data_ptr(),
        out=out.data_ptr(),
        num_heads=out.shape[1] // head_dim,
        num_kv_heads=num_kv_heads,
        slots=slots,
        scaling=head_dim**-0.5,
    )
    name = f"decode_attention<{int(qkv.dtype == torch.bfloat16)}, {head_dim}, {int(two_d)}>"
    cluster, splits = _attention_blocks(batch, num_kv_heads, slots, qkv.device)
    kernel = _kernel(name, qkv.device, (*COMMON_DEFINES, f"CLUSTER={cluster}"))
    kernel.launch((splits * cluster, num_kv_heads, batch), 128, arguments)


def attention_scratch(
    batch: int, num_kv_heads: int, slots: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the buffers in which `decode_attention` combines its splits; calls on one stream may share them."""
    splits = _attention_blocks(batch, num_kv_heads, slots, device)[1]
    partial = torch.empty(batch * num_kv_heads * splits * 16 * (head_dim + 2), dtype=torch.float32, device=device)
    return partial, torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=device)


def _attention_blocks(batch: int, num_kv_heads: int, slots: int, device) -> tuple[int, int]:
    """Choose how many blocks share the keys of a sequence: blocks of a cluster, and clusters.

    Both grow until the GPU is full twice. Joining clusters costs several us, so that each block takes
    MIN_KEYS_PER_BLOCK first.
    """
    full = -(-2 * _num_sms(device) // (batch * num_kv_heads))
    cluster = min(MAX_CLUSTER, 1 << (full.bit_length() - 1)) if _has_clusters(device) else 1
    return cluster, max(1, min(full // cluster, -(-slots // (MIN_KEYS_PER_BLOCK * cluster))))


@functools.cache
def _num_sms(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_clusters(device) -> bool:
    return torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
