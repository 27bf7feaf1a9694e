"""The data files that a flag names: one, several, or globs."""

import glob
from collections.abc import Sequence
from pathlib import Path

from glm_utils.cli import UserError, nearest

REMEDY = "Give a file of JSON lines, a JSON list, CSV or XLSX; data/README.md shows the forms"


def find_files(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """Return the files that are named, globs expanded in order of their names.

    Args:
        paths: Files or globs, separated by commas or as a list.

    Raises:
        UserError: A name matches nothing, or a file is named twice.
    """
    names = [paths] if isinstance(paths, Path | str) else paths
    found: list[Path] = []
    for name in filter(str, names):
        whole = str(Path(name).expanduser())
        parts = [whole] if is_there(whole) else [part.strip() for part in whole.split(",")]
        found += [path for part in parts if part for path in expand(part)]
    for index, path in enumerate(found):
        if path in found[:index]:
            raise UserError(f"{path}: named twice. Name each file once")
    if not found:
        raise UserError(f"no file is named. {REMEDY}")
    return found


def is_there(name: str) -> bool:
    """Whether a name is that of a file, whatever its characters."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False


def expand(name: str) -> list[Path]:
    """Return the file of a name, or the files of a glob."""
    path = Path(name).expanduser()
    if is_there(name) or not glob.has_magic(name):
        if not is_there(str(path)) and is_there(str(path.parent)):
            near = nearest(path.name, [other.name for other in list(path.parent.iterdir())[:1000]], "files")
            hint = f"{near} " if near.startswith("Did") else ""
            raise UserError(f"{path}: no such file. {hint}{REMEDY}")
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not matches:
        raise UserError(f"{name}: matches no file. {REMEDY}")
    return matches
