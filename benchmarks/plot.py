"""The ratios of router.py as dots, release beside release, from the JSON of `python benchmarks`.

python benchmarks/plot.py build/bench.json [OLDER.json] --to docs/performance.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TITLES = {
    "softmax": "softmax",
    "pre_softmax": "softmax before top-k",
    "sigmoid_bias": "sigmoid, expert bias",
    "groups": "group-limited",
}
#: What router.py names, and in which order it stands: what costs least comes first.
ROWS = (
    "Megatron's RouterReplay",
    "global manager",
    "replay",
    "replay, 1 % gaps",
    "replay, 50 % gaps",
    "replay, 100 % gaps",
    "measure",
    "measure, 1 % gaps",
    "masked list, 1 % gaps",
    "record",
)
OURS, OLDER, OTHERS = "#0b6e99", "#d9822b", "#555555"


def draw(releases: dict[str, dict[str, Any]], to: Path) -> None:
    """Write the picture; `to` says by its suffix in which format.

    Args:
        releases: the figures of one or two runs by name, the newest last.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "r3patch", "font.size": 9}
    (newest, figures), *others = reversed(releases.items())
    older_name, older = others[0] if others else ("", None)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (routing, title) in zip(grid.flat, TITLES.items(), strict=True):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for place, name in enumerate(ROWS):
            ours = name.startswith(("replay", "measure", "record"))
            shift = 0.16 if ours and older else 0.0
            if older and ours:
                ratio = older["router"][routing][name]["stock"]
                _dot(axes, place - shift, ratio, OLDER, filled=False)
            ratio = figures["router"][routing][name]["stock"]
            _dot(axes, place + shift, ratio, OURS if ours else OTHERS)
    grid[0, 0].set_yticks(range(len(ROWS)), ROWS)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set_xlim(0.2, None)
    for axes in grid[1]:
        axes.set_xlabel("time of forward + backward, ratio to stock live routing")
    handles = [_handle(OURS, f"r3patch {newest}")]
    if older:
        handles.append(_handle(OLDER, f"r3patch {older_name}", filled=False))
    handles.append(_handle(OTHERS, "other managers"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None, dpi=110)


def _dot(axes: Any, y: float, ratio: dict[str, float], color: str, *, filled: bool = True) -> None:
    axes.plot([ratio["low"], ratio["high"]], [y, y], color=color, linewidth=1.2)
    face = color if filled else "white"
    axes.plot(ratio["median"], y, "o", markersize=5, color=color, markerfacecolor=face)


def _handle(color: str, label: str, *, filled: bool = True) -> Any:
    from matplotlib.lines import Line2D

    face = color if filled else "white"
    return Line2D([], [], color=color, marker="o", markersize=5, markerfacecolor=face, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="NAME=FILE, one or two, the newest last")
    parser.add_argument("--to", type=Path, default=Path("docs/performance.svg"))
    args = parser.parse_args()
    named = [run.partition("=") for run in args.runs]
    draw({name: json.loads(Path(file).read_text()) for name, _, file in named}, args.to)


if __name__ == "__main__":
    main()
