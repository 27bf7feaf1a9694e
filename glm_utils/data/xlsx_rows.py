"""Rows of an XLSX workbook: one sheet, whose first row that is not empty is the header, every cell as text.

openpyxl reads the cells one row at a time. What it leaves out, and what could make it run for ever, is found before
in one pass over the sheet's XML: merged cells, formulas without a value, errors, cells far outside.
"""

import datetime
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from glm_utils.cli import UserError, nearest
from glm_utils.data.example import CellFault, RowSource
from glm_utils.data.table_rows import check_header, make_row
from glm_utils.data.text_file import check_file

MAX_UNPACKED_BYTES = 1 << 30
MAX_ROWS, MAX_SHEET_COLUMNS = 1 << 20, 1 << 14  # of a sheet, as Excel has them
MAX_FAULTS = 1000
INSTALL = "pip install -e '.[xlsx]' -c constraints.txt"
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
REFERENCE = re.compile(r"([A-Z]{1,3})([0-9]{1,7})")
Record = tuple[str, list[str]]  # file:line and cells


@dataclass
class SheetFacts:
    """What one pass over the XML of a sheet found.

    Attributes:
        num_cells: Cells that hold something.
        merged: Ranges of merged cells.
        faults: What is wrong with a cell, by row and column.
    """

    num_cells: int = 0
    merged: list[str] = field(default_factory=list)
    faults: dict[tuple[int, int], CellFault] = field(default_factory=dict)


def import_openpyxl(path: Path, verb: str) -> Any:
    """Return openpyxl.

    Raises:
        UserError: It is not installed.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"{path}: openpyxl, which {verb} XLSX, is not installed. {INSTALL}; or use CSV UTF-8"
        ) from error
    return openpyxl


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Translate what openpyxl, zipfile and the XML parser raise on a damaged workbook.

    Raises:
        UserError: Instead.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of styles and extensions that are not read
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # openpyxl lets pass what its parts raise: KeyError, BadZipFile, ...
        raise UserError(
            f"{path}: not a workbook that can be read ({type(error).__name__}: {str(error)[:200]}). Save it anew "
            "as .xlsx, or as CSV UTF-8"
        ) from error


def read_xlsx(path: Path, sheet: str | None) -> RowSource:
    """Read a sheet of a workbook.

    Args:
        path: The workbook.
        sheet: Its name; None: the only one that is not empty.

    Raises:
        UserError: openpyxl is missing, the workbook is damaged or too large, the sheet is not clear or has merged
            cells, or there is no header.
    """
    check_file(path, "Give a workbook")
    openpyxl = import_openpyxl(path, "reads")
    with faults_named(path):
        check_size(path)
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        chosen, facts = choose_sheet(path, workbook, sheet)
        if facts.merged:
            shown = ", ".join(facts.merged[:5]) + (f" and {len(facts.merged) - 5} more" if facts.merged[5:] else "")
            raise UserError(
                f"{path}: sheet {chosen.title!r} has merged cells ({shown}). Unmerge them and fill each cell"
            )
    notes: list[str] = []
    records = read_records(path, workbook, chosen, facts, notes)
    where, fields = next(records, (f"{path}:1", []))
    header = check_header(fields, where)
    rows = (make_row(header, pad(header, cells), where) for where, cells in records)
    return RowSource(rows, where, header, notes)


def check_size(path: Path) -> None:
    """Refuse a workbook that is none, or that would fill the memory.

    Raises:
        UserError: It is an old or encrypted one, or holds too much.
    """
    with path.open("rb") as file:
        if file.read(4) == b"\xd0\xcf\x11\xe0":
            raise UserError(f"{path}: an old or encrypted workbook. Save it as .xlsx without a password")
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(entry.file_size for entry in archive.infolist())
    if num_bytes > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path}: unpacked {num_bytes / 1e9:,.1f} GB, at most {MAX_UNPACKED_BYTES / 1e9:.1f} GB are read. "
            "Save it as CSV UTF-8, or split it"
        )


def choose_sheet(path: Path, workbook: Any, sheet: str | None) -> tuple[Any, SheetFacts]:
    """Return a sheet and its facts: the one that is named, or the only one that is not empty.

    Raises:
        UserError: There is no such sheet, none that holds anything, or several.
    """
    sheets = {one.title: one for one in workbook.worksheets}
    if sheet is not None:
        if sheet not in sheets:
            raise UserError(f"{path}: no sheet {sheet!r} (--sheet). {nearest(sheet, list(sheets)[:20], 'sheets')}")
        return sheets[sheet], inspect_sheet(path, workbook, sheets[sheet])
    facts = {title: inspect_sheet(path, workbook, one) for title, one in sheets.items()}
    filled = [title for title, found in facts.items() if found.num_cells]
    if not filled:
        raise UserError(f"{path}: no examples in it, all sheets are empty")
    if len(filled) > 1:
        names = ", ".join(map(repr, filled[:20]))
        raise UserError(f"{path}: {len(filled)} sheets hold something: {names}. Choose with --sheet")
    return sheets[filled[0]], facts[filled[0]]


def inspect_sheet(path: Path, workbook: Any, sheet: Any) -> SheetFacts:
    """Find what openpyxl's reader of rows does not tell, and what would mislead it.

    Raises:
        UserError: A row or a cell lies outside of what a sheet can hold, or rows are out of order.
    """
    facts, data, last_row = SheetFacts(), None, 0
    with workbook._archive.open(sheet._worksheet_path) as file:  # no public name leads there
        for event, element in ElementTree.iterparse(file, ("start", "end")):
            tag = element.tag.rpartition("}")[2]
            if event == "start":
                data = element if tag == "sheetData" else data
            elif tag == "mergeCell":
                facts.merged.append(element.get("ref", "?"))
            elif tag == "row":
                row = int(element.get("r", last_row + 1))
                if not last_row < row <= MAX_ROWS or not inspect_row(facts, element, row):
                    raise UserError(
                        f"{path}: damaged, row {row} of sheet {sheet.title!r} is out of place. Save it anew"
                    )
                last_row = row
                if data is not None:
                    data.clear()  # what was read need not stay in memory
    return facts


def inspect_row(facts: SheetFacts, element: ElementTree.Element, row: int) -> bool:
    """Note the cells of a row; return whether all lie in columns that a sheet has."""
    column = 0
    for cell in element:
        column = find_column(cell.get("r"), row, column)
        if not 0 < column <= MAX_SHEET_COLUMNS:
            return False
        note_cell(facts, cell, (row, column))
    return True


def find_column(reference: str | None, row: int, column: int) -> int:
    """Return the column of a cell: the next one if it does not say, 0 if it is not one of its row."""
    if reference is None:
        return column + 1
    match = REFERENCE.fullmatch(reference)
    number = 0
    for letter in match[1] if match and int(match[2]) == row else "":
        number = 26 * number + ord(letter) - ord("A") + 1
    return number


def note_cell(facts: SheetFacts, cell: ElementTree.Element, place: tuple[int, int]) -> None:
    """Count a cell, and note what is wrong with it."""
    parts = {part.tag.rpartition("}")[2]: part for part in cell}
    text = "".join(parts["v"].itertext()) if "v" in parts else ""
    facts.num_cells += bool(text) or "is" in parts or "f" in parts
    if len(facts.faults) >= MAX_FAULTS:
        return
    if cell.get("t") == "e":
        facts.faults[place] = CellFault.of(text or "#?", "is an error of the spreadsheet. Correct the cell")
    elif "f" in parts and not text and cell.get("t") != "str":  # a formula may give an empty text
        fault = "is a formula whose value is not in the file. Open it in Excel, WPS or LibreOffice and save it"
        facts.faults[place] = CellFault.of("(formula)", fault)


def read_records(path: Path, workbook: Any, sheet: Any, facts: SheetFacts, notes: list[str]) -> Iterator[Record]:
    """Yield the rows that are not empty; at the end, note what was not text."""
    sheet.reset_dimensions()  # what the file says of its size need not be true
    kinds: Counter[str] = Counter()
    rows = enumerate(sheet.iter_rows(values_only=True), start=1)
    while True:
        with faults_named(path):
            number, values = next(rows, (0, ()))
        if not number:
            break
        cells = [facts.faults.get((number, column)) or to_text(value, kinds) for column, value in enumerate(values, 1)]
        if any(cells):
            yield f"{path}:{number}", cells
    workbook.close()
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        notes.append(f"cells that are no text are read as text, as they are stored: {counts}")


def to_text(value: object, kinds: Counter[str]) -> str:
    """Return a cell as text, and count its kind if it is none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return ESCAPED.sub(lambda match: chr(int(match[1], 16)), value) if "_x" in value else value
    if isinstance(value, bool):
        kinds["truth values"] += 1
        return str(value).upper()
    if isinstance(value, int | float):
        kinds["numbers"] += 1
        return str(value) if isinstance(value, int) else f"{value:.15g}"  # as many digits as a spreadsheet keeps
    kinds["dates and times"] += 1
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def pad(header: tuple[str, ...], cells: list[str]) -> list[str]:
    """Return the cells of a row with empty ones for those that the sheet leaves out at the end."""
    return [*cells, *[""] * (len(header) - len(cells))]
