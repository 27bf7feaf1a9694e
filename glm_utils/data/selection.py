"""Some examples of a sequence, chosen by a seed: those held out for evaluation, and those of a mixture.

A choice is an array of indices, so that nothing is copied and examples may stay in their file.
"""

from __future__ import annotations  # numpy is imported where it is needed: a wrong flag is answered before

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from tqdm import tqdm

from glm_utils.cli import UserError
from glm_utils.data.example import Example

if TYPE_CHECKING:
    import numpy as np


class Selection(Sequence[Example]):
    """Examples of a sequence, by their indices.

    Args:
        source: Any sequence of examples.
        indices: Of the selected ones, in order.

    Attributes:
        is_streamed: Whether getting an example reads it from its file, which may raise a UserError.
    """

    def __init__(self, source: Sequence[Example], indices: np.ndarray):
        self.source, self.indices = source, indices
        self.is_streamed = getattr(source, "is_streamed", False)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Selection: ...

    def __getitem__(self, index: int | slice) -> Example | Selection:
        if isinstance(index, slice):
            return Selection(self.source, self.indices[index])
        return self.source[int(self.indices[index])]


def select(examples: Sequence[Example], indices: np.ndarray | None) -> Sequence[Example]:
    """Return the examples of these indices; None: all."""
    return examples if indices is None else Selection(examples, indices)


def content_keys(
    examples: Sequence[Example], num_examples: int, with_answer: bool = True, seed: int | None = None
) -> np.ndarray:
    """Return 8 bytes for each of the first examples: equal where question, history and answer are, on any machine.

    Args:
        examples: The examples.
        num_examples: How many of them.
        with_answer: False: whatever the answer is.
        seed: Gives other keys; None: those without a seed.

    Returns:
        uint64 (num_examples,).
    """
    import numpy as np

    secret = b"" if seed is None else str(seed).encode()

    def key_of(index: int) -> int:
        content: object
        try:
            example = examples[index]
            content = [example.query, example.history, example.answer if with_answer else None]
        except UserError as error:  # a row of a streamed file that no example can be made of; it is skipped later
            content = error.message if seed is None else index  # the message names a path, which may change
        return int.from_bytes(hashlib.blake2b(json.dumps(content).encode(), digest_size=8, key=secret).digest())

    bar = tqdm(range(num_examples), desc="comparing", unit="example", leave=False)
    return np.fromiter(map(key_of, bar), dtype=np.uint64, count=num_examples)


def hold_out(examples: Sequence[Example], ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose examples for evaluation; those with the same question and history stay together.

    The choice depends on the content and the seed, not on the order. It has as many examples as come nearest to the
    ratio from below, and at least one; at least one stays for training.

    Args:
        examples: All examples.
        ratio: Part that is held out, between 0 and 1.
        seed: Seed of the choice.

    Returns:
        The indices of the examples that stay, and of those that are held out; both ascend.

    Raises:
        UserError: All have the same question.
    """
    import numpy as np

    keys = content_keys(examples, len(examples), with_answer=False, seed=seed)
    _, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)  # in the order of the keys
    if len(sizes) < 2:
        raise UserError(
            f"--eval_ratio {ratio:g}: all {len(examples):,} examples have the same question, and those stay together. "
            "Give --eval_data_path"
        )
    wanted = min(max(1, round(ratio * len(examples))), len(examples) - 1)
    is_held_out, num_held_out = np.zeros(len(sizes), dtype=bool), 0
    for group, size in enumerate(sizes.tolist()):
        if num_held_out + size <= wanted:
            is_held_out[group], num_held_out = True, num_held_out + size
        if num_held_out == wanted:
            break
    if not num_held_out:
        is_held_out[sizes.argmin()] = True
    mask = is_held_out[group_of]
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def mix(parts: Sequence[np.ndarray], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Choose the largest mixture with these shares in which no example stands twice.

    Args:
        parts: Indices of the examples of each part, at least one each.
        shares: Of the mixture's examples, one for each part; they add up to 1.
        seed: Seed of the choice.

    Returns:
        The chosen indices of each part, ascending; at least one each. The part that decides the size is chosen whole.
    """
    import numpy as np

    size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    chosen = []
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = min(len(part), max(1, round(size * share)))
        order = np.random.RandomState([seed, number]).permutation(len(part))  # its numbers stay whatever the version
        chosen.append(np.sort(part[order[:count]]))
    return chosen
