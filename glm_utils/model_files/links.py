"""Links to places outside their directory, as an unpacked archive may hold them, are not followed."""

import re
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import download_again

READ_SUFFIXES = (".json", ".model", ".safetensors", ".bin", ".jinja")
HUB_BLOB = re.compile(r".*/blobs/([0-9a-f]{2}/)?([0-9a-f]{40}|[0-9a-f]{64})")  # a downloaded snapshot links there


def check_links(directory: Path) -> None:
    """Refuse a directory of which a file that this project reads is a link out of it; see `check_inside`.

    Raises:
        UserError: There is such a link.
    """
    for path in sorted(directory.iterdir()):
        if path.suffix in READ_SUFFIXES:
            check_inside(path)


def check_inside(path: Path) -> None:
    """Refuse a file that is a link out of its directory; links into the hub's cache pass.

    Args:
        path: A file; it need not exist.

    Raises:
        UserError: It is such a link.
    """
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise UserError(f"{path}: a link that leads nowhere. {download_again(path)}") from None
    if path.parent.resolve() not in target.parents and not HUB_BLOB.fullmatch(target.as_posix()):
        raise UserError(f"{path}: a link out of its directory, to {target}: not followed. Copy the file here")
