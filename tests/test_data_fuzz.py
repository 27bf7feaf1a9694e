"""Hostile data files: whatever they hold, reading ends with examples or with one error whose lines can be shown.

HOSTILE_CASES=20000 gives the campaign; `make test` runs a few of each kind.
"""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_utils.cli import UserError
from glm_utils.data import Example, read_data
from glm_utils.data.checks import MAX_SHOWN_ERRORS, DataReport
from glm_utils.data.file_form import FileForm
from glm_utils.data.forms import FORMS, NO_COLUMNS
from glm_utils.data.read import read_rows
from glm_utils.visible_text import one_line
from tests import hostile_data

ANSWERS = st.sampled_from(["required", "optional", "ignored"])


def hostile(share):
    """Settings of a property that gets a share of the campaign."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=hostile_data.num_cases(share), deadline=None, suppress_health_check=slow, database=None
    )


def check_error(error):
    """Check that an error can be shown: a message, which the log makes visible, and details that are lines already."""
    assert len(error.details) <= MAX_SHOWN_ERRORS + len(FORMS) + 5
    assert all(line == one_line(line) for line in error.details), str(error)
    assert all(len(line) < 3000 for line in (error.message, *error.details)), str(error)


def check_reading(path, data, answers, columns):
    """Read a file both ways: as examples, and row by row."""
    path.write_bytes(data)
    try:
        found = read_data(path, answers, columns)
    except UserError as error:
        check_error(error)
    else:
        assert found.examples
        for one in found.examples:
            assert isinstance(one, Example)
            assert one.query.strip()
            assert answers != "required" or one.answer.strip()
            "".join((one.query, one.answer, *itertools.chain(*one.history))).encode()
    try:
        rows = list(read_rows(path, answers, columns, DataReport()))
    except UserError as error:
        check_error(error)
    else:
        assert all((row.example is None) == (row.error is not None) for row in rows)


@hostile(0.35)
@given(data=hostile_data.json_files(), answers=ANSWERS, columns=hostile_data.columns | st.just(NO_COLUMNS))
def test_json(tmp_path, data, answers, columns):
    check_reading(tmp_path / "a.jsonl", data, answers, columns)


@hostile(0.25)
@given(data=hostile_data.csv_files(), answers=ANSWERS, columns=hostile_data.columns | st.just(NO_COLUMNS))
def test_csv(tmp_path, data, answers, columns):
    check_reading(tmp_path / "a.csv", data, answers, columns)


@hostile(0.1)
@given(data=hostile_data.csv_files() | hostile_data.plain_lines | st.binary(max_size=40), answers=ANSWERS)
def test_other_files(tmp_path, data, answers):
    for name in ("a.txt", "a.json", "a.xlsx", "a"):
        check_reading(tmp_path / name, data, answers, NO_COLUMNS)


@hostile(0.2)
@given(data=st.data(), answers=ANSWERS, columns=hostile_data.columns | st.just(NO_COLUMNS))
def test_workbooks(tmp_path, data, answers, columns):
    check_reading(tmp_path / "a.xlsx", data.draw(hostile_data.workbook_files(tmp_path)), answers, columns)


@hostile(0.1)
@given(row=hostile_data.rows() | hostile_data.json_values, form=st.sampled_from(FORMS), answers=ANSWERS)
def test_rows(row, form, answers):
    """A row is parsed the same each time, and is not changed by it."""
    before, results = json.dumps(row), []
    for _ in range(2):
        try:
            results.append(FileForm(form, "a:1", answers).parse(row, "a:2"))
        except UserError as error:
            results.append(str(error))
    assert results[0] == results[1]
    assert json.dumps(row) == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.xlsx"])
def test_what_is_right_is_read(tmp_path, name):
    """The strategies begin with files that are read, else they would prove nothing."""
    from tests.data_files import ROWS, write_as

    for row in ROWS.values():
        assert len(read_data(write_as(tmp_path / name, [row])).examples) == 1
