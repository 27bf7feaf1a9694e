"""Texts of data, files and models, shown so that they cannot steer a terminal, a log or a page.

Imports the standard library only: the log needs it before anything else is loaded.
"""

import html
import json
import re

# C0 and C1 controls but newline and tab, line and paragraph separators, marks that turn the direction of writing,
# halves of surrogate pairs, which no file takes
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
# Between two letters or digits, - = + # _ mean nothing
MARKDOWN = re.compile(r"[\\`*{}\[\]()!|<>~$&]|(?<![^\W_])[-=+#_]|[-=+#_](?![^\W_])")


def visible(text: str) -> str:
    """Spell out characters that steer a terminal or the direction of writing, as Python does; newline, tab stay."""
    return UNSAFE.sub(_spelled, text)


def one_line(text: str) -> str:
    """Return a text as one visible line: what a message quotes cannot pass for a line of the log."""
    return visible(text).replace("\n", r"\n")


def html_text(text: str) -> str:
    """Return a text for an HTML page."""
    return html.escape(visible(text))


def markdown_text(text: str) -> str:
    """Return a text for a Markdown table or paragraph, on one line."""
    return MARKDOWN.sub(r"\\\g<0>", " ".join(visible(text).split()))


def json_line(value: dict) -> str:
    """Return a JSON object as one line, the same to a parser, in which unsafe characters are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _spelled(match: re.Match) -> str:
    """Write one character by its number, as in a string of Python."""
    return match[0].encode("unicode_escape", "backslashreplace").decode()
