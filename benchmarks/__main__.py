"""All tables in one run: exactness first, then a router, sessions, and some stress.

    python benchmarks [short] [--json build/bench.json]
    python benchmarks --device cuda [--seconds 150]      # on a GPU: what is another there

Prints ratios and judges none; the exit status is 1 where something is inexact. ``short`` takes
about a minute and its ratios mean little: it shows that everything here still runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import router
import sessions
import stress
import torch
from device import add_device, megatron_on
from exactness import InexactError, check
from stack import expect_foreign_routes
from timing import keep_freed_memory


def _on_gpu(device: torch.device, seconds: float, *, short: bool) -> tuple[Any, Any, bool]:
    """The figures of a GPU, of what is inexact too: it is said, and the rest is wanted."""
    inexact = False
    try:
        print(f"{check(0.1 if short else 0.5, device)} cases of exactness.py are exact", flush=True)
    except InexactError as error:
        print(f"inexact: {error}", flush=True)
        inexact = True
    table = router.on_gpu(device, 5 if short else 30, seconds / 2)
    found = sessions.on_gpu(device, seconds / 6, short=short)
    return table, found, inexact


def main() -> None:
    expect_foreign_routes()
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("length", nargs="?", choices=["full", "short"], default="full")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--seconds", type=float, default=150.0, help="on a GPU, about")
    add_device(parser)
    args = parser.parse_args()
    short = args.length == "short"
    torch.set_num_threads(1)
    keep_freed_memory()
    versions = router.versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    with megatron_on(args.device):
        if args.device.type == "cuda":
            table, found, inexact = _on_gpu(args.device, args.seconds, short=short)
        else:
            print(f"{check(0.1 if short else 1.0)} cases of exactness.py are exact", flush=True)
            table = router.run(4096, 5 if short else 60)
            router.show(table)
            found = sessions.run(short=short)
            print("\nstress")
            inexact = stress.many(seed=0, seconds=5 if short else 60, shrink_first=5)
    figures = {
        "versions": versions,
        "router": table,
        "sessions": found,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, default=vars, indent=1) + "\n")
    raise SystemExit(inexact)


if __name__ == "__main__":
    main()
