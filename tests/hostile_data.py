"""Hostile data files for hypothesis: nearly right, damaged, and nothing like data. HOSTILE_CASES scales the number."""

import csv
import io
import json
import os
import zipfile

from hypothesis import strategies as st

from glm_utils.data.forms import KNOWN_KEYS, Columns
from tests.data_files import ROWS, cells_of, write_sheets

MIN_CASES = 60  # of each property, in `make test`
ENCODINGS = ("utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "big5")
KEYS = sorted(KNOWN_KEYS) + ["histroy", "ouput", "System", "role", "from", "value", "id", ""]
CSV_PARTS = [*KEYS, ",", ";", "\t", "\n", "\r\n", '"', '""', "=1+1", "\0", "\ufeff", "中文", "[[", '[["a", "b"]]']
WORKBOOK_PARTS = ("xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/styles.xml", "xl/_rels/workbook.xml.rels")


def num_cases(share=1.0):
    """Return how many cases a property gets: a few, or its share of HOSTILE_CASES."""
    return max(MIN_CASES, int(int(os.environ.get("HOSTILE_CASES", "0")) * share))


encodings = st.just("utf-8") | st.sampled_from(ENCODINGS)
texts = st.text(max_size=8) | st.sampled_from(
    ["", " ", "中文", "\0", "\x1b[2J", "\u2028", "\ud83d", "a" * 300, "1e999"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def rows(draw, name=None):
    """A row of some form, in which something may be replaced, missing, renamed or added."""
    row = json.loads(json.dumps(ROWS[name or draw(st.sampled_from(list(ROWS)))]))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        key = draw(st.sampled_from(list(row) or ["id"]))
        change = draw(st.sampled_from(["replace", "delete", "rename", "add", "inside"]))
        if change in ("delete", "rename"):
            value = row.pop(key, None)
        if change == "rename":
            row[draw(st.sampled_from(KEYS))] = value
        if change in ("replace", "add"):
            row[key if change == "replace" else draw(st.sampled_from(KEYS))] = draw(json_values)
        if change == "inside" and isinstance(row.get(key), list):
            row[key].insert(draw(st.integers(0, len(row[key]))), draw(json_values))
    return row


def damaged(data):
    """Bytes that are cut, doubled, or in which some are replaced."""

    def damage(change, place, piece):
        index = int(place * len(data))
        return {
            "none": data,
            "cut": data[:index],
            "insert": data[:index] + piece + data[index:],
            "replace": data[:index] + piece + data[index + len(piece) :],
            "double": data + data[index:],
        }[change]

    pieces = st.binary(max_size=4) | st.sampled_from([b"\0", b"\xff\xfe", b'"', b"\n", b"{", b"]", b"\x1a", b"\xc3"])
    changes = st.sampled_from(["none", "none", "none", "none", "cut", "insert", "replace", "double"])
    return st.builds(damage, changes, st.floats(0, 1), pieces)


@st.composite
def json_files(draw):
    """JSON lines or a list, mostly of nearly right rows of one form, in some encoding, perhaps damaged."""
    form = st.just(draw(st.sampled_from(list(ROWS))) if draw(st.integers(0, 3)) else None)
    row = form.flatmap(rows) if draw(st.integers(0, 3)) else rows() | json_values
    values = draw(st.lists(row, min_size=draw(st.sampled_from([0, 1, 1, 1])), max_size=4))
    if draw(st.booleans()):
        text = "".join(json.dumps(value, ensure_ascii=draw(st.booleans())) + "\n" for value in values)
    else:
        text = json.dumps(values, indent=1)
    return draw(damaged(text.encode(draw(encodings), "replace")))


@st.composite
def csv_files(draw):
    """A table of nearly right rows, or its pieces in any order, in some encoding, perhaps damaged."""
    if draw(st.integers(0, 2)):
        name, delimiter = draw(st.sampled_from(list(ROWS))), draw(st.sampled_from(",;\t|"))
        table = [list(ROWS[name]), *(cells_of(row) for row in draw(st.lists(rows(name), min_size=1, max_size=3)))]
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter).writerows(table)
        text = buffer.getvalue()
    else:
        text = draw(st.sampled_from(["", "question,answer\n", "query;response;history\n", "messages\tid\n"]))
        text += "".join(draw(st.lists(st.sampled_from(CSV_PARTS) | texts, max_size=30)))
    return draw(damaged(text.encode(draw(encodings), "replace")))


def workbook_files(tmp_path):
    """Workbooks of which a part or the archive is damaged."""
    path = write_sheets(tmp_path / "whole.xlsx", {"a": [["question", "answer"], ["b", 1.5], ["c", True]], "d": []})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def pack(name, data):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for part in parts:
                archive.writestr(part, data if part == name else parts[part])
        return buffer.getvalue()

    numbers = st.integers(-1, 20_000) | st.sampled_from([10**7, 10**12, 10**30])
    tokens = st.sampled_from([b'"1"', b'"2"', b'"A1"', b'"B2"', b"<v>1.5</v>", b'"n"', b't="inlineStr"', b"</row>"])
    values = numbers.map(lambda number: f'"{number}"'.encode()) | numbers.map(lambda number: f'"B{number}"'.encode())
    values |= st.sampled_from(
        [b'"ZZZ1"', b'"s"', b'"e"', b'"d"', b"<f>1</f>", b"", b"<v/>", b'"\xf0"', b'<row r="9"/>']
    )
    swapped = st.builds(
        lambda name, old, new: pack(name, parts[name].replace(old, new, 1)),
        st.sampled_from(WORKBOOK_PARTS),
        tokens,
        values,
    )
    torn = st.sampled_from(WORKBOOK_PARTS).flatmap(
        lambda name: damaged(parts[name]).map(lambda data: pack(name, data))
    )
    return damaged(whole) | torn | swapped


columns = st.builds(
    Columns,
    prompt=st.none() | st.sampled_from(KEYS) | texts,
    response=st.none() | st.sampled_from(KEYS),
    history=st.none() | st.sampled_from(KEYS),
    sheet=st.none() | st.none() | st.sampled_from(["a", "d", "x"]),
)
plain_lines = st.lists(texts, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
