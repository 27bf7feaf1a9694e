"""Which reader opens a data file, by its ending and its beginning."""

from collections.abc import Iterator
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.data.example import Row, RowSource
from glm_utils.data.find_files import REMEDY
from glm_utils.data.forms import KNOWN_KEYS, Answers, Columns
from glm_utils.data.json_rows import read_lines, read_list
from glm_utils.data.table_rows import read_csv
from glm_utils.data.text_file import read_text_file, split_lines
from glm_utils.data.xlsx_rows import read_xlsx

WORKBOOKS, TABLES = (".xlsx", ".xlsm"), (".csv", ".tsv")
OTHER_SHEETS = (".xls", ".xlsb", ".ods", ".et", ".numbers")


def open_rows(path: Path, answers: Answers, columns: Columns, num_bytes: int | None = None) -> RowSource:
    """Open a file with the reader of its kind; see `read_rows`.

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
    file = read_text_file(path, REMEDY, num_bytes)
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
