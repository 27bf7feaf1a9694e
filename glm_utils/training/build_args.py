"""Make the TrainingArguments of a run, and try before the model is loaded what the Trainer will make of them."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator

import torch
from loguru import logger
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from glm_utils.cli import UserError
from glm_utils.training.argument_keys import CHECKPOINTING_KEYS
from glm_utils.training.argument_rules import patience_settings
from glm_utils.training.json_faults import as_json
from glm_utils.training.precision import precision_settings
from glm_utils.training.restart import join_after_restart
from glm_utils.training.training_args import TrainArgsFile

DEFAULT_SEED = 42
MAX_TRIED_RATES = 1000


def build_args(file: TrainArgsFile, **overrides: object) -> TrainingArguments:
    """Make TrainingArguments from a file.

    Args:
        file: The checked file.
        **overrides: Values that replace the file's.

    Raises:
        UserError: A key that the installed transformers lacks, or settings that contradict each other.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in file.values:
        if key not in known:
            raise UserError(f"{file.at(key)} is unknown to the installed transformers. Delete the line, or update it")
    if file.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = file.logging_dir
    values = {**file.values, **checkpointing_values(file, known), **overrides}
    try:
        join_after_restart(values.get("use_cpu", False), values.get("ddp_backend"), values.get("ddp_timeout", 1800))
        return TrainingArguments(**values)
    except Exception as error:  # whatever transformers and accelerate raise for a value they do not take
        raise UserError(f"{place_of(file, error)}: {error_text(error)}") from error


def checkpointing_values(file: TrainArgsFile, known: set[str]) -> dict:
    """Return the settings of activation checkpointing under the installed transformers' name; it is on by default."""
    name = next(key for key in CHECKPOINTING_KEYS if key in known)
    if file.checkpointing_key and file.checkpointing_key != name:
        logger.warning(f"{file.at(file.checkpointing_key)} is now {name}")
    is_on = file.checkpointing is not False
    return {name: is_on, **({f"{name}_kwargs": {"use_reentrant": False}} if is_on else {})}


def place_of(file: TrainArgsFile, error: Exception) -> str:
    """Return the file and, if the error names a key of it, its line."""
    text = str(error)
    named = [key for key in file.values if key in text]
    return file.at(max(named, key=len)) if named else str(file.path)


def error_text(error: Exception) -> str:
    """Return an error's message in one line, its type's name where the message alone says little."""
    text = "".join(letter if letter.isprintable() else " " for letter in " ".join(str(error).split()))
    return text if isinstance(error, ValueError | ImportError) and text else f"{type(error).__name__} {text}".rstrip()


def make_training_args(
    file: TrainArgsFile,
    seed: int | None,
    compute_dtype: str,
    has_eval: bool,
    packing: bool,
    patience: int | None = None,
) -> TrainingArguments:
    """Make the TrainingArguments of a run.

    Args:
        file: The checked JSON file.
        seed: Overrides the file's seed; None: the file's, else 42.
        compute_dtype: fp32, fp16 or bf16.
        has_eval: Whether there is evaluation data.
        packing: Whether batches are packed; if not, they are made of examples of similar length.
        patience: --early_stopping_patience.

    Raises:
        UserError: Settings that contradict each other or the hardware.
    """
    values, overrides = file.values, precision_settings(file, compute_dtype) | patience_settings(file, patience)
    for key in ("eval_strategy", "eval_on_start"):
        if not has_eval and values.get(key, "no") not in ("no", False):
            raise UserError(
                f"{file.at(key)} asks for evaluation. Give --eval_data_path or --eval_ratio, or set "
                "eval_strategy to no"
            )
    if packing and values.get("neftune_noise_alpha"):
        raise UserError(
            f"{file.at('neftune_noise_alpha')} scales its noise by the length of a sequence, and a packed batch is "
            "one long sequence. Give --packing=false, or delete the line"
        )
    if not packing and "train_sampling_strategy" not in values:
        overrides["train_sampling_strategy"] = "group_by_length"
    if "ddp_find_unused_parameters" not in values:  # every LoRA weight takes part in every batch
        overrides["ddp_find_unused_parameters"] = False
    if "LOCAL_RANK" not in os.environ:  # without torchrun there is no group of processes, and a backend is an error
        overrides["ddp_backend"] = None
    overrides["seed"] = values.get("seed", DEFAULT_SEED) if seed is None else seed
    training_args = build_args(file, **overrides, label_names=["labels"])
    if training_args.n_gpu > 1:  # the Trainer would wrap the 4-bit model into DataParallel, which cannot copy it
        logger.warning(f"1 of {training_args.n_gpu} GPUs is used; for all of them: torchrun --nproc_per_node N ...")
        training_args._n_gpu = 1
    return training_args


def try_training_args(file: TrainArgsFile, training_args: TrainingArguments, num_steps: int) -> None:
    """Build what the Trainer will build: trackers, and optimizer and schedule on a dummy weight, moved one step.

    Args:
        file: The checked JSON file.
        training_args: Made from it.
        num_steps: Optimizer steps of the run.

    Raises:
        UserError: One of them cannot be built, or the schedule yields a rate that is negative or no number.
    """
    with refused(file, "report_to"):
        for callback in get_reporting_integration_callbacks(training_args.report_to):
            callback()
    weights = torch.nn.ParameterList([torch.ones(2, 2, device=training_args.device)])
    with refused(file, "optim", "optim_args"):
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, weights)
        optimizer = kind(weights.parameters(), **kwargs)
        weights[0].square().sum().backward()
        optimizer.step()
    with refused(file, "lr_scheduler_type", "lr_scheduler_kwargs"):
        scheduler = get_scheduler(
            training_args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training_args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )
        check_rates(scheduler, num_steps)


def check_rates(scheduler: torch.optim.lr_scheduler.LRScheduler, num_steps: int) -> None:
    """Check the factors of the learning rate over a run, at up to MAX_TRIED_RATES of its steps.

    Raises:
        ValueError: One is negative or no finite number.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # those that follow eval_loss
        scheduler.step(1.0)  # type: ignore[arg-type]  # torch declares the epoch of the others
        return
    for step in range(0, num_steps + 1, num_steps // MAX_TRIED_RATES + 1):
        for factor in (function(step) for function in scheduler.lr_lambdas):
            if isinstance(factor, complex) or not 0 <= factor < math.inf:
                raise ValueError(f"at step {step:,} the learning rate would be multiplied by {factor}")


@contextlib.contextmanager
def refused(file: TrainArgsFile, *keys: str) -> Iterator[None]:
    """Turn any error of the block, which tries settings in a library, into one line that names their place.

    Args:
        file: The checked JSON file.
        keys: The settings; the last one that the file holds is named.

    Raises:
        UserError: The block failed.
    """
    try:
        yield
    except Exception as error:  # whatever the libraries raise for values that they do not take
        given = [key for key in keys if key in file.values] or [keys[0]]
        values = ", ".join(f"{key} {as_json(file.values.get(key))}" for key in given)
        where = file.at(given[-1]).rpartition(":")[0]
        raise UserError(f"{where}: {values} cannot be used: {error_text(error)}") from error
