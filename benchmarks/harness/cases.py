"""Choose the cases of a benchmark by name, name their models, and run a script for one in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence

from glm_utils.cli import UserError, nearest
from glm_utils.family import PROJECT_DIR, Family


def choose_cases(cases: Sequence, names: str | None) -> list:
    """Return the named cases, in the order of `cases`.

    Args:
        cases: Anything with an attribute name.
        names: Joined by commas; None: all.

    Raises:
        UserError: A name that no case has.
    """
    known = {case.name: case for case in cases}
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    for name in wanted:
        if name not in known:
            raise UserError(f"--cases: no case {name!r}. {nearest(name, known, 'cases')}")
    return [case for name, case in known.items() if name in wanted]


def model_name(family: Family, scale: str) -> str:
    """Return the family's title, or at scale tiny the name of its model in models/."""
    return family.title if scale == "6b" else f"{family.name.removesuffix('-6b')}-tiny"


def run_python(*arguments: object) -> str:
    """Run Python in the project's directory; return its stdout, while stderr passes through.

    Args:
        *arguments: A script or -m and a module, then its flags; paths are absolute or start at the project.

    Raises:
        UserError: The exit code is not 0.
    """
    words = [sys.executable, *map(str, arguments)]
    process = subprocess.run(words, cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(words[1:])}: exit code {process.returncode}")
    return process.stdout
