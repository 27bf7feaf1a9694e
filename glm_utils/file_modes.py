"""Who may read a file: safetensors writes files for their owner only, whatever the umask."""

import contextlib
import os
import tempfile
from pathlib import Path


def give_usual_modes(directory: Path) -> None:
    """Give every file in a directory and below it the mode of a new file, where the file system has modes."""
    mode = new_file_mode(directory)
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            with contextlib.suppress(PermissionError):
                path.chmod(mode)


def new_file_mode(directory: Path) -> int:
    """Return the mode of files that this process creates in a directory, as its umask and the directory decide."""
    with tempfile.TemporaryDirectory(prefix=".mode-", dir=directory) as folder, Path(folder, "new").open("x") as file:
        return os.fstat(file.fileno()).st_mode & 0o777
