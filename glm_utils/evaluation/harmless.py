"""Texts of models and users in a report: shown as they are, unable to do anything."""

import html
import json
import re
import unicodedata

# C0 and C1 controls but newline and tab, line and paragraph separators, marks that turn the direction of writing,
# halves of surrogate pairs, which no file takes
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~$&=-])")


def visible(text: str) -> str:
    """Write characters that steer a terminal or the direction of writing as their names or numbers."""
    return UNSAFE.sub(_name, text)


def _name(match: re.Match) -> str:
    """Name one character: a picture where Unicode has one."""
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return f"[{unicodedata.name(match[0], f'U+{code:04X}')}]"


def html_text(text: str) -> str:
    """Return a text for an HTML page."""
    return html.escape(visible(text))


def markdown_text(text: str) -> str:
    """Return a text for a Markdown table or paragraph, on one line."""
    return MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))


def json_line(value: dict) -> str:
    """Return a JSON object as one line, the same to a parser, in which unsafe characters are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
