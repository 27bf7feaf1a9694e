"""Parse a JSON file that a person wrote, and say what to do about the faults that people make."""

import json
import math
import re
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import parse_json_object

PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def parse_settings(text: str, path: Path, remedy: str) -> dict:
    """Parse a JSON object of settings.

    Args:
        text: The text.
        path: Its file, for messages.
        remedy: What to do if no better advice is found.

    Raises:
        UserError: Broken JSON, not an object, a key that is given twice, or a number that is not finite.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: {key} is given twice. Keep one of them")
        return dict(pairs)

    def finite(word: str) -> float:
        number = float(word)
        if math.isfinite(number):
            return number
        line = text.count("\n", 0, max(0, text.find(word))) + 1
        raise UserError(f"{path}:{line}: {word} is not a finite number. Give one that is")

    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = advice(text, error) or remedy
    hooks = {"object_pairs_hook": unique, "parse_constant": finite, "parse_float": finite}
    return parse_json_object(text, path, remedy, **hooks)


def as_json(value: object) -> str:
    """Return a value as JSON in one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def advice(text: str, error: Exception) -> str | None:
    """Say what to do about a JSON text that cannot be parsed; None: nothing better than the error itself."""
    if not isinstance(error, json.JSONDecodeError):
        return None
    before, here = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    line = text.splitlines()[error.lineno - 1] if text.strip() else ""
    if "escape" in error.msg:
        return 'A backslash begins an escape in JSON. Write / or two backslashes in paths: "C:/Users/me"'
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments. Delete them"
    if here[:1] in ("}", "]") and before.endswith(",") or here.startswith(",") and re.match(r",\s*[}\]]", here):
        return "Delete the comma behind the last entry"
    if here.startswith("'") or line.lstrip().startswith("'"):
        return "Write texts and keys in double quotes"
    word = re.match(r"\w+", here)
    if word and word[0] in PYTHON_WORDS:
        return f"Write {PYTHON_WORDS[word[0]]} instead of {word[0]}"
    if here.startswith('"') and "delimiter" in error.msg:
        return "Put a comma between the entries"
    return None
