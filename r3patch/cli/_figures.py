"""The figures of a report, drawn by matplotlib into SVG text.

Each is about as wide as the screen of a phone, so that its letters stay legible there.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib import colors, ticker
from matplotlib.figure import Figure as Canvas

from r3patch.observe.history import History
from r3patch.observe.reader import Load

_WIDTH, _HEIGHT = 5.2, 3.2  # inches
INK, _GRID, _VOID = "#22262b", "#d9dce0", "#eceef0"
_COLORS = ("#0b6e99", "#c2571a", "#5b7f2b", "#7a4fa3")
_MAX_PHASES = 4
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names of notes and phases may have a $
    "svg.fonttype": "path",
    "svg.hashsalt": "r3patch",  # the same numbers give the same bytes
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows, and the same in words for those who do not see it."""

    title: str
    caption: str
    svg: str
    alt: str


def figures(history: History) -> list[Figure]:
    """Those for which the traces have numbers."""
    mpl.use("svg")
    phases = list(history.phases.items())[:_MAX_PHASES] or [("", history)]
    drawn: list[Figure | None] = []
    with mpl.rc_context(STYLE):
        for name, phase in phases:
            of_phase = [
                _mismatch(phase),
                _mismatch_over_steps(phase),
                _policy_gap(phase),
                _rows(phase),
            ]
            if name != phases[0][0]:
                of_phase = [
                    figure and replace(figure, caption=f"As above, in {_legible(name)}.")
                    for figure in of_phase
                ]
            drawn += [_named(figure, name if len(phases) > 1 else "") for figure in of_phase]
        for num_experts, loads in sorted(history.loads.items()):
            name = f"{num_experts} experts" if len(history.loads) > 1 else ""
            drawn += [_named(_load(loads, padding=padding), name) for padding in (False, True)]
    return [figure for figure in drawn if figure is not None]


def _named(figure: Figure | None, name: str) -> Figure | None:
    return figure and replace(figure, title=f"{figure.title}, {name}" if name else figure.title)


def _axes(rows: int = 1, height: float = _HEIGHT, *, sharex: bool = True) -> tuple[Any, Any]:
    figure = Canvas(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0]


def svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", dpi=200, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _step_label(history: History) -> str:
    return "step" if history.numbered else "session"


def _mismatch(history: History) -> Figure | None:
    if not history.total("rows_measured"):
        return None
    grid = [
        [history.worst.get((layer, step), math.nan) for step in history.steps]
        for layer in history.layers
    ]
    highest = max(history.worst.values())
    figure, (axes,) = _axes()
    # One scale for every run, and finer where healthy runs are: reports can be laid side by side.
    scale = colors.PowerNorm(0.6, vmin=0, vmax=1)
    image = _heat(axes, grid, history.layers, cmap="YlOrRd", norm=scale)
    _label_steps(axes, history)
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 0.02, 0.1, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1, 0))
    bar.set_label("router calls that differ")
    whole = history.total("rows_differing") / history.total("rows_measured")
    return Figure(
        "Mismatch by layer and step",
        "Fraction of replayed rows whose set of experts is not the one that Megatron would have "
        "chosen, in the worst session and rank of each step. A pale, even field is healthy. Dark "
        "everywhere: routes shifted by a layer, or of other weights. Dark columns: stale rows. "
        "Grey: nothing was replayed or measured. Megatron is asked on inputs that replay has made "
        "in the layers before, so without replay more would differ.",
        svg(figure),
        f"Heat map: {whole:.1%} of router calls differ over all layers and steps, {highest:.1%} at "
        "most.",
    )


def _mismatch_over_steps(history: History) -> Figure | None:
    if not history.total("rows_measured"):
        return None
    rows = _quotients(history.by_step("rows_differing"), history.by_step("rows_measured"))
    figure, (axes,) = _axes()
    _line(axes, history.steps, rows, "router calls", 0)
    worst = [
        max(value for (_, of), value in history.worst.items() if of == step)
        if any(of == step for _, of in history.worst)
        else math.nan
        for step in history.steps
    ]
    _line(axes, history.steps, worst, "worst layer, session and rank", 2)
    if history.tokens:
        steps = sorted(history.tokens)
        values = [history.tokens[step][1] / history.tokens[step][0] for step in steps]
        name = "tokens (at least)" if history.tokens_are_bounds else "tokens"
        _line(axes, steps, values, name, 1)
    axes.set(xlabel=_step_label(history), ylabel="fraction that differs")
    _from_zero(axes, percent=True)
    axes.legend()
    bound = (
        " Pipeline stages are traced apart, so the fraction of tokens is a lower bound."
        if history.tokens_are_bounds
        else ""
    )
    return Figure(
        "Mismatch over steps",
        "Router calls that differ, over all layers, sessions and ranks and in the worst of them, "
        "and tokens that differ in at least one layer." + bound,
        svg(figure),
        f"Lines: router calls differ by {_first_last(rows)} from the first to the last step.",
    )


def _policy_gap(history: History) -> Figure | None:
    labels = {
        "mean_abs": "mean |Δ log p|",
        "k3": "k3 KL",
        "above_2": "ratio > 2",
    }
    panels = {m: found for m in labels if (found := history.gap_series(m))}
    if not panels:
        return None
    figure, axes = _axes(len(panels), height=1.3 + 1.25 * len(panels))
    prefixes = list(dict.fromkeys(prefix for found in panels.values() for prefix in found))
    for axis, (measure, found) in zip(axes, panels.items(), strict=True):
        for prefix, series in found.items():
            steps = sorted(series)
            name = _legible(prefix.replace("_", " ")) or "replay"
            _line(axis, steps, [series[s] for s in steps], name, prefixes.index(prefix))
        axis.set(ylabel=labels[measure])
        _from_zero(axis, percent=measure == "above_2")
    axes[-1].set(xlabel=_step_label(history))
    if len(prefixes) > 1:
        axes[0].legend(loc="upper left", bbox_to_anchor=(0, 1.35), ncols=3)
    last = {p or "replay": s[max(s)] for p, s in next(iter(panels.values())).items()}
    return Figure(
        "Policy gap",
        "Between the log-probs of the sampled tokens under trainer and rollout engine, as the "
        "sessions noted it: the mean of |Δ|, the k3 estimate of KL(rollout || train), and the "
        "fraction of tokens whose probabilities differ by more than a factor of 2.",
        svg(figure),
        f"Lines: the last {next(iter(panels))} is "
        + ", ".join(f"{value:.3g} ({name})" for name, value in last.items()),
    )


_SOURCES = {  # count -> name, color
    "rows_replayed": ("replayed", "#0b6e99"),
    "rows_live": ("live (no routes)", "#c9ced4"),
    "rows_spread": ("spread (no routes)", "#c2a878"),
}


def _rows(history: History) -> Figure | None:
    if not history.main:
        return None
    sources = {source: history.total(source) for source in _SOURCES if history.total(source)}
    figure, (over_steps, over_layers) = _axes(2, height=1.3 + 1.25 * 3, sharex=False)
    steps, layers = history.steps, history.layers
    _stack(over_steps, steps, {source: history.by_step(source) for source in sources})
    _stack(over_layers, layers, {source: history.by_layer(source) for source in sources})
    over_steps.set(xlabel=_step_label(history), ylabel="rows, all layers")
    over_layers.set(xlabel="layer", ylabel="rows, all steps")
    over_steps.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), handlelength=1)
    total = sum(sources.values()) or 1
    parts = ", ".join(f"{_SOURCES[source][0]} {n / total:.1%}" for source, n in sources.items())
    return Figure(
        "Rows by source",
        "Where the experts of the main routers' rows came from, by step and by layer. Rows without "
        "routes are padding, the last token of each sample, and samples whose routes are missing. "
        "A layer without a blue bar has an orphaned or bypassed router.",
        svg(figure),
        f"Bars: {parts}.",
    )


def _stack(axes: Any, places: Sequence[int], sources: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(places)
    width = 0.88 * min((b - a for a, b in pairwise(places)), default=1)
    for source, values in sources.items():
        name, color = _SOURCES[source]
        top = [a + b for a, b in zip(bottom, values, strict=True)]
        if len(places) <= 80:
            axes.bar(places, values, width=width, bottom=bottom, label=name, color=color)
        else:  # bars thinner than a pixel make patterns of their own
            axes.fill_between(places, bottom, top, step="mid", lw=0, label=name, color=color)
        bottom = top
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _load(loads: dict[int, Load], *, padding: bool) -> Figure | None:
    layers = sorted(loads)
    counts = [loads[layer].padding if padding else loads[layer].real for layer in layers]
    if not sum(map(sum, counts)):
        return None
    relative = [[n * len(row) / (sum(row) or math.nan) for n in row] for row in counts]
    log2 = [
        [math.log2(x) if x > 0 else (x if math.isnan(x) else -9.0) for x in r] for r in relative
    ]
    figure, (axes,) = _axes()
    image = _heat(axes, log2, layers, cmap="RdBu_r", vmin=-2, vmax=2)
    axes.set(xlabel="expert", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], extend="both", pad=0.02)
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
    bar.set_label("load / mean")
    highest = max(max(row) for row in relative if not math.isnan(row[0]))
    what = "Padding load" if padding else "Expert load"
    which = "padding rows" if padding else "rows of real tokens"
    return Figure(
        what,
        f"{which.capitalize()} of each expert over the mean of its layer. White is even; red gets "
        "more than its share, blue less.",
        svg(figure),
        f"Heat map: the fullest expert has {highest:.2f} times the mean of its layer.",
    )


def _heat(axes: Any, grid: list[list[float]], layers: Sequence[int], **look: Any) -> Any:
    """Layers from the top down, as the model runs."""
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", **look)
    axes.set_facecolor(_VOID)
    axes.grid(visible=False)
    every = max(1, math.ceil(len(layers) / 12))
    axes.set_yticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    return image


def _label_steps(axes: Any, history: History) -> None:
    """Columns of a picture have places; steps may have gaps between them."""
    steps = history.steps
    axes.set(xlabel=_step_label(history), ylabel="layer")
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(
            lambda place, _: str(steps[int(place)]) if 0 <= place < len(steps) else ""
        )
    )


def _line(axes: Any, steps: Sequence[int], values: Sequence[float], name: str, color: int) -> None:
    marker = "o" if len(steps) <= 40 else ""
    color_ = _COLORS[color % len(_COLORS)]
    # What a run that blew up has noted: beyond these, matplotlib's own arithmetic overflows.
    values = [value if abs(value) < 1e100 else math.nan for value in values]
    axes.plot(steps, values, color=color_, label=name, marker=marker, markersize=2.5)


def _from_zero(axes: Any, *, percent: bool) -> None:
    """Axes of sizes begin at 0: a cut one makes noise look like a trend."""
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))


def _legible(text: str) -> str:
    """Without control characters, which no SVG may hold, and short enough for a legend."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:40]


def _quotients(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    return [a / b if b else math.nan for a, b in zip(parts, wholes, strict=True)]


def _first_last(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} to {values[-1]:.1%}"
