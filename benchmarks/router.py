"""A router's forward and backward in a session, as ratios to stock live routing in one run.

    python benchmarks/router.py [--tokens 4096] [--repeats 60] [--short] [--no-check]
    python benchmarks/router.py --profile [--tokens 4096]     # what replay adds to native replay
    python benchmarks/router.py --device cuda [--seconds 90]  # launching and running, by sizes

Stock Megatron's ``TopKRouter`` on a CPU, one thread, hidden size 32, 128 experts, top-8: the router
next to no model at all, so that the ratios are as far from 1 as they can be. First the grid of
exactness.py is checked, and what is not exact is not measured (`--no-check` is for releases that
are known not to be). How ratios are taken: timing.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from device import CPU, add_device, megatron_on
from exactness import check
from managers import GlobalManager, MaskedList
from stack import ROUTINGS, Stack, expect_foreign_routes, random_routes
from timing import Ratio, Variant, keep_freed_memory, launching, measure, ratio, running
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import r3patch
from r3patch import Routes

HIDDEN, EXPERTS, TOPK = 32, 128, 8
#: Tokens, experts and hidden size of the tables of a GPU; of what matters most first.
SIZES = list(itertools.product((4096, 32768), (128, 256), (4096, 32)))
GAPS = (0.01, 0.5, 1.0)
Table = dict[str, dict[str, dict[str, Ratio]]]  # routing, variant, "stock" or "native"
Operations = dict[str, tuple[int, float]]  # by name: how many, and microseconds, of one call


def run(tokens: int, repeats: int) -> Table:
    """Ratios of every variant, by score function."""
    return {routing: _routing(routing, tokens, repeats) for routing in ROUTINGS}


def _routing(routing: str, tokens: int, repeats: int) -> dict[str, dict[str, Ratio]]:
    bench = _Bench(routing, tokens)
    managers = {
        "global manager": bench.manager(GlobalManager(), bench.sentinel(GAPS[0])),
        "masked list, 1 % gaps": bench.manager(MaskedList(), bench.masked(GAPS[0])),
    }
    with _variants(bench, managers) as variants:
        seconds = measure(variants, repeats)
    return _ratios(seconds)


@contextlib.contextmanager
def _variants(bench: _Bench, managers: dict[str, Variant]) -> Iterator[dict[str, Variant]]:
    """All there is to compare, with its sessions open."""
    variants: dict[str, Variant] = {
        "stock, live": bench.variant(bench.stack()),
        "Megatron's RouterReplay": bench.native(),
        **managers,
    }
    with contextlib.ExitStack() as sessions:

        def replay(gaps: float, **options: Any) -> Variant:
            stack, routes = bench.stack(), bench.routes(gaps)
            session = sessions.enter_context(r3patch.replay(stack, **options))
            return bench.variant(stack, lambda: session.feed(routes))

        variants["replay"] = replay(0.0)
        for gaps in GAPS:
            variants[f"replay, {gaps:.0%} gaps".replace("%", " %")] = replay(gaps)
        variants["measure"] = replay(0.0, measure=True)
        variants["measure, 1 % gaps"] = replay(GAPS[0], measure=True)
        stack = bench.stack()
        sessions.enter_context(r3patch.record(stack))
        variants["record"] = bench.variant(stack)
        yield variants


def _ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, Ratio]]:
    return {
        name: {
            "stock": ratio(seconds[name], seconds["stock, live"]),
            "native": ratio(seconds[name], seconds["Megatron's RouterReplay"]),
        }
        for name in seconds
    }


def on_gpu(device: torch.device, repeats: int, limit: float) -> dict[str, Any]:
    """Microseconds, and ratios, of launching a call and of running it: printed as they come.

    Args:
        device: the GPU.
        repeats: rounds of each table, of which there are `SIZES` x `ROUTINGS` x two clocks.
        limit: seconds of all together; late tables have fewer rounds.
    """
    found: dict[str, Any] = {}
    cases = list(itertools.product(SIZES, ROUTINGS))
    deadline = time.monotonic() + limit
    for number, ((tokens, experts, hidden), routing) in enumerate(cases):
        title = f"{routing}, {tokens} tokens, {experts} experts, hidden size {hidden}"
        share = max(0.0, deadline - time.monotonic()) / (len(cases) - number) / 2
        try:
            bench = _Bench(routing, tokens, experts=experts, hidden=hidden, device=device)
            control = {"Megatron's RouterReplay, again": bench.native()}
            with _variants(bench, control) as variants:
                clocks = {
                    name: measure(variants, repeats, clock=clock, limit=share)
                    for name, clock in (("host", launching), ("device", running))
                }
        except Exception as error:  # noqa: BLE001 - the other tables are wanted all the same
            print(f"\n{title}: {type(error).__name__}: {error}", flush=True)
            continue
        found[title] = _show_clocks(title, clocks)
    return found


def _show_clocks(title: str, clocks: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    rounds = len(next(iter(clocks["device"].values())))
    print(f"\n{title} ({rounds} rounds)")
    columns = f"{'stock':>7}{'native':>8}"
    print(f"  {'':33}{'host us':>9}{columns}{'device us':>12}{columns}")
    ratios = {clock: _ratios(seconds) for clock, seconds in clocks.items()}
    found: dict[str, Any] = {}
    for name in clocks["host"]:
        cells, found[name] = "", {}
        for clock, width in (("host", 9), ("device", 12)):
            spent = statistics.median(clocks[clock][name]) * 1e6
            to = ratios[clock][name]
            cells += f"{spent:{width}.0f}{to['stock']!s:>7}{to['native']!s:>8}"
            found[name][clock] = {"microseconds": spent, **to}
        print(f"  {name:33}{cells}", flush=True)
    return found


class _Bench:
    """One score function: routers with the same weights, and the same input."""

    def __init__(
        self,
        routing: str,
        tokens: int,
        *,
        experts: int = EXPERTS,
        hidden: int = HIDDEN,
        device: torch.device = CPU,
    ) -> None:
        self.routing, self.tokens, self.device = routing, tokens, device
        self.experts, self.hidden = experts, hidden
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(tokens, 1, hidden, generator=generator).to(device)
        self.gradient = torch.randn(tokens, experts, generator=generator).to(device)

    def stack(self) -> Stack:
        return Stack(
            self.routing,
            1,
            hidden_size=self.hidden,
            num_moe_experts=self.experts,
            moe_router_topk=TOPK,
        ).to(self.device)

    def routes(self, gaps: float) -> Routes:
        return random_routes((1,), self.tokens, experts=self.experts, topk=TOPK, seed=1, gaps=gaps)

    def variant(self, stack: Stack, prepare: Callable[[], object] = lambda: None) -> Variant:
        (router,) = stack.routers

        def step() -> None:
            probs, _ = router(self.input)
            probs.backward(self.gradient)

        return Variant(step, prepare)

    def native(self) -> Variant:
        """Megatron's own replay, its targets in place: int64 ids on the device."""
        from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

        stack, replay = self.stack(), RouterReplay()
        replay.set_target_indices(self.routes(0.0).experts[:, 0].long().to(self.device))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        stack.routers[0].router_replay = replay
        return self.variant(stack)

    def manager(self, manager: Any, rows: tuple[torch.Tensor, ...]) -> Variant:
        stack = self.stack()
        stack.routers[0].router_replay = manager
        return self.variant(stack, lambda: manager.add(*rows))

    def sentinel(self, gaps: float) -> tuple[torch.Tensor]:
        ids, mask = self.masked(gaps)
        return (ids.masked_fill(~mask.unsqueeze(1), -1),)

    def masked(self, gaps: float) -> tuple[torch.Tensor, torch.Tensor]:
        routes = self.routes(gaps)
        assert routes.valid is not None
        return routes.experts[:, 0].long(), routes.valid[:, 0]


def profile(routing: str, tokens: int, repeats: int) -> None:
    """Print which operations a replayed call runs beside those of native replay, and their time."""
    bench = _Bench(routing, tokens)
    stack, twin = bench.stack(), bench.stack()
    with r3patch.replay(stack) as session, r3patch.replay(twin) as other:
        # What no other way to sort comes under; its bits are not Megatron's.
        twin.routers[0].router_replay._ordered = {False: False, True: False}
        variants = {
            "native": bench.native(),
            "replay": bench.variant(stack, lambda: session.feed(bench.routes(0.0))),
            "without the order": bench.variant(twin, lambda: other.feed(bench.routes(0.0))),
        }
        seconds = measure(variants, repeats)
        native, ours = (_operations(variants[name], repeats) for name in ("native", "replay"))
    native_time = statistics.median(seconds["native"]) * 1e6
    print(f"\n{routing}, {tokens} tokens: forward and backward of a call, replay less native")
    print(f"  {'operation':24}{'calls':>8}{'us':>8}{'of native':>11}")
    for name in sorted(ours, key=lambda n: native.get(n, (0, 0))[1] - ours[n][1]):
        count, spent = (a - b for a, b in zip(ours[name], native.get(name, (0, 0)), strict=True))
        if count >= 1 and spent >= 5:  # microseconds: the rest is views
            print(f"  {name:24}{count:8.0f}{spent:8.0f}{spent / native_time:11.3f}")
    for name in ("replay", "without the order"):
        more = ratio(seconds[name], seconds["native"]).median - 1
        print(f"  {f'{name}, not profiled':32}{more * native_time:8.0f}{more:11.3f}")


def _operations(variant: Variant, calls: int) -> Operations:
    for _ in range(calls):
        variant.prepare()
    with profiler(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            variant.run()
    times = defaultdict(list)
    for event in profiled.events():
        times[event.name].append(event.self_cpu_time_total)
    found = {}
    for name, spent in times.items():
        count = len(spent) // calls
        by_call = [sum(spent[i * count : (i + 1) * count]) for i in range(calls)]
        found[name] = count, statistics.median(by_call)
    return found


def versions() -> dict[str, str]:
    """What was measured, and on what."""
    found = {name: metadata.version(name) for name in ("torch", "megatron-core")}
    found = {"r3patch": r3patch.__version__, **found, "python": platform.python_version()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return found | ({"GPU": gpu} if gpu else {})


def show(table: Table) -> None:
    for reference, title in (
        ("stock", "stock live routing"),
        ("native", "Megatron's RouterReplay"),
    ):
        print(f"\nratio to {title:26}" + "".join(f"{routing:>14}" for routing in table))
        for name in next(iter(table.values())):
            cells = (str(table[routing][name][reference]) for routing in table)
            print(f"  {name:33}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    expect_foreign_routes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--short", action="store_true", help="a tenth of the grid, 5 repeats")
    parser.add_argument("--no-check", action="store_true", help="measure what may be inexact")
    parser.add_argument("--profile", action="store_true", help="operations of replay and native")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=90.0, help="on a GPU, of all tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with megatron_on(args.device):
        if args.profile:
            for routing in ROUTINGS:
                profile(routing, args.tokens, args.repeats)
            return
        if not args.no_check:
            print(f"{check(0.1 if args.short else 1.0, args.device)} cases are exact")
        repeats = 5 if args.short else args.repeats
        if args.device.type == "cuda":
            table: Any = on_gpu(args.device, repeats, args.seconds)
        else:
            table = run(args.tokens, repeats)
            show(table)
    if args.json:
        figures = {"versions": versions(), "router": table}
        args.json.write_text(json.dumps(figures, default=vars, indent=1) + "\n")


if __name__ == "__main__":
    main()
