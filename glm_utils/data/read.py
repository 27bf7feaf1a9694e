"""Read data files: names and globs -> rows -> examples, with every fault named by file and line.

A row goes the same way whatever its file: a reader makes a `Row` (json_rows, table_rows, xlsx_rows), the form of its
file turns that into an `Example` (`FileForm.parse`), and a `DataReport` collects what there is to say.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.data.checks import DataReport
from glm_utils.data.example import Example, Row, RowSource
from glm_utils.data.file_form import FileForm, check_object
from glm_utils.data.find_files import REMEDY, find_files
from glm_utils.data.forms import (
    KNOWN_KEYS,
    NO_COLUMNS,
    Answers,
    Columns,
    find_form,
    list_forms,
    nearest_form,
    show_keys,
)
from glm_utils.data.json_rows import read_lines, read_list
from glm_utils.data.table_rows import read_csv
from glm_utils.data.text_file import read_text_file, split_lines
from glm_utils.data.xlsx_rows import read_xlsx

FORMS_HELP = (
    "The forms:",
    *list_forms(),
    "Rename the keys, or name them with --prompt_column and --response_column",
)
WORKBOOKS, TABLES = (".xlsx", ".xlsm"), (".csv", ".tsv")
OTHER_SHEETS = (".xls", ".xlsb", ".ods", ".et", ".numbers")


@dataclass(frozen=True)
class ReadRow:
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
        examples: The examples.
        report: What was found.
        sizes: How many of the examples are from each file.
    """

    paths: tuple[Path, ...]
    examples: list[Example]
    report: DataReport
    sizes: tuple[int, ...]


def read_examples(
    paths: Path | str | Sequence[Path | str], needs_answer: bool = True, columns: Columns = NO_COLUMNS
) -> list[Example]:
    """Read and check data files, and log what is worth knowing; see `read_data`.

    Args:
        paths: Files or globs, separated by commas or as a list.
        needs_answer: False accepts examples without an answer too; their answer is then empty.
        columns: Names that the user gave.
    """
    data = read_data(paths, "required" if needs_answer else "optional", columns)
    data.report.log()
    return data.examples


def read_data(
    paths: Path | str | Sequence[Path | str], answers: Answers = "required", columns: Columns = NO_COLUMNS
) -> ExampleData:
    """Read and check data files.

    Args:
        paths: Files or globs, separated by commas or as a list.
        answers: Whether an answer is required, or read if it is there.
        columns: Names that the user gave.

    Raises:
        UserError: A file that is missing, empty or cannot be read, or rows that fit no form; all faults at once.
    """
    found, report, examples = find_files(paths), DataReport(), []
    for path in found:
        try:
            for read in read_rows(path, answers, columns, report):
                if read.example is not None:
                    examples.append(read.example)
                else:
                    report.add_error(read.error or "")
            if not report.num_rows[str(path)]:
                raise UserError(f"{path}: no examples in it. {REMEDY}")
        except UserError as error:
            report.add_error(error.message, error.details)
    report.raise_errors()
    return ExampleData(tuple(found), examples, report, tuple(report.num_rows[str(path)] for path in found))


def read_rows(path: Path, answers: Answers, columns: Columns, report: DataReport) -> Iterator[ReadRow]:
    """Read the rows of one file, those with faults too.

    Args:
        path: The file.
        answers: Whether an answer is required, read if it is there, or not read.
        columns: Names that the user gave.
        report: Gets the keys that are not read, and the notes; faults of rows are with the rows.

    Raises:
        UserError: A fault after which no row can be read.
    """
    name, form = str(path), None
    source = open_rows(path, answers, columns)
    report.notes[name] = source.notes
    if source.header is not None:
        form = form_of_table(source, answers, columns)
    for row in source.rows:
        report.num_rows[name] += 1
        if form is None and isinstance(row.value, dict) and row.error is None:
            found = find_form(row.value, columns)
            if found:
                form = FileForm(found, row.where, answers, columns)
            else:
                report.help_lines = FORMS_HELP
        read = apply_form(row, form, answers)
        if form and read.example and answers != "ignored":  # rows of prompts are written out again as they are
            report.add_unread(name, form.unread(row.value))
        yield read


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


def open_rows(path: Path, answers: Answers, columns: Columns) -> RowSource:
    """Open a file with the reader of its kind.

    Raises:
        UserError: It is missing, cannot be read, or of an unknown kind.
    """
    ending = path.suffix.lower()
    if ending in WORKBOOKS:
        return read_xlsx(path, columns.sheet)
    if columns.sheet is not None:
        raise UserError(f"{path}: --sheet {columns.sheet!r} is for XLSX. Leave it out")
    if ending in OTHER_SHEETS:
        raise UserError(f"{path}: a spreadsheet of another kind. Save it as .xlsx or as CSV UTF-8")
    file = read_text_file(path, REMEDY)
    notes = [file.note] if file.note else []
    first = file.text.lstrip()[:1]
    if ending in TABLES:
        source = read_csv(path, file.text, KNOWN_KEYS | set(columns.named.values()))
        source.notes[:0] = notes
        return source
    if ending == ".txt" and first not in ("{", "["):
        if answers == "required":
            raise UserError(f"{path}: lines of text hold no answers. {REMEDY}")
        if columns.named:
            flag, column = next(iter(columns.named.items()))
            raise UserError(f"{flag} {column}: {path} is text without columns. Leave it out")
        return RowSource(read_prompt_lines(path, file.text), str(path), ("prompt",), notes)
    if first == "[":
        return RowSource(read_list(path, file.text), str(path), None, notes)
    if first == "{" or ending in (".jsonl", ".json", "") or not first:
        return RowSource(read_lines(path, file.text), str(path), None, notes)
    raise UserError(f"{path}: unknown kind of file. {REMEDY}. Its name must end in .jsonl, .json, .csv or .xlsx")


def read_prompt_lines(path: Path, text: str) -> Iterator[Row]:
    """Yield each line that is not blank as a prompt."""
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            yield Row(f"{path}:{number}", {"prompt": line.removesuffix("\n").removesuffix("\r")})
