"""Files of very many rows: read and tokenized as needed, with the same result as in memory."""

import json
import os
import pickle
import random
import re

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file

import train_qlora as stage
from glm_utils.cli import UserError
from glm_utils.data import indexed as indexed_module
from glm_utils.data import read_data, read_examples
from glm_utils.data.indexed import IndexedExamples, LineIndex, UnusableRow, is_blank, is_streamed
from glm_utils.data.training_data import read_training_data
from glm_utils.encoding import EncodedExample
from glm_utils.evaluation import at_end
from glm_utils.family import PROJECT_DIR
from glm_utils.training.sampling import CompactOrder
from glm_utils.training.stop_request import StopRequest
from glm_utils.training.streamed import StreamedDataset

COLORS = "白黑红蓝绿"
ARGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def row(number):
    return {
        "content": f"类型#上衣*颜色#{COLORS[number % 5]}色*编号#{number}",
        "summary": "百搭又时尚，" * (number % 4 + 1),
    }


def as_line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"


@pytest.fixture
def limits(monkeypatch):
    """Files count as very large from 21 rows on, of which the first 10 are checked."""
    monkeypatch.setattr(indexed_module, "MAX_ROWS_IN_MEMORY", 20)
    monkeypatch.setattr(indexed_module, "NUM_CHECKED_ROWS", 10)


@pytest.fixture
def data_path(write):
    return write("train.jsonl", "".join(as_line(row(number)) for number in range(40)))


def stream(path, **settings):
    return read_data(path, may_stream=True, **settings).examples


# ---- the index


def test_examples_are_those_in_memory(limits, tmp_path, write):
    """For any mixture of blank lines, line ends, forms of white space and a byte order mark."""
    rng, fillers = random.Random(7), ["", " ", "\t\t", "\u3000", "\r", "\u2028 \x1c", "\xa0"]
    for case in range(30):
        text = "\ufeff" * (case % 2)
        for number in range(rng.randint(21, 70)):
            text += "".join(rng.choice(fillers) + "\n" for _ in range(rng.choice([0, 0, 0, 1, 3, 20])))
            text += rng.choice(["", " ", "\u3000"][:2]) + as_line(row(number)).replace(
                "\n", rng.choice(["\n", "\r\n"])
            )
        path = write(f"a{case}.jsonl", text[: rng.choice([None, -1])])
        examples = stream(path)
        assert isinstance(examples, IndexedExamples)
        assert is_streamed(examples)
        assert list(examples) == list(read_examples(path))
        assert (examples[-1], examples[3:5]) == (examples[len(examples) - 1], [examples[3], examples[4]])
        with pytest.raises(IndexError):
            examples[len(examples)]


@pytest.mark.parametrize(
    "text", ["", " ", "\t\r", "\u3000\u3000", "\x85", "\u2029 ", "\x1c\x1f", "x", " {", "{", "上"]
)
def test_blank_lines_are_those_of_python(text):
    assert is_blank(text.encode()) == (not text.strip())


def test_few_rows_stay_in_memory(limits, write):
    few, other = (write(name, "".join(as_line(row(i)) for i in range(20))) for name in ("few.jsonl", "other.jsonl"))
    assert isinstance(stream(few), list)
    assert isinstance(read_examples([few, other]), list)  # asked for by training alone
    both = stream([few, other])
    assert is_streamed(both)
    assert list(both) == read_examples([few, other])
    assert both[-1].where == f"{other}:20"


def test_files_of_other_kinds_stay_in_memory(limits, write, tmp_path):
    examples = [row(number) for number in range(30)]
    lines = "".join(map(as_line, examples))
    csv = "content,summary\n" + "".join(f"{one['content']},{one['summary']}\n" for one in examples)
    gbk = tmp_path / "gbk.jsonl"
    gbk.write_bytes(lines.encode("gb18030"))
    for path in (write("a.csv", csv), write("a.json", examples), gbk):
        assert isinstance(stream(path), list)
        mixed = stream([path, write("a.jsonl", lines)])
        assert [example.query for example in mixed] == 2 * [example["content"] for example in examples]


def test_one_line_says_that_a_file_is_streamed(limits, data_path, log_lines):
    read_examples(data_path, may_stream=True)
    (line,) = [line for line in log_lines if "40 rows" in line]
    assert "read and tokenized as they are needed. The first 10 are checked now" in line


def test_reports_are_of_the_first_rows(limits, write):
    path = write("a.jsonl", "".join(as_line({**row(number), "id": number}) for number in range(40)))
    report = read_data(path, may_stream=True).report
    assert (report.num_rows[str(path)], report.unread[str(path)]) == (10, {"id": 10})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{broken", "broken JSON"),
        ({"content": "a"}, "the example has no 'summary'"),
        ({"content": "a", "summary": ""}, "the summary is empty"),
        ({"contnet": "a", "summary": "b"}, "'content'"),
    ],
)
def test_bad_rows(limits, write, bad, message):
    """Among the first rows they are refused; a later one is refused when it is asked for."""
    lines = [as_line(row(number)) for number in range(40)]
    bad = as_line(bad) if isinstance(bad, dict) else bad + "\n"
    with pytest.raises(UserError, match=message):
        stream(write("early.jsonl", "".join([*lines[:9], bad, *lines[9:]])))
    path = write("late.jsonl", "".join([*lines[:30], bad, *lines[30:]]))
    examples = stream(path)
    with pytest.raises(UnusableRow, match=f"^{path}:31: .*{message}"):
        examples[30]
    assert examples[31].query == row(30)["content"]


def test_bytes_that_are_no_text(limits, data_path):
    data_path.write_bytes(data_path.read_bytes() + b'{"content": "\xff", "summary": "b"}\n')
    with pytest.raises(UnusableRow, match=f"^{data_path}:41: not UTF-8"):
        stream(data_path)[40]


def test_a_copy_opens_the_file_for_itself(limits, data_path):
    examples = stream(data_path)
    first = examples[0]
    copy = pickle.loads(pickle.dumps(examples))
    assert copy.lines._fd is None
    assert (copy[0], list(copy)) == (first, list(examples))


@pytest.mark.parametrize("change", ["append", "touch", "shrink", "replace", "delete"])
def test_a_file_that_changes_is_refused(limits, data_path, change):
    examples, text = stream(data_path), data_path.read_text("utf-8")
    if change == "append":
        data_path.write_text(text + as_line(row(1)), "utf-8")
    elif change == "touch":
        os.utime(data_path, (1, 1))
    elif change == "shrink":
        data_path.write_text(text[:100], "utf-8")
    else:
        data_path.unlink()
        if change == "replace":
            data_path.write_text(text, "utf-8")
    with pytest.raises(
        UserError, match=f"^{data_path}: (changed while it was in use|cannot be read any more)"
    ) as found:
        examples[0]
    assert not isinstance(found.value, UnusableRow)


def test_what_a_process_has_open_stays_readable(limits, data_path):
    examples = stream(data_path)
    expected = list(examples)
    data_path.unlink()
    assert list(examples) == expected


def test_the_index_takes_a_byte_a_row(write):
    lines = LineIndex(write("a.jsonl", "".join(as_line(row(number)) for number in range(1600))))
    assert len(lines.offsets) * lines.offsets.itemsize + len(lines.numbers) * lines.numbers.itemsize == 1600


# ---- encoded on access


def encode_query(example):
    """Return the number in a question as one token; 13 cannot be used, 14 is left out."""
    number = int(example.query.rpartition("#")[2])
    if number == 13:
        raise UserError(f"{example.where}: too long")
    ids = torch.tensor([number], dtype=torch.int32).numpy()
    return None if number == 14 else EncodedExample(ids, ids, False, False)


def test_unusable_examples_are_replaced_by_the_next_ones(limits, write, monkeypatch):
    lines = [as_line(row(number)) for number in range(40)]
    lines[12], lines[39] = "{broken\n", '{"content": 1}\n'
    path = write("a.jsonl", "".join(lines))
    dataset = StreamedDataset(stream(path), encode_query)
    expected = [0, *range(1, 12), 15, 15, 15, *range(15, 39), 0]
    for order in (range(40), reversed(range(40))):
        found = {index: dataset[index] for index in order}
        assert [found[index]["input_ids"] for index in range(40)] == [[number] for number in expected]
    assert [index for index in range(40) if dataset.unusable[index]] == [12, 13, 14, 39]
    monkeypatch.setattr("glm_utils.training.streamed.MAX_REPLACED", 3)
    with pytest.raises(UserError, match=f"^3 examples in a row cannot be used, beginning with {path}:13: broken JSON"):
        dataset[12]


# ---- training


@pytest.fixture(params=["chatglm2-6b"])
def family_name(request):
    """One family, unless a test asks for both."""
    return request.param


@pytest.fixture
def train(write, data_path, tmp_path, family_name):
    """Run the stage on a tiny model; JSON keys in `args`, flags as keywords. Returns the output directory."""

    def run(name, args=None, **flags):
        path = write("args.json", {**ARGS, "output_dir": str(tmp_path / name), **(args or {})})
        base = PROJECT_DIR / "models" / f"{family_name.removesuffix('-6b')}-tiny"
        flags = {"train_args_json": str(path), "train_data_path": str(data_path), **flags}
        stage.train_qlora(model_name_or_path=str(base), **flags)
        return tmp_path / name

    return run


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same_bits(first, second):
    first, second = adapter(first), adapter(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family_name", ["chatglm-6b", "chatglm2-6b"], indirect=True)
def test_the_same_bits_as_in_memory(train, monkeypatch, log_lines, family_name):
    """Streamed, with workers, resumed, over more than an epoch: the weights are those of a training in memory."""
    args = {"train_sampling_strategy": "random", "per_device_train_batch_size": 7, "max_steps": 8}
    packing, read, get = family_name == "chatglm2-6b", [], IndexedExamples.__getitem__
    expected = train("memory", args, packing=packing)
    assert not any("as they are needed" in line for line in log_lines)
    monkeypatch.setattr(indexed_module, "MAX_ROWS_IN_MEMORY", 20)
    monkeypatch.setattr(indexed_module, "NUM_CHECKED_ROWS", 10)
    monkeypatch.setattr(IndexedExamples, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    streamed = train("streamed", args, packing=packing)
    assert_same_bits(expected, streamed)
    counts = json.loads((streamed / "run_config.json").read_text("utf-8"))["data"]["train"]
    assert (counts["num_rows"], counts["num_checked"]) == (40, 10)
    assert "40 examples, of which the first 10 have" in (streamed / "README.md").read_text("utf-8")
    before = 10 + 1 + 10 + 4  # what is checked, shown and reported, and a batch whose memory is measured
    first, read[:] = read[before:], []
    (streamed / "adapter_config.json").unlink()
    checkpoint = streamed / "checkpoint-4"
    assert_same_bits(expected, train("streamed", args, packing=packing, resume_from_checkpoint=str(checkpoint)))
    assert sorted(first[:40]) == list(range(40))
    assert read[before:] == first[4 * 7 :]  # what the checkpoint has behind it is not read again
    assert_same_bits(expected, train("workers", {**args, "dataloader_num_workers": 2}, packing=packing))


def test_unusable_rows_are_named_at_the_end(limits, train, write, log_lines):
    """Those of all workers, once each however often they came up; with evaluation data that is streamed too."""
    lines = [as_line(row(number)) for number in range(40)]
    lines[12], lines[39] = "{broken\n", '{"content": 1}\n'
    path = write("bad.jsonl", "".join(lines))
    args = {"dataloader_num_workers": 2, "per_device_train_batch_size": 8, "num_train_epochs": 2, "max_steps": -1}
    args |= {"eval_strategy": "epoch", "save_strategy": "no"}
    out = train("out", args, train_data_path=str(path), eval_data_path=str(path))
    warnings = [line for line in log_lines if "could not be used" in line]
    assert len(warnings) == 2  # of the training data, and of the evaluation data
    for line in warnings:
        assert line.startswith("WARNING 2 examples could not be used, and the next ones took their place: ")
        assert re.search(f"{path}:13: broken JSON.*; {path}:40: ", line)
    assert "eval_loss" in json.loads((out / "all_results.json").read_text("utf-8"))


def test_settings_that_need_all_lengths_are_refused(limits, train, data_path, write):
    few, grouped = write("few.jsonl", as_line(row(1))), {"train_sampling_strategy": "group_by_length"}
    only_eval = {"train_data_path": str(few), "eval_data_path": str(data_path)}
    for args, flags in ((grouped, {}), ({}, {"packing": False}), (grouped, only_eval)):
        with pytest.raises(UserError, match="group_by_length needs the lengths of all 40 examples"):
            train("out", args, **flags)


def test_all_turns_of_what_is_not_read_are_refused(limits, train):
    with pytest.raises(UserError, match="--loss_on all needs the turns of all 40 examples"):
        train("out", {}, loss_on="all")


def test_long_answers_are_left_out_when_they_are_read(limits, train, write, log_lines):
    """One that is not among the first is replaced, and named at the end; the report is on the first."""
    rows = [row(number) for number in range(40)]
    rows[25]["summary"] *= 30
    path = write("long.jsonl", "".join(map(as_line, rows)))
    args = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    train("out", args, train_data_path=str(path), truncated_answers="drop", max_output_length=60)
    (warning,) = [line for line in log_lines if "could not be used" in line]
    assert f"{path}:26: left out by --truncated_answers drop" in warning


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_changes_during_training_ends_it(limits, train, data_path, monkeypatch, num_workers):
    """In one line, also where a worker notices it; a resumed run notices it by the hash."""

    def change(self, args, state, control, **kwargs):
        if state.global_step == 2:
            data_path.write_text(data_path.read_text("utf-8") + as_line(row(40)), "utf-8")

    monkeypatch.setattr(StopRequest, "on_step_begin", change, raising=False)
    args = {"max_steps": 20, "dataloader_num_workers": num_workers}
    with pytest.raises(UserError, match=f"^{data_path}: changed while it was in use[^\n]*$"):
        train("out", args)
    with pytest.raises(UserError, match="train_data_sha256 is"):
        train("out", args, resume_from_checkpoint="latest")


def test_orders_are_those_of_accelerate():
    for epoch in (0, 3):
        usual = SeedableRandomSampler(range(100_003), data_seed=5)
        compact = CompactOrder(100_003, 5)
        for sampler in (usual, compact):
            sampler.set_epoch(epoch)
        assert list(usual) == list(compact)
        assert list(usual) == list(compact)  # both moved on to the next epoch


def test_what_is_held_out_does_not_depend_on_the_path(limits, write, tmp_path, monkeypatch):
    """Of a file with rows of no use, named in two ways: a resumed run must have the same examples."""
    lines = [as_line(row(number)) for number in range(40)]
    for number in range(12, 40, 3):
        lines[number] = "{broken\n"
    path = write("bad.jsonl", "".join(lines))
    monkeypatch.chdir(path.parent)
    sides = [
        {name: part.indices.tolist() for name, part in draw.examples.items()}
        for draw in (read_training_data(str(name), eval_ratio=0.2).draw(3) for name in (path, path.name))
    ]
    assert sides[0] == sides[1]


def test_an_evaluation_at_the_end_judges_what_can_be_read(limits, train, write, monkeypatch):
    """Streamed evaluation data with rows of no use behind the checked ones."""
    judged, lines = [], [as_line(row(number)) for number in range(40)]
    lines[30] = "{broken\n"
    path = write("bad.jsonl", "".join(lines))
    monkeypatch.setattr(at_end, "check_evaluation", lambda *args: None)
    monkeypatch.setattr(at_end, "evaluate_output", lambda *args, **kwargs: judged.append(args[3]))
    args = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    train("out", args, eval_data_path=str(path), evaluate_after=True)
    assert [example.query for example in judged[0]] == [row(number)["content"] for number in range(10)]
