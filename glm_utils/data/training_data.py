"""The data of a training: what its flags name, read, and what the seed makes of it: held-out examples, a mixture."""

from __future__ import annotations  # numpy is imported where it is needed

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.data.drawn import DrawnData, FileUse
from glm_utils.data.find_files import FilePart, find_files, find_parts
from glm_utils.data.forms import NO_COLUMNS, Columns
from glm_utils.data.read import ExampleData, read_data
from glm_utils.data.selection import hold_out, mix, select
from glm_utils.data.shared import warn_of_evaluation

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TrainingData:
    """What the flags of a training name, read and checked.

    Attributes:
        parts: The training files, as they were named.
        train: Their examples.
        evaluation: Those of the evaluation files; None: there are none.
        eval_ratio: Part of the training files' examples that is held out for evaluation instead; None: nothing is.
    """

    parts: Sequence[FilePart]
    train: ExampleData
    evaluation: ExampleData | None = None
    eval_ratio: float | None = None

    @property
    def has_eval(self) -> bool:
        """Whether there are evaluation examples."""
        return self.evaluation is not None or self.eval_ratio is not None

    def draw(self, seed: int) -> DrawnData:
        """Choose the examples of a run, and log what is taken of which file.

        Args:
            seed: Decides what is held out and what a mixture takes.

        Raises:
            UserError: Nothing can be held out, or nothing of a file is left for a mixture.
        """
        import numpy as np

        kept, held_out, taken = None, None, [0] * len(self.parts)
        if self.eval_ratio is not None:
            kept, held_out = hold_out(self.train.examples, self.eval_ratio, seed)
            logger.info(
                f"--eval_ratio {self.eval_ratio:g}: {len(held_out):,} of {len(self.train.examples):,} examples are "
                "held out for evaluation, those with the same question together"
            )
        if self.is_mixture:
            chosen = self._mix(np.arange(len(self.train.examples)) if kept is None else kept, seed)
            kept, taken = np.concatenate(chosen), [len(part) for part in chosen]
        sources = {"train": (self.train, kept)}
        if held_out is not None:
            sources["eval"] = (self.train, held_out)
        elif self.evaluation is not None:
            sources["eval"] = (self.evaluation, None)
        shares = {"train": {path: part.share for part in self.parts for path in part.paths}}
        drawn = DrawnData(
            {name: select(data.examples, indices) for name, (data, indices) in sources.items()},
            {name: list_uses(data, indices, shares.get(name, {})) for name, (data, indices) in sources.items()},
            self._identity(),
            held_out is not None,
            [(part.name, num) for part, num in zip(self.parts, taken, strict=True)] if self.is_mixture else (),
        )
        drawn.log_files()
        if self.evaluation is not None:
            files = drawn.paths("train"), drawn.paths("eval")
            warn_of_evaluation(*files, drawn.examples["train"], drawn.examples["eval"])
        return drawn

    @property
    def is_mixture(self) -> bool:
        """Whether the training files have shares."""
        return self.parts[0].share is not None

    def _identity(self) -> dict:
        """Return the ratio, and the mixture in words."""
        mixture = ", ".join(f"{part.share} (files: {len(part.paths)})" for part in self.parts)
        return {"eval_ratio": self.eval_ratio, "train_mixture": mixture if self.is_mixture else None}

    def _mix(self, kept: np.ndarray, seed: int) -> list[np.ndarray]:
        """Return the indices of each part of the mixture, out of those that are kept."""
        import numpy as np

        sizes = iter(self.train.sizes)
        ends = itertools.accumulate(sum(itertools.islice(sizes, len(part.paths))) for part in self.parts)
        parts = np.split(kept, np.searchsorted(kept, [*ends][:-1]))
        for part, indices in zip(self.parts, parts, strict=True):
            if not len(indices):
                raise UserError(
                    f"{part.name}: --eval_ratio {self.eval_ratio} leaves none of its examples for training. Lower it, "
                    "or give --eval_data_path"
                )
        chosen = mix(parts, [part.share or 0 for part in self.parts], seed)
        log_mixture(self.parts, [len(part) for part in parts], [len(part) for part in chosen])
        return chosen


def list_uses(data: ExampleData, indices: np.ndarray | None, shares: Mapping[Path, float | None]) -> list[FileUse]:
    """Return what is taken of each file.

    Args:
        data: The files and their examples.
        indices: Of the examples that are taken, ascending; None: all.
        shares: Of a mixture, by file.
    """
    import numpy as np

    ends = list(itertools.accumulate(data.sizes))
    used = data.sizes if indices is None else np.diff(np.searchsorted(indices, ends), prepend=0).tolist()
    return [
        FileUse(str(path), size, num, shares.get(path))
        for path, size, num in zip(data.paths, data.sizes, used, strict=True)
    ]


def read_training_data(
    train_data_path: str | Sequence[str],
    eval_data_path: str | Sequence[str] | None = None,
    eval_ratio: float | None = None,
    columns: Columns = NO_COLUMNS,
) -> TrainingData:
    """Read what the flags of a training name.

    Args:
        train_data_path: Files or globs, perhaps with shares.
        eval_data_path: Files or globs; None: none.
        eval_ratio: Part of the training examples that is held out for evaluation instead; None: nothing is.
        columns: Names that the user gave.

    Raises:
        UserError: A flag or a file is wrong, or evaluation data is given twice.
    """
    if eval_ratio is not None:
        if not 0 < eval_ratio < 1:
            raise UserError(f"--eval_ratio {eval_ratio}: expected a number between 0 and 1, such as 0.05")
        if eval_data_path:
            raise UserError(f"--eval_ratio {eval_ratio} and --eval_data_path {eval_data_path}: give one of the two")
    parts = find_parts(train_data_path)
    eval_paths = find_files(eval_data_path) if eval_data_path else []
    train = read_data([path for part in parts for path in part.paths], columns=columns, may_stream=True)
    train.report.log()
    if len(train.examples) < 2 and eval_ratio is not None:
        raise UserError(f"--eval_ratio {eval_ratio}: one example cannot be split. Give --eval_data_path")
    evaluation = read_data(eval_paths, columns=columns, may_stream=True) if eval_paths else None
    if evaluation is not None:
        evaluation.report.log()
    return TrainingData(parts, train, evaluation, eval_ratio)


def log_mixture(parts: Sequence[FilePart], sizes: Sequence[int], taken: Sequence[int]) -> None:
    """Log what a mixture takes of each part, what it leaves, and which part decides its size."""
    total = sum(taken)
    lines = [
        f"{part.name} {num:,} of {size:,} ({num / total:.2%}, {size - num:,} left out)"
        for part, size, num in zip(parts, sizes, taken, strict=True)
    ]
    deciding = min(range(len(parts)), key=lambda index: sizes[index] / (parts[index].share or 1))
    logger.info(
        f"mixture of {total:,} examples, none of them twice: {', '.join(lines)}. {parts[deciding].name} decides the "
        "size: it is used up; a smaller share of it takes more of the others"
    )
