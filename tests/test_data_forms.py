"""Forms of data: the same content is the same tokens whatever its form, layout and encoding; nothing is dropped."""

import json
import pickle
import re
import subprocess
import sys

import pytest

from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError
from glm_utils.data import read_data, read_examples
from glm_utils.data.find_files import find_files
from glm_utils.data.forms import FORMS, ChatForm, Columns, find_form
from glm_utils.encoding import EncodingLimits, encode_examples
from glm_utils.family import PROJECT_DIR
from tests.data_files import HISTORY, MESSAGES, PAIR, ROWS, SYSTEM, jsonl, write_as

QUESTION, ANSWER = PAIR


@pytest.fixture(scope="module", params=["chatglm-tiny", "chatglm2-tiny"])
def tiny_tokenizer(request):
    return open_checkpoint(PROJECT_DIR / "models" / request.param).tokenizer


def content(examples):
    return [(example.query, example.answer, example.history) for example in examples]


def failed(path, **options):
    """Return the error of reading a file."""
    with pytest.raises(UserError) as error_info:
        read_data(path, **options)
    return str(error_info.value)


# ---- equal content


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("layout", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.xlsx"])
def test_equal_content_is_equal_examples(tmp_path, form, layout):
    """System, earlier turns, question and answer arrive in every form and layout."""
    examples = read_examples(write_as(tmp_path / layout, [ROWS[form.name]] * 2))
    assert content(examples) == [(QUESTION, ANSWER, ((f"{SYSTEM}\n{HISTORY[0][0]}", HISTORY[0][1]),))] * 2


def test_equal_content_is_equal_tokens(tmp_path, tiny_tokenizer):
    """Of every form, on both families' tokenizers."""
    limits, encoded = EncodingLimits(512, 512), {}
    for form in FORMS:
        examples = read_examples(write_as(tmp_path / "a.jsonl", [ROWS[form.name]]))
        (row,) = encode_examples(examples, tiny_tokenizer, limits).dataset
        encoded[form.name] = (row["input_ids"], row["labels"])
    assert all(ids == encoded["messages"] for ids in encoded.values())
    prompt = tiny_tokenizer.encode_prompt(QUESTION, [(f"{SYSTEM}\n{HISTORY[0][0]}", HISTORY[0][1])])
    assert encoded["messages"][0] == prompt + tiny_tokenizer.encode_answer(ANSWER)


@pytest.mark.parametrize("layout", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize(
    ("encoding", "title"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("gb18030", "GBK (GB18030)"),
        ("gbk", "GBK (GB18030)"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
        ("utf-32", "UTF-32"),
    ],
)
def test_encodings_are_read_directly(tmp_path, log_lines, layout, encoding, title):
    """With one line in the log where it is not UTF-8, with a piece of the text by which one sees that it is right."""
    path = write_as(tmp_path / layout, [ROWS["instruction/output"]] * 3)
    expected = content(read_examples(path))
    path.write_bytes(path.read_text("utf-8").encode(encoding))
    assert content(read_examples(path)) == expected
    assert len(log_lines) == (title is not None)
    assert title is None or f"{path}: not UTF-8, read as {title}, e.g. " in log_lines[0]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (
            "Big5",
            "".join(jsonl({"content": "顏色是白色的裙子", "summary": "這件連衣裙採用柔軟的面料"})).encode("big5"),
        ),
        ("Latin-1", jsonl({"content": "été à Noël", "summary": "voilà, très bien"}).encode("latin-1")),
        (
            "Shift JIS",
            jsonl({"content": "白いスカートです", "summary": "とてもきれいなスカートです"}).encode("shift-jis"),
        ),
        ("mixed", jsonl(ROWS["content/summary"]).encode() + jsonl(ROWS["content/summary"]).encode("gbk")),
        ("damaged", jsonl(*[ROWS["content/summary"]] * 9).encode()[:-6] + b'\xe4"}\n'),
        ("half a UTF-16", b"\xff\xfe" + jsonl(ROWS["content/summary"]).encode("utf-16-le")[:-3]),
    ],
)
def test_what_is_no_known_encoding_is_not_guessed(tmp_path, name, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert "Save it anew as UTF-8" in failed(path) or "iconv -f ITS_ENCODING" in failed(path)


# ---- nothing silent


def test_keys_that_are_not_read_are_named_once(tmp_path, log_lines):
    row = ROWS["query/response"]
    path = write_as(tmp_path / "a.jsonl", [{**row, "id": 1, "x\x1b": 2}, {**row, "id": 2}, row])
    data = read_data(path)
    assert data.report.unread == {str(path): {"id": 2, "x\x1b": 1}}
    data.report.log()
    (line,) = log_lines
    assert line.endswith(r"keys that are not read, with their rows of 3: id (2), x\x1b (1)")


def test_keys_of_messages_that_are_not_read_are_named(tmp_path):
    messages = [{**MESSAGES[1], "name": "x"}, {**MESSAGES[2], "weight": 0}]
    data = read_data(write_as(tmp_path / "a.jsonl", [{"messages": messages}]))
    (counts,) = data.report.unread.values()
    assert counts == {"messages[].name": 1, "messages[].weight": 1}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("histroy", "history"),
        ("History", "history"),
        ("ssytem", "system"),
        ("SYSTEM", "system"),
        ("inputs", "input"),
        (" input", "input"),
    ],
)
def test_a_misspelt_key_is_an_error(tmp_path, key, meant):
    row = {"instruction": "a", "output": "b"}
    path = write_as(tmp_path / "a.jsonl", [row, {**row, key: "c"}])
    assert failed(path) == f"{path}:2: {key!r} is not read. Is {meant!r} meant? Rename it, or delete it"
    if key.strip() == key:
        path = write_as(tmp_path / "a.csv", [{**row, key: "c"}])
        assert failed(path).startswith(f"{path}:1: {key!r} is not read. Is {meant!r} meant?")


def test_a_misspelt_answer_is_an_error(tmp_path):
    path = write_as(tmp_path / "a.jsonl", [{"instruction": "a", "ouput": "b"}])
    for answers in ("required", "optional"):
        assert failed(path, answers=answers).startswith(f"{path}:1: ")
        assert "'ouput'" in failed(path, answers=answers)
        assert "Is 'o" in failed(path, answers=answers)


@pytest.mark.parametrize("key", ["id", "output_id", "old_history", "input_tokens", "system_prompt", "source", "label"])
def test_another_key_is_not_taken_for_a_misspelt_one(tmp_path, key):
    row = {"instruction": "a", "output": "b", key: "c"}
    data = read_data(write_as(tmp_path / "a.jsonl", [row]))
    assert [*data.report.unread.values()] == [{key: 1}]


def test_all_bad_rows_are_reported_at_once(tmp_path):
    rows = [{"content": "a", "summary": "b"}] + [{"content": "a", "summary": number} for number in range(30)]
    path = write_as(tmp_path / "a.jsonl", rows)
    lines = failed(path).splitlines()
    assert lines[0] == "30 faults:"
    assert [line.split(": ")[0].strip() for line in lines[1:21]] == [f"{path}:{number}" for number in range(2, 22)]
    assert lines[21:] == ["  and 10 more"]


def test_faults_of_several_files_are_reported_at_once(tmp_path):
    good = write_as(tmp_path / "good.jsonl", [ROWS["content/summary"]])
    bad = write_as(tmp_path / "bad.jsonl", [{"content": "a", "summary": 1}])
    empty = write_as(tmp_path / "empty.jsonl", [])
    broken = tmp_path / "broken.csv"
    broken.write_text('content,summary\n"a,b\n', "utf-8")
    error = failed([good, bad, empty, broken])
    assert [f"{path}:" in error for path in (good, bad, empty, broken)] == [False, True, True, True]
    assert error.startswith("3 faults:")


def test_mixed_forms_name_both_lines(tmp_path):
    path = write_as(tmp_path / "a.jsonl", [ROWS["query/response"], ROWS["content/summary"], ROWS["conversations"]])
    lines = failed(path).splitlines()
    assert [line.strip().split(". One")[0] for line in lines[1:]] == [
        f"{path}:2: the form is content/summary, but {path}:1 is query/response",
        f"{path}:3: the form is conversations, but {path}:1 is query/response",
    ]


def test_each_file_has_its_own_form(tmp_path):
    paths = [write_as(tmp_path / f"{number}.jsonl", [ROWS[form.name]]) for number, form in enumerate(FORMS)]
    assert len(read_examples(paths)) == len(FORMS)


@pytest.mark.parametrize(
    ("row", "nearest", "hint"),
    [
        ({"instrction": "a", "output": "b"}, "instruction/output", "Is 'instrction' meant for 'instruction'?"),
        ({"conversation": []}, "conversations", "Is 'conversation' meant for 'conversations'?"),
        ({"q": "a", "respones": "b"}, "query/response", ""),
        ({"Question": "a", "Answer": "b"}, "question/answer", "Is 'Question' meant for 'question'?"),
    ],
)
def test_unknown_form_lists_the_forms_and_names_the_nearest(tmp_path, row, nearest, hint):
    for name in ("a.jsonl", "a.csv", "a.xlsx"):
        path = write_as(tmp_path / name, [row])
        error = failed(path)
        assert f"{path}:1: unknown form (its keys: {', '.join(row)}). The nearest is {nearest}," in error
        assert hint in error
        assert all(f"\n  {form.description}\n" in error for form in FORMS)


# ---- bad rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"content": "a", "content": "b", "summary": "c"}', "'content' stands twice in one object"),
        ('{"messages": [{"role": "user", "role": "x", "content": ""}]}', "'role' stands twice in one object"),
        (r'{"content": "a\ud83d", "summary": "c"}', r"content holds \ud83d, half of a character"),
        ('{"content": "a", "summary": 1.5}', "summary is float, expected a string"),
        ('{"content": "a", "summary": "b", "system": 3}', "system is int, expected a string"),
        (
            '{"content": "a", "summary": "b", "history": [["a", "b", "c"]]}',
            "history must be a list of [question, answer]",
        ),
        ('{"content": "a", "summary": "b", "history": [["a", 1]]}', "history must be a list of [question, answer]"),
        ('{"content": "a", "summary": "b", "history": ["a", "b"]}', "history must be a list of [question, answer]"),
        (r'{"content": "a", "summary": "b", "history": [["\udc00", ""]]}', r"history holds \udc00"),
        ('{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}', "are assistant, user"),
        (
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}',
            "roles are user, tool",
        ),
        ('{"conversations": [{"from": "human", "value": null}]}', "number 1 has NoneType for its text"),
        ('{"conversations": {"from": "human"}}', "conversations must be a list of"),
        (
            '{"system": "x", "messages": [{"role": "system", "content": "y"}, {"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}',
            "a system text in messages and one under 'system'",
        ),
        ('"a"', "the example is str, expected an object"),
        ('{"data": [\n{"content": "a", "summary": "b"}\n]}', "Give the list under 'data' alone"),
        ('{\n"content": "a",\n"summary": "b"\n}', "one JSON value over several lines"),
        ('{"content": "a\0", "summary": "b"}', "a NUL byte"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text(row + "\n", "utf-8")
    assert failed(path).startswith(f"{path}:1: ")
    assert message in failed(path)


def test_optional_answers(tmp_path):
    """Of evaluation: an answer is read where there is one."""
    for form in FORMS:
        row = dict(ROWS[form.name])
        if isinstance(form, ChatForm):
            row[form.prompt] = row[form.prompt][:-1]
        else:
            del row[form.answer]
        examples = read_examples(write_as(tmp_path / "a.jsonl", [ROWS[form.name], row]), needs_answer=False)
        assert [(example.query, example.answer) for example in examples] == [(QUESTION, ANSWER), (QUESTION, "")]


# ---- names of columns


def test_columns_are_named_by_the_user(tmp_path):
    row = {"问": QUESTION, "答": ANSWER, "前文": [list(pair) for pair in HISTORY], "content": "x"}
    columns = Columns(prompt="问", response="答", history="前文")
    for name in ("a.jsonl", "a.csv", "a.xlsx"):
        data = read_data(write_as(tmp_path / name, [row]), columns=columns)
        assert content(data.examples) == [(QUESTION, ANSWER, tuple(HISTORY))]
        assert [*data.report.unread.values()] == [{"content": 1}]


def test_a_named_column_comes_before_the_form(tmp_path):
    row = {"instruction": "a", "input": "b", "output": "c", "better": "d", "query": "e"}
    path = write_as(tmp_path / "a.csv", [row])
    assert content(read_examples(path, columns=Columns(response="better"))) == [("a\nb", "d", ())]
    assert content(read_examples(path, columns=Columns(prompt="query"))) == [("e", "c", ())]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.xlsx"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(prompt="qestion"), "no column 'qestion' (--prompt_column). Did you mean question?"),
        (Columns(response="anwser"), "no column 'anwser' (--response_column). Did you mean answer?"),
        (
            Columns(prompt="id", response="zzz"),
            "no column 'zzz' (--response_column). Known columns: id, question, answer",
        ),
    ],
)
def test_a_missing_column_names_the_nearest(tmp_path, name, columns, message):
    path = write_as(tmp_path / name, [{"id": "1", "question": "a", "answer": "b"}])
    assert f"{path}:1: {message}" in failed(path, columns=columns)


def test_no_column_of_answers(tmp_path):
    path = write_as(tmp_path / "a.csv", [{"a": "1", "b": "2"}])
    assert "Name their column with --response_column" in failed(path, columns=Columns(prompt="a"))


# ---- files


def test_several_files_and_globs(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "d,e.jsonl"):
        write_as(tmp_path / name, [ROWS["content/summary"]])
    names = {path.name for path in find_files(f"{tmp_path}/*.jsonl,{tmp_path}/c.csv")}
    assert names == {"a.jsonl", "b.jsonl", "d,e.jsonl", "c.csv"}
    assert [path.name for path in find_files(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl", "d,e.jsonl"]
    assert [path.name for path in find_files(f"{tmp_path}/d,e.jsonl")] == ["d,e.jsonl"]
    assert [
        example.where.rpartition("/")[2] for example in read_examples([tmp_path / "c.csv", tmp_path / "a.jsonl"])
    ] == [
        "c.csv:2",
        "a.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{0}/x*.jsonl", "matches no file"),
        ("{0}/a.jsnl", "no such file. Did you mean a.jsonl?"),
        ("{0}/a.jsonl,{0}/a.jsonl", "named twice"),
        ("{0}/a.jsonl,{0}/*.jsonl", "named twice"),
        ("{0}", "a directory. Name its files, e.g. "),
        ("", "no file is named"),
        ("{0}/a\0b", "no such file"),
        ("{0}/" + "a" * 5000, "no such file"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, name, message):
    write_as(tmp_path / "a.jsonl", [ROWS["content/summary"]])
    assert message in failed(name.format(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"PK\x03\x04", "a workbook needs the ending .xlsx"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old or encrypted Office file"),
        (b"\x00\x01\x02\x03" * 50, "a NUL byte"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, data, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert message in failed(path)


def test_history_of_json_in_a_cell(tmp_path):
    path = write_as(tmp_path / "a.csv", [{"query": "a", "response": "b", "history": "x: y"}])
    assert failed(path).startswith(f"{path}:2: history is no JSON. In a table it is a JSON list in one cell")


def test_parsing_stands_on_the_row_alone(tmp_path):
    """A row parsed later, by its file's form, is the example that reading the file gives."""

    from glm_utils.data.file_form import FileForm
    from glm_utils.data.json_rows import parse_line

    path = write_as(tmp_path / "a.jsonl", [ROWS["conversations"]])
    form = pickle.loads(pickle.dumps(FileForm(FORMS[1], f"{path}:1")))
    row = parse_line(json.dumps(ROWS["conversations"]), f"{path}:1")
    assert [form.parse(row.value, row.where)] == read_examples(path)


# ---- the documentation


def documented(name, language):
    """Return the fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (PROJECT_DIR / name).read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("name", ["data/README", "docs/training"])
@pytest.mark.parametrize("ending", [".md", "_zh.md"])
def test_every_documented_example_is_read(tmp_path, log_lines, name, ending):
    """Each line is a file of its own; every form has one, and nothing in them is left unread."""
    examples = [line for line in documented(name + ending, "json")[-1].splitlines() if line.strip()]
    forms = [find_form(json.loads(line)).name for line in examples]
    assert sorted(forms) == sorted(form.name for form in FORMS)
    for line in examples:
        path = tmp_path / "a.jsonl"
        path.write_text(line, "utf-8")
        assert len(read_examples(path)) == 1
    assert log_lines == []


def test_documented_tables_are_read(tmp_path):
    (english,), (chinese,) = documented("data/README.md", "csv"), documented("data/README_zh.md", "csv")
    assert english == chinese
    path = tmp_path / "a.csv"
    path.write_text(english, "utf-8")
    first, second = read_examples(path)
    assert (first.history, second.history) == ((), ((first.query, first.answer),))


def test_the_data_readers_need_no_torch():
    """They are imported by tools that have to answer at once."""
    code = "import sys, glm_utils.data; print(*{'torch', 'transformers', 'openpyxl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
