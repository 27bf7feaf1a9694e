"""Check that what the model families share is the same in all their directories, and repair it on request.

    python tools/check_copies.py [--fix] [--scripts_dir remote_scripts]

Every file must be in every family's directory, in one of two forms: byte-identical, or with named regions, from
`# region NAME` to `# endregion`, that are the same in all of them. Which form a file has is seen from the file itself:
one with region markers has regions, any other is identical. What can be neither stands in EXCEPTIONS. --fix copies
from the first family, in alphabetical order, to the others. Exit code 1 when a difference is left.
"""

import argparse
import re
import sys
from pathlib import Path

# File name -> why only one family has it, or why the families' files have nothing in common. None today.
EXCEPTIONS: dict[str, str] = {}
SCRIPTS_DIR = Path(__file__).resolve().parent.parent / "remote_scripts"
REGION = re.compile(
    rb"^[ \t]*# region (?P<name>[^\r\n]+?)[ \t]*\r?\n.*?^[ \t]*# endregion\b[^\n]*", re.DOTALL | re.MULTILINE
)
MARKER = re.compile(rb"^[ \t]*# (?:end)?region\b", re.MULTILINE)


def regions(content: bytes) -> dict[str, bytes]:
    """Return the named regions of a file, marker lines included.

    Raises:
        ValueError: A region without an end, one inside another, or two of one name.
    """
    found = list(REGION.finditer(content))
    named = {match["name"].decode("utf-8"): match[0] for match in found}
    if len(MARKER.findall(content)) != 2 * len(named):
        raise ValueError("region markers do not pair up: expected `# region NAME` ... `# endregion`, each NAME once")
    return named


def compare(source: Path, target: Path) -> tuple[list[str], bytes | None]:
    """Compare one file of two families.

    Args:
        source: The first family's file.
        target: The other family's.

    Returns:
        One message for each difference, and the content that repairs the target; None where a person has to.
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
    return [f"{target}: differs from {source}; without regions they are one file in two places"], ours


def compare_regions(source: Path, target: Path, ours: bytes, theirs: bytes) -> tuple[list[str], bytes | None]:
    """Compare the named regions of one file of two families; arguments and result as for `compare`."""
    messages, repaired, wanted, present = [], theirs, {}, {}
    for path, content, named in ((source, ours, wanted), (target, theirs, present)):
        try:
            named.update(regions(content))
        except ValueError as error:
            messages.append(f"{path}: {error}")
    if messages:
        return messages, None
    for name in wanted.keys() ^ present.keys():
        path, other = (target, source) if name in wanted else (source, target)
        messages.append(f"{path}: has no region {name!r}, which {other} has; put the markers where it belongs")
    is_repairable = not messages
    for name in wanted.keys() & present.keys():
        if wanted[name] != present[name]:
            messages.append(f"{target}: region {name!r} differs from {source}")
            repaired = repaired.replace(present[name], wanted[name])
    return messages, repaired if is_repairable else None


def main() -> None:
    """Print the differences; exit with 1 when there are any that were not repaired."""
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
            messages, repaired = compare(source_dir / name, target_dir / name)
            is_fixed = bool(messages) and options.fix and repaired is not None
            if is_fixed:
                (target_dir / name).write_bytes(repaired)
            num_left += 0 if is_fixed else len(messages)
            for message in messages:
                print(("repaired: " if is_fixed else "") + message)
    if num_left:
        print(f"{num_left} differences left; `python tools/check_copies.py --fix` copies from {source_dir.name}")
    sys.exit(bool(num_left))


if __name__ == "__main__":
    main()
