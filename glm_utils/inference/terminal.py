"""Chat in the terminal: read lines, run commands, print answers while they are generated.

Answers go to stdout, everything else to stderr. Control characters in either are spelled out, so that neither a model
nor a question that was pasted can steer the terminal.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from typing import TextIO

from glm_utils.cli import UserError
from glm_utils.inference.chat import AnswerCounts, ChatSession
from glm_utils.tables import side_by_side
from glm_utils.visible_text import visible

with contextlib.suppress(ImportError):  # Windows has its own line editing
    import readline  # noqa: F401

COMMANDS = {
    "clear": "forget all turns",
    "undo": "take the last question and its answer back",
    "retry": "answer the last question again",
    "stop": "leave, as Ctrl-D does",
    "help": "show this list",
}


def converse(sessions: dict[str, ChatSession], keep_history: bool = True) -> None:
    """Read lines until the input ends or "stop": commands, and questions that every session answers.

    Args:
        sessions: The sessions by title; a single session needs no title.
        keep_history: Whether a question follows the turns before it, or begins a conversation.
    """
    tolerate_any_text(sys.stdin)
    print_note(f"{', '.join(COMMANDS)} are commands; Ctrl-C stops an answer")
    if not keep_history:
        print_note("each line is a conversation of its own; --conversation makes one of all lines")
    while (line := read_line()) not in (None, "stop"):
        try:
            if line in COMMANDS:
                run_command(line, sessions)
            elif line.strip():
                if not keep_history:
                    forget_all(sessions)
                print_answers(line, sessions)
        except (UserError, KeyboardInterrupt) as error:
            print_note(str(error))


def tolerate_any_text(stream: TextIO) -> None:
    """Replace what a standard stream cannot encode or decode, instead of ending the chat with an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def read_line() -> str | None:
    """Return the next line, empty after Ctrl-C; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print_note("\n(stop or Ctrl-D leaves)")
        return ""


def run_command(command: str, sessions: dict[str, ChatSession]) -> None:
    """Run a command on all sessions.

    Args:
        command: Any of COMMANDS except stop.
        sessions: The sessions by title.

    Raises:
        UserError: There is no turn to undo or retry.
    """
    if command == "help":
        for name, text in COMMANDS.items():
            print_note(f"{name:<6} {text}")
        print_note("With a space in front, such a word is a question.")
    elif command == "clear":
        forget_all(sessions)
        print_note("(a new conversation)")
    else:
        query = [session.undo() for session in sessions.values()][0][0]
        if command == "retry":
            print_answers(query, sessions)
        else:
            print_note(f"(taken back: {query})")


def forget_all(sessions: dict[str, ChatSession]) -> None:
    """Begin a new conversation in all sessions."""
    for session in sessions.values():
        session.clear()


def print_answers(query: str, sessions: dict[str, ChatSession]) -> None:
    """Print a session's answer while it is generated, or those of several sessions side by side at the end.

    Ctrl-C stops the answer that is being generated.

    Args:
        query: The question.
        sessions: The sessions by title.

    Raises:
        UserError: The question is too long, the model computed NaN, or memory ran out.
    """
    for session in sessions.values():
        session.count_prompt(query)  # all are checked before the first answers, so that their histories stay equal
    is_compared = len(sessions) > 1
    write: Callable = (lambda text: None) if is_compared else print_piece
    errors = []
    for title, session in sessions.items():
        ending = ""
        with contextlib.closing(session.ask(query)) as pieces:
            try:
                for piece in pieces:
                    write(piece)
            except KeyboardInterrupt:
                ending = ", stopped"
            except UserError as error:  # raised below: the other sessions answer first
                errors.append(error)
        write("\n")
        counted = format_counts(session.counts, session.settings.max_length)
        print_note((f"{title}: " if title else "") + counted + ending)
    if is_compared:
        answers = {title: session.history[-1][1] for title, session in sessions.items()}
        print(side_by_side(answers, shutil.get_terminal_size().columns), flush=True)
    if errors:
        raise errors[0]


def print_piece(text: str) -> None:
    """Print a piece of an answer, character by character visible: an escape sequence may come in several pieces."""
    print(visible(text), end="", flush=True)


def format_counts(counts: AnswerCounts, max_length: int) -> str:
    """Say how long an answer is and how fast it was generated."""
    text = f"{counts.num_tokens} tokens, {counts.tokens_per_second:.1f} tokens/s"
    text += f", the first after {counts.first_seconds:.2f} s"
    return text + (", truncated at max_length" if counts.num_prompt + counts.num_tokens >= max_length else "")


def print_note(text: str) -> None:
    """Print to stderr what is not part of an answer."""
    print(visible(text), file=sys.stderr, flush=True)
