"""The examples of a run, drawn by its seed, and what is taken of which file."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loguru import logger

from glm_utils.data.example import Example
from glm_utils.data.find_files import show_paths

MAX_SHOWN_FILES = 20


@dataclass(frozen=True)
class FileUse:
    """What a run takes of a file.

    Attributes:
        path: The file.
        num_rows: Examples in it.
        num_used: Those that are taken.
        share: Share of the mixture, together with the other files of the same glob; None: it is not mixed.
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
        mixture: Names of the parts of a mixture and how many examples each has, in their order; empty: there is none.
    """

    examples: Mapping[str, Sequence[Example]]
    files: Mapping[str, list[FileUse]]
    identity: dict = field(default_factory=dict)
    held_out: bool = False
    mixture: Sequence[tuple[str, int]] = ()

    def paths(self, name: str) -> list[Path]:
        """Return the files of "train" or "eval"."""
        return [Path(use.path) for use in self.files[name]]

    def source(self, name: str) -> str | list[str]:
        """Return where the examples of "train" or "eval" are from, for a record: files, or that they were held out."""
        paths = self.paths(name)
        if name == "eval" and self.held_out:
            return f"--eval_ratio {self.identity['eval_ratio']:g} of {', '.join(map(str, paths))}"
        return show_paths(paths)

    def log_files(self) -> None:
        """Log the files of a run where there are several."""
        for name, uses in self.files.items():
            if len(uses) > (len(self.mixture) or 1):  # the log of a mixture names its parts
                shown = [f"{use.path} {use.num_used:,} of {use.num_rows:,}" for use in uses[:MAX_SHOWN_FILES]]
                more = [f"and {len(uses) - MAX_SHOWN_FILES:,} more files"] if len(uses) > MAX_SHOWN_FILES else []
                logger.info(f"{name}: {len(uses):,} files, examples used: {', '.join([*shown, *more])}")

    def log_token_shares(self, lengths: Sequence[int]) -> None:
        """Log the shares of a mixture by tokens, where each training example is one that was encoded.

        Args:
            lengths: Tokens of each encoded example.
        """
        if not self.mixture or len(lengths) != len(self.examples["train"]):
            return
        remaining = iter(lengths)
        tokens = [sum(itertools.islice(remaining, num)) for _, num in self.mixture]
        shown = [f"{name} {num / sum(tokens):.2%}" for (name, _), num in zip(self.mixture, tokens, strict=True)]
        logger.info(f"mixture by tokens: {', '.join(shown)}")

    def record(self) -> dict[str, list[dict]]:
        """Return the files as run_config.json holds them."""
        return {name: [asdict(use) for use in uses] for name, uses in self.files.items()}
