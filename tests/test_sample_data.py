"""The sample data: schema, variety, and that its script still makes the committed bytes."""

import json
import subprocess
import sys

import pytest

from glm_utils.data import read_examples
from tests.conftest import PROJECT_DIR

DATA_DIR = PROJECT_DIR / "data"


def examples_of(name):
    """Load the examples of a file as they are stored."""
    return [json.loads(line) for line in (DATA_DIR / name).read_text("utf-8").splitlines()]


def test_script_reproduces_the_committed_files(tmp_path):
    """A second run gives the same bytes."""
    subprocess.run([sys.executable, "-m", "tools.make_data", "--out", str(tmp_path)], check=True, cwd=PROJECT_DIR)
    for name in ("train.jsonl", "dev.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()


def test_examples_are_distinct_and_split():
    """No copy and no attribute list occurs twice, within or across the files."""
    examples = examples_of("train.jsonl") + examples_of("dev.jsonl")
    assert len(examples) == 6300
    for key in ("content", "summary"):
        assert len({example[key] for example in examples}) == len(examples)


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl"])
def test_copies_use_their_attributes(name):
    """Every copy mentions every attribute value verbatim, apart from the kind."""
    for example in examples_of(name):
        pairs = [pair.split("#") for pair in example["content"].split("*")]
        assert pairs[0][0] == "类型"
        for _, value in pairs[1:]:
            assert value in example["summary"], (value, example)


def test_training_reads_the_files():
    """The reader of train_qlora.py reads every example of both files."""
    assert len(read_examples(DATA_DIR / "train.jsonl")) == 6000
    assert len(read_examples(DATA_DIR / "dev.jsonl")) == 300
