"""Tables that a command writes into a page, between marks on lines of their own."""

from __future__ import annotations

import re
from pathlib import Path


def write(page: Path, name: str, table: str) -> None:
    """Put a table between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        SystemExit: the page does not have these marks once.
    """
    new, found = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
        lambda marks: f"{marks[1]}{table}\n{marks[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(
            f"{page} has {found} places between <!-- {name} --> and <!-- /{name} -->, expected "
            "one, each mark on a line of its own"
        )
    page.write_text(new)
