"""Commands as processes that can be killed: forked from one that has imported everything, or fresh interpreters."""

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glm_utils.family import PROJECT_DIR
from tests.campaign.harness import wait_for

TIMEOUT = 300  # seconds; a command takes about ten
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.campaign.preload"])


def start_server(modules_cache: Path) -> None:
    """Start the process that commands are forked from, with a cache of model code of its own."""
    os.environ["HF_MODULES_CACHE"] = str(modules_cache)
    os.environ["PYTHONPATH"] = str(PROJECT_DIR)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    process = FORK.Process(target=os.getpid)
    process.start()
    process.join()


class Run:
    """A command that runs.

    Args:
        words: Script or `-m` and module, then the flags.
        directory: Its working directory; what it writes to the terminal goes to a file there.
        log_name: Name of that file.
        fresh: Start a Python of its own instead of forking one.
        max_file_bytes: Largest file that it may write, None: any.
        environment: Variables that differ from this process's.
    """

    def __init__(
        self,
        words: Sequence[str],
        directory: Path,
        log_name: str = "log.txt",
        fresh: bool = False,
        max_file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.log_path, self.is_fresh = directory / log_name, fresh
        words, environment = [str(word) for word in words], dict(environment or {})
        if fresh:
            environment = {**os.environ, "HF_MODULES_CACHE": str(directory / "modules"), **environment}
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    command_line(words),
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        else:
            self.process = FORK.Process(
                target=run_here, args=(words, str(directory), str(self.log_path), max_file_bytes, environment)
            )
            self.process.start()
        self.pid = self.process.pid
        self.start_seconds = time.monotonic()

    def code(self) -> int | None:
        """Return the exit code, a signal as a negative number, or None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Wait for the end and return the exit code; one that hangs is killed, and its code is that of the signal."""
        ended = wait_for(lambda: self.code() is not None, seconds, pause=0.01)
        if not ended:
            self.send(signal.SIGKILL, group=True)
            wait_for(lambda: self.code() is not None, 30, pause=0.01)
            raise TimeoutError(f"no end within {seconds} s: {self.log_path.read_text(errors='replace')[-1000:]}")
        return self.code()

    def send(self, number: int, group: bool) -> None:
        """Send a signal to the process, or as a terminal does to its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    def children(self) -> list[int]:
        """Return the processes of its session, those that outlived it included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z" and int(path.parent.name) != self.pid:
                    found.append(int(path.parent.name))
        return found

    def end_children(self, seconds: float) -> list[int]:
        """Wait for what outlived it, kill the rest, and return that rest."""
        wait_for(lambda: not self.children(), seconds, pause=0.05)
        left = self.children()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.children(), 10, pause=0.01)
        return left


def command_line(words: Sequence[str]) -> list[str]:
    """Return the command of a fresh Python."""
    return [sys.executable, *([*words] if words[0] == "-m" else [str(PROJECT_DIR / words[0]), *words[1:]])]


def run_here(words: list[str], directory: str, log_path: str, max_file_bytes: int | None, environment: dict) -> None:
    """Become a command: a session of its own, its output in a file; called in the forked process."""
    os.setsid()
    output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if max_file_bytes is not None:  # the log goes through another process, which the limit does not bind
        reader, writer = os.pipe()
        subprocess.Popen(["cat"], stdin=reader, stdout=output)
        os.close(reader)
        output = writer
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    os.chdir(directory)
    os.environ.update(environment)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(PROJECT_DIR / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def run(words: Sequence[str], directory: Path, log_name: str = "log.txt", **options: object) -> tuple[int, Path]:
    """Run a command to its end; return its exit code and the file with its output."""
    started = Run(words, directory, log_name, **options)
    code = started.wait()
    started.end_children(2)
    return code, started.log_path


def call_forked(function: Callable, *arguments: object, seconds: float) -> int:
    """Call a function in a forked process and return its exit code; -9 if it did not end in time."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode
