"""The form of one file, applied to its rows: what a row becomes follows from its value, that form and its place."""

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from glm_utils.cli import UserError, nearest
from glm_utils.data.example import Example
from glm_utils.data.forms import (
    NO_COLUMNS,
    Answers,
    ChatForm,
    Columns,
    Form,
    PairForm,
    find_form,
    show_keys,
    show_list,
)
from glm_utils.data.turns import check_text

CLOSE = 0.8  # from which similarity on a key is taken for a misspelt one


@dataclass(frozen=True)
class FileForm:
    """The form of one file, and how its rows are read.

    Attributes:
        form: The form.
        where: The row or header that decided it.
        answers: Whether an answer is required, read if it is there, or not read.
        columns: Names that the user gave.
        in_table: Whether rows are cells of a table, whose header was checked once.
    """

    form: Form
    where: str
    answers: Answers = "required"
    columns: Columns = NO_COLUMNS
    in_table: bool = False

    def parse(self, value: object, where: str) -> Example:
        """Turn one row into an example.

        Args:
            value: The JSON value, or the cells by column.
            where: file:line, for messages.

        Raises:
            UserError: The row is not of this form, or holds what the form does not allow.
        """
        row = check_object(value, where)
        if self.in_table:
            row = self._read_cells(row, where)
        else:
            self.check_keys(row, where)
        turns = self.form.turns(row, where, self.answers)
        if row.get("system") is not None:
            turns = turns.after_system(check_text(row["system"], "system", where))
        name = "prompt" if self.answers == "ignored" else self.form.prompt
        if not turns.query.strip():
            raise UserError(f"{where}: the {name} is empty. Fill it or delete the example")
        if self.answers == "required" and not turns.answer.strip():
            raise UserError(f"{where}: the {self.form.answer or 'answer'} is empty. Fill it or delete the example")
        return Example(turns.query, turns.answer, turns.history, where)

    def check_keys(self, keys: Collection[str], where: str) -> None:
        """Refuse keys, or the columns of a table, that do not fit.

        Raises:
            UserError: A key is missing, is probably misspelt, or the row is in another form.
        """
        if self.form.prompt not in keys and not self.columns.named and (other := find_form(keys)):
            raise UserError(
                f"{where}: the form is {other.name}, but {self.where} is {self.form.name}. One file has one form: "
                "split it"
            )
        for key in (self.form.prompt, self.form.answer if self.answers == "required" else None):
            if key is not None and key not in keys:
                raise UserError(self._missing(key, keys, where))
        if self.answers == "required" and isinstance(self.form, PairForm) and self.form.answer is None:
            raise UserError(f"{where}: no answers ({show_keys(keys)}). Name their column with --response_column")
        if self.in_table and self.columns.history is not None and self.columns.history not in keys:
            raise UserError(self._missing(self.columns.history, keys, where))
        if self.form.key_set.issuperset(keys):  # most rows
            return
        for key in keys:
            if isinstance(key, str) and key not in self.form.keys and (meant := self._meant(key, keys)):
                raise UserError(f"{where}: {key!r} is not read. Is {meant!r} meant? Rename it, or delete it")

    def _missing(self, key: str, keys: Collection[str], where: str) -> str:
        """Say that a key is missing, and which may be it."""
        flag = next((flag for flag, name in self.columns.named.items() if name == key), None)
        if flag:
            return f"{where}: no column {key!r} ({flag}). {nearest(key, show_list(keys), 'columns')}"
        close = difflib.get_close_matches(key, [name for name in keys if name not in self.form.keys], n=1)
        hint = f"Is {close[0]!r} meant? Rename it" if close else f"Expected {self.form.description}"
        subject = "header" if self.in_table else "example"
        return f"{where}: the {subject} has no {key!r} ({show_keys(keys)}). {hint}"

    def _meant(self, key: str, keys: Collection[str]) -> str | None:
        """Return the absent key of the form that a key is probably a misspelling of."""
        wanted = (name for name in self.form.keys if self.answers != "ignored" or name != self.form.answer)
        return next((name for name in wanted if name not in keys and looks_like(key, name)), None)

    def _read_cells(self, cells: dict, where: str) -> dict:
        """Turn the cells of a table into what JSON would hold: nothing for empty ones, values for JSON texts."""
        needed = (self.form.prompt, self.form.answer)
        row = {key: cell for key, cell in cells.items() if key in self.form.keys and (cell or key in needed)}
        key = self.form.json_key
        if row.get(key):
            try:
                row[key] = json.loads(check_text(row[key], key, where))
            except UserError:  # a ValueError too
                raise
            except (ValueError, RecursionError):
                raise UserError(
                    f"{where}: {key} is no JSON. In a table it is a JSON list in one cell, "
                    'e.g. [["question", "answer"]]'
                ) from None
        return row

    def unread(self, value: object) -> list[str]:
        """Return the keys of a row that are not read, those of messages as messages[].key."""
        if not isinstance(value, dict):
            return []
        found = [] if self.form.key_set.issuperset(value) else [key for key in value if key not in self.form.keys]
        entries = value.get(self.form.prompt) if isinstance(self.form, ChatForm) else None
        if isinstance(entries, list):
            inner = {key for entry in entries if isinstance(entry, dict) for key in entry}
            found += [f"{self.form.prompt}[].{key}" for key in sorted(inner - {"role", "content", "from", "value"})]
        return found


def check_object(value: object, where: str) -> dict:
    """Return a row that is an object.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: the example is {type(value).__name__}, expected an object")
    return value


def looks_like(key: str, name: str) -> bool:
    """Whether a key is probably a misspelling of a name: another case, or a letter too many, too few or other."""
    plain = re.sub(r"[\W_]", "", key).lower()
    if plain == name:
        return True
    if key.startswith(f"{name}_") or key.endswith(f"_{name}"):  # output_id is a name of its own
        return False
    return difflib.SequenceMatcher(None, key, name).ratio() >= CLOSE
