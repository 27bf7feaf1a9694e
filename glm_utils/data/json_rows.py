"""Rows of JSON: one object per line, or one list of objects; a fault in a line does not keep the others unread."""

import json
from collections.abc import Iterator
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.data.example import Row
from glm_utils.data.text_file import split_lines
from glm_utils.files import JSON_ERRORS, json_fault

MAX_CHARACTERS_TRIED = 1 << 26  # of a text that is parsed again to explain its fault


class RowDecoder:
    """Parse JSON and notice keys that stand twice in one object, of which json keeps the last."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._make_object)

    def _make_object(self, pairs: list[tuple[str, object]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated.append(next(key for key in keys if keys.count(key) > 1))
        return value

    def make_row(self, value: object, where: str) -> Row:
        """Return the row of the value that was just parsed."""
        if not self.repeated:
            return Row(where, value)
        key, self.repeated = self.repeated[0], []
        return Row(where, None, f"{where}: {key!r} stands twice in one object. Delete one of them")


def parse_line(line: str, where: str, decoder: RowDecoder | None = None) -> Row:
    """Parse one line of a file of JSON lines."""
    decoder = decoder or RowDecoder()
    try:
        value = decoder.decoder.decode(line)
    except JSON_ERRORS as error:
        decoder.repeated = []
        return Row(where, None, f"{where}: broken JSON, {json_fault(error)}. Every line must be one JSON object")
    return decoder.make_row(value, where)


def read_lines(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a text of JSON lines; empty lines are skipped.

    Raises:
        UserError: The text is one object over several lines.
    """
    decoder, first = RowDecoder(), True
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            row = parse_line(line, f"{path}:{number}", decoder)
            if first and row.error and len(line) < len(text) < MAX_CHARACTERS_TRIED:
                refuse_single_object(path, text)
            first = False
            yield row


def refuse_single_object(path: Path, text: str) -> None:
    """Refuse a text that is one object over several lines.

    Raises:
        UserError: It is.
    """
    try:
        value = json.loads(text)
    except JSON_ERRORS:
        return
    lists = [key for key, entry in value.items() if isinstance(entry, list)] if isinstance(value, dict) else []
    remedy = f"Give the list under {lists[0]!r} alone" if lists else "Write each example on one line, or all as a list"
    raise UserError(f"{path}:1: one JSON value over several lines, not one example per line. {remedy}")


def read_list(path: Path, text: str) -> Iterator[Row]:
    """Yield the entries of a JSON list with their lines; json.loads alone would lose the lines.

    Raises:
        UserError: Broken JSON.
    """
    decoder = RowDecoder()
    position, line, counted = text.index("[") + 1, 1, 0  # newlines before `counted` are in `line`

    def skip(position: int, characters: str) -> int:
        while position < len(text) and text[position] in characters:
            position += 1
        return position

    while True:
        position = skip(position, " \t\r\n")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, end = decoder.decoder.raw_decode(text, position)
        except JSON_ERRORS as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', line)}: broken JSON, {json_fault(error)}") from None
        yield decoder.make_row(value, f"{path}:{line}")
        position = skip(end, " \t\r\n")
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise UserError(
                f"{path}:{line}: broken JSON, expected ',' or ']' after an example. Is the file truncated?"
            )
        position += text[position] == ","
    if text[position + 1 :].strip():
        raise UserError(f"{path}:{line}: text after the end of the list. Expected one list, or one object per line")
