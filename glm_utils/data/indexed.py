"""Files of more rows than memory should hold: where the rows of JSON lines begin, and examples read when needed.

Below MAX_ROWS_IN_MEMORY nothing here is used. Above, the first rows of each file are checked as those of any file; of
the others only the places are known until they are read.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

from glm_utils.cli import UserError
from glm_utils.data.example import Example
from glm_utils.data.file_form import FileForm
from glm_utils.data.json_rows import parse_line
from glm_utils.data.text_file import find_encoding

MAX_ROWS_IN_MEMORY = 1_000_000  # of all files together
MIN_ROW_BYTES = 20  # {"query":"","response":""} is longer: a file of fewer bytes a row need not be counted
NUM_CHECKED_ROWS, MAX_CHECKED_BYTES = 100_000, 256 << 20  # of each file, when it is opened
STRIDE = 16  # the place of every 16th row is kept, 1 byte a row; the others are found from there
BUFFER_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnusableRow(UserError):
    """A row that no example can be made of; another one may take its place."""


class LineIndex:
    """Where the rows of a file of JSON lines begin. Blank lines are no rows.

    Attributes:
        path: The file.
        num_rows: Its rows.
        num_checked_bytes: The bytes of the first rows, which are checked when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        """Scan a file once."""
        self.path, self.num_rows, self.num_checked_bytes = path, 0, 0
        self.offsets, self.numbers = array("q"), array("q")  # of every 16th row: its place, and its line
        self.state, self.file_id = identify(os.stat(path))
        self._fd: int | None = None
        offset = num_checked = 0
        with path.open("rb", buffering=BUFFER_BYTES) as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(BYTE_ORDER_MARK):
                    line, offset = line[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
                if line[:1] == b"{" or not is_blank(line):
                    if self.num_rows % STRIDE == 0:
                        self.offsets.append(offset)
                        self.numbers.append(number)
                    self.num_rows += 1
                    if self.num_rows <= NUM_CHECKED_ROWS and (offset < MAX_CHECKED_BYTES or num_checked == 0):
                        num_checked, self.num_checked_bytes = self.num_rows, offset + len(line)
                offset += len(line)
        self.num_checked = num_checked
        self.num_bytes = offset

    def __getstate__(self) -> dict:
        """Leave out the open file: a process that gets a copy opens its own."""
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a row as it stands in the file, and its line.

        Raises:
            UserError: The file changed.
        """
        block = index // STRIDE
        start = self.offsets[block]
        end = self.offsets[block + 1] if block + 1 < len(self.offsets) else self.num_bytes
        data, num_before = self._read_bytes(start, end), index % STRIDE
        for number, line in enumerate(data.split(b"\n"), start=self.numbers[block]):
            if not is_blank(line):
                if not num_before:
                    return line, number
                num_before -= 1
        raise UserError(self._changed())

    def _read_bytes(self, start: int, end: int) -> bytes:
        """Read a part of the file, which this process opens when it is first needed."""
        try:
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self._fd = fd
            state, file_id = identify(os.fstat(self._fd))
            data = os.pread(self._fd, end - start, start)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        if state != self.state or file_id != self.file_id or len(data) != end - start:
            raise UserError(self._changed())
        return data

    def _changed(self) -> str:
        return (
            f"{self.path}: changed while it was in use, so its rows are not where they were. Restore it to go on from "
            "a checkpoint, or start from scratch with a file that stays as it is"
        )


def identify(stat: os.stat_result) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what changes when a file is written to, and what when another one takes its place."""
    return (stat.st_size, stat.st_mtime_ns), (stat.st_dev, stat.st_ino)


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space, also that of other scripts."""
    if b"!" <= line[:1] <= b"~":  # most lines
        return False
    return not line.decode("utf-8", "replace").strip()


class IndexedExamples(Sequence[Example]):
    """The examples of one file, each read when it is asked for.

    Every process opens the file for itself; copies may go to other processes.

    Attributes:
        is_streamed: Says that examples are not in memory, that only the first were checked, and that getting one may
            raise UnusableRow.
        lines: Where the rows are.
        form: The form of the file.
    """

    is_streamed = True

    def __init__(self, lines: LineIndex, form: FileForm) -> None:
        self.lines, self.form = lines, form

    def __len__(self) -> int:
        return self.lines.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Read one example, or several.

        Raises:
            UnusableRow: No example can be made of the row.
            UserError: The file changed.
        """
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        line, number = self.lines.read(range(len(self))[index])
        where = f"{self.lines.path}:{number}"
        try:
            row = parse_line(line.decode("utf-8"), where)
            if row.error is not None:
                raise UnusableRow(row.error)
            return self.form.parse(row.value, where)
        except UnicodeDecodeError:
            raise UnusableRow(f"{where}: not UTF-8. Repair that line, or convert the file") from None
        except UserError as error:
            raise UnusableRow(error.message, error.details) from None


class JoinedExamples(Sequence[Example]):
    """The examples of several files, one after the other, in memory or not.

    Attributes:
        is_streamed: Whether any of them are not in memory.
    """

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(map(len, self.parts)))
        self.is_streamed = any(map(is_streamed, self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example, or several; see IndexedExamples."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        return self.parts[number][index - (self.ends[number - 1] if number else 0)]


def is_streamed(examples: Sequence[Example]) -> bool:
    """Whether examples are read when they are asked for, and only the first of them were checked."""
    return getattr(examples, "is_streamed", False)


def checked_examples(examples: Sequence[Example]) -> Sequence[Example]:
    """Return examples of which each can be read: the first of streamed ones, else all."""
    return read_first(examples) if is_streamed(examples) else examples


def read_first(examples: Sequence[Example]) -> list[Example]:
    """Return the first examples of many, as many as are checked of a file, without those that cannot be used.

    Raises:
        UserError: None of them can be used.
    """
    found, faults = [], []
    for index in range(min(len(examples), NUM_CHECKED_ROWS)):
        try:
            found.append(examples[index])
        except UnusableRow as error:
            faults.append(error)
    if not found:
        raise faults[0]
    return found


def index_large_files(paths: Sequence[Path]) -> dict[Path, LineIndex]:
    """Index files of JSON lines in UTF-8 if together they have more rows than memory should hold.

    Args:
        paths: Files that may be JSON lines, but for their beginning; others are left out.
    """
    candidates = [path for path in paths if begins_as_object(path)]
    if sum(path.stat().st_size for path in candidates) <= MAX_ROWS_IN_MEMORY * MIN_ROW_BYTES:
        return {}
    indexes = [LineIndex(path) for path in candidates]
    if sum(index.num_rows for index in indexes) <= MAX_ROWS_IN_MEMORY:
        return {}
    return {index.path: index for index in indexes if is_utf8(index)}


def begins_as_object(path: Path) -> bool:
    """Whether a file can be read and begins with an object of JSON."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(BUFFER_BYTES).decode("utf-8-sig", "ignore").lstrip()[:1] == "{"
    except (OSError, ValueError):
        return False


def is_utf8(index: LineIndex) -> bool:
    """Whether the checked rows of a file are in UTF-8, perhaps damaged, and not in another encoding."""
    with index.path.open("rb") as file:
        return find_encoding(file.read(index.num_checked_bytes))[0] == "utf-8-sig"
