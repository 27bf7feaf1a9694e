"""--prompt_text: recorded with the adapter, and in front of every question wherever the adapter is used.

Whatever stands behind a training with a prompt_text must read the token ids that were trained: chat, answers to a
file, the speed test, evaluation, a merged directory, and the chat templates of the exports.
"""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import peft
import pytest
import torch
from transformers import AutoTokenizer

import chat_demo
import evaluate_adapter
import generate
import inference_test
import merge_lora_and_quantize as merge_stage
import train_qlora
from glm_utils.adapter import find_base, read_adapter
from glm_utils.checkpoint import load_classes, load_tokenizer_class, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.evaluation import job
from glm_utils.export import gguf_tokenizer
from glm_utils.export.fast_tokenizer import PREFIX_TEXT, chat_template
from glm_utils.export.template_text import go_with_text, jinja_with_text
from glm_utils.family import FAMILIES, PROJECT_DIR
from glm_utils.load_model import find_model, load_base_model
from glm_utils.prompt_text import agree_on, recorded_prompt_text
from glm_utils.training import run
from glm_utils.training.inputs import read_inputs
from tests.conftest import FAMILY_BY_NAME
from tests.test_export_gguf import GO_PROGRAM, as_messages, metadata

TINY_DIRS = {"chatglm-6b": PROJECT_DIR / "models/chatglm-tiny", "chatglm2-6b": PROJECT_DIR / "models/chatglm2-tiny"}
TEXT = "写文案{{ 'a' }}：\n"
QUERY, HISTORY = "类型#裙*颜色#白色", [("你好", "你好！"), ("类型#裤", "裤子。")]
ROWS = [
    {"query": QUERY, "response": "白色的裙子。", "history": HISTORY},
    {"query": QUERY, "response": "白色的裙子。"},
    {"query": "颜色#红", "response": "红色。"},
]
MERGE = {"qbits": 0, "device": "cpu"}
# what has a meaning in Jinja, Go, a Modelfile or JSON, in front, at the end and beside each other
NASTY = [
    TEXT,
    "'\"\\ \\n {{- x -}} {% raw %} {# c #} }} %} ''",
    '"""\nSYSTEM """x"" {{"{{"}} {{/* c */}}',
    "\\",
    "'",
    '"',
    "a\r\nb\tc  ",
    " {",
    "}",
    "问：{{ .Content }}答：\u2028😀",
    "$x `raw` \\u007b \\x41 {%- endfor -%}",
]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def with_text(family, text):
    """The tiny tokenizer of a family, opened by its class with a prompt_text."""
    return load_tokenizer_class(family).from_pretrained(TINY_DIRS[family.name], prompt_text=text)


@pytest.fixture(scope="module", params=list(TINY_DIRS))
def trained(request, tmp_path_factory):
    """A training of one step with TEXT: the adapter, its data, and the prompt ids that were trained by row."""
    directory = tmp_path_factory.mktemp(request.param)
    args = {"output_dir": str(directory / "adapter"), "max_steps": 1, "report_to": "none", "disable_tqdm": True}
    args_path = directory / "args.json"
    args_path.write_text(json.dumps({**args, "use_cpu": True, "save_steps": 1, "per_device_train_batch_size": 3}))
    data_path = write_json_lines(directory / "train.jsonl", ROWS)
    flags = {"train_args_json": str(args_path), "model_name_or_path": str(TINY_DIRS[request.param])}
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        encode = run.encode_data
        patch.setattr(run, "encode_data", lambda settings: encoded.append(encode(settings)) or encoded[0])
        train_qlora.train_qlora(**flags, train_data_path=str(data_path), prompt_text=TEXT)
    prompts = [
        [index for index, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        for row in encoded[0]["train"].dataset
    ]
    family = FAMILY_BY_NAME[request.param]
    return SimpleNamespace(adapter=directory / "adapter", data=data_path, prompts=prompts, family=family, flags=flags)


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """The adapter of `trained` in its base, in the published layout."""
    out = tmp_path_factory.mktemp("merged") / "fp16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm_utils.export.chatglm.verify", lambda *args: None)
        merge_stage.merge_lora_and_quantize(lora_path=str(trained.adapter), output_path=str(out), **MERGE)
    return out


@pytest.fixture
def read_ids(monkeypatch, trained):
    """Count the sequences, of those that models of the family read during the test, that hold given ids.

    The last id may be missing: a batch reads it with the first step.
    """
    found = []
    model_class = sys.modules[load_classes(trained.family).model.__module__].ChatGLMModel
    forward = model_class.forward

    def spy(self, *args, **kwargs):
        found.extend(inspect.signature(forward).bind(self, *args, **kwargs).arguments["input_ids"].tolist())
        return forward(self, *args, **kwargs)

    def count(ids):
        ids = ids[:-1]
        return sum(any(row[n : n + len(ids)] == ids for n in range(len(row) - len(ids) + 1)) for row in found)

    monkeypatch.setattr(model_class, "forward", spy)
    return count


# ---- what is trained is what is read


def test_every_question_gets_the_text_in_training(trained):
    plain = open_checkpoint(TINY_DIRS[trained.family.name]).tokenizer
    history = [(TEXT + question, answer) for question, answer in HISTORY]
    assert trained.prompts[0] == plain.encode_prompt(TEXT + QUERY, history)
    assert trained.prompts[1] == plain.encode_prompt(TEXT + QUERY)
    assert json.loads((trained.adapter / "tokenizer_config.json").read_text("utf-8"))["prompt_text"] == TEXT
    assert json.loads((trained.adapter / "run_config.json").read_text("utf-8"))["arguments"]["prompt_text"] == TEXT
    assert recorded_prompt_text(trained.adapter / "checkpoint-1") == TEXT


def test_chat_reads_it(trained, merged, read_ids, capsys):
    for num_chats, paths in enumerate(({"lora_path": str(trained.adapter)}, {"model_path": str(merged)}), start=1):
        chat_demo.chat_demo(**paths, prompt=QUERY, temperature=0, max_length=len(trained.prompts[1]) + 2, device="cpu")
        assert read_ids(trained.prompts[1]) == num_chats
    checkpoint, _ = find_model(None, str(trained.adapter))
    model = load_base_model(checkpoint).eval()
    model.chat(checkpoint.tokenizer, QUERY, HISTORY, max_length=len(trained.prompts[0]) + 2)
    list(model.stream_chat(checkpoint.tokenizer, QUERY, HISTORY, max_length=len(trained.prompts[0]) + 2))
    assert read_ids(trained.prompts[0]) == 2


def test_a_turn_behind_a_cache_reads_it(trained):
    if not hasattr(load_classes(trained.family).model, "build_stream_inputs"):
        pytest.skip("ChatGLM-6B has no turns behind a cache")
    checkpoint, _ = find_model(None, str(trained.adapter))
    model, tokenizer = load_base_model(checkpoint).eval(), checkpoint.tokenizer
    before = torch.tensor([tokenizer.encode_prompt(HISTORY[0][0])])
    cache = model(before, use_cache=True).past_key_values
    turn = model.build_stream_inputs(tokenizer, QUERY, HISTORY[:1], cache)["input_ids"][0].tolist()
    assert tokenizer.decode(turn) == f"\n\n[Round 2]\n\n问：{TEXT}{QUERY}\n\n答："


def test_answers_to_a_file_read_it(trained, read_ids, tmp_path):
    flags = {"lora_path": str(trained.adapter), "data_path": str(trained.data), "temperature": 0, "device": "cpu"}
    generate.generate(**flags, output_path=str(tmp_path / "answers.jsonl"), max_new_tokens=1)
    assert [read_ids(prompt) for prompt in trained.prompts] == [1, 1, 1]
    record = json.loads((tmp_path / "answers.jsonl.run_config.json").read_text("utf-8"))
    assert record["job"]["prompt_text"] == TEXT  # answers with another one are not mixed with these


def test_the_speed_test_reads_it(trained, merged, read_ids):
    flags = {"lora_path": str(trained.adapter), "model_path": str(merged), "loop_number": 1, "new_tokens": 2}
    inference_test.inference_test(**flags, instruction_text=QUERY)
    assert read_ids(trained.prompts[1]) >= 2


def test_evaluation_reads_it_but_for_general_questions(trained, read_ids, tmp_path):
    flags = {"lora_path": str(trained.adapter), "data_path": str(trained.data), "device": "cpu", "max_new_tokens": 1}
    evaluate_adapter.evaluate_adapter(**flags, output_dir=str(tmp_path / "report"), probe=2)
    assert all(read_ids(prompt) == 4 for prompt in trained.prompts)  # loss and answer, without and with the adapter
    plain = open_checkpoint(TINY_DIRS[trained.family.name]).tokenizer
    assert all(read_ids(plain.encode_prompt(question.example.query)) == 4 for question in job.choose_probe(2))


README_FILES = ["README.md", "README_zh.md", "docs/inference.md", "docs/inference_zh.md"]


def test_the_snippet_of_the_docs_loads_the_adapter(trained, read_ids, capsys):
    found = [
        re.findall(r"```python\n(.*?)```", (PROJECT_DIR / name).read_text("utf-8"), re.DOTALL) for name in README_FILES
    ]
    snippets = {part for parts in found for part in parts if "load_chat_model" in part}
    assert [sum("load_chat_model" in part for part in parts) for parts in found] == [1, 1, 1, 1]
    (snippet,) = snippets  # the same in all of them
    assert len(snippet.strip().splitlines()) <= 6
    code = snippet.replace("saved_files/chatGLM2_6B_QLoRA_t32", str(trained.adapter)).replace(
        "类型#裙*颜色#白色", QUERY
    )
    assert str(trained.adapter) in code
    names = {}
    exec(code, names)
    assert isinstance(names["model"], peft.PeftModel)
    assert any(type(module).__name__ == "Linear4bit" for module in names["model"].modules())
    assert names["history"] == [(QUERY, names["response"])]
    assert read_ids(trained.prompts[1]) == 1
    assert capsys.readouterr().out.strip() == names["response"].strip()


# ---- merged and exported


def test_the_merged_directory_needs_nothing_of_this_project(trained, merged):
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=True)
    assert [tokenizer.encode_prompt(row["query"], row.get("history")) for row in ROWS] == trained.prompts


def test_exported_templates_write_it(trained, tmp_path, monkeypatch):
    if trained.family.native_class is None:
        pytest.skip(f"{trained.family.title} has no such export")
    monkeypatch.setattr("glm_utils.export.glm.verify", lambda *args: None)
    outs = {name: tmp_path / name for name in ("glm", "gguf")}
    for name, out in outs.items():
        flags = {"lora_path": str(trained.adapter), "output_path": str(out), "export_format": name}
        merge_stage.merge_lora_and_quantize(**flags, **MERGE)
    auto = AutoTokenizer.from_pretrained(outs["glm"])
    jinja_text = metadata(outs["gguf"] / "model.gguf")["tokenizer.chat_template"]
    modelfile_text = (outs["gguf"] / "Modelfile").read_text("utf-8")
    template = modelfile_text.split('"""')[1]
    ours = find_model(None, str(trained.adapter))[0].tokenizer
    for row, prompt in zip(ROWS, trained.prompts, strict=True):
        messages = as_messages(row["query"], row.get("history", []))
        assert auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
        expected = "[gMASK]<sop>" + ours.build_prompt(row["query"], row.get("history"))
        assert render_jinja(jinja_text, messages) == expected
    assert template == go_with_text(gguf_tokenizer.GO_TEMPLATE, TEXT)


def test_an_adapter_for_engines_gets_its_template(trained, tmp_path):
    from tools.to_glm import to_glm

    if trained.family.native_class is None:
        pytest.skip(f"{trained.family.title} has no such export")
    to_glm(lora_path=str(trained.adapter), output_path=str(tmp_path / "native"))
    assert (tmp_path / "native/chat_template.jinja").read_text("utf-8") == chat_template(TEXT)


def render_jinja(template, messages):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers and llama.cpp do
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_in_a_template(text):
    tokenizer = with_text(FAMILIES[1], text)
    messages = as_messages(QUERY, HISTORY)
    prompt = tokenizer.build_prompt(QUERY, HISTORY)
    assert render_jinja(jinja_with_text(gguf_tokenizer.JINJA_TEMPLATE, text), messages) == "[gMASK]<sop>" + prompt
    assert render_jinja(chat_template(text), messages) == PREFIX_TEXT + prompt
    system = [{"role": "system", "content": "说中文"}]
    expected = prompt.replace(text + HISTORY[0][0], f"{text}说中文\n{HISTORY[0][0]}", 1)
    assert render_jinja(chat_template(text), system + messages) == PREFIX_TEXT + expected
    for mark in ("{{", "{%", "{#", "}}", "%}", "#}"):  # some engines look for these in the whole template
        assert chat_template(text).count(mark) == chat_template("").count(mark)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_in_a_modelfile(text):
    written = gguf_tokenizer.modelfile("model.gguf", 2048, text)
    plain = gguf_tokenizer.modelfile("model.gguf", 2048)
    assert written.count('"""') == 2
    action = re.search(r"问：(\{\{ (\".*?\") \}\})\{\{ \$system", written)
    assert json.loads(action[2]) == text  # Go reads the escapes of JSON alike
    assert not {"{", "}", "\n"} & set(action[2])
    assert written.replace(action[1], "") == plain


@pytest.mark.slow
def test_go_renders_any_text(tmp_path):
    if not shutil.which("go"):
        pytest.skip("no go command")
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    command = ["go", "build", "-o", "render", "main.go"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for text in NASTY:
        template = gguf_tokenizer.modelfile("model.gguf", 2048, text).split('"""')[1]
        request = json.dumps({"Template": template, "Messages": as_messages(QUERY, HISTORY)})
        done = subprocess.run([tmp_path / "render"], input=request.encode(), check=True, capture_output=True)
        expected = "[gMASK]<sop>" + with_text(FAMILIES[1], text).build_prompt(QUERY, HISTORY)
        assert done.stdout.decode() == expected


@pytest.mark.parametrize("name", ["</s>", "[gMASK]", "<sop>", "<unk>"])
def test_a_control_token_is_refused_where_the_engine_takes_it_for_one(name):
    with pytest.raises(UserError, match=f"holds {re.escape(name)}, a control token for llama.cpp.*--export_format"):
        gguf_tokenizer.check_prompt_text(with_text(FAMILIES[1], f"a{name}b"))
    gguf_tokenizer.check_prompt_text(with_text(FAMILIES[1], "sop eop philosopher"))


# ---- the tokenizer


def test_saved_and_read_again(family, tmp_path):
    tokenizer = with_text(family, "甲")
    tokenizer.save_pretrained(tmp_path / "given")
    again = load_tokenizer_class(family).from_pretrained(tmp_path / "given")
    assert again.prompt_text == "甲"
    assert again.encode_prompt("a", [("b", "c")]) == tokenizer.encode_prompt("a", [("b", "c")])
    again.prompt_text = "乙"
    again.save_pretrained(tmp_path / "changed")
    assert recorded_prompt_text(tmp_path / "changed") == "乙"
    assert load_tokenizer_class(family).from_pretrained(TINY_DIRS[family.name]).prompt_text == ""
    with pytest.raises(ValueError, match="prompt_text is 3, expected a text"):
        with_text(family, 3)


# ---- where it is recorded, and only once


@pytest.fixture
def adapter_copy(trained, tmp_path):
    """A copy of the adapter, and a function that changes keys of one of its JSON files; None removes one."""
    directory = tmp_path / "adapter"
    shutil.copytree(trained.adapter, directory, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    return directory


@pytest.fixture
def base_copy(family, tmp_path):
    """A copy of a tiny base, free to be changed."""
    return shutil.copytree(TINY_DIRS[family.name], tmp_path / "base")


def change(path, **changes):
    values = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), "utf-8")


def opened_text(adapter_dir):
    return find_base(read_adapter(adapter_dir)).tokenizer.prompt_text


def test_adapters_of_before_have_it_in_run_config_alone(adapter_copy, log_lines):
    change(adapter_copy / "tokenizer_config.json", prompt_text=...)
    assert opened_text(adapter_copy) == TEXT
    assert any("before every question stands the prompt_text of the training" in line for line in log_lines)
    (adapter_copy / "tokenizer_config.json").unlink()
    assert opened_text(adapter_copy) == TEXT
    (adapter_copy / "run_config.json").unlink()
    assert opened_text(adapter_copy) == ""


@pytest.mark.parametrize("value", [3, None, ["a"], {"a": 1}, True])
def test_a_value_that_is_no_text_is_refused(base_copy, value, tmp_path):
    change(base_copy / "tokenizer_config.json", prompt_text=value)
    with pytest.raises(UserError, match=r"tokenizer_config.json: prompt_text is .*, expected "):
        open_checkpoint(base_copy)
    with pytest.raises(UserError, match=r"tokenizer_config.json: prompt_text is .*, expected a text"):
        recorded_prompt_text(base_copy)


def test_a_hostile_file_of_an_adapter_is_refused(adapter_copy, tmp_path):
    path = adapter_copy / "tokenizer_config.json"
    for content, message in (
        ('{"prompt_text": 3}', "prompt_text is 3, expected a text"),
        ('{"prompt_text": "\\ud800"}', "surrogate"),
        ("[]", "tokenizer_config.json"),
        ('{"prompt_text": ', "tokenizer_config.json"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            opened_text(adapter_copy)
    (tmp_path / "secret.json").write_text('{"prompt_text": "a"}')
    path.unlink()
    path.symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match="a link out of its directory"):
        opened_text(adapter_copy)


def test_a_second_text_in_training_is_refused_before_torch(base_copy, trained, tmp_path):
    change(base_copy / "tokenizer_config.json", prompt_text="甲")
    signature = inspect.signature(train_qlora.train_qlora)
    flags = {name: parameter.default for name, parameter in signature.parameters.items()}
    flags |= {"model_name_or_path": str(base_copy), "train_data_path": str(trained.data)}
    for text in ("乙", "甲"):
        with pytest.raises(UserError, match=f"--prompt_text '{text}': .*base puts '甲' before every question already"):
            read_inputs({**flags, "prompt_text": text})
    read_inputs(flags)


def test_training_on_a_merged_base_keeps_its_text(trained, merged, tmp_path, log_lines):
    flags = {**trained.flags, "model_name_or_path": str(merged), "train_data_path": str(trained.data)}
    args = json.loads(Path(flags["train_args_json"]).read_text("utf-8"))
    args_path = tmp_path / "args.json"
    args_path.write_text(json.dumps({**args, "output_dir": str(tmp_path / "again")}))
    train_qlora.train_qlora(**{**flags, "train_args_json": str(args_path)})
    record = json.loads((tmp_path / "again/run_config.json").read_text("utf-8"))
    assert record["arguments"]["prompt_text"] == record["identity"]["prompt_text"] == TEXT
    assert any(line.startswith("INFO before every question stands the prompt_text") for line in log_lines)
    assert opened_text(tmp_path / "again") == TEXT  # once


def test_an_adapter_and_a_base_with_different_texts(adapter_copy, trained, tmp_path):
    base = shutil.copytree(TINY_DIRS[trained.family.name], tmp_path / "base")
    change(base / "tokenizer_config.json", prompt_text="甲")
    change(adapter_copy / "adapter_config.json", base_model_name_or_path=str(base))
    for text in ("乙", ""):
        change(adapter_copy / "tokenizer_config.json", prompt_text=text)
        with pytest.raises(
            UserError, match=f"prompt_text of tokenizer_config.json is '甲', but .*adapter says '{text}'"
        ):
            opened_text(adapter_copy)
    change(adapter_copy / "tokenizer_config.json", prompt_text="甲")
    assert opened_text(adapter_copy) == "甲"
    change(adapter_copy / "tokenizer_config.json", prompt_text=...)
    (adapter_copy / "run_config.json").unlink()
    assert opened_text(adapter_copy) == "甲"  # nothing is known of the adapter


@pytest.mark.parametrize(
    ("recorded", "given", "expected"),
    [
        ({"": "base", "甲": "merged"}, None, "甲"),
        ({"": "base", "甲": "merged"}, "甲", "甲"),
        ({"": "base"}, None, ""),
        ({"": "base"}, "乙", "乙"),
        ({"甲": "one", "乙": "other"}, "", ""),
        ({"甲": "one", "乙": "other"}, None, "the training put '甲' for one and '乙' for other before every question"),
        ({"甲": "one", "乙": "other"}, "甲", "--prompt_text '甲': the training put '甲' for one and '乙' for other"),
        (
            {"": "base", "甲": "merged"},
            "乙",
            "--prompt_text '乙': the training put '甲' for merged before every question",
        ),
    ],
)
def test_two_models_get_one_text(recorded, given, expected):
    if len(expected) < 2:
        assert agree_on(recorded, given) == expected
        return
    with pytest.raises(UserError, match=f'^{expected}.* leave --prompt_text out, or give --prompt_text "" for none'):
        agree_on(recorded, given)


def test_a_copied_template_is_named(trained, adapter_copy, tmp_path, monkeypatch, log_lines):
    monkeypatch.setattr("glm_utils.export.chatglm.verify", lambda *args: None)
    base = shutil.copytree(TINY_DIRS[trained.family.name], tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    change(adapter_copy / "adapter_config.json", base_model_name_or_path=str(base))
    merge_stage.merge_lora_and_quantize(lora_path=str(adapter_copy), output_path=str(tmp_path / "out"), **MERGE)
    assert any("apply_chat_template will not put prompt_text" in line for line in log_lines)
