"""Check that the code that the model families share is the same in all their directories; --fix repairs it.

    python -m tools.check_copies [--fix] [--scripts_dir remote_scripts]

Every file must be in every family's directory. A file with named regions, from `# region NAME` to `# endregion`, must
have the same regions in all of them; any other file must be byte-identical. EXCEPTIONS lists the files that can be
neither. --fix copies from the alphabetically first family to the others. The exit code is 1 if a difference is left.
"""

import argparse
import re
import sys
from pathlib import Path

# File name -> why only one family has it, or why the families' files have nothing in common. There is none today.
EXCEPTIONS: dict[str, str] = {}
SCRIPTS_DIR = Path(__file__).resolve().parent.parent / "remote_scripts"
REGION = re.compile(
    rb"^[ \t]*# region (?P<name>[^\r\n]+?)[ \t]*\r?\n.*?^[ \t]*# endregion\b[^\n]*", re.DOTALL | re.MULTILINE
)
MARKER = re.compile(rb"^[ \t]*# (?:end)?region\b", re.MULTILINE)


def regions(content: bytes) -> dict[str, bytes]:
    """Return the named regions of a file, marker lines included.

    Raises:
        ValueError: A region without an end, a region inside another, or two regions of the same name.
    """
    found = list(REGION.finditer(content))
    named = {match["name"].decode("utf-8"): match[0] for match in found}
    if len(MARKER.findall(content)) != 2 * len(named):
        raise ValueError("region markers do not pair up: expected `# region NAME` ... `# endregion`, each NAME once")
    return named


def compare_files(source: Path, target: Path) -> tuple[list[str], bytes | None]:
    """Compare one file of two families.

    Args:
        source: The first family's file.
        target: The other family's file.

    Returns:
        One message for each difference, and the content that repairs the target; None if it has to be done by hand.
    """
    if source.name in EXCEPTIONS:
        return [], None
    if not source.is_file():
        return [f"{source}: missing; {target} is there. Copy it, or name it in EXCEPTIONS"], None
    ours = source.read_bytes()
    if not target.is_file():
        is_identical = not MARKER.search(ours)
        messages = [f"{target}: missing; {source} is there. Copy it, or name it in EXCEPTIONS"]
        return messages, ours if is_identical else None
    theirs = target.read_bytes()
    if MARKER.search(ours) or MARKER.search(theirs):
        return compare_regions(source, target, ours, theirs)
    if ours == theirs:
        return [], ours
    return [f"{target}: differs from {source}; files without regions must be identical"], ours


def compare_regions(source: Path, target: Path, ours: bytes, theirs: bytes) -> tuple[list[str], bytes | None]:
    """Compare the named regions of one file of two families; result as for `compare_files`."""
    messages, repaired = [], theirs
    wanted: dict[str, bytes] = {}
    present: dict[str, bytes] = {}
    for path, content, named in ((source, ours, wanted), (target, theirs, present)):
        try:
            named.update(regions(content))
        except ValueError as error:
            messages.append(f"{path}: {error}")
    if messages:
        return messages, None
    for name in wanted.keys() ^ present.keys():
        path, other = (target, source) if name in wanted else (source, target)
        messages.append(f"{path}: has no region {name!r}, which {other} has; add its markers")
    is_repairable = not messages
    for name in wanted.keys() & present.keys():
        if wanted[name] != present[name]:
            messages.append(f"{target}: region {name!r} differs from {source}")
            repaired = repaired.replace(present[name], wanted[name])
    return messages, repaired if is_repairable else None


def main() -> None:
    """Print the differences; exit with 1 if any was not repaired."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="copy from the first family to the others")
    parser.add_argument("--scripts_dir", type=Path, default=SCRIPTS_DIR, help="holds one directory for each family")
    options = parser.parse_args()
    source_dir, *target_dirs = sorted({path.parent for path in options.scripts_dir.glob("*/*.py")}) or [None]
    if not target_dirs:
        parser.error(f"{options.scripts_dir}: expected at least two directories with scripts in it")
    num_left = 0
    for target_dir in target_dirs:
        for name in sorted({path.name for parent in (source_dir, target_dir) for path in parent.glob("*.*")}):
            messages, repaired = compare_files(source_dir / name, target_dir / name)
            is_fixed = bool(messages) and options.fix and repaired is not None
            if is_fixed:
                (target_dir / name).write_bytes(repaired)
            num_left += 0 if is_fixed else len(messages)
            for message in messages:
                print(("repaired: " if is_fixed else "") + message)
    if num_left:
        print(f"{num_left} differences left; `python -m tools.check_copies --fix` copies from {source_dir.name}")
    sys.exit(bool(num_left))


if __name__ == "__main__":
    main()
