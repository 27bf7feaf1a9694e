"""What data, files and models contain cannot steer a terminal: in logs, answers, tables and JSON lines."""

import io
import json
import re
import unicodedata

import pytest
from loguru import logger

from glm_utils import tables
from glm_utils.cli import UserError, run_cli
from glm_utils.inference import report, terminal
from glm_utils.inference.chat import ChatSettings
from glm_utils.logs import setup_logging
from glm_utils.visible_text import UNSAFE, html_text, json_line, markdown_text, one_line, visible

HOSTILE = "\x1b[31mred\x9b2J\r\x07\x00\u202eabc\u2066\u2028\u2029\u200f\ud800\x85"


def is_steering(character):
    """Return whether a character could steer a terminal or the direction of writing, by its Unicode category."""
    category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
    embeds = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return category in {"Cc", "Cs", "Zl", "Zp"} or direction in embeds


def test_every_steering_character_is_spelled_out():
    for code in range(0x110000):
        character = chr(code)
        if is_steering(character) and character not in "\n\t":
            assert UNSAFE.fullmatch(character), hex(code)


@pytest.mark.parametrize("text", ["一\n二\t三", "　全角　", "👩‍👩‍👧 é e\u0301", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "עברית العربية", "a\\x1b"])
def test_other_text_stays(text):
    assert visible(text) == text


def test_one_form_and_it_is_stable():
    shown = visible(HOSTILE)
    assert shown == r"\x1b[31mred\x9b2J\r\x07\x00\u202eabc\u2066\u2028\u2029\u200f\ud800\x85"
    assert visible(shown) == shown
    assert one_line("a\nb") == r"a\nb"
    shown.encode("ascii")


def test_pages_and_json_lines():
    assert html_text("<b>\x1b") == r"&lt;b&gt;\x1b"
    assert markdown_text("chatglm2-tiny a_b 1.5 = x#1\n# y") == r"chatglm2-tiny a_b 1.5 \= x#1 \# y"
    assert json.loads(json_line({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}
    assert not UNSAFE.search(json_line({HOSTILE: HOSTILE}))


# ---- the log


class FakeTerminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def test_messages_are_one_visible_line_and_keep_the_colors_of_the_log(monkeypatch):
    screen = FakeTerminal()
    monkeypatch.setattr("sys.stderr", screen)
    setup_logging()
    logger.warning(f"{HOSTILE}\n12:00:00 SUCCESS adapter written")
    logger.info("<red>{}</red> %s", "x")
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2
    assert "\x1b[32m" in lines[0]  # the time
    without_colors = re.sub(r"\x1b\[\d+m", "", lines[0])
    assert not UNSAFE.search(without_colors)
    assert without_colors.endswith(one_line(f"{HOSTILE}\n12:00:00 SUCCESS adapter written"))
    assert "<red>x</red>" in lines[1]


def test_errors_of_a_command_are_one_visible_line(capsys):
    def stage(*, name: str = HOSTILE) -> None:
        """Fail."""
        raise UserError(f"{name}\n: no such file")

    with pytest.raises(SystemExit):
        run_cli(stage, [])
    errors = capsys.readouterr().err
    assert not UNSAFE.search(errors)
    assert len(errors.splitlines()) == 1


def test_a_flag_that_is_misspelt_with_an_escape_sequence(capsys):
    def stage(*, name: str = "") -> None:
        """Do nothing."""

    with pytest.raises(SystemExit):
        run_cli(stage, ["--na\x1b[2Jme=1"])
    assert not UNSAFE.search(capsys.readouterr().err)


# ---- tables and answers


def test_tables_stay_tables():
    table = tables.markdown_table(["", f"{HOSTILE}\n|"], [["a\x1b[2J", "1"]])
    assert not UNSAFE.search(table)
    assert len(table.splitlines()) == 3
    side = tables.side_by_side({"one": f"{HOSTILE}\nnext", "two": "x"}, 60)
    assert not UNSAFE.search(side)
    models = [{"label": HOSTILE, "error": HOSTILE}]
    assert not UNSAFE.search(report.models_table(models))
    assert not UNSAFE.search(report.write_report({"models": models, "arguments": {"model_path": HOSTILE}}, None))


class Session:
    """Answers with given pieces."""

    def __init__(self, *pieces):
        self.pieces, self.history = pieces, []
        self.settings = ChatSettings(100, 0, 1.0)

    def count_prompt(self, query):
        return 1

    @property
    def counts(self):
        return terminal.AnswerCounts()

    def ask(self, query):
        yield from self.pieces
        self.history.append((query, "".join(self.pieces)))


@pytest.mark.parametrize("is_compared", [False, True])
def test_answers_are_visible_although_a_sequence_comes_in_pieces(capsys, is_compared):
    pieces = ["好\x1b", "[31", "m红\u202e", "\x9b2", "J\n", "\tend", "\ud83d"]
    sessions = {"": Session(*pieces)} | ({"\x1b[1mtitle": Session("x")} if is_compared else {})
    terminal.print_answers("\x1b[5mquestion", sessions)
    output = capsys.readouterr()
    assert not UNSAFE.search(output.out + output.err)
    assert r"好\x1b[31m红\u202e\x9b2J" in output.out
    assert "end" in output.out
    assert sessions[""].history == [("\x1b[5mquestion", "".join(pieces))]  # the model reads its true text


def test_notes_of_the_chat_are_visible(capsys):
    session = Session()
    session.history, session.undo = [], lambda: ("\x1b[2Jquestion", "answer")
    terminal.run_command("undo", {"": session})
    assert capsys.readouterr().err == "(taken back: \\x1b[2Jquestion)\n"
