"""Tables as people keep them: CSV of any dialect, workbooks with all that spreadsheets put into them."""

import datetime
import re
import sys
import zipfile

import openpyxl
import pytest

from glm_utils.cli import UserError
from glm_utils.data import read_data, read_examples, table_rows, text_file, xlsx_rows
from glm_utils.data.forms import Columns
from tests.data_files import write_sheets

HEADER = ["question", "answer"]


@pytest.fixture
def csv_file(tmp_path):
    """Write a CSV file."""

    def write(text):
        path = tmp_path / "a.csv"
        path.write_bytes(text.encode())
        return path

    return write


@pytest.fixture
def book(tmp_path):
    """Write a workbook with one sheet: a header and rows."""
    return lambda *rows, header=HEADER: write_sheets(tmp_path / "a.xlsx", {"data": [header, *rows]})


@pytest.fixture
def edited(book):
    """Write a workbook and replace a piece of its sheet's XML."""

    def write(pattern, new, *rows):
        path = book(*rows)
        with zipfile.ZipFile(path) as archive:
            parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = "xl/worksheets/sheet1.xml"
        text, count = re.subn(pattern, new, parts[name].decode())
        assert count
        parts[name] = text.encode()
        with zipfile.ZipFile(path, "w") as archive:
            for part, data in parts.items():
                archive.writestr(part, data)
        return path

    return write


def failed(path, **columns):
    """Return the error of reading a file."""
    with pytest.raises(UserError) as error_info:
        read_examples(path, columns=Columns(**columns))
    return str(error_info.value)


def pairs(path, **columns):
    return [(one.query, one.answer) for one in read_examples(path, columns=Columns(**columns))]


# ---- CSV


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("question,answer\na,b\n", None),
        ("question;answer\na;b\n", "semicolons"),
        ("question\tanswer\r\na\tb\r\n", "tabs"),
        ("\ufeffquestion,answer\r\n\r\na,b\r\n,\r\n", None),
        ("question,answer\ra,b\r", None),
        ("question;answer;x,y\na;b;\n", "semicolons"),
        ('"question","answer"\n"a","b"', None),
        ("question,answer,,\na,b,,\n", None),
        ("question,answer\na,b,,\n", None),
        (" question , answer \na,b\n", None),
    ],
)
def test_dialects_of_csv(csv_file, log_lines, text, note):
    assert pairs(csv_file(text)) == [("a", "b")]
    assert [line for line in log_lines if "separated" in line] == (
        [f"INFO {csv_file(text)}: columns are separated by {note}"] if note else []
    )


def test_a_row_of_several_lines_is_named_by_its_first(csv_file):
    path = csv_file('question,answer\n"a\n\nb","c\nd"\ne,\n"f\n",g\n')
    assert failed(path) == f"{path}:6: the answer is empty. Fill it or delete the example"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b,c\n", ":2: 3 fields, the header has 2. Quote fields that hold a separator"),
        ("question,answer\na\n", ":2: 1 field, the header has 2"),
        ('question,answer\na,b\n"c,d\n', ":3: broken CSV"),
        ('question,answer\n"a"x,b\n', ":2: broken CSV"),
        ("question,answer,answer\na,b,c\n", ":1: column 'answer' stands twice in the header"),
        (",".join(f"c{number}" for number in range(10_000)) + "\n", ":1: 10,000 columns, at most 1,000 are read"),
        ("question,text\na,b\n", ":1: the header has no 'answer' (its keys: question, text)"),
        ("question,answer\na,b\0\n", ":2: a NUL byte"),
        ("question,answer\n", ": no examples in it"),
        ("", "no examples in it"),
    ],
)
def test_faults_of_csv(csv_file, text, message):
    path = csv_file(text)
    assert failed(path).startswith(f"{path}:")
    assert message in failed(path)


def test_empty_cells_are_absent(csv_file):
    (example,) = read_examples(csv_file("instruction,input,output,history,system\na,,b,,\n"))
    assert (example.query, example.history) == ("a", ())


def test_numbers_of_csv_stay_as_they_are_written(csv_file):
    assert pairs(csv_file("question,answer\n007,1.50\n")) == [("007", "1.50")]


# ---- workbooks


def test_values_of_cells_become_texts(book, log_lines):
    day, moment = datetime.date(2026, 11, 26), datetime.datetime(2026, 11, 26, 19, 30)
    values = ["12", 12, 12.0, 0.1 + 0.2, 13800138000, day, moment, datetime.time(8, 5), True, 1e20]
    path = book(*([value, "x"] for value in values))
    texts = ["12", "12", "12", "0.3", "13800138000", "2026-11-26", "2026-11-26 19:30:00", "08:05:00", "TRUE", "1e+20"]
    assert [query for query, _ in pairs(path)] == texts
    (line,) = log_lines
    assert line.endswith(
        "cells that are no text are read as text, as they are stored: 3 dates and times, 5 numbers, 1 truth values"
    )


def test_rows_of_a_workbook_keep_their_numbers(book):
    path = book([None, None], ["a", "b"], [None, "c"], [" x ", "_x000D_d\ne"])
    assert failed(path) == f"{path}:4: the question is empty. Fill it or delete the example"


def test_a_sheet_is_chosen(tmp_path):
    path = write_sheets(tmp_path / "a.xlsx", {"一": [HEADER, ["a", "b"]], "empty": [], "二": [HEADER, ["c", "d"]]})
    assert pairs(path, sheet="二") == [("c", "d")]
    assert failed(path) == f"{path}: 2 sheets hold something: '一', '二'. Choose with --sheet"
    assert "no sheet 'emtpy' (--sheet). Did you mean empty?" in failed(path, sheet="emtpy")
    assert "no examples in it" in failed(path, sheet="empty")
    path = write_sheets(tmp_path / "b.xlsx", {"empty": [], "二": [HEADER, ["c", "d"]]})
    assert pairs(path) == [("c", "d")]
    assert "all sheets are empty" in failed(write_sheets(tmp_path / "c.xlsx", {"empty": []}))


def test_a_sheet_of_another_kind_of_file(csv_file):
    assert "--sheet 'x' is for XLSX" in failed(csv_file("question,answer\na,b\n"), sheet="x")


def test_merged_cells_are_refused(tmp_path, book):
    path = book(["a", "b"], ["c", None])
    workbook = openpyxl.load_workbook(path)
    workbook.active.merge_cells("B2:B3")
    workbook.save(path)
    assert failed(path) == f"{path}: sheet 'data' has merged cells (B2:B3). Unmerge them and fill each cell"


def test_formulas_without_a_value_and_errors_are_named(book, edited):
    path = book(["a", "=1+1"], ["b", "c"])
    assert f"{path}:2: answer shows (formula): it is a formula whose value is not in the file. Open it" in failed(path)
    path = edited("<v ?/>|<v></v>", "<v>2</v>", ["a", "=1+1"])
    assert pairs(path) == [("a", "2")]
    path = edited('<c r="B2"(.*?)</c>', '<c r="B2" t="e"><v>#N/A</v></c>', ["a", "=1+1"])
    assert f"{path}:2: answer shows #N/A: it is an error of the spreadsheet" in failed(path)


def test_a_fault_in_a_column_that_is_not_read_is_none(book):
    path = book(["a", "b", "=1+1"], header=[*HEADER, "note"])
    assert pairs(path) == [("a", "b")]


@pytest.mark.parametrize(
    ("pattern", "new", "message"),
    [
        ('r="B2"', 'r="ZZZ2"', "is out of place. Save it anew"),
        ('r="B2"', 'r="ZZZZZZZZ2"', "is out of place. Save it anew"),
        ('r="B2"', 'r="B9999999"', "is out of place. Save it anew"),
        ('<row r="2"', '<row r="99999999999"', "is out of place. Save it anew"),
        ('<row r="2"', '<row r="1"', "row 1 of sheet 'data' is out of place"),
        ('<c r="B2"[^/]*?>', '<x r="ZZZZZZZ2"/><c>', "is out of place. Save it anew"),
        ('<row r="2"', '<row r="x"', "not a workbook that can be read"),
        ("</sheetData>", "", "not a workbook that can be read (ParseError"),
        ('<c r="B2"(.*?)</c>', '<c r="B2" t="s"><v>999</v></c>', "not a workbook that can be read"),
        ("<worksheet", '<!DOCTYPE x [<!ENTITY a "b">]><worksheet', "not a workbook that can be read"),
    ],
)
def test_damaged_sheets_are_named(edited, pattern, new, message):
    """None of them takes long or fills the memory."""
    assert message in failed(edited(pattern, new, ["a", "b"]))


def test_a_size_that_is_a_lie_costs_nothing(edited):
    assert pairs(edited("<dimension[^>]*>", '<dimension ref="A1:XFD1048576"/>', ["a", "b"])) == [("a", "b")]


def test_bombs_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", b" " * (1 << 20))
    monkeypatch.setattr(xlsx_rows, "MAX_UNPACKED_BYTES", 1000)
    assert "are read. Save it as CSV UTF-8, or split it" in failed(path)


def test_files_that_are_too_large_are_refused_unread(csv_file, monkeypatch):
    path = csv_file("question,answer\na,b\n")
    monkeypatch.setattr(text_file, "MAX_TEXT_BYTES", 10)
    assert "are read. Split it" in failed(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a workbook"),
        (b"question,answer\na,b\n", "not a workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old or encrypted workbook. Save it as .xlsx without a password"),
    ],
)
def test_what_is_no_workbook(tmp_path, data, message):
    path = tmp_path / "a.xlsx"
    path.write_bytes(data)
    assert message in failed(path)


def test_without_openpyxl_one_line_says_how(book, monkeypatch):
    path = book(["a", "b"])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    error = failed(path)
    assert error.startswith(f"{path}: openpyxl, which reads XLSX, is not installed. pip install -e '.[xlsx]'")


def test_very_wide_tables_are_refused(book, csv_file):
    assert "at most 1,000 are read" in failed(book(["a"], header=[f"c{number}" for number in range(1100)]))


def test_a_field_of_many_characters(csv_file):
    text = "长" * 300_000
    assert pairs(csv_file(f'question,answer\na,"{text}"\n')) == [("a", text)]
    assert table_rows.MAX_FIELD_CHARACTERS > 1 << 20


def test_the_report_counts_columns_that_are_not_read(book):
    data = read_data(book(["a", "b", 1], ["c", "d", None], header=[*HEADER, "id"]))
    assert [*data.report.unread.values()] == [{"id": 2}]
