"""Signals that ask a command to leave: its context managers clean up, one line says so, the exit code is 128 + N.

A stage can take the signals over, as training does to save a checkpoint first. A second signal then leaves at once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PROJECT_DIR = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.05
SAME_SIGNAL_SECONDS = 1.0  # timeout, Slurm and torchrun reach a process twice: directly, and through group or parent


class Terminated(BaseException):
    """SIGTERM or SIGUSR1 arrived; like KeyboardInterrupt it is no Exception, so that only clean-up code stops it.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Listener:
    """What a signal does now.

    Attributes:
        pid: The process; its children inherit the handlers.
        take: What a stage does instead of leaving; None: leave.
        taken: The signal that the stage took; None: none yet.
        first_seconds: When the signal arrived that ends the command; None: not yet.
        note: What is left behind, for the line about the interruption.

    Args:
        stage: Function of a process of its own; its import statements come before anything that must be cleaned up.
            None: a caller's process, which goes on.
    """

    def __init__(self, stage: Callable | None = None) -> None:
        self.stage_code = getattr(stage, "__code__", None)
        self.pid = os.getpid()
        self.take: Callable[[int], None] | None = None
        self.taken: int | None = None
        self.first_seconds: float | None = None
        self.note = ""

    def hear(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self.pid and self.take:  # a data loader's worker: its parent decides
            return
        if self.first_seconds is not None:
            if time.monotonic() - self.first_seconds > SAME_SIGNAL_SECONDS:
                say(f"{signal_name(signum)} again: leaving at once")
                os._exit(128 + signum)
            return
        if self.take:
            self.first_seconds, self.taken = time.monotonic(), signum
            self.take(signum)
        elif (importer := find_importer(frame)) is not None:
            if importer is self.stage_code:
                leave_at_once(signum)
            self.first_seconds = time.monotonic()
            signal.signal(signal.SIGALRM, lambda _, frame: self.leave(signum, frame))
            signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)
        else:
            self.leave(signum, frame)

    def leave(self, signum: int, frame: FrameType | None) -> None:
        """Raise the exception for a signal once no module is being imported: libraries lose it while they are."""
        if find_importer(frame) is not None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.take:  # since the signal arrived
            self.taken = signum
            self.take(signum)
            return
        if signum == signal.SIGINT:
            self.first_seconds = None  # chat goes on after it
            raise KeyboardInterrupt
        self.first_seconds = time.monotonic()
        raise Terminated(signum)


_listener = _Listener()


@contextlib.contextmanager
def signals_heard(stage: Callable | None) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into exceptions while the block runs, except those that are ignored already.

    Args:
        stage: The function that this process is for; when the block ends, the process does, and ignores them. None:
            the handlers are restored.
    """
    global _listener
    _listener = _Listener(stage)
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    before = {signum: old for signum, old in before.items() if old not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, _listener.hear)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_IGN if stage else old)


def find_importer(frame: FrameType | None) -> CodeType | None:
    """Return the code whose import, not itself part of another one, is running; None: no module is being imported."""
    importer, is_below = None, False
    while frame is not None:
        is_import = frame.f_code.co_filename.startswith("<frozen importlib")
        if is_below and not is_import:
            importer = frame.f_code
        is_below, frame = is_import, frame.f_back
    return importer


def leave_at_once(signum: int) -> NoReturn:
    """End the process in one line; nothing needs cleaning up yet."""
    say(interruption_note(signum))
    os._exit(128 + signum)


def is_own_script(frame: FrameType | None) -> bool:
    """Return whether a frame runs below a script of this project."""
    path = ""
    while frame is not None:
        path = path if frame.f_code.co_filename.startswith("<frozen") else frame.f_code.co_filename
        frame = frame.f_back
    return "site-packages" not in path and Path(path).resolve().is_relative_to(PROJECT_DIR)


def hear_while_importing(signum: int, frame: FrameType | None) -> None:
    """Leave at Ctrl-C while a script imports its modules: there is nothing to clean up yet, and libraries lose it."""
    if find_importer(frame) is not None and is_own_script(frame):
        leave_at_once(signum)
    signal.default_int_handler(signum, frame)


def quiet_interruptions() -> None:
    """Let an interruption that nothing handles end the process in one line, also where Python would lose it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, hear_while_importing)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def print_one_line(kind, error, trace) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(interruption_note(signal.SIGINT) + "\n")
        else:
            excepthook(kind, error, trace)

    def send_again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Repeat the signal whose exception was lost in a finalizer or a callback, instead of a traceback."""
        signum = signal_of(unraisable.exc_value)
        if signum is None:
            unraisablehook(unraisable)
        else:
            _listener.first_seconds = None
            threading.Timer(POLL_SECONDS, os.kill, (os.getpid(), signum)).start()

    sys.excepthook, sys.unraisablehook = print_one_line, send_again


def take_signals(take: Callable[[int], None]) -> None:
    """Call a function for the first signal instead of leaving; a later one leaves at once.

    Args:
        take: Gets the signal; it may not log, as the signal may have interrupted the logger.
    """
    _listener.take, _listener.note = take, ""


def release_signals(note: str) -> None:
    """Leave again when a signal arrives, or now if one did since `take_signals`.

    Args:
        note: See `note_if_interrupted`.

    Raises:
        Terminated: A signal arrived.
    """
    _listener.take, _listener.note = None, note
    if _listener.taken is not None:
        raise Terminated(_listener.taken)


def ignore_signals() -> None:
    """Ignore further signals: the command is leaving."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) == _listener.hear:
            signal.signal(signum, signal.SIG_IGN)


def note_if_interrupted(text: str) -> None:
    """Set what the line about an interruption says besides the signal, e.g. what is kept."""
    _listener.note = text


def interruption_note(signum: int) -> str:
    """Return the line about an interruption."""
    return f"interrupted by {signal_name(signum)}" + (f": {_listener.note}" if _listener.note else "")


def signal_name(signum: int) -> str:
    """Return the name of a signal as a user knows it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def signal_of(error: BaseException | None) -> int | None:
    """Return the signal behind an exception, also where a library turned it into another one; None: there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return signal.SIGINT
        if isinstance(error, Terminated):
            return error.signum
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def end_with_parent(parent_id: int, poll_seconds: float = 0.5) -> None:
    """End this process soon after its parent: one that is killed cannot end its children itself.

    Args:
        parent_id: The parent's process id, as the parent knows it: it may have ended already.
        poll_seconds: Time between two looks.
    """

    def watch() -> None:
        while os.getppid() == parent_id:
            time.sleep(poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def say(text: str) -> None:
    """Write a line to standard error, without the logger, which a signal may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
