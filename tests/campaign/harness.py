"""What all campaigns share: the seed, how much is tried, what counts as a fault, and results computed once."""

import contextlib
import functools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

KINDS = ("traceback", "lost", "wrong bits", "other")  # of faults, worst ones are the middle two
MAX_KEPT_FAULTS = 20  # of one test; all are counted
TRACEBACK = "Traceback (most recent call last)"
ERROR_LINE = re.compile(r"^\S* ?ERROR\s+(.*)$", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def seed() -> int:
    """Return the seed of this campaign; conftest.py draws one where none is set."""
    return int(os.environ.get("CAMPAIGN_SEED", "0"))


def scaled(number: int) -> int:
    """Return how many of so many cases are run: CAMPAIGN_SCALE 1 is the full campaign."""
    return max(1, math.ceil(number * float(os.environ.get("CAMPAIGN_SCALE", "1"))))


def rng_of(*names: object) -> random.Random:
    """Return the random numbers of one case, the same for the same seed whatever else runs."""
    return random.Random(f"{seed()} {names}")


class Tally:
    """What one test tried and found; conftest.py collects it from all workers.

    Args:
        campaign: The line of the results that it belongs to.
        record: Filled in place, as a report of pytest carries it.
    """

    def __init__(self, campaign: str, record: dict):
        self.record = record
        record.update(campaign=campaign, cases=0, faults=[], counts=dict.fromkeys(KINDS, 0), notes={})

    def case(self, number: int = 1) -> None:
        """Count cases that are about to run."""
        self.record["cases"] += number

    def note(self, *words: str) -> None:
        """Count what a case was, e.g. which signal ended it."""
        for word in words:
            self.record["notes"][word] = self.record["notes"].get(word, 0) + 1

    def fault(self, kind: str, what: str) -> None:
        """Record a fault."""
        self.record["counts"][kind] += 1
        if len(self.record["faults"]) < MAX_KEPT_FAULTS:
            self.record["faults"].append([kind, what])

    def require(self, holds: bool, kind: str, what: str) -> bool:
        """Record a fault unless something holds; return whether it does."""
        if not holds:
            self.fault(kind, what)
        return holds

    def check(self) -> None:
        """Fail the test if there was a fault."""
        faults = [f"{kind}: {what}" for kind, what in self.record["faults"]]
        assert not faults, f"seed {seed()}\n" + "\n".join(faults)


# ---- outputs


def clean_log(path: Path) -> str:
    """Return what a command wrote, without colors."""
    return ANSI.sub("", path.read_text("utf-8", errors="replace")) if path.is_file() else ""


def check_log(tally: Tally, path: Path, what: str) -> str:
    """Record a traceback in a command's output; return the output."""
    text = clean_log(path)
    tally.require(TRACEBACK not in text, "traceback", f"{what}: {text[text.find(TRACEBACK) :][-1500:]}")
    return text


def check_refusal(tally: Tally, code: int | None, path: Path, what: str) -> str:
    """Record a fault unless a command ended with exit code 1 and one line that says why; return its output."""
    text = check_log(tally, path, what)
    lines = ERROR_LINE.findall(text)
    tally.require(code == 1, "other", f"{what}: exit code {code}, expected 1: {text[-500:]}")
    tally.require(len(lines) == 1, "other", f"{what}: {len(lines)} error lines, expected 1: {lines or text[-500:]}")
    return text


def logged_losses(output_dir: Path) -> dict[int, float]:
    """Return the losses of a finished training by step."""
    history = json.loads((output_dir / "trainer_state.json").read_text("utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


# ---- computed once


def once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return a directory that the first caller of all workers fills; the others wait for it.

    Args:
        directory: Shared by the workers.
        make: Fills the directory that it is given.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            part = directory.with_name(f"{directory.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(directory)
    return directory


def wait_for(condition: Callable[[], object], seconds: float, pause: float = 0.003) -> bool:
    """Wait until something holds; return whether it came to that in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


# ---- small disks


@functools.cache
def can_mount() -> bool:
    """Return whether this process may mount a tmpfs, as root or in a user namespace of its own."""
    return os.geteuid() == 0 and os.system("d=$(mktemp -d) && mount -t tmpfs none $d 2>/dev/null && umount $d") == 0


@contextlib.contextmanager
def small_disk(place: Path, num_bytes: int):
    """Mount a tmpfs of so many bytes at a directory for the time of the block.

    Yields:
        A function that gives it another size.
    """
    place.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        assert os.system(f"mount -t tmpfs -o {options} none '{place}'") == 0

    mount(f"size={num_bytes}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        os.system(f"umount -l '{place}'")
