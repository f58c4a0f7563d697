"""Progress that moves: bars in a terminal, lines in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from r3patch.cli.demo.results import Point, change

#: Called with an arm's name, its points so far, and what is new: a point, or None for a step.
Show = Callable[[str, list[Point], Point | None], None]


@contextmanager
def shown(out: Console, names: Sequence[str], steps: int) -> Iterator[Show]:
    """Of arms that take so many steps each."""
    out.print(f"training {len(names)} arms of {steps} steps", soft_wrap=True)
    if not out.is_terminal:
        yield lambda name, points, news: _line(out, name, points, news, steps)
        return
    out.print("(beside the bars: change in accepted drafts, in points)")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[change]}", justify="right"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True, expand=True) as bars:
        tasks = {name: bars.add_task(name, total=None, change="", start=False) for name in names}

        def show(name: str, points: list[Point], news: Point | None) -> None:
            task = tasks[name]
            if news is not None and news.step == 0:
                bars.start_task(task)
                bars.update(task, total=steps)
                return
            bars.update(task, advance=1, change=f"{change(points):+.1f}")

        yield show


def _line(out: Console, name: str, points: list[Point], news: Point | None, steps: int) -> None:
    if news is not None:
        out.print(
            f"{name}: step {news.step} of {steps}, {news.accepted:.1%} of drafts accepted"
            + (f" ({change(points):+.1f})" if news.step else ""),
            soft_wrap=True,
        )
