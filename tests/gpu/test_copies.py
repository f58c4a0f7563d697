"""What travels between host and device without blocking arrives whole, however busy streams are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from card import keep_busy
from stack import Stack, random_routes

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron")]

TOKENS, LAYERS, EXPERTS, TOPK = 4096, 3, 16, 4
MANY = 64  # microbatches: more than what is kept of them on the device


def inputs(stack: Stack, device: torch.device, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, TOKENS, 1, stack.config.hidden_size)
    return list(torch.randn(shape, generator=generator).to(device).unbind(0))


def noted(stack: Stack) -> list[torch.Tensor]:
    """The maps of every call of a router from now on, on the device."""
    maps: list[torch.Tensor] = []
    for router in stack.routers:
        router.register_forward_hook(lambda module, args, output: maps.append(output[1].clone()))
    return maps


def as_routes(maps: list[torch.Tensor]) -> list[Routes]:
    """The maps of whole forwards, layer after layer, as recorded routes."""
    ids = [each.nonzero()[:, 1].view(TOKENS, TOPK).cpu() for each in maps]
    layers = range(1, LAYERS + 1)
    forwards = [ids[i : i + LAYERS] for i in range(0, len(ids), LAYERS)]
    return [Routes(torch.stack(each, 1), layers, num_experts=EXPERTS) for each in forwards]


def assert_same_sets(got: list[Routes], want: list[Routes]) -> None:
    assert len(got) == len(want)
    wrong = [
        number
        for number, (one, other) in enumerate(zip(got, want, strict=True))
        if not torch.equal(one.experts.sort(-1).values, other.experts.sort(-1).values)
    ]
    assert not wrong


def streams(count: int) -> list[Any]:
    return [torch.cuda.Stream() for _ in range(count)]


@pytest.mark.parametrize("kind", ["", "R", "N"])
def test_a_record_behind_a_busy_stream(kind: str, device: torch.device) -> None:
    """Ids that are dropped on the device before their copy has run are recorded all the same."""
    stack = Stack("softmax", LAYERS).to(device)
    stack.nest = ((kind, (0, 1, 2)),) if kind else stack.nest
    xs, maps = inputs(stack, device, MANY), noted(stack)
    with r3patch.record(stack) as recording:
        keep_busy()
        for x in xs:
            stack(x).sum().backward() if kind else stack(x)
            torch.empty(TOKENS * TOPK, dtype=torch.uint8, device=device).fill_(255)
    forwards = maps
    if kind:  # each forward and its recompute, layer after layer
        parts = [maps[i : i + 2 * LAYERS] for i in range(0, len(maps), 2 * LAYERS)]
        forwards = [each for part in parts for each in part[:LAYERS]]
    assert_same_sets(recording.routes, as_routes(forwards))


def test_a_record_on_several_streams(device: torch.device, on_card: None) -> None:
    """Forwards on three streams that do not wait for one another."""
    stack = Stack("softmax", LAYERS).to(device)
    xs, maps = inputs(stack, device, MANY), noted(stack)
    sides = streams(3)
    torch.cuda.synchronize()
    with r3patch.record(stack) as recording:
        for number, x in enumerate(xs):
            with torch.cuda.stream(sides[number % 3]):
                keep_busy(1 + number % 3)
                stack(x)
    torch.cuda.synchronize()
    assert_same_sets(recording.routes, as_routes(maps))


@pytest.mark.parametrize("sides", [0, 1, 3])
def test_many_microbatches_behind_a_busy_stream(sides: int, device: torch.device) -> None:
    """Host rows whose session has let them go are not reused before their copy has run."""
    if sides and device.type == "cpu":
        pytest.skip("a CPU has no streams")
    stack = Stack("softmax", LAYERS).to(device)
    xs, maps = inputs(stack, device, 4), noted(stack)
    layers = range(1, LAYERS + 1)
    rows = [
        random_routes(layers, TOKENS, experts=EXPERTS, topk=TOPK, seed=seed) for seed in range(MANY)
    ]
    on: list[Any] = streams(sides) if sides else [None]
    if device.type == "cuda":
        torch.cuda.synchronize()
    with r3patch.replay(stack) as session:
        keep_busy()
        for number, routes in enumerate(rows):
            session.feed(routes)
            with torch.cuda.stream(on[number % len(on)]):
                if sides:
                    keep_busy(1 + number % 3)
                stack(xs[number % 4])
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert_same_sets(as_routes(maps), rows)


def test_routers_of_a_microbatch_on_streams_of_their_own(
    device: torch.device, on_card: None
) -> None:
    """The rows travel on the first router's stream, which is busy; the others wait for them."""
    stack = Stack("softmax", LAYERS).to(device)
    xs, maps = inputs(stack, device, 1), noted(stack)
    rows = [
        random_routes(stack.layers, TOKENS, experts=EXPERTS, topk=TOPK, seed=seed)
        for seed in range(MANY)
    ]
    sides = streams(LAYERS)
    torch.cuda.synchronize()
    with r3patch.replay(stack) as session, torch.no_grad():
        for number, routes in enumerate(rows):
            session.feed(routes)
            for layer, router in enumerate(stack.routers):
                with torch.cuda.stream(sides[(number + layer) % LAYERS]):
                    if layer == 0:
                        keep_busy(5)
                    router(xs[0])
    torch.cuda.synchronize()
    assert_same_sets(as_routes(maps), rows)


@pytest.mark.parametrize("kind", ["R", "N", "M"])
def test_a_recompute_copies_old_rows_again(kind: str, device: torch.device) -> None:
    """Eight forwards, then their backwards from the first on: more rows than the device keeps."""
    stack = Stack("softmax", LAYERS).to(device)
    stack.nest = ((kind, (0, 1, 2)),)
    xs, maps = inputs(stack, device, 8), noted(stack)
    layers = range(1, LAYERS + 1)
    rows = [
        random_routes(layers, TOKENS, experts=EXPERTS, topk=TOPK, seed=seed, gaps=0.1)
        for seed in range(8)
    ]
    with r3patch.replay(stack, rows):
        keep_busy()
        losses = [stack(x).sum() for x in xs]
        for loss in losses:
            keep_busy(1)
            loss.backward()
    forwards, repeats = maps[: 8 * LAYERS], maps[8 * LAYERS :]
    assert len(repeats) == len(forwards)
    for number, routes in enumerate(rows):
        valid = routes.mask[:, 0].to(device)
        part = slice(number * LAYERS, (number + 1) * LAYERS)
        for layer, (first, again) in enumerate(zip(forwards[part], repeats[part], strict=True)):
            assert torch.equal(first, again)
            ids = routes.experts[:, layer].long().to(device)
            want = torch.zeros_like(first).scatter(1, ids, True)
            assert torch.equal(first[valid], want[valid])
