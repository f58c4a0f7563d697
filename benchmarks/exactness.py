"""What is measured is exact, or it is not measured: every kind of router call against an oracle.

The grid: score functions x scores with ties or without x no grad, grad and every checkpoint x rows
without routes x measure x the model's own routes or others. Of each call:

* a row with routes takes these experts; a row without takes Megatron's own choice on the same
  input, ties included; a recompute takes what its forward took;
* the model's own routes, their columns in another order, measured: every gate weight and gradient
  is stock Megatron's, to the bit;
* other routes: gate weights and gradients are those of `stack.Forced`, to the bit where scores do
  not tie and nothing is recomputed, else to rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from device import CPU
from stack import CHECKPOINTS, ROUTINGS, Forced, Nest, Stack, random_routes

import r3patch
from r3patch import Routes

LENGTH, BATCH, LAYERS, EXPERTS, TOPK = 25, 2, 2, 16, 4
TOKENS = LENGTH * BATCH
GAPS = (0.0, 0.02, 0.5, 1.0)

MODES: dict[str, tuple[Nest, ...]] = {
    "no grad": (0, 1),
    "grad": (0, 1),
    **{kind: ((kind, (0, 1)),) for kind in CHECKPOINTS},
    "R in N": (("N", (0, ("R", (1,)))),),
    "N in R": (("R", (0, ("N", (1,)))),),
}


class InexactError(Exception):
    """A case of the grid that is not as wanted."""


class Call(NamedTuple):
    """One router call. Its tensors are kept as they are: a copy would be one operation more."""

    layer: int
    in_backward: bool
    grad: bool
    input: torch.Tensor
    routing_map: torch.Tensor


class Result(NamedTuple):
    output: torch.Tensor
    gradients: dict[str, torch.Tensor]
    calls: list[Call]


def check(fraction: float = 1.0, device: torch.device = CPU) -> int:
    """Check the grid, or a fraction of it; how many cases that were.

    Raises:
        InexactError: at the first case that is not exact.
    """
    draw = random.Random(0)  # noqa: S311 - a choice of cases, no secret
    count = 0
    for routing, ties in itertools.product(ROUTINGS, (False, True)):
        stack, twin = (_stack(routing, ties=ties).to(device) for _ in range(2))
        x = torch.randn(LENGTH, BATCH, stack.config.hidden_size, generator=_generator())
        x = ((x * 2).round() / 2 if ties else x).to(device)
        for mode, gaps, measure, source in itertools.product(
            MODES, GAPS, (False, True), ("own", "other")
        ):
            if draw.random() >= fraction:
                continue
            case: dict[str, Any] = {
                "mode": mode,
                "gaps": gaps,
                "measure": measure,
                "source": source,
                "ties": ties,
            }
            try:
                _check(stack, twin, x, **case)
            except Exception as error:
                text = f"{routing}, {case}: {type(error).__name__}: {error}"
                raise InexactError(text) from error
            count += 1
    return count


def _check(
    stack: Stack,
    twin: Stack,
    x: torch.Tensor,
    *,
    mode: str,
    gaps: float,
    measure: bool,
    source: str,
    ties: bool,
) -> None:
    routes = random_routes(stack.layers, TOKENS, experts=EXPERTS, topk=TOPK, seed=5, gaps=gaps)
    stock = _run(twin, x, mode)
    if source == "own":
        maps = [call.routing_map.cpu() for call in stock.calls[:LAYERS]]
        own = torch.stack([m.nonzero()[:, 1].view(TOKENS, TOPK) for m in maps], dim=1)
        routes = Routes(own, routes.layers, routes.valid, num_experts=EXPERTS)
    with r3patch.replay(stack, [routes], measure=measure):
        got = _run(stack, x, mode)
    _check_maps(got.calls, routes, twin, recomputed=mode not in ("grad", "no grad"))
    if source == "own" and measure:
        _check_values(got, stock, bits=True)
        return
    with _forced(twin, routes):
        wanted = _run(twin, x, mode if mode == "no grad" else "grad")
    _check_values(got, wanted, bits=mode == "grad" and not ties)


def _run(stack: Stack, x: torch.Tensor, mode: str) -> Result:
    """One forward, and backward: what came out and which calls the routers got."""
    stack.nest = MODES[mode]
    calls: list[Call] = []
    with _noting(stack, calls), torch.set_grad_enabled(mode != "no grad"):
        output = stack(x)
        stack.hidden = []
        if mode != "no grad":
            output.square().sum().backward()
    gradients = {n: p.grad for n, p in stack.named_parameters() if p.grad is not None}
    stack.zero_grad()
    return Result(output.detach(), gradients, calls)


@contextlib.contextmanager
def _noting(stack: Stack, calls: list[Call]) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for index, router in enumerate(stack.routers):

            def note(module: Any, args: Any, output: Any, index: int = index) -> None:
                in_backward = torch._C._current_graph_task_id() != -1
                calls.append(Call(index, in_backward, torch.is_grad_enabled(), args[0], output[1]))

            undo.callback(router.register_forward_hook(note).remove)
        yield


@contextlib.contextmanager
def _forced(stack: Stack, routes: Routes) -> Iterator[None]:
    for router in stack.routers:
        router.router_replay = Forced(routes, router.layer_number)
    try:
        yield
    finally:
        for router in stack.routers:
            router.router_replay = None


def _check_maps(calls: list[Call], routes: Routes, twin: Stack, *, recomputed: bool) -> None:
    forwards: dict[int, torch.Tensor] = {}
    repeats = 0
    for call in calls:
        if call.in_backward:
            repeats += 1
            _same(call.routing_map, forwards[call.layer], f"the recompute of layer {call.layer}")
            continue
        with torch.set_grad_enabled(call.grad):
            _, own = twin.routers[call.layer](call.input)
        ids = routes.experts[:, call.layer].long().to(own.device)
        given = torch.zeros_like(own).scatter(1, ids, True)
        valid = routes.mask[:, call.layer].to(own.device)
        wanted = torch.where(valid.unsqueeze(1), given, own)
        _same(call.routing_map, wanted, f"the map of layer {call.layer}")
        forwards[call.layer] = call.routing_map
    if len(forwards) != LAYERS or (repeats > 0) != recomputed:
        raise AssertionError(f"{len(forwards)} layers were called and {repeats} calls repeated")


def _same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    wrong = int((got != wanted).any(dim=1).sum())
    if wrong:
        raise AssertionError(f"{what} differs in {wrong} of {TOKENS} rows")


def _check_values(got: Result, wanted: Result, *, bits: bool) -> None:
    rtol, atol = (0.0, 0.0) if bits else (1e-4, 1e-5)
    torch.testing.assert_close(got.output, wanted.output, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.gradients, wanted.gradients, rtol=rtol, atol=atol)


def _stack(routing: str, *, ties: bool) -> Stack:
    stack = Stack(routing, LAYERS, num_moe_experts=EXPERTS, moe_router_topk=TOPK)
    if ties:
        with torch.no_grad():
            for router in stack.routers:
                router.weight.copy_((router.weight * 4).round() / 4)
                if router.expert_bias is not None:
                    router.expert_bias.zero_()
    return stack


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
