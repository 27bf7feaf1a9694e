"""What a run needs, reported before it starts: trained weights, tokens and steps, memory and how much is available."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import peft
import torch
from loguru import logger
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from glm_utils.device import out_of_memory_explained
from glm_utils.encoding import EncodedExamples
from glm_utils.training.data_report import BatchFigures
from glm_utils.training.disk_space import check_disk_space
from glm_utils.training.memory_plan import MemoryPlan, make_plan
from glm_utils.training.settings import TrainingSettings
from glm_utils.training.steps import examples_per_step, num_steps

GIB = 1 << 30
NUM_PLAN_EXAMPLES = 4  # in the batch that is measured


def plan_run(settings: TrainingSettings, model: peft.PeftModel, encoded: EncodedExamples) -> MemoryPlan:
    """Measure the memory that a batch needs; log it with the weights, tokens, steps and checkpoints of the run.

    Args:
        settings: The run's settings.
        model: The LoRA model.
        encoded: The training examples.

    Raises:
        UserError: The disk has no room for a checkpoint.
    """
    training_args = settings.training_args
    num_examples = min(NUM_PLAN_EXAMPLES, training_args.train_batch_size, len(encoded.dataset))
    batch: dict = settings.collator([encoded.dataset[index] for index in range(num_examples)])
    advice = functools.partial(memory_advice, training_args)
    with memory_explained("the preflight", batch["input_ids"].numel(), advice):
        plan = make_plan(model, batch, settings.args_file.checkpointing)
    report_run(model, plan, encoded, training_args, settings.packing)
    if training_args.process_index == 0:
        check_disk_space(settings, model)
    return plan


def batch_tokens(
    lengths: Sequence[int] | np.ndarray, batch_size: int, packing: bool, group_size: int | None = None
) -> np.ndarray:
    """Return the number of tokens in each batch of one shuffled epoch, padding included.

    Args:
        lengths: Tokens per example.
        batch_size: Examples per batch.
        packing: Whether a batch is packed; if not, it is padded to its longest example.
        group_size: Examples that the Trainer groups by length; None: the order is random.
    """
    generator = torch.Generator().manual_seed(0)
    if group_size:
        order = get_length_grouped_indices(list(lengths), group_size, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).numpy()
    ordered, starts = np.asarray(lengths)[order], np.arange(0, len(lengths), batch_size)
    if packing:
        return np.add.reduceat(ordered, starts)
    return np.maximum.reduceat(ordered, starts) * np.diff(starts, append=len(lengths))


def batch_figures(lengths: np.ndarray, settings: TrainingSettings) -> BatchFigures:
    """Say what the training batches hold, and what padding costs or would cost in their order.

    Args:
        lengths: Tokens per training example.
        settings: The run's settings.
    """
    args = settings.training_args
    grouped = args.train_sampling_strategy == "group_by_length"
    group_size = examples_per_step(args) if grouped else None
    padded = batch_tokens(lengths, args.train_batch_size, packing=False, group_size=group_size)
    num_tokens = int(np.sum(lengths))
    return BatchFigures(
        num_examples=min(args.train_batch_size, len(lengths)),
        packing=settings.packing,
        num_tokens=num_tokens / len(padded),
        padding_share=1 - num_tokens / int(padded.sum()),
    )


def report_run(
    model: peft.PeftModel, plan: MemoryPlan, encoded: EncodedExamples, training_args: TrainingArguments, packing: bool
) -> None:
    """Log what the run needs; warn if its largest batch may not fit.

    Args:
        model: The LoRA model.
        plan: Its memory plan.
        encoded: The training examples.
        training_args: The run's settings.
        packing: Whether batches are packed.
    """
    trained, total = model.get_nb_trainable_parameters()
    targets = ", ".join(sorted(model.active_peft_config.target_modules))
    logger.info(f"LoRA on {targets}: {trained:,} of {total:,} weights are trained")
    num_examples, batch_size = examples_per_step(training_args), training_args.train_batch_size
    num_batches = num_examples // batch_size
    grouped = training_args.train_sampling_strategy == "group_by_length"
    tokens = batch_tokens(encoded.lengths, batch_size, packing, num_examples if grouped else None)
    logger.info(
        f"per step: {min(num_examples, len(encoded.dataset)):,} examples, about "
        f"{tokens.mean() * min(num_batches, len(tokens)):,.0f} tokens "
        f"({'no' if packing else 'with'} padding); per batch: {tokens.mean():,.0f} tokens, {tokens.max():,} at most; "
        f"{num_steps(len(encoded.dataset), training_args):,} steps"
    )
    largest = int(tokens.max())
    needed, recomputed = plan.needed_bytes(largest), plan.num_recomputed(largest)
    offloading = ", their inputs are offloaded to the host" if plan.is_offloaded(largest) else ""
    logger.info(
        f"memory: about {needed / GIB:.1f} GiB of {plan.limit_bytes / GIB:.1f} for the largest batch, activation "
        f"checkpointing in {recomputed} of {len(plan.layers)} blocks{offloading}"
    )
    if needed > plan.limit_bytes:
        logger.warning(f"the largest batch may not fit. {memory_advice(training_args)}")


def memory_advice(training_args: TrainingArguments) -> str:
    """Say which settings lower the memory of a step."""
    size, parts = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    checkpointing = getattr(training_args, "activation_checkpointing", training_args.gradient_checkpointing)
    advice = []
    if size > 1:
        advice.append(
            f"halve per_device_train_batch_size (now {size}) and double gradient_accumulation_steps (now {parts}), "
            "which gives the same training"
        )
    if not checkpointing:
        advice.append("delete activation_checkpointing (or gradient_checkpointing) false from the JSON file")
    advice.append("lower --max_input_length and --max_output_length")
    return f"In this order: {'; '.join(advice)}"


@contextlib.contextmanager
def memory_explained(where: str, num_tokens: int, advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to change.

    Args:
        where: What the block does, for the message, e.g. step 3.
        num_tokens: Tokens of its batch.
        advice: Returns the settings to change.

    Raises:
        UserError: The GPU or the host ran out of memory.
    """

    def message() -> str:
        used = f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if torch.cuda.is_available() else "all memory"
        return (
            f"out of memory in {where} on a batch of {num_tokens:,} tokens, {used} in use. {advice()}. Checkpoints "
            "written so far are complete: --resume_from_checkpoint latest continues from the last one, also with "
            "another batch size, as long as the number of examples per step stays the same"
        )

    with out_of_memory_explained(message):
        yield
