"""The one door to every optional kernel: who computes this input, a kernel or plain torch?

(This file is byte-identical in both families' directories and imports none of its siblings.)

Each kernel has a reference in plain torch that computes the same on any device. Which of the two runs is decided here
and nowhere else; the kernels themselves stand in the files that launch them:

    triton   fused_chatglm.py (SwiGLU, rotary embedding, cross-entropy) and quantization.py (int8 and int4 weights)
    nvrtc    cuda_kernels.py: CUDA C++ that is compiled when it is first used, for generation token by token
    varlen   attention_chatglm.py: torch's variable-length attention, for packed batches

To compare with the reference, or to get around a kernel that misbehaves on some machine, set before Python starts

    CHATGLM_DISABLE_KERNELS=nvrtc,varlen      some of the three
    CHATGLM_DISABLE_KERNELS=all               all of them

A test sets ``OVERRIDES[name]``: False forces the reference, True the kernel, even where it would not be chosen.
"""

import ctypes
import functools
import os
import sys

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

VARIABLE = "CHATGLM_DISABLE_KERNELS"
KERNELS = ("triton", "nvrtc", "varlen")


def read_overrides(value: str) -> dict[str, bool]:
    """Read the environment variable: name -> False for every kernel that it disables.

    Raises:
        ValueError: A name that is not in KERNELS.
    """
    names = [name.strip() for name in value.split(",") if name.strip()]
    if unknown := set(names) - {"all", *KERNELS}:
        raise ValueError(f"{VARIABLE}={value}: {sorted(unknown)} not known, expected 'all' or any of {list(KERNELS)}")
    return dict.fromkeys(KERNELS if "all" in names else names, False)


OVERRIDES: dict[str, bool] = read_overrides(os.environ.get(VARIABLE, ""))


def triton_takes(x: torch.Tensor) -> bool:
    """Return whether the fused Triton kernels compute with this tensor."""
    return OVERRIDES.get("triton", triton is not None and x.is_cuda and x.dtype != torch.float64)


def triton_takes_quantized(x: torch.Tensor) -> bool:
    """Return whether the Triton kernels multiply these activations by int8 and int4 weights."""
    if "triton" in OVERRIDES:
        return OVERRIDES["triton"]
    if triton is None or not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(x.device) >= ((7, 5) if x.dtype == torch.float16 else (8, 0))


def varlen_takes(query: torch.Tensor) -> bool:
    """Return whether torch's variable-length attention takes these queries, (tokens, heads, head_dim)."""
    if "varlen" in OVERRIDES:
        return OVERRIDES["varlen"]
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def nvrtc_runs_on(device: torch.device) -> bool:
    """Return whether the CUDA C++ kernels run on a device.

    They need a CUDA build of PyTorch, its NVRTC, and compute capability 8.0 (mma.m16n8k16 and bf16).
    """
    if "nvrtc" in OVERRIDES:
        return OVERRIDES["nvrtc"]
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        cuda_libraries()
    except OSError:
        return False
    return True


@functools.cache
def cuda_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Open the CUDA driver and NVRTC, which PyTorch's CUDA builds bring along.

    Raises:
        OSError: One of them is not there.
    """
    major = (torch.version.cuda or "0").split(".")[0]
    on_windows = sys.platform == "win32"
    driver = ctypes.CDLL("nvcuda.dll" if on_windows else "libcuda.so.1")
    return driver, ctypes.CDLL(f"nvrtc64_{major}0_0.dll" if on_windows else f"libnvrtc.so.{major}")


def jit(kernel):
    """Leave a Triton kernel to be compiled at its first launch; without Triton nobody launches it."""
    return triton.jit(kernel) if triton else kernel
