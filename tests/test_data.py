"""Data files: three schemas in two layouts, and every fault with its line."""

import json

import pytest

from glm_utils.cli import UserError
from glm_utils.data import read_examples

ROW = {"instruction": "颜色#白", "output": "白色上衣"}
CHAT = [
    {"role": "system", "content": "你是文案。"},
    {"role": "user", "content": "一"},
    {"role": "assistant", "content": "甲"},
    {"role": "user", "content": "二"},
    {"role": "assistant", "content": "乙"},
]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("row", "query", "answer", "history"),
    [
        (ROW, "颜色#白", "白色上衣", ()),
        ({**ROW, "input": ""}, "颜色#白", "白色上衣", ()),
        ({**ROW, "input": None, "history": None}, "颜色#白", "白色上衣", ()),
        ({**ROW, "input": "材质#棉"}, "颜色#白\n材质#棉", "白色上衣", ()),
        ({**ROW, "history": [["你好", "你好！"]]}, "颜色#白", "白色上衣", (("你好", "你好！"),)),
        ({"content": "颜色#白", "summary": "白色上衣"}, "颜色#白", "白色上衣", ()),
        ({"messages": CHAT[1:3]}, "一", "甲", ()),
        ({"messages": CHAT[1:]}, "二", "乙", (("一", "甲"),)),
        ({"messages": CHAT}, "二", "乙", (("你是文案。\n一", "甲"),)),
        ({"messages": CHAT[:3]}, "你是文案。\n一", "甲", ()),
        ({**ROW, "id": 7}, "颜色#白", "白色上衣", ()),
    ],
)
def test_schemas(write, row, query, answer, history):
    for name, text in (("a.jsonl", lines(row)), ("a.json", json.dumps([row], indent=1))):
        (found,) = read_examples(write(name, text))
        assert (found.query, found.answer, found.history) == (query, answer, history)


def test_rows_know_their_lines(write):
    path = write("a.jsonl", lines(ROW) + "\n  \n" + lines(ROW))
    assert [row.where for row in read_examples(path)] == [f"{path}:1", f"{path}:4"]
    path = write("a.json", json.dumps([ROW, ROW], indent=2))
    assert [row.where for row in read_examples(path)] == [f"{path}:2", f"{path}:6"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROW, ROW).replace("\n", "\r\n").encode())
    assert len(read_examples(path)) == 2


def test_line_separators_inside_a_text_split_no_row(write):
    row = {"instruction": "a\u2028b\u0085c", "output": "d"}
    (found,) = read_examples(write("a.jsonl", lines(row)))
    assert found.query == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "no rows in it"),
        ("\n \n", None, "no rows in it"),
        ("[]", None, "no rows in it"),
        (lines(ROW) + '{"instruction": "a", "output": \n', 2, "broken JSON"),
        (lines(ROW) + "plain text\n", 2, "broken JSON"),
        (lines(ROW) + "[" * 100_000 + "\n", 2, "broken JSON"),
        (lines(ROW) + "1" * 5000 + "\n", 2, "broken JSON"),
        ("[\n" + '{"a":' * 100_000, 2, "broken JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", 1, "Git LFS pointer"),
        (lines(ROW, {"instruction": "a"}), 2, "no 'output' in the row (keys: instruction)"),
        (lines(ROW, {"question": "a", "answer": "b"}), 2, "no 'instruction' in the row (keys: question, answer)"),
        (lines({"content": "a"}), 1, "no 'summary'"),
        (lines({**ROW, "output": ""}), 1, "the output is empty"),
        (lines({**ROW, "instruction": " "}), 1, "the instruction is empty"),
        (lines({**ROW, "output": 3}), 1, "output is int, expected a string"),
        (lines({**ROW, "input": ["a"]}), 1, "input is list, expected a string"),
        (lines({**ROW, "history": "a"}), 1, "history must be a list of [question, answer] pairs"),
        (lines({**ROW, "history": [["a"]]}), 1, "history must be a list of [question, answer] pairs"),
        (lines(ROW) + "[1]\n", 2, "a row is list, expected an object"),
        (lines(ROW) + "null\n", 2, "a row is NoneType, expected an object"),
        (lines({"messages": "a"}), 1, "messages must be a list"),
        (lines({"messages": []}), 1, "roles are none"),
        (lines({"messages": CHAT[1:2]}), 1, "roles are user; expected user and assistant in turn"),
        (lines({"messages": CHAT[2:4]}), 1, "roles are assistant, user"),
        (lines({"messages": [*CHAT, CHAT[0], *CHAT[1:3]]}), 1, "roles are user, assistant, user, assistant, system"),
        (lines({"messages": [{"role": "user"}]}), 1, "messages must be a list"),
        ('[\n{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}]', 3, "expected ',' or ']'"),
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": }]', 3, "broken JSON"),
        ('[\n{"instruction": "a", "output": "b"}', 2, "Is the file cut short?"),
        ('[\n{"instruction": "a"}]', 2, "no 'output' in the row"),
        ('[{"instruction": "a", "output": "b"}] x', 1, "text behind the end"),
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
    path.write_bytes(lines(ROW).encode() + lines(ROW).encode("gb18030"))
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8.*iconv"):
        read_examples(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
