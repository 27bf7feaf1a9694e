"""Lay texts side by side in a terminal, where a Chinese character takes two cells."""

import itertools
import unicodedata
from collections.abc import Iterator

GAP = " | "
MIN_CELLS = 10  # of a column


def side_by_side(texts: dict[str, str], num_cells: int) -> str:
    """Return texts as columns of equal width under their titles.

    Args:
        texts: The texts by their titles.
        num_cells: Width of the terminal.
    """
    width = max(MIN_CELLS, (num_cells - len(GAP) * (len(texts) - 1)) // len(texts))
    columns = [[*wrap(title, width), "-" * width, *wrap(text, width)] for title, text in texts.items()]
    lines = (
        GAP.join(map(pad, parts, [width] * len(parts))) for parts in itertools.zip_longest(*columns, fillvalue="")
    )
    return "\n".join(line.rstrip() for line in lines)


def wrap(text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text, cut at the last space where there is one, else anywhere.

    Args:
        text: Any text.
        width: Most cells of a line, 2 or more.
    """
    for line in text.expandtabs().splitlines() or [""]:
        while count_cells(line) > width:
            ends = list(itertools.accumulate(map(count_cells, line)))
            fit = sum(end <= width for end in ends)
            cut = line.rfind(" ", 1, fit + 1)
            splits_word = line[fit - 1].isascii() and line[fit].isascii()
            fit = cut if cut > 0 and splits_word else fit
            yield line[:fit].rstrip()
            line = line[fit:].lstrip()
        yield line


def pad(text: str, width: int) -> str:
    """Fill a line up with spaces."""
    return text + " " * (width - count_cells(text))


def count_cells(text: str) -> int:
    """Return the cells that a text takes. Source: Unicode, UAX 11 (East Asian Width)."""
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me", "Cf") else
        2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
        for character in text
    )  # fmt: skip
