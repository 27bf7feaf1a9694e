"""Markdown tables and texts side by side, laid out by rich, which knows that a Chinese character takes two cells."""

from rich.box import MARKDOWN, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glm_utils.visible_text import one_line, visible

MIN_CELLS = 10  # of a column of text
MAX_TABLE_CELLS = 100_000  # wide enough that no cell of a Markdown table is ever wrapped
GAP = " | "
BARS = Box("\n".join(["    ", *["  | "] * 6, "    "]), ascii=True)  # a bar between columns and nothing else


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return an aligned Markdown table: the first column to the left, all others to the right.

    Args:
        header: The titles of the columns, as plain text.
        rows: The cells, as plain text.
    """
    table = Table(box=MARKDOWN)
    for index, title in enumerate(header):
        table.add_column(escaped(title), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escaped, row))
    titles, line, *body = render(table, MAX_TABLE_CELLS).strip().splitlines()
    # rich's line under the titles does not say how a column is aligned
    first, *others = (len(part) - len("  ") for part in line.strip("|").split("|"))
    marks = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    return "\n".join([titles, f"| {GAP.join(marks)} |", *body])


def escaped(cell: str) -> Text:
    """Return the text of a Markdown cell, in which rich finds no markup and Markdown no end of the cell."""
    return Text(one_line(cell).replace("|", "\\|"))


def side_by_side(texts: dict[str, str], num_cells: int) -> str:
    """Return texts as columns of equal width under their titles; words are split only where they exceed a line.

    Args:
        texts: The texts by their titles.
        num_cells: Width of the terminal.
    """
    width = max(MIN_CELLS, (num_cells - len(GAP) * (len(texts) - 1)) // len(texts))
    table = Table(box=BARS, show_edge=False, show_header=False, pad_edge=False)
    for _ in texts:
        table.add_column(width=width, overflow="fold")
    lines = {visible(title): "\n".join(visible(text).expandtabs().splitlines()) for title, text in texts.items()}
    table.add_row(*(Text(f"{title}\n{'-' * width}\n{text}") for title, text in lines.items()))
    rendered = render(table, len(texts) * (width + len(GAP)) - len(GAP))
    return "\n".join(line.rstrip() for line in rendered.splitlines())


def render(table: Table, num_cells: int) -> str:
    """Return a table as plain text, whatever the terminal and the environment are.

    Args:
        table: A table without styles that matter.
        num_cells: Most cells of a line.
    """
    console = Console(width=num_cells, height=1, legacy_windows=False)  # a size that is not asked of the terminal
    return "".join(segment.text for segment in console.render(table))
