"""Answer many prompts in one batch, whose finished answers make room for the next prompts."""

from __future__ import annotations  # libraries are imported for their types only

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.inference.memory import fitting_batch_size
from glm_utils.inference.prompt_file import no_room

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizer

PREFILL_TOKENS = 2048  # of prompts that go through the model together, padding included
FIRST_NEW_TOKENS = 256  # that there is room for at first


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: Most tokens of an answer, its end token included.
        temperature: Divides the logits; 0: always the most probable token; None: the family's default.
        top_p: Nucleus probability; None: the family's default.
        seed: Seed of the sampling.
        num_samples: Answers to each prompt.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    num_samples: int = 1


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        index: Place of the prompt in the input.
        sample: 0 .. num_samples - 1.
        token_ids: Generated ids, the end token included if there is one.
        text: Decoded and post-processed as `chat` does.
        num_tokens: Number of token_ids.
        ended: True: by an end token; False: by max_new_tokens or at the context's end.
    """

    index: int
    sample: int
    token_ids: list[int]
    text: str
    num_tokens: int
    ended: bool


@dataclass
class PendingAnswer:
    """An answer that is to be generated.

    Attributes:
        index: Place of the prompt in the input.
        sample: 0 .. num_samples - 1.
        prompt_ids: The prompt, special tokens included.
        max_new_tokens: Most tokens of the answer.
        token_ids: What was generated so far.
        is_finished: Whether that is all.
    """

    index: int
    sample: int
    prompt_ids: list[int]
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizer,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    batch_size: int | None = None,
) -> Iterator[Answer]:
    """Yield answers in the order in which they finish.

    The answers do not depend on the batch size, but for rounding: noise is a function of seed, index, sample and
    position.

    Args:
        model: A model of this project in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, special tokens included.
        settings: How answers are generated.
        batch_size: Sequences at once; None: what fits.

    Raises:
        UserError: A prompt that leaves no room for an answer, or see `generate_pending`.
        FloatingPointError: The model computed NaN or infinite logits.
    """
    pending = [
        PendingAnswer(index, sample, prompt, settings.max_new_tokens)
        for index, prompt in enumerate(prompts)
        for sample in range(settings.num_samples)
    ]
    yield from generate_pending(model, tokenizer, pending, settings, batch_size)


def generate_pending(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizer,
    pending: Iterable[PendingAnswer],
    settings: GenerationSettings,
    batch_size: int | None = None,
) -> Iterator[Answer]:
    """Yield answers in the order in which they finish; see `generate_answers`.

    Args:
        model: As there.
        tokenizer: As there.
        pending: What to generate; max_new_tokens and num_samples of the settings do not count here.
        settings: As there.
        batch_size: As there.

    Raises:
        UserError: A prompt that leaves no room for an answer, too little memory for one, or a generation config that
            asks for what a batch does not do.
        FloatingPointError: The model computed NaN or infinite logits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Longest first: memory is at its peak at the start, and no later prompt needs the others to be moved.
    queue = deque(sorted(pending, key=lambda one: (-len(one.prompt_ids), one.index, one.sample)))
    if not queue:
        return
    limit_to_context(queue, base.config.max_position_embeddings)
    num_slots = max(len(one.prompt_ids) + min(one.max_new_tokens, FIRST_NEW_TOKENS) for one in queue)
    num_tokens = max(len(one.prompt_ids) + one.max_new_tokens for one in queue)
    batch_size = min(batch_size or fitting_batch_size(base, num_tokens, PREFILL_TOKENS), len(queue))
    try:
        batch = base.continuous_batch(tokenizer, batch_size, num_slots, settings.temperature, settings.top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    path = "the fast path" if batch.is_fast else "the model's forward"
    logger.info(f"{batch_size} sequences at once on {base.device} through {path}")
    end_ids = end_token_ids(base)
    try:
        for one in run_batch(batch, queue, end_ids, settings.seed):
            text = base.process_response(tokenizer.decode(one.token_ids))
            ended = one.token_ids[-1] in end_ids
            yield Answer(one.index, one.sample, one.token_ids, text, len(one.token_ids), ended)
    finally:
        batch.close()


def run_batch(batch, queue: deque[PendingAnswer], end_ids: set[int], seed: int) -> Iterator[PendingAnswer]:
    """Yield what is finished; a place that becomes free is taken by the next in the queue.

    Args:
        batch: What the model's `continuous_batch` returned.
        queue: What to generate; is emptied.
        end_ids: End tokens.
        seed: Seed of the sampling.

    Raises:
        FloatingPointError: The model computed NaN or infinite logits.
    """
    running: list[PendingAnswer | None] = [None] * batch.batch
    ready: deque = deque()  # prompts that have gone through the model: (pending answer, prefill, row)
    launched: deque = deque()  # steps whose tokens were not read: (what waits for them, whose they are)
    while queue or ready or any(running):
        for place in range(batch.batch):
            if running[place] is None and (queue or ready):
                ready = ready or prefill_next(batch, queue)
                begun, prefill, row = ready.popleft()
                batch.place(place, prefill, row, (seed, begun.index, begun.sample))
                running[place] = begun
        launched.append((batch.step(), list(running)))
        if len(launched) <= batch.num_ahead:
            continue
        wait, owners = launched.popleft()
        for place, (one, token) in enumerate(zip(owners, wait(), strict=True)):
            if one is None or one.is_finished:  # the step was launched before its end was known
                continue
            if token < 0:
                raise FloatingPointError(
                    f"the model returned NaN or infinite logits at token {len(one.token_ids) + 1} of the answer to "
                    f"prompt {one.index + 1}. Usual causes: weights that were damaged or only partly loaded, or fp16 "
                    "overflow; run in bf16 or fp32, and check the checkpoint"
                )
            one.token_ids.append(token)
            if token in end_ids or len(one.token_ids) == one.max_new_tokens:
                one.is_finished, running[place] = True, None
                batch.free(place)
                yield one


def prefill_next(batch, queue: deque[PendingAnswer]) -> deque:
    """Run the next prompts of a queue through the model, of samples of one prompt only the first.

    Args:
        batch: What the model's `continuous_batch` returned.
        queue: The longest first; those that are run are taken out.

    Returns:
        A pending answer, the prefill and its row there, for each.
    """
    width = len(queue[0].prompt_ids)
    prompts: list[list[int]] = []
    taken: list[tuple[PendingAnswer, int]] = []
    while queue:
        is_new = not taken or queue[0].index != taken[-1][0].index
        if is_new and prompts and width * (len(prompts) + 1) > PREFILL_TOKENS:
            break
        prompts += [queue[0].prompt_ids] if is_new else []
        taken.append((queue.popleft(), len(prompts) - 1))
    prefill = batch.prefill(prompts)
    return deque((one, prefill, row) for one, row in taken)


def limit_to_context(pending: Iterable[PendingAnswer], context: int) -> None:
    """Let no answer grow beyond the model's context.

    Args:
        pending: Changed in place.
        context: Prompt and answer together, in tokens.

    Raises:
        UserError: A prompt that leaves no room.
    """
    for one in pending:
        num_left = context - len(one.prompt_ids)
        if num_left < 1:
            raise UserError(f"prompt {one.index + 1}: {no_room(len(one.prompt_ids), context)}")
        one.max_new_tokens = min(one.max_new_tokens, num_left)


def end_token_ids(model: PreTrainedModel) -> set[int]:
    """Return the end tokens of a model's generation config, which may be one, several or none."""
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
