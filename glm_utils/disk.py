"""What a disk does with an output: links followed, names, synchronization, and its errors in words."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glm_utils.cli import UserError

WRITE_FAULTS = {  # of a place that takes no more, in words
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would become larger than it may be here (`ulimit -f` shows a limit of the shell)",
    errno.EROFS: "the disk is read-only",
}
# Libraries in Rust (safetensors, tokenizers) put the error number into a text; numpy and torch tell only that less was
# written than was to be
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
SHORT_WRITE = re.compile(
    r"\d+ requested and \d+ written|PytorchStreamWriter failed|unexpected pos \d+ vs \d+|basic_ios::clear"
)
MAX_STEM_BYTES = 100  # of a name in a hidden one; most file systems take names of 255 bytes, some of 143


def real_path(path: Path, name: str) -> Path:
    """Return where an output will be: absolute, links followed, also those to something that does not exist yet.

    Args:
        path: The output.
        name: The flag or setting that names it.

    Raises:
        UserError: Links in a circle, or a name that no file can have.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        fault = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name} {path}: cannot be created ({fault}). Choose another {name}") from error


def existing_parent(path: Path) -> Path:
    """Return an absolute path, or its nearest parent that exists.

    Raises:
        OSError: The path is too long, or a directory on the way may not be looked into.
    """
    for place in (path, *path.parents):
        try:
            place.stat()
            return place
        except (FileNotFoundError, NotADirectoryError):
            pass
    return Path("/")


def check_names(place: Path, names: Sequence[str]) -> None:
    """Check the length of names that are to be created.

    Raises:
        OSError: One is longer than the file system of `place` takes.
    """
    longest = os.pathconf(place, "PC_NAME_MAX")
    if any(len(os.fsencode(name)) > longest for name in names):
        raise OSError(errno.ENAMETOOLONG, f"a name of more than {longest} bytes")


def hidden_sibling(path: Path, kind: str) -> Path:
    """Return the hidden path beside an output under which something of it is kept, e.g. .NAME.incomplete."""
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= MAX_STEM_BYTES else hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f".{stem}.{kind}")


@contextmanager
def write_faults_explained(place: Path, name: str, every: bool = False) -> Iterator[None]:
    """Turn the errors of a place that takes no more, whichever library raises them, into one line.

    Args:
        place: What is written to.
        name: The flag or setting that names it.
        every: Whether every OSError is about the place, as the block touches nothing else.

    Raises:
        UserError: See `write_fault`; with `every`, any OSError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault, remedy = write_fault(error), f"Free some space, or choose another {name}"
        if fault is None and every and isinstance(error, OSError):
            fault, remedy = f"cannot be written ({error.strerror or error})", f"Choose another {name}"
        if fault is None:
            raise
        raise UserError(f"{place}: {fault}. {remedy}") from error


def write_fault(error: Exception) -> str | None:
    """Say why a place took no more; None if the error is of another kind."""
    if isinstance(error, OSError) and error.errno:
        return WRITE_FAULTS.get(error.errno)
    text = str(error)
    if found := RUST_ERROR.search(text):
        return WRITE_FAULTS.get(int(found[1]))
    return WRITE_FAULTS[errno.ENOSPC] if SHORT_WRITE.search(text) else None


def sync_tree(directory: Path) -> None:
    """Wait until a directory and all that is in it are on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync files only
            raise
    finally:
        os.close(descriptor)
