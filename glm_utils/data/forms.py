"""The forms of an example. FORMS is the one list: reading, error messages and documentation follow it."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from glm_utils.cli import UserError
from glm_utils.data.turns import Turns, check_text, parse_history, parse_messages

Answers = Literal["required", "optional", "ignored"]  # of training, of evaluation, of a file of prompts
MAX_SHOWN_KEYS = 20


@dataclass(frozen=True)
class Columns:
    """Names that the user gave; None: by the form of the file.

    Attributes:
        prompt: Key or column of the prompt.
        response: Key or column of the answer.
        history: Key or column of the earlier turns.
        sheet: Sheet of a workbook.
    """

    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    sheet: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """The named keys by flag."""
        flags = {"--prompt_column": self.prompt, "--response_column": self.response, "--history_column": self.history}
        return {flag: name for flag, name in flags.items() if name is not None}


NO_COLUMNS = Columns()


@dataclass(frozen=True)
class PairForm:
    """A prompt under one key, its answer under another.

    Attributes:
        name: As messages call it.
        description: What it is, in one line.
        prompt: Key of the prompt, by which the form is recognized.
        answer: Key of the answer; None: there is none.
        extra: Key of a text that follows the prompt on a new line; None: there is none.
        history: Key of the earlier turns.
    """

    name: str
    description: str
    prompt: str
    answer: str | None
    extra: str | None = None
    history: str = "history"

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return tuple(key for key in (self.prompt, self.answer, self.extra, self.history, "system") if key)

    @cached_property
    def key_set(self) -> frozenset[str]:
        """The same, for quick comparisons."""
        return frozenset(self.keys)

    @property
    def json_key(self) -> str:
        """The key whose cell in a table holds JSON."""
        return self.history

    def turns(self, value: dict, where: str, answers: Answers) -> Turns:
        """Return the turns of a row that has the prompt's key."""
        query = check_text(value[self.prompt], self.prompt, where)
        if self.extra and value.get(self.extra) is not None:
            extra = check_text(value[self.extra], self.extra, where)
            query = "\n".join(part for part in (query, extra) if part)
        given = answers != "ignored" and self.answer is not None and value.get(self.answer) is not None
        answer = check_text(value[self.answer], self.answer, where) if given and self.answer else ""
        return Turns(query, answer, parse_history(value.get(self.history), self.history, where))


@dataclass(frozen=True)
class ChatForm:
    """A conversation as a list of messages, the last of which is the answer.

    Attributes:
        name: As messages call it.
        description: What it is, in one line.
        prompt: Key of the list, by which the form is recognized.
    """

    name: str
    description: str
    prompt: str

    answer = None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (self.prompt, "system")

    @cached_property
    def key_set(self) -> frozenset[str]:
        """The same, for quick comparisons."""
        return frozenset(self.keys)

    @property
    def json_key(self) -> str:
        """The key whose cell in a table holds JSON."""
        return self.prompt

    def turns(self, value: dict, where: str, answers: Answers) -> Turns:
        """Return the turns of a row that has the list's key."""
        turns = parse_messages(value[self.prompt], self.prompt, where, answers)
        if value.get("system") and turns.has_system:
            raise UserError(f"{where}: a system text in {self.prompt} and one under 'system'. Keep one of them")
        return turns


Form = PairForm | ChatForm
FORMS: tuple[Form, ...] = (
    ChatForm(
        "messages",
        'messages: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}] (OpenAI)',
        "messages",
    ),
    ChatForm(
        "conversations",
        'conversations: [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}] (ShareGPT)',
        "conversations",
    ),
    PairForm(
        "instruction/output", "instruction, output and optionally input (alpaca)", "instruction", "output", "input"
    ),
    PairForm("content/summary", "content, summary (ADGEN)", "content", "summary"),
    PairForm("prompt/response", "prompt, response", "prompt", "response"),
    PairForm("prompt/completion", "prompt, completion (TRL)", "prompt", "completion"),
    PairForm("query/response", "query, response (ms-swift)", "query", "response"),
    PairForm("question/answer", "question, answer", "question", "answer"),
)
KNOWN_KEYS = frozenset(key for form in FORMS for key in form.keys)
ANSWER_KEYS = tuple(dict.fromkeys(form.answer for form in FORMS if form.answer))


def find_form(keys: Collection[str], columns: Columns = NO_COLUMNS) -> Form | None:
    """Find the form of a row by its keys, or of a table by its header; None: no form fits.

    Args:
        keys: The keys.
        columns: Names that the user gave; they come first.
    """
    fitting = [form for form in FORMS if form.prompt in keys]
    complete = [form for form in fitting if form.answer is None or form.answer in keys]
    form = next(iter(complete or fitting), None)
    if not columns.named or (isinstance(form, ChatForm) and columns.prompt is None):
        return form
    pair = form if isinstance(form, PairForm) else None
    prompt = columns.prompt or (pair.prompt if pair else None)
    if prompt is None:
        return None
    answer = columns.response or (pair.answer if pair and pair.answer in keys else None)
    answer = answer or next((key for key in ANSWER_KEYS if key in keys and key != prompt), None)
    extra = "input" if prompt == "instruction" else None
    description = "the columns that the flags name"
    return PairForm(f"{prompt}/{answer}", description, prompt, answer, extra, columns.history or "history")


def show_list(keys: Collection[str]) -> list[str]:
    """Return keys for a message, of very many the first."""
    shown = [str(key) for key in keys][:MAX_SHOWN_KEYS]
    return shown if len(keys) <= MAX_SHOWN_KEYS else [*shown, f"and {len(keys) - MAX_SHOWN_KEYS:,} more"]


def show_keys(keys: Collection[str]) -> str:
    """Name the keys of a row."""
    return f"its keys: {', '.join(show_list(keys)) or 'none'}"


def nearest_form(keys: Collection[str]) -> Form:
    """Return the form whose prompt's and answer's keys are most like some of these."""

    def likeness(form: Form) -> float:
        wanted = [key for key in (form.prompt, form.answer) if key]
        best = (
            max((difflib.SequenceMatcher(None, key.lower(), name).ratio() for key in show_list(keys)), default=0.0)
            for name in wanted
        )
        return sum(best) / len(wanted)

    return max(FORMS, key=likeness)


def list_forms() -> list[str]:
    """Return the forms, one line each, and what all of them may have."""
    lines = [f"  {form.description}" for form in FORMS]
    return [*lines, "  and optionally system, and history: [[question, answer], ...] but for lists of messages"]
