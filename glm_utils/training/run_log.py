"""What a training run says while it goes on: losses, speed and time left, and when its weights are numbers no more."""

import datetime
import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loguru import logger
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from glm_utils.cli import UserError
from glm_utils.run_record import RUN_CONFIG_NAME

NUM_TIMED_STEPS = 10  # before the time of an epoch is told


def clock() -> float:
    """Return seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def check_trained_weights(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Refuse to go on with weights that are no numbers any more.

    Args:
        args: Named in the error.
        state: The run's.
        model: Its trained weights are on one device.

    Raises:
        UserError: NaN or an infinite number in a trained weight.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if torch.stack([weight.detach().isfinite().all() for weight in trained]).all():
        return
    raise UserError(
        f"step {state.global_step}: the trained weights are NaN or infinite, nothing mends that. Lower learning_rate "
        f"(now {args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g}), or train in bf16 or fp32; what "
        f"{args.output_dir} holds is from before"
    )


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without its own line for each report."""

    def on_log(self, args, state, control, **kwargs) -> None:
        """Leave the report to RunCallback."""


class RunCallback(TrainerCallback):
    """Log losses and the time left, and keep the run's settings in every checkpoint.

    Args:
        begin: Called once, when optimizer and schedule are made and the first step is due.
    """

    def __init__(self, begin: Callable[[], None]):
        self.begin = functools.cache(begin)  # auto_find_batch_size begins more than once

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Start the clock."""
        self.begin()
        self.first_step, self.start_seconds = state.global_step, time.monotonic()
        self.warm_seconds, self.warm_tokens = self.start_seconds, state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control, train_dataloader=None, **kwargs
    ) -> None:
        """Start the clock again after the first step, which warms up; tell how long an epoch takes ten steps later."""
        num_done = state.global_step - self.first_step
        if num_done == 1 and state.global_step < state.max_steps:
            self.warm_seconds, self.warm_tokens = clock(), state.num_input_tokens_seen
        elif num_done == NUM_TIMED_STEPS + 1 and state.is_world_process_zero:
            seconds = (clock() - self.warm_seconds) / NUM_TIMED_STEPS
            num_steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            logger.info(
                f"{seconds:.3f} s a step, {self.tokens_per_second(state):,.0f} tokens a second, "
                f"{datetime.timedelta(seconds=round(seconds * num_steps))} an epoch of {num_steps:,} steps"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs) -> None:
        """Look at the weights that will be kept."""
        check_trained_weights(args, state, model)

    def tokens_per_second(self, state: TrainerState) -> float:
        """Return the rate since the first step, evaluations and checkpoints included, padding not."""
        return (state.num_input_tokens_seen - self.warm_tokens) / (clock() - self.warm_seconds)

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs=None, **kwargs) -> None:
        """Log one line for each report of the Trainer."""
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Copy run_config.json into the checkpoint, where resume compares it."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            shutil.copyfile(Path(args.output_dir) / RUN_CONFIG_NAME, checkpoint / RUN_CONFIG_NAME)
