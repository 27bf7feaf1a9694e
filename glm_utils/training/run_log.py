"""What a training run logs: losses, speed and time left; it ends with an error when its weights become NaN."""

import datetime
import functools
import math
import time
from collections.abc import Callable

import torch
from loguru import logger
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from glm_utils.cli import UserError
from glm_utils.training.best_step import find_best_again

NUM_TIMED_STEPS = 10  # after the first one, before the time per epoch is logged


def clock() -> float:
    """Return the time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def check_trained_weights(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Refuse to continue with trained weights that are NaN or infinite.

    Args:
        args: The run's settings, for the message.
        state: The Trainer's state.
        model: The model; its trained weights are on one device.

    Raises:
        UserError: A trained weight is NaN or infinite.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if torch.stack([weight.detach().isfinite().all() for weight in trained]).all():
        return
    raise UserError(
        f"step {state.global_step}: the trained weights are NaN or infinite and cannot recover. Lower learning_rate "
        f"(now {args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g}), or train in bf16 or fp32. The "
        f"files in {args.output_dir} are from earlier steps"
    )


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without its own line per report."""

    def on_log(self, args, state, control, **kwargs) -> None:
        """Do nothing: RunCallback logs the report."""


class RunCallback(TrainerCallback):
    """Log losses and the time left.

    Args:
        begin: Called once, when optimizer and schedule exist and the first step is due.
    """

    def __init__(self, begin: Callable[[], None]):
        self.begin = functools.cache(begin)  # with auto_find_batch_size training begins more than once

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Start the clock."""
        self.begin()
        find_best_again(args, state)
        self.first_step, self.start_seconds = state.global_step, time.monotonic()
        self.warm_seconds, self.warm_tokens = self.start_seconds, state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control, train_dataloader=None, **kwargs
    ) -> None:
        """Restart the clock after the first step, which is a warm-up; log the time per epoch ten steps later."""
        num_done = state.global_step - self.first_step
        if num_done == 1 and state.global_step < state.max_steps:
            self.warm_seconds, self.warm_tokens = clock(), state.num_input_tokens_seen
        elif num_done == NUM_TIMED_STEPS + 1 and state.is_world_process_zero:
            seconds = (clock() - self.warm_seconds) / NUM_TIMED_STEPS
            num_steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            logger.info(
                f"{seconds:.3f} s per step, {self.tokens_per_second(state):,.0f} tokens/s, "
                f"{datetime.timedelta(seconds=round(seconds * num_steps))} per epoch of {num_steps:,} steps"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs) -> None:
        """Check the weights that will be saved."""
        check_trained_weights(args, state, model)

    def tokens_per_second(self, state: TrainerState) -> float:
        """Return the rate since the first step; evaluations and checkpoints take time, padding does not count."""
        return (state.num_input_tokens_seen - self.warm_tokens) / (clock() - self.warm_seconds)

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs=None, **kwargs) -> None:
        """Log one line per report of the Trainer."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = [
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
            for key, value in logs.items()
            if isinstance(value, float | int)
        ]
        num_done = state.global_step - self.first_step
        if num_done and state.global_step < state.max_steps:
            seconds = (time.monotonic() - self.start_seconds) / num_done * (state.max_steps - state.global_step)
            numbers.append(f"{datetime.timedelta(seconds=round(seconds))} left")
        logger.info(f"step {state.global_step}/{state.max_steps}: {', '.join(numbers)}")
