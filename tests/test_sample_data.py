"""The sample data: schema, variety, and that its script still makes the committed bytes."""

import json
import random
import subprocess
import sys

import pytest
from sentencepiece import SentencePieceProcessor

from glm_utils.data import read_examples
from tests.conftest import PROJECT_DIR
from tools.sample_grammar import OPENINGS
from tools.tiny_corpus import COPY_REQUESTS, dialogue, document

DATA_DIR = PROJECT_DIR / "data"


def examples_of(name):
    """Load the examples of a file as they are stored."""
    return [json.loads(line) for line in (DATA_DIR / name).read_text("utf-8").splitlines()]


def test_script_reproduces_the_committed_files(tmp_path):
    """A second run gives the same bytes."""
    subprocess.run([sys.executable, "-m", "tools.make_data", "--out", str(tmp_path)], check=True, cwd=PROJECT_DIR)
    for name in ("train.jsonl", "dev.jsonl", "probe_tiny.jsonl"):
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


def test_no_pretraining_text_has_attributes_before_copy_or_a_probe_question():
    """What fine-tuning adds is not in the tiny models' pretraining, and the probe's questions are not either."""
    rng, openings = random.Random(1), tuple(opening.format(name="") for opening in OPENINGS)
    probe = {example["instruction"] for example in examples_of("probe_tiny.jsonl")}
    assert len(probe) == 160
    for _ in range(3000):
        text, turns = document(rng), dialogue(rng)
        assert text.startswith(openings) or not any(opening in text for opening in openings), text
        assert not probe & {question for question, _ in turns}
        for question, answer in turns:
            assert not any(opening in answer for opening in openings) or question in COPY_REQUESTS, turns


@pytest.mark.parametrize("name", ["chatglm-tiny/ice_text.model", "chatglm2-tiny/tokenizer.model"])
def test_the_vocabularies_cover_the_pretraining_text(name):
    """No character of it is written in bytes, as the small models learn those badly."""
    rng, tokenizer = random.Random(1), SentencePieceProcessor(str(PROJECT_DIR / "models" / name))
    for _ in range(1500):
        for text in (document(rng), *(text for turn in dialogue(rng) for text in turn)):
            ids = tokenizer.encode(text.replace("\n", ""))
            assert not any(tokenizer.is_byte(i) or tokenizer.is_unknown(i) for i in ids), text


def test_training_reads_the_files():
    """The reader of train_qlora.py reads every example of both files."""
    assert len(read_examples(DATA_DIR / "train.jsonl")) == 6000
    assert len(read_examples(DATA_DIR / "dev.jsonl")) == 300
