"""Each kind of damage to the newest of two checkpoints: named when it is asked for, passed over by auto."""

import json
import shutil

import pytest

from tests.campaign import trainings
from tests.campaign.harness import check_log, check_refusal, once, rng_of
from tests.campaign.processes import run

pytestmark = [pytest.mark.campaign("checkpoints damaged"), pytest.mark.usefixtures("server")]

NAME, OLDER, NEWER = "a save at every step", "checkpoint-3", "checkpoint-6"
BINARY = ("optimizer.pt", "scheduler.pt", "rng_state.pth", trainings.ADAPTER)


def cut(data, rng):
    return data[: rng.randrange(1, len(data))]


def noise(data, rng):
    """Change 16 bytes behind the header, where only a checksum tells."""
    start = rng.randrange(len(data) // 2, len(data) - 32)
    return data[:start] + bytes(byte ^ rng.randrange(1, 256) for byte in data[start : start + 16]) + data[start + 16 :]


def zeros(data, rng):
    """Fill with zeros from a point on, as a file system does after a power loss."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(len(data) - start)


def changed(**values):
    """Return a damage that changes keys of a JSON object."""
    return lambda data, rng: json.dumps({**json.loads(data), **values}).encode()


DAMAGES = {
    **{f"{name} {kind.__name__}": (name, kind) for name in BINARY for kind in (cut, noise, zeros)},
    **{f"{name} empty": (name, lambda data, rng: b"") for name in (*BINARY, "trainer_state.json")},
    **{
        f"{name} deleted": (name, None)
        for name in (*BINARY, "trainer_state.json", "adapter_config.json", "run_config.json")
    },
    "trainer_state.json cut": ("trainer_state.json", cut),
    "trainer_state.json {}": ("trainer_state.json", lambda data, rng: b"{}"),
    "trainer_state.json, step a text": ("trainer_state.json", changed(global_step="six")),
    "trainer_state.json, another step": ("trainer_state.json", changed(global_step=2)),
    "adapter_config.json cut": ("adapter_config.json", cut),
    "run_config.json cut": ("run_config.json", cut),
}


def interrupted(shared_dir, directory):
    """Write a training that was interrupted with two checkpoints; return the words of its command."""

    def make(part):
        source = trainings.reference(shared_dir, NAME) / "out"
        for name in (OLDER, NEWER):
            shutil.copytree(source / name, part / name)
        shutil.copyfile(source / "run_config.json", part / "run_config.json")

    source = once(shared_dir / "interrupted", make)
    words = trainings.prepare(directory, NAME)
    shutil.copytree(source, directory / "out")
    return words


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_passed_over(kind, tally, tmp_path, shared_dir):
    words, rng = interrupted(shared_dir, tmp_path), rng_of("damage", kind)
    (file_name, damage), newer = DAMAGES[kind], tmp_path / "out" / NEWER
    path = newer / file_name
    if damage:
        path.write_bytes(damage(path.read_bytes(), rng))
    else:
        path.unlink()
    tally.case()
    asked = [word.replace("=auto", f"=out/{NEWER}") for word in words]
    code, log_path = run(asked, tmp_path, "asked.txt")
    text = check_refusal(tally, code, log_path, f"{kind}, asked for")
    tally.require(NEWER in text, "other", f"{kind}: the error does not name the checkpoint: {text[-500:]}")
    code, log_path = run(words, tmp_path, "auto.txt")
    text = check_log(tally, log_path, f"{kind}, auto")
    tally.require(code == 0, "lost", f"{kind}: auto ended with {code}: {text[-1000:]}")
    if code == 0:
        tally.require(
            NEWER in text and OLDER in text, "other", f"{kind}: not said what was passed over: {text[:1500]}"
        )
        tally.require(4 in trainings.steps_logged(text), "wrong bits", f"{kind}: did not go on from {OLDER}")
        expected = trainings.reference(shared_dir, NAME) / "out"
        same = (tmp_path / "out" / trainings.ADAPTER).read_bytes() == (expected / trainings.ADAPTER).read_bytes()
        tally.require(same, "wrong bits", f"{kind}: another adapter than that of the uninterrupted run")
    tally.check()
