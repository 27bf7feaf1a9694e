"""Trainings are ended by KILL, TERM and INT at random moments and started again with the same command.

Nothing may be lost but the steps since the last checkpoint, and the adapter must end bit-equal to that of a training
that nobody interrupted.
"""

import signal
import time

import pytest

from tests.campaign import trainings
from tests.campaign.harness import check_log, clean_log, logged_losses, rng_of, scaled, wait_for
from tests.campaign.processes import Run, run

pytestmark = [pytest.mark.campaign("training killed"), pytest.mark.usefixtures("server")]

NUM_KILLS, NUM_FRESH = 60, 10
SIGNALS = ("KILL", "TERM", "INT")
CODES = {  # exit codes; 0: it had just finished
    "KILL": (-signal.SIGKILL, 0),
    "TERM": (75, 0),
    "INT": (130, 0),
}
EARLY_CODES = {"TERM": (143, -signal.SIGTERM)}  # before training has begun there is nothing to save
MOMENTS = ("step", "save", "save", "end", "second signal")
LONGEST_SAVE, LONGEST_STEP = 0.03, 0.06  # seconds, about


def wait_for_moment(run, rng, moment, num_steps, out):
    """Wait until a run is where it is to be interrupted; False if it ended before."""

    def ended():
        return run.code() is not None

    def listing():
        return sorted(path.name for path in out.iterdir()) if out.is_dir() else []

    first = rng.randrange(num_steps) if moment != "end" else num_steps
    if not wait_for(lambda: ended() or len(trainings.steps_logged(clean_log(run.log_path))) >= min(first, 1), 120):
        return False
    begun = trainings.steps_logged(clean_log(run.log_path))
    target = max([first, *begun[-1:]])  # a resumed run does not begin with step 1
    wait_for(lambda: ended() or target in [0, *trainings.steps_logged(clean_log(run.log_path))], 120)
    if moment == "save":
        before = listing()
        wait_for(lambda: ended() or listing() != before, 60, pause=0.0002)
        time.sleep(rng.random() * LONGEST_SAVE)
    else:
        time.sleep(rng.random() * LONGEST_STEP)
    return not ended()


def interrupt(tally, run, rng, name, moment):
    """Send a signal; check how the run ends and what it says. Returns the exit code."""
    steps_before = trainings.steps_logged(clean_log(run.log_path))
    group = name == "INT"  # as a terminal does
    run.send(getattr(signal, f"SIG{name}"), group)
    if moment == "second signal" and name != "KILL":
        time.sleep(rng.random() * LONGEST_SAVE)
        run.send(getattr(signal, f"SIG{name}"), group)
    code = run.wait(90)
    text = check_log(tally, run.log_path, f"{name} at {moment}")
    allowed = CODES[name] + (EARLY_CODES.get(name, ()) if not steps_before or moment == "second signal" else ())
    if moment == "second signal" and name != "KILL":
        allowed += (128 + getattr(signal, f"SIG{name}"),)
    tally.require(code in allowed, "other", f"{name} at {moment}: exit code {code}, expected {allowed}: {text[-800:]}")
    if code in (75, 130) and steps_before and moment != "second signal":
        last_line = text.rstrip().rpartition("\n")[2]
        tally.require("--resume_from_checkpoint" in last_line, "other", f"no resume command in {text[-500:]!r}")
        saved = trainings.checkpoint_steps(run.log_path.parent / "out")
        tally.require(
            saved != [] and saved[-1] >= steps_before[-1],
            "lost",
            f"{name} at {moment} after step {steps_before[-1]}: checkpoints {saved}: {text[-500:]}",
        )
    left = run.end_children(30)  # of loader workers that are still importing
    tally.require(not left, "other", f"{name} at {moment}: {len(left)} processes outlived the run")
    return code


def check_unfinished(tally, out, expected, what):
    """An interrupted run has left no adapter but the finished one."""
    if (out / "adapter_config.json").is_file():
        same = (out / trainings.ADAPTER).read_bytes() == (expected / trainings.ADAPTER).read_bytes()
        tally.require(same, "wrong bits", f"{what}: output_dir holds an adapter that is not the finished one")


@pytest.mark.parametrize("number", range(scaled(NUM_KILLS)))
def test_a_killed_training_goes_on(number, tally, tmp_path, shared_dir):
    rng = rng_of("training", number)
    name = list(trainings.TRAININGS)[number % len(trainings.TRAININGS)]
    expected = trainings.reference(shared_dir, name) / "out"
    num_steps = max(logged_losses(expected))
    words, out = trainings.prepare(tmp_path, name), tmp_path / "out"
    num_killed, attempt, code = 0, 0, None
    num_rounds = rng.choice((1, 1, 1, 2, 3))
    while num_killed < num_rounds and attempt < num_rounds + 5 and code != 0:
        attempt += 1
        moment, sent = rng.choice(MOMENTS), SIGNALS[(number + num_killed) % 3]
        run_now = Run(words, tmp_path, f"killed-{attempt}.txt", fresh=number % (NUM_KILLS // NUM_FRESH) == 0)
        if not wait_for_moment(run_now, rng, moment, num_steps, out):
            code = run_now.wait()
            check_log(tally, run_now.log_path, f"{name}, not interrupted")
            tally.note("finished before the signal")
            continue
        before = trainings.checkpoint_steps(out)
        tally.case()
        code = interrupt(tally, run_now, rng, sent, moment)
        num_killed += 1
        tally.note(sent, f"at {moment}", *(["fresh interpreter"] if run_now.is_fresh else []))
        check_unfinished(tally, out, expected, f"{name}, {sent} at {moment}")
        after = trainings.checkpoint_steps(out)
        lost = [step for step in before if after and step > after[-1]] or (before and not after)
        tally.require(not lost, "lost", f"{name}, {sent} at {moment}: checkpoints {before} became {after}")
    finish(tally, words, tmp_path, expected, code, name)
    tally.check()


def finish(tally, words, directory, expected, code, name):
    """Run the command until it is done; the adapter and the losses are those of the uninterrupted run."""
    out = directory / "out"
    before = trainings.checkpoint_steps(out)
    if code != 0:
        code, log_path = run(words, directory, "last.txt")
        text = check_log(tally, log_path, f"{name}, restart")
        if not tally.require(code == 0, "lost", f"{name}: the restart ended with {code}: {text[-1500:]}"):
            return
        first = [step for step in trainings.steps_logged(text) if before and step <= before[-1]]
        tally.require(not first, "lost", f"{name}: step {first[:1]} again, although {before} were there: {text}")
    same = (out / trainings.ADAPTER).read_bytes() == (expected / trainings.ADAPTER).read_bytes()
    tally.require(same, "wrong bits", f"{name}: another adapter than that of the uninterrupted run")
    tally.require(logged_losses(out) == logged_losses(expected), "wrong bits", f"{name}: other losses")
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".") and "lock" not in path.name]
    tally.require(not hidden, "other", f"{name}: left in output_dir: {hidden}")
