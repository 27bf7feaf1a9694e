"""Check that what the two families share is the same in both directories, and repair it on request.

python tools/check_copies.py [--fix]

Files listed in IDENTICAL_FILES must be byte-identical. In other files of the same name, a part between
`# region NAME` and `# endregion` must be identical to the region of that name in the other file. --fix copies from
chatglm-6b to chatglm2-6b.
"""

import argparse
import re
import sys
from pathlib import Path

SOURCE, TARGET = "chatglm-6b", "chatglm2-6b"
IDENTICAL_FILES = ("generation_chatglm.py", "masking_chatglm.py", "quantization.py")
REGION = re.compile(r"^# region (?P<name>.+?)\n.*?^# endregion$", re.DOTALL | re.MULTILINE)


def regions(text: str) -> dict[str, str]:
    """Return the named regions of a file, marker lines included."""
    return {match["name"]: match[0] for match in REGION.finditer(text)}


def check_copies(scripts_dir: Path, fix: bool = False) -> list[str]:
    """Compare the two families.

    Args:
        scripts_dir: The directory that holds one directory for each family.
        fix: Copy the first family's version over the second's.

    Returns:
        One message for each difference that was found (and repaired when ``fix``).
    """
    messages = []
    for source in sorted((scripts_dir / SOURCE).glob("*.py")):
        target = scripts_dir / TARGET / source.name
        source_text = source.read_text("utf-8")
        target_text = target.read_text("utf-8") if target.exists() else ""
        repaired = target_text
        if source.name in IDENTICAL_FILES:
            if source_text != target_text:
                messages.append(f"{target}: differs from {source}; they are one file in two places")
                repaired = source_text
        else:
            theirs = regions(target_text)
            for name, region in regions(source_text).items():
                if name not in theirs:
                    messages.append(f"{target}: has no region {name!r}, which {source} has")
                elif theirs[name] != region:
                    messages.append(f"{target}: region {name!r} differs from {source}")
                    repaired = repaired.replace(theirs[name], region)
        if fix and repaired != target_text:
            target.write_text(repaired, "utf-8")
    return messages


def main() -> None:
    """Print the differences; exit with 1 when there are any that were not repaired."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true")
    fix = parser.parse_args().fix
    messages = check_copies(Path(__file__).resolve().parent.parent / "remote_scripts", fix)
    for message in messages:
        print(("repaired: " if fix else "") + message)
    sys.exit(bool(messages) and not fix)


if __name__ == "__main__":
    main()
