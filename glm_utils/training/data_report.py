"""What the data of a run is like, as figures: lengths, truncation, duplicates, padding, scripts.

Pure functions of examples and what they became; data_page.py shows the result. All of it is vectorized or one cheap
pass, so that a million examples take seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from glm_utils.data import Example
from glm_utils.encoding import EncodedExamples
from glm_utils.training.scripts import script_shares

MAX_PLACES = 10  # that a list of lines names
MAX_BINS = 20


@dataclass(frozen=True)
class Places:
    """Some of the examples.

    Attributes:
        count: How many.
        first: file:line of the first ones, at most MAX_PLACES.
    """

    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        """List the first and count the others."""
        more = (f"and {self.count - len(self.first):,} more",) if self.count > len(self.first) else ()
        return ", ".join([*self.first, *more])


@dataclass(frozen=True)
class Duplicates:
    """Examples with the same question, history and answer.

    Attributes:
        count: Examples that repeat an earlier one.
        num_distinct: How many different examples they repeat.
        first_pair: file:line of the first example that repeats one, behind that of the one it repeats; else empty.
    """

    count: int
    num_distinct: int
    first_pair: tuple[str, ...]


@dataclass(frozen=True)
class Bin:
    """Examples whose lengths lie in a range.

    Attributes:
        shortest: Least tokens of the range.
        longest: Most tokens of it.
        num_examples: How many they are.
    """

    shortest: int
    longest: int
    num_examples: int


@dataclass(frozen=True)
class BatchFigures:
    """What a batch of the run holds.

    Attributes:
        num_examples: Examples of a batch, on one GPU.
        packing: Whether they are packed.
        num_tokens: Tokens of a batch, its padding not counted, on average.
        padding_share: Share of padding in all positions of padded batches: the run's own, or what packing saves.
    """

    num_examples: int
    packing: bool
    num_tokens: float
    padding_share: float


@dataclass(frozen=True)
class TrainingDataReport:
    """What the examples of one part of the data are like.

    Attributes:
        num_examples: Examples of the part.
        num_reported: So many of them, from the first on, are what all other figures are about.
        num_tokens: Their tokens.
        num_trained_tokens: Those with a loss.
        mean_tokens: Tokens of an example, on average.
        median_tokens: The median of these.
        p95_tokens: 95 % of the examples have at most so many.
        longest_tokens: The longest example has so many.
        longest_place: Its file:line.
        histogram: Examples by their lengths; only the last bin may be wider than the others.
        truncated_prompts: Examples with a truncated prompt.
        truncated_answers: Examples with a truncated answer.
        dropped: Examples that were left out, and are not counted above, because of their answer's length.
        duplicates: Examples that are there more than once.
        batches: What a batch holds; None for evaluation data.
        scripts: Share of each script in the characters of questions and answers, the largest first.
    """

    num_examples: int
    num_reported: int
    num_tokens: int
    num_trained_tokens: int
    mean_tokens: float
    median_tokens: float
    p95_tokens: int
    longest_tokens: int
    longest_place: str
    histogram: tuple[Bin, ...]
    truncated_prompts: Places
    truncated_answers: Places
    dropped: Places
    duplicates: Duplicates
    batches: BatchFigures | None
    scripts: dict[str, float]


def report_data(
    examples: Sequence[Example],
    encoded: EncodedExamples,
    batches: BatchFigures | None = None,
    num_examples: int | None = None,
) -> TrainingDataReport:
    """Report on examples and what they became.

    Args:
        examples: What was encoded: all examples, or the first of them.
        encoded: What they became.
        batches: What a batch holds, see `batch_figures` in preflight.py; None for evaluation data.
        num_examples: How many examples there are; None: no more than these.
    """
    lengths = encoded.lengths
    kept = np.delete(np.arange(len(examples)), np.asarray(encoded.dropped, dtype=np.int64))
    return TrainingDataReport(
        num_examples=num_examples or len(examples),
        num_reported=len(examples),
        num_tokens=int(lengths.sum()),
        num_trained_tokens=encoded.counts["num_trained_tokens"],
        mean_tokens=float(lengths.mean()),
        median_tokens=float(np.median(lengths)),
        p95_tokens=int(np.percentile(lengths, 95, method="inverted_cdf")),
        longest_tokens=int(lengths.max()),
        longest_place=examples[int(kept[lengths.argmax()])].where,
        histogram=length_histogram(lengths),
        truncated_prompts=find_places(examples, encoded.truncated_prompts),
        truncated_answers=find_places(examples, encoded.truncated_answers),
        dropped=find_places(examples, encoded.dropped),
        duplicates=find_duplicates(examples),
        batches=batches,
        scripts=script_shares(examples),
    )


def find_places(examples: Sequence[Example], indices: Sequence[int]) -> Places:
    """Return how many examples are meant, and where the first of them are."""
    return Places(len(indices), tuple(examples[index].where for index in islice(indices, MAX_PLACES)))


def find_duplicates(examples: Sequence[Example]) -> Duplicates:
    """Find examples that are exactly the same.

    Their hashes are compared first, as a table of all texts would take the memory of the data again.
    """
    hashes = np.fromiter((hash(content(example)) for example in examples), np.int64, len(examples))
    order = np.argsort(hashes, kind="stable")
    same = np.append(hashes[order][1:] == hashes[order][:-1], False)
    candidates = np.sort(order[same | np.roll(same, 1)])  # those with the hash of another one
    first: dict[tuple, int] = {}
    repeated: set[tuple] = set()
    pair: tuple[int, ...] = ()
    count = 0
    for index in candidates.tolist():
        text = content(examples[index])
        earlier = first.setdefault(text, index)
        if earlier != index:
            count += 1
            repeated.add(text)
            pair = pair or (earlier, index)
    return Duplicates(count, len(repeated), tuple(examples[index].where for index in pair))


def content(example: Example) -> tuple:
    """Return what makes an example what it is, without its place."""
    return example.query, example.answer, example.history


def length_histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Count examples by their lengths, in bins of equal width that 99 % of them fit into; the last takes the rest."""
    width = round_up(int(np.percentile(lengths, 99, method="inverted_cdf")) / (MAX_BINS - 1))
    places = np.minimum((lengths - 1) // width, MAX_BINS - 1)
    counts = np.bincount(places)
    first, last = int(places.min()), len(counts) - 1
    longest = int(lengths.max())
    return tuple(
        Bin(
            shortest=place * width + 1,
            longest=longest if place == MAX_BINS - 1 else (place + 1) * width,
            num_examples=int(counts[place]),
        )
        for place in range(first, last + 1)
    )


def round_up(number: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ..."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if number <= factor * unit:
                return factor * unit
        unit *= 10
