"""Read data files: names and globs -> rows -> examples, with every fault named by file and line.

A row goes the same way whatever its file: a reader makes a `Row` (readers.py chooses it), the form of its
file turns that into an `Example` (`FileForm.parse`), and a `DataReport` collects what there is to say.
"""

import difflib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from glm_utils.cli import UserError
from glm_utils.data.checks import DataReport
from glm_utils.data.example import Example, Row, RowSource
from glm_utils.data.file_form import FileForm, check_object
from glm_utils.data.find_files import REMEDY, find_files
from glm_utils.data.forms import (
    NO_COLUMNS,
    Answers,
    Columns,
    find_form,
    list_forms,
    nearest_form,
    show_keys,
)
from glm_utils.data.indexed import (
    MAX_ROWS_IN_MEMORY,
    IndexedExamples,
    JoinedExamples,
    LineIndex,
    index_large_files,
)
from glm_utils.data.readers import OTHER_SHEETS, TABLES, WORKBOOKS, open_rows

FORMS_HELP = (
    "The forms:",
    *list_forms(),
    "Rename the keys, or name them with --prompt_column and --response_column",
)


class ReadRow(NamedTuple):
    """A row after its form was applied.

    Attributes:
        row: The row as it was read.
        example: What it became; None: it has an error.
        error: Why it cannot be used; None: it can.
    """

    row: Row
    example: Example | None = None
    error: str | None = None


@dataclass(frozen=True)
class ExampleData:
    """The examples of some files, and what reading them found.

    Attributes:
        paths: The files, in the order of their examples.
        examples: The examples; of very large files not in memory, see `is_streamed`.
        report: What was found.
        sizes: How many of the examples are from each file.
    """

    paths: tuple[Path, ...]
    examples: Sequence[Example]
    report: DataReport
    sizes: tuple[int, ...]


def read_examples(
    paths: Path | str | Sequence[Path | str],
    needs_answer: bool = True,
    columns: Columns = NO_COLUMNS,
    may_stream: bool = False,
) -> Sequence[Example]:
    """Read and check data files, and log what is worth knowing; see `read_data`.

    Args:
        paths: Files or globs, separated by commas or as a list.
        needs_answer: False accepts examples without an answer too; their answer is then empty.
        columns: Names that the user gave.
        may_stream: See `read_data`.
    """
    data = read_data(paths, "required" if needs_answer else "optional", columns, may_stream)
    data.report.log()
    return data.examples


def read_data(
    paths: Path | str | Sequence[Path | str],
    answers: Answers = "required",
    columns: Columns = NO_COLUMNS,
    may_stream: bool = False,
) -> ExampleData:
    """Read and check data files.

    Args:
        paths: Files or globs, separated by commas or as a list.
        answers: Whether an answer is required, or read if it is there.
        columns: Names that the user gave.
        may_stream: Whether examples may be read when they are needed, see `is_streamed`, if they are very many.

    Raises:
        UserError: A file that is missing, empty or cannot be read, or rows that fit no form; all faults at once.
    """
    found, report = find_files(paths), DataReport()
    lines = [path for path in found if path.suffix.lower() not in (*WORKBOOKS, *TABLES, *OTHER_SHEETS)]
    large = index_large_files(lines) if may_stream else {}
    parts: list[Sequence[Example]] = []
    for path in found:
        try:
            if path in large:
                parts.append(read_large_file(large[path], answers, columns, report))
            else:
                parts.append(read_file(path, answers, columns, report))
            if not report.num_rows[str(path)]:
                raise UserError(f"{path}: no examples in it. {REMEDY}")
        except UserError as error:
            report.add_error(error.message, error.details)
    report.raise_errors()
    examples = parts[0] if len(parts) == 1 else join(parts)
    return ExampleData(tuple(found), examples, report, tuple(map(len, parts)))


def join(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """Return the examples of all files as one sequence, a list if they are in memory."""
    joined = JoinedExamples(parts)
    return joined if joined.is_streamed else [example for part in parts for example in part]


def read_file(path: Path, answers: Answers, columns: Columns, report: DataReport) -> list[Example]:
    """Return the examples of a file; see `read_rows`."""
    examples = []
    gc_was_enabled = gc.isenabled()
    gc.disable()  # examples refer to nothing else, and looking through them again and again takes a fifth of the time
    try:
        for read in read_rows(path, answers, columns, report):
            if read.example is not None:
                examples.append(read.example)
            else:
                report.add_error(read.error or "")
    finally:
        if gc_was_enabled:
            gc.enable()
    if len(examples) > MAX_ROWS_IN_MEMORY:
        report.notes[str(path)].append(
            f"{len(examples):,} examples are held in memory. Of JSON lines in UTF-8 they would be read as needed"
        )
    return examples


def read_large_file(lines: LineIndex, answers: Answers, columns: Columns, report: DataReport) -> IndexedExamples:
    """Check the first rows of a file, and return all as examples that are read when they are needed."""
    form = None
    for read in read_rows(lines.path, answers, columns, report, lines.num_checked_bytes):
        form = form or form_of_row(read.row, answers, columns)
        if read.error is not None:
            report.add_error(read.error)
    if form is None:
        raise UserError(f"{lines.path}: none of its first {lines.num_checked:,} rows has a known form", FORMS_HELP)
    report.notes[str(lines.path)].append(
        f"{lines.num_rows:,} rows, more than are held in memory: they are read and tokenized as they are needed. The "
        f"first {lines.num_checked:,} are checked now, the others then"
    )
    return IndexedExamples(lines, form)


def read_rows(
    path: Path, answers: Answers, columns: Columns, report: DataReport, num_bytes: int | None = None
) -> Iterator[ReadRow]:
    """Read the rows of one file, those with faults too.

    Args:
        path: The file.
        answers: Whether an answer is required, read if it is there, or not read.
        columns: Names that the user gave.
        report: Gets the keys that are not read, and the notes; faults of rows are with the rows.
        num_bytes: How much of the file is read; None: all.

    Raises:
        UserError: A fault after which no row can be read.
    """
    name, form = str(path), None
    source = open_rows(path, answers, columns, num_bytes)
    report.notes[name] = source.notes
    if source.header is not None:
        form = form_of_table(source, answers, columns)
    for row in source.rows:
        report.num_rows[name] += 1
        if form is None and isinstance(row.value, dict) and row.error is None:
            form = form_of_row(row, answers, columns)
            if form is None:
                report.help_lines = FORMS_HELP
        read = apply_form(row, form, answers)
        # rows of prompts are written out again as they are
        if form and read.example and answers != "ignored" and (unread := form.unread(row.value)):
            report.add_unread(name, unread)
        yield read


def form_of_row(row: Row, answers: Answers, columns: Columns) -> FileForm | None:
    """Return the form of a file of JSON by one of its rows; None: the row has no known form."""
    found = find_form(row.value, columns) if isinstance(row.value, dict) and row.error is None else None
    return FileForm(found, row.where, answers, columns) if found else None


def apply_form(row: Row, form: FileForm | None, answers: Answers) -> ReadRow:
    """Return a row with its example or its error.

    Args:
        row: The row.
        form: The form of its file; None: no row so far had one.
        answers: See `read_data`.
    """
    if row.error is not None:
        return ReadRow(row, error=row.error)
    try:
        if form is None:
            raise UserError(explain_unknown(row.value, row.where, answers))
        return ReadRow(row, form.parse(row.value, row.where))
    except UserError as error:
        return ReadRow(row, error=str(error))


def explain_unknown(value: object, where: str, answers: Answers) -> str:
    """Say that a row fits no form, and which is nearest."""
    keys = list(check_object(value, where))
    near = nearest_form(keys)
    needed = (near.prompt, near.answer if answers == "required" else None)
    missing = [key for key in needed if key and key not in keys]
    close = {key: difflib.get_close_matches(key, keys, n=1) for key in missing}
    hints = "".join(f" Is {found[0]!r} meant for {key!r}?" for key, found in close.items() if found)
    lacking = " and ".join(map(repr, missing))
    return f"{where}: unknown form ({show_keys(keys)}). The nearest is {near.name}, which needs {lacking}.{hints}"


def form_of_table(source: RowSource, answers: Answers, columns: Columns) -> FileForm:
    """Return the form of a table, by its header.

    Raises:
        UserError: The header fits no form, or lacks a column.
    """
    header = source.header or ()
    found = find_form(header, columns)
    if not header:
        raise UserError(f"{source.where}: no examples in it. {REMEDY}")
    if found is None:
        raise UserError(explain_unknown(dict.fromkeys(header), source.where, answers), FORMS_HELP)
    form = FileForm(found, source.where, answers, columns, in_table=True)
    form.check_keys(header, source.where)
    return form
