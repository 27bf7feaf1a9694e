"""One writer per output: a lock of the operating system, which the kernel releases when its process ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from loguru import logger

from glm_utils.cli import UserError

GRACE_SECONDS = 8  # data loader workers of a killed run hold its lock until they notice, within five seconds


@contextmanager
def lock_output(path: Path, what: str, grace_seconds: float = GRACE_SECONDS, remove: bool = False) -> Iterator[None]:
    """Hold the lock of an output while the block runs.

    Args:
        path: The lock file; it is created, with the directories above it.
        what: The output, as the message names it, e.g. `output_dir saved_files/run`.
        grace_seconds: How long to wait for a run that is just ending.
        remove: Delete the file at the end, while the lock is held. A run that waits for it then finds that the file it
            opened has no name any more, and opens a new one (filelock looks at st_nlink), so no two hold the lock.

    Raises:
        UserError: Another process holds the lock, it cannot be written, or the file system has no locks.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"{what} is in use by another run; waiting {grace_seconds:g} s for it to end")
        try:
            lock.acquire(timeout=grace_seconds)
        except Timeout:
            raise UserError(
                f"{what} is in use by another run. Wait until that ends, or choose another place"
            ) from None
    except NotImplementedError:
        raise UserError(f"{path}: this file system has no file locks. Choose a place on another one") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be written ({error.strerror}). Choose another place") from error
    try:
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        lock.release()
