"""Read files of prompts: what training reads, without answers too, or lines of text.

A fault in one row is kept with the row and does not keep the others from being answered.
"""

from __future__ import annotations  # checkpoint.py imports transformers

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from glm_utils.cli import UserError
from glm_utils.data.checks import DataReport
from glm_utils.data.find_files import Names, find_files
from glm_utils.data.forms import NO_COLUMNS, Columns
from glm_utils.data.read import ReadRow, read_rows
from glm_utils.visible_text import one_line

if TYPE_CHECKING:
    from glm_utils.checkpoint import Checkpoint

FORMS = "a file as for training, with or without answers, or text with one prompt per line"


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts.

    Attributes:
        path: The file.
        where: file:line.
        columns: What the row holds, by name, as it was read.
        query: The question.
        history: Earlier (question, answer) turns, oldest first.
        error: Why the row cannot be answered; None: it can.
    """

    path: Path
    where: str
    columns: dict
    query: str = ""
    history: tuple[tuple[str, str], ...] = ()
    error: str | None = None


def read_prompts(paths: Names, columns: Columns = NO_COLUMNS) -> list[PromptRow]:
    """Read files of prompts.

    Args:
        paths: Files or globs, separated by commas or as a list.
        columns: Names of their keys or columns, where they were given.

    Raises:
        UserError: A file that is missing, empty or cannot be read, a column that is missing, or a file in which no row
            can be answered; all faults at once.
    """
    report, rows, faults = DataReport(), [], []
    for path in find_files(paths):
        try:
            rows += read_prompts_of(path, columns, report)
        except UserError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    for fault in faults:
        report.add_error(fault.message, fault.details)
    report.raise_errors()
    report.log()
    return rows


def read_prompts_of(path: Path, columns: Columns, report: DataReport) -> list[PromptRow]:
    """Read one file of prompts.

    Raises:
        UserError: See `read_prompts`.
    """
    rows = [make_prompt(read, path) for read in read_rows(path, "ignored", columns, report)]
    if not rows:
        raise UserError(f"{path}: no prompts in it. Give {FORMS}")
    errors = [row.error for row in rows if row.error]
    if len(errors) == len(rows):
        raise UserError(f"{path}: no row can be answered. The first: {errors[0]}", report.help_lines)
    return rows


def make_prompt(read: ReadRow, path: Path) -> PromptRow:
    """Turn a row that was read into one that is answered, or that says why not."""
    columns = read.row.value if isinstance(read.row.value, dict) else {}
    if read.example is None:
        return PromptRow(path, read.row.where, columns, error=one_line(read.error or ""))
    return PromptRow(path, read.row.where, columns, read.example.query, read.example.history)


def encode_prompts(rows: list[PromptRow], checkpoint: Checkpoint) -> tuple[list[PromptRow], list[list[int] | None]]:
    """Encode the prompts.

    Args:
        rows: The prompts.
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
            row, ids = replace(row, error=one_line(f"{row.where}: {no_room(len(ids), context)}")), None
        found.append(row)
        prompts.append(ids)
    return found, prompts


def no_room(num_prompt_tokens: int, context: int) -> str:
    """Say that a prompt leaves no room for an answer in the model's context."""
    return f"the prompt takes {num_prompt_tokens} tokens, the model's context holds {context}: shorten it"
