"""The data of a training: what its flags name, read, and what the seed makes of it: held-out examples, a mixture."""

from __future__ import annotations  # numpy is imported where it is needed

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.data.example import Example
from glm_utils.data.find_files import FilePart, find_files, find_parts, show_paths
from glm_utils.data.forms import NO_COLUMNS, Columns
from glm_utils.data.read import ExampleData, read_data
from glm_utils.data.selection import hold_out, mix, select
from glm_utils.data.shared import same_files, warn_of_shared

if TYPE_CHECKING:
    import numpy as np

MAX_SHOWN_FILES = 20


@dataclass(frozen=True)
class FileUse:
    """What a run takes of a file.

    Attributes:
        path: The file.
        num_rows: Examples in it.
        num_used: Those that are taken.
        share: Share of a mixture, together with the other files of the same glob; None: nothing is mixed.
    """

    path: str
    num_rows: int
    num_used: int
    share: float | None = None


@dataclass(frozen=True)
class DrawnData:
    """The examples of a run.

    Attributes:
        examples: Under "train" and, optionally, "eval".
        files: What is taken of which file, under the same keys.
        identity: What a resumed run must share, beside the files' content and the seed.
        held_out: Whether the evaluation examples come from the training files.
    """

    examples: Mapping[str, Sequence[Example]]
    files: Mapping[str, list[FileUse]]
    identity: dict = field(default_factory=dict)
    held_out: bool = False

    def paths(self, name: str) -> list[Path]:
        """Return the files of "train" or "eval"."""
        return [Path(use.path) for use in self.files[name]]

    def source(self, name: str) -> str | list[str]:
        """Return where the examples of "train" or "eval" are from, for a record: files, or that they were held out."""
        files = show_paths(self.paths(name))
        return (
            f"--eval_ratio {self.identity['eval_ratio']:g} of {files}" if name == "eval" and self.held_out else files
        )

    def record(self) -> dict[str, list[dict]]:
        """Return the files as run_config.json holds them."""
        return {name: [asdict(use) for use in uses] for name, uses in self.files.items()}


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
        kept = held_out = None
        if self.eval_ratio is not None:
            kept, held_out = hold_out(self.train.examples, self.eval_ratio, seed)
            logger.info(
                f"--eval_ratio {self.eval_ratio:g}: {len(held_out):,} of {len(self.train.examples):,} examples are "
                "held out for evaluation, those with the same question together"
            )
        if self.is_mixture:
            kept = self._mix(kept, seed)
        sources = {"train": (self.train, kept)}
        if held_out is not None:
            sources["eval"] = (self.train, held_out)
        elif self.evaluation is not None:
            sources["eval"] = (self.evaluation, None)
        drawn = DrawnData(
            {name: select(data.examples, indices) for name, (data, indices) in sources.items()},
            {name: self._uses(data, indices) for name, (data, indices) in sources.items()},
            self._identity(),
            held_out is not None,
        )
        log_files(drawn)
        if self.evaluation is not None:
            warn_of_evaluation(drawn)
        return drawn

    @property
    def is_mixture(self) -> bool:
        """Whether the training files have shares."""
        return self.parts[0].share is not None

    def _identity(self) -> dict:
        """Return the ratio, and the mixture in words."""
        words = [f"{part.share} of {len(part.paths)} file(s)" for part in self.parts] if self.is_mixture else None
        return {"eval_ratio": self.eval_ratio, "train_mixture": words and ", ".join(words)}

    def _mix(self, kept: np.ndarray | None, seed: int) -> np.ndarray:
        """Return the indices of the mixture, out of those that are kept; None: all are."""
        import numpy as np

        kept = np.arange(len(self.train.examples)) if kept is None else kept
        sizes = [sum(self.train.report.num_rows[str(path)] for path in part.paths) for part in self.parts]
        parts = np.split(kept, np.searchsorted(kept, list(itertools.accumulate(sizes))[:-1]))
        for part, indices in zip(self.parts, parts, strict=True):
            if not len(indices):
                raise UserError(
                    f"{part.name}: --eval_ratio {self.eval_ratio} leaves none of its examples for training. Lower it, "
                    "or give --eval_data_path"
                )
        chosen = mix(parts, [part.share or 0 for part in self.parts], seed)
        log_mixture(self.parts, [len(part) for part in parts], [len(part) for part in chosen])
        return np.concatenate(chosen)

    def _uses(self, data: ExampleData, indices: np.ndarray | None) -> list[FileUse]:
        """Return what ascending indices take of each file; None: everything."""
        import numpy as np

        sizes = [data.report.num_rows[str(path)] for path in data.paths]
        ends = list(itertools.accumulate(sizes))
        used = sizes if indices is None else np.diff(np.searchsorted(indices, ends), prepend=0).tolist()
        shares = {path: part.share for part in self.parts for path in part.paths}
        return [
            FileUse(str(path), size, num, shares.get(path))
            for path, size, num in zip(data.paths, sizes, used, strict=True)
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
    train = read_data([path for part in parts for path in part.paths], columns=columns)
    train.report.log()
    if len(train.examples) < 2 and eval_ratio is not None:
        raise UserError(f"--eval_ratio {eval_ratio}: one example cannot be split. Give --eval_data_path")
    evaluation = read_data(eval_paths, columns=columns) if eval_paths else None
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


def log_files(drawn: DrawnData) -> None:
    """Log the files of a run where there are several."""
    for name, uses in drawn.files.items():
        if len(uses) > 1:
            shown = [f"{use.path} {use.num_used:,} of {use.num_rows:,}" for use in uses[:MAX_SHOWN_FILES]]
            more = [f"and {len(uses) - MAX_SHOWN_FILES:,} more files"] if len(uses) > MAX_SHOWN_FILES else []
            logger.info(f"{name}: {len(uses):,} files, examples used: {', '.join([*shown, *more])}")


def warn_of_evaluation(drawn: DrawnData) -> None:
    """Warn of evaluation examples that are trained on."""
    train, evaluation = drawn.paths("train"), drawn.paths("eval")
    same = same_files(train, evaluation)
    if same:
        names = ", ".join(map(str, same[:MAX_SHOWN_FILES]))
        logger.warning(
            f"--eval_data_path names training data too ({names}), so the evaluation says how well it was learned by "
            "heart. Give other data, or --eval_ratio"
        )
    if len(same) < len(evaluation):
        warn_of_shared(drawn.examples["train"], drawn.examples["eval"])
