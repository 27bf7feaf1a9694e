"""Files: text and JSON read with errors that name the line, places checked before any work, files written atomically.

Directories that are written as one are in glm_utils/output_dir.py.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm_utils.cli import UserError
from glm_utils.disk import (
    check_names,
    existing_parent,
    hidden_sibling,
    real_path,
    sync,
    sync_tree,
    write_faults_explained,
)

LFS_MAGIC = b"version https://git-lfs"
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads; `json_fault` words them


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


def peek_json_object(path: Path) -> dict:
    """Return the JSON object in a file; an empty dict if there is none, whatever else the file may be."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, *JSON_ERRORS):
        return {}
    return value if isinstance(value, dict) else {}


def download_again(path: Path) -> str:
    """Return the remedy for a downloaded file that is missing or broken."""
    return f"Download {path.name} again"


# ---- checks before any work


def check_writable(directory: Path, name: str, file_names: Sequence[str] = ()) -> None:
    """Check that a directory can be created and written to, by writing there: to root, os.access promises anything.

    Args:
        directory: The directory; it need not exist.
        name: The flag or setting that names it.
        file_names: Files that will be written there.

    Raises:
        UserError: It, or its nearest parent that exists, is a file or cannot be written to, or a name is too long.
    """
    try:
        place = existing_parent(real_path(directory, name))
        if place.is_dir():
            check_names(place, [*real_path(directory, name).relative_to(place).parts, *file_names])
            with tempfile.TemporaryFile(dir=place):  # without a name on Linux: a kill leaves nothing
                return
        fault = "is a file"
    except OSError as error:
        place, fault = directory, f"cannot be written to ({error.strerror or error})"
    subject = name if place in (directory, directory.absolute()) else f"{name} cannot be created, {place}"
    raise UserError(f"{directory}: {subject} {fault}. Choose another {name}")


def check_output_file(path: Path, name: str, companions: Sequence[str] = ()) -> Path:
    """Check before any work that a file can be written.

    Args:
        path: The file; it need not exist.
        name: The flag that names it.
        companions: Endings of further files, which are written beside it.

    Returns:
        The path, links followed.

    Raises:
        UserError: A directory, a device, pipe or mounted file, a name that is too long, or a place that cannot be
            written to.
    """
    target = real_path(path, name)
    check_writable(target.parent, name, [target.name + ending for ending in ("", *companions)])
    if target.exists() and (not target.is_file() or os.path.ismount(target)):
        fault = "a directory" if target.is_dir() else "a device, a pipe or a mounted file, which cannot be replaced"
        raise UserError(f"{name} {path}: {fault}. Give a file in a directory that can be written to")
    return target


def check_apart(output_dir: Path, inputs: Sequence[Path], name: str) -> None:
    """Check that an output directory neither contains an input directory nor lies in one.

    Args:
        output_dir: The output directory.
        inputs: Directories that are read.
        name: The flag for the output directory.

    Raises:
        UserError: They overlap.
    """
    resolved = real_path(output_dir, name)
    for path in map(Path.resolve, inputs):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            raise UserError(f"{name} {output_dir} overlaps the input {path}. Give a directory beside it")


def check_free_space(output_dir: Path, num_bytes: int) -> None:
    """Check that the disk of an output directory, which need not exist, has room for so many bytes.

    Raises:
        UserError: Too little space is free.
    """
    place = existing_parent(real_path(output_dir, "--output_path"))
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        unit, size = ("GB", 1e9) if num_bytes >= 1e7 else ("MB", 1e6)
        raise UserError(
            f"{place}: {free / size:.2f} {unit} free, {num_bytes / size:.2f} {unit} needed. Free some space, or give "
            "an --output_path on another disk"
        )


# ---- writing


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically; a link at its place, or at that of the temporary file, is not followed."""
    temporary = path.with_name(f".incomplete-{secrets.token_hex(8)}")
    try:
        # what is not UTF-8, as names of files may be, is written as JSON writes such characters
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_files(target_dir: Path, last: str, name: str = "output_dir") -> Iterator[Path]:
    """Collect files in a temporary directory and move them into place when all are written.

    The caller holds the lock of the output, so what is there under the temporary directory's name is of a killed run.

    Args:
        target_dir: Where the files go; other files there stay.
        last: Name of the file that is moved last: a reader that requires it never sees half of the set.
        name: The flag or setting that names target_dir, for messages.

    Yields:
        The temporary directory, inside target_dir.

    Raises:
        UserError: The directory takes no more, or cannot be written to.
    """
    target_dir = real_path(target_dir, name)
    temporary_dir = hidden_sibling(target_dir / last, "incomplete")
    with write_faults_explained(target_dir, name, every=True):
        target_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary_dir, ignore_errors=True)
        temporary_dir.mkdir()
    try:
        with write_faults_explained(target_dir, name):
            yield temporary_dir
        with write_faults_explained(target_dir, name, every=True):
            sync_tree(temporary_dir)
            for path in sorted(temporary_dir.iterdir(), key=lambda path: path.name == last):
                os.replace(path, target_dir / path.name)
            sync(target_dir)
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)
