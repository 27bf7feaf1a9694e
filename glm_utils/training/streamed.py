"""Training on files that are not in memory: examples are read and tokenized when a batch needs them.

Everything that is reported before a training comes from the first examples. A later one that cannot be used is
replaced by the next one that can, always by the same one, and counted.
"""

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object
from loguru import logger
from transformers import PreTrainedTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_utils.cli import UserError
from glm_utils.data import Example
from glm_utils.data.indexed import UnusableRow, is_streamed, read_first
from glm_utils.encoding import EncodedExample, EncodedExamples, encode_example, encode_examples
from glm_utils.limits import EncodingLimits
from glm_utils.training.training_args import TrainArgsFile

MAX_REPLACED = 1000  # examples in a row that cannot be used
MAX_NAMED = 20
Encode = Callable[[Example], EncodedExample | None]  # None: the settings leave the example out


def check_streamable(
    examples: Mapping[str, Sequence[Example]],
    args_file: TrainArgsFile,
    training_args: TrainingArguments,
    loss_on: str = "last",
) -> None:
    """Refuse settings that would have to read all examples before the training. Of examples in memory, none is.

    Args:
        examples: Those of training and evaluation, which the Trainer groups alike.
        args_file: The TrainingArguments file.
        training_args: Made from it.
        loss_on: The flag; "all" needs to know how many turns each example has.

    Raises:
        UserError: There is such a setting.
    """
    num_streamed = max((len(part) for part in examples.values() if is_streamed(part)), default=0)
    if num_streamed and training_args.train_sampling_strategy == "group_by_length":
        raise UserError(
            f"{args_file.at('train_sampling_strategy')} group_by_length needs the lengths of all {num_streamed:,} "
            'examples, which are read only when they are needed. Set it to "random", or give --packing=true'
        )

    if num_streamed and loss_on == "all":
        raise UserError(
            f"--loss_on all needs the turns of all {num_streamed:,} examples, which are read only when they are "
            "needed. Train on parts of fewer than a million rows, or give --loss_on last"
        )


class StreamedDataset(torch.utils.data.Dataset):
    """Examples that are read and tokenized when they are asked for.

    Attributes:
        examples: The examples; getting one may raise UnusableRow.
        encode: Encodes one.
        unusable: For each example whether it was found to be of no use, shared with the workers of data loaders.
    """

    def __init__(self, examples: Sequence[Example], encode: Encode):
        self.examples, self.encode = examples, encode
        self.unusable = multiprocessing.RawArray("b", len(examples))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        """Return input_ids, labels and length of an example or, if it cannot be used, of the next one that can.

        Raises:
            UserError: Very many examples in a row cannot be used, or the file changed.
        """
        first = range(len(self))[index]
        for number in islice(range(first, first + len(self)), MAX_REPLACED):
            found = self.try_example(number % len(self))
            if isinstance(found, EncodedExample):
                ids, labels = found.input_ids.tolist(), found.labels.tolist()
                return {"input_ids": ids, "labels": labels, "length": len(ids)}
            self.unusable[number % len(self)] = 1
        raise UserError(
            f"{min(len(self), MAX_REPLACED):,} examples in a row cannot be used, beginning with "
            f"{self.try_example(first)}"
        )

    def try_example(self, index: int) -> EncodedExample | str:
        """Return an encoded example, or why it cannot be used.

        Raises:
            UserError: The file changed.
        """
        try:
            example = self.examples[index]
        except UnusableRow as error:
            return error.message
        try:
            return self.encode(example) or f"{example.where}: left out by --truncated_answers drop"
        except UserError as error:
            return error.message


@dataclass(frozen=True)
class StreamedExamples(EncodedExamples):
    """Examples that are encoded when they are asked for; counts and lengths are those of the first ones.

    Attributes:
        first: What the first examples became.
    """

    first: EncodedExamples = field(kw_only=True)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each of the first examples, int64 (N,)."""
        return self.first.lengths

    def describe_counts(self) -> str:
        """Say the counts in words, for the log."""
        first = EncodedExamples(self.dataset, {**self.counts, "num_rows": self.counts["num_checked"]})
        return f"{self.counts['num_rows']:,} examples; the first of them: {first.describe_counts()}"


def encode_streamed(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None = None
) -> StreamedExamples:
    """Encode the first examples, for counts and lengths, and prepare the others; see `encode_examples`.

    Raises:
        UserError: One of the first examples cannot be used.
    """
    encode = functools.partial(encode_kept, tokenizer=tokenizer, limits=limits, max_length=max_length)
    first = encode_examples(read_first(examples), tokenizer, limits, max_length)
    counts = {**first.counts, "num_rows": len(examples), "num_checked": first.counts["num_rows"]}
    return StreamedExamples(StreamedDataset(examples, encode), counts, first=first)


def encode_kept(
    example: Example, tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None
) -> EncodedExample | None:
    """Encode one example; None: its answer is too long, and such examples are left out. See `encode_example`."""
    encoded = encode_example(example, tokenizer, limits, max_length)
    return None if encoded.answer_truncated and limits.truncated_answers == "drop" else encoded


class UnusableReport(TrainerCallback):
    """Name the examples that could not be used, once, at the end of the training.

    Args:
        datasets: The datasets of the run, in memory or not.
    """

    def __init__(self, *datasets: object):
        self.datasets = [dataset for dataset in datasets if isinstance(dataset, StreamedDataset)]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Log what all processes and their workers found since the start or the checkpoint."""
        for dataset in self.datasets:
            own = np.flatnonzero(np.frombuffer(dataset.unusable, np.int8))
            found = np.unique(np.concatenate(gather_object([own]))).tolist()
            if found and state.is_world_process_zero:
                named = [str(dataset.try_example(index)) for index in found[:MAX_NAMED]]
                more = [f"and {len(found) - MAX_NAMED:,} more"] if len(found) > MAX_NAMED else []
                logger.warning(
                    f"{len(found):,} examples could not be used, and the next ones took their place: "
                    + "; ".join([*named, *more])
                )


@contextlib.contextmanager
def worker_errors_unwrapped() -> Iterator[None]:
    """Give errors of data loaders' workers the one line that they have without workers.

    Raises:
        UserError: Instead of one whose message is a traceback.
    """
    try:
        yield
    except UserError as error:
        if "DataLoader worker" not in error.message:
            raise
        raise UserError(error.message.rpartition(f"{UserError.__name__}: ")[2].strip()) from None
