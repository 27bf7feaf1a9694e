"""Write a table as XLSX: texts stay texts, whatever a spreadsheet would take them for, and nothing is lost unsaid."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.data.xlsx_rows import MAX_ROWS, MAX_SHEET_COLUMNS, import_openpyxl

MAX_CELL_CHARACTERS = 32_767  # that Excel takes
MAX_INTEGER = 10**15  # beyond it a spreadsheet rounds
# XLSX spells out control characters, as _x0007_, and what looks like one that is spelled out
UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")


def write_workbook(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a workbook with one sheet: a header and rows.

    Args:
        path: The file.
        names: The header.
        rows: JSON values; lists and objects become JSON texts.

    Raises:
        UserError: openpyxl is missing, or the table is larger than a sheet.
    """
    openpyxl = import_openpyxl(path, "writes")
    if len(rows) >= MAX_ROWS or len(names) > MAX_SHEET_COLUMNS:
        raise UserError(
            f"{path.name}: a sheet holds {MAX_ROWS:,} rows of {MAX_SHEET_COLUMNS:,} columns. Give an output in .csv"
        )
    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet("answers")
    sheet.freeze_panes = "A2"
    num_truncated = 0
    for row in [names, *rows]:
        values = [cell_value(value) for value in row]
        num_truncated += any(isinstance(value, str) and len(value) > MAX_CELL_CHARACTERS for value in values)
        sheet.append([make_cell(openpyxl, sheet, value) for value in values])
    workbook.save(path)
    if num_truncated:
        logger.warning(
            f"{path.name}: texts of {num_truncated:,} rows are truncated to {MAX_CELL_CHARACTERS:,} characters, which "
            "is what a cell holds; .csv and .jsonl hold all"
        )


def cell_value(value: object) -> str | int | float | bool | None:
    """Return a JSON value as a spreadsheet keeps it; what it would change becomes text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < MAX_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return UNWRITABLE.sub(lambda match: f"_x{ord(match[0]):04X}_", text)


def make_cell(openpyxl: Any, sheet: Any, value: str | int | float | bool | None) -> Any:
    """Return a cell; a text that begins like a formula is marked as text, also for when it is edited."""
    if not isinstance(value, str):
        return value
    cell = openpyxl.cell.WriteOnlyCell(sheet, value=value[:MAX_CELL_CHARACTERS])
    cell.data_type = "s"
    cell.quotePrefix = value[:1] in tuple("=+-@")
    return cell
