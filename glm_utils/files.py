"""Files and directories: text and JSON read with a named fault, everything written atomically.

An output directory is filled as a hidden sibling and renamed when it is complete. A run that is killed leaves only
that sibling, without a config.json until its last step, so nothing loads it; the next run into the same place removes
it.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError

LFS_MAGIC = b"version https://git-lfs"
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads; `json_fault` puts them in words
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


# ---- reading


def read_text(path: Path, remedy: str, encoding_remedy: str | None = None) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to do when the file is missing.
        encoding_remedy: What to do when it is not UTF-8. None: `remedy`.

    Raises:
        UserError: The file is missing, a directory, a Git LFS pointer or, with its line, not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}. {remedy}")
    data = path.read_bytes()
    if data.startswith(LFS_MAGIC):
        raise UserError(f"{path}:1: a Git LFS pointer, not the file. Run `git lfs pull`")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8. {encoding_remedy or remedy}") from None


def parse_json(text: str, path: Path, remedy: str, first_line: int = 1, **options: object) -> object:
    """Parse a JSON text.

    Args:
        text: The text.
        path: Its file, named in the error.
        remedy: What to do when it is broken.
        first_line: Line of the file at which the text begins.
        **options: Of json.loads.

    Raises:
        UserError: A syntax error, a number of too many digits or nesting too deep; with file and line.
    """
    try:
        return json.loads(text, **options)
    except UserError:  # of a hook; a ValueError too
        raise
    except JSON_ERRORS as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: broken JSON, {json_fault(error)}. {remedy}") from None


def json_fault(error: ValueError | RecursionError) -> str:
    """Say what json could not parse: a syntax error, a number of too many digits, or nesting too deep."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def parse_json_object(text: str, path: Path, remedy: str, **options: object) -> dict:
    """Parse a JSON text that holds one object; see `parse_json`.

    Raises:
        UserError: Broken JSON, or a value that is not an object.
    """
    value = parse_json(text, path, remedy, **options)
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value


def read_json_object(path: Path) -> dict:
    """Read a JSON file that holds one object, one that was downloaded or written by a program.

    Raises:
        UserError: See `read_text` and `parse_json_object`.
    """
    remedy = download_again(path)
    return parse_json_object(read_text(path, remedy), path, remedy)


def download_again(path: Path) -> str:
    """Return the remedy for a downloaded file that is missing or broken."""
    return f"Download {path.name} again"


# ---- may I write there?


def check_writable(directory: Path, name: str) -> None:
    """Check before any work that a directory can be made and written to.

    Args:
        directory: The directory; it need not exist.
        name: The flag or setting that names it.

    Raises:
        UserError: It, or the nearest parent that exists, is a file or cannot be written to.
    """
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if place.is_dir() and os.access(place, os.W_OK):
        return
    fault = "cannot be written to" if place.is_dir() else "is a file"
    subject = name if place == directory else f"{name} cannot be made, {place}"
    raise UserError(f"{directory}: {subject} {fault}. Choose another {name}")


def check_apart(output_dir: Path, inputs: Sequence[Path], name: str) -> None:
    """Check that an output directory neither holds nor lies in a directory that is read.

    Args:
        output_dir: The output directory.
        inputs: Directories that are read.
        name: The flag that names the output directory.

    Raises:
        UserError: They overlap.
    """
    resolved = output_dir.resolve()
    for path in map(Path.resolve, inputs):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            raise UserError(f"{name} {output_dir} overlaps the input {path}. Give a directory beside it")


def check_free_space(output_dir: Path, num_bytes: int) -> None:
    """Check that the disk has room.

    Args:
        output_dir: Where the bytes go; it need not exist.
        num_bytes: How many.

    Raises:
        UserError: Too little space is free.
    """
    parent = next(path for path in [output_dir, *output_dir.resolve().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{parent}: {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB needed. Free some space, or give an "
            "--output_path on another disk"
        )


# ---- writing


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def atomic_files(target_dir: Path, last: str) -> Iterator[Path]:
    """Collect files in a temporary directory and rename them into place when all are written.

    Args:
        target_dir: Where the files go; other files there stay.
        last: Name of the file that is moved last: a reader that needs it never sees half of the set.

    Yields:
        The temporary directory, inside target_dir.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    temporary_dir = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=target_dir))
    try:
        yield temporary_dir
        for path in sorted(temporary_dir.iterdir(), key=lambda path: path.name == last):
            os.replace(path, target_dir / path.name)
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)


@contextmanager
def atomic_directory(output_dir: Path) -> Iterator[Path]:
    """Fill a hidden sibling of output_dir and rename it when the block ends without an error.

    Args:
        output_dir: Absent, empty, or an earlier output that is replaced.

    Yields:
        The directory to fill.

    Raises:
        UserError: The disk is full, or the directory cannot be written to.
    """
    output_dir = output_dir.absolute()
    prefix = f".{output_dir.name}.incomplete-"
    temporary_dir = output_dir.with_name(f"{prefix}{os.getpid()}")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output_dir.parent.glob(f"{prefix}*"):
            remove_leftover(leftover, prefix)
        temporary_dir.mkdir()
    except OSError as error:
        raise UserError(f"--output_path {output_dir}: cannot be written ({error.strerror})") from error
    try:
        yield temporary_dir
        replace_directory(temporary_dir, output_dir)
    except OSError as error:
        if error.errno in DISK_FULL_ERRORS:
            raise UserError(
                f"{output_dir}: the disk is full. Free some space, or give another --output_path"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)


def remove_leftover(path: Path, prefix: str) -> None:
    """Remove what a killed run left, unless its process is alive.

    Args:
        path: A hidden directory.
        prefix: Its name without the process id.
    """
    pid = path.name.removeprefix(prefix)
    if pid.isdecimal() and int(pid) != os.getpid():
        try:
            os.kill(int(pid), 0)
            return
        except ProcessLookupError:
            pass
        except PermissionError:  # alive, of another user
            return
    logger.warning(f"removing {path}, left by a run that was killed")
    shutil.rmtree(path)


def replace_directory(source: Path, target: Path) -> None:
    """Rename source to target; an earlier target is moved aside first and deleted afterwards."""
    if not target.exists():
        source.rename(target)
        return
    aside = source.with_name(source.name + "-replaced")
    target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
