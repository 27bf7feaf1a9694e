"""Two ranks under torchrun, one of them killed: torchrun restarts them, and they go on from the last checkpoint."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.campaign import trainings
from tests.campaign.harness import clean_log, logged_losses, once, rng_of, scaled, wait_for
from tests.campaign.processes import Run, run
from tests.conftest import PROJECT_DIR

pytestmark = [pytest.mark.campaign("one of two ranks killed"), pytest.mark.usefixtures("server")]

NUM_CASES = 4
NAMES = ("a save at every step", "best model, one checkpoint kept")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
NUM_STEPS = 40  # enough that one is left when torchrun has started both ranks


def prepare(directory, name):
    """Write the inputs; return the words of the command."""
    script, *flags = trainings.prepare(directory, name, max_steps=NUM_STEPS)
    return [*TORCHRUN, str(PROJECT_DIR / script), *flags]


def reference(shared_dir, name):
    """Return the output of both ranks uninterrupted."""

    def make(directory):
        code, log_path = run(prepare(directory, name), directory, fresh=True)
        assert code == 0, clean_log(log_path)[-3000:]

    return once(shared_dir / f"two ranks {name}", make) / "out"


def find_rank(running, rank):
    """Return the process id of a rank, which torchrun starts in a session of its own; None if it does not run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            variables = path.with_name("environ").read_bytes().split(b"\0")
            if int(parent) == running.pid and state != "Z" and f"LOCAL_RANK={rank}".encode() in variables:
                return int(path.parent.name)
    return None


@pytest.mark.parametrize("number", range(scaled(NUM_CASES)))
def test_torchrun_restarts_a_killed_rank(number, tally, tmp_path, shared_dir):
    rng, name, rank = rng_of("ranks", number), NAMES[number // 2 % 2], number % 2
    expected, words, out = reference(shared_dir, name), prepare(tmp_path, name), tmp_path / "out"
    target = rng.randrange(4, NUM_STEPS // 2)
    running = Run(words, tmp_path, fresh=True)
    wait_for(lambda: running.code() is not None or target in trainings.steps_logged(clean_log(running.log_path)), 200)
    before, pid = trainings.checkpoint_steps(out), find_rank(running, rank)
    time.sleep(rng.random() * 0.05)
    if not tally.require(pid is not None, "other", f"rank {rank} not found: {clean_log(running.log_path)[-1000:]}"):
        running.wait()
        tally.check()
    os.kill(pid, signal.SIGKILL)
    tally.case()
    tally.note(f"rank {rank}")
    code = running.wait(200)
    text = clean_log(running.log_path)
    tally.require(code == 0, "lost", f"rank {rank} killed: torchrun ended with {code}: {text[-2000:]}")
    left = running.end_children(10)
    tally.require(not left, "other", f"{len(left)} processes outlived torchrun")
    steps = trainings.steps_logged(text)
    resumed = next((step for last, step in zip(steps, steps[1:], strict=False) if step <= last), None)
    tally.require(
        resumed is None or not before or resumed > before[-1], "lost", f"step {resumed} again, checkpoints {before}"
    )
    tally.require("checkpoint-" in text, "lost", f"no word of a checkpoint: {text[-2000:]}")
    if code == 0:
        same = (out / trainings.ADAPTER).read_bytes() == (expected / trainings.ADAPTER).read_bytes()
        tally.require(same, "wrong bits", f"rank {rank} killed: another adapter")
        tally.require(logged_losses(out) == logged_losses(expected), "wrong bits", f"rank {rank} killed: other losses")
    tally.check()
