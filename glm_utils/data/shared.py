"""Examples that training and evaluation data share, by which an evaluation flatters a training."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from glm_utils.data.example import Example
from glm_utils.data.selection import content_keys

MAX_COMPARED, NUM_COMPARED_OF_MORE = 1_000_000, 100_000  # of more examples than this, only so many are compared
MAX_SHOWN = 3


def warn_of_evaluation(
    train_paths: Sequence[Path], eval_paths: Sequence[Path], train: Sequence[Example], evaluation: Sequence[Example]
) -> None:
    """Warn of evaluation files that are training files too, links followed, and of examples that others share.

    Args:
        train_paths: The training files.
        eval_paths: The evaluation files.
        train: The training examples.
        evaluation: The evaluation examples.
    """
    known = {path.resolve() for path in train_paths}
    same = [str(path) for path in eval_paths if path.resolve() in known]
    if same:
        logger.warning(
            f"--eval_data_path names training data too ({list_first(same)}), so the evaluation says how well it was "
            "learned by heart. Give other data, or --eval_ratio"
        )
    if len(same) < len(eval_paths):
        warn_of_shared(train, evaluation)


def warn_of_shared(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    """Name the evaluation examples that are training examples too, and those that share a question with one.

    Args:
        train: The training examples.
        evaluation: The evaluation examples.
    """
    compared = []
    for name, examples in (("training", train), ("evaluation", evaluation)):
        are_many = getattr(examples, "is_streamed", False) or len(examples) > MAX_COMPARED
        num = min(len(examples), NUM_COMPARED_OF_MORE) if are_many else len(examples)
        compared.append(num)
        if num < len(examples):
            logger.info(f"only the first {num:,} of {len(examples):,} {name} examples are looked at for shared ones")
    num_train, num_eval = compared
    same = find_shared(train, evaluation, num_train, num_eval, with_answer=True)
    asked = find_shared(train, evaluation, num_train, num_eval, with_answer=False)
    other = {index: first for index, first in asked.items() if index not in same}
    if same:
        logger.warning(
            f"{len(same):,} of {num_eval:,} evaluation examples are training examples too, so the evaluation "
            f"flatters the training: {show_places(train, evaluation, same)}. Delete them from one of the two"
        )
    if other:
        logger.warning(
            f"{len(other):,} of {num_eval:,} evaluation examples have the question of a training example, with "
            f"another answer: {show_places(train, evaluation, other)}"
        )


def find_shared(
    train: Sequence[Example], evaluation: Sequence[Example], num_train: int, num_eval: int, with_answer: bool
) -> dict[int, int]:
    """Return the index of each shared evaluation example, with that of the first training example like it."""
    import numpy as np

    train_keys, first = np.unique(content_keys(train, num_train, with_answer), return_index=True)
    keys = content_keys(evaluation, num_eval, with_answer)
    places = np.searchsorted(train_keys, keys).clip(max=len(train_keys) - 1)
    found = np.flatnonzero(train_keys[places] == keys)
    return dict(zip(found.tolist(), first[places[found]].tolist(), strict=True))


def show_places(train: Sequence[Example], evaluation: Sequence[Example], shared: dict[int, int]) -> str:
    """Return file:line of the first shared examples, in both."""
    pairs = itertools.islice(shared.items(), MAX_SHOWN)
    return list_first([f"{evaluation[index].where} = {train[first].where}" for index, first in pairs], len(shared))


def list_first(texts: Sequence[str], total: int | None = None) -> str:
    """Return the first of some texts, and how many more there are.

    Args:
        texts: The texts, or the first of them.
        total: How many there are; None: these.
    """
    hidden = (len(texts) if total is None else total) - MAX_SHOWN
    return ", ".join([*texts[:MAX_SHOWN], *([f"and {hidden:,} more"] if hidden > 0 else [])])
