"""How a command ends after an error that nothing foresaw, and when its output cannot be written."""

import contextlib
import os
import select
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from loguru import logger

from glm_utils.signals import PROJECT_DIR
from glm_utils.visible_text import one_line

MAX_MESSAGE_LENGTH = 500
BROKEN_PIPE_CODE = 141  # 128 + SIGPIPE, what a shell reports for a program that SIGPIPE ends


def describe_crash(error: BaseException, command: str) -> str:
    """Say in one line what ended a command, and write the traceback to a temporary file.

    Args:
        error: The exception.
        command: The command's name, with which the file's name begins.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = one_line(lines[0].strip()[:MAX_MESSAGE_LENGTH]) if lines else ""
    text = type(error).__name__ + (f": {message}" if message else "") + f" ({_place(error)})"
    try:
        return f"{text}. This was not foreseen; the full traceback is in {_write_traceback(error, command)}"
    except Exception as second:  # no memory, no temporary directory, a full disk
        return f"{text}. This was not foreseen; the traceback could not be written ({type(second).__name__})"


def _place(error: BaseException) -> str:
    """Return file:line of the innermost frame in this project, else of the innermost frame."""
    frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [
        (path.relative_to(PROJECT_DIR), line)
        for path, line in frames
        if path.is_relative_to(PROJECT_DIR) and "site-packages" not in path.parts
    ]
    path, line = (own or frames or [(Path("no file"), 0)])[-1]
    return f"{path}:{line}"


def _write_traceback(error: BaseException, command: str) -> str:
    """Write the command line and the traceback to a file that only the user can read; return its path."""
    content = [f"{shlex.join(sys.orig_argv)}\n\n", *traceback.format_exception(error)]
    options = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace", "delete": False}
    with tempfile.NamedTemporaryFile(prefix=f"{command}_error_", suffix=".txt", **options) as file:  # type: ignore
        file.writelines(content)
    return file.name


def open_missing_outputs() -> None:
    """Open /dev/null as standard output or error where the caller closed them, so that no file takes their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process


def is_output_fault(error: BaseException) -> bool:
    """Return whether an exception comes from a standard output that cannot be written."""
    if not isinstance(error, OSError):
        return False
    try:
        sys.stdout.flush()  # what could not be written is still in the buffer
    except OSError:
        return True
    return isinstance(error, BrokenPipeError) and any(_has_no_reader(stream) for stream in (sys.stdout, sys.stderr))


def _has_no_reader(stream) -> bool:
    """Return whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file behind it
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def flush_output(code: int | None) -> int | None:
    """Write what is left of standard output; where that is not possible, say so once, and quietly without a reader.

    Args:
        code: The exit code so far; None: the command has ended well.

    Returns:
        The exit code.
    """
    try:
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = BROKEN_PIPE_CODE
    except OSError as fault:
        logger.error(f"standard output cannot be written ({fault.strerror}). Give it a place with room")
        code = 1
    with contextlib.suppress(OSError, ValueError):  # the interpreter flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
