"""All tables in one run: exactness first, then a router, sessions, and some stress.

    python benchmarks [short] [--json build/bench.json]

Prints ratios and judges none; the exit status is 1 where something is inexact. ``short`` takes
about a minute and its ratios mean little: it shows that everything here still runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import router
import sessions
import stress
import torch
from exactness import check
from stack import expect_foreign_routes
from timing import keep_freed_memory

from r3patch import testing


def main() -> None:
    expect_foreign_routes()
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("length", nargs="?", choices=["full", "short"], default="full")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    args = parser.parse_args()
    short = args.length == "short"
    torch.set_num_threads(1)
    keep_freed_memory()
    versions = router.versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    with testing.megatron_on_cpu():
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
