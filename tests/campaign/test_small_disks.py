"""Disks that fill up: one line, exit code 1, nothing half; with space made the same command goes on.

A disk is a tmpfs of a random size; where mounting is not allowed, a limit on the size of files (EFBIG instead of
ENOSPC). `unshare -rm make test-slow` lets an ordinary user mount.
"""

import contextlib

import pytest

from tests.campaign import outputs, trainings
from tests.campaign.harness import can_mount, check_log, check_refusal, rng_of, scaled, small_disk
from tests.campaign.processes import run

pytestmark = [pytest.mark.campaign("small disks"), pytest.mark.usefixtures("server")]

NUM_TRAININGS, NUM_OUTPUTS = 14, 16
PLENTY = 200_000_000  # bytes
PAGE = 4096


@contextlib.contextmanager
def narrow_place(tally, directory, fraction, sizes):
    """Make a directory with room for a fraction of some files.

    Yields:
        The directory, the options for a run that is to find it narrow, and a function that makes space.
    """
    if can_mount():
        tally.note("tmpfs")
        with small_disk(directory, max(4, int(sum(sizes) * fraction / PAGE)) * PAGE) as resize:
            yield {}, lambda: resize(PLENTY)
    else:
        tally.note("limited file size")
        directory.mkdir()
        yield {"max_file_bytes": max(1, int(max(sizes) * fraction))}, lambda: None


def sizes_below(path):
    """Return the sizes of an output's files."""
    return [len(data) for data in outputs.contents(path).values()]


@pytest.mark.parametrize("number", range(scaled(NUM_TRAININGS)))
def test_a_training_goes_on_when_there_is_space(number, tally, tmp_path, shared_dir):
    rng = rng_of("disk of a training", number)
    name = list(trainings.TRAININGS)[number % len(trainings.TRAININGS)]
    expected = trainings.reference(shared_dir, name) / "out"
    words = trainings.prepare(tmp_path, name, output_dir="disk/out")
    with narrow_place(tally, tmp_path / "disk", rng.uniform(0.02, 1.1), sizes_below(expected)) as (options, widen):
        tally.case()
        code, log_path = run(words, tmp_path, "narrow.txt", **options)
        if code == 0:
            tally.note("fits")
            check_log(tally, log_path, f"{name} on a small disk")
        else:
            check_refusal(tally, code, log_path, f"{name} on a small disk")
            finished = (tmp_path / "disk/out/adapter_config.json").exists()
            tally.require(not finished, "wrong bits", f"{name}: a full disk left an adapter in output_dir")
            widen()
            code, log_path = run(words, tmp_path, "wide.txt")
            text = check_log(tally, log_path, f"{name} with space made")
            tally.require(code == 0, "lost", f"{name}: with space made {code}: {text[-1000:]}")
        if code == 0:
            same = (tmp_path / "disk/out" / trainings.ADAPTER).read_bytes() == (
                expected / trainings.ADAPTER
            ).read_bytes()
            tally.require(same, "wrong bits", f"{name}: another adapter than on a large disk")
    tally.check()


@pytest.mark.parametrize("number", range(scaled(NUM_OUTPUTS)))
def test_an_output_appears_when_there_is_space(number, tally, tmp_path, shared_dir):
    rng = rng_of("disk of an output", number)
    name = list(outputs.COMMANDS)[number % len(outputs.COMMANDS)]
    overwrite = rng.random() < 0.3
    reference = outputs.reference(shared_dir, name, 0, overwrite)
    expected, disk = outputs.contents(reference), tmp_path / "disk"
    words = outputs.command(shared_dir, name, outputs.output_name(name), 0, overwrite)
    earlier = outputs.contents(outputs.reference(shared_dir, name, 1)) if overwrite else {}
    sizes = sizes_below(reference)
    fraction = rng.uniform(0.02, 1.0) + (1 if overwrite and can_mount() else 0)  # room for the earlier output
    with narrow_place(tally, disk, fraction, sizes) as (options, widen):
        place = disk / outputs.output_name(name)
        if overwrite:
            outputs.copy_output(outputs.reference(shared_dir, name, 1), place)
        tally.case()
        code, log_path = run(words, disk, "../narrow.txt", **options)
        if code == 0:
            tally.note("fits")
            check_log(tally, log_path, f"{name} on a small disk")
        else:
            check_refusal(tally, code, log_path, f"{name} on a small disk")
            names = outputs.differing(outputs.contents(place), earlier)
            tally.require(not names, "lost" if earlier else "wrong bits", f"{name}: a full disk left {names}")
            widen()
            code, log_path = run(words, disk, "../wide.txt")
            text = check_log(tally, log_path, f"{name} with space made")
            tally.require(code == 0, "lost", f"{name}: with space made {code}: {text[-1000:]}")
        names = outputs.differing(outputs.contents(place), expected)
        tally.require(not names, "wrong bits", f"{name}: {names} differ from those on a large disk")
        hidden = outputs.leftovers(disk)
        tally.require(not hidden, "other", f"{name}: left beside the output: {hidden}")
    tally.check()
