"""The sample data: schema, variety, and that its script still makes the committed bytes."""

import json
import subprocess
import sys

import pytest

from glm_utils.data import read_examples
from tests.conftest import PROJECT_DIR

DATA_DIR = PROJECT_DIR / "data"


def rows_of(name):
    """Load the raw rows of a file."""
    return [json.loads(line) for line in (DATA_DIR / name).read_text("utf-8").splitlines()]


def test_script_reproduces_the_committed_files(tmp_path):
    """A second run gives the same bytes."""
    subprocess.run([sys.executable, "-m", "tools.make_data", "--out", str(tmp_path)], check=True, cwd=PROJECT_DIR)
    for name in ("train.jsonl", "dev.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()


def test_rows_are_distinct_and_split(tmp_path):
    """No copy and no attribute list stands twice, within or across the files."""
    rows = rows_of("train.jsonl") + rows_of("dev.jsonl")
    assert len(rows) == 6300
    for key in ("content", "summary"):
        assert len({row[key] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl"])
def test_copies_use_their_attributes(name):
    """Every copy mentions every attribute value verbatim, apart from the kind."""
    for row in rows_of(name):
        pairs = [pair.split("#") for pair in row["content"].split("*")]
        assert pairs[0][0] == "类型"
        for _, value in pairs[1:]:
            assert value in row["summary"], (value, row)


def test_training_reads_the_files():
    """The reader of train_qlora.py takes both files whole."""
    assert len(read_examples(DATA_DIR / "train.jsonl")) == 6000
    assert len(read_examples(DATA_DIR / "dev.jsonl")) == 300
