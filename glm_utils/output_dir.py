"""Output directories that appear complete or not at all, also behind links, in mount points and over earlier outputs.

A directory is filled as a hidden sibling, .NAME.incomplete, and renamed when it is complete and on the disk. A mount
point (a container's volume) cannot be renamed to, and the directory around one may be read-only: there the hidden
directory lies inside, as .incomplete, and its files are moved out one by one, the one without which nothing loads the
directory last. What a killed run leaves is hidden and has an exact name. Whoever holds the lock may clear it away, or
finish the exchange of an earlier output that was under way:

    .NAME.incomplete    the new output; complete once .NAME.replaced exists
    .NAME.replacing     inside a mount point: the earlier output while it is moved aside
    .NAME.replaced      the earlier output, aside; then the new one gets its place
    .NAME.lock          held by the run that writes; it deletes it at its end
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.disk import hidden_sibling, real_path, sync, sync_tree, write_faults_explained
from glm_utils.file_modes import give_usual_modes
from glm_utils.files import check_apart, check_writable
from glm_utils.output_lock import lock_output
from glm_utils.run_record import RUN_CONFIG_NAME, read_run_config

LAST_NAMES = ("adapter_config.json", "config.json")  # one of them makes a directory loadable
KINDS = ("incomplete", "replacing", "replaced", "lock")
FOREIGN_NAMES = ["lost+found"]  # in the root of a fresh disk
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)  # mount points, overlays, a read-only parent


@dataclass(frozen=True)
class OutputPlace:
    """Where a directory goes and where the hidden entries of its making are.

    Attributes:
        target: The directory, links followed.
        inside: Whether the hidden entries are in it, as it cannot be renamed to, or beside it.
    """

    target: Path
    inside: bool

    def hidden(self, kind: str) -> Path:
        """Return the path of a hidden entry of one of KINDS."""
        return self.target / f".{kind}" if self.inside else hidden_sibling(self.target, kind)

    @property
    def entries(self) -> list[Path]:
        """What is in the directory, but for hidden entries of its making and what a fresh disk holds."""
        if not self.target.is_dir():
            return []
        left_out = [f".{kind}" for kind in KINDS] + (FOREIGN_NAMES if self.inside else [])
        return [path for path in self.target.iterdir() if path.name not in left_out]


def find_place(output_dir: Path, name: str) -> OutputPlace:
    """Return where an output directory goes.

    Args:
        output_dir: The directory; it need not exist.
        name: The flag that names it.

    Raises:
        UserError: No directory can be there.
    """
    target = real_path(output_dir, name)
    if not target.is_dir():
        return OutputPlace(target, inside=False)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            # nor is the working directory renamed, which a shell would go on in
            return OutputPlace(target, inside=os.path.ismount(target) or target == Path.cwd())
    except OSError:
        return OutputPlace(target, inside=True)


@contextmanager
def lock_directory(output_dir: Path, name: str) -> Iterator[OutputPlace]:
    """Hold the lock of an output directory while the block runs.

    Raises:
        UserError: Another run holds it, or it cannot be written.
    """
    place = find_place(output_dir, name)
    with lock_output(place.hidden("lock"), f"{name} {output_dir}", remove=True):
        yield place


@contextmanager
def lock_and_recover(output_dir: Path) -> Iterator[OutputPlace]:
    """Hold the lock of an --output_path, after what a killed run left there was cleared away or finished."""
    with lock_directory(output_dir, "--output_path") as place:
        with write_faults_explained(output_dir, "--output_path", every=True):
            inner = replace(place, inside=True)
            if not place.inside and any(inner.hidden(kind).exists() for kind in KINDS):
                with lock_output(inner.hidden("lock"), f"--output_path {output_dir}", remove=True):
                    recover(inner)
            recover(place)
        yield place


def check_replaceable(output_dir: Path, overwrite: bool, stage: str, inputs: Sequence[Path]) -> None:
    """Check before any work that an output directory may be written to.

    Args:
        output_dir: The directory, given as --output_path.
        overwrite: Whether an earlier output of the same stage may be replaced.
        stage: Name of the stage as its run_config.json records it.
        inputs: Directories that are read; the output must lie outside them.

    Raises:
        UserError: It overlaps an input, cannot be written to, is in use, or holds something other than an earlier
            output.
    """
    check_apart(output_dir, inputs, "--output_path")
    check_writable(output_dir, "--output_path")
    if find_place(output_dir, "--output_path").hidden("lock").parent.is_dir():
        with lock_and_recover(output_dir) as place:
            check_unused(place, output_dir, overwrite, stage)


def check_unused(place: OutputPlace, output_dir: Path, overwrite: bool, stage: str) -> None:
    """Refuse a directory, given as output_dir, that holds something else than an earlier output to be replaced."""
    if not place.entries:
        return
    if not overwrite:
        raise UserError(f"--output_path {output_dir}: not empty. Give another directory, or --overwrite")
    if read_run_config(place.target).get("stage") != stage:
        raise UserError(
            f"--output_path {output_dir}: --overwrite replaces an earlier output of {stage} only, and this directory "
            f"has no {RUN_CONFIG_NAME} of it. Empty it yourself, or give another directory"
        )


@contextmanager
def atomic_directory(output_dir: Path, overwrite: bool, stage: str) -> Iterator[Path]:
    """Fill a hidden directory that becomes output_dir if the block ends without an error.

    Args:
        output_dir: Absent, empty, or an earlier output.
        overwrite: Whether an earlier output of the same stage is replaced.
        stage: Name of the stage as its run_config.json records it.

    Yields:
        The directory to fill.

    Raises:
        UserError: Another run writes there, there is something else by now, or the place cannot be written to or
            takes no more.
    """
    with lock_and_recover(output_dir) as place:
        check_unused(place, output_dir, overwrite, stage)  # again: a run that was waited for may have written it
        filling = place.hidden("incomplete")
        with write_faults_explained(output_dir, "--output_path", every=True):
            filling.mkdir()
        try:
            with write_faults_explained(output_dir, "--output_path"):
                yield filling
            with write_faults_explained(output_dir, "--output_path", every=True):
                give_usual_modes(filling)
                sync_tree(filling)
                put_in_place(place)
        finally:
            if not place.hidden("replaced").exists():  # else the new output is complete: the next run finishes it
                shutil.rmtree(filling, ignore_errors=True)


def put_in_place(place: OutputPlace) -> None:
    """Give a complete new output the place of what is there.

    Raises:
        OSError: It could not be moved. What was there before is there again, or the next run finishes the exchange.
    """
    try:
        exchange(place)
    except OSError as error:
        if place.inside or error.errno not in CANNOT_RENAME or not place.target.is_dir():
            raise
        logger.info(f"{place.target} cannot be renamed, as is so with mount points; its files are exchanged instead")
        inner = replace(place, inside=True)
        try:
            shutil.copytree(place.hidden("incomplete"), inner.hidden("incomplete"))
            sync_tree(inner.hidden("incomplete"))
            exchange(inner)
        finally:
            if not inner.hidden("replaced").exists():
                shutil.rmtree(inner.hidden("incomplete"), ignore_errors=True)


def exchange(place: OutputPlace) -> None:
    """Move an earlier output aside, the new one into its place, and delete the earlier one."""
    new, replacing, replaced = map(place.hidden, KINDS[:3])
    try:
        if place.inside:
            replacing.mkdir()
            move_entries(place.entries, replacing)
            replacing.rename(replaced)
        elif place.target.is_dir() and any(place.target.iterdir()):
            place.target.rename(replaced)
        else:
            new.rename(place.target)  # takes the place of an empty directory, too
            sync(place.target.parent)
            return
        finish(place)
    except BaseException:
        restore(place)
        raise


def finish(place: OutputPlace) -> None:
    """Move the new output into its place, once the earlier one is aside, and delete that."""
    new, _, replaced = map(place.hidden, KINDS[:3])
    if place.inside:
        move_entries(new.iterdir(), place.target)
        new.rmdir()
    else:
        new.rename(place.target)
    sync(new.parent)
    replaced.rename(new)  # from now on it is only what a killed run left
    shutil.rmtree(new, ignore_errors=True)


def restore(place: OutputPlace) -> None:
    """Move an earlier output back, unless it is completely aside and the new one has begun to take its place."""
    _, replacing, replaced = map(place.hidden, KINDS[:3])
    if replacing.is_dir():
        move_entries(replacing.iterdir(), place.target)
        replacing.rmdir()
    if not place.inside and replaced.is_dir() and not place.target.exists():
        replaced.rename(place.target)


def recover(place: OutputPlace) -> None:
    """Clear away what a killed run left, or finish its exchange of an earlier output. The caller holds the lock."""
    new, replacing, replaced = map(place.hidden, KINDS[:3])
    if replaced.is_dir() and new.is_dir() and (place.inside or not place.target.exists()):
        logger.warning(f"{place.target}: finishing what a run began that was killed when its output was complete")
        finish(place)
    elif replacing.is_dir() or replaced.is_dir():
        restore(place)
    for leftover in (new, replaced):
        if leftover.is_dir():
            logger.warning(f"removing {leftover}, left by a run that was killed")
            shutil.rmtree(leftover)


def move_entries(paths: Iterable[Path], target: Path) -> None:
    """Move files into a directory of the same disk, those of LAST_NAMES last."""
    for path in sorted(paths, key=lambda path: (path.name in LAST_NAMES, path.name)):
        os.replace(path, target / path.name)
