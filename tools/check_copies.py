"""Check that what the two families share is the same in both directories, and repair it on request.

    python tools/check_copies.py [--fix] [--scripts_dir remote_scripts]

Files listed in IDENTICAL_FILES must be byte-identical. In other files of the same name, a part between
`# region NAME` and `# endregion` must be identical to the region of that name in the other file. --fix copies from
chatglm-6b to chatglm2-6b. Exit code 1 when a difference is left.
"""

import argparse
import re
import sys
from pathlib import Path

SOURCE, TARGET = "chatglm-6b", "chatglm2-6b"
IDENTICAL_FILES = (
    "cuda_kernels.py",
    "cuda_source.py",
    "decoding_chatglm.py",
    "fused_chatglm.py",
    "generation_chatglm.py",
    "masking_chatglm.py",
    "packing_chatglm.py",
    "quantization.py",
)
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
    """Compare one file of both families.

    Args:
        source: The first family's file.
        target: The second family's.

    Returns:
        One message for each difference, and the content that repairs the target; None where a person has to.
    """
    for path, other in ((source, target), (target, source)):
        if not path.is_file() and source.name in IDENTICAL_FILES:
            content = source.read_bytes() if source.is_file() else None
            return [f"{path}: missing; it is the same file as {other}"], content
    if not (source.is_file() and target.is_file()):
        return [], None  # a file that only one family has
    ours, theirs = source.read_bytes(), target.read_bytes()
    if source.name in IDENTICAL_FILES:
        return ([f"{target}: differs from {source}; they are one file in two places"] if ours != theirs else []), ours
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
    unrepairable = bool(messages)
    for name in wanted.keys() & present.keys():
        if wanted[name] != present[name]:
            messages.append(f"{target}: region {name!r} differs from {source}")
            repaired = repaired.replace(present[name], wanted[name])
    return messages, None if unrepairable else repaired


def main() -> None:
    """Print the differences; exit with 1 when there are any that were not repaired."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help=f"copy from {SOURCE} to {TARGET}")
    parser.add_argument("--scripts_dir", type=Path, default=SCRIPTS_DIR, help="holds one directory for each family")
    options = parser.parse_args()
    names = {path.name for family in (SOURCE, TARGET) for path in (options.scripts_dir / family).glob("*.py")}
    num_left = 0
    for name in sorted(names | set(IDENTICAL_FILES)):
        target = options.scripts_dir / TARGET / name
        messages, repaired = compare(options.scripts_dir / SOURCE / name, target)
        fixed = bool(messages) and options.fix and repaired is not None
        if fixed:
            target.write_bytes(repaired)
        num_left += 0 if fixed else len(messages)
        for message in messages:
            print(("repaired: " if fixed else "") + message)
    if num_left:
        print(f"{num_left} differences left; `python tools/check_copies.py --fix` copies from {SOURCE} to {TARGET}")
    sys.exit(bool(num_left))


if __name__ == "__main__":
    main()
