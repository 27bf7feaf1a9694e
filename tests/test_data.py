"""Data files: three schemas in two layouts, and errors that name the line."""

import json

import pytest

from glm_utils.cli import UserError
from glm_utils.data import read_examples

EXAMPLE = {"instruction": "颜色#白", "output": "白色上衣"}
CHAT = [
    {"role": "system", "content": "你是文案。"},
    {"role": "user", "content": "一"},
    {"role": "assistant", "content": "甲"},
    {"role": "user", "content": "二"},
    {"role": "assistant", "content": "乙"},
]


def lines(*examples):
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


@pytest.mark.parametrize(
    ("example", "query", "answer", "history"),
    [
        (EXAMPLE, "颜色#白", "白色上衣", ()),
        ({**EXAMPLE, "input": ""}, "颜色#白", "白色上衣", ()),
        ({**EXAMPLE, "input": None, "history": None}, "颜色#白", "白色上衣", ()),
        ({**EXAMPLE, "input": "材质#棉"}, "颜色#白\n材质#棉", "白色上衣", ()),
        ({**EXAMPLE, "history": [["你好", "你好！"]]}, "颜色#白", "白色上衣", (("你好", "你好！"),)),
        ({"content": "颜色#白", "summary": "白色上衣"}, "颜色#白", "白色上衣", ()),
        ({"messages": CHAT[1:3]}, "一", "甲", ()),
        ({"messages": CHAT[1:]}, "二", "乙", (("一", "甲"),)),
        ({"messages": CHAT}, "二", "乙", (("你是文案。\n一", "甲"),)),
        ({"messages": CHAT[:3]}, "你是文案。\n一", "甲", ()),
        ({**EXAMPLE, "id": 7}, "颜色#白", "白色上衣", ()),
    ],
)
def test_schemas(write, example, query, answer, history):
    for name, text in (("a.jsonl", lines(example)), ("a.json", json.dumps([example], indent=1))):
        (found,) = read_examples(write(name, text))
        assert (found.query, found.answer, found.history) == (query, answer, history)


def test_examples_know_their_lines(write):
    path = write("a.jsonl", lines(EXAMPLE) + "\n  \n" + lines(EXAMPLE))
    assert [example.where for example in read_examples(path)] == [f"{path}:1", f"{path}:4"]
    path = write("a.json", json.dumps([EXAMPLE, EXAMPLE], indent=2))
    assert [example.where for example in read_examples(path)] == [f"{path}:2", f"{path}:6"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(EXAMPLE, EXAMPLE).replace("\n", "\r\n").encode())
    assert len(read_examples(path)) == 2


def test_line_separators_inside_a_text_split_no_example(write):
    example = {"instruction": "a\u2028b\u0085c", "output": "d"}
    (found,) = read_examples(write("a.jsonl", lines(example)))
    assert found.query == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "no examples in it"),
        ("\n \n", None, "no examples in it"),
        ("[]", None, "no examples in it"),
        (lines(EXAMPLE) + '{"instruction": "a", "output": \n', 2, "broken JSON"),
        (lines(EXAMPLE) + "plain text\n", 2, "broken JSON"),
        (lines(EXAMPLE) + "[" * 100_000 + "\n", 2, "broken JSON"),
        (lines(EXAMPLE) + "1" * 5000 + "\n", 2, "broken JSON"),
        ("[\n" + '{"a":' * 100_000, 2, "broken JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", 1, "Git LFS pointer"),
        (lines(EXAMPLE, {"instruction": "a"}), 2, "the example has no 'output' (its keys: instruction)"),
        (
            lines(EXAMPLE, {"question": "a", "answer": "b"}),
            2,
            "data.json:1 is instruction/output. One file has one form: split it",
        ),
        (lines(EXAMPLE, {"text": "a"}), 2, "the example has no 'instruction' (its keys: text)"),
        (lines({"content": "a"}), 1, "the example has no 'summary'"),
        (lines({**EXAMPLE, "output": ""}), 1, "the output is empty"),
        (lines({**EXAMPLE, "instruction": " "}), 1, "the instruction is empty"),
        (lines({**EXAMPLE, "output": 3}), 1, "output is int, expected a string"),
        (lines({**EXAMPLE, "input": ["a"]}), 1, "input is list, expected a string"),
        (lines({**EXAMPLE, "history": "a"}), 1, "history must be a list of [question, answer] pairs"),
        (lines({**EXAMPLE, "history": [["a"]]}), 1, "history must be a list of [question, answer] pairs"),
        (lines(EXAMPLE) + "[1]\n", 2, "the example is list, expected an object"),
        (lines(EXAMPLE) + "null\n", 2, "the example is NoneType, expected an object"),
        (lines({"messages": "a"}), 1, "messages must be a list"),
        (lines({"messages": []}), 1, "roles are none"),
        (lines({"messages": CHAT[1:2]}), 1, "roles are user; expected user and assistant alternately"),
        (lines({"messages": CHAT[2:4]}), 1, "roles are assistant, user"),
        (lines({"messages": [*CHAT, CHAT[0], *CHAT[1:3]]}), 1, "roles are user, assistant, user, assistant, system"),
        (lines({"messages": [{"role": "user"}]}), 1, "messages must be a list"),
        ('[\n{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}]', 3, "expected ',' or ']'"),
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": }]', 3, "broken JSON"),
        ('[\n{"instruction": "a", "output": "b"}', 2, "Is the file truncated?"),
        ('[\n{"instruction": "a"}]', 2, "the example has no 'output'"),
        ('[{"instruction": "a", "output": "b"}] x', 1, "text after the end"),
    ],
)
def test_faults_name_file_line_and_remedy(write, text, line, message):
    path = write("data.json", text)
    with pytest.raises(UserError) as error_info:
        read_examples(path)
    assert str(error_info.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert message in str(error_info.value)


def test_wrong_encoding_names_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(EXAMPLE).encode() + lines(EXAMPLE).encode("gb18030"))
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8.*iconv"):
        read_examples(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
