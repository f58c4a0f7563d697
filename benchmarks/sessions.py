"""What a session costs beside its router calls: entering, growing, memory, copies, a whole step.

    python benchmarks/sessions.py [--short] [--json FILE]
    python benchmarks/sessions.py --soak 10000     # sessions in one process: does anything grow?
    python benchmarks/sessions.py --device cuda    # entering, a call's launch, a step, peaks

Times are ratios within one run (timing.py says how they are taken); bytes and counts are exact.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from device import CPU, add_device, megatron_on
from stack import Nest, Stack, expect_foreign_routes, random_routes
from timing import Variant, computing, keep_freed_memory, launching, measure, passing, ratio
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import r3patch
from r3patch import Layout, Routes, testing
from r3patch.sessions._tokens import TokenWatch

EXPERTS, TOPK = 64, 8
Figures = dict[str, float]


def _stack(layers: int, *, first: int = 1, total: int = 0, recompute: bool = False) -> Stack:
    stack = Stack(
        "softmax", layers, first=first, total=total, num_moe_experts=EXPERTS, moe_router_topk=TOPK
    )
    if recompute:
        nest: list[Nest] = [("R", (layer,)) for layer in range(layers)]
        stack.nest = tuple(nest)
    return stack


def _routes(stack: Stack, tokens: int, gaps: float = 0.01) -> Routes:
    return random_routes(stack.layers, tokens, experts=EXPERTS, topk=TOPK, seed=0, gaps=gaps)


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: part.to(device) for name, part in batch.items()}


def _backward(stack: Stack, x: torch.Tensor) -> None:
    stack(x).sum().backward()
    stack.hidden = []


# Entering and leaving


def walks(layers: int, experts: int, repeats: int, device: torch.device = CPU) -> Figures:
    """Enter + exit of a session with one tiny microbatch, in walks of ``model.modules()``."""
    (model,) = testing.tiny_model(
        num_layers=layers,
        moe_layer_freq=[1] * layers,
        num_moe_experts=experts,
        moe_router_topk=2,
        mtp_num_layers=None,
        multi_latent_attention=False,
    )
    model.to(device)
    (batch,) = testing.random_batches(num_microbatches=1, micro_batch_size=1, seq_length=2)
    batch = _on(device, batch)
    numbers = [info.layer_number for info in r3patch.routers(model, "main")]
    routes = random_routes([n or 0 for n in numbers], 2, experts=experts, topk=2, seed=0)
    ratios = []
    for number in range(repeats + 2):
        session = r3patch.replay(model, [routes])
        begin = time.thread_time()
        session.__enter__()
        entered = time.thread_time() - begin
        with torch.no_grad():
            model(**batch)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.thread_time()
        session.__exit__(None, None, None)
        left = time.thread_time() - begin
        begin = time.thread_time()
        modules = sum(1 for _ in model.modules())
        if number >= 2:
            ratios.append((entered + left) / (time.thread_time() - begin))
    return {"modules": modules, "walks": statistics.median(ratios)}


# Growth


def growth(repeats: int, scale: int) -> dict[str, list[float]]:
    """Time of a whole step per unit, relative to the smallest size: flat or falling is linear."""
    base = {"layers": 4, "tokens": 64 * scale, "microbatches": 2, "chunks": 1}
    found = {}
    for what, size in base.items():
        steps = {n: _step(**{**base, what: size * n}) for n in (1, 2, 4, 8)}
        found[what] = _per_unit(steps, repeats)
    layout = Layout(pad_to_multiple=8)
    sample = _routes(_stack(8), 32 * scale)
    places: dict[int, Callable[[], object]] = {
        n: lambda n=n: layout.place([sample] * (4 * n))  # type: ignore[misc]
        for n in (1, 2, 4, 8)
    }
    found["samples (Layout.place)"] = _per_unit(places, repeats)
    return found


def _step(*, layers: int, tokens: int, microbatches: int, chunks: int) -> Callable[[], object]:
    """Enter, forward and backward of all microbatches through all chunks, leave."""
    stacks = [_stack(layers, first=1 + c * layers, total=layers * chunks) for c in range(chunks)]
    every = range(1, 1 + layers * chunks)
    routes = random_routes(every, tokens, experts=EXPERTS, topk=TOPK, seed=0, gaps=0.01)
    x = torch.randn(tokens, 1, stacks[0].config.hidden_size)

    def step() -> None:
        with r3patch.replay(stacks, [routes] * microbatches):
            for _ in range(microbatches):
                for stack in stacks:
                    _backward(stack, x)

    return step


def _per_unit(steps: dict[int, Callable[[], object]], repeats: int) -> list[float]:
    seconds = measure({str(n): Variant(step) for n, step in steps.items()}, repeats, warmup=1)
    smallest, *_ = steps
    return [ratio(seconds[str(n)], seconds[str(smallest)]).median / n for n in steps]


# Bytes


def kept(tokens: int, layers: int, *, measured: bool, microbatches: int = 4) -> Figures:
    """Bytes of tensors that a session holds for each microbatch that has had its backward."""
    stack, model = _stack(layers, recompute=True), _stack(layers)
    routes = _routes(stack, tokens)
    x = torch.randn(tokens, 1, stack.config.hidden_size)
    found: Figures = {}
    before = _alive()
    with r3patch.replay(stack, measure=measured) as session:
        alive = []
        for _ in range(microbatches):
            session.feed(routes)
            _backward(stack, x)
            stack.zero_grad()
            alive.append(_alive())
        found["per finished microbatch"] = _each(alive)
        found["while open"] = alive[-1] - before
    _ = session.stats
    found["after exit"] = _alive() - before
    with r3patch.replay(model, measure=measured) as session, torch.no_grad():
        alive = []
        for _ in range(microbatches):
            session.feed(routes)
            model(x)
            model.hidden = []
            alive.append(_alive())
        found["per scored microbatch, no grad"] = _each(alive)
    return found


def _each(alive: list[int]) -> float:
    """The growth per microbatch from the second on: the rows of the last two stay on the device."""
    return (alive[-1] - alive[1]) / (len(alive) - 2)


def _alive() -> int:
    """Bytes of all storages that a tensor known to Python holds."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peaks(tokens: int, layers: int, modes: Sequence[str], device: torch.device = CPU) -> Figures:
    """What a session adds to the peak of stock Megatron, in bytes per id of the microbatch."""
    found = {mode: _peak(mode, tokens, layers, device) for mode in ("stock", *modes)}
    ids = tokens * layers * TOPK
    return {mode: (found[mode] - found["stock"]) / ids for mode in modes} | {
        "stock, bytes": found["stock"],
        "ids": ids,
    }


def _peak(mode: str, tokens: int, layers: int, device: torch.device) -> int:
    """Peak bytes of a forward and backward of one microbatch, each layer recomputed."""
    stack = _stack(layers, recompute=True).to(device)
    x = torch.randn(tokens, 1, stack.config.hidden_size, device=device)
    routes = _routes(stack, tokens)

    def step() -> None:
        if mode == "stock":
            _backward(stack, x)
        elif mode == "native":
            with _native(stack, routes):
                _backward(stack, x)
        else:
            with r3patch.replay(stack, [routes], measure=mode == "measure"):
                _backward(stack, x)

    if device.type == "cuda":
        step()  # what a first step makes and keeps
        stack.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(int(event.nbytes()) for event in memory))


@contextlib.contextmanager
def _native(stack: torch.nn.Module, routes: Routes) -> Iterator[None]:
    """Megatron's RouterReplay as frameworks drive it: int64 targets, again for recompute."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    routers = [info.module for info in r3patch.routers(stack, "main")]
    replays = [RouterReplay() for _ in routers]
    for index, (router, replay) in enumerate(zip(routers, replays, strict=True)):
        ids = routes.experts[:, index].long()
        replay.set_target_indices(ids.to(router.weight.device, non_blocking=True))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        router.router_replay = replay
    yield
    for router, replay in zip(routers, replays, strict=True):
        router.router_replay = None
        RouterReplay.global_router_replay_instances.remove(replay)


# Counts


class _Calls(TorchFunctionMode):
    """Copies to a device that are asked for: on a CPU they are none, but the call is the same.

    A call that names a dtype, too, is a cast of what is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = (*args[1:], *(kwargs or {}).values())
        moves = func in (torch.Tensor.to, torch.Tensor.cuda)
        moves = moves and not any(isinstance(v, torch.dtype) for v in values)
        self.copies += moves and any(isinstance(v, (torch.device, str)) for v in values)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Operations after which the host knows a value, for which a device makes it wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def counts(microbatches: int = 4, chunks: int = 2, layers: int = 3) -> Figures:
    """Host bytes per id, copies per microbatch and chunk, and waits in forward and backward."""
    tokens = 256
    stacks = [
        _stack(layers, first=1 + c * layers, total=layers * chunks, recompute=True)
        for c in range(chunks)
    ]
    every = range(1, 1 + layers * chunks)
    routes = random_routes(every, tokens, experts=EXPERTS, topk=TOPK, seed=0, gaps=0.1)
    x = torch.randn(tokens, 1, stacks[0].config.hidden_size)

    def step() -> None:
        for _ in range(microbatches):
            for stack in stacks:
                _backward(stack, x)

    stock = _copies_and_waits(step)
    before = _alive()
    with r3patch.replay(stacks, [routes] * microbatches, measure=False):
        host = _alive() - before
        replay = _copies_and_waits(step)
    calls = microbatches * chunks
    checked = _counts_with_tokens(microbatches, tokens)
    return {
        "host bytes per id": host / (microbatches * routes.experts.numel()),
        "copies per microbatch and chunk": (replay[0] - stock[0]) / calls,
        "waits per microbatch and chunk": (replay[1] - stock[1]) / calls,
        "copies, tokens checked": checked[0] / microbatches,
        "waits, tokens checked": checked[1] / microbatches,
    }


def _counts_with_tokens(microbatches: int, length: int) -> tuple[int, int]:
    """Copies and waits of a whole model, which has an embedding: beyond those of stock."""
    (model,) = testing.tiny_model(
        num_layers=3,
        moe_layer_freq=[1] * 3,
        mtp_num_layers=None,
        multi_latent_attention=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    batches = testing.random_batches(
        num_microbatches=microbatches, micro_batch_size=1, seq_length=length
    )
    rows = random_routes(range(1, 4), length, experts=EXPERTS, topk=TOPK, seed=0, gaps=0.1)
    testing.train_step([model], batches)  # the first step of a model copies what it keeps
    stock = _copies_and_waits(lambda: testing.train_step([model], batches))
    with r3patch.replay(model, _with_tokens(rows, batches)) as session, _read_at_exit():
        replay = _copies_and_waits(lambda: testing.train_step([model], batches))
    if not all(check.checked for check in session.stats.token_checks):
        raise AssertionError(f"no tokens were compared: {session.stats.token_checks}")
    return replay[0] - stock[0], replay[1] - stock[1]


def _copies_and_waits(step: Callable[[], object]) -> tuple[int, int]:
    with _Calls() as calls, _Operations() as operations:
        step()
    return calls.copies, operations.waits.total()


@contextlib.contextmanager
def _read_at_exit() -> Iterator[None]:
    """Comparisons of tokens are read at once on a CPU; on a device later, as here."""
    with mock.patch.object(TokenWatch, "_settle"):
        yield


def _with_tokens(routes: Routes, batches: Sequence[Any]) -> list[Routes]:
    """The routes for each batch, as rows of its tokens."""
    return [
        Routes(
            routes.experts,
            routes.layers,
            routes.valid,
            num_experts=routes.num_experts,
            tokens=batch["input_ids"][0].to(torch.int32),
        )
        for batch in batches
    ]


# A call, and a step


def calls(
    repeats: int, tokens: int = 16, layers: int = 8, device: torch.device = CPU
) -> dict[str, Figures]:
    """A router's forward and backward of few tokens: microseconds above stock, and the ratio.

    The routers of a chunk of some layers, one after the other: a microbatch's own cost (its copy
    to the device, say) is shared by them, as in a model.
    """
    x = torch.randn(tokens, 1, 32).to(device)
    gradient = torch.randn(tokens, EXPERTS).to(device)

    def variant(stack: Stack, prepare: Callable[[], object] = lambda: None) -> Variant:
        def step() -> None:
            for router in stack.routers:
                probs, _map = router(x)
                probs.backward(gradient)

        return Variant(step, prepare)

    native = _stack(layers).to(device)
    full = _routes(native, tokens, 0.0)
    variants = {"stock": variant(_stack(layers).to(device)), "native": variant(native)}
    with contextlib.ExitStack() as sessions:
        sessions.enter_context(_native(native, full))
        for name, gaps, measured in (
            ("replay", 0.0, False),
            ("replay, gaps", 0.125, False),
            ("measure, gaps", 0.125, True),
        ):
            stack = _stack(layers).to(device)
            session = sessions.enter_context(r3patch.replay(stack, measure=measured))
            rows = _routes(stack, tokens, gaps)
            variants[name] = variant(stack, functools.partial(session.feed, rows))
        clock = computing if device.type == "cpu" else launching
        seconds = measure(variants, repeats, clock=clock)
    stock = statistics.median(seconds["stock"]) / layers
    found = {}
    for name in variants:
        times = ratio(seconds[name], seconds["stock"]).median
        found[name] = {"ratio": times, "microseconds above stock": (times - 1) * stock * 1e6}
    return found


#: Fields of the model of `step`, and the tokens of each of its two microbatches.
_SMALL: tuple[dict[str, Any], int] = (
    {
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "moe_ffn_hidden_size": 128,
        "moe_shared_expert_intermediate_size": 128,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
    },
    256,
)
_OF_GPU: tuple[dict[str, Any], int] = (
    {
        "hidden_size": 1024,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 8,
        "moe_ffn_hidden_size": 256,
        "moe_shared_expert_intermediate_size": 256,
        "num_moe_experts": 32,
        "moe_router_topk": 8,
        "moe_router_dtype": "fp32",
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
    },
    4096,
)


def step(
    repeats: int, device: torch.device = CPU, limit: float = float("inf")
) -> dict[str, list[float]]:
    """A whole step of a small MoE model to the same with native replay: quartiles and median."""
    (fields, length), microbatches = _SMALL if device.type == "cpu" else _OF_GPU, 2
    experts, topk = fields["num_moe_experts"], fields["moe_router_topk"]

    def build() -> Any:
        (model,) = testing.tiny_model(
            num_layers=4,
            moe_layer_freq=[1] * 4,
            mtp_num_layers=None,
            multi_latent_attention=False,
            max_sequence_length=max(512, length),
            **fields,
        )
        testing.seed_parameters(model)
        return model.to(device, fields.get("params_dtype", torch.float32))

    batches = [
        _on(device, batch)
        for batch in testing.random_batches(
            num_microbatches=microbatches, micro_batch_size=1, seq_length=length
        )
    ]
    routes = random_routes(range(1, 5), length, experts=experts, topk=topk, seed=0, gaps=0.01)
    full = random_routes(range(1, 5), length, experts=experts, topk=topk, seed=0)

    def live() -> Variant:
        model = build()
        return Variant(lambda: testing.train_step([model], batches))

    def native() -> Variant:
        model = build()

        def step() -> None:
            with _native(model, full):
                testing.train_step([model], batches)

        return Variant(step)

    def replay(rows: list[Routes], **options: Any) -> Variant:
        model = build()

        def step() -> None:
            with r3patch.replay(model, rows, **options):
                testing.train_step([model], batches)

        return Variant(step)

    variants = {
        "native": native(),
        "native, once more": native(),  # the same again: what the clock cannot tell apart
        "live": live(),
        "replay": replay([full] * microbatches),
        "replay, 1 % gaps": replay([routes] * microbatches),
        "replay, 1 % gaps, tokens checked": replay(_with_tokens(routes, batches)),
        "measure, 1 % gaps": replay([routes] * microbatches, measure=True),
    }
    clock = computing if device.type == "cpu" else passing
    seconds = measure(variants, repeats, clock=clock, limit=limit)
    found = {name: ratio(seconds[name], seconds["native"]) for name in variants}
    if device.type == "cuda":
        spent = statistics.median(seconds["native"]) * 1000
        print(f"  native replay's step: {spent:.1f} ms, of {len(seconds['native'])} rounds")
    return {name: [one.low, one.median, one.high] for name, one in found.items()}


# Soak


def soak(sessions: int) -> Iterator[tuple[int, int, int, int]]:
    """Sessions done, resident bytes, objects, hooks: eleven times over the run."""
    stack = _stack(2, recompute=True)
    routes = _routes(stack, 16, gaps=0.1)
    x = torch.randn(16, 1, stack.config.hidden_size)
    for number in range(sessions + 1):
        if number % max(1, sessions // 10) == 0:
            gc.collect()
            hooks = sum(
                len(hook)
                for module in stack.modules()
                for name, hook in vars(module).items()
                if name.endswith("_hooks")
            )
            yield number, _resident(), len(gc.get_objects()), hooks
        kind = number % 3
        with contextlib.suppress(ZeroDivisionError):
            if kind == 0:
                with r3patch.record(stack):
                    _backward(stack, x)
            else:
                with r3patch.replay(stack, [routes], measure=kind == 1):
                    _backward(stack, x)
                    if number % 7 == 0:
                        raise ZeroDivisionError  # a session that an exception leaves
        stack.zero_grad()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# Printing


def run(*, short: bool) -> dict[str, Any]:
    """All figures, printed as they come."""
    repeats = 3 if short else 15
    tokens, layers = (1024, 6) if short else (8192, 58)
    shapes = [(6, 8)] if short else [(61, 8), (61, 32)]
    modes = ("replay",) if short else ("native", "replay", "measure")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "enter + exit": lambda: {f"{n} x {e} experts": walks(n, e, repeats) for n, e in shapes},
        "time per unit": lambda: growth(repeats, scale=1 if short else 8),
        "a call of 16 tokens": lambda: calls(repeats * 10),
        "a step, to native replay": lambda: step(repeats),
        "counts": counts,
        "bytes kept": lambda: kept(tokens, layers, measured=False),
        "bytes kept, measured": lambda: kept(tokens, layers, measured=True),
        "peak, bytes per id above stock": lambda: peaks(4 * tokens, layers, modes),
    }
    return _run(parts)


def on_gpu(device: torch.device, limit: float, *, short: bool) -> dict[str, Any]:
    """What is another on a GPU, printed as it comes; a step's rounds end after `limit` seconds."""
    repeats, layers = (3, 6) if short else (15, 58)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "a step, to native replay": lambda: step(repeats * 3, device, limit),
        "launching a call of 16 tokens": lambda: calls(repeats * 10, device=device),
        "peak, bytes per id above stock": lambda: peaks(
            32768, layers, ("native", "replay", "measure"), device
        ),
        "enter + exit": lambda: {"61 x 8 experts": walks(61, 8, repeats, device)},
    }
    return _run(parts)


def _run(parts: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    found = {}
    for title, part in parts.items():
        try:
            found[title] = part()
        except Exception as error:
            print(f"\n{title}: {type(error).__name__}: {error}", flush=True)
            if not torch.cuda.is_available():
                raise
            continue  # a card is at hand for minutes: the other figures are wanted all the same
        _show(title, found[title])
    return found


def _show(title: str, figures: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in figures.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {_number(number)}" for key, number in value.items())
        else:
            text = "  ".join(map(_number, value)) if isinstance(value, list) else _number(value)
        print(f"  {name:34}{text}", flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def main() -> None:
    expect_foreign_routes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few repeats, small sizes")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--soak", type=int, metavar="N", help="N sessions, and nothing else")
    parser.add_argument("--seconds", type=float, default=30.0, help="on a GPU, of the steps")
    add_device(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with megatron_on(args.device):
        if args.soak:
            print(f"{'sessions':>10}{'MB':>8}{'objects':>10}{'hooks':>7}")
            for number, resident, objects, hooks in soak(args.soak):
                print(f"{number:10}{resident / 1e6:8.1f}{objects:10}{hooks:7}", flush=True)
        else:
            keep_freed_memory()
            found = (
                on_gpu(args.device, args.seconds, short=args.short)
                if args.device.type == "cuda"
                else run(short=args.short)
            )
            if args.json:
                Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
