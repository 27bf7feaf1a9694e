"""Time generation token by token and collect the figures of one model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from loguru import logger
from transformers import PreTrainedModel

from glm_utils.cli import UserError
from glm_utils.device import is_out_of_memory
from glm_utils.inference.memory import bytes_read_per_step, peak_memory, reset_peak_memory, weight_bytes
from glm_utils.inference.report import summarize
from glm_utils.inference.timer import CpuClock, CudaClock, make_clock

NUM_WARM_UPS = 1  # complete runs between the cold first run and the measured ones
FAST_PATH_OFF = {"use_cuda_graph": False}  # argument of the model's stream_generate
Generate = Callable[[Callable[[], None]], int]  # calls its argument after each token; returns tokens per sequence


@dataclass(frozen=True)
class Workload:
    """What is generated, and how often.

    Attributes:
        input_ids: Prompts on the model's device, (B, T).
        new_tokens: Tokens to generate per sequence.
        loop_number: Measured runs.
        max_time: Seconds of measured runs after which no further one starts; None: no limit.
    """

    input_ids: torch.Tensor
    new_tokens: int
    loop_number: int
    max_time: float | None = None


def measure_model(
    load: Callable[[], PreTrainedModel],
    make_generate: Callable[[PreTrainedModel, Workload], Generate],
    workload: Workload,
    bandwidth: float,
    check: Callable[[PreTrainedModel, torch.Tensor], None] | None = None,
) -> dict:
    """Load, measure and free one model; running out of memory ends its figures, not the program.

    Args:
        load: Loads the model.
        make_generate: Returns the function that generates once, see `stream_generate`.
        workload: What to generate.
        bandwidth: Of copies on the device, bytes per second.
        check: Called with the model and the prompts after the cold and the measured runs, see `check_finite`.

    Returns:
        Figures by name, and "error" if memory ran out.
    """
    device, (batch_size, num_prompt_tokens) = workload.input_ids.device, workload.input_ids.shape
    reset_peak_memory(device)
    figures: dict = {}
    try:
        start_seconds = time.perf_counter()
        model = load()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures["load_seconds"] = time.perf_counter() - start_seconds
        figures |= {"weight_bytes": weight_bytes(model), "bytes_read_per_step": bytes_read_per_step(model, batch_size)}
        cold, runs = time_runs(make_generate(model, workload), workload)
        if check:
            check(model, workload.input_ids)
        figures |= {"cold_first_token_seconds": cold[0], "cold_run_seconds": cold[-1]}
        figures |= summarize(runs, num_prompt_tokens, batch_size)
        # Each step reads these weights once, so no step takes less time than reading them at the speed of a copy.
        figures["bound_tokens_per_second"] = bandwidth / figures["bytes_read_per_step"]
        figures["bandwidth_share"] = figures["decode_tokens_per_second"] / figures["bound_tokens_per_second"]
        figures |= peak_memory(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error(f"{type(error).__name__}: {error}")
        figures["error"] = "out of memory"
    return figures


def check_finite(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Refuse a model whose logits are not finite: greedy generation would go on with token 0, at full speed.

    Args:
        model: The model.
        input_ids: Prompts, (B, T).

    Raises:
        UserError: It computes NaN or infinite logits.
    """
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), logits_to_keep=1).logits
    if not logits.isfinite().all():
        raise UserError(
            "the model computes NaN or infinite logits, so its figures would mean nothing. Usual causes: weights that "
            "are damaged, or fp16 overflow; try --dtype bf16 or fp32, and download the weights again"
        )


def stream_generate(model: PreTrainedModel, workload: Workload, fast_path: bool = True) -> Generate:
    """Return a function that generates greedily with a model of this project; an end token does not stop it.

    Args:
        model: The model.
        workload: What to generate.
        fast_path: False disables the CUDA graph.
    """
    input_ids, settings = workload.input_ids, {} if fast_path else FAST_PATH_OFF

    def generate(mark: Callable[[], None]) -> int:
        num_generated = 0
        for ids in model.stream_generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=workload.new_tokens,
            do_sample=False,
            eos_token_id=None,
            **settings,
        ):
            mark()
            num_generated = ids.shape[1] - input_ids.shape[1]
        return num_generated

    return generate


def time_runs(generate: Generate, workload: Workload) -> tuple[list[float], list[list[float]]]:
    """Time a cold run, then, after the warm-up, the measured runs.

    Returns:
        Seconds from the call to each token, of the cold run and of each measured run.
    """
    clock = make_clock(workload.input_ids.device)
    cold = time_run(generate, clock, workload.new_tokens)
    for _ in range(NUM_WARM_UPS):
        time_run(generate, clock, workload.new_tokens)
    max_time = float("inf") if workload.max_time is None else workload.max_time
    runs: list[list[float]] = []
    while not runs or (len(runs) < workload.loop_number and sum(run[-1] for run in runs) < max_time):
        runs.append(time_run(generate, clock, workload.new_tokens))
    return cold, runs


def time_run(generate: Generate, clock: CpuClock | CudaClock, new_tokens: int) -> list[float]:
    """Generate once; return the seconds from the call to each new token.

    Raises:
        RuntimeError: The number of generated tokens per sequence is not new_tokens.
    """
    clock.start()
    num_generated = generate(clock.mark)
    seconds = clock.seconds()
    if not num_generated == len(seconds) == new_tokens:
        raise RuntimeError(f"generated {num_generated} tokens in {len(seconds)} steps instead of {new_tokens}")
    return seconds
