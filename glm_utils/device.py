"""Devices and dtypes: the device that a flag names, its free memory, and errors that say memory ran out."""

import contextlib
from collections.abc import Callable, Iterator

import psutil
import torch

from glm_utils.cli import UserError
from glm_utils.early_checks import check_device_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """Turn the --device flag into a device.

    Args:
        device: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises:
        UserError: A device that is not there, or a name that is not one of these.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    check_device_name(device)
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices. Use auto or cpu")
    return resolved


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of fp32, fp16 or bf16; a torch dtype is returned as it is."""
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return fp16, bf16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; for the CPU, what is available without swapping."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error reports a failed allocation, on the GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


@contextlib.contextmanager
def out_of_memory_explained(message: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    Args:
        message: Returns the line, once it is needed.

    Raises:
        UserError: The GPU or the host ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message()) from error
