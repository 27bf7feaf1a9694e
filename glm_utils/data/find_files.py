"""The data files that a flag names: one, several, or globs, perhaps with their shares of a mixture."""

import glob
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glm_utils.cli import UserError, nearest
from glm_utils.family import PROJECT_DIR

REMEDY = "Give a file of JSON lines, a JSON list, CSV or XLSX; data/README.md shows the forms"
SUM_TOLERANCE = 0.0101  # so that three shares of 0.33 are accepted
Names = Path | str | Sequence[Path | str]


@dataclass(frozen=True)
class FilePart:
    """What stands between two commas: one file, or the files of a glob.

    Attributes:
        name: As it was given, without the share.
        paths: The files.
        share: Their share of all examples of a mixture; None: nothing is mixed.
    """

    name: str
    paths: tuple[Path, ...]
    share: float | None = None


def find_files(names: Names, leave_out: Collection[Path] = ()) -> list[Path]:
    """Return the files that are named, globs expanded in order of their names.

    Args:
        names: Files or globs, separated by commas or as a list.
        leave_out: Files that no glob matches.

    Raises:
        UserError: A name matches nothing or has a share, or a file is named twice.
    """
    parts = list_parts(names, leave_out)
    for part in parts:
        if part.share is not None:
            raise UserError(f"{part.name}: a share is for --train_data_path only. Leave it out")
    return [path for part in parts for path in part.paths]


def find_parts(names: Names) -> list[FilePart]:
    """Return the files that are named, those of a glob together, with their shares: a.jsonl:0.8,b/*.jsonl:0.2.

    Args:
        names: Files or globs, separated by commas or as a list.

    Raises:
        UserError: A name matches nothing, a file is named twice, or the shares do not add up.
    """
    return checked_shares(list_parts(names, ()))


def list_parts(names: Names, leave_out: Collection[Path]) -> list[FilePart]:
    """Return the files that are named, with their shares as they were given; see `find_parts`.

    Raises:
        UserError: A name matches nothing, or a file is named twice.
    """
    given = [names] if isinstance(names, Path | str) else names
    parts = [find_part(text, leave_out) for name in filter(str, given) for text in split_names(str(name))]
    if not parts:
        raise UserError(f"no file is named. {REMEDY}")
    seen: dict[Path, Path] = {}
    for path in (path for part in parts for path in part.paths):
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            also = "" if other == path else f", also as {other}"
            raise UserError(f"{path}: named twice{also}. Name each file once")
    return parts


def split_names(name: str) -> list[str]:
    """Split at commas, unless a comma belongs to the name of a file."""
    file_name, share = split_share(name)
    if is_named(name) or ("," not in (share or "") and is_there(expand_user(file_name))):
        return [name]
    return [part.strip() for part in name.split(",") if part.strip()]


def split_share(text: str) -> tuple[str, str | None]:
    """Split a file or glob from its share; None: it has none, and a colon belongs to its name."""
    name, _, share = text.rpartition(":")
    is_drive = len(name) == 1 and share.startswith(("/", "\\"))  # C:\data\a.jsonl
    if not name or is_drive or is_named(text):
        return text, None
    try:
        float(share.strip().rstrip("%"))
    except ValueError:
        return (name, share) if is_named(name) else (text, None)
    return name, share


def find_part(text: str, leave_out: Collection[Path]) -> FilePart:
    """Return the files of a name or glob, with their share.

    Raises:
        UserError: It matches nothing, or the share is not a positive number.
    """
    name, share = split_share(text)
    paths = tuple(expand(name, leave_out))
    try:
        value = None if share is None else float(share)
    except ValueError:
        value = math.nan
    if value is not None and not 0 < value < math.inf:
        raise UserError(
            f"{name}: the share is {share!r}, expected a number above 0, such as 0.2. Leave the file out if nothing "
            "of it is wanted"
        )
    return FilePart(name, paths, value)


def checked_shares(parts: list[FilePart]) -> list[FilePart]:
    """Return parts whose shares add up to 1 exactly, or which have none.

    Raises:
        UserError: Some have a share and others none, only one is there, or they do not add up.
    """
    without = [part.name for part in parts if part.share is None]
    if len(without) == len(parts):
        return parts
    if without:
        raise UserError(f"{without[0]}: no share, where others have one. Give all of them one, or none")
    shares = [part.share or 0 for part in parts]
    if len(parts) == 1:
        raise UserError(f"{parts[0].name}:{shares[0]:g}: a share, but nothing to mix with. Leave it out")
    total = math.fsum(shares)
    if abs(total - 1) > SUM_TOLERANCE:
        scaled = ",".join(f"{part.name}:{share / total:.4g}" for part, share in zip(parts, shares, strict=True))
        raise UserError(f"the shares add up to {total:g}, expected 1. In these proportions: {scaled}")
    if math.isclose(total, 1, rel_tol=1e-12):
        return parts
    return [replace(part, share=share / total) for part, share in zip(parts, shares, strict=True)]


def expand_user(name: str) -> Path:
    """Return a path with the home directory for ~; where there is none, the path as it is."""
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):  # ~name of nobody, or a NUL character
        return Path(name)


def is_there(name: str | Path) -> bool:
    """Whether a name is that of a file, whatever its characters."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False


def is_named(name: str) -> bool:
    """Whether a name is that of a file, here or among those of the project, or a glob that matches one."""
    path = str(expand_user(name))
    return is_there(path) or is_there(PROJECT_DIR / path) or bool(glob.has_magic(path) and matches(path))


def matches(name: str) -> list[Path]:
    """Return the files that a glob matches, in the order of their names."""
    try:
        return [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
    except ValueError:  # a NUL character
        return []


def expand(name: str, leave_out: Collection[Path]) -> list[Path]:
    """Return the file of a name, shipped ones from anywhere, or the files of a glob.

    Raises:
        UserError: There is none.
    """
    path = expand_user(name)
    if is_there(path):
        return [path]
    if glob.has_magic(name):
        found = [match for match in matches(str(path)) if match.resolve() not in leave_out]
        if not found:
            raise UserError(f"{name}: matches no file. {REMEDY}")
        return found
    if is_there(PROJECT_DIR / path):
        return [PROJECT_DIR / path]
    try:
        near = nearest(path.name, [other.name for other in itertools.islice(path.parent.iterdir(), 1000)], "files")
    except (OSError, ValueError):  # no directory, or one that cannot be read
        near = ""
    raise UserError(f"{path}: no such file. {near + ' ' if near.startswith('Did') else ''}{REMEDY}")


def show_paths(paths: Sequence[Path]) -> str | list[str]:
    """Return files as a record holds them: one as a text, several as a list."""
    return str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]
