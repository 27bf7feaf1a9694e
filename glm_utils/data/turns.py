"""The turns of an example, as a history of pairs or as a list of messages."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, overload

from glm_utils.cli import UserError
from glm_utils.data.example import CellFault, Example

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
MAX_SHOWN_ROLES = 12


class Turns(NamedTuple):
    """A question, its answer (empty: there is none) and the earlier (question, answer) turns.

    Attributes:
        has_system: Whether a system text stands before the first question.
    """

    query: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    has_system: bool = False

    def after_system(self, system: str) -> "Turns":
        """Put a system text before the first question, with a newline between them."""
        if not system:
            return self
        if not self.history:
            return self._replace(query=f"{system}\n{self.query}", has_system=True)
        (question, answer), *later = self.history
        return self._replace(history=((f"{system}\n{question}", answer), *later), has_system=True)


def check_text(value: object, key: str, where: str) -> str:
    """Return a text.

    Raises:
        UserError: It is no string, or not one that can be written as UTF-8.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {type(value).__name__}, expected a string")
    if isinstance(value, CellFault):
        raise UserError(f"{where}: {key} shows {str(value)}: it {value.fault}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(
            f"{where}: {key} holds {half}, half of a character (a surrogate pair cut in two). Mend the text"
        ) from None
    return value


def parse_history(history: object, key: str, where: str) -> tuple[tuple[str, str], ...]:
    """Check a history of [question, answer] pairs; None means an empty one.

    Raises:
        UserError: It is not a list of pairs of strings.
    """
    if history is None:
        return ()
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise UserError(f"{where}: {key} must be a list of [question, answer] pairs of strings")
    return tuple((check_text(question, key, where), check_text(answer, key, where)) for question, answer in history)


def read_message(message: object, key: str, number: int, where: str) -> tuple[str, str]:
    """Return role and text of one message.

    Args:
        message: An object with role and content, or with from and value.
        key: Key of the list.
        number: Its number in the list, from 1.
        where: file:line.

    Raises:
        UserError: It is no such object.
    """
    expected = f'{key} must be a list of {{"role": ..., "content": "text"}} objects'
    if not isinstance(message, dict):
        raise UserError(f"{where}: {expected}; number {number} is {type(message).__name__}")
    role = next((message[name] for name in ROLE_KEYS if name in message), None)
    text_key = next((name for name in TEXT_KEYS if name in message), None)
    if text_key is None or not isinstance(message[text_key], str):
        found = "nothing" if text_key is None else type(message[text_key]).__name__
        raise UserError(f"{where}: {expected}; number {number} has {found} for its text")
    return ROLES.get(str(role), str(role)), check_text(message[text_key], f"{key}[{number - 1}]", where)


def parse_messages(messages: object, key: str, where: str, answers: str) -> Turns:
    """Turn messages into turns: the last answer is trained, a system text precedes the first question.

    Args:
        messages: The list.
        key: Its key, for messages.
        where: file:line.
        answers: required, optional (a conversation may end with a question), or ignored (a last answer is left out).

    Raises:
        UserError: Not a list of messages, or their roles are out of order.
    """
    if not isinstance(messages, list):
        found = type(messages).__name__
        raise UserError(f'{where}: {key} must be a list of {{"role": ..., "content": "text"}} objects, not {found}')
    read = [read_message(message, key, number, where) for number, message in enumerate(messages, start=1)]
    roles, texts = [role for role, _ in read], [text for _, text in read]
    system = ""
    if roles[:1] == ["system"]:
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if answers == "ignored" and roles[-1:] == ["assistant"]:
        roles, texts = roles[:-1], texts[:-1]
    if answers != "required" and roles[-1:] == ["user"]:
        roles, texts = [*roles, "assistant"], [*texts, ""]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        shown = ", ".join(roles[:MAX_SHOWN_ROLES]) + (", ..." if len(roles) > MAX_SHOWN_ROLES else "")
        raise UserError(
            f"{where}: roles are {shown or 'none'}; expected user and assistant alternately (or human and gpt), "
            "ending with assistant, after at most one system message"
        )
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return Turns(*turns[-1], tuple(turns[:-1])).after_system(system)


class AnsweredTurns(Sequence[Example]):
    """One example per answered turn of other examples: the turn's answer, behind what was said before it.

    An example is made when it is asked for. A turn with an empty answer is none, but stays in the history of later
    ones.

    Args:
        examples: Complete conversations.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self._places, self._turns = array("q"), array("q")
        for place, example in enumerate(examples):
            answers = [*(answer for _, answer in example.history), example.answer]
            turns = [turn for turn, answer in enumerate(answers) if answer.strip()]
            self._places.extend([place] * len(turns))
            self._turns.extend(turns)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        example, turn = self.examples[self._places[index]], self._turns[index]
        if not example.history:
            return example
        query, answer = [*example.history, (example.query, example.answer)][turn]
        return Example(query, answer, example.history[:turn], f"{example.where}, turn {turn + 1}")
