"""What reading data files found: faults of rows, reported all at once, and what is worth knowing, said once."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.visible_text import one_line

MAX_SHOWN_ERRORS, MAX_SHOWN_KEYS = 20, 20


@dataclass
class DataReport:
    """What reading found.

    Attributes:
        num_rows: Rows of each file.
        unread: Per file, how many rows have each key that is not read.
        notes: Per file, what the reader had to decide or convert, e.g. the encoding.
        errors: The first faults.
        num_errors: How many there are.
        help_lines: What helps with a fault and need be said only once, e.g. the list of forms.
    """

    num_rows: Counter[str] = field(default_factory=Counter)
    unread: dict[str, Counter[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0
    help_lines: tuple[str, ...] = ()

    def add_error(self, error: str, help_lines: Sequence[str] = ()) -> None:
        """Count a fault, and keep it, as one line of a list, if it is among the first."""
        self.num_errors += 1
        self.help_lines = tuple(help_lines) or self.help_lines
        if len(self.errors) < MAX_SHOWN_ERRORS:
            self.errors.append(one_line(error))

    def add_unread(self, name: str, keys: Iterable[str]) -> None:
        """Count the keys of a row that are not read."""
        self.unread.setdefault(name, Counter()).update(keys)

    def log(self) -> None:
        """Log, once per file, its notes and the keys that were not read."""
        for name, notes in self.notes.items():
            for note in notes:
                logger.info(f"{name}: {note}")
        for name, counts in self.unread.items():
            if counts:
                shown = [f"{key} ({count:,})" for key, count in counts.most_common(MAX_SHOWN_KEYS)]
                more = [f"and {len(counts) - MAX_SHOWN_KEYS:,} more"] if len(counts) > MAX_SHOWN_KEYS else []
                logger.warning(
                    f"{name}: keys that are not read, with their rows of {self.num_rows[name]:,}: "
                    + ", ".join([*shown, *more])
                )

    def raise_errors(self) -> None:
        """Raise the faults as one error, after logging what may explain them.

        Raises:
            UserError: There are any.
        """
        if not self.errors:
            return
        self.log()
        if self.num_errors == 1:
            raise UserError(self.errors[0], self.help_lines)
        hidden = self.num_errors - len(self.errors)
        more = [f"  and {hidden:,} more"] if hidden else []
        faults = [f"  {error}" for error in self.errors]
        raise UserError(f"{self.num_errors:,} faults:", [*faults, *more, *self.help_lines])
