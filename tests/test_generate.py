"""Answers to a file of prompts: the same whatever the batch, every form of input and output, stopped and resumed."""

import contextlib
import csv
import json
import sys
from pathlib import Path

import openpyxl
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import generate as stage
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data.forms import Columns
from glm_utils.family import PROJECT_DIR
from glm_utils.inference import answer_file, file_job, memory
from glm_utils.inference.batch import GenerationSettings, generate_answers
from glm_utils.inference.prompt_file import read_prompts
from glm_utils.load_model import ModelSource, load_base_model

MODEL = str(PROJECT_DIR / "models" / "chatglm2-tiny")
TEXTS = [
    "类型#裙*颜色#红色",
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套",
    "类型#裤",
    "你好",
    "类型#裙",
]
SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 7, "num_samples": 2}


@pytest.fixture
def tiny(family_name):
    """A family's trained tiny model in fp32, and its tokenizer."""
    checkpoint = open_checkpoint(PROJECT_DIR / "models" / f"{family_name.removesuffix('-6b')}-tiny")
    return load_base_model(checkpoint).eval(), checkpoint.tokenizer


@pytest.fixture
def run(tmp_path):
    """Run the stage on a file; return the rows of its output, or the bytes of a table."""

    def run_stage(path, name="out.jsonl", **flags):
        output = tmp_path / name
        flags = {"model_path": MODEL, "max_new_tokens": 12, "temperature": 0.0, **flags}
        stage.generate(data_path=str(path), output_path=str(output), **flags)
        assert not output.with_name(f"{name}.partial.jsonl").exists()
        if name.endswith((".csv", ".xlsx")):
            return output.read_bytes()
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return run_stage


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(ModelSource, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))


def jsonl(*values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


# ---- batches


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_batch_size_changes_nothing(tiny, sampling, monkeypatch):
    """Ids are those of a batch of one, and greedy ones those of chat; prompts meet a running batch."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(text) for text in TEXTS]
    settings = GenerationSettings(max_new_tokens=20, **sampling)
    monkeypatch.setattr("glm_utils.inference.batch.PREFILL_TOKENS", 60)  # several groups
    found = {
        size: {(one.index, one.sample): one for one in generate_answers(model, tokenizer, prompts, settings, size)}
        for size in (1, 3, 8, None)
    }
    assert found[1] == found[3] == found[8] == found[None]
    assert len(found[1]) == len(TEXTS) * settings.num_samples
    for one in found[1].values():
        assert one.num_tokens == len(one.token_ids) <= 20
        assert one.ended == (one.token_ids[-1] == model.generation_config.eos_token_id)
        assert one.ended or one.num_tokens == 20
    if not settings.temperature:
        chats = [model.chat(tokenizer, text, do_sample=False, max_new_tokens=20)[0] for text in TEXTS]
        assert [found[1][index, 0].text for index in range(len(TEXTS))] == chats
    else:
        assert any(found[1][index, 0].token_ids != found[1][index, 1].token_ids for index in range(len(TEXTS)))


def test_other_seeds_and_places_give_other_answers(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer.encode_prompt(TEXTS[0])] * 2
    texts = {}
    for seed in (0, 1, 2**64 - 1):
        settings = GenerationSettings(16, temperature=2.5, top_p=1.0, seed=seed)
        texts |= {(seed, one.index): one.text for one in generate_answers(model, tokenizer, prompts, settings, 2)}
    assert len(set(texts.values())) == 6


def test_several_end_tokens_and_none(tiny):
    """End tokens come from the generation config, as one, a list or none."""
    model, tokenizer = tiny
    prompts, settings = [tokenizer.encode_prompt(TEXTS[1])], GenerationSettings(8, temperature=0)

    def generated(end):
        model.generation_config.eos_token_id = end
        (one,) = generate_answers(model, tokenizer, prompts, settings)
        return one

    free = generated(None)
    assert (free.num_tokens, free.ended) == (8, False)
    end = free.token_ids[3]
    stopped = generated([len(tokenizer) + 5, end])
    assert (stopped.token_ids, stopped.ended) == (free.token_ids[: free.token_ids.index(end) + 1], True)


def test_context_limits_an_answer(tiny):
    """An answer ends with the context; a prompt that fills it is refused."""
    model, tokenizer = tiny
    prompt = tokenizer.encode_prompt(TEXTS[1])
    model.config.max_position_embeddings = len(prompt) + 3
    model.generation_config.eos_token_id = None
    (one,) = generate_answers(model, tokenizer, [prompt], GenerationSettings(100, temperature=0))
    assert (one.num_tokens, one.ended) == (3, False)
    model.config.max_position_embeddings = len(prompt)
    with pytest.raises(UserError, match=rf"prompt 1: the prompt takes {len(prompt)} tokens"):
        list(generate_answers(model, tokenizer, [prompt], GenerationSettings()))


def test_nan_is_an_error(tiny):
    model, tokenizer = tiny
    with torch.no_grad():
        model.get_output_embeddings().weight[3].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite logits at token 1 of the answer to prompt 1"):
        list(generate_answers(model, tokenizer, [tokenizer.encode_prompt("你好")], GenerationSettings()))


def test_nothing_to_do(tiny):
    assert list(generate_answers(*tiny, [], GenerationSettings())) == []


def test_batch_size_by_memory(tiny, monkeypatch):
    """Keys and values of the longest sequences fit, at most 16 sequences; nothing free is refused."""
    model, config = tiny[0], tiny[0].config
    kv_bytes = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a token, in fp32

    def batch_size(free):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return memory.fitting_batch_size(model, 1000, 2048)

    assert batch_size(10**12) == 16
    assert batch_size((5.5 * 1024 * 1.5 + 2048) * kv_bytes / 0.9) == 5
    with pytest.raises(UserError, match="too little for the keys and values of 1000 tokens"):
        batch_size(2048 * kv_bytes)


# ---- sampling


def sampler(module, batch, **sampling):
    """Make a sampler with keys of its sequences."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_tokens": 1000, **sampling}
    made = module.BatchSampler(batch, module.Sampling(**settings), torch.device("cpu"))
    made.keys[:] = torch.tensor([module.sequence_key(3, index, 0) for index in range(batch)])
    return made


def test_noise_is_uniform_and_independent(sibling):
    """Exponential noise of many sequences, positions and tokens: its quantiles, and no correlation of neighbours."""
    made = sampler(sibling("batching_chatglm"), 64)
    ids = torch.arange(200).expand(64, -1)
    noise = []
    for _ in range(8):
        noise.append((-made._exponential(ids)).exp())  # uniform in (0, 1)
        made.counts += 1
    noise = torch.stack(noise)  # (positions, sequences, tokens)
    histogram = torch.histc(noise, 50, 0, 1) / noise.numel()
    assert (histogram - 0.02).abs().max() < 5 * (0.02 / noise.numel()) ** 0.5
    for axis in range(3):
        one, other = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert correlation.abs() < 5 / one.numel() ** 0.5


def test_samples_follow_the_probabilities(sibling):
    """Frequencies over many sequences are those that transformers' warpers leave."""
    torch.manual_seed(0)
    logits, num_sequences = torch.randn(1, 40) * 2, 20_000
    made = sampler(sibling("batching_chatglm"), num_sequences, temperature=0.7, top_k=12, top_p=0.9, num_tokens=38)
    expected = logits[:, :38]
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.9)):
        expected = warper(None, expected)
    expected = torch.nn.functional.pad(expected.softmax(-1)[0], (0, 2))
    for _ in range(2):
        picked = made.pick(logits.expand(num_sequences, -1))
        found = torch.bincount(picked, minlength=40) / num_sequences
        assert ((found > 0) == (expected > 0)).all()
        assert (found - expected).abs().max() < 5 * (0.25 / num_sequences) ** 0.5


def test_keys_tell_sequences_apart(sibling):
    key = sibling("batching_chatglm").sequence_key
    numbers = [(seed, index, sample) for seed in (0, 1, 2**64 - 1) for index in range(50) for sample in range(4)]
    assert len({key(*three) for three in numbers}) == len(numbers)
    assert all(-(2**63) <= key(*three) < 2**63 for three in numbers)


# ---- forms of input


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", jsonl({"content": "甲", "summary": "x"}, {"content": "乙"}), ["甲", "乙"]),
        ("a.json", json.dumps([{"instruction": "甲", "input": "乙", "output": ""}]), ["甲\n乙"]),
        ("a.jsonl", jsonl({"messages": [{"role": "user", "content": "甲"}]}), ["甲"]),
        ("a.jsonl", jsonl({"question": "甲", "content_id": 3}, {"question": "乙"}), ["甲", "乙"]),
        ("a.jsonl", jsonl({"prompt": "甲", "query": "丙"}), ["甲"]),
        ("a.jsonl", jsonl({"conversations": [{"from": "human", "value": "甲"}], "system": "乙"}), ["乙\n甲"]),
        ("a.txt", "\ufeff甲\r\n\n乙 丙\n", ["甲", "乙 丙"]),
        ("a.csv", '\ufeffid,query\r\n1,甲\r\n\r\n2,"乙\n丙"\r\n', ["甲", "乙\n丙"]),
        ("a.csv", "instruction,input\n甲,乙\n丙,\n", ["甲\n乙", "丙"]),
        ("a.csv", "id;question\n1;甲\n", ["甲"]),
        ("a.tsv", "id\tquestion\n1\t甲\n", ["甲"]),
        ("data", jsonl({"content": "甲"}), ["甲"]),
    ],
)
def test_forms_of_prompts(write, name, content, expected):
    assert [row.query for row in read_prompts(write(name, content))] == expected


def test_earlier_turns_are_read(write):
    turns = {"system": "s", "user": "a", "assistant": "b"}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    messages += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    (first,) = read_prompts(write("a.jsonl", jsonl({"messages": messages})))
    (second,) = read_prompts(write("b.jsonl", jsonl({"instruction": "q", "history": [["a", "b"]]})))
    assert (first.query, first.history) == ("c", (("s\na", "b"),))
    assert (second.query, second.history) == ("q", (("a", "b"),))


def test_prompt_column_is_chosen(write):
    assert read_prompts(write("a.csv", "content,名称\n甲,乙\n"), Columns(prompt="名称"))[0].query == "乙"
    assert (
        read_prompts(write("a.jsonl", jsonl({"content": "甲", "名称": "乙"})), Columns(prompt="名称"))[0].query == "乙"
    )


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", "id,questoin\n1,x\n", None, r"a\.csv:1: unknown form .*Is 'questoin' meant for 'question'\?"),
        ("a.csv", "id,text\n1,x\n", None, r"unknown form \(its keys: id, text\)[\s\S]*name them with --prompt_column"),
        ("a.csv", "id,text\n1,x\n", "txet", r"no column 'txet' .*Did you mean text\?"),
        ("a.csv", "id,id\n1,x\n", None, r"column 'id' stands twice"),
        ("a.csv", "a;b,c\n1;x,y\n", None, r"a\.csv:1: are the columns separated by commas or semicolons\?"),
        ("a.csv", 'question\nx\n"y\n', None, r"a\.csv:3: broken CSV"),
        ("a.csv", "question\n", None, "no prompts in it"),
        ("a.csv", "que\x1b[31mstion\n1\n", None, r"its keys: que\x1b\[31mstion"),
        ("a.txt", "\n \n", None, "no prompts in it"),
        ("a.txt", "x\n", "y", "text without columns"),
        ("a.xlsx", "PK", None, r"not a workbook .*Save it anew as \.xlsx, or as CSV UTF-8"),
        ("a.xls", "x", None, r"another kind\. Save it as \.xlsx or as CSV UTF-8"),
        ("a.data", "x", None, r"unknown kind of file.*\.csv"),
        (
            "a.jsonl",
            jsonl({"text": "x"}),
            None,
            r"no row can be answered\. The first: .*a\.jsonl:1: unknown form \(its keys: text\)",
        ),
        ("a.json", '[{"content": "x"}', None, r"a\.json:1: broken JSON"),
    ],
)
def test_faults_of_a_file(write, name, content, column, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(name, content), Columns(prompt=column))


@pytest.mark.parametrize(("encoding", "title"), [("gb18030", "GBK (GB18030)"), ("utf-16", "UTF-16")])
def test_other_encodings_are_read_and_said_once(tmp_path, log_lines, encoding, title):
    path = tmp_path / "in.csv"
    path.write_bytes("编号,question\n1,类型#裙\n2,类型#裤\n".encode(encoding))
    assert [row.query for row in read_prompts(path)] == ["类型#裙", "类型#裤"]
    assert log_lines == [f"INFO {path}: not UTF-8, read as {title}, e.g. '编号,question'"]


def test_a_row_in_another_form_is_not_answered(write):
    path = write("a.jsonl", jsonl({"content": "甲"}, {"query": "乙"}))
    first, second = read_prompts(path)
    assert (first.query, first.error) == ("甲", None)
    assert f"{path}:2: the form is query/response, but {path}:1 is content/summary" in second.error


# ---- whole runs


def test_rows_come_back_in_order(run, write):
    """Columns stay, those with a name of the output's as input_NAME; faulty rows say why and where."""
    long = "长" * 3000
    lines = ["{broken", jsonl({"content": TEXTS[1], "answer": "old", "id": 4}), jsonl({"content": " "})]
    lines += [jsonl([1]), jsonl({"content": long}), jsonl({"content": TEXTS[0], "summary": "x", "n": [1, {"a": 2}]})]
    path = write("in.jsonl", "\n".join(line.strip() for line in lines))
    rows = run(path)
    assert rows[0] == {"error": rows[0]["error"]}
    assert rows[1] == {"content": TEXTS[1], "input_answer": "old", "id": 4, **rows[1], "num_tokens": 12}
    assert rows[1]["ended_by"] == "length"
    assert list(rows[5].items())[:3] == [("content", TEXTS[0]), ("summary", "x"), ("n", [1, {"a": 2}])]
    num_tokens = len(open_checkpoint(PROJECT_DIR / "models/chatglm2-tiny").tokenizer.encode_answer(rows[5]["answer"]))
    assert (rows[5]["num_tokens"], rows[5]["ended_by"]) == (num_tokens, "end")
    for index, fault in {0: "broken JSON", 2: "the prompt is empty", 3: "list", 4: "context holds 2048"}.items():
        assert rows[index]["error"].startswith(f"{path}:{index + 1}: ")
        assert fault in rows[index]["error"]
    record = json.loads((path.parent / "out.jsonl.run_config.json").read_text("utf-8"))
    assert record["counts"] == {"num_rows": 6, "num_end": 1, "num_length": 1, "num_error": 4}
    assert record["arguments"]["max_new_tokens"] == 12


def test_csv_to_csv(run, write):
    """A spreadsheet reads it as UTF-8, nothing in it is a formula, and lines inside a field stay."""
    path = write("in.csv", 'id,question,note\n-1,"类型#裙\n颜色#红色",=1+1\n2,你好,"+86 1"\n3,,@x\n4,x,y,z\n')
    data = run(path, "out.csv", num_samples=2, temperature=None)
    assert data.startswith(b"\xef\xbb\xbf")
    header, *rows = csv.reader(data.decode("utf-8-sig").splitlines(keepends=True))
    assert header == ["id", "question", "note", "sample", "answer", "num_tokens", "ended_by", "error"]
    assert [row[0] for row in rows] == ["-1", "-1", "2", "2", "3", "4"]
    assert [row[3] for row in rows] == ["0", "1", "0", "1", "", ""]
    assert rows[0][1] == "类型#裙\n颜色#红色"
    assert [rows[index][2] for index in (0, 2, 4)] == ["'=1+1", "'+86 1", "'@x"]
    assert f"{path}:5: the prompt is empty" in rows[4][7]
    assert f"{path}:6: 4 fields, the header has 3" in rows[5][7]


def test_workbook_to_workbook(run, write, tmp_path, log_lines):
    """Texts stay what they are and nothing is a formula; values that a spreadsheet would change are texts."""
    values = {
        "note": "=1+1",
        "phone": "+86 1",
        "id": 12345678901234567890,
        "list": [1],
        "bell": "a\x07_x0041_",
    }
    path = write("in.jsonl", jsonl({"content": "类型#裙", "n": 1.5, "long": "长" * 40_000, **values}))
    run(path, "out.xlsx")
    header, row = openpyxl.load_workbook(tmp_path / "out.xlsx")["answers"].iter_rows()
    cells = {name.value: cell for name, cell in zip(header, row, strict=True)}
    assert list(cells) == ["content", "n", "long", *values, "answer", "num_tokens", "ended_by"]
    assert {cell.data_type for name, cell in cells.items() if name not in ("n", "num_tokens")} == {"s"}
    assert [cells[name].value for name in ("n", "note", "phone")] == [1.5, "=1+1", "+86 1"]
    assert cells["note"].quotePrefix  # stays a text when somebody edits it
    assert cells["id"].value == "12345678901234567890"
    assert any("texts of 1 rows are truncated to 32,767 characters" in line for line in log_lines)
    run(tmp_path / "out.xlsx", "again.xlsx")
    assert read_prompts(tmp_path / "again.xlsx")[0].columns["bell"] == "a\x07_x0041_"


def test_a_table_that_no_sheet_holds_keeps_its_answers(run, write, tmp_path, monkeypatch):
    monkeypatch.setattr("glm_utils.inference.workbook.MAX_ROWS", 1)
    with pytest.raises(UserError, match=r"out\.xlsx: a sheet holds 1 rows .*Give an output in \.csv"):
        run(write("in.txt", "甲\n"), "out.xlsx")
    assert not (tmp_path / "out.xlsx").exists()
    monkeypatch.undo()
    assert run(write("in.txt", "甲\n"), "out.xlsx").startswith(b"PK")


def test_a_workbook_needs_its_package_before_any_work(run, write, no_loading, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"openpyxl, which writes XLSX, is not installed\. pip install"):
        run(write("in.txt", "甲\n"), "out.xlsx")


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "＝1", "-1+cmd|' /C calc'!A0"])
def test_formulas_are_made_harmless(text):
    assert answer_file.csv_field(text) == f"'{text}"


@pytest.mark.parametrize("value", ["x", "-1.5", "+3", "a=b", "", None, 3, [1]])
def test_other_fields_stay(value):
    assert answer_file.csv_field(value) == ("" if value is None else value if isinstance(value, str) else str(value))


def test_control_characters_do_not_reach_the_terminal(run, write, log_lines):
    path = write("in.jsonl", jsonl({"content": "类型#裙"}, {"\x1b[2Jkey\x07": 1}))
    assert len(run(path)) == 2
    assert not [character for line in log_lines for character in line if not character.isprintable()]
    assert any(r"\x1b[2Jkey\x07" in line for line in log_lines)


def test_half_a_surrogate_pair_is_written(run, write):
    (row,) = run(write("in.jsonl", '{"content": "类型#裙", "note": "\\ud83d"}\n'))
    assert row["note"] == "\ud83d"
    assert b"?" in run(write("in.jsonl", '{"content": "类型#裙", "note": "\\ud83d"}\n'), "out.csv")


# ---- several files


@pytest.fixture
def several(write, tmp_path):
    """Files of several kinds in the working directory, one with columns of the output's own names."""
    write("b.csv", f"question,file,note\n{TEXTS[0]},old.csv,=1\n")
    write("a.jsonl", jsonl({"content": TEXTS[1], "id": 7}, {"content": TEXTS[2]}))
    write("lines.txt", f"{TEXTS[3]}\n")
    with contextlib.chdir(tmp_path):
        yield


def test_rows_of_several_files_name_their_file(several, run):
    """Rows come in the order of the files as they are named; the answers are those of each file alone."""
    rows = run("b.csv,*.jsonl,lines.txt")
    assert [row["file"] for row in rows] == ["b.csv", "a.jsonl", "a.jsonl", "lines.txt"]
    assert list(rows[0]) == ["file", "question", "input_file", "note", "answer", "num_tokens", "ended_by"]
    assert list(rows[1]) == ["file", "content", "id", "answer", "num_tokens", "ended_by"]
    alone = run("a.jsonl", "alone.jsonl")
    assert [row["answer"] for row in alone] == [row["answer"] for row in rows[1:3]]
    assert "file" not in alone[0]
    record = json.loads(Path("out.jsonl.run_config.json").read_text("utf-8"))
    assert record["arguments"]["data_path"] == ["b.csv", "a.jsonl", "lines.txt"]


def test_a_table_has_the_columns_of_all_files(several, run, log_lines):
    header, *rows = csv.reader(run("b.csv,a.jsonl", "out.csv").decode("utf-8-sig").splitlines())
    assert header == ["file", "question", "input_file", "note", "content", "id", "answer", "num_tokens", "ended_by"]
    assert [row[:6] for row in rows[:2]] == [
        ["b.csv", TEXTS[0], "old.csv", "'=1", "", ""],
        ["a.jsonl", "", "", "", TEXTS[1], "7"],
    ]
    shown = "b.csv (question, file, note), a.jsonl (content, id)"
    assert (
        f"INFO the output has the columns of all files, empty where a row's file has none. Only in some: {shown}"
        in log_lines
    )


def test_a_stopped_run_over_a_glob_goes_on(several, run, stop_after, monkeypatch):
    """What it left beside its output matches the glob too, and is no input; another order is another job."""
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        run("*.csv,*.jsonl")
    monkeypatch.undo()
    assert Path("out.jsonl.partial.jsonl").exists()
    with pytest.raises(UserError, match=r"of another job \(data_sha256"):
        run("*.jsonl,*.csv")
    assert [row["file"] for row in run("*.csv,*.jsonl")] == ["b.csv", "a.jsonl", "a.jsonl"]
    with pytest.raises(UserError, match="the file of prompts itself"):
        run("*.csv,*.jsonl", overwrite=True)


def test_faults_of_several_files_come_together(several, write):
    write("empty.csv", "question\n")
    write("other.jsonl", jsonl({"text": "x"}))
    with pytest.raises(UserError) as error_info:
        read_prompts("a.jsonl,empty.csv,other.jsonl")
    assert error_info.value.message == "2 faults:"
    assert "empty.csv: no prompts in it" in error_info.value.details[0]
    assert "other.jsonl: no row can be answered. The first: other.jsonl:1: unknown form" in error_info.value.details[1]


# ---- stopped and resumed


@pytest.fixture
def stop_after(monkeypatch):
    """Let the next run stop as by Ctrl-C, after some answers."""
    generate_pending = file_job.generate_pending

    def stop(num_answers):
        def stopped(*args):
            for number, one in enumerate(generate_pending(*args)):
                if number == num_answers:
                    raise KeyboardInterrupt
                yield one

        monkeypatch.setattr(file_job, "generate_pending", stopped)

    yield stop
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_stopped_run_goes_on(run, write, tmp_path, monkeypatch, stop_after, name):
    """The output is that of a run that was never stopped, and no answer is generated twice."""
    path = write("in.jsonl", jsonl(*({"content": text} for text in TEXTS)))
    flags = {"batch_size": 2, **SAMPLED}
    expected = run(path, f"other_{name}", **flags)
    stop_after(4)
    with pytest.raises(KeyboardInterrupt):
        run(path, name, **flags)
    partial = tmp_path / f"{name}.partial.jsonl"
    assert len(partial.read_text("utf-8").splitlines()) == 5
    with partial.open("ab") as file:
        file.write(b'{"index": 1, "sample": 1, "ans')  # what a kill may leave
    seen = []
    monkeypatch.undo()
    generate_pending = file_job.generate_pending
    monkeypatch.setattr(file_job, "generate_pending", lambda *args: seen.extend(args[2]) or generate_pending(*args))
    assert run(path, name, **{**flags, "batch_size": 8}) == expected
    assert len(seen) == 2 * len(TEXTS) - 4


def test_what_another_job_left_is_refused(run, write, tmp_path, stop_after, monkeypatch):
    """Its answers stay, until they are given up on purpose."""
    path = write("in.jsonl", jsonl(*({"content": text} for text in TEXTS)))
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    left = (tmp_path / "out.jsonl.partial.jsonl").read_bytes()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"of another job \(max_new_tokens 12, now 13\).*--resume false"):
        run(path, max_new_tokens=13)
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(UserError, match="data_sha256"):
        run(path)
    assert (tmp_path / "out.jsonl.partial.jsonl").read_bytes() == left
    assert len(run(path, resume=False)) == len(TEXTS)


def test_complete_answers_need_no_model(run, write, monkeypatch, no_loading, tmp_path):
    """A run that was killed just before its output was written."""
    path = write("in.txt", "甲\n")
    identity = {}
    monkeypatch.setattr(file_job, "identify", lambda *args: identity)
    value = {"index": 0, "sample": 0, "answer": "x", "num_tokens": 1, "ended_by": "end"}
    write("out.jsonl.partial.jsonl", jsonl({"job": {}}, value))
    assert run(path) == [{"prompt": "甲", "answer": "x", "num_tokens": 1, "ended_by": "end"}]


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"num_samples": 0}, "--num_samples 0"),
        ({"num_samples": 2}, "--num_samples 2: at --temperature 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": 1.5}, "--top_p 1.5"),
        ({"seed": -1}, "--seed -1"),
        ({"model_path": None}, "neither is given"),
        ({"lora_path": "x"}, "both are given"),
        ({"device": "tpu"}, "--device tpu"),
        ({"name": "out.ods"}, r"unknown ending '.ods'. Give a name in .jsonl, .csv or .xlsx"),
        ({"name": "in.csv"}, "the file of prompts itself"),
        ({"name": "there.csv"}, "there.csv: exists. Give another file, or --overwrite"),
        ({"name": "dir.csv"}, "a directory"),
        ({"name": "in.csv/out.csv"}, "--output_path is a file"),
    ],
)
def test_bad_arguments(run, write, tmp_path, no_loading, flags, message):
    path = write("in.csv", "question\n你好\n")
    write("there.csv", "x")
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(UserError, match=message):
        run(path, **flags)
    assert (tmp_path / "there.csv").read_text() == "x"


def test_a_model_that_does_not_fit(run, write, no_loading, monkeypatch):
    monkeypatch.setattr("glm_utils.load_model.free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="needs at least .* --load_in_4bit or fewer --max_new_tokens"):
        run(write("in.txt", "甲\n"))


def test_out_of_memory_keeps_the_answers(run, write, tmp_path, monkeypatch):
    generate_pending = file_job.generate_pending

    def failing(*args):
        yield next(generate_pending(*args))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(file_job, "generate_pending", failing)
    with pytest.raises(UserError, match="out of memory after 1 answers, which are kept"):
        run(write("in.txt", "甲\n乙\n"))
    assert len((tmp_path / "out.jsonl.partial.jsonl").read_text("utf-8").splitlines()) == 2


def test_command_line(tmp_path, write):
    """An adapter's model, flags as they are typed; an existing output only with --overwrite."""
    output = write("out.csv", "x")
    words = ["--model_path", MODEL, "--data_path", str(write("in.txt", "你好\n")), "--output_path", str(output)]
    with pytest.raises(SystemExit) as stopped:
        run_cli(stage.generate, words)
    assert stopped.value.code == 1
    run_cli(stage.generate, [*words, "--overwrite", "--max_new_tokens=3", "--temperature", "0"])
    assert output.read_text("utf-8-sig").startswith("prompt,answer,num_tokens,ended_by")
