"""The file that --output_json names: checked before any work, written atomically when the report is there."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.disk import hidden_sibling
from glm_utils.files import atomic_files, check_output_file, write_json
from glm_utils.output_lock import lock_output

FLAG = "--output_json"


def check_report_path(output_json: str | Path | None, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that could not be written, or that is read, before any work.

    Args:
        output_json: The file; None: nothing is written.
        inputs: Files that the command reads.

    Raises:
        UserError: output_json is a directory, lies in one that is missing or read-only, or is one of the inputs.
    """
    if output_json is None:
        return
    path = check_output_file(Path(output_json).expanduser(), FLAG)
    if not path.parent.is_dir():
        raise UserError(
            f"{FLAG} {output_json}: there is no directory {path.parent}. Give a file in a directory that can "
            "be written to"
        )
    for source in inputs:
        with contextlib.suppress(OSError):  # one of the two is not there
            if path.samefile(source):
                raise UserError(f"{FLAG} {output_json}: this file is read, and would be replaced. Give another one")


def write_report_file(report: dict, output_json: str | Path) -> None:
    """Write a report as one JSON document.

    Raises:
        UserError: The file cannot be written.
    """
    path = check_output_file(Path(output_json).expanduser(), FLAG)
    with (
        lock_output(hidden_sibling(path, "lock"), f"{FLAG} {path}", remove=True),
        atomic_files(path.parent, last=path.name, name=FLAG) as temporary_dir,
    ):
        write_json(temporary_dir / path.name, report)
