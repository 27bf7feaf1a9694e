"""Read a file of prompts: what training reads (without answers too), CSV with a header, or lines of text.

A fault in one row is kept with the row and does not keep the others from being answered.
"""

from __future__ import annotations  # checkpoint.py imports transformers

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from glm_utils.cli import UserError, nearest
from glm_utils.data import iter_list, parse_example
from glm_utils.files import parse_json, read_text

if TYPE_CHECKING:
    from glm_utils.checkpoint import Checkpoint

PROMPT_COLUMNS = ("content", "instruction", "prompt", "query", "question")  # the first that is there is the prompt
FORMS = "JSONL or JSON as for training, CSV with a header, or text with one prompt per line"
SPREADSHEETS = (".xlsx", ".xls", ".ods")
MAX_FIELD_CHARACTERS = 1 << 30  # of a CSV field; the csv module's own limit is 128 KiB


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts.

    Attributes:
        where: file:line.
        columns: What the row holds, by name, as it was read.
        query: The question.
        history: Earlier (question, answer) turns, oldest first.
        error: Why the row cannot be answered; None: it can.
    """

    where: str
    columns: dict
    query: str = ""
    history: tuple[tuple[str, str], ...] = ()
    error: str | None = None


def read_prompts(path: Path, prompt_column: str | None) -> list[PromptRow]:
    """Read a file of prompts.

    Args:
        path: .csv, .txt, or JSONL or JSON under any other name.
        prompt_column: Column or key that holds the prompt; None: by the forms of training, else the first of
            PROMPT_COLUMNS.

    Raises:
        UserError: A file that is missing, empty, not UTF-8 or in no known form, a column that is missing, or a file in
            which no row can be answered.
    """
    ending = path.suffix.lower()
    if ending in SPREADSHEETS:
        raise UserError(f'{path}: a spreadsheet. Save it as "CSV UTF-8" and give that file')
    text = read_text(path, f"Give a file of prompts: {FORMS}", encoding_remedy(path))
    if ending == ".txt":
        if prompt_column is not None:
            raise UserError(f"--prompt_column {prompt_column}: {path} is text without columns. Leave it out")
        rows = [PromptRow(where, {"prompt": line}, line) for line, where in iter_text(path, text)]
    elif ending == ".csv":
        rows = list(iter_csv(path, text, prompt_column))
    elif text.lstrip()[:1] == "[":
        rows = [parse_row(value, where, prompt_column) for value, where in iter_list(path, text)]
    elif text.lstrip()[:1] == "{" or ending in (".jsonl", ".json"):
        rows = [parse_line(path, line, where, prompt_column) for line, where in iter_text(path, text)]
    else:
        raise UserError(f"{path}: unknown form. Give {FORMS}, with the ending .jsonl, .json, .csv or .txt")
    if not rows:
        raise UserError(f"{path}: no prompts in it. Give {FORMS}")
    errors = [row.error for row in rows if row.error]
    if len(errors) == len(rows):
        raise UserError(f"{path}: no row can be answered. The first: {errors[0]}")
    return rows


def encoding_remedy(path: Path) -> str:
    """Say what to do with a file that is not UTF-8, and which encoding it seems to have."""
    excel = 'or save it in Excel or WPS as "CSV UTF-8"' if path.suffix.lower() == ".csv" else "or save it as UTF-8"
    data = path.read_bytes() if path.is_file() else b""
    encodings = ("utf-16",) if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("gb18030",)
    for encoding in encodings:
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        title = {"gb18030": "GBK (GB18030)"}.get(encoding, encoding.upper())
        return f"It reads as {title}: convert it (iconv -f {encoding} -t utf-8 OLD > NEW), {excel}"
    return f"Convert it with iconv, {excel}"


def iter_text(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text that are not blank, with file:line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield line.removesuffix("\r"), f"{path}:{number}"


def parse_line(path: Path, line: str, where: str, prompt_column: str | None) -> PromptRow:
    """Turn a line of a JSONL file into a row."""
    try:
        value = parse_json(line, path, "Every line must be one JSON object", int(where.rpartition(":")[2]))
    except UserError as error:
        return PromptRow(where, {}, error=str(error))
    return parse_row(value, where, prompt_column)


def parse_row(value: object, where: str, prompt_column: str | None) -> PromptRow:
    """Turn a JSON value, or the columns of a CSV row, into a row.

    Args:
        value: An object in a form of training, or with a prompt under another name.
        where: file:line.
        prompt_column: See `read_prompts`.
    """
    columns = value if isinstance(value, dict) else {}
    try:
        if isinstance(value, dict) and (prompt_column or not {"messages", *PROMPT_COLUMNS[:2]} & value.keys()):
            column = find_column(columns, prompt_column, where)
            if not isinstance(value[column], str):
                raise UserError(f"{where}: {column} is {type(value[column]).__name__}, expected a string")
            value = {"instruction": value[column], "history": value.get("history")}
        example = parse_example(value, where, needs_answer=False)
    except UserError as error:
        return PromptRow(where, columns, error=str(error))
    return PromptRow(where, columns, example.query, example.history)


def find_column(columns: Iterable[str], prompt_column: str | None, where: str) -> str:
    """Return the name under which the prompt stands.

    Args:
        columns: The names that there are.
        prompt_column: The wanted name; None: the first of PROMPT_COLUMNS.
        where: File or file:line, for the error.

    Raises:
        UserError: There is no such column; with the nearest.
    """
    columns = list(columns)
    wanted = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    found = next((name for name in wanted if name in columns), None)
    if found is not None:
        return found
    if prompt_column is not None:
        close = nearest(prompt_column, columns, "columns")
        raise UserError(f"{where}: no column {prompt_column!r} (--prompt_column). {close}")
    hints = (nearest(name, columns, "columns") for name in PROMPT_COLUMNS)
    hint = next((hint for hint in hints if hint.startswith("Did")), f"Columns: {', '.join(columns) or 'none'}.")
    raise UserError(f"{where}: no column {', '.join(PROMPT_COLUMNS)}. {hint} Name the prompt's with --prompt_column")


def iter_csv(path: Path, text: str, prompt_column: str | None) -> Iterator[PromptRow]:
    """Yield the rows of a CSV file.

    Args:
        path: The file, for messages.
        text: Its text.
        prompt_column: See `read_prompts`.

    Raises:
        UserError: No header, one without the column or with a name twice, or quotes that do not pair up.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    column, line = "", 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if not header:
                header = [name.strip() for name in fields]
                column = check_header(header, prompt_column, where)
                continue
            columns = dict(zip(header, fields, strict=False))
            if len(fields) != len(header):
                error = f"{where}: {len(fields)} fields, the header has {len(header)}. Quote fields that hold a comma"
                yield PromptRow(where, columns, error=error)
                continue
            prompt = {"instruction": columns[column]}
            if column == "instruction" and "input" in columns:
                prompt["input"] = columns["input"]
            row = parse_row(prompt, where, None)
            yield PromptRow(where, columns, row.query, error=row.error)
    except csv.Error as error:
        raise UserError(f"{path}:{line}: broken CSV, {error}. Quotes must pair up; save the table anew") from None


def check_header(header: list[str], prompt_column: str | None, where: str) -> str:
    """Return the column of a CSV file that holds the prompt.

    Raises:
        UserError: It is missing, or a name stands twice.
    """
    if repeated := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{where}: column {min(repeated)!r} stands twice in the header. Rename one")
    if len(header) == 1 and any(separator in header[0] for separator in ";\t"):
        raise UserError(f"{where}: one column, {header[0]!r}. Separate columns by commas")
    return find_column(header, prompt_column, where)


def encode_prompts(rows: list[PromptRow], checkpoint: Checkpoint) -> tuple[list[PromptRow], list[list[int] | None]]:
    """Encode the prompts.

    Args:
        rows: The file of prompts.
        checkpoint: The model.

    Returns:
        The rows, those with an error now that leave no room for an answer, and the token ids of those without one.
    """
    context = checkpoint.model_config.max_position_embeddings
    found: list[PromptRow] = []
    prompts: list[list[int] | None] = []
    for row in tqdm(rows, desc="prompts", leave=False):
        ids = None if row.error else checkpoint.tokenizer.encode_prompt(row.query, list(row.history))
        if ids and len(ids) >= context:
            row, ids = replace(row, error=f"{row.where}: {no_room(len(ids), context)}"), None
        found.append(row)
        prompts.append(ids)
    return found, prompts


def no_room(num_prompt_tokens: int, context: int) -> str:
    """Say that a prompt leaves no room for an answer in the model's context."""
    return f"the prompt takes {num_prompt_tokens} tokens, the model's context holds {context}: shorten it"
