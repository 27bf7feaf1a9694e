"""Where a training step's time goes on a GPU, by kind of kernel."""

import re
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_STEPS = 5  # before a rate is taken: shapes differ from batch to batch, and the allocator learns them
KINDS = {  # kernels by name, first match
    "matrix products": r"nvjet|gemm|cutlass_\d|sm90_xmma|cublas",
    "dequantisation": r"kDequantize|_decode_kernel",
    "attention": r"flash|fmha|attention",
    "loss": r"cross_entropy|softmax|nll_loss",
    "norms": r"layer_norm|rms_norm|reduce_kernel",
    "swiglu and rotation": r"_swiglu|_rotate|silu",
    "copies and casts": r"copy_kernel|Memcpy|CatArray",
}


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profiled(step: Callable[[dict], None], batches: list[dict]) -> dict:
    """Return the milliseconds of a step by kind of kernel, and those in which the GPU has nothing to do."""
    step(batches[0])
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    synchronize()
    wall = (time.perf_counter() - start) * 1e3 / len(batches)
    if DEVICE != "cuda":
        return {"wall_ms": wall}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for batch in batches:
            step(batch)
        synchronize()
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in trace.key_averages():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key)), "other")
        found[kind] += event.self_device_time_total / 1e3 / len(batches)
    return {"wall_ms": wall, **found, "idle": wall - sum(found.values())}
