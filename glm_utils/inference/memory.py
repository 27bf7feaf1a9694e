"""Measure what generation needs, on a GPU or on the CPU: bytes of weights, copy bandwidth, peak memory."""

import contextlib
import gc
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from glm_utils.cli import UserError
from glm_utils.device import free_bytes
from glm_utils.inference.timer import make_clock

if sys.platform != "win32":
    import resource

MAX_FAST_BATCH = 16  # of the CUDA kernels; on a CPU more brings nothing
MAX_FORWARD_BATCH = 64  # of a GPU without them, where launches take the time
MEMORY_SHARE = 0.9  # of the free memory
GROWTH = 1.5  # while a cache doubles, the old one is there too
COPY_BYTES = 1 << 30  # far beyond any cache
NUM_COPIES = 10
PEAK_RESET = Path("/proc/self/clear_refs")  # "5" resets the peak RSS. Source: Linux, proc_pid_clear_refs(5)


def copy_bandwidth(device: torch.device, free: int) -> float:
    """Return the bytes per second, read plus written, of the fastest of several copies of a large tensor.

    Args:
        device: Where to copy.
        free: Free bytes there; at most a quarter of them is used.

    Raises:
        UserError: Almost nothing is free.
    """
    num_bytes = min(COPY_BYTES, free // 8)
    if num_bytes < 1:
        raise UserError(f"{device}: no memory is free. Stop the processes that use it")
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target, clock = torch.zeros_like(source), make_clock(device)
    clock.start()
    for _ in range(NUM_COPIES):
        target.copy_(source)
        clock.mark()
    moments = clock.seconds()
    return 2 * num_bytes / min(later - earlier for earlier, later in itertools.pairwise(moments))


def stored_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers and the scales that bitsandbytes keeps beside 4-bit weights, each once."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        yield tensor
        if quant_state := getattr(tensor, "quant_state", None):
            yield from (part for part in quant_state.as_dict().values() if isinstance(part, torch.Tensor))


def weight_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's weights and buffers."""
    return sum(tensor.nbytes for tensor in stored_tensors(module))


def bytes_read_per_step(model: PreTrainedModel, batch_size: int) -> int:
    """Return how many bytes of weights one generation step reads, which adds a token to each sequence.

    These are the layers, norms and output layer, and one row of the input embedding per sequence. Keys and values are
    not counted.

    Args:
        model: Any causal language model of transformers.
        batch_size: Sequences generated at once.
    """
    embedding, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
    row_bytes = weight_bytes(embedding) // embedding.num_embeddings
    is_tied = output_layer.weight is embedding.weight
    return weight_bytes(model) - (0 if is_tied else weight_bytes(embedding)) + batch_size * row_bytes


def reset_peak_memory(device: torch.device) -> None:
    """Free unused memory and reset the peak that `peak_memory` returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: then it is the peak since the start
            PEAK_RESET.write_text("5")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak of the memory used since `reset_peak_memory`, in bytes.

    Returns:
        GPU: peak_allocated_bytes and peak_reserved_bytes of this process, and driver_bytes, what all processes use on
        the card now. CPU: peak_rss_bytes, the resident set of this process, pages of mapped weight files included.
    """
    if device.type == "cpu":
        return {"peak_rss_bytes": peak_rss_bytes()}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "driver_bytes": total - free,
    }


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process; without /proc, getrusage starts with that of the parent."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if PEAK_RESET.exists():
        status = PEAK_RESET.with_name("status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))  # in kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fitting_batch_size(model: PreTrainedModel, num_tokens: int, num_prefilled: int) -> int:
    """Return how many sequences fit into the free memory, at most as many as are worth it.

    Args:
        model: The loaded model.
        num_tokens: Prompt and new tokens of the longest sequence.
        num_prefilled: Tokens whose keys and values are held besides.

    Raises:
        UserError: Not even one fits.
    """
    config, free = model.config, free_bytes(model.device)
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    num_slots = 1 << (num_tokens - 1).bit_length()
    num_fitting = int((MEMORY_SHARE * free - num_prefilled * kv_bytes) / (GROWTH * num_slots * kv_bytes))
    if num_fitting < 1:
        raise UserError(
            f"{free / 1e9:.2f} GB are free on {model.device}, too little for the keys and values of {num_tokens} "
            "tokens. Free some, or lower --max_new_tokens"
        )
    is_slow_gpu = model.device.type == "cuda" and model.dtype == torch.float32
    return min(num_fitting, MAX_FORWARD_BATCH if is_slow_gpu else MAX_FAST_BATCH)
