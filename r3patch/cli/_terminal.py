"""What commands print with: rich, from the extra ``cli``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """A rich console on standard output."""
    return Console(highlight=False)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Padding:
    """A table without lines, whose cells fold where the terminal is narrow.

    Args:
        headings: column names; none for a table without a head.
        rows: strings with rich markup, or rich objects.
    """
    grid = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD if headings else None,
        show_header=bool(headings),
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    rows = list(rows)
    for number in range(max(map(len, [headings, *rows]), default=0)):
        grid.add_column(headings[number] if headings else "", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return Padding(grid, (0, 0, 1, 0))


def plain(text: str) -> str:
    """Text that is no markup: paths and settings have brackets of their own."""
    return escape(text)


def paragraph(text: str) -> Padding:
    """Text as it is, without markup, indented and followed by an empty line."""
    return Padding(Text(text), (0, 0, 1, 2))
