"""What a data file holds: rows as they were read, and the examples that they become."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Example:
    """One training example: a question with its earlier turns, and the answer that is trained.

    Attributes:
        query: The question, without the history.
        answer: The answer.
        history: Earlier (question, answer) turns, oldest first; they are part of the prompt and not trained.
        where: file:line, for messages.
    """

    query: str
    answer: str
    history: tuple[tuple[str, str], ...]
    where: str


class Row(NamedTuple):
    """One row of a data file, before its form is applied.

    Attributes:
        where: file:line.
        value: The JSON value, or the cells of a table as text by column; None: it could not be read.
        error: Why it could not be read; None: it could.
    """

    where: str
    value: object = None
    error: str | None = None


class CellFault(str):
    """What a cell of a spreadsheet shows instead of a value; an error only where it is read.

    Attributes:
        fault: What is wrong, and what to do.
    """

    fault: str

    @classmethod
    def of(cls, text: str, fault: str) -> "CellFault":
        """Return a cell that shows a text."""
        cell = cls(text)
        cell.fault = fault
        return cell


@dataclass
class RowSource:
    """The rows of one file, read one by one.

    Attributes:
        rows: Read once, in order.
        header: The columns of a table; None: the file is JSON, and each row has its own keys.
        where: file:line of the header, or the file.
        notes: What the reader had to decide or convert; complete when all rows were read.
    """

    rows: Iterable[Row]
    where: str
    header: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
