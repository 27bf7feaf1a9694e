"""Turn examples into token ids: prompt and answer, truncation, labels.

glm_utils/data reads the files. The prompt comes from the tokenizer's one prompt builder, which `chat` uses too, and
text typed by users cannot become control tokens. Labels cover only the answer and the end token.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.data import Example
from glm_utils.limits import EncodingLimits

IGNORED_LABEL = -100  # no loss at this position
MAX_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class EncodedExample:
    """One encoded example.

    Attributes:
        input_ids: Prompt and answer, int32.
        labels: The answer's ids at their positions, IGNORED_LABEL elsewhere, int32.
        prompt_truncated: Whether the prompt was truncated.
        answer_truncated: Whether the answer was truncated.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_truncated: bool
    answer_truncated: bool


@dataclass(frozen=True)
class EncodedExamples:
    """Encoded examples and their counts.

    Attributes:
        dataset: Columns input_ids, labels and length; the examples in their order, without those left out.
        counts: num_rows (examples), num_tokens, num_trained_tokens (those with a label), longest (tokens of the
            longest example), num_cut_prompts and num_cut_answers (examples truncated to the limits), num_dropped
            (examples left out). run_config.json holds them under these names, which therefore stay.
        truncated_prompts: Places, in the sequence that was encoded, of the examples with a truncated prompt.
        truncated_answers: The same of those with a truncated answer.
        dropped: The same of those that were left out because their answer is too long.
    """

    dataset: datasets.Dataset
    counts: dict[str, int]
    truncated_prompts: Sequence[int] = ()
    truncated_answers: Sequence[int] = ()
    dropped: Sequence[int] = ()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (N,); of streamed ones, of those that were checked."""
        return np.asarray(self.dataset["length"][:], dtype=np.int64)  # a column as such is read item by item

    def describe_counts(self) -> str:
        """Say the counts in words, for the log."""
        counts = self.counts
        return (
            f"{counts['num_rows']:,} examples, {counts['num_tokens']:,} tokens "
            f"({counts['num_trained_tokens']:,} trained), {counts['longest']:,} in the longest example; truncated: "
            f"{counts['num_cut_prompts']:,} prompts, {counts['num_cut_answers']:,} answers; left out: "
            f"{counts['num_dropped']:,} examples"
        )


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None = None
) -> EncodedExamples:
    """Encode examples for training.

    Args:
        examples: Examples from read_examples, at least one.
        tokenizer: The base model's tokenizer.
        limits: Limits of the prompt and the answer.
        max_length: The model's context length in tokens; None: no limit.

    Raises:
        UserError: An example that is longer than max_length, a prompt whose template alone exceeds its limit, or no
            example that is not left out.
    """
    all_ids, all_labels = [], []
    prompts: list[int] = []
    answers: list[int] = []
    for index, example in enumerate(tqdm(examples, desc="tokens", unit="example", leave=False)):
        encoded = encode_example(example, tokenizer, limits, max_length)
        if encoded.answer_truncated:
            answers.append(index)
            if limits.truncated_answers == "drop":
                continue
        if encoded.prompt_truncated:
            prompts.append(index)
        all_ids.append(encoded.input_ids)
        all_labels.append(encoded.labels)
    dropped, answers = (answers, []) if limits.truncated_answers == "drop" else ([], answers)
    if not all_ids:
        raise UserError(
            f"all answers, {len(dropped):,} from {examples[0].where} on, are longer than --max_output_length "
            f"{limits.max_output_length}, and --truncated_answers drop leaves them out: nothing is left. Raise "
            "--max_output_length, or give --truncated_answers cut"
        )
    lengths = [len(ids) for ids in all_ids]
    counts = {
        "num_rows": len(all_ids),
        "num_tokens": sum(lengths),
        "num_trained_tokens": int(sum((labels != IGNORED_LABEL).sum() for labels in all_labels)),
        "longest": max(lengths),
        "num_cut_prompts": len(prompts),
        "num_cut_answers": len(answers),
        "num_dropped": len(dropped),
    }
    columns = {"input_ids": all_ids, "labels": all_labels, "length": lengths}
    return EncodedExamples(datasets.Dataset.from_dict(columns), counts, prompts, answers, dropped)


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None = None
) -> EncodedExample:
    """Encode one example; see `encode_examples`.

    An example that is to be left out is encoded too: the caller sees by answer_truncated that it is one.

    Raises:
        UserError: It is longer than max_length, or its prompt's template alone exceeds the limit.
    """
    prompt_ids, prompt_truncated = truncate_prompt(example, tokenizer, limits)
    answer_ids, answer_truncated = truncate_answer(example, tokenizer, limits)
    length = len(prompt_ids) + len(answer_ids)
    left_out = answer_truncated and limits.truncated_answers == "drop"
    if max_length and length > max_length and not left_out:
        raise UserError(
            f"{example.where}: {length} tokens, the model takes {max_length}. Lower --max_input_length or "
            f"--max_output_length (now {limits.max_input_length} and {limits.max_output_length})"
        )
    return EncodedExample(
        input_ids=np.array(prompt_ids + answer_ids, dtype=np.int32),
        labels=np.array([IGNORED_LABEL] * len(prompt_ids) + answer_ids, dtype=np.int32),
        prompt_truncated=prompt_truncated,
        answer_truncated=answer_truncated,
    )


def truncate_prompt(
    example: Example, tokenizer: PreTrainedTokenizer, limits: EncodingLimits
) -> tuple[list[int], bool]:
    """Encode the prompt, truncated to max_input_length; the template and the special tokens stay complete.

    The oldest turns of the history are dropped first, then the end of the question.

    Returns:
        The ids, and whether the prompt was truncated.

    Raises:
        UserError: Not even an empty question fits.
    """
    query, history = example.query, list(example.history)
    ids = tokenizer.encode_prompt(query, history)
    if len(ids) <= limits.max_input_length:
        return ids, False

    def fits(num_dropped: int) -> bool:
        return len(tokenizer.encode_prompt(query, history[num_dropped:])) <= limits.max_input_length

    # Prompts grow with the turns and characters that they keep, so the most that fits is found by bisection. The
    # complete prompt is encoded each time: tokens may span the borders of turns and template.
    history = history[bisect.bisect_left(range(len(history)), True, key=fits) :]  # no turn stays if none fits
    ids = tokenizer.encode_prompt(query, history)
    if len(ids) > limits.max_input_length:
        num_kept = bisect.bisect_right(
            range(len(query) + 1),
            limits.max_input_length,
            key=lambda num_characters: len(tokenizer.encode_prompt(query[:num_characters], history)),
        )
        if num_kept == 0:
            num_least = len(tokenizer.encode_prompt("", history))
            raise UserError(
                f"{example.where}: the prompt's template {'with prompt_text' if tokenizer.prompt_text else 'alone'} "
                f"takes {num_least} tokens, "
                f"--max_input_length allows {limits.max_input_length}. Raise it"
            )
        ids = tokenizer.encode_prompt(query[: num_kept - 1], history)
    return ids, True


def truncate_answer(
    example: Example, tokenizer: PreTrainedTokenizer, limits: EncodingLimits
) -> tuple[list[int], bool]:
    """Encode the answer, truncated to max_output_length; the end token stays unless truncated_answers is cut.

    Returns:
        The ids, and whether the answer was truncated.
    """
    ids = tokenizer.encode_answer(example.answer)
    if len(ids) <= limits.max_output_length:
        return ids, False
    if limits.truncated_answers == "cut":
        return ids[: limits.max_output_length], True
    return [*ids[: limits.max_output_length - 1], ids[-1]], True


def show_example(example: dict, tokenizer: PreTrainedTokenizer) -> str:
    """Show an encoded example as tokens: the trained part in double brackets, long parts without their middle.

    Args:
        example: An entry of EncodedExamples.dataset.
        tokenizer: The base model's tokenizer.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(example["input_ids"]))
    num_prompt = sum(label == IGNORED_LABEL for label in example["labels"])
    half = MAX_SHOWN_TOKENS // 4
    prompt, answer = (
        part if len(part) <= 2 * half else [*part[:half], "...", *part[-half:]]
        for part in (tokens[:num_prompt], tokens[num_prompt:])
    )
    return " ".join([*prompt, "[[", *answer, "]]"])
