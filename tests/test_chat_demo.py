"""chat_demo.py: the session (pieces, history, counts), what it loads and refuses, and the terminal on a pty."""

import codecs
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import peft
import pytest
import torch
from rich.cells import cell_len

import chat_demo
import merge_lora_and_quantize as merge_stage
from glm_utils import chat_model, load_model, tables
from glm_utils.chat_model import load_chat_model
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.family import PROJECT_DIR
from glm_utils.inference import terminal
from glm_utils.inference.chat import ChatSession, ChatSettings, chat_settings
from glm_utils.load_model import load_base_model

TINY_NAMES = {"chatglm-6b": "chatglm-tiny", "chatglm2-6b": "chatglm2-tiny"}
QUERY = "类型#裙*颜色#白色*风格#简约"
GREEDY = ChatSettings(max_length=200, temperature=0, top_p=1.0)
DEFAULTS = {"chatglm-6b": (2048, 0.95, 0.7), "chatglm2-6b": (8192, 0.8, 0.8)}  # max_length, temperature, top_p


@pytest.fixture
def tiny_dir(family_name):
    """The tiny trained model of a family."""
    return PROJECT_DIR / "models" / TINY_NAMES[family_name]


@pytest.fixture
def adapter_dir(tiny_dir, tmp_path):
    """An adapter of a tiny model that changes what it says."""
    model = load_base_model(open_checkpoint(tiny_dir))
    model.name_or_path = str(tiny_dir)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["query_key_value"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def session(tiny_dir):
    """A greedy session with a tiny model."""
    return ChatSession(*load_chat_model(str(tiny_dir), None, False, "cpu", merge_adapter=True), GREEDY)


class ScriptedModel:
    """Answers with given snapshots of a growing text, one per token, as stream_chat does."""

    def __init__(self, *snapshots):
        self.snapshots, self.prompts = snapshots, []

    def stream_chat(self, tokenizer, query, history, **settings):
        self.prompts.append((query, list(history)))
        for num_tokens, text in enumerate(self.snapshots, start=1):
            tokenizer.decode([0] * num_tokens)
            yield text, [*history, (query, text)]


def scripted(*snapshots):
    tokenizer = SimpleNamespace(
        encode_prompt=lambda query, history: [0] * (len(query) + 10 * len(history)), decode=lambda ids: ""
    )
    return ChatSession(ScriptedModel(*snapshots), tokenizer, ChatSettings(40, 0, 1.0))


# ---- the session


@pytest.mark.parametrize(
    ("snapshots", "pieces"),
    [
        (["a", "ab", "abc"], ["a", "b", "c"]),
        (["好", "好，", "好，a", "好，a,", "好，a，好"], ["好", "，", "a", "，好"]),  # "," changes when 好 follows
        (["a,", "a,\ufffd", "a,\ufffd\ufffd", "a，好"], ["a", "，好"]),  # the same, by bytes
        (["a", "ab", "ab\ufffd"], ["a", "b\ufffd"]),  # an answer that ends inside a character
        (["[[训练", "[[训练时", "[[训练时间", "2023年"], ["[[训练", "时", "\n2023年"]),  # what was shown has changed
        ([], [""]),
    ],
)
def test_pieces_of_an_answer(snapshots, pieces):
    session = scripted(*snapshots)
    assert list(session.ask("q")) == pieces
    assert session.history == [("q", snapshots[-1] if snapshots else "")]
    assert session.counts.num_tokens == len(snapshots)


def test_history_undo_and_clear():
    session = scripted("x", "xy")
    for query in ("one", "two"):
        list(session.ask(query))
    assert session.model.prompts == [("one", []), ("two", [("one", "xy")])]
    assert session.undo() == ("two", "xy")
    assert session.history == [("one", "xy")]
    session.clear()
    with pytest.raises(UserError, match="no earlier question"):
        session.undo()


def test_a_stopped_answer_stands_as_far_as_it_came():
    session = scripted("a", "ab", "abc", "abcd")
    pieces = session.ask("q")
    assert next(pieces) == "a"
    pieces.close()
    assert session.history == [("q", "ab")]
    assert session.counts.num_tokens == 2


def test_a_question_that_is_too_long():
    session = scripted("a")
    with pytest.raises(UserError, match="the question takes 40 tokens and max_length is 40, which leaves no room"):
        next(session.ask("q" * 40))
    assert not session.history
    list(session.ask("q"))
    with pytest.raises(UserError, match="with the 1 turns before it takes 45 tokens.*undo or clear"):
        next(session.ask("q" * 35))


def test_pieces_and_counts_with_a_model(session):
    model, tokenizer = session.model, session.tokenizer
    answer = "".join(session.ask(QUERY))
    expected, history = model.chat(tokenizer, QUERY, [], do_sample=False, max_length=200)
    assert answer == expected
    assert session.history == history
    ids = torch.tensor([tokenizer.encode_prompt(QUERY)])
    num_tokens = model.generate(ids, do_sample=False, max_length=200).shape[1] - ids.shape[1]
    assert session.counts.num_tokens == num_tokens > 5
    assert session.counts.num_prompt == ids.shape[1]
    assert 0 < session.counts.first_seconds < session.counts.seconds
    assert "".join(session.ask("你好")) == model.chat(tokenizer, "你好", history, do_sample=False, max_length=200)[0]


def test_a_model_that_computes_nan(session):
    session.model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite logits"):
        list(session.ask(QUERY))


def test_defaults_are_the_published_ones(family_name, session):
    max_length, temperature, top_p = DEFAULTS[family_name]
    session.model.config.max_position_embeddings = 10_000
    assert chat_settings(session.model, None, None, None) == ChatSettings(max_length, temperature, top_p)
    session.model.config.max_position_embeddings = 100
    assert chat_settings(session.model, None, 0, 1.0) == ChatSettings(100, 0, 1.0)
    assert ChatSettings(100, 0, 0.5).arguments() == {"max_length": 100, "do_sample": False}
    assert ChatSettings(100, 0.5, 0.6).arguments() == {"max_length": 100, "temperature": 0.5, "top_p": 0.6}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, None, None), "--max_length 0: expected 1 to 2048"),
        ((2049, None, None), "--max_length 2049: expected 1 to 2048"),
        ((None, -0.1, None), "--temperature -0.1: expected 0"),
        ((None, float("nan"), None), "--temperature nan: expected 0"),
        ((None, None, 0.0), "--top_p 0.0: expected more than 0"),
        ((None, None, 1.1), "--top_p 1.1: expected more than 0"),
    ],
)
@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_settings_out_of_range(session, values, message):
    with pytest.raises(UserError, match=message):
        chat_settings(session.model, *values)


# ---- loading


def ask(model, tokenizer, **settings):
    return "".join(ChatSession(model, tokenizer, GREEDY, **settings).ask(QUERY))


def test_adapter_switched_off_is_the_base(tiny_dir, adapter_dir):
    base_answer = ask(*load_chat_model(str(tiny_dir), None, False, "cpu", merge_adapter=True))
    merged_model, tokenizer = load_chat_model(None, str(adapter_dir), False, "cpu", merge_adapter=True)
    assert not isinstance(merged_model, peft.PeftModel)
    model, _ = load_chat_model(None, str(adapter_dir), False, "cpu", merge_adapter=False)
    assert isinstance(model, peft.PeftModel)
    adapted_answer = ask(model, tokenizer)
    assert adapted_answer == ask(merged_model, tokenizer)
    stopped = ChatSession(model, tokenizer, GREEDY, use_adapter=False).ask(QUERY)
    next(stopped)
    stopped.close()  # must switch the adapter on again
    assert ask(model, tokenizer) == adapted_answer
    assert ask(model, tokenizer, use_adapter=False) == base_answer != adapted_answer


def test_adapter_on_a_4bit_base(adapter_dir):
    model, tokenizer = load_chat_model(None, str(adapter_dir), True, "cpu", merge_adapter=True)
    assert isinstance(model, peft.PeftModel)
    session = ChatSession(model, tokenizer, chat_settings(model, 200, 0, None))
    answer = "".join(session.ask(QUERY))
    assert answer == model.get_base_model().chat(tokenizer, QUERY, [], do_sample=False, max_length=200)[0]
    assert session.counts.num_tokens > 1


@pytest.mark.parametrize("qbits", [0, 8, 4])
def test_merged_directory(adapter_dir, tmp_path, monkeypatch, qbits):
    monkeypatch.setattr("glm_utils.export.chatglm.verify", lambda *args: None)
    out = tmp_path / "merged"
    flags = {"lora_path": str(adapter_dir), "output_path": str(out), "qbits": qbits, "device": "cpu"}
    merge_stage.merge_lora_and_quantize(**flags)
    model, tokenizer = load_chat_model(str(out), None, False, "cpu", merge_adapter=True)
    assert ask(model, tokenizer) == model.chat(tokenizer, QUERY, [], do_sample=False, max_length=200)[0]
    if qbits:
        with pytest.raises(UserError, match=f"quantized already .quantization_bit {qbits}.* leave it out"):
            load_chat_model(str(out), None, True, "cpu", merge_adapter=True)


def test_paths_that_name_no_model(tiny_dir, adapter_dir, tmp_path):
    for model_path, lora_path, message in (
        (None, None, "neither is given: give --model_path DIR, or --lora_path DIR"),
        (str(tiny_dir), str(adapter_dir), "both are given"),
        (str(adapter_dir), None, "a LoRA adapter. Give it as --lora_path"),
        (None, str(tiny_dir), "adapter_config.json is missing: not a LoRA adapter"),
        (str(tmp_path / "absent"), None, "no such directory, and not a hub id either"),
    ):
        with pytest.raises(UserError, match=message):
            load_chat_model(model_path, lora_path, False, "cpu", merge_adapter=True)
    config_path = adapter_dir / "adapter_config.json"
    config_path.write_text(config_path.read_text().replace(str(tiny_dir), str(tmp_path / "gone")))
    with pytest.raises(UserError, match="the base model of .* cannot be opened"):
        load_chat_model(None, str(adapter_dir), False, "cpu", merge_adapter=True)


# ---- the command


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_one_prompt(tiny_dir, capsys):
    run_cli(chat_demo.chat_demo, ["--model_path", str(tiny_dir), "--prompt", QUERY, "--temperature=0"])
    output = capsys.readouterr()
    model, tokenizer = load_chat_model(str(tiny_dir), None, False, "cpu", merge_adapter=True)
    assert output.out == model.chat(tokenizer, QUERY, [], do_sample=False)[0] + "\n"
    assert re.search(r"\n\d+ tokens, [\d.]+ tokens/s, the first after [\d.]+ s\n$", output.err)


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_seed_and_the_end_of_max_length(tiny_dir, capsys):
    command = ["--model_path", str(tiny_dir), "--prompt", QUERY, "--temperature=50", "--max_length=120"]
    outputs = []
    for seed in ("1", "1", "2"):
        run_cli(chat_demo.chat_demo, [*command, "--seed", seed])
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out != outputs[2].out
    assert outputs[0].err.strip().endswith(", truncated at max_length")
    with pytest.raises(SystemExit):
        run_cli(chat_demo.chat_demo, [*command, "--prompt", QUERY * 50])
    assert "which leaves no room for an answer" in capsys.readouterr().err


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_compare(adapter_dir, capsys):
    flags = ["--prompt", QUERY, "--temperature=0", "--compare", "--device=cpu"]
    run_cli(chat_demo.chat_demo, ["--lora_path", str(adapter_dir), *flags])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [part.strip() for part in lines[0]] == ["without the adapter", "with the adapter"]
    without, with_adapter = ("".join(line[side].strip() for line in lines[2:] if len(line) > side) for side in (0, 1))
    assert "" not in (without, with_adapter)
    assert without != with_adapter
    with pytest.raises(SystemExit):
        run_cli(chat_demo.chat_demo, ["--model_path", str(adapter_dir), "--compare"])
    assert "--compare needs --lora_path" in capsys.readouterr().err


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_commands_keep_compared_sessions_in_step(session, capsys):
    sessions = {"a": session, "b": ChatSession(session.model, session.tokenizer, GREEDY)}
    terminal.print_answers(QUERY, sessions)
    first = session.history[-1]
    terminal.run_command("retry", sessions)
    assert [list(each.history) for each in sessions.values()] == [[first], [first]]
    sessions["b"].history[0] = (QUERY, "长" * 400)  # the next question fits after one of them only
    with pytest.raises(UserError, match="leaves no room"):
        terminal.print_answers("你好", sessions)
    assert [len(each.history) for each in sessions.values()] == [1, 1]
    terminal.run_command("undo", sessions)
    assert not session.history
    assert not sessions["b"].history
    terminal.run_command("help", sessions)
    errors = capsys.readouterr().err
    assert all(f"\n{command:<6} " in errors for command in terminal.COMMANDS)


def test_piped_lines_broken_bytes_and_the_end():
    command = [
        sys.executable,
        "chat_demo.py",
        "--model_path",
        "models/chatglm2-tiny",
        "--temperature=0",
        "--conversation",
    ]
    text = "你好\n\n \n".encode() + b"\xe4\xbd\xff broken\nundo\nretry\nclear\nretry\nhelp\n stop\nthe last line"
    done = subprocess.run(command, input=text, capture_output=True, cwd=PROJECT_DIR, timeout=120)
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert len(done.stdout.decode().splitlines()) == 5  # 你好, broken, retry, stop as a question, the last line
    assert re.search(r"\(taken back: \ufffd+ broken\)", errors)
    assert "(a new conversation)\nthere is no earlier question" in errors
    assert "retry  answer the last question again" in errors


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
@pytest.mark.parametrize("conversation", [False, True])
def test_a_piped_line_is_a_conversation_of_its_own(tiny_dir, conversation, monkeypatch, capsys):
    histories = {}
    ask = ChatSession.ask
    monkeypatch.setattr(
        ChatSession, "ask", lambda self, query: histories.update({query: list(self.history)}) or ask(self, query)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("一\n\n二\nretry\nundo\n三"))
    chat_demo.chat_demo(
        model_path=str(tiny_dir), temperature=0, max_length=99, conversation=conversation, device="cpu"
    )
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 4
    turns = {query: [question for question, _ in history] for query, history in histories.items()}
    before = ["一"] if conversation else []
    assert turns == {"一": [], "二": before, "三": before}
    assert ("each line is a conversation of its own; --conversation" in output.err) is not conversation
    assert "(taken back: 二)" in output.err


# Ctrl-C reaches a process whose controlling terminal the pty is, unless SIGINT is ignored, as it is in what a shell
# started in the background. pty.fork() would fork a process that has threads.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A command on a pty of its own, as a user sees it."""

    def __init__(self, *arguments):
        self.file, other_end = pty.openpty()
        command = [sys.executable, "-c", TAKE_TERMINAL, *arguments]
        ends = {"stdin": other_end, "stdout": other_end, "stderr": other_end}
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(command, cwd=PROJECT_DIR, env=environment, start_new_session=True, **ends)
        os.close(other_end)
        self.text, self.decoder = "", codecs.getincrementaldecoder("utf-8")("replace")  # a read may end in a character

    def wait_for(self, pattern, seconds=90, again=""):
        """Read until the pattern shows; returns the match and forgets what came up to it.

        ``again`` is typed after each silent second: readline misses a Ctrl-C that comes right behind its prompt.
        """
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[-2000:]!r}"
            if select.select([self.file], [], [], 1)[0]:
                try:
                    self.text += self.decoder.decode(os.read(self.file, 65536))
                except OSError:  # the other end is closed
                    pytest.fail(f"ended before {pattern!r}: {self.text[-2000:]!r}")
            else:
                self.type(again)
        self.text = self.text[match.end() :]
        return match

    def type(self, text):
        os.write(self.file, text.encode())

    def end(self):
        """Read to the end and return the exit code."""
        try:
            while os.read(self.file, 65536):
                pass
        except OSError:
            pass
        os.close(self.file)
        return self.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_terminal_with_ctrl_c_and_editing(tiny_dir, tmp_path):
    endless_dir = tmp_path / "endless"  # its end token has no text and is never sampled
    shutil.copytree(tiny_dir, endless_dir)
    config = json.loads((endless_dir / "config.json").read_text())
    (endless_dir / "config.json").write_text(json.dumps(config | {"eos_token_id": config["padded_vocab_size"] - 1}))
    screen = Terminal("chat_demo.py", "--model_path", str(endless_dir), "--seed=0", "--device=cpu")
    screen.wait_for(r"commands; Ctrl-C stops an answer\r\n")
    screen.wait_for("> ")
    screen.type("\x03")  # at the prompt
    screen.wait_for(r"stop or Ctrl-D leaves\)\r\n", again="\x03")
    screen.wait_for("> ")
    screen.type("你好吗\x7f\x7f们\r")  # two deletions take two characters
    screen.wait_for(r"们\r\n[\s\S]{10}")
    screen.type("\x03")
    stopped = screen.wait_for(r"(\d+) tokens, [\d.]+ tokens/s, the first after [\d.]+ s, stopped\r\n")
    assert 0 < int(stopped[1]) < 2000
    screen.wait_for("> ")
    screen.type("undo\r")
    assert screen.wait_for(r"\(taken back: (.*)\)")[1] == "你们"
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.end() == 0


def test_what_a_model_writes_cannot_steer_the_terminal(capsys):
    session = scripted("白\x1b", "白\x1b]0;", "白\x1b]0;title\x07", "白\x1b]0;title\x07\u202e。")
    terminal.print_answers("q", {"": session})
    assert capsys.readouterr().out == r"白\x1b]0;title\x07\u202e。" + "\n"
    assert session.history == [("q", "白\x1b]0;title\x07\u202e。")]


# ---- side by side


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 10, [""]),
        ("白色的连衣裙", 4, ["白色", "的连", "衣裙"]),
        ("白色的连衣裙", 5, ["白色", "的连", "衣裙"]),
        ("one two three", 8, ["one two", "three"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
        ("a\n\n白\tb", 20, ["a", "", "白       b"]),
        ("e\u0301e\u0301e\u0301", 2, ["e\u0301e\u0301", "e\u0301"]),
    ],
)
def test_lines_fit_their_column(monkeypatch, text, width, lines):
    monkeypatch.setattr(tables, "MIN_CELLS", 1)
    assert tables.side_by_side({"t": text}, width).split("\n")[2:] == lines
    assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize("num_cells", [5, 40, 81])
def test_columns_hold_whole_texts(num_cells):
    texts = {"first": "这款上衣采用了柔软的面料。" * 3, "second": "白色的连衣裙", "third": ""}
    rows = [line.ljust(1) for line in tables.side_by_side(texts, num_cells).splitlines()]
    width = max(tables.MIN_CELLS, (num_cells - 2 * len(tables.GAP)) // 3)
    cells = [[part.strip() for part in row.split("|")] for row in rows]
    assert all(cell_len(row) <= 3 * width + 2 * len(tables.GAP) for row in rows)
    for index, (title, text) in enumerate(texts.items()):
        column = [row[index] for row in cells if len(row) > index]
        assert column[:2] == [title, "-" * width]
        assert "".join(column[2:]) == text


# ---- memory


@pytest.mark.parametrize("family_name", ["chatglm2-6b"])
def test_a_model_that_does_not_fit_is_refused_before_loading(tiny_dir, monkeypatch, capsys):
    monkeypatch.setattr(load_model, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(load_model, "load_base_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit):
        run_cli(chat_demo.chat_demo, ["--model_path", str(tiny_dir), "--prompt", QUERY, "--device=cpu"])
    assert re.search(r"needs at least .* GB .* 0.00 GB are free on cpu.*--load_in_4bit", capsys.readouterr().err)


def test_out_of_memory_ends_an_answer_and_not_the_program(capsys):
    """The other session answers all the same, so that both stay in step."""

    def stream_chat(tokenizer, query, history, **settings):
        yield "一", []
        raise torch.OutOfMemoryError("CUDA out of memory")

    sessions = {"full": scripted(), "other": scripted("二", "二三")}
    sessions["full"].model.stream_chat = stream_chat
    with pytest.raises(UserError, match="out of memory after .* clear earlier turns"):
        terminal.print_answers("q", sessions)
    assert [session.history for session in sessions.values()] == [[("q", "一")], [("q", "二三")]]
    assert "二三" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=inf"], "--temperature inf: expected 0"),
        (["--temperature=1e-45"], "--temperature 1e-45: expected 0"),
        (["--top_p=0"], "--top_p 0"),
        (["--seed=99999999999999999999999"], "--seed 99999999999999999999999: expected 0 to"),
    ],
)
def test_bad_settings_are_refused_before_loading(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(chat_model, "load_chat_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit):
        run_cli(chat_demo.chat_demo, ["--model_path=models/chatglm2-tiny", *flags])
    assert message in capsys.readouterr().err
