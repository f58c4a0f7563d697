"""What commands print with: rich, from the extra ``cli``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from r3patch._errors import R3PatchError


def need(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        R3PatchError: it is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise R3PatchError(
            f"this needs {module.partition('.')[0]} ({error}). Install it by: "
            f"pip install 'r3patch[{extra}]'"
        ) from error


def console() -> Any:
    """A rich console on standard output."""
    return need("rich.console", "cli").Console(highlight=False)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A table without lines, whose cells fold where the terminal is narrow.

    Args:
        headings: column names; none for a table without a head.
        rows: strings with rich markup, or rich objects.
    """
    grid = need("rich.table", "cli").Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=need("rich.box", "cli").SIMPLE_HEAD if headings else None,
        show_header=bool(headings),
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    rows = list(rows)
    for number in range(max(map(len, [headings, *rows]), default=0)):
        grid.add_column(headings[number] if headings else "", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return need("rich.padding", "cli").Padding(grid, (0, 0, 1, 0))


def plain(text: str) -> str:
    """Text that is no markup: paths and settings have brackets of their own."""
    return str(need("rich.markup", "cli").escape(text))


def paragraph(text: str) -> Any:
    """Text as it is, without markup, indented and followed by an empty line."""
    return need("rich.padding", "cli").Padding(need("rich.text", "cli").Text(text), (0, 0, 1, 2))
