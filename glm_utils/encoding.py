"""Turn examples into token ids and batches: prompt and answer, truncation, labels, padding and packing.

glm_utils/data reads the files. The prompt comes from the tokenizer's one prompt builder, which `chat` uses too, and
text typed by users cannot become control tokens. Labels cover only the answer and the end token.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
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
        dataset: Columns input_ids, labels and length.
        counts: num_rows (examples), num_tokens, num_trained_tokens (those with a label), longest (tokens of the
            longest example), num_cut_prompts and num_cut_answers (examples truncated to the limits). run_config.json
            holds them under these names, which therefore stay.
    """

    dataset: datasets.Dataset
    counts: dict[str, int]

    def describe_counts(self) -> str:
        """Say the counts in words, for the log."""
        counts = self.counts
        return (
            f"{counts['num_rows']:,} examples, {counts['num_tokens']:,} tokens "
            f"({counts['num_trained_tokens']:,} trained), {counts['longest']:,} in the longest example; truncated: "
            f"{counts['num_cut_prompts']:,} prompts, {counts['num_cut_answers']:,} answers"
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
        UserError: An example that is longer than max_length, or a prompt whose template alone exceeds its limit.
    """
    all_ids, all_labels, truncations = [], [], []
    for example in tqdm(examples, desc="tokens", unit="example", leave=False):
        encoded = encode_example(example, tokenizer, limits, max_length)
        all_ids.append(encoded.input_ids)
        all_labels.append(encoded.labels)
        truncations.append((encoded.prompt_truncated, encoded.answer_truncated))
    lengths = [len(ids) for ids in all_ids]
    counts = {
        "num_rows": len(examples),
        "num_tokens": sum(lengths),
        "num_trained_tokens": int(sum((labels != IGNORED_LABEL).sum() for labels in all_labels)),
        "longest": max(lengths),
        "num_cut_prompts": sum(prompt for prompt, _ in truncations),
        "num_cut_answers": sum(answer for _, answer in truncations),
    }
    columns = {"input_ids": all_ids, "labels": all_labels, "length": lengths}
    return EncodedExamples(datasets.Dataset.from_dict(columns), counts)


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None = None
) -> EncodedExample:
    """Encode one example; see `encode_examples`.

    Raises:
        UserError: It is longer than max_length, or its prompt's template alone exceeds the limit.
    """
    prompt_ids, prompt_truncated = truncate_prompt(example, tokenizer, limits)
    answer_ids, answer_truncated = truncate_answer(example, tokenizer, limits)
    length = len(prompt_ids) + len(answer_ids)
    if max_length and length > max_length:
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
    """Encode the answer, truncated to max_output_length; the end token stays.

    Returns:
        The ids, and whether the answer was truncated.
    """
    ids = tokenizer.encode_answer(example.answer)
    if len(ids) <= limits.max_output_length:
        return ids, False
    return [*ids[: limits.max_output_length - 1], ids[-1]], True


def loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the flat positions in labels (B, S) whose next token is trained.

    They are found here, on the CPU, so that no forward pass has to wait for the GPU to count them.
    """
    counts = torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))
    return counts.flatten().nonzero().flatten()


@dataclass(frozen=True)
class Collator:
    """Pad encoded examples to one length.

    Attributes:
        padding_side: right or left.
    """

    pad_token_id: int
    padding_side: str

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask (1 = keep) and labels, int64 (B, S), and loss_positions, int64 (M,)."""
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {
            "input_ids": torch.full((len(features), width), self.pad_token_id),
            "attention_mask": torch.zeros((len(features), width), dtype=torch.long),
            "labels": torch.full((len(features), width), IGNORED_LABEL),
        }
        for index, feature in enumerate(features):
            length = len(feature["input_ids"])
            columns = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            batch["input_ids"][index, columns] = torch.as_tensor(feature["input_ids"], dtype=torch.long)
            batch["attention_mask"][index, columns] = 1
            batch["labels"][index, columns] = torch.as_tensor(feature["labels"], dtype=torch.long)
        return {**batch, "loss_positions": loss_positions(batch["labels"])}


@dataclass(frozen=True)
class PackingCollator:
    """Pack the encoded examples of a batch end to end into one sequence, without padding.

    A batch holds the same examples as with padding. No token predicts the first token of the next example.
    """

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor | int]:
        """Return a batch.

        It has input_ids and labels, int64 (1, T), loss_positions, int64 (M,), and the boundaries of the examples under
        the names of transformers' FlashAttentionKwargs.
        """
        lengths = [len(feature["input_ids"]) for feature in features]
        ids = itertools.chain.from_iterable(feature["input_ids"] for feature in features)
        labels = torch.tensor([[*itertools.chain.from_iterable(feature["labels"] for feature in features)]])
        labels[0, [0, *itertools.accumulate(lengths[:-1])]] = IGNORED_LABEL
        return {
            "input_ids": torch.tensor([[*ids]]),
            "labels": labels,
            "loss_positions": loss_positions(labels),
            "cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            "max_length_q": max(lengths),
        }


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
