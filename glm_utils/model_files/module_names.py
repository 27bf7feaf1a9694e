r"""Which modules the names in adapter_config.json stand for, without running a regular expression from a file.

peft matches names in lists by their end, at a dot, and evaluates names given as one text and the keys of its patterns
as regular expressions. Their usual forms are read here as what they say: `name`, `^path`, `.*\.name`, `.*(a|b)$`.
Source: peft 0.21, tuners/tuners_utils.py (check_target_module_exists) and utils/other.py (get_pattern_key).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from glm_utils.cli import UserError
from glm_utils.model_files.model_json import shown

ALL_LINEAR = "all-linear"
MAX_NAME_CHARACTERS = 1000
PLAIN_NAME = re.compile(r"\w+(?:\.\w+)*", re.ASCII)
_NAME = r"\w+(?:\\?\.\w+)*"
# Every character can be read in one way only, so that matching takes time in proportion to the text
LITERAL = re.compile(
    rf"(?P<start>\^)?(?P<any>\.\*(?P<dot>\\?\.)?)?(?:(?P<name>{_NAME})|\((?:\?:)?(?P<names>{_NAME}(?:\|{_NAME})*)\))\$?",
    re.ASCII,
)
REMEDY = 'Write the names of the modules as a list, e.g. ["query_key_value", "dense"]'


@dataclass(frozen=True)
class ModuleNames:
    """A set of modules by name.

    Attributes:
        endings: Names that a module's path ends with, at a dot or as a whole.
        paths: Whole paths.
        tails: What a path ends with, not only at a dot.
        is_all: Every linear layer.
    """

    endings: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()
    tails: tuple[str, ...] = ()
    is_all: bool = False

    def __contains__(self, path: str) -> bool:
        return (
            self.is_all
            or path in self.paths
            or path.endswith(self.tails)
            or any(ending in self.endings for ending in endings_of(path))
        )


def is_module_name(text: str) -> bool:
    """Return whether a text is a module's name or path: words with dots between them."""
    return len(text) <= MAX_NAME_CHARACTERS and PLAIN_NAME.fullmatch(text) is not None


def endings_of(path: str) -> Iterator[str]:
    """Yield the path and what follows each of its dots, e.g. a.b.c, b.c, c."""
    while path:
        yield path
        path = path.partition(".")[2]


def read_names(value: object, key: str, source: Path) -> ModuleNames | None:
    """Read target_modules or exclude_modules.

    Args:
        value: A list of names, one name, "all-linear", a usual form of regular expression, or None.
        key: Its key, for messages.
        source: The file, for messages.

    Returns:
        The modules; None when nothing is named.

    Raises:
        UserError: Another type, or an expression that is not of a usual form.
    """
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return ModuleNames(is_all=True) if value.lower() == ALL_LINEAR else _parse(value, key, source)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{source}: {key} is {shown(value)}, expected names of modules. {REMEDY}")
    for name in value:
        if not is_module_name(name):
            raise UserError(f"{source}: {key} holds {shown(name)}, which is not a name of a module. {REMEDY}")
    return ModuleNames(frozenset(value))


def _parse(text: str, key: str, source: Path) -> ModuleNames:
    """Read one name or a usual form of regular expression."""
    match = LITERAL.fullmatch(text) if len(text) <= MAX_NAME_CHARACTERS else None
    if match is None or (match["any"] is None and match["names"]):
        raise UserError(
            f"{source}: {key} {shown(text)} is not a name of a module, and regular expressions of a file are not "
            f"run. {REMEDY}"
        )
    names = [name.replace("\\", "") for name in (match["name"] or match["names"]).split("|")]
    if match["any"] and not match["dot"]:
        return ModuleNames(tails=tuple(names))
    if match["start"] and not match["any"]:
        return ModuleNames(paths=frozenset(names))
    return ModuleNames(endings=frozenset(names))


class PatternTable:
    r"""Values by module name, as in rank_pattern: the first entry that fits a path counts.

    Args:
        entries: Values by name, `^path` or `.*\.name`.
        key: Its key, for messages.
        source: The file, for messages.

    Raises:
        UserError: A name that is a regular expression.
    """

    def __init__(self, entries: Mapping[str, float] = MappingProxyType({}), key: str = "", source: Path = Path()):
        self._endings: dict[str, tuple[int, float]] = {}
        self._paths: dict[str, tuple[int, float]] = {}
        for number, (text, value) in enumerate(entries.items()):
            names = _parse(text, key, source)
            if names.tails:
                raise UserError(f"{source}: {key} {shown(text)} is a regular expression. Write the module's name")
            for name in names.endings:
                self._endings.setdefault(name, (number, value))
            for name in names.paths:
                self._paths.setdefault(name, (number, value))

    def get(self, path: str, default: float) -> float:
        """Return the value of a module."""
        found = [self._endings[ending] for ending in endings_of(path) if ending in self._endings]
        found += [self._paths[path]] if path in self._paths else []
        return min(found)[1] if found else default


def summarize(paths: Iterable[str]) -> str:
    """Name one of several modules and count the rest."""
    first, *others = sorted(paths)
    return shown(first) + (f" and {len(others)} more" if others else "")
