"""Encode data for a training measurement, run the shipped command in this process, and profile steps on a GPU."""

import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizer

from glm_utils.checkpoint import open_checkpoint
from glm_utils.data import read_examples
from glm_utils.encoding import encode_examples
from glm_utils.family import PROJECT_DIR
from glm_utils.limits import EncodingLimits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_STEPS = 5  # before a rate is measured: shapes differ from batch to batch, and the allocator adapts
KINDS = {  # key in the result file -> names of kernels; the first match counts
    "matrix products": r"nvjet|gemm|cutlass_\d|sm90_xmma|cublas",
    "dequantisation": r"kDequantize|_dequantize_kernel",
    "attention": r"flash|fmha|attention",
    "loss": r"cross_entropy|softmax|nll_loss",
    "norms": r"layer_norm|rms_norm|reduce_kernel",
    "swiglu and rotation": r"_swiglu|_rotate|silu",
    "copies and casts": r"copy_kernel|Memcpy|CatArray",
}


def encode_file(model_dir: Path, train_data_path: str) -> tuple[datasets.Dataset, PreTrainedTokenizer]:
    """Return the encoded examples of a data file, and the tokenizer."""
    tokenizer = open_checkpoint(model_dir).tokenizer
    examples = read_examples(Path(train_data_path))
    return encode_examples(examples, tokenizer, EncodingLimits(512, 1536)).dataset, tokenizer


def run_train_qlora(flags: list[str]) -> None:
    """Run train_qlora.py in this process, as its command line does."""
    sys.argv = ["train_qlora.py", *flags]
    runpy.run_path(str(PROJECT_DIR / "train_qlora.py"), run_name="__main__")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def profiled(step: Callable[[dict], None], batches: list[dict]) -> dict:
    """Profile a training step.

    Args:
        step: Runs one step on a batch.
        batches: The first one is also the warm-up.

    Returns:
        Milliseconds per step: wall_ms and, on a GPU, those of each of KINDS, of other kernels, and idle.
    """
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
