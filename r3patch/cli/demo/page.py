"""The demo's part of its report, which is the first: what the arms came to, and the excerpt."""

from __future__ import annotations

from html import escape

from r3patch.cli import report
from r3patch.cli._figures import Figure
from r3patch.cli.demo import told
from r3patch.cli.demo.picture import pictures
from r3patch.cli.demo.results import Curves, Excerpt


def lead(curves: Curves, excerpt: Excerpt | None) -> str:
    """HTML for the head of the page."""
    first, *rest = pictures(curves)
    small = "".join(map(_figure, rest))
    parts = [
        '<section id="demo"><h2>The same weights, trained on in four ways</h2>',
        "".join(f"<p>{escape(text)}</p>" for text in told.reading(curves)),
        '<div style="display:flex;flex-wrap:wrap;gap:2rem">',
        f'<div style="flex:3 1 420px;min-width:0">{_figure(first)}</div>',
        '<div style="flex:1 1 260px;min-width:0;display:flex;flex-direction:column;gap:1.5rem">',
        f"{small}</div></div></section>",
    ]
    if excerpt is not None:
        parts.append(_excerpt(excerpt))
    return "\n".join(parts)


def _figure(figure: Figure) -> str:
    return f"<figure>{report.picture(figure, figure.title)}</figure>"


def _excerpt(excerpt: Excerpt) -> str:
    marked = {difference.place for difference in excerpt.differences}
    text = "".join(
        f"<mark>{escape(character)}</mark>" if place in marked else escape(character)
        for place, character in enumerate(excerpt.text)
    )
    rows = "".join(
        f"<li>{escape(told.difference_line(difference, excerpt.text))}</li>"
        for difference in excerpt.differences[: told.SHOWN]
    )
    return (
        f'<section id="excerpt"><h2>In a few tokens</h2><p>{escape(told.caption(excerpt))}</p>'
        f"<p><code>{text}</code></p><ul>{rows}</ul></section>"
    )
