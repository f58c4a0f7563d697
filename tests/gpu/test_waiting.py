"""Nothing that a session adds to forward and backward waits for the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from card import DTYPES, batch, build, keep_busy, waits
from stack import ROUTINGS, Stack, random_routes

import r3patch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron")]

TOKENS, LAYERS = 512, 2
SESSIONS: dict[str, dict[str, Any]] = {
    "stock": {},
    "replay": {"gaps": 0.0},
    "gaps": {"gaps": 0.1},
    "every row a gap": {"gaps": 1.0},
    "spread": {"gaps": 0.1, "missing": "spread"},
    "measure": {"gaps": 0.0, "measure": True},
    "measure and gaps": {"gaps": 0.1, "measure": True},
}


@pytest.mark.parametrize("nest", [(0, 1), (("R", (0, 1)),), (("N", (0, 1)),), (("M", (0, 1)),)])
@pytest.mark.parametrize("kind", [*SESSIONS, "record"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_routers_calls_wait_for_nothing(
    routing: str, kind: str, nest: Any, device: torch.device
) -> None:
    """Feed, forward, backward and recompute of real routers, while waiting is an error."""
    stack = Stack(routing, LAYERS).to(device)
    stack.nest = nest
    x = torch.randn(TOKENS, 1, stack.config.hidden_size, device=device)
    options = dict(SESSIONS.get(kind, {}))
    gaps = options.pop("gaps", 0.0)
    rows = [
        random_routes(stack.layers, TOKENS, experts=16, topk=4, seed=seed, gaps=gaps)
        for seed in range(3)
    ]
    session: Any = contextlib.nullcontext()
    if kind == "record":
        session = r3patch.record(stack)
    elif kind != "stock":
        session = r3patch.replay(stack, **options)

    def step(number: int) -> None:
        if kind in SESSIONS and kind != "stock":
            session.feed(rows[number])
        stack(x).sum().backward()

    with session:
        step(0)
        with waits("error"):
            step(1)
            step(2)


def test_a_wait_is_noticed(device: torch.device, on_card: None) -> None:
    """The test above can fail: reading a number of the device raises."""
    one = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match="synchroniz"), waits("error"):
        one.item()
    with waits() as found:
        one.item()
    assert len(found) == 1


@pytest.mark.parametrize("recompute", [{}, tiny.FULL, tiny.SELECTIVE], ids=["no", "full", "moe"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16_router_fp32"])
def test_a_whole_step_waits_as_often_as_stock(
    dtype: str, recompute: Any, device: torch.device
) -> None:
    """Stock Megatron's dispatcher waits; a session with token check and alarm adds nothing."""
    model, data = build(**DTYPES[dtype], **recompute), [batch(1), batch(2)]
    routes = [
        tiny.with_tokens(tiny.with_gaps(tiny.random_routes(model, 10 + seed)), seed)
        for seed in (1, 2)
    ]

    def step(before: Callable[[int], None] = lambda number: None) -> None:
        for number, each in enumerate(data):
            before(number)
            model(**each).mean().backward()

    def count(session: Any, before: Callable[[int], None] = lambda number: None) -> list[str]:
        with session, waits() as found:
            step(before)
        return found

    step()  # what a first step makes and keeps
    stock = count(contextlib.nullcontext())
    assert len(count(contextlib.nullcontext())) == len(stock)
    if device.type == "cuda":
        assert stock, "a dispatcher that reads the tokens of each expert waits, and none was seen"
    for options in ({}, {"measure": True}, {"missing": "spread"}, {"tokens": "strict"}):
        session = r3patch.replay(model, **options)

        def feed(number: int, session: Any = session) -> None:
            session.feed(routes[number])

        got = count(session, feed)
        assert len(got) == len(stock), (options, sorted(set(got) - set(stock)))
        (check,) = session.stats.token_checks
        assert (check.checked, check.wrong) == (2 * math.ceil(tiny.TOKENS * 2 / 3), 0)
    got = count(r3patch.record(model))
    assert len(got) == len(stock), sorted(set(got) - set(stock))


def test_a_forward_returns_before_the_device_has_run_it(
    device: torch.device, on_card: None
) -> None:
    """Behind a busy stream a router's forward and backward return while it is still busy."""
    stack = Stack("sigmoid_bias", LAYERS).to(device)
    x = torch.randn(TOKENS, 1, stack.config.hidden_size, device=device)
    rows = random_routes(stack.layers, TOKENS, experts=16, topk=4, seed=0, gaps=0.1)
    with r3patch.replay(stack, measure=True) as session:
        for busy in (False, True):
            session.feed(rows)
            torch.cuda.synchronize()
            event = torch.cuda.Event()
            if busy:
                keep_busy(500)
            event.record()
            stack(x).sum().backward()
            running = not event.query()
            torch.cuda.synchronize()
    assert running
