"""How much of the disk the checkpoints of a run take, estimated before it starts."""

import math
import shutil
from pathlib import Path

import peft
from loguru import logger
from transformers import TrainingArguments

from glm_utils.cli import UserError
from glm_utils.disk import existing_parent
from glm_utils.training.checkpoints import list_checkpoints
from glm_utils.training.manifest import is_own
from glm_utils.training.settings import TrainingSettings

WEIGHT_BYTES = 4  # adapters are saved in fp32
# of the optimizer's state per weight, by a part of the optimizer's name; the first that fits
STATE_BYTES = {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4, "ademamix": 12, "adam": 8}
OTHER_BYTES = 70_000  # random states, settings, records, and blocks that are not full


def check_disk_space(settings: TrainingSettings, model: peft.PeftModel) -> None:
    """Refuse a disk that cannot take one checkpoint; log what the run will need, and warn if that is more than free.

    Args:
        settings: The run's settings.
        model: The LoRA model.

    Raises:
        UserError: Not even one checkpoint fits, or the adapter where none is saved.
    """
    args, output_dir = settings.training_args, settings.output_dir
    num_weights, _ = model.get_nb_trainable_parameters()
    base = settings.base
    adapter = num_weights * WEIGHT_BYTES + (base.directory / base.family.tokenizer_file).stat().st_size
    one = adapter + num_weights * state_bytes(args.optim) + OTHER_BYTES
    at_once = num_at_once(args, settings.num_steps)
    own = sum(directory_bytes(path) for path in list_checkpoints(output_dir) if is_own(path))
    free = shutil.disk_usage(existing_parent(output_dir.absolute())).free
    if settings.args_file.overwrite_output_dir and not settings.resume_from:
        free, own = free + own, 0  # they are deleted when the first step is due
    least, what = (one, "a checkpoint") if at_once else (adapter, "the adapter")
    if free < least:
        raise UserError(
            f"output_dir {output_dir}: {in_words(free)} free, and {what} takes about {in_words(least)}. Free some "
            "space, or choose another output_dir"
        )
    total = at_once * one + adapter
    logger.info(
        f"disk: about {in_words(one)} per checkpoint, {at_once} at once, and the adapter with {in_words(adapter)}; "
        f"{in_words(free)} free"
    )
    if free + own < total:
        logger.warning(
            f"{output_dir}: {in_words(free)} free, and this run will take about {in_words(max(total - own, 0))}. Free "
            f"some space, or lower save_total_limit (now {args.save_total_limit})"
        )


def state_bytes(optim: str) -> int:
    """Return the bytes per weight of an optimizer's state; those of an unknown one are not counted."""
    return next((size for part, size in STATE_BYTES.items() if part in str(optim)), 0)


def num_at_once(args: TrainingArguments, num_steps: int) -> int:
    """Return how many checkpoints lie on the disk at the same time, the one included that is being written."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    saves_best = strategy == "best" or args.load_best_model_at_end  # at any evaluation, see trainer.py
    interval = args.eval_steps if saves_best else args.save_steps
    if strategy == "epoch" or not interval:
        num_saves = math.ceil(args.num_train_epochs)
    else:
        num_saves = math.ceil(num_steps / (interval if interval >= 1 else max(1, math.ceil(num_steps * interval))))
    limit = args.save_total_limit
    if not limit or limit < 1:
        return max(1, num_saves)
    return max(1, min(num_saves, max(limit, 2 if args.load_best_model_at_end else 1) + 1))


def directory_bytes(directory: Path) -> int:
    """Return the size of all files in a directory and below it."""
    return sum(path.lstat().st_size for path in directory.rglob("*"))


def in_words(num_bytes: float) -> str:
    """Return a number of bytes in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
