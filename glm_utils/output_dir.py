"""Write an output directory whole or not at all: a hidden sibling is filled and renamed when it is complete.

A run that is killed leaves only that sibling, without a config.json until its last step, so nothing loads it; the
next run into the same place removes it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from glm_utils.checkpoint_files import read_json_object
from glm_utils.cli import UserError
from glm_utils.run_record import RUN_CONFIG_NAME

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def check_output_path(output_dir: Path, overwrite: bool, stage: str, inputs: list[Path]) -> None:
    """Check, before any work, that an output directory may be written.

    Args:
        output_dir: The directory.
        overwrite: Whether an earlier output of the same stage may be replaced.
        stage: Name of the stage, as in its run_config.json.
        inputs: Directories that are read; the output must lie outside them.

    Raises:
        UserError: Why not, with the remedy.
    """
    resolved = output_dir.resolve()
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents or path.resolve() in resolved.parents:
            raise UserError(f"--output_path {output_dir} overlaps the input {path}. Give a directory beside it")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_path {output_dir}: a file. Give a directory")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output_path {output_dir}: not empty. Give another directory, or --overwrite")
    run_config = output_dir / RUN_CONFIG_NAME
    if not run_config.is_file() or read_json_object(run_config).get("stage") != stage:
        raise UserError(
            f"--output_path {output_dir}: --overwrite replaces an earlier output of {stage} only, and this directory "
            f"has no such {RUN_CONFIG_NAME}. Empty it yourself, or give another one"
        )


def check_free_space(output_dir: Path, num_bytes: int) -> None:
    """Check that the disk has room.

    Args:
        output_dir: Where the bytes go; it need not exist.
        num_bytes: How many.

    Raises:
        UserError: It has not.
    """
    parent = next(path for path in [output_dir, *output_dir.resolve().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{parent}: {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB needed. Free some space, or give an "
            "--output_path on another disk"
        )


@contextmanager
def whole_directory(output_dir: Path) -> Iterator[Path]:
    """Fill a hidden sibling of output_dir and rename it when the block ends without an error.

    Args:
        output_dir: Absent, empty, or an earlier output that is replaced; see `check_output_path`.

    Yields:
        The directory to fill.

    Raises:
        UserError: The disk is full, or the place cannot be written.
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
        if error.errno in DISK_ERRORS:
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
