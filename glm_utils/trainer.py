"""Transformers' Trainer with this project's batches, memory plan and log lines."""

import datetime
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from loguru import logger
from torch import nn
from transformers import (
    PreTrainedTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from glm_utils.cli import UserError
from glm_utils.encoding import Collator, EncodedRows, PackingCollator
from glm_utils.memory_plan import MemoryPlan
from glm_utils.preflight import memory_advice, out_of_memory
from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.training_args import rows_per_step

NUM_TIMED_STEPS = 10  # before the time of an epoch is told


def clock() -> float:
    """Return seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


class LengthGroups(LengthGroupedSampler):
    """Rows of like length together, in an order that follows from the seed and the epoch.

    The Trainer's own order follows from the random state where the epoch begins, which a resumed run does not have.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(rows_per_step(trainer.args), lengths=list(trainer.train_dataset["length"]))
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of an epoch."""
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(
            epoch + (args.seed if args.data_seed is None else args.data_seed)
        )
        return super().__iter__()


class LoraTrainer(Trainer):
    """Run each batch under the memory plan, and weigh and count tokens without waiting for the GPU.

    Attributes:
        plan: Set by make_trainer, as is run_log.
        run_log: Logs the run and knows its speed.
        eval_sums: Summed loss and number of trained tokens of an evaluation, on this process.
    """

    plan: MemoryPlan
    run_log: "RunCallback"
    eval_sums: torch.Tensor

    def _get_train_sampler(self, train_dataset=None):
        """Return the order of the rows."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return LengthGroups(self) if grouped else super()._get_train_sampler(train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward of one batch.

        Raises:
            UserError: The device's memory does not suffice.
        """
        num_tokens = inputs["input_ids"].numel()
        if self.args.include_num_input_tokens_seen == "no":  # else the Trainer counts
            num_real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else num_tokens
            self.state.num_input_tokens_seen += num_real * self.args.world_size  # ranks see alike
        try:
            with self.plan.applied(num_tokens):
                return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
                raise  # the Trainer begins again with smaller batches
            step = f"step {self.state.global_step + 1}"
            raise out_of_memory(step, num_tokens, memory_advice(self.args)) from error

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Log, evaluate and save what is due at this step or end of an epoch, unless the weights are NaN."""
        if self.control.should_log or self.control.should_save:
            check_trained_weights(self.args, self.state, self.model)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate, and report the loss as the mean over all trained tokens, whatever the batches.

        On several GPUs the rows that fill up the last batches count twice.
        """
        self.eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_tokens = self.accelerator.reduce(self.eval_sums).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of one batch, and add its sum to those of the evaluation.

        Raises:
            UserError: The device's memory does not suffice.
        """
        inputs = self._prepare_inputs(inputs)
        num_tokens = inputs["loss_positions"].numel()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**inputs).loss
        except torch.OutOfMemoryError as error:
            advice = f"Halve per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})"
            raise out_of_memory("the evaluation", inputs["input_ids"].numel(), advice) from error
        self.eval_sums[0] += loss * num_tokens
        self.eval_sums[1] += num_tokens
        return loss, None, None

    def end_processes(self) -> None:
        """Leave the group of training processes; without several of them nothing happens.

        The group's threads end with its last reference, which the DDP wrapper holds. A thread that outlives the
        interpreter aborts the process, and torchrun then stops the others, perhaps before the adapter is written.
        """
        self.model_wrapped = None
        self.accelerator.free_memory()
        self.accelerator.end_training()


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
    """Log losses and the time left, and keep the run's settings in every checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Start the clock."""
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


def make_trainer(
    model: peft.PeftModel,
    plan: MemoryPlan,
    training_args: TrainingArguments,
    encoded: dict[str, EncodedRows],
    tokenizer: PreTrainedTokenizer,
    collator: Collator | PackingCollator,
) -> LoraTrainer:
    """Build the Trainer.

    Args:
        model: LoRA model.
        plan: Its memory plan.
        training_args: Its settings.
        encoded: Rows under "train" and, optionally, "eval".
        tokenizer: Saved in every checkpoint.
        collator: Makes the batches.
    """
    trainer = LoraTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"].dataset,
        eval_dataset=encoded["eval"].dataset if "eval" in encoded else None,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.plan = plan
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    if not training_args.disable_tqdm:
        trainer.add_callback(QuietProgress())
    trainer.run_log = RunCallback()
    trainer.add_callback(trainer.run_log)
    return trainer
