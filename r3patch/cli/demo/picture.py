"""What the arms of the demo came to, drawn: the first figures of its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.figure import Figure as Canvas

from r3patch.cli import _figures
from r3patch.cli._figures import Figure
from r3patch.cli.demo.results import FROZEN, LEAK, PLAIN, REPLAY, Curves, Point, change

_COLORS = {
    PLAIN.name: "#7d858e",
    REPLAY.name: "#0b6e99",
    LEAK.name: "#c2571a",
    FROZEN.name: "#5b7f2b",
}


def pictures(curves: Curves) -> list[Figure]:
    """The change in accepted drafts, large, and two small ones: MTP loss and policy gap."""
    mpl.use("svg")
    with mpl.rc_context(_figures.STYLE):
        return [_accepted(curves), _losses(curves), _gaps(curves)]


def _accepted(curves: Curves) -> Figure:
    figure = Canvas(figsize=(5.8, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=_figures.INK, lw=0.8)
    _draw(
        axes,
        curves,
        lambda points: [100 * (point.accepted - points[0].accepted) for point in points],
        labels={name: f"{name}  {change(points):+.1f}" for name, points in curves.items()},
    )
    axes.set(xlabel="training step", ylabel="accepted drafts, change in points")
    axes.yaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: f"{value:+g}" if value else "0")
    )
    start = next(iter(curves.values()))[0].accepted
    ends = ", ".join(f"{change(points):+.1f} ({name})" for name, points in curves.items())
    return Figure(
        "Drafts that the engine accepts",
        f"Change in the share of MTP drafts that the main model accepts, from {start:.1%} before "
        "the first step, in percentage points. Greedy, natural routing, a bf16 copy on the whole "
        "text: as an engine serves the weights. All four arms train on the same batches.",
        _figures.svg(figure),
        f"Lines, at the end: {ends} points.",
    )


def _losses(curves: Curves) -> Figure:
    leak = curves[LEAK.name]
    figure = Canvas(figsize=(3.6, 2.1), layout="constrained")
    axes = figure.subplots()
    _draw(axes, curves, lambda points: [point.served_loss for point in points])
    axes.set(xlabel="training step", ylabel="MTP loss, nats")
    return Figure(
        "MTP loss as served",
        f"Of the same copies on the same text. Where replay reaches MTP, the trainer itself logs "
        f"{leak[1].trained_loss:.2f} to {leak[-1].trained_loss:.2f}, on no engine's routes.",
        _figures.svg(figure),
        "Lines, at the end: "
        + ", ".join(f"{points[-1].served_loss:.3f} ({name})" for name, points in curves.items()),
    )


def _gaps(curves: Curves) -> Figure:
    figure = Canvas(figsize=(3.6, 2.1), layout="constrained")
    axes = figure.subplots()
    _draw(axes, curves, lambda points: [point.gap for point in points])
    axes.set(xlabel="training step", ylabel="mean |Δ log p|")
    axes.set_ylim(bottom=0)
    return Figure(
        "Policy gap",
        "Between trainer and rollout, the figure that most people watch: at the end "
        f"{curves[PLAIN.name][-1].gap:.3f} without replay, {curves[REPLAY.name][-1].gap:.3f} with "
        f"it, {curves[LEAK.name][-1].gap:.3f} where it reaches MTP.",
        _figures.svg(figure),
        "Lines, at the end: "
        + ", ".join(f"{points[-1].gap:.3f} ({name})" for name, points in curves.items()),
    )


def _draw(
    axes: Any,
    curves: Curves,
    values: Callable[[list[Point]], list[float]],
    labels: dict[str, str] | None = None,
) -> None:
    """A line for each arm, with its label at its end, if it has one."""
    ends = {}
    for name, points in curves.items():
        heights = values(points)
        steps = [point.step for point in points]
        wide = 2.4 if labels and name in (REPLAY.name, LEAK.name) else 1.4
        axes.plot(steps, heights, color=_COLORS[name], lw=wide, solid_capstyle="round")
        ends[name] = (steps[-1], heights[-1])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.margins(x=0.01)
    if labels is None:
        return
    low, high = axes.get_ylim()
    apart = _apart([height for _, height in ends.values()], (high - low) / 16)
    for (name, (step, _)), height in zip(ends.items(), apart, strict=True):
        axes.annotate(
            labels[name], (step, height), (6, 0), color=_COLORS[name], weight="bold",
            textcoords="offset points", va="center", annotation_clip=False,
        )  # fmt: skip


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights, moved so that no two labels are closer than ``least``."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = [heights[index] for index in order]
    for _ in range(100):
        for place in range(1, len(moved)):
            short = least - (moved[place] - moved[place - 1])
            if short > 0:
                moved[place] += short / 2
                moved[place - 1] -= short / 2
    result = [0.0] * len(heights)
    for index, height in zip(order, moved, strict=True):
        result[index] = height
    return result
