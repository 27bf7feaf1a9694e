"""The data of a training: several files, globs and shares, held-out examples, mixtures, examples that files share."""

import contextlib
import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_utils.cli import UserError
from glm_utils.data import shared
from glm_utils.data.example import Example
from glm_utils.data.find_files import find_files, find_parts
from glm_utils.data.recorded import warn_of_recorded
from glm_utils.data.selection import Selection, hold_out, mix
from glm_utils.data.training_data import read_training_data
from glm_utils.run_record import sha256, sha256_of_files
from tests.data_files import jsonl


def example(query, answer="答", history=(), where="x:1"):
    return Example(query, answer, history, where)


class Lazy:
    """Examples as those of a streamed file: a length, and one at a time."""

    is_streamed = True

    def __init__(self, examples):
        self.examples, self.num_read = examples, 0

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        assert isinstance(index, int)
        self.num_read += 1
        return self.examples[index]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write files of so many examples, each with a question of its own; the working directory is theirs."""
    monkeypatch.chdir(tmp_path)

    def write(**sizes):
        for name, size in sizes.items():
            rows = [{"query": f"{name} {number}", "response": "x" * (number % 7 + 1)} for number in range(size)]
            (tmp_path / f"{name}.jsonl").write_text(jsonl(*rows), "utf-8")

    return write


def draw(train, *args, seed=1, **flags):
    return read_training_data(train, *args, **flags).draw(seed)


def queries(examples):
    return [one.query for one in examples]


# ---- names, globs and shares


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 1, None)]),
        ("b.jsonl, a.jsonl", [("b.jsonl", 1, None), ("a.jsonl", 1, None)]),
        ("a.jsonl:0.8,b.jsonl:0.2", [("a.jsonl", 1, 0.8), ("b.jsonl", 1, 0.2)]),
        ("[ab].jsonl:.75,c:1.jsonl:0.25", [("[ab].jsonl", 2, 0.75), ("c:1.jsonl", 1, 0.25)]),
        ("c:1.jsonl,d:0.5", [("c:1.jsonl", 1, None), ("d:0.5", 1, None)]),  # files of these names
        ("d:0.5:0.4,a.jsonl:6e-1", [("d:0.5", 1, 0.4), ("a.jsonl", 1, 0.6)]),
        (r"C:\data\a.jsonl:0.8,a.jsonl:0.2", [(r"C:\data\a.jsonl", 1, 0.8), ("a.jsonl", 1, 0.2)]),
        (r"C:\data\a.jsonl", [(r"C:\data\a.jsonl", 1, None)]),
        (["e,f.jsonl:0.5", "a.jsonl:0.5"], [("e,f.jsonl", 1, 0.5), ("a.jsonl", 1, 0.5)]),
        ("data/dev.jsonl,a.jsonl", [("data/dev.jsonl", 1, None), ("a.jsonl", 1, None)]),  # shipped
    ],
)
def test_names_and_shares(files, tmp_path, text, expected):
    files(a=1, b=1)
    for name in ("c:1.jsonl", "d:0.5", r"C:\data\a.jsonl", "C", "e,f.jsonl"):
        (tmp_path / name).write_text(jsonl({"query": "q", "response": "a"}), "utf-8")
    assert [(part.name, len(part.paths), part.share) for part in find_parts(text)] == expected


def test_shares_that_are_rounded_add_up_to_one(files):
    files(a=1, b=1, c=1)
    parts = find_parts("a.jsonl:0.33,b.jsonl:0.33,c.jsonl:0.33")
    assert [part.share for part in parts] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.jsonl:0,b.jsonl:1",
            "a.jsonl: the share is '0', expected a number above 0, such as 0.2. Leave the file",
        ),
        ("a.jsonl:-0.2,b.jsonl:1.2", "a.jsonl: the share is '-0.2'"),
        ("a.jsonl:nan,b.jsonl:1", "a.jsonl: the share is 'nan'"),
        ("a.jsonl:inf,b.jsonl:1", "a.jsonl: the share is 'inf'"),
        ("a.jsonl:80%,b.jsonl:20%", "a.jsonl: the share is '80%'"),
        ("a.jsonl:x,b.jsonl:1", "a.jsonl: the share is 'x'"),
        ("a.jsonl:,b.jsonl:1", "a.jsonl: the share is ''"),
        ("a.jsonl:0.8,b.jsonl", "b.jsonl: no share, where others have one. Give all of them one, or none"),
        ("a.jsonl:0.8,b.jsonl:0.4", "the shares add up to 1.2, expected 1. In these proportions: a.jsonl:0.6667,"),
        ("a.jsonl:8,b.jsonl:2", "In these proportions: a.jsonl:0.8,b.jsonl:0.2"),
        ("a.jsonl:0.5", "a.jsonl:0.5: a share, but nothing to mix with. Leave it out"),
        ("a.jsonl:0.5,a.jsonl:0.5", "a.jsonl: named twice. Name each file once"),
        ("a.jsonl,link.jsonl", "link.jsonl: named twice, also as a.jsonl"),
        ("x*.jsonl:0.5,a.jsonl:0.5", "x*.jsonl: matches no file"),
        ("a.jsonl/b.jsonl", "a.jsonl/b.jsonl: no such file"),
        ("a.jsonl,\0*", "matches no file"),
        (",", "no file is named"),
        ("a.jsonl,empty.jsonl", "empty.jsonl: no examples in it"),
    ],
)
def test_bad_names_and_shares_are_one_line(files, tmp_path, text, message):
    files(a=3, b=3)
    os.symlink("a.jsonl", "link.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError) as error_info:
        read_training_data(text)
    assert message in error_info.value.message
    assert not error_info.value.details


def test_a_share_where_nothing_is_mixed_is_refused(files):
    files(a=3, b=3)
    with pytest.raises(UserError, match=r"b\.jsonl: a share is for --train_data_path only"):
        read_training_data("a.jsonl", "b.jsonl:0.5")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.sampled_from(list("ab.jsonl:,*?[]~/\\0159-e%\0\n é")), max_size=30))
def test_any_text_is_read_or_refused(files, text):
    files(a=1, b=1)
    with contextlib.suppress(UserError):
        assert all(part.paths for part in find_parts(text))


def test_one_hash_over_the_files_in_their_order(files):
    files(a=2, b=3)
    first, second = find_files("a.jsonl,b.jsonl")
    assert sha256_of_files([first]) == sha256(first)
    assert len({sha256_of_files(paths) for paths in ([first], [first, second], [second, first])}) == 3


# ---- held-out examples


@pytest.mark.parametrize("ratio", [1e-9, 0.05, 0.3, 0.5, 0.97, 1 - 1e-9])
@pytest.mark.parametrize("num", [2, 3, 40])
def test_both_sides_have_examples_and_the_part_is_as_asked(num, ratio):
    examples = [example(str(number)) for number in range(num)]
    kept, held_out = hold_out(examples, ratio, seed=1)
    assert sorted([*kept, *held_out]) == list(range(num))
    assert len(held_out) == min(max(1, round(ratio * num)), num - 1)


def test_the_content_and_the_seed_decide_and_not_the_order():
    examples = [example(str(number)) for number in range(100)]
    chosen = {seed: {examples[index].query for index in hold_out(examples, 0.2, seed)[1]} for seed in range(3)}
    assert len(set(map(frozenset, chosen.values()))) == 3
    backwards = examples[::-1]
    assert {backwards[index].query for index in hold_out(backwards, 0.2, 1)[1]} == chosen[1]
    # what was held out once stays held out in another process, version or machine
    assert sorted(map(int, chosen[0]))[:6] == FROZEN


FROZEN = [7, 15, 18, 20, 24, 26]


@pytest.mark.parametrize("seed", range(5))
def test_a_question_is_on_one_side(seed):
    """Repeated examples, and a question with several answers; a history makes another question."""
    examples = [example(f"{number % 17}", f"{number % 5}") for number in range(100)]
    examples += [example("0", history=(("a", "b"),)) for _ in range(3)]
    kept, held_out = hold_out(examples, 0.3, seed)
    sides = [{(examples[index].query, examples[index].history) for index in side} for side in (kept, held_out)]
    assert not sides[0] & sides[1]
    assert 0 < len(held_out) <= round(0.3 * len(examples))


def test_a_question_of_most_examples():
    """No choice comes near the ratio; the smallest one is taken."""
    examples = [example("a", str(number)) for number in range(9)] + [example("b", str(number)) for number in range(8)]
    kept, held_out = hold_out(examples, 0.1, 0)
    assert {examples[index].query for index in held_out} == {"b"}
    with pytest.raises(UserError, match=r"--eval_ratio 0.1: all 9 examples have the same question"):
        hold_out(examples[:9], 0.1, 0)


def test_unusable_rows_of_a_streamed_file_are_held_out_as_others(files):
    class Broken(Lazy):
        def __getitem__(self, index):
            if index % 3 == 0:
                raise UserError(f"x:{index}: broken")
            return super().__getitem__(index)

    examples = Broken([example(str(number)) for number in range(30)])
    first, second = hold_out(examples, 0.2, 1), hold_out(examples, 0.2, 1)
    assert len(first[1]) == 6
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_what_is_held_out_is_logged_and_recorded(files, log_lines):
    files(a=30, b=10)
    drawn = draw("a.jsonl,b.jsonl", eval_ratio=0.25, seed=3)
    assert not set(queries(drawn.examples["train"])) & set(queries(drawn.examples["eval"]))
    assert (len(drawn.examples["train"]), len(drawn.examples["eval"])) == (30, 10)
    for name in ("train", "eval"):
        counted = Counter(query[0] for query in queries(drawn.examples[name]))
        assert {use["path"]: use["num_used"] for use in drawn.record()[name]} == {
            f"{letter}.jsonl": counted[letter] for letter in "ab"
        }
    assert any("--eval_ratio 0.25: 10 of 40 examples are held out" in line for line in log_lines)
    assert not any("training examples too" in line for line in log_lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_ratio": 0.0}, "--eval_ratio 0.0: expected a number between 0 and 1"),
        ({"eval_ratio": 1.0}, "--eval_ratio 1.0: expected"),
        ({"eval_ratio": -0.1}, "--eval_ratio -0.1: expected"),
        ({"eval_ratio": float("nan")}, "--eval_ratio nan: expected"),
        ({"eval_ratio": 0.1, "eval_data_path": "a.jsonl"}, "give one of the two"),
        ({"eval_ratio": 0.1, "train_data_path": "one.jsonl"}, "one example cannot be split"),
    ],
)
def test_bad_ratios_are_one_line(files, flags, message):
    files(a=3, one=1)
    with pytest.raises(UserError, match=message):
        read_training_data(**{"train_data_path": "a.jsonl", **flags})


# ---- mixtures


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [
        ((100, 100), (0.8, 0.2), (100, 25)),
        ((100, 10), (0.8, 0.2), (40, 10)),
        ((3, 10), (0.8, 0.2), (3, 1)),
        ((10, 10, 10), (1 / 3, 1 / 3, 1 / 3), (10, 10, 10)),
        ((1, 1000), (0.999, 0.001), (1, 1)),
        ((7, 1), (0.5, 0.5), (1, 1)),
        ((1000, 999), (0.1, 0.9), (111, 999)),
    ],
)
def test_the_largest_mixture_without_repetition(sizes, shares, expected, seed):
    bounds = [0, *itertools.accumulate(sizes)]
    parts = [np.arange(start, end) for start, end in itertools.pairwise(bounds)]
    chosen = mix(parts, shares, seed)
    assert tuple(map(len, chosen)) == expected
    for part, indices in zip(parts, chosen, strict=True):
        assert len(set(indices.tolist())) == len(indices)
        assert set(indices.tolist()) <= set(part.tolist())
        assert sorted(indices.tolist()) == indices.tolist()
    assert all(np.array_equal(one, other) for one, other in zip(chosen, mix(parts, shares, seed), strict=True))


def test_a_mixture_is_drawn_by_the_seed_and_copies_nothing():
    """Its numbers are those of every version: a run that goes on after an upgrade has the same data."""
    parts = [np.arange(6), np.arange(6, 106)]
    assert mix(parts, (0.5, 0.5), 1)[1].tolist() == MIXED
    assert mix(parts, (0.5, 0.5), 2)[1].tolist() != MIXED
    lazy = Lazy([example(str(number)) for number in range(106)])
    selection = Selection(lazy, np.concatenate(mix(parts, (0.5, 0.5), 1)))
    assert (len(selection), lazy.num_read, selection.is_streamed) == (12, 0, True)
    assert selection[-1].query == str(MIXED[-1])
    assert queries(selection[6:8]) == [str(number) for number in MIXED[:2]]
    assert len(list(selection)) == 12
    with pytest.raises(IndexError):
        selection[12]


MIXED = [31, 33, 80, 81, 84, 87]


def test_what_a_mixture_takes_and_leaves_is_logged(files, log_lines):
    files(a=40, b1=6, b2=4)
    drawn = draw("a.jsonl:0.5,b*.jsonl:0.5")
    drawn.log_token_shares([3] * 10 + [1] * 10)
    assert Counter(query[0] for query in queries(drawn.examples["train"])) == {"a": 10, "b": 10}
    assert [(use["path"], use["num_rows"], use["num_used"], use["share"]) for use in drawn.record()["train"]] == [
        ("a.jsonl", 40, 10, 0.5),
        ("b1.jsonl", 6, 6, 0.5),
        ("b2.jsonl", 4, 4, 0.5),
    ]
    text = "\n".join(log_lines)
    assert "mixture of 20 examples, none of them twice: a.jsonl 10 of 40 (50.00%, 30 left out), b*.jsonl 10" in text
    assert "b*.jsonl decides the size" in text
    assert "mixture by tokens: a.jsonl 75.00%, b*.jsonl 25.00%" in text


def test_a_mixture_of_what_is_not_held_out(files):
    """Nothing that is held out is trained on, and every file must have something left."""
    files(a=40, b=20)
    drawn = draw("a.jsonl:0.5,b.jsonl:0.5", eval_ratio=0.2)
    assert not set(queries(drawn.examples["train"])) & set(queries(drawn.examples["eval"]))
    assert len(drawn.examples["eval"]) == 12
    counts = Counter(query[0] for query in queries(drawn.examples["train"]))
    assert counts["a"] == counts["b"] == 20 - drawn.files["eval"][1].num_used
    files(one=1)
    one = "a.jsonl:0.5,one.jsonl:0.5"
    assert len(draw(one, eval_ratio=0.5, seed=4).examples["train"]) == 2
    with pytest.raises(UserError, match=r"one\.jsonl: --eval_ratio 0\.5 leaves none of its examples for training"):
        draw(one, eval_ratio=0.5, seed=0)


# ---- examples that training and evaluation data share


def test_shared_examples_are_named(files, tmp_path, log_lines):
    files(a=5)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    other = [{"query": "new", "response": "x"}, rows[3], {**rows[1], "response": "another"}, rows[0], rows[2], rows[4]]
    (tmp_path / "dev.jsonl").write_text(jsonl(*other, {**rows[0], "history": [["a", "b"]]}), "utf-8")
    draw("a.jsonl", "dev.jsonl")
    warnings = [line for line in log_lines if line.startswith("WARNING")]
    places = "dev.jsonl:2 = a.jsonl:4, dev.jsonl:4 = a.jsonl:1, dev.jsonl:5 = a.jsonl:3, and 1 more."
    assert len(warnings) == 2
    assert "4 of 7 evaluation examples are training examples too, so the evaluation flatters" in warnings[0]
    assert places in warnings[0]
    assert "1 of 7 evaluation examples have the question of a training example, with another answer: " in warnings[1]
    assert "dev.jsonl:3 = a.jsonl:2" in warnings[1]


def test_the_training_file_as_evaluation_data_is_one_line(files, log_lines):
    files(a=5, b=5)
    os.symlink("a.jsonl", "link.jsonl")
    draw("a.jsonl,b.jsonl", "link.jsonl")
    warnings = [line for line in log_lines if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "--eval_data_path names training data too (link.jsonl)" in warnings[0]


def test_other_data_shares_nothing(files, log_lines):
    files(a=50, b=50)
    draw("a.jsonl", "b.jsonl")
    assert not [line for line in log_lines if line.startswith("WARNING")]


def test_of_a_streamed_file_the_first_examples_are_compared(log_lines, monkeypatch):
    monkeypatch.setattr(shared, "NUM_COMPARED_OF_MORE", 4)
    train = Lazy([example(str(number), where=f"a:{number + 1}") for number in range(10)])
    shared.warn_of_shared(train, [example("9", where="b:1"), example("3", where="b:2")])
    assert train.num_read <= 2 * 4 + 1
    assert "INFO only the first 4 of 10 training examples are looked at for shared ones" in log_lines
    assert "1 of 2 evaluation examples are training examples too" in log_lines[-1]
    assert "b:2 = a:4" in log_lines[-1]


def test_what_was_held_out_of_the_training_is_no_training_data(files, log_lines):
    files(a=20)
    (path,) = find_files("a.jsonl")
    held_out = draw("a.jsonl", eval_ratio=0.2, seed=3).examples["eval"]
    record = {
        "arguments": {"train_data_path": str(path)},
        "identity": {"train_data_sha256": sha256(path), "eval_ratio": 0.2, "seed": 3},
    }
    log_lines.clear()
    warn_of_recorded(record, held_out)
    assert log_lines == []
    record["identity"]["eval_ratio"] = None
    warn_of_recorded(record, held_out)
    assert log_lines[0].startswith("WARNING 4 of 4 evaluation examples are training examples too")


@pytest.mark.parametrize("change", [None, "changed", "gone", "unread"])
def test_the_data_that_an_adapter_was_trained_on_is_compared(files, tmp_path, log_lines, change):
    files(a=5, b=5)
    paths = find_files("a.jsonl,b.jsonl")
    record = {
        "arguments": {"train_data_path": [str(path) for path in paths], "prompt_column": None},
        "identity": {"train_data_sha256": sha256_of_files(paths)},
    }
    if change == "changed":
        files(b=6)
    elif change == "gone":
        paths[1].unlink()
    elif change == "unread":
        record = {"arguments": {"train_data_path": 3}, "identity": []}
    warn_of_recorded(record, [example("b 2", "xxx", where="d:1"), example("new", where="d:2")])
    expected = {
        None: "WARNING 1 of 2 evaluation examples are training examples too",
        "changed": "INFO not compared with the training data: a.jsonl has changed, or another file of it",
        "gone": "INFO not compared with the training data: b.jsonl is not there any more",
    }
    assert len(log_lines) == (change != "unread")
    assert change == "unread" or log_lines[0].startswith(expected[change])
