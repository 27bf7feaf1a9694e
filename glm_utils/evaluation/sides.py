"""Let both models do the same work: answer the examples and the probe, and rate the reference answers."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from loguru import logger
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.data import Example
from glm_utils.device import out_of_memory_explained
from glm_utils.encoding import truncate_prompt
from glm_utils.evaluation.job import REMEDY, EvaluationJob
from glm_utils.evaluation.losses import example_losses
from glm_utils.evaluation.two_models import Side
from glm_utils.inference.batch import Answer, generate_answers


@dataclass(frozen=True)
class SideResult:
    """What one model did.

    Attributes:
        answers: To the examples, in their order.
        losses: A row per example with a reference answer of (summed loss in nats, tokens).
        probe_answers: To the questions of the probe, in their order.
        probe_losses: A row per question, as losses.
    """

    answers: list[Answer]
    losses: np.ndarray
    probe_answers: list[Answer]
    probe_losses: np.ndarray


def run_sides(job: EvaluationJob) -> tuple[SideResult, SideResult]:
    """Run both models, one after the other; a base and its adapter are loaded once.

    Raises:
        UserError: A model computes NaN, or memory runs out.
    """
    results, model = [], None
    for side in (job.before, job.after):
        if model is None or not job.is_adapter:
            model = None  # frees the first of two models before the second one is loaded
            release_memory()
            logger.info(f"loading {side.source.checkpoint.directory} as {side.source.weight_format}")
            model = side.source.load()
        with named_errors(side.label), adapter_switched(model, side):
            results.append(run_side(job, side, model))
    return results[0], results[1]


def run_side(job: EvaluationJob, side: Side, model: PreTrainedModel | PeftModel) -> SideResult:
    """Let one model answer and rate.

    Args:
        job: The evaluation.
        side: The model's side.
        model: The model, its adapter switched as the side says.
    """
    checkpoint, limits = side.source.checkpoint, job.limits
    tokenizer = checkpoint.tokenizer
    general = replace(checkpoint, prompt_text="").tokenizer  # a text that asks for advertising copy asks for no facts
    probe = [question.example for question in job.probe]

    def rate(examples: Sequence[Example], reader: PreTrainedTokenizer) -> np.ndarray:
        if not examples:
            return np.zeros((0, 2))
        return example_losses(model, reader, examples, limits, checkpoint.context_length)

    def answer(examples: Sequence[Example], reader: PreTrainedTokenizer, name: str) -> list[Answer]:
        prompts = [truncate_prompt(example, reader, limits)[0] for example in examples]
        return collect_answers(job, model, reader, prompts, f"{side.label}: {name}")

    return SideResult(
        losses=rate([example for example in job.examples if example.answer], tokenizer),
        probe_losses=rate(probe, general),
        answers=answer(job.examples, tokenizer, "answers"),
        probe_answers=answer(probe, general, "general questions"),
    )


def collect_answers(
    job: EvaluationJob,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizer,
    prompts: Sequence[list[int]],
    title: str,
) -> list[Answer]:
    """Return an answer to each prompt, in the order of the prompts.

    Args:
        job: The evaluation.
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        title: What the progress bar says.
    """
    answers = generate_answers(model, tokenizer, prompts, job.generation, job.batch_size)
    shown = tqdm(answers, total=len(prompts), desc=title, unit="answer")
    return sorted(shown, key=lambda found: found.index)


def adapter_switched(model: PreTrainedModel | PeftModel, side: Side) -> contextlib.AbstractContextManager:
    """Return a context in which the model's adapter is on or off."""
    off = side.source.adapter is not None and not side.use_adapter
    return model.disable_adapter() if off else contextlib.nullcontext()


@contextlib.contextmanager
def named_errors(label: str) -> Iterator[None]:
    """Turn what a model or its memory may raise into an error that names the model.

    Raises:
        UserError: NaN logits, or memory that ran out.
    """
    try:
        with out_of_memory_explained(lambda: f"{label}: out of memory. Give {REMEDY}, or fewer --max_new_tokens"):
            yield
    except FloatingPointError as error:
        raise UserError(f"{label}: {error}") from error


def release_memory() -> None:
    """Give the memory of models that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
