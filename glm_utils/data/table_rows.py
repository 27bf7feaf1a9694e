"""Rows of a CSV file: columns separated by commas, semicolons or tabs, named by a header."""

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.data.example import Row, RowSource
from glm_utils.data.text_file import split_lines

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MAX_FIELD_CHARACTERS = 1 << 30  # of a CSV field; the csv module's own limit is 128 KiB
MAX_COLUMNS = 1000


def read_csv(path: Path, text: str, known: Collection[str]) -> RowSource:
    """Read a table.

    Args:
        path: The file, for messages.
        text: Its text.
        known: Names of columns, by which the delimiter is recognized.

    Raises:
        UserError: No header, one that cannot be read, or several possible delimiters.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    if "\n" not in text:  # ends of lines as of old Macs
        text = text.replace("\r", "\n")
    delimiter = find_delimiter(path, text, known)
    records = read_records(path, text, delimiter)
    where, fields = next(records, (f"{path}:1", []))
    header = check_header(fields, where)
    notes = [] if delimiter == "," else [f"columns are separated by {DELIMITERS[delimiter]}"]
    return RowSource((make_row(header, fields, where) for where, fields in records), where, header, notes)


def read_records(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield file:line and fields of the records that are not blank.

    Raises:
        UserError: Quotes that do not pair up.
    """
    reader = csv.reader(split_lines(text), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield f"{path}:{line}", fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: broken CSV, {error}. Quotes must pair up; save the table anew") from None


def find_delimiter(path: Path, text: str, known: Collection[str]) -> str:
    """Recognize what separates the columns: with it the header has a known name, or it alone gives several columns.

    Raises:
        UserError: Several would do, or the header's quotes do not pair up.
    """
    headers = {delimiter: read_first(path, text, delimiter) for delimiter in DELIMITERS}
    fitting = [delimiter for delimiter, names in headers.items() if set(names) & set(known)]
    if fitting:
        return max(fitting, key=lambda delimiter: len(headers[delimiter]))
    several = [delimiter for delimiter, names in headers.items() if len(names) > 1]
    if len(several) > 1:
        kinds = " or ".join(DELIMITERS[delimiter] for delimiter in several)
        raise UserError(
            f"{path}:1: are the columns separated by {kinds}? Quote names that hold one, or save it with commas"
        )
    return several[0] if several else ","


def read_first(path: Path, text: str, delimiter: str) -> list[str]:
    """Return the names of the header with a delimiter; none if it cannot be read with it."""
    try:
        _, fields = next(read_records(path, text, delimiter), ("", []))
    except UserError:
        return []
    return [field.strip() for field in fields]


def check_header(fields: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the names of the columns; one without a name gets its number.

    Raises:
        UserError: Too many columns, or a name stands twice.
    """
    names = [name.strip() or f"(column {number})" for number, name in enumerate(strip_empty(fields), start=1)]
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{where}: {len(names):,} columns, at most {MAX_COLUMNS:,} are read. Delete those not needed")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where}: column {name!r} stands twice in the header. Rename one")
        seen.add(name)
    return tuple(names)


def strip_empty(fields: Sequence[str]) -> Sequence[str]:
    """Return fields without the empty ones at the end, which spreadsheets leave."""
    end = len(fields)
    while end and not fields[end - 1].strip():
        end -= 1
    return fields[:end]


def make_row(header: tuple[str, ...], fields: Sequence[str], where: str) -> Row:
    """Return the row of a record."""
    cells = dict(zip(header, fields, strict=False))
    extra = len(strip_empty(fields)) > len(header)
    if extra or len(fields) < len(header):
        count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
        error = f"{where}: {count}, the header has {len(header)}. Quote fields that hold a separator"
        return Row(where, cells, error)
    return Row(where, cells)
