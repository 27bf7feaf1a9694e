"""Read instruction data: JSONL or a JSON list, three schemas, errors that name the line.

| schema      | keys of an example                                                  |
|-------------|---------------------------------------------------------------------|
| instruction | instruction, output, optional input, optional history [[q, a], ...] |
| ADGEN       | content, summary                                                    |
| chat        | messages: [{"role": "system" / "user" / "assistant", "content": ...}, ...] |

encoding.py turns examples into token ids.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import JSON_ERRORS, json_fault, parse_json, read_text

SCHEMAS = (
    "instruction/output (+ optional input, history), content/summary, or messages; "
    'e.g. {"instruction": "...", "output": "..."}'
)


@dataclass(frozen=True)
class Example:
    """One training example: a question with its earlier turns, and the answer that is trained.

    Attributes:
        query: The question, without the history.
        answer: The answer.
        history: Earlier (question, answer) turns, oldest first; they are part of the prompt and not trained.
        where: file:line, for messages.
    """

    query: str
    answer: str
    history: tuple[tuple[str, str], ...]
    where: str


def read_examples(path: Path) -> list[Example]:
    """Read and check a data file.

    Args:
        path: JSONL (one object per line) or JSON (one list of objects), UTF-8.

    Raises:
        UserError: A missing or empty file, broken JSON, or an example that fits none of the schemas.
    """
    remedy = "Give a JSONL or JSON file; data/README.md describes the schema"
    text = read_text(path, remedy, encoding_remedy="Convert it, e.g. iconv -f gb18030 -t utf-8")
    values = iter_list(path, text) if text.lstrip().startswith("[") else _iter_lines(path, text)
    examples = [parse_example(value, where) for value, where in values]
    if not examples:
        raise UserError(
            f"{path}: no examples in it. Expected one JSON object per line, or a JSON list of objects: {SCHEMAS}"
        )
    return examples


def _iter_lines(path: Path, text: str) -> Iterator[tuple[object, str]]:
    """Yield the values of a JSONL file with file:line; empty lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield parse_json(line, path, "Every line must be one JSON object", number), f"{path}:{number}"


def iter_list(path: Path, text: str) -> Iterator[tuple[object, str]]:
    """Yield the entries of a JSON list with file:line; json.loads alone would lose the lines."""
    decoder = json.JSONDecoder()
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
            value, end = decoder.raw_decode(text, position)
        except JSON_ERRORS as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', line)}: broken JSON, {json_fault(error)}") from None
        yield value, f"{path}:{line}"
        position = skip(end, " \t\r\n")
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise UserError(
                f"{path}:{line}: broken JSON, expected ',' or ']' after an example. Is the file truncated?"
            )
        position += text[position] == ","
    if text[position + 1 :].strip():
        raise UserError(f"{path}:{line}: text after the end of the list. Expected one list, or one object per line")


def parse_example(value: object, where: str, needs_answer: bool = True) -> Example:
    """Turn one JSON value into an example.

    Args:
        value: The parsed JSON.
        where: file:line, for messages.
        needs_answer: False: the answer is neither expected nor read; the example's is then empty.

    Raises:
        UserError: It fits none of the schemas.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: the example is {type(value).__name__}, expected an object with {SCHEMAS}")
    if "messages" in value:
        return _parse_messages(value["messages"], where, needs_answer)
    keys = ("content", "summary") if "content" in value and "instruction" not in value else ("instruction", "output")
    for key in keys[: 2 if needs_answer else 1]:
        if key not in value:
            found = ", ".join(value) or "none"
            raise UserError(f"{where}: the example has no {key!r} (its keys: {found}). Expected {SCHEMAS}")
    query, answer = _text(value, keys[0], where), _text(value, keys[1], where) if needs_answer else ""
    extra = _text(value, "input", where) if value.get("input") is not None and keys[0] == "instruction" else ""
    query = "\n".join(part for part in (query, extra) if part)
    return _make_example(query, answer, _parse_history(value.get("history"), where), where, needs_answer)


def _text(value: dict, key: str, where: str) -> str:
    """Return a string entry of an example."""
    if not isinstance(value[key], str):
        raise UserError(f"{where}: {key} is {type(value[key]).__name__}, expected a string")
    return value[key]


def _make_example(
    query: str, answer: str, history: tuple[tuple[str, str], ...], where: str, needs_answer: bool
) -> Example:
    """Build an example; refuse one without a question or an answer."""
    if not query.strip():
        name = "instruction" if needs_answer else "prompt"
        raise UserError(f"{where}: the {name} is empty. Fill it or delete the example")
    if needs_answer and not answer.strip():
        raise UserError(f"{where}: the output is empty. Fill it or delete the example")
    return Example(query, answer, history, where)


def _parse_history(history: object, where: str) -> tuple[tuple[str, str], ...]:
    """Check a history of [question, answer] pairs; None means an empty one."""
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise UserError(f"{where}: history must be a list of [question, answer] pairs of strings")
    return tuple((question, answer) for question, answer in pairs)


def _parse_messages(messages: object, where: str, needs_answer: bool) -> Example:
    """Turn chat messages into an example: the last answer is trained, a system text precedes the first question."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
    ):
        raise UserError(f'{where}: messages must be a list of {{"role": ..., "content": "text"}} objects')
    roles = [message.get("role") for message in messages]
    contents = [message["content"] for message in messages]
    if roles[:1] == ["system"]:
        system, roles, contents = contents[0], roles[1:], contents[1:]
        contents[:1] = [f"{system}\n{first}" if system else first for first in contents[:1]]
    if not needs_answer:
        answered = roles[-1:] == ["assistant"]
        roles, contents = (
            [*roles[: -1 if answered else None], "assistant"],
            [*contents[: -1 if answered else None], ""],
        )
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: roles are {', '.join(map(str, roles)) or 'none'}; expected user and assistant alternately, "
            "ending with assistant, after at most one system message"
        )
    turns = list(zip(contents[::2], contents[1::2], strict=True))
    return _make_example(*turns[-1], tuple(turns[:-1]), where, needs_answer)
