"""Fifty thousand damaged and hostile files: each ends in a value or a UserError, in bounded time and memory.

A test runs some hundred cases in a process of its own. A case is repeated by its seed, subject and number; a faulty
one is kept below saved_files/campaign_cases/.
"""

import json
import os
import resource
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path

import pytest

from glm_utils.cli import UserError
from glm_utils.visible_text import one_line
from tests.campaign import fuzz_subjects
from tests.campaign.fuzz_subjects import SUBJECTS, Files, Reached
from tests.campaign.harness import rng_of, scaled, seed
from tests.campaign.processes import call_forked
from tests.conftest import PROJECT_DIR

pytestmark = pytest.mark.usefixtures("server")

MAX_SECONDS = 5  # of processor time, for a case: others may be at work on the machine
MAX_WALL_SECONDS = 60  # for one that waits
MAX_EXTRA_BYTES = 3 * 2**30  # of address space, beyond what the imports take
MAX_DETAILS = 24  # lines below the message of an error: the first twenty bad rows, or the forms of data
SECONDS = 900  # of a test
KEPT_DIR = PROJECT_DIR / "saved_files" / "campaign_cases"
NUM_KEPT = 3  # files of one kind of fault in one test


class TooSlow(BaseException):
    """A case took longer than MAX_SECONDS; no handler of the project catches this."""


def parts():
    """Return (subject, first case, last case) of every test."""
    for name, subject in SUBJECTS.items():
        number = scaled(subject.share)
        for start in range(0, number, subject.per_test):
            values = name, start, min(start + subject.per_test, number)
            yield pytest.param(
                *values, marks=pytest.mark.campaign(f"{name} fuzzed"), id=f"{name.replace(' ', '_')}-{start}"
            )


def place_of(error: BaseException) -> str:
    """Return where in the project an exception passed last, and its type."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    frame = (own or frames or traceback.extract_tb(error.__traceback__))[-1]
    name = Path(frame.filename)
    return f"{name.parent.name}/{name.name}:{frame.lineno} {type(error).__name__}"


def run_case(subject, rng, files):
    """Run one case; return what came of it: "read", "refused", or the kind of a fault and what it was."""

    def alarm(*_args):
        raise TooSlow

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, MAX_SECONDS),
        signal.SIGALRM: (signal.ITIMER_REAL, MAX_WALL_SECONDS),
    }
    for signum, (timer, seconds) in timers.items():
        signal.signal(signum, alarm)
        signal.setitimer(timer, seconds)
    try:
        subject.fuzz(rng, files)
    except Reached:
        return "read", ""
    except UserError as error:
        lines = one_line(error.message), *error.details  # as the log shows them
        faked = [line for line in lines if len(line.splitlines()) != 1]
        return ("other", f"{place_of(error)}: not one line each: {faked!r}") if faked else ("refused", "")
    except TooSlow as error:
        return "other", f"{place_of(error)}: no end within {MAX_SECONDS} s of processor time"
    except MemoryError as error:
        return "other", f"{place_of(error)}: more than {MAX_EXTRA_BYTES} bytes"
    except Exception as error:
        return "traceback", f"{place_of(error)}: {str(error)[:200]}"
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
    return "read", ""


def run_cases(name, start, stop, scratch, result_path):
    """Run cases in this process, which is left afterwards; the number of the last one stands in a file of its own."""
    subject, found, kept = SUBJECTS[name], {"read": 0, "refused": 0, "faults": []}, Counter()
    fuzz_subjects.quiet()
    fuzz_subjects.stop_before_the_model()
    family = "chatglm2-6b" if "index" in name or start // subject.per_test % 2 == 0 else "chatglm-6b"
    files = Files(Path(scratch), family)
    subject.prepare(files)
    original = Path(f"{scratch}-original")
    shutil.copytree(scratch, original)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_EXTRA_BYTES, resource.RLIM_INFINITY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for number in range(start, stop):
        Path(f"{result_path}.at").write_text(str(number))
        kind, what = run_case(subject, rng_of("fuzz", name, number), files)
        if kind in found:
            found[kind] += 1
        else:
            place = what.partition(": ")[0]
            found["faults"].append([kind, place, f"case {number}: {what}"])
            kept[place] += 1
            if kept[place] <= NUM_KEPT:
                keep(scratch, original, KEPT_DIR / f"{seed()}-{name.replace(' ', '_')}-{number}")
        restore(Path(scratch), original)
    Path(result_path).write_text(json.dumps(found), "utf-8")


def changed_files(scratch, original):
    """Return the files that a case changed or made."""
    for path in [path for path in Path(scratch).rglob("*") if path.is_file()]:
        twin = original / path.relative_to(scratch)
        stat, before = path.stat(), twin.stat() if twin.exists() else None
        if before is None or stat.st_mtime_ns > before.st_mtime_ns:
            yield path, twin


def keep(scratch, original, place):
    """Copy the files that a case damaged."""
    for path, _ in changed_files(scratch, original):
        target = place / path.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def restore(scratch, original):
    """Undo what a case did to the files."""
    for path, twin in list(changed_files(scratch, original)):
        if twin.exists():
            shutil.copyfile(twin, path)
            shutil.copystat(twin, path)
        else:
            path.unlink()
    shutil.rmtree(scratch / "out", ignore_errors=True)


@pytest.mark.parametrize("name, start, stop", list(parts()))
def test_damaged_files(name, start, stop, tally, tmp_path):
    result_path = tmp_path / "result.json"
    code = call_forked(run_cases, name, start, stop, str(tmp_path / "scratch"), str(result_path), seconds=SECONDS)
    if result_path.is_file():
        found = json.loads(result_path.read_text("utf-8"))
        tally.case(found["read"] + found["refused"] + len(found["faults"]))
        for outcome in ("read", "refused"):
            tally.note(*[outcome] * found[outcome])
        for kind, place, what in found["faults"]:
            tally.fault(kind, what)
            tally.note(place)
    else:
        last = Path(f"{result_path}.at")
        tally.case()
        at = last.read_text() if last.is_file() else "before the first case"
        tally.fault("traceback", f"{name}: the process ended with {code} at case {at}")
    tally.check()
