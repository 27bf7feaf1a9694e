"""Merges, exports and answer files are ended by KILL, TERM and INT, over nothing and over an earlier output.

What stands at the place is the earlier output or the new one, complete and to the byte, at every moment.
"""

import signal
import time

import pytest

from tests.campaign import outputs
from tests.campaign.harness import check_log, rng_of, scaled, wait_for
from tests.campaign.processes import Run, run

pytestmark = [pytest.mark.campaign("merges and exports killed"), pytest.mark.usefixtures("server")]

NUM_KILLS, NUM_FRESH = 40, 4
CODES = {
    "KILL": (-signal.SIGKILL, 0),
    "TERM": (128 + signal.SIGTERM, -signal.SIGTERM, 0),
    "INT": (128 + signal.SIGINT, 0),
}
MOMENTS = ("time", "change", "change", "end")
MOST_CHANGES = 16


def wait_for_moment(run, rng, moment, place, seconds):
    """Wait until a run is where it is to be killed; False if it ended before."""

    def ended():
        return run.code() is not None

    if moment == "time":
        wait_for(ended, rng.random() * seconds)
    elif moment == "end":
        before = place.stat().st_ino if place.exists() else None
        wait_for(lambda: ended() or (place.exists() and place.stat().st_ino != before), 120, pause=0.0002)
        time.sleep(rng.choice((0, 0, 0.001, 0.005)))
    else:
        for _ in range(rng.randrange(1, MOST_CHANGES)):
            seen = outputs.listing(place.parent)
            wait_for(lambda seen=seen: ended() or outputs.listing(place.parent) != seen, 20, pause=0.0002)
        time.sleep(rng.random() * 0.01)
    return not ended()


@pytest.mark.parametrize("number", range(scaled(NUM_KILLS)))
def test_a_killed_output_is_complete_or_absent(number, tally, tmp_path, shared_dir):
    rng = rng_of("output", number)
    name = list(outputs.COMMANDS)[number % len(outputs.COMMANDS)]
    overwrite = rng.random() < 0.6
    reference = outputs.reference(shared_dir, name, 0, overwrite)
    expected, seconds = outputs.contents(reference), float(reference.with_name("seconds.txt").read_text())
    words = outputs.command(shared_dir, name, outputs.output_name(name), 0, overwrite)
    fresh = number % (NUM_KILLS // NUM_FRESH) == 0
    for attempt in range(8):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        place, earlier = directory / outputs.output_name(name), {}
        if overwrite:
            outputs.copy_output(outputs.reference(shared_dir, name, 1), place)
            earlier = outputs.contents(place)
        moment, sent = rng.choice(MOMENTS), ("KILL", "TERM", "INT")[(number + attempt) % 3]
        running = Run(words, tmp_path / str(attempt), "../log.txt", fresh=fresh)
        if wait_for_moment(running, rng, moment, place, seconds):
            break
        running.wait()
        tally.note("finished before the signal")
    what = f"{name}{' over an earlier one' if overwrite else ''}, {sent} at {moment}"
    tally.case()
    tally.note(
        name, sent, *(["fresh interpreter"] if fresh else []), *(["over an earlier output"] if overwrite else [])
    )
    running.send(getattr(signal, f"SIG{sent}"), group=sent == "INT")
    code = running.wait(90)
    text = check_log(tally, running.log_path, what)
    tally.require(code in CODES[sent], "other", f"{what}: exit code {code}: {text[-1000:]}")
    left = running.end_children(5 if sent != "KILL" else 60)
    tally.require(not left, "other", f"{what}: {len(left)} processes outlived the run")
    finish(tally, words, directory, place, earlier, expected, what)
    tally.check()


def finish(tally, words, directory, place, earlier, expected, what):
    """Check what stands at the place, then that the next run succeeds."""
    found = outputs.contents(place)
    is_new = found == expected
    if not is_new:
        kind = "lost" if earlier else "wrong bits"
        names = outputs.differing(found, earlier)
        tally.require(not names, kind, f"{what}: neither the earlier output nor the new one, {names} differ")
    if not is_new or "--overwrite" in words:
        code, log_path = run(words, directory, "../next.txt")
        text = check_log(tally, log_path, f"{what}, next run")
        tally.require(code == 0, "lost", f"{what}: the next run ended with {code}: {text[-1000:]}")
        outputs.check_complete(tally, directory, place, expected, f"{what}, after the next run")
