"""The report on the data before a training: its figures, the page, the JSON document, and what is truncated."""

import dataclasses
import io
import json
import re
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

import train_qlora as stage
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.data import Example, read_examples
from glm_utils.encoding import EncodedExamples, encode_examples
from glm_utils.family import PROJECT_DIR
from glm_utils.limits import EncodingLimits
from glm_utils.training import inputs, run, scripts
from glm_utils.training.data_page import data_page, histogram_lines, print_page, truncation_warnings
from glm_utils.training.data_report import (
    BatchFigures,
    Places,
    find_duplicates,
    find_places,
    length_histogram,
    report_data,
)
from glm_utils.training.preflight import batch_figures, batch_tokens


def example(query="q", answer="a", history=(), line=1):
    return Example(query, answer, tuple(history), f"d.jsonl:{line}")


def encoded_as(lengths, num_trained=1, **places):
    counts = {"num_rows": len(lengths), "num_tokens": sum(lengths), "num_trained_tokens": num_trained}
    return EncodedExamples(datasets.Dataset.from_dict({"length": lengths}), counts, **places)


# ---- figures


def test_duplicates_are_exact_repetitions():
    history = (("hi", "ho"),)
    rows = [("q", "a", ()), ("q", "b", ()), ("q", "a", ()), ("q", "a", history), ("q", "a", ()), ("q", "b", ())]
    found = find_duplicates([example(*row, line=line) for line, row in enumerate(rows, start=1)])
    assert (found.count, found.num_distinct, found.first_pair) == (3, 2, ("d.jsonl:1", "d.jsonl:3"))
    assert find_duplicates([example()]).first_pair == ()


def test_equal_hashes_are_no_duplicates():
    class Text(str):
        __slots__ = ()

        def __hash__(self):
            return 7

    rows = [example(Text(text), line=line) for line, text in enumerate("abcab", start=1)]
    found = find_duplicates(rows)
    assert (found.count, found.num_distinct, found.first_pair) == (2, 2, ("d.jsonl:1", "d.jsonl:4"))


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_holds_every_example_once(seed):
    generator = np.random.default_rng(seed)
    lengths = np.maximum(2, generator.lognormal(4, 0.2 + seed / 2, size=1 + 300 * seed).astype(np.int64))
    bins = length_histogram(lengths)
    for each in bins:
        assert each.num_examples == ((lengths >= each.shortest) & (lengths <= each.longest)).sum()
    assert sum(each.num_examples for each in bins) == len(lengths)
    assert len(bins) <= 20
    assert len(histogram_lines(bins)) == len(bins)


def test_one_outlier_does_not_hide_the_others():
    bins = length_histogram(np.array([*range(40, 140), *range(40, 140), 100_000]))
    assert len(bins) >= 8
    assert bins[-1].num_examples == 1
    assert bins[-1].longest == 100_000


def test_bars_show_every_example():
    lines = histogram_lines(length_histogram(np.array([5] * 10_000 + [30] + [50] * 5000)))
    assert [line.count("#") for line in lines if "#" in line] == [40, 1, 20]
    assert len({line.index("|") for line in lines}) == 1
    assert lines[0].endswith("66.7%")


def test_scripts_of_questions_and_answers():
    shares = scripts.script_shares(
        [example("你好 abc", "ひらカナー", history=[("ж" * 50, "x")]), example("Жё", "1２, 한"), example("é", "ﾊＡ")]
    )
    total = 2 + 3 + 5 + 2 + 2 + 1 + 1 + 1 + 2
    expected = {"Chinese characters": 2, "Latin": 5, "Japanese kana": 6, "Cyrillic": 2, "digits": 2}
    expected |= {"punctuation and symbols": 1, "Korean Hangul": 1}
    assert shares == pytest.approx({name: count / total for name, count in expected.items()})
    assert list(shares)[0] == "Japanese kana"
    assert scripts.script_shares([example(" ", "\n")]) == {}
    assert scripts.script_shares([example("\ue000", "𠀀")]) == {"other": 0.5, "Chinese characters": 0.5}


def test_scripts_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr(scripts, "PART_CHARACTERS", 4)
    texts = ["", "", "я", "zz", "", "", "ы" * 11, "", "y"]
    parts = list(scripts.parts_of(texts))
    assert "".join(parts) == "".join(texts)
    assert max(map(len, parts)) < 8
    rows = [example("", ""), example("я", "zz"), example("", ""), example("ы" * 11, "y")]
    assert scripts.script_shares(rows) == pytest.approx({"Cyrillic": 12 / 15, "Latin": 3 / 15})


def test_figures_with_examples_left_out():
    """The longest example is named by its own line, also behind others that are left out."""
    rows = [example(line=line) for line in range(1, 6)]
    encoded = encoded_as([10, 30, 20], num_trained=15, truncated_prompts=[4], dropped=[0, 2])
    report = report_data(rows, encoded)
    assert (report.longest_tokens, report.longest_place) == (30, "d.jsonl:4")
    assert (report.num_tokens, report.num_trained_tokens, report.mean_tokens) == (60, 15, 20)
    assert (report.median_tokens, report.p95_tokens) == (20, 30)
    assert report.dropped == Places(2, ("d.jsonl:1", "d.jsonl:3"))
    assert report.truncated_prompts == Places(1, ("d.jsonl:5",))
    page = data_page("train", report)
    assert "examples     3" in page
    assert "60, 15 of them trained (25.0%)" in page
    assert "left out     2 (--truncated_answers drop)" in page


def test_a_sample_says_so():
    page = data_page("train", report_data([example()], encoded_as([10]), num_examples=10_000_000))
    assert page.startswith("train data (of the first 1 of 10,000,000 examples)\n")
    assert "of the first" not in data_page("train", report_data([example()], encoded_as([10])))


def test_a_hostile_name_stays_on_its_line():
    rows = [dataclasses.replace(example(), where="a\nb\x1b[2J.jsonl:1")] * 2
    lines = data_page("train", report_data(rows, encoded_as([10, 10]))).splitlines()
    assert sum(r"a\nb\x1b[2J.jsonl:1" in line for line in lines) == 2  # the longest, the duplicates
    assert all("\x1b" not in line for line in lines)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_tokens_of_batches(batch_size):
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    packed, padded = (batch_tokens(lengths, batch_size, packing) for packing in (True, False))
    assert packed.sum() == lengths.sum()
    assert (padded >= packed).all()
    assert len(packed) == len(padded) == -(-50 // batch_size)
    assert batch_size > 1 or (padded == packed).all()
    assert batch_size < 50 or padded.tolist() == [50 * lengths.max()]


def test_padding_is_named_for_what_the_run_does():
    report = report_data([example()], encoded_as([10]), BatchFigures(32, True, 320, 0.25))
    assert "32 examples, 320 tokens on average, packed; padded, 25.0% of a batch would be padding" in data_page(
        "t", report
    )
    report = report_data([example()], encoded_as([10]), BatchFigures(32, False, 320, 0.25))
    assert "32 examples, 320 tokens on average; 25.0% of a batch is padding" in data_page("t", report)


# ---- what is truncated


def test_ten_lines_and_a_count():
    rows = [example(line=line) for line in range(1, 31)]
    assert str(find_places(rows, range(0, 24, 2))) == (
        ", ".join(f"d.jsonl:{line}" for line in range(1, 20, 2)) + ", and 2 more"
    )
    assert str(find_places(rows, [3])) == "d.jsonl:4"


@pytest.mark.parametrize(
    ("truncated_answers", "words"),
    [
        ("cut_and_end", "1 of 2 answers exceed --max_output_length 4 and are truncated, with a trained end token"),
        ("cut", "1 of 2 answers exceed --max_output_length 4 and are truncated, without an end token"),
        ("drop", "1 of 2 answers exceed --max_output_length 4 and are left out with their examples"),
    ],
)
def test_prompts_and_answers_are_listed_apart(tokenizer, truncated_answers, words):
    rows = [example("类型#裙" * 9, "白", line=1), example("裙", "白色的裙子百搭又时尚" * 3, line=2)]
    limits = EncodingLimits(len(tokenizer.encode_prompt("类型#裙")), 4, truncated_answers)
    warnings = truncation_warnings("train", report_data(rows, encode_examples(rows, tokenizer, limits)), limits)
    assert len(warnings) == 2
    assert warnings[0].startswith(f"train: 1 of 2 prompts exceed --max_input_length {limits.max_input_length}")
    assert warnings[0].endswith(": d.jsonl:1")
    assert words in warnings[1]
    assert warnings[1].endswith(": d.jsonl:2")


# ---- the stage


@pytest.mark.parametrize("name", ["docs/training.md", "docs/training_zh.md"])
def test_the_page_of_the_documentation(monkeypatch, name):
    monkeypatch.chdir(PROJECT_DIR)
    examples, tokenizer = read_examples("data/train.jsonl"), open_checkpoint("models/chatglm2-tiny").tokenizer
    encoded = encode_examples(examples, tokenizer, EncodingLimits(512, 60))
    args = SimpleNamespace(train_sampling_strategy="random", train_batch_size=32)
    batches = batch_figures(encoded.lengths, SimpleNamespace(training_args=args, packing=True))
    page = data_page("train", report_data(examples, encoded, batches))
    assert f"```text\n{page}```\n" in (PROJECT_DIR / name).read_text("utf-8")


@pytest.fixture
def report(write, model_dir, tmp_path, monkeypatch):
    """Make a dry run of two files; return the JSON document."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"content": f"类型#裙*颜色#{color}", "summary": f"{color}的裙子。" * count}
        for count, color in enumerate("白红蓝白", 1)
    ]
    rows.append(rows[0])
    data = write("train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    dev = write("dev.json", rows[:1])

    def make(**flags):
        args = {"output_dir": "out", "per_device_train_batch_size": 2, "num_train_epochs": 1, "report_to": "none"}
        args |= {"eval_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
        flags = {"model_name_or_path": str(model_dir), "train_data_path": str(data), **flags}
        flags = {"eval_data_path": str(dev), "output_json": "report.json", "dry_run": True, **flags}
        stage.train_qlora(train_args_json=str(write("args.json", args)), **flags)
        return json.loads((tmp_path / "report.json").read_text("utf-8"))

    return make


def test_the_page_and_the_document_say_the_same(report, capsys, log_lines, tmp_path):
    document = report(max_output_length=12, truncated_answers="drop")
    train, dev = document["data"]["train"], document["data"]["eval"]
    assert (train["num_examples"], train["num_reported"]) == (5, 5)
    assert train["duplicates"] == {
        "count": 1,
        "num_distinct": 1,
        "first_pair": [f"{tmp_path}/train.jsonl:{line}" for line in (1, 5)],
    }
    assert train["dropped"]["count"] > 0
    assert dev["num_examples"] == 1
    assert dev["batches"] is None
    assert document["num_steps"] == -(-(5 - train["dropped"]["count"]) // 2)
    assert document["arguments"]["truncated_answers"] == "drop"
    assert {"versions", "commit", "base"} <= document.keys()
    page = capsys.readouterr().out
    assert page.count("tokens per example") == 2
    assert f"{train['num_tokens']:,}, {train['num_trained_tokens']:,} of them trained" in page
    assert f"{train['longest_tokens']:,} tokens, {train['longest_place']}" in page
    assert "1 repeat an earlier example, 1 of them distinct" in page
    text = "\n".join(log_lines)
    assert f"train: {train['dropped']['count']} of 5 answers exceed --max_output_length 12 and are left out" in text
    assert "dry run: nothing was trained or written but report.json" in text
    assert not (tmp_path / "out").exists()


def test_a_training_writes_the_document_too(report, tmp_path):
    document = report(dry_run=False)
    record = json.loads((tmp_path / "out/run_config.json").read_text("utf-8"))
    counts = record["data"]["train"]
    assert (counts["num_rows"], counts["num_dropped"], counts["num_duplicates"]) == (5, 0, 1)
    assert counts["num_tokens"] == document["data"]["train"]["num_tokens"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize(
    "path", ["no/report.json", ".", "train.jsonl", "dev.json", "args.json", "link.jsonl", "base/config.json"]
)
def test_a_document_that_cannot_be_written_is_refused_before_any_work(report, model_dir, tmp_path, monkeypatch, path):
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    (tmp_path / "base").symlink_to(model_dir)
    monkeypatch.setattr(inputs, "read_training_data", lambda *args, **kwargs: pytest.fail("data was read"))
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"^--output_json {re.escape(path)}: "):
        report(output_json=path)
    assert (tmp_path / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_all_left_out_is_one_line(report, tmp_path):
    with pytest.raises(UserError) as error_info:
        report(max_output_length=2, truncated_answers="drop")
    assert str(error_info.value).startswith(f"all answers, 5 from {tmp_path}/train.jsonl:1 on, are longer than")
    assert "\n" not in str(error_info.value)
    assert not (tmp_path / "report.json").exists()


def test_other_processes_report_nothing(capsys, log_lines):
    settings = SimpleNamespace(encoded={"train": encoded_as([3])}, training_args=SimpleNamespace(process_index=1))
    assert run.encode_data(settings) == settings.encoded
    assert capsys.readouterr().out == ""
    assert log_lines == []


def test_a_terminal_that_lacks_characters_ends_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    print_page("数据")
    assert out.buffer.getvalue() == b"\\u6570\\u636e\n"
