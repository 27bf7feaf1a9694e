"""Disks that are too small or fill up meanwhile: one line, exit code 1, nothing half; with space made it goes on.

A disk is a tmpfs of a random size, or a large one that another file fills while the command writes. Where mounting is
not allowed, a limit on the size of files takes its place (EFBIG instead of ENOSPC). `unshare -rm make test-slow` lets
an ordinary user mount.
"""

import contextlib
import os
import shutil

import pytest

from tests.campaign import outputs, trainings
from tests.campaign.harness import can_mount, check_log, check_refusal, clean_log, rng_of, scaled, small_disk, wait_for
from tests.campaign.processes import Run, run

pytestmark = [pytest.mark.campaign("small disks"), pytest.mark.usefixtures("server")]

NUM_TRAININGS, NUM_OUTPUTS = 14, 16
PLENTY = 200_000_000  # bytes
PAGE = 4096


class Disk:
    """A place with little room.

    Args:
        directory: The place.
        rng: Decides how much room, and whether it is there at first.
        sizes: Of the files that are to be written.
        taken: Bytes of what is there before.
    """

    def __init__(self, directory, rng, sizes, taken=0):
        self.directory, self.sizes = directory, sizes
        self.room = int(sum(sizes) * rng.uniform(0.0, 1.0))
        self.fills_up = can_mount() and rng.random() < 0.6
        self.num_bytes = PLENTY if self.fills_up else max(4, (self.room + taken) // PAGE) * PAGE

    @contextlib.contextmanager
    def mounted(self, tally):
        """Mount the place for the time of the block."""
        tally.note("tmpfs" if can_mount() else "limited file size", *(["filled meanwhile"] if self.fills_up else []))
        if can_mount():
            with small_disk(self.directory, self.num_bytes) as self.resize:
                yield
        else:
            self.directory.mkdir()
            yield

    def run(self, words, directory, log_name, begun):
        """Run a command in the place; fill what is left of it once the command has begun to write."""
        limit = None if can_mount() else max(1, int(max(self.sizes) * self.room / sum(self.sizes)))
        running = Run(words, directory, log_name, max_file_bytes=limit)
        if self.fills_up:
            wait_for(lambda: running.code() is not None or begun(running), 120, pause=0.0005)
            free = shutil.disk_usage(self.directory).free - self.room
            with contextlib.suppress(OSError), (self.directory / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free))
        code = running.wait()
        running.end_children(2)
        return code, running.log_path

    def widen(self):
        """Make space."""
        (self.directory / "ballast").unlink(missing_ok=True)
        if can_mount():
            self.resize(PLENTY)


def sizes_below(path):
    """Return the sizes of an output's files."""
    return [len(data) for data in outputs.contents(path).values()]


@pytest.mark.parametrize("number", range(scaled(NUM_TRAININGS)))
def test_a_training_goes_on_when_there_is_space(number, tally, tmp_path, shared_dir):
    rng = rng_of("disk of a training", number)
    name = list(trainings.TRAININGS)[number % len(trainings.TRAININGS)]
    expected = trainings.reference(shared_dir, name) / "out"
    words, out = trainings.prepare(tmp_path, name, output_dir="disk/out"), tmp_path / "disk" / "out"
    disk, first = Disk(tmp_path / "disk", rng, sizes_below(expected)), rng.randrange(1, 6)
    with disk.mounted(tally):
        tally.case()
        code, log_path = disk.run(
            words, tmp_path, "narrow.txt", lambda run: first in trainings.steps_logged(clean_log(run.log_path))
        )
        if code == 0:
            tally.note("fits")
            check_log(tally, log_path, f"{name} on a small disk")
        else:
            check_refusal(tally, code, log_path, f"{name} on a small disk")
            finished = (out / "adapter_config.json").exists()
            tally.require(not finished, "wrong bits", f"{name}: a full disk left an adapter in output_dir")
            disk.widen()
            before = trainings.checkpoint_steps(out)
            code, log_path = run(words, tmp_path, "wide.txt")
            text = check_log(tally, log_path, f"{name} with space made")
            tally.require(code == 0, "lost", f"{name}: with space made {code}: {text[-1000:]}")
            again = [step for step in trainings.steps_logged(text) if before and step <= before[-1]]
            tally.require(not again, "lost", f"{name}: steps {again} again, although {before} were there")
        if code == 0:
            same = (out / trainings.ADAPTER).read_bytes() == (expected / trainings.ADAPTER).read_bytes()
            tally.require(same, "wrong bits", f"{name}: another adapter than on a large disk")
    tally.check()


@pytest.mark.parametrize("number", range(scaled(NUM_OUTPUTS)))
def test_an_output_appears_when_there_is_space(number, tally, tmp_path, shared_dir):
    rng = rng_of("disk of an output", number)
    name = list(outputs.COMMANDS)[number % len(outputs.COMMANDS)]
    overwrite = rng.random() < 0.3
    reference = outputs.reference(shared_dir, name, 0, overwrite)
    expected, directory = outputs.contents(reference), tmp_path / "disk"
    words = outputs.command(shared_dir, name, outputs.output_name(name), 0, overwrite)
    earlier = outputs.contents(outputs.reference(shared_dir, name, 1)) if overwrite else {}
    disk = Disk(directory, rng, sizes_below(reference), sum(map(len, earlier.values())))
    with disk.mounted(tally):
        place = directory / outputs.output_name(name)
        if overwrite:
            outputs.copy_output(outputs.reference(shared_dir, name, 1), place)
        seen, num_changes = outputs.listing(directory), rng.randrange(1, 5)
        tally.case()

        def begun(_):
            nonlocal seen, num_changes
            found = outputs.listing(directory)
            num_changes -= found != seen
            seen = found
            return num_changes <= 0

        code, log_path = disk.run(words, directory, "../narrow.txt", begun)
        if code == 0:
            tally.note("fits")
            check_log(tally, log_path, f"{name} on a small disk")
        else:
            check_refusal(tally, code, log_path, f"{name} on a small disk")
            names = outputs.differing(outputs.contents(place), earlier)
            tally.require(not names, "lost" if earlier else "wrong bits", f"{name}: a full disk left {names}")
            disk.widen()
            code, log_path = run(words, directory, "../wide.txt")
            text = check_log(tally, log_path, f"{name} with space made")
            tally.require(code == 0, "lost", f"{name}: with space made {code}: {text[-1000:]}")
        outputs.check_complete(tally, directory, place, expected, name)
    tally.check()
