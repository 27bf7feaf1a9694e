"""Files and directories: text and JSON read with errors that name the line, everything written atomically.

An output directory is filled as a hidden sibling and renamed when it is complete. A run that is killed leaves only
that sibling, which nothing can load because config.json is written last; the next run with the same output directory
removes it.
"""

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.disk import sync

LFS_MAGIC = b"version https://git-lfs"
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads; `json_fault` words them
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


# ---- reading


def read_text(path: Path, remedy: str, encoding_remedy: str | None = None) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to do if the file is missing.
        encoding_remedy: What to do if it is not UTF-8; None: `remedy`.

    Raises:
        UserError: The file is missing, a directory, a Git LFS pointer or not UTF-8.
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


def parse_json(text: str, path: Path, remedy: str, first_line: int = 1, **options: Any) -> object:
    """Parse a JSON text.

    Args:
        text: The text.
        path: Its file, for messages.
        remedy: What to do if it is broken.
        first_line: Line of the file at which the text begins.
        **options: Options of json.loads; their hooks may raise UserError.

    Raises:
        UserError: A syntax error, a number with too many digits, or nesting that is too deep.
    """
    try:
        return json.loads(text, **options)
    except UserError:  # a ValueError too, so it must pass before JSON_ERRORS
        raise
    except JSON_ERRORS as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: broken JSON, {json_fault(error)}. {remedy}") from None


def json_fault(error: ValueError | RecursionError) -> str:
    """Say what json could not parse: a syntax error, a number with too many digits, or nesting that is too deep."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def parse_json_object(text: str, path: Path, remedy: str, **options: Any) -> dict:
    """Parse a JSON text that holds one object; see `parse_json`.

    Raises:
        UserError: Broken JSON, or a value that is not an object.
    """
    value = parse_json(text, path, remedy, **options)
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value


def read_json_object(path: Path) -> dict:
    """Read a JSON file that holds one object and was downloaded or written by a program.

    Raises:
        UserError: See `read_text` and `parse_json_object`.
    """
    remedy = download_again(path)
    return parse_json_object(read_text(path, remedy), path, remedy)


def download_again(path: Path) -> str:
    """Return the remedy for a downloaded file that is missing or broken."""
    return f"Download {path.name} again"


# ---- checks before any work


def _existing_parent(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_writable(directory: Path, name: str) -> None:
    """Check that a directory can be created and written to.

    Args:
        directory: The directory; it need not exist.
        name: The flag or setting that names it.

    Raises:
        UserError: It, or its nearest parent that exists, is a file or cannot be written to.
    """
    place = _existing_parent(directory)
    if place.is_dir() and os.access(place, os.W_OK):
        return
    fault = "cannot be written to" if place.is_dir() else "is a file"
    subject = name if place == directory else f"{name} cannot be created, {place}"
    raise UserError(f"{directory}: {subject} {fault}. Choose another {name}")


def check_apart(output_dir: Path, inputs: Sequence[Path], name: str) -> None:
    """Check that an output directory neither contains an input directory nor lies in one.

    Args:
        output_dir: The output directory.
        inputs: Directories that are read.
        name: The flag for the output directory.

    Raises:
        UserError: They overlap.
    """
    resolved = output_dir.resolve()
    for path in map(Path.resolve, inputs):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            raise UserError(f"{name} {output_dir} overlaps the input {path}. Give a directory beside it")


def check_free_space(output_dir: Path, num_bytes: int) -> None:
    """Check that the disk of an output directory, which need not exist, has room for so many bytes.

    Raises:
        UserError: Too little space is free.
    """
    place = _existing_parent(output_dir)
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise UserError(
            f"{place}: {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB needed. Free some space, or give an "
            "--output_path on another disk"
        )


# ---- writing


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically; a link at its place, or at that of the temporary file, is not followed."""
    temporary = path.with_name(f".incomplete-{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_files(target_dir: Path, last: str) -> Iterator[Path]:
    """Collect files in a temporary directory and move them into place when all are written.

    Args:
        target_dir: Where the files go; other files there stay.
        last: Name of the file that is moved last: a reader that requires it never sees half of the set.

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
    """Fill a hidden sibling of output_dir and rename it if the block ends without an error.

    Args:
        output_dir: Absent, empty, or an earlier output, which is replaced.

    Yields:
        The directory to fill.

    Raises:
        UserError: The directory cannot be written to, or the disk is full.
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
            remedy = "Free some space, or give another --output_path"
            raise UserError(f"{output_dir}: the disk is full. {remedy}") from error
        raise
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)


def remove_leftover(path: Path, prefix: str) -> None:
    """Remove the hidden directory of a killed run, named prefix + process id, unless that process is alive."""
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
    """Rename source to target; an existing target is moved aside first and deleted afterwards."""
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
