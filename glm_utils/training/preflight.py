"""What a run will take, said before it starts: weights that train, tokens and steps, memory against what is free."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import peft
import torch
from loguru import logger
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from glm_utils.cli import UserError
from glm_utils.device import is_out_of_memory
from glm_utils.encoding import EncodedExamples
from glm_utils.training.memory_plan import MemoryPlan, make_plan
from glm_utils.training.settings import TrainingSettings, examples_per_step, num_steps

GIB = 1 << 30
NUM_PLAN_EXAMPLES = 4  # whose memory is measured


def plan_run(settings: TrainingSettings, model: peft.PeftModel, encoded: EncodedExamples) -> MemoryPlan:
    """Measure what a batch needs, and log it with the weights, tokens and steps of the run.

    Args:
        settings: The run's settings.
        model: The LoRA model.
        encoded: The training examples.
    """
    training_args = settings.training_args
    num_examples = min(NUM_PLAN_EXAMPLES, training_args.train_batch_size, len(encoded.dataset))
    sample = settings.collator([encoded.dataset[index] for index in range(num_examples)])
    advice = functools.partial(memory_advice, training_args)
    with memory_explained("the preflight", sample["input_ids"].numel(), advice):
        plan = make_plan(model, sample, settings.args_file.checkpointing)
    report_run(model, plan, encoded.dataset["length"], training_args, settings.packing)
    return plan


def batch_tokens(lengths: Sequence[int], batch_size: int, packing: bool, group_size: int | None = None) -> np.ndarray:
    """Return the tokens that each batch of one shuffled epoch computes, padding included.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        packing: Whether rows are laid end to end, else padded to the longest of the batch.
        group_size: Rows that the Trainer groups by length; None: it takes rows at random.
    """
    generator, lengths = torch.Generator().manual_seed(0), np.asarray(lengths)
    if group_size:
        order = get_length_grouped_indices(lengths.tolist(), group_size, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).numpy()
    batches = np.split(lengths[order], range(batch_size, len(lengths), batch_size))
    return np.array([batch.sum() if packing else batch.max() * len(batch) for batch in batches])


def report_run(
    model: peft.PeftModel, plan: MemoryPlan, lengths: Sequence[int], training_args: TrainingArguments, packing: bool
) -> None:
    """Log what the run will take; warn where its largest batch may not fit.

    Args:
        model: The LoRA model.
        plan: Its memory plan.
        lengths: Tokens of each training row.
        training_args: The run's settings.
        packing: Whether rows are laid end to end.
    """
    trained, total = model.get_nb_trainable_parameters()
    targets = ", ".join(sorted(model.active_peft_config.target_modules))
    logger.info(f"LoRA on {targets}: {trained:,} of {total:,} weights train")
    num_rows, batch_size = examples_per_step(training_args), training_args.train_batch_size
    grouped = training_args.train_sampling_strategy == "group_by_length"
    tokens = batch_tokens(lengths, batch_size, packing, num_rows if grouped else None)
    logger.info(
        f"a step: {num_rows:,} rows, about {tokens.mean() * num_rows / batch_size:,.0f} tokens "
        f"({'no' if packing else 'with'} padding); a batch: {tokens.mean():,.0f} tokens, {tokens.max():,} at most; "
        f"{num_steps(len(lengths), training_args):,} steps"
    )
    largest = int(tokens.max())
    needed, recomputed = plan.needed_bytes(largest), plan.num_recomputed(largest)
    states = ", their inputs on the host" if plan.is_offloaded(largest) else ""
    logger.info(
        f"memory: about {needed / GIB:.1f} GiB of {plan.limit_bytes / GIB:.1f} for the largest batch, {recomputed} of "
        f"{len(plan.layers)} blocks recomputed in the backward pass{states}"
    )
    if needed > plan.limit_bytes:
        logger.warning(f"the largest batch may not fit. {memory_advice(training_args)}")


def memory_advice(training_args: TrainingArguments) -> str:
    """Return the settings that lower a step's memory."""
    size, parts = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    checkpointing = getattr(training_args, "activation_checkpointing", training_args.gradient_checkpointing)
    advice = []
    if size > 1:
        advice.append(
            f"halve per_device_train_batch_size (now {size}) and double gradient_accumulation_steps (now {parts}), "
            "which trains the same"
        )
    if not checkpointing:
        advice.append("delete gradient_checkpointing false from the JSON file")
    advice.append("lower --max_input_length and --max_output_length")
    return f"In this order: {'; '.join(advice)}"


@contextlib.contextmanager
def memory_explained(where: str, num_tokens: int, advice: Callable[[], str]) -> Iterator[None]:
    """Say what to change when memory runs out.

    Args:
        where: What is done meanwhile, in words.
        num_tokens: Tokens of its batch.
        advice: Returns the settings to change.

    Raises:
        UserError: The memory of the GPU or of the computer did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        used = f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if torch.cuda.is_available() else "all there is"
        raise UserError(
            f"out of memory in {where} on a batch of {num_tokens:,} tokens, {used} in use. {advice()}. Checkpoints "
            "written so far are whole: --resume_from_checkpoint latest goes on from the last one, also with other "
            "batch sizes as long as a step has as many rows"
        ) from error
