"""How many optimizer steps a run takes, and how many examples a step."""

import math

from transformers import TrainingArguments

from glm_utils.cli import UserError


def examples_per_step(training_args: TrainingArguments) -> int:
    """Return the examples per optimizer step, on all GPUs together."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def num_steps(num_examples: int, training_args: TrainingArguments) -> int:
    """Return the number of optimizer steps of a run, as the Trainer counts them.

    Raises:
        UserError: dataloader_drop_last drops the only batch, as it is not full.
    """
    batch_size = training_args.per_device_train_batch_size * training_args.world_size
    drop_last = training_args.dataloader_drop_last
    num_batches = num_examples // batch_size if drop_last else math.ceil(num_examples / batch_size)
    if not num_batches:
        raise UserError(
            f"{num_examples} training examples do not fill a batch of {batch_size}, and dataloader_drop_last drops a "
            "batch that is not full: nothing would be trained. Delete dataloader_drop_last, or lower "
            "per_device_train_batch_size"
        )
    if training_args.max_steps > 0:
        return training_args.max_steps
    per_epoch = max(1, math.ceil(num_batches / training_args.gradient_accumulation_steps))
    return math.ceil(training_args.num_train_epochs * per_epoch)
