"""``r3patch demo``: what replay closes, and what it costs where it reaches an MTP layer.

A small GLM-shaped model, pretrained on a page of text, is trained on from the same weights in four
ways: without replay, with replay, with replay that also reaches the MTP router, as it does where
routers carry no label, and with replay while MTP is not trained. Each is then served.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from r3patch.cli.demo import progress, told, work
from r3patch.cli.demo.results import ARMS, WEIGHTS, Curves, Excerpt, Point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, default=40, help="of training, each way (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches (0)")
    parser.add_argument(
        "--workers", type=_positive, default=_cores(), help="processes; as a rule one per core"
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="of tools/demo_weights.py (those shipped)"
    )
    parser.add_argument(
        "-o", "--output", default="r3patch-demo.html", metavar="FILE", help="the report"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 130 where it was interrupted."""
    from r3patch.cli._terminal import console

    out = console()
    _check_packages()
    _check_writable(Path(args.output))
    args.weights.open("rb").close()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "demo.jsonl")
            curves, excerpt = _train(args, out, trace)
            told.tell(out, curves, excerpt)
            _write_report(Path(args.output), trace, curves, excerpt)
    except KeyboardInterrupt:
        out.print("Interrupted, nothing written.")
        return 130
    seconds = time.monotonic() - began
    out.print(f"{args.output} has the pictures. This took {seconds:.0f} seconds.", soft_wrap=True)
    return 0


def _train(args: argparse.Namespace, out: Console, trace: Path) -> tuple[Curves, Excerpt | None]:
    """All arms, in worker processes."""
    curves: Curves = {arm.name: [] for arm in ARMS}
    excerpt = None
    task = work.Task(args.steps, args.seed, args.weights, trace)
    with progress.shown(out, list(curves), args.steps) as show:
        for arm, news in work.run(ARMS, task, min(args.workers, len(ARMS))):
            if isinstance(news, Excerpt):
                excerpt = news
                continue
            if isinstance(news, Point):
                curves[arm.name].append(news)
            show(arm.name, curves[arm.name], news)
    return curves, excerpt


def _write_report(path: Path, trace: Path, curves: Curves, excerpt: Excerpt | None) -> None:
    from r3patch.cli import report
    from r3patch.cli.demo import page
    from r3patch.observe import history as histories

    history = histories.load([str(trace)])
    about = "The sessions of the arm with replay"
    text = report.page(history, "r3patch demo", about, page.lead(curves, excerpt))
    path.write_text(text, encoding="utf-8")


def _check_packages() -> None:
    """What is missing is told now, not after the training."""
    for package in ("torch", "megatron.core", "safetensors", "matplotlib"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # its parent
            found = None
        if found is None:
            raise ImportError(f"No module named {package!r}", name=package)


def _check_writable(path: Path) -> None:
    there = path.exists()
    with path.open("ab"):
        pass
    if not there:
        path.unlink()


def _cores() -> int:
    """Those that this process may use, as far as arms can use them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number
